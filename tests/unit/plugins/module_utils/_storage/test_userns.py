# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What may come out of a namespace, and the environment that goes in."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import pathlib
import pickle
import subprocess
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage import userns
from ansible_collections.userns.storage.plugins.module_utils._storage.drivers.base import (
    Staged,
    Strategy,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    InternalError,
    MapError,
    NamespaceError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import mounts
from hypothesis import given
from hypothesis import strategies as st

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.binary()
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_travel(value: t.Any) -> None:
    assert userns._load(pickle.dumps(value, protocol=4)) == value


@pytest.mark.parametrize(
    "value",
    [
        Staged("copy", "because", 1, 2, 3),
        Strategy("copy", "because"),
        IDMap.parse(["0:1:2"]),
        {1, 2},
        frozenset("a"),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    ],
)
def test_values_of_ours_travel(value: t.Any) -> None:
    assert userns._load(pickle.dumps(value, protocol=4)) == value


def test_errors_of_ours_travel() -> None:
    error = userns._load(pickle.dumps(MapError("map", "is odd", "Mend it.", ids=[1]), protocol=4))
    assert error.__class__ is MapError
    assert (error.subject, error.facts) == ("map", {"ids": [1]})


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call: t.Any) -> None:
        self._call = call

    def __reduce__(self) -> t.Tuple[t.Any, ...]:
        return self._call[0], tuple(self._call[1:])


@pytest.mark.parametrize(
    "value",
    [
        Reduced(os.system, "true"),
        Reduced(subprocess.Popen, ["true"]),
        Reduced(eval, "1"),
        Reduced(mounts.umount, "/none"),
        Reduced(userns.run, print),
        Reduced(getattr, IDMap, "parse"),
        pathlib.PurePosixPath("/"),
    ],
)
def test_calls_do_not_travel(value: t.Any) -> None:
    with pytest.raises(InternalError, match="cannot be read"):
        userns._load(pickle.dumps(value, protocol=4))


def test_dotted_names_do_not_travel() -> None:
    data = pickle.dumps(IDMap.parse, protocol=4)
    with pytest.raises(InternalError):
        userns._load(data)


@given(st.binary())
def test_rubbish_is_told(data: bytes) -> None:
    with contextlib.suppress(InternalError):
        userns._load(data)


@given(st.lists(st.tuples(st.sampled_from([b"R", b"P", b"E"]), st.binary(max_size=99))))
def test_frames(frames: t.List[t.Tuple[bytes, bytes]]) -> None:
    data = b"".join(userns._HEADER.pack(kind, len(body)) + body for kind, body in frames)
    assert list(userns._frames(io.BytesIO(data))) == frames
    assert list(userns._frames(io.BytesIO(data[:-1]))) == frames[:-1]


def test_a_frame_beyond_measure() -> None:
    assert list(userns._frames(io.BytesIO(userns._HEADER.pack(b"R", 1 << 60)))) == []


ALICE = userns._Login("alice", os.getuid(), os.getgid(), "/home/alice")
NOBODY = userns._Login("nobody-at-all", 987654, 987654, "/home/nobody")


def test_the_own_environment_stays(tmp_path: pathlib.Path) -> None:
    given_environ = {"A": "1", "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "USER": "x"}
    environ = userns.environment(given_environ, ALICE, True)
    assert environ["A"] == "1"
    assert environ["HOME"] == environ["XDG_DATA_HOME"] == str(tmp_path)
    assert environ["USER"] == environ["LOGNAME"] == "alice"


def test_of_another_environment_only_the_neutral_stays(tmp_path: pathlib.Path) -> None:
    conf = tmp_path / "storage.conf"
    conf.write_text("")
    environ = userns.environment(
        {
            "A": "1",
            "HOME": "/root",
            "PATH": "/bin",
            "LC_ALL": "C",
            "XDG_RUNTIME_DIR": str(tmp_path),
            "XDG_CONFIG_HOME": "/nowhere",
            "CONTAINERS_STORAGE_CONF": str(conf),
            "STORAGE_DRIVER": "vfs",
        },
        ALICE,
        False,
    )
    assert "A" not in environ
    assert "XDG_CONFIG_HOME" not in environ
    assert environ["HOME"] == "/home/alice"
    assert environ["XDG_RUNTIME_DIR"] == str(tmp_path)
    assert environ["CONTAINERS_STORAGE_CONF"] == str(conf)
    assert environ["STORAGE_DRIVER"] == "vfs"
    assert (environ["PATH"], environ["LC_ALL"]) == ("/bin", "C")


def test_paths_of_others_do_not_stay(tmp_path: pathlib.Path) -> None:
    home = str(tmp_path)
    environ = {"XDG_RUNTIME_DIR": home, "XDG_CONFIG_HOME": home, "XDG_DATA_HOME": "a\0b"}
    for own in (False, True):
        left = userns.environment(environ, NOBODY, own)
        assert not [name for name in left if name.startswith("XDG_")]


def test_a_uid_without_account() -> None:
    with pytest.raises(NamespaceError, match="987654"):
        userns._caller(987654)
