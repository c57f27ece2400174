# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Private stores that the real podman, buildah and skopeo create and use."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import shutil
import socket
import stat
import time
import typing as t
import uuid

from ansible_collections.userns.storage.plugins.module_utils._storage.capabilities import (
    capabilities,
    released_storage,
)

from . import mounts
from .images import Image
from .lab import Lab
from .machines import Account, Machine, Result
from .users import User
from .waiting import LIMIT, wait_until

# kind -> (storage driver, filesystem to format or "", rootless)
KINDS: t.Dict[str, t.Tuple[str, str, bool]] = {
    "vfs": ("vfs", "", False),
    "overlay": ("overlay", "", False),
    "overlay-forced": ("overlay", "", False),
    "overlay-ext4": ("overlay", "ext4", False),
    "overlay-xfs": ("overlay", "xfs", False),
    # In memory: for operations that are repeated so often that they must not wait for the disk.
    "overlay-tmpfs": ("overlay", "tmpfs", False),
    "vfs-tmpfs": ("vfs", "tmpfs", False),
    "vfs-xfs": ("vfs", "xfs", False),
    "vfs-ext4": ("vfs", "ext4", False),
    "overlay-btrfs": ("overlay", "btrfs", False),
    "btrfs": ("btrfs", "btrfs", False),
    "rootless-overlay": ("overlay", "", True),
    "rootless-vfs": ("vfs", "", True),
    "rootless-vfs-tmpfs": ("vfs", "tmpfs", True),
    "rootless-fuse": ("overlay", "", True),
}
# Kinds whose runtime copies although the kernel could shift.
_FORCED = ("overlay-forced", "overlay-ext4", "overlay-xfs", "overlay-btrfs", "overlay-tmpfs")

CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=1000:1000", "nproc=1000:1000"]
netns = "host"
cgroups = "disabled"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"""

Json = t.Dict[str, t.Any]


@dataclasses.dataclass(frozen=True)
class DiskState:
    """The state of all paths below some folders, including the tokens of locks."""

    entries: t.Mapping[str, t.Tuple[t.Any, ...]]

    def changes(self, later: DiskState) -> t.List[str]:
        """The differences in `later`, a line for each path; empty if nothing was written."""
        lines = []
        for path in sorted({*self.entries, *later.entries}):
            old, new = self.entries.get(path), later.entries.get(path)
            if old != new:
                lines.append(f"{path}: {old} -> {new}")
        return lines


def disk_state(*folders: t.Union[str, pathlib.Path]) -> DiskState:
    """Mode, owner, size, inode, mtime and ctime (ns) of all paths, targets of links, and tokens of lock files."""
    entries: t.Dict[str, t.Tuple[t.Any, ...]] = {}

    def record(path: str) -> None:
        info = os.lstat(path)
        extra: t.Any = None
        if stat.S_ISLNK(info.st_mode):
            extra = os.readlink(path)
        elif path.endswith((".lock", ".json")) and stat.S_ISREG(info.st_mode):
            handle = os.open(path, os.O_RDONLY | os.O_NOATIME)
            try:
                extra = os.read(handle, 64)
            finally:
                os.close(handle)
        entries[path] = (
            oct(info.st_mode), info.st_uid, info.st_gid, info.st_size, info.st_nlink, info.st_ino,
            info.st_mtime_ns, info.st_ctime_ns, extra,
        )  # fmt: skip

    for folder in map(str, folders):
        if not os.path.lexists(folder):
            continue
        record(folder)
        pending = [folder]
        while pending:
            parent = pending.pop()
            for name in _names(parent):
                path = os.path.join(parent, name)
                record(path)
                if entries[path][0].startswith("0o4"):
                    pending.append(path)
    return DiskState(entries)


def _names(folder: str) -> t.List[str]:
    """The names in a folder. The access time is preserved, because modules use it to see whether a layer was used."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME)
    try:
        return os.listdir(handle)
    finally:
        os.close(handle)


def _logged(log: pathlib.Path) -> str:
    """The standard output in a log of conmon, whose lines contain time, stream, F(ull) or P(artial), and text."""
    output = []
    for line in log.read_text("utf-8", "surrogateescape").split("\n")[:-1]:
        _time, stream, kind, text = line.split(" ", 3)
        if stream == "stdout":
            output.append(text + ("\n" if kind == "F" else ""))
    return "".join(output)


class Store:
    """A private store. Programs find a rootful store by CONTAINERS_STORAGE_CONF; a rootless store is the
    default store of its user, with ~/.config/containers/storage.conf, as on a real workstation.

    Attributes: kind, driver, graphroot, runroot (pathlib.Path), user (None if rootful), machine.
    """

    def __init__(
        self,
        lab: Lab,
        kind: str,
        *,
        machine: t.Optional[Machine] = None,
        user: t.Optional[User] = None,
        options: t.Optional[t.Mapping[str, str]] = None,
        read_only: t.Sequence[str] = (),
        mib: int = 600,
        on_disk: bool = False,
    ) -> None:
        """
        :param options: keys of [storage.options.DRIVER]
        :param read_only: additional image stores
        :param mib: the size of the loop file, for kinds with a filesystem
        :param on_disk: whether that file is in the laboratory's folder, for measurements of disks, and not in memory
        """
        self.driver, filesystem, rootless = KINDS[kind]
        if rootless != (user is not None):
            raise ValueError(f"{kind}: rootless stores require a user, and other stores have none")
        self.lab, self.kind, self.user = lab, kind, user
        self.machine = machine or lab.machine
        self.account: t.Optional[Account] = user
        self.read_only = tuple(read_only)
        self.options = dict(options or {})
        if kind == "rootless-fuse":
            self.options.setdefault("mount_program", "/usr/bin/fuse-overlayfs")
        self.base = lab.folder()
        self._memory: t.Optional[pathlib.Path] = None
        if user and filesystem == "tmpfs":
            self._use_memory(user, mib)
        elif filesystem:
            self._format(filesystem, mib, on_disk)
        for name in ("tmp", "t"):
            (self.base / name).mkdir()
            (self.base / name).chmod(0o1777)
        if user:
            home = pathlib.Path(user.home)
            self.graphroot = home / ".local/share/containers/storage"
            self.runroot = pathlib.Path(user.runtime_dir) / "containers"
            self.storage_conf = user.write(
                ".config/containers/storage.conf", self._storage_conf(paths=False)
            )
            self.containers_conf = user.write(".config/containers/containers.conf", CONTAINERS_CONF)
        else:
            self.graphroot = self.base / "disk" / "g" if filesystem else self.base / "g"
            self.runroot = self.base / "r"
            self.storage_conf = self.base / "storage.conf"
            self.containers_conf = self.base / "containers.conf"
            self.storage_conf.write_text(self._storage_conf(paths=True))
            self.containers_conf.write_text(f'{CONTAINERS_CONF}tmp_dir = "{self.base}/t"\n')
        self.forced = kind in _FORCED
        if self.forced and not self._env_forces():
            cache = self.runroot / "overlay"
            cache.mkdir(parents=True, mode=0o700)
            (cache / "idmapped-lower-dir-false").touch()

    def add_read_only(self, graphroot: pathlib.Path) -> None:
        """Add an additional image store, whose images may already exist in this store."""
        self.read_only = (*self.read_only, str(graphroot))
        self.storage_conf.write_text(self._storage_conf(paths=True))

    @staticmethod
    def _use_memory(user: User, mib: int) -> None:
        folder = os.path.join(user.home, ".local")
        os.mkdir(folder)
        options = f"size={mib}m,mode=0700,uid={user.uid},gid={user.gid}"
        mounts.mount("-t", "tmpfs", "-o", options, "lab", folder)

    def _format(self, filesystem: str, mib: int, on_disk: bool) -> None:
        image, disk = self.base / "disk.img", self.base / "disk"
        if filesystem == "tmpfs":
            disk.mkdir()
            mounts.mount("-t", "tmpfs", "-o", f"size={mib}m", "lab", str(disk))
            return
        if not on_disk:
            # Frequent syncs of the filesystem must not wait for the disk of the machine.
            self._memory = pathlib.Path(f"/dev/shm/us-{os.getpid()}-{self.base.name}.img")
            image.symlink_to(self._memory)
        with open(image, "wb") as content:
            content.truncate(mib << 20)
        more: t.Tuple[str, ...] = ()
        if filesystem == "ext4":
            # With many small files, the inodes must not run out before the blocks; and the kernel must not
            # continue formatting during measurements.
            more = ("-i", "4096", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0")
        self.lab.local.run([f"mkfs.{filesystem}", "-q", *more, str(image)])
        disk.mkdir()
        mounts.mount("-o", "loop", str(image), str(disk))

    def _storage_conf(self, paths: bool) -> str:
        lines = ["[storage]", f'driver = "{self.driver}"']
        if paths:
            lines += [f'graphroot = "{self.graphroot}"', f'runroot = "{self.runroot}"']
        if self.read_only:
            lines += ["[storage.options]", f"additionalimagestores = {json.dumps(self.read_only)}"]
        if self.options:
            lines.append(f"[storage.options.{self.driver}]")
            lines += [f'{key} = "{value}"' for key, value in self.options.items()]
        return "\n".join(lines) + "\n"

    def _env_forces(self) -> bool:
        """Whether the machine's containers/storage supports _CONTAINERS_OVERLAY_DISABLE_IDMAP."""
        version = self.machine.version("podman")
        storage = released_storage("podman", version)
        return capabilities("podman", version, storage).idmap_can_be_disabled

    # Programs

    def env(self) -> t.Dict[str, str]:
        """The environment in which programs find the store and can start containers."""
        env = {"TMPDIR": str(self.base / "tmp"), "CONTAINERS_CONF": str(self.containers_conf)}
        if not self.user:
            env["CONTAINERS_STORAGE_CONF"] = str(self.storage_conf)
            env["HOME"] = str(self.base / "tmp")
            env["XDG_RUNTIME_DIR"] = str(self.base / "t")
        return {**env, **self.module_environ()}

    def module_environ(self) -> t.Dict[str, str]:
        """The environment variables with which a module treats the store like programs with :meth:`env`."""
        forced = self.forced and self._env_forces()
        return {"_CONTAINERS_OVERLAY_DISABLE_IDMAP": "yes"} if forced else {}

    def tool(self, *argv: t.Union[str, pathlib.Path], **options: t.Any) -> Result:
        """Run a program with this store as its default store; options are those of Machine.run."""
        env = {**self.env(), **options.pop("env", {})}
        return self.machine.run(
            [str(argument) for argument in argv], account=self.account, env=env, **options
        )

    def podman(self, *args: t.Union[str, pathlib.Path], **options: t.Any) -> Result:
        """`podman ARGS` on this store."""
        return self.tool("podman", *args, **options)

    @property
    def has_merging_loader(self) -> bool:
        """Whether the machine's podman has containers/storage 1.63 or later, which reads drop-ins and lower-layers."""
        return self.machine.version("podman") >= (5, 8)

    def assert_image_is_not_listed(self, name: str) -> None:
        """Check that `podman images` does not list an image whose record refers to a missing layer."""
        listed = self.podman("images", check=False)
        assert name.partition(":")[0] not in listed.stdout
        # podman 4 does not list any image and fails; podman 5 and later omit this image without a message.
        assert listed.rc == (0 if self.machine.version("podman") >= (5,) else 125)

    def buildah(self, *args: t.Union[str, pathlib.Path], **options: t.Any) -> Result:
        """`buildah ARGS` on this store."""
        return self.tool("buildah", *args, **options)

    def skopeo(self, *args: t.Union[str, pathlib.Path], **options: t.Any) -> Result:
        """`skopeo ARGS` with this store for names with containers-storage:."""
        inside = ("podman", "unshare") if self.user else ()
        return self.tool(*inside, "skopeo", *args, **options)

    def storage_cli(self, *args: t.Union[str, pathlib.Path], **options: t.Any) -> Result:
        """`containers-storage ARGS` on this store."""
        inside = ("podman", "unshare") if self.user else ()
        return self.tool(*inside, "containers-storage", *args, **options)

    def load(self, image: Image, name: str = "") -> str:
        """Import an image; returns its ID (64 hex digits)."""
        target = name or image.name
        self.skopeo("copy", "-q", image.source, f"containers-storage:{target}")
        return str(self.image(target)["id"])

    def create(self, image: str, *args: str, command: t.Sequence[str] = ("true",)) -> str:
        """`podman create ARGS IMAGE COMMAND`; returns the container's ID."""
        return self.podman("create", *args, image, *command).stdout.split()[-1]

    def run(self, image: str, *command: str, args: t.Sequence[str] = ()) -> str:
        """Start a container (`podman run --rm ARGS IMAGE COMMAND`); returns its standard output.

        The output is read from conmon's log, because podman's attached client may miss all output of a
        short-lived container.
        """
        log = self.base / "tmp" / f"{uuid.uuid4().hex}.log"
        options = ("--log-driver=k8s-file", f"--log-opt=path={log}")
        self.podman("run", "--rm", *options, *args, image, *command)
        return _logged(log)

    def shell(self, image: str, script: str, args: t.Sequence[str] = ()) -> str:
        """Start a container that runs a shell script; returns its standard output."""
        return self.run(image, "sh", "-c", script, args=args)

    def timed(self, action: t.Callable[[], t.Any]) -> float:
        """Seconds that `action` takes."""
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    @contextlib.contextmanager
    def service(self) -> t.Iterator[Service]:
        """Run `podman system service` during the context."""
        path = self.base / "tmp" / f"s{time.monotonic_ns() % 10**6}"
        process = self.machine.popen(
            ["podman", "system", "service", "-t", "0", f"unix://{path}"],
            account=self.account,
            env=self.env(),
        )
        try:
            wait_until(lambda: _accepts(str(path)), while_running=process)
            yield Service(str(path), process.pid)
        finally:
            process.terminate()
            process.wait(LIMIT)

    def own_entries(self, layer_id: str) -> t.List[pathlib.Path]:
        """The entries of an overlay layer itself, without those of the layers below."""
        return [path for folder in self._own_folders(layer_id) for path in folder.iterdir()]

    def _own_folders(self, layer_id: str) -> t.List[pathlib.Path]:
        # containers/storage renames diff to diff1, diff2 and so on when it changes owners.
        return sorted((self.graphroot / "overlay" / layer_id).glob("diff*"))

    def empty_layer(self, layer_id: str) -> None:
        """Make an overlay layer empty, like a copy by podman without a changed owner."""
        for own_entry in self.own_entries(layer_id):
            shutil.rmtree(
                own_entry
            ) if own_entry.is_dir() and not own_entry.is_symlink() else own_entry.unlink()

    # Records, read directly from the files

    def _records(self, folder: str, *names: str) -> t.List[Json]:
        records: t.List[Json] = []
        for name in names:
            path = self.graphroot / f"{self.driver}-{folder}" / name
            if path.exists():
                records += json.loads(path.read_text() or "[]") or []
        return records

    def layers(self) -> t.List[Json]:
        """All layer records."""
        return self._records("layers", "layers.json", "volatile-layers.json")

    def images(self) -> t.List[Json]:
        """All image records."""
        return self._records("images", "images.json")

    def containers(self) -> t.List[Json]:
        """All container records."""
        return self._records("containers", "containers.json", "volatile-containers.json")

    def layer(self, layer_id: str) -> Json:
        """The record of a layer."""
        return next(layer for layer in self.layers() if layer["id"] == layer_id)

    def image(self, name: str) -> Json:
        """The record of the image with that name or ID."""
        return next(i for i in self.images() if name == i["id"] or name in i.get("names", ()))

    def container(self, name: str) -> Json:
        """The record of the container with that name or ID."""
        return next(c for c in self.containers() if name == c["id"] or name in c.get("names", ()))

    def mapped_layers(self, name: str) -> t.List[str]:
        """IDs of an image's mapped layers."""
        return list(self.image(name).get("mapped-layers") or ())

    def layer_ids(self) -> t.Set[str]:
        """IDs of all layers."""
        return {layer["id"] for layer in self.layers()}

    # The disk

    def layer_folder(self, layer_id: str) -> pathlib.Path:
        """The driver's folder of a layer."""
        inner = {"vfs": "dir", "btrfs": "subvolumes", "overlay": ""}[self.driver]
        return self.graphroot / self.driver / inner / layer_id

    def disk_state(self) -> DiskState:
        """The current state of graph root and run root; `changes` compares two states."""
        return disk_state(self.graphroot, self.runroot)

    @contextlib.contextmanager
    def mounted(self, layer_id: str) -> t.Iterator[pathlib.Path]:
        """Mount the tree of a layer as the runtime does without a container (with host IDs)."""
        if self.driver != "overlay":
            yield self.layer_folder(layer_id)
            return
        home = self.graphroot / "overlay"
        lowers = _diff_folders(home / layer_id)
        lower = home / layer_id / "lower"
        if lower.exists():
            for link in lower.read_text().split(":"):
                lowers += _diff_folders((home / link).resolve().parent)
        target = self.base / "tmp" / f"m{time.monotonic_ns()}"
        target.mkdir()
        option = "userxattr," if self.user else ""
        if "metacopy=on" in self.options.get("mountopt", ""):
            option += "metacopy=on,"
        joined = ":".join(map(str, lowers))
        try:
            if len(lowers) == 1:
                mounts.mount("--bind", str(lowers[0]), str(target))
            else:
                mounts.mount("-t", "overlay", "-o", f"ro,{option}lowerdir={joined}", "lab", str(target))  # fmt: skip
            yield target
        finally:
            mounts.detach_all(str(target))
            target.rmdir()

    def remaining_paths(self, layer_id: str) -> t.List[str]:
        """Paths of the store that still refer to a layer."""
        paths = disk_state(self.graphroot).entries
        found = [path for path in paths if os.path.basename(path).startswith(layer_id)]
        links = self.graphroot / "overlay" / "l"
        if links.is_dir():
            found += [
                str(link) for link in links.iterdir() if layer_id in os.readlink(link)
            ]  # fmt: skip
        return found

    def host_id(self, mapping: t.Sequence[Json], container_id: int) -> int:
        """The ID on disk for a container ID with the map of a record."""
        inner = container_id
        for part in mapping:
            if part["container_id"] <= container_id < part["container_id"] + part["size"]:
                inner = part["host_id"] + container_id - part["container_id"]
                break
        else:
            if mapping:
                raise ValueError(f"{container_id} is not in {mapping}")
        if self.user is None:
            return inner
        return self.user.uid if inner == 0 else self.user.subuid_start + inner - 1

    # For modules of this collection

    def module_args(self) -> Json:
        """The store options for modules that run as root: the paths, or the user of a rootless store."""
        if self.user:
            return {"user": self.user.name}
        args: Json = {
            "graphroot": str(self.graphroot),
            "runroot": str(self.runroot),
            "driver": self.driver,
        }
        if self.options:
            args["storage_options"] = [f"{self.driver}.{k}={v}" for k, v in self.options.items()]
        if self.read_only:
            return {"storage_conf": str(self.storage_conf)}
        return args

    def close(self) -> None:
        """End its processes, unmount and delete it."""
        if self.user:
            self.lab.kill(self.user.home)
            home = pathlib.Path(self.user.home)
            mounts.detach_all(str(home))
            for path in (home / ".local", home / ".config", self.runroot):
                shutil.rmtree(path, ignore_errors=True)
        self.lab.remove(self.base)
        if self._memory:
            self._memory.unlink()


def _diff_folders(folder: pathlib.Path) -> t.List[pathlib.Path]:
    """diff, diff1, diff2 ... of an overlay layer, top first."""
    found = [folder / "diff"]
    while (folder / f"diff{len(found)}").exists():
        found.append(folder / f"diff{len(found)}")
    return found


def _accepts(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(path) == 0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=LIMIT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


class Service:
    """A running podman API, whose process keeps the store open."""

    def __init__(self, path: str, pid: int) -> None:
        self.path, self.pid = path, pid

    def call(self, method: str, path: str, body: t.Optional[Json] = None) -> t.Any:
        """Send a request to the libpod API.

        :raises AssertionError: the response has an error status
        """
        connection = _UnixConnection(self.path)
        try:
            connection.request(
                method,
                f"/v4.0.0/libpod/{path}",
                json.dumps(body) if body is not None else None,
                {"Content-Type": "application/json"},
            )
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        if answer.status >= 400:
            raise AssertionError(f"{method} {path}: {answer.status} {text}")
        return json.loads(text) if text else None
