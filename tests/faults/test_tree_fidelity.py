# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Clones of random layer stacks have the content of the kernel's overlay mount, with other owners."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import resource
import shutil
import signal
import stat
import struct
import subprocess
import traceback
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    NoSpace,
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
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import (
    files,
    namespaces,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.tree import walk
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.clone import (
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
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.tree_tools import (
    CloneResult,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import mounts
from support.tree_compare import IDs, Ranges, differences, to_host
from support.waiting import wait_until

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
    children: t.Tuple[t.Tuple[bytes, Node], ...] = ()

    def __repr__(self) -> str:
        fields = (
            f"{field}={value[:20] if isinstance(value, bytes) else value!r}"
            for field, value, default in zip(
                self._fields[1:], self[1:], self._field_defaults.values()
            )
            if value != default
        )
        return f"Node({self.kind!r}, {', '.join(fields)})"


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
    """A permutation of ranges of 0..65535, at some IDs of the host."""
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
        uid=IDMap(tuple(IDRange(*item) for item in ids.uid)),
        gid=IDMap(tuple(IDRange(*item) for item in ids.gid)),
    )


class Builder:
    """Writes layers in the correct order: attributes last, directories after their entries."""

    def __init__(self, old: IDs, family: str = "trusted") -> None:
        self.old = old
        self.opaque = f"{family}.overlay.opaque"

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
            os.setxattr(fd, self.opaque, b"y")
        self._set_metadata(parent, name, node)

    def _make(self, fd: int, name: bytes, node: Node) -> None:
        if node.kind == "directory":
            os.mkdir(name, dir_fd=fd)
            self._fill(fd, name, node)
            return
        if node.kind == "hard link":
            if self.files:
                folder, existing = self.files[node.link % len(self.files)]
                os.link(existing, name, src_dir_fd=folder, dst_dir_fd=fd)
            return
        if node.kind == "whiteout":
            os.mknod(name, stat.S_IFCHR, 0, dir_fd=fd)
            return
        if node.kind == "file":
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=fd)
            os.lseek(descriptor, node.hole, os.SEEK_SET)
            os.write(descriptor, node.content)
            os.ftruncate(descriptor, 2 * node.hole + len(node.content))
            os.close(descriptor)
            self.files.append((fd, name))
        elif node.kind == "symlink":
            os.symlink(node.content, name, dir_fd=fd)
        elif node.kind == "socket":
            os.mknod(name, stat.S_IFSOCK | 0o600, 0, dir_fd=fd)
        else:
            kinds = {"fifo": stat.S_IFIFO, "char": stat.S_IFCHR, "block": stat.S_IFBLK}
            device = 0 if node.kind == "fifo" else node.device
            os.mknod(name, kinds[node.kind] | 0o600, device, dir_fd=fd)
        self._set_metadata(fd, name, node)

    def _set_metadata(self, fd: int, name: bytes, node: Node) -> None:
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
        entries += [(0x02, identifier & 7, to_host(self.old.uid, identifier)) for identifier in ids]
        entries += [(0x04, 5, 2**32 - 1)]
        entries += [(0x08, identifier & 6, to_host(self.old.gid, identifier)) for identifier in ids]
        entries += [(0x10, mode >> 3 & 7, 2**32 - 1), (0x20, mode & 7, 2**32 - 1)]
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


@contextlib.contextmanager
def stacked(
    base: pathlib.Path, bottom_first: t.Sequence[Node], old: IDs, family: str = "trusted"
) -> t.Iterator[t.Any]:
    """Write layers and mount them with overlay; yields (directories top first, mount point)."""
    builder = Builder(old, family)
    directories: t.List[str] = []
    for number, node in enumerate(bottom_first):
        path = str(base / f"layer{number}")
        builder.layer(path, node)
        directories.insert(0, path)
    view, empty = base / "view", base / "empty"
    view.mkdir()
    empty.mkdir()
    lower = ":".join([*directories, str(empty)])
    options = f"ro,lowerdir={lower}" + (",userxattr" if family == "user" else "")
    mounts.mount("-t", "overlay", "-o", options, "test", str(view))
    try:
        yield directories, str(view)
    finally:
        mounts.detach(str(view))


@pytest.fixture(scope="module", params=["ext4", "xfs", "btrfs"])
def filesystem(request: pytest.FixtureRequest, lab: Lab) -> t.Iterator[pathlib.Path]:
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
def scratch(filesystem: pathlib.Path) -> t.Iterator[pathlib.Path]:
    base = filesystem / "work"
    base.mkdir()
    try:
        yield base
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", str(base)], check=True)


def clone_stack(
    directories: t.Sequence[str], target: pathlib.Path, old: IDs, new: IDs, **options: t.Any
) -> CloneResult:
    target.mkdir()
    with LayerStack(directories, options.pop("family", "trusted")) as stack:
        return clone(stack, str(target), Shift(mapping(old), mapping(new)), **options)


old_ids = st.sampled_from([IDs(), IDs(((0, 7_000_000, 65536),), ((0, 8_000_000, 65536),))])
new_ids = st.one_of(st.just(IDs()), st.builds(IDs, uid=id_maps(), gid=id_maps()))
random_examples = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(stack=layers, old=old_ids, new=new_ids, workers=st.sampled_from([1, 2]))
@random_examples
def test_clone_equals_overlay_mount(
    filesystem: pathlib.Path, stack: t.List[Node], old: IDs, new: IDs, workers: int
) -> None:
    with scratch(filesystem) as base, stacked(base, stack, old) as (directories, view):
        strategy = "reflink" if can_reflink(str(base)) else "copy"
        made = clone_stack(
            directories, base / "mapped", old, new, strategy=strategy, workers=workers
        )
        assert differences(view, str(base / "mapped"), old, new) == []
        with LayerStack(directories, "trusted") as layer_stack:
            surveyed = survey(layer_stack, Shift(mapping(old), mapping(new)), workers)
        assert surveyed[:4] == made[:4]
        usage = measure([str(base / "mapped")])
        assert (usage.inodes, usage.apparent) == (made.inodes, made.apparent)


@given(stack=layers, old=old_ids, new=new_ids)
@random_examples
def test_copy_is_shifted_in_place(
    filesystem: pathlib.Path, stack: t.List[Node], old: IDs, new: IDs
) -> None:
    with scratch(filesystem) as base, stacked(base, stack, old) as (directories, view):
        clone_stack(directories, base / "mapped", old, old)
        shift_in_place(str(base / "mapped"), Shift(mapping(old), mapping(new)))
        assert differences(view, str(base / "mapped"), old, new) == []


@given(stack=layers, old=old_ids, new=new_ids)
@random_examples
def test_mounted_layer_is_shifted_in_place(
    filesystem: pathlib.Path, stack: t.List[Node], old: IDs, new: IDs
) -> None:
    with scratch(filesystem) as base, stacked(base, stack, old) as (directories, view):
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


def without_privilege(node: Node) -> Node:
    """A node as a user can create it: without devices, and with user attributes only."""
    allowed = tuple(
        pair
        for pair in node.attributes
        if pair[0].startswith("user.") and not pair[0].startswith("user.overlay.")
    )
    return node._replace(
        kind="fifo" if node.kind in ("char", "block") else node.kind,
        attributes=allowed,
        children=tuple((name, without_privilege(child)) for name, child in node.children),
    )


def in_namespace(base: pathlib.Path, function: t.Callable[[], None]) -> None:
    """Run a function as root of a user namespace whose IDs begin at 100000."""
    os.chown(base, 100000, 100000)
    ready, go, errors = os.pipe(), os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            namespaces.unshare(namespaces.CLONE_NEWUSER | namespaces.CLONE_NEWNS)
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            function()
        except BaseException:
            os.write(errors[1], traceback.format_exc().encode()[-60000:])
        finally:
            os._exit(0)
    os.read(ready[0], 1)
    for kind in ("uid", "gid"):
        pathlib.Path(f"/proc/{pid}/{kind}_map").write_text("0 100000 65536")
    os.write(go[1], b"x")
    os.close(errors[1])
    message = b""
    while piece := os.read(errors[0], 65536):
        message += piece
    os.waitpid(pid, 0)
    for fd in (*ready, *go, errors[0]):
        os.close(fd)
    assert not message, message.decode()


@st.composite
def inner_maps(draw: st.DrawFn) -> Ranges:
    """A permutation of ranges of the IDs in the namespace."""
    cuts = sorted(draw(st.sets(st.sampled_from([1, 2, 33, 1000, 1001]), max_size=4)))
    result, host = [], 0
    for start, end in draw(st.permutations(list(itertools.pairwise([0, *cuts, 65535])))):
        result.append((start, host, end - start))
        host += end - start
    return tuple(result)


@given(
    stack=layers, new=st.builds(IDs, uid=inner_maps(), gid=inner_maps()), workers=st.integers(1, 2)
)
@random_examples
def test_clone_works_without_privileges(
    filesystem: pathlib.Path, stack: t.List[Node], new: IDs, workers: int
) -> None:
    layers_of_user = [without_privilege(node) for node in stack]

    def work() -> None:
        with stacked(base, layers_of_user, IDs(), "user") as (directories, view):
            clone_stack(directories, base / "mapped", IDs(), new, family="user", workers=workers)
            assert differences(view, str(base / "mapped"), IDs(), new) == []
            shift_in_place(str(base / "mapped"), Shift(mapping(new), mapping(IDs())))
            # Capabilities that belong to the root of the namespace are not changed back.
            ignore = ("security.capability",)
            assert differences(view, str(base / "mapped"), IDs(), IDs(), ignore) == []

    with scratch(filesystem) as base:
        in_namespace(base, work)


def chain(base: pathlib.Path, names: t.Sequence[bytes]) -> None:
    """Create nested directories, each with a file beside it."""
    fd = os.open(base, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=fd)
        os.close(os.open(b"file", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd))
        deeper = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = deeper
    os.close(fd)


HIGH = IDs(((0, 100000, 65536),), ((0, 100000, 65536),))


@pytest.mark.parametrize(("depth", "length"), [(60, 255), (2000, 10), (400, 255)])
@pytest.mark.parametrize("workers", [1, 2])
def test_tree_deeper_than_path_limit_is_cloned(
    lab: Lab, depth: int, length: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = lab.folder()
    names = [b"%0*d" % (length, number) for number in range(depth)]
    for layer in ("top", "bottom"):
        (base / layer).mkdir()
        chain(base / layer, names)
    # Too few descriptors for a recursive walk.
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 24, limits[1]))
    try:
        directories = [str(base / "top"), str(base / "bottom")]
        made = clone_stack(directories, base / "mapped", IDs(), HIGH, workers=workers)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (made.files, made.directories) == (depth, depth + 1)
    assert differences(str(base / "top"), str(base / "mapped"), IDs(), HIGH) == []
    assert len(os.listdir("/proc/self/fd")) == used
    # The code for kernels without openat2(2) has the same result.
    monkeypatch.setattr(files, "_openat2_works", False)
    if depth < 100:
        clone_stack(directories, base / "again", IDs(), HIGH, workers=workers)
        assert differences(str(base / "top"), str(base / "again"), IDs(), HIGH) == []
    subprocess.run(["rm", "-rf", str(base)], check=True)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_directory_with_many_entries_and_links_is_cloned(lab: Lab, workers: int) -> None:
    base = lab.folder()
    for layer in ("top", "bottom"):
        (base / layer / "wide").mkdir(parents=True)
        (base / layer / "other").mkdir()
        for number in range(3000):
            path = base / layer / "wide" / f"{layer}{number}"
            path.write_text(str(number))
            if number % 3 == 0:
                os.link(path, base / layer / "other" / f"{layer}{number}")
            if number % 7 == 0:
                os.link(path, base / layer / "wide" / f"{layer}{number}-again")
        os.utime(base / layer / "wide", ns=(1, 2))
        os.utime(base / layer / "other", ns=(3, 4))
        os.utime(base / layer, ns=(5, 6))
    os.mknod(base / "top" / "wide" / "bottom3", stat.S_IFCHR)
    os.utime(base / "top" / "wide", ns=(1, 2))
    (base / "view").mkdir()
    directories = [str(base / "top"), str(base / "bottom")]
    lower = ":".join(directories)
    mounts.mount("-t", "overlay", "-o", f"ro,lowerdir={lower}", "test", str(base / "view"))
    try:
        reported: t.List[t.Tuple[int, int]] = []
        made = clone_stack(
            directories,
            base / "mapped",
            IDs(),
            HIGH,
            workers=workers,
            progress=lambda count, size: reported.append((count, size)),
        )
        assert differences(str(base / "view"), str(base / "mapped"), IDs(), HIGH) == []
        assert reported[-1] == (made.files + made.directories, made.apparent)
        assert reported == sorted(reported)
    finally:
        mounts.detach(str(base / "view"))


def make_tree(base: pathlib.Path, count: int, size: int = 10) -> str:
    root = base / "template"
    for number in range(count):
        path = root / f"d{number % 50}" / f"e{number % 7}" / f"f{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * size)
    return str(root)


@pytest.mark.parametrize("workers", [1, 2])
def test_full_filesystem_is_reported(lab: Lab, workers: int) -> None:
    base = lab.folder()
    template = make_tree(base, 2000, 5000)
    (base / "small").mkdir()
    mounts.mount("-t", "tmpfs", "-o", "size=4m", "small", str(base / "small"))
    before = set(os.listdir("/proc/self/fd"))
    others = children()
    try:
        with pytest.raises(NoSpace, match="no space left on device") as caught:
            clone_stack([template], base / "small" / "mapped", IDs(), HIGH, workers=workers)
        assert str(caught.value.facts["path"]).startswith(f"{base}/small/mapped/d")
    finally:
        mounts.detach(str(base / "small"))
    assert set(os.listdir("/proc/self/fd")) == before
    assert children() == others


def test_killed_worker_is_reported(lab: Lab) -> None:
    base = lab.folder()
    template = make_tree(base, 5000)
    others = children()

    def kill(_count: int, _size: int) -> None:
        for pid in set(children()) - set(others):
            os.kill(pid, signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walk, "_PROGRESS_SECONDS", 0.0)
        with pytest.raises(TreeError, match="killed by signal 9"):
            clone_stack([template], base / "mapped", IDs(), HIGH, workers=2, progress=kill)
    assert children() == others


def test_workers_end_with_their_leader(lab: Lab) -> None:
    base = lab.folder()
    template = make_tree(base, 5000)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)

        def stop(_count: int, _size: int) -> None:
            if children():
                os.write(writing, " ".join(map(str, children())).encode())
                os.kill(os.getpid(), signal.SIGKILL)

        walk._PROGRESS_SECONDS = 0.0
        clone_stack([template], base / "mapped", IDs(), HIGH, workers=2, progress=stop)
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    workers = [int(word) for word in os.read(reading, 1000).split()]
    os.close(reading)
    assert len(workers) == 2
    wait_until(lambda: not any(os.path.exists(f"/proc/{worker}") for worker in workers))


def children() -> t.List[int]:
    pid = os.getpid()
    return [
        int(word) for word in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ]


def test_all_unmapped_ids_are_reported(lab: Lab) -> None:
    base = lab.folder()
    template = make_tree(base, 1500)
    for number, (uid, gid) in enumerate([(70000, 0), (0, 80000), (90000, 90001)]):
        os.chown(os.path.join(template, f"d{number}"), uid, gid)
    path = os.path.join(template, "d3")
    entries = [(1, 7, -1), (2, 7, 70001), (4, 7, -1), (16, 7, -1), (32, 7, -1)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_default", value)
    with pytest.raises(UnmappedIDs) as caught:
        clone_stack([template], base / "mapped", IDs(), HIGH, workers=2)
    expected = {"uids": [70000, 70001, 90000], "gids": [80000, 90001]}
    assert {kind: caught.value.facts[kind] for kind in expected} == expected
    with LayerStack([template], "trusted") as stack, pytest.raises(UnmappedIDs) as caught:
        survey(stack, Shift(Mapping(), mapping(HIGH)))
    assert {kind: caught.value.facts[kind] for kind in expected} == expected


@pytest.mark.parametrize(
    ("attribute", "value", "on"),
    [
        ("trusted.overlay.redirect", b"/other", "d1"),
        ("trusted.overlay.opaque", b"x", "d1"),
        ("trusted.overlay.metacopy", b"", "d1/e1/f1"),
        ("trusted.overlay.whiteout", b"y", "d1/e1/f1"),
    ],
)
def test_overlay_attributes_that_need_a_mount_are_refused(
    lab: Lab, attribute: str, value: bytes, on: str
) -> None:
    base = lab.folder()
    template = make_tree(base, 50)
    os.setxattr(os.path.join(template, on), attribute, value)
    with pytest.raises(NeedsMount, match=attribute):
        clone_stack([template], base / "mapped", IDs(), HIGH)
    with LayerStack([template], "trusted") as stack, pytest.raises(NeedsMount):
        survey(stack)
    clone_stack([template], base / "plain", IDs(), HIGH, family="plain")


def test_racing_attacker_cannot_redirect_the_walk(lab: Lab) -> None:
    base = lab.folder()
    secret = base / "secret"
    secret.mkdir()
    (secret / "f").write_text("secret")
    before = os.stat(secret / "f")
    template = base / "template"
    for number in range(30):
        (template / f"d{number}").mkdir(parents=True)
        for entry in range(20):
            (template / f"d{number}" / f"f{entry}").write_text("x")
        (template / f"d{number}" / "f").write_text("x")
    pid = os.fork()
    if pid == 0:
        # Directories and files are symbolic links half of the time.
        while True:
            for number in range(30):
                path = template / f"d{number}"
                with contextlib.suppress(OSError):
                    os.rename(path, template / f"kept{number}")
                    os.symlink(secret, path)
                    os.unlink(path)
                    os.rename(template / f"kept{number}", path)
                    os.rename(path / "f", path / "kept")
                    os.symlink(secret / "f", path / "f")
                    os.unlink(path / "f")
                    os.rename(path / "kept", path / "f")
    try:
        for attempt in range(60):
            target = base / f"mapped{attempt}"
            with contextlib.suppress(StorageError):
                clone_stack([str(template)], target, IDs(), HIGH, workers=1 + attempt % 2)
            for folder, _folders, names in os.walk(target):
                for name in names:
                    path = pathlib.Path(folder, name)
                    assert path.is_symlink() or path.read_text() in ("x", "")
            subprocess.run(["rm", "-rf", str(target)], check=True)
            with contextlib.suppress(StorageError):
                shift_in_place(str(template), Shift(mapping(HIGH), mapping(HIGH), True))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    after = os.stat(secret / "f")
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    assert os.stat(secret).st_uid == 0


def test_symlinked_layer_is_refused(lab: Lab) -> None:
    base = lab.folder()
    os.symlink("/etc", base / "layer")
    with pytest.raises(OSError, match="Not a directory"):
        LayerStack([str(base / "layer")], "trusted")


def test_device_without_privileges_is_refused(lab: Lab) -> None:
    base = lab.folder()
    (base / "template").mkdir()
    os.mknod(base / "template" / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chmod(base, 0o777)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresgid(1234, 1234, 1234)
            os.setresuid(1234, 1234, 1234)
            clone_stack([str(base / "template")], base / "mapped", IDs(), IDs(), workers=1)
        except TreeError as error:
            status = 0 if "null: is a device (1:3)" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_parents_default_acl_is_not_inherited(lab: Lab) -> None:
    base = lab.folder()
    template = make_tree(base, 100)
    (base / "strict").mkdir()
    entries = [(1, 7, -1), (2, 7, 5), (4, 7, -1), (16, 7, -1), (32, 0, -1)]
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    os.setxattr(base / "strict", "system.posix_acl_default", value)
    clone_stack([template], base / "strict" / "mapped", IDs(), HIGH)
    assert differences(template, str(base / "strict" / "mapped"), IDs(), HIGH) == []


def test_missing_reflink_support_is_reported(lab: Lab) -> None:
    base = lab.folder()
    template = make_tree(base, 3)
    assert not can_reflink(str(base))
    with pytest.raises(TreeError, match="cannot share data"):
        clone_stack([template], base / "mapped", IDs(), HIGH, strategy="reflink")


def test_groups_are_correct_on_filesystem_with_grpid(lab: Lab) -> None:
    base = lab.folder()
    template = make_tree(base, 800)
    for number in range(0, 50, 7):
        os.chown(os.path.join(template, f"d{number}"), 33, 1000 + number)
        os.chown(os.path.join(template, f"d{number}", "e0"), 1, 2000 + number)
    with open(base / "disk.img", "wb") as disk:
        disk.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", base / "disk.img"], check=True)
    (base / "disk").mkdir()
    mounts.mount("-o", "loop,grpid", str(base / "disk.img"), str(base / "disk"))
    try:
        made = base / "disk" / "mapped"
        clone_stack([template], made, IDs(), HIGH, workers=2)
        assert differences(template, str(made), IDs(), HIGH) == []
    finally:
        mounts.detach(str(base / "disk"))
