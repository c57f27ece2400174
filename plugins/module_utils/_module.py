# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Between Ansible and the library: argument specs, errors, results. Nothing else here imports Ansible."""

from __future__ import annotations

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ._storage import userns
from ._storage.errors import InternalError, StorageError
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
    def store(self) -> StoreRequest: ...


_Asked = t.TypeVar("_Asked", bound=Request)


def run(
    module: AnsibleModule,
    request: t.Callable[[StoreRequest], _Asked],
    operation: t.Callable[[_Asked], t.Dict[str, t.Any]],
) -> t.NoReturn:
    """Carry out ``operation`` as the store's owner and leave the module.

    ``request`` makes the operation's request from the module's options, given the store that they name. A result
    with an ``error`` fails the module with that message and with all else that the result holds: what was done
    stays said.
    """
    try:
        store = _store_request(module.params)
        result = userns.run(operation, (request(store),), store.account)
    except InternalError as error:
        facts = dict(error.facts)
        module.fail_json(msg=str(error), exception=facts.pop("trace", ""), **facts)
    except StorageError as error:
        module.fail_json(msg=str(error), **error.facts)
    for warning in result.pop("warnings", ()):
        module.warn(warning)
    if not module._diff:
        result.pop("diff", None)
    message = result.pop("error", None)
    if message:
        module.fail_json(msg=message, **result)
    module.exit_json(**result)


def _store_request(params: t.Mapping[str, t.Any]) -> StoreRequest:
    return StoreRequest(
        account=account_named(params["user"]),
        storage_conf=params["storage_conf"] or "",
        graphroot=params["graphroot"] or "",
        runroot=params["runroot"] or "",
        driver=params["driver"] or "",
        storage_options=tuple(params["storage_options"]),
        lock_timeout=float(params["lock_timeout"]),
    )
