# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Predict whether a runtime needs a mapped layer, or shifts the IDs with a mount.

Follows the checks of containers/storage 1.38 to 1.63 in their order: environment, mount
program, recorded feature test, and finally the kernel itself.
"""

from __future__ import annotations

import os
import re
import shutil
import typing as t
from dataclasses import dataclass

from ..capabilities import KERNEL_IDMAPPED_OVERLAY, Version, first_release, idmapped_overlay
from ..idmap.mapping import Mapping
from ..kernel.namespaces import idmap_probe
from .detect import Runtime

DISABLE_VARIABLE = "_CONTAINERS_OVERLAY_DISABLE_IDMAP"
FORCE_VARIABLE = "_TEST_FORCE_SUPPORT_SHIFTING"
FUSE_PROGRAM = "fuse-overlayfs"

_FORCE = "To create a mapped layer anyway, set force: true."

Probe = t.Callable[[str], bool]


@dataclass(frozen=True)
class Shifting:
    """The answer, with explanations for an administrator.

    :param shifts: no mapped layer is needed
    :param reason: the reason, a clause
    :param advice: how to change it, whole sentences
    :param reorders_map: the store checks whether the map is contiguous, which sorts the recorded map
        (see ``forms.recorded_form``)
    :param usable: the runtime can mount a mapped layer of this map
    """

    shifts: bool
    reason: str
    advice: str
    reorders_map: bool = False
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
    probe: t.Optional[Probe] = None,
    kernel: t.Optional[str] = None,
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
            "no ID map is set, so the image is used unchanged",
            "Set userns or maps to prepare a mapped layer.",
        )
    if driver_name not in ("overlay", "overlay2"):
        return _other_driver(driver_name, rootless, runtime)
    if runtime.capabilities.idmap_can_be_disabled and environ.get(DISABLE_VARIABLE) == "yes":
        return Shifting(
            False,
            f"{DISABLE_VARIABLE}=yes in the environment prevents {runtime} from shifting IDs",
            "If the kernel supports idmapped mounts, remove the variable. No copy is then needed.",
        )
    if (
        not runtime.capabilities.idmap_can_be_disabled
        and environ.get(FORCE_VARIABLE) == "yes-please"
    ):
        return _shifts_contiguous_maps(
            mapping,
            runtime,
            f"{FORCE_VARIABLE}=yes-please makes {runtime} assume that the kernel shifts IDs",
        )
    program = mount_program(options, graphroot, runroot)
    if program:
        return _mount_program(program, mapping, runtime)
    if rootless and not (
        runtime.capabilities.shifts_rootless and _remembered(runroot, "idmapped-lower-dir")
    ):
        return Shifting(
            False,
            "in a user's namespace the kernel does not allow idmapped mounts of the host's filesystem, "
            f"so {runtime} copies the image for each map",
            f"Only mount_program = {FUSE_PROGRAM} in storage.conf shifts IDs for rootless users, "
            "but file access is slower.",
        )
    if not runtime.capabilities.idmapped_mounts:
        return Shifting(
            False,
            f"{runtime} does not support idmapped mounts and copies the image for each map",
            f"{_since(runtime, 'idmapped_mounts')} or later needs no copies on Linux 5.19 or later.",
        )
    able, why = _native(graphroot, runroot, probe, kernel)
    if not able:
        return Shifting(
            False, f"{why}, so {runtime} copies the image for each map", _native_advice(why)
        )
    if runtime.capabilities.shifts_any_map:
        return Shifting(True, _no_copy(why, runtime), _FORCE)
    return _shifts_contiguous_maps(mapping, runtime, why)


def mount_program(options: t.Mapping[str, str], graphroot: str, runroot: str) -> str:
    """The program that mounts the store's overlays; empty if the kernel does.

    It is configured, or found in PATH if the store was used with a mount program before, or if the kernel's
    overlay does not work here.
    """
    configured = options.get("mount_program", "")
    if configured:
        return configured
    flag = _read(os.path.join(graphroot, "overlay", ".has-mount-program")).strip()
    if flag == "true" or _remembered(runroot, "overlay") is False:
        return shutil.which(FUSE_PROGRAM) or ""
    return ""


def _other_driver(driver_name: str, rootless: bool, runtime: Runtime) -> Shifting:
    advice = (
        f"Only the overlay driver with mount_program = {FUSE_PROGRAM} needs no copies for rootless users, "
        "but file access is slower."
        if rootless
        else f"The overlay driver needs no copies for root on Linux {_dotted(KERNEL_IDMAPPED_OVERLAY)} or later."
    )
    if driver_name in ("btrfs", "zfs"):
        return Shifting(
            False,
            f"the {driver_name} driver cannot shift IDs; {runtime} clones the image for each map "
            "and changes its owners, while the data stays shared",
            advice,
        )
    return Shifting(
        False,
        f"the {driver_name} driver cannot shift IDs, so {runtime} copies the image for each map",
        advice,
    )


def _mount_program(program: str, mapping: Mapping, runtime: Runtime) -> Shifting:
    name = os.path.basename(program)
    if mapping.contiguous:
        return Shifting(
            True,
            _no_copy(f"{name} shifts the IDs", runtime),
            f"A mapped layer would be shifted by {name} a second time, so it is not created. Without "
            "mount_program in storage.conf the kernel's overlay mounts mapped layers.",
            reorders_map=True,
            usable=False,
        )
    return Shifting(
        False,
        f"{name} shifts only contiguous maps and this map has gaps, "
        f"so {runtime} copies the image for it",
        "Map a single range of IDs, or ranges that are adjacent inside and outside the container.",
        reorders_map=True,
    )


def _shifts_contiguous_maps(mapping: Mapping, runtime: Runtime, why: str) -> Shifting:
    if mapping.contiguous:
        return Shifting(True, _no_copy(why, runtime), _FORCE, reorders_map=True)
    if runtime.capabilities.idmap_can_be_disabled:
        return Shifting(
            False,
            f"{runtime} shifts only contiguous maps and this map has gaps, "
            "so it copies the image for it",
            f"Map a single range of IDs, or use {_since(runtime, 'shifts_any_map')} or later, which shifts any map.",
            reorders_map=True,
        )
    return Shifting(
        False,
        f"{runtime} shifts only contiguous maps and this map has gaps; it copies the image for it, "
        "but it cannot mount any such copy on a kernel with idmapped mounts",
        f"Map a single range of IDs, or use {_since(runtime, 'idmap_can_be_disabled')} or later.",
        reorders_map=True,
        usable=False,
    )


def _native(
    graphroot: str, runroot: str, probe: t.Optional[Probe], kernel: t.Optional[str]
) -> t.Tuple[bool, str]:
    """Whether the kernel shifts IDs for root on this filesystem, and the reason."""
    remembered = _remembered(runroot, "idmapped-lower-dir")
    if remembered:
        return True, "the kernel shifts IDs with idmapped mounts"
    if remembered is False:
        return False, (
            "the runtime detected, and recorded in "
            f"{_feature_file(runroot, 'idmapped-lower-dir', False)}, "
            "that idmapped mounts do not work here"
        )
    release = os.uname().release if kernel is None else kernel
    if not idmapped_overlay(_version(release)):
        return False, f"kernel {release} does not support idmapped mounts for overlay"
    if probe is None:
        probe = idmap_probe
    if probe(_existing(os.path.join(graphroot, "overlay"))):
        return True, "the kernel shifts IDs with idmapped mounts"
    return False, f"the filesystem of {graphroot} does not support idmapped mounts"


def _existing(path: str) -> str:
    """The folder, or its nearest existing parent, where a store that no runtime has written yet will be created."""
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def _native_advice(why: str) -> str:
    if "recorded in" in why:
        return (
            "The next boot removes this file. Remove it after a change of the kernel or filesystem."
        )
    if why.startswith("kernel"):
        return f"Linux {_dotted(KERNEL_IDMAPPED_OVERLAY)} or later needs no copies."
    return "ext4, xfs, btrfs and, since Linux 6.3, tmpfs support idmapped mounts."


def _no_copy(why: str, runtime: Runtime) -> str:
    return f"{why}: {runtime} needs no copy for this map"


def _remembered(runroot: str, feature: str) -> t.Optional[bool]:
    """The result of a runtime's own test of a feature; None if it was not run."""
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


def _since(runtime: Runtime, field: str) -> str:
    """The first release of a program that has a capability."""
    return f"{runtime.name} {_dotted(first_release(runtime.name, field)[:2])}"


def _dotted(version: Version) -> str:
    return ".".join(str(number) for number in version)
