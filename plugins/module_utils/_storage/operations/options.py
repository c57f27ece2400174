# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tables of options: dataclasses whose fields describe how a task sets them.

The argument specs of the modules, the settings of the service and the slices of the action plugins are made from
these tables. Documentation, role specs and surveys are compared with them by tests/unit/test_options.py.
"""

from __future__ import annotations

import dataclasses
import typing as t

# The value of an option in a task. A list is a tuple.
Value = t.Union[str, bool, int, float, t.Tuple[str, ...]]

_KEY = "option"


@dataclasses.dataclass(frozen=True)
class Option:
    """The definition of an option.

    :param type: the type in Ansible's argument spec
    :param default: the default value; None if there is none
    :param choices: the values that a text may have; empty for any
    :param name: the name in a task, if it differs from the name of the field
    :param field: the name of the field; set by :func:`options_of`
    """

    type: str = "str"
    default: t.Any = None
    choices: t.Tuple[str, ...] = ()
    name: str = ""
    field: str = ""

    def argument(self) -> t.Dict[str, t.Any]:
        """The entry of the argument spec."""
        made: t.Dict[str, t.Any] = {"type": self.type}
        if self.type == "list":
            made["elements"] = "str"
        if self.choices:
            made["choices"] = list(self.choices)
        if self.default is not None:
            made["default"] = list(self.default) if self.type == "list" else self.default
        return made

    def is_given(self, value: t.Any) -> bool:
        """Whether a task sets the option; an empty text only counts if it replaces a default."""
        return value is not None and (value != "" or self.default is not None)


_AnyOption = t.TypeVar("_AnyOption", bound=Option)


def as_option(option: Option) -> t.Mapping[str, t.Any]:
    """The metadata that adds a field of a dataclass to its table of options."""
    return {_KEY: option}


def options_of(table: type, kind: t.Type[_AnyOption]) -> t.Dict[str, _AnyOption]:
    """The options of a table by their names in tasks, in the table's order."""
    declared = {
        field.name: field.metadata[_KEY]
        for field in dataclasses.fields(table)
        if isinstance(field.metadata.get(_KEY), kind)
    }
    return {
        option.name or name: dataclasses.replace(option, field=name)
        for name, option in declared.items()
    }


def argument_spec(options: t.Mapping[str, Option]) -> t.Dict[str, t.Dict[str, t.Any]]:
    """The argument spec of a module that takes these options."""
    return {name: option.argument() for name, option in options.items()}


def given(options: t.Mapping[str, Option], params: t.Mapping[str, t.Any]) -> t.Dict[str, t.Any]:
    """The options that a task sets, with tuples for lists.

    :param params: the parameters of a module, or the settings of a service
    """
    return {
        name: tuple(params[name]) if option.type == "list" else params[name]
        for name, option in options.items()
        if option.is_given(params.get(name))
    }
