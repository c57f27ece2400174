# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Create images without a registry: OCI layouts from descriptions of their layers."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import struct
import tarfile
import typing as t

# 2021-06-01 with a fraction, because copies must preserve nanoseconds.
MTIME_NS = 1_622_505_600_123_456_789

CAP_NET_RAW = 13

_TYPES = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "symlink": tarfile.SYMTYPE,
    "link": tarfile.LNKTYPE,
    "fifo": tarfile.FIFOTYPE,
    "char": tarfile.CHRTYPE,
    "block": tarfile.BLKTYPE,
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A file of any type in a layer. IDs are container IDs; the `target` of a hard link is a path in the image."""

    kind: str
    content: bytes = b""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    target: str = ""
    xattrs: t.Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    mtime_ns: int = MTIME_NS
    device: t.Tuple[int, int] = (0, 0)


Layer = t.Dict[str, Entry]
Xattrs = t.Optional[t.Mapping[str, bytes]]


def file(
    content: t.Union[str, bytes] = b"",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    xattrs: Xattrs = None,
) -> Entry:
    """A regular file."""
    data = content.encode() if isinstance(content, str) else content
    return Entry("file", data, mode, uid, gid, xattrs=xattrs or {})


def directory(mode: int = 0o755, uid: int = 0, gid: int = 0, xattrs: Xattrs = None) -> Entry:
    """A directory."""
    return Entry("dir", b"", mode, uid, gid, xattrs=xattrs or {})


def symlink(target: str, uid: int = 0, gid: int = 0) -> Entry:
    """A symbolic link to `target`."""
    return Entry("symlink", mode=0o777, uid=uid, gid=gid, target=target)


def link(target: str) -> Entry:
    """A hard link to the file `target` of the same layer."""
    return Entry("link", target=target)


def fifo(mode: int = 0o644, uid: int = 0, gid: int = 0) -> Entry:
    """A named pipe."""
    return Entry("fifo", b"", mode, uid, gid)


def device(kind: str, major: int, minor: int, mode: int = 0o600, uid: int = 0) -> Entry:
    """A device node; `kind` is char or block. Rootless stores cannot contain device nodes."""
    return Entry(kind, b"", mode, uid, uid, device=(major, minor))


def whiteout() -> Entry:
    """A whiteout, which removes the path of the layers below."""
    return Entry("whiteout")


def opaque(mode: int = 0o755, uid: int = 0, gid: int = 0) -> Entry:
    """A directory that hides its content in the layers below."""
    return Entry("opaque", b"", mode, uid, gid)


def capability(*bits: int, rootid: t.Optional[int] = None) -> bytes:
    """The value of security.capability, revision 2 (3 with a root ID), with `bits` effective and permitted."""
    low = sum(1 << bit for bit in bits if bit < 32)
    high = sum(1 << (bit - 32) for bit in bits if bit >= 32)
    revision = 0x02000000 if rootid is None else 0x03000000
    blob = struct.pack("<IIIII", revision | 1, low, 0, high, 0)
    return blob if rootid is None else blob + struct.pack("<I", rootid)


def posix_acl(*entries: t.Tuple[str, int, t.Optional[int]]) -> bytes:
    """The value of system.posix_acl_* for entries of a tag (a key of `tags`), permission bits, and an ID or None."""
    tags = {"u": 1, "user": 2, "g": 4, "group": 8, "mask": 0x10, "other": 0x20}
    blob = struct.pack("<I", 2)
    for tag, bits, number in entries:
        blob += struct.pack("<HHI", tags[tag], bits, 0xFFFFFFFF if number is None else number)
    return blob


def _add(archive: tarfile.TarFile, name: str, entry: Entry, kind: str) -> None:
    info = tarfile.TarInfo(name)
    info.type = _TYPES[kind]
    info.mode, info.uid, info.gid = entry.mode, entry.uid, entry.gid
    seconds, fraction = divmod(entry.mtime_ns, 1_000_000_000)
    info.mtime = seconds
    info.linkname = entry.target
    info.devmajor, info.devminor = entry.device
    headers = {"mtime": f"{seconds}.{fraction:09d}"}
    for key, value in entry.xattrs.items():
        headers[f"SCHILY.xattr.{key}"] = value.decode("utf-8", "surrogateescape")
    info.pax_headers = headers
    if kind == "file":
        info.size = len(entry.content)
        archive.addfile(info, io.BytesIO(entry.content))
    else:
        archive.addfile(info)


def layer_tar(layer: Layer) -> bytes:
    """A layer as a PAX tar archive with OCI whiteouts, in the order of the description."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape"
    ) as archive:
        for path, entry in layer.items():
            folder, slash, name = path.rpartition("/")
            if entry.kind == "whiteout":
                _add(archive, f"{folder}{slash}.wh.{name}", Entry("file", mode=0), "file")
            elif entry.kind == "opaque":
                _add(archive, path, entry, "dir")
                _add(archive, f"{path}/.wh..wh..opq", Entry("file", mode=0), "file")
            elif entry.kind == "link":
                # As in archives of tar, the header of a hard link repeats the owner and mode of the file.
                linked = dataclasses.replace(layer[entry.target], target=entry.target)
                _add(archive, path, linked, "link")
            else:
                _add(archive, path, entry, entry.kind)
    return buffer.getvalue()


def complete(layers: t.Sequence[Layer]) -> t.List[Layer]:
    """Add entries for missing parent directories to layers, as tools that build images do.

    A directory of a layer below keeps its owner and mode; others get mode 0755 and belong to root. Keys
    are paths without a leading slash; "." is the root directory.
    """
    known: Layer = {}
    result = []
    for number, layer in enumerate(layers):
        full: Layer = {}
        if number == 0 and "." not in layer:
            full["."] = directory()
        for path, entry in layer.items():
            parts = path.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                parent = "/".join(parts[:depth])
                if parent not in full:
                    full[parent] = layer.get(parent) or known.get(parent) or directory()
            full[path] = entry
        for path, entry in full.items():
            if entry.kind in ("dir", "opaque"):
                known[path] = dataclasses.replace(entry, kind="dir")
        result.append(full)
    return result


def merged(layers: t.Sequence[Layer]) -> Layer:
    """The tree that a container sees: all layers applied, and hard links replaced by the linked file."""
    tree: Layer = {}

    def drop(path: str, itself: bool) -> None:
        for name in [n for n in tree if n.startswith(path + "/") or (itself and n == path)]:
            del tree[name]

    for layer in complete(layers):
        for path, entry in layer.items():
            if entry.kind == "whiteout":
                drop(path, True)
            elif entry.kind == "opaque":
                drop(path, False)
                tree[path] = dataclasses.replace(entry, kind="dir")
            elif entry.kind == "link":
                tree[path] = tree[entry.target]
            else:
                if entry.kind != "dir":
                    drop(path, True)
                tree[path] = entry
    return tree


@dataclasses.dataclass(frozen=True)
class Image:
    """An OCI layout on disk, which stores import as `name`."""

    path: pathlib.Path
    name: str
    layers: t.Tuple[Layer, ...]
    # Bytes of the archive of each layer, lowest first. Runtimes record them as diff-size.
    sizes: t.Tuple[int, ...]
    tag: str = "image"

    @property
    def source(self) -> str:
        """The name of the layout for skopeo and podman."""
        return f"oci:{self.path}:{self.tag}"

    def tree(self) -> Layer:
        """The tree that a container sees, with container IDs."""
        return merged(self.layers)


def _blob(folder: pathlib.Path, data: bytes) -> t.Tuple[str, int]:
    digest = hashlib.sha256(data).hexdigest()
    (folder / "blobs" / "sha256" / digest).write_bytes(data)
    return f"sha256:{digest}", len(data)


def _config(diff_ids: t.Sequence[str], config: t.Optional[t.Mapping[str, t.Any]] = None) -> bytes:
    body = {
        "architecture": {"aarch64": "arm64"}.get(os.uname().machine, "amd64"),
        "os": "linux",
        "created": "2021-06-01T00:00:00Z",
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin:/usr/bin"], **(config or {})},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
    }
    return json.dumps(body).encode()


def image_id(layers: t.Sequence[Layer], config: t.Optional[t.Mapping[str, t.Any]] = None) -> str:
    """The ID in stores of the image that `build` creates from the same arguments."""
    diff_ids = [hashlib.sha256(layer_tar(layer)).hexdigest() for layer in complete(layers)]
    body = _config([f"sha256:{digest}" for digest in diff_ids], config)
    return hashlib.sha256(body).hexdigest()


def write_oci(
    folder: pathlib.Path,
    tars: t.Iterable[bytes],
    config: t.Optional[t.Mapping[str, t.Any]] = None,
    tag: str = "image",
) -> t.Tuple[int, ...]:
    """Write an OCI layout of uncompressed layer archives; returns their sizes in bytes."""
    (folder / "blobs" / "sha256").mkdir(parents=True, exist_ok=True)
    (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    layers = [_blob(folder, tar) for tar in tars]
    kind = "application/vnd.oci.image"
    digest, size = _blob(folder, _config([digest for digest, _size in layers], config))
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{kind}.manifest.v1+json",
        "config": {"mediaType": f"{kind}.config.v1+json", "digest": digest, "size": size},
        "layers": [
            {"mediaType": f"{kind}.layer.v1.tar", "digest": digest, "size": size}
            for digest, size in layers
        ],
    }
    digest, size = _blob(folder, json.dumps(manifest).encode())
    reference = {
        "mediaType": f"{kind}.manifest.v1+json",
        "digest": digest,
        "size": size,
        "annotations": {"org.opencontainers.image.ref.name": tag},
    }
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [reference]}))
    return tuple(size for _digest, size in layers)


def build(
    folder: pathlib.Path,
    layers: t.Sequence[Layer],
    name: str = "localhost/test:1",
    config: t.Optional[t.Mapping[str, t.Any]] = None,
) -> Image:
    """Create an OCI layout of layers, which stores import as `name`; missing parent directories are added."""
    full = complete(layers)
    sizes = write_oci(folder, (layer_tar(layer) for layer in full), config)
    return Image(folder, name, tuple(full), sizes)


# A shell and the other programs that tests run in containers.
_APPLETS = (
    *("cat", "chmod", "chown", "cp", "cut", "echo", "env", "find", "grep", "head", "id", "ls"),
    *("mkdir", "mv", "ps", "readlink", "rm", "sed", "sh", "sleep", "sort", "stat", "su", "tail"),
    *("test", "touch", "true", "wc", "whoami", "xargs"),
)


def shell() -> Layer:
    """/bin with a static busybox and its applets."""
    for path in ("/bin/busybox", "/usr/bin/busybox"):
        if os.path.exists(path):
            busybox = pathlib.Path(path).read_bytes()
            break
    else:
        raise RuntimeError("busybox is missing: apt-get install busybox-static")
    return {
        "bin": directory(),
        "bin/busybox": file(busybox, 0o755),
        **{f"bin/{name}": symlink("busybox") for name in _APPLETS},
    }


def small_layers() -> t.List[Layer]:
    """Four layers (2 MB, the last of a few bytes) with everything that a mapped layer must preserve.

    Owners 0, 1, 500 and 1000; setuid, setgid, sticky, a capability, a user xattr; absolute, relative,
    dangling and owned symlinks; hard links across folders; whiteouts of a file and of a folder; an
    opaque folder; a file that is replaced by a folder and the reverse; names of a single character.
    """
    base: Layer = {
        ".": directory(),
        **shell(),
        "a": directory(),
        "a/file": file("one-character names\n"),
        "b": directory(uid=1, gid=1),
        "dev": directory(),
        "etc": directory(),
        "etc/passwd": file(
            "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:/bin/sh\n"
            "user:x:1000:1000::/home/user:/bin/sh\n"
        ),
        "etc/group": file("root:x:0:\ndaemon:x:1:\nuser:x:1000:\n"),
        "etc/motd": file("first\n"),
        "etc/shadow": file("root:*:::::::\n", 0o640, 0, 500),
        "home": directory(),
        "home/user": directory(0o700, 1000, 1000),
        "home/user/notes": file("mine\n", 0o600, 1000, 1000),
        "home/user/link": symlink("/home/user/notes", 1000, 1000),
        "opt": directory(),
        "opt/app": directory(0o755, 500, 500),
        "opt/app/old": file("goes\n", uid=500, gid=500),
        "opt/app/keep": file("stays\n", uid=500, gid=500),
        "opt/app/swap": file("a file first\n"),
        "opt/app/tree": directory(),
        "opt/app/tree/leaf": file("a folder first\n"),
        "proc": directory(),
        "root": directory(0o700),
        "run": directory(),
        "sys": directory(),
        "tmp": directory(0o1777),
        "usr": directory(),
        "usr/bin": directory(),
        "usr/bin/suid": file(b"\x7fsuid", 0o4755, 0, 0),
        "usr/bin/sgid": file(b"\x7fsgid", 0o2755, 0, 1000),
        "usr/bin/ping": file(
            b"\x7fping", 0o755, xattrs={"security.capability": capability(CAP_NET_RAW)}
        ),
        "usr/share": directory(),
        "usr/share/doc": directory(),
        "usr/share/doc/a": file("goes with its folder\n"),
        "usr/share/doc/sub": directory(),
        "usr/share/doc/sub/b": file("goes too\n"),
        "var": directory(),
        "var/cache": directory(0o2775, 1, 1),
        "var/cache/stale": file("hidden by the opaque folder\n", uid=1, gid=1),
        "var/spool": directory(0o1770, 1, 500),
        "var/spool/queue": fifo(0o620, 1, 500),
    }
    second: Layer = {
        "etc/motd": file("second\n", 0o664, 0, 1000),
        "opt/app/old": whiteout(),
        "opt/app/tagged": file("xattr\n", uid=500, gid=500, xattrs={"user.origin": b"layer two"}),
        "usr/bin/helper": file(b"\x7fsuid of 1000", 0o4755, 1000, 1000),
        "usr/lib": directory(),
        "usr/lib/one": file("three names\n", 0o640, 1000, 1),
        "usr/lib/two": link("usr/lib/one"),
        "usr/lib/deep": directory(uid=1, gid=1),
        "usr/lib/deep/three": link("usr/lib/one"),
        "usr/share/doc": whiteout(),
        "var/cache": opaque(0o2775, 1, 1),
        "var/cache/fresh": file("seen\n", uid=1, gid=1),
    }
    third: Layer = {
        "opt/app/swap": directory(uid=500, gid=500),
        "opt/app/swap/inner": file("a folder now\n", uid=500, gid=500),
        "opt/app/tree": file("a file now\n"),
        "srv/data": file(b"\0" * 65536 + b"end", uid=1000, gid=500),
        "usr/share/doc": directory(),
        "usr/share/doc/new": symlink("../nowhere", 500, 500),
    }
    return [base, second, third, {"etc/release": file("1\n")}]


def many_files_layers(count: int) -> t.List[Layer]:
    """Two layers: a shell, and `count` small files of owner 1000 in folders of 150."""
    base: Layer = {
        ".": directory(),
        **shell(),
        **{name: directory() for name in ("dev", "etc", "proc", "run", "sys")},
        "tmp": directory(0o1777),
    }
    files: Layer = {}
    for number in range(count):
        folder = f"data/{number // 150:05d}"
        files.setdefault(folder, directory(uid=1000, gid=1000))
        files[f"{folder}/{number}"] = file(f"{number}\n" * 20, uid=1000, gid=1000)
    return [base, files]
