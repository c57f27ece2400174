# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run a function inside a user's namespace, or as root in a mount namespace of its own.

The function runs in a child process with the ID mapping of the store's owner. Only data
of the declared form is returned, through a pipe: see ``channel`` for the messages and ``declared`` for the forms.
"""

from __future__ import annotations

import errno
import os
import pwd
import typing as t

from ..errors import NamespaceError, StorageError
from ..kernel.oserrors import namespace_owner
from ..store.config import Account
from .channel import DEFAULT_LIMITS, Limits
from .declared import returns
from .entering import Forbidden, explain, run_in_child
from .environment import environment
from .podman import run_through_podman

__all__ = ["Limits", "environment", "returns", "run", "run_as", "waiting_for_locks"]


def waiting_for_locks(seconds: float) -> Limits:
    """Limits for a function that may wait this long (seconds) for a lock without progress."""
    limits = Limits()
    return limits._replace(stall=limits.stall + seconds)


def run(
    function: t.Callable[..., t.Any],
    arguments: t.Sequence[t.Any] = (),
    account: t.Optional[Account] = None,
    limits: Limits = DEFAULT_LIMITS,
) -> t.Any:
    """Run a function in a child process with its own mount namespace and, for a user's store, user namespace.

    Root without an account, or with that of root, gets a mount namespace. Root with another account gets that user's
    namespace, mapped by root, and takes the user's IDs before the function starts. A user gets a namespace
    through newuidmap and newgidmap or, if the host forbids that, through ``podman unshare``.

    :param function: a function of a module (imported by name for ``podman unshare``). It must have imported everything
        it needs, because the user may not be able to read root's copy of this library.
    :param arguments: dataclasses and plain data
    :param account: the owner of the store; None for the caller
    :param limits: how long root waits for a process in a user's store
    :returns: the function's result: plain data of the form that the function declares
    :raises StorageError: the function's own error, with its class and fields
    :raises InternalError: any other exception of the function
    :raises WorkerError: the child died, did not respond, or sent invalid data
    :raises NamespaceError: the namespace cannot be created
    """
    own = os.geteuid()
    if account is None and own != 0:
        account = caller(own)
    if account is not None and account.uid == namespace_owner():
        # Inside podman unshare this process already is the user's root.
        account = None
    if account is None or (account.uid == 0 and own == 0):
        return run_in_child(function, arguments, None, limits)
    if own not in (0, account.uid):
        raise NamespaceError(
            f"user {account.name}",
            f"owns the store, but the module runs as the user with UID {own}",
            f"Run as root or as {account.name} (become_user: {account.name}).",
        )
    try:
        return run_in_child(function, arguments, account, limits)
    except Forbidden as error:
        if own == 0 or error.errno == errno.ENOSPC:
            raise explain(account, error) from error
        return run_through_podman(function, arguments, account, error)


def run_as(
    function: t.Callable[..., t.Any],
    arguments: t.Sequence[t.Any],
    account: t.Optional[Account],
    limits: Limits = DEFAULT_LIMITS,
) -> t.Any:
    """Run a function as a user without the user's namespace: for files below a home, and programs of the user.

    Root's child permanently takes the user's IDs and groups before the function starts. Without an account, or for the
    caller's own account, the function runs in this process.

    :raises StorageError: the function's own error; for another user it names that user
    :raises WorkerError: the child died, did not respond, or sent invalid data
    :raises NamespaceError: it is another user's account, and this process does not run as root
    """
    own = os.geteuid()
    if account is None or account.uid in (own, namespace_owner()):
        return function(*arguments)
    if own != 0:
        raise NamespaceError(
            f"user {account.name}",
            f"is not the user with UID {own}, who runs the module",
            f"Run as root or as {account.name} (become_user: {account.name}).",
        )
    try:
        return run_in_child(function, arguments, account, limits, namespace=False)
    except StorageError as error:
        if not error.subject.startswith(("user ", "the store of ")):
            error.subject = f"user {account.name}: {error.subject}"
            error.args = (str(error),)
        raise


def caller(uid: int) -> Account:
    """The account of a UID.

    :raises NamespaceError: there is no such account
    """
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise NamespaceError(
            f"UID {uid}", "has no account", "Run this as a user of /etc/passwd or NSS."
        ) from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)
