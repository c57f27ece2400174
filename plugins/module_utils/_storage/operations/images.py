# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What image_layers does: an image with its layers, present or absent.

Images are brought by the host's own programs, which must not run in the private namespaces of this
library. So :func:`declare` runs outside and enters the store for one step at a time.
"""

from __future__ import annotations

import contextlib
import time
import typing as t
from dataclasses import dataclass

from .. import userns
from ..errors import (
    ConfigError,
    ImageUnknown,
    LayerInUse,
    ReadOnlyStore,
    StorageError,
    StoreUnwritten,
)
from ..store.fields import Raw
from ..store.records import Image
from ..store.snapshot import Snapshot, has_registry, split_tag
from ..store.store import Transaction
from .fetching import Tools
from .inventory import image_result, take
from .opening import OpenStore, StoreRequest, opened
from .removing import condemn, is_condemning, users_of
from .tidying import tidy
from .watching import watch

MISSING, NEWER, ALWAYS = "missing", "newer", "always"


@dataclass(frozen=True)
class ImagesRequest:
    """What a task declares.

    :param images: the image's names; with ``absent`` also IDs and digests
    :param source: where to bring it from, in skopeo's words; empty: from the registry of the name
    :param pull: ``missing``, ``newer`` or ``always``
    :param measure: as image_layers_info has it
    :param check: only say what would be done
    """

    store: StoreRequest
    images: t.Tuple[str, ...]
    source: str = ""
    state: str = "present"
    pull: str = MISSING
    measure: str = "apparent"
    check: bool = False


@dataclass(frozen=True)
class _Step:
    """One entry into the store."""

    store: StoreRequest
    images: t.Tuple[str, ...]
    measure: str = "none"
    write: bool = True


def declare(request: ImagesRequest) -> t.Dict[str, t.Any]:
    """Bring the image into the wanted state.

    :returns: the module's result
    :raises StorageError: the image cannot be had, or cannot go
    """
    account = request.store.account
    if request.state == "absent":
        step = _Step(request.store, request.images, request.measure, not request.check)
        result: t.Dict[str, t.Any] = userns.run(remove, (step,), account)
        return result
    names = tuple(dict.fromkeys(_full_name(one, request.source) for one in request.images))
    if not request.source and len(names) > 1:
        results = [_present(request, (name,)) for name in names]
    else:
        results = [_present(request, names)]
    return {
        "changed": any(one["changed"] for one in results),
        "images": [image for one in results for image in one["images"]],
        "actions": [action for one in results for action in one["actions"]],
        "store": results[0]["store"],
        "diff": {
            side: {"images": [entry for one in results for entry in one["diff"][side]["images"]]}
            for side in ("before", "after")
        },
    }


def _full_name(name: str, source: str) -> str:
    """A name as it will be recorded.

    :raises ConfigError: it is an ID or a digest, by which nothing can be brought
    """
    if "@" in name or name.startswith("sha256:") or not name.strip() or name != name.strip():
        raise ConfigError(
            f"image {name!r}", "is no name that an image could be given", "Write NAME:TAG."
        )
    repository, tag = split_tag(name)
    if not has_registry(repository):
        # What comes from a file is nobody's; what comes without a source comes from a registry.
        place = "localhost" if source else "docker.io"
        if place == "docker.io" and "/" not in repository:
            place += "/library"
        repository = f"{place}/{repository}"
    return f"{repository}:{tag or 'latest'}"


# Present


def _present(request: ImagesRequest, names: t.Tuple[str, ...]) -> t.Dict[str, t.Any]:
    account = request.store.account
    source = request.source or f"docker://{names[0]}"
    found = userns.run(look, (_Step(request.store, names),), account)
    tools = Tools(request.store, found["driver"], found["graphroot"], found["runroot"])
    current: t.Optional[str] = found["current"]
    actions: t.List[str] = []
    wanted = current
    if request.pull != MISSING or current is None:
        if request.pull == NEWER or request.check:
            wanted = tools.image_id(source)
        if current is None or request.pull == ALWAYS or wanted != current:
            if not request.check:
                tools.copy(source, names[0])
                wanted = userns.run(look, (_Step(request.store, names[:1]),), account)["current"]
            if wanted != current:
                actions.append("pulled")
    lacking = [name for name in names if found["holders"].get(name) != wanted]
    if "pulled" in actions:
        lacking = lacking[1:] if lacking[:1] == [names[0]] else lacking
    if lacking:
        actions.append("tagged")
        if not request.check and wanted:
            userns.run(tag, (_Step(request.store, (wanted, *lacking)),), account)
    shown = (wanted,) if wanted else ()
    known = not request.check or wanted == current
    after = userns.run(
        report,
        (_Step(request.store, shown if known else (), request.measure, not request.check),),
        account,
    )
    return {
        "changed": bool(actions),
        "images": after["images"],
        "actions": actions,
        "store": after["store"],
        "diff": {
            "before": {"images": [{"id": current, "names": found["names"]}] if current else []},
            "after": {
                "images": [
                    {
                        "id": wanted,
                        "names": [
                            *(found["names"] if wanted == current else ()),
                            *(name for name in names if actions and name not in found["names"]),
                        ],
                    }
                ]
            },
        },
    }


def look(step: _Step) -> t.Dict[str, t.Any]:
    """Which image has the names, and where the store is; whoever brings the first image writes it."""
    try:
        return _look(step)
    except StoreUnwritten as error:
        return {"holders": {}, "current": None, "names": [], **error.facts}


def _look(step: _Step) -> t.Dict[str, t.Any]:
    with opened(step.store) as place:
        snapshot = place.store.snapshot()
        holders = {
            name: image.id
            for image in reversed(list(snapshot.images.values()))
            for name in image.names
        }
        current = next((holders[name] for name in step.images if name in holders), None)
        return {
            "holders": {name: holders[name] for name in step.images if name in holders},
            "current": current,
            "names": list(snapshot.images[current].names) if current else [],
            "driver": place.config.driver,
            "graphroot": place.config.graphroot,
            "runroot": place.config.runroot,
        }


def report(step: _Step) -> t.Dict[str, t.Any]:
    """The images as image_layers_info tells them; the ledger is kept on the way."""
    try:
        return _report(step)
    except StoreUnwritten as error:
        return {"images": [], "store": _unwritten(step, error)}


def _unwritten(step: _Step, error: StoreUnwritten) -> t.Dict[str, t.Any]:
    """A store that will be, as a result shows it."""
    rootless = step.store.account is not None
    return {**error.facts, "backing_filesystem": "", "rootless": rootless, "shifting": None}


def _report(step: _Step) -> t.Dict[str, t.Any]:
    with opened(step.store) as place:
        found = take(place, step.images, step.measure).images if step.images else []
        if step.write:
            with contextlib.suppress(StorageError, OSError):
                watch(place, place.store.view(), time.time(), begin=False)
        return {"images": [image_result(one) for one in found], "store": place.describe()}


def tag(step: _Step) -> None:
    """Give the image with the first ID the names that follow; whoever has one loses it."""
    image_id, names = step.images[0], step.images[1:]
    with opened(step.store) as place, place.store.transaction() as transaction:
        losers = [
            image.id
            for image in transaction.snapshot.images.values()
            if image.id != image_id and not image.store and set(names).intersection(image.names)
        ]
        # At once, for a name that nobody has would be pulled.
        transaction.update_images(
            {
                **dict.fromkeys(losers, lambda raw: _drop_names(raw, names)),
                image_id: lambda raw: _add_names(raw, names),
            }
        )


def _drop_names(raw: Raw, names: t.Container[str]) -> None:
    left = [one for one in raw.get("names") or () if one not in names]
    if left:
        raw["names"] = left
    else:
        raw.pop("names", None)


def _add_names(raw: Raw, names: t.Sequence[str]) -> None:
    """As containers/storage does it: the history has the newest name first, each once."""
    raw["names"] = list(dict.fromkeys([*(raw.get("names") or ()), *names]))
    history = raw.get("names-history") or ()
    raw["names-history"] = list(dict.fromkeys([*reversed(names), *history]))


# Absent


def remove(step: _Step) -> t.Dict[str, t.Any]:
    """Take images away by name, ID or digest; a name of an image with further names only goes
    itself.
    """
    try:
        with opened(step.store) as place:
            removal = _Removal(place, step)
            return removal.carry_out()
    except StoreUnwritten as error:
        return {
            "changed": False,
            "images": [],
            "actions": [],
            "removed_layers": [],
            "store": _unwritten(step, error),
            "diff": {"before": {"images": []}, "after": {"images": []}},
        }


class _Removal:
    def __init__(self, place: OpenStore, step: _Step) -> None:
        self.place = place
        self.step = step
        self.snapshot = place.store.snapshot()
        self.actions: t.List[str] = []
        self.layers: t.List[str] = []

    def carry_out(self) -> t.Dict[str, t.Any]:
        if self.step.write and tidy(self.place, self.snapshot):
            self.snapshot = self.place.store.snapshot()
        doomed, names = self._wanted()
        for image_id in doomed:
            _refuse(self.snapshot, self.snapshot.images[image_id])
        concerned = tuple(dict.fromkeys([*doomed, *names]))
        found = take(self.place, concerned, self.step.measure).images if concerned else []
        before = [_brief(self.snapshot, one) for one in concerned]
        for image_id, gone in names.items():
            self._untag(image_id, gone)
        for image_id in doomed:
            self._remove(image_id)
        after = [
            {
                "id": one["id"],
                "names": [name for name in one["names"] if name not in names[one["id"]]],
            }
            for one in before
            if one["id"] in names
        ]
        if self.step.write:
            with contextlib.suppress(StorageError, OSError):
                watch(self.place, self.place.store.view(), time.time(), begin=False)
        return {
            "changed": bool(self.actions),
            "images": [image_result(one) for one in found],
            "actions": self.actions,
            "removed_layers": self.layers,
            "store": self.place.describe(),
            "diff": {"before": {"images": before}, "after": {"images": after}},
        }

    def _wanted(self) -> t.Tuple[t.List[str], t.Dict[str, t.List[str]]]:
        """Images to remove, and names to take from images that stay."""
        doomed: t.List[str] = []
        names: t.Dict[str, t.List[str]] = {}
        for reference in self.step.images:
            try:
                image = self.snapshot.resolve_image(reference)
            except ImageUnknown:
                continue
            if image.store:
                raise ReadOnlyStore(
                    f"image {reference}",
                    f"lies in the read-only store {image.store}",
                    "Remove it there.",
                )
            name = _name_meant(reference, image)
            if name:
                names.setdefault(image.id, []).append(name)
            elif image.id not in doomed:
                doomed.append(image.id)
        for image_id, gone in list(names.items()):
            if image_id in doomed or set(self.snapshot.images[image_id].names) <= set(gone):
                del names[image_id]
                if image_id not in doomed:
                    doomed.append(image_id)
        return doomed, names

    def _untag(self, image_id: str, names: t.List[str]) -> None:
        if self.step.write:
            with self.place.store.transaction() as transaction:
                if image_id not in transaction.snapshot.images:
                    return
                transaction.update_image(image_id, lambda raw: _drop_names(raw, names))
        self.actions.append("untagged")

    def _remove(self, image_id: str) -> None:
        if not self.step.write:
            self.actions.append("removed")
            self.layers += _doomed_layers(self.snapshot, self.snapshot.images[image_id])
            return
        store = self.place.store
        with store.trash(image_id, self.place.destroy) as trash:
            try:
                with store.transaction(True) as transaction:
                    self._detach(transaction, image_id, trash)
            except BaseException:
                if is_condemning(trash):
                    # Whoever comes next ends it.
                    store.staging.leave(trash)
                raise

    def _detach(self, transaction: Transaction, image_id: str, trash: str) -> None:
        """The image's record first, then mapped layers, then its own ones from the top down."""
        image = transaction.snapshot.images.get(image_id)
        if image is None:
            return
        _refuse(transaction.snapshot, image)
        self.actions.append("removed")
        layers = _doomed_layers(transaction.snapshot, image)
        condemn(trash, layers)
        transaction.remove_image(image_id, trash)
        for layer_id in layers:
            transaction.mark_incomplete(layer_id)
            self.place.driver.detach(layer_id, trash)
            transaction.remove_layer(layer_id, trash)
            self.layers.append(layer_id)


def _brief(snapshot: Snapshot, image_id: str) -> t.Dict[str, t.Any]:
    return {"id": image_id, "names": list(snapshot.images[image_id].names)}


def _name_meant(reference: str, image: Image) -> str:
    """The recorded name that a reference stands for; empty for an ID or a digest."""
    text = reference.strip()
    bare = text[len("sha256:") :] if text.startswith("sha256:") else text
    if image.id.startswith(bare) or "@" in text or text in image.digests:
        return ""
    if text in image.names:
        return text
    repository, tag_ = split_tag(text)
    ending = f"/{repository}:{tag_ or 'latest'}"
    return next((one for one in image.names if f"/{one}".endswith(ending)), "")


def _refuse(snapshot: Snapshot, image: Image) -> None:
    """Raise when an image cannot go.

    :raises LayerInUse: containers use it; each is named
    """
    containers = {one.id: one for one in snapshot.containers_of(image.id)}
    for layer_id in image.candidates:
        if [one.id for one in snapshot.images_of_layer(layer_id)] == [image.id]:
            containers.update((one.id, one) for one in snapshot.containers_on(layer_id))
    if containers:
        named = ", ".join(f"{one.name} ({one.id[:12]})" for one in containers.values())
        raise LayerInUse(
            f"image {(image.names or (image.id[:12],))[0]}",
            f"is in use by container {named}",
            "Remove them first: podman ps --all --external shows those that podman did not make.",
            image_id=image.id,
            users=[{"id": one.id, "name": one.name} for one in containers.values()],
        )


def _doomed_layers(snapshot: Snapshot, image: Image) -> t.List[str]:
    """The layers that go with an image: mapped ones before its own, those that others need kept."""
    going: t.List[str] = []

    def free(layer_id: str) -> bool:
        layer = snapshot.layers.get(layer_id)
        if layer is None or layer.read_only_store:
            return False
        others = [one for one in snapshot.images_of_layer(layer_id) if one.id != image.id]
        users = [one for one in users_of(snapshot, layer_id) if one["id"] not in going]
        return not others and not users

    for layer_id in image.mapped_layers:
        if layer_id != image.layer and layer_id not in going and free(layer_id):
            going.append(layer_id)
    layer_id = image.layer
    while layer_id and layer_id not in going and free(layer_id):
        going.append(layer_id)
        layer_id = snapshot.layers[layer_id].parent
    return going
