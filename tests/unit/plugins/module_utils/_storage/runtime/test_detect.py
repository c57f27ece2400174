# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the detection of the runtime, its version and its containers/storage version."""

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
        ("podman", "7.1", (7, 1, 0), (1, 65, 0)),
        ("podman", "3.4.4", (3, 4, 4), (0,)),
        ("buildah", "buildah version 1.28.2 (image-spec 1.1.0-rc2)", (1, 28, 2), (1, 43, 0)),
        ("buildah", "1.34.0", (1, 34, 0), (1, 51, 0)),
        ("crio", "crio version 1.30.2\nVersion: 1.30.2", (1, 30, 2), (1, 51, 0)),
        ("CRI-O", "1.33.1", (1, 33, 1), (1, 58, 0)),
        # Patch releases whose containers/storage version differs from that of their line.
        ("crio", "1.25.4", (1, 25, 4), (1, 42, 0)),
        ("crio", "1.25.5", (1, 25, 5), (1, 46, 1)),
        ("crio", "1.26.3", (1, 26, 3), (1, 44, 0)),
        ("crio", "1.26.4", (1, 26, 4), (1, 45, 3)),
        ("crio", "1.27.0", (1, 27, 0), (1, 46, 1)),
        ("crio", "1.32.12", (1, 32, 12), (1, 56, 0)),
        ("crio", "1.32.13", (1, 32, 13), (1, 57, 2)),
        ("crio", "crio version 1.36.3", (1, 36, 3), (1, 61, 0)),
        ("crio", "1.37.0", (1, 37, 0), (1, 62, 0)),
    ],
)
def test_versions_are_parsed(
    name: str, version: str, numbers: tuple[int, ...], storage: tuple[int, ...]
) -> None:
    found = runtime(name, version)
    assert (found.version, found.storage_version) == (numbers, storage)
    assert found.name == {"crio": "cri-o", "CRI-O": "cri-o"}.get(name, name)


def test_given_version_is_used() -> None:
    found = detect("podman 5.4.2")
    assert found == Runtime("podman", (5, 4, 2), (1, 57, 1))
    assert str(found) == "podman 5.4.2"


@pytest.mark.parametrize("text", ["docker", "docker 20.1", "podman latest", "/nonexistent/podman"])
def test_invalid_runtime_is_rejected(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        detect(text)
    assert caught.value.hint


def program(folder: pathlib.Path, name: str, text: str) -> str:
    """Create an executable that records its calls and prints a text."""
    path = folder / name
    path.write_text(f'#!/bin/sh\necho >>"{folder}/{name}.calls"\necho "{text}"\n')
    path.chmod(0o755)
    return str(path)


def test_runtimes_are_found_in_path(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buildah = program(tmp_path, "buildah", "buildah version 1.39.3 (image-spec 1.1.0)")
    podman = program(tmp_path, "podman", "podman version 5.2.1")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = detect()
    assert found == Runtime("podman", (5, 2, 1), (1, 55, 0), podman)
    assert detect("buildah") == Runtime("buildah", (1, 39, 3), (1, 57, 1), buildah)
    assert detect(podman) == found
    assert len((tmp_path / "podman.calls").read_text()) == 1


def test_program_without_version_is_rejected(tmp_path: pathlib.Path) -> None:
    path = program(tmp_path, "podman", "no idea")
    with pytest.raises(ConfigError, match="no readable version in 'no idea'"):
        detect(path)


def test_version_is_cached_while_executable_is_unchanged(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    version_cache: dict[str, str] = {}
    script = program(tmp_path, "podman", "podman version 5.2.1")
    assert detect(script, version_cache) == Runtime("podman", (5, 2, 1), (1, 55, 0), script)
    assert version_cache == {}, (
        "the version of a script, which may call another program later, is not cached"
    )
    compiled = str(tmp_path / "buildah")
    # GNU tools also print a version.
    shutil.copy("/bin/true", compiled)
    uncached = detect("buildah", version_cache)
    assert uncached is not None
    identity, storage = list(version_cache)
    version_cache[identity] = "buildah version 1.39.3"
    version_cache[storage] = "1.57.2 the package of the executable"
    found = detect("buildah", version_cache)
    assert found == Runtime("buildah", (1, 39, 3), (1, 57, 2), compiled)
    assert found.source == "the package of the executable"
    os.utime(compiled)
    assert detect("buildah", version_cache) == uncached
    assert len(version_cache) == 4


def test_script_counts_as_program_that_it_calls(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script prints the version of the compiled program that comes after it in PATH."""
    real = detect("podman")
    assert real is not None
    text = ".".join(map(str, real.version))
    script = program(tmp_path, "podman", f"podman version {text}")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin")
    found = detect("podman")
    assert found == Runtime("podman", real.version, real.storage_version, script)
    assert found.source == real.source != "the table of releases"
    (tmp_path / "other").mkdir()
    other = program(tmp_path / "other", "podman", "podman version 5.2.1")
    assert detect(other) == Runtime("podman", (5, 2, 1), (1, 55, 0), other)
