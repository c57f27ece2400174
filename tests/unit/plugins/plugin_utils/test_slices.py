# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the action plugins that call a module repeatedly, for a limited time each."""

from __future__ import annotations

import itertools
import time
import typing as t
from types import SimpleNamespace

import pytest
from ansible.plugins.action import ActionBase
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


PROGRESS = {"files": 120, "bytes": 3_000_000, "bytes_expected": 12_000_000, "seconds_resuming": 6.0}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> t.List[str]:
    lines: t.List[str] = []

    def display(line: str, stderr: bool) -> None:
        assert stderr
        lines.append(line)

    monkeypatch.setattr(_slices, "display", SimpleNamespace(display=display))
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    return lines


def run(
    results: t.Union[t.List[Json], EndlessResults],
    arguments: t.Optional[Json] = None,
    check: bool = False,
    background: int = 0,
    no_log: bool = False,
    plugin: t.Any = layer_template,
) -> t.Tuple[Json, t.List[Json]]:
    """Run the action with the results of successive module calls; returns its result and the arguments of the calls."""
    calls: t.List[Json] = []

    def execute(module_args: Json, task_vars: t.Any, wrap_async: bool) -> Json:
        calls.append({**module_args, "async": wrap_async})
        return results[len(calls) - 1]

    return run_with(execute, arguments, check, background, no_log, plugin), calls


def run_with(
    execute: t.Callable[..., Json],
    arguments: t.Optional[Json] = None,
    check: bool = False,
    background: int = 0,
    no_log: bool = False,
    plugin: t.Any = layer_template,
) -> Json:
    action = plugin.ActionModule.__new__(plugin.ActionModule)
    action._task = SimpleNamespace(
        args=dict(arguments or {}), async_val=background, check_mode=check, no_log=no_log
    )
    action._connection = SimpleNamespace(has_native_async=False)
    action._execute_module = execute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ActionBase, "run", lambda *_arguments: {})
        result: Json = action.run(None, {"inventory_hostname": "web1"})
        return result


def test_complete_result_needs_no_further_call(shown: t.List[str]) -> None:
    result, calls = run([call(entry(1, "created"))])
    assert [item["time_limit"] for item in calls] == [10]
    assert result["changed"]
    assert result["invocation"]["module_args"]["time_limit"] is None
    assert shown == []


def test_module_is_called_until_nothing_remains(shown: t.List[str]) -> None:
    progressed = {**PROGRESS, "bytes": 6_000_000}
    result, calls = run(
        [
            call(entry(1, "created"), entry(2, "pending", **PROGRESS), entry(3, "pending")),
            call(entry(1, "existing"), entry(2, "pending", **progressed), entry(3, "pending")),
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
    # The time limit grows with the time that the previous call needed to resume.
    assert [item["time_limit"] for item in calls] == [10, 24, 24]
    assert [item["action"] for item in result["layers"]] == ["created", "created", "existing"]
    assert (result["changed"], result["partial"], result["remaining"]) == (True, False, 0)
    assert result["diff"] == {"before": "then", "after": "in the end"}


def test_refused_layer_does_not_stop_the_others(shown: t.List[str]) -> None:
    refusal = {"failed": True, "msg": "no such image"}
    result, calls = run(
        [
            call(entry(1, "refused"), entry(2, "pending", **PROGRESS), **refusal),
            call(entry(1, "refused"), entry(2, "created"), **refusal),
        ]
    )
    assert len(calls) == 2
    assert (result["failed"], result["msg"]) == (True, "no such image")
    assert [item["action"] for item in result["layers"]] == ["refused", "created"]


def test_failed_call_ends_the_task_with_the_earlier_results(shown: t.List[str]) -> None:
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


def test_unreachable_host_is_not_called_again(shown: t.List[str]) -> None:
    result, calls = run([call(entry(1, "pending", **PROGRESS)), {"unreachable": True}])
    assert len(calls) == 2
    assert result["unreachable"]


def test_host_without_progress_is_not_called_forever(shown: t.List[str]) -> None:
    result, calls = run(
        [
            call(entry(1, "pending", **PROGRESS)),
            call(entry(1, "pending", **PROGRESS), changed=False),
        ]
    )
    assert len(calls) == 2
    assert (result["failed"], result["changed"]) == (True, True)
    assert result["msg"] == "The module made no progress within 24 seconds."


class EndlessResults:
    """An endless list of results."""

    def __init__(self, make: t.Callable[[int], Json]) -> None:
        self.make = make

    def __getitem__(self, number: int) -> Json:
        return self.make(number)


@pytest.mark.parametrize(
    ("make", "calls", "message"),
    [
        (lambda _n: call(entry(1, "created"), entry(2, "pending")), 362, "no nearer to its end"),
        (lambda n: call(entry(1, "pending", **{**PROGRESS, "bytes": n % 2})), 363, "no nearer"),
        (lambda n: call(entry(1, "pending", **{**PROGRESS, "bytes": n})), 1441, "after 4 hours"),
    ],
)
def test_store_that_is_never_ready_does_not_block_the_play(
    make: t.Callable[[int], Json], calls: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The owner may remove created layers, or send results instead of the module's process."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(_slices, "display", SimpleNamespace(display=lambda *_args, **_how: None))
    result, module_calls = run(EndlessResults(make))
    assert result["failed"]
    assert message in result["msg"]
    assert len(module_calls) == calls


def entry_of(user: str, number: int, action: str, **progress: float) -> Json:
    return {**entry(number, action, **progress), "user": user}


class ResultsForUsers:
    """The results of the module for several users: `mallory` is never ready, the others need three calls each."""

    def __init__(self, entry_of_mallory: t.Callable[[int], Json]) -> None:
        self.entry_of_mallory = entry_of_mallory
        self.calls: t.List[str] = []

    def __call__(self, users: t.List[str]) -> Json:
        self.calls += users
        done, failures = [], []
        for user in users:
            count = self.calls.count(user)
            if user == "mallory":
                done.append(self.entry_of_mallory(count))
                if done[-1].get("error"):
                    failures.append(f"For mallory: {done.pop()['error']}")
            else:
                current = {**PROGRESS, "bytes": count}
                done.append(
                    entry_of(user, 1, "created")
                    if count == 3
                    else entry_of(user, 1, "pending", **current)
                )
        result = call(*done, stores=[{"user": user} for user in users])
        result["diff"] = {"before": dict.fromkeys(users), "after": dict.fromkeys(users)}
        if failures:
            result["stores"] = [{"user": user, "error": "no"} for user in users]
            result.update(failed=True, msg=" ".join(failures))
        return result


@pytest.mark.parametrize(
    ("entry_of_mallory", "calls", "message"),
    [
        (
            lambda n: entry_of("mallory", 1, "pending", **{**PROGRESS, "bytes": n}),
            1442,
            "after 4 hours",
        ),
        (lambda _n: entry_of("mallory", 1, "pending", **PROGRESS), 363, "no nearer to its end"),
        (
            lambda n: {"error": "broken"} if n > 1 else entry_of("mallory", 1, "pending"),
            2,
            "broken",
        ),
    ],
)
def test_users_take_turns(
    entry_of_mallory: t.Callable[[int], Json],
    calls: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A store that is never ready has a limit of its own, and the others are ready long before."""
    clock = itertools.count(0, 10)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(_slices, "display", SimpleNamespace(display=lambda *_args, **_how: None))
    hostile = ResultsForUsers(entry_of_mallory)
    users = ["mallory", "bob", "eve"]
    module_calls: t.List[Json] = []

    def execute(module_args: Json, **_how: t.Any) -> Json:
        module_calls.append(module_args)
        return hostile(module_args["users"])

    result = run_with(execute, {"users": users})
    assert hostile.calls[:6] == [*users, "mallory", "bob", "eve"]
    # Three calls for each, and at most as many for mallory in the meantime.
    assert {hostile.calls.count(user) for user in users[1:]} == {3}
    assert max(hostile.calls.index(user, 5) for user in users[1:]) < 9
    assert hostile.calls.count("mallory") == calls
    assert result["failed"]
    assert result["msg"].startswith("For mallory: ")
    assert message in result["msg"]
    actions = {item["user"]: item["action"] for item in result["layers"]}
    assert list(actions) == users
    assert (actions["bob"], actions["eve"]) == ("created", "created")
    assert [item["user"] for item in result["stores"]] == users
    assert set(result["diff"]["after"]) == set(users)
    assert result["remaining"] == 1


@pytest.mark.parametrize("seconds", [10**29, 1e300, 1e9])
def test_time_limit_of_a_call_is_at_most_an_hour(seconds: float, shown: t.List[str]) -> None:
    current = {**PROGRESS, "seconds_resuming": seconds}
    _result, calls = run([call(entry(1, "pending", **current)), call(entry(1, "created"))])
    assert [item["time_limit"] for item in calls] == [10, 3600]


def test_warnings_are_returned_once(shown: t.List[str]) -> None:
    result, _calls = run(
        [
            call(entry(1, "pending", **PROGRESS), warnings=["a", "b"]),
            call(entry(1, "created"), warnings=["b"]),
        ]
    )
    assert result["warnings"] == ["a", "b"]


def test_progress_of_a_task_with_no_log_is_not_displayed(shown: t.List[str]) -> None:
    run([call(entry(1, "pending", **PROGRESS)), call(entry(1, "created"))], no_log=True)
    assert shown == []


@pytest.mark.parametrize(
    "options",
    [
        {"check": True},
        {"background": 60},
        {"arguments": {"time_limit": 5}},
        {"arguments": {"time_limit": 0}},
        {"arguments": {"state": "absent"}},
    ],
)
def test_result_of_a_single_call_is_returned_unchanged(
    options: t.Dict[str, t.Any], shown: t.List[str]
) -> None:
    expected = call(entry(1, "pending"))
    result, calls = run([expected], **options)
    assert result is expected
    assert [item["async"] for item in calls] == [bool(options.get("background"))]
    assert calls[0].get("time_limit") == options.get("arguments", {}).get("time_limit")


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


def test_garbage_collection_continues_with_its_first_plan(shown: t.List[str]) -> None:
    arguments_of_task = {
        "max_freed": "3MB",
        "high_threshold": 80,
        "low_threshold": 70,
        "keep_images": ["a"],
    }
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
        arguments_of_task,
        plugin=layer_gc,
    )
    assert calls[0] == {**arguments_of_task, "time_limit": 10, "async": False}
    later_arguments = {"keep_images": ["a"], "async": False}
    ids = [f"{number:064x}" for number in (2, 3)]
    assert calls[1] == {**later_arguments, "layers": ids, "time_limit": 32}
    assert calls[2] == {**later_arguments, "layers": ids[1:], "time_limit": 10}
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


def test_partly_failed_garbage_collection_fails(shown: t.List[str]) -> None:
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


def test_call_for_remaining_leftovers_only_selects_no_layers(shown: t.List[str]) -> None:
    rest = {"findings": [{"id": "x", "rule": "time_limit"}], "partial": True, "remaining": 1}
    _result, calls = run(
        [collected(removed=[layer(1, "duplicates")], **rest), collected()],
        {"duplicates": True},
        plugin=layer_gc,
    )
    assert calls[1]["layers"] == ["none"]
