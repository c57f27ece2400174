# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Parse quadlet units of podman as its generator does (podman 5.4 to 6.1), and expand them as systemd does.

A value that those versions read differently, or of which they silently drop a part, is refused.
"""

from __future__ import annotations

import posixpath
import re
import typing as t

# The white space of Go's unicode.IsSpace, which excludes the record separators of Python's.
_SPACE = "".join(
    character
    for character in map(chr, range(0x3001))
    if character.isspace() and not "\x1c" <= character <= "\x1f"
)
_SEPARATORS = " \t\n\r"
# The kinds of units, each with its section and the suffix of its service's name.
SECTIONS = {
    "container": ("Container", ""),
    "pod": ("Pod", "-pod"),
    "kube": ("Kube", ""),
    "image": ("Image", "-image"),
    "build": ("Build", "-build"),
    "volume": ("Volume", "-volume"),
    "network": ("Network", "-network"),
    "artifact": ("Artifact", "-artifact"),
}
# Keys that determine the mapping or the image.
KEYS = (
    *("Image", "Rootfs", "Pod", "Yaml", "ImageTag", "PodmanArgs", "GlobalArgs"),
    *("UserNS", "UIDMap", "GIDMap", "SubUIDMap", "SubGIDMap"),
    *("RemapUsers", "RemapUid", "RemapGid", "RemapUidSize"),
)
_KNOWN = {key.casefold(): key for key in KEYS}
_MAPPING_KEYS = frozenset(KEYS[7:])
# Specifiers of systemd; other letters are not replaced.
_SPECIFIERS = frozenset("aAbBCdDEfgGhHiIjJlLmMnNopPqsStTuUvVwWy")
_ESCAPES = dict(zip("abfnrtvs\\\"'", "\a\b\f\n\r\t\v \\\"'"))
_ESCAPE = re.compile(
    r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-3][0-7]{2})|([abfnrtvs\\\"'])"
)


class UnitError(ValueError):
    """A unit or manifest cannot be parsed, or depends on an unknown value. The message names it."""


class Unit:
    """A unit with its drop-ins.

    :param name: its file name, or a description of a text without one
    :param named: whether ``name`` is a file name
    :raises UnitError: a line is malformed, or one of :data:`KEYS` is misspelled
    """

    def __init__(self, name: str, text: str, named: bool = True) -> None:
        self.name = name
        self.named = named
        self.kind = name.rpartition(".")[2] if named else ""
        # Sections, with their pairs of key and value in order.
        self.sections: t.Dict[str, t.List[t.Tuple[str, str]]] = {}
        self.notes: t.List[str] = []
        self._read(name, text)

    def add(self, name: str, text: str) -> None:
        """Read a drop-in.

        :raises UnitError: as the class
        """
        self._read(name, text)

    def _read(self, name: str, text: str) -> None:
        current: t.Optional[t.List[t.Tuple[str, str]]] = None
        section = ""
        for number, line in _lines(text):
            heading = re.fullmatch(r"\[([^\]]*)\][ \t]*", line)
            if heading:
                section = heading[1]
                if not section or "[" in section or not section.isprintable():
                    raise UnitError(f"{name} line {number}: {line!r} is not a section")
                current = self.sections.setdefault(section, [])
                continue
            key, equals, value = line.partition("=")
            key = key.rstrip(_SPACE)
            if not equals or not key:
                raise UnitError(f"{name} line {number}: {line!r} is not KEY=VALUE")
            if current is None:
                raise UnitError(f"{name} line {number}: {line!r} is before the first section")
            self._check(name, number, section, key)
            current.append((key, value.lstrip(_SPACE)))

    def _check(self, name: str, number: int, section: str, key: str) -> None:
        own = {section for section, _ending in SECTIONS.values()}
        known = _KNOWN.get(key.casefold())
        if section in own and known not in (None, key):
            raise UnitError(
                f"{name} line {number}: quadlet does not support the key {key}, but {known}"
            )
        if section not in own and key in _MAPPING_KEYS:
            self.notes.append(f"{name} line {number}: quadlet does not read {key} in [{section}]")

    # Values

    def last(self, section: str, key: str) -> str:
        """The last value, without surrounding white space and quotation marks.

        :raises UnitError: quotation marks are not around the whole value
        """
        value = next(
            (value for found, value in reversed(self.sections.get(section, ())) if found == key), ""
        ).rstrip(_SPACE)
        if not (value.startswith('"') or value.endswith('"')):
            return value
        inner = value[1:-1]
        if len(value) < 2 or value[0] != value[-1] or inner.startswith('"') or inner.endswith('"'):
            raise UnitError(
                f"{self.name}: {key}={value} has quotation marks that do not enclose the whole "
                "value, which versions of quadlet read differently: remove them"
            )
        return inner

    def bare(self, section: str, key: str) -> str:
        """As :meth:`last`, with quotation marks kept."""
        values = [value for found, value in self.sections.get(section, ()) if found == key]
        return values[-1].rstrip(_SPACE) if values else ""

    def has(self, section: str, key: str) -> bool:
        """Whether the key exists, even with an empty value."""
        return any(found == key for found, _value in self.sections.get(section, ()))

    def all(self, section: str, key: str) -> t.List[str]:
        """All values; an empty value removes those before it."""
        values: t.List[str] = []
        for found, value in self.sections.get(section, ()):
            if found == key:
                values = [*values, value] if value else []
        return values

    def words(self, section: str, key: str) -> t.List[str]:
        """The words of all values, without quotation marks; backslashes are literal.

        :raises UnitError: a quotation mark is not closed, or a word is empty
        """
        return self._split(section, key, False)

    def arguments(self, section: str, key: str) -> t.List[str]:
        """The words of all values as of a command, with escape sequences.

        :raises UnitError: as :meth:`words`, or an escape sequence is unknown
        """
        return self._split(section, key, True)

    def _split(self, section: str, key: str, escapes: bool) -> t.List[str]:
        try:
            return [word for value in self.all(section, key) for word in split(value, escapes)]
        except UnitError as error:
            raise UnitError(f"{self.name}: {key}: {error}") from error

    # Expansion by systemd

    def expanded(
        self,
        key: str,
        value: str,
        specifiers: t.Mapping[str, str],
        variables: t.Mapping[str, str],
    ) -> str:
        """A value of the generated command as podman receives it.

        :raises UnitError: it has a specifier or variable of unknown value
        """
        known = {**self._own_specifiers(), **specifiers}

        def specifier(match: t.Match[str]) -> str:
            letter = match[1]
            if letter == "%":
                return "%"
            if letter in known:
                return known[letter]
            if letter not in _SPECIFIERS:
                return match[0]
            what = (
                "the instance"
                if letter in "iI"
                else "whose value only systemd on the host can determine"
            )
            raise UnitError(
                f"{self.name}: {key}={value} has %{letter}, {what}: set it in specifiers"
            )

        result = re.sub(r"%(.)", specifier, value)
        return expand_variables(
            f"{self.name}: {key}={value}", result, {**self._environment(), **variables}
        )

    def _environment(self) -> t.Dict[str, str]:
        assignments = self.arguments("Service", "Environment")
        return dict(word.split("=", 1) for word in assignments if "=" in word)

    def _own_specifiers(self) -> t.Dict[str, str]:
        """Specifiers with values from the file name."""
        if not self.named or self.kind not in SECTIONS:
            return {}
        section, ending = SECTIONS[self.kind]
        stem = self.name.rpartition(".")[0]
        name = self.last(section, "ServiceName") or f"{stem}{ending}"
        prefix, at, instance = name.partition("@")
        if at and not instance:
            # The instance of a template is only known when it is started.
            return {"p": prefix, "P": _unescaped(prefix)}
        last = prefix.rpartition("-")[2]
        known = {"n": f"{name}.service", "N": name, "p": prefix, "i": instance, "j": last}
        return {**known, "P": _unescaped(prefix), "I": _unescaped(instance), "J": _unescaped(last)}


def expand_variables(location: str, value: str, known: t.Mapping[str, str]) -> str:
    """Replace the variables in a word of a command as systemd does.

    :param location: the location of the value, for messages
    :raises UnitError: a variable is unknown
    """

    def lookup(name: str) -> str:
        if name not in known:
            raise UnitError(f"{location} has the variable {name}: set its value in variables")
        return known[name]

    whole = re.fullmatch(r"\$([A-Za-z_][A-Za-z0-9_]*)", value)
    if whole:
        return lookup(whole[1])

    def variable(match: t.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", match[1]):
            raise UnitError(
                f"{location} has {match[0]}, which is not expanded: write the value instead"
            )
        return lookup(match[1])

    return re.sub(r"\$\$|\$\{([^}]*)\}", variable, value)


def dropin_folders(name: str) -> t.List[str]:
    """The folders of a unit's drop-ins, the most specific first: those of its name, parts of it, and its kind."""
    stem, _dot, kind = name.rpartition(".")
    prefix, at, instance = stem.partition("@")
    folders = [f"{kind}.d"]
    parts = prefix.split("-")
    for number in range(1, len(parts)):
        start = "-".join(parts[:number]) + "-"
        folders += [f"{start}.{kind}.d", *([f"{start}@.{kind}.d"] if at else ())]
    if instance:
        folders.append(f"{prefix}@.{kind}.d")
    return [*folders, f"{name}.d"][::-1]


def dropins(name: str, files: t.Mapping[str, str]) -> t.List[str]:
    """The paths among ``files`` that are drop-ins of a unit, in the order in which they are applied."""
    found: t.Dict[str, str] = {}
    for folder in dropin_folders(name):
        for path in sorted(files):
            parent, file = posixpath.split(path)
            if file.endswith(".conf") and posixpath.basename(parent) == folder:
                # Of drop-ins with the same name, only the most specific is used.
                found.setdefault(file, path)
    return [found[file] for file in sorted(found)]


def split(text: str, escapes: bool) -> t.List[str]:
    """Split a value into words as systemd does.

    :param escapes: whether backslashes start escape sequences
    :raises UnitError: a quotation mark is not closed, a word is empty, or an escape sequence is unknown
    """
    words: t.List[str] = []
    word: t.List[str] = []
    quote, begun, at = "", False, 0
    if "\0" in text:
        raise UnitError("quadlet stops reading at a NUL character")
    while at < len(text):
        character = text[at]
        at += 1
        if escapes and character == "\\":
            match = _ESCAPE.match(text, at)
            if match is None:
                raise UnitError(f"\\{text[at : at + 1]} is not an escape sequence of systemd")
            word.append(_escaped(match))
            begun, at = True, match.end()
        elif quote:
            if character == quote:
                quote = ""
            else:
                word.append(character)
        elif character in "'\"":
            quote, begun = character, True
        elif character in _SEPARATORS:
            if begun:
                words.append("".join(word))
                word, begun = [], False
        else:
            word.append(character)
            begun = True
    if quote:
        raise UnitError(f"a quotation mark {quote} is not closed")
    if begun:
        words.append("".join(word))
    if "" in words:
        raise UnitError("quadlet ignores the text after an empty word")
    return words


def _escaped(match: t.Match[str]) -> str:
    if match[5]:
        return _ESCAPES[match[5]]
    number = int(match[4], 8) if match[4] else int(match[1] or match[2] or match[3], 16)
    if number == 0 or number > 0x10FFFF or 0xD800 <= number < 0xE000:
        raise UnitError(f"\\{match[0]} is not a character")
    return chr(number)


def _lines(text: str) -> t.Iterator[t.Tuple[int, str]]:
    """Lines with their numbers, without comments; lines that end in a backslash are joined with the next line.

    Comments and empty lines between joined lines are left out, and lines are joined without a blank.
    """
    begun, started = "", 0
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    for number, raw in enumerate(lines, 1):
        line = raw.strip(_SPACE)
        if not line or line[0] in "#;":
            continue
        started = started or number
        if line.endswith("\\"):
            begun += line[:-1]
            if number < len(lines):
                continue
            line = ""
        yield started, begun + line
        begun, started = "", 0
    if begun:
        # Only comments follow the last backslash; quadlet then drops the line.
        raise UnitError(f"line {started}: {begun!r} continues on a missing line")


def _unescaped(name: str) -> str:
    """A part of a unit's name as unescaped by systemd-escape --unescape."""
    text = name.replace("-", "/")
    raw = re.sub(
        rb"\\x([0-9a-f]{2})",
        lambda match: bytes([int(match[1], 16)]),
        text.encode("utf-8", "replace"),
    )
    return raw.decode("utf-8", "replace")
