# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Detect changes of the images of a store by the token of their lock file, which the owner of the store reads.

Root reads its own store directly. For the store of another user, a child process with that user's IDs resolves
the store's configuration, reads the token, and sends a byte for each change. All other output of it is ignored.
"""

from __future__ import annotations

import os
import time
import typing as t

from ..errors import StorageError
from ..operations.store_opening import StoreRequest
from ..store.config import Account
from ..userns.entering import become
from ..userns.waiting import killed
from . import store_tasks

# The time until a store that is missing or unreadable is checked again (seconds).
LOOK_AGAIN = 60.0


class Images:
    """The images of one store, as a user with read permission sees them."""

    def __init__(self, find: t.Callable[[], str]) -> None:
        """Create the watcher; the store is not read yet.

        :param find: returns the path of the lock file; raises StorageError
        """
        self._find = find
        self._path = ""
        self._last = b""
        self._looked: t.Optional[float] = None

    def changed(self) -> bool:
        """Whether they changed since the last call; true at the first call, and once a minute while there is no store.

        :raises StorageError: the store's configuration cannot be read
        """
        token = store_tasks.token(self._path) if self._path else b""
        now = time.monotonic()
        # Without a token the store may not exist yet, or may have been replaced.
        if token and token == self._last:
            return False
        if not token and self._looked is not None and now - self._looked < LOOK_AGAIN:
            return False
        self._looked = now
        self._path = self._find()
        self._last = store_tasks.token(self._path)
        return True


class ImagesOfUser:
    """The images of another user's store, read by a process of that user."""

    def __init__(self, store: StoreRequest, account: Account, interval: float) -> None:
        """Create the watcher; no process is started yet.

        :param interval: seconds between two checks
        """
        self._store = store
        self._account = account
        self._interval = interval
        self._pid = 0
        self._descriptor = -1
        self._started: t.Optional[float] = None

    def changed(self) -> bool:
        """As :meth:`Images.changed`; does not wait, and raises nothing."""
        if self._descriptor < 0:
            if self._started is not None and time.monotonic() - self._started < LOOK_AGAIN:
                return False
            self._start()
        try:
            data = os.read(self._descriptor, 4096)
        except BlockingIOError:
            return False
        if not data:
            # The user may have ended the process, which is no reason to restart it at once.
            self.close()
            return False
        return True

    def _start(self) -> None:
        self._started = time.monotonic()
        reading, writing = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(reading)
                become(self._account, parent)
                self._look(writing)
            finally:
                os._exit(1)
        os.close(writing)
        os.set_blocking(reading, False)
        self._descriptor = reading

    def _look(self, writing: int) -> t.NoReturn:
        """Run the child: send a byte for each change, and for each failed check, so that the parent retries and
        reports it."""
        os.chdir("/")
        images = Images(lambda: store_tasks.token_path(self._store))
        while True:
            try:
                changed = images.changed()
            except (StorageError, OSError):
                changed = True
            if changed:
                os.write(writing, b".")
            time.sleep(self._interval)

    def close(self) -> None:
        """End the child. A process that the kernel cannot end now is left to init."""
        os.close(self._descriptor)
        self._descriptor = -1
        killed(self._pid)
