# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Resolve the mappings of a task to the literal maps that the runtime will request from the store."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import typing as t
from dataclasses import dataclass

from ..errors import ConfigError, MapError, NamespaceError, StorageError
from ..idmap.grammar import Request, UsernsContext, parse_request, resolve_auto_extras
from ..idmap.mapping import UNMAPPED, Mapping
from ..idmap.subids import SubIDs, namespace_mapping, ranges_of, subordinate_ids
from ..kernel import files
from ..runtime import auto
from ..runtime.detect import Runtime, detect, find_program
from ..runtime.forms import context, recorded_form, reuse_form
from ..runtime.shifting import Shifting, shifting
from ..store.config import Account, AutoUserns, StoreConfig
from ..store.records import Image, Layer
from ..store.snapshot import Snapshot
from ..store.store import Store
from .layer_flags import ORIGIN_FLAG
from .mapping_options import MappingOptions
from .store_opening import OpenStore
from .usage_tracking import known_programs

_GROUP_FILE = "/etc/group"
# Bytes; configurations of images have a few kilobytes.
_TEXT_LIMIT = 16 * 1024 * 1024


@dataclass(frozen=True)
class ResolvedMapping:
    """The request of the runtime: the map as it writes it, and whether it needs a layer.

    :ivar index: the index of the requested mapping
    """

    mapping: Mapping
    shifting: Shifting
    index: int = 0


Answer = t.Union[ResolvedMapping, StorageError]


class MappingResolver:
    """Predicts the maps that the runtimes of this host request from a store.

    :raises MapError: a map is malformed
    :raises ConfigError: no runtime is installed, or an unknown one is named
    :raises NamespaceError: the user has no subordinate IDs
    """

    def __init__(self, store_ctx: OpenStore, mappings: t.Iterable[MappingOptions]) -> None:
        self._store_ctx = store_ctx
        # Versions reported by programs, to be saved in the ledger.
        self.version_cache = known_programs(store_ctx)
        self._requests = [
            MappingRequest(item, store_ctx.account, self.version_cache) for item in mappings
        ]

    @property
    def remarks(self) -> t.List[str]:
        """Notes and warnings about the requested maps."""
        remarks = [text for request in self._requests for text in request.remarks]
        if self._store_ctx.account is None and find_program("cri-o"):
            # Programs write maps and sizes of auto differently.
            remarks += [
                f"CRI-O and {request.runtime.name} are both installed on this host, and `runtime` is not set. The "
                f"maps are those of {request.runtime}; set runtime: cri-o for layers that CRI-O uses."
                for request in self._requests
                if request.is_default and request.runtime.name != "cri-o"
            ]
        return list(dict.fromkeys(remarks))

    def runtime(self, index: int) -> Runtime:
        """The program that will request the mapping of this index."""
        return self._requests[index].runtime

    def answers(self, snapshot: Snapshot, image: Image) -> t.List[Answer]:
        """The maps that an image needs, without duplicates, in the order of the request.

        If a map is not possible, its place has the error: the runtime refuses it, too few IDs are
        free for ``auto``, or the image needs more IDs than allowed or cannot be read.
        """
        found: t.Dict[Mapping, ResolvedMapping] = {}
        answers: t.List[Answer] = []
        for number, request in enumerate(self._requests):
            try:
                for mapping in request.mappings(lambda: self._evidence(snapshot, image)):
                    resolved = self._resolve(mapping, request.runtime, snapshot, image)
                    resolved = dataclasses.replace(resolved, index=number)
                    if found.setdefault(resolved.mapping, resolved) is resolved:
                        answers.append(resolved)
            except StorageError as error:
                answers.append(error)
        return answers

    def _resolve(
        self, mapping: Mapping, runtime: Runtime, snapshot: Snapshot, image: Image
    ) -> ResolvedMapping:
        answer = _shifting(self._store_ctx.config, mapping, runtime)
        return ResolvedMapping(
            _in_use(recorded_form(mapping, runtime, answer.reorders_map), snapshot, image), answer
        )

    def _evidence(self, snapshot: Snapshot, image: Image) -> t.Optional[AutoEvidence]:
        if not image.layer:
            return None
        store_ctx = self._store_ctx
        chain = snapshot.chain(image.layer)
        ids = [layer.id for layer in chain]
        return AutoEvidence(
            store_ctx.config.auto_userns,
            chain,
            lambda path: store_ctx.driver.read_text(ids, path),
            image_user(store_ctx.store, image),
            [container.mapping for container in snapshot.containers.values()],
            [container.mapping for container in snapshot.containers_of(image.id)],
        )


def own_layers_mapping(
    config: StoreConfig,
    account: t.Optional[Account],
    options: MappingOptions,
    version_cache: t.Dict[str, str],
    present: t.Optional[t.Tuple[Snapshot, Image]] = None,
) -> ResolvedMapping:
    """The map that an image's own layers need, so that containers with a user namespace start without a copy.

    It is no map if the runtime shifts IDs, or if the user namespace changes no IDs.

    :param version_cache: see ``detect``
    :param present: the image, if it is in the store: the form of the map that the runtime used for its
        containers is preferred
    :raises MapError: a map is malformed, or the namespace has no map of its own (``auto``)
    :raises ConfigError: no runtime is installed, or an unknown one is named
    :raises NamespaceError: the user has no subordinate IDs
    """
    request = MappingRequest(options, account, version_cache)
    if request.automatic:
        raise MapError(
            "userns auto",
            "gives each container a range of IDs of its own, so the image's own layers cannot carry its map",
            "Pull the image without a mapping and use userns.storage.layer_template with userns: auto, or set a fixed "
            "map with uidmap and gidmap.",
        )
    (mapping,) = request.mappings(lambda: None)
    answer = _shifting(config, mapping, request.runtime)
    if mapping.changes_nothing or answer.shifts:
        return ResolvedMapping(UNMAPPED, answer)
    form = recorded_form(mapping, request.runtime, answer.reorders_map)
    return ResolvedMapping(_in_use(form, *present) if present else form, answer)


def _shifting(config: StoreConfig, mapping: Mapping, runtime: Runtime) -> Shifting:
    return shifting(
        config.driver,
        config.options,
        config.rootless,
        config.graphroot,
        config.runroot,
        mapping,
        runtime,
        os.environ,
    )


@dataclass(frozen=True)
class AutoEvidence:
    """The inputs for the map of an automatic namespace.

    :param limits: the settings of storage.conf
    :param layers: the image's layers, topmost first
    :param read_file: returns the text of a file in the merged image, or None
    :param image_user: USER of the image's configuration
    :param used: maps of all containers of the store
    :param held: maps of the containers of this image
    """

    limits: AutoUserns
    layers: t.Sequence[Layer]
    read_file: t.Callable[[str], t.Optional[str]]
    image_user: str
    used: t.Sequence[Mapping]
    held: t.Sequence[Mapping]


class MappingRequest:
    """A requested namespace, parsed and checked.

    :raises MapError: a map is malformed
    :raises ConfigError: no runtime is installed, or an unknown one is named
    :raises NamespaceError: the user has no subordinate IDs
    """

    def __init__(
        self, options: MappingOptions, account: t.Optional[Account], version_cache: t.Dict[str, str]
    ) -> None:
        self._options = options
        self._account = account
        self._request: Request = parse_request(
            options.userns, options.uidmap, options.gidmap, options.subuidname, options.subgidname
        )
        # Remarks on the requested maps, without duplicates.
        self.remarks: t.Dict[str, None] = {}
        self.runtime = _runtime(options.runtime, version_cache)
        # Whether it was detected, and not named in the request.
        self.is_default = not options.runtime
        self._context = _context(self.runtime, account)

    @property
    def automatic(self) -> bool:
        """Whether the runtime chooses another range for each container."""
        return self._request.kind == "auto"

    def mappings(self, evidence: t.Callable[[], t.Optional[AutoEvidence]]) -> t.List[Mapping]:
        """The maps for an image; a single map except for ``auto``.

        :param evidence: called only for ``auto``; returns None for an image without layers
        :raises StorageError: the map is not possible
        """
        if not self.automatic:
            return [self._request.resolve(self._context)]
        userns = self._request.userns
        found = evidence() if userns is not None else None
        if userns is None or found is None:
            return []
        rootless = self._account is not None
        ids = auto.image_ids(
            (ids for layer in found.layers for ids in (layer.uidset, layer.gidset)),
            found.read_file,
            # Root's services start in /, users in their home directories, where there is no etc/group.
            None if rootless else _read_text(_GROUP_FILE),
        )
        size = auto.namespace_size(self.runtime, found.limits, ids, userns.size, found.image_user)
        self._compare_folders(found, ids, size, userns.size)
        return auto.slots(
            self._options.slots,
            size,
            auto.available_ids(rootless, _shared_ids(self._account, found.limits.owner)),
            found.used,
            found.held,
            resolve_auto_extras(userns, self._context),
        )

    def _compare_folders(
        self, found: AutoEvidence, ids: auto.ImageIDs, size: int, asked: t.Optional[int]
    ) -> None:
        """Add a remark if the size depends on the working directory of the runtime."""
        if self.runtime.capabilities.counts_accounts_exactly or asked:
            return
        group = _read_text(_GROUP_FILE) if ids.started_group is None else None
        elsewhere = dataclasses.replace(ids, started_group=group)
        with contextlib.suppress(StorageError):
            other = auto.namespace_size(
                self.runtime, found.limits, elsewhere, None, found.image_user
            )
            if other == size:
                return
            here, there = (
                ("elsewhere", "in /") if ids.started_group is None else ("in /", "elsewhere")
            )
            self.remarks[
                f"userns auto: {self.runtime} reads etc/group below the directory in which it is "
                f"started, so it uses {size} IDs for an image when it is started {here}, as "
                f"assumed, and {other} when it is "
                f"started {there}. Write auto:size={size} in the unit, or use auto:size={other} "
                "here, to use the same size everywhere."
            ] = None


def _runtime(preferred: str, version_cache: t.Dict[str, str]) -> Runtime:
    runtime = detect(preferred or None, version_cache)
    if runtime is None:
        raise ConfigError(
            "runtime",
            "neither podman nor buildah nor CRI-O is installed on this host",
            'Install any of them, or set the program that will use the layers, for example runtime: "podman 5.4.2"',
        )
    return runtime


def _context(runtime: Runtime, account: t.Optional[Account]) -> UsernsContext:
    if account is None:
        return context(runtime, rootless=False, uid=0, gid=0)
    available = namespace_mapping(
        account.uid, account.gid, subordinate_ids(account.name, account.uid)
    )
    return context(runtime, True, account.uid, account.gid, available)


def _shared_ids(account: t.Optional[Account], owner: str) -> SubIDs:
    """The IDs available to automatic namespaces: the user's own, or those of the configured owner for root."""
    if account is not None:
        return subordinate_ids(account.name, account.uid)
    try:
        return SubIDs(ranges_of(owner, None, "uid"), ranges_of(owner, None, "gid"))
    except NamespaceError as error:
        raise NamespaceError(
            "userns auto", f"uses the ranges of {owner}, which has none", error.hint
        ) from error


def _in_use(mapping: Mapping, snapshot: Snapshot, image: Image) -> Mapping:
    """The form in which the runtime has already written this map for the image, if any."""
    seen = [item.mapping for item in snapshot.containers_of(image.id)]
    for layer_id in image.mapped_layers:
        layer = snapshot.layers.get(layer_id)
        if layer is not None and ORIGIN_FLAG not in layer.flags:
            seen.append(layer.mapping)
    return mapping if mapping in seen else reuse_form(mapping, seen)


def image_user(store: Store, image: Image) -> str:
    """USER of the image's configuration, whose numbers podman includes in the size."""
    text = _read_text(store.image_data_path(image.id, f"sha256:{image.id}"))
    try:
        content = json.loads(text or "{}")
        user = content["config"]["User"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    return user if isinstance(user, str) else ""


def _read_text(path: str) -> t.Optional[str]:
    try:
        return files.read_regular(path, _TEXT_LIMIT, follow=True).decode("utf-8", "replace")
    except OSError:
        return None
