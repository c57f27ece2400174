# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Lock files as containers/storage uses them: a POSIX record lock and a 64-byte change token.

POSIX locks belong to the process, and closing any descriptor of the file releases them. Therefore only one
holder per process locks a file at a time, and no other holder opens it during that time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import stat
import struct
import threading
import time
import typing as t

from ..errors import InternalError, LockTimeout, StoreError
from ..printable import command

TOKEN_SIZE = 64

_FileKey = t.Tuple[int, int]

# How long a busy lock is polled before a thread waits in the kernel's queue (seconds).
_EAGER_SECONDS = 0.02
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK, errno.EINTR)
_counter = itertools.count(1)


def fresh_token() -> bytes:
    """64 unique bytes: time, counter, PID and random bytes.

    The layout is that of containers/storage 1.42 and later; readers compare it as a whole.
    """
    head = struct.pack("<QQI", time.time_ns(), next(_counter), os.getpid())
    return head + os.urandom(TOKEN_SIZE - len(head))


def peek_token(path: str) -> bytes:
    """The token of a lock file, read without the lock; empty if there is none. Links are not followed."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.pread(descriptor, TOKEN_SIZE, 0)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _holder(descriptor: int, operation: int) -> t.Optional[int]:
    """The PID of a process that holds the lock; None if the kernel does not report it."""
    kind = fcntl.F_RDLCK if operation == fcntl.LOCK_SH else fcntl.F_WRLCK
    if struct.calcsize("P") != 8:
        return None
    # struct flock of all 64-bit Linux: type, whence, start, length, PID.
    layout = "hhqqi4x"
    try:
        answer = fcntl.fcntl(
            descriptor, fcntl.F_GETLK, struct.pack(layout, kind, os.SEEK_SET, 0, 0, 0)
        )
    except OSError:
        return None
    found, _whence, _start, _length, pid = struct.unpack(layout, answer)
    return pid if found != fcntl.F_UNLCK and pid > 0 else None


def _timeout(path: str, allowed: float, pid: t.Optional[int]) -> LockTimeout:
    by = f" by process {pid}" if pid else ""
    look = f"`ps -o args= -p {pid}`" if pid else f"`{command('fuser', '-v', path)}`"
    return LockTimeout(
        path,
        f"stayed locked{by} for {allowed:g} s",
        f"Find the process with {look}, wait for it or end it, or raise `lock_timeout`.",
        path=path,
        pid=pid,
        seconds=allowed,
    )


class _Gate:
    """Lets one holder of this process at a time open a lock file."""

    def __init__(self) -> None:
        # Held as long as the lock file is open. It may be released by another thread, see _Waiter.
        self.mutex = threading.Lock()
        # The number of threads that hold the mutex or wait for it. Guarded by _Gates._guard.
        self.users = 0
        # The thread that holds the mutex; 0 for none, or for a _Waiter. Only the holder of the mutex writes it, without
        # _Gates._guard. Other threads only compare it with their own identity. They never find that by a race,
        # because only the thread itself writes it, and it writes 0 before it releases the mutex.
        self.owner = 0


class _Gates:
    """All gates of this process, by device and inode."""

    def __init__(self) -> None:
        # Guards the dictionary and the counts of its gates. It is never held while a thread waits for a mutex.
        self._guard = threading.Lock()
        self._gates: t.Dict[_FileKey, _Gate] = {}

    def enter(self, key: _FileKey, timeout: float, allowed: float, path: str) -> _Gate:
        with self._guard:
            gate = self._gates.setdefault(key, _Gate())
            if gate.owner == threading.get_ident():
                raise InternalError(path, "is locked a second time by the same thread")
            gate.users += 1
        if not gate.mutex.acquire(timeout=max(timeout, 0)):
            self._forget(key, gate)
            raise _timeout(path, allowed, os.getpid())
        gate.owner = threading.get_ident()
        return gate

    def leave(self, key: _FileKey, gate: _Gate) -> None:
        gate.owner = 0
        gate.mutex.release()
        self._forget(key, gate)

    def _forget(self, key: _FileKey, gate: _Gate) -> None:
        with self._guard:
            gate.users -= 1
            if not gate.users and self._gates.get(key) is gate:
                del self._gates[key]

    def busy(self, key: _FileKey) -> bool:
        """Whether a thread holds the gate; outdated as soon as it returns."""
        with self._guard:
            gate = self._gates.get(key)
            return gate is not None and gate.mutex.locked()

    def reset(self) -> None:
        """Forget all locks, because a forked child does not inherit locks of its parent.

        Another thread of the parent may have held the guard, and no thread of the child would release it.
        """
        self._guard = threading.Lock()
        self._gates = {}


_GATES = _Gates()
os.register_at_fork(after_in_child=_GATES.reset)


class _Claim:
    """An open lock file and its gate in this process, released together.

    It belongs to one thread at a time, the one that opened the file or a _Waiter, so that its fields need no mutex.
    """

    def __init__(self, descriptor: int, key: _FileKey, gate: _Gate) -> None:
        self.descriptor = descriptor
        self._key = key
        self._gate = gate

    def disown(self) -> None:
        """Stop counting the calling thread as the holder; the gate stays closed."""
        self._gate.owner = 0

    def drop(self) -> None:
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
            _GATES.leave(self._key, self._gate)


class _Waiter(threading.Thread):
    """Wait for a lock in the kernel's queue, and release the claim when it is no longer needed."""

    def __init__(self, claim: _Claim, operation: int) -> None:
        super().__init__(name="store-lock", daemon=True)
        self.claim = claim
        self.operation = operation
        # Written before `done` is set, and read only afterwards.
        self.error: t.Optional[OSError] = None
        self.done = threading.Event()
        # Guards the decision to which thread the claim belongs: setting `done` and `_abandoned`. Without it, run() may
        # read an old value of `_abandoned`, and then waits once more.
        self._state = threading.Lock()
        self._abandoned = False

    def run(self) -> None:
        while True:
            try:
                fcntl.lockf(self.claim.descriptor, self.operation)
            except OSError as error:
                # Two processes wait for each other; the other process may give up.
                if error.errno == errno.EDEADLK and not self._abandoned:
                    time.sleep(0.01)
                    continue
                self.error = error
            break
        with self._state:
            self.done.set()
            if self._abandoned:
                self.claim.drop()

    def abandon(self) -> bool:
        """Leave the claim to the thread; false if the thread has ended and the caller keeps the claim."""
        with self._state:
            if self.done.is_set():
                return False
            self._abandoned = True
            self.claim.disown()
            return True


class LockFile:
    """A lock file. It is only created by ``create``.

    :param path: the lock file
    :param read_only: the file is read-only, so that no exclusive lock is possible
    """

    def __init__(self, path: str, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._claim: t.Optional[_Claim] = None
        self._exclusive = False

    def create(self) -> None:
        """Create an empty lock file if there is none.

        :raises OSError: as open(2)
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, flags, 0o644))

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._claim is not None

    @property
    def busy_here(self) -> bool:
        """Whether this process holds the lock or waits for it, with any object."""
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        return _GATES.busy((found.st_dev, found.st_ino))

    @property
    def identity(self) -> t.Tuple[int, int]:
        """Device and inode of the locked file."""
        found = os.fstat(self._descriptor)
        return found.st_dev, found.st_ino

    @property
    def _descriptor(self) -> int:
        if self._claim is None:
            raise InternalError(self.path, "is used without being locked")
        return self._claim.descriptor

    @contextlib.contextmanager
    def shared(self, timeout: float, allowed: t.Optional[float] = None) -> t.Iterator[LockFile]:
        """Hold the lock together with other readers.

        :param timeout: seconds; 0 tries once
        :param allowed: the seconds that the error names, if `timeout` is the rest of them
        :raises LockTimeout: another process held it exclusively all the time
        :raises FileNotFoundError: there is no such file
        """
        self.acquire(fcntl.LOCK_SH, timeout, allowed)
        try:
            yield self
        finally:
            self.release()

    @contextlib.contextmanager
    def exclusive(self, timeout: float, allowed: t.Optional[float] = None) -> t.Iterator[LockFile]:
        """Hold the lock alone.

        :param timeout: seconds; 0 tries once
        :param allowed: the seconds that the error names, if `timeout` is the rest of them
        :raises LockTimeout: another process held it all the time
        :raises FileNotFoundError: there is no such file
        """
        self.acquire(fcntl.LOCK_EX, timeout, allowed)
        try:
            yield self
        finally:
            self.release()

    def acquire(self, operation: int, timeout: float, allowed: t.Optional[float] = None) -> None:
        """Take the lock; ``shared`` and ``exclusive`` also release it.

        :param operation: ``fcntl.LOCK_SH`` or ``fcntl.LOCK_EX``
        """
        if self.held:
            raise InternalError(self.path, "is locked already")
        if operation == fcntl.LOCK_EX and self.read_only:
            raise InternalError(self.path, "is in a read-only store, which is never changed")
        deadline = time.monotonic() + timeout
        allowed = timeout if allowed is None else allowed
        while not self._attempt(operation, allowed, deadline):
            if time.monotonic() >= deadline:
                raise _timeout(self.path, allowed, None)
        self._exclusive = operation == fcntl.LOCK_EX

    def release(self) -> None:
        """Release the lock."""
        claim, self._claim, self._exclusive = self._claim, None, False
        if claim is not None:
            claim.drop()

    def token(self) -> bytes:
        """The token of the last writer: 64 opaque bytes, fewer or none in a file that was never written."""
        return os.pread(self._descriptor, TOKEN_SIZE, 0)

    def touch(self) -> bytes:
        """Notify all other processes that the protected data is about to change.

        :returns: the token written
        :raises OSError: the token could not be written
        """
        if not self._exclusive:
            raise InternalError(self.path, "would be written without an exclusive lock")
        token = fresh_token()
        done = 0
        while done < TOKEN_SIZE:
            done += os.pwrite(self._descriptor, token[done:], done)
        return token

    def _attempt(self, operation: int, allowed: float, deadline: float) -> bool:
        """One attempt; false if the path became another file."""
        before = os.lstat(self.path)
        if not stat.S_ISREG(before.st_mode):
            raise StoreError(
                self.path,
                "is not a regular file",
                "Move it elsewhere; the runtime creates it again.",
            )
        key = (before.st_dev, before.st_ino)
        gate = _GATES.enter(key, deadline - time.monotonic(), allowed, self.path)
        try:
            flags = os.O_RDWR if operation == fcntl.LOCK_EX else os.O_RDONLY
            descriptor = os.open(self.path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except BaseException:
            _GATES.leave(key, gate)
            raise
        claim = _Claim(descriptor, key, gate)
        try:
            now = os.fstat(descriptor)
            if (now.st_dev, now.st_ino) != key:
                claim.drop()
                return False
            if not _try(descriptor, operation, deadline):
                self._queue(claim, operation, allowed, deadline)
                # The previous holder may have replaced or removed the file.
                now = os.lstat(self.path)
                if (now.st_dev, now.st_ino) != key:
                    claim.drop()
                    return False
        except _GivenAway as error:
            raise error.reason from None
        except BaseException:
            claim.drop()
            raise
        self._claim = claim
        return True

    def _queue(self, claim: _Claim, operation: int, allowed: float, deadline: float) -> None:
        """Wait in the kernel's queue, because polling misses short gaps between busy runtimes."""
        pid = _holder(claim.descriptor, operation)
        left = deadline - time.monotonic()
        if left <= 0:
            raise _timeout(self.path, allowed, pid)
        waiter = _Waiter(claim, operation)
        waiter.start()
        try:
            if not waiter.done.wait(left):
                pid = _holder(claim.descriptor, operation) or pid
                raise _timeout(self.path, allowed, pid)
        except BaseException as error:
            if waiter.abandon():
                raise _GivenAway(error) from None
            if not isinstance(error, LockTimeout) or waiter.error is not None:
                raise
        if waiter.error is not None:
            raise waiter.error


class _GivenAway(Exception):
    """The waiting thread owns the claim now."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__()
        self.reason = reason


def _try(descriptor: int, operation: int, deadline: float) -> bool:
    """Try to take the lock without waiting, a few times."""
    pause = 0.001
    eager = min(deadline, time.monotonic() + _EAGER_SECONDS)
    while True:
        try:
            fcntl.lockf(descriptor, operation | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        if time.monotonic() >= eager:
            return False
        time.sleep(pause)
        pause *= 2
