# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""/etc/subuid and /etc/subgid as shadow reads them, byte for byte.

Follows lib/commonio.c and lib/subordinateio.c of shadow 4.13, 4.17 and 4.20; the tests compare the result with
``getsubids`` of each. newuidmap and newgidmap do not map entries that shadow does not read.
"""

from __future__ import annotations

import functools
import glob
import re
import typing as t
from dataclasses import dataclass

_CHUNK = 4096
_LONGEST_LINE = 1023
_MAX_ULONG = 2**64 - 1
_MAX_ID = 2**32 - 1

# strtoul(3) with base 0 in the C locale: white space, a sign, and digits of the base given by the prefix.
_NUMBER = re.compile(
    rb"[ \t\n\v\f\r]*([+-]?)(?:0[xX]([0-9a-fA-F]+)|0[bB]([01]+)|(0[0-7]*)|([1-9][0-9]*))"
)
_BASES = (16, 2, 8, 10)

_LIBRARIES = (
    "/usr/lib/*-linux-gnu*/libsubid.so.*",
    "/usr/lib64/libsubid.so.*",
    "/usr/lib/libsubid.so.*",
)
_SONAME = re.compile(r"libsubid\.so\.([0-9]+)")


@dataclass(frozen=True)
class Dialect:
    """The differences between the versions of shadow.

    :ivar signed: a negative number is taken modulo 2**64
    :ivar binary: ``0b101`` is a number (where shadow was built with glibc 2.38 or later)
    :ivar strict: a line has exactly three fields and stays within 32 bits, and a file that has a NUL or does
        not end in a newline is not read at all
    """

    signed: bool = False
    binary: bool = False
    strict: bool = False


SHADOW_4_13 = Dialect(signed=True)
SHADOW_4_17 = Dialect(binary=True)
SHADOW_4_20 = Dialect(binary=True, strict=True)
DIALECTS = (SHADOW_4_13, SHADOW_4_17, SHADOW_4_20)
# By the version of libsubid's interface that introduced it.
_BY_SONAME = {5: SHADOW_4_17, 6: SHADOW_4_20}


class NotRead(Exception):
    """Shadow does not read the file at all. The message states the reason."""


class Line(t.NamedTuple):
    """One entry that shadow reads."""

    owner: str
    start: int
    size: int


def installed() -> Dialect:
    """The dialect of this host's shadow, by the version of its library; the oldest without a library."""
    return _dialect_of(_LIBRARIES)


@functools.cache
def _dialect_of(libraries: t.Tuple[str, ...]) -> Dialect:
    versions = [4]
    for pattern in libraries:
        for path in glob.glob(pattern):
            found = _SONAME.search(path)
            versions.append(int(found.group(1)) if found else 0)
    newest = max(versions)
    return _BY_SONAME.get(newest, SHADOW_4_20 if newest > max(_BY_SONAME) else SHADOW_4_13)


def parse(content: bytes, dialect: Dialect) -> t.List[Line]:
    """The entries of a file in order, including empty ranges.

    :raises NotRead: shadow does not read the file
    """
    found = []
    for raw in _strict_lines(content) if dialect.strict else _lines(content):
        line = parse_line(raw, dialect)
        if line is not None:
            found.append(line)
    return found


def parse_line(raw: bytes, dialect: Dialect) -> t.Optional[Line]:
    """Parse a line without its newline; None if shadow ignores it."""
    if raw[:1] in (b"+", b"-") or len(raw) > _LONGEST_LINE:
        return None
    fields = raw.split(b":")
    if len(fields) < 3 or not all(fields[:3]) or (dialect.strict and len(fields) != 3):
        return None
    start, size = number(fields[1], dialect), number(fields[2], dialect)
    if start is None or size is None:
        return None
    if dialect.strict and (start > _MAX_ID or size > min(_MAX_ID + 1 - start, _MAX_ID)):
        return None
    return Line(fields[0].decode("utf-8", "surrogateescape"), start, size)


def number(text: bytes, dialect: Dialect) -> t.Optional[int]:
    """An unsigned number as shadow reads it; None if it is no number."""
    found = _NUMBER.fullmatch(text)
    if found is None or (found.group(3) is not None and not dialect.binary):
        return None
    sign, *digits = found.groups()
    value = next(int(text, base) for text, base in zip(digits, _BASES) if text is not None)
    if value > _MAX_ULONG:
        return None
    if sign == b"-" and value:
        return (1 << 64) - value if dialect.signed else None
    return value


def _strict_lines(content: bytes) -> t.Iterator[bytes]:
    if b"\0" in content:
        raise NotRead("holds a NUL character")
    if content and not content.endswith(b"\n"):
        raise NotRead("does not end in a newline")
    return iter(content.split(b"\n")[:-1])


def _lines(content: bytes) -> t.Iterator[bytes]:
    """Lines as fgets(3) reads them into a growing buffer; a NUL ends the visible part of a piece."""
    room, position, size = _CHUNK, 0, len(content)

    def piece(most: int) -> t.Tuple[bytes, bool]:
        """The result of a call, and whether it reached the end of the file."""
        nonlocal position
        newline = content.find(b"\n", position, position + most)
        end = newline + 1 if newline >= 0 else min(position + most, size)
        read = content[position:end]
        position = end
        return read, newline < 0 and len(read) < most

    while position < size:
        read, ended = piece(room - 1)
        line = read.partition(b"\0")[0]
        while b"\n" not in line and not ended:
            room += _CHUNK
            if position >= size:
                raise NotRead(
                    "ends in a line with a NUL character"
                    if b"\0" in content
                    else "does not end in a newline, after a last line of thousands of characters"
                )
            read, ended = piece(room - len(line) - 1)
            line += read.partition(b"\0")[0]
        yield line.rpartition(b"\n")[0] if b"\n" in line else line
