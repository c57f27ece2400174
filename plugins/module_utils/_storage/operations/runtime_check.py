# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Check that the podman of the host accepts the mapped layers.

After the layers are created, podman creates a container for each image and mapping, outside the
private namespaces of this library. It is never started. The container's own layer must have one of the new layers as
its parent. The container is always removed, and layers that podman did not use are removed too.
"""

from __future__ import annotations

import os
import re
import typing as t
from dataclasses import dataclass, field, replace

from .. import as_user
from ..errors import ConfigError, StorageError, StoreError, UntestedRuntime
from ..printable import command
from ..store.records import Layer
from ..userns import running as userns
from ..userns.shapes import Items, Record, text
from . import temporary_containers
from .configuration import untested
from .layer_flags import ORIGIN, ORIGIN_FLAG
from .layer_removal import remove_mapped_layer, users_of
from .layer_template import (
    CREATED,
    EXISTING,
    PENDING,
    REFUSED,
    REMOVED,
    TemplateRequest,
    declare_with_mappings,
)
from .layer_template import declare as declare_inside
from .mapping_options import MappingOptions
from .store_opening import StoreRequest, opened

NEVER = "never"
UNTESTED = "untested"
ALWAYS = "always"

_ID = re.compile(r"[0-9a-f]{64}")

_Result = t.Dict[str, t.Any]


def declare(request: TemplateRequest, check_with_runtime: str) -> _Result:
    """As :func:`.template.declare`, but called outside the store's namespaces.

    :param check_with_runtime: "untested" if a program is newer than the tested versions, or "always"
    :returns: the module's result; layers that podman did not use are "refused" and removed
    :raises ConfigError: the runtime is not podman, or podman is not installed
    :raises StorageError: as :func:`.template.declare`
    """
    store = request.store
    if request.state != "present" or not _needed(store, check_with_runtime):
        result: _Result = userns.run(declare_inside, (request,), store.account, _limits(store))
        return result
    programs = [_program(store, mapping) for mapping in request.mappings]
    store = replace(store, allow_untested_runtime=True)
    request = replace(request, store=store)
    if request.check:
        result = userns.run(declare_inside, (request,), store.account, _limits(store))
        return result
    state = userns.run(look, (store,), store.account, _limits(store))
    for name in state["containers"]:
        if not temporary_containers.is_running(name):
            _remove_container(_Podman(programs[0], store, state), name)
    made = userns.run(declare_with_mappings, (request,), store.account, _limits(store))
    result = made["result"]
    groups: t.Dict[t.Tuple[str, int], t.List[_Result]] = {}
    for entry, number in zip(result["layers"], made["mappings"]):
        if entry["action"] in (CREATED, EXISTING):
            groups.setdefault((entry["image_id"], int(number)), []).append(entry)
    withdrawn = False
    for (image_id, number), entries in groups.items():
        state = userns.run(look, (store,), store.account, _limits(store))
        tested = [item for item in entries if item["layer_id"] in state["unused"]]
        if tested:
            podman = _Podman(programs[number], store, state)
            error = _check(podman, request.mappings[number], image_id, tested, state["layers"])
            if error is not None:
                withdrawn = withdrawn or any(item["action"] == EXISTING for item in tested)
                _refuse(result, tested, error)
    result["changed"] = withdrawn or any(
        item["action"] in (CREATED, REMOVED) or (item["action"] == PENDING and result["changed"])
        for item in result["layers"]
    )
    return result


def _needed(store: StoreRequest, check_with_runtime: str) -> bool:
    if check_with_runtime == ALWAYS:
        return True
    return untested(store.account is not None, store.runtime) is not None


def _limits(store: StoreRequest) -> userns.Limits:
    return userns.waiting_for_locks(store.lock_timeout)


# Inside the namespaces


@userns.returns(
    Record(
        {
            **dict.fromkeys(("podman", "layers", "unused", "containers"), Items(text)),
        }
    )
)
def look(store: StoreRequest) -> _Result:
    """The command line of ``podman`` for the store, and its ``layers`` by ID.

    :returns: also ``unused``, the layers of this collection that no container uses, and ``containers``, the names of
        containers of earlier checks
    """
    with opened(store, read_only=True) as store_ctx:
        snapshot = store_ctx.store.snapshot()
        ours = [
            layer.id for layer in snapshot.layers.values() if layer.flags.get(ORIGIN_FLAG) == ORIGIN
        ]
        return {
            "podman": list(store_ctx.config.podman),
            "layers": list(snapshot.layers),
            "unused": [our for our in ours if not users_of(snapshot, our)],
            "containers": [
                name
                for container in snapshot.containers.values()
                for name in container.names
                if temporary_containers.is_name(name)
            ],
        }


@userns.returns(Record({"layer": text, "uidmap": Items(text), "gidmap": Items(text)}))
def parent_of(store: StoreRequest, container_id: str) -> _Result:
    """The layer that a container uses, and that layer's maps.

    :raises StoreError: the store has no such container
    """
    with opened(store, read_only=True) as store_ctx:
        snapshot = store_ctx.store.snapshot()
        container = snapshot.containers.get(container_id)
        own = snapshot.layers.get(container.layer) if container else None
        if container is None or own is None:
            raise StoreError(
                f"container {container_id[:12]}",
                "was created by podman in another store than this one",
                "Give the store's options as podman uses them.",
            )
        layer: t.Optional[Layer] = snapshot.layers.get(own.parent)
        mapping = layer.mapping if layer else container.mapping
        return {
            "layer": own.parent,
            "uidmap": mapping.uid.to_strings(),
            "gidmap": mapping.gid.to_strings(),
        }


@userns.returns(Items(text))
def withdraw(store: StoreRequest, layers: t.Sequence[str], copy: str) -> t.List[str]:
    """Remove the layers that podman did not use, and the unused ``copy`` that it created instead.

    :returns: why layers remain
    """
    remaining = []
    with opened(store) as store_ctx:
        for layer_id in (*layers, *([copy] if copy else ())):
            try:
                remove_mapped_layer(store_ctx, layer_id)
            except StorageError as error:
                # Another container may use it now; podman's own copy is correct for it.
                if layer_id != copy:
                    remaining.append(str(error))
    return remaining


# Outside the namespaces


@dataclass(frozen=True)
class _Podman:
    """podman, called for the store that a request names.

    :ivar state: the result of :func:`look`
    """

    program: str
    store: StoreRequest
    state: _Result = field(repr=False)

    def command_line(self, *arguments: str) -> t.List[str]:
        """A command line that creates no event."""
        start: t.List[str] = self.state["podman"]
        at = start.index("podman")
        return [
            *start[:at],
            self.program,
            *("--events-backend", "none"),
            *start[at + 1 :],
            *arguments,
        ]

    def run(self, *arguments: str) -> as_user.Finished:
        return as_user.execute(self.command_line(*arguments), self.store.account, {})


def _program(store: StoreRequest, mapping: MappingOptions) -> str:
    """The podman that the options ``runtime`` name.

    :raises ConfigError: another program is named
    """
    word = (mapping.runtime or store.runtime or "podman").split(maxsplit=1)[0]
    if os.path.basename(word) != "podman":
        raise ConfigError(
            f"runtime {word}",
            "cannot check a layer: only podman can create a container without starting it",
            "Set check_with_runtime: never, and allow_untested_runtime: true where the program is too new.",
        )
    return word


def _check(
    podman: _Podman,
    mapping: MappingOptions,
    image_id: str,
    entries: t.Sequence[_Result],
    before: t.Collection[str],
) -> t.Optional[StorageError]:
    """Let podman create a container; returns None if it used one of the layers of ``entries``."""
    store = podman.store
    layers = [item["layer_id"] for item in entries]
    label = (entries[0]["image_names"] or [image_id[:12]])[0]
    problem, hint, copy = "", "", ""
    name = temporary_containers.new_name()
    arguments = _create(name, mapping, image_id)
    try:
        try:
            done = podman.run(*arguments)
            found = _ID.search(done.stdout)
            if done.rc != 0 or found is None:
                problem = f"podman could not create a container to check it: {_last(done)}"
                hint = f"Run it manually: {_by_hand(podman, arguments)}"
            else:
                parent = userns.run(
                    parent_of, (store, found.group()), store.account, _limits(store)
                )
                if parent["layer"] not in layers:
                    copy = parent["layer"] if parent["layer"] not in before else ""
                    problem = (
                        f"podman did not use it for a container with this mapping, but layer {parent['layer'][:12]} "
                        f"with UIDs {','.join(parent['uidmap']) or 'as they are'} and GIDs "
                        f"{','.join(parent['gidmap']) or 'as they are'}"
                    )
                    hint = "Update the collection. Until then run the containers without a mapped layer."
        finally:
            _remove_container(podman, name)
    except StorageError as error:
        problem, hint = str(error), error.hint
    if not problem:
        for entry in entries:
            entry["reason"] += " podman used it for a container that was created and removed again."
        return None
    remaining = userns.run(withdraw, (store, layers, copy), store.account, _limits(store))
    outcome = "it was removed again"
    if remaining:
        outcome = f"it could not be removed: {' '.join(remaining)}"
    return UntestedRuntime(
        f"mapped layer of image {label}", f"{problem.rstrip('.')}; {outcome.rstrip('.')}", hint
    )


def _create(name: str, mapping: MappingOptions, image_id: str) -> t.List[str]:
    arguments = temporary_containers.create_arguments(name, "never")
    arguments += ["--userns", mapping.userns] if mapping.userns else []
    for option, values in (("--uidmap", mapping.uidmap), ("--gidmap", mapping.gidmap)):
        for value in values:
            arguments += [option, value]
    arguments += ["--subuidname", mapping.subuidname] if mapping.subuidname else []
    arguments += ["--subgidname", mapping.subgidname] if mapping.subgidname else []
    return [*arguments, image_id, "true"]


def _remove_container(podman: _Podman, name: str) -> None:
    """Remove a container of a check; a missing container is ignored.

    :raises StoreError: podman cannot remove it
    """
    arguments = temporary_containers.remove_arguments(name)
    done = podman.run(*arguments)
    if done.rc != 0:
        raise StoreError(
            f"container {name}",
            f"was created to check a layer, and podman could not remove it: {_last(done)}",
            f"Run it manually: {_by_hand(podman, arguments)}",
        )


def _by_hand(podman: _Podman, arguments: t.Sequence[str]) -> str:
    return as_user.typed(podman.store.account, command(*podman.command_line(*arguments)))


def _last(done: as_user.Finished) -> str:
    lines = done.stderr.splitlines()
    return lines[-1] if lines else "no reason given"


def _refuse(result: _Result, entries: t.Sequence[_Result], error: StorageError) -> None:
    """Change a result to report that layers were created and removed again."""
    for entry in entries:
        entry.update(action=REFUSED, reason=str(error), layer_id="")
        entry.update(dict.fromkeys(("strategy", "files", "size_apparent", "size_exclusive")))
        label = (entry["image_names"] or [entry["image_id"][:12]])[0]
        maps = {key: entry[key] for key in ("uidmap", "gidmap")}
        shown = result["diff"]["after"].get(label, [])
        shown[:] = [item for item in shown if item != maps]
    message = str(error)
    if result.get("error"):
        message = f"{result['error']} {message}"
    result["error"] = message
    result.setdefault("facts", {})
