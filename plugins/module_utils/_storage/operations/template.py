# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What layer_template does: mapped layers of images, present or absent."""

from __future__ import annotations

import contextlib
import time
import typing as t
from dataclasses import dataclass

from ..drivers.base import Staged
from ..errors import ImageUnknown, MapError, ReadOnlyStore, StorageError
from ..idmap.mapping import Mapping
from ..store.records import Image
from ..store.snapshot import Snapshot
from ..tree.craft import Suspended
from ..tree.workshop import CRAFT
from .asking import Asker, Question, Wanted
from .building import Building, label, template_of
from .moments import age
from .opening import OpenStore, StoreRequest, opened
from .pace import Pace
from .removing import refuse_if_used, remove_mapped_layer
from .tidying import tidy
from .watching import watch

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
    :param force: make the layer even where the runtime shifts IDs
    :param overflow: give IDs outside the map to the overflow ID instead of refusing them
    :param lease: for how long (an age such as "30d") a new layer is kept though nobody uses it
    :param check: only say what would be done
    :param deadline: when to stop, on the monotonic clock; 0 for never. What is half made then is left to the next run
    :param awaited: stop likewise when nobody reads standard output any more
    """

    store: StoreRequest
    images: t.Tuple[str, ...]
    wanted: t.Tuple[Wanted, ...]
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
    """What became of one image and one map.

    :param names: of the image; the reference where no image answers to it
    :param image: None where no image answers
    :param question: None where the map cannot be had
    """

    names: t.List[str]
    image: t.Optional[Image] = None
    question: t.Optional[Question] = None
    action: str = REFUSED
    reason: str = ""
    layer_id: str = ""
    template_id: str = ""
    staged: t.Optional[Staged] = None
    seconds: float = 0.0
    lock_seconds: float = 0.0
    error: t.Optional[StorageError] = None
    progress: t.Optional[t.Dict[str, float]] = None
    further: bool = False

    def refuse(self, error: StorageError) -> None:
        """Nothing becomes of it."""
        self.action, self.reason, self.error = REFUSED, str(error), error

    def result(self, user: str) -> t.Dict[str, t.Any]:
        """The entry as the module returns it."""
        staged, question = self.staged, self.question
        return {
            "user": user,
            "image_id": self.image.id if self.image else "",
            "image_names": self.names,
            "layer_id": self.layer_id,
            "template_id": self.template_id,
            "uidmap": question.mapping.uid.to_strings() if question else [],
            "gidmap": question.mapping.gid.to_strings() if question else [],
            "action": self.action,
            "reason": self.reason,
            "advice": question.shifting.advice if question else "",
            "strategy": staged.strategy if staged else None,
            "files": staged.files if staged else None,
            "size_apparent": staged.apparent if staged else None,
            "size_exclusive": staged.exclusive if staged else None,
            "seconds": round(self.seconds, 3),
            "lock_seconds": round(self.lock_seconds, 4),
            "progress": self.progress,
        }


def declare(request: TemplateRequest) -> t.Dict[str, t.Any]:
    """Bring the mapped layers of ``request`` into the wanted state.

    What cannot be read fails before anything is changed. From there on one refused pair of image and map does not
    stop the others; the result then has an ``error``, and the ``facts`` of it where there is just one.

    :returns: the module's result
    :raises StorageError: a map is malformed, or the store itself is not what it should be
    """
    with opened(request.store, CRAFT) as place:
        return _Task(request, place).carry_out()


class _Task:
    """One request against one open store."""

    def __init__(self, request: TemplateRequest, place: OpenStore) -> None:
        self._request = request
        self._place = place
        self._asker = Asker(place, request.wanted)
        self._snapshot = place.store.snapshot()
        self._lease = time.time() + age("lease", request.lease) if request.lease else None
        # However short the time, a run gets something done.
        self._begun = False

    def carry_out(self) -> t.Dict[str, t.Any]:
        place = self._place
        entries = list(self._entries())
        images = {entry.image.id: entry.image for entry in entries if entry.image}.values()
        before = {label(image): _maps(self._snapshot, image) for image in images}
        after = {name: list(maps) for name, maps in before.items()}
        if not self._request.check and tidy(place, self._snapshot):
            self._snapshot = place.store.snapshot()
        for entry in entries:
            self._act(entry)
            if entry.image and entry.question:
                _apply(after[label(entry.image)], entry.action, entry.question.mapping)
        changed = any(entry.action in (CREATED, REMOVED) or entry.further for entry in entries)
        remaining = sum(entry.action == PENDING for entry in entries)
        if not self._request.check:
            self._note_use(changed)
        user = place.account.name if place.account else "root"
        asked = [entry.question for entry in entries if entry.question]
        shifting = bool(asked) and all(question.shifting.shifts for question in asked)
        store = place.describe(shifting)
        return {
            "changed": changed,
            "layers": [entry.result(user) for entry in entries],
            "partial": remaining > 0,
            "remaining": remaining,
            "store": store,
            "stores": [{"user": user, **store}],
            "diff": {"before": before, "after": after},
            **_refusals(entries),
        }

    def _note_use(self, changed: bool) -> None:
        """Keep the ledger; a run that changes nothing begins none. What it cannot note is no fault."""
        with contextlib.suppress(StorageError, OSError):
            snapshot, said = self._place.store.snapshot(), self._asker.said
            watch(self._place, snapshot, time.time(), begin=changed, programs=said)

    def _entries(self) -> t.Iterator[Entry]:
        """Each image, once, with each of its maps, in the order asked."""
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
            for answer in self._asker.answers(self._snapshot, image):
                entry = Entry(list(image.names), image)
                if isinstance(answer, Question):
                    entry.question = answer
                else:
                    entry.refuse(answer)
                yield entry

    def _act(self, entry: Entry) -> None:
        """Make of an entry what is asked; what was refused stays so."""
        if not entry.image or not entry.question:
            return
        act = self._present if self._request.state == "present" else self._absent
        started = time.monotonic()
        try:
            act(entry, entry.image, entry.question)
        except StorageError as error:
            entry.refuse(error)
        entry.seconds = time.monotonic() - started

    def _present(self, entry: Entry, image: Image, question: Question) -> None:
        snapshot, mapping = self._snapshot, question.mapping
        if not image.layer:
            entry.action, entry.reason = NOT_NEEDED, "The image has no layers."
            return
        if mapping.identity:
            entry.action, entry.reason = NOT_NEEDED, _sentence(question.shifting.reason)
            return
        template = template_of(snapshot, image)
        entry.template_id = template.id
        pace = Pace(self._request.deadline, self._request.awaited)
        building = Building(
            self._place,
            image,
            mapping,
            self._request.strategy,
            self._request.overflow,
            self._lease,
            pace,
        )
        shifting = question.shifting
        if not shifting.usable and (self._request.force or not shifting.shifts):
            # Even one that is there: the runtime may have made it and then failed to mount it.
            raise MapError(f"map {mapping}", shifting.reason, shifting.advice)
        found = building.equal_layer(snapshot)
        damage = building.damage(snapshot, found) if found else None
        if found and damage is None:
            entry.action, entry.layer_id = EXISTING, found.id
            entry.reason = "A layer with this map is in place."
            return
        if found:
            refuse_if_used(snapshot, found.id)
        if shifting.shifts and not self._request.force:
            entry.action = NOT_NEEDED
            entry.reason = f"{_sentence(shifting.reason)} {shifting.advice}"
            return
        read_only = image.store or template.read_only_store
        if read_only:
            raise ReadOnlyStore(
                f"image {label(image)}",
                f"lies in the read-only store {read_only}, where no mapped layer can be kept",
                "Each container maps it for itself there. Pull it into the store itself to pre-map it.",
                store=read_only,
            )
        if self._begun and pace.over:
            entry.action, entry.reason = PENDING, "The time limit was reached before its turn came."
            return
        try:
            self._make(entry, building, snapshot)
        except Suspended:
            entry.action = PENDING
            entry.reason = "The time limit was reached. The next run goes on from here."
            entry.further = pace.further
            if pace.files:
                expected = sum(layer.diff_size or 0 for layer in snapshot.chain(template.id))
                entry.progress = {
                    "files": pace.files,
                    "bytes": pace.bytes,
                    "bytes_expected": max(expected, pace.bytes),
                    "seconds_resuming": round(pace.catching_up, 3),
                }
            return
        if entry.staged is None:
            entry.reason = "A layer with this map came while it was being made."
        elif damage:
            entry.reason = f"The layer with this map was damaged: {damage}."
        else:
            staged = entry.staged
            entry.reason = f"{_sentence(shifting.reason)} By {staged.strategy}: {staged.reason}."

    def _make(self, entry: Entry, building: Building, snapshot: Snapshot) -> None:
        if self._request.check:
            entry.staged = building.predict(snapshot)
            entry.action = CREATED
            return
        self._begun = True
        outcome = building.make()
        entry.layer_id, entry.staged = outcome.layer_id, outcome.staged
        entry.lock_seconds = outcome.lock_seconds
        entry.action = CREATED if outcome.staged else EXISTING

    def _absent(self, entry: Entry, image: Image, question: Question) -> None:
        found = [
            layer_id
            for layer_id in image.mapped_layers
            if layer_id in self._snapshot.layers
            and self._snapshot.layers[layer_id].mapping.same_form(question.mapping)
        ]
        if not found:
            entry.action, entry.reason = NOT_NEEDED, "There is no layer with this map."
            return
        entry.layer_id, entry.template_id = found[0], image.layer
        for layer_id in found:
            refuse_if_used(self._snapshot, layer_id)
        entry.action, entry.reason = REMOVED, "No container uses the layer."
        if self._request.check:
            return
        removals = [remove_mapped_layer(self._place, layer_id) for layer_id in found]
        held = [seconds for seconds in removals if seconds is not None]
        entry.lock_seconds = sum(held)
        if not held:
            entry.action, entry.reason = NOT_NEEDED, "Somebody else has just removed the layer."


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
    """Bring what a diff shows of an image up to date with what became of one map."""
    this = _as_diff(mapping)
    if action == CREATED and this not in maps:
        maps.append(this)
    if action == REMOVED:
        maps[:] = [one for one in maps if one != this]


def _as_diff(mapping: Mapping) -> t.Dict[str, t.List[str]]:
    return {"uidmap": mapping.uid.to_strings(), "gidmap": mapping.gid.to_strings()}


def _refusals(entries: t.Sequence[Entry]) -> t.Dict[str, t.Any]:
    """The result's ``error`` and ``facts``, empty when nothing was refused."""
    refused = [entry.error for entry in entries if entry.error]
    if not refused:
        return {}
    # One mapping that cannot be had is told once, not for each image.
    message = " ".join(dict.fromkeys(str(error) for error in refused))
    if len(entries) > 1:
        message = f"{len(refused)} of {len(entries)} refused. {message}"
    return {"error": message, "facts": refused[0].facts if len(refused) == 1 else {}}
