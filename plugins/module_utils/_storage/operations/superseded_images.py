# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Find unused images whose names belong to newer images.

Each update of an image leaves such an image, with all its mapped layers. Runtimes record the former names of an image
(containers/storage, ``names-history``). Images that never had a name, such as those of a build cache, do not count.
"""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass

from ..errors import LayerInUse
from ..store.records import Image
from ..store.snapshot import Snapshot
from .gc_plan import Watch
from .gc_policy import Policy
from .image_patterns import Patterns, image_terms
from .image_removal import layers_of_removal, users_of_image
from .inventory import LayerState
from .time_formats import format_age, format_time

RULE = "superseded_images"
_OF_A_BUILD = re.compile(r"/[0-9a-f]{64}-tmp:latest$")
# An image and its successor.
_ENOUGH = 2


@dataclass(frozen=True)
class Superseded:
    """A decision about an image without a name.

    :ivar layers: the layers that are removed with it, mapped layers first
    :ivar since: the time at which it lost its names, in seconds since the epoch; None if unknown
    :ivar rule: the protection that keeps it, or the rule that removes it
    """

    image: Image
    layers: t.Tuple[str, ...]
    since: t.Optional[float]
    remove: bool
    rule: str
    reason: str


def decide(
    snapshot: Snapshot,
    policy: Policy,
    watch: Watch,
    now: float,
    states: t.Mapping[str, LayerState],
    refusal: t.Optional[t.Tuple[str, str]] = None,
) -> t.List[Superseded]:
    """Decide about all images that lost their names; empty if the policy has no rule for them.

    :param now: seconds since the epoch
    :param states: the states of mapped layers, by ID
    :param refusal: why nothing may be removed from the store, as rule and reason
    """
    if policy.superseded_images is None:
        return []
    images = [image for image in snapshot.images.values() if is_superseded(image)]
    dependents = snapshot.images_above({image.layer for image in images}, _ENOUGH)
    judge = _Judge(policy, watch, now, states)
    taken = _times_of_names(snapshot)
    found = []
    for image in images:
        since = _since(snapshot, image, taken)
        kept = refusal or _use(snapshot, image, dependents) or judge.protection(image, since)
        rule, reason = kept or (
            RULE,
            f"superseded at {format_time(since or 0.0)}, more than {format_age(policy.superseded_images)} ago",
        )
        layers = tuple(layers_of_removal(snapshot, image))
        found.append(Superseded(image, layers, since, kept is None, rule, reason))
    return found


def is_superseded(image: Image) -> bool:
    """Whether an image of the store itself lost all its names."""
    return not image.names and bool(former_names(image)) and not image.read_only_store


def former_names(image: Image) -> t.List[str]:
    """The names that an image had, without temporary names of buildah."""
    return [name for name in image.names_history if not _OF_A_BUILD.search(name)]


def refuse_used(snapshot: Snapshot, image: Image) -> None:
    """Check under the locks that an image is still superseded, and that nothing uses it.

    :raises LayerInUse: it is in use
    """
    subject = f"image {image.id[:12]}"
    if not is_superseded(image):
        raise LayerInUse(subject, "was given a name during the task")
    used = _use(snapshot, image, snapshot.images_above({image.layer}, _ENOUGH))
    if used:
        raise LayerInUse(subject, used[1])


def _use(
    snapshot: Snapshot, image: Image, dependents: t.Mapping[str, t.Sequence[Image]]
) -> t.Optional[t.Tuple[str, str]]:
    """Why an image is in use, as rule and reason; None if it is not."""
    containers = users_of_image(snapshot, image)
    if containers:
        named = ", ".join(f"container {container.name}" for container in containers)
        return "in_use", f"in use by {named}"
    for other in dependents.get(image.layer, ()):
        if other.id != image.id:
            return "dependents", f"image {other.label} is based on it"
    return None


class _Judge:
    """Applies the protections of a policy to images that nothing uses."""

    def __init__(
        self, policy: Policy, watch: Watch, now: float, states: t.Mapping[str, LayerState]
    ) -> None:
        self._policy, self._watch, self._now, self._states = policy, watch, now, states
        self._images = Patterns(policy.images)
        self._keep_images = Patterns(policy.keep_images)

    def protection(self, image: Image, since: t.Optional[float]) -> t.Optional[t.Tuple[str, str]]:
        """The first protection that applies, as rule and reason."""
        policy, now, doubt = self._policy, self._now, self._watch.doubt
        terms = image_terms((image.id,), former_names(image))
        if self._images.given and self._images.hit(terms) is None:
            return "images", "it is not selected by images"
        if policy.ours_only:
            return "origin", "images are not created by this collection, and origin is ours"
        pinned = self._keep_images.hit(terms)
        if pinned is not None:
            return "keep_images", f"it matches {pinned} of keep_images"
        mapped = [self._states[item] for item in image.mapped_layers if item in self._states]
        if any(state.layer_id in policy.keep_layers for state in mapped):
            return "keep_layers", "one of its mapped layers is declared to be ready"
        leases = [state.lease for state in mapped if state.lease is not None]
        if leases and (max(leases) > now or doubt):
            return "lease", f"one of its mapped layers is leased until {format_time(max(leases))}"
        if policy.shared:
            return "shared", f"containers of other stores may use it: {policy.shared}"
        if doubt or since is None:
            return RULE, f"it is unknown when it was superseded: {doubt or 'no layer has a date'}"
        touched = max([since, *(state.last_used or 0.0 for state in mapped)])
        least = max(policy.superseded_images or 0.0, policy.min_age)
        if now - touched < least:
            what = "superseded" if touched == since else "seen in use"
            return RULE, f"{what} at {format_time(touched)}, less than {format_age(least)} ago"
        return None


def _times_of_names(snapshot: Snapshot) -> t.Dict[str, float]:
    """By name, the time at which the newest image with that name was pulled or built."""
    found: t.Dict[str, float] = {}
    for image in snapshot.images.values():
        created = _created(snapshot, image)
        if created is not None:
            found.update((name, max(created, found.get(name, created))) for name in image.names)
    return found


def _since(snapshot: Snapshot, image: Image, taken: t.Mapping[str, float]) -> t.Optional[float]:
    """The time at which the successor was pulled or built, or the image itself if there is no successor."""
    own = _created(snapshot, image)
    if own is None:
        return None
    return max([own, *(taken[name] for name in former_names(image) if name in taken)])


def _created(snapshot: Snapshot, image: Image) -> t.Optional[float]:
    """The creation time of the top layer, because an image's own date is that of its build."""
    layer = snapshot.layers.get(image.layer)
    return layer.created.timestamp() if layer is not None and layer.created else None
