# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Calls of layer_template for units and manifests, and the settings for reading them."""

from __future__ import annotations

import dataclasses
import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    ConfigError,
    MapError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.grammar import (
    parse_request,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store import references
from ansible_collections.userns.storage.plugins.plugin_utils._kubelet import Kubelet
from ansible_collections.userns.storage.plugins.plugin_utils._units import UnitError

# The options of one call, and of one mapping in it.
Call = t.Dict[str, t.Any]
Mapping = t.Dict[str, t.Any]


@dataclasses.dataclass
class Settings:
    """The options of the filter, for all units and manifests of one call.

    :ivar slots: the number of containers or pods that need layers with ID ranges of their own
    :ivar runtime: as the option of layer_template; may be empty
    :ivar kubelet: the maps of pods with hostUsers false
    :ivar pause_image: the image of each pod of CRI-O in addition to those of its manifest; may be empty
    :ivar specifiers: values of systemd specifiers by letter
    :ivar variables: values of variables by name
    :ivar notes: warnings about ignored content, a line each
    """

    slots: int = 1
    runtime: str = ""
    kubelet: Kubelet = dataclasses.field(default_factory=Kubelet)
    pause_image: str = ""
    specifiers: t.Mapping[str, str] = dataclasses.field(default_factory=dict)
    variables: t.Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: t.List[str] = dataclasses.field(default_factory=list)

    def checked(self, name: str, mapping: Mapping) -> t.Optional[Mapping]:
        """A mapping with the options of the filter; None for the namespace of the host.

        :param name: the unit or pod, for messages
        :raises UnitError: the mapping is malformed
        """
        try:
            request = parse_request(**mapping)
        except MapError as error:
            raise UnitError(f"{name}: {error}") from error
        if request.kind == "host":
            return None
        mapping = dict(mapping)
        if request.kind == "auto" and self.slots > 1:
            mapping["slots"] = self.slots
        if self.runtime:
            mapping["runtime"] = self.runtime
        return mapping


def checked_image(location: str, image: str) -> str:
    """An image reference that a runtime accepts.

    :param location: its location, for messages
    :raises UnitError: it is malformed
    """
    try:
        references.parse(image)
    except ConfigError as error:
        raise UnitError(f"{location}: {error}") from error
    return image
