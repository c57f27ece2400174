# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which layers runtimes have mounted: RUNROOT/DRIVER-layers/mountpoints.json of containers/storage."""

from __future__ import annotations

import json
import os
import typing as t

from ..errors import StoreError
from ..kernel import files
from ..kernel.oserrors import translate_oserror
from .config import StoreConfig

_LONGEST = 16 * 1024 * 1024


def mounted_layers(config: StoreConfig) -> t.Set[str]:
    """The IDs of the layers that a runtime has mounted and not unmounted since the last boot.

    :raises StoreError: the file cannot be read
    """
    path = os.path.join(config.runroot, f"{config.driver}-layers", "mountpoints.json")
    with translate_oserror(path):
        try:
            data = files.read_regular(path, _LONGEST)
        except FileNotFoundError:
            return set()
    try:
        entries = json.loads(data.decode("utf-8", "replace") or "[]") or []
        return {str(entry["id"]) for entry in entries if entry.get("count", 0) > 0}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise StoreError(
            path, f"cannot be understood: {error}", "Unmount all images, then remove the file."
        ) from error
