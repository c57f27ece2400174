# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""From what a task says to the literal maps that the runtime will ask the store for."""

from __future__ import annotations

import contextlib
import json
import os
import typing as t
from dataclasses import dataclass

from ..errors import ConfigError, NamespaceError, StorageError
from ..idmap.grammar import Request, UsernsContext, parse_request, resolve_auto_extras
from ..idmap.mapping import Mapping
from ..idmap.subids import SubIDs, namespace_mapping, ranges_of, subordinate_ids
from ..runtime import auto
from ..runtime.detect import Runtime, detect
from ..runtime.forms import context, prefer, shape
from ..runtime.shifting import Shifting, shifting
from ..store.records import Image
from ..store.snapshot import Snapshot
from .opening import OpenStore
from .records import ORIGIN_FLAG
from .watching import ledger_of

_GROUP_FILE = "/etc/group"


@dataclass(frozen=True)
class Wanted:
    """A user namespace in the words of podman's options; empty for not given.

    :param runtime: the program that will ask, with its version if it is to be believed without asking
    :param slots: for ``auto``, how many containers of the image will run at once
    """

    userns: str = ""
    uidmap: t.Tuple[str, ...] = ()
    gidmap: t.Tuple[str, ...] = ()
    subuidname: str = ""
    subgidname: str = ""
    runtime: str = ""
    slots: int = 1


@dataclass(frozen=True)
class Question:
    """What the runtime will ask for: the map as it writes it, and whether it needs a layer at all."""

    mapping: Mapping
    shifting: Shifting


Answer = t.Union[Question, StorageError]


class Asker:
    """Knows what the runtimes of this host will ask a store for.

    :raises MapError: a map is malformed
    :raises ConfigError: no runtime is installed, or an unknown one is named
    :raises NamespaceError: the user has no subordinate IDs
    """

    def __init__(self, place: OpenStore, wanted: t.Iterable[Wanted]) -> None:
        self._place = place
        # What programs said of their version, to be kept in the ledger.
        self.said: t.Dict[str, str] = {}
        with contextlib.suppress(StorageError):
            self.said.update(ledger_of(place).programs)
        self._asked = [_Asked(one, place, self.said) for one in wanted]

    def answers(self, snapshot: Snapshot, image: Image) -> t.List[Answer]:
        """The maps to be there for an image, each once, in the order asked.

        In place of a map that cannot be had stands the reason: the runtime refuses it, too few IDs are
        free for ``auto``, the image needs more than are allowed or cannot be read.
        """
        found: t.Dict[Mapping, Question] = {}
        answers: t.List[Answer] = []
        for asked in self._asked:
            try:
                for mapping in asked.mappings(snapshot, image):
                    question = self._question(mapping, asked.runtime, snapshot, image)
                    if found.setdefault(question.mapping, question) is question:
                        answers.append(question)
            except StorageError as error:
                answers.append(error)
        return answers

    def _question(
        self, mapping: Mapping, runtime: Runtime, snapshot: Snapshot, image: Image
    ) -> Question:
        answer = self._shifting(mapping, runtime)
        return Question(_in_use(shape(mapping, runtime, answer.sorts), snapshot, image), answer)

    def _shifting(self, mapping: Mapping, runtime: Runtime) -> Shifting:
        config = self._place.config
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


class _Asked:
    """One wanted namespace, read and checked."""

    def __init__(self, wanted: Wanted, place: OpenStore, said: t.Dict[str, str]) -> None:
        self._wanted = wanted
        self._place = place
        self._request: Request = parse_request(
            wanted.userns, wanted.uidmap, wanted.gidmap, wanted.subuidname, wanted.subgidname
        )
        self.runtime = _runtime(wanted.runtime, said)
        self._context = _context(self.runtime, place)

    def mappings(self, snapshot: Snapshot, image: Image) -> t.List[Mapping]:
        """The maps for an image; one, save for ``auto``.

        :raises StorageError: it cannot be had here
        """
        if self._request.kind != "auto":
            return [self._request.resolve(self._context)]
        userns = self._request.userns
        if userns is None or not image.layer:
            return []
        place = self._place
        limits = auto.AutoLimits.from_config(place.config.auto_userns)
        chain = snapshot.chain(image.layer)
        ids = [layer.id for layer in chain]
        size = auto.namespace_size(
            self.runtime,
            limits,
            auto.image_ids(
                (one for layer in chain for one in (layer.uidset, layer.gidset)),
                lambda path: place.driver.read_text(ids, path),
                # Root's services start in /, users at home, where there is no etc/group.
                None if place.config.rootless else _read_text(_GROUP_FILE),
            ),
            userns.size,
            _image_user(place, image),
        )
        return auto.slots(
            self._wanted.slots,
            size,
            auto.available_ids(place.config.rootless, _shared_ids(place, limits.owner)),
            [one.mapping for one in snapshot.containers.values()],
            [one.mapping for one in snapshot.containers_of(image.id)],
            resolve_auto_extras(userns, self._context),
        )


def _runtime(preferred: str, said: t.Dict[str, str]) -> Runtime:
    runtime = detect(preferred or None, said)
    if runtime is None:
        raise ConfigError(
            "runtime",
            "neither podman nor buildah nor CRI-O is installed on this host",
            'Install one, or say which one will ask, for example: runtime: "podman 5.4.2"',
        )
    return runtime


def _context(runtime: Runtime, place: OpenStore) -> UsernsContext:
    account = place.account
    if account is None:
        return context(runtime, rootless=False, uid=0, gid=0)
    available = namespace_mapping(
        account.uid, account.gid, subordinate_ids(account.name, account.uid)
    )
    return context(runtime, True, account.uid, account.gid, available)


def _shared_ids(place: OpenStore, owner: str) -> SubIDs:
    """The IDs that automatic namespaces share out: the user's own, or those of the owner for root's."""
    if place.account is not None:
        return subordinate_ids(place.account.name, place.account.uid)
    try:
        return SubIDs(ranges_of(owner, None, "uid"), ranges_of(owner, None, "gid"))
    except NamespaceError as error:
        raise NamespaceError(
            "userns auto", f"takes the ranges of {owner}, and it has none", error.way_out
        ) from error


def _in_use(mapping: Mapping, snapshot: Snapshot, image: Image) -> Mapping:
    """The form in which the runtime itself has written this map for the image, if it has."""
    seen = [one.mapping for one in snapshot.containers_of(image.id)]
    for layer_id in image.mapped_layers:
        layer = snapshot.layers.get(layer_id)
        if layer is not None and ORIGIN_FLAG not in layer.flags:
            seen.append(layer.mapping)
    return mapping if mapping in seen else prefer(mapping, seen)


def _image_user(place: OpenStore, image: Image) -> str:
    """USER of the image's configuration, whose numbers podman makes room for."""
    text = _read_text(place.store.image_data_path(image.id, f"sha256:{image.id}"))
    try:
        content = json.loads(text or "{}")
        user = content["config"]["User"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return ""
    return user if isinstance(user, str) else ""


def _read_text(path: str) -> t.Optional[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None
