# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import itertools
import typing as t
from types import SimpleNamespace

import pytest
from ansible_collections.userns.storage.plugins.action import layer_gc, layer_template
from ansible_collections.userns.storage.plugins.plugin_utils import _slices

Json = t.Dict[str, t.Any]


def entry(number: int, action: str, **progress: float) -> Json:
    return {
        "user": "root",
        "image_id": f"{number:064x}",
        "image_names": [f"localhost/i:{number}"],
        "uidmap": ["0:100000:65536"],
        "gidmap": ["0:100000:65536"],
        "action": action,
        "size_expected": None if action == "existing" else 12_000_000,
        "progress": progress or None,
    }


def call(*layers: Json, **more: t.Any) -> Json:
    left = sum(item["action"] == "pending" for item in layers)
    return {
        "changed": any(item["action"] == "created" or item["progress"] for item in layers),
        "layers": list(layers),
        "partial": left > 0,
        "remaining": left,
        "diff": {"before": "then", "after": "now"},
        "invocation": {"module_args": {"time_limit": 10}},
        **more,
    }


GOING = {"files": 120, "bytes": 3_000_000, "bytes_expected": 12_000_000, "seconds_resuming": 6.0}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> t.List[str]:
    lines: t.List[str] = []

    def display(line: str, stderr: bool) -> None:
        assert stderr
        lines.append(line)

    monkeypatch.setattr(_slices, "display", SimpleNamespace(display=display))
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(_slices.time, "monotonic", lambda: float(next(clock)))
    return lines


def run(
    results: t.Union[t.List[Json], Forever],
    arguments: t.Optional[Json] = None,
    check: bool = False,
    background: int = 0,
    secret: bool = False,
    plugin: t.Any = layer_template,
) -> t.Tuple[Json, t.List[Json]]:
    """What the action makes of what the module returns, call by call; and how it called it."""
    calls: t.List[Json] = []

    def execute(module_args: Json, task_vars: t.Any, wrap_async: bool) -> Json:
        calls.append({**module_args, "async": wrap_async})
        return results[len(calls) - 1]

    return run_with(execute, arguments, check, background, secret, plugin), calls


def run_with(
    execute: t.Callable[..., Json],
    arguments: t.Optional[Json] = None,
    check: bool = False,
    background: int = 0,
    secret: bool = False,
    plugin: t.Any = layer_template,
) -> Json:
    action = plugin.ActionModule.__new__(plugin.ActionModule)
    action._task = SimpleNamespace(
        args=dict(arguments or {}), async_val=background, check_mode=check, no_log=secret
    )
    action._connection = SimpleNamespace(has_native_async=False)
    action._execute_module = execute
    base = _slices.ActionBase.run
    _slices.ActionBase.run = lambda *_arguments: {}
    try:
        result: Json = action.run(None, {"inventory_hostname": "web1"})
        return result
    finally:
        _slices.ActionBase.run = base


def test_one_call_may_do(shown: t.List[str]) -> None:
    result, calls = run([call(entry(1, "created"))])
    assert [item["time_limit"] for item in calls] == [10]
    assert result["changed"]
    assert result["invocation"]["module_args"]["time_limit"] is None
    assert shown == []


def test_it_is_called_until_nothing_remains(shown: t.List[str]) -> None:
    farther = {**GOING, "bytes": 6_000_000}
    result, calls = run(
        [
            call(entry(1, "created"), entry(2, "pending", **GOING), entry(3, "pending")),
            call(entry(1, "existing"), entry(2, "pending", **farther), entry(3, "pending")),
            call(
                entry(1, "existing"),
                entry(2, "created"),
                entry(3, "existing"),
                diff={"before": "now", "after": "in the end"},
            ),
        ]
    )
    assert shown == [
        # 15 of 36 MB in 10 s.
        "web1 | 1 of 3 layers created, 14.3 MiB of 34.3 MiB, 42% done, about 14 s left;"
        " now localhost/i:2 for 0:100000:65536: 120 files, 2.9 MiB of 11.4 MiB",
        # 3 MB more in the next 10 s.
        "web1 | 1 of 3 layers created, 17.2 MiB of 34.3 MiB, 50% done, about 60 s left;"
        " now localhost/i:2 for 0:100000:65536: 120 files, 5.7 MiB of 11.4 MiB",
    ]
    # A call that has to look through a lot gets the time to get on.
    assert [item["time_limit"] for item in calls] == [10, 24, 24]
    assert [item["action"] for item in result["layers"]] == ["created", "created", "existing"]
    assert (result["changed"], result["partial"], result["remaining"]) == (True, False, 0)
    assert result["diff"] == {"before": "then", "after": "in the end"}


def test_what_is_refused_keeps_nothing_else_from_being_done(shown: t.List[str]) -> None:
    refusal = {"failed": True, "msg": "no such image"}
    result, calls = run(
        [
            call(entry(1, "refused"), entry(2, "pending", **GOING), **refusal),
            call(entry(1, "refused"), entry(2, "created"), **refusal),
        ]
    )
    assert len(calls) == 2
    assert (result["failed"], result["msg"]) == (True, "no such image")
    assert [item["action"] for item in result["layers"]] == ["refused", "created"]


def test_a_failed_call_ends_the_task_with_the_earlier_results(shown: t.List[str]) -> None:
    result, calls = run(
        [
            call(entry(1, "created"), entry(2, "pending"), store={"driver": "vfs"}),
            {"failed": True, "msg": "broken"},
        ]
    )
    assert len(calls) == 2
    assert (result["failed"], result["changed"]) == (True, True)
    assert [item["action"] for item in result["layers"]] == ["created", "pending"]
    assert result["store"] == {"driver": "vfs"}
    assert shown == [
        "web1 | 1 of 2 layers created, 11.4 MiB of 22.9 MiB, 50% done, about 10 s left"
    ]


def test_an_unreachable_host_is_not_called_again(shown: t.List[str]) -> None:
    result, calls = run([call(entry(1, "pending", **GOING)), {"unreachable": True}])
    assert len(calls) == 2
    assert result["unreachable"]


def test_a_host_without_progress_is_not_called_forever(shown: t.List[str]) -> None:
    result, calls = run(
        [
            call(entry(1, "pending", **GOING)),
            call(entry(1, "pending", **GOING), changed=False),
        ]
    )
    assert len(calls) == 2
    assert (result["failed"], result["changed"]) == (True, True)
    assert result["msg"] == "The module made no progress within 24 seconds."


class Forever:
    """A list of results without end."""

    def __init__(self, make: t.Callable[[int], Json]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Json:
        return self.make(number)


@pytest.mark.parametrize(
    ("make", "calls", "why"),
    [
        (lambda _n: call(entry(1, "created"), entry(2, "pending")), 362, "no nearer to its end"),
        (lambda n: call(entry(1, "pending", **{**GOING, "bytes": n % 2})), 363, "no nearer"),
        (lambda n: call(entry(1, "pending", **{**GOING, "bytes": n})), 1441, "after 4 hours"),
    ],
)
def test_a_store_that_never_is_ready_does_not_hold_the_play(
    make: t.Callable[[int], Json], calls: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner may remove what was made, or answer in place of the module's process."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(_slices.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(_slices, "display", SimpleNamespace(display=lambda *_args, **_how: None))
    result, made = run(Forever(make))
    assert result["failed"]
    assert why in result["msg"]
    assert len(made) == calls


def of(user: str, number: int, action: str, **progress: float) -> Json:
    return {**entry(number, action, **progress), "user": user}


class Hostile:
    """What the module returns for users of whom `mallory` always shows progress; the others need three calls each."""

    def __init__(self, odd: t.Callable[[int], Json]) -> None:
        self.odd = odd
        self.calls: t.List[str] = []

    def __call__(self, users: t.List[str]) -> Json:
        self.calls += users
        done, failures = [], []
        for user in users:
            count = self.calls.count(user)
            if user == "mallory":
                done.append(self.odd(count))
                if done[-1].get("error"):
                    failures.append(f"For mallory: {done.pop()['error']}")
            else:
                going = {**GOING, "bytes": count}
                done.append(
                    of(user, 1, "created") if count == 3 else of(user, 1, "pending", **going)
                )
        result = call(*done, stores=[{"user": user} for user in users])
        result["diff"] = {"before": dict.fromkeys(users), "after": dict.fromkeys(users)}
        if failures:
            result["stores"] = [{"user": user, "error": "no"} for user in users]
            result.update(failed=True, msg=" ".join(failures))
        return result


@pytest.mark.parametrize(
    ("odd", "calls", "why"),
    [
        (lambda n: of("mallory", 1, "pending", **{**GOING, "bytes": n}), 1442, "after 4 hours"),
        (lambda _n: of("mallory", 1, "pending", **GOING), 363, "no nearer to its end"),
        (lambda n: {"error": "broken"} if n > 1 else of("mallory", 1, "pending"), 2, "broken"),
    ],
)
def test_users_take_turns(
    odd: t.Callable[[int], Json], calls: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that never is ready has its own limit, and the others are finished long before."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(_slices.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(_slices, "display", SimpleNamespace(display=lambda *_args, **_how: None))
    hostile = Hostile(odd)
    users = ["mallory", "bob", "eve"]
    made: t.List[Json] = []

    def execute(module_args: Json, **_how: t.Any) -> Json:
        made.append(module_args)
        return hostile(module_args["users"])

    result = run_with(execute, {"users": users})
    assert hostile.calls[:6] == [*users, "mallory", "bob", "eve"]
    # Three calls each, and not more than as many for the first one meanwhile.
    assert {hostile.calls.count(user) for user in users[1:]} == {3}
    assert max(hostile.calls.index(user, 5) for user in users[1:]) < 9
    assert hostile.calls.count("mallory") == calls
    assert result["failed"]
    assert result["msg"].startswith("For mallory: ")
    assert why in result["msg"]
    actions = {item["user"]: item["action"] for item in result["layers"]}
    assert list(actions) == users
    assert (actions["bob"], actions["eve"]) == ("created", "created")
    assert [item["user"] for item in result["stores"]] == users
    assert set(result["diff"]["after"]) == set(users)
    assert result["remaining"] == 1


@pytest.mark.parametrize("seconds", [10**29, 1e300, 1e9])
def test_no_call_is_given_more_than_an_hour(seconds: float, shown: t.List[str]) -> None:
    going = {**GOING, "seconds_resuming": seconds}
    _result, calls = run([call(entry(1, "pending", **going)), call(entry(1, "created"))])
    assert [item["time_limit"] for item in calls] == [10, 3600]


def test_warnings_are_given_once(shown: t.List[str]) -> None:
    result, _calls = run(
        [
            call(entry(1, "pending", **GOING), warnings=["a", "b"]),
            call(entry(1, "created"), warnings=["b"]),
        ]
    )
    assert result["warnings"] == ["a", "b"]


def test_nothing_of_a_secret_task_is_shown(shown: t.List[str]) -> None:
    run([call(entry(1, "pending", **GOING)), call(entry(1, "created"))], secret=True)
    assert shown == []


@pytest.mark.parametrize(
    "how",
    [
        {"check": True},
        {"background": 60},
        {"arguments": {"time_limit": 5}},
        {"arguments": {"time_limit": 0}},
        {"arguments": {"state": "absent"}},
    ],
)
def test_one_call_and_its_result_as_it_is(how: t.Dict[str, t.Any], shown: t.List[str]) -> None:
    only = call(entry(1, "pending"))
    result, calls = run([only], **how)
    assert result is only
    assert [item["async"] for item in calls] == [bool(how.get("background"))]
    assert calls[0].get("time_limit") == how.get("arguments", {}).get("time_limit")


def layer(number: int, rule: str, size: int = 1_000_000) -> Json:
    return {"id": f"{number:064x}", "rule": rule, "size": size, "inodes": 10, "uidmap": []}


def collected(**more: t.Any) -> Json:
    later = [item for item in more.get("kept", ()) if item["rule"] == "time_limit"]
    return {
        "changed": bool(more.get("removed")),
        **{name: [] for name in ("removed", "kept", "failures", "repaired", "findings", "notes")},
        **{name: [] for name in ("removed_images", "kept_images")},
        "space_reclaimed": 0,
        "inodes_reclaimed": 0,
        "target_met": True,
        "would_free": [],
        "store": {},
        "partial": bool(later),
        "remaining": len(later),
        "seconds_planning": 1.0,
        **more,
    }


def test_a_collection_goes_on_with_its_first_plan(shown: t.List[str]) -> None:
    asked = {"max_freed": "3MB", "high_threshold": 80, "low_threshold": 70, "keep_images": ["a"]}
    result, calls = run(
        [
            collected(
                removed=[layer(1, "high_threshold")],
                kept=[
                    layer(2, "time_limit"),
                    layer(3, "time_limit", 2_000_000),
                    layer(4, "keep_images"),
                    layer(5, "max_freed"),
                ],
                space_reclaimed=900,
                seconds_planning=8.0,
            ),
            collected(
                removed=[layer(2, "layers")],
                kept=[layer(3, "time_limit", 2_000_000), layer(4, "keep_images"), layer(5, "none")],
                space_reclaimed=90,
            ),
            collected(
                kept=[layer(3, "in_use"), layer(4, "keep_images"), layer(5, "none")],
                space_reclaimed=9,
            ),
        ],
        asked,
        plugin=layer_gc,
    )
    assert calls[0] == {**asked, "time_limit": 10, "async": False}
    following = {"keep_images": ["a"], "async": False}
    ids = [f"{number:064x}" for number in (2, 3)]
    assert calls[1] == {**following, "layers": ids, "time_limit": 32}
    assert calls[2] == {**following, "layers": ids[1:], "time_limit": 10}
    assert shown == [
        "web1 | 1 layers removed, 10 files, 977 KiB of 3.8 MiB, 25% done, about 30 s left; 2 remaining",
        "web1 | 2 layers removed, 20 files, 1.9 MiB of 3.8 MiB, 50% done, about 20 s left; 1 remaining",
    ]
    assert [item["rule"] for item in result["removed"]] == ["high_threshold", "layers"]
    assert [(item["id"][-1], item["rule"]) for item in result["kept"]] == [
        ("4", "keep_images"),
        ("5", "max_freed"),
        ("3", "in_use"),
    ]
    assert (result["space_reclaimed"], result["changed"]) == (999, True)
    assert (result["partial"], result["remaining"]) == (False, 0)


def test_a_collection_that_failed_in_part_has_failed(shown: t.List[str]) -> None:
    refusal = {"failed": True, "msg": "1 of 2 could not be removed"}
    result, calls = run(
        [
            collected(failures=[layer(1, "duplicates")], kept=[layer(2, "time_limit")], **refusal),
            collected(removed=[layer(2, "layers")], kept=[layer(1, "none")]),
        ],
        {"duplicates": True},
        plugin=layer_gc,
    )
    assert len(calls) == 2
    assert (result["failed"], result["msg"]) == (True, refusal["msg"])
    assert [item["id"][-1] for item in result["failures"]] == ["1"]
    assert result["kept"] == []
    assert not result["target_met"]


def test_a_collection_of_leftovers_only_has_a_rule(shown: t.List[str]) -> None:
    rest = {"findings": [{"id": "x", "rule": "time_limit"}], "partial": True, "remaining": 1}
    _result, calls = run(
        [collected(removed=[layer(1, "duplicates")], **rest), collected()],
        {"duplicates": True},
        plugin=layer_gc,
    )
    assert calls[1]["layers"] == ["none"]
