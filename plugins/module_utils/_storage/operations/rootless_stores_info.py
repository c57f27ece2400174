# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module rootless_stores_info: find the users who have a store, with each user's own permissions, and the stores
whose images are shared with users.
"""

from __future__ import annotations

import os
import pwd
import time
import typing as t

from ..errors import StorageError, WorkerError
from ..printable import printable
from ..store.config import Account
from ..userns import running as userns
from ..userns.shapes import Maybe, text
from .shared_declarations import declarations
from .store_opening import StoreRequest, configured

# Seconds; home directories may be on network filesystems that do not respond.
_LIMITS = userns.Limits(silence=10.0, stall=10.0, total=30.0)
# The total time (seconds) for unresponsive home directories below the same folder. Any user can make the own home
# directory unresponsive, so a few of them must not affect other users; but the server of all of them may be down.
_PATIENCE = 300.0


def find() -> t.Dict[str, t.Any]:
    """Look for a store of each account of the host except root.

    :returns: ``stores`` with ``user``, ``uid`` and ``graphroot``; ``failures`` with ``user`` and ``reason``;
        ``shared_stores`` as :func:`_shared_stores`
    :raises ConfigError: a declaration of a shared store cannot be read
    """
    stores: t.List[t.Dict[str, t.Any]] = []
    failures: t.List[t.Dict[str, str]] = []
    # Seconds, by folder of homes.
    waited: t.Dict[str, float] = {}
    seen: t.Set[int] = set()
    for entry in pwd.getpwall():
        above = os.path.dirname(entry.pw_dir)
        if entry.pw_uid == 0 or entry.pw_uid in seen or not os.path.isabs(entry.pw_dir):
            continue
        seen.add(entry.pw_uid)
        if waited.get(above, 0.0) > _PATIENCE:
            reason = f"not examined, because too many home directories in {printable(above)} do not respond"
            failures.append({"user": entry.pw_name, "reason": reason})
            continue
        account = Account(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)
        before = time.monotonic()
        try:
            graphroot = userns.run_as(_graphroot, (account,), account, _LIMITS)
        except WorkerError as error:
            waited[above] = waited.get(above, 0.0) + time.monotonic() - before
            failures.append({"user": entry.pw_name, "reason": str(error)})
        except StorageError as error:
            failures.append({"user": entry.pw_name, "reason": str(error)})
        else:
            if graphroot is not None:
                stores.append({"user": entry.pw_name, "uid": entry.pw_uid, "graphroot": graphroot})
    return {"stores": stores, "failures": failures, "shared_stores": _shared_stores()}


def _shared_stores() -> t.List[t.Dict[str, t.Any]]:
    """``graphroot``, ``runroot`` and ``users`` of each store that shared_images shares; mappings of a user do not
    include the one that every user gets."""
    return [
        {
            "graphroot": declaration.graphroot,
            "runroot": declaration.runroot,
            "users": [
                {
                    "user": name,
                    "images": list(share.images),
                    "mappings": sum(options.slots for options in share.mappings),
                }
                for name, share in sorted(declaration.users.items())
            ],
        }
        for declaration in declarations()
    ]


@userns.returns(Maybe(text))
def _graphroot(account: Account) -> t.Optional[str]:
    """The location of the account's store; None if it has no store or uses a store of another user."""
    graphroot = configured(StoreRequest(account=account)).graphroot
    try:
        names = os.listdir(graphroot)
        owner = os.stat(graphroot).st_uid
    except OSError:
        return None
    written = any(name.endswith(("-layers", "-images")) for name in names)
    return graphroot if written and owner == account.uid else None
