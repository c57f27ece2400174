# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide which mapped layers to remove and which to keep, with reasons. A pure function that accesses no files.

Rules add up: a layer is removed if any rule selects it and nothing protects it. Each rule selects layers
independently, so that an additional or a stricter rule never keeps a layer. The limits ``max_freed`` and
``reserved_space`` cut off the end of the list.
"""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, replace

from ..errors import size_text
from ..tree.measure import Usage
from . import gc_policy
from .gc_policy import PROTECTION, RULE, Policy
from .image_patterns import Patterns, image_terms, map_terms
from .time_formats import format_age, format_time

# The ledger records a use at most this often (seconds), so that times closer to each other do not
# define an order.
LEDGER_STEP = 600.0
# Earlier times (seconds since the epoch, the beginning of 2013) are from a clock that was not set, because
# there were no containers before.
_NO_MOMENT = 1356998400.0
# A complete layer that nothing refers to may be part of a running pull; the runtime's own check
# waits as long (seconds).
UNREFERENCED_AGE = 86400.0


@dataclass(frozen=True)
class Candidate:
    """A mapped layer with all properties that the rules use. Times in seconds since the epoch.

    ``idle`` is the number of watched seconds for which nothing has used it; None
    if it was never watched. It does not depend on the wall clock.
    ``newer_format`` describes what this collection does not know about the layer's form on disk; empty if it knows it.
    """

    layer_id: str
    image_ids: t.Tuple[str, ...] = ()
    image_names: t.Tuple[str, ...] = ()
    uidmap: t.Tuple[str, ...] = ()
    gidmap: t.Tuple[str, ...] = ()
    created: t.Optional[float] = None
    last_used: t.Optional[float] = None
    idle: t.Optional[float] = None
    lease: t.Optional[float] = None
    users: t.Tuple[str, ...] = ()
    dependents: t.Tuple[str, ...] = ()
    read_only_store: t.Optional[str] = None
    newer_format: str = ""
    ours: bool = False
    duplicate_of: t.Optional[str] = None
    unusable: t.Optional[str] = None
    size: int = 0
    inodes: int = 0


@dataclass(frozen=True)
class Watch:
    """How the store was watched.

    ``seconds`` is the time for which it was watched often enough, ``since`` its beginning (seconds since the
    epoch). ``doubt`` is the reason why the wall clock is unreliable, empty if it is reliable. ``remarks`` list
    times that did not count.
    """

    seconds: float = 0.0
    since: t.Optional[float] = None
    doubt: str = ""
    remarks: t.Tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """Something damaged or left over.

    ``kind``: ``entry`` (a ``mapped-layers`` entry whose layer is missing), ``missing`` (a record
    without data), ``damaged`` (unusable data), ``incomplete``, ``unreferenced`` (a
    mapped layer that no image lists), ``directory``, ``link``, ``staging``, ``trash`` or
    ``records``.
    ``template`` says that it is an image's own layer, ``ours`` that this collection created it.
    ``size`` is in bytes; ``usage`` is None if it could not be measured.
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
    usage: t.Optional[Usage] = None


@dataclass(frozen=True)
class Disk:
    """The filesystem of the store, in bytes and inodes. Zero inodes for filesystems that do
    not count them.
    """

    total: int
    free: int
    total_inodes: int = 0
    free_inodes: int = 0


@dataclass(frozen=True)
class Decision:
    """The decision about one layer: the deciding ``rule``, its ``reason`` as text, and ``wanted_by`` with all rules
    that select it.
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
    """The bytes or inodes that a rule for space requires to be freed, and those that the plan frees."""

    rule: str
    unit: str
    amount: int
    planned: int

    @property
    def met(self) -> bool:
        return self.planned >= self.amount


@dataclass(frozen=True)
class Plan:
    """The ``removals`` in their order, the layers that are ``kept``, and the same for findings."""

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
    watch: Watch,
    now: float,
    refusal: t.Optional[t.Tuple[str, str]] = None,
) -> Plan:
    """Decide on each layer and each finding.

    :param refusal: why nothing may be removed from this store at all, as rule and reason; None if there is no reason
    """
    planner = _Planner(policy, disk, watch, now, refusal)
    return planner.plan(candidates, findings)


class _Planner:
    def __init__(
        self,
        policy: Policy,
        disk: Disk,
        watch: Watch,
        now: float,
        refusal: t.Optional[t.Tuple[str, str]] = None,
    ) -> None:
        self.refusal = refusal
        self.policy = policy
        self.disk = disk
        self.now = now
        self.watch = watch
        self.images = Patterns(policy.images)
        self.keep_images = Patterns(policy.keep_images)
        self.keep_mappings = Patterns(policy.keep_mappings)
        self.notes: t.List[str] = []
        # The remaining time (seconds) for which the store must be watched before unused_for can act.
        self.unwatched = 0.0
        if policy.unused_for is not None:
            self.unwatched = max(policy.unused_for - watch.seconds, 0.0)
        if watch.doubt and self._asks_for_ages(policy):
            self.notes.append(
                "The clock is unreliable, so nothing is removed because of its age: "
                f"{watch.doubt}. It counts as reliable again when it is back to the right time, or "
                "after a day of observation."
            )

    @staticmethod
    def _asks_for_ages(policy: Policy) -> bool:
        return policy.created_before is not None or bool(policy.has_rule and policy.min_age)

    def plan(self, candidates: t.Sequence[Candidate], findings: t.Sequence[Finding]) -> Plan:
        # The order of the input does not change the plan.
        ordered = sorted(candidates, key=self._removal_order)
        protected = {candidate.layer_id: self._protection(candidate) for candidate in ordered}
        free = [candidate for candidate in ordered if protected[candidate.layer_id] is None]
        selected = self._selecting_rules(ordered, free)
        used = sum(candidate.size for candidate in ordered if self._chosen(candidate))
        removals, kept = self._cut(ordered, protected, selected, used)
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

    def _removal_order(self, candidate: Candidate) -> t.Tuple[int, int, int, str]:
        """Duplicates, then unusable maps, then the longest unused layers, then the largest."""
        group = 0 if candidate.duplicate_of else 1 if candidate.unusable else 2
        return (
            group,
            int(self._last_touch(candidate) // LEDGER_STEP),
            -candidate.size,
            candidate.layer_id,
        )

    def _last_touch(self, candidate: Candidate) -> float:
        return max(candidate.created or 0.0, candidate.last_used or 0.0)

    def _chosen(self, candidate: Candidate) -> bool:
        if self.policy.ours_only and not candidate.ours:
            return False
        return not self.images.given or bool(
            self.images.hit(image_terms(candidate.image_ids, candidate.image_names))
        )

    def _protection(self, candidate: Candidate) -> t.Optional[t.Tuple[str, str]]:
        """The first protection that applies, as rule and reason."""
        policy = self.policy
        if self.refusal:
            return self.refusal
        if candidate.users:
            return "in_use", "in use by " + ", ".join(candidate.users)
        if candidate.dependents:
            return "dependents", "other layers depend on it: " + ", ".join(candidate.dependents)
        if candidate.read_only_store:
            return "read_only", f"it is in the read-only store {candidate.read_only_store}"
        if candidate.newer_format:
            return "newer_format", candidate.newer_format
        terms = image_terms(candidate.image_ids, candidate.image_names)
        if policy.images and self.images.hit(terms) is None:
            return "images", "its image is not selected by images"
        if policy.ours_only and not candidate.ours:
            return "origin", "the runtime created it, and origin is ours"
        if candidate.lease is not None and (candidate.lease > self.now or self.watch.doubt):
            return "lease", f"leased until {format_time(candidate.lease)}"
        pinned = self.keep_images.hit(terms)
        if pinned is not None:
            return "keep_images", f"its image matches {pinned} of keep_images"
        pinned = self.keep_mappings.hit(map_terms(candidate.uidmap, candidate.gidmap))
        if pinned is not None:
            return "keep_mappings", f"its mapping matches {pinned} of keep_mappings"
        if candidate.layer_id in policy.keep_layers:
            return "keep_layers", "it is declared to be ready"
        if policy.shared and candidate.layer_id not in policy.layers:
            return "shared", f"containers of other stores may use it: {policy.shared}"
        return self._recent(candidate)

    def _recent(self, candidate: Candidate) -> t.Optional[t.Tuple[str, str]]:
        """Whether min_age protects it. A container that is being re-created leaves its layer unused for a
        moment, so the time of the last use counts like the time of creation.
        """
        least = self.policy.min_age
        if (candidate.idle or 0.0) >= least:
            # It was observed for that time, which does not depend on the wall clock.
            return None
        if self.watch.doubt:
            return "min_age", f"the time of its creation or use is unknown: {self.watch.doubt}"
        touched = self._last_touch(candidate)
        if self._created(candidate) is None:
            return "min_age", "the time of its creation is unknown"
        if self.now - touched < least:
            what = "made" if touched == (candidate.created or 0.0) else "seen in use"
            return "min_age", f"{what} at {format_time(touched)}, less than {format_age(least)} ago"
        return None

    def _selecting_rules(
        self, ordered: t.Sequence[Candidate], free: t.Sequence[Candidate]
    ) -> t.Dict[str, t.List[t.Tuple[str, str]]]:
        """For each layer ID, the rules that select it, with their reasons."""
        selected: t.Dict[str, t.List[t.Tuple[str, str]]] = {
            candidate.layer_id: [] for candidate in free
        }
        for rule, why in LAYER_RULES.items():
            for candidate in free:
                reason = why(self, candidate)
                if reason:
                    selected[candidate.layer_id].append((rule, reason))
        if self.policy.unused_for is not None:
            if self.unwatched:
                self.notes.append(self._waiting())
            self.notes += self.watch.remarks
        for rule, select in IMAGE_RULES.items():
            for candidate, reason in select(self, ordered, free):
                selected[candidate.layer_id].append((rule, reason))
        used = sum(candidate.size for candidate in ordered if self._chosen(candidate))
        for rule, unit, amount, reason in self._space(used):
            freed = 0
            for candidate in free:
                if freed >= amount:
                    break
                gain = candidate.size if unit == "bytes" else candidate.inodes
                if gain > 0:
                    selected[candidate.layer_id].append((rule, reason))
                    freed += gain
        return selected

    # The predicates of the rules; the tables below name the rule of each.

    def listed(self, candidate: Candidate) -> str:
        return "it is listed in layers" if candidate.layer_id in self.policy.layers else ""

    def duplicate(self, candidate: Candidate) -> str:
        if not self.policy.duplicates or not candidate.duplicate_of:
            return ""
        return f"the layer {candidate.duplicate_of} has the same mapping"

    def unusable(self, candidate: Candidate) -> str:
        return (candidate.unusable or "") if self.policy.unusable_maps else ""

    def unused(self, candidate: Candidate) -> str:
        least = self.policy.unused_for
        if least is None or (candidate.idle or 0.0) < least:
            return ""
        last = candidate.last_used
        seen = "" if last is None else f", last on {format_time(last)}"
        return f"not seen in use for {format_age(least)}{seen}"

    def older(self, candidate: Candidate) -> str:
        if not self._is_older(candidate):
            return ""
        created = self._created(candidate)
        born = "at an unknown time" if created is None else f"at {format_time(created)}"
        return f"created {born}, before {format_time(self.policy.created_before or 0.0)}"

    def _is_older(self, candidate: Candidate) -> bool:
        """Whether created_before selects it."""
        bound = self.policy.created_before
        if bound is None or self.watch.doubt:
            return False
        # A layer with unknown creation time is at least as old as the time for which it was watched.
        return (self._created(candidate) or self.now - (candidate.idle or 0.0)) < bound

    @staticmethod
    def _created(candidate: Candidate) -> t.Optional[float]:
        return (
            None
            if candidate.created is None or candidate.created < _NO_MOMENT
            else candidate.created
        )

    def _waiting(self) -> str:
        earliest = format_time(self.now + self.unwatched)
        if self.watch.since is None:
            so_far = "this store was not observed before"
        else:
            so_far = f"since {format_time(self.watch.since)} it was observed for {format_age(self.watch.seconds)}"
        return f"unused_for has no effect before {earliest}: {so_far}"

    def surplus_copies(
        self, ordered: t.Sequence[Candidate], free: t.Sequence[Candidate]
    ) -> t.Iterator[t.Tuple[Candidate, str]]:
        """All copies of each image beyond the allowed number; protected copies are counted first."""
        most = self.policy.max_copies_per_image
        if most is None:
            return
        all_copies: t.Dict[t.Tuple[str, ...], int] = {}
        for candidate in ordered:
            all_copies[candidate.image_ids] = all_copies.get(candidate.image_ids, 0) + 1
        surplus = {image: number - most for image, number in all_copies.items()}
        for candidate in free:
            if surplus[candidate.image_ids] > 0:
                surplus[candidate.image_ids] -= 1
                number = all_copies[candidate.image_ids]
                yield (
                    candidate,
                    f"its image has {number} mapped layers, but only {most} are allowed",
                )

    def _space(self, used: int) -> t.Iterator[t.Tuple[str, str, int, str]]:
        """The rules for space: rule, unit, the amount to free, and the reason."""
        for rule, select in SPACE_RULES.items():
            for unit, amount, reason in select(self, used):
                yield rule, unit, amount, reason

    def used_too_much(self, used: int) -> t.Iterator[t.Tuple[str, int, str]]:
        if self.policy.max_used_space is None:
            return
        most = self.policy.max_used_space.of(self.disk.total)
        reason = f"mapped layers use {size_text(used)}, but only {size_text(most)} are allowed"
        yield "bytes", max(used - most, 0), reason

    def free_too_little(self, _used: int) -> t.Iterator[t.Tuple[str, int, str]]:
        if self.policy.min_free_space is None:
            return
        free = self.disk.free
        least = self.policy.min_free_space.of(self.disk.total)
        reason = f"the filesystem has {size_text(free)} free, but {size_text(least)} are required"
        yield "bytes", max(least - free, 0), reason

    def above_threshold(self, _used: int) -> t.Iterator[t.Tuple[str, int, str]]:
        policy, disk = self.policy, self.disk
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
                unit,
                amount,
                f"{usage:.1f} % of the filesystem's {unit} are used; from "
                f"{policy.high_threshold:g} % on, layers are removed until it is {policy.low_threshold:g} %",
            )

    def _allowed(self, used: int) -> t.Tuple[t.Optional[int], str, str]:
        """The maximum number of bytes to remove, and the limit that sets it; None without a limit."""
        allowed: t.Optional[int] = None
        rule = reason = ""
        if self.policy.max_freed is not None:
            allowed = self.policy.max_freed.of(self.disk.total)
            rule, reason = "max_freed", f"max_freed ({size_text(allowed)}) is reached"
        if self.policy.reserved_space is not None:
            reserved = self.policy.reserved_space.of(self.disk.total)
            room = max(used - reserved, 0)
            if allowed is None or room < allowed:
                allowed = room
                rule = "reserved_space"
                reason = f"mapped layers would use less than reserved_space ({size_text(reserved)})"
        return allowed, rule, reason

    def _cut(
        self,
        ordered: t.Sequence[Candidate],
        protected: t.Mapping[str, t.Optional[t.Tuple[str, str]]],
        selected: t.Mapping[str, t.Sequence[t.Tuple[str, str]]],
        used: int,
    ) -> t.Tuple[t.List[Decision], t.List[Decision]]:
        allowed, limit, limit_reason = self._allowed(used)
        removals: t.List[Decision] = []
        kept: t.List[Decision] = []
        freed = 0
        for candidate in ordered:
            protection = protected[candidate.layer_id]
            rules = selected.get(candidate.layer_id, ())
            remove = False
            if protection is not None:
                rule, reason = protection
            elif not rules:
                rule, reason = self._rule_without_selection()
            elif allowed is not None and freed >= allowed:
                rule, reason = limit, limit_reason
            else:
                remove = True
                freed += candidate.size
                rule = rules[0][0]
                reason = "; ".join(dict.fromkeys(reason for _first, reason in rules))
            decision = Decision(
                layer_id=candidate.layer_id,
                remove=remove,
                rule=rule,
                reason=reason,
                wanted_by=tuple(dict.fromkeys(rule for rule, _rest in rules)),
                size=candidate.size,
                inodes=candidate.inodes,
            )
            (removals if remove else kept).append(decision)
        return removals, kept

    def _rule_without_selection(self) -> t.Tuple[str, str]:
        if not self.policy.has_rule:
            return "none", "no rule is set"
        if self.unwatched:
            return "unused_for", self._waiting()
        return "none", "no rule selects it"

    def _targets(self, used: int, removals: t.Sequence[Decision]) -> t.Iterator[Target]:
        planned = {
            "bytes": sum(removal.size for removal in removals),
            "inodes": sum(removal.inodes for removal in removals),
        }
        for rule, unit, amount, _reason in self._space(used):
            yield Target(rule, unit, amount, planned[unit])

    def _findings(
        self, findings: t.Sequence[Finding]
    ) -> t.Tuple[t.List[t.Tuple[Finding, Decision]], t.List[t.Tuple[Finding, Decision]]]:
        repairs: t.List[t.Tuple[Finding, Decision]] = []
        kept: t.List[t.Tuple[Finding, Decision]] = []
        for item in sorted(findings, key=lambda finding: (finding.kind, finding.name)):
            decision = self._judge(item)
            (repairs if decision.remove else kept).append((item, decision))
        return repairs, kept

    def _judge(self, finding: Finding) -> Decision:
        policy = self.policy
        option, value, allowed = "orphans", "remove", policy.remove_orphans
        if finding.kind in BROKEN:
            option, value, allowed = "broken", "repair", policy.repair_broken
        if finding.kind in LEFTOVERS or finding.ours:
            # No process holds its lock, so any run that may write removes it.
            allowed = allowed or policy.has_rule or policy.remove_orphans or policy.repair_broken
        least = 0.0
        if not (finding.kind in BROKEN or finding.kind in LEFTOVERS or finding.ours):
            least = max(policy.min_age, UNREFERENCED_AGE if finding.kind == "unreferenced" else 0.0)
        remove, rule, reason = False, option, FINDINGS[finding.kind]
        if self.refusal:
            rule, reason = self.refusal[0], f"{reason}; {self.refusal[1]}"
        elif finding.users:
            rule, reason = "in_use", "in use by " + ", ".join(finding.users)
        elif finding.template:
            reason = "it is an image's own layer, which is never removed by layer_gc"
        elif finding.kind in _USABLE and policy.shared:
            rule = "shared"
            reason = f"{reason}, but containers of other stores may use it: {policy.shared}"
        elif least and self.watch.doubt:
            rule, reason = "min_age", f"{reason}, for an unknown time: {self.watch.doubt}"
        elif self.now - (finding.created or 0.0) < least:
            rule, reason = "min_age", f"{reason}, younger than {format_age(least)}"
        elif not allowed:
            reason = f"{reason}; {option}={value} removes it"
        else:
            remove = True
        return Decision(finding.name, remove, rule, reason, (option,), finding.size, finding.inodes)


# The predicate of each rule, which is named after its option. Each rule of gc_policy.py is in one of these tables;
# their order is the order in which reasons are given.
#
# Rules for single layers. They return the reason as text, empty if the rule does not select the layer.
LAYER_RULES: t.Mapping[str, t.Callable[[_Planner, Candidate], str]] = {
    "layers": _Planner.listed,
    "duplicates": _Planner.duplicate,
    "unusable_maps": _Planner.unusable,
    "unused_for": _Planner.unused,
    "created_before": _Planner.older,
}
# Rules that compare the layers of an image: from all layers, and those that nothing protects, both in the order of
# removal, to the layers that the rule selects, with the reasons.
IMAGE_RULES: t.Mapping[
    str,
    t.Callable[
        [_Planner, t.Sequence[Candidate], t.Sequence[Candidate]],
        t.Iterator[t.Tuple[Candidate, str]],
    ],
] = {
    "max_copies_per_image": _Planner.surplus_copies,
}
# Rules that free space: from the bytes that mapped layers use to the unit, the amount to free and the reason.
SPACE_RULES: t.Mapping[str, t.Callable[[_Planner, int], t.Iterator[t.Tuple[str, int, str]]]] = {
    "max_used_space": _Planner.used_too_much,
    "min_free_space": _Planner.free_too_little,
    "high_threshold": _Planner.above_threshold,
}

BROKEN = frozenset(("entry", "missing", "damaged", "foreign_root", "incomplete"))
# Damaged layers that containers of other stores may have mounted.
_USABLE = frozenset(("unreferenced", "damaged", "foreign_root"))
LEFTOVERS = frozenset(("staging", "trash", "records"))

FINDINGS: t.Dict[str, str] = {
    "entry": "an image lists this mapped layer, but the store has no record of this",
    "missing": "the store has a record of this mapped layer, but its data is missing",
    "damaged": "no runtime can use this mapped layer",
    "foreign_root": "names in this mapped layer belong to IDs outside its map",
    "incomplete": "the creation of this layer never finished",
    "unreferenced": "no image and no container references this mapped layer",
    "directory": "a layer directory without a record",
    "link": "a link to a missing layer",
    "staging": "left over from an interrupted run",
    "trash": "left over from an interrupted removal",
    "records": "an unfinished file of records",
}


@dataclass(frozen=True)
class Prospect:
    """The space that a rule would free on its own with the given protections."""

    rule: str
    value: t.Union[str, int, bool]
    layers: int
    bytes: int
    inodes: int


def prospects(
    candidates: t.Sequence[Candidate],
    policy: Policy,
    disk: Disk,
    watch: Watch,
    now: float,
) -> t.Tuple[Prospect, ...]:
    """The space that each rule would free if it were set, for a run without rules. The protections of ``policy``
    apply."""
    protections = [gc_policy.OPTIONS[name].field for name in gc_policy.named(PROTECTION)]
    kept = {field: getattr(policy, field) for field in protections}
    found: t.List[Prospect] = []
    for rule in gc_policy.named(RULE):
        option = gc_policy.OPTIONS[rule]
        for number, value in enumerate(option.trials):
            tried = {rule: value}
            if option.pair:
                tried[option.pair] = gc_policy.OPTIONS[option.pair].trials[number]
            removals = plan(
                candidates, (), replace(gc_policy.read(tried, now), **kept), disk, watch, now
            ).removals
            found.append(
                Prospect(
                    rule=rule,
                    value=value,
                    layers=len(removals),
                    bytes=sum(removal.size for removal in removals),
                    inodes=sum(removal.inodes for removal in removals),
                )
            )
    return tuple(item for item in found if item.layers)
