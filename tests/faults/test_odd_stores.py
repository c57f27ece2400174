# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Unusual metadata of images and unusual records of stores are reported, and cause no internal error."""

from __future__ import annotations

import importlib
import json
import pathlib
import pkgutil
import typing as t

import hypothesis.internal.conjecture
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import Account
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import (
    running as userns,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import written_store
from support.written_store import IMAGE, MAPPED, TOP

ROUNDS = 40
TIMES = st.sampled_from(
    [
        *("0001-01-01T00:00:00Z", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999999Z"),
        *("9999-12-31T23:59:59-23:59", "0000-00-00T00:00:00Z", "2026-02-31T25:61:61Z"),
        *("2026-01-01T00:00:00+99:99", "1969-12-31T23:59:59Z", "soon", ""),
    ]
)
ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2**32, 2**63, 10**30, 1e308])
    | st.text(max_size=6)
    | st.sampled_from(["\udcff", "\ud800", "\0", "\x1b[2J", "__ansible_type", "a" * 5000])
    | TIMES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
TEXTS = st.sampled_from(
    [b"", b"{", b"[]", b"NaN", b'{"config":NaN}', b'{"config":{},"config":1}', b"[" * 100_000]
)
CONFIG = st.one_of(
    TEXTS,
    ODD.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {},
        optional={
            "created": TIMES | ODD,
            "history": ODD,
            "config": st.fixed_dictionaries({}, optional={"User": ODD, "Labels": ODD}) | ODD,
            "rootfs": ODD,
        },
    ).map(lambda value: json.dumps(value).encode()),
)
ACCOUNTS = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b"app:x:99999999999999999999:1::/:\n",
            b"app:x:-1:-1::/:\n",
            b"app:x:" + "²".encode() + b":1::/:\n",
            b"app:x:1_0:1::/:\n",
            b"app\n:::::\n",
            b"app:x:" + b"9" * 5000 + b":1\n",
        ]
    ),
)
LEDGER = st.one_of(
    TEXTS,
    st.fixed_dictionaries(
        {"version": st.integers(0, 4)},
        optional={
            **dict.fromkeys(
                ("watched_since", "programs", "gaps", "now", "observed", "believed"), ODD
            ),
            "layers": st.dictionaries(
                st.sampled_from([MAPPED, TOP, "x"]),
                st.fixed_dictionaries(
                    {"key": st.just("k") | ODD},
                    optional=dict.fromkeys(("first_seen", "last_used", "idle_from", "trace"), ODD),
                )
                | ODD,
                max_size=3,
            ),
        },
    ).map(lambda value: json.dumps(value).encode()),
)


@st.composite
def changed_records(draw: st.DrawFn) -> t.Dict[str, t.Any]:
    """The usual records with some fields of an image or a layer changed."""
    found = written_store.records()
    for layer in found["layers"]:
        layer["created"] = draw(TIMES)
        layer["flags"] = draw(
            st.just({})
            | st.fixed_dictionaries(
                {"userns.storage.origin": st.just("layer_template")},
                optional={"userns.storage.lease": TIMES | ODD, "incomplete": ODD},
            )
        )
    image = found["images"][0]
    image["created"] = draw(TIMES)
    image["names"] = draw(st.lists(st.text(max_size=9) | st.just("localhost/a:1"), max_size=3))
    for kind in draw(st.lists(st.sampled_from(sorted(found)), max_size=2)):
        entry = draw(st.sampled_from(found[kind]))
        entry[draw(st.sampled_from(sorted(entry)))] = draw(ODD)
    return found


def _import_hypothesis_modules() -> None:
    """Import all modules that are needed, since the user may have no permission to read them."""
    for module in pkgutil.walk_packages(
        hypothesis.internal.conjecture.__path__, "hypothesis.internal.conjecture."
    ):
        importlib.import_module(module.name)


def _odd_stores(home: str) -> t.Dict[str, int]:
    """Run all operations in generated stores; returns how often each outcome occurred."""
    outcomes: t.Dict[str, int] = {}

    @settings(
        max_examples=ROUNDS, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(changed_records() | st.just({}), CONFIG, ACCOUNTS, ACCOUNTS, LEDGER, st.booleans())
    @example({}, b"{", b"app:x:-1:-1::/:\n", b"\0", b"NaN", False)
    @example({}, b"{", b"app:x:-1:-1::/:\n", b"\0", b"NaN", True)
    def operate(
        changed: t.Dict[str, t.Any],
        config: bytes,
        passwd: bytes,
        group: bytes,
        ledger: bytes,
        check: bool,
    ) -> None:
        files = {
            f"vfs-images/{IMAGE}/{pathlib.Path(written_store.OPENED_PATHS[_CONFIG]).name}": config,
            f"vfs/dir/{TOP}/etc/passwd": passwd,
            f"vfs/dir/{TOP}/etc/group": group,
            "userns-storage/ledger.json": ledger,
        }
        found = written_store.run_all_operations(written_store.write(home, changed, files), check)
        for outcome in found:
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert "InternalError" not in found
        if not changed:
            # With valid records, unusual content of the other files makes no operation fail.
            assert found == ["done"] * 5 + ["LayerInUse"]

    operate()
    return outcomes


_CONFIG = "an image's configuration"


def test_unusual_records_cause_no_internal_error(alice: Account) -> None:
    _import_hypothesis_modules()
    outcomes = userns.run(_odd_stores, (f"{alice.home}/made",), alice)
    print(outcomes)
    assert outcomes["done"] > ROUNDS


def _odd_images(home: str) -> int:
    """Run all operations in stores with valid records and generated image metadata; returns the number of stores."""
    done = 0

    @settings(
        max_examples=ROUNDS, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(CONFIG, ACCOUNTS, ACCOUNTS, LEDGER)
    def operate(config: bytes, passwd: bytes, group: bytes, ledger: bytes) -> None:
        nonlocal done
        files = {
            written_store.OPENED_PATHS[_CONFIG]: config,
            written_store.OPENED_PATHS["an image's passwd"]: passwd,
            written_store.OPENED_PATHS["an image's group"]: group,
            written_store.OPENED_PATHS["our ledger"]: ledger,
        }
        found = written_store.run_all_operations(written_store.write(home, None, files), True)
        assert found == ["done"] * 5 + ["LayerInUse"]
        done += 1

    operate()
    return done


def test_image_metadata_makes_no_operation_fail(alice: Account) -> None:
    _import_hypothesis_modules()
    assert userns.run(_odd_images, (f"{alice.home}/made",), alice) >= ROUNDS
