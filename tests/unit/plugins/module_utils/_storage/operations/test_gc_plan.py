# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the garbage collection plan: protected layers are kept, a stricter policy does not remove fewer layers."""

from __future__ import annotations

import random
import typing as t
from dataclasses import replace

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    gc_plan as plans,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import gc_policy
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.gc_plan import (
    Candidate,
    Disk,
    Finding,
    Plan,
    Watch,
    plan,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.gc_policy import (
    Amount,
    Policy,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.time_formats import (
    format_time,
)
from hypothesis import given
from hypothesis import strategies as st

NOW = 1_800_000_000.0
HOUR, DAY, WEEK = 3600.0, 86400.0, 604800.0
DISK = Disk(total=10_000, free=4_000, total_inodes=1_000, free_inodes=600)
LONG_AGO = NOW - 52 * WEEK

times = st.floats(0, 60 * WEEK).map(lambda age: NOW - age)
IMAGES = (("a" * 64, "quay.io/org/app:1"), ("b" * 64, "localhost/base:latest"), ("c" * 64, ""))
MAPS = ("0:100000:65536", "0:1:1000", "0:200000:65536")


@st.composite
def candidates(draw: st.DrawFn) -> t.List[Candidate]:
    number = draw(st.integers(0, 12))
    found = []
    for index in range(number):
        image_id, name = draw(st.sampled_from(IMAGES))
        mapping = draw(st.sampled_from(MAPS))
        found.append(
            Candidate(
                layer_id=f"{index:064x}",
                image_ids=(image_id,),
                image_names=(name,) if name else (),
                uidmap=(mapping,),
                gidmap=(mapping,),
                created=draw(st.none() | times | st.floats(1, 14 * 52 * WEEK).map(NOW.__add__)),
                last_used=draw(st.none() | times),
                idle=draw(st.none() | st.floats(0, 60 * WEEK)),
                lease=draw(
                    st.none() | times | st.floats(1, 60 * WEEK).map(lambda more: NOW + more)
                ),
                users=draw(st.sampled_from(((), (), ("container web",)))),
                dependents=draw(st.sampled_from(((), (), (), ("layer 1234",)))),
                read_only_store=draw(st.sampled_from((None, None, None, "/srv/images"))),
                ours=draw(st.booleans()),
                duplicate_of=draw(st.sampled_from((None, None, "d" * 64))),
                unusable=draw(st.sampled_from((None, None, "no range holds it"))),
                size=draw(st.integers(0, 3_000)),
                inodes=draw(st.integers(0, 200)),
            )
        )
    return found


amounts = st.integers(0, 12_000).map(Amount) | st.floats(0, 100).map(
    lambda share: Amount(percent=share)
)
# A strategy for each field of a policy; limited_policies adds the limits.
FIELDS: t.Mapping[str, st.SearchStrategy[t.Any]] = {
    "images": st.sampled_from(((), ("*app*",), ("a*", "base"))),
    "keep_images": st.sampled_from(((), (), ("*base*",), ("cccccccccccc",))),
    "keep_mappings": st.sampled_from(((), (), ("0:1:*",))),
    "layers": st.sampled_from((frozenset(), frozenset((f"{0:064x}", f"{3:064x}")))),
    "shared": st.sampled_from(("", "", "", "other stores read this one")),
    "min_age": st.sampled_from((0.0, 600.0, WEEK)),
    "duplicates": st.booleans(),
    "unusable_maps": st.booleans(),
    "unused_for": st.none() | st.floats(0, 30 * WEEK),
    "created_before": st.none() | times,
    "max_copies_per_image": st.none() | st.integers(0, 5),
    "max_used_space": st.none() | amounts,
    "reserved_space": st.none(),
    "min_free_space": st.none() | amounts,
    "high_threshold": st.just(60.0),
    "low_threshold": st.floats(0, 59),
    "max_freed": st.none(),
    "superseded_images": st.none() | st.floats(0, 30 * WEEK),
    "ours_only": st.booleans(),
    "remove_orphans": st.booleans(),
    "repair_broken": st.booleans(),
}
policies = st.builds(Policy, **FIELDS)
limited_policies = st.builds(
    lambda policy, reserved, freed: replace(policy, reserved_space=reserved, max_freed=freed),
    policies,
    st.none() | amounts,
    st.none() | amounts,
)
disks = st.builds(
    Disk,
    total=st.integers(9_000, 20_000),
    free=st.integers(0, 9_000),
    total_inodes=st.sampled_from((0, 1_000)),
    free_inodes=st.integers(0, 1_000),
)
watches = st.builds(
    Watch,
    seconds=st.floats(0, 60 * WEEK),
    since=st.none() | times,
    doubt=st.sampled_from(("", "", "", "the clock of this host was set forward by 14 days")),
    remarks=st.sampled_from(((), ("unused_for does not count a gap",))),
)
WATCHED = Watch(NOW - LONG_AGO, LONG_AGO)


def removed(result: Plan) -> t.Set[str]:
    return {removal.layer_id for removal in result.removals}


def old(number: int, **fields: t.Any) -> Candidate:
    """Return a layer without protection that was not seen for a year."""
    fields.setdefault("image_ids", ("a" * 64,))
    fields.setdefault("created", LONG_AGO)
    fields.setdefault("size", 100)
    fields.setdefault("inodes", 10)
    touched = max(fields["created"] or 0, fields.get("last_used") or 0)
    fields.setdefault("idle", max(NOW - touched, 0))
    return Candidate(layer_id=f"{number:064x}", **fields)


def decide(layers: t.Sequence[Candidate], policy: Policy, **options: t.Any) -> Plan:
    return plan(
        layers,
        options.pop("findings", ()),
        policy,
        options.pop("disk", DISK),
        options.pop("watch", WATCHED),
        NOW,
        **options,
    )


class TestInvariants:
    @given(layers=candidates(), policy=limited_policies, disk=disks, watched=watches)
    def test_protected_layers_are_never_removed(
        self, layers: t.List[Candidate], policy: Policy, disk: Disk, watched: Watch
    ) -> None:
        removed_ids = removed(plan(layers, (), policy, disk, watched, NOW))
        for layer in layers:
            if layer.layer_id not in removed_ids:
                continue
            assert not layer.users
            assert not layer.dependents
            assert layer.read_only_store is None
            assert layer.lease is None or (layer.lease <= NOW and not watched.doubt)
            age = NOW - max(layer.created or NOW, layer.last_used or 0)
            known = 0.0 if watched.doubt else age
            assert max(layer.idle or 0.0, known) >= policy.min_age
            assert layer.ours or not policy.ours_only
            assert not policy.shared or layer.layer_id in policy.layers
            app, base, unnamed = (layer.image_ids[0][0] == letter for letter in "abc")
            assert not (base and policy.keep_images == ("*base*",))
            assert not (unnamed and policy.keep_images == ("cccccccccccc",))
            assert not (layer.uidmap == ("0:1:1000",) and policy.keep_mappings)
            assert app or policy.images != ("*app*",)
            assert app or base or not policy.images

    @given(layers=candidates(), policy=limited_policies, disk=disks, watched=watches)
    def test_each_layer_has_one_decision_with_reason(
        self, layers: t.List[Candidate], policy: Policy, disk: Disk, watched: Watch
    ) -> None:
        result = plan(layers, (), policy, disk, watched, NOW)
        decisions = result.removals + result.kept
        assert sorted(layer.layer_id for layer in decisions) == [layer.layer_id for layer in layers]
        assert all(removal.remove for removal in result.removals)
        assert not any(item.remove for item in result.kept)
        assert all(layer.rule and layer.reason for layer in decisions)
        assert all(removal.wanted_by for removal in result.removals)

    @given(
        layers=candidates(),
        policy=limited_policies,
        disk=disks,
        watched=watches,
        seed=st.integers(0, 1000),
    )
    def test_plan_does_not_depend_on_order_of_layers(
        self,
        layers: t.List[Candidate],
        policy: Policy,
        disk: Disk,
        watched: Watch,
        seed: int,
    ) -> None:
        shuffled = list(layers)
        random.Random(seed).shuffle(shuffled)
        assert plan(layers, (), policy, disk, watched, NOW) == plan(
            shuffled, (), policy, disk, watched, NOW
        )

    @given(layers=candidates(), disk=disks, watched=watches)
    def test_policy_without_rules_removes_no_layers(
        self, layers: t.List[Candidate], disk: Disk, watched: Watch
    ) -> None:
        result = plan(layers, (), Policy(min_age=0), disk, watched, NOW)
        assert not result.removals
        assert not result.targets
        assert result.target_met

    @given(layers=candidates(), policy=policies, disk=disks, watched=watches)
    def test_next_run_removes_no_further_layers(
        self, layers: t.List[Candidate], policy: Policy, disk: Disk, watched: Watch
    ) -> None:
        first = plan(layers, (), policy, disk, watched, NOW)
        removed_ids = removed(first)
        freed = sum(removal.size for removal in first.removals)
        freed_inodes = sum(removal.inodes for removal in first.removals)
        after = replace(
            disk,
            free=min(disk.free + freed, disk.total),
            free_inodes=min(disk.free_inodes + freed_inodes, disk.total_inodes),
        )
        rest = [layer for layer in layers if layer.layer_id not in removed_ids]
        second = plan(rest, (), policy, after, watched, NOW)
        # A space rule that could not be met has already removed all that it may remove.
        assert removed(second) == set()


def test_strategies_cover_all_options_of_policy() -> None:
    """A new rule needs a strategy in ``FIELDS``, and a stricter value in ``stricter``."""
    assert {*FIELDS} == {option.field for option in gc_policy.OPTIONS.values()}


def stricter(draw: st.DrawFn, policy: Policy) -> Policy:
    """Return the policy with more or stricter rules, and with the same protections and limits."""

    def lower(value: t.Optional[float], least: float = 0.0) -> t.Optional[float]:
        if value is None:
            return draw(st.none() | st.floats(least, 30 * WEEK))
        return draw(st.floats(least, value)) if value > least else value

    def shrink(value: t.Optional[Amount]) -> t.Optional[Amount]:
        if value is None:
            return draw(st.none() | amounts)
        if value.percent is not None:
            return Amount(percent=draw(st.floats(0, value.percent)))
        return Amount(draw(st.integers(0, value.bytes)))

    def grow(value: t.Optional[Amount]) -> t.Optional[Amount]:
        if value is None:
            return draw(st.none() | amounts)
        if value.percent is not None:
            return Amount(percent=draw(st.floats(value.percent, 100)))
        return Amount(draw(st.integers(value.bytes, 15_000)))

    created = policy.created_before
    most = policy.max_copies_per_image
    high, low = policy.high_threshold or 60.0, policy.low_threshold or 0.0
    new_low = draw(st.floats(0, low))
    return replace(
        policy,
        duplicates=policy.duplicates or draw(st.booleans()),
        unusable_maps=policy.unusable_maps or draw(st.booleans()),
        unused_for=lower(policy.unused_for),
        created_before=draw(st.floats(created, NOW)) if created else draw(st.none() | times),
        max_copies_per_image=(
            draw(st.none() | st.integers(0, 5)) if most is None else draw(st.integers(0, most))
        ),
        max_used_space=shrink(policy.max_used_space),
        min_free_space=grow(policy.min_free_space),
        high_threshold=draw(st.floats(low, high)),
        low_threshold=new_low,
    )


class TestMonotonicity:
    @given(
        layers=candidates(),
        policy=policies,
        disk=disks,
        watched=watches,
        data=st.data(),
    )
    def test_stricter_rules_remove_at_least_the_same_layers(
        self,
        layers: t.List[Candidate],
        policy: Policy,
        disk: Disk,
        watched: Watch,
        data: st.DataObject,
    ) -> None:
        strict = stricter(t.cast(st.DrawFn, data.draw), policy)
        lax_plan = plan(layers, (), policy, disk, watched, NOW)
        strict_plan = plan(layers, (), strict, disk, watched, NOW)
        assert removed(lax_plan) <= removed(strict_plan)

    @given(
        layers=candidates(),
        policy=limited_policies,
        disk=disks,
        watched=watches,
        data=st.data(),
    )
    def test_stricter_rules_free_at_least_as_much_up_to_limit(
        self,
        layers: t.List[Candidate],
        policy: Policy,
        disk: Disk,
        watched: Watch,
        data: st.DataObject,
    ) -> None:
        strict = stricter(t.cast(st.DrawFn, data.draw), policy)
        lax_plan = plan(layers, (), policy, disk, watched, NOW)
        strict_plan = plan(layers, (), strict, disk, watched, NOW)
        limits = [10**9]
        if policy.max_freed is not None:
            limits.append(policy.max_freed.of(disk.total))
        if policy.reserved_space is not None:
            used = sum(
                layer.size
                for layer in layers
                if (layer.ours or not policy.ours_only)
                and (
                    not policy.images
                    or layer.image_ids[0][0] == "a"
                    or (layer.image_ids[0][0] == "b" and policy.images == ("a*", "base"))
                )
            )
            limits.append(max(used - policy.reserved_space.of(disk.total), 0))
        lax_freed = sum(removal.size for removal in lax_plan.removals)
        strict_freed = sum(removal.size for removal in strict_plan.removals)
        assert strict_freed >= min(lax_freed, *limits)

    @given(
        layers=candidates(),
        policy=limited_policies,
        more=st.integers(0, 5_000),
        disk=disks,
        watched=watches,
    )
    def test_higher_limit_keeps_no_additional_layer(
        self,
        layers: t.List[Candidate],
        policy: Policy,
        more: int,
        disk: Disk,
        watched: Watch,
    ) -> None:
        base = replace(policy, max_freed=Amount(1_000), reserved_space=Amount(5_000))
        wide = replace(
            base, max_freed=Amount(1_000 + more), reserved_space=Amount(max(5_000 - more, 0))
        )
        narrow_plan = plan(layers, (), base, disk, watched, NOW)
        assert removed(narrow_plan) <= removed(plan(layers, (), wide, disk, watched, NOW))

    @given(layers=candidates(), policy=policies, disk=disks, watched=watches, data=st.data())
    def test_fewer_protections_keep_no_more_layers_with_per_layer_rules(
        self,
        layers: t.List[Candidate],
        policy: Policy,
        disk: Disk,
        watched: Watch,
        data: st.DataObject,
    ) -> None:
        per_layer = replace(
            policy,
            max_copies_per_image=None,
            max_used_space=None,
            min_free_space=None,
            high_threshold=None,
            low_threshold=None,
        )
        unprotected = replace(
            per_layer,
            images=data.draw(st.sampled_from(((), per_layer.images))),
            keep_images=data.draw(st.sampled_from(((), per_layer.keep_images))),
            keep_mappings=data.draw(st.sampled_from(((), per_layer.keep_mappings))),
            min_age=data.draw(st.floats(0, per_layer.min_age)),
            ours_only=per_layer.ours_only and data.draw(st.booleans()),
        )
        assert removed(plan(layers, (), per_layer, disk, watched, NOW)) <= removed(
            plan(layers, (), unprotected, disk, watched, NOW)
        )

    @given(layers=candidates(), policy=policies, disk=disks, watched=watches)
    def test_met_target_stays_met_without_protections(
        self, layers: t.List[Candidate], policy: Policy, disk: Disk, watched: Watch
    ) -> None:
        unprotected = replace(policy, keep_images=(), keep_mappings=(), min_age=0.0)
        if plan(layers, (), policy, disk, watched, NOW).target_met:
            assert plan(layers, (), unprotected, disk, watched, NOW).target_met


class TestRules:
    def test_removal_order_is_duplicates_unusable_maps_last_use_size(
        self,
    ) -> None:
        layers = [
            old(1, size=500),
            old(2, size=700),
            old(3, created=LONG_AGO - WEEK),
            old(4, unusable="no range", created=NOW - DAY),
            old(5, duplicate_of="d" * 64, created=NOW - DAY),
            old(6, last_used=NOW - WEEK),
        ]
        result = decide(layers, Policy(created_before=NOW))
        assert [int(removal.layer_id, 16) for removal in result.removals] == [5, 4, 3, 2, 1, 6]

    def test_unused_for_waits_until_store_was_observed_long_enough(self) -> None:
        watch = Watch(3 * WEEK, NOW - 8 * WEEK)
        early = decide([old(1, idle=3 * WEEK)], Policy(unused_for=4 * WEEK), watch=watch)
        assert not early.removals
        assert early.kept[0].rule == "unused_for"
        for text in (early.kept[0].reason, early.notes[0]):
            assert f"has no effect before {format_time(NOW + WEEK)}: " in text
            assert "was observed for 3 weeks" in text
        late = decide([old(1, idle=4 * WEEK)], Policy(unused_for=4 * WEEK))
        assert removed(late) == {f"{1:064x}"}
        assert not late.notes

    def test_first_inspection_removes_no_unused_layers(self) -> None:
        result = decide([old(1, idle=None)], Policy(unused_for=WEEK), watch=Watch())
        assert not result.removals
        assert format_time(NOW + WEEK) in result.notes[0]

    def test_uncounted_time_is_reported_only_for_unused_for(self) -> None:
        watch = Watch(9 * WEEK, LONG_AGO, remarks=("unused_for does not count a gap",))
        assert decide([old(1)], Policy(unused_for=WEEK), watch=watch).notes == watch.remarks
        assert decide([old(1)], Policy(duplicates=True), watch=watch).notes == ()

    def test_unused_time_does_not_depend_on_wall_clock(self) -> None:
        """The layers are 90 days old, but the host was off: the store was observed for one hour."""
        layers = [old(1, idle=HOUR), old(2, idle=None, last_used=NOW - 90 * DAY)]
        assert not decide(layers, Policy(unused_for=WEEK)).removals

    def test_layer_used_within_unused_for_is_kept_without_container(self) -> None:
        layers = [old(1, last_used=NOW - 6 * DAY), old(2, last_used=NOW - 8 * DAY)]
        assert removed(decide(layers, Policy(unused_for=WEEK))) == {f"{2:064x}"}

    def test_unused_layer_younger_than_unused_for_is_kept(self) -> None:
        assert not decide([old(1, created=NOW - DAY)], Policy(unused_for=WEEK)).removals

    def test_min_age_counts_from_last_use(self) -> None:
        result = decide([old(1, last_used=NOW - 60)], Policy(created_before=NOW))
        assert not result.removals
        assert result.kept[0].rule == "min_age"
        assert "seen in use" in result.kept[0].reason

    def test_layer_created_in_future_is_kept_by_min_age(self) -> None:
        assert not decide([old(1, created=NOW + WEEK)], Policy(max_copies_per_image=0)).removals

    def test_age_of_layer_created_in_future_is_observed_time(self) -> None:
        layers = [old(1, created=NOW + 52 * WEEK, idle=HOUR), old(2, created=NOW + WEEK, idle=60)]
        assert removed(decide(layers, Policy(max_copies_per_image=0))) == {f"{1:064x}"}
        assert not decide(layers, Policy(created_before=NOW, min_age=0)).removals

    @pytest.mark.parametrize("created", [None, 0.0, 86400.0])
    def test_age_of_layer_without_creation_time_is_observed_time(
        self, created: t.Optional[float]
    ) -> None:
        layers = [
            old(number, created=created, idle=idle)
            for number, idle in enumerate((None, 60.0, HOUR, 5 * WEEK))
        ]
        assert removed(decide(layers, Policy(max_copies_per_image=0))) == {
            f"{number:064x}" for number in (2, 3)
        }
        removed_ids = removed(decide(layers, Policy(created_before=NOW - 4 * WEEK, min_age=0)))
        assert removed_ids == {f"{3:064x}"}

    @given(layers=candidates(), policy=limited_policies, disk=disks)
    def test_unreliable_clock_does_not_change_ages(
        self, layers: t.List[Candidate], policy: Policy, disk: Disk
    ) -> None:
        """The plan does not depend on the clock: the only ages are those that were observed."""
        policy = replace(policy, unused_for=policy.unused_for or WEEK)
        unreliable = replace(WATCHED, doubt="the clock was set forward by 14 days")
        plans_made = [
            plan(layers, (), policy, disk, unreliable, NOW + shift)
            for shift in (0, 14 * 52 * WEEK, -14 * 52 * WEEK)
        ]
        assert len({frozenset(removed(item)) for item in plans_made}) == 1
        for removal in plans_made[0].removals:
            assert "created_before" not in removal.wanted_by
        if policy.created_before is not None or policy.min_age:
            assert "The clock is unreliable" in plans_made[0].notes[0]

    def test_unreliable_clock_ends_no_lease_and_removes_no_orphan(self) -> None:
        unreliable = replace(WATCHED, doubt="the clock was set")
        layers = [old(1, lease=NOW - 1)]
        policy = Policy(duplicates=True, max_copies_per_image=0, remove_orphans=True)
        found = Finding("directory", "x", created=LONG_AGO)
        result = decide(layers, policy, watch=unreliable, findings=(found,))
        assert (result.kept[0].rule, result.findings_kept[0][1].rule) == ("lease", "min_age")
        reliable = decide(layers, policy, findings=(found,))
        assert len(reliable.removals) == len(reliable.repairs) == 1

    def test_max_copies_applies_with_unreliable_clock(self) -> None:
        unreliable = replace(WATCHED, doubt="the host was off for 90 days")
        layers = [old(1), old(2, idle=None)]
        assert removed(decide(layers, Policy(max_copies_per_image=0), watch=unreliable)) == {
            f"{1:064x}"
        }

    @pytest.mark.parametrize(
        "policy",
        [
            Policy(max_used_space=Amount(0)),
            Policy(min_free_space=Amount(9_000)),
            Policy(high_threshold=85, low_threshold=10),
        ],
        ids=["max_used_space", "min_free_space", "high_threshold"],
    )
    def test_space_rules_apply_with_unreliable_clock(self, policy: Policy) -> None:
        """They remove the layers that were observed for min_age, and keep those whose age is unknown."""
        unreliable = replace(WATCHED, doubt="the host was off for 90 days")
        layers = [old(1), old(2, idle=None), old(3, idle=policy.min_age), old(4, idle=1.0)]
        result = decide(layers, policy, watch=unreliable, disk=Disk(10_000, 1_000))
        assert removed(result) == {f"{1:064x}", f"{3:064x}"}
        assert {item.rule for item in result.kept} == {"min_age"}
        assert all("the host was off for 90 days" in item.reason for item in result.kept)
        assert not result.target_met

    def test_layers_in_use_count_towards_max_copies(self) -> None:
        layers = [
            old(1, users=("container web",)),
            old(2, last_used=NOW - DAY),
            old(3),
            old(4, image_ids=("b" * 64,)),
        ]
        assert removed(decide(layers, Policy(max_copies_per_image=2))) == {f"{3:064x}"}
        assert removed(decide(layers, Policy(max_copies_per_image=1))) == {
            f"{2:064x}",
            f"{3:064x}",
        }

    def test_max_used_space_counts_layers_in_use_and_removes_others(self) -> None:
        layers = [old(1, size=600, users=("container web",)), old(2, size=300), old(3, size=200)]
        result = decide(layers, Policy(max_used_space=Amount(900)))
        assert removed(result) == {f"{2:064x}"}
        assert result.target_met

    def test_unreachable_target_is_reported(self) -> None:
        layers = [old(1, size=600, users=("container web",)), old(2, size=300)]
        result = decide(layers, Policy(max_used_space=Amount(500)))
        assert removed(result) == {f"{2:064x}"}
        assert not result.target_met
        assert [(target.amount, target.planned, target.met) for target in result.targets] == [
            (400, 300, False)
        ]

    def test_min_free_space_removes_no_layers_while_met(self) -> None:
        assert not decide([old(1)], Policy(min_free_space=Amount(4_000))).removals
        assert decide([old(1)], Policy(min_free_space=Amount(percent=40.01))).removals

    def test_reserved_space_limits_all_rules(self) -> None:
        layers = [old(number, size=100, created=LONG_AGO + number * HOUR) for number in range(5)]
        result = decide(layers, Policy(created_before=NOW, reserved_space=Amount(300)))
        assert removed(result) == {f"{0:064x}", f"{1:064x}"}
        assert {item.rule for item in result.kept} == {"reserved_space"}

    def test_max_freed_limits_all_rules(self) -> None:
        layers = [old(number, size=100, created=LONG_AGO + number * HOUR) for number in range(5)]
        result = decide(layers, Policy(created_before=NOW, max_freed=Amount(150)))
        assert removed(result) == {f"{0:064x}", f"{1:064x}"}
        assert {item.rule for item in result.kept} == {"max_freed"}

    def test_removal_starts_at_high_and_ends_at_low_threshold(self) -> None:
        layers = [old(number, size=400, created=LONG_AGO + number * HOUR) for number in range(9)]
        policy = Policy(high_threshold=85, low_threshold=80)
        below = decide(layers, policy, disk=Disk(10_000, 1_501))
        assert not below.removals
        at = decide(layers, policy, disk=Disk(10_000, 1_500))
        # 2,000 bytes are required and 1,500 are free: two layers of 400 bytes are removed.
        assert len(at.removals) == 2

    def test_thresholds_also_apply_to_inodes(self) -> None:
        layers = [old(number, inodes=20, created=LONG_AGO + number * HOUR) for number in range(9)]
        result = decide(
            layers,
            Policy(high_threshold=85, low_threshold=80),
            disk=Disk(10_000, 9_000, total_inodes=1_000, free_inodes=150),
        )
        assert len(result.removals) == 3
        assert "inodes" in result.removals[0].reason

    def test_filesystem_without_inode_count_has_no_inode_threshold(self) -> None:
        result = decide(
            [old(1)],
            Policy(high_threshold=85, low_threshold=80),
            disk=Disk(10_000, 9_000, total_inodes=0, free_inodes=0),
        )
        assert not result.removals

    def test_all_matching_rules_are_named(self) -> None:
        result = decide(
            [old(1, duplicate_of="d" * 64)],
            Policy(duplicates=True, created_before=NOW, unused_for=WEEK),
        )
        assert result.removals[0].wanted_by == ("duplicates", "unused_for", "created_before")
        assert "same mapping" in result.removals[0].reason
        assert "not seen in use" in result.removals[0].reason

    @pytest.mark.parametrize(
        "pattern",
        [
            "a" * 64,
            "a" * 12,
            "sha256:" + "a" * 64,
            "docker.io/library/web:1",
            "docker.io/library/web",
            "web:1",
            "web",
            "w*",
            "*library*",
        ],
    )
    def test_keep_images_matches_any_name_or_id(self, pattern: str) -> None:
        layers = [old(1, image_names=("docker.io/library/web:1",))]
        result = decide(layers, Policy(created_before=NOW, keep_images=(pattern,)))
        assert result.kept[0].rule == "keep_images"
        assert pattern in result.kept[0].reason

    @pytest.mark.parametrize(
        "pattern",
        [
            "0:1:1000,1000:0:1",
            "0:5:1000,1000:0:1",
            "0:1:1000,1000:0:1/0:5:1000,1000:0:1",
            "0:1:*",
        ],
    )
    def test_keep_mappings_matches_maps(self, pattern: str) -> None:
        layers = [old(1, uidmap=("0:1:1000", "1000:0:1"), gidmap=("0:5:1000", "1000:0:1"))]
        result = decide(layers, Policy(created_before=NOW, keep_mappings=(pattern,)))
        assert result.kept[0].rule == "keep_mappings"

    def test_expired_lease_does_not_protect(self) -> None:
        layers = [old(1, lease=NOW), old(2, lease=NOW + 1)]
        assert removed(decide(layers, Policy(created_before=NOW))) == {f"{1:064x}"}


def test_layers_of_shared_store_are_removed_only_if_listed() -> None:
    layers = [old(1), old(2, duplicate_of="d" * 64)]
    policy = Policy(
        layers=frozenset((f"{1:064x}",)),
        duplicates=True,
        max_copies_per_image=0,
        created_before=NOW,
        remove_orphans=True,
        shared="the marker says so",
    )
    policy = replace(policy, repair_broken=True)
    kinds = ("damaged", "foreign_root", "unreferenced")
    found = tuple(Finding(kind, "x", created=LONG_AGO) for kind in (*kinds, "missing"))
    result = decide(layers, policy, findings=found)
    assert removed(result) == {f"{1:064x}"}
    assert result.kept[0].rule == "shared"
    assert [(item.kind, kept.rule) for item, kept in result.findings_kept] == [
        (kind, "shared") for kind in kinds
    ]
    # A missing layer cannot be used.
    assert [item.kind for item, _rest in result.repairs] == ["missing"]
    assert "the marker says so" in result.kept[0].reason


@pytest.mark.parametrize(
    "rule", [name for name in gc_policy.named(gc_policy.RULE) if name != "layers"]
)
def test_no_rule_except_layers_removes_layers_of_shared_store(rule: str) -> None:
    layers = [
        old(number, duplicate_of="d" * 64, unusable="no range holds it", size=2_000, inodes=100)
        for number in range(4)
    ]
    option = gc_policy.OPTIONS[rule]
    values = {rule: option.trials[0]}
    if option.pair:
        values[option.pair] = gc_policy.OPTIONS[option.pair].trials[0]
    policy = gc_policy.read(values, NOW)
    full = Disk(total=10_000, free=100, total_inodes=1_000, free_inodes=10)
    assert removed(decide(layers, policy, disk=full))
    shared = replace(policy, shared="the marker says so")
    assert removed(decide(layers, shared, disk=full)) == set()


class TestFindings:
    @given(
        kind=st.sampled_from(sorted(plans.FINDINGS)),
        age=st.floats(0, 10 * DAY),
        users=st.sampled_from(((), ("container web",))),
        template=st.booleans(),
        ours=st.booleans(),
        policy=policies,
    )
    def test_layers_in_use_or_of_images_are_never_removed(
        self,
        kind: str,
        age: float,
        users: t.Tuple[str, ...],
        template: bool,
        ours: bool,
        policy: Policy,
    ) -> None:
        finding = Finding(
            kind, "x", created=NOW - age, users=users, template=template, ours=ours, size=1
        )
        result = decide((), policy, findings=(finding,))
        assert len(result.repairs) + len(result.findings_kept) == 1
        if result.repairs:
            assert not users
            assert not template
            if kind in plans.LEFTOVERS or ours:
                assert policy.remove_orphans or policy.repair_broken or policy.has_rule
            elif kind in plans.BROKEN:
                assert policy.repair_broken
            else:
                assert policy.remove_orphans
                assert age >= policy.min_age - 1e-3
                assert kind != "unreferenced" or age >= DAY - 1e-3
        else:
            assert result.findings_kept[0][1].reason

    def test_report_names_option_that_removes_finding(self) -> None:
        result = decide(
            (), Policy(), findings=(Finding("entry", "x"), Finding("link", "y", created=1.0))
        )
        assert [
            decision.reason.rpartition("; ")[2] for _first, decision in result.findings_kept
        ] == [
            "broken=repair removes it",
            "orphans=remove removes it",
        ]


def test_prospects_predict_space_that_each_rule_frees() -> None:
    layers = [
        old(1, size=100, duplicate_of="d" * 64),
        old(2, size=200, last_used=NOW - 2 * DAY),
        old(3, size=400, users=("container web",)),
    ]
    found = {
        (prospect.rule, prospect.value): (prospect.layers, prospect.bytes)
        for prospect in plans.prospects(layers, Policy(), DISK, WATCHED, NOW)
    }
    assert found["duplicates", True] == (1, 100)
    assert ("unusable_maps", True) not in found
    assert found["unused_for", "1d"] == (2, 300)
    assert found["unused_for", "1w"] == (1, 100)
    assert found["created_before", "26w"] == (2, 300)
    assert found["max_copies_per_image", 1] == (2, 300)
    assert found["max_copies_per_image", 2] == (1, 100)
    assert ("max_used_space", "10%") not in found


def test_planning_work_grows_linearly_with_number_of_layers(
    count_calls: t.Callable[[t.Callable[[], t.Any]], int],
) -> None:
    few = count_calls(lambda: _plan_for(250))
    many = count_calls(lambda: _plan_for(2000))
    # Sorting needs slightly more comparisons per layer. Quadratic work would be 64 times as much.
    assert few * 6 < many < few * 12


def _plan_for(count: int) -> None:
    """Plan for a number of layers with all rules."""
    generator = random.Random(1)
    layers = [
        Candidate(
            layer_id=f"{number:064x}",
            image_ids=(f"{number // 5:064x}",),
            image_names=(f"quay.io/org/app{number // 5}:latest",),
            uidmap=(f"0:{100000 + number}:65536",),
            gidmap=(f"0:{100000 + number}:65536",),
            created=NOW - generator.random() * 52 * WEEK,
            last_used=NOW - generator.random() * 52 * WEEK,
            users=("container web",) if number % 7 == 0 else (),
            size=generator.randrange(10**9),
            inodes=generator.randrange(10**5),
        )
        for number in range(count)
    ]
    policy = Policy(
        images=("quay.io/*", "app*"),
        keep_images=("*nothing*", "app1*"),
        keep_mappings=("0:1:*",),
        unused_for=4 * WEEK,
        created_before=NOW - 8 * WEEK,
        max_copies_per_image=2,
        max_used_space=Amount(percent=10),
        min_free_space=Amount(percent=20),
        high_threshold=85,
        low_threshold=80,
        max_freed=Amount(10**12),
    )
    disk = Disk(10**12, 10**11, 10**7, 10**6)
    plan(layers, (), policy, disk, WATCHED, NOW)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(max_used_space=Amount(300)),
        Policy(created_before=NOW, reserved_space=Amount(200)),
    ],
)
def test_space_of_layer_of_newer_format_counts(policy: Policy) -> None:
    newer = old(1, newer_format="has a file that no known version writes")
    known = [old(number) for number in (2, 3, 4)]
    without = decide(known, policy)
    made = decide([newer, *known], policy)
    assert len(made.removals) == len(without.removals) + 1
    assert newer.layer_id not in {removal.layer_id for removal in made.removals}


def test_layer_of_newer_format_is_kept_and_counts_as_copy() -> None:
    newer = old(1, newer_format="has a file that no known version writes")
    known = old(2)
    policy = Policy(max_copies_per_image=1, layers=frozenset((newer.layer_id,)))
    made = decide([newer, known], policy)
    (kept,) = made.kept
    assert (kept.layer_id, kept.rule) == (newer.layer_id, "newer_format")
    assert kept.reason == newer.newer_format
    assert [item.layer_id for item in made.removals] == [known.layer_id]
