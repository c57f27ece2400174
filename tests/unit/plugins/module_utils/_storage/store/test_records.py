# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of records: they are read strictly, and unchanged parts are written back byte for byte."""

from __future__ import annotations

import copy
import json
import pickle
import typing as t
from datetime import datetime, timezone

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import RecordError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.store import records
from ansible_collections.userns.storage.plugins.module_utils._storage.store.records import (
    Container,
    Image,
    Layer,
    changed,
    encode,
    new_record,
    parse,
    serialise,
)
from hypothesis import given
from hypothesis import strategies as st

A, B, C = "a" * 64, "b" * 64, "c" * 64
ID_RANGE = {"container_id": 0, "host_id": 100000, "size": 65536}

LAYER = {
    "id": A,
    "names": ["one-layer"],
    "parent": B,
    "mountlabel": "system_u:object_r:container_file_t:s0",
    "created": "2026-01-02T03:04:05.123456789Z",
    "compressed-diff-digest": "sha256:" + C,
    "compressed-size": 12,
    "diff-digest": "sha256:" + A,
    "toc-digest": "sha256:" + B,
    "diff-size": 1024,
    "compression": 2,
    "uidset": [0, 1000],
    "gidset": [0, 4294967295],
    "flags": {"incomplete": True, "lease": 1.50},
    "uidmap": [ID_RANGE],
    "gidmap": [ID_RANGE],
    "big-data-names": ["x"],
}
IMAGE = {
    "id": A,
    "digest": "sha256:" + A,
    "names": ["localhost/a:1"],
    "names-history": ["localhost/a:1"],
    "layer": B,
    "mapped-layers": [C],
    "metadata": "{}",
    "big-data-names": ["manifest"],
    "big-data-sizes": {"manifest": 3},
    "big-data-digests": {"manifest": "sha256:" + B, "sha256:" + A: "sha256:" + A},
    "created": "2026-01-02T03:04:05Z",
}
CONTAINER = {
    "id": A,
    "names": ["web"],
    "image": B,
    "layer": C,
    "metadata": json.dumps({"image-name": "localhost/a:1", "name": "web-1"}),
    "created": "2026-01-02T03:04:05+02:00",
    "flags": {"MountLabel": "", "ProcessLabel": ""},
    "uidmap": [ID_RANGE],
    "gidmap": [ID_RANGE],
}
KINDS: t.List[t.Tuple[t.Any, t.Dict[str, t.Any]]] = [
    (Layer, LAYER),
    (Image, IMAGE),
    (Container, CONTAINER),
]


def read(kind: t.Any, *items: t.Any) -> t.List[t.Any]:
    return parse(json.dumps(items).encode(), kind, "/store/file.json")


def test_layer_record_is_read() -> None:
    layer = read(Layer, LAYER)[0]
    assert (layer.id, layer.parent, layer.names) == (A, B, ("one-layer",))
    assert layer.incomplete
    assert layer.mapping.uid == layer.mapping.gid == IDMap.of((0, 100000, 65536))
    assert layer.created == datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=timezone.utc)
    assert (layer.diff_size, layer.diff_digest) == (1024, "sha256:" + A)
    assert (layer.uidset, layer.gidset) == ((0, 1000), (0, 4294967295))
    assert (layer.location, layer.read_only_store) == ("stable", None)


def test_image_record_is_read() -> None:
    image = read(Image, IMAGE)[0]
    assert image.candidates == (B, C)
    assert image.digests == ("sha256:" + A, "sha256:" + B)
    assert image.store is None
    bare = read(Image, {"id": A, "layer": "", "mapped-layers": [B, ""]})[0]
    assert bare.candidates == (B,)


def test_container_record_is_read() -> None:
    container = read(Container, CONTAINER)[0]
    assert (container.image, container.layer) == (B, C)
    assert container.podman_name == "web-1"
    assert container.name == "web-1"
    assert container.created == datetime(2026, 1, 2, 1, 4, 5, tzinfo=timezone.utc)
    assert not container.volatile


@pytest.mark.parametrize("metadata", ["", "plain", "{", '{"name":1}', "{" * 5000, '{"name":NaN}'])
def test_container_without_a_podman_name_has_the_recorded_name(metadata: str) -> None:
    container = read(Container, {"id": A, "names": ["b"], "metadata": metadata})[0]
    assert (container.podman_name, container.name) == ("", "b")
    assert read(Container, {"id": A, "metadata": metadata})[0].name == "a" * 12


def test_container_is_volatile_by_flag_or_file() -> None:
    data = json.dumps([{"id": A}]).encode()
    assert parse(data, Container, "f", records.VOLATILE)[0].volatile
    assert read(Container, {"id": A, "flags": {"Volatile": True}})[0].volatile


@pytest.mark.parametrize("data", [b"", b" \n", b"[]", b" [ ] ", b"null", b" null\n"])
def test_empty_list_has_no_records(data: bytes) -> None:
    assert parse(data, Layer, "f") == []


def test_null_field_equals_absent_field() -> None:
    layer = read(Layer, {**dict.fromkeys(LAYER), "id": A})[0]
    assert layer.names == layer.uidset == ()
    assert layer.created is layer.diff_size is None
    assert layer.mapping.identity


@pytest.mark.parametrize("kind", [Layer, Image, Container])
def test_zero_and_invalid_times_are_none(kind: t.Any) -> None:
    for timestamp in ("0001-01-01T00:00:00Z", "2026-13-40T25:61:61Z", "0001-01-01T00:00:00+14:00"):
        assert read(kind, {"id": A, "created": timestamp})[0].created is None


# Malformed records


@pytest.mark.parametrize("fields", [b'"x":1,"x":2', b'"flags":{"x":1,"x":2}'])
def test_record_with_a_duplicate_field_is_read_but_not_written(fields: bytes) -> None:
    layer = parse(b'[{"id":"' + A.encode() + b'",' + fields + b"}]", Layer, "f")[0]
    assert (layer.raw.get("x") or layer.flags.get("x")) == 2
    with pytest.raises(RecordError, match="the field 'x' twice"):
        records.serialise([layer])
    with pytest.raises(RecordError, match="the field 'x' twice"):
        records.changed(layer, {**layer.raw, "names": ["a"]})


def parse_error(kind: t.Any, data: bytes) -> RecordError:
    with pytest.raises(RecordError) as caught:
        parse(data, kind, "/store/layers.json")
    assert "/store/layers.json" in caught.value.subject
    str(caught.value).encode()
    return caught.value


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[",
        b"[{}",
        b"[{},",
        b'[{"id":"' + A.encode() + b'"}',
        b'[{"id":"' + A.encode() + b'"}]]',
        b'[{"id":"' + A.encode() + b'"},]',
        b'[{"id":"' + A.encode() + b'"} {}]',
        b'{"id":"' + A.encode() + b'"}',
        b"[1]",
        b"[null]",
        b'["x"]',
        b"[[]]",
        b"\xef\xbb\xbf[]",
        b"\x00",
        b"nul",
        b"[" * 100000,
        b'[{"id":"' + A.encode() + b'","x":' + b"[" * 100000 + b"]" * 100000 + b"}]",
        b'[{"id":"' + A.encode() + b'","x":' + b"[" * 200 + b"]" * 200 + b"}]",
        b'[{"id":"' + A.encode() + b'","flags":{"x":' + b"[" * 200 + b"]" * 200 + b"}}]",
        b'[{"id":"' + A.encode() + b'","x":' + b"9" * 5000 + b"}]",
        b'[{"id":"' + A.encode() + b'","x":NaN}]',
        b'[{"id":"' + A.encode() + b'","x":-Infinity}]',
        b'[{"id":"' + A.encode() + b'","Parent":"' + B.encode() + b'"}]',
        b'[{"id":"' + A.encode() + b'","names":["\n"]}]',
    ],
)
def test_malformed_file_is_rejected(data: bytes) -> None:
    parse_error(Layer, data)


@pytest.mark.parametrize(
    "value",
    [None, "", "../../etc", "a" * 63, "A" * 64, "a" * 64 + "\n", "/" * 64, 1, True, [A], {"id": A}],
)
@pytest.mark.parametrize(("kind", "example"), KINDS)
def test_id_must_be_64_hexadecimal_digits(kind: t.Any, example: t.Any, value: t.Any) -> None:
    error = parse_error(kind, json.dumps([{**example, "id": value}]).encode())
    assert error.facts["field"] == "id"


@pytest.mark.parametrize(
    ("kind", "field"),
    [(Layer, "parent"), (Image, "layer"), (Container, "image"), (Container, "layer")],
)
@pytest.mark.parametrize("value", ["../" + A, "x", A + "/..", "\ud800", 5, [A]])
def test_references_must_be_ids(kind: t.Any, field: str, value: t.Any) -> None:
    error = parse_error(kind, json.dumps([{"id": B, field: value}]).encode())
    assert error.facts["field"] == field
    parse_error(Image, json.dumps([{"id": B, "mapped-layers": [value]}]).encode())


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Layer, "diff-size", 1.0),
        (Layer, "diff-size", 10**30),
        (Layer, "diff-size", "1"),
        (Layer, "compression", True),
        (Layer, "uidset", [-1]),
        (Layer, "uidset", [2**32]),
        (Layer, "uidset", {"0": 1}),
        (Layer, "names", "x"),
        (Layer, "names", [None]),
        (Layer, "flags", []),
        (Layer, "created", "yesterday"),
        (Layer, "created", 0),
        (Layer, "uidmap", [[0, 0, 1]]),
        (Layer, "uidmap", [{"container_id": 0, "host_id": 0, "size": 10**40}]),
        (Layer, "uidmap", [{"container_id": 0.5, "host_id": 0, "size": 1}]),
        (Layer, "gidmap", [{"container_id": -1, "host_id": 0, "size": 1}]),
        (Layer, "gidmap", {"container_id": 0}),
        (Image, "big-data-digests", {"manifest": 5}),
        (Image, "big-data-sizes", {"manifest": "5"}),
        (Image, "mapped-layers", A),
        (Container, "metadata", {}),
    ],
)
def test_wrong_type_is_rejected(kind: t.Any, field: str, value: t.Any) -> None:
    data = json.dumps([{"id": B}, {"id": A, field: value}]).encode()
    error = parse_error(kind, data)
    assert A in error.subject
    assert field in str(error)


def test_duplicate_id_is_rejected() -> None:
    assert parse_error(Layer, json.dumps([{"id": A}, {"id": A}]).encode()).facts["record"] == 1


def test_huge_numbers_are_rejected_without_conversion() -> None:
    """The time to convert a number grows with the square of its digits, and would be days for this number."""
    parse_error(Layer, b"[" + b"9" * 100_000_000 + b"]")


# Any JSON

ids = st.text("0123456789abcdef", min_size=64, max_size=64)
texts = st.text(max_size=20)
values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**70), 2**70),
        st.floats(allow_nan=False, allow_infinity=False),
        texts,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=10,
)
unknown = st.dictionaries(
    st.text(max_size=10).filter(lambda key: key.lower() not in records.KINDS["layers"].fields),
    values,
    max_size=5,
)


def layers(extra: t.Dict[str, t.Any], layer_id: str, flags: t.Any, size: int) -> t.Dict[str, t.Any]:
    items = [("id", layer_id), ("diff-size", size), ("flags", flags), *extra.items()]
    return dict(items[::-1])


layer_dicts = st.builds(
    layers,
    unknown,
    ids,
    st.dictionaries(texts, values, max_size=3),
    st.integers(-(2**63), 2**63 - 1),
)
layer_lists = st.lists(layer_dicts, max_size=5, unique_by=lambda item: t.cast(str, item["id"]))
styles = st.sampled_from(
    [
        {"separators": (",", ":")},
        {"indent": 2},
        {"ensure_ascii": False},
        {"ensure_ascii": True, "separators": (" ,\n", "\t: ")},
    ]
)


def dump(value: t.Any, style: t.Dict[str, t.Any]) -> bytes:
    return json.dumps(value, **style).encode("utf-8", "surrogatepass")


@given(layer_lists, styles)
def test_records_are_written_as_they_were_read(
    raw: t.List[t.Dict[str, t.Any]], style: t.Dict[str, t.Any]
) -> None:
    read_back = parse(dump(raw, style), Layer, "f")
    assert [item.raw for item in read_back] == raw
    assert [list(item.raw) for item in read_back] == [list(item) for item in raw]
    written = serialise(read_back)
    assert [item.raw for item in parse(written, Layer, "f")] == raw
    assert serialise(parse(written, Layer, "f")) == written


@given(layer_lists.filter(bool), styles, st.data())
def test_change_keeps_other_fields_and_records(
    raw: t.List[t.Dict[str, t.Any]], style: t.Dict[str, t.Any], data: st.DataObject
) -> None:
    before = parse(dump(raw, style), Layer, "f")
    index = data.draw(st.integers(0, len(raw) - 1))
    expected = copy.deepcopy(before[index].raw)
    expected["flags"]["incomplete"] = True
    expected["parent"] = B
    after = [*before]
    after[index] = changed(before[index], expected)
    written = parse(serialise(after), Layer, "f")
    assert written[index].raw == expected
    assert list(written[index].raw) == list(expected)
    for old, new in zip(before, written):
        if old is not before[index]:
            assert old.text == new.text
    old_fields = records._fields(before[index].text)
    new_fields = records._fields(written[index].text)
    for key in expected:
        if key not in ("flags", "parent"):
            assert old_fields[key] == new_fields[key]


@given(values)
def test_encoded_values_are_json_without_html_characters(value: t.Any) -> None:
    text = encode(value)
    assert json.loads(text) == value
    assert not set(b"<>&") & set(text)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_rejected(data: bytes) -> None:
    for kind in (Layer, Image, Container):
        try:
            parse(data, kind, "f")
        except RecordError as error:
            str(error).encode()


@given(st.lists(st.one_of(values, st.dictionaries(st.sampled_from([*LAYER, *IMAGE]), values))))
def test_any_json_is_read_or_rejected(value: t.List[t.Any]) -> None:
    for kind in (Layer, Image, Container):
        try:
            for record in parse(dump(value, {}), kind, "f"):
                str((record.created, record.names, record.flags, record.mapping)).encode(
                    "utf-8", "surrogatepass"
                )
        except RecordError as error:
            str(error).encode()


NUMBERS = (
    b'{"id":"%s","x":[1.0,1e5,1E+2,0.10,-0.0,12345678901234567890123],"y" : 1.50}' % A.encode()
)


def test_numbers_keep_their_notation() -> None:
    layer = parse(b"[" + NUMBERS + b"]", Layer, "f")[0]
    assert layer.text == NUMBERS
    raw = copy.deepcopy(layer.raw)
    raw["parent"] = B
    assert changed(layer, raw).text == NUMBERS[:-1].replace(b',"y"', b',"y"') + (
        b',"parent":"%s"}' % B.encode()
    )
    raw["x"].append("<&>\u2028\ud800")
    assert b'"x":[1.0,1e5,1E+2,0.10,-0.0,12345678901234567890123,' in changed(layer, raw).text
    assert b"\\u003c\\u0026\\u003e\\u2028\\ud800" in changed(layer, raw).text


def test_bytes_that_are_not_utf8_are_kept() -> None:
    data = b'[{"id":"%s","metadata":"\xff\xc3\xa4"}]' % A.encode()
    layer = parse(data, Layer, "f")[0]
    assert serialise([layer]) == data
    raw = {**layer.raw, "parent": B}
    assert changed(layer, raw).text.startswith(data[1:-2])


def test_new_record_is_checked() -> None:
    assert new_record(Layer, {"id": A}, "f").raw == {"id": A}
    with pytest.raises(RecordError):
        new_record(Layer, {"id": "x"}, "f")
    for bad in (float("nan"), float("inf"), {1: 2}, {1, 2}, b"x"):
        with pytest.raises(RecordError):
            new_record(Layer, {"id": A, "x": bad}, "f")


def test_records_can_be_pickled() -> None:
    for kind, example in KINDS:
        record = parse(b"[" + NUMBERS + b"]", kind, "f", "volatile", "/ro")[0]
        restored = pickle.loads(pickle.dumps(record))
        assert (restored.raw, restored.text, restored.path) == (
            record.raw,
            record.text,
            record.path,
        )
        assert (restored.location, restored.read_only_store) == ("volatile", "/ro")
        assert encode(restored.raw["x"]) == encode(record.raw["x"])
        assert read(kind, example)[0].raw == example
