# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Which program and version will ask for a layer, and which containers/storage is built into it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import typing as t
from dataclasses import dataclass

from ..errors import ConfigError

Version = t.Tuple[int, ...]

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
_TIMEOUT = 60.0
_ELF = b"\x7fELF"

# Executables, in the order in which a host is searched.
PROGRAMS = {"podman": "podman", "buildah": "buildah", "cri-o": "crio"}
_ALIASES = {"crio": "cri-o", **{name: name for name in PROGRAMS}}

# From (major, minor) on: the containers/storage that the release was built with (its go.mod).
_STORAGE: dict[str, tuple[tuple[Version, Version], ...]] = {
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
    ),
    "cri-o": (
        ((1, 24), (1, 37, 0)),
        ((1, 25), (1, 42, 0)),
        ((1, 26), (1, 44, 0)),
        ((1, 27), (1, 46, 1)),
        ((1, 28), (1, 49, 0)),
        ((1, 29), (1, 51, 0)),
        ((1, 31), (1, 55, 0)),
        ((1, 32), (1, 56, 0)),
        ((1, 33), (1, 58, 0)),
        ((1, 34), (1, 59, 1)),
        ((1, 35), (1, 61, 0)),
    ),
}


@dataclass(frozen=True)
class Runtime:
    """A program that asks for layers.

    ``name`` is "podman", "buildah" or "cri-o"; ``path`` is empty when it was only named.
    """

    name: str
    version: Version
    storage_version: Version
    path: str = ""

    def __str__(self) -> str:
        return f"{self.name} {'.'.join(str(number) for number in self.version)}"


def runtime(name: str, version: str, path: str = "") -> Runtime:
    """A runtime of a given version, such as ``runtime("podman", "4.3.1")``.

    :raises ConfigError: the program is unknown or the version unreadable
    """
    known = _ALIASES.get(name.lower())
    if known is None:
        raise ConfigError(
            f"runtime {name}",
            "is no program whose layers can be predicted",
            f"Use one of: {', '.join(PROGRAMS)}.",
        )
    match = _VERSION.search(version)
    if match is None:
        raise ConfigError(
            f"runtime {name}",
            f"has no readable version in {version.strip()!r}",
            f'Give one, for example "{known} 5.4.2".',
        )
    numbers = tuple(int(number or 0) for number in match.groups())
    return Runtime(known, numbers, storage_version(known, numbers), path)


def storage_version(name: str, version: Version) -> Version:
    """The containers/storage version in a release of a program, (0,) before any that is known."""
    found: Version = (0,)
    for start, storage in _STORAGE[name]:
        if version[:2] >= start:
            found = storage
    return found


def detect(
    preferred: str | None = None, said: t.MutableMapping[str, str] | None = None
) -> Runtime | None:
    """The runtime of this host: the preferred one, else the first of podman, buildah and CRI-O.

    :param preferred: a program's name or path, optionally followed by a version ("podman 5.4.2"),
        which is then believed without asking the program
    :param said: what programs said when they were asked before, by what identifies their file; the
        same file is not asked again, and new answers are added
    :raises ConfigError: the preferred program is unknown, not installed, or does not tell its
        version
    """
    if preferred and preferred.strip():
        word, _blank, version = preferred.strip().partition(" ")
        base = os.path.basename(word)
        if version.strip():
            return runtime(base, version)
        known = _ALIASES.get(base.lower())
        if known is None:
            return runtime(base, version)
        path = shutil.which(word if os.sep in word else PROGRAMS[known], path=_search_path())
        if path is None:
            raise ConfigError(
                f"runtime {word}",
                "is not installed on this host",
                f'Install it, or give its version too, for example "{known} 5.4.2".',
            )
        return _ask(known, path, said)
    for known, program in PROGRAMS.items():
        path = shutil.which(program, path=_search_path())
        if path is not None:
            return _ask(known, path, said)
    return None


def _search_path() -> str:
    """PATH, with the folders that a plain user's or Ansible's shell may leave out."""
    given = os.environ.get("PATH", os.defpath)
    return os.pathsep.join((given, "/usr/local/bin", "/usr/bin", "/usr/sbin"))


def _ask(name: str, path: str, said: t.MutableMapping[str, str] | None) -> Runtime:
    identity = _identity(path) if said is not None else ""
    if said is None or not identity:
        return runtime(name, _version(name, path), path)
    if identity not in said:
        said[identity] = _version(name, path)
    return runtime(name, said[identity], path)


def _identity(path: str) -> str:
    """What changes whenever a program does; empty for scripts, which may call any other."""
    real = os.path.realpath(path)
    try:
        with open(real, "rb") as file:
            if file.read(len(_ELF)) != _ELF:
                return ""
            status = os.fstat(file.fileno())
    except OSError:
        return ""
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return f"{real} {' '.join(map(str, numbers))}"


@functools.cache
def _version(name: str, path: str) -> str:
    try:
        answer = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            timeout=_TIMEOUT,
            check=False,
            encoding="utf-8",
            errors="replace",
            cwd="/",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(
            f"runtime {path}",
            f"does not tell its version: {error}",
            f'Try: {path} --version, or give the version, for example "{name} 5.4.2".',
        ) from error
    return answer.stdout or answer.stderr
