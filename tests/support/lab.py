# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The laboratory: a private mount namespace and a temporary folder, with the removal of everything in them."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import os
import pathlib
import secrets
import shutil
import signal
import stat
import time
import typing as t

from . import mounts
from .machines import Machine, busy_pids
from .waiting import LIMIT

COLLECTION = pathlib.Path(__file__).resolve().parents[2]
_PREFIX = "us-"
# Folders of the machine, and paths below them to which podman or skopeo would write by mistake. These are only the
# stores: podman has a cache beside them, which integration tests may write at the same time.
_DEFAULT_STORES = (
    ("/var", "lib/containers/storage"),
    ("/root", ".local/share/containers/storage"),
)


def cache_dir() -> pathlib.Path:
    """The folder in which roots and images are kept between runs; it is created if it is missing."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = pathlib.Path(
        os.environ.get("USERNS_STORAGE_CACHE") or os.path.join(base, "userns-storage")
    )
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _locked(folder: str) -> t.Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Lab:
    """The laboratory of a test process, which must not create a second one.

    Its creation moves the process into a private mount namespace with

    - a pure cgroup2 tree, because crun cannot start containers on hybrid hosts,
    - empty /run and /dev/shm, so that no lock, socket or run root of the machine is used,
    - private /etc and /var (overlays), so that users, subordinate IDs, storage.conf and the path of
      the default store can be changed,
    - `base`, /tmp/us-XXXX, for all stores, images and homes (paths of run roots must be short),
    - `tree`, a folder with ansible_collections that any user and any Python can read.

    Everything disappears with the process, even if it is killed, except `base`, which the next
    laboratory removes.
    """

    def __init__(self) -> None:
        # Without this lock, another process could remove the folder before it is locked.
        with _locked("/tmp"):
            self._remove_stale()
            # buildah uses the path as the name of an image, which must not contain underscores in some positions.
            self.base = pathlib.Path(f"/tmp/{_PREFIX}{secrets.token_hex(4)}")
            self.base.mkdir(mode=0o700)
            self.base.chmod(0o755)
            self._lock = os.open(self.base / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._numbers = itertools.count(1)
        self._closers: t.List[t.Callable[[], None]] = []
        # Opened before the private mounts, these descriptors refer to the folders of the machine.
        self._outside = {
            folder: os.open(folder, os.O_PATH | os.O_CLOEXEC) for folder, _path in _DEFAULT_STORES
        }
        self._before = self._default_stores()
        mounts.unshare_mounts()
        self._private_mounts()
        self.tree = self.base / "tree"
        self._expose_collection()
        # The mount namespace of the laboratory, even if `machine` is of another release.
        self.local = Machine()
        self.machine = self.local

    @staticmethod
    def _remove_stale() -> None:
        """Remove the folders of laboratories whose process has ended."""
        for old in pathlib.Path("/tmp").glob(_PREFIX + "*"):
            try:
                lock = os.open(old / ".lock", os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                pass
            else:
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(lock)

    def _default_stores(self) -> t.Dict[str, t.Tuple[int, int]]:
        found = {}
        for folder, path in _DEFAULT_STORES:
            with contextlib.suppress(OSError):
                state = os.stat(path, dir_fd=self._outside[folder])
                found[f"{folder}/{path}"] = (state.st_ino, state.st_mtime_ns)
        return found

    def _private_mounts(self) -> None:
        with open("/proc/self/mountinfo", encoding="utf-8") as table:
            hybrid = " - cgroup cgroup " in table.read()
        if hybrid:
            mounts.detach_all("/sys/fs/cgroup")
            mounts.mount("-t", "cgroup2", "none", "/sys/fs/cgroup")
        mounts.mount("-t", "tmpfs", "-o", "mode=1777,nosuid,nodev", "lab", "/dev/shm")
        mounts.mount("-t", "tmpfs", "-o", "mode=0755,nosuid,nodev", "lab", "/run")
        for name in ("lock", "user", "sshd"):
            os.makedirs(f"/run/{name}")
        os.chmod("/run/lock", 0o1777)
        for folder in ("/etc", "/var"):
            self._redirect_writes(folder)
        if os.path.exists("/dev/fuse"):
            # Without udev, only root can open it; fuse-overlayfs of a user requires access for all users.
            os.makedirs("/run/lab/dev")
            mounts.mount("-t", "tmpfs", "lab", "/run/lab/dev")
            os.mknod("/run/lab/dev/fuse", stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
            os.chmod("/run/lab/dev/fuse", 0o666)
            mounts.mount("--bind", "/run/lab/dev/fuse", "/dev/fuse")
        # As under systemd; code that creates mounts must make them private if required.
        mounts.mount("--make-rshared", "/")

    @staticmethod
    def _redirect_writes(folder: str) -> None:
        """Redirect writes below `folder` to memory; mounts below it stay visible."""
        kept = {
            point: os.open(point, os.O_PATH | os.O_CLOEXEC)
            for point in reversed(mounts.mount_points(folder))
        }
        upper, work = (f"/run/lab{folder}/{name}" for name in ("upper", "work"))
        os.makedirs(upper)
        os.makedirs(work)
        options = f"lowerdir={folder},upperdir={upper},workdir={work}"
        mounts.mount("-t", "overlay", "-o", options, "lab", folder)
        for point, handle in kept.items():
            mounts.mount("--bind", f"/proc/{os.getpid()}/fd/{handle}", point)
            os.close(handle)

    def _expose_collection(self) -> None:
        """Bind-mount the collection and the package ansible at paths that every user can read."""
        spec = importlib.util.find_spec("ansible")
        if spec is None or not spec.origin:
            raise RuntimeError("ansible-core is not installed in the environment of pytest")
        sources = {
            self.tree / "ansible_collections" / "userns" / "storage": COLLECTION,
            self.tree / "ansible": pathlib.Path(spec.origin).parent,
        }
        for target, source in sources.items():
            target.mkdir(parents=True)
            mounts.mount("--bind", str(source), str(target))

    def folder(self, mode: int = 0o755) -> pathlib.Path:
        """A new folder with a short path below `base`."""
        path = self.base / str(next(self._numbers))
        path.mkdir()
        path.chmod(mode)
        return path

    def on_close(self, closer: t.Callable[[], None]) -> None:
        """Register a function that is called when the laboratory closes; the last function is called first."""
        self._closers.append(closer)

    def kill(self, marker: t.Union[str, pathlib.Path]) -> None:
        """End all processes that were started for the folder `marker` of the laboratory."""
        marker = f"{marker}/"
        for sign in (signal.SIGTERM, signal.SIGKILL):
            pids = busy_pids(marker)
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
            # Processes get little time to exit after the first signal; after the second, the kernel may take longer.
            until = time.monotonic() + (0.2 if sign == signal.SIGTERM else LIMIT)
            while time.monotonic() < until and busy_pids(marker):
                time.sleep(0.02)

    def remove(self, folder: pathlib.Path) -> None:
        """End the processes of a folder, unmount everything below it and delete it."""
        self.kill(folder)
        mounts.detach_all(str(folder))
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(folder)

    def close(self) -> None:
        """Remove everything.

        :raises AssertionError: a default store of the machine was changed
        """
        while self._closers:
            self._closers.pop()()
        self.remove(self.base)
        os.close(self._lock)
        after = self._default_stores()
        if after != self._before:
            raise AssertionError(f"a default store was changed: {self._before} became {after}")
