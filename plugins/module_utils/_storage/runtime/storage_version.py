# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Determine the version of containers/storage in an executable.

Distributions may build a program with another version of the library than upstream, so the program's own version
is not enough. Sources, in this order: Go's build information in the executable, the Debian package that the
executable belongs to, and whether the executable contains the configuration loader of storage 1.63.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import typing as t
from dataclasses import dataclass

from ..capabilities import Version, loader_agrees

ELF = b"\x7fELF"

_CHUNK = 1 << 20
# The list of modules of a large Go program takes less than 100 kB.
_INFORMATION_LIMIT = 1 << 20
_SECTIONS_LIMIT = 1024
_ENTRY_LIMIT = 256
_INFORMATION = b".go.buildinfo"
# https://pkg.go.dev/runtime/debug#ParseBuildInfo: a line for each module, followed by another line if it was replaced.
_MODULE = re.compile(
    rb"\ndep\t(?:github\.com/containers|go\.podman\.io)/storage\t(v[^\t\n]*)[^\n]*"
    rb"(?:\n=>\t[^\t\n]*\t?(v[^\t\n]*)?)?"
)
_NUMBER = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?(-)?")
_LOADER = b"storage/pkg/configfile"
_BUILT_WITH = re.compile(
    r"\bgolang-[a-z0-9.+-]*(?:containers|podman)[a-z0-9.+-]*storage \(= (?:\d+:)?(\d+)\.(\d+)(?:\.(\d+))?"
)
_DPKG = "/var/lib/dpkg/info"
_TIMEOUT = 60.0

BUILD_INFORMATION = "the build information of the executable"
PACKAGE = "the package of the executable"
LOADER = "the configuration loader in the executable"


@dataclass(frozen=True)
class FoundVersion:
    """A version of containers/storage, and its source."""

    version: Version
    source: str


def storage_version(path: str, package: str, released: t.Callable[[], Version]) -> FoundVersion:
    """Determine the version of containers/storage in an executable.

    :param package: the name of the Debian package with the program
    :param released: returns the version with which the release was published; called for executables
        without version information
    :raises OSError: the executable cannot be read
    """
    path = os.path.realpath(path)
    information = _build_information(path)
    match = _MODULE.search(information)
    number = _NUMBER.match((match.group(2) or match.group(1)).decode()) if match else None
    if number is not None:
        version = _version(number.groups()[:3])
        if number.group(4):
            # A snapshot between two releases.
            version = loader_agrees(version, contains(path, _LOADER))
        return FoundVersion(version, BUILD_INFORMATION)
    built_with = _BUILT_WITH.search(_debian_sources(path, package))
    if built_with is not None:
        return FoundVersion(_version(built_with.groups()), PACKAGE)
    return FoundVersion(loader_agrees(released(), contains(path, _LOADER)), LOADER)


def contains(path: str, text: bytes) -> bool:
    """Whether a file contains a text; read in chunks of 1 MB.

    :raises OSError: it cannot be read
    """
    with open(path, "rb", buffering=0) as file:
        tail = b""
        while True:
            chunk = file.read(_CHUNK)
            if not chunk:
                return False
            chunk = tail + chunk
            if text in chunk:
                return True
            tail = chunk[1 - len(text) :]


def _version(numbers: t.Iterable[t.Optional[str]]) -> Version:
    return tuple(int(number or 0) for number in numbers)


def _build_information(path: str) -> bytes:
    """The section with Go's build information; empty if there is none."""
    with open(path, "rb") as file:
        try:
            return _section(file, _INFORMATION)
        except (struct.error, IndexError):
            return b""


def _section(file: t.BinaryIO, name: bytes) -> bytes:
    """A section of an ELF file, at most its first megabyte (System V ABI, chapter 4)."""
    head = file.read(64)
    if head[:4] != ELF:
        return b""
    wide, order = head[4] == 2, "<" if head[5] == 1 else ">"
    offset = struct.unpack_from(order + ("Q" if wide else "I"), head, 40 if wide else 32)[0]
    size, count, names = struct.unpack_from(f"{order}HHH", head, 58 if wide else 46)
    layout = struct.Struct(order + ("IIQQQQ" if wide else "IIIIII"))
    end = os.fstat(file.fileno()).st_size
    if not layout.size <= size <= _ENTRY_LIMIT or offset > end:
        return b""
    file.seek(offset)
    table = file.read(size * min(count, _SECTIONS_LIMIT))
    sections = [layout.unpack_from(table, index * size) for index in range(len(table) // size)]

    def content(section: t.Tuple[int, ...]) -> bytes:
        file.seek(min(section[4], end))
        return file.read(min(section[5], _INFORMATION_LIMIT))

    texts = content(sections[names])
    for section in sections:
        if texts[section[0] : texts.find(b"\0", section[0])] == name:
            return content(section)
    return b""


def _debian_sources(path: str, package: str) -> str:
    """The packages with which a Debian package was built; empty if the executable belongs to no package."""
    try:
        with open(os.path.join(_DPKG, f"{package}.list"), encoding="utf-8") as listed:
            if path not in listed.read().splitlines():
                return ""
        done = subprocess.run(
            [
                "dpkg-query",
                "--show",
                "--showformat=${Static-Built-Using}\n${Built-Using}\n",
                package,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
