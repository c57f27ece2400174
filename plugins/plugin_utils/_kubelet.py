# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""The maps that the kubelet gives to pods with hostUsers false, see userns_manager.go of the kubelet."""

from __future__ import annotations

import json
import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils._units import UnitError

# The number of IDs of a pod is a multiple of this.
POD_SIZE = 65536
_HIGHEST_ID = 2**32 - 1
# A file of the kubelet has a few hundred characters.
_MOST_CHARACTERS = 1_000_000
_FIELDS = ("containerId", "hostId", "length")

Maps = t.Dict[str, t.List[str]]


class Kubelet:
    """The known maps of a node's pods.

    :ivar is_random: whether no map is known, because the kubelet selects the range of each new pod at random
    :ivar has_no_pods: whether only the maps of existing pods are used, and there are none
    :ivar covers_ranges: whether the maps are those of ranges that pods may get
    :ivar maps: options ``uidmap`` and ``gidmap`` of layer_template, without duplicates
    """

    def __init__(
        self,
        first_id: t.Optional[int] = None,
        slots: int = 1,
        size: int = POD_SIZE,
        pod_maps: t.Any = None,
    ) -> None:
        """Collect the maps.

        :param first_id: the first host ID of the kubelet's range; None to cover no ranges
        :param slots: the number of ranges to cover
        :param size: the number of IDs of each pod
        :param pod_maps: contents of the kubelet's files with the maps of existing pods, as a list or as the
            values of a dictionary
        :raises UnitError: an option has an invalid value, or a file has another form
        """
        if size % POD_SIZE:
            raise UnitError(f"ids_per_pod is {size}, not a multiple of {POD_SIZE}")
        if first_id is not None and first_id + slots * size > _HIGHEST_ID:
            raise UnitError(
                f"{slots} slots of {size} IDs from {first_id} on exceed the available IDs"
            )
        self.is_random = first_id is None and pod_maps is None
        contents = _contents(pod_maps)
        self.has_no_pods = first_id is None and not self.is_random and not contents
        self.covers_ranges = first_id is not None
        self.maps: t.List[Maps] = []
        if first_id is not None:
            for number in range(slots):
                entry = f"0:{first_id + number * size}:{size}"
                self.maps.append({"uidmap": [entry], "gidmap": [entry]})
        for content in contents:
            mapping = _pod_map(content)
            if mapping not in self.maps:
                self.maps.append(mapping)


def _contents(pod_maps: t.Any) -> t.List[t.Any]:
    if pod_maps is None:
        return []
    found = list(pod_maps.values()) if isinstance(pod_maps, t.Mapping) else pod_maps
    if not isinstance(found, list):
        raise UnitError(f"pod_maps is {type(found).__name__}, not a list or a dictionary")
    return found


def _pod_map(content: t.Any) -> Maps:
    if isinstance(content, (str, bytes)):
        if len(content) > _MOST_CHARACTERS:
            raise UnitError("pod_maps: an entry is too large")
        try:
            content = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UnitError(
                f"pod_maps: an entry is not the content of a file /var/lib/kubelet/pods/*/userns: {error}"
            ) from None
    found: Maps = {}
    for key, option in (("uidMappings", "uidmap"), ("gidMappings", "gidmap")):
        entries = content.get(key) if isinstance(content, t.Mapping) else None
        if not isinstance(entries, list) or not entries:
            raise UnitError(f"pod_maps: an entry has no {key}, as files userns of the kubelet have")
        found[option] = [_range(entry) for entry in entries]
    return found


def _range(entry: t.Any) -> str:
    values = [entry.get(key) if isinstance(entry, t.Mapping) else None for key in _FIELDS]
    for key, value in zip(_FIELDS, values):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
            raise UnitError(f"pod_maps: {key} is {value!r}, not an ID or a number of IDs")
    _inner, outer, length = (int(value or 0) for value in values)
    if not length or outer + length > 2**32:
        raise UnitError(f"pod_maps: {length} IDs from {outer} on are not a range")
    return ":".join(map(str, values))
