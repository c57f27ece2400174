# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

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
        "progress": progress or None,
    }


def call(*layers: Json, **more: t.Any) -> Json:
    left = sum(one["action"] == "pending" for one in layers)
    return {
        "changed": any(one["action"] == "created" or one["progress"] for one in layers),
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
    results: t.List[Json],
    arguments: t.Optional[Json] = None,
    check: bool = False,
    background: int = 0,
    secret: bool = False,
    plugin: t.Any = layer_template,
) -> t.Tuple[Json, t.List[Json]]:
    """What the action makes of what the module returns, call by call; and how it called it."""
    calls: t.List[Json] = []
    action = plugin.ActionModule.__new__(plugin.ActionModule)
    arguments = dict(arguments or {})
    action._task = SimpleNamespace(
        args=arguments, async_val=background, check_mode=check, no_log=secret
    )
    action._connection = SimpleNamespace(has_native_async=False)

    def execute(module_args: Json, task_vars: t.Any, wrap_async: bool) -> Json:
        calls.append({**module_args, "async": wrap_async})
        return results[len(calls) - 1]

    action._execute_module = execute
    base = _slices.ActionBase.run
    _slices.ActionBase.run = lambda *_arguments: {}
    try:
        return action.run(None, {"inventory_hostname": "web1"}), calls
    finally:
        _slices.ActionBase.run = base


def test_one_call_may_do(shown: t.List[str]) -> None:
    result, calls = run([call(entry(1, "created"))])
    assert [one["time_limit"] for one in calls] == [10]
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
        "web1 | localhost/i:2 for 0:100000:65536: 120 files, 2.9 MiB of 11.4 MiB, 25% done, about 30 s left;"
        " 2 of 3 layers to do",
        "web1 | localhost/i:2 for 0:100000:65536: 120 files, 5.7 MiB of 11.4 MiB, 50% done, about 20 s left;"
        " 2 of 3 layers to do",
    ]
    # A call that has to look through a lot gets the time to get on.
    assert [one["time_limit"] for one in calls] == [10, 24, 24]
    assert [one["action"] for one in result["layers"]] == ["created", "created", "existing"]
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
    assert [one["action"] for one in result["layers"]] == ["refused", "created"]


def test_a_call_that_breaks_ends_it_and_all_before_is_told(shown: t.List[str]) -> None:
    result, calls = run(
        [
            call(entry(1, "created"), entry(2, "pending"), store={"driver": "vfs"}),
            {"failed": True, "msg": "broken"},
        ]
    )
    assert len(calls) == 2
    assert (result["failed"], result["changed"]) == (True, True)
    assert [one["action"] for one in result["layers"]] == ["created", "pending"]
    assert result["store"] == {"driver": "vfs"}
    assert shown == ["web1 | 1 of 2 layers to do"]


def test_a_host_that_is_gone_is_not_asked_again(shown: t.List[str]) -> None:
    result, calls = run([call(entry(1, "pending", **GOING)), {"unreachable": True}])
    assert len(calls) == 2
    assert result["unreachable"]


def test_a_host_that_gets_nothing_done_is_not_asked_for_ever(shown: t.List[str]) -> None:
    result, calls = run(
        [
            call(entry(1, "pending", **GOING)),
            call(entry(1, "pending", **GOING), changed=False),
        ]
    )
    assert len(calls) == 2
    assert (result["failed"], result["changed"]) == (True, True)
    assert result["msg"] == "Nothing was done within 24 seconds."


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
    assert [one["async"] for one in calls] == [bool(how.get("background"))]
    assert calls[0].get("time_limit") == how.get("arguments", {}).get("time_limit")


def layer(number: int, rule: str, size: int = 1_000_000) -> Json:
    return {"id": f"{number:064x}", "rule": rule, "size": size, "inodes": 10, "uidmap": []}


def collected(**more: t.Any) -> Json:
    later = [one for one in more.get("kept", ()) if one["rule"] == "time_limit"]
    return {
        "changed": bool(more.get("removed")),
        **{name: [] for name in ("removed", "kept", "failures", "repaired", "findings", "notes")},
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
        "web1 | 1 layers removed, 10 files, 977 KiB of 3.8 MiB, 25% done, about 30 s left; 2 to go",
        "web1 | 2 layers removed, 20 files, 1.9 MiB of 3.8 MiB, 50% done, about 20 s left; 1 to go",
    ]
    assert [one["rule"] for one in result["removed"]] == ["high_threshold", "layers"]
    assert [(one["id"][-1], one["rule"]) for one in result["kept"]] == [
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
    assert [one["id"][-1] for one in result["failures"]] == ["1"]
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
