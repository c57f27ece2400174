# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The candidates and findings for a plan of layer_gc, from the layers of an inventory. No function accesses files."""

from __future__ import annotations

import typing as t

from ..store.records import Layer
from ..store.snapshot import Snapshot
from .gc_plan import Candidate, Finding
from .inventory import INCOMPLETE, NEWER, UNREFERENCED, LayerState, Orphan


def candidate(
    state: LayerState,
    layer: Layer,
    idle: t.Optional[float],
    dependents: t.Sequence[str],
    unusable: t.Optional[str],
) -> Candidate:
    """A mapped layer as a candidate for removal.

    :param layer: the record of the layer
    :param idle: the observed seconds for which it has been unused
    :param dependents: names of layers that need it on disk
    :param unusable: why no user can use its map
    """
    return Candidate(
        layer_id=state.layer_id,
        image_ids=tuple(image.id for image in state.images),
        image_names=tuple(name for image in state.images for name in image.names),
        uidmap=tuple(state.mapping.uid.to_strings()),
        gidmap=tuple(state.mapping.gid.to_strings()),
        created=state.created,
        last_used=state.last_used,
        idle=idle,
        lease=state.lease,
        users=_users(state),
        dependents=tuple(dependents),
        read_only_store=layer.read_only_store,
        newer_format=state.problem if state.status == NEWER else "",
        ours=state.ours,
        duplicate_of=state.duplicate_of,
        unusable=unusable,
        size=state.usage.exclusive if state.usage else 0,
        inodes=state.usage.inodes if state.usage else 0,
    )


def dependents_by_layer(states: t.Mapping[str, LayerState]) -> t.Dict[str, t.List[str]]:
    """Mapped layers that other mapped layers need on disk; containers' layers are known from the records."""
    found: t.Dict[str, t.List[str]] = {}
    for state in states.values():
        for needed in state.dependencies:
            if needed in states:
                found.setdefault(needed, []).append(f"layer {state.layer_id[:12]}")
    return found


def is_own_layer(state: LayerState) -> bool:
    """Whether it is the own layer of an image."""
    return any(image.layer == state.layer_id for image in state.images)


def _users(state: LayerState) -> t.Tuple[str, ...]:
    return tuple(f"container {container.name}" for container in state.containers) + tuple(
        f"layer {layer_id[:12]}" for layer_id in state.child_layers
    )


def layer_finding(kind: str, state: LayerState, ours: bool) -> Finding:
    """A damaged layer or one that nothing references, as a finding.

    :param ours: whether this collection left it behind
    """
    return Finding(
        kind=kind,
        name=state.layer_id,
        image_ids=tuple(image.id for image in state.images),
        created=state.created,
        users=_users(state),
        template=is_own_layer(state),
        ours=ours and kind in (INCOMPLETE, UNREFERENCED),
        size=state.usage.exclusive if state.usage else 0,
        inodes=state.usage.inodes if state.usage else 0,
        usage=state.usage,
    )


def incomplete_finding(snapshot: Snapshot, layer: Layer) -> Finding:
    """A layer whose creation never finished and that no image lists, as a finding."""
    containers = snapshot.containers_on(layer.id)
    own = {container.layer for container in containers}
    users = [f"container {container.name}" for container in containers] + [
        f"layer {child.id[:12]}" for child in snapshot.children(layer.id) if child.id not in own
    ]
    return Finding(
        kind=INCOMPLETE,
        name=layer.id,
        created=layer.created.timestamp() if layer.created else None,
        users=tuple(users),
        template=any(image.layer == layer.id for image in snapshot.images.values()),
    )


def orphan_finding(orphan: Orphan) -> Finding:
    """Data without a record, as a finding."""
    return Finding(
        kind=orphan.kind,
        name=orphan.path,
        created=orphan.changed,
        size=orphan.usage.exclusive if orphan.usage else 0,
        inodes=orphan.usage.inodes if orphan.usage else 0,
        usage=orphan.usage,
    )
