# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Which mapped layers go, which stay, and why: one pure function that touches no file.

Rules add up: a layer goes when any rule wants it and nothing protects it. Each rule chooses on its
own, so that one more rule, or a stricter one, never saves a layer. The limits, ``max_freed`` and
``reserved_space``, cut the end of the list off.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from .moments import say, say_age
from .naming import Patterns, image_words, map_words
from .policy import Amount, Policy

# The ledger notes a use at most this often (seconds), so moments closer to each other say nothing
# about the order.
LEDGER_STEP = 600.0
# A complete layer that nothing refers to may be part of a pull under way; the runtime's own check
# waits as long (seconds).
UNREFERENCED_AGE = 86400.0


@dataclass(frozen=True)
class Candidate:
    """One mapped layer with all that the rules ask. Moments in seconds since the epoch."""

    layer_id: str
    image_ids: t.Tuple[str, ...] = ()
    image_names: t.Tuple[str, ...] = ()
    uidmap: t.Tuple[str, ...] = ()
    gidmap: t.Tuple[str, ...] = ()
    created: t.Optional[float] = None
    last_used: t.Optional[float] = None
    lease: t.Optional[float] = None
    users: t.Tuple[str, ...] = ()
    dependents: t.Tuple[str, ...] = ()
    read_only_store: t.Optional[str] = None
    ours: bool = False
    duplicate_of: t.Optional[str] = None
    unusable: t.Optional[str] = None
    size: int = 0
    inodes: int = 0


@dataclass(frozen=True)
class Finding:
    """Something damaged or left over.

    ``kind``: ``entry`` (a ``mapped-layers`` entry whose layer is gone), ``missing`` (a record
    without data), ``damaged`` (data that no runtime can use), ``incomplete``, ``unreferenced`` (a
    mapped layer that no image lists), ``directory``, ``link``, ``staging``, ``trash`` or
    ``records``.
    ``template`` says that an image has it for its own layer, ``ours`` that this collection made it.
    """

    kind: str
    name: str
    image_ids: t.Tuple[str, ...] = ()
    created: t.Optional[float] = None
    users: t.Tuple[str, ...] = ()
    template: bool = False
    ours: bool = False
    size: int = 0
    inodes: int = 0


@dataclass(frozen=True)
class Disk:
    """The filesystem of the store, in bytes and inodes. A filesystem that does not count inodes has
    0 of them.
    """

    total: int
    free: int
    total_inodes: int = 0
    free_inodes: int = 0


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer: ``rule`` is what decided, ``reason`` says it in words,
    ``wanted_by`` every rule that wants it.
    """

    layer_id: str
    remove: bool
    rule: str
    reason: str
    wanted_by: t.Tuple[str, ...] = ()
    size: int = 0
    inodes: int = 0


@dataclass(frozen=True)
class Target:
    """What a rule of space asks to be freed, in bytes or inodes, and what the plan frees."""

    rule: str
    unit: str
    wanted: int
    planned: int

    @property
    def met(self) -> bool:
        return self.planned >= self.wanted


@dataclass(frozen=True)
class Plan:
    """``removals`` in the order in which they are to go, ``kept``, and the same for findings."""

    removals: t.Tuple[Decision, ...]
    kept: t.Tuple[Decision, ...]
    repairs: t.Tuple[t.Tuple[Finding, Decision], ...]
    findings_kept: t.Tuple[t.Tuple[Finding, Decision], ...]
    targets: t.Tuple[Target, ...]
    notes: t.Tuple[str, ...]

    @property
    def target_met(self) -> bool:
        return all(target.met for target in self.targets)


def plan(
    candidates: t.Sequence[Candidate],
    findings: t.Sequence[Finding],
    policy: Policy,
    disk: Disk,
    watched_since: t.Optional[float],
    now: float,
) -> Plan:
    """Decide on each layer and each finding. ``watched_since`` is when the ledger began; None when
    it is empty.
    """
    planner = _Planner(policy, disk, watched_since, now)
    return planner.plan(candidates, findings)


class _Planner:
    def __init__(
        self, policy: Policy, disk: Disk, watched_since: t.Optional[float], now: float
    ) -> None:
        self.policy = policy
        self.disk = disk
        self.now = now
        self.watched_since = watched_since
        self.images = Patterns(policy.images)
        self.keep_images = Patterns(policy.keep_images)
        self.keep_mappings = Patterns(policy.keep_mappings)
        self.notes: t.List[str] = []
        # The moment from which the ledger has watched for as long as unused_for asks.
        self.unused_from: t.Optional[float] = None
        if policy.unused_for is not None:
            self.unused_from = (now if watched_since is None else watched_since) + policy.unused_for

    def plan(self, candidates: t.Sequence[Candidate], findings: t.Sequence[Finding]) -> Plan:
        # The same input in another order is the same plan.
        ordered = sorted(candidates, key=self._removal_order)
        protected = {one.layer_id: self._protection(one) for one in ordered}
        free = [one for one in ordered if protected[one.layer_id] is None]
        wanted = self._wanted(ordered, free)
        used = sum(one.size for one in ordered if self._chosen(one))
        removals, kept = self._cut(ordered, protected, wanted, used)
        targets = self._targets(used, removals)
        repairs, left = self._findings(findings)
        return Plan(
            removals=tuple(removals),
            kept=tuple(kept),
            repairs=tuple(repairs),
            findings_kept=tuple(left),
            targets=tuple(targets),
            notes=tuple(self.notes),
        )

    def _removal_order(self, one: Candidate) -> t.Tuple[int, int, int, str]:
        """Duplicates, then maps nobody can use any more, then longest unseen, then largest."""
        group = 0 if one.duplicate_of else 1 if one.unusable else 2
        return group, int(self._last_touch(one) // LEDGER_STEP), -one.size, one.layer_id

    def _last_touch(self, one: Candidate) -> float:
        return max(one.created or 0.0, one.last_used or 0.0)

    def _chosen(self, one: Candidate) -> bool:
        if self.policy.ours_only and not one.ours:
            return False
        return not self.images.given or bool(
            self.images.hit(image_words(one.image_ids, one.image_names))
        )

    def _protection(self, one: Candidate) -> t.Optional[t.Tuple[str, str]]:
        """The first protection that holds, as rule and reason."""
        policy = self.policy
        if one.users:
            return "in_use", "in use by " + ", ".join(one.users)
        if one.dependents:
            return "dependents", "other layers rest on it: " + ", ".join(one.dependents)
        if one.read_only_store:
            return "read_only", f"it lies in the read-only store {one.read_only_store}"
        words = image_words(one.image_ids, one.image_names)
        if policy.images and self.images.hit(words) is None:
            return "images", "its image is not among those chosen by images"
        if policy.ours_only and not one.ours:
            return "origin", "the runtime made it, and origin is ours"
        if one.lease is not None and one.lease > self.now:
            return "lease", f"leased until {say(one.lease)}"
        pinned = self.keep_images.hit(words)
        if pinned is not None:
            return "keep_images", f"its image answers to {pinned} of keep_images"
        pinned = self.keep_mappings.hit(map_words(one.uidmap, one.gidmap))
        if pinned is not None:
            return "keep_mappings", f"its mapping answers to {pinned} of keep_mappings"
        if one.layer_id in policy.keep_layers:
            return "keep_layers", "it is declared to be ready"
        # A container that is being made again leaves its layer alone for a moment: being seen
        # counts like being made.
        touched = self._last_touch(one)
        if self.now - touched < policy.min_age:
            what = "made" if touched == (one.created or 0.0) else "seen in use"
            return "min_age", f"{what} at {say(touched)}, less than {say_age(policy.min_age)} ago"
        return None

    def _wanted(
        self, ordered: t.Sequence[Candidate], free: t.Sequence[Candidate]
    ) -> t.Dict[str, t.List[t.Tuple[str, str]]]:
        """Each rule on its own: layer ID -> the rules that want it, with their reasons."""
        policy, now = self.policy, self.now
        wanted: t.Dict[str, t.List[t.Tuple[str, str]]] = {one.layer_id: [] for one in free}
        for one in free:
            rules = wanted[one.layer_id]
            if one.layer_id in policy.layers:
                rules.append(("layers", "it was asked for"))
            if policy.duplicates and one.duplicate_of:
                rules.append(("duplicates", f"the layer {one.duplicate_of} has the same mapping"))
            if policy.unusable_maps and one.unusable:
                rules.append(("unusable_maps", one.unusable))
            touched = self._last_touch(one)
            if (
                policy.unused_for is not None
                and self.unused_from is not None
                and now >= self.unused_from
                and now - touched >= policy.unused_for
            ):
                seen = "" if one.last_used is None else f", last on {say(one.last_used)}"
                rules.append(
                    ("unused_for", f"not seen in use for {say_age(policy.unused_for)}{seen}")
                )
            if policy.created_before is not None and (one.created or 0.0) < policy.created_before:
                born = "at an unknown time" if one.created is None else f"at {say(one.created)}"
                rules.append(
                    ("created_before", f"made {born}, before {say(policy.created_before)}")
                )
        if self.unused_from is not None and now < self.unused_from:
            self.notes.append(f"unused_for acts from {say(self.unused_from)} on: {self._watch()}")
        if policy.max_copies_per_image is not None:
            self._want_copies(ordered, free, policy.max_copies_per_image, wanted)
        used = sum(one.size for one in ordered if self._chosen(one))
        for rule, unit, amount, reason in self._space(used):
            freed = 0
            for one in free:
                if freed >= amount:
                    break
                gain = one.size if unit == "bytes" else one.inodes
                if gain > 0:
                    wanted[one.layer_id].append((rule, reason))
                    freed += gain
        return wanted

    def _watch(self) -> str:
        if self.watched_since is None:
            return "nobody has watched this store before"
        return f"the ledger has watched this store since {say(self.watched_since)}"

    def _want_copies(
        self,
        ordered: t.Sequence[Candidate],
        free: t.Sequence[Candidate],
        most: int,
        wanted: t.Dict[str, t.List[t.Tuple[str, str]]],
    ) -> None:
        """All but ``most`` copies of each image; those that stay anyway count first."""
        all_copies: t.Dict[t.Tuple[str, ...], int] = {}
        for one in ordered:
            all_copies[one.image_ids] = all_copies.get(one.image_ids, 0) + 1
        surplus = {image: number - most for image, number in all_copies.items()}
        for one in free:
            if surplus[one.image_ids] > 0:
                surplus[one.image_ids] -= 1
                wanted[one.layer_id].append(
                    (
                        "max_copies_per_image",
                        f"its image has {all_copies[one.image_ids]} mapped layers, "
                        f"{most} are allowed",
                    )
                )

    def _space(self, used: int) -> t.Iterator[t.Tuple[str, str, int, str]]:
        """The rules of space: rule, unit, how much is to be freed, and the reason in words."""
        policy, disk = self.policy, self.disk
        if policy.max_used_space is not None:
            most = policy.max_used_space.of(disk.total)
            yield (
                "max_used_space",
                "bytes",
                max(used - most, 0),
                f"mapped layers hold {used} bytes, {most} are allowed",
            )
        if policy.min_free_space is not None:
            least = policy.min_free_space.of(disk.total)
            yield (
                "min_free_space",
                "bytes",
                max(least - disk.free, 0),
                f"the filesystem has {disk.free} bytes free, {least} are asked for",
            )
        if policy.high_threshold is None or policy.low_threshold is None:
            return
        for unit, total, free in (
            ("bytes", disk.total, disk.free),
            ("inodes", disk.total_inodes, disk.free_inodes),
        ):
            if total <= 0:
                continue
            usage = 100 - free * 100 / total
            amount = 0
            if usage >= policy.high_threshold:
                amount = max(int(total * (100 - policy.low_threshold) / 100) - free, 0)
            yield (
                "high_threshold",
                unit,
                amount,
                f"{usage:.1f} % of the filesystem's {unit} are used; from "
                f"{policy.high_threshold:g} % on layers go until it is {policy.low_threshold:g} %",
            )

    def _allowed(self, used: int) -> t.Tuple[t.Optional[int], str, str]:
        """How many bytes may go before the rest stays, and which limit says so; None without a
        limit.
        """
        allowed: t.Optional[int] = None
        rule = reason = ""
        if self.policy.max_freed is not None:
            allowed = self.policy.max_freed.of(self.disk.total)
            rule, reason = "max_freed", f"max_freed ({allowed} bytes) is reached"
        if self.policy.reserved_space is not None:
            reserved = self.policy.reserved_space.of(self.disk.total)
            room = max(used - reserved, 0)
            if allowed is None or room < allowed:
                allowed = room
                rule = "reserved_space"
                reason = f"mapped layers would hold less than reserved_space ({reserved} bytes)"
        return allowed, rule, reason

    def _cut(
        self,
        ordered: t.Sequence[Candidate],
        protected: t.Mapping[str, t.Optional[t.Tuple[str, str]]],
        wanted: t.Mapping[str, t.Sequence[t.Tuple[str, str]]],
        used: int,
    ) -> t.Tuple[t.List[Decision], t.List[Decision]]:
        allowed, limit, limit_reason = self._allowed(used)
        removals: t.List[Decision] = []
        kept: t.List[Decision] = []
        freed = 0
        for one in ordered:
            protection = protected[one.layer_id]
            rules = wanted.get(one.layer_id, ())
            remove = False
            if protection is not None:
                rule, reason = protection
            elif not rules:
                rule, reason = self._unwanted()
            elif allowed is not None and freed >= allowed:
                rule, reason = limit, limit_reason
            else:
                remove = True
                freed += one.size
                rule = rules[0][0]
                reason = "; ".join(dict.fromkeys(reason for _first, reason in rules))
            decision = Decision(
                layer_id=one.layer_id,
                remove=remove,
                rule=rule,
                reason=reason,
                wanted_by=tuple(dict.fromkeys(rule for rule, _rest in rules)),
                size=one.size,
                inodes=one.inodes,
            )
            (removals if remove else kept).append(decision)
        return removals, kept

    def _unwanted(self) -> t.Tuple[str, str]:
        if not self.policy.has_rule:
            return "none", "no rule was given"
        if self.unused_from is not None and self.now < self.unused_from:
            return "unused_for", f"unused_for acts from {say(self.unused_from)} on: {self._watch()}"
        return "none", "no rule wants it"

    def _targets(self, used: int, removals: t.Sequence[Decision]) -> t.Iterator[Target]:
        planned = {
            "bytes": sum(one.size for one in removals),
            "inodes": sum(one.inodes for one in removals),
        }
        for rule, unit, amount, _reason in self._space(used):
            yield Target(rule, unit, amount, planned[unit])

    def _findings(
        self, findings: t.Sequence[Finding]
    ) -> t.Tuple[t.List[t.Tuple[Finding, Decision]], t.List[t.Tuple[Finding, Decision]]]:
        repairs: t.List[t.Tuple[Finding, Decision]] = []
        kept: t.List[t.Tuple[Finding, Decision]] = []
        for one in sorted(findings, key=lambda finding: (finding.kind, finding.name)):
            decision = self._judge(one)
            (repairs if decision.remove else kept).append((one, decision))
        return repairs, kept

    def _judge(self, one: Finding) -> Decision:
        policy = self.policy
        option, value, allowed = "orphans", "remove", policy.remove_orphans
        if one.kind in BROKEN:
            option, value, allowed = "broken", "repair", policy.repair_broken
        if one.kind in LEFTOVERS or one.ours:
            # Nobody works on it, or its lock would be held: what any run that may act takes away.
            allowed = allowed or policy.has_rule or policy.remove_orphans or policy.repair_broken
        least = 0.0
        if not (one.kind in BROKEN or one.kind in LEFTOVERS or one.ours):
            least = max(policy.min_age, UNREFERENCED_AGE if one.kind == "unreferenced" else 0.0)
        remove, rule, reason = False, option, FINDINGS[one.kind]
        if one.users:
            rule, reason = "in_use", "in use by " + ", ".join(one.users)
        elif one.template:
            reason = "it is an image's own layer, which is never touched here"
        elif self.now - (one.created or 0.0) < least:
            rule, reason = "min_age", f"{reason}, younger than {say_age(least)}"
        elif not allowed:
            reason = f"{reason}; {option}={value} takes it away"
        else:
            remove = True
        return Decision(one.name, remove, rule, reason, (option,), one.size, one.inodes)


BROKEN = frozenset(("entry", "missing", "damaged", "incomplete"))
LEFTOVERS = frozenset(("staging", "trash", "records"))

FINDINGS: t.Dict[str, str] = {
    "entry": "an image lists this mapped layer, and the store has no record of it",
    "missing": "the store has a record of this mapped layer, and its data is gone",
    "damaged": "no runtime could use this mapped layer",
    "incomplete": "this layer was never finished",
    "unreferenced": "no image and no container refers to this mapped layer",
    "directory": "a layer's folder without a record",
    "link": "a link to a layer that is gone",
    "staging": "left over from work that was cut off",
    "trash": "left over from a removal that was cut off",
    "records": "a file of records that was never put in place",
}


@dataclass(frozen=True)
class Prospect:
    """What one rule, alone and with today's protections, would free."""

    rule: str
    value: t.Union[str, int, bool]
    layers: int
    bytes: int
    inodes: int


_AGES = (("1d", 86400), ("1w", 604800), ("4w", 2419200), ("26w", 15724800))


def prospects(
    candidates: t.Sequence[Candidate],
    policy: Policy,
    disk: Disk,
    watched_since: t.Optional[float],
    now: float,
) -> t.Tuple[Prospect, ...]:
    """What each rule would free if it were given: for a run without any rule. The protections of
    ``policy`` hold.
    """
    bare = {
        name: getattr(policy, name)
        for name in ("images", "keep_images", "keep_mappings", "min_age", "ours_only")
    }
    trials: t.List[t.Tuple[str, t.Union[str, int, bool], t.Dict[str, t.Any]]] = [
        ("duplicates", True, {"duplicates": True}),
        ("unusable_maps", True, {"unusable_maps": True}),
    ]
    trials += [("unused_for", name, {"unused_for": float(length)}) for name, length in _AGES]
    trials += [("created_before", name, {"created_before": now - length}) for name, length in _AGES]
    trials += [("max_copies_per_image", most, {"max_copies_per_image": most}) for most in (0, 1, 2)]
    trials += [
        ("max_used_space", f"{share}%", {"max_used_space": Amount(percent=float(share))})
        for share in (10, 20)
    ]
    trials += [
        ("min_free_space", f"{share}%", {"min_free_space": Amount(percent=float(share))})
        for share in (10, 20)
    ]
    trials.append(("high_threshold", 85, {"high_threshold": 85.0, "low_threshold": 80.0}))
    found: t.List[Prospect] = []
    for rule, value, change in trials:
        removals = plan(candidates, (), Policy(**bare, **change), disk, watched_since, now).removals
        found.append(
            Prospect(
                rule=rule,
                value=value,
                layers=len(removals),
                bytes=sum(one.size for one in removals),
                inodes=sum(one.inodes for one in removals),
            )
        )
    return tuple(found)
