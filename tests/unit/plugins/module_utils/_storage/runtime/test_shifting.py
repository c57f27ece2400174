# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a copy will be asked for: each row of the table, in the order in which runtimes ask."""

from __future__ import annotations

import dataclasses
import pathlib
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

SOLID = Mapping(IDMap.of((0, 1000, 10)), IDMap.of((0, 1000, 10)))
GAPS = Mapping(IDMap.of((0, 1000, 10), (10, 5000, 1)), IDMap.of((0, 1000, 10)))


@dataclasses.dataclass
class Ask:
    """A store in a scratch folder, and questions to it."""

    base: pathlib.Path
    probed: list[str] = dataclasses.field(default_factory=list)

    def __call__(
        self, version: str = "5.4.2", mapping: Mapping = SOLID, **options: t.Any
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

    def note(self, name: str) -> None:
        """Write a feature cache file of the runtime."""
        (self.base / "r/overlay").mkdir(parents=True, exist_ok=True)
        (self.base / "r/overlay" / name).touch()

    def flag(self, text: str) -> None:
        """Write .has-mount-program."""
        (self.base / "g/overlay/.has-mount-program").write_text(text)


@pytest.fixture
def ask(tmp_path: pathlib.Path) -> Ask:
    (tmp_path / "g/overlay").mkdir(parents=True)
    return Ask(tmp_path)


def test_no_map_needs_no_copy(ask: Ask) -> None:
    answer = ask(mapping=UNMAPPED, driver="vfs")
    assert answer.shifts
    assert "no ID map is set" in answer.reason


def test_the_kernel_shifts_for_root(ask: Ask) -> None:
    answer = ask("4.3.1")
    assert answer.shifts
    assert answer.reorders_map
    assert answer.reason == (
        "the kernel shifts IDs with idmapped mounts: podman 4.3.1 needs no copy for this map"
    )
    assert "force: true" in answer.advice
    assert ask.probed == [str(ask.base / "g/overlay")]


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
def test_maps_with_gaps(
    ask: Ask, version: str, shifts: bool, reorders_map: bool, usable: bool
) -> None:
    answer = ask(version, GAPS)
    assert (answer.shifts, answer.reorders_map, answer.usable) == (shifts, reorders_map, usable)
    if not usable:
        assert "cannot mount any such copy" in answer.reason
        assert "podman 4.5" in answer.advice


def test_contiguous_maps_in_new_versions_are_not_sorted(ask: Ask) -> None:
    assert ask("5.5.0").reorders_map
    assert not ask("5.6.0").reorders_map


@pytest.mark.parametrize(
    ("options", "words", "advice"),
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
def test_what_needs_copies(ask: Ask, options: dict[str, t.Any], words: str, advice: str) -> None:
    answer = ask(**options)
    assert not answer.shifts
    assert not answer.reorders_map
    assert answer.usable
    assert words in answer.reason
    assert advice in answer.advice


def test_rootless_stores_shift_where_the_runtime_has_found_that_they_do(ask: Ask) -> None:
    ask.note("idmapped-lower-dir-true")
    # Up to storage 1.62 a rule forbids it, whatever the kernel says.
    assert not ask("5.4.2", rootless=True).shifts
    answer = ask("6.1.1", rootless=True, works=False)
    assert answer.shifts
    assert "the kernel shifts IDs with idmapped mounts" in answer.reason
    assert ask("6.1.1", GAPS, rootless=True).shifts


def test_a_note_that_they_do_not_is_heeded_as_well(ask: Ask) -> None:
    ask.note("idmapped-lower-dir-false")
    assert not ask("6.1.1", rootless=True).shifts


def test_old_versions_ignore_the_variable(ask: Ask) -> None:
    environ = {"_CONTAINERS_OVERLAY_DISABLE_IDMAP": "yes"}
    assert ask("4.3.1", environ=environ).shifts
    assert ask("5.4.2", environ={"_CONTAINERS_OVERLAY_DISABLE_IDMAP": "true"}).shifts


def test_old_versions_know_another_one(ask: Ask) -> None:
    environ = {"_TEST_FORCE_SUPPORT_SHIFTING": "yes-please"}
    assert ask("4.3.1", environ=environ, works=False).shifts
    assert not ask("4.3.1", GAPS, environ=environ, works=False).shifts
    assert not ask("5.4.2", environ=environ, works=False).shifts


def test_what_the_runtime_has_noted_comes_first(ask: Ask) -> None:
    ask.note("idmapped-lower-dir-true")
    assert ask(works=False, kernel="5.4.0").shifts
    assert not ask.probed


def test_what_the_runtime_has_noted_against_it(ask: Ask) -> None:
    ask.note("idmapped-lower-dir-false")
    answer = ask()
    assert not answer.shifts
    assert not answer.reorders_map
    assert str(ask.base / "r/overlay/idmapped-lower-dir-false") in answer.reason
    assert "Remove it" in answer.advice
    assert not ask.probed


@pytest.mark.parametrize("version", ["4.3.1", "5.8.0"])
@pytest.mark.parametrize("rootless", [False, True])
def test_mount_program(ask: Ask, version: str, rootless: bool) -> None:
    options = {"mount_program": "/usr/bin/fuse-overlayfs"}
    answer = ask(version, options=options, rootless=rootless)
    assert answer.shifts
    assert answer.reorders_map
    assert answer.reason.startswith("fuse-overlayfs shifts the IDs")
    answer = ask(version, GAPS, options=options, rootless=rootless)
    assert not answer.shifts
    assert answer.reorders_map
    assert answer.usable
    assert "shifts only contiguous maps" in answer.reason


def test_the_variable_beats_the_mount_program(ask: Ask) -> None:
    environ = {"_CONTAINERS_OVERLAY_DISABLE_IDMAP": "yes"}
    options = {"mount_program": "/usr/bin/fuse-overlayfs"}
    assert not ask(environ=environ, options=options).shifts


@pytest.mark.parametrize("installed", [False, True])
def test_stores_once_used_with_a_mount_program(
    ask: Ask, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module.shutil, "which", lambda name: f"/usr/bin/{name}" if installed else None
    )
    ask.flag("true\n")
    assert ask(rootless=True).shifts is installed
    ask.flag("false")
    assert not ask(rootless=True).shifts
    ask.note("overlay-false")
    assert ask(rootless=True).shifts is installed


def test_the_probe_is_the_kernel_s_own(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(module, "idmap_probe", lambda path: bool(seen.append(path)) or True)
    answer = shifting(
        "overlay", {}, False, str(ask.base / "g"), str(ask.base / "r"), SOLID,
        runtime("podman", "5.4.2"), {}, kernel="6.1",
    )  # fmt: skip
    assert answer.shifts
    assert seen == [str(ask.base / "g/overlay")]
