# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Enter namespaces: a forked child creates them, and its parent maps the IDs and waits for the result."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import resource
import signal
import subprocess
import typing as t

from ..errors import NamespaceError
from ..idmap.subids import namespace_mapping, subordinate_ids
from ..kernel import namespaces, termination
from ..store.config import Account
from .channel import ENTERED, FORBIDDEN, UNLIMITED, Limits, Receiver, Sender
from .environment import environment, find_program
from .waiting import Ended, death, killed, outcome, signals_passed_on, wait_for_end
from .work import errors_sent, work

if t.TYPE_CHECKING:
    from ..idmap.ranges import IDMap

# Imported now, because the user may not be able to read root's folders, and the codec is a separate module.
codecs.lookup("ascii")

# The memory limit in bytes for work in a user's store for which root waits; 10,000 layers need a tenth of it.
MEMORY_LIMIT = 2 * 1024**3


class Forbidden(Exception):
    """The kernel or a security module does not allow the namespace."""

    def __init__(self, number: int, step: str) -> None:
        super().__init__(number, step)
        self.errno = number
        self.step = step

    @property
    def reason(self) -> str:
        """The cause as part of a message."""
        return f"{self.step}: {os.strerror(self.errno)}"


def explain(account: t.Optional[Account], error: Forbidden) -> NamespaceError:
    """The error for a namespace that cannot be created.

    :param account: the user whose namespace it is; None for a mount namespace of root
    """
    subject = f"user {account.name}" if account is not None else "root"
    kind = "user" if account is not None else "mount"
    if error.errno == errno.ENOSPC:
        limit = "user.max_user_namespaces" if account is not None else "user.max_mnt_namespaces"
        return NamespaceError(
            subject,
            f"cannot create another {kind} namespace, because the host's limit is reached",
            f"Raise it: sysctl {limit}=15000",
        )
    return NamespaceError(
        subject, f"cannot create a {kind} namespace: {error.reason}", _hint(error.errno, error.step)
    )


# The steps of a child before its function runs.
_UNSHARE = "unshare"
_TAKE_GROUPS = "taking the groups of the user"
_TAKE_IDS = "taking the IDs of the user"
_BECOME_ROOT = "becoming root of the namespace"
_MOUNT = "mounting in the new namespace"
_MISSING_FEATURE = (
    "The kernel has no such namespaces (for users CONFIG_USER_NS, see user_namespaces(7)), or the seccomp profile of "
    "a container blocks the system call."
)
_INVALID = {
    _UNSHARE: _MISSING_FEATURE,
    **dict.fromkeys(
        (_TAKE_GROUPS, _TAKE_IDS, _BECOME_ROOT),
        "An ID has no mapping in the current user namespace. See /proc/self/uid_map and /proc/self/gid_map there.",
    ),
    _MOUNT: "The root directory is not a mount point, as in a chroot. Run the task outside of it.",
}


def _hint(number: int, step: str) -> str:
    """What to do if a step fails."""
    if number == errno.ENOSYS:
        return _MISSING_FEATURE
    if number == errno.EINVAL and step in _INVALID:
        return _INVALID[step]
    if number not in (errno.EPERM, errno.EACCES):
        return "Fix the cause, then run the task again; `dmesg` may show more details."
    if os.geteuid() == 0:
        return "Inside a container, give it the capabilities SYS_ADMIN, SETUID and SETGID."
    return (
        "The host restricts user namespaces of users. See `sysctl kernel.unprivileged_userns_clone "
        "user.max_user_namespaces kernel.apparmor_restrict_unprivileged_userns`; sysctl prints an error for those "
        "that the host does not have. Inside a container, its seccomp profile may be the cause."
    )


# The parent's side


def run_in_child(
    function: t.Callable[..., t.Any],
    arguments: t.Sequence[t.Any],
    account: t.Optional[Account],
    limits: Limits,
    namespace: bool = True,
) -> t.Any:
    """Run a function in a child process with a mount namespace and, for an account, a user namespace.

    :param namespace: false for a child of root that only takes the account's IDs
    :param limits: how long root waits for a user's process; users wait for their own processes without limit
    :raises StorageError: the function's own error
    :raises Forbidden: the user may not create a user namespace
    :raises NamespaceError: it cannot be created for another reason
    :raises WorkerError: the child died, did not respond, or sent invalid data
    """
    maps: t.Optional[t.Tuple[IDMap, IDMap]] = None
    watched = account is not None and os.geteuid() == 0
    if account is not None and namespace:
        found = namespace_mapping(
            account.uid, account.gid, subordinate_ids(account.name, account.uid)
        )
        maps = (found.uid, found.gid)
    parent = os.getpid()
    upstream, writer = os.pipe()
    gate, downstream = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            sender = Sender(writer)
            with errors_sent(sender):
                os.close(upstream)
                os.close(downstream)
                if account is not None and not namespace:
                    _become(account, parent)
                    entered = True
                else:
                    entered = _enter(sender, gate, account, parent)
                if entered:
                    os.close(gate)
                    if watched:
                        _limit_memory()
                    work(sender, function, arguments)
        finally:
            os._exit(1)
    os.close(writer)
    os.close(gate)
    owner = f"user {account.name}" if account is not None else "root"
    receiver = Receiver(upstream, limits if watched else UNLIMITED)
    alive = True

    def map_ids(_message: t.Dict[str, t.Any]) -> None:
        if account is not None and maps is not None:
            _map_ids(pid, account, maps)
            # The return value shows whether it was waited for.
            with contextlib.suppress(BrokenPipeError):
                os.write(downstream, b"\n")

    def forbid(message: t.Dict[str, t.Any]) -> None:
        raise Forbidden(message["errno"], message["step"])

    try:
        with signals_passed_on(pid, receiver):
            try:
                handlers = {ENTERED: map_ids, FORBIDDEN: forbid} if namespace else {}
                return outcome(receiver, function, owner, handlers)
            except Ended:
                pass
        # Its end of the pipe is closed, but it may still run.
        status = wait_for_end(pid)
        alive = status is None
        raise death(owner, -signal.SIGKILL if status is None else status, receiver.step)
    except Forbidden as error:
        if account is not None:
            raise
        raise explain(None, error) from error
    finally:
        os.close(upstream)
        os.close(downstream)
        if alive:
            # After its last message the child has no more work.
            killed(pid)


def _map_ids(pid: int, account: Account, maps: t.Tuple[IDMap, IDMap]) -> None:
    for kind, id_map in zip(("uid", "gid"), maps):
        if os.geteuid() == 0:
            try:
                namespaces.write_map(pid, kind, id_map.ranges)
            except OSError as error:
                raise NamespaceError(
                    f"user {account.name}",
                    f"the {kind} map {id_map} was rejected: {error.strerror}",
                    f"See the lines of {account.name} in /etc/sub{kind}.",
                ) from error
            continue
        program = find_program(f"new{kind}map")
        if program is None:
            raise NamespaceError(
                f"new{kind}map",
                "is not installed, which is required for rootless stores",
                "Install the package uidmap (Debian, Ubuntu) or shadow-utils (Fedora, RHEL).",
            )
        numbers = [str(number) for entry in id_map.ranges for number in entry]
        done = subprocess.run(
            [program, str(pid), *numbers],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip()
            raise NamespaceError(
                f"user {account.name}",
                f"{program} rejected the {kind} map {id_map}: "
                f"{reason or f'exit status {done.returncode}'}",
                f"See the lines of {account.name} in /etc/sub{kind}, and whether {program} is "
                "setuid root or has the file capability.",
            )


# The child's side


def become(account: Account, parent: int) -> None:
    """Permanently take an account's IDs, groups and environment in this child of root.

    :param parent: the PID of the process that forked it, with whose end it ends
    """
    _default_signals()
    _set_groups(account)
    os.setresgid(account.gid, account.gid, account.gid)
    os.setresuid(account.uid, account.uid, account.uid)
    namespaces.die_with_parent(parent)
    _set_environment(environment(os.environ, account, own=False))


def _become(account: Account, parent: int) -> None:
    """As :func:`become`, with an error for the parent."""
    try:
        become(account, parent)
    except OSError as error:
        raise NamespaceError(
            f"user {account.name}",
            f"root cannot take the IDs of this user: {error.strerror}",
            _hint(error.errno or 0, _TAKE_IDS),
        ) from error


def _default_signals() -> None:
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for number in termination.SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _set_groups(account: Account) -> None:
    """Set the user's groups as root, because that is not possible later."""
    os.setgroups(os.getgrouplist(account.name, account.gid))


def _environment_of(account: Account) -> t.Dict[str, str]:
    """The environment, checked with the user's permissions, because its variables may name paths of the user."""
    if os.geteuid() != 0:
        return environment(os.environ, account, own=True)
    os.setegid(account.gid)
    os.seteuid(account.uid)
    try:
        return environment(os.environ, account, own=False)
    finally:
        os.seteuid(0)
        os.setegid(0)


def _set_environment(environ: t.Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environ)


def _enter(sender: Sender, gate: int, account: t.Optional[Account], parent: int) -> bool:
    """Enter the child's namespaces; false if that failed and was reported."""
    _default_signals()
    namespaces.die_with_parent(parent)
    step = _UNSHARE
    try:
        if account is None:
            namespaces.unshare(namespaces.CLONE_NEWNS)
        else:
            if os.geteuid() == 0:
                step = _TAKE_GROUPS
                _set_groups(account)
                step = _UNSHARE
            # Before the namespace is entered, in which owners have other numbers.
            environ = _environment_of(account)
            namespaces.die_with_parent(parent)
            _set_environment(environ)
            namespaces.unshare(namespaces.CLONE_NEWUSER | namespaces.CLONE_NEWNS)
            sender.send(ENTERED, {"pid": os.getpid()})
            if not os.read(gate, 1):
                return False
            step = _BECOME_ROOT
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        step = _MOUNT
        namespaces.isolate_mounts()
        # Each change of credentials cancels it.
        namespaces.die_with_parent(parent)
    except OSError as error:
        sender.send(FORBIDDEN, {"errno": error.errno or 0, "step": step})
        return False
    return True


def _limit_memory() -> None:
    _soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(hard, MEMORY_LIMIT)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
