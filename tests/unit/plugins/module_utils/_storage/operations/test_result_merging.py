# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of merging the results of several users."""

from __future__ import annotations

from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    InternalError,
    NamespaceError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.result_merging import (
    joined,
    merged,
)


def result(user: str, changed: bool, **more: object) -> dict[str, object]:
    return {
        "changed": changed,
        "layers": [{"user": user}],
        "partial": False,
        "remaining": 0,
        "store": {"graphroot": f"/home/{user}"},
        "stores": [{"user": user, "graphroot": f"/home/{user}"}],
        "diff": {"before": {"image": []}, "after": {"image": [user]}},
        **more,
    }


def test_results_are_joined_in_order() -> None:
    both = joined({"bob": result("bob", False, warnings=["slow"]), "alice": result("alice", True)})
    assert both == {
        "changed": True,
        "layers": [{"user": "bob"}, {"user": "alice"}],
        "partial": False,
        "remaining": 0,
        "stores": [
            {"user": "bob", "graphroot": "/home/bob"},
            {"user": "alice", "graphroot": "/home/alice"},
        ],
        "warnings": ["slow"],
        "diff": {
            "before": {"bob": {"image": []}, "alice": {"image": []}},
            "after": {"bob": {"image": ["bob"]}, "alice": {"image": ["alice"]}},
        },
    }


def test_joined_result_without_users_is_unchanged() -> None:
    empty = joined({})
    assert (empty["changed"], empty["layers"], empty["stores"]) == (False, [], [])
    assert "error" not in empty


def test_remaining_work_is_added_up() -> None:
    both = joined(
        {
            "bob": result("bob", True, partial=True, remaining=2),
            "alice": result("alice", False),
            "carol": result("carol", False, partial=True, remaining=1),
        }
    )
    assert (both["partial"], both["remaining"]) == (True, 3)


def test_failed_user_does_not_hide_results_of_others() -> None:
    error = NamespaceError("user bob", "has no subordinate IDs", "Add a line.", line="bob:1:2")
    both = joined({"bob": error, "alice": result("alice", True)})
    assert both["changed"]
    assert both["stores"][0] == {"user": "bob", "error": str(error)}
    assert both["layers"] == [{"user": "alice"}]
    assert list(both["diff"]["after"]) == ["alice"]
    assert both["error"] == f"1 of 2 users failed. For bob: {error}"
    assert both["facts"] == {}


def test_errors_of_all_users_are_reported() -> None:
    both = joined(
        {
            "bob": result("bob", True, error="1 of 2 refused. No room.", facts={"free": 1}),
            "alice": InternalError("the work", "failed", trace="Traceback"),
        }
    )
    assert both["changed"]
    assert both["error"] == (
        "2 of 2 users failed. For bob: 1 of 2 refused. No room. For alice: the work: failed."
    )
    assert both["facts"] == {"trace": "Traceback"}


def test_facts_of_single_user_are_kept() -> None:
    single = joined({"bob": result("bob", False, error="No room.", facts={"free": 1})})
    assert (single["error"], single["facts"]) == ("For bob: No room.", {"free": 1})


def test_values_are_merged_by_type() -> None:
    first = {
        "changed": False,
        "removed": [{"id": "a"}],
        "actions": ["pulled"],
        "space_reclaimed": 3,
        "target_met": True,
        "partial": False,
        "store": {"driver": "vfs"},
        "diff": {"before": {"x": 1}, "after": {"x": 2}},
        "warnings": ["w"],
    }
    second = {**first, "changed": True, "target_met": False, "partial": True, "error": "full"}
    found = merged({"alice": first, "bob": second, "eve": NamespaceError("eve", "is none", "Go")})
    assert found["changed"] is True
    assert found["removed"] == [{"id": "a", "user": "alice"}, {"id": "a", "user": "bob"}]
    assert found["actions"] == ["pulled", "pulled"]
    assert found["space_reclaimed"] == 6
    assert (found["target_met"], found["partial"]) == (False, True)
    assert "store" not in found
    assert found["stores"][0]["store"] == {"driver": "vfs"}
    assert [store.get("error", "") != "" for store in found["stores"]] == [False, True, True]
    assert found["diff"]["after"] == {"alice": {"x": 2}, "bob": {"x": 2}}
    assert found["warnings"] == ["w", "w"]
    assert found["error"].startswith("2 of 3 users failed. For bob: full")


def test_merged_result_without_users_is_unchanged() -> None:
    empty = merged({})
    assert (empty["changed"], empty["stores"]) == (False, [])
    assert "error" not in empty
