# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The JSON records of layers, images and containers. Unchanged records are written back byte for byte.

Each file is a JSON array, as containers/storage writes it. A record keeps the bytes from which it was
read, so that unchanged parts are written back unchanged, including unknown fields and unusual numbers.
"""

from __future__ import annotations

import json
import math
import re
import typing as t
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from ..errors import RecordError
from ..idmap.mapping import UNMAPPED, Mapping
from ..idmap.ranges import IDENTITY, IDMap
from .fields import CONTAINER, DEPTH_LIMIT, IMAGE, LAYER, TIME, Fields, Raw, all_good, first_fault
from .json_numbers import PARSE_INT, refuse_constant

LAYERS = "layers"
IMAGES = "images"
CONTAINERS = "containers"

STABLE = "stable"
VOLATILE = "volatile"
IMAGESTORE = "imagestore"

# Larger than any real store, small enough to be read into memory (bytes).
SIZE_LIMIT = 256 * 1024 * 1024

_HINT = "Restore the file from a backup. `contradictions` of userns.storage.image_layers_info lists all damage."

_SPACE = re.compile(r"[ \t\n\r]*")
# Characters that Go's encoder escapes, and surrogates, which UTF-8 cannot encode.
_ESCAPED = re.compile("[<>&\u2028\u2029\ud800-\udfff]")


class _Number(float):
    """A number with a fraction or exponent that keeps its notation."""

    literal: str

    def __new__(cls, literal: str) -> _Number:
        number = super().__new__(cls, literal)
        number.literal = literal
        return number

    def __reduce__(self) -> t.Tuple[t.Any, ...]:
        return (_Number, (self.literal,))

    def __copy__(self) -> _Number:
        return self

    def __deepcopy__(self, memo: t.Any) -> _Number:
        return self


def _object(pairs: t.List[t.Tuple[str, t.Any]]) -> Raw:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: t.Set[str] = set()
        for key, _value in pairs:
            if key in seen:
                raise ValueError(f"the field {key[:60]!r} twice")
            seen.add(key)
    return result


# If a field occurs twice, the last one is used, as in Go.
_READER = json.JSONDecoder(parse_float=_Number, parse_int=PARSE_INT, parse_constant=refuse_constant)
# Refuses such a field, because it could not be written back unchanged.
_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_float=_Number,
    parse_int=PARSE_INT,
    parse_constant=refuse_constant,
)


def _space(text: str, index: int) -> int:
    match = _SPACE.match(text, index)
    return match.end() if match else index


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _plain(text: str) -> str:
    """Text for a message: short, printable, encodable."""
    return ascii(text[:80])[1:-1]


@dataclass(frozen=True)
class _Subject:
    """The subject of an error."""

    path: str
    index: int
    record: str = ""

    def __str__(self) -> str:
        name = f" ({_plain(self.record)})" if self.record else ""
        return f"{self.path}, record {self.index}{name}"


def _as_time(text: t.Optional[str]) -> t.Optional[datetime]:
    """A time with Python's precision of microseconds; None for Go's zero time and impossible dates."""
    match = TIME.fullmatch(text) if text else None
    if match is None:
        return None
    year, month, day, hour, minute, second, fraction, sign, hours, minutes = match.groups()
    try:
        offset = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
        moment = datetime(
            int(year),
            int(month),
            int(day),
            int(hour),
            int(minute),
            int(second),
            int((fraction or "0")[:6].ljust(6, "0")),
            timezone(-offset if sign == "-" else offset),
        ).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None
    return None if moment.year == 1 else moment


class _Source:
    """The bytes from which records were read; they are only split into records on demand."""

    def __init__(self, data: bytes, path: str) -> None:
        self._data = data
        self._path = path
        self._texts: t.Optional[t.List[bytes]] = None

    @property
    def texts(self) -> t.List[bytes]:
        if self._texts is None:
            self._texts = [text for _value, text in _split(self._data, self._path)]
        return self._texts


class Record:
    """A record. ``raw`` has the fields of the JSON in their order; it is read-only.

    :ivar path: the file from which it was read
    :ivar location: the kind of that file: "stable", "volatile" or "imagestore"
    :ivar read_only_store: the additional store that contains it; None for the store itself
    """

    __slots__ = ("_index", "_source", "location", "mapping", "path", "raw", "read_only_store")

    kind = ""
    fields: t.ClassVar[Fields] = {}

    def __init__(
        self,
        raw: Raw,
        source: _Source,
        path: str,
        location: str = STABLE,
        read_only_store: t.Optional[str] = None,
        index: int = 0,
        *,
        checked: bool = False,
    ) -> None:
        """Check the types of all known fields, unless they were checked before.

        :raises RecordError: a field is of a wrong type, or the ID is missing or malformed
        """
        self.raw = raw
        self._source = source
        self._index = index
        self.path = path
        self.location = location
        self.read_only_store = read_only_store
        fault = None if checked else first_fault(raw, self.fields)
        if fault:
            self._refuse(index, *fault)
        self.mapping = self._mapping(index)

    @property
    def text(self) -> bytes:
        """The record's own JSON.

        :raises RecordError: it cannot be written back unchanged because a field occurs twice
        """
        return self._source.texts[self._index]

    def __getstate__(self) -> t.Tuple[t.Any, ...]:
        return (self.raw, self.text, self.path, self.location, self.read_only_store, self.mapping)

    def __setstate__(self, state: t.Tuple[t.Any, ...]) -> None:
        (self.raw, text, self.path, self.location, self.read_only_store, self.mapping) = state
        self._source, self._index = _Source(b"[" + text + b"]", self.path), 0

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    def _refuse(self, index: int, key: str, wrong: str) -> t.NoReturn:
        name = self.raw.get("id")
        subject = _Subject(self.path, index, name if isinstance(name, str) else "")
        raise RecordError(
            str(subject),
            f"field {_plain(key)!r} {wrong}",
            _HINT,
            path=self.path,
            record=index,
            field=_plain(key),
        )

    def _mapping(self, index: int) -> Mapping:
        raw = self.raw
        uid, gid = raw.get("uidmap"), raw.get("gidmap")
        if not uid and not gid:
            return UNMAPPED
        # One object for all layers with a map, of which there may be thousands.
        spelt = repr((uid, gid))
        known = _mappings.get(spelt)
        if known is None:
            subject = str(_Subject(self.path, index, self.id))
            known = Mapping(
                IDMap.from_record(uid, f"{subject}, uidmap") if uid else IDENTITY,
                IDMap.from_record(gid, f"{subject}, gidmap") if gid else IDENTITY,
            )
            if len(_mappings) < _MOST_MAPPINGS:
                _mappings[spelt] = known
        return known

    # None counts as absent, as in Go

    def _text(self, key: str) -> str:
        text: t.Optional[str] = self.raw.get(key)
        return text or ""

    def _texts(self, key: str) -> t.Tuple[str, ...]:
        return tuple(self.raw.get(key) or ())

    def _table(self, key: str) -> Raw:
        return self.raw.get(key) or {}

    @property
    def id(self) -> str:
        """64 lower-case hexadecimal digits."""
        identifier: str = self.raw["id"]
        return identifier

    @property
    def names(self) -> t.Tuple[str, ...]:
        """The names as recorded."""
        return self._texts("names")

    @property
    def metadata(self) -> str:
        """Free text of the program that created the record."""
        return self._text("metadata")

    @property
    def flags(self) -> Raw:
        """The map of flags, which every runtime preserves."""
        return self._table("flags")

    @property
    def created(self) -> t.Optional[datetime]:
        """The time of creation in UTC; None if not recorded."""
        return _as_time(self.raw.get("created"))


# By the notation of the maps.
_mappings: t.Dict[str, Mapping] = {}
_MOST_MAPPINGS = 1024


class Layer(Record):
    """A layer of layers.json, volatile-layers.json or the image store's layers.json."""

    __slots__ = ()

    kind = LAYERS
    fields = LAYER

    @property
    def parent(self) -> str:
        """The parent layer's ID; empty for none. It may be in another store."""
        return self.raw.get("parent") or ""

    @property
    def incomplete(self) -> bool:
        """Whether the layer is being built, or a leftover of an interrupted build."""
        flags: t.Optional[Raw] = self.raw.get("flags")
        return flags is not None and flags.get("incomplete") is True

    @property
    def diff_size(self) -> t.Optional[int]:
        """The recorded size of the uncompressed tar, in bytes; None if unknown."""
        size = self.raw.get("diff-size") or 0
        return size if size > 0 else None

    @property
    def diff_digest(self) -> str:
        """The digest of the uncompressed tar; empty if unknown."""
        return self._text("diff-digest")

    @property
    def uidset(self) -> t.Tuple[int, ...]:
        """UIDs, as the container sees them, of the files in the layer's tar."""
        return tuple(self.raw.get("uidset") or ())

    @property
    def gidset(self) -> t.Tuple[int, ...]:
        """GIDs, as the container sees them, of the files in the layer's tar."""
        return tuple(self.raw.get("gidset") or ())


class Image(Record):
    """An image of images.json."""

    __slots__ = ()

    kind = IMAGES
    fields = IMAGE

    @property
    def names_history(self) -> t.Tuple[str, ...]:
        """All names that the image has or had, the newest first."""
        return tuple(text for text in self._texts("names-history") if text)

    @property
    def label(self) -> str:
        """The name for messages."""
        return self.names[0] if self.names else self.id[:12]

    @property
    def layer(self) -> str:
        """The top layer's ID, empty for an image without layers."""
        return self._text("layer")

    @property
    def mapped_layers(self) -> t.Tuple[str, ...]:
        """Layers of the same content and parent as ``layer`` with other ID maps."""
        return tuple(text for text in self._texts("mapped-layers") if text)

    @property
    def candidates(self) -> t.Tuple[str, ...]:
        """The layers that the creation of a container considers, in its order."""
        first = (self.layer,) if self.layer else ()
        return first + self.mapped_layers

    @property
    def store(self) -> t.Optional[str]:
        """The read-only store that contains it; None for the store itself."""
        return self.read_only_store

    @property
    def big_data_digests(self) -> t.Dict[str, str]:
        """Digest of each file of big data."""
        return self._table("big-data-digests")

    @property
    def digests(self) -> t.Tuple[str, ...]:
        """Digests of the image's manifests, the recorded one first, each once."""
        found = [self._text("digest")]
        found += [
            digest for key, digest in self.big_data_digests.items() if key.startswith("manifest")
        ]
        return tuple(dict.fromkeys(item for item in found if item))


class Container(Record):
    """A container of containers.json or volatile-containers.json."""

    __slots__ = ()

    kind = CONTAINERS
    fields = CONTAINER

    @property
    def image(self) -> str:
        """The image's ID, empty for none."""
        return self._text("image")

    @property
    def layer(self) -> str:
        """The container's own read-write layer."""
        return self._text("layer")

    @property
    def volatile(self) -> bool:
        """Whether the container is removed at a reboot or when it ends."""
        return self.location == VOLATILE or self.flags.get("Volatile") is True

    @property
    def name(self) -> str:
        """The name of podman, or that of the storage, or a short ID."""
        return self.podman_name or (self.names[0] if self.names else self.id[:12])

    @property
    def podman_name(self) -> str:
        """The name in podman's metadata, empty for containers of other programs."""
        return self._note("name")

    @property
    def from_crio(self) -> bool:
        """Whether CRI-O created the container, which records the pod."""
        return bool(self._note("pod-id"))

    @property
    def is_pod(self) -> bool:
        """Whether it is the infrastructure container of a pod of CRI-O, which is only removed with the pod."""
        return self.from_crio and self.id == self._note("pod-id")

    def _note(self, key: str) -> str:
        text = self.metadata
        if not text.startswith("{"):
            return ""
        try:
            notes = _DECODER.decode(text)
        except (ValueError, RecursionError):
            return ""
        note = notes.get(key) if isinstance(notes, dict) else None
        return note if isinstance(note, str) else ""


R = t.TypeVar("R", bound=Record)

KINDS: t.Dict[str, t.Type[Record]] = {LAYERS: Layer, IMAGES: Image, CONTAINERS: Container}


def recorded_size(layers: t.Iterable[Layer]) -> int:
    """The size of layers by their records, in bytes."""
    return sum(layer.diff_size or 0 for layer in layers)


def parse(
    data: bytes,
    kind: t.Type[R],
    path: str,
    location: str = STABLE,
    read_only_store: t.Optional[str] = None,
) -> t.List[R]:
    """Parse a file of records. An empty file has no records.

    :param kind: ``Layer``, ``Image`` or ``Container``
    :param path: the file, for messages
    :raises RecordError: not JSON, not a list of objects, a field of a wrong type, or one ID twice
    """
    if not data.strip(b" \t\r\n"):
        return []
    if len(data) > SIZE_LIMIT:
        raise RecordError(path, f"is larger than {SIZE_LIMIT} bytes", _HINT, path=path)
    source = _Source(data, path)
    values = _values(data, path)
    if all_good(values, kind.fields) and len({raw["id"] for raw in values}) == len(values):
        return [
            kind(raw, source, path, location, read_only_store, index, checked=True)
            for index, raw in enumerate(values)
        ]
    records: t.List[R] = []
    seen: t.Set[str] = set()
    for index, raw in enumerate(values):
        if not isinstance(raw, dict):
            raise RecordError(
                str(_Subject(path, index)),
                "is not an object",
                _HINT,
                path=path,
                record=index,
            )
        record = kind(raw, source, path, location, read_only_store, index)
        if record.id in seen:
            raise RecordError(
                str(_Subject(path, index, record.id)),
                "has the ID of an earlier record",
                _HINT,
                path=path,
                record=index,
                field="id",
            )
        seen.add(record.id)
        records.append(record)
    return records


def _values(data: bytes, path: str) -> t.List[t.Any]:
    """The elements of the array."""
    try:
        values = _READER.decode(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        values = None
    if isinstance(values, list):
        return values
    # Element by element, to locate the error.
    return [value for value, _text in _split(data, path)]


def _split(data: bytes, path: str) -> t.Iterator[t.Tuple[t.Any, bytes]]:
    """Each element of the array with its own bytes."""
    index = 0
    try:
        text = data.decode("utf-8", "surrogateescape")
        # If every character is one byte, character positions are byte positions.
        single = len(text) == len(data)
        decode = _DECODER.raw_decode
        at = _space(text, 0)
        if text.startswith("null", at) and _space(text, at + 4) == len(text):
            return
        if text[at : at + 1] != "[":
            raise ValueError("no list of records")
        at = _space(text, at + 1)
        if text[at : at + 1] != "]":
            while True:
                value, end = decode(text, at)
                yield value, (data[at:end] if single else _bytes(text[at:end]))
                index += 1
                # The format of all runtimes.
                if text.startswith(",{", end):
                    at = end + 1
                    continue
                at = _space(text, end)
                mark = text[at : at + 1]
                if mark == "]":
                    break
                if mark != ",":
                    raise ValueError(
                        "a break-off in the middle" if not mark else "no comma after a record"
                    )
                at = _space(text, at + 1)
        if _space(text, at + 1) != len(text):
            raise ValueError("more after the end of the list")
    except RecursionError:
        raise _malformed(path, index, "is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _malformed(path, index, f"is not JSON at byte {error.pos}: {error.msg}") from None
    except ValueError as error:
        raise _malformed(path, index, f"is malformed: {_plain(str(error))}") from None


def _malformed(path: str, index: int, cause: str) -> RecordError:
    return RecordError(str(_Subject(path, index)), cause, _HINT, path=path, record=index)


def serialise(records: t.Iterable[Record]) -> bytes:
    """The bytes of a file with these records, unchanged records byte for byte."""
    return b"[" + b",".join(record.text for record in records) + b"]"


def encode(value: t.Any) -> bytes:
    """Compact JSON with Go's escapes; numbers that were read keep their notation.

    :raises RecordError: the value cannot be represented in JSON
    """
    pieces: t.List[str] = []
    try:
        _encode(value, pieces, 0)
    except (TypeError, ValueError) as error:
        raise RecordError("record", f"cannot be written as JSON: {_plain(str(error))}") from None
    return "".join(pieces).encode("utf-8")


def _encode(value: t.Any, pieces: t.List[str], depth: int) -> None:
    if depth > DEPTH_LIMIT + 8:
        raise ValueError(f"nested more than {DEPTH_LIMIT} deep")
    if value is None:
        pieces.append("null")
    elif value is True:
        pieces.append("true")
    elif value is False:
        pieces.append("false")
    elif isinstance(value, str):
        pieces.append(_quote(value))
    elif isinstance(value, int):
        pieces.append(int.__repr__(value))
    elif isinstance(value, _Number):
        pieces.append(value.literal)
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{value} is not a JSON number")
        pieces.append(float.__repr__(value))
    elif isinstance(value, (list, tuple)):
        mark = "["
        for item in value:
            pieces.append(mark)
            _encode(item, pieces, depth + 1)
            mark = ","
        pieces.append("]" if value else "[]")
    elif isinstance(value, dict):
        mark = "{"
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is not a string")
            pieces.append(mark + _quote(key) + ":")
            _encode(item, pieces, depth + 1)
            mark = ","
        pieces.append("}" if value else "{}")
    else:
        raise TypeError(f"{type(value).__name__} has no form in JSON")


def _quote(text: str) -> str:
    return _ESCAPED.sub(
        lambda match: f"\\u{ord(match.group()):04x}", json.dumps(text, ensure_ascii=False)
    )


def new_record(kind: t.Type[R], raw: Raw, path: str, location: str = STABLE) -> R:
    """A record to be added to a file, with the same checks as a record that is read.

    :raises RecordError: as ``parse``
    """
    text = encode(raw)
    return parse(b"[" + text + b"]", kind, path, location)[0]


def changed(record: R, raw: Raw) -> R:
    """The same record with the content of ``raw``; unchanged fields keep their bytes.

    :raises RecordError: as ``parse``
    """
    old = _fields(record.text)
    pieces = []
    for key, value in raw.items():
        written = encode(value)
        if key in old and encode(record.raw[key]) == written:
            pieces.append(old[key])
        else:
            pieces.append(_quote(key).encode("utf-8") + b":" + written)
    text = b"{" + b",".join(pieces) + b"}"
    return parse(b"[" + text + b"]", type(record), record.path, record.location)[0]


def _fields(data: bytes) -> t.Dict[str, bytes]:
    """The bytes of each top-level field, key and value, of a well-formed record."""
    text = data.decode("utf-8", "surrogateescape")
    result: t.Dict[str, bytes] = {}
    at = _space(text, 1)
    while text[at] != "}":
        start = at
        key, at = _DECODER.raw_decode(text, at)
        at = _space(text, _space(text, at) + 1)
        _value, end = _DECODER.raw_decode(text, at)
        result[key] = _bytes(text[start:end])
        at = _space(text, end)
        if text[at] == ",":
            at = _space(text, at + 1)
    return result
