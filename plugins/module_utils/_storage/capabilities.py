# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The capabilities of each version of podman, buildah, CRI-O and containers/storage: the only version thresholds.

All other modules ask :class:`Capabilities`. Thresholds by storage version follow the source of containers/storage,
those by podman version podman's own; each was measured against Debian's builds.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

Version = t.Tuple[int, ...]

# The newest containers/storage (major, minor) with which the test suite has run.
TESTED_STORAGE: Version = (1, 64)

# A release for each way in which a program reads its configuration.
RELEASE_OF_EACH_LOADER: t.Mapping[str, t.Tuple[str, ...]] = {
    "podman": ("5.8.6", "6.1.1"),
    "cri-o": ("1.36.3",),
}

# Linux: overlay accepts idmapped layers; overlay can be mounted in a user's namespace.
KERNEL_IDMAPPED_OVERLAY: Version = (5, 19)
KERNEL_ROOTLESS_OVERLAY: Version = (5, 13)


@dataclass(frozen=True)
class Capabilities:
    """The capabilities of a runtime. Fields without an explanation are true from a version on, see the tables below.

    :ivar reads_drop_ins: storage.conf is read by the loader of storage 1.63: drop-ins, appending lists,
        CONTAINERS_STORAGE_CONF_OVERRIDE, and /etc and /usr in full for rootless users too
    :ivar named_file_sets_paths: rootless users use the paths in the file that CONTAINERS_STORAGE_CONF names
    :ivar reads_transient_store: the keys ``transient_store`` and ``driver_priority`` are used
    :ivar rootless_inherits_priority: users without a file of their own use ``driver_priority`` of /etc
    :ivar rootless_prefers_overlay: a user without a file gets the driver of the existing store, or overlay if it
        works; before, vfs
    :ivar reads_lower_layers: ``lower-layers`` is enough to mount a layer; the names in ``l/`` are not needed
    :ivar maps_container_layers: a container's own layer carries its ID map even if mounts shift the IDs
    :ivar idmapped_mounts: overlay shifts IDs with idmapped mounts
    :ivar idmap_can_be_disabled: a variable disables idmapped mounts, and mapped layers are mounted unchanged
    :ivar shifts_any_map: maps that are not contiguous are shifted too
    :ivar shifts_rootless: idmapped mounts for rootless users depend only on the kernel
    :ivar ignores_overflow_accounts: auto ignores accounts with ID 65534, regardless of the name
    :ivar counts_accounts_exactly: auto includes the highest ID of an account, and reads the image's group file
    :ivar sqlite_first: podman prefers db.sql if there is also a bolt file
    :ivar keeps_database: podman's database overrides storage.conf
    :ivar sets_config_home: before the files are read, XDG_CONFIG_HOME gets its default, so that a user's own file is
        read instead of the system's files
    :ivar reads_crio_conf: crio.conf overrides storage.conf
    :ivar removes_unused_mapped_layers: a mapped layer is removed with the last container on it, even if another
        program created it
    :ivar mounts_long_paths: the paths of all layers of a container may exceed one page, also in additional stores
    :ivar tested: the storage version is not above the newest that was tested
    """

    reads_drop_ins: bool = False
    named_file_sets_paths: bool = False
    reads_transient_store: bool = False
    rootless_inherits_priority: bool = False
    rootless_prefers_overlay: bool = False
    reads_lower_layers: bool = False
    maps_container_layers: bool = False
    mounts_long_paths: bool = False
    idmapped_mounts: bool = False
    idmap_can_be_disabled: bool = False
    shifts_any_map: bool = False
    shifts_rootless: bool = False
    ignores_overflow_accounts: bool = False
    counts_accounts_exactly: bool = False
    sqlite_first: bool = False
    # podman alone, see idmap.grammar.UsernsContext for the meaning.
    map_flags: bool = False
    merges_maps: bool = False
    drops_zero_entry: bool = False
    keep_id_without_ranges: bool = False
    rootful_keep_id: bool = False
    keep_id_size: bool = False
    auto_parent_ids: bool = False
    keeps_database: bool = False
    sets_config_home: bool = False
    # CRI-O alone.
    reads_crio_conf: bool = False
    removes_unused_mapped_layers: bool = False
    tested: bool = True


# Field: the first version of containers/storage of which it is true.
_STORAGE_SINCE: t.Dict[str, Version] = {
    "idmapped_mounts": (1, 40),
    "idmap_can_be_disabled": (1, 45, 4),
    "ignores_overflow_accounts": (1, 46),
    "reads_transient_store": (1, 45),
    "rootless_inherits_priority": (1, 46),
    "rootless_prefers_overlay": (1, 47),
    "counts_accounts_exactly": (1, 56),
    # The oldest version in which it was seen; 1.43 does not have it.
    "mounts_long_paths": (1, 57),
    "named_file_sets_paths": (1, 59),
    "shifts_any_map": (1, 59),
    # The first releases of podman with it.
    "sqlite_first": (1, 62),
    "reads_drop_ins": (1, 63),
    "reads_lower_layers": (1, 63),
    "shifts_rootless": (1, 63),
    "maps_container_layers": (1, 64),
}

# Field: the first version of podman of which it is true.
_PODMAN_SINCE: t.Dict[str, Version] = {
    "keeps_database": (),
    "sets_config_home": (),
    "keep_id_without_ranges": (4, 4),
    "rootful_keep_id": (4, 5),
    "map_flags": (4, 7),
    "merges_maps": (4, 7),
    "auto_parent_ids": (5, 0),
    "drops_zero_entry": (5, 1),
    "keep_id_size": (5, 4),
}

# From (major, minor) or (major, minor, patch) on: the containers/storage in the go.mod of the release. Used only if
# neither the executable nor its package contains the version.
_RELEASES: t.Dict[str, t.Tuple[t.Tuple[Version, Version], ...]] = {
    "podman": (
        ((4, 0), (1, 38, 2)),
        ((4, 1), (1, 40, 2)),
        ((4, 2), (1, 42, 0)),
        ((4, 3), (1, 43, 0)),
        ((4, 4), (1, 45, 3)),
        ((4, 5), (1, 46, 1)),
        ((4, 6), (1, 48, 0)),
        ((4, 7), (1, 50, 2)),
        ((4, 8), (1, 51, 0)),
        ((5, 0), (1, 53, 0)),
        ((5, 1), (1, 54, 0)),
        ((5, 2), (1, 55, 0)),
        ((5, 3), (1, 56, 0)),
        ((5, 4), (1, 57, 1)),
        ((5, 5), (1, 58, 0)),
        ((5, 6), (1, 59, 1)),
        ((5, 7), (1, 61, 0)),
        ((5, 8), (1, 62, 0)),
        ((6, 0), (1, 63, 0)),
        ((6, 1), (1, 64, 0)),
    ),
    "buildah": (
        ((1, 24), (1, 38, 2)),
        ((1, 26), (1, 40, 2)),
        ((1, 27), (1, 42, 0)),
        ((1, 28), (1, 43, 0)),
        ((1, 29), (1, 45, 3)),
        ((1, 30), (1, 46, 1)),
        ((1, 31), (1, 48, 0)),
        ((1, 32), (1, 50, 2)),
        ((1, 33), (1, 51, 0)),
        ((1, 35), (1, 53, 0)),
        ((1, 36), (1, 54, 0)),
        ((1, 37), (1, 55, 0)),
        ((1, 38), (1, 56, 0)),
        ((1, 39), (1, 57, 1)),
        ((1, 40), (1, 58, 0)),
        ((1, 41), (1, 59, 1)),
        ((1, 42), (1, 61, 0)),
        ((1, 43), (1, 62, 0)),
        ((1, 44), (1, 63, 0)),
        ((1, 45), (1, 64, 0)),
    ),
    "cri-o": (
        ((1, 24), (1, 37, 0)),
        ((1, 25), (1, 42, 0)),
        ((1, 25, 5), (1, 46, 1)),
        ((1, 26), (1, 44, 0)),
        ((1, 26, 4), (1, 45, 3)),
        ((1, 27), (1, 46, 1)),
        ((1, 28), (1, 49, 0)),
        ((1, 29), (1, 51, 0)),
        ((1, 31), (1, 55, 0)),
        ((1, 32), (1, 56, 0)),
        ((1, 32, 13), (1, 57, 2)),
        ((1, 33), (1, 58, 0)),
        ((1, 34), (1, 59, 1)),
        ((1, 35), (1, 61, 0)),
        ((1, 36), (1, 61, 0)),
    ),
}


def capabilities(name: str, version: Version, storage: Version) -> Capabilities:
    """The capabilities of a program.

    :param name: "podman", "buildah" or "cri-o"
    :param storage: its version of containers/storage
    """
    values = {field: storage >= since for field, since in _STORAGE_SINCE.items()}
    if name == "podman":
        values.update({field: version >= since for field, since in _PODMAN_SINCE.items()})
    values["reads_crio_conf"] = values["removes_unused_mapped_layers"] = name == "cri-o"
    values["tested"] = storage[:2] <= TESTED_STORAGE
    return Capabilities(**values)


def released_storage(name: str, version: Version) -> Version:
    """The containers/storage that a release was published with; (0,) before the oldest known release.

    A release after the newest known release counts as having a newer version.
    """
    found: Version = (0,)
    for start, storage in _RELEASES[name]:
        # A patch release may have another version than its line.
        if version >= start:
            found = storage
    newest, storage = _RELEASES[name][-1]
    return (storage[0], storage[1] + 1, 0) if version[:2] > newest else found


def first_release(name: str, field: str) -> Version:
    """The first release of a program whose containers/storage has a capability.

    :param field: of :class:`Capabilities`, one that depends on the storage version
    """
    since = _STORAGE_SINCE[field]
    # Patch releases of an older line may have it too.
    lines = (start for start, storage in _RELEASES[name] if len(start) == 2 and storage >= since)
    return next(lines)


def loader_agrees(storage: Version, reads_drop_ins: bool) -> Version:
    """The storage version, corrected by the configuration loader that the executable contains."""
    since = _STORAGE_SINCE["reads_drop_ins"]
    if reads_drop_ins:
        return max(storage, since)
    # The newest version without that loader.
    return min(storage, (since[0], since[1] - 1))


def rootless_overlay(kernel: Version) -> bool:
    """Whether Linux of that version mounts overlay in a user's namespace."""
    return kernel >= KERNEL_ROOTLESS_OVERLAY


def idmapped_overlay(kernel: Version) -> bool:
    """Whether Linux of that version mounts overlay on idmapped layers."""
    return kernel >= KERNEL_IDMAPPED_OVERLAY


# One for each loader of storage.conf, oldest first; without podman's own capabilities.
LOADERS: t.Tuple[Capabilities, ...] = tuple(
    capabilities("", (), since)
    for since in sorted(
        {
            (0,),
            *(
                _STORAGE_SINCE[field]
                for field in (
                    "reads_transient_store",
                    "rootless_inherits_priority",
                    "rootless_prefers_overlay",
                    "named_file_sets_paths",
                    "reads_drop_ins",
                )
            ),
        }
    )
)
