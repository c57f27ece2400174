# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The laboratory: a private mount namespace, a short scratch folder, and the end of all it started."""

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
# Folders of the machine, and what below them a stray podman or skopeo would write to.
# The stores alone: podman keeps a cache beside them, which the integration tests may write meanwhile.
_DEFAULT_STORES = (
    ("/var", "lib/containers/storage"),
    ("/root", ".local/share/containers/storage"),
)


def cache_dir() -> pathlib.Path:
    """Where roots and images are kept between runs; made when missing."""
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
    """One per test process.

    Entering it moves the whole process into a private mount namespace with

    - a pure cgroup2 tree, without which crun starts nothing on hybrid hosts,
    - empty /run and /dev/shm, so that no lock, socket or runroot of the machine is met,
    - private /etc and /var (overlays), so that users, subordinate IDs, storage.conf and the default
      store's place can be written freely,
    - `base`, /tmp/us-XXXX: all stores, images and homes live below it (runroots must be short),
    - `tree`, an ansible_collections folder that any user and any Python may read.

    Everything vanishes with the process, even when it is killed, save `base`, which the next
    laboratory sweeps.
    """

    def __init__(self) -> None:
        # One at a time, or a folder would be swept before it is locked.
        with _locked("/tmp"):
            self._sweep()
            # buildah takes the path for an image's name, in which underscores are not allowed everywhere.
            self.base = pathlib.Path(f"/tmp/{_PREFIX}{secrets.token_hex(4)}")
            self.base.mkdir(mode=0o700)
            self.base.chmod(0o755)
            self._lock = os.open(self.base / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._numbers = itertools.count(1)
        self._closers: t.List[t.Callable[[], None]] = []
        # Opened before the private mounts, these show what the machine itself has.
        self._outside = {
            folder: os.open(folder, os.O_PATH | os.O_CLOEXEC) for folder, _path in _DEFAULT_STORES
        }
        self._before = self._default_stores()
        mounts.unshare_mounts()
        self._private_mounts()
        self.tree = self.base / "tree"
        self._expose_collection()
        # The laboratory's own mount namespace, whatever release its `machine` stands for.
        self.local = Machine()
        self.machine = self.local

    @staticmethod
    def _sweep() -> None:
        """Remove the folders of laboratories whose process is gone."""
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
            self._privatise(folder)
        if os.path.exists("/dev/fuse"):
            # Machines without udev keep it for root; fuse-overlayfs of a user needs it open to all.
            os.makedirs("/run/lab/dev")
            mounts.mount("-t", "tmpfs", "lab", "/run/lab/dev")
            os.mknod("/run/lab/dev/fuse", stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
            os.chmod("/run/lab/dev/fuse", 0o666)
            mounts.mount("--bind", "/run/lab/dev/fuse", "/dev/fuse")
        # As under systemd; whoever makes mounts of his own has to see to it that they stay private.
        mounts.mount("--make-rshared", "/")

    @staticmethod
    def _privatise(folder: str) -> None:
        """Let writes below `folder` go to memory; what is mounted below it stays visible."""
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
        """Bind the collection and Ansible's own package where every user may read them."""
        spec = importlib.util.find_spec("ansible")
        if spec is None or not spec.origin:
            raise RuntimeError("ansible-core is not installed beside pytest")
        sources = {
            self.tree / "ansible_collections" / "userns" / "storage": COLLECTION,
            self.tree / "ansible": pathlib.Path(spec.origin).parent,
        }
        for target, source in sources.items():
            target.mkdir(parents=True)
            mounts.mount("--bind", str(source), str(target))

    def folder(self, mode: int = 0o755) -> pathlib.Path:
        """A fresh folder with a short path below `base`."""
        path = self.base / str(next(self._numbers))
        path.mkdir()
        path.chmod(mode)
        return path

    def on_close(self, closer: t.Callable[[], None]) -> None:
        """Have `closer` called when the laboratory closes, last come first served."""
        self._closers.append(closer)

    def kill(self, marker: t.Union[str, pathlib.Path]) -> None:
        """End every process that was started to work below the folder `marker`, one of ours."""
        marker = f"{marker}/"
        for sign in (signal.SIGTERM, signal.SIGKILL):
            pids = busy_pids(marker)
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
            # The first signal is a courtesy; after the second the kernel ends them in its own time.
            until = time.monotonic() + (0.2 if sign == signal.SIGTERM else LIMIT)
            while time.monotonic() < until and busy_pids(marker):
                time.sleep(0.02)

    def remove(self, folder: pathlib.Path) -> None:
        """End what works below a folder, unmount what is mounted there and delete it."""
        self.kill(folder)
        mounts.detach_all(str(folder))
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            shutil.rmtree(folder)

    def close(self) -> None:
        """Undo everything; raises when a default store of the machine was touched meanwhile."""
        while self._closers:
            self._closers.pop()()
        self.remove(self.base)
        os.close(self._lock)
        after = self._default_stores()
        if after != self._before:
            raise AssertionError(f"a default store was touched: {self._before} became {after}")
