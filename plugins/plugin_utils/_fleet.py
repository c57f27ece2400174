# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""What the role report has gathered, as one fleet: hosts, their stores, images, and sums of these."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ._amounts import human

OK, PARTLY, FAILED, UNREACHABLE, SILENT = "ok", "partly", "failed", "unreachable", "silent"
# What wants looking at comes first.
_ORDER = {UNREACHABLE: 0, FAILED: 1, SILENT: 2, PARTLY: 3, OK: 4}

Facts = t.Mapping[str, t.Any]


@dataclass
class Sums:
    """Bytes and counts. What is on disk is what would go with the layers."""

    recorded: int = 0
    on_disk: int = 0
    mapped_recorded: int = 0
    mapped_on_disk: int = 0
    inodes: int = 0
    mapped_layers: int = 0
    images: int = 0
    freed: int = 0
    freed_layers: int = 0
    missing: int = 0

    def add(self, other: Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def mapped_kept(self) -> int:
        """Bytes of mapped layers that would stay."""
        return max(self.mapped_on_disk - self.freed, 0)

    @property
    def own(self) -> int:
        """Bytes of the images' own layers."""
        return max(self.on_disk - self.mapped_on_disk, 0)


@dataclass(frozen=True)
class Copy:
    """A mapped layer."""

    map: str
    recorded: int
    on_disk: int
    status: str
    containers: t.Tuple[str, ...]
    last_used: str
    origin: str


@dataclass(frozen=True)
class Image:
    """An image with its mapped layers, in one store."""

    name: str
    copies: t.Tuple[Copy, ...]
    recorded: int
    on_disk: int
    problem: str


@dataclass(frozen=True)
class Removal:
    """What layer_gc would take, and why."""

    image: str
    map: str
    size: int
    reason: str


@dataclass(frozen=True)
class Missing:
    """What prepare would make, or cannot."""

    image: str
    map: str
    reason: str
    size: int
    refused: bool


@dataclass
class Store:
    """One store of a host; of a user, or root's."""

    user: str
    problem: str = ""
    place: str = ""
    images: t.List[Image] = field(default_factory=list)
    removals: t.List[Removal] = field(default_factory=list)
    # Without a policy: what each rule would free.
    prospects: t.List[t.Tuple[str, int, int]] = field(default_factory=list)
    missing: t.List[Missing] = field(default_factory=list)
    notes: t.List[str] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)


@dataclass
class Host:
    """One host, whether it answered or not."""

    name: str
    state: str = OK
    message: str = ""
    stores: t.List[Store] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)


@dataclass
class FleetImage:
    """One image name over all hosts."""

    name: str
    hosts: t.Set[str] = field(default_factory=set)
    copies: int = 0
    recorded: int = 0
    on_disk: int = 0
    freed: int = 0


@dataclass
class Fleet:
    """All hosts that were asked, those that need looking at first, then the fullest."""

    hosts: t.List[Host]
    images: t.List[FleetImage]
    sums: Sums

    def counted(self, *states: str) -> int:
        """How many hosts are in these states."""
        return sum(1 for host in self.hosts if host.state in states)


def fleet(names: t.Iterable[str], facts: t.Mapping[str, Facts]) -> Fleet:
    """Make one fleet of what each host has left in ``report_*``, ``prune_collected`` and ``prepare_made``."""
    hosts = [_host(name, facts[name]) for name in names]
    hosts.sort(key=lambda host: (_ORDER[host.state], -host.sums.on_disk, host.name))
    total = Sums()
    images: t.Dict[str, FleetImage] = {}
    for host in hosts:
        total.add(host.sums)
        for store in host.stores:
            _count_images(images, host, store)
    ranked = sorted(images.values(), key=lambda one: (-one.on_disk, -one.copies, one.name))
    return Fleet(hosts, ranked, total)


def totals(found: Fleet) -> t.Dict[str, int]:
    """What the job's artifacts tell of the fleet."""
    return {
        "hosts": len(found.hosts),
        "hosts_unreachable": found.counted(UNREACHABLE),
        "hosts_failed": found.counted(FAILED, SILENT, PARTLY),
        "images": found.sums.images,
        "mapped_layers": found.sums.mapped_layers,
        "bytes_recorded": found.sums.recorded,
        "bytes_on_disk": found.sums.on_disk,
        "bytes_of_mapped_layers": found.sums.mapped_on_disk,
        "bytes_reclaimable": found.sums.freed,
        "layers_reclaimable": found.sums.freed_layers,
        "layers_missing": found.sums.missing,
    }


def _count_images(images: t.Dict[str, FleetImage], host: Host, store: Store) -> None:
    for image in store.images:
        found = images.setdefault(image.name, FleetImage(image.name))
        found.hosts.add(host.name)
        found.copies += len(image.copies)
        found.recorded += sum(one.recorded for one in image.copies)
        found.on_disk += sum(one.on_disk for one in image.copies)
    for removal in store.removals:
        images.setdefault(removal.image, FleetImage(removal.image)).freed += removal.size


def _host(name: str, facts: Facts) -> Host:
    host = Host(name)
    reached = facts.get("report_reached") or {}
    error = facts.get("report_error") or ""
    results = _results(facts.get("report_found"))
    lost = next((one for one in [reached, *results] if one.get("unreachable")), None)
    if lost is not None:
        host.state, host.message = UNREACHABLE, _text(lost.get("msg"))
        return host
    if not results:
        failed = error or reached.get("failed")
        host.state = FAILED if failed else SILENT
        host.message = _text(error or reached.get("msg") or "It was never asked.")
        return host
    for result in results:
        host.stores.append(_store(result))
    stores = {store.user: store for store in host.stores}
    for result in _results(facts.get("prune_collected")):
        if str(result.get("prune_store")) in stores:
            _collected(stores[str(result["prune_store"])], result)
    made = facts.get("prepare_made") or {}
    for layer in made.get("layers") or ():
        user = str(layer.get("user") or "root")
        if user not in stores:
            stores[user] = Store(user)
            host.stores.append(stores[user])
        _made(stores[user], layer)
    for one in made.get("stores") or ():
        if one.get("error") and str(one.get("user")) in stores:
            stores[str(one["user"])].notes.append(_text(one["error"]))
    if made.get("failed") and not made.get("layers") and not made.get("stores") and host.stores:
        host.stores[0].notes.append(_text(made.get("msg")))
    for store in host.stores:
        host.sums.add(store.sums)
    if error:
        host.state, host.message = PARTLY, _text(error)
    else:
        troubled = [store for store in host.stores if store.problem]
        if troubled:
            host.state = FAILED if len(troubled) == len(host.stores) else PARTLY
            host.message = troubled[0].problem
    return host


def _store(result: Facts) -> Store:
    store = Store(str(result.get("report_store") or "root"))
    described = result.get("store")
    if not described:
        # A host without any store of a user is no trouble: nothing is there to be told.
        if result.get("graphroot") and not result.get("drivers"):
            store.notes.append("There is no store yet.")
        else:
            store.problem = _text(result.get("msg") or result.get("module_stderr"))
        return store
    store.place = (
        f"{described['driver']} on {described['backing_filesystem']}, {described['graphroot']}"
    )
    for image in result.get("images") or ():
        copies = tuple(_copy(one) for one in image.get("mapped_layers") or ())
        own = image.get("layers") or ()
        store.images.append(
            Image(
                name=_name(image),
                copies=copies,
                recorded=sum(_number(one.get("recorded_size")) for one in own),
                on_disk=sum(_number(one.get("size_exclusive")) for one in own),
                problem=_text(image.get("problem")),
            )
        )
    sums = result.get("totals") or {}
    mapped = sums.get("mapped") or {}
    store.sums = Sums(
        recorded=_number(sums.get("recorded")),
        on_disk=_number(sums.get("exclusive")),
        mapped_recorded=_number(mapped.get("recorded")),
        mapped_on_disk=_number(mapped.get("exclusive")),
        inodes=_number(sums.get("inodes")),
        mapped_layers=_number(mapped.get("layers")),
        images=len(store.images),
    )
    orphans = result.get("orphans") or ()
    if orphans:
        size = sum(_number(one.get("size_exclusive")) for one in orphans)
        store.notes.append(f"{len(orphans)} leftovers without a record hold {human(size)}.")
    return store


def _copy(layer: Facts) -> Copy:
    return Copy(
        map=_map(layer),
        recorded=_number(layer.get("recorded_size")),
        on_disk=_number(layer.get("size_exclusive")),
        status=str(layer.get("problem") or layer.get("status") or ""),
        containers=tuple(str(one.get("name")) for one in layer.get("containers") or ()),
        last_used=str(layer.get("last_used") or ""),
        origin=str(layer.get("origin") or ""),
    )


def _collected(store: Store, result: Facts) -> None:
    if "removed" not in result:
        if not store.problem and store.place:
            store.problem = _text(result.get("msg"))
        return
    for one in result["removed"]:
        store.removals.append(
            Removal(
                image=_name(one),
                map=_map(one),
                size=_number(one.get("size")),
                reason=_text(one.get("reason")),
            )
        )
    store.sums.freed = sum(one.size for one in store.removals)
    store.sums.freed_layers = len(store.removals)
    store.notes += [_text(note) for note in result.get("notes") or ()]
    for one in result.get("would_free") or ():
        if one.get("layers"):
            rule = f"{one.get('rule')}: {one.get('value')}"
            store.prospects.append((rule, _number(one["layers"]), _number(one.get("bytes"))))


def _made(store: Store, layer: Facts) -> None:
    action = layer.get("action")
    if action not in ("created", "refused"):
        return
    store.missing.append(
        Missing(
            image=_name(layer, "image_names", "image_id"),
            map=_map(layer),
            reason=_text(layer.get("reason")),
            size=_number(layer.get("size_apparent")),
            refused=action == "refused",
        )
    )
    store.sums.missing += 1


def _results(registered: t.Any) -> t.List[Facts]:
    """The results of a task with a loop; one that never came to its loop has but one result, or none."""
    if not registered:
        return []
    found = registered.get("results")
    if found is None:
        found = [] if registered.get("skipped") else [registered]
    return [one for one in found if not one.get("skipped")]


def _name(entry: Facts, names: str = "", identity: str = "") -> str:
    for key in filter(None, (names, "names", "image_names")):
        if entry.get(key):
            return str(entry[key][0])
    ids = [entry.get(identity)] if identity else entry.get("image_ids") or [entry.get("id")]
    return str((ids or [""])[0] or "")[:12] or "(none)"


def _map(entry: Facts) -> str:
    uid, gid = (", ".join(map(str, entry.get(key) or ())) for key in ("uidmap", "gidmap"))
    return uid if uid == gid else f"{uid} / {gid}"


def _number(value: t.Any) -> int:
    return value if isinstance(value, int) else 0


def _text(value: t.Any) -> str:
    """One line, not too long a one."""
    text = " ".join(str(value or "").split())
    return text if len(text) <= 500 else f"{text[:499]}…"
