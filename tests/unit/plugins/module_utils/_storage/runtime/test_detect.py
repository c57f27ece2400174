# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which runtime is there, in which version, with which containers/storage."""

from __future__ import annotations

import os
import pathlib
import shutil

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import ConfigError
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.detect import (
    Runtime,
    detect,
    runtime,
)


@pytest.mark.parametrize(
    ("name", "version", "numbers", "storage"),
    [
        ("podman", "podman version 4.3.1", (4, 3, 1), (1, 43, 0)),
        ("podman", "4.9.4-rhel", (4, 9, 4), (1, 51, 0)),
        ("podman", "5.4.2", (5, 4, 2), (1, 57, 1)),
        ("podman", "podman version 6.0.0-rc1", (6, 0, 0), (1, 63, 0)),
        ("podman", "7.1", (7, 1, 0), (1, 63, 0)),
        ("podman", "3.4.4", (3, 4, 4), (0,)),
        ("buildah", "buildah version 1.28.2 (image-spec 1.1.0-rc2)", (1, 28, 2), (1, 43, 0)),
        ("buildah", "1.34.0", (1, 34, 0), (1, 51, 0)),
        ("crio", "crio version 1.30.2\nVersion: 1.30.2", (1, 30, 2), (1, 51, 0)),
        ("CRI-O", "1.33.1", (1, 33, 1), (1, 58, 0)),
    ],
)
def test_versions(
    name: str, version: str, numbers: tuple[int, ...], storage: tuple[int, ...]
) -> None:
    found = runtime(name, version)
    assert (found.version, found.storage_version) == (numbers, storage)
    assert found.name == {"crio": "cri-o", "CRI-O": "cri-o"}.get(name, name)


def test_a_given_version_is_believed() -> None:
    found = detect("podman 5.4.2")
    assert found == Runtime("podman", (5, 4, 2), (1, 57, 1))
    assert str(found) == "podman 5.4.2"


@pytest.mark.parametrize("text", ["docker", "docker 20.1", "podman latest", "/nonexistent/podman"])
def test_what_is_no_runtime(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        detect(text)
    assert caught.value.way_out


def program(folder: pathlib.Path, name: str, text: str) -> str:
    """An executable that counts its calls and says something."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho >>"{folder}/{name}.calls"\necho "{text}"\n')
    path.chmod(0o755)
    return str(path)


def test_the_host_is_searched(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buildah = program(tmp_path, "buildah", "buildah version 1.39.3 (image-spec 1.1.0)")
    podman = program(tmp_path, "podman", "podman version 5.2.1")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = detect()
    assert found == Runtime("podman", (5, 2, 1), (1, 55, 0), podman)
    assert detect("buildah") == Runtime("buildah", (1, 39, 3), (1, 57, 1), buildah)
    assert detect(podman) == found
    assert len((tmp_path / "podman.calls").read_text()) == 1


def test_a_runtime_without_a_version(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path, "podman", "no idea")
    with pytest.raises(ConfigError, match="no readable version in 'no idea'"):
        detect(path)


def test_a_program_is_asked_once_for_as_long_as_its_file_stays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said: dict[str, str] = {}
    script = program(tmp_path, "podman", "podman version 5.2.1")
    assert detect(script, said) == Runtime("podman", (5, 2, 1), (1, 55, 0), script)
    assert said == {}, "a script may call another program tomorrow"
    compiled = str(tmp_path / "buildah")
    # GNU's own tools tell a version as well.
    shutil.copy("/bin/true", compiled)
    asked = detect("buildah", said)
    assert asked is not None
    identity = next(iter(said))
    said[identity] = "buildah version 1.39.3"
    assert detect("buildah", said) == Runtime("buildah", (1, 39, 3), (1, 57, 1), compiled)
    os.utime(compiled)
    assert detect("buildah", said) == asked
    assert len(said) == 2
