# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module layer_gc: make a plan, then remove layer by layer."""

from __future__ import annotations

import contextlib
import errno
import os
import time
import typing as t
from dataclasses import asdict, dataclass, field, replace

from ..errors import (
    ImageUnknown,
    LayerInUse,
    NoSpace,
    StorageError,
    StoreError,
)
from ..kernel import clock, files
from ..kernel.clock import Moment
from ..kernel.oserrors import translate_oserror
from ..store.records import Layer
from ..store.snapshot import Snapshot
from ..tree.measure import Usage, together
from ..userns.declared import returns
from . import gc_policy, inventory_results, superseded_images
from .cleanup import Abandoned, end_removals, keep_reserve, sweep, waiting_removals
from .contradictions import contradictory, examine, shown
from .gc_plan import (
    LEFTOVERS,
    Candidate,
    Decision,
    Disk,
    Finding,
    Plan,
    Watch,
    plan,
    prospects,
)
from .gc_policy import Policy
from .image_removal import remove_image
from .inventory import (
    DAMAGED,
    EXCLUSIVE,
    INCOMPLETE,
    MISSING,
    NEWER,
    UNREFERENCED,
    Inventory,
    LayerState,
    take,
)
from .layer_removal import begun_removals, mark_of, remove_mapped_layer
from .layer_results import container_result
from .map_usability import MapUsability
from .options import Value
from .sharing import readers
from .store_opening import OpenStore, StoreRequest, opened
from .superseded_images import Superseded
from .time_formats import format_time
from .usage_tracking import record_use
from .work_budget import WorkBudget

# How long a filesystem may take to start, and to continue, freeing deleted data (seconds); and the share
# that counts as all of it.
_SETTLING = 5.0
_LONGEST_SETTLING = 60.0
_EXACT_ENOUGH = 0.98
# Filesystems that free deleted data in the background.
_FREES_LATER = frozenset(("bcachefs", "btrfs", "xfs", "zfs"))
_MAGIC = frozenset("*?[")
_MOST_GAPS_SHOWN = 3
_MOST_IMAGES_SHOWN = 1000
_NO_ROOM = (
    "the filesystem is full, and the store has neither a reserve nor files of its own that could "
    "be removed. Delete a file of "
    "1 MB elsewhere on the filesystem, then run layer_gc again"
)
# For removals that the time limit prevented.
_LATER = {
    "rule": "time_limit",
    "reason": "the time limit was reached before this layer, the next run continues with it",
}


@dataclass(frozen=True)
class GcRequest:
    """What a task declares.

    :param options: the options of the table in gc_policy.py, as given in a task
    :param keep_layers: IDs of declared layers to keep
    :param deadline: when to stop, on the monotonic clock; 0 for never
    :param awaited: also stop when nobody reads standard output any more
    """

    store: StoreRequest
    options: t.Mapping[str, Value] = field(default_factory=dict)
    keep_layers: t.Tuple[str, ...] = ()
    check: bool = False
    deadline: float = 0.0
    awaited: bool = False


def read_policy(request: GcRequest, now: float) -> Policy:
    """The policy that a request declares.

    :param now: seconds since the epoch
    :raises ConfigError: an option is invalid
    """
    return replace(gc_policy.read(request.options, now), keep_layers=frozenset(request.keep_layers))


@returns(inventory_results.GC)
def collect(request: GcRequest, moment: t.Optional[Moment] = None) -> t.Dict[str, t.Any]:
    """Collect mapped layers according to ``request``. An error for one layer does not stop the others.

    :param moment: the current time; None to read the clocks
    :returns: the module's result
    :raises StorageError: an option is invalid, or the store cannot be opened or read
    """
    moment = moment or clock.now()
    policy = read_policy(request, moment.wall)
    with opened(request.store) as store_ctx:
        return _Collection(request, policy, store_ctx, moment).carry_out()


class _Collection:
    """A request for an open store."""

    def __init__(
        self, request: GcRequest, policy: Policy, store_ctx: OpenStore, moment: Moment
    ) -> None:
        self.started = time.monotonic()
        self.request = request
        self.store_ctx = store_ctx
        # First, while the records are current.
        self.contradictions = examine(store_ctx)
        snapshot = store_ctx.store.snapshot()
        self.policy = _with_ids(policy, snapshot)
        self.policy = replace(self.policy, shared=self._readers())
        self.inventory: Inventory = take(store_ctx, (), EXCLUSIVE)
        self.moment = moment
        self.now = moment.wall
        self.states = {
            mapped_layer.layer_id: mapped_layer for mapped_layer in self.inventory.mapped_layers()
        }
        self.states.update((item.layer_id, item) for item in self.inventory.unreferenced)
        self.usages = {state.layer_id: state.usage for state in self.inventory.layers()}
        # The observed seconds for which each layer has been unused.
        self.idle: t.Dict[str, t.Optional[float]] = {}
        self.failed: t.List[t.Dict[str, t.Any]] = []
        self.removed: t.List[t.Dict[str, t.Any]] = []
        self.kept: t.List[t.Dict[str, t.Any]] = []
        self.repaired: t.List[t.Dict[str, t.Any]] = []
        self.reported: t.List[t.Dict[str, t.Any]] = []
        # Removals that failed because the disk is full.
        self.no_room: t.List[Decision] = []
        # Freed bytes and inodes, and the minimum and maximum of the bytes.
        self.freed = [0, 0]
        self.bounds = [0, 0]
        # The usage of what was removed, or would be removed in check mode.
        self.gone: t.List[t.Optional[Usage]] = []
        self.removed_images: t.List[t.Dict[str, t.Any]] = []
        self.kept_images: t.List[t.Dict[str, t.Any]] = []
        self.budget = WorkBudget(request.deadline, request.awaited)
        self.pending = 0
        # Each run does at least one thing, however short its time limit is.
        self.begun = False
        self.seconds_planning = 0.0

    def carry_out(self) -> t.Dict[str, t.Any]:
        watched = self._watch()
        candidates = self._candidates()
        before = self._disk()
        refusal = self._refusal()
        made = plan(candidates, self._findings(), self.policy, before, watched, self.now, refusal)
        images = superseded_images.decide(
            self.store_ctx.store.view(), self.policy, watched, self.now, self.states, refusal
        )
        going_images = [item for item in images if item.remove]
        self.kept_images += [self._image_entry(item) for item in images if not item.remove]
        self.seconds_planning = time.monotonic() - self.started
        self.kept += [self._entry(item) for item in made.kept]
        self.reported += [_finding_entry(*item) for item in made.findings_kept]
        if self.request.check:
            if made.removals or made.repairs or going_images:
                self._refuse_read_only()
            self.removed += [self._entry(removal) for removal in made.removals]
            self.repaired += [_finding_entry(*repair) for repair in made.repairs]
            self.gone += [self.states[removal.layer_id].usage for removal in made.removals]
            self.gone += [finding.usage for finding, _rest in made.repairs]
            planned = {removal.layer_id for removal in made.removals}
            for item in going_images:
                self._count_image(item, [layer for layer in item.layers if layer not in planned])
            found = self._expected()
            self.freed = [found.exclusive, found.inodes]
            self.bounds = [found.least, found.most]
        else:
            if made.removals or made.repairs or going_images:
                self.store_ctx.store.require_tested()
                self._apply(made, going_images)
                self.store_ctx.ensure_still_there()
                # So that the next run does not find missing layers.
                with contextlib.suppress(NoSpace):
                    record_use(self.store_ctx, self.store_ctx.store.snapshot(), self.moment)
            keep_reserve(self.store_ctx)
        result: t.Dict[str, t.Any] = {
            "changed": bool(self.removed or self.repaired or self.removed_images),
            "removed": self.removed,
            "kept": self.kept,
            "removed_images": self.removed_images,
            "kept_images": self.kept_images[:_MOST_IMAGES_SHOWN],
            "failures": self.failed,
            "repaired": self.repaired,
            "findings": self.reported,
            "space_reclaimed": self.freed[0],
            "space_reclaimed_min": self.bounds[0],
            "space_reclaimed_max": self.bounds[1],
            "inodes_reclaimed": self.freed[1],
            "target_met": self._target_met(made),
            "partial": self.pending > 0,
            "remaining": self.pending,
            "seconds_planning": round(self.seconds_planning, 3),
            "notes": list(made.notes),
            "would_free": [],
            "contradictions": shown(self.contradictions),
            "store": self.store_ctx.describe(),
            "diff": self._diff(),
        }
        if refusal is not None:
            self._refuse(result, refusal[1])
            return result
        if not self.policy.has_rule:
            result["would_free"] = [
                asdict(prospect)
                for prospect in prospects(candidates, self.policy, before, watched, self.now)
            ]
        newer = (
            self.store_ctx.store.untested() if self.request.check and result["changed"] else None
        )
        result["warnings"] = [str(newer)] if newer else []
        if not result["target_met"]:
            result["warnings"] += [
                "The rules for space require more than the removable layers use: "
                + "; ".join(
                    f"{target.rule} {target.wanted} {target.unit}, {target.planned} can be freed"
                    for target in made.targets
                    if not target.met
                )
            ]
        if self.failed:
            total = len(self.failed) + len(self.removed) + len(self.repaired)
            result["error"] = (
                f"{len(self.failed)} of {total} could not be removed: {self.failed[0]['reason']}"
            )
        return result

    def _refusal(self) -> t.Optional[t.Tuple[str, str]]:
        """Why nothing may be removed from this store at all, as rule and reason."""
        if self.contradictions:
            return "contradictions", "the records of the store are inconsistent"
        image_store = self.store_ctx.config.imagestore
        if image_store:
            return "read_only", f"its images are stored separately in imagestore {image_store}"
        return None

    def _refuse_read_only(self) -> None:
        """Check that the filesystem is not mounted read-only, so that check mode predicts the failure.

        :raises PermissionDenied: it is mounted read-only
        """
        graphroot = self.store_ctx.config.graphroot
        with translate_oserror(graphroot):
            if os.statvfs(graphroot).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), graphroot)

    def _refuse(self, result: t.Dict[str, t.Any], reason: str) -> None:
        """Report that nothing is removed: an error if a damaged store has something to remove, otherwise a warning."""
        if not self.contradictions:
            result["warnings"] = [
                f"Nothing is removed from {self.store_ctx.config.graphroot}: {reason}."
            ]
            return
        message = str(contradictory(self.store_ctx, self.contradictions))
        policy = self.policy
        if policy.has_rule or policy.remove_orphans or policy.repair_broken:
            result["error"] = message
        else:
            result["warnings"] = [message]

    # Collecting candidates

    def _readers(self) -> str:
        is_set = self.request.options.get("shared") is not None
        return self.policy.shared if is_set else readers(self.store_ctx)

    def _watch(self) -> Watch:
        """Record the layers in use in the ledger; returns how the store was watched."""
        snapshot = self.store_ctx.store.view()
        # The ledger must keep layers that damaged records do not list.
        write = not self.request.check and not self.contradictions
        try:
            ledger = record_use(self.store_ctx, snapshot, self.moment, write=write)
        except NoSpace:
            # The use is recorded at the end, when there is space.
            ledger = record_use(self.store_ctx, snapshot, self.moment, write=False)
        for state in self.states.values():
            state.last_used = ledger.last_used(state.layer_id)
            self.idle[state.layer_id] = ledger.idle(state.layer_id)
        remarks = [
            f"unused_for does not count the time from {format_time(gap.start)} to {format_time(gap.end)}, in which "
            "the store was not observed"
            for gap in ledger.gaps[-_MOST_GAPS_SHOWN:]
        ]
        if ledger.untraced:
            remarks.append(
                "unused_for counts only time in which no container was created or removed: on this "
                "filesystem the use of a layer is not recorded (noatime)"
            )
        return Watch(ledger.watched, ledger.watched_since, ledger.doubt, tuple(remarks))

    def _candidates(self) -> t.List[Candidate]:
        dependents = self._dependents()
        unusable = MapUsability(self.store_ctx)
        found = []
        newer = [state for state in self.inventory.unreferenced if state.status == NEWER]
        for mapped_layer in (*self.inventory.mapped_layers(), *newer):
            if mapped_layer.layer is None or mapped_layer.status in (MISSING, INCOMPLETE, DAMAGED):
                continue
            if self._is_repaired(mapped_layer):
                continue
            if _is_own_layer(mapped_layer):
                continue
            found.append(
                Candidate(
                    layer_id=mapped_layer.layer_id,
                    image_ids=tuple(image.id for image in mapped_layer.images),
                    image_names=tuple(
                        name for image in mapped_layer.images for name in image.names
                    ),
                    uidmap=tuple(mapped_layer.mapping.uid.to_strings()),
                    gidmap=tuple(mapped_layer.mapping.gid.to_strings()),
                    created=mapped_layer.created,
                    last_used=mapped_layer.last_used,
                    idle=self.idle.get(mapped_layer.layer_id),
                    lease=mapped_layer.lease,
                    users=_users(mapped_layer),
                    dependents=tuple(dependents.get(mapped_layer.layer_id, ())),
                    read_only_store=mapped_layer.layer.read_only_store,
                    newer_format=mapped_layer.problem if mapped_layer.status == NEWER else "",
                    ours=mapped_layer.ours,
                    duplicate_of=mapped_layer.duplicate_of,
                    unusable=unusable.reason(mapped_layer.mapping),
                    size=mapped_layer.usage.exclusive if mapped_layer.usage else 0,
                    inodes=mapped_layer.usage.inodes if mapped_layer.usage else 0,
                )
            )
        return found

    def _dependents(self) -> t.Dict[str, t.List[str]]:
        """Mapped layers that other mapped layers need on disk; containers' layers are known from the records."""
        found: t.Dict[str, t.List[str]] = {}
        for state in self.states.values():
            for needed in state.dependencies:
                if needed in self.states:
                    found.setdefault(needed, []).append(f"layer {state.layer_id[:12]}")
        return found

    def _is_repaired(self, state: LayerState) -> bool:
        """Whether a layer that runtimes would use counts as broken; otherwise the rules apply to it as to any other."""
        return state.wrong and self.policy.repair_broken

    def _findings(self) -> t.List[Finding]:
        found = []
        seen = set()
        snapshot = self.store_ctx.store.view()
        abandoned = Abandoned(begun_removals(self.store_ctx), self.moment)
        ours = {item.id for item in abandoned.layers(snapshot)}
        waiting = waiting_removals(self.store_ctx)
        for state in self.states.values():
            kind = ""
            if state.layer is None:
                kind = "entry"
            elif state.layer.read_only_store:
                continue
            elif state.status in (MISSING, INCOMPLETE, DAMAGED, UNREFERENCED) or self._is_repaired(
                state
            ):
                kind = state.status
            if kind:
                seen.add(state.layer_id)
                found.append(_layer_finding(kind, state, state.layer_id in ours))
        for layer in snapshot.layers.values():
            if layer.incomplete and not layer.read_only_store and layer.id not in seen:
                found.append(_incomplete(snapshot, layer))
        for orphan in self.inventory.orphans:
            if orphan.path in waiting:
                continue
            found.append(
                Finding(
                    kind=orphan.kind,
                    name=orphan.path,
                    created=orphan.changed,
                    size=orphan.usage.exclusive if orphan.usage else 0,
                    inodes=orphan.usage.inodes if orphan.usage else 0,
                    usage=orphan.usage,
                )
            )
        return found

    def _disk(self) -> Disk:
        found = os.statvfs(self.store_ctx.config.graphroot)
        return Disk(
            total=found.f_blocks * found.f_frsize,
            free=found.f_bavail * found.f_frsize,
            total_inodes=found.f_files,
            free_inodes=found.f_favail,
        )

    # Removing

    def _apply(self, made: Plan, images: t.Sequence[Superseded]) -> None:
        before = self._settled()
        for decision in made.removals:
            if self._in_time():
                self._remove(decision)
            else:
                self.kept.append({**self._entry(decision), **_LATER})
        if self.removed:
            # On a full disk, a removal frees the space that other removals need.
            failed, self.no_room = self.no_room, []
            for decision in failed:
                self._remove(decision)
        for decision in self.no_room:
            self.failed.append({**self._entry(decision), "reason": _NO_ROOM})
        for item in images:
            if self._in_time():
                self._remove_image(item)
            else:
                self.kept_images.append({**self._image_entry(item), **_LATER})
        leftovers = [repair for repair in made.repairs if repair[0].kind in LEFTOVERS]
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
            self.reported += [{**_finding_entry(*leftover), **_LATER} for leftover in leftovers]
        expected = self._expected().exclusive
        after = self._settled()
        now = time.monotonic()
        end, patience = now + _LONGEST_SETTLING, now + _SETTLING
        if files.filesystem_type(self.store_ctx.config.graphroot) not in _FREES_LATER:
            end = now
        while after[0] - before[0] < expected * _EXACT_ENOUGH and now < min(end, patience):
            time.sleep(0.1)
            later = self._settled()
            now = time.monotonic()
            if later[0] > after[0]:
                patience = now + _SETTLING
            after = later
        self.freed = [max(after[0] - before[0], 0), max(after[1] - before[1], 0)]
        self.bounds = [self.freed[0]] * 2

    def _expected(self) -> Usage:
        """The space that all removals free together, because layers of one image may share data."""
        going = [item for item in self.gone if item is not None]
        known = {id(item) for item in going}
        states = [*self.inventory.layers(), *self.inventory.unreferenced]
        staying = [state.usage for state in states if state.usage and id(state.usage) not in known]
        return together(going, staying)

    def _in_time(self, things: int = 1) -> bool:
        """Whether there is time to start more work. Otherwise ``things`` are counted as left for the next run."""
        if self.begun and self.budget.over:
            self.pending += things
            return False
        self.begun = True
        return True

    def _settled(self) -> t.Tuple[int, int]:
        """Free bytes and inodes, after all changes are synced to disk."""
        with contextlib.suppress(NoSpace):
            self.store_ctx.driver.flush()
        found = os.statvfs(self.store_ctx.config.graphroot)
        return found.f_bfree * found.f_frsize, found.f_ffree

    def _remove(self, decision: Decision) -> None:
        entry = self._entry(decision)
        state = self.states[decision.layer_id]

        def unchanged(snapshot: Snapshot) -> None:
            layer = snapshot.layer(decision.layer_id)
            if state.layer is None or layer.raw != state.layer.raw:
                raise StoreError(
                    f"layer {decision.layer_id[:12]}",
                    "was changed during the task",
                    "Run this again.",
                )

        try:
            seconds = remove_mapped_layer(self.store_ctx, decision.layer_id, unchanged)
        except LayerInUse as error:
            # Another program uses it since the plan was made, which is not a failure.
            self.kept.append({**entry, "rule": "in_use", "reason": str(error)})
        except NoSpace:
            self.no_room.append(decision)
        except (StorageError, OSError) as error:
            self.failed.append({**entry, "reason": str(error)})
        else:
            # A layer that another program removed meanwhile does not count as removed by this run.
            if seconds is not None:
                self.removed.append(entry)
                self.gone.append(state.usage)

    def _remove_image(self, item: Superseded) -> None:
        entry = self._image_entry(item)
        try:
            layers = remove_image(self.store_ctx, item.image.id, superseded_images.refuse_used)
        except LayerInUse as error:
            self.kept_images.append({**entry, "rule": "in_use", "reason": str(error)})
        except (StorageError, OSError) as error:
            self.failed.append({**entry, "reason": str(error)})
        else:
            if layers is not None:
                self._count_image(item, layers)

    def _count_image(self, item: Superseded, layers: t.Sequence[str]) -> None:
        """Add an image to those that were removed, or would be removed in check mode."""
        self.removed_images.append(self._image_entry(replace(item, layers=tuple(layers))))
        self.gone += [self.usages.get(layer_id) for layer_id in layers]

    def _repair(self, finding: Finding, decision: Decision) -> None:
        entry = _finding_entry(finding, decision)
        try:
            if finding.kind == "entry":
                self._drop_entry(finding.name)
            elif finding.kind in ("directory", "link"):
                self._drop_orphan(finding.name)
            elif remove_mapped_layer(self.store_ctx, finding.name, self._still(finding)) is None:
                return
        except LayerInUse as error:
            self.reported.append({**entry, "rule": "in_use", "reason": str(error)})
        except (StorageError, OSError) as error:
            self.failed.append({**entry, "reason": str(error)})
        else:
            self.repaired.append(entry)
            self.gone.append(finding.usage)

    def _still(self, finding: Finding) -> t.Callable[[Snapshot], None]:
        """Check under the locks that the layer has not changed."""
        state = self.states.get(finding.name)
        mark = mark_of(state.layer) if state and state.layer else ""

        def check(snapshot: Snapshot) -> None:
            layer = snapshot.layer(finding.name)
            changed = bool(mark) and mark != mark_of(layer)
            if finding.kind == INCOMPLETE:
                changed = changed or not layer.incomplete
            elif finding.kind == UNREFERENCED:
                changed = changed or bool(snapshot.images_of_layer(finding.name))
            if changed:
                raise LayerInUse(f"layer {finding.name[:12]}", "came into use during the task")

        return check

    def _drop_entry(self, layer_id: str) -> None:
        with self.store_ctx.store.transaction() as transaction:
            if layer_id in transaction.snapshot.layers:
                raise LayerInUse(f"layer {layer_id[:12]}", "has a record now")
            transaction.drop_mapped_layer(layer_id)

    def _drop_orphan(self, path: str) -> None:
        store, driver = self.store_ctx.store, self.store_ctx.driver
        with (
            store.trash("orphan", self.store_ctx.destroy) as trash,
            store.transaction() as transaction,
        ):
            # Under the lock, no program can be creating a layer from it.
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
            # Their notes are about to be deleted.
            end_removals(self.store_ctx, self.store_ctx.store.snapshot())
            sweep(self.store_ctx)
        except (StorageError, OSError) as error:
            for path, entry in wanted.items():
                if os.path.lexists(path):
                    self.failed.append({**entry, "reason": str(error)})
        self.repaired += [entry for path, entry in wanted.items() if not os.path.lexists(path)]
        self.gone += [
            finding.usage
            for finding, _decision in made.repairs
            if finding.name in wanted and not os.path.lexists(finding.name)
        ]

    # Results

    def _entry(self, decision: Decision) -> t.Dict[str, t.Any]:
        state = self.states[decision.layer_id]
        idle = self.idle.get(decision.layer_id)
        return {
            "id": decision.layer_id,
            "image_ids": [image.id for image in state.images],
            "image_names": [name for image in state.images for name in image.names],
            "uidmap": state.mapping.uid.to_strings(),
            "gidmap": state.mapping.gid.to_strings(),
            "size": decision.size,
            **_bounds(state.usage),
            "inodes": decision.inodes,
            "unused_seconds": None if idle is None else round(idle),
            "rule": decision.rule,
            "wanted_by": list(decision.wanted_by),
            "reason": decision.reason,
            "origin": "ours" if state.ours else "runtime",
            "containers": [container_result(container) for container in state.containers],
        }

    def _image_entry(self, item: Superseded) -> t.Dict[str, t.Any]:
        usages = [usage for usage in map(self.usages.get, item.layers) if usage]
        return {
            "id": item.image.id,
            "former_names": superseded_images.former_names(item.image),
            "superseded": None if item.since is None else format_time(item.since),
            "layers": list(item.layers),
            "size": sum(usage.exclusive for usage in usages),
            "inodes": sum(usage.inodes for usage in usages),
            "rule": item.rule,
            "reason": item.reason,
        }

    def _target_met(self, made: Plan) -> bool:
        if self.request.check or self.pending or not made.targets:
            return made.target_met
        gone = {
            "bytes": sum(entry["size"] for entry in self.removed),
            "inodes": sum(entry["inodes"] for entry in self.removed),
        }
        return all(gone[target.unit] >= target.wanted for target in made.targets)

    def _diff(self) -> t.Dict[str, t.Any]:
        gone = {entry["id"] for entry in (*self.removed, *self.removed_images)}
        layers = [item for item in (*self.removed, *self.kept, *self.failed) if "uidmap" in item]
        images = [
            item
            for item in (*self.removed_images, *self.kept_images, *self.failed)
            if "former_names" in item
        ]
        return {
            side: {
                "mapped_layers": _shown(layers, excluded, "image_names", "uidmap", "gidmap"),
                "superseded_images": _shown(images, excluded, "former_names"),
            }
            for side, excluded in (("before", set()), ("after", gone))
        }


def _shown(
    entries: t.Iterable[t.Dict[str, t.Any]], excluded: t.Collection[str], *keys: str
) -> t.List[t.Dict[str, t.Any]]:
    return [
        {key: entry[key] for key in ("id", *keys)}
        for entry in sorted(entries, key=lambda item: str(item["id"]))
        if entry["id"] not in excluded
    ]


def _with_ids(policy: Policy, snapshot: Snapshot) -> Policy:
    """Replace image references that are no patterns by the IDs of the images that podman would use."""

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


def _is_own_layer(state: LayerState) -> bool:
    return any(image.layer == state.layer_id for image in state.images)


def _users(state: LayerState) -> t.Tuple[str, ...]:
    return tuple(f"container {container.name}" for container in state.containers) + tuple(
        f"layer {layer_id[:12]}" for layer_id in state.child_layers
    )


def _layer_finding(kind: str, state: LayerState, ours: bool) -> Finding:
    return Finding(
        kind=kind,
        name=state.layer_id,
        image_ids=tuple(image.id for image in state.images),
        created=state.created,
        users=_users(state),
        template=_is_own_layer(state),
        ours=ours and kind in (INCOMPLETE, UNREFERENCED),
        size=state.usage.exclusive if state.usage else 0,
        inodes=state.usage.inodes if state.usage else 0,
        usage=state.usage,
    )


def _incomplete(snapshot: Snapshot, layer: Layer) -> Finding:
    containers = snapshot.containers_on(layer.id)
    own = {container.layer for container in containers}
    users = [f"container {container.name}" for container in containers] + [
        f"layer {child.id[:12]}" for child in snapshot.children(layer.id) if child.id not in own
    ]
    return Finding(
        kind=INCOMPLETE,
        name=layer.id,
        created=layer.created.timestamp() if layer.created else None,
        users=tuple(users),
        template=any(image.layer == layer.id for image in snapshot.images.values()),
    )


def _bounds(usage: t.Optional[Usage]) -> t.Dict[str, int]:
    """The minimum and maximum of the bytes that a removal frees."""
    return {
        "size_min": usage.least if usage else 0,
        "size_max": usage.most if usage else 0,
    }


def _finding_entry(finding: Finding, decision: Decision) -> t.Dict[str, t.Any]:
    return {
        "kind": finding.kind,
        "id": os.path.basename(finding.name),
        "path": finding.name if finding.name.startswith("/") else None,
        "image_ids": list(finding.image_ids),
        "size": finding.size,
        **_bounds(finding.usage),
        "inodes": finding.inodes,
        "rule": decision.rule,
        "reason": decision.reason,
    }
