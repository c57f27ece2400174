# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The names by which an image of the real store of shared images outlives its other names."""

from __future__ import annotations

# The ID of the image follows as the tag. It stays as long as users' containers need the image.
PIN = "localhost/userns-storage/shared"
