# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests that a policy of the service accepts the options of layer_gc, except those for a single run."""

from __future__ import annotations

import json
import pathlib

from ansible_collections.userns.storage.plugins.module_utils._storage.operations.gc_policy import (
    OPTIONS,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.service.settings import load


def test_policy_accepts_every_rule(tmp_path: pathlib.Path) -> None:
    rules = {name for name, option in OPTIONS.items() if not option.of_one_run}
    policy = {
        "images": ["*/app:*"],
        "keep_images": ["*/db:*"],
        "keep_mappings": ["keep-id"],
        "min_age": "1h",
        "duplicates": True,
        "unusable_maps": True,
        "unused_for": "2w",
        "created_before": "2026-01-01T00:00:00Z",
        "max_copies_per_image": 2,
        "max_used_space": "10%",
        "reserved_space": "1G",
        "min_free_space": "5%",
        "high_threshold": 85,
        "low_threshold": 80,
        "superseded_images": "2w",
        "max_freed": "2G",
        "origin": "ours",
        "shared": True,
        "orphans": "remove",
        "broken": "repair",
    }
    assert set(policy) == rules
    path = tmp_path / "all.json"
    path.write_text(json.dumps({"stores": [{"policy": policy}]}))
    (store,) = load(str(path))
    assert store.policy is not None
    found = dict(store.policy.options)
    assert json.loads(json.dumps(found)) == policy
