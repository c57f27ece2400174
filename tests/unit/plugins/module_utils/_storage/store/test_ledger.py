# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the ledger: unused time of layers, changes of the clock, concurrent runs and damaged files."""

from __future__ import annotations

import json
import os
import pathlib
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import Mapping
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import (
    IDMap,
    IDRange,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel.clock import Moment
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.time_formats import (
    format_time,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.ledger import (
    Gap,
    Ledger,
    Sighting,
    ledger_key,
)
from hypothesis import given
from hypothesis import strategies as st

NOW = 1_800_000_000.0
HOUR = 3600.0
DAY = 24 * HOUR


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "userns-storage" / "ledger.json")


def at(wall: float, uptime: t.Optional[float] = None, boot: str = "one") -> Moment:
    """A moment. The default uptime belongs to a clock that was never changed."""
    return Moment(wall, wall - NOW + 1000 if uptime is None else uptime, boot)


def seen(
    *used: str, traces: t.Optional[t.Mapping[str, str]] = None, **keys: str
) -> t.Dict[str, Sighting]:
    """The layers that an observation finds: their keys, whether they are in use, and their traces."""
    traces = {} if traces is None else traces
    return {
        layer: Sighting(key, layer in used, traces.get(layer, "never"), None)
        for layer, key in keys.items()
    }


def watch_hourly(ledger: Ledger, hours: int, start: int = 0, **keys: str) -> None:
    for hour in range(start, start + hours + 1):
        ledger.observe(at(NOW + hour * HOUR), seen(traces=None, **keys))


def test_missing_file_is_an_empty_ledger(path: str) -> None:
    ledger = Ledger(path).load()
    assert ledger.watched_since is None
    assert ledger.watched == 0
    assert ledger.last_used("a") is ledger.first_seen("a") is ledger.idle("a") is None
    assert not ledger.changed
    assert not ledger.save()
    assert not os.path.exists(os.path.dirname(path))


def test_ledger_is_loaded_as_it_was_saved(path: str) -> None:
    ledger = Ledger(path)
    ledger.observe(at(NOW), seen("a", a="k1", b="k2"), "token")
    ledger.observe(at(NOW + HOUR), seen("a", a="k1", b="k2"), "token")
    ledger.observe(at(NOW + 100 * HOUR), seen(a="k1", b="k2"), "token")
    ledger.observe(at(NOW + 101 * HOUR), seen(a="k1", b="k2"), "other")
    assert ledger.save()
    assert os.stat(path).st_mode & 0o777 == 0o600
    loaded = Ledger(path).load()
    assert loaded.watched_since == NOW
    assert loaded.watched == 2 * HOUR
    assert (loaded.last_used("a"), loaded.last_used("b")) == (NOW + HOUR, None)
    assert (loaded.idle("a"), loaded.idle("b")) == (HOUR, 2 * HOUR)
    assert loaded.first_seen("b") == NOW
    assert loaded.gaps == ledger.gaps == (Gap(NOW + HOUR, NOW + 100 * HOUR, 99 * HOUR),)
    assert sorted(os.listdir(os.path.dirname(path))) == ["ledger.json", "lock"]


def test_ledger_is_written_at_intervals_and_for_changes(path: str) -> None:
    ledger = Ledger(path)
    ledger.observe(at(NOW), seen("a", a="k"))
    assert ledger.save()
    for seconds, is_written in (
        (60, False),
        (600, False),
        (601, True),
        (1100, False),
        (1300, True),
    ):
        ledger.load()
        ledger.observe(at(NOW + seconds), seen("a", a="k"))
        assert ledger.idle("a") == 0
        assert ledger.save() == is_written
    ledger.load()
    assert ledger.watched == 1300
    for found in (seen(a="k", traces={"a": "new"}), seen(), seen(a="k", b="k2")):
        ledger.load()
        ledger.observe(at(NOW + 1400), found)
        assert ledger.save()


class TestUnusedTime:
    def test_time_between_close_observations_counts(self) -> None:
        ledger = Ledger("/nowhere")
        offsets = [0.0, HOUR, 37 * HOUR, 73 * HOUR + 1, 74 * HOUR]
        for offset in offsets:
            ledger.observe(at(NOW + offset), seen(a="k"))
        assert ledger.watched == ledger.idle("a") == 38 * HOUR - 1
        assert ledger.gaps == (Gap(NOW + 37 * HOUR, NOW + 73 * HOUR + 1, 36 * HOUR + 1),)

    def test_long_time_with_the_host_off_does_not_count(self) -> None:
        ledger = Ledger("/nowhere")
        watch_hourly(ledger, 24, a="k")
        ledger.observe(at(NOW + 90 * DAY, 60.0, "two"), seen(a="k"))
        assert ledger.idle("a") == DAY
        assert ledger.doubt.startswith("the host was off for 89 days, or")
        assert ledger.gaps[-1].end == NOW + 90 * DAY

    def test_night_with_the_host_off_counts(self) -> None:
        ledger = Ledger("/nowhere")
        watch_hourly(ledger, 8, a="k")
        ledger.observe(at(NOW + DAY, 60.0, "two"), seen(a="k"))
        assert ledger.idle("a") == DAY
        assert not ledger.doubt

    def test_use_between_observations_is_detected_by_its_trace(self) -> None:
        ledger = Ledger("/nowhere")
        for hour in range(50):
            ledger.observe(at(NOW + hour * HOUR), seen(a="k1", b="k2", traces={"a": f"{hour}"}))
        assert (ledger.idle("a"), ledger.idle("b")) == (0, 49 * HOUR)
        assert ledger.last_used("a") == NOW + 49 * HOUR

    def test_unused_time_with_a_daily_trace_is_a_day_less(self) -> None:
        ledger = Ledger("/nowhere")
        coarse = Sighting("k", False, "x", NOW, True)
        for hour in range(30):
            ledger.observe(at(NOW + hour * HOUR), {"a": coarse})
        assert ledger.idle("a") == 5 * HOUR

    def test_last_use_is_the_time_of_the_trace(self) -> None:
        ledger = Ledger("/nowhere")
        ledger.observe(at(NOW), {"a": Sighting("k", False, "1", NOW - DAY)})
        ledger.observe(at(NOW + DAY), {"a": Sighting("k", False, "2", NOW + HOUR)})
        assert (ledger.last_used("a"), ledger.idle("a")) == (NOW + HOUR, 0)

    @pytest.mark.parametrize("first", ["", "x"])
    def test_time_with_container_changes_does_not_count_without_traces(self, first: str) -> None:
        ledger = Ledger("/nowhere")
        tokens = ["1", "1", "2", "2", "", ""]
        for hour, token in enumerate(tokens):
            trace = first if hour % 2 else ""
            ledger.observe(at(NOW + hour * HOUR), {"a": Sighting("k", False, trace)}, token)
        assert ledger.watched == 5 * HOUR
        assert ledger.idle("a") == 2 * HOUR
        assert ledger.untraced
        ledger.observe(at(NOW + 6 * HOUR, 9.0, "two"), {"a": Sighting("k")}, "3")
        ledger.observe(at(NOW + 7 * HOUR, HOUR, "three"), {"a": Sighting("k")}, "3")
        assert ledger.idle("a") == 2 * HOUR

    def test_unused_time_of_a_new_layer_starts_at_zero(self) -> None:
        ledger = Ledger("/nowhere")
        watch_hourly(ledger, 9, a="k")
        watch_hourly(ledger, 2, 10, a="k", b="k2")
        assert (ledger.idle("a"), ledger.idle("b")) == (12 * HOUR, 2 * HOUR)


class TestClocks:
    @pytest.mark.parametrize("jump", [14 * 365 * DAY, -14 * 365 * DAY, 2 * HOUR, -2 * HOUR])
    def test_clock_that_is_wrong_for_a_single_run_is_ignored(self, jump: float) -> None:
        ledger = Ledger("/nowhere")
        watch_hourly(ledger, 24, a="k")
        later = at(NOW + 25 * HOUR)
        ledger.observe(later._replace(wall=later.wall + jump), seen(a="k"))
        assert ledger.doubt
        assert ledger.idle("a") == ledger.watched == 25 * HOUR
        ledger.observe(at(NOW + 26 * HOUR), seen(a="k"))
        assert not ledger.doubt
        assert ledger.idle("a") == 26 * HOUR

    def test_reason_for_doubt_is_recorded(self) -> None:
        ledger = Ledger("/nowhere")
        ledger.observe(at(NOW), {})
        ledger.observe(at(NOW + 14 * DAY, 1060.0), {})
        assert ledger.doubt == "the clock of this host was set forward by 13 days"
        ledger.observe(at(NOW - 5 * HOUR, 1120.0), {})
        assert ledger.doubt == "the clock of this host was set back by 5 hours"
        ledger.observe(at(1000.0, 1120.0), {})
        assert ledger.doubt == "the clock of this host shows a date before 2024"

    @pytest.mark.parametrize("boot", ["one", "two"])
    @pytest.mark.parametrize("jump", [60 * DAY, -60 * DAY])
    def test_permanent_change_is_accepted_after_a_day(self, jump: float, boot: str) -> None:
        ledger = Ledger("/nowhere")
        watch_hourly(ledger, 24, a="k")
        doubts = []
        for hour in range(48):
            ledger.observe(at(NOW + jump + hour * HOUR, 100 * DAY + hour * HOUR, boot), seen(a="k"))
            doubts.append(bool(ledger.doubt))
        assert doubts == [True] * 24 + [False] * 24

    def test_time_counts_with_a_clock_without_battery(self) -> None:
        """After each boot, the clock shows 1970 until it is set over the network."""
        ledger = Ledger("/nowhere")
        for boot in range(4):
            ledger.observe(at(60.0, 60.0, f"{boot}"), seen(a="k"))
            assert ledger.doubt
            for hour in range(1, 5):
                wall = NOW + boot * DAY + hour * HOUR
                ledger.observe(at(wall, hour * HOUR, f"{boot}"), seen(a="k"))
                assert not ledger.doubt
        assert ledger.idle("a") == 4 * (4 * HOUR - 60)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (-HOUR, ""),
            (-90 * DAY, ""),
            (60.0, ""),
            (DAY, "written later than the clock"),
            (-14 * 365 * DAY, "for 5110 days"),
        ],
    )
    def test_first_observation_compares_the_clock_with_the_records(
        self, changed: float, message: str
    ) -> None:
        ledger = Ledger("/nowhere")
        ledger.observe(at(NOW), {}, "", NOW + changed)
        assert (message in ledger.doubt) if message else not ledger.doubt

    @given(
        st.lists(
            st.tuples(
                st.floats(0, 40 * HOUR),
                st.sampled_from((0.0, 0.0, 14 * 365 * DAY, -14 * 365 * DAY, 5 * HOUR)),
                st.booleans(),
                st.booleans(),
            ),
            max_size=30,
        )
    )
    def test_unused_time_never_exceeds_the_elapsed_time(
        self, steps: t.List[t.Tuple[float, float, bool, bool]]
    ) -> None:
        """For any changes of the clock within a boot."""
        ledger = Ledger("/nowhere")
        true = used_at = uptime = 0.0
        for passed, jump, used, traced in steps:
            true += passed
            uptime += passed
            if used or not true:
                used_at = true
            ledger.observe(
                Moment(NOW + true + jump, uptime, "one"),
                {"a": Sighting("k", used, "x" if traced else "")},
            )
            assert (ledger.idle("a") or 0) <= true - used_at + 1e-3
            assert ledger.watched <= true + 1e-3


def test_replacement_inherits_the_times_of_a_removed_layer(path: str) -> None:
    ledger = Ledger(path)
    ledger.observe(at(NOW), seen("a", "b", a="k1", b="k2", c="k3"))
    ledger.observe(at(NOW + HOUR), seen(a2="k1", c="k3"))
    assert ledger.last_used("a") is ledger.last_used("b") is None
    assert ledger.last_used("a2") == NOW
    assert ledger.first_seen("a2") == NOW + HOUR
    assert ledger.idle("a2") == 0
    assert ledger.watched_since == NOW
    ledger.observe(at(NOW + 2 * HOUR), seen(b2="k2", c="k3"))
    assert ledger.last_used("b2") is None


def test_unused_time_restarts_for_another_layer_with_the_same_id(path: str) -> None:
    ledger = Ledger(path)
    ledger.observe(at(NOW), seen("a", a="k1"))
    ledger.observe(at(NOW + HOUR), seen(a="k2"))
    assert ledger.last_used("a") is None
    assert ledger.idle("a") == 0


def test_ledgers_of_concurrent_runs_are_merged(path: str) -> None:
    first, second, third = Ledger(path), Ledger(path), Ledger(path)
    first.observe(at(NOW), seen("a", a="k1", b="k2"))
    second.observe(at(NOW + HOUR), seen("b", a="k1", b="k2"))
    third.observe(at(NOW + 60), seen("a", a="k1", b="k2"))
    third.learn({"program": "version"})
    assert first.save()
    assert second.save()
    assert third.save()
    ledger = Ledger(path).load()
    assert ledger.watched_since == NOW
    assert ledger.watched == HOUR
    assert (ledger.last_used("a"), ledger.last_used("b")) == (NOW + 60, NOW + HOUR)
    assert (ledger.idle("a"), ledger.idle("b")) == (HOUR, 0)
    assert ledger.first_seen("b") == NOW
    assert ledger.programs == {"program": "version"}


def test_ledger_of_version_1_is_read(path: str) -> None:
    """Its times are kept for display. They do not count, because version 1 does not record the observations."""
    mapping = Mapping(IDMap.of((0, 1, 2)), IDMap.of((0, 1, 2)))
    content = {
        "version": 1,
        "watched_since": NOW - 90 * DAY,
        "programs": {"p": "1"},
        "layers": {
            "a": {
                "key": f"image {mapping.uid} {mapping.gid}",
                "first_seen": NOW - 90 * DAY,
                "last_used": NOW - 80 * DAY,
            }
        },
    }
    os.mkdir(os.path.dirname(path))
    pathlib.Path(path).write_text(json.dumps(content))
    ledger = Ledger(path).load()
    assert (ledger.watched_since, ledger.watched) == (NOW - 90 * DAY, 0)
    ledger.observe(at(NOW), {"a": Sighting(ledger_key("image", mapping))})
    assert (ledger.last_used("a"), ledger.idle("a")) == (NOW - 80 * DAY, 0)
    assert ledger.save()
    ledger = Ledger(path).load()
    assert ledger.first_seen("a") == NOW - 90 * DAY
    assert ledger.programs == {"p": "1"}


def test_size_of_the_ledger_is_limited(path: str) -> None:
    many = IDMap(tuple(IDRange(2 * item, 2 * item, 1) for item in range(340)))
    key = ledger_key("i" * 64, Mapping(many, many))
    assert len(key) == 64
    ledger = Ledger(path)
    found = {f"{item:064x}": Sighting(key, trace="1" * 19) for item in range(20500)}
    ledger.observe(at(NOW), found)
    for item in range(100):
        ledger.observe(at(NOW + item * 40 * HOUR), found)
        ledger.learn({f"p{item}": "1"})
    ledger.save()
    assert os.path.getsize(path) < 8 * 1024 * 1024
    ledger = Ledger(path).load()
    assert ledger.first_seen(f"{0:064x}") == NOW
    assert len(ledger.gaps) == len(ledger.programs) == 8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100000,
        b'{"version":3,"watched_since":1,"layers":{}}',
        b'{"version":true,"watched_since":1,"layers":{}}',
        b'{"version":2,"watched_since":1,"layers":{}}',
        b'{"version":2,"watched_since":1,"watched":1,"last":[],"layers":{}}',
        b'{"version":2,"watched_since":1,"watched":-1,"last":{"wall":1,"uptime":1,"boot":"b"},"layers":{}}',
        b'{"version":1,"watched_since":253402300800,"layers":{}}',
        b'{"version":1,"watched_since":"x","layers":{}}',
        b'{"version":1,"watched_since":1,"layers":[]}',
        b'{"version":1,"watched_since":1,"layers":{"a":1}}',
        b'{"version":1,"watched_since":1,"layers":{"a":{"key":5}}}',
        b'{"version":1,"watched_since":1e400,"layers":{}}',
        b'{"version":1,"watched_since":NaN,"layers":{}}',
        b'{"version":1,"watched_since":' + b"9" * 5000 + b',"layers":{}}',
        b'{"version":1,"watched_since":true,"layers":{}}',
        b'{"version":1,"watched_since":1,"layers":{},"programs":[]}',
        b'{"version":1,"watched_since":1,"layers":{},"programs":{"a":1}}',
    ],
)
def test_broken_file_is_an_empty_ledger(path: str, data: bytes) -> None:
    os.mkdir(os.path.dirname(path))
    pathlib.Path(path).write_bytes(data)
    ledger = Ledger(path).load()
    assert ledger.watched_since is None
    ledger.observe(at(NOW), seen("a", a="k"))
    assert ledger.save()
    assert Ledger(path).load().last_used("a") == NOW


_NUMBERS = st.sampled_from((NOW, 1.0, 0, -1, 1e11, 1e12, 253402300799.0, 1e400, float("nan")))
_KEYS = ("wall", "uptime", "boot", "steady", "key", "first_seen", "last_used", "idle_from", "trace")
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), _NUMBERS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(_KEYS), inner),
        st.fixed_dictionaries({"wall": _NUMBERS, "uptime": _NUMBERS, "boot": st.just("one")}),
    ),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {"key": st.sampled_from(("k", "other"))},
    optional=dict.fromkeys(
        ("first_seen", "last_used", "idle_from", "trace", "coarse"), json_values
    ),
)
ledgers = st.fixed_dictionaries(
    {"version": st.sampled_from((1, 2)), "watched_since": _NUMBERS},
    optional={
        "layers": st.dictionaries(st.sampled_from("ab"), entries | json_values),
        **dict.fromkeys(("watched", "token", "gaps"), json_values | _NUMBERS),
        **dict.fromkeys(("last", "believed", "doubted"), json_values),
        "programs": json_values,
    },
)


@given(ledgers | json_values)
def test_any_json_is_read_and_rewritten(
    tmp_path_factory: pytest.TempPathFactory, value: t.Any
) -> None:
    """A user may write anything to the file. It can be read, displayed and written again."""
    path = str(tmp_path_factory.mktemp("ledger") / "ledger.json")
    pathlib.Path(path).write_text(json.dumps(value))
    ledger = Ledger(path).load()
    ledger.observe(at(NOW), seen("a", a="k", b="k"))
    assert (ledger.last_used("a"), ledger.idle("a")) == (NOW, 0)
    for item in "ab":
        assert 0 <= (ledger.idle(item) or 0) <= ledger.watched
        assert format_time(ledger.first_seen(item) or 0)
        assert format_time(ledger.last_used(item) or 0)
    for gap in ledger.gaps:
        assert format_time(gap.start)
        assert format_time(gap.end)
    assert format_time(ledger.watched_since or 0)
    ledger.learn({"p": "1"})
    ledger.save()
    loaded = Ledger(path).load()
    assert loaded.last_used("a") == NOW


def test_link_is_not_followed(path: str, tmp_path: pathlib.Path) -> None:
    os.mkdir(os.path.dirname(path))
    victim = tmp_path / "victim"
    victim.write_text("safe")
    os.symlink(victim, f"{path}.tmp")
    ledger = Ledger(path)
    ledger.observe(at(NOW), seen("a", a="k"))
    ledger.save()
    assert victim.read_text() == "safe"
    assert not os.path.lexists(f"{path}.tmp")


def test_keys_depend_on_image_and_maps() -> None:
    first, second = IDMap.of((0, 1, 2)), IDMap.of((0, 1, 3))
    keys = {
        ledger_key(image, Mapping(uid, gid))
        for image in ("a", "b")
        for uid in (first, second)
        for gid in (first, second)
    }
    assert len(keys) == 8


def test_last_reported_versions_of_programs_are_kept(path: str) -> None:
    ledger = Ledger(path).load()
    ledger.observe(at(NOW), {})
    ledger.learn({f"program {number}": f"version {number}" for number in range(9)})
    assert ledger.save()
    ledger = Ledger(path).load()
    assert list(ledger.programs) == [f"program {number}" for number in range(1, 9)]
    ledger.learn({"program 3": "version 3"})
    assert not ledger.changed
    ledger.learn({"program 1": "version 10"})
    assert ledger.save()
    assert Ledger(path).load().programs["program 1"] == "version 10"
