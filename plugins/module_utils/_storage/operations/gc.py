# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What layer_gc does: plan with the pure function, then carry the plan out, layer by layer."""

from __future__ import annotations

import contextlib
import os
import time
import typing as t
from dataclasses import asdict, dataclass

from ..errors import (
    ImageUnknown,
    LayerInUse,
    NamespaceError,
    StorageError,
    StoreError,
)
from ..idmap.mapping import Mapping
from ..idmap.ranges import IDMap
from ..idmap.subids import everybodys_ranges, subordinate_ids
from ..kernel import files
from ..store.records import Layer
from ..store.snapshot import Snapshot
from . import policy as reading
from .inventory import (
    DAMAGED,
    EXCLUSIVE,
    INCOMPLETE,
    MISSING,
    UNREFERENCED,
    Inventory,
    LayerState,
    container_result,
    take,
)
from .moments import age
from .opening import OpenStore, StoreRequest, opened
from .pace import Pace
from .plan import (
    LEFTOVERS,
    Candidate,
    Decision,
    Disk,
    Finding,
    Plan,
    plan,
    prospects,
)
from .policy import Policy
from .removing import condemned, remove_mapped_layer
from .tidying import end_removals
from .watching import watch

# Host IDs below are nobody's subordinate ones.
_FIRST_SUBORDINATE = 65536
# For how long a filesystem may free nothing of what was deleted, and for how long it may go on
# freeing (seconds); and what counts as all of it.
_SETTLING = 5.0
_LONGEST_SETTLING = 60.0
_EXACT_ENOUGH = 0.98
# Filesystems that free in the background what was deleted.
_FREES_LATER = frozenset(("bcachefs", "btrfs", "xfs", "zfs"))
_MAGIC = frozenset("*?[")
# Of what was to go, had there been time.
_LATER = {
    "rule": "time_limit",
    "reason": "the time limit was reached before its turn came, the next run goes on with it",
}


@dataclass(frozen=True)
class GcRequest:
    """What a task declares, with ages and sizes as they were typed; empty for not given.

    :param deadline: when to begin with nothing more, on the monotonic clock; 0 for never
    :param awaited: nor when nobody reads standard output any more
    """

    store: StoreRequest
    images: t.Tuple[str, ...] = ()
    layers: t.Tuple[str, ...] = ()
    keep_images: t.Tuple[str, ...] = ()
    keep_mappings: t.Tuple[str, ...] = ()
    # IDs of layers, for callers that know what is declared.
    keep_layers: t.Tuple[str, ...] = ()
    min_age: str = "10m"
    duplicates: bool = False
    unusable_maps: bool = False
    unused_for: str = ""
    created_before: str = ""
    max_copies_per_image: t.Optional[int] = None
    max_used_space: str = ""
    reserved_space: str = ""
    min_free_space: str = ""
    high_threshold: t.Optional[float] = None
    low_threshold: t.Optional[float] = None
    max_freed: str = ""
    origin: str = "any"
    orphans: str = "report"
    broken: str = "report"
    check: bool = False
    deadline: float = 0.0
    awaited: bool = False


def read_policy(request: GcRequest, now: float) -> Policy:
    """The options as numbers.

    :raises ConfigError: one is not what it should be
    """

    def amount(option: str) -> t.Optional[reading.Amount]:
        text = getattr(request, option)
        return reading.amount(option, text) if text else None

    high, low = reading.thresholds(request.high_threshold, request.low_threshold)
    return Policy(
        images=request.images,
        layers=frozenset(request.layers),
        keep_images=request.keep_images,
        keep_mappings=request.keep_mappings,
        keep_layers=frozenset(request.keep_layers),
        min_age=age("min_age", request.min_age),
        duplicates=request.duplicates,
        unusable_maps=request.unusable_maps,
        unused_for=age("unused_for", request.unused_for) if request.unused_for else None,
        created_before=(
            reading.moment("created_before", request.created_before, now)
            if request.created_before
            else None
        ),
        max_copies_per_image=reading.copies("max_copies_per_image", request.max_copies_per_image),
        max_used_space=amount("max_used_space"),
        reserved_space=amount("reserved_space"),
        min_free_space=amount("min_free_space"),
        high_threshold=high,
        low_threshold=low,
        max_freed=amount("max_freed"),
        ours_only=request.origin == "ours",
        remove_orphans=request.orphans == "remove",
        repair_broken=request.broken == "repair",
    )


def collect(request: GcRequest) -> t.Dict[str, t.Any]:
    """Collect mapped layers as ``request`` says; an error on one does not stop the others.

    :returns: the module's result
    :raises StorageError: an option is wrong, or the store cannot be opened or read
    """
    policy = read_policy(request, time.time())
    with opened(request.store) as place:
        return _Collection(request, policy, place).carry_out()


class _Collection:
    """One request against one open store."""

    def __init__(self, request: GcRequest, policy: Policy, place: OpenStore) -> None:
        self.started = time.monotonic()
        self.request = request
        self.place = place
        snapshot = place.store.snapshot()
        self.policy = _with_ids(policy, snapshot)
        self.inventory: Inventory = take(place, (), EXCLUSIVE)
        self.now = self.inventory.now
        self.states = {one.layer_id: one for one in self.inventory.mapped_layers()}
        self.states.update((one.layer_id, one) for one in self.inventory.unreferenced)
        self.failed: t.List[t.Dict[str, t.Any]] = []
        self.removed: t.List[t.Dict[str, t.Any]] = []
        self.kept: t.List[t.Dict[str, t.Any]] = []
        self.repaired: t.List[t.Dict[str, t.Any]] = []
        self.reported: t.List[t.Dict[str, t.Any]] = []
        self.freed = [0, 0]
        self.pace = Pace(request.deadline, request.awaited)
        self.pending = 0
        # However short the time, a run gets something done.
        self.begun = False
        self.seconds_planning = 0.0

    def carry_out(self) -> t.Dict[str, t.Any]:
        watched_since = self._watch()
        candidates = self._candidates()
        before = self._disk()
        made = plan(candidates, self._findings(), self.policy, before, watched_since, self.now)
        self.seconds_planning = time.monotonic() - self.started
        self.kept += [self._entry(one) for one in made.kept]
        self.reported += [_finding_entry(*one) for one in made.findings_kept]
        if self.request.check:
            self.removed += [self._entry(one) for one in made.removals]
            self.repaired += [_finding_entry(*one) for one in made.repairs]
            self.freed = [
                sum(one.size for one in made.removals)
                + sum(one.size for one, _rest in made.repairs),
                sum(one.inodes for one in made.removals)
                + sum(one.inodes for one, _rest in made.repairs),
            ]
        elif made.removals or made.repairs:
            self._apply(made)
            # What is gone need not be found gone by the next run.
            watch(self.place, self.place.store.snapshot(), self.now)
        result: t.Dict[str, t.Any] = {
            "changed": bool(self.removed or self.repaired),
            "removed": self.removed,
            "kept": self.kept,
            "failures": self.failed,
            "repaired": self.repaired,
            "findings": self.reported,
            "space_reclaimed": self.freed[0],
            "inodes_reclaimed": self.freed[1],
            "target_met": self._target_met(made),
            "partial": self.pending > 0,
            "remaining": self.pending,
            "seconds_planning": round(self.seconds_planning, 3),
            "notes": list(made.notes),
            "would_free": [],
            "store": self.place.describe(),
            "diff": self._diff(),
        }
        if not self.policy.has_rule:
            result["would_free"] = [
                asdict(one)
                for one in prospects(candidates, self.policy, before, watched_since, self.now)
            ]
        if not result["target_met"]:
            result["warnings"] = [
                "The rules of space asked for more than the layers that may go hold: "
                + "; ".join(
                    f"{one.rule} {one.wanted} {one.unit}, {one.planned} can be freed"
                    for one in made.targets
                    if not one.met
                )
            ]
        if self.failed:
            total = len(self.failed) + len(self.removed) + len(self.repaired)
            result["error"] = (
                f"{len(self.failed)} of {total} could not be removed: {self.failed[0]['reason']}"
            )
        return result

    # What there is

    def _watch(self) -> t.Optional[float]:
        """Note in the ledger what is in use now; since when somebody has watched."""
        ledger, since = watch(
            self.place, self.place.store.view(), self.now, write=not self.request.check
        )
        for one in self.states.values():
            one.last_used = ledger.last_used(one.layer_id)
        return since

    def _candidates(self) -> t.List[Candidate]:
        dependents = self._dependents()
        unusable = _Usability(self.place)
        found = []
        for one in self.inventory.mapped_layers():
            if one.layer is None or one.status in (MISSING, INCOMPLETE, DAMAGED):
                continue
            if _is_own_layer(one):
                continue
            found.append(
                Candidate(
                    layer_id=one.layer_id,
                    image_ids=tuple(image.id for image in one.images),
                    image_names=tuple(name for image in one.images for name in image.names),
                    uidmap=tuple(one.mapping.uid.to_strings()),
                    gidmap=tuple(one.mapping.gid.to_strings()),
                    created=one.created,
                    last_used=one.last_used,
                    lease=one.lease,
                    users=_users(one),
                    dependents=tuple(dependents.get(one.layer_id, ())),
                    read_only_store=one.layer.read_only_store,
                    ours=one.ours,
                    duplicate_of=one.duplicate_of,
                    unusable=unusable.reason(one.mapping),
                    size=one.usage.exclusive if one.usage else 0,
                    inodes=one.usage.inodes if one.usage else 0,
                )
            )
        return found

    def _dependents(self) -> t.Dict[str, t.List[str]]:
        """Mapped layers that others need on disk; containers' layers are known from the records."""
        found: t.Dict[str, t.List[str]] = {}
        for one in self.states.values():
            for needed in one.dependencies:
                if needed in self.states:
                    found.setdefault(needed, []).append(f"layer {one.layer_id[:12]}")
        return found

    def _findings(self) -> t.List[Finding]:
        found = []
        seen = set()
        begun = condemned(self.place)
        for one in self.states.values():
            kind = ""
            if one.layer is None:
                kind = "entry"
            elif one.layer.read_only_store:
                continue
            elif one.status in (MISSING, INCOMPLETE, DAMAGED, UNREFERENCED):
                kind = one.status
            if kind:
                seen.add(one.layer_id)
                found.append(_layer_finding(kind, one, one.ours or one.layer_id in begun))
        snapshot = self.place.store.view()
        for layer in snapshot.layers.values():
            if layer.incomplete and not layer.read_only_store and layer.id not in seen:
                found.append(_incomplete(snapshot, layer))
        for orphan in self.inventory.orphans:
            found.append(
                Finding(
                    kind=orphan.kind,
                    name=orphan.path,
                    created=orphan.changed,
                    size=orphan.usage.allocated if orphan.usage else 0,
                    inodes=orphan.usage.inodes if orphan.usage else 0,
                )
            )
        return found

    def _disk(self) -> Disk:
        found = os.statvfs(self.place.config.graphroot)
        return Disk(
            total=found.f_blocks * found.f_frsize,
            free=found.f_bavail * found.f_frsize,
            total_inodes=found.f_files,
            free_inodes=found.f_favail,
        )

    # Carrying it out

    def _apply(self, made: Plan) -> None:
        before = self._settled()
        for decision in made.removals:
            if self._in_time():
                self._remove(decision)
            else:
                self.kept.append({**self._entry(decision), **_LATER})
        leftovers = [one for one in made.repairs if one[0].kind in LEFTOVERS]
        for finding, decision in made.repairs:
            if finding.kind in LEFTOVERS:
                continue
            if self._in_time():
                self._repair(finding, decision)
            else:
                self.reported.append({**_finding_entry(finding, decision), **_LATER})
        if leftovers and self._in_time(len(leftovers)):
            self._sweep(made)
        elif leftovers:
            self.reported += [{**_finding_entry(*one), **_LATER} for one in leftovers]
        expected = sum(one["size"] or 0 for one in self.removed + self.repaired)
        after = self._settled()
        now = time.monotonic()
        end, patience = now + _LONGEST_SETTLING, now + _SETTLING
        if files.filesystem_type(self.place.config.graphroot) not in _FREES_LATER:
            end = now
        while after[0] - before[0] < expected * _EXACT_ENOUGH and now < min(end, patience):
            time.sleep(0.1)
            later = self._settled()
            now = time.monotonic()
            if later[0] > after[0]:
                patience = now + _SETTLING
            after = later
        self.freed = [max(after[0] - before[0], 0), max(after[1] - before[1], 0)]

    def _in_time(self, things: int = 1) -> bool:
        """Whether to begin with something more; else so many things are left to the next run."""
        if self.begun and self.pace.over:
            self.pending += things
            return False
        self.begun = True
        return True

    def _settled(self) -> t.Tuple[int, int]:
        """Free bytes and inodes, once all that was written and deleted is on disk."""
        self.place.driver.settle()
        found = os.statvfs(self.place.config.graphroot)
        return found.f_bfree * found.f_frsize, found.f_ffree

    def _remove(self, decision: Decision) -> None:
        entry = self._entry(decision)
        state = self.states[decision.layer_id]

        def unchanged(snapshot: Snapshot) -> None:
            layer = snapshot.layer(decision.layer_id)
            if state.layer is None or layer.raw != state.layer.raw:
                raise StoreError(
                    f"layer {decision.layer_id[:12]}", "was changed meanwhile", "Run this again."
                )

        try:
            seconds = remove_mapped_layer(self.place, decision.layer_id, unchanged)
        except LayerInUse as error:
            # Somebody took it into use since the plan was made: that is no failure.
            self.kept.append({**entry, "rule": "in_use", "reason": str(error)})
        except (StorageError, OSError) as error:
            self.failed.append({**entry, "reason": str(error)})
        else:
            # What somebody else took away since then is gone, as was wanted, but not by us.
            if seconds is not None:
                self.removed.append(entry)

    def _repair(self, finding: Finding, decision: Decision) -> None:
        entry = _finding_entry(finding, decision)
        try:
            if finding.kind == "entry":
                self._drop_entry(finding.name)
            elif finding.kind in ("directory", "link"):
                self._drop_orphan(finding.name)
            elif remove_mapped_layer(self.place, finding.name, _still(finding)) is None:
                return
        except LayerInUse as error:
            self.reported.append({**entry, "rule": "in_use", "reason": str(error)})
        except (StorageError, OSError) as error:
            self.failed.append({**entry, "reason": str(error)})
        else:
            self.repaired.append(entry)

    def _drop_entry(self, layer_id: str) -> None:
        with self.place.store.transaction() as transaction:
            if layer_id in transaction.snapshot.layers:
                raise LayerInUse(f"layer {layer_id[:12]}", "has a record by now")
            transaction.drop_mapped_layer(layer_id)

    def _drop_orphan(self, path: str) -> None:
        store, driver = self.place.store, self.place.driver
        with store.trash("orphan", self.place.destroy) as trash, store.transaction() as transaction:
            # Under the lock nobody can be half-way through making a layer of it.
            for orphan in driver.orphans(transaction.snapshot.layers):
                if orphan.path == path:
                    driver.drop(orphan, trash)
                    break

    def _sweep(self, made: Plan) -> None:
        wanted = {
            finding.name: _finding_entry(finding, decision)
            for finding, decision in made.repairs
            if finding.kind in LEFTOVERS
        }
        try:
            # What tells of them is about to go.
            end_removals(self.place, self.place.store.snapshot())
            self.place.store.sweep(self.place.destroy)
        except (StorageError, OSError) as error:
            for path, entry in wanted.items():
                if os.path.lexists(path):
                    self.failed.append({**entry, "reason": str(error)})
        self.repaired += [entry for path, entry in wanted.items() if not os.path.lexists(path)]

    # Telling

    def _entry(self, decision: Decision) -> t.Dict[str, t.Any]:
        state = self.states[decision.layer_id]
        return {
            "id": decision.layer_id,
            "image_ids": [image.id for image in state.images],
            "image_names": [name for image in state.images for name in image.names],
            "uidmap": state.mapping.uid.to_strings(),
            "gidmap": state.mapping.gid.to_strings(),
            "size": decision.size,
            "inodes": decision.inodes,
            "rule": decision.rule,
            "wanted_by": list(decision.wanted_by),
            "reason": decision.reason,
            "origin": "ours" if state.ours else "runtime",
            "containers": [container_result(one) for one in state.containers],
        }

    def _target_met(self, made: Plan) -> bool:
        if self.request.check or self.pending or not made.targets:
            return made.target_met
        gone = {
            "bytes": sum(one["size"] for one in self.removed),
            "inodes": sum(one["inodes"] for one in self.removed),
        }
        return all(gone[target.unit] >= target.wanted for target in made.targets)

    def _diff(self) -> t.Dict[str, t.Any]:
        gone = {one["id"] for one in self.removed}
        before = sorted(self.removed + self.kept + self.failed, key=lambda one: one["id"])
        return {
            "before": {"mapped_layers": [_shown(one) for one in before if "uidmap" in one]},
            "after": {
                "mapped_layers": [
                    _shown(one) for one in before if "uidmap" in one and one["id"] not in gone
                ]
            },
        }


def _shown(entry: t.Dict[str, t.Any]) -> t.Dict[str, t.Any]:
    return {key: entry[key] for key in ("id", "image_names", "uidmap", "gidmap")}


def _with_ids(policy: Policy, snapshot: Snapshot) -> Policy:
    """Image references that are no patterns become the IDs that podman would take them for."""

    def resolved(references: t.Tuple[str, ...]) -> t.Tuple[str, ...]:
        found = []
        for reference in references:
            if not _MAGIC.intersection(reference):
                with contextlib.suppress(ImageUnknown):
                    reference = snapshot.resolve_image(reference).id
            found.append(reference)
        return tuple(found)

    return Policy(
        **{
            **{name: getattr(policy, name) for name in policy.__dataclass_fields__},
            "images": resolved(policy.images),
            "keep_images": resolved(policy.keep_images),
        }
    )


def _is_own_layer(one: LayerState) -> bool:
    return any(image.layer == one.layer_id for image in one.images)


def _users(one: LayerState) -> t.Tuple[str, ...]:
    return tuple(f"container {container.name}" for container in one.containers) + tuple(
        f"layer {layer_id[:12]}" for layer_id in one.child_layers
    )


def _layer_finding(kind: str, one: LayerState, ours: bool) -> Finding:
    return Finding(
        kind=kind,
        name=one.layer_id,
        image_ids=tuple(image.id for image in one.images),
        created=one.created,
        users=_users(one),
        template=_is_own_layer(one),
        ours=ours and kind in (INCOMPLETE, UNREFERENCED),
        size=one.usage.exclusive if one.usage else 0,
        inodes=one.usage.inodes if one.usage else 0,
    )


def _incomplete(snapshot: Snapshot, layer: Layer) -> Finding:
    containers = snapshot.containers_on(layer.id)
    own = {one.layer for one in containers}
    users = [f"container {one.name}" for one in containers] + [
        f"layer {child.id[:12]}" for child in snapshot.children(layer.id) if child.id not in own
    ]
    return Finding(
        kind=INCOMPLETE,
        name=layer.id,
        created=layer.created.timestamp() if layer.created else None,
        users=tuple(users),
        template=any(image.layer == layer.id for image in snapshot.images.values()),
    )


def _still(finding: Finding) -> t.Callable[[Snapshot], None]:
    """Under the locks: is the layer what it was found to be?"""

    def check(snapshot: Snapshot) -> None:
        layer = snapshot.layer(finding.name)
        changed = False
        if finding.kind == INCOMPLETE:
            changed = not layer.incomplete
        elif finding.kind == UNREFERENCED:
            changed = bool(snapshot.images_of_layer(finding.name))
        if changed:
            raise LayerInUse(f"layer {finding.name[:12]}", "was taken into use meanwhile")

    return check


def _finding_entry(finding: Finding, decision: Decision) -> t.Dict[str, t.Any]:
    return {
        "kind": finding.kind,
        "id": os.path.basename(finding.name),
        "path": finding.name if finding.name.startswith("/") else None,
        "image_ids": list(finding.image_ids),
        "size": finding.size,
        "inodes": finding.inodes,
        "rule": decision.rule,
        "reason": decision.reason,
    }


class _Usability:
    """Which maps nobody can use any more: their host IDs are no longer anybody's."""

    def __init__(self, place: OpenStore) -> None:
        self.rootless = place.account is not None
        self.who = ""
        self.spans: t.Dict[str, t.List[t.Tuple[int, int]]] = {}
        try:
            if place.account is not None:
                self.who = f"user {place.account.name}"
                mine = subordinate_ids(place.account.name, place.account.uid, required=False)
                for kind, ranges in (("uid", mine.uid), ("gid", mine.gid)):
                    self.spans[kind] = [(0, 1 + sum(one.size for one in ranges))]
            else:
                self.who = "this host"
                for kind in ("uid", "gid"):
                    self.spans[kind] = [
                        (one.start, one.start + one.size) for one in everybodys_ranges(kind)
                    ]
        except NamespaceError:
            self.spans = {}

    def reason(self, mapping: Mapping) -> t.Optional[str]:
        """Why nobody can use the map, in words; None if somebody can, or it cannot be told."""
        for kind, one in (("uid", mapping.uid), ("gid", mapping.gid)):
            outside = self._outside(kind, one)
            if outside:
                return f"the {kind} range {outside} is no subordinate range of {self.who} any more"
        return None

    def _outside(self, kind: str, one: IDMap) -> str:
        spans = self.spans.get(kind)
        if not spans:
            return ""
        for entry in one.ranges:
            first, last = entry.host_id, entry.host_id + entry.size
            if not entry.size or (not self.rootless and first < _FIRST_SUBORDINATE):
                continue
            if not any(start <= first and last <= end for start, end in spans):
                return f"{first}-{last - 1}"
        return ""
