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
from ..store.snapshot import Snapshot
from ..userns.declared import returns
from . import gc_policy, inventory_results, superseded_images
from .cleanup import Abandoned, end_removals, keep_reserve, sweep, waiting_removals
from .contradictions import contradictory, examine, shown
from .gc_candidates import (
    candidate,
    dependents_by_layer,
    incomplete_finding,
    is_own_layer,
    layer_finding,
    orphan_finding,
)
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
from .gc_results import LATER, GcResults, Space, unmet_targets
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
_NO_ROOM = (
    "the filesystem is full, and the store has neither a reserve nor files of its own that could "
    "be removed. Delete a file of "
    "1 MB elsewhere on the filesystem, then run layer_gc again"
)


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
        self.policy = _with_image_ids(policy, snapshot)
        self.policy = replace(self.policy, shared=self._readers())
        self.inventory: Inventory = take(store_ctx, (), EXCLUSIVE)
        self.moment = moment
        self.now = moment.wall
        self.states = {
            mapped_layer.layer_id: mapped_layer for mapped_layer in self.inventory.mapped_layers()
        }
        self.states.update((item.layer_id, item) for item in self.inventory.unreferenced)
        # The observed seconds for which each layer has been unused.
        self.idle: t.Dict[str, t.Optional[float]] = {}
        self.results = GcResults(self.inventory, self.states, self.idle)
        # Removals that failed because the disk is full.
        self.no_room: t.List[Decision] = []
        self.budget = WorkBudget(request.deadline, request.awaited)
        self.pending = 0
        # Each run does at least one thing, however short its time limit is.
        self.begun = False
        self.seconds_planning = 0.0

    def carry_out(self) -> t.Dict[str, t.Any]:
        watched = self._watch()
        candidates = self._candidates()
        before = self._disk()
        protection = self._store_protection()
        made = plan(
            candidates, self._findings(), self.policy, before, watched, self.now, protection
        )
        images = superseded_images.decide(
            self.store_ctx.store.view(), self.policy, watched, self.now, self.states, protection
        )
        going_images = [item for item in images if item.remove]
        self.seconds_planning = time.monotonic() - self.started
        results = self.results
        for item in images:
            if not item.remove:
                results.add_kept_image(item)
        for decision in made.kept:
            results.add_kept(decision)
        for finding, decision in made.findings_kept:
            results.add_finding(finding, decision)
        has_work = bool(made.removals or made.repairs or going_images)
        if self.request.check:
            if has_work:
                self._require_writable_filesystem()
            self._predict(made, going_images)
        else:
            if has_work:
                self.store_ctx.store.require_tested()
                self._apply(made, going_images)
                self.store_ctx.ensure_still_there()
                # So that the next run does not find missing layers.
                with contextlib.suppress(NoSpace):
                    record_use(self.store_ctx, self.store_ctx.store.snapshot(), self.moment)
            keep_reserve(self.store_ctx)
        result: t.Dict[str, t.Any] = {
            **results.fields(),
            "target_met": self._target_met(made),
            "partial": self.pending > 0,
            "remaining": self.pending,
            "seconds_planning": round(self.seconds_planning, 3),
            "notes": list(made.notes),
            "would_free": [],
            "contradictions": shown(self.contradictions),
            "store": self.store_ctx.describe(),
        }
        if protection is not None:
            self._report_store_protection(result, protection[1])
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
            result["warnings"].append(unmet_targets(made))
        if results.failures:
            result["error"] = results.error()
        return result

    def _predict(self, made: Plan, going_images: t.Sequence[Superseded]) -> None:
        """Add everything that a run would remove, and the space that this would free, to the results."""
        for decision in made.removals:
            self.results.add_removed(decision)
        for finding, decision in made.repairs:
            self.results.add_repaired(finding, decision)
        planned = {decision.layer_id for decision in made.removals}
        for item in going_images:
            layers = [layer_id for layer_id in item.layers if layer_id not in planned]
            self.results.add_removed_image(item, layers)
        found = self.results.expected()
        self.results.space = Space(found.exclusive, found.inodes, found.least, found.most)

    def _store_protection(self) -> t.Optional[t.Tuple[str, str]]:
        """Why nothing may be removed from this store at all, as rule and reason."""
        if self.contradictions:
            return "contradictions", "the records of the store are inconsistent"
        image_store = self.store_ctx.config.imagestore
        if image_store:
            return "read_only", f"its images are stored separately in imagestore {image_store}"
        return None

    def _require_writable_filesystem(self) -> None:
        """Check that the filesystem is not mounted read-only, so that check mode predicts the failure.

        :raises PermissionDenied: it is mounted read-only
        """
        graphroot = self.store_ctx.config.graphroot
        with translate_oserror(graphroot):
            if os.statvfs(graphroot).f_flag & os.ST_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), graphroot)

    def _report_store_protection(self, result: t.Dict[str, t.Any], reason: str) -> None:
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
        dependents = dependents_by_layer(self.states)
        unusable = MapUsability(self.store_ctx)
        newer = [state for state in self.inventory.unreferenced if state.status == NEWER]
        return [
            candidate(
                state,
                state.layer,
                self.idle.get(state.layer_id),
                dependents.get(state.layer_id, ()),
                unusable.reason(state.mapping),
            )
            for state in (*self.inventory.mapped_layers(), *newer)
            if state.layer is not None
            and state.status not in (MISSING, INCOMPLETE, DAMAGED)
            and not self._is_repaired(state)
            and not is_own_layer(state)
        ]

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
                found.append(layer_finding(kind, state, state.layer_id in ours))
        for layer in snapshot.layers.values():
            if layer.incomplete and not layer.read_only_store and layer.id not in seen:
                found.append(incomplete_finding(snapshot, layer))
        found += [
            orphan_finding(orphan)
            for orphan in self.inventory.orphans
            if orphan.path not in waiting
        ]
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
        results = self.results
        for decision in made.removals:
            if self._in_time():
                self._remove(decision)
            else:
                results.add_kept(decision, **LATER)
        if results.removed:
            # On a full disk, a removal frees the space that other removals need.
            failed, self.no_room = self.no_room, []
            for decision in failed:
                self._remove(decision)
        for decision in self.no_room:
            results.add_failed(decision, _NO_ROOM)
        for item in images:
            if self._in_time():
                self._remove_image(item)
            else:
                results.add_kept_image(item, **LATER)
        leftovers = [repair for repair in made.repairs if repair[0].kind in LEFTOVERS]
        for finding, decision in made.repairs:
            if finding.kind in LEFTOVERS:
                continue
            if self._in_time():
                self._repair(finding, decision)
            else:
                results.add_finding(finding, decision, **LATER)
        if leftovers and self._in_time(len(leftovers)):
            self._sweep(leftovers)
        elif leftovers:
            for finding, decision in leftovers:
                results.add_finding(finding, decision, **LATER)
        expected = results.expected().exclusive
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
        size, inodes = max(after[0] - before[0], 0), max(after[1] - before[1], 0)
        results.space = Space(size, inodes, size, size)

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
            self.results.add_kept(decision, rule="in_use", reason=str(error))
        except NoSpace:
            self.no_room.append(decision)
        except (StorageError, OSError) as error:
            self.results.add_failed(decision, str(error))
        else:
            # A layer that another program removed meanwhile does not count as removed by this run.
            if seconds is not None:
                self.results.add_removed(decision)

    def _remove_image(self, item: Superseded) -> None:
        try:
            layers = remove_image(self.store_ctx, item.image.id, superseded_images.refuse_used)
        except LayerInUse as error:
            self.results.add_kept_image(item, rule="in_use", reason=str(error))
        except (StorageError, OSError) as error:
            self.results.add_failed_image(item, str(error))
        else:
            if layers is not None:
                self.results.add_removed_image(item, layers)

    def _repair(self, finding: Finding, decision: Decision) -> None:
        try:
            if finding.kind == "entry":
                self._drop_entry(finding.name)
            elif finding.kind in ("directory", "link"):
                self._drop_orphan(finding.name)
            elif remove_mapped_layer(self.store_ctx, finding.name, self._still(finding)) is None:
                return
        except LayerInUse as error:
            self.results.add_finding(finding, decision, rule="in_use", reason=str(error))
        except (StorageError, OSError) as error:
            self.results.add_failed_finding(finding, decision, str(error))
        else:
            self.results.add_repaired(finding, decision)

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

    def _sweep(self, leftovers: t.Sequence[t.Tuple[Finding, Decision]]) -> None:
        try:
            # Their notes are about to be deleted.
            end_removals(self.store_ctx, self.store_ctx.store.snapshot())
            sweep(self.store_ctx)
        except (StorageError, OSError) as error:
            for finding, decision in leftovers:
                if os.path.lexists(finding.name):
                    self.results.add_failed_finding(finding, decision, str(error))
        for finding, decision in leftovers:
            if not os.path.lexists(finding.name):
                self.results.add_repaired(finding, decision)

    def _target_met(self, made: Plan) -> bool:
        if self.request.check or self.pending or not made.targets:
            return made.target_met
        return self.results.reached(made)


def _with_image_ids(policy: Policy, snapshot: Snapshot) -> Policy:
    """Replace image references that are no patterns by the IDs of the images that podman would use."""

    def resolved(references: t.Tuple[str, ...]) -> t.Tuple[str, ...]:
        found = []
        for reference in references:
            if not _MAGIC.intersection(reference):
                with contextlib.suppress(ImageUnknown):
                    reference = snapshot.resolve_image(reference).id
            found.append(reference)
        return tuple(found)

    return replace(policy, images=resolved(policy.images), keep_images=resolved(policy.keep_images))
