# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Detect which program and version will request a layer, and the version of containers/storage in it."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import typing as t
from dataclasses import dataclass, field, replace

from ..capabilities import Capabilities, Version, capabilities, released_storage
from ..errors import ConfigError
from .storage_version import ELF, FoundVersion, storage_version

_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")
_TIMEOUT = 60.0

# Executables, in the order in which a host is searched.
PROGRAMS = {"podman": "podman", "buildah": "buildah", "cri-o": "crio"}
_ALIASES = {"crio": "cri-o", **{name: name for name in PROGRAMS}}
_RELEASE = "the table of releases"
# The prefix of storage versions in the cache.
_STORAGE_KEY = "storage "


@dataclass(frozen=True)
class Runtime:
    """A program that requests layers.

    ``name`` is "podman", "buildah" or "cri-o"; ``path`` is empty if it was only named; ``source`` is the source of
    the version of containers/storage.
    """

    name: str
    version: Version
    storage_version: Version
    path: str = ""
    source: str = field(default="", compare=False)

    @functools.cached_property
    def capabilities(self) -> Capabilities:
        """Its capabilities."""
        return capabilities(self.name, self.version, self.storage_version)

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
            "is not a supported program",
            f"Use one of: {', '.join(PROGRAMS)}.",
        )
    match = _VERSION.search(version)
    if match is None:
        raise ConfigError(
            f"runtime {name}",
            f"has no readable version in {version.strip()!r}",
            f'Set it, for example "{known} 5.4.2".',
        )
    numbers = tuple(int(number or 0) for number in match.groups())
    return Runtime(known, numbers, released_storage(known, numbers), path, _RELEASE)


def detect(
    preferred: t.Optional[str] = None, version_cache: t.Optional[t.MutableMapping[str, str]] = None
) -> t.Optional[Runtime]:
    """The runtime of this host: the preferred program, or the first of podman, buildah and CRI-O.

    :param preferred: a program's name or path, optionally followed by a version ("podman 5.4.2"),
        which is then used without running the program
    :param version_cache: versions that programs reported before, by the identity of the file; the
        same file is not run again, and new answers are added
    :raises ConfigError: the preferred program is unknown, not installed, or does not report its
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
                f'Install it, or set its version as well, for example "{known} 5.4.2".',
            )
        return _ask(known, path, version_cache)
    for known in PROGRAMS:
        path = find_program(known)
        if path:
            return _ask(known, path, version_cache)
    return None


def find_program(name: str) -> str:
    """The path of "podman", "buildah" or "cri-o"; empty if it is not installed."""
    return shutil.which(PROGRAMS[name], path=_search_path()) or ""


def installed() -> t.Iterator[t.Tuple[str, Capabilities, FoundVersion]]:
    """The programs of this host that use stores, without running them if possible.

    :returns: name, capabilities by the version of containers/storage (without podman's own), and that version
    :raises ConfigError: the version of a program cannot be determined
    """
    for name in PROGRAMS:
        path = find_program(name)
        if not path:
            continue
        if _is_executable(path):
            found = _storage_version(name, path)
        else:
            detected = _ask(name, path, None)
            found = FoundVersion(detected.storage_version, detected.source)
        yield name, capabilities(name, (), found.version), found


def _search_path() -> str:
    """PATH, with the folders that may be missing in a user's or Ansible's shell."""
    given = os.environ.get("PATH", os.defpath)
    return os.pathsep.join((given, "/usr/local/bin", "/usr/bin", "/usr/sbin"))


def _ask(name: str, path: str, version_cache: t.Optional[t.MutableMapping[str, str]]) -> Runtime:
    found = runtime(name, _remembered(version_cache, "", path, lambda: _version(name, path)), path)
    executable = path if _is_executable(path) else _wrapped(found)
    if not executable:
        return found

    def look() -> str:
        answer = _storage_version(name, executable)
        return f"{'.'.join(map(str, answer.version))} {answer.source}"

    number, _blank, source = _remembered(version_cache, _STORAGE_KEY, executable, look).partition(
        " "
    )
    match = _VERSION.match(number)
    if match is None:
        return found
    return replace(
        found,
        storage_version=tuple(int(number or 0) for number in match.groups()),
        source=source,
    )


def _remembered(
    version_cache: t.Optional[t.MutableMapping[str, str]],
    kind: str,
    path: str,
    ask: t.Callable[[], str],
) -> str:
    """A cached answer about a file, which is valid as long as the file does not change."""
    identity = _identity(path) if version_cache is not None else ""
    if version_cache is None or not identity:
        return ask()
    if kind + identity not in version_cache:
        version_cache[kind + identity] = ask()
    return version_cache[kind + identity]


def _wrapped(script: Runtime) -> str:
    """The executable that a wrapper script of the same name calls, identified by its equal version; empty if
    unknown."""
    program = PROGRAMS[script.name]
    for folder in _search_path().split(os.pathsep):
        path = os.path.join(folder, program)
        if _is_executable(path) and os.access(path, os.X_OK):
            same = runtime(script.name, _version(script.name, path)).version == script.version
            return path if same else ""
    return ""


@functools.cache
def _storage_version(name: str, path: str) -> FoundVersion:
    def released() -> Version:
        return runtime(name, _version(name, path)).storage_version

    try:
        return storage_version(path, name, released)
    except OSError:
        return FoundVersion(released(), _RELEASE)


def _is_executable(path: str) -> bool:
    """Whether it is a compiled program."""
    return bool(_identity(path))


def _identity(path: str) -> str:
    """The identity of a program file; empty for scripts, which may call other programs."""
    real = os.path.realpath(path)
    try:
        with open(real, "rb") as file:
            if file.read(len(ELF)) != ELF:
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
            f"does not report its version: {error}",
            f'Try: {path} --version, or set the version, for example "{name} 5.4.2".',
        ) from error
    return answer.stdout or answer.stderr
