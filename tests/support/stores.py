# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Private stores made and used by the real podman, buildah and skopeo."""

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
    # In memory: for what is done so often that the disk must not be waited for.
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
    """Everything below some folders at one instant: what each path is, and the locks' tokens."""

    entries: t.Mapping[str, t.Tuple[t.Any, ...]]

    def changes(self, later: DiskState) -> t.List[str]:
        """What differs in `later`, one line a path; empty when nothing was written."""
        lines = []
        for path in sorted({*self.entries, *later.entries}):
            old, new = self.entries.get(path), later.entries.get(path)
            if old != new:
                lines.append(f"{path}: {old} -> {new}")
        return lines


def disk_state(*folders: t.Union[str, pathlib.Path]) -> DiskState:
    """Mode, owner, size, inode, mtime and ctime (ns) of all paths, link texts, and lock files' tokens."""
    entries: t.Dict[str, t.Tuple[t.Any, ...]] = {}

    def look(path: str) -> None:
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
        look(folder)
        waiting = [folder]
        while waiting:
            parent = waiting.pop()
            for name in _names(parent):
                path = os.path.join(parent, name)
                look(path)
                if entries[path][0].startswith("0o4"):
                    waiting.append(path)
    return DiskState(entries)


def _names(folder: str) -> t.List[str]:
    """The names in a folder. Its access time stays, for that tells our modules whether a layer was used."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME)
    try:
        return os.listdir(handle)
    finally:
        os.close(handle)


def _logged(log: pathlib.Path) -> str:
    """The standard output in a log of conmon's: lines of time, stream, F(ull) or P(artial), text."""
    said = []
    for line in log.read_text("utf-8", "surrogateescape").split("\n")[:-1]:
        _time, stream, kind, text = line.split(" ", 3)
        if stream == "stdout":
            said.append(text + ("\n" if kind == "F" else ""))
    return "".join(said)


class Store:
    """One private store. Rootful ones are told to tools by CONTAINERS_STORAGE_CONF; a rootless one is
    its user's own default store, with ~/.config/containers/storage.conf, as on a real workstation.

    Attributes: kind, driver, graphroot, runroot (pathlib.Path), user (None when rootful), machine.
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
        """:param options: keys of [storage.options.DRIVER]; :param read_only: additional image stores;
        :param mib: size of the loop file for the kinds that format one; :param on_disk: whether that
        file lies in the laboratory's folder, for what measures disks, and not in memory."""
        self.driver, filesystem, rootless = KINDS[kind]
        if rootless != (user is not None):
            raise ValueError(f"{kind}: a user is needed for rootless stores, and only for them")
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
        """Use one more additional image store, with images that this store may have pulled already."""
        self.read_only = (*self.read_only, str(graphroot))
        self.storage_conf.write_text(self._storage_conf(paths=True))

    @staticmethod
    def _use_memory(user: User, mib: int) -> None:
        place = os.path.join(user.home, ".local")
        os.mkdir(place)
        options = f"size={mib}m,mode=0700,uid={user.uid},gid={user.gid}"
        mounts.mount("-t", "tmpfs", "-o", options, "lab", place)

    def _format(self, filesystem: str, mib: int, on_disk: bool) -> None:
        image, disk = self.base / "disk.img", self.base / "disk"
        if filesystem == "tmpfs":
            disk.mkdir()
            mounts.mount("-t", "tmpfs", "-o", f"size={mib}m", "lab", str(disk))
            return
        if not on_disk:
            # A filesystem that is synced often must not wait for the machine's disk.
            self._memory = pathlib.Path(f"/dev/shm/us-{os.getpid()}-{self.base.name}.img")
            image.symlink_to(self._memory)
        with open(image, "wb") as content:
            content.truncate(mib << 20)
        more: t.Tuple[str, ...] = ()
        if filesystem == "ext4":
            # Many small files must not run out of inodes before they run out of bytes; and the kernel is
            # not to go on formatting while something else is measured.
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
        """Whether this machine's containers/storage honours the variable."""
        version = self.machine.version("podman")
        storage = released_storage("podman", version)
        return capabilities("podman", version, storage).idmap_can_be_disabled

    # Programs

    def env(self) -> t.Dict[str, str]:
        """What tools need to find the store and to start containers here."""
        env = {"TMPDIR": str(self.base / "tmp"), "CONTAINERS_CONF": str(self.containers_conf)}
        if not self.user:
            env["CONTAINERS_STORAGE_CONF"] = str(self.storage_conf)
            env["HOME"] = str(self.base / "tmp")
            env["XDG_RUNTIME_DIR"] = str(self.base / "t")
        return {**env, **self.module_environ()}

    def module_environ(self) -> t.Dict[str, str]:
        """What a module's task has to set for it to see the store as :meth:`env`'s programs do."""
        forced = self.forced and self._env_forces()
        return {"_CONTAINERS_OVERLAY_DISABLE_IDMAP": "yes"} if forced else {}

    def tool(self, *argv: t.Union[str, pathlib.Path], **options: t.Any) -> Result:
        """Run a program with the store as its default one; options as Machine.run takes them."""
        env = {**self.env(), **options.pop("env", {})}
        return self.machine.run(
            [str(word) for word in argv], account=self.account, env=env, **options
        )

    def podman(self, *args: t.Union[str, pathlib.Path], **options: t.Any) -> Result:
        """`podman ARGS` on this store."""
        return self.tool("podman", *args, **options)

    @property
    def has_merging_loader(self) -> bool:
        """Whether the machine's podman has containers/storage 1.63 or later, which reads drop-ins and lower-layers."""
        return self.machine.version("podman") >= (5, 8)

    def assert_image_is_not_listed(self, name: str) -> None:
        """What `podman images` does with an image whose record names a layer that is not there."""
        listed = self.podman("images", check=False)
        assert name.partition(":")[0] not in listed.stdout
        # podman 4 refuses to list any image; from podman 5 on this image is left out without a word.
        assert listed.rc == (0 if self.machine.version("podman") >= (5,) else 125)

    def buildah(self, *args: t.Union[str, pathlib.Path], **options: t.Any) -> Result:
        """`buildah ARGS` on this store."""
        return self.tool("buildah", *args, **options)

    def skopeo(self, *args: t.Union[str, pathlib.Path], **options: t.Any) -> Result:
        """`skopeo ARGS` with this store behind containers-storage: names."""
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
        """Really start a container (`podman run --rm ARGS IMAGE COMMAND`); returns its standard output.

        It is read from conmon's log, for the client that podman attaches may miss all that a short-lived
        container says.
        """
        log = self.base / "tmp" / f"{uuid.uuid4().hex}.log"
        options = ("--log-driver=k8s-file", f"--log-opt=path={log}")
        self.podman("run", "--rm", *options, *args, image, *command)
        return _logged(log)

    def shell(self, image: str, script: str, args: t.Sequence[str] = ()) -> str:
        """Really start a container that runs a shell script."""
        return self.run(image, "sh", "-c", script, args=args)

    def timed(self, action: t.Callable[[], t.Any]) -> float:
        """Seconds that `action` takes."""
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    @contextlib.contextmanager
    def service(self) -> t.Iterator[Service]:
        """`podman system service` as long as the context lasts."""
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
        """What an overlay layer holds itself, and does not only show of the layers below."""
        return [path for place in self._own_folders(layer_id) for path in place.iterdir()]

    def _own_folders(self, layer_id: str) -> t.List[pathlib.Path]:
        # containers/storage turns diff into diff1, diff2 and so on when it has changed owners.
        return sorted((self.graphroot / "overlay" / layer_id).glob("diff*"))

    def forget_owners(self, layer_id: str) -> None:
        """Leave an overlay layer as a copy is that podman made and gave no owner to: empty."""
        for own_entry in self.own_entries(layer_id):
            shutil.rmtree(
                own_entry
            ) if own_entry.is_dir() and not own_entry.is_symlink() else own_entry.unlink()

    # Records, read straight from the files

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
        """The record of one layer."""
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

    def snapshot_of_disk(self) -> DiskState:
        """All of graphroot and runroot as it is: compare two with `changes`."""
        return disk_state(self.graphroot, self.runroot)

    @contextlib.contextmanager
    def mounted(self, layer_id: str) -> t.Iterator[pathlib.Path]:
        """The tree of a layer as the runtime sees it without any container (host IDs)."""
        if self.driver != "overlay":
            yield self.layer_folder(layer_id)
            return
        home = self.graphroot / "overlay"
        lowers = _with_numbered(home / layer_id)
        lower = home / layer_id / "lower"
        if lower.exists():
            for word in lower.read_text().split(":"):
                lowers += _with_numbered((home / word).resolve().parent)
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

    def leftovers(self, layer_id: str) -> t.List[str]:
        """Paths of the store that still speak of a layer."""
        paths = disk_state(self.graphroot).entries
        found = [path for path in paths if os.path.basename(path).startswith(layer_id)]
        links = self.graphroot / "overlay" / "l"
        if links.is_dir():
            found += [
                str(link) for link in links.iterdir() if layer_id in os.readlink(link)
            ]  # fmt: skip
        return found

    def host_id(self, mapping: t.Sequence[Json], container_id: int) -> int:
        """The ID on this machine's disk for a container's ID under a record's map."""
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

    # For our modules

    def module_args(self) -> Json:
        """Store options for the modules, run as root: paths, or the rootless store's user."""
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


def _with_numbered(folder: pathlib.Path) -> t.List[pathlib.Path]:
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
    """A running podman API: one process that keeps the store open."""

    def __init__(self, path: str, pid: int) -> None:
        self.path, self.pid = path, pid

    def call(self, method: str, path: str, body: t.Optional[Json] = None) -> t.Any:
        """One request to the libpod API; a refusal raises."""
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
