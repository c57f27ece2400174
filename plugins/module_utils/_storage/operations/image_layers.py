# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module image_layers: pull or remove an image with all its layers.

The host's own programs copy images. They must not run in the private namespaces of this
library, so :func:`declare` runs outside and enters the store for single steps.
"""

from __future__ import annotations

import contextlib
import typing as t
from dataclasses import dataclass

from ..errors import (
    ConfigError,
    ImageUnknown,
    LayerInUse,
    ReadOnlyStore,
    StorageError,
    StoreUnwritten,
)
from ..kernel import clock
from ..store.fields import Raw
from ..store.records import Image
from ..store.references import DOCKER, LOCAL, parse, recorded
from ..store.snapshot import Snapshot
from ..userns import running as userns
from . import image_conversion, image_forms, inventory_results
from .cleanup import clean_up, keep_reserve
from .contradictions import refuse_contradictions
from .image_removal import layers_of_removal, remove_image, users_of_image
from .image_tools import (
    NO_CREDENTIALS,
    Credentials,
    SourceImage,
    Tools,
    location,
    location_of_unwritten,
    unwritten_store,
)
from .inventory import take
from .layer_removal import removal_hint
from .layer_results import image_result
from .mapping_options import MappingOptions
from .store_opening import OpenStore, StoreRequest, opened
from .usage_tracking import record_use

MISSING, NEWER, ALWAYS = "missing", "newer", "always"


@dataclass(frozen=True)
class ImagesRequest:
    """What a task declares.

    :param images: the image's names; with ``absent`` also IDs and digests
    :param source: the source in skopeo's notation; empty: the registry of the name
    :param pull: ``missing``, ``newer`` or ``always``
    :param measure: as in image_layers_info
    :param check: only predict the changes
    :param credentials: for the registries of the images
    :param mapping: the user namespace whose map the own layers of the image should carry; None for any map
    :param convert: change the layers of existing images with another map in place
    """

    store: StoreRequest
    images: t.Tuple[str, ...]
    source: str = ""
    state: str = "present"
    pull: str = MISSING
    measure: str = "apparent"
    check: bool = False
    credentials: Credentials = NO_CREDENTIALS
    mapping: t.Optional[MappingOptions] = None
    convert: bool = False


@dataclass(frozen=True)
class _Step:
    """A step inside the store."""

    store: StoreRequest
    images: t.Tuple[str, ...]
    measure: str = "none"
    write: bool = True


def declare(request: ImagesRequest) -> t.Dict[str, t.Any]:
    """Ensure the requested state of the image.

    :returns: the module's result
    :raises StorageError: the image cannot be copied or removed
    """
    account = request.store.account
    if request.state == "absent":
        step = _Step(request.store, request.images, request.measure, not request.check)
        result: t.Dict[str, t.Any] = userns.run(remove, (step,), account)
        return result
    names = tuple(dict.fromkeys(_full_name(item, request.source) for item in request.images))
    groups = [names] if request.source else [(name,) for name in names]
    forms = _Forms(request, request.mapping) if request.mapping is not None else None
    converted = _convert(request, groups, forms)
    steps = [_present(request, group, converted, forms) for group in groups]
    result = {
        "changed": any(item["changed"] for item in steps),
        "images": [image for item in steps for image in item["images"]],
        "actions": [action for item in steps for action in item["actions"]],
        "store": steps[0]["store"],
        "diff": {
            side: {"images": [entry for item in steps for entry in item["diff"][side]["images"]]}
            for side in ("before", "after")
        },
    }
    if request.mapping is not None:
        mappings = [entry for item in steps for entry in item["mappings"]]
        refused = [item for item in mappings if item["status"] == image_forms.DIFFERENT]
        result["mappings"] = mappings
        result["conversions"] = converted.conversions
        if refused:
            message = " ".join(dict.fromkeys(item["reason"] for item in refused))
            several = f"{len(refused)} of {len(mappings)} images failed. "
            result["error"] = f"{several if len(mappings) > 1 else ''}{message}"
    return result


def _full_name(name: str, source: str) -> str:
    """The name that will be recorded.

    :raises ConfigError: it is an ID or a digest, which cannot be pulled, or no reference
    """
    if name.startswith("sha256:"):
        raise ConfigError(
            f"image {name!r}", "is an ID, which cannot be used as an image name", "Write NAME:TAG."
        )
    # Images from files get the registry localhost; without a source, images come from a registry.
    return recorded(name, LOCAL if source else DOCKER)


# Present


class _Forms:
    """Compares the maps of images with the map that a task requests."""

    def __init__(self, request: ImagesRequest, mapping: MappingOptions) -> None:
        self._request = request
        self._mapping = mapping
        # The versions that programs reported, so that they run once for all images.
        self.programs: t.Dict[str, str] = {}

    def examine(self, image_id: str, chain: t.Tuple[str, ...] = ()) -> t.Dict[str, t.Any]:
        """The form of an image; see :func:`image_forms.examine`."""
        store = self._request.store
        step = image_forms.FormRequest(store, self._mapping, image_id, chain, self.programs)
        form: t.Dict[str, t.Any] = userns.run(image_forms.examine, (step,), store.account)
        self.programs = form.pop("programs")
        return form


@dataclass(frozen=True)
class _Brought:
    """The result of copying an image.

    :ivar image_id: the ID of the image for the names; it is in the store, except in check mode; None if nothing
        was copied
    :ivar form: the result of ``image_forms.examine``, if its layers should carry a map
    :ivar described: the ID of the image that ``form`` describes
    """

    image_id: t.Optional[str]
    form: t.Optional[t.Dict[str, t.Any]] = None
    described: str = ""

    @property
    def fits(self) -> bool:
        """Whether its layers carry the requested map, if any."""
        return self.form is None or bool(self.form["fits"])


@dataclass(frozen=True)
class _Converted:
    """The images that were converted in place, or would be.

    :ivar conversions: as returned by the module
    :ivar before: the previous maps of the top layer of each image, by image ID
    """

    conversions: t.List[t.Dict[str, t.Any]]
    before: t.Dict[str, t.Dict[str, t.Any]]

    def corrected(self, form: t.Dict[str, t.Any]) -> t.Dict[str, t.Any]:
        """The form in check mode after the conversion of the layers."""
        layers = {layer for item in self.conversions for layer in item["layers"]}
        return image_forms.with_map(form, layers) if layers else form


def _convert(
    request: ImagesRequest, groups: t.Sequence[t.Tuple[str, ...]], forms: t.Optional[_Forms]
) -> _Converted:
    """Convert images with another map to the requested map, all of them together, because they may
    share layers.

    :param groups: the names of each image
    """
    account = request.store.account
    found = _Converted([], {})
    if forms is None or not request.convert:
        return found
    by_map: t.Dict[t.Tuple[t.Tuple[str, ...], ...], t.List[str]] = {}
    for names in groups:
        current = userns.run(look, (_Step(request.store, names),), account)["current"]
        form = forms.examine(current) if current else None
        if form is not None and not form["fits"] and current not in found.before:
            maps = (tuple(form["uidmap"]), tuple(form["gidmap"]))
            by_map.setdefault(maps, []).append(current)
            top = form["layers"][0]
            found.before[current] = {"uidmap": top["uidmap"], "gidmap": top["gidmap"]}
    for (uidmap, gidmap), images in by_map.items():
        asked = image_conversion.ConversionRequest(
            request.store, tuple(images), uidmap, gidmap, request.check
        )
        done = userns.run(image_conversion.declare, (asked,), account)
        found.conversions.append({"images": images, **done})
    return found


def _present(
    request: ImagesRequest,
    names: t.Tuple[str, ...],
    converted: _Converted,
    forms: t.Optional[_Forms],
) -> t.Dict[str, t.Any]:
    account = request.store.account
    source = request.source or f"docker://{names[0]}"
    found = userns.run(look, (_Step(request.store, names),), account)
    tools = Tools.at(request.store, found, request.credentials)
    current: t.Optional[str] = found["current"]
    if forms is None:
        brought = _Brought(_bring(request, tools, source, names, current))
    else:
        # Existing layers decide about the map of an image that is pulled onto them.
        reuses = bool(found["layers"])
        brought = _bring_mapped(request, converted, forms, tools, source, names, current, reuses)
    image_id = brought.image_id
    actions: t.List[str] = ["converted"] if current in converted.before else []
    lacking = [name for name in names if found["holders"].get(name) != image_id]
    if image_id != current:
        actions.append("pulled")
        lacking = lacking[1:] if lacking[:1] == [names[0]] else lacking
    if lacking and brought.fits:
        actions.append("tagged")
        if not request.check and image_id:
            userns.run(tag, (_Step(request.store, (image_id, *lacking)),), account)
    shown = (image_id,) if image_id else ()
    known = not request.check or image_id == current
    after = userns.run(
        report,
        (_Step(request.store, shown if known else (), request.measure, not request.check),),
        account,
    )
    gained = names if brought.fits else names[:1]
    maps_before = converted.before.get(current or "", {})
    maps_after = {key: brought.form[key] for key in maps_before} if brought.form else {}
    result = {
        "changed": bool(actions),
        "images": after["images"],
        "actions": actions,
        "store": after["store"],
        "diff": {
            "before": {
                "images": [{"id": current, "names": found["names"], **maps_before}]
                if current
                else []
            },
            "after": {
                "images": [
                    {
                        "id": image_id,
                        "names": [
                            *(found["names"] if image_id == current else ()),
                            *(name for name in gained if actions and name not in found["names"]),
                        ],
                        **maps_after,
                    }
                ]
                if image_id
                else []
            },
        },
    }
    if brought.form is not None:
        result["mappings"] = [image_forms.entry(brought.form, brought.described, names)]
    return result


def _bring(
    request: ImagesRequest,
    tools: Tools,
    source: str,
    names: t.Sequence[str],
    current: t.Optional[str],
) -> t.Optional[str]:
    """Copy the source's image if requested; returns the ID of the image for the names."""
    if request.pull == MISSING and current is not None:
        return current
    image_id = current
    if request.pull == NEWER or request.check:
        image_id = tools.source_image(source).image_id
    if not request.check and (current is None or request.pull == ALWAYS or image_id != current):
        image_id = _copy(request, tools, source, names[0])
    return image_id


def _copy(request: ImagesRequest, tools: Tools, source: str, name: str) -> t.Optional[str]:
    tools.copy(source, name)
    found = userns.run(look, (_Step(request.store, (name,)),), request.store.account)
    current: t.Optional[str] = found["current"]
    return current


def _bring_mapped(
    request: ImagesRequest,
    converted: _Converted,
    forms: _Forms,
    tools: Tools,
    source: str,
    names: t.Sequence[str],
    current: t.Optional[str],
    reuses: bool,
) -> _Brought:
    """As :func:`_bring`, with layers that carry a map.

    Nothing is pulled if existing layers of the store would prevent the image from getting the map.

    :param reuses: whether the store has layers that the image may share
    """
    if request.pull == MISSING and current is not None:
        form = converted.corrected(forms.examine(current))
        return _Brought(current, form, current)
    asks = request.check or request.pull == NEWER or (reuses and tools.can_describe)
    image = tools.source_image(source) if asks else SourceImage("", ())
    if request.pull != ALWAYS and image.image_id == current:
        form = converted.corrected(forms.examine(image.image_id))
        return _Brought(current, form, image.image_id)
    chain = image_forms.chain_ids(image.diff_ids)
    form = converted.corrected(forms.examine(image.image_id, chain))
    if not form["fits"]:
        return _Brought(current, form, image.image_id)
    if request.check:
        return _Brought(image.image_id, form, image.image_id)
    if form["uidmap"] or form["gidmap"]:
        pulled = tools.pull(source, form["uidmap"], form["gidmap"])
        step = _PulledStep(request.store, pulled, names[0], form["holders"])
        userns.run(name_pulled, (step,), request.store.account)
    else:
        pulled = _copy(request, tools, source, names[0]) or ""
    return _Brought(pulled, forms.examine(pulled), pulled)


@userns.returns(inventory_results.IMAGES_LOOKED_UP)
def look(step: _Step) -> t.Dict[str, t.Any]:
    """The image with these names, and the location of the store."""
    try:
        return _look(step)
    except StoreUnwritten as error:
        return {
            "holders": {},
            "current": None,
            "names": [],
            "layers": False,
            **location_of_unwritten(step.store, error),
        }


def _look(step: _Step) -> t.Dict[str, t.Any]:
    with opened(step.store) as store_ctx:
        snapshot = store_ctx.store.snapshot()
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
            "layers": bool(snapshot.layers),
            **location(store_ctx.config),
        }


@userns.returns(inventory_results.IMAGES_REPORTED)
def report(step: _Step) -> t.Dict[str, t.Any]:
    """The images as image_layers_info returns them. Also updates the ledger."""
    try:
        return _report(step)
    except StoreUnwritten as error:
        return {"images": [], "store": unwritten_store(step.store, error.facts)}


def _report(step: _Step) -> t.Dict[str, t.Any]:
    with opened(step.store) as store_ctx:
        found = (
            take(store_ctx, step.images, step.measure, removals=True).images if step.images else []
        )
        if step.write:
            with contextlib.suppress(StorageError, OSError):
                record_use(store_ctx, store_ctx.store.view(), clock.now(), begin=False)
        return {"images": [image_result(item) for item in found], "store": store_ctx.describe()}


@userns.returns(inventory_results.NOTHING)
def tag(step: _Step) -> None:
    """Assign names to the image with the given ID, and remove them from other images."""
    image_id, names = step.images[0], step.images[1:]
    with opened(step.store) as store_ctx, store_ctx.store.transaction() as transaction:
        losers = [
            image.id
            for image in transaction.snapshot.images.values()
            if image.id != image_id and not image.store and set(names).intersection(image.names)
        ]
        # All at once, because runtimes would pull a name that no image has.
        transaction.update_images(
            {
                **dict.fromkeys(losers, lambda raw: _drop_names(raw, names)),
                image_id: lambda raw: _add_names(raw, names),
            }
        )


@dataclass(frozen=True)
class _PulledStep:
    """An image that a runtime pulled under names of its own choice.

    :param name: the requested name
    :param holders: the images with the names of the store before the pull, by name
    """

    store: StoreRequest
    image: str
    name: str
    holders: t.Mapping[str, str]


@userns.returns(inventory_results.NOTHING)
def name_pulled(step: _PulledStep) -> None:
    """Set the name of a pulled image; other names from the pull are returned to their previous images.

    :raises ImageUnknown: the image was removed
    """
    with opened(step.store) as store_ctx, store_ctx.store.transaction() as transaction:
        images = transaction.snapshot.images
        image = images.get(step.image)
        if image is None:
            raise ImageUnknown(
                f"image {step.name}",
                "was removed while the task pulled it",
                "Run the task again when no other program removes images.",
            )
        extra = [
            name
            for name in image.names
            if name != step.name and step.holders.get(name) != step.image
        ]
        drops = {step.image: extra}
        adds = {step.image: [] if step.name in image.names else [step.name]}
        for other in images.values():
            if other.id != step.image and not other.store:
                drops[other.id] = [step.name] if step.name in other.names else []
                adds[other.id] = [name for name in extra if step.holders.get(name) == other.id]
        transaction.update_images(
            {
                image_id: _renaming(drops[image_id], adds[image_id])
                for image_id in drops
                if drops[image_id] or adds[image_id]
            }
        )


def _renaming(drop: t.Sequence[str], add: t.Sequence[str]) -> t.Callable[[Raw], None]:
    def change(raw: Raw) -> None:
        if drop:
            _drop_names(raw, drop)
        if add:
            _add_names(raw, add)

    return change


def _drop_names(raw: Raw, names: t.Container[str]) -> None:
    left = [item for item in raw.get("names") or () if item not in names]
    if left:
        raw["names"] = left
    else:
        raw.pop("names", None)


def _add_names(raw: Raw, names: t.Sequence[str]) -> None:
    """Add names as containers/storage does: the history has the newest name first, without duplicates."""
    raw["names"] = list(dict.fromkeys([*(raw.get("names") or ()), *names]))
    history = raw.get("names-history") or ()
    raw["names-history"] = list(dict.fromkeys([*reversed(names), *history]))


# Absent


@userns.returns(inventory_results.IMAGES_REMOVED)
def remove(step: _Step) -> t.Dict[str, t.Any]:
    """Remove images by name, ID or digest. If an image has other names, only the given name is removed."""
    try:
        with opened(step.store) as store_ctx:
            removal = _Removal(store_ctx, step)
            return removal.carry_out()
    except StoreUnwritten as error:
        return {
            "changed": False,
            "images": [],
            "actions": [],
            "removed_layers": [],
            "store": unwritten_store(step.store, error.facts),
            "diff": {"before": {"images": []}, "after": {"images": []}},
        }


class _Removal:
    def __init__(self, store_ctx: OpenStore, step: _Step) -> None:
        self.store_ctx = store_ctx
        self.step = step
        self.snapshot = store_ctx.store.snapshot()
        self.actions: t.List[str] = []
        self.layers: t.List[str] = []

    def carry_out(self) -> t.Dict[str, t.Any]:
        if self.step.write and clean_up(self.store_ctx, self.snapshot):
            self.snapshot = self.store_ctx.store.snapshot()
        to_remove, names = self._planned_changes()
        if to_remove or names:
            self.store_ctx.store.require_tested()
        if to_remove:
            refuse_contradictions(self.store_ctx)
        for image_id in to_remove:
            _refuse(self.snapshot, self.snapshot.images[image_id])
        concerned = tuple(dict.fromkeys([*to_remove, *names]))
        found = (
            take(self.store_ctx, concerned, self.step.measure, removals=True).images
            if concerned
            else []
        )
        before = [_brief(self.snapshot, item) for item in concerned]
        for image_id, gone in names.items():
            self._untag(image_id, gone)
        for image_id in to_remove:
            self._remove(image_id)
        after = [
            {
                "id": item["id"],
                "names": [name for name in item["names"] if name not in names[item["id"]]],
            }
            for item in before
            if item["id"] in names
        ]
        if self.step.write:
            self.store_ctx.ensure_still_there()
            with contextlib.suppress(StorageError, OSError):
                record_use(self.store_ctx, self.store_ctx.store.view(), clock.now(), begin=False)
            if self.actions:
                keep_reserve(self.store_ctx)
        return {
            "changed": bool(self.actions),
            "images": [image_result(item) for item in found],
            "actions": self.actions,
            "removed_layers": self.layers,
            "store": self.store_ctx.describe(),
            "diff": {"before": {"images": before}, "after": {"images": after}},
        }

    def _planned_changes(self) -> t.Tuple[t.List[str], t.Dict[str, t.List[str]]]:
        """The images to remove, and the names to remove from other images."""
        to_remove: t.List[str] = []
        names: t.Dict[str, t.List[str]] = {}
        for reference in self.step.images:
            try:
                image = self.snapshot.resolve_image(reference)
            except ImageUnknown:
                continue
            if image.store:
                raise ReadOnlyStore(
                    f"image {reference}",
                    f"is in the read-only store {image.store}",
                    "Remove it in that store.",
                )
            name = _name_meant(reference, image)
            if name:
                names.setdefault(image.id, []).append(name)
            elif image.id not in to_remove:
                to_remove.append(image.id)
        for image_id, gone in list(names.items()):
            if image_id in to_remove or set(self.snapshot.images[image_id].names) <= set(gone):
                del names[image_id]
                if image_id not in to_remove:
                    to_remove.append(image_id)
        return to_remove, names

    def _untag(self, image_id: str, names: t.List[str]) -> None:
        if self.step.write:
            with self.store_ctx.store.transaction() as transaction:
                if image_id not in transaction.snapshot.images:
                    return
                transaction.update_image(image_id, lambda raw: _drop_names(raw, names))
        self.actions.append("untagged")

    def _remove(self, image_id: str) -> None:
        if not self.step.write:
            self.actions.append("removed")
            self.layers += layers_of_removal(self.snapshot, self.snapshot.images[image_id])
            return
        layers = remove_image(self.store_ctx, image_id, _refuse)
        if layers is not None:
            self.actions.append("removed")
            self.layers += layers


def _brief(snapshot: Snapshot, image_id: str) -> t.Dict[str, t.Any]:
    return {"id": image_id, "names": list(snapshot.images[image_id].names)}


def _name_meant(reference: str, image: Image) -> str:
    """The recorded name of a reference; empty for an ID or a digest."""
    text = reference.strip()
    bare = text[len("sha256:") :] if text.startswith("sha256:") else text
    if image.id.startswith(bare) or "@" in text or text in image.digests:
        return ""
    if text in image.names:
        return text
    try:
        reference_parts = parse(text)
    except ConfigError:
        return ""
    full = f"{reference_parts.repository}:{reference_parts.tag or 'latest'}"
    alike = (
        (full,)
        if reference_parts.domain
        else tuple(name for name in image.names if name.endswith(f"/{full}"))
    )
    return next((name for name in alike if name in image.names), "")


def _refuse(snapshot: Snapshot, image: Image) -> None:
    """Raise an error if an image cannot be removed.

    :raises LayerInUse: containers use it; each is named
    """
    containers = users_of_image(snapshot, image)
    if containers:
        named = ", ".join(f"{container.name} ({container.id[:12]})" for container in containers)
        raise LayerInUse(
            f"image {(image.names or (image.id[:12],))[0]}",
            f"is in use by container {named}",
            removal_hint(containers, snapshot.podman),
            image_id=image.id,
            users=[{"id": container.id, "name": container.name} for container in containers],
        )
