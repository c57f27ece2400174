# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The result of layer_gc: the entries of its lists, and the space that removals free. No function accesses files."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass, replace

from ..tree.measure import Usage, together
from . import superseded_images
from .gc_plan import Decision, Finding, Plan
from .inventory import Inventory, LayerState
from .layer_results import container_result
from .superseded_images import Superseded
from .time_formats import format_time

_MOST_IMAGES_SHOWN = 1000
# For removals that the time limit prevented.
LATER = {
    "rule": "time_limit",
    "reason": "the time limit was reached before this layer, the next run continues with it",
}

_Entry = t.Dict[str, t.Any]


@dataclass(frozen=True)
class Space:
    """The space that a run frees, in bytes and inodes; ``least`` and ``most`` bytes where it is only predicted."""

    size: int = 0
    inodes: int = 0
    least: int = 0
    most: int = 0


class GcResults:
    """What a run removed, would remove in check mode, kept, or could not remove.

    :ivar space: the space that the removals freed
    """

    def __init__(
        self,
        inventory: Inventory,
        states: t.Mapping[str, LayerState],
        idle: t.Mapping[str, t.Optional[float]],
    ) -> None:
        """
        :param states: all mapped layers, by ID
        :param idle: the observed seconds for which each layer has been unused
        """
        self._states = states
        self._idle = idle
        self._usages = {state.layer_id: state.usage for state in inventory.layers()}
        self._measured = [
            state.usage
            for state in (*inventory.layers(), *inventory.unreferenced)
            if state.usage is not None
        ]
        # The usage of the removed layers and images.
        self._gone: t.List[t.Optional[Usage]] = []
        self.removed: t.List[_Entry] = []
        self.kept: t.List[_Entry] = []
        self.removed_images: t.List[_Entry] = []
        self.kept_images: t.List[_Entry] = []
        self.repaired: t.List[_Entry] = []
        self.findings: t.List[_Entry] = []
        self.failures: t.List[_Entry] = []
        self.space = Space()

    # Mapped layers

    def add_removed(self, decision: Decision) -> None:
        """Add a layer that was removed."""
        self.removed.append(self._entry(decision))
        self._gone.append(self._states[decision.layer_id].usage)

    def add_kept(self, decision: Decision, **changes: str) -> None:
        """Add a layer that is kept.

        :param changes: values that differ from those of the decision
        """
        self.kept.append({**self._entry(decision), **changes})

    def add_failed(self, decision: Decision, reason: str) -> None:
        """Add a layer that could not be removed."""
        self.failures.append({**self._entry(decision), "reason": reason})

    def _entry(self, decision: Decision) -> _Entry:
        state = self._states[decision.layer_id]
        idle = self._idle.get(decision.layer_id)
        return {
            "id": decision.layer_id,
            "image_ids": [image.id for image in state.images],
            "image_names": [name for image in state.images for name in image.names],
            "uidmap": state.mapping.uid.to_strings(),
            "gidmap": state.mapping.gid.to_strings(),
            "size": decision.size,
            **_bounds(state.usage),
            "inodes": decision.inodes,
            "unused_seconds": None if idle is None else round(idle),
            "rule": decision.rule,
            "wanted_by": list(decision.wanted_by),
            "reason": decision.reason,
            "origin": "ours" if state.ours else "runtime",
            "containers": [container_result(container) for container in state.containers],
        }

    # Superseded images

    def add_removed_image(self, item: Superseded, layers: t.Sequence[str]) -> None:
        """Add an image that was removed.

        :param layers: the layers that were removed with it
        """
        self.removed_images.append(self._image_entry(replace(item, layers=tuple(layers))))
        self._gone += [self._usages.get(layer_id) for layer_id in layers]

    def add_kept_image(self, item: Superseded, **changes: str) -> None:
        """Add an image that is kept.

        :param changes: values that differ from those of the decision
        """
        self.kept_images.append({**self._image_entry(item), **changes})

    def add_failed_image(self, item: Superseded, reason: str) -> None:
        """Add an image that could not be removed."""
        self.failures.append({**self._image_entry(item), "reason": reason})

    def _image_entry(self, item: Superseded) -> _Entry:
        usages = [usage for usage in map(self._usages.get, item.layers) if usage]
        return {
            "id": item.image.id,
            "former_names": superseded_images.former_names(item.image),
            "superseded": None if item.since is None else format_time(item.since),
            "layers": list(item.layers),
            "size": sum(usage.exclusive for usage in usages),
            "inodes": sum(usage.inodes for usage in usages),
            "rule": item.rule,
            "reason": item.reason,
        }

    # Findings

    def add_repaired(self, finding: Finding, decision: Decision) -> None:
        """Add a finding that was removed."""
        self.repaired.append(_finding_entry(finding, decision))
        self._gone.append(finding.usage)

    def add_finding(self, finding: Finding, decision: Decision, **changes: str) -> None:
        """Add a finding that is kept.

        :param changes: values that differ from those of the decision
        """
        self.findings.append({**_finding_entry(finding, decision), **changes})

    def add_failed_finding(self, finding: Finding, decision: Decision, reason: str) -> None:
        """Add a finding that could not be removed."""
        self.failures.append({**_finding_entry(finding, decision), "reason": reason})

    # The whole result

    @property
    def changed(self) -> bool:
        """Whether anything was removed."""
        return bool(self.removed or self.repaired or self.removed_images)

    def expected(self) -> Usage:
        """The space that all removals free together, because layers of one image may share data."""
        going = [usage for usage in self._gone if usage is not None]
        known = {id(usage) for usage in going}
        return together(going, [usage for usage in self._measured if id(usage) not in known])

    def reached(self, made: Plan) -> bool:
        """Whether the removed layers meet the targets of the rules for space."""
        gone = {
            "bytes": sum(entry["size"] for entry in self.removed),
            "inodes": sum(entry["inodes"] for entry in self.removed),
        }
        return all(gone[target.unit] >= target.amount for target in made.targets)

    def error(self) -> str:
        """The message about failures; empty if there are none."""
        if not self.failures:
            return ""
        total = len(self.failures) + len(self.removed) + len(self.repaired)
        return f"{len(self.failures)} of {total} could not be removed: {self.failures[0]['reason']}"

    def fields(self) -> _Entry:
        """The lists and the space as keys of the module's result."""
        return {
            "changed": self.changed,
            "removed": self.removed,
            "kept": self.kept,
            "removed_images": self.removed_images,
            "kept_images": self.kept_images[:_MOST_IMAGES_SHOWN],
            "failures": self.failures,
            "repaired": self.repaired,
            "findings": self.findings,
            "space_reclaimed": self.space.size,
            "space_reclaimed_min": self.space.least,
            "space_reclaimed_max": self.space.most,
            "inodes_reclaimed": self.space.inodes,
            "diff": self._diff(),
        }

    def _diff(self) -> _Entry:
        gone = {entry["id"] for entry in (*self.removed, *self.removed_images)}
        layers = [item for item in (*self.removed, *self.kept, *self.failures) if "uidmap" in item]
        images = [
            item
            for item in (*self.removed_images, *self.kept_images, *self.failures)
            if "former_names" in item
        ]
        return {
            side: {
                "mapped_layers": _shown(layers, excluded, "image_names", "uidmap", "gidmap"),
                "superseded_images": _shown(images, excluded, "former_names"),
            }
            for side, excluded in (("before", set()), ("after", gone))
        }


def unmet_targets(made: Plan) -> str:
    """The warning about rules for space that require more than the removable layers use."""
    return "The rules for space require more than the removable layers use: " + "; ".join(
        f"{target.rule} {target.amount} {target.unit}, {target.planned} can be freed"
        for target in made.targets
        if not target.met
    )


def _shown(entries: t.Iterable[_Entry], excluded: t.Collection[str], *keys: str) -> t.List[_Entry]:
    return [
        {key: entry[key] for key in ("id", *keys)}
        for entry in sorted(entries, key=lambda item: str(item["id"]))
        if entry["id"] not in excluded
    ]


def _bounds(usage: t.Optional[Usage]) -> t.Dict[str, int]:
    """The minimum and maximum of the bytes that a removal frees."""
    return {
        "size_min": usage.least if usage else 0,
        "size_max": usage.most if usage else 0,
    }


def _finding_entry(finding: Finding, decision: Decision) -> _Entry:
    return {
        "kind": finding.kind,
        "id": os.path.basename(finding.name),
        "path": finding.name if finding.name.startswith("/") else None,
        "image_ids": list(finding.image_ids),
        "size": finding.size,
        **_bounds(finding.usage),
        "inodes": finding.inodes,
        "rule": decision.rule,
        "reason": decision.reason,
    }
