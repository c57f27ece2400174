# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module layer_template: create or remove mapped layers of images."""

from __future__ import annotations

import contextlib
import os
import time
import typing as t
from dataclasses import dataclass, replace

from ..drivers.base import Staged
from ..errors import ImageUnknown, MapError, ReadOnlyStore, StorageError, size_text
from ..idmap.mapping import Mapping
from ..kernel import clock
from ..runtime.detect import Runtime
from ..runtime.shifting import Shifting
from ..store import conf_crio
from ..store.config import CRI_O, OPTION
from ..store.records import Image, recorded_size
from ..store.snapshot import Snapshot
from ..tree.tree_tools import Suspended
from ..userns.declared import returns
from ..userns.shapes import Items, Record, whole
from . import results
from .cleanup import clean_up, keep_reserve
from .contradictions import commands_of, refuse_contradictions
from .layer_building import TREE_TOOLS, Building, template_of
from .layer_removal import refuse_if_used, remove_mapped_layer, users_of
from .mapping_options import MappingOptions
from .mapping_resolver import MappingResolver, ResolvedMapping
from .store_opening import OpenStore, StoreRequest, configured, opened
from .time_formats import age
from .usage_tracking import record_use
from .work_budget import WorkBudget

CREATED = "created"
EXISTING = "existing"
REMOVED = "removed"
NOT_NEEDED = "not_needed"
REFUSED = "refused"
PENDING = "pending"


@dataclass(frozen=True)
class TemplateRequest:
    """What a task declares.

    :param images: names, IDs or digests
    :param state: "present" or "absent"
    :param force: create the layer even if the runtime shifts IDs
    :param overflow: map IDs outside the map to the overflow ID instead of refusing them
    :param lease: the time (an age such as "30d") for which a new layer is kept even if unused
    :param check: only predict the changes
    :param deadline: when to stop, on the monotonic clock; 0 for never. The next run resumes partial work
    :param awaited: also stop when nobody reads standard output any more
    """

    store: StoreRequest
    images: t.Tuple[str, ...]
    mappings: t.Tuple[MappingOptions, ...]
    state: str = "present"
    strategy: str = "auto"
    force: bool = False
    overflow: bool = False
    lease: str = ""
    check: bool = False
    deadline: float = 0.0
    awaited: bool = False


@dataclass
class Entry:
    """The result for an image and a map.

    :param names: the image's names; the reference if no image matches it
    :param image: None if no image matches
    :param resolved: None if the map is not possible
    """

    names: t.List[str]
    image: t.Optional[Image] = None
    resolved: t.Optional[ResolvedMapping] = None
    action: str = REFUSED
    reason: str = ""
    layer_id: str = ""
    template_id: str = ""
    staged: t.Optional[Staged] = None
    size_expected: t.Optional[int] = None
    seconds: float = 0.0
    lock_seconds: float = 0.0
    error: t.Optional[StorageError] = None
    progress: t.Optional[t.Dict[str, float]] = None
    made_progress: bool = False

    def refuse(self, error: StorageError) -> None:
        """Mark the layer as refused."""
        self.action, self.reason, self.error = REFUSED, str(error), error

    def result(self, user: str) -> t.Dict[str, t.Any]:
        """The entry as the module returns it."""
        staged, resolved = self.staged, self.resolved
        return {
            "user": user,
            "image_id": self.image.id if self.image else "",
            "image_names": self.names,
            "layer_id": self.layer_id,
            "template_id": self.template_id,
            "uidmap": resolved.mapping.uid.to_strings() if resolved else [],
            "gidmap": resolved.mapping.gid.to_strings() if resolved else [],
            "action": self.action,
            "reason": self.reason,
            "advice": resolved.shifting.advice if resolved else "",
            "strategy": staged.strategy if staged else None,
            "files": staged.files if staged else None,
            "size_expected": self.size_expected,
            "size_apparent": staged.apparent if staged else None,
            "size_exclusive": staged.exclusive if staged else None,
            "seconds": round(self.seconds, 3),
            "lock_seconds": round(self.lock_seconds, 4),
            "progress": self.progress,
        }


@returns(results.TEMPLATE)
def declare(request: TemplateRequest) -> t.Dict[str, t.Any]:
    """Ensure the requested state of the mapped layers.

    Read errors are raised before anything is changed. After that, a refused pair of image and map does not
    stop the others; the result then has an ``error``, and its ``facts`` if there is only one.

    :returns: the module's result
    :raises StorageError: a map is malformed, or the store cannot be used
    """
    with opened(request.store, TREE_TOOLS, request.check) as store_ctx:
        return _Task(request, store_ctx).carry_out()


@returns(Record({"result": results.TEMPLATE, "mappings": Items(whole)}))
def declare_with_mappings(request: TemplateRequest) -> t.Dict[str, t.Any]:
    """As :func:`declare`; ``mappings`` has the index in ``request.mappings`` of each of the result's layers."""
    with opened(request.store, TREE_TOOLS, request.check) as store_ctx:
        task = _Task(request, store_ctx)
        result = task.carry_out()
        found = [entry.resolved.index if entry.resolved else 0 for entry in task.entries]
        return {"result": result, "mappings": found}


class _Task:
    """A request for an open store."""

    def __init__(self, request: TemplateRequest, store_ctx: OpenStore) -> None:
        self._request = request
        self._store_ctx = store_ctx
        # A program that is named for the store is the one that requests the layers.
        self._resolver = MappingResolver(
            store_ctx,
            [
                replace(item, runtime=item.runtime or request.store.runtime)
                for item in request.mappings
            ],
        )
        self._snapshot = store_ctx.store.snapshot()
        self._lease = time.time() + age("lease", request.lease) if request.lease else None
        # Each run does at least one thing, however short its time limit is.
        self._begun = False
        self._examined = False
        self._warnings: t.List[str] = []
        self.entries: t.List[Entry] = []

    def carry_out(self) -> t.Dict[str, t.Any]:
        store_ctx = self._store_ctx
        entries = self.entries = list(self._entries())
        images = {entry.image.id: entry.image for entry in entries if entry.image}.values()
        before = {image.label: _maps(self._snapshot, image) for image in images}
        after = {name: list(maps) for name, maps in before.items()}
        if not self._request.check and clean_up(store_ctx, self._snapshot):
            self._snapshot = store_ctx.store.snapshot()
        for entry in entries:
            self._act(entry)
            if entry.image and entry.resolved:
                _apply(after[entry.image.label], entry.action, entry.resolved.mapping)
        changed = any(
            entry.action in (CREATED, REMOVED) or entry.made_progress for entry in entries
        )
        remaining = sum(entry.action == PENDING for entry in entries)
        if not self._request.check:
            self._note_use(changed)
            if changed:
                keep_reserve(store_ctx)
        user = store_ctx.account.name if store_ctx.account else "root"
        answers = [entry.resolved for entry in entries if entry.resolved]
        shifting = bool(answers) and all(answer.shifting.shifts for answer in answers)
        store = store_ctx.describe(shifting)
        return {
            "changed": changed,
            "layers": [entry.result(user) for entry in entries],
            "partial": remaining > 0,
            "remaining": remaining,
            "store": store,
            "stores": [{"user": user, **store}],
            "warnings": [
                *self._resolver.remarks,
                *self._warnings,
                *self._lifetime(),
                *self._driver_warnings(images),
            ],
            "diff": {"before": before, "after": after},
            **_refusals(entries),
        }

    def _lifetime(self) -> t.Iterator[str]:
        """A warning if the runtime removes the layers by itself, with the alternative."""
        runtimes = [
            self._resolver.runtime(entry.resolved.index)
            for entry in self.entries
            if entry.resolved and entry.action in (CREATED, EXISTING)
        ]
        removing = [item for item in runtimes if item.capabilities.removes_unused_mapped_layers]
        if not removing:
            return
        config = self._store_ctx.config
        if any(map(self._goes_with_containers, self.entries)) and (
            config.sources.get("graphroot") != OPTION or self._is_main_store(removing[0])
        ):
            yield (
                f"{removing[0]} removes a mapped layer together with the last container that uses it, whoever "
                "created the layer. Layers in this store therefore only last until then. Layers in an additional image "
                "store last: see the guide on images that ship with their layers."
            )
        names = [name for entry in self.entries for name in entry.names]
        pause = conf_crio.pause_image(os.environ) or "registry.k8s.io/pause"
        if not any("pause" in name for name in names):
            yield (
                f"Each pod of CRI-O also has a container of the pause image ({pause}) with the same map, which needs a "
                "layer of its own. Add this image to the images."
            )

    def _goes_with_containers(self, entry: Entry) -> bool:
        """Whether the entry has a mapped layer of the store itself, and not of an additional store, nor an image's
        own layer."""
        if entry.action not in (CREATED, EXISTING):
            return False
        layer = self._snapshot.layers.get(entry.layer_id)
        return layer is None or not (layer.read_only_store or entry.layer_id == entry.template_id)

    def _is_main_store(self, runtime: Runtime) -> bool:
        """Whether a runtime creates its containers in this store."""
        with contextlib.suppress(StorageError):
            version = ".".join(map(str, runtime.version))
            own = configured(StoreRequest(runtime=f"{runtime.name} {version}"))
            here = self._store_ctx.config.graphroot
            return os.path.realpath(own.graphroot) == os.path.realpath(here)
        return False

    def _driver_warnings(self, images: t.Iterable[Image]) -> t.Iterator[str]:
        """A warning about the vfs driver, with which mapped layers do not make starts faster."""
        config, account = self._store_ctx.config, self._store_ctx.account
        if config.driver != "vfs" or self._request.state != "present":
            return
        size = sum(
            recorded_size(self._snapshot.chain(image.layer))
            for image in images
            if image.layer in self._snapshot.layers
        )
        reset = commands_of(self._store_ctx).remove_everything(config.graphroot)
        setting = (
            'storage_driver = "overlay" in crio.conf'
            if config.runtime == CRI_O
            else 'driver = "overlay" in storage.conf'
        )
        whose = f" of user {account.name}" if account else ""
        yield (
            f"The store {config.graphroot}{whose} uses the driver vfs. For every container, vfs copies the whole "
            f"image, about {size_text(size)} for these images, even if a mapped layer exists. The driver overlay "
            f"does not. To change the driver, set {setting} and empty the store, which removes "
            f"all containers, images and volumes{whose}: {reset}"
        )

    def _note_use(self, changed: bool) -> None:
        """Update the ledger; a run without changes does not create it. Errors are ignored."""
        with contextlib.suppress(StorageError, OSError):
            snapshot, version_cache = self._store_ctx.store.snapshot(), self._resolver.version_cache
            record_use(
                self._store_ctx, snapshot, clock.now(), begin=changed, programs=version_cache
            )

    def _entries(self) -> t.Iterator[Entry]:
        """The pairs of images and maps without duplicates, in the order of the request."""
        seen: t.Set[str] = set()
        for reference in self._request.images:
            try:
                image = self._snapshot.resolve_image(reference)
            except StorageError as error:
                if self._request.state == "present" or not isinstance(error, ImageUnknown):
                    yield Entry([reference], reason=str(error), error=error)
                continue
            if image.id in seen:
                continue
            seen.add(image.id)
            for answer in self._resolver.answers(self._snapshot, image):
                entry = Entry(list(image.names), image)
                if isinstance(answer, ResolvedMapping):
                    entry.resolved = answer
                else:
                    entry.refuse(answer)
                yield entry

    def _act(self, entry: Entry) -> None:
        """Carry out the request for an entry. A refused entry stays refused."""
        if not entry.image or not entry.resolved:
            return
        act = self._present if self._request.state == "present" else self._absent
        started = time.monotonic()
        try:
            act(entry, entry.image, entry.resolved)
        except StorageError as error:
            entry.refuse(error)
        entry.seconds = time.monotonic() - started

    def _present(self, entry: Entry, image: Image, resolved: ResolvedMapping) -> None:
        snapshot, mapping = self._snapshot, resolved.mapping
        if not image.layer:
            entry.action, entry.reason = NOT_NEEDED, "The image has no layers."
            return
        template = template_of(snapshot, image)
        # A runtime also copies an image whose own layers carry a map for containers without a map.
        plain = template.mapping.identity
        if mapping.identity and plain:
            entry.action, entry.reason = NOT_NEEDED, _sentence(resolved.shifting.reason)
            return
        if mapping.changes_nothing and plain:
            entry.action = NOT_NEEDED
            entry.reason = "The map maps each ID to itself, so the image is used unchanged."
            return
        entry.template_id = template.id
        budget = WorkBudget(self._request.deadline, self._request.awaited)
        building = Building(
            self._store_ctx,
            image,
            mapping,
            self._request.strategy,
            self._request.overflow,
            self._lease,
            budget,
        )
        shifting = resolved.shifting if plain else _of_mapped_image(resolved.shifting)
        if not shifting.usable and (self._request.force or not shifting.shifts):
            # Even an existing layer: the runtime may have created it and then failed to mount it.
            raise MapError(f"map {mapping}", shifting.reason, shifting.advice)
        found = building.equal_layer(snapshot)
        damage = building.damage(snapshot, found) if found else None
        wrong = building.wrong(snapshot, found) if found and damage is None else None
        if found and damage is None and (not wrong or users_of(snapshot, found.id)):
            entry.action, entry.layer_id = EXISTING, found.id
            entry.reason = "A layer with this map exists."
            if wrong:
                self._keep_wrong_layer(entry, image, wrong)
            return
        damage = damage or wrong
        if found:
            refuse_if_used(snapshot, found.id)
            self._refuse_contradictions()
        if shifting.shifts and not self._request.force:
            entry.action = NOT_NEEDED
            entry.reason = f"{_sentence(shifting.reason)} {shifting.advice}"
            return
        read_only = image.store or template.read_only_store
        if read_only:
            raise ReadOnlyStore(
                f"image {image.label}",
                f"lies in the read-only store {read_only}, which cannot store mapped layers",
                f"Create the layer in that store, with graphroot: {read_only} in the task and while the store is "
                "writable, or pull the image into the store itself. Otherwise each container creates its own copy.",
                store=read_only,
            )
        entry.size_expected = recorded_size(snapshot.chain(template.id))
        if self._begun and budget.over:
            entry.action, entry.reason = (
                PENDING,
                "The time limit was reached before this layer was started.",
            )
            return
        try:
            self._make(entry, building, snapshot)
        except Suspended:
            entry.action = PENDING
            entry.reason = "The time limit was reached. The next run continues from here."
            entry.made_progress = budget.made_progress
            if budget.files:
                entry.progress = {
                    "files": budget.files,
                    "bytes": budget.bytes,
                    "bytes_expected": max(entry.size_expected, budget.bytes),
                    "seconds_resuming": round(budget.resume_seconds, 3),
                }
            return
        if entry.staged is None and wrong and found and entry.layer_id == found.id:
            self._keep_wrong_layer(entry, image, wrong)
        elif entry.staged is None:
            entry.reason = "Another program created a layer with this map at the same time."
        elif damage:
            entry.reason = f"The layer with this map was damaged: {damage}."
        else:
            staged = entry.staged
            entry.reason = f"{_sentence(shifting.reason)} By {staged.strategy}: {staged.reason}."

    def _keep_wrong_layer(self, entry: Entry, image: Image, wrong: str) -> None:
        entry.reason = f"A layer with this map is in use, and has names {wrong}."
        self._warnings.append(
            f"Layer {entry.layer_id[:12]} of image {image.label} has names {wrong}. It is in use; remove its "
            "containers and run the task again to recreate it."
        )

    def _make(self, entry: Entry, building: Building, snapshot: Snapshot) -> None:
        self._store_ctx.store.require_tested()
        if self._request.check:
            entry.staged = building.predict(snapshot)
            entry.action = CREATED
            return
        self._begun = True
        outcome = building.make()
        self._store_ctx.ensure_still_there()
        entry.layer_id, entry.staged = outcome.layer_id, outcome.staged
        entry.lock_seconds = outcome.lock_seconds
        entry.action = CREATED if outcome.staged else EXISTING

    def _refuse_contradictions(self) -> None:
        """Refuse to remove a layer from a store whose records contradict each other; checked once."""
        if not self._examined:
            refuse_contradictions(self._store_ctx)
            self._examined = True

    def _absent(self, entry: Entry, image: Image, resolved: ResolvedMapping) -> None:
        found = [
            layer_id
            for layer_id in image.mapped_layers
            if layer_id in self._snapshot.layers
            and self._snapshot.layers[layer_id].mapping.same_form(resolved.mapping)
        ]
        if not found:
            entry.action, entry.reason = NOT_NEEDED, "There is no layer with this map."
            return
        entry.layer_id, entry.template_id = found[0], image.layer
        for layer_id in found:
            refuse_if_used(self._snapshot, layer_id)
        self._refuse_contradictions()
        self._store_ctx.store.require_tested()
        entry.action, entry.reason = REMOVED, "No container uses the layer."
        if self._request.check:
            return
        removals = [remove_mapped_layer(self._store_ctx, layer_id) for layer_id in found]
        self._store_ctx.ensure_still_there()
        held = [seconds for seconds in removals if seconds is not None]
        entry.lock_seconds = sum(held)
        if not held:
            entry.action, entry.reason = (
                NOT_NEEDED,
                "Another program removed the layer at the same time.",
            )


def _of_mapped_image(answer: Shifting) -> Shifting:
    """Whether a runtime shifts IDs on an image whose own layers carry a map: never (containers/storage, store.go)."""
    if not answer.shifts:
        return answer
    return Shifting(
        False,
        "the image's own layers carry another map, so the runtime copies the image for each other map",
        "Remove the image and pull it without a mapping, if most of its containers have no user namespace.",
        answer.reorders_map,
        answer.usable,
    )


def _sentence(clause: str) -> str:
    return f"{clause[:1].upper()}{clause[1:]}."


def _maps(snapshot: Snapshot, image: Image) -> t.List[t.Dict[str, t.List[str]]]:
    """The maps of an image's mapped layers, as a diff shows them."""
    return [
        _as_diff(snapshot.layers[layer_id].mapping)
        for layer_id in image.mapped_layers
        if layer_id in snapshot.layers
    ]


def _apply(maps: t.List[t.Dict[str, t.List[str]]], action: str, mapping: Mapping) -> None:
    """Update the diff of an image with the result for one map."""
    this = _as_diff(mapping)
    if action == CREATED and this not in maps:
        maps.append(this)
    if action == REMOVED:
        maps[:] = [item for item in maps if item != this]


def _as_diff(mapping: Mapping) -> t.Dict[str, t.List[str]]:
    return {"uidmap": mapping.uid.to_strings(), "gidmap": mapping.gid.to_strings()}


def _refusals(entries: t.Sequence[Entry]) -> t.Dict[str, t.Any]:
    """The result's ``error`` and ``facts``; empty if nothing was refused."""
    refused = [entry.error for entry in entries if entry.error]
    if not refused:
        return {}
    # A mapping that cannot be resolved is reported once, not for each image.
    message = " ".join(dict.fromkeys(str(error) for error in refused))
    if len(entries) > 1:
        message = f"{len(refused)} of {len(entries)} layers failed. {message}"
    return {"error": message, "facts": refused[0].facts if len(refused) == 1 else {}}
