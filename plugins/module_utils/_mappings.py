# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The options that describe a mapping, shared by all modules that have them."""

from __future__ import annotations

import typing as t

from ._storage.operations.mapping_options import MAPS, OPTIONS, MappingOptions
from ._storage.operations.options import argument_spec, given

# The options of a mapping, and their combinations.
MAPPING_ARGUMENTS = argument_spec(OPTIONS)
MAPPING_OPTIONS = ("userns", *MAPS)
# The user namespace alone.
USERNS_ARGUMENTS = {name: MAPPING_ARGUMENTS[name] for name in MAPPING_OPTIONS}
MAPPING_EXCLUSIVE = [("userns", option) for option in MAPS]
MAPPINGS_ARGUMENT: t.Dict[str, t.Any] = {
    "type": "list",
    "elements": "dict",
    "options": MAPPING_ARGUMENTS,
    "mutually_exclusive": MAPPING_EXCLUSIVE,
    "required_one_of": [MAPPING_OPTIONS],
}


def read_mapping(options: t.Mapping[str, t.Any]) -> MappingOptions:
    """The mapping that a task declares."""
    return MappingOptions(**given(OPTIONS, options))


def read_userns(options: t.Mapping[str, t.Any]) -> t.Optional[MappingOptions]:
    """The user namespace that a task declares for all containers of an image; None if it declares none."""
    return read_mapping(options) if any(map(options.get, MAPPING_OPTIONS)) else None
