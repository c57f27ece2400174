# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the summaries that roles and the report display: a line for each store."""

from __future__ import annotations

import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils import _fleet, _summaries

Json = t.Dict[str, t.Any]
GIB = 1 << 30


def looped(owner: t.Any, **result: t.Any) -> Json:
    return {"ansible_loop_var": "prune_store", "prune_store": owner, **result}


def removal(**more: t.Any) -> Json:
    lists: Json = {name: [] for name in ("removed", "kept", "repaired", "would_free")}
    return {**lists, "space_reclaimed": 0, "inodes_reclaimed": 0, "remaining": 0, **more}


def test_summary_counts_images_and_layers_of_each_store() -> None:
    pulled = {"results": [looped("alice", actions=["pulled", "tagged"])]}
    copied = {"results": [looped(["alice", "x=oci:x"], actions=["pulled"]), {"skipped": True}]}
    template_result = {
        "layers": [
            {"user": "alice", "action": "created", "size_exclusive": GIB},
            {"user": "alice", "action": "created", "size_exclusive": GIB // 2},
            {"user": "alice", "action": "not_needed"},
            {"user": "bob", "action": "existing"},
        ],
        "stores": [{"user": "eve", "error": "no podman"}],
    }
    stores = ["alice", "bob", "eve", "root"]
    assert _summaries.store_lines(stores, [pulled, copied], template_result) == [
        "alice: 2 images pulled; 1 image tagged; mapped layers: 2 created (1.5 GiB), 1 not needed",
        "bob: mapped layers: 1 existing",
        "eve: failed: no podman",
        "root: nothing to do",
    ]
    assert _summaries.store_lines(["alice"], [pulled, copied], template_result, predicted=True) == [
        "alice: 2 images would be pulled; 1 image would be tagged; "
        "mapped layers: 2 would be created (1.5 GiB), 1 not needed",
    ]


def test_summary_counts_removals_of_each_store() -> None:
    with_rules = removal(
        removed=[{}] * 3, kept=[{}], repaired=[{}], space_reclaimed=GIB, inodes_reclaimed=12
    )
    without_rules = removal(
        kept=[{}, {}],
        would_free=[
            {"rule": "duplicates", "value": True, "bytes": 5},
            {"rule": "unused_for", "value": "1d", "bytes": GIB},
        ],
    )
    registered = {
        "results": [looped("alice", **with_rules), looped("bob", **without_rules), looped("eve")]
    }
    failures = [("eve", "no podman")]
    stores = ["alice", "bob", "eve"]
    assert _summaries.store_lines(stores, removals=registered, failures=failures) == [
        "alice: 3 mapped layers removed, 1 kept; 1 leftover removed; 1.0 GiB and 12 inodes freed",
        "bob: 0 mapped layers removed, 2 kept; no rule is set; unused_for=1d would free 1.0 GiB",
        "eve: failed: no podman",
    ]
    assert _summaries.store_lines(["alice"], removals=registered, predicted=True) == [
        "alice: 3 mapped layers would be removed, 1 kept; 1 leftover would be removed; "
        "1.0 GiB and 12 inodes would be freed",
    ]


def test_summary_counts_shared_images_of_each_user() -> None:
    shared: t.Dict[str, t.Any] = {
        "users": [
            {"user": "alice", "action": "shared", "images": [{}], "mounts": 2},
            {"user": "bob", "action": "existing", "images": [{}, {}], "mounts": 1},
            {"user": "eve", "action": "refused", "reason": "no range"},
            {"user": "zoe", "action": "removed"},
        ]
    }
    stores = [user["user"] for user in shared["users"]]
    assert _summaries.store_lines(stores, shared=shared) == [
        "alice: shared images: 1 image, 2 mounts, shared",
        "bob: shared images: 2 images, 1 mount, existing",
        "eve: failed: no range",
        "zoe: shared images: removed",
    ]
    assert _summaries.store_lines(stores, shared=shared, predicted=True)[::3] == [
        "alice: shared images: 1 image, 2 mounts, would be shared",
        "zoe: shared images: would be removed",
    ]


def test_values_of_other_types_do_not_add_lines() -> None:
    """The owner of a store controls the values."""
    template_result = {"layers": [{"user": "alice", "action": ["x"], "size_exclusive": "{{ 1 }}"}]}
    failures = [("alice", "a\nb\x1b[31m")]
    (line,) = _summaries.store_lines(["alice"], layers=template_result, failures=failures)
    assert line.isprintable()
    assert line.startswith("alice: failed: a b")


def test_report_has_a_line_for_each_store() -> None:
    store = _fleet.Store("alice")
    store.sums = _fleet.Sums(
        images=2, mapped_layers=1, on_disk=3 * GIB, freed=GIB, freed_layers=1, missing=2
    )
    hosts = [
        _fleet.Host("web1", stores=[store, _fleet.Store("bob", problem="no podman")]),
        _fleet.Host("web2", _fleet.UNREACHABLE, "ssh: timeout"),
        _fleet.Host("web3"),
    ]
    assert _summaries.fleet_lines(_fleet.Fleet(hosts, [], _fleet.Sums())) == [
        "web1: alice: 2 images and 1 mapped layer use 3.0 GiB; prune would remove 1 layer and free 1.0 GiB; "
        "2 layers missing for the next start",
        "web1: bob: failed: no podman",
        "web2: unreachable: ssh: timeout",
        "web3: no store",
    ]
