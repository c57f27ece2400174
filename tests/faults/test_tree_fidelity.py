# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Random stacks of layers: what the kernel's overlay shows is what our clone holds, owners apart."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import shutil
import socket
import stat
import struct
import subprocess
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    StorageError,
    TreeError,
    UnmappedIDs,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import (
    Mapping,
    Shift,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import (
    IDMap,
    IDRange,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.clone import (
    CloneResult,
    can_reflink,
    clone,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.measure import measure
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.merged import (
    LayerStack,
    NeedsMount,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.shift import (
    shift_in_place,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.survey import survey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import mounts
from support.differ import IDs, Ranges, differences, to_host

if t.TYPE_CHECKING:
    from support.lab import Lab

NAMES = (
    b"a",
    b"b",
    b"c d",
    b"\n",
    b"\xff\xfe\x80",
    b".wh.a",
    b"-rf",
    "ü".encode(),
    b"x" * 255,
    b"\\",
    b"..x",
)
OWNERS = (0, 1, 2, 33, 1000, 1001, 65534)
CAPABILITY_V2 = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)


class Node(t.NamedTuple):
    """An entry of a layer; owners are container IDs."""

    kind: str
    uid: int = 0
    gid: int = 0
    mode: int = 0o755
    mtime: int = 0
    content: bytes = b""
    hole: int = 0
    device: int = 0
    link: int = 0
    attributes: t.Tuple[t.Tuple[str, bytes], ...] = ()
    acl: t.Tuple[int, ...] = ()
    default_acl: t.Tuple[int, ...] = ()
    capability: t.Optional[int] = None
    opaque: bool = False
    children: t.Tuple[t.Tuple[bytes, "Node"], ...] = ()

    def __repr__(self) -> str:
        said = (
            f"{field}={value[:20] if isinstance(value, bytes) else value!r}"
            for field, value, usual in zip(
                self._fields[1:], self[1:], self._field_defaults.values()
            )
            if value != usual
        )
        return f"Node({self.kind!r}, {', '.join(said)})"


owner = st.sampled_from(OWNERS)
mtime = st.integers(0, 2**31 * 10**9)
user_attributes = st.lists(
    st.tuples(
        st.sampled_from(["user.a", "user.overlay.b", "trusted.c", "security.selinux"]),
        st.binary(min_size=1, max_size=20),
    ),
    max_size=2,
    unique_by=lambda pair: pair[0],
).map(tuple)
other_attributes = user_attributes.map(
    lambda pairs: tuple(pair for pair in pairs if not pair[0].startswith("user."))
)
acl = st.lists(owner, max_size=3, unique=True).map(lambda ids: tuple(sorted(ids)))


def as_node(drawn: t.Dict[str, t.Any]) -> Node:
    return Node(**drawn)


def nodes(**fields: st.SearchStrategy[t.Any]) -> st.SearchStrategy[Node]:
    return st.fixed_dictionaries(fields).map(as_node)


leaf = st.one_of(
    nodes(
        kind=st.just("file"),
        uid=owner,
        gid=owner,
        mode=st.integers(0, 0o7777),
        mtime=mtime,
        content=st.one_of(st.binary(max_size=64), st.just(b"data" * 8192)),
        hole=st.sampled_from([0, 0, 0, 1 << 20]),
        attributes=user_attributes,
        acl=acl,
        capability=st.one_of(st.none(), st.none(), owner),
    ),
    nodes(kind=st.just("hard link"), link=st.integers(0, 100)),
    nodes(kind=st.just("whiteout")),
    nodes(
        kind=st.just("symlink"),
        uid=owner,
        gid=owner,
        mtime=mtime,
        content=st.sampled_from([b"/etc/passwd", b"../../..", b"a", b"\xff\n", b"y" * 1000]),
        attributes=other_attributes,
    ),
    nodes(
        kind=st.sampled_from(["fifo", "socket", "char", "block"]),
        uid=owner,
        gid=owner,
        mode=st.integers(0, 0o7777),
        mtime=mtime,
        device=st.sampled_from([os.makedev(1, 3), os.makedev(7, 300), os.makedev(0, 1)]),
        attributes=other_attributes,
        acl=acl,
    ),
)


def directory(children: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    return nodes(
        kind=st.just("directory"),
        uid=owner,
        gid=owner,
        mode=st.integers(0, 0o7777),
        mtime=mtime,
        attributes=user_attributes,
        acl=acl,
        default_acl=acl,
        opaque=st.sampled_from([False, False, True]),
        children=st.dictionaries(st.sampled_from(NAMES), children, max_size=5).map(
            lambda entries: tuple(entries.items())
        ),
    )


layers = st.lists(directory(st.recursive(leaf, directory, max_leaves=12)), min_size=1, max_size=4)


@st.composite
def id_maps(draw: st.DrawFn) -> Ranges:
    """A permutation of some pieces of 0..65535, somewhere on the host."""
    cuts = sorted(draw(st.sets(st.sampled_from([1, 2, 3, 33, 34, 1000, 1001, 1002]), max_size=4)))
    pieces = list(itertools.pairwise([0, *cuts, 65536]))
    result = []
    host = draw(st.sampled_from([1, 100000, 3_000_000_000]))
    for start, end in draw(st.permutations(pieces)):
        result.append((start, host, end - start))
        host += end - start + draw(st.sampled_from([0, 5]))
    return tuple(result)


def mapping(ids: IDs) -> Mapping:
    return Mapping(
        uid=IDMap(tuple(IDRange(*one) for one in ids.uid)),
        gid=IDMap(tuple(IDRange(*one) for one in ids.gid)),
    )


class Builder:
    """Writes layers by the book: attributes last, directories after their entries."""

    def __init__(self, old: IDs) -> None:
        self.old = old

    def layer(self, path: str, node: Node) -> None:
        os.mkdir(path)
        parent = os.open(os.path.dirname(path), os.O_RDONLY)
        self.files: t.List[t.Tuple[int, bytes]] = []
        self.opened = [parent]
        try:
            self._fill(parent, os.fsencode(os.path.basename(path)), node)
        finally:
            for fd in self.opened:
                os.close(fd)

    def _fill(self, parent: int, name: bytes, node: Node) -> None:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=parent)
        self.opened.append(fd)
        for child_name, child in node.children:
            self._make(fd, child_name, child)
        if node.opaque:
            os.setxattr(fd, "trusted.overlay.opaque", b"y")
        self._dress(parent, name, node)

    def _make(self, fd: int, name: bytes, node: Node) -> None:
        if node.kind == "directory":
            os.mkdir(name, dir_fd=fd)
            self._fill(fd, name, node)
            return
        if node.kind == "hard link":
            if self.files:
                there, other = self.files[node.link % len(self.files)]
                os.link(other, name, src_dir_fd=there, dst_dir_fd=fd)
            return
        if node.kind == "whiteout":
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=fd)
            return
        if node.kind == "file":
            made = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=fd)
            os.lseek(made, node.hole, os.SEEK_SET)
            os.write(made, node.content)
            os.ftruncate(made, 2 * node.hole + len(node.content))
            os.close(made)
            self.files.append((fd, name))
        elif node.kind == "symlink":
            os.symlink(node.content, name, dir_fd=fd)
        elif node.kind == "socket":
            os.mknod(name, stat.S_IFSOCK | 0o600, 0, dir_fd=fd)
        else:
            kinds = {"fifo": stat.S_IFIFO, "char": stat.S_IFCHR, "block": stat.S_IFBLK}
            device = 0 if node.kind == "fifo" else node.device
            os.mknod(name, kinds[node.kind] | 0o600, device, dir_fd=fd)
        self._dress(fd, name, node)

    def _dress(self, fd: int, name: bytes, node: Node) -> None:
        path = os.fsencode(f"/proc/self/fd/{fd}/") + name
        uid, gid = to_host(self.old.uid, node.uid), to_host(self.old.gid, node.gid)
        os.lchown(path, uid, gid)
        for attribute, value in node.attributes:
            os.setxattr(path, attribute, value, follow_symlinks=False)
        if node.kind != "symlink":
            os.chmod(path, node.mode)
            if node.acl:
                os.setxattr(path, "system.posix_acl_access", self._acl(node.acl, node.mode))
            if node.default_acl:
                os.setxattr(path, "system.posix_acl_default", self._acl(node.default_acl, 0o750))
        if node.capability is not None:
            value = CAPABILITY_V2
            if node.capability:
                root = to_host(self.old.uid, node.capability)
                value = struct.pack("<I", 0x03000001) + CAPABILITY_V2[4:] + struct.pack("<I", root)
            os.setxattr(path, "security.capability", value)
        os.utime(path, ns=(node.mtime // 3, node.mtime), follow_symlinks=False)

    def _acl(self, ids: t.Sequence[int], mode: int) -> bytes:
        entries = [(0x01, mode >> 6 & 7, 2**32 - 1)]
        entries += [(0x02, one & 7, to_host(self.old.uid, one)) for one in ids]
        entries += [(0x04, 5, 2**32 - 1)]
        entries += [(0x08, one & 6, to_host(self.old.gid, one)) for one in ids]
        entries += [(0x10, mode >> 3 & 7, 2**32 - 1), (0x20, mode & 7, 2**32 - 1)]
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@contextlib.contextmanager
def stacked(base: pathlib.Path, bottom_first: t.Sequence[Node], old: IDs) -> t.Iterator[t.Any]:
    """Layers on disk, and the kernel's view of them; yields (directories top first, view)."""
    builder = Builder(old)
    directories = []
    for number, node in enumerate(bottom_first):
        path = str(base / f"layer{number}")
        builder.layer(path, node)
        directories.insert(0, path)
    view, empty = base / "view", base / "empty"
    view.mkdir()
    empty.mkdir()
    lower = ":".join([*directories, str(empty)])
    mounts.mount("-t", "overlay", "-o", f"ro,lowerdir={lower}", "test", str(view))
    try:
        yield directories, str(view)
    finally:
        mounts.detach(str(view))


@pytest.fixture(scope="module", params=["ext4", "xfs", "btrfs"])
def ground(request: pytest.FixtureRequest, lab: Lab) -> t.Iterator[pathlib.Path]:
    """A filesystem of each kind, in memory."""
    kind = request.param
    folder = pathlib.Path(lab.folder())
    backing = pathlib.Path("/dev/shm") / f"{folder.name}-{kind}"
    with open(backing, "wb") as image:
        image.truncate(1 << 30)
    subprocess.run([f"mkfs.{kind}", "-q", str(backing)], check=True, capture_output=True)
    mounts.mount("-o", "loop", str(backing), str(folder))
    try:
        yield folder
    finally:
        mounts.detach(str(folder))
        backing.unlink()


@contextlib.contextmanager
def scratch(ground: pathlib.Path) -> t.Iterator[pathlib.Path]:
    base = ground / "work"
    base.mkdir()
    try:
        yield base
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", str(base)], check=True)


def make(
    directories: t.Sequence[str], target: pathlib.Path, old: IDs, new: IDs, **options: t.Any
) -> CloneResult:
    target.mkdir()
    with LayerStack(directories, options.pop("family", "trusted")) as stack:
        return clone(stack, str(target), Shift(mapping(old), mapping(new)), **options)


old_ids = st.sampled_from([IDs(), IDs(((0, 7_000_000, 65536),), ((0, 8_000_000, 65536),))])
new_ids = st.one_of(st.just(IDs()), st.builds(IDs, uid=id_maps(), gid=id_maps()))
many = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(stack=layers, old=old_ids, new=new_ids, workers=st.sampled_from([1, 2]))
@many
def test_clone_shows_what_the_kernel_shows(
    ground: pathlib.Path, stack: t.List[Node], old: IDs, new: IDs, workers: int
) -> None:
    with scratch(ground) as base, stacked(base, stack, old) as (directories, view):
        strategy = "reflink" if can_reflink(str(base)) else "copy"
        made = make(directories, base / "mapped", old, new, strategy=strategy, workers=workers)
        assert differences(view, str(base / "mapped"), old, new) == []
        with LayerStack(directories, "trusted") as layer_stack:
            seen = survey(layer_stack, Shift(mapping(old), mapping(new)), workers)
        assert seen[:4] == made[:4]
        usage = measure([str(base / "mapped")])
        assert (usage.inodes, usage.apparent) == (made.inodes, made.apparent)


@given(stack=layers, old=old_ids, new=new_ids)
@many
def test_shift_in_place_of_a_copy(
    ground: pathlib.Path, stack: t.List[Node], old: IDs, new: IDs
) -> None:
    with scratch(ground) as base, stacked(base, stack, old) as (directories, view):
        make(directories, base / "mapped", old, old)
        shift_in_place(str(base / "mapped"), Shift(mapping(old), mapping(new)))
        assert differences(view, str(base / "mapped"), old, new) == []


@given(stack=layers, old=old_ids, new=new_ids)
@many
def test_shift_in_place_of_a_mounted_layer(
    ground: pathlib.Path, stack: t.List[Node], old: IDs, new: IDs
) -> None:
    with scratch(ground) as base, stacked(base, stack, old) as (directories, view):
        for name in ("upper", "work", "merged"):
            (base / name).mkdir()
        root = os.stat(view)
        os.chown(base / "upper", root.st_uid, root.st_gid)
        shutil.copystat(view, base / "upper")
        options = f"lowerdir={':'.join(directories)},upperdir={base}/upper,workdir={base}/work"
        mounts.mount("-t", "overlay", "-o", options, "test", str(base / "merged"))
        try:
            shift_in_place(str(base / "merged"), Shift(mapping(old), mapping(new)), relink=True)
            # The kernel's copy-up fills some holes.
            assert differences(view, str(base / "merged"), old, new, ignore=("sparse",)) == []
        finally:
            mounts.detach(str(base / "merged"))
