# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Between Ansible and the library: argument specs, errors, results. Nothing else here imports Ansible."""

from __future__ import annotations

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ._storage import userns
from ._storage.errors import StorageError
from ._storage.operations.opening import StoreRequest, account_named

STORE_ARGUMENTS: t.Dict[str, t.Dict[str, t.Any]] = {
    "user": {"type": "str"},
    "storage_conf": {"type": "path"},
    "graphroot": {"type": "path"},
    "runroot": {"type": "path"},
    "driver": {"type": "str"},
    "storage_options": {"type": "list", "elements": "str", "default": []},
    "lock_timeout": {"type": "int", "default": 60},
}


class Request(t.Protocol):
    """What every operation takes: a frozen dataclass that says, first, which store is meant."""

    @property
    def store(self) -> StoreRequest:
        """The store options."""


_Asked = t.TypeVar("_Asked", bound=Request)


def run(
    module: AnsibleModule,
    request: t.Callable[[StoreRequest], _Asked],
    operation: t.Callable[[_Asked], t.Dict[str, t.Any]],
) -> t.NoReturn:
    """Carry out ``operation`` as the store's owner and leave the module.

    ``request`` makes the operation's request from the module's options, given the store that they name. A result
    with an ``error`` fails the module with that message and with all else that the result holds: what was done
    stays said. Its ``facts`` are details of the error.
    """
    try:
        result = _result(module.params, module.params["user"], request, operation)
    except StorageError as error:
        result = {"error": str(error), "facts": dict(error.facts)}
    _leave(module, result)


def run_outside(
    module: AnsibleModule,
    request: t.Callable[[StoreRequest], _Asked],
    operation: t.Callable[[_Asked], t.Dict[str, t.Any]],
) -> t.NoReturn:
    """As :func:`run`, for an operation that enters the store by itself, step by step."""
    try:
        result = operation(request(_store_request(module.params, module.params["user"])))
    except StorageError as error:
        result = {"error": str(error), "facts": dict(error.facts)}
    _leave(module, result)


def run_for_users(
    module: AnsibleModule,
    users: t.Iterable[str],
    request: t.Callable[[StoreRequest], _Asked],
    operation: t.Callable[[_Asked], t.Dict[str, t.Any]],
    join: t.Callable[
        [t.Mapping[str, t.Union[t.Dict[str, t.Any], StorageError]]], t.Dict[str, t.Any]
    ],
) -> t.NoReturn:
    """Carry out ``operation`` in the store of each user, whatever becomes of the others, and leave the module.

    ``join`` makes one result of those of all.
    """
    outcomes: t.Dict[str, t.Union[t.Dict[str, t.Any], StorageError]] = {}
    for user in dict.fromkeys(users):
        try:
            outcomes[user] = _result(module.params, user, request, operation)
        except StorageError as error:
            outcomes[user] = error
    _leave(module, join(outcomes))


def _result(
    params: t.Mapping[str, t.Any],
    user: t.Optional[str],
    request: t.Callable[[StoreRequest], _Asked],
    operation: t.Callable[[_Asked], t.Dict[str, t.Any]],
) -> t.Dict[str, t.Any]:
    store = _store_request(params, user)
    result: t.Dict[str, t.Any] = userns.run(operation, (request(store),), store.account)
    return result


def _leave(module: AnsibleModule, result: t.Dict[str, t.Any]) -> t.NoReturn:
    for warning in result.pop("warnings", ()):
        module.warn(warning)
    if not module._diff:
        result.pop("diff", None)
    message = result.pop("error", None)
    facts = result.pop("facts", {})
    if not message:
        module.exit_json(**result)
    # A fault of the collection's own.
    trace = facts.pop("trace", None)
    if trace is not None:
        facts["exception"] = trace
    module.fail_json(msg=message, **{**facts, **result})


def _store_request(params: t.Mapping[str, t.Any], user: t.Optional[str]) -> StoreRequest:
    return StoreRequest(
        account=account_named(user),
        storage_conf=params["storage_conf"] or "",
        graphroot=params["graphroot"] or "",
        runroot=params["runroot"] or "",
        driver=params["driver"] or "",
        storage_options=tuple(params["storage_options"]),
        lock_timeout=float(params["lock_timeout"]),
    )
