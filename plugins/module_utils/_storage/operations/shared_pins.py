# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The names that keep an image of the real store after its other names were removed."""

from __future__ import annotations

# The tag is the ID of the image. The name is kept as long as users' containers need the image.
PIN = "localhost/userns-storage/shared"
