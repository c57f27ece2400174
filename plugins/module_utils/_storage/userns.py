# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Run a function inside a user's namespace, or as root in a mount namespace of its own.

The function runs in a child process that sees the store with the IDs with which the store's owner
sees it; the result, an error of this library's family, or progress comes back through a pipe.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import enum
import errno
import importlib
import io
import os
import pickle
import pwd
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
import typing as t

from . import errors
from .errors import InternalError, NamespaceError, StorageError
from .idmap.subids import namespace_mapping, subordinate_ids
from .kernel import cycles, endings, namespaces

if t.TYPE_CHECKING:
    from .idmap.ranges import IDMap

# A user cannot import from root's folders any more, and this codec is a module of its own.
codecs.lookup("ascii")

_HEADER = struct.Struct(">cQ")
_RESULT, _ERROR, _PROGRESS = b"R", b"E", b"P"
# The child stands in its new namespace and waits for the ID maps; or may not have one.
_ENTERED, _FORBIDDEN = b"U", b"F"
_MAX_FRAME = 256 * 2**20

_PACKAGE = __name__.rpartition(".")[0]
# What an instance may be made of, on the way from a less privileged process to this one.
_PLAIN = {
    "builtins": {"set", "frozenset", "bytearray", "complex", "range", "slice"},
    "collections": {"OrderedDict", "deque"},
    "datetime": {"datetime", "date", "time", "timedelta", "timezone"},
}

# Variables with a path are taken over only when that path belongs to the account.
_PATH_VARIABLES = ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")
_FILE_VARIABLES = ("CONTAINERS_STORAGE_CONF", "CONTAINERS_STORAGE_CONF_OVERRIDE", "CONTAINERS_CONF")
# The rest of root's environment that means the same to another account.
_NEUTRAL = (
    *("PATH", "TZ", "LANG", "LANGUAGE", "STORAGE_DRIVER", "STORAGE_OPTS"),
    *("_CONTAINERS_OVERLAY_DISABLE_IDMAP", "_TEST_FORCE_SUPPORT_SHIFTING"),
)

# The program that `podman unshare` runs: the library's own path, then everything else from stdin.
_BOOT = (
    "import importlib, pickle, sys; source = sys.stdin.buffer; "
    "sys.path[:], name = pickle.load(source); importlib.import_module(name).serve(source)"
)


class Account(t.Protocol):
    """What must be known of a user; store.config.Account is one."""

    @property
    def name(self) -> str:
        """Login name."""

    @property
    def uid(self) -> int:
        """Host UID."""

    @property
    def gid(self) -> int:
        """Host GID of the primary group."""

    @property
    def home(self) -> str:
        """Home directory."""


def run(
    function: t.Callable[..., t.Any],
    arguments: t.Sequence[t.Any] = (),
    account: t.Optional[Account] = None,
    progress: t.Optional[t.Callable[[t.Any], None]] = None,
) -> t.Any:
    """Run a function in a child process that owns its mounts and, for a user's store, its IDs.

    Root without an account, or with that of root, gets a mount namespace. Root with another
    account gets that user's namespace, mapped by root, and has become that user before the function
    starts. A user gets the own namespace through newuidmap and newgidmap or, where the host
    forbids that, through `podman unshare`.

    :param function: a function of a module (for `podman unshare` it is found by its name). It must
        have imported all it needs: root's copy of this library may be out of a user's reach.
    :param account: whose store it is; None is the caller
    :param progress: called here with what the function sends; the function then gets a sender as
        the keyword argument `progress`
    :returns: the function's result: plain types, and what of this library only holds data
    :raises StorageError: the function's own error, class and fields kept
    :raises InternalError: any other exception of the function, or its death
    :raises NamespaceError: the namespace cannot be had
    """
    own = os.geteuid()
    if account is None and own != 0:
        account = _caller(own)
    if account is None or (account.uid == 0 and own == 0):
        return _in_child(function, arguments, None, progress)
    if own not in (0, account.uid):
        raise NamespaceError(
            f"user {account.name}",
            f"whose store it is, is not the user with UID {own} who runs this",
            f"Become root or {account.name} (become_user: {account.name}).",
        )
    try:
        return _in_child(function, arguments, account, progress)
    except _Forbidden as error:
        if own == 0 or error.errno == errno.ENOSPC:
            raise _explain(account, error) from error
        return _through_podman(function, arguments, account, progress, error)


class _Forbidden(Exception):
    """The kernel or a security module does not allow the namespace."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(number, what)
        self.errno = number
        self.what = what


class _Login(t.NamedTuple):
    name: str
    uid: int
    gid: int
    home: str


def _caller(uid: int) -> _Login:
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        raise NamespaceError(
            f"UID {uid}", "has no account", "Run this as a user of /etc/passwd or NSS."
        ) from None
    return _Login(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


def _explain(account: Account, error: _Forbidden) -> NamespaceError:
    if error.errno == errno.ENOSPC:
        return NamespaceError(
            f"user {account.name}",
            "may make no further user namespace, the host's limit is reached",
            "Raise it: sysctl user.max_user_namespaces=15000",
        )
    return NamespaceError(
        f"user {account.name}",
        f"gets no user namespace: {error.what}: {os.strerror(error.errno)}",
        "See sysctl kernel.unprivileged_userns_clone, user.max_user_namespaces and "
        "kernel.apparmor_restrict_unprivileged_userns.",
    )


# The parent's side


def _in_child(
    function: t.Callable[..., t.Any],
    arguments: t.Sequence[t.Any],
    account: t.Optional[Account],
    progress: t.Optional[t.Callable[[t.Any], None]],
) -> t.Any:
    maps: t.Optional[t.Tuple[IDMap, IDMap]] = None
    environ: t.Optional[t.Dict[str, str]] = None
    if account is not None:
        found = namespace_mapping(
            account.uid, account.gid, subordinate_ids(account.name, account.uid)
        )
        maps = (found.uid, found.gid)
        # Looked at from outside: owners have other numbers in the namespace.
        environ = environment(os.environ, account, os.geteuid() != 0)
    parent = os.getpid()
    upstream, writer = os.pipe()
    gate, downstream = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(upstream)
            os.close(downstream)
            channel = _Channel(writer)
            if _enter(channel, gate, account, parent):
                os.close(gate)
                if environ is not None:
                    os.environ.clear()
                    os.environ.update(environ)
                _work(channel, function, arguments, progress is not None)
        finally:
            os._exit(1)
    os.close(writer)
    os.close(gate)
    alive = True
    try:
        with os.fdopen(upstream, "rb") as source, _passed_on(pid):
            for kind, payload in _frames(source):
                if kind == _FORBIDDEN:
                    number, what = _load(payload)
                    raise _Forbidden(int(number), str(what))
                if kind == _ENTERED and account is not None and maps is not None:
                    _map_ids(pid, account, maps)
                    os.write(downstream, b"\n")
                    continue
                outcome = _receive(kind, payload, progress)
                if outcome is not None:
                    return outcome[0]
        alive = False
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        raise _died(-status if status < 0 else status, status < 0)
    except _Forbidden as error:
        if account is not None:
            raise
        raise NamespaceError(
            "root",
            f"gets no mount namespace: {error.what}: {os.strerror(error.errno)}",
            "Inside a container, give it the capability SYS_ADMIN.",
        ) from error
    finally:
        os.close(downstream)
        if alive:
            # After its last frame a child has nothing to lose.
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@contextlib.contextmanager
def _passed_on(pid: int) -> t.Iterator[None]:
    """Let a child end its work in its own way where this process is told to end; which it does after that."""
    received: t.List[int] = []

    def pass_on(number: int, _frame: t.Any) -> None:
        received.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in endings.SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            os.kill(os.getpid(), received[0])


@contextlib.contextmanager
def _unread_with(pid: int) -> t.Iterator[None]:
    """Tell a process whose output is not ours that nobody reads ours any more."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            if endings.nobody_listens(patience=0.5):
                with contextlib.suppress(ProcessLookupError):
                    # Not a hangup, which is ignored below nohup.
                    os.kill(pid, signal.SIGTERM)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()


def _map_ids(pid: int, account: Account, maps: t.Tuple[IDMap, IDMap]) -> None:
    for kind, one in zip(("uid", "gid"), maps):
        if os.geteuid() == 0:
            try:
                namespaces.write_map(pid, kind, one.ranges)
            except OSError as error:
                raise NamespaceError(
                    f"user {account.name}",
                    f"the {kind} map {one} was refused: {error.strerror}",
                    f"See the lines of {account.name} in /etc/sub{kind}.",
                ) from error
            continue
        program = _find(f"new{kind}map")
        if program is None:
            raise NamespaceError(
                f"new{kind}map",
                "is not installed, and rootless stores cannot be worked on without it",
                "Install the package uidmap (Debian, Ubuntu) or shadow-utils (Fedora, RHEL).",
            )
        numbers = [str(number) for entry in one.ranges for number in entry]
        done = subprocess.run(
            [program, str(pid), *numbers],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}"
            raise NamespaceError(
                f"user {account.name}",
                f"{program} refused the {kind} map {one}: {said}",
                f"See the lines of {account.name} in /etc/sub{kind}, and whether {program} is "
                "setuid root or has the file capability.",
            )


def _find(program: str) -> t.Optional[str]:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/bin", "/bin", "/usr/sbin"])
    return shutil.which(program, path=path)


def _receive(
    kind: bytes, payload: bytes, progress: t.Optional[t.Callable[[t.Any], None]]
) -> t.Optional[t.Tuple[t.Any]]:
    """Handle a frame; a tuple holds the result."""
    if kind == _PROGRESS:
        if progress is not None:
            progress(_load(payload))
        return None
    if kind == _RESULT:
        return (_load(payload),)
    if kind == _ERROR:
        error = _load(payload)
        if isinstance(error, StorageError):
            raise error
    raise InternalError("the work inside the namespace", f"sent something unknown: {kind!r}")


def _died(number: int, by_signal: bool) -> InternalError:
    if not by_signal:
        cause, way_out = f"ended with status {number} and no answer", ""
    else:
        cause = f"was killed by signal {number}"
        way_out = "Run it again; the rubbish is removed then."
        if number == signal.SIGKILL:
            way_out = f"If memory ran out, the kernel log says so. {way_out}"
    return InternalError("the work inside the namespace", cause, way_out)


def _frames(source: t.IO[bytes]) -> t.Iterator[t.Tuple[bytes, bytes]]:
    while True:
        header = source.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return
        kind, size = _HEADER.unpack(header)
        if size > _MAX_FRAME:
            return
        payload = source.read(size)
        if len(payload) < size:
            return
        yield kind, payload


class _Reader(pickle.Unpickler):
    """Unpickles data only: what comes from a user's process must not run code as root."""

    def find_class(self, module: str, name: str) -> t.Any:
        """Give out plain classes, and those of this library that only hold data."""
        if "." not in name:
            if name in _PLAIN.get(module, ()):
                return getattr(importlib.import_module(module), name)
            if module == errors.__name__ and name == "_rebuild":
                return _rebuild_error
            if module.startswith(_PACKAGE + "."):
                found = getattr(importlib.import_module(module), name, None)
                if isinstance(found, type) and _holds_data(found):
                    return found
        raise pickle.UnpicklingError(f"{module}.{name} is not accepted from a namespace")


def _holds_data(kind: type) -> bool:
    return dataclasses.is_dataclass(kind) or issubclass(kind, (tuple, enum.Enum, StorageError))


def _rebuild_error(kind: t.Any, *fields: t.Any) -> t.Any:
    if not (isinstance(kind, type) and issubclass(kind, StorageError)):
        raise pickle.UnpicklingError("not an error of this library")
    return kind(*fields[:3], **fields[3])


def _load(payload: bytes) -> t.Any:
    try:
        with cycles.unsearched():
            return _Reader(io.BytesIO(payload)).load()
    except Exception as error:
        # A hostile pickle can raise anything at all.
        raise InternalError(
            "the answer from inside the namespace", f"cannot be read: {error}"
        ) from error


# Through podman, where only podman may make user namespaces


def _through_podman(
    function: t.Callable[..., t.Any],
    arguments: t.Sequence[t.Any],
    account: Account,
    progress: t.Optional[t.Callable[[t.Any], None]],
    reason: _Forbidden,
) -> t.Any:
    podman = _find("podman")
    if podman is None:
        raise _explain(account, reason)
    if "<" in function.__qualname__ or function.__module__ == "__main__":
        raise InternalError(
            f"{function.__module__}.{function.__qualname__}", "cannot be found by name in a child"
        )
    parent = os.getpid()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [podman, "unshare", sys.executable or "python3", "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env=environment(os.environ, account, True),
            cwd="/",
            preexec_fn=lambda: namespaces.die_with_parent(parent),
        )
        try:
            return _converse(process, function, arguments, progress)
        except _NoAnswer:
            said.seek(0)
            words = said.read(4096).decode(errors="replace").strip()
            raise NamespaceError(
                f"user {account.name}",
                f"gets no user namespace, neither directly ({reason.what}: "
                f"{os.strerror(reason.errno)}) nor through podman unshare: {words or 'no answer'}",
                f"Try as {account.name}: podman unshare cat /proc/self/uid_map",
            ) from reason
        finally:
            process.kill()
            process.wait()


class _NoAnswer(Exception):
    """The program ended without having sent a frame."""


def _converse(
    process: subprocess.Popen[bytes],
    function: t.Callable[..., t.Any],
    arguments: t.Sequence[t.Any],
    progress: t.Optional[t.Callable[[t.Any], None]],
) -> t.Any:
    sink, source = process.stdin, process.stdout
    if sink is None or source is None:
        raise _NoAnswer
    call = (function.__module__, function.__qualname__, arguments, progress is not None)
    try:
        # Closing flushes once more, so a program that never read ends here in either case.
        with sink:
            sink.write(pickle.dumps((sys.path, __name__), protocol=4))
            sink.write(pickle.dumps(call, protocol=4))
    except BrokenPipeError:
        raise _NoAnswer from None
    heard = False
    with source, contextlib.ExitStack() as undo:
        for kind, payload in _frames(source):
            if kind == _ENTERED:
                heard = True
                pid = int(_load(payload))
                undo.enter_context(_passed_on(pid))
                undo.enter_context(_unread_with(pid))
                continue
            outcome = _receive(kind, payload, progress)
            if outcome is not None:
                return outcome[0]
    if not heard:
        raise _NoAnswer
    status = process.wait()
    raise _died(-status if status < 0 else status, status < 0)


def serve(source: t.IO[bytes]) -> None:
    """What runs inside `podman unshare`: read the call from stdin, answer on stdout.

    :param source: stdin, from which the parent's first item has been read
    """
    namespaces.die_with_parent(os.getppid())
    channel = _Channel(os.dup(1))
    os.dup2(2, 1)
    module, name, arguments, wants_progress = pickle.load(source)
    namespaces.unshare(namespaces.CLONE_NEWNS)
    namespaces.isolate_mounts()
    channel.send(_ENTERED, os.getpid())
    function: t.Any = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    _work(channel, function, arguments, wants_progress)


# The child's side


class _Channel:
    """The child's end of the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, kind: bytes, value: t.Any) -> None:
        with cycles.unsearched():
            payload = pickle.dumps(value, protocol=4)
        data = memoryview(_HEADER.pack(kind, len(payload)) + payload)
        while data:
            data = data[os.write(self._descriptor, data) :]


def _enter(channel: _Channel, gate: int, account: t.Optional[Account], parent: int) -> bool:
    """Take the child into its namespaces; false when that failed and was reported."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    for number in endings.SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    namespaces.die_with_parent(parent)
    what = "unshare"
    try:
        if account is None:
            namespaces.unshare(namespaces.CLONE_NEWNS)
        else:
            if os.geteuid() == 0:
                # The user's groups, as far as they are the user's: later they cannot be had.
                os.setgroups(os.getgrouplist(account.name, account.gid))
            namespaces.unshare(namespaces.CLONE_NEWUSER | namespaces.CLONE_NEWNS)
            channel.send(_ENTERED, None)
            if not os.read(gate, 1):
                return False
            what = "becoming root of the namespace"
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
        what = "mounting in the new namespace"
        namespaces.isolate_mounts()
        # Each change of credentials has undone it.
        namespaces.die_with_parent(parent)
    except OSError as error:
        channel.send(_FORBIDDEN, (error.errno, what))
        return False
    return True


def environment(environ: t.Mapping[str, str], account: Account, own: bool) -> t.Dict[str, str]:
    """The environment in which an account's store is to be found.

    :param environ: of the process that asked for the work
    :param own: whether that process was the account's own; otherwise only what is neutral stays
    """
    if own:
        result = dict(environ)
    else:
        kept = (*_NEUTRAL, *_PATH_VARIABLES, *_FILE_VARIABLES)
        result = {
            name: value for name, value in environ.items() if name in kept or name.startswith("LC_")
        }
    for name in _PATH_VARIABLES:
        if name in result and not _belongs(result[name], (account.uid,)):
            del result[name]
    for name in _FILE_VARIABLES:
        if not own and name in result and not _belongs(result[name], (account.uid, 0)):
            del result[name]
    if not (own and _belongs(result.get("HOME", ""), (account.uid,))):
        result["HOME"] = account.home
    result["USER"] = result["LOGNAME"] = account.name
    runtime = f"/run/user/{account.uid}"
    if "XDG_RUNTIME_DIR" not in result and _belongs(runtime, (account.uid,)):
        result["XDG_RUNTIME_DIR"] = runtime
    return result


def _belongs(path: str, owners: t.Container[int]) -> bool:
    try:
        return os.stat(path).st_uid in owners
    except (OSError, ValueError):
        return False


def _work(
    channel: _Channel,
    function: t.Callable[..., t.Any],
    arguments: t.Sequence[t.Any],
    wants_progress: bool,
) -> None:
    os.chdir("/")
    os.umask(0o022)
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        if wants_progress:
            result = function(*arguments, progress=lambda value: channel.send(_PROGRESS, value))
        else:
            result = function(*arguments)
        channel.send(_RESULT, result)
    except StorageError as error:
        try:
            _load(pickle.dumps(error, protocol=4))
        except Exception:
            # Facts that do not travel are told as text.
            error.facts = {name: repr(value) for name, value in error.facts.items()}
        channel.send(_ERROR, error)
    except Exception as error:
        channel.send(_ERROR, _fault(error))


def _fault(error: BaseException) -> InternalError:
    return InternalError(
        "the work inside the namespace",
        f"failed unexpectedly with {type(error).__name__}: {error}",
        "Please report this with the trace.",
        trace="".join(traceback.format_exception(type(error), error, error.__traceback__)),
    )
