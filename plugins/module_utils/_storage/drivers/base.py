# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""What every graph driver can do, with the generic, driver-oblivious copy as the default.

A new driver says where a layer lies and how its tree is read; the rest is inherited.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import re
import stat
import typing as t
from dataclasses import dataclass

from ..errors import (
    InternalError,
    StoreError,
    UnsupportedDriver,
)
from ..idmap.mapping import Shift
from ..kernel import files, refusals, xattrs
from ..store.removal import remove_tree
from ..tree import lookup
from ..tree.craft import CloneResult, Craft, Suspended
from ..tree.measure import Usage, measure
from ..tree.merged import LayerStack
from ..tree.roots import top_owners

Progress = t.Callable[[int, int], None]

LAYER_ID = re.compile(r"[0-9a-f]{64}")
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_TEXT = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE_TEXT = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC

SNAPSHOT, REFLINK, METACOPY, COPY = "snapshot", "reflink", "metacopy", "copy"
# In a staging folder, the way in which its layer is being made.
_WAY = "way"

# Filesystems in which no two files can share data, under any kernel so far.
_NEVER_SHARING = frozenset(("ext2", "ext3", "ext4", "f2fs", "tmpfs", "reiserfs", "jfs"))

_LABEL = "security.selinux"


class Strategy(t.NamedTuple):
    """A way to make a tree, and why it is open or the best one here."""

    name: str
    reason: str


@dataclass(frozen=True)
class DriverHome:
    """Where a driver's data lies.

    :param options: the driver's own options, prefix stripped, keys in lower case
    :param view: the graphroot to work through, see :func:`.view.view_of`
    :param image_stores: graphroots of read-only image stores, where parents may lie
    :param craft: what it takes to make layers; None for a driver that only looks and removes
    """

    graphroot: str
    runroot: str
    options: t.Mapping[str, str]
    rootless: bool
    view: str
    image_stores: t.Tuple[str, ...] = ()
    craft: t.Optional[Craft] = None


@dataclass(frozen=True)
class Staged:
    """A tree that was, or would be, built.

    :param files: names of anything but directories
    :param apparent: bytes that all but directories claim, each inode once
    :param exclusive: bytes of disk that it shares with nothing
    :param inodes: hard-linked files once, directories too
    """

    strategy: str
    reason: str
    files: int
    apparent: int
    exclusive: int
    inodes: int = 0


class Orphan:
    """Data in the driver's folder that no record speaks of.

    :param kind: "directory" or "link"
    :param changed: seconds since the epoch of the last change of its inode
    """

    def __init__(
        self, kind: str, name: str, path: str, changed: float, size: t.Callable[[], Usage]
    ) -> None:
        self.kind = kind
        self.name = name
        self.path = path
        self.changed = changed
        self._size = size

    def __repr__(self) -> str:
        return f"Orphan({self.kind!r}, {self.path!r})"

    def usage(self) -> Usage:
        """What it costs; walks the tree.

        :raises StorageError: it cannot be read
        """
        return self._size()


class Driver(abc.ABC):
    """A kind of layer storage. Layer IDs are 64 hexadecimal digits; chains are top first."""

    name: t.ClassVar[str]
    # The folder that holds one entry per layer, below the graphroot.
    places: t.ClassVar[t.Tuple[str, ...]]

    def __init__(self, home: DriverHome) -> None:
        self.home = home

    @property
    def folder(self) -> str:
        """The folder that holds the layers, as seen through the view."""
        return os.path.join(self.home.view, *self.places)

    @property
    def craft(self) -> Craft:
        """What it takes to make layers.

        :raises InternalError: the driver was opened without it
        """
        if self.home.craft is None:
            raise InternalError(f"driver {self.name}", "was opened to look and to remove only")
        return self.home.craft

    # Asking

    def exists(self, layer_id: str) -> bool:
        """Whether the store itself (no read-only one) has a directory for the layer.

        :raises StorageError: the driver's folder cannot be read
        """
        with self._explained(layer_id), self._opened_folder() as folder:
            return _is_directory(folder, self._checked(layer_id))

    def damage(self, layer_id: str, chain: t.Sequence[str] = ()) -> t.Optional[str]:
        """What a runtime would miss of a layer's data, in words; None when it is intact.

        :param chain: the IDs of the layers that must be there for it
        :raises StorageError: the driver's folder cannot be read
        """
        for one in (layer_id, *chain):
            with contextlib.ExitStack() as undo:
                if self._opened_layer(undo, one) is None:
                    return f"the directory of layer {one[:12]} is missing"
        return None

    def measure(self, layer_id: str, exclusive: bool = False) -> Usage:
        """What a layer's data costs on disk, each inode once.

        :param exclusive: whether to find out which bytes nothing else shares
        :raises StorageError: the layer is missing or cannot be read
        """
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            return measure([self._need_layer(undo, layer_id)], exclusive=exclusive)

    def present(self) -> t.Set[str]:
        """The names of all directories in the driver's folder, those of its layers among them.

        :raises StorageError: the driver's folder cannot be read
        """
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._explained(self.folder))
            entries = undo.enter_context(os.scandir(undo.enter_context(self._opened_folder())))
            return {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}

    def top_owners(self, chain: t.Sequence[str]) -> t.List[t.Tuple[str, int, int]]:
        """The root directory ("") and the names in it, with their UID and GID on disk; nothing where that
        is not whom they belong to.

        :param chain: the layer and its parents, top first
        :raises StorageError: a layer of the chain is missing or cannot be read
        """
        with self._explained(chain[0]), self._readable(chain) as stack:
            return list(top_owners(stack))

    def measure_path(self, path: str) -> Usage:
        """What anything in the store costs on disk; the part that it shares is not looked for.

        :raises StorageError: it cannot be read
        """
        with self._explained(path):
            return measure([path])

    def read_text(self, chain: t.Sequence[str], path: str) -> t.Optional[str]:
        """The text of one file of a layer's tree, None when it has no such regular file.

        :param chain: the layer and its parents
        :param path: relative to the tree's root
        :raises StorageError: a layer is missing or cannot be read
        """
        with self._explained(chain[0]), self._readable(chain) as stack:
            return lookup.read_text(stack, path)

    def settle(self) -> None:
        """Have on disk what was written, and freed what was deleted as far as that is to be had.

        :raises StorageError: something could not be written
        """
        with self._explained(self.home.graphroot), contextlib.ExitStack() as undo:
            directory = os.open(self.home.view, DIRECTORY & ~os.O_NOFOLLOW)
            undo.callback(os.close, directory)
            self._settle(directory)

    def _settle(self, directory: int) -> None:
        files.syncfs(directory)

    def dependencies(self, layer_id: str) -> t.List[str]:
        """The layers whose data this one needs on disk, nearest first; none where trees are whole."""
        return []

    def dependents(self, layer_id: str) -> t.List[str]:
        """The layers in the folder that need the data of this one."""
        return []

    def links(self) -> t.Dict[str, str]:
        """Short names that the driver keeps, with the layer each stands for ("" if for none)."""
        return {}

    def orphans(
        self,
        known_ids: t.Collection[str],
        thorough: bool = True,
        present: t.Optional[t.Set[str]] = None,
    ) -> t.List[Orphan]:
        """Layer directories without a record. Other names in the folder are never touched.

        :param known_ids: the IDs of all layers with a record, in whichever file
        :param thorough: whether to look at each short name even where there is one for each layer
        :param present: what :meth:`present` has just told, not to list the folder again
        :raises StorageError: the driver's folder cannot be read
        """
        names = self.present() if present is None else present
        with self._explained(self.folder), self._opened_folder() as folder:
            return self._orphans(folder, names, known_ids, thorough)

    def _orphans(
        self, folder: int, names: t.Set[str], known_ids: t.Collection[str], thorough: bool
    ) -> t.List[Orphan]:
        """What :meth:`orphans` finds in the open folder of the driver, which holds these directories."""
        found = []
        for name in sorted(names.difference(known_ids)):
            if not LAYER_ID.fullmatch(name):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    found.append(self._orphan("directory", name, status.st_ctime))
        return found

    def _orphan(self, kind: str, name: str, changed: float) -> Orphan:
        path = os.path.join(self.folder, name)
        return Orphan(kind, name, path, changed, lambda: self.measure(name))

    # Making

    def strategies(self, chain: t.Sequence[str]) -> t.List[Strategy]:
        """The ways to make a mapped layer from a template, cheapest faithful one first.

        :param chain: the template and its parents
        :raises UnsupportedDriver: the layers use a feature that is not handled here
        :raises StorageError: a layer of the chain is missing
        """
        with self._explained(chain[0]), contextlib.ExitStack() as undo:
            self._need_layer(undo, chain[0])
            return self._copying()

    def _copying(self) -> t.List[Strategy]:
        filesystem = files.filesystem_type(self.home.view) or "this filesystem"
        # Asked for where it may be, for it takes a (nameless) file to find out.
        if filesystem not in _NEVER_SHARING and self.craft.can_reflink(self.home.view):
            return [
                Strategy(REFLINK, f"{filesystem} lets files share their data"),
                Strategy(COPY, "plain copies work everywhere"),
            ]
        return [Strategy(COPY, f"{filesystem} does not let files share their data")]

    def predict(
        self,
        chain: t.Sequence[str],
        shift: Shift,
        strategy: str = "auto",
        progress: t.Optional[Progress] = None,
    ) -> t.Tuple[Strategy, CloneResult]:
        """What :meth:`stage` would do and read. Writes nothing.

        :param progress: called with files and bytes seen; may raise Suspended
        :returns: the way it would choose, and what the tree holds; ``exclusive`` there is what a plain
            copy would take
        :raises StorageError: as :meth:`stage`
        """
        with self._explained(chain[0]):
            chosen = self._choose(strategy, self.strategies(chain))
            return chosen, self._survey(chain, shift, progress)

    def stage(
        self,
        chain: t.Sequence[str],
        shift: Shift,
        strategy: str,
        into: str,
        layer_id: str,
        progress: t.Optional[Progress] = None,
    ) -> Staged:
        """Build the whole layer in a staging folder and have it on disk. Takes no lock of the store.

        :param chain: the template and its parents, top first
        :param shift: from the template's mapping to the wanted one
        :param strategy: a name of :meth:`strategies`, or "auto" for the first
        :param into: an existing folder of the caller's, on the view and the driver's filesystem; what
            a suspended call with the same arguments has left in it is gone on with
        :param layer_id: the ID that the layer will have
        :param progress: called with files and bytes done; may raise Suspended
        :raises UnsupportedDriver: that strategy, or a feature of the store, is not to be had
        :raises UnmappedIDs: the tree holds IDs that the shift does not map
        :raises NoSpace: the filesystem is full
        :raises StorageError: the template is damaged or cannot be read
        """
        self._checked(layer_id)
        with self._explained(chain[0]), contextlib.ExitStack() as undo:
            chosen = self._choose(strategy, self.strategies(chain))
            staging = os.open(into, DIRECTORY)
            undo.callback(os.close, staging)
            target = os.path.join(into, self._staged_name(layer_id))
            if read_text(staging, _WAY) != chosen.name:
                remove_tree(target, self.destroy)
                write_text(staging, _WAY, chosen.name)
            staged = self._build(chosen, chain, shift, staging, target, progress)
            files.syncfs(staging)
            return staged

    def commit(self, into: str, layer_id: str) -> None:
        """Move a staged layer to its place. Called with the store's locks held and its record, flagged
        as incomplete, written: whoever finds that record removes what a kill has left. It is durable
        when this returns, so that the record may say that the layer is there.

        :raises StorageError: a directory is there already, or the rename failed
        """
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            folder = undo.enter_context(self._opened_folder())
            staging = os.open(into, DIRECTORY)
            undo.callback(os.close, staging)
            self._install(staging, folder, self._checked(layer_id))
            sync_names(folder)

    def detach(self, layer_id: str, trash_dir: str) -> None:
        """Move a layer's data out of the store. Called with the store's locks held and its record
        flagged as incomplete. Data that is not there is no error. It is durable when this returns, so
        that the record may go.

        :param trash_dir: an existing folder on the view, where the layer keeps its ID as name
        :raises StorageError: the rename failed
        """
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            folder = undo.enter_context(self._opened_folder())
            trash = os.open(trash_dir, DIRECTORY)
            undo.callback(os.close, trash)
            with contextlib.suppress(FileNotFoundError):
                self._uninstall(folder, self._checked(layer_id), trash)
                sync_names(folder)

    def drop(self, orphan: Orphan, trash_dir: str) -> None:
        """Move an orphan out of the store, as :meth:`detach` does with a layer.

        :raises StorageError: the rename failed
        """
        self.detach(orphan.name, trash_dir)

    def destroy(self, parent: int, name: str) -> bool:
        """Delete an entry of an open directory in one piece, if this driver can; the store's
        ``remove_tree`` asks wherever a device number changes.

        :returns: whether it is gone
        """
        return False

    def holds(self, name: str) -> bool:
        """Whether the place of a layer of that name is only held, for one that is to come or was taken away.

        :raises StorageError: the driver's folder cannot be read
        """
        return False

    def vacate(self, layer_id: str) -> bool:
        """Give up a place that is held, once no record speaks of that layer.

        :returns: whether there was one
        :raises StorageError: it cannot be removed
        """
        return False

    # What a driver may do its own way

    def _staged_name(self, layer_id: str) -> str:
        """What the layer is called in its staging folder."""
        return "layer"

    @abc.abstractmethod
    def _readable(self, chain: t.Sequence[str]) -> t.ContextManager[LayerStack]:
        """The template's tree, open for reading."""

    def _survey(
        self, chain: t.Sequence[str], shift: Shift, progress: t.Optional[Progress]
    ) -> CloneResult:
        with self._readable(chain) as stack:
            return self.craft.survey(stack, shift, progress=progress)

    def _build(
        self,
        strategy: Strategy,
        chain: t.Sequence[str],
        shift: Shift,
        staging: int,
        target: str,
        progress: t.Optional[Progress],
    ) -> Staged:
        """Build the layer as ``target``, an entry of the open directory ``staging``; one that is there is
        a part of it.
        """
        again = os.path.lexists(target)
        if not again:
            os.mkdir(os.path.basename(target), 0o700, dir_fd=staging)
        with self._readable(chain) as stack:
            return self._cloned(stack, target, shift, strategy, progress, again)

    def _cloned(
        self,
        stack: LayerStack,
        target: str,
        shift: Shift,
        strategy: Strategy,
        progress: t.Optional[Progress],
        again: bool,
    ) -> Staged:
        made = self.craft.clone(
            stack, target, shift, strategy=strategy.name, progress=progress, again=again
        )
        return self._told(strategy, made, made.exclusive)

    def _in_one_go(self, staging: int, progress: t.Optional[Progress]) -> t.Optional[Progress]:
        """A progress callback for work that nothing can go on with: what there is of it will be begun anew."""
        write_text(staging, _WAY, "")
        if progress is None:
            return None
        tell = progress

        def tell_only(files_done: int, bytes_done: int) -> None:
            try:
                tell(files_done, bytes_done)
            except Suspended as stop:
                if stop.given_up:
                    raise

        return tell_only

    def _told(self, strategy: Strategy, made: CloneResult, exclusive: int) -> Staged:
        return Staged(
            strategy.name, strategy.reason, made.files, made.apparent, exclusive, made.inodes
        )

    def _install(self, staging: int, folder: int, layer_id: str) -> None:
        name = self._staged_name(layer_id)
        os.rename(name, layer_id, src_dir_fd=staging, dst_dir_fd=folder)

    def _uninstall(self, folder: int, layer_id: str, trash: int) -> None:
        os.rename(layer_id, layer_id, src_dir_fd=folder, dst_dir_fd=trash)

    # Helpers

    def _choose(self, wanted: str, open_ways: t.Sequence[Strategy]) -> Strategy:
        if wanted == "auto":
            return open_ways[0]
        for one in open_ways:
            if one.name == wanted:
                return Strategy(one.name, "as asked")
        names = ", ".join(one.name for one in open_ways)
        raise UnsupportedDriver(
            f"strategy {wanted}",
            f"is not to be had with driver {self.name} on "
            f"{files.filesystem_type(self.home.view) or 'this filesystem'} as the store is set up",
            f"Use auto, or one of: {names}.",
        )

    def _checked(self, layer_id: str) -> str:
        if not LAYER_ID.fullmatch(layer_id):
            raise StoreError(
                f"layer {layer_id[:80]!r}", "is no layer ID, which is 64 hexadecimal digits"
            )
        return layer_id

    @contextlib.contextmanager
    def _opened_folder(self, graphroot: t.Optional[str] = None) -> t.Iterator[int]:
        """The folder of the layers, reached without following a link below the graphroot."""
        current = os.open(graphroot or self.home.view, DIRECTORY & ~os.O_NOFOLLOW)
        try:
            for place in self.places:
                following = os.open(place, DIRECTORY, dir_fd=current)
                os.close(current)
                current = following
            yield current
        finally:
            os.close(current)

    def _opened_layer(self, undo: contextlib.ExitStack, layer_id: str) -> t.Optional[int]:
        """A descriptor of a layer's directory, in the store or a read-only one; None if missing."""
        name = self._checked(layer_id)
        for graphroot in (self.home.view, *self.home.image_stores):
            try:
                with self._opened_folder(graphroot) as folder:
                    descriptor = os.open(name, DIRECTORY, dir_fd=folder)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    continue
                raise
            undo.callback(os.close, descriptor)
            return descriptor
        return None

    def _need_layer(self, undo: contextlib.ExitStack, layer_id: str) -> int:
        descriptor = self._opened_layer(undo, layer_id)
        if descriptor is None:
            raise StoreError(
                f"layer {layer_id[:12]}",
                f"has no directory in {os.path.join(self.home.graphroot, *self.places)}",
                "Pull or load its image again.",
                layer_id=layer_id,
            )
        return descriptor

    def _explained(self, subject: str) -> t.ContextManager[None]:
        """Turn the system's errors into those of this library.

        :param subject: a layer ID or a path
        """
        about = f"layer {subject[:12]}" if LAYER_ID.fullmatch(subject) else subject
        return refusals.explained(self.home.graphroot, about)


def read_text(folder: int, name: str) -> t.Optional[str]:
    """The text of a small file in an open directory, None when there is none."""
    try:
        descriptor = os.open(name, _READ_TEXT, dir_fd=folder)
    except FileNotFoundError:
        return None
    with open(descriptor, encoding="utf-8") as stream:
        return stream.read(1000)


def write_text(folder: int, name: str, text: str) -> None:
    """Put a small file in an open directory, in the place of one that is there."""
    descriptor = os.open(name, _WRITE_TEXT, 0o600, dir_fd=folder)
    with open(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)


def sync_names(directory: int) -> None:
    """Make what was renamed, made or removed in an open directory durable, where the filesystem can."""
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def copy_label(source: int, target: int) -> None:
    """Give an open file the SELinux label of another, where there are labels."""
    try:
        xattrs.put(target, _LABEL, xattrs.get(source, _LABEL))
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.ENOTSUP, errno.EPERM, errno.EACCES):
            raise


def _is_directory(folder: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False
