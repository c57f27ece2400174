# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""A reader of TOML 1.0, for storage.conf on Pythons without ``tomllib``.

Dates and times are left as text, since no setting of storage.conf is one.
"""

from __future__ import annotations

import math
import re
import typing as t

from ..errors import ConfigError

Table = t.Dict[str, t.Any]

_DEPTH_LIMIT = 64
_DIGITS_LIMIT = 400

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_BLANK = re.compile(r"[ \t]*")
_COMMENT = re.compile(r"#[^\n\r\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*")
_INTEGER = re.compile(
    r"0x[0-9A-Fa-f]+(?:_[0-9A-Fa-f]+)*|0o[0-7]+(?:_[0-7]+)*|0b[01]+(?:_[01]+)*"
    r"|[+-]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)"
)
_FLOAT = re.compile(
    r"[+-]?(?:(?:0|[1-9][0-9]*(?:_[0-9]+)*)"
    r"(?:\.[0-9]+(?:_[0-9]+)*(?:[eE][+-]?[0-9]+(?:_[0-9]+)*)?|[eE][+-]?[0-9]+(?:_[0-9]+)*)"
    r"|inf|nan)"
)
_MOMENT = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"(?:[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?(?:[Zz]|[+-][0-9]{2}:[0-9]{2})?)?"
    r"|[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?"
)
_WORD_END = re.compile(r"[ \t\n\r,\]}#]|$")
_LITERAL = re.compile(r"'([^'\n\r\x00-\x08\x0b\x0c\x0e-\x1f\x7f]*)'")
_BASIC_PART = re.compile(r'[^"\\\n\r\x00-\x08\x0b\x0c\x0e-\x1f\x7f]+')
_BASIC_LINES_PART = re.compile(r'[^"\\\x00-\x08\x0b\x0c\x0e-\x1f\x7f]+')
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")
_FOLD = re.compile(r"\\[ \t]*\r?\n[ \t\r\n]*")
_ESCAPES = {
    "b": "\b",
    "t": "\t",
    "n": "\n",
    "f": "\f",
    "r": "\r",
    '"': '"',
    "\\": "\\",
}


def quoted(text: str) -> str:
    """A string in TOML notation, on one line.

    :raises ConfigError: it contains a character that TOML documents cannot contain
    """
    if not _writable(text):
        raise ConfigError(
            repr(text), "is not Unicode text, which TOML requires", "Give it another name."
        )
    return f'"{"".join(map(_in_quotes, text))}"'


def _in_quotes(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08X}"


def key(text: str) -> str:
    """A key in TOML notation.

    :raises ConfigError: as :func:`quoted`
    """
    return text if _BARE_KEY.fullmatch(text) else quoted(text)


def value(found: t.Any) -> str:
    """A string, truth value, number, or list of these in TOML notation.

    :raises ConfigError: as :func:`quoted`, or it has another type
    """
    if isinstance(found, str):
        return quoted(found)
    if isinstance(found, bool):
        return "true" if found else "false"
    if isinstance(found, int) and -(2**63) <= found < 2**63:
        return str(int(found))
    if isinstance(found, float) and math.isfinite(found):
        return repr(float(found))
    if isinstance(found, (list, tuple)):
        return f"[{', '.join(value(item) for item in found)}]"
    raise ConfigError(
        repr(found),
        "is not a value of storage.conf",
        "Give a string, a number, a boolean or a list.",
    )


def _writable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Defined(t.Dict[str, t.Any]):
    """A table with a record of how it was defined."""

    header = False
    dotted = False
    closed = False


class _Reader:
    def __init__(self, text: str, path: str) -> None:
        self.text = text
        self.path = path
        self.at = 0
        self.root = _Defined()

    def wrong(self, what: str) -> ConfigError:
        line = self.text.count("\n", 0, self.at) + 1
        return ConfigError(
            f"{self.path}, line {line}",
            f"is not TOML: {what}",
            "Correct the file; man 5 containers-storage.conf shows its form.",
            path=self.path,
            line=line,
        )

    def skip(self, pattern: t.Pattern[str]) -> bool:
        match = pattern.match(self.text, self.at)
        if match is None:
            return False
        self.at = match.end()
        return True

    def take(self, word: str) -> bool:
        if self.text.startswith(word, self.at):
            self.at += len(word)
            return True
        return False

    def end_of_line(self) -> None:
        self.skip(_BLANK)
        self.skip(_COMMENT)
        if self.at < len(self.text) and not (self.take("\n") or self.take("\r\n")):
            raise self.wrong("unexpected text follows at the end of the line")

    def blanks(self) -> None:
        """Skip blanks, line ends and comments, which arrays allow."""
        while True:
            before = self.at
            self.skip(_BLANK)
            self.skip(_COMMENT)
            if not self.take("\n"):
                self.take("\r\n")
            if self.at == before:
                return

    def run(self) -> Table:
        table = self.root
        while True:
            self.skip(_BLANK)
            if self.at >= len(self.text):
                return self.root
            if self.take("[["):
                table = self.array_header()
            elif self.take("["):
                table = self.header()
            elif self.text[self.at] not in "#\r\n":
                self.pair(table)
            self.end_of_line()

    # Keys and tables

    def key(self) -> t.List[str]:
        names = []
        while True:
            self.skip(_BLANK)
            match = _BARE_KEY.match(self.text, self.at)
            if match:
                self.at = match.end()
                names.append(match.group())
            elif self.text.startswith("'", self.at):
                names.append(self.literal())
            elif self.text.startswith('"', self.at):
                names.append(self.basic())
            else:
                raise self.wrong("a key is missing")
            self.skip(_BLANK)
            if not self.take("."):
                if len(names) > _DEPTH_LIMIT:
                    raise self.wrong("a key has too many parts")
                return names

    def descend(self, table: _Defined, names: t.Sequence[str], dotted: bool) -> _Defined:
        for name in names:
            found = table.get(name)
            if found is None:
                found = _Defined()
                found.dotted = dotted
                table[name] = found
            elif isinstance(found, list) and found and not dotted:
                found = found[-1]
            if not isinstance(found, _Defined) or found.closed:
                raise self.wrong(f"{name!r} is already a value")
            if dotted and not found.dotted:
                raise self.wrong(f"{name!r} is already a table")
            table = found
        return table

    def header(self) -> _Defined:
        names = self.key()
        if not self.take("]"):
            raise self.wrong("a table's name lacks its ']'")
        parent = self.descend(self.root, names[:-1], False)
        found = parent.get(names[-1])
        if found is None:
            found = _Defined()
            parent[names[-1]] = found
        if not isinstance(found, _Defined) or found.header or found.dotted or found.closed:
            raise self.wrong(f"{names[-1]!r} is already defined")
        found.header = True
        return found

    def array_header(self) -> _Defined:
        names = self.key()
        if not self.take("]]"):
            raise self.wrong("a table's name lacks its ']]'")
        parent = self.descend(self.root, names[:-1], False)
        found = parent.setdefault(names[-1], _TableArray())
        if not isinstance(found, _TableArray):
            raise self.wrong(f"{names[-1]!r} is already defined")
        table = _Defined()
        found.append(table)
        return table

    def pair(self, table: _Defined, depth: int = 0) -> None:
        names = self.key()
        if not self.take("="):
            raise self.wrong("a key is not followed by '='")
        parent = self.descend(table, names[:-1], True)
        if names[-1] in parent:
            raise self.wrong(f"{names[-1]!r} is already defined")
        self.skip(_BLANK)
        parent[names[-1]] = self.value(depth)

    # Values

    def value(self, depth: int) -> t.Any:
        if depth > _DEPTH_LIMIT:
            raise self.wrong("too many nested lists or tables")
        start = self.text[self.at : self.at + 1]
        if start == '"':
            return self.basic_lines() if self.take('"""') else self.basic()
        if start == "'":
            return self.literal_lines() if self.text.startswith("'''", self.at) else self.literal()
        if start == "[":
            return self.array(depth)
        if start == "{":
            return self.inline_table(depth)
        return self.word()

    def word(self) -> t.Any:
        match = _MOMENT.match(self.text, self.at)
        if match is None or not _WORD_END.match(self.text, match.end()):
            end = _WORD_END.search(self.text, self.at)
            stop = end.start() if end else len(self.text)
        else:
            stop = match.end()
        word = self.text[self.at : stop]
        if word in ("true", "false"):
            result: t.Any = word == "true"
        elif len(word) > _DIGITS_LIMIT:
            raise self.wrong("a value is too long")
        elif _INTEGER.fullmatch(word):
            result = int(word.replace("_", ""), 0)
        elif _FLOAT.fullmatch(word):
            result = float(word.replace("_", ""))
        elif _MOMENT.fullmatch(word):
            result = word
        else:
            raise self.wrong("a value is missing or malformed; text must stand in quotes")
        self.at = stop
        return result

    def array(self, depth: int) -> t.List[t.Any]:
        self.at += 1
        result: t.List[t.Any] = []
        while True:
            self.blanks()
            if self.take("]"):
                return result
            result.append(self.value(depth + 1))
            self.blanks()
            if not self.take(","):
                if self.take("]"):
                    return result
                raise self.wrong("a list lacks a ',' or its ']'")

    def inline_table(self, depth: int) -> _Defined:
        self.at += 1
        table = _Defined()
        self.skip(_BLANK)
        if not self.take("}"):
            while True:
                self.pair(table, depth + 1)
                self.skip(_BLANK)
                if self.take("}"):
                    break
                if not self.take(","):
                    raise self.wrong("an inline table lacks a ',' or its '}'")
        _close(table)
        return table

    def literal(self) -> str:
        match = _LITERAL.match(self.text, self.at)
        if match is None:
            raise self.wrong("a text lacks its closing quote")
        self.at = match.end()
        return match.group(1)

    def literal_lines(self) -> str:
        end = self.text.find("'''", self.at + 3)
        if end < 0:
            raise self.wrong("a text lacks its closing quotes")
        # Up to two more quotes are part of the text.
        while self.text.startswith("'", end + 3) and end - self.text.find("'''", self.at + 3) < 2:
            end += 1
        text = self.text[self.at + 3 : end]
        self.at = end + 3
        return self.lines(text)

    def lines(self, text: str) -> str:
        if _CONTROL.search(text):
            raise self.wrong("a text holds a control character")
        text = text.replace("\r\n", "\n")
        return text[1:] if text.startswith("\n") else text

    def basic(self) -> str:
        self.at += 1
        pieces = []
        while True:
            match = _BASIC_PART.match(self.text, self.at)
            if match:
                self.at = match.end()
                pieces.append(match.group())
            elif self.take('"'):
                return "".join(pieces)
            elif self.text.startswith("\\", self.at):
                pieces.append(self.escape())
            else:
                raise self.wrong("a text lacks its closing quote")

    def basic_lines(self) -> str:
        if not self.take("\n"):
            self.take("\r\n")
        pieces = []
        while True:
            match = _BASIC_LINES_PART.match(self.text, self.at)
            if match:
                self.at = match.end()
                if _CONTROL.search(match.group()):
                    raise self.wrong("a text holds a control character")
                pieces.append(match.group().replace("\r\n", "\n"))
            elif self.take('"""'):
                for _extra in range(2):
                    if self.take('"'):
                        pieces.append('"')
                return "".join(pieces)
            elif self.take('"'):
                pieces.append('"')
            elif self.skip(_FOLD):
                continue
            elif self.text.startswith("\\", self.at):
                pieces.append(self.escape())
            else:
                raise self.wrong("a text lacks its closing quotes")

    def escape(self) -> str:
        mark = self.text[self.at + 1 : self.at + 2]
        if mark in _ESCAPES and mark:
            self.at += 2
            return _ESCAPES[mark]
        size = {"u": 4, "U": 8}.get(mark, 0)
        digits = self.text[self.at + 2 : self.at + 2 + size]
        if size and len(digits) == size and re.fullmatch(r"[0-9A-Fa-f]+", digits):
            number = int(digits, 16)
            if number <= 0x10FFFF and not 0xD800 <= number <= 0xDFFF:
                self.at += 2 + size
                return chr(number)
        raise self.wrong("a text holds an unknown escape")


class _TableArray(t.List[t.Any]):
    """An array that ``[[name]]`` can extend."""


def _close(table: _Defined) -> None:
    """Mark an inline table and its contents as complete."""
    table.closed = True
    for value in table.values():
        if isinstance(value, _Defined):
            _close(value)


def loads(data: bytes, path: str) -> Table:
    """Read a TOML document.

    :param path: its name in error messages
    :raises ConfigError: it is not TOML; the message names the line
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(path, f"is not UTF-8 text: {error.reason}", "Correct the file.") from None
    return _Reader(text, path).run()
