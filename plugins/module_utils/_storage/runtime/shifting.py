# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Whether a runtime will ask for a mapped layer at all, or shift the IDs while it mounts.

The answer follows what containers/storage 1.38 to 1.63 ask, in their order: environment, mount
program, remembered feature test, and the kernel itself last.
"""

from __future__ import annotations

import os
import re
import shutil
import typing as t
from dataclasses import dataclass

from ..idmap.mapping import Mapping
from ..kernel.namespaces import idmap_probe
from .detect import Runtime, Version

DISABLE_VARIABLE = "_CONTAINERS_OVERLAY_DISABLE_IDMAP"
FORCE_VARIABLE = "_TEST_FORCE_SUPPORT_SHIFTING"
FUSE_PROGRAM = "fuse-overlayfs"

# Linux lets overlay stand on idmapped layers since this version.
KERNEL = (5, 19)
# containers/storage: idmapped lower layers; the variable that disables them, and mapped layers
# mounted as they are; maps that are not contiguous.
_IDMAPPED = (1, 40)
_DISABLING = (1, 45, 4)
_ANY_MAP = (1, 59)

_FORCE = "To make a mapped layer all the same, set force: true."

Probe = t.Callable[[str], bool]


@dataclass(frozen=True)
class Shifting:
    """The answer, in words for an administrator.

    :param shifts: no mapped layer is needed
    :param reason: why, one clause
    :param advice: what would change it, whole sentences
    :param sorts: the store asks whether the map is contiguous, which sorts what it records
        (see ``forms.shape``)
    :param usable: the runtime can mount a mapped layer of this map at all
    """

    shifts: bool
    reason: str
    advice: str
    sorts: bool = False
    usable: bool = True


def shifting(
    driver_name: str,
    options: t.Mapping[str, str],
    rootless: bool,
    graphroot: str,
    runroot: str,
    mapping: Mapping,
    runtime: Runtime,
    environ: t.Mapping[str, str],
    probe: Probe | None = None,
    kernel: str | None = None,
) -> Shifting:
    """Say whether a runtime shifts IDs for a mapping in a store.

    :param options: the driver's options, without their prefix, as ``StoreConfig.options``
    :param environ: the environment in which the runtime will run
    :param probe: tests an overlay on an idmapped layer in a folder of the graphroot; by default
        ``kernel.namespaces.idmap_probe``
    :param kernel: the kernel's release, by default that of this host
    """
    if mapping.identity:
        return Shifting(
            True,
            "no ID map is asked for, so the image is used as it is",
            "Give userns or maps to prepare a mapped layer.",
        )
    if driver_name not in ("overlay", "overlay2"):
        return _other_driver(driver_name, runtime)
    if runtime.storage_version >= _DISABLING and environ.get(DISABLE_VARIABLE) == "yes":
        return Shifting(
            False,
            f"{DISABLE_VARIABLE}=yes in the environment forbids {runtime} to shift IDs",
            "Remove the variable where the kernel has idmapped mounts: then no copy is needed.",
        )
    if runtime.storage_version < _DISABLING and environ.get(FORCE_VARIABLE) == "yes-please":
        return _asked_for_contiguity(
            mapping, runtime, f"{FORCE_VARIABLE}=yes-please makes {runtime} believe in shifting"
        )
    program = mount_program(options, graphroot, runroot)
    if program:
        return _mount_program(program, mapping, runtime)
    if rootless:
        return Shifting(
            False,
            "in a user's namespace the kernel allows no idmapped mounts of the host's filesystem, "
            f"so {runtime} copies the image for each map",
            f"Only mount_program = {FUSE_PROGRAM} in storage.conf shifts IDs for rootless users, "
            "at the price of slower files.",
        )
    if runtime.storage_version < _IDMAPPED:
        return Shifting(
            False,
            f"{runtime} knows no idmapped mounts and copies the image for each map",
            "podman 4.1 or later needs no copies on Linux 5.19 or later.",
        )
    able, why = _native(graphroot, runroot, probe, kernel)
    if not able:
        return Shifting(
            False, f"{why}, so {runtime} copies the image for each map", _native_advice(why)
        )
    if runtime.storage_version >= _ANY_MAP:
        return Shifting(True, _no_copy(why, runtime), _FORCE)
    return _asked_for_contiguity(mapping, runtime, why)


def mount_program(options: t.Mapping[str, str], graphroot: str, runroot: str) -> str:
    """The program that mounts the store's overlays, empty where the kernel does.

    Configured, or found in PATH when the store was once used with one, or when the kernel's own
    overlay was found not to work here.
    """
    configured = options.get("mount_program", "")
    if configured:
        return configured
    flag = _read(os.path.join(graphroot, "overlay", ".has-mount-program")).strip()
    if flag == "true" or _remembered(runroot, "overlay") is False:
        return shutil.which(FUSE_PROGRAM) or ""
    return ""


def _other_driver(driver_name: str, runtime: Runtime) -> Shifting:
    if driver_name in ("btrfs", "zfs"):
        return Shifting(
            False,
            f"the {driver_name} driver cannot shift IDs; {runtime} clones the image for each map "
            "and changes its owners, the data stays shared",
            f"The overlay driver needs no copies for root on Linux {_dotted(KERNEL)} or later.",
        )
    return Shifting(
        False,
        f"the {driver_name} driver cannot shift IDs, so {runtime} copies the image for each map",
        f"The overlay driver needs no copies for root on Linux {_dotted(KERNEL)} or later.",
    )


def _mount_program(program: str, mapping: Mapping, runtime: Runtime) -> Shifting:
    name = os.path.basename(program)
    if mapping.contiguous:
        return Shifting(
            True,
            _no_copy(f"{name} shifts the IDs", runtime),
            f"A mapped layer would be shifted by {name} once more, so none is made. Without "
            "mount_program in storage.conf the kernel's overlay mounts mapped layers.",
            sorts=True,
            usable=False,
        )
    return Shifting(
        False,
        f"{name} shifts contiguous maps only and this one has gaps, "
        f"so {runtime} copies the image for it",
        "Map a single range of IDs, or ranges that touch inside and outside the container.",
        sorts=True,
    )


def _asked_for_contiguity(mapping: Mapping, runtime: Runtime, why: str) -> Shifting:
    if mapping.contiguous:
        return Shifting(True, _no_copy(why, runtime), _FORCE, sorts=True)
    if runtime.storage_version >= _DISABLING:
        return Shifting(
            False,
            f"{runtime} shifts contiguous maps only and this one has gaps, "
            "so it copies the image for it",
            "Map a single range of IDs, or use podman 5.6 or later, which shifts any map.",
            sorts=True,
        )
    return Shifting(
        False,
        f"{runtime} shifts contiguous maps only and this one has gaps; it copies the image for it, "
        "but cannot mount the copy, its own neither, on a kernel with idmapped mounts",
        "Map a single range of IDs, or use podman 4.5 or later.",
        sorts=True,
        usable=False,
    )


def _native(
    graphroot: str, runroot: str, probe: Probe | None, kernel: str | None
) -> tuple[bool, str]:
    """Whether the kernel shifts IDs for root on this filesystem, and in words why."""
    remembered = _remembered(runroot, "idmapped-lower-dir")
    if remembered:
        return True, "the kernel shifts IDs with idmapped mounts"
    if remembered is False:
        return False, (
            "the runtime has found, and noted in "
            f"{_feature_file(runroot, 'idmapped-lower-dir', False)}, "
            "that idmapped mounts do not work here"
        )
    release = os.uname().release if kernel is None else kernel
    if _version(release) < KERNEL:
        return False, f"kernel {release} has no idmapped mounts for overlay"
    if probe is None:
        probe = idmap_probe
    folder = os.path.join(graphroot, "overlay")
    if probe(folder if os.path.isdir(folder) else graphroot):
        return True, "the kernel shifts IDs with idmapped mounts"
    return False, f"the filesystem of {graphroot} takes no idmapped mounts"


def _native_advice(why: str) -> str:
    if "noted in" in why:
        return "The note goes with the next boot; after a change of kernel or filesystem remove it."
    if why.startswith("kernel"):
        return f"Linux {_dotted(KERNEL)} or later needs no copies."
    return "ext4, xfs, btrfs and, since Linux 6.3, tmpfs take idmapped mounts."


def _no_copy(why: str, runtime: Runtime) -> str:
    return f"{why}: {runtime} needs no copy for this map"


def _remembered(runroot: str, feature: str) -> bool | None:
    """What a runtime's own test of a feature has said, None when it has not been made."""
    for answer in (True, False):
        if os.path.exists(_feature_file(runroot, feature, answer)):
            return answer
    return None


def _feature_file(runroot: str, feature: str, answer: bool) -> str:
    return os.path.join(runroot, "overlay", f"{feature}-{'true' if answer else 'false'}")


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read(64)
    except OSError:
        return ""


def _version(release: str) -> Version:
    match = re.match(r"(\d+)\.(\d+)", release)
    return tuple(int(number) for number in match.groups()) if match else (0,)


def _dotted(version: Version) -> str:
    return ".".join(str(number) for number in version)
