# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""The data that the role report collects, as a fleet: hosts, stores, images and totals."""

from __future__ import annotations

import fnmatch
import re
import typing as t
from dataclasses import dataclass, field

from ._amounts import human
from ._values import Facts, Malformed, dict_of, dicts_of, list_of, number_of, results_of, text_of

OK, PARTLY, FAILED, UNREACHABLE, SILENT = "ok", "partly", "failed", "unreachable", "silent"
# Problems come first.
_ORDER = {UNREACHABLE: 0, FAILED: 1, SILENT: 2, PARTLY: 3, OK: 4}


@dataclass
class Sums:
    """Bytes and counts. Bytes on disk are those that removing the layers would free."""

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
    saved: int = 0

    def add(self, other: Sums) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def mapped_kept(self) -> int:
        """Bytes of mapped layers that would be kept."""
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
    """An image in a store with its mapped layers.

    :ivar map: the map that the image's own layers carry; empty if they carry none
    :ivar identity_copy: bytes of the copy for containers without a user namespace, which only an image with a map needs
    """

    name: str
    copies: t.Tuple[Copy, ...]
    recorded: int
    on_disk: int
    problem: str
    map: str = ""
    identity_copy: int = 0


@dataclass(frozen=True)
class Removal:
    """A layer that layer_gc would remove, and the reason."""

    image: str
    map: str
    size: int
    reason: str


@dataclass(frozen=True)
class Missing:
    """A layer that prepare would create, or cannot create."""

    image: str
    map: str
    reason: str
    size: int
    refused: bool


@dataclass
class Store:
    """A store of a host, of root or of a user."""

    user: str
    problem: str = ""
    location: str = ""
    images: t.List[Image] = field(default_factory=list)
    removals: t.List[Removal] = field(default_factory=list)
    # Without a policy: the space that each rule would free.
    prospects: t.List[t.Tuple[str, int, int]] = field(default_factory=list)
    missing: t.List[Missing] = field(default_factory=list)
    notes: t.List[str] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)


@dataclass
class Host:
    """A host, reachable or not."""

    name: str
    state: str = OK
    message: str = ""
    stores: t.List[Store] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)


@dataclass
class FleetImage:
    """An image name on all hosts."""

    name: str
    hosts: t.Set[str] = field(default_factory=set)
    copies: int = 0
    recorded: int = 0
    on_disk: int = 0
    freed: int = 0


@dataclass
class Fleet:
    """All hosts: first those with problems, then by used space."""

    hosts: t.List[Host]
    images: t.List[FleetImage]
    sums: Sums

    def counted(self, *states: str) -> int:
        """The number of hosts in these states."""
        return sum(1 for host in self.hosts if host.state in states)


def fleet(names: t.Iterable[str], facts: t.Mapping[str, Facts]) -> Fleet:
    """Create a fleet from each host's variables ``report_*``, ``prune_collected`` and ``prepare_made``."""
    hosts = [_host_or_error(name, facts) for name in names]
    hosts.sort(key=lambda host: (_ORDER[host.state], -host.sums.on_disk, host.name))
    total = Sums()
    images: t.Dict[str, FleetImage] = {}
    for host in hosts:
        total.add(host.sums)
        for store in host.stores:
            _count_images(images, host, store)
    ranked = sorted(images.values(), key=lambda item: (-item.on_disk, -item.copies, item.name))
    return Fleet(hosts, ranked, total)


def totals(found: Fleet) -> t.Dict[str, int]:
    """The summary of the fleet for the artifacts of a job."""
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
        "bytes_saved_by_sharing": found.sums.saved,
    }


def _count_images(images: t.Dict[str, FleetImage], host: Host, store: Store) -> None:
    for image in store.images:
        found = images.setdefault(image.name, FleetImage(image.name))
        found.hosts.add(host.name)
        found.copies += len(image.copies)
        found.recorded += sum(copy.recorded for copy in image.copies)
        found.on_disk += sum(copy.on_disk for copy in image.copies)
    for removal in store.removals:
        images.setdefault(removal.image, FleetImage(removal.image)).freed += removal.size


def _host_or_error(name: t.Any, facts: t.Mapping[str, Facts]) -> Host:
    """A host, or the fault of its variables, which must not affect the report about other hosts."""
    shown = text_of(name)
    try:
        return _host(shown, dict_of(facts[name], "hostvars"))
    except Malformed as error:
        cause = str(error)
    except Exception as error:  # Reading a host's variables may run any code, such as a lookup.
        cause = f"{type(error).__name__}: {text_of(str(error))}"
    return Host(
        shown,
        FAILED,
        f"The variables of this host cannot be read. {text_of(cause)}. Run the role report again.",
    )


def _host(name: str, facts: Facts) -> Host:
    host = Host(name)
    reached = dict_of(facts.get("report_reached"), "report_reached")
    error = facts.get("report_error") or ""
    results = results_of(facts.get("report_found"), "report_found")
    lost = next((item for item in [reached, *results] if item.get("unreachable")), None)
    if lost is not None:
        host.state, host.message = UNREACHABLE, _unreachable(lost.get("msg"))
        return host
    if not results:
        failed = error or reached.get("failed")
        host.state = FAILED if failed else SILENT
        host.message = text_of(error or reached.get("msg") or "The host was not examined.")
        return host
    for result in results:
        host.stores.append(_store(result))
    stores = {store.user: store for store in host.stores}
    for result in results_of(facts.get("report_shared_found"), "report_shared_found"):
        host.stores.append(_shared_store(result))
    for result in results_of(facts.get("prune_collected"), "prune_collected"):
        if text_of(result.get("prune_store")) in stores:
            _collected(stores[text_of(result["prune_store"])], result)
    made = dict_of(facts.get("prepare_made"), "prepare_made")
    for layer in dicts_of(made, "layers", "prepare_made"):
        user = text_of(layer.get("user") or "root")
        if user not in stores:
            stores[user] = Store(user)
            host.stores.append(stores[user])
        _made(stores[user], layer)
    for item in dicts_of(made, "stores", "prepare_made"):
        if item.get("error") and text_of(item.get("user")) in stores:
            stores[text_of(item["user"])].notes.append(text_of(item["error"]))
    if made.get("failed") and not made.get("layers") and not made.get("stores") and host.stores:
        host.stores[0].notes.append(text_of(made.get("msg")))
    for store in host.stores:
        host.sums.add(store.sums)
    if error:
        host.state, host.message = PARTLY, text_of(error)
    else:
        troubled = [store for store in host.stores if store.problem]
        if troubled:
            host.state = FAILED if len(troubled) == len(host.stores) else PARTLY
            host.message = troubled[0].problem
    return host


def _unreachable(message: t.Any) -> str:
    """Why a host cannot be reached, without the surrounding text of ssh and Ansible."""
    text = text_of(message)
    connect = re.search(r"connect to host \S+ port (\d+): ([^:]+?)(?: *\\r.*)?$", text)
    if connect:
        return f"ssh: {connect[2].strip()} (port {connect[1]})"
    refused = re.search(
        r"Permission denied \([^()]*\)|Host key verification failed|Connection timed out", text
    )
    if refused:
        return f"ssh: {refused[0]}"
    return re.sub(
        r"^(Data could not be sent to remote host|Failed to connect to the host via ssh)\W*(?:ssh: )?",
        "ssh: ",
        text,
    )


def _store(result: Facts) -> Store:
    store = Store(text_of(result.get("report_store") or "root"))
    described = dict_of(result.get("store"), "store")
    if not described:
        # A host without rootless stores is no problem.
        if result.get("graphroot") and not result.get("drivers"):
            store.notes.append("There is no store yet.")
        else:
            store.problem = text_of(result.get("msg") or result.get("module_stderr"))
        return store
    driver, backing, graphroot = (
        text_of(described.get(key)) for key in ("driver", "backing_filesystem", "graphroot")
    )
    if driver == "vfs":
        store.notes.append(
            "The vfs driver copies the whole image for every container, with or without a mapped layer. "
            "The overlay driver does not."
        )
    store.location = f"{driver} on {backing}, {graphroot}"
    for image in dicts_of(result, "images", "result"):
        mapped_layers = dicts_of(image, "mapped_layers", "image")
        copies = tuple(map(_copy, mapped_layers))
        own = dicts_of(image, "layers", "image")
        store.images.append(
            Image(
                name=_name(image),
                copies=copies,
                recorded=sum(number_of(item.get("recorded_size")) for item in own),
                on_disk=sum(number_of(item.get("size_exclusive")) for item in own),
                problem=text_of(image.get("problem")),
                map=_map(image),
                identity_copy=sum(
                    number_of(item.get("size_exclusive"))
                    for item in mapped_layers
                    if item.get("id") is not None and item["id"] == image.get("identity_copy")
                ),
            )
        )
    sums = dict_of(result.get("totals"), "totals")
    mapped = dict_of(sums.get("mapped"), "totals.mapped")
    store.sums = Sums(
        recorded=number_of(sums.get("recorded")),
        on_disk=number_of(sums.get("exclusive")),
        mapped_recorded=number_of(mapped.get("recorded")),
        mapped_on_disk=number_of(mapped.get("exclusive")),
        inodes=number_of(sums.get("inodes")),
        mapped_layers=number_of(mapped.get("layers")),
        images=len(store.images),
    )
    orphans = dicts_of(result, "orphans", "result")
    if orphans:
        size = sum(number_of(orphan.get("size_exclusive")) for orphan in orphans)
        store.notes.append(f"{len(orphans)} leftovers without a record use {human(size)}.")
    return store


def _shared_store(result: Facts) -> Store:
    """A store of root with shared images, which each user would otherwise have pulled, and copied for each mapping."""
    store = _store(result)
    declared = dict_of(result.get("report_shared"), "report_shared")
    users = dicts_of(declared, "users", "report_shared")
    store.user = "root, shared with users"
    copies = 0
    for user in users:
        patterns = [text_of(item) for item in list_of(user, "images", "report_shared")]
        each = 1 + number_of(user.get("mappings"))
        copies += each
        for image in store.images:
            if any(fnmatch.fnmatch(image.name, pattern) for pattern in patterns):
                store.sums.saved += each * image.on_disk
    store.notes.append(
        f"Shared with {len(users)} users in {copies} mappings. Copies of their own would use {human(store.sums.saved)}."
    )
    return store


def _copy(layer: Facts) -> Copy:
    return Copy(
        map=_map(layer),
        recorded=number_of(layer.get("recorded_size")),
        on_disk=number_of(layer.get("size_exclusive")),
        status=text_of(layer.get("problem") or layer.get("status")),
        containers=tuple(
            text_of(item.get("name")) for item in dicts_of(layer, "containers", "mapped layer")
        ),
        last_used=text_of(layer.get("last_used")),
        origin=text_of(layer.get("origin")),
    )


def _collected(store: Store, result: Facts) -> None:
    if "removed" not in result:
        if not store.problem and store.location:
            store.problem = text_of(result.get("msg"))
        return
    for item in dicts_of(result, "removed", "result of layer_gc"):
        store.removals.append(
            Removal(
                image=_name(item),
                map=_map(item),
                size=number_of(item.get("size")),
                reason=text_of(item.get("reason")),
            )
        )
    store.sums.freed = sum(removal.size for removal in store.removals)
    store.sums.freed_layers = len(store.removals)
    images = dicts_of(result, "removed_images", "result of layer_gc")
    if images:
        size = sum(number_of(item.get("size")) for item in images)
        store.notes.append(
            f"{len(images)} superseded images would be removed, which frees {human(size)}."
        )
    store.notes += [text_of(note) for note in list_of(result, "notes", "result of layer_gc")]
    for item in dicts_of(result, "would_free", "result of layer_gc"):
        if item.get("layers"):
            rule = f"{text_of(item.get('rule'))}: {text_of(item.get('value'))}"
            store.prospects.append((rule, number_of(item["layers"]), number_of(item.get("bytes"))))


def _made(store: Store, layer: Facts) -> None:
    action = layer.get("action")
    if action not in ("created", "refused"):
        return
    store.missing.append(
        Missing(
            image=_name(layer, "image_names", "image_id"),
            map=_map(layer),
            reason=text_of(layer.get("reason")),
            size=number_of(layer.get("size_apparent")),
            refused=action == "refused",
        )
    )
    store.sums.missing += 1


def _name(entry: Facts, names: str = "", identity: str = "") -> str:
    for key in filter(None, (names, "names", "image_names")):
        if list_of(entry, key, "entry"):
            return text_of(entry[key][0])
    ids = (
        [entry.get(identity)]
        if identity
        else list_of(entry, "image_ids", "entry") or [entry.get("id")]
    )
    return text_of(ids[0])[:12] or "(none)"


def _map(entry: Facts) -> str:
    uid, gid = (
        text_of(", ".join(map(text_of, list_of(entry, key, "entry"))))
        for key in ("uidmap", "gidmap")
    )
    return uid if uid == gid else f"{uid} / {gid}"
