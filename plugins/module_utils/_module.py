# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The interface between Ansible and the library: argument specs, errors and results. Only this file imports Ansible."""

from __future__ import annotations

import contextlib
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ._storage.errors import StorageError
from ._storage.operations import result_merging
from ._storage.operations.options import argument_spec
from ._storage.operations.results import refuse_other_users
from ._storage.operations.store_opening import (
    STORE_OPTIONS,
    StoreRequest,
    account_named,
    store_request,
)
from ._storage.printable import printable, printable_diff, printable_lines, without_controls
from ._storage.userns import running as userns
from ._storage.userns.work import unexpected

STORE_ARGUMENTS = {
    "user": {"type": "str"},
    "users": {"type": "list", "elements": "str"},
    **argument_spec(STORE_OPTIONS),
}

# A single store cannot belong to several users.
STORE_EXCLUSIVE = [("users", option) for option in ("user", "graphroot", "runroot")]

# Seconds for which root waits for the work in a user's store after the time limit.
_BEYOND_TIME_LIMIT = 3600.0
# Characters.
_LONGEST_MESSAGE = 16_000


class Request(t.Protocol):
    """The parameter of an operation: a frozen dataclass whose first field is the store."""

    @property
    def store(self) -> StoreRequest:
        """The store options."""


_RequestT = t.TypeVar("_RequestT", bound=Request)
_Declared = t.TypeVar("_Declared")
# Merges the results of several users.
Join = t.Callable[[t.Mapping[str, t.Union[t.Dict[str, t.Any], StorageError]]], t.Dict[str, t.Any]]


def run(
    module: AnsibleModule,
    request: t.Callable[[StoreRequest], _RequestT],
    operation: t.Callable[[_RequestT], t.Dict[str, t.Any]],
    join: Join = result_merging.merged,
) -> t.NoReturn:
    """Carry out ``operation`` as the store's owner and leave the module.

    ``request`` creates the operation's request from the module's options and the store that they name. A result
    with an ``error`` fails the module with that message and all other fields of the result, which describe the
    work that was done. Its ``facts`` are details of the error.

    With the option ``users``, the operation works in the store of each user, even if those of other users fail, and
    ``join`` merges the results.
    """
    _run(module, request, operation, join, outside=False)


def run_outside(
    module: AnsibleModule,
    request: t.Callable[[StoreRequest], _RequestT],
    operation: t.Callable[[_RequestT], t.Dict[str, t.Any]],
    join: Join = result_merging.merged,
) -> t.NoReturn:
    """As :func:`run`, for an operation that enters the store itself for single steps."""
    _run(module, request, operation, join, outside=True)


def _run(
    module: AnsibleModule,
    request: t.Callable[[StoreRequest], _RequestT],
    operation: t.Callable[[_RequestT], t.Dict[str, t.Any]],
    join: Join,
    *,
    outside: bool,
) -> t.NoReturn:
    users = module.params["users"]
    if users is not None:
        _run_for_users(module, users, request, operation, join, outside=outside)
    try:
        with _unexpected_explained():
            result = _result(
                module.params, module.params["user"], request, operation, outside=outside
            )
    except StorageError as error:
        result = {"error": str(error), "facts": dict(error.facts)}
    leave(module, result)


def run_as_root(
    module: AnsibleModule,
    request: _Declared,
    operation: t.Callable[[_Declared], t.Dict[str, t.Any]],
) -> t.NoReturn:
    """Carry out an operation in this process, and exit the module."""
    try:
        with _unexpected_explained():
            result = operation(request)
    except StorageError as error:
        result = {"error": str(error), "facts": dict(error.facts)}
    leave(module, result)


@contextlib.contextmanager
def _unexpected_explained() -> t.Iterator[None]:
    """Convert unexpected exceptions to errors of the library.

    :raises InternalError: for any of them
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        raise unexpected(error) from error


def _run_for_users(
    module: AnsibleModule,
    users: t.Iterable[str],
    request: t.Callable[[StoreRequest], _RequestT],
    operation: t.Callable[[_RequestT], t.Dict[str, t.Any]],
    join: Join,
    *,
    outside: bool,
) -> t.NoReturn:
    outcomes: t.Dict[str, t.Union[t.Dict[str, t.Any], StorageError]] = {}
    for user in dict.fromkeys(users):
        try:
            with _unexpected_explained():
                outcomes[user] = _result(module.params, user, request, operation, outside=outside)
        except StorageError as error:
            outcomes[user] = error
    leave(module, join(outcomes))


def _result(
    params: t.Mapping[str, t.Any],
    user: t.Optional[str],
    request: t.Callable[[StoreRequest], _RequestT],
    operation: t.Callable[[_RequestT], t.Dict[str, t.Any]],
    *,
    outside: bool,
) -> t.Dict[str, t.Any]:
    store = store_request(account_named(user), params)
    result: t.Dict[str, t.Any]
    if outside:
        result = operation(request(store))
    else:
        limits = userns.waiting_for_locks(store.lock_timeout)
        if params.get("time_limit") is not None:
            # The total time of a user's process is limited; reading a large store takes time.
            limits = limits._replace(
                total=min(limits.total, max(params["time_limit"], 0) + _BEYOND_TIME_LIMIT)
            )
        result = userns.run(operation, (request(store),), store.account, limits)
    refuse_other_users(result, store.account.name if store.account else "root")
    return result


def leave(module: AnsibleModule, result: t.Dict[str, t.Any]) -> t.NoReturn:
    """Exit the module with a result, which may contain ``warnings``, ``error`` and ``facts``."""
    for warning in result.pop("warnings", ()):
        module.warn(printable(warning, _LONGEST_MESSAGE))
    diff = result.pop("diff", None)
    if module._diff and diff is not None:
        result["diff"] = _shown_diff(diff)
    message = result.pop("error", None)
    facts = without_controls(result.pop("facts", {}))
    result = without_controls(result)
    if not message:
        module.exit_json(**result)
    if "path" in facts:
        # Ansible examines the "path" of a result with the permissions of this process, and it may be in a user's reach.
        facts["file"] = facts.pop("path")
    # A fault of the collection's own.
    trace = facts.pop("trace", None)
    if trace is not None:
        facts["exception"] = printable_lines(trace)
    # Some callbacks display it without escaping.
    if "stderr" in facts:
        facts["stderr"] = printable_lines(facts["stderr"])
    module.fail_json(msg=printable(message, _LONGEST_MESSAGE), **{**facts, **result})


def _shown_diff(diff: t.Any) -> t.Any:
    """A diff with texts for Ansible to display; other values are displayed as JSON."""
    if isinstance(diff, list):
        return [_shown_diff(item) for item in diff]
    return {
        name: printable(value, _LONGEST_MESSAGE)
        if name.endswith("_header")
        else printable_diff(value)
        if isinstance(value, str)
        else value
        for name, value in diff.items()
    }
