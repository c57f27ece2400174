# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of messages from processes in a user namespace: only data of a declared form is accepted."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pathlib
import resource
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage import errors
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    InternalError,
    LayerInUse,
    MapError,
    StorageError,
    WorkerError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import (
    channel,
    shapes,
    waiting,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.userns.channel import (
    BadMessage,
    Limits,
    Receiver,
    Sender,
    Silence,
    decode,
    encode,
)
from hypothesis import given
from hypothesis import strategies as st

LIBRARY = pathlib.Path(channel.__file__).resolve().parents[1]
PATHS = st.binary(max_size=30).map(os.fsdecode)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | PATHS
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(PATHS, inner),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_are_sent_unchanged(value: t.Any) -> None:
    assert decode(encode(value)) == value


@given(st.text(st.characters(categories=["Cs", "Ll"])))
def test_sent_text_is_accepted(value: str) -> None:
    """Surrogates that do not represent bytes of a path are replaced, other characters are kept."""
    received = decode(encode({value: [value]}))
    for item in received:
        assert shapes.text(item) == ""
        assert len(item) <= len(value)
    if not shapes.ODD_SURROGATES.search(value):
        assert received == {value: [value]}


@pytest.mark.parametrize(
    "value", [{1, 2}, b"x", object(), float("nan"), float("inf"), {"a": print}, {(1, 2): 3}]
)
def test_values_that_are_not_plain_are_not_sent(value: t.Any) -> None:
    with pytest.raises(BadMessage, match="is not plain data"):
        encode(value)


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{", b"nul", b"NaN", b"[Infinity]", b"[-Infinity]", b"'a'", b"1 2"),
        b'{"a":1,"a":2}',
        b'"\xc3\xa4"',
        b'"\xff"',
        b"\xef\xbb\xbf1",
        b"1" * 100_000,
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b"[" + b"[]," * 600_001 + b"0]",
        b"[" + b"0," * 3_000_001 + b"0]",
        b'"' + b"x" * channel.SIZE_LIMIT + b'"',
    ],
    ids=lambda data: repr(data[:12]) + str(len(data)),
)
def test_malformed_data_is_rejected(data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(data)


TEXTS = shapes.Items(shapes.text)


@pytest.mark.parametrize(
    ("form", "data"),
    [
        (shapes.text, b"1"),
        (shapes.text, b'"\\ud800"'),
        (shapes.text, b'"' + b"x" * (shapes.TEXT_LIMIT + 1) + b'"'),
        (shapes.flag, b"0"),
        (shapes.whole, b"true"),
        (shapes.whole, b"1.0"),
        (shapes.whole, b"1" + b"0" * 30),
        (shapes.real, b"1e999"),
        (shapes.real, b"false"),
        (TEXTS, b"{}"),
        (TEXTS, b"[[]]"),
        (shapes.Maybe(shapes.text), b"[]"),
        (shapes.choice("a"), b"[]"),
        (shapes.word("[a-z]+"), b'"a\\n"'),
        (shapes.table(shapes.text), b'{"__ansible_unsafe":"x"}'),
        (shapes.table(shapes.text), b'{"_ansible_no_log":"x"}'),
        (shapes.table(shapes.text), b'{"a":1}'),
        (shapes.Record({"a": shapes.text}), b"{}"),
        (shapes.Record({"a": shapes.text}), b'{"a":"","ansible_facts":{}}'),
        (shapes.Record({}, {"a": shapes.text}), b'{"a":null}'),
        (shapes.plain(2), b"[[[]]]"),
    ],
)
def test_data_of_another_form_is_rejected(form: shapes.Check, data: bytes) -> None:
    with pytest.raises(BadMessage):
        decode(data, form)


def test_errors_keep_class_and_fields() -> None:
    for kind in channel.ERRORS.values():
        error = kind("map", "is odd", "Mend it.", uids=[1])
        found = channel.rebuilt_error(
            channel.decode_message(channel.ERROR, encode(channel.error_message(error)))
        )
        assert found.__class__ == kind
        assert (found.subject, found.cause, found.hint) == ("map", "is odd", "Mend it.")
        assert found.facts == {"uids": [1]}


def test_every_error_has_a_kind() -> None:
    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, StorageError)
    }
    assert set(channel.ERRORS) == kinds


def test_every_fact_has_a_form() -> None:
    """Facts without a form would be lost. The library passes facts as keyword arguments of errors."""
    names = set()
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in channel.ERRORS:
                names |= {keyword.arg for keyword in node.keywords if keyword.arg}
    assert names
    assert names <= set(channel.FACTS)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "Exception"},
        {"kind": "_rebuild"},
        {"kind": "builtins.OSError"},
        {"kind": ["StoreError"]},
        {"subject": {"a": 1}},
        {"facts": {"ansible_facts": {}}},
        {"facts": {"exception": "x"}},
        {"facts": {"changed": True}},
        {"facts": {"users": "all"}},
        {"facts": []},
        {"more": 1},
        {"__class__": "x"},
    ],
)
def test_forged_errors_are_rejected(change: t.Dict[str, t.Any]) -> None:
    message = {**channel.error_message(MapError("a", "b", "c")), **change}
    with pytest.raises(BadMessage):
        channel.decode_message(channel.ERROR, encode(message))


def test_only_internal_errors_have_a_trace() -> None:
    for kind, expected in ((InternalError, {"trace": "x"}), (LayerInUse, {})):
        message = channel.error_message(kind("a", "b", trace="x"))
        assert channel.rebuilt_error(message).facts == expected


@given(st.binary() | PLAIN.map(encode), st.sampled_from([b"E", b"P", b"U", b"F", b"X", b"\0"]))
def test_any_message_is_decoded_or_rejected(data: bytes, kind: bytes) -> None:
    with contextlib.suppress(BadMessage):
        channel.decode_message(kind, data)


def received(data: bytes, limits: Limits = channel.UNLIMITED) -> t.List[t.Tuple[bytes, bytes]]:
    """The messages of a child process that sends these bytes and exits."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "wb") as sink:
            sink.write(data)
        os._exit(0)
    os.close(writer)
    try:
        return list(Receiver(reader, limits).messages())
    finally:
        os.close(reader)
        os.waitpid(pid, 0)


@given(st.lists(st.tuples(st.sampled_from([b"R", b"E", b"U"]), st.binary(max_size=99)), max_size=5))
def test_complete_messages_are_received(messages: t.List[t.Tuple[bytes, bytes]]) -> None:
    data = b"".join(channel._HEADER.pack(kind, len(body)) + body for kind, body in messages)
    assert received(data) == messages
    assert received(data[:-1]) == messages[:-1]


def test_too_large_message_is_rejected() -> None:
    """Its body is not read."""
    with pytest.raises(BadMessage, match="larger"):
        received(channel._HEADER.pack(b"R", channel.SIZE_LIMIT + 1) + b"x" * 1000)


def test_progress_is_stored_and_not_returned() -> None:
    reader, writer = os.pipe()
    sender = Sender(writer)
    sender.send(channel.PROGRESS, {"moved": True, "step": "reading /a"})
    sender.send(channel.RESULT, 1)
    os.close(writer)
    receiver = Receiver(reader, channel.UNLIMITED)
    assert list(receiver.messages()) == [(channel.RESULT, b"1")]
    assert receiver.step == "reading /a"
    os.close(reader)


@pytest.mark.parametrize(
    ("limits", "beats", "message"),
    [
        (Limits(silence=0.01), 0, "did not respond"),
        (Limits(stall=0.01), 10**6, "made no progress"),
        (Limits(total=0.01), 10**6, "worked for more than"),
    ],
)
def test_waiting_for_messages_is_limited(
    monkeypatch: t.Any, limits: Limits, beats: int, message: str
) -> None:
    """Tests a process that sends nothing, a process without progress, and a process that never ends."""
    monkeypatch.setattr(channel, "_LOOK", 0.005)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        sender = Sender(writer)
        moved = "worked" in message
        with contextlib.suppress(BrokenPipeError):
            for _number in range(beats):
                sender.send(channel.PROGRESS, {"moved": moved, "step": "reading /fuse"})
        os.read(os.pipe()[0], 1)
    os.close(writer)
    receiver = Receiver(reader, limits)
    try:
        with pytest.raises(Silence, match=message):
            list(receiver.messages())
    finally:
        os.close(reader)
        waiting.killed(pid)


def _data_bytes() -> int:
    """The memory of this process that counts for RLIMIT_DATA."""
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = (item for item in status.splitlines() if item.startswith("VmData:"))
    return int(line.split()[1]) * 1024


def test_memory_is_limited_for_any_message() -> None:
    """Decodes the structures that need most memory in a process with a limit of 1 GB."""
    worst = [
        b"[" + b'{"":0},' * 299_999 + b"0]",
        b"[" + b'"aa",' * 2_999_000 + b'"aa"]',
        b"{" + b",".join(b'"%d":0' % number for number in range(2_900_000)) + b"}",
        b'"' + b"\\u0101" * (channel.SIZE_LIMIT // 6 - 1) + b'"',
    ]
    for data in worst:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                # Memory that the test process already uses does not count.
                limit = _data_bytes() + (1 << 30)
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
                with contextlib.suppress(BadMessage):
                    decode(data, shapes.plain(3))
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, data[:20]


def test_result_of_ten_thousand_layers_is_far_below_the_limits() -> None:
    maps = ["0:100000:65536"] * 3
    layer = {
        **dict.fromkeys(("id", "duplicate_of", "last_used", "lease", "created"), "a" * 64),
        **dict.fromkeys(("recorded_size", "size_apparent", "size_exclusive", "inodes"), 10**10),
        **dict.fromkeys(("uidmap", "gidmap"), maps),
        **dict.fromkeys(("status", "problem", "origin"), "ok"),
        "containers": [{"id": "a" * 64, "name": "some-container", "known_to_podman": True}],
    }
    data = json.dumps([layer] * 10_000, separators=(",", ":")).encode()
    assert len(data) < channel.SIZE_LIMIT / 4
    assert data.count(b",") < channel._COMMAS_LIMIT / 4
    assert data.count(b"[") + data.count(b"{") < channel._BRACKETS_LIMIT / 4
    assert len(decode(encode([layer] * 10_000))) == 10_000


def test_error_reports_how_a_process_ended() -> None:
    assert "status 3" in str(waiting.death("user alice", 3, ""))
    error = waiting.death("user alice", -9, "reading /a")
    assert isinstance(error, WorkerError)
    assert "killed by signal 9 (SIGKILL) while reading /a" in str(error)
