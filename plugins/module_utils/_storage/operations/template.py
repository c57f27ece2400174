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
from .asking import Asker, Question, Wanted
from .building import Building, label, template_of
from .moments import age
from .opening import OpenStore, StoreRequest, opened
from .removing import refuse_if_used, remove_mapped_layer
from .tidying import tidy
from .watching import watch

CREATED = "created"
EXISTING = "existing"
REMOVED = "removed"
NOT_NEEDED = "not_needed"
REFUSED = "refused"


@dataclass(frozen=True)
class TemplateRequest:
    """What a task declares.

    :param images: names, IDs or digests
    :param state: "present" or "absent"
    :param force: make the layer even where the runtime shifts IDs
    :param overflow: give IDs outside the map to the overflow ID instead of refusing them
    :param lease: for how long (an age such as "30d") a new layer is kept though nobody uses it
    :param check: only say what would be done
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


@dataclass
class Entry:
    """What became of one image and one map."""

    image: Image
    question: Question
    action: str = REFUSED
    reason: str = ""
    layer_id: str = ""
    template_id: str = ""
    staged: t.Optional[Staged] = None
    seconds: float = 0.0
    lock_seconds: float = 0.0
    error: t.Optional[StorageError] = None

    @property
    def mapping(self) -> Mapping:
        """The map, as the runtime writes it."""
        return self.question.mapping

    def result(self) -> t.Dict[str, t.Any]:
        """The entry as the module returns it."""
        staged = self.staged
        return {
            "image_id": self.image.id,
            "image_names": list(self.image.names),
            "layer_id": self.layer_id,
            "template_id": self.template_id,
            "uidmap": self.mapping.uid.to_strings(),
            "gidmap": self.mapping.gid.to_strings(),
            "action": self.action,
            "reason": self.reason,
            "strategy": staged.strategy if staged else None,
            "files": staged.files if staged else None,
            "size_apparent": staged.apparent if staged else None,
            "size_exclusive": staged.exclusive if staged else None,
            "seconds": round(self.seconds, 3),
            "lock_seconds": round(self.lock_seconds, 4),
        }


def declare(request: TemplateRequest) -> t.Dict[str, t.Any]:
    """Bring the mapped layers of ``request`` into the wanted state.

    Bad input fails before anything is changed. From there on one refused image does not stop the others; the
    result then has an ``error``.

    :returns: the module's result
    :raises StorageError: an image, a map or the store itself is not what it should be
    """
    with opened(request.store) as place:
        return _Task(request, place).carry_out()


class _Task:
    """One request against one open store."""

    def __init__(self, request: TemplateRequest, place: OpenStore) -> None:
        self._request = request
        self._place = place
        self._asker = Asker(place, request.wanted)
        self._snapshot = place.store.snapshot()
        self._lease = time.time() + age("lease", request.lease) if request.lease else None

    def carry_out(self) -> t.Dict[str, t.Any]:
        act = self._present if self._request.state == "present" else self._absent
        images = self._images()
        entries = [
            Entry(image, question)
            for image in images
            for question in self._asker.questions(self._snapshot, image)
        ]
        before = {label(image): _maps(self._snapshot, image) for image in images}
        after = {name: list(maps) for name, maps in before.items()}
        if not self._request.check and tidy(self._place, self._snapshot):
            self._snapshot = self._place.store.snapshot()
        for entry in entries:
            started = time.monotonic()
            try:
                act(entry)
            except StorageError as error:
                entry.action, entry.reason, entry.error = REFUSED, str(error), error
            entry.seconds = time.monotonic() - started
            _apply(after[label(entry.image)], entry)
        changed = any(entry.action in (CREATED, REMOVED) for entry in entries)
        if not self._request.check:
            self._note_use(changed)
        result: t.Dict[str, t.Any] = {
            "changed": changed,
            "layers": [entry.result() for entry in entries],
            "store": self._place.describe(
                bool(entries) and all(entry.question.shifting.shifts for entry in entries)
            ),
            "diff": {"before": before, "after": after},
        }
        refused = [entry.error for entry in entries if entry.error]
        if refused:
            result["error"] = " ".join(str(error) for error in refused)
            if len(entries) > 1:
                result["error"] = f"{len(refused)} of {len(entries)} refused. {result['error']}"
        return result

    def _note_use(self, changed: bool) -> None:
        """Keep the ledger; a run that changes nothing begins none. What it cannot note is no fault."""
        with contextlib.suppress(StorageError, OSError):
            watch(self._place, self._place.store.snapshot(), time.time(), begin=changed)

    def _images(self) -> t.List[Image]:
        """The images asked for, each once, in the order asked."""
        images: t.Dict[str, Image] = {}
        for reference in self._request.images:
            try:
                image = self._snapshot.resolve_image(reference)
            except ImageUnknown:
                if self._request.state == "absent":
                    continue
                raise
            images.setdefault(image.id, image)
        return list(images.values())

    def _present(self, entry: Entry) -> None:
        image, snapshot = entry.image, self._snapshot
        if not image.layer:
            entry.action, entry.reason = NOT_NEEDED, "The image has no layers."
            return
        if entry.mapping.identity:
            entry.action, entry.reason = NOT_NEEDED, _sentence(entry.question.shifting.reason)
            return
        template = template_of(snapshot, image)
        entry.template_id = template.id
        building = Building(
            self._place,
            image,
            entry.mapping,
            self._request.strategy,
            self._request.overflow,
            self._lease,
        )
        found = building.equal_layer(snapshot)
        damage = building.damage(snapshot, found) if found else None
        if found and damage is None:
            entry.action, entry.layer_id = EXISTING, found.id
            entry.reason = "A layer with this map is in place."
            return
        if found:
            refuse_if_used(snapshot, found.id)
        shifting = entry.question.shifting
        if shifting.shifts and not self._request.force:
            entry.action = NOT_NEEDED
            entry.reason = f"{_sentence(shifting.reason)} {shifting.advice}"
            return
        if not shifting.usable:
            raise MapError(f"map {entry.mapping}", shifting.reason, shifting.advice)
        read_only = image.store or template.read_only_store
        if read_only:
            raise ReadOnlyStore(
                f"image {label(image)}",
                f"lies in the read-only store {read_only}, where no mapped layer can be kept",
                "Each container maps it for itself there. Pull it into the store itself to pre-map it.",
                store=read_only,
            )
        if self._request.check:
            entry.staged = building.predict(snapshot)
            entry.action = CREATED
        else:
            outcome = building.make()
            entry.layer_id, entry.staged = outcome.layer_id, outcome.staged
            entry.lock_seconds = outcome.lock_seconds
            entry.action = CREATED if outcome.staged else EXISTING
        if entry.staged is None:
            entry.reason = "A layer with this map came while it was being made."
        elif damage:
            entry.reason = f"The layer with this map was damaged: {damage}."
        else:
            staged = entry.staged
            entry.reason = f"{_sentence(shifting.reason)} By {staged.strategy}: {staged.reason}."

    def _absent(self, entry: Entry) -> None:
        image = entry.image
        found = [
            layer_id
            for layer_id in image.mapped_layers
            if layer_id in self._snapshot.layers
            and self._snapshot.layers[layer_id].mapping.same_form(entry.mapping)
        ]
        if not found:
            entry.action, entry.reason = NOT_NEEDED, "There is no layer with this map."
            return
        entry.layer_id, entry.template_id = found[0], image.layer
        for layer_id in found:
            refuse_if_used(self._snapshot, layer_id)
        if not self._request.check:
            entry.lock_seconds = sum(
                remove_mapped_layer(self._place, layer_id).lock_seconds for layer_id in found
            )
        entry.action, entry.reason = REMOVED, "No container uses the layer."


def _sentence(clause: str) -> str:
    return f"{clause[:1].upper()}{clause[1:]}."


def _maps(snapshot: Snapshot, image: Image) -> t.List[t.Dict[str, t.List[str]]]:
    """The maps of an image's mapped layers, as a diff shows them."""
    return [
        _as_diff(snapshot.layers[layer_id].mapping)
        for layer_id in image.mapped_layers
        if layer_id in snapshot.layers
    ]


def _apply(maps: t.List[t.Dict[str, t.List[str]]], entry: Entry) -> None:
    """Bring what a diff shows of an image up to date with what became of one map."""
    this = _as_diff(entry.mapping)
    if entry.action == CREATED and this not in maps:
        maps.append(this)
    if entry.action == REMOVED:
        maps[:] = [one for one in maps if one != this]


def _as_diff(mapping: Mapping) -> t.Dict[str, t.List[str]]:
    return {"uidmap": mapping.uid.to_strings(), "gidmap": mapping.gid.to_strings()}
