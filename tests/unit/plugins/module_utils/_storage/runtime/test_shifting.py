# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of whether a runtime needs a copy: each row of the table, in the order of the checks of runtimes."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    UNMAPPED,
    Mapping,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime import (
    shifting as module,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.detect import runtime
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.shifting import (
    Shifting,
    shifting,
)

CONTIGUOUS = Mapping(IDMap.of((0, 1000, 10)), IDMap.of((0, 1000, 10)))
GAPS = Mapping(IDMap.of((0, 1000, 10), (10, 5000, 1)), IDMap.of((0, 1000, 10)))


@dataclasses.dataclass
class ShiftingQuery:
    """A store in a temporary directory, with a call of shifting() for it."""

    base: pathlib.Path
    probed: list[str] = dataclasses.field(default_factory=list)

    def __call__(
        self, version: str = "5.4.2", mapping: Mapping = CONTIGUOUS, **options: t.Any
    ) -> Shifting:
        works = options.pop("works", True)

        def probe(directory: str) -> bool:
            self.probed.append(directory)
            return bool(works)

        return shifting(
            options.pop("driver", "overlay"),
            options.pop("options", {}),
            options.pop("rootless", False),
            str(self.base / "g"),
            str(self.base / "r"),
            mapping,
            runtime("podman", version),
            options.pop("environ", {}),
            probe,
            options.pop("kernel", "6.1.0-13-amd64"),
        )

    def add_feature_file(self, name: str) -> None:
        """Write a feature cache file of the runtime."""
        (self.base / "r/overlay").mkdir(parents=True, exist_ok=True)
        (self.base / "r/overlay" / name).touch()

    def write_mount_program_flag(self, text: str) -> None:
        """Write .has-mount-program."""
        (self.base / "g/overlay/.has-mount-program").write_text(text)


@pytest.fixture
def query(tmp_path: pathlib.Path) -> ShiftingQuery:
    (tmp_path / "g/overlay").mkdir(parents=True)
    return ShiftingQuery(tmp_path)


def test_no_map_needs_no_copy(query: ShiftingQuery) -> None:
    answer = query(mapping=UNMAPPED, driver="vfs")
    assert answer.shifts
    assert "no ID map is set" in answer.reason


def test_kernel_shifts_for_root(query: ShiftingQuery) -> None:
    answer = query("4.3.1")
    assert answer.shifts
    assert answer.reorders_map
    assert answer.reason == (
        "the kernel shifts IDs with idmapped mounts: podman 4.3.1 needs no copy for this map"
    )
    assert "force: true" in answer.advice
    assert query.probed == [str(query.base / "g/overlay")]


@pytest.mark.parametrize(
    ("version", "shifts", "reorders_map", "usable"),
    [
        ("4.3.1", False, True, False),
        ("4.4.0", False, True, False),
        ("4.5.0", False, True, True),
        ("5.5.0", False, True, True),
        ("5.6.0", True, False, True),
    ],
)
def test_support_of_maps_with_gaps_depends_on_version(
    query: ShiftingQuery, version: str, shifts: bool, reorders_map: bool, usable: bool
) -> None:
    answer = query(version, GAPS)
    assert (answer.shifts, answer.reorders_map, answer.usable) == (shifts, reorders_map, usable)
    if not usable:
        assert "cannot mount any such copy" in answer.reason
        assert "podman 4.5" in answer.advice


def test_new_versions_do_not_reorder_contiguous_maps(query: ShiftingQuery) -> None:
    assert query("5.5.0").reorders_map
    assert not query("5.6.0").reorders_map


@pytest.mark.parametrize(
    ("options", "reason", "advice"),
    [
        (
            {"kernel": "5.15.0-91-generic"},
            "kernel 5.15.0-91-generic does not support idmapped",
            "Linux 5.19",
        ),
        ({"kernel": "4.18.0"}, "kernel 4.18.0 does not support idmapped", "Linux 5.19"),
        ({"works": False}, "does not support idmapped mounts", "ext4, xfs"),
        (
            {"rootless": True},
            "in a user's namespace the kernel does not allow idmapped mounts",
            "mount_program",
        ),
        ({"version": "4.0.3"}, "podman 4.0.3 does not support idmapped mounts", "podman 4.1"),
        ({"driver": "vfs"}, "the vfs driver cannot shift IDs", "overlay driver"),
        ({"driver": "btrfs"}, "the data stays shared", "overlay driver"),
        ({"driver": "zfs"}, "the data stays shared", "overlay driver"),
        (
            {"environ": {"_CONTAINERS_OVERLAY_DISABLE_IDMAP": "yes"}},
            "_CONTAINERS_OVERLAY_DISABLE_IDMAP=yes in the environment prevents",
            "remove the variable",
        ),
    ],
)
def test_copy_is_needed_without_shifting(
    query: ShiftingQuery, options: dict[str, t.Any], reason: str, advice: str
) -> None:
    answer = query(**options)
    assert not answer.shifts
    assert not answer.reorders_map
    assert answer.usable
    assert reason in answer.reason
    assert advice in answer.advice


def test_rootless_store_shifts_if_runtime_recorded_support(query: ShiftingQuery) -> None:
    query.add_feature_file("idmapped-lower-dir-true")
    # Up to containers/storage 1.62, rootless stores do not shift, even if the kernel supports it.
    assert not query("5.4.2", rootless=True).shifts
    answer = query("6.1.1", rootless=True, works=False)
    assert answer.shifts
    assert "the kernel shifts IDs with idmapped mounts" in answer.reason
    assert query("6.1.1", GAPS, rootless=True).shifts


def test_rootless_store_does_not_shift_if_runtime_recorded_failure(query: ShiftingQuery) -> None:
    query.add_feature_file("idmapped-lower-dir-false")
    assert not query("6.1.1", rootless=True).shifts


def test_old_versions_ignore_variable_that_disables_idmap(query: ShiftingQuery) -> None:
    environ = {"_CONTAINERS_OVERLAY_DISABLE_IDMAP": "yes"}
    assert query("4.3.1", environ=environ).shifts
    assert query("5.4.2", environ={"_CONTAINERS_OVERLAY_DISABLE_IDMAP": "true"}).shifts


def test_only_old_versions_read_variable_that_forces_shifting(query: ShiftingQuery) -> None:
    environ = {"_TEST_FORCE_SUPPORT_SHIFTING": "yes-please"}
    assert query("4.3.1", environ=environ, works=False).shifts
    assert not query("4.3.1", GAPS, environ=environ, works=False).shifts
    assert not query("5.4.2", environ=environ, works=False).shifts


def test_recorded_support_is_used_without_probe(query: ShiftingQuery) -> None:
    query.add_feature_file("idmapped-lower-dir-true")
    assert query(works=False, kernel="5.4.0").shifts
    assert not query.probed


def test_recorded_failure_is_used_without_probe(query: ShiftingQuery) -> None:
    query.add_feature_file("idmapped-lower-dir-false")
    answer = query()
    assert not answer.shifts
    assert not answer.reorders_map
    assert str(query.base / "r/overlay/idmapped-lower-dir-false") in answer.reason
    assert "Remove it" in answer.advice
    assert not query.probed


@pytest.mark.parametrize("version", ["4.3.1", "5.8.0"])
@pytest.mark.parametrize("rootless", [False, True])
def test_mount_program_shifts_only_contiguous_maps(
    query: ShiftingQuery, version: str, rootless: bool
) -> None:
    options = {"mount_program": "/usr/bin/fuse-overlayfs"}
    answer = query(version, options=options, rootless=rootless)
    assert answer.shifts
    assert answer.reorders_map
    assert answer.reason.startswith("fuse-overlayfs shifts the IDs")
    answer = query(version, GAPS, options=options, rootless=rootless)
    assert not answer.shifts
    assert answer.reorders_map
    assert answer.usable
    assert "shifts only contiguous maps" in answer.reason


def test_variable_that_disables_idmap_overrides_mount_program(query: ShiftingQuery) -> None:
    environ = {"_CONTAINERS_OVERLAY_DISABLE_IDMAP": "yes"}
    options = {"mount_program": "/usr/bin/fuse-overlayfs"}
    assert not query(environ=environ, options=options).shifts


@pytest.mark.parametrize("installed", [False, True])
def test_mount_program_of_earlier_use_shifts_if_installed(
    query: ShiftingQuery, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if installed else None)
    query.write_mount_program_flag("true\n")
    assert query(rootless=True).shifts is installed
    query.write_mount_program_flag("false")
    assert not query(rootless=True).shifts
    query.add_feature_file("overlay-false")
    assert query(rootless=True).shifts is installed


def test_kernel_is_probed_by_default(query: ShiftingQuery, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: t.List[str] = []

    def probe(path: str) -> bool:
        seen.append(path)
        return True

    monkeypatch.setattr(module, "idmap_probe", probe)
    answer = shifting(
        "overlay", {}, False, str(query.base / "g"), str(query.base / "r"), CONTIGUOUS,
        runtime("podman", "5.4.2"), {}, kernel="6.1",
    )  # fmt: skip
    assert answer.shifts
    assert seen == [str(query.base / "g/overlay")]
