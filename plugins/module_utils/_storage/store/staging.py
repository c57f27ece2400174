# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The collection's own directory in a store: staging for layers being built, trash for data being deleted.

``staging/ID/`` and ``trash/ID/`` each contain a file ``lock`` that the worker keeps locked while it
runs. Entries that are not locked are leftovers, unless a file ``suspended`` marks them as work to be resumed.
A short lock on the whole folder makes the creation of an entry with its lock atomic for a
sweep. Both folders are outside the driver's folder, where containers/storage's own garbage collection
would treat them as layers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import stat
import time
import typing as t
import uuid
from dataclasses import dataclass

from ..errors import LockTimeout, NoSpace, StoreError
from ..kernel import files
from ..kernel.oserrors import translate_oserror
from .locks import LockFile
from .removal import Destroy, remove_tree

__all__ = ["Leftover", "StagingArea", "Workspace", "remove_tree"]

STAGING = "staging"
TRASH = "trash"
LOCK_NAME = "lock"
# The ledger while it is being written, under the short lock.
LEDGER_TEMPORARY = "ledger.json.tmp"
SUSPENDED = "suspended"

# Suspended work can be resumed for this long (seconds).
_PATIENCE = 86400.0
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


@dataclass
class Workspace:
    """A private directory for work. It is removed when the claim ends, unless the work is suspended.

    :ivar resumed: whether it contains suspended work of the same key
    :ivar suspended: set it to leave the work to the next claim of the same key
    """

    id: str
    path: str
    resumed: bool = False
    suspended: bool = False


@dataclass(frozen=True)
class Leftover:
    """An entry of the collection's directory that no process uses any more.

    :ivar kind: "staging", "trash", or "records" for a half-written file of records
    :ivar modified: the last change of its top folder, seconds since the epoch
    """

    kind: str
    path: str
    modified: float


class StagingArea:
    """The folder ``userns-storage`` of a store; created on first use.

    :param root: its path, on the filesystem and mount of the driver's folder
    :param timeout: seconds to wait for its short lock, and for equal work by default
    """

    def __init__(self, root: str, timeout: float = 60.0) -> None:
        self.root = root
        self.timeout = timeout
        self._trash: t.Dict[str, LockFile] = {}

    @contextlib.contextmanager
    def claim(
        self,
        key: str,
        timeout: t.Optional[float] = None,
        destroy: t.Optional[Destroy] = None,
        fits: t.Optional[t.Callable[[str], bool]] = None,
    ) -> t.Iterator[Workspace]:
        """An empty folder for the work of a key; waits for other processes with the same key.

        After waiting, callers should check whether the work is still needed.

        :param key: the identity of the work: image and maps
        :param timeout: seconds to wait for equal work
        :param fits: given a folder with suspended work, returns whether to resume it; otherwise it is deleted
        :raises LockTimeout: the other process takes longer than that
        """
        name = _named(key)
        path = os.path.join(self.root, STAGING, name)
        workspace = Workspace(name, path)
        allowed = self.timeout if timeout is None else timeout
        deadline = time.monotonic() + allowed
        while True:
            lock = self._open_entry(STAGING, name)
            if lock is None:
                lock = LockFile(os.path.join(path, LOCK_NAME))
                with translate_oserror(path):
                    try:
                        left = max(deadline - time.monotonic(), 0)
                        lock.acquire(fcntl.LOCK_EX, left, allowed)
                    except (FileNotFoundError, NotADirectoryError):
                        continue
                if fits is not None and self._resumes(path, lock, fits):
                    workspace.resumed = True
                    break
                # The entry was left by a worker that died, or was moved.
                self._retire(path, lock, destroy)
                continue
            break
        try:
            yield workspace
        finally:
            with contextlib.suppress(StoreError):
                if workspace.suspended:
                    self._suspend(path, lock)
                else:
                    self._retire(path, lock, destroy)

    def suspended(self, key: str) -> bool:
        """Whether there is suspended work of this key."""
        return _is_suspended(os.path.join(self.root, STAGING, _named(key)))

    def trash(self, name: str) -> str:
        """A new empty folder for files to be deleted; call ``discard`` when no lock is held any more.

        :param name: its purpose, a plain word or an ID
        """
        while True:
            entry = f"{name}-{uuid.uuid4().hex[:16]}"
            lock = self._open_entry(TRASH, entry)
            if lock is not None:
                path = os.path.join(self.root, TRASH, entry)
                self._trash[path] = lock
                return path

    def discard(self, path: str, destroy: t.Optional[Destroy] = None) -> None:
        """Delete a folder that ``trash`` returned, with its contents.

        :raises StoreError: something cannot be deleted; the next sweep tries again
        """
        lock = self._trash.pop(path, None)
        if lock is not None:
            self._delete(path, lock, destroy)

    def leave(self, path: str) -> None:
        """Leave a folder that ``trash`` returned to the next sweep."""
        self._trash.pop(path).release()

    def leftovers(self) -> t.List[Leftover]:
        """The entries that a sweep would delete; writes nothing."""
        found = []
        for kind, path in self._rubbish():
            lock = LockFile(os.path.join(path, LOCK_NAME), read_only=True)
            if lock.busy_here:
                continue
            try:
                missing = contextlib.suppress(FileNotFoundError, NotADirectoryError)
                with translate_oserror(path), missing, lock.shared(0):
                    # Its worker may have suspended it after the folder was listed.
                    if _is_suspended(path):
                        continue
            except LockTimeout:
                continue
            with translate_oserror(path), contextlib.suppress(FileNotFoundError):
                found.append(Leftover(kind, path, os.lstat(path).st_mtime))
        return found

    def sweep(
        self,
        destroy: t.Optional[Destroy] = None,
        keep: t.Optional[t.Callable[[str], bool]] = None,
    ) -> t.List[str]:
        """Delete entries that no process uses.

        :param keep: returns whether to keep a path
        :returns: the paths that were deleted
        :raises StoreError: something cannot be deleted; everything else was deleted
        """
        removed = []
        failure: t.Optional[StoreError] = None
        for _kind, path in self._rubbish():
            if keep is not None and keep(path):
                continue
            try:
                lock = self._seize(path)
                if lock is not None:
                    self._retire(path, lock, destroy)
                    removed.append(path)
            except StoreError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        return removed

    def give_up_suspended(self) -> t.List[str]:
        """Delete suspended work, which the next claim of its key starts again.

        :returns: the paths that were deleted
        :raises StoreError: something cannot be deleted
        """
        for kind, path in self._entries():
            if kind == STAGING and _is_suspended(path):
                lock = LockFile(os.path.join(path, LOCK_NAME))
                missing = contextlib.suppress(FileNotFoundError, NotADirectoryError, LockTimeout)
                with translate_oserror(path), missing, lock.exclusive(0):
                    os.unlink(os.path.join(path, SUSPENDED))
        return self.sweep(None, lambda path: os.path.basename(os.path.dirname(path)) != STAGING)

    # Internals

    def _rubbish(self) -> t.List[t.Tuple[str, str]]:
        return [(kind, path) for kind, path in self._entries() if not _is_suspended(path)]

    def _resumes(self, path: str, lock: LockFile, fits: t.Callable[[str], bool]) -> bool:
        """Take over suspended work, whose lock is held. If this process dies, it becomes a leftover."""
        try:
            if not (self._is_place_of(path, lock) and _is_suspended(path) and fits(path)):
                return False
            with translate_oserror(path):
                os.unlink(os.path.join(path, SUSPENDED))
        except BaseException:
            lock.release()
            raise
        return True

    def _suspend(self, path: str, lock: LockFile) -> None:
        try:
            with (
                translate_oserror(path),
                open(os.path.join(path, SUSPENDED), "w", encoding="ascii") as stream,
            ):
                stream.write(_boot_id())
        finally:
            lock.release()

    def _entries(self) -> t.List[t.Tuple[str, str]]:
        found = []
        with translate_oserror(self.root):
            temporary = os.path.join(self.root, LEDGER_TEMPORARY)
            if _is_folder(self.root) and os.path.lexists(temporary):
                found.append(("records", temporary))
            for kind in (STAGING, TRASH):
                folder = os.path.join(self.root, kind)
                if not _is_folder(self.root) or not _is_folder(folder):
                    continue
                names = sorted(os.listdir(folder))
                found += [(kind, os.path.join(folder, name)) for name in names]
        return found

    def _make(self, folder: str) -> None:
        with translate_oserror(self.root), contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        if not _is_folder(folder):
            raise StoreError(
                folder, "is not a directory", "Move it elsewhere; it is created again."
            )

    @contextlib.contextmanager
    def _settled(self) -> t.Iterator[None]:
        """Hold the short lock of the whole folder."""
        lock = LockFile(os.path.join(self.root, LOCK_NAME))
        with translate_oserror(self.root):
            lock.create()
            lock.acquire(fcntl.LOCK_EX, self.timeout)
        try:
            yield
        finally:
            lock.release()

    def _open_entry(self, kind: str, name: str) -> t.Optional[LockFile]:
        """Create an entry and lock it; None if it exists."""
        for folder in (self.root, os.path.join(self.root, kind)):
            self._make(folder)
        path = os.path.join(self.root, kind, name)
        with translate_oserror(self.root), self._settled():
            lock = LockFile(os.path.join(path, LOCK_NAME))
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                if not _is_folder(path):
                    os.unlink(path)
                else:
                    # The entry of a process that died before it created the lock gets a lock now.
                    lock.create()
                return None
            try:
                lock.create()
            except OSError:
                with contextlib.suppress(OSError):
                    os.rmdir(path)
                raise
            try:
                # Without waiting, because its holder may be waiting for the short lock.
                lock.acquire(fcntl.LOCK_EX, 0)
            except LockTimeout:
                return None
            return lock

    def _seize(self, path: str) -> t.Optional[LockFile]:
        """Lock an entry; None if another process has it locked or it does not exist any more."""
        with translate_oserror(self.root), self._settled():
            lock = LockFile(os.path.join(path, LOCK_NAME))
            if lock.busy_here:
                return None
            try:
                if not _is_folder(path):
                    os.unlink(path)
                    return None
                lock.create()
                lock.acquire(fcntl.LOCK_EX, 0)
            except (FileNotFoundError, LockTimeout):
                return None
            # Its worker may have suspended it after the folder was listed.
            if _is_suspended(path):
                lock.release()
                return None
            return lock

    def _retire(self, path: str, lock: LockFile, destroy: t.Optional[Destroy]) -> None:
        """Delete an entry that this process has locked, after moving it to the trash."""
        try:
            with translate_oserror(self.root), self._settled():
                if not self._is_place_of(path, lock):
                    lock.release()
                    return
                if os.path.basename(os.path.dirname(path)) != TRASH:
                    # On a full disk a rename may fail; the entry is then deleted in place.
                    with contextlib.suppress(NoSpace):
                        path = self._move_to_trash(path)
        except BaseException:
            lock.release()
            raise
        self._delete(path, lock, destroy)

    def _move_to_trash(self, path: str) -> str:
        """Move an entry to the trash; returns its new path.

        :raises NoSpace: the disk is full; the entry was not moved
        """
        folder = os.path.join(self.root, TRASH)
        target = os.path.join(folder, f"{os.path.basename(path)}-{uuid.uuid4().hex[:16]}")
        with translate_oserror(self.root):
            self._make(folder)
            os.rename(path, target)
        return target

    def _is_place_of(self, path: str, lock: LockFile) -> bool:
        """Whether the locked file is still the one at the entry's path."""
        try:
            found = os.lstat(os.path.join(path, LOCK_NAME))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (found.st_dev, found.st_ino) == lock.identity

    def _delete(self, path: str, lock: LockFile, destroy: t.Optional[Destroy]) -> None:
        """Delete a trash entry; its lock is deleted last, so that no sweep finds a partial entry without a lock."""
        try:
            with translate_oserror(path), contextlib.suppress(FileNotFoundError):
                for name in os.listdir(path):
                    if name != LOCK_NAME:
                        remove_tree(os.path.join(path, name), destroy)
                with self._settled():
                    os.unlink(os.path.join(path, LOCK_NAME))
                    os.rmdir(path)
        finally:
            lock.release()


def _is_folder(path: str) -> bool:
    """Whether it is a directory and no symbolic link."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _named(key: str) -> str:
    """The name of the folder for the work of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _is_suspended(path: str) -> bool:
    """Whether suspended work can still be resumed. After a reboot it is unknown which files are complete."""
    try:
        descriptor = files.open_regular(os.path.join(path, SUSPENDED))
        try:
            text = os.read(descriptor, 100).decode("ascii")
            age = time.time() - os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
    except (OSError, ValueError):
        return False
    # The clock may have been set back.
    return abs(age) <= _PATIENCE and text != "" and text == _boot_id()


def _boot_id() -> str:
    try:
        with open(_BOOT_ID, encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return ""
