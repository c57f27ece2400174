# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The contract of the graph drivers. By default, layers are made by copying the tree.

A driver must define where its layers are (``name``, ``folders``) and how the tree of a layer is read (``_readable``).
Everything else has a default. The docstring of each method, and docs/architecture.md, define what a driver may
override and what callers rely on. tests/interop/test_driver_contract.py checks every driver on real filesystems.

A placeholder is an empty entry under the ID of a layer that is absent. A driver needs placeholders if runtimes fail on
a record without data, as on btrfs: between ``stage`` and ``commit``, and from ``detach`` or ``erase`` to
``remove_placeholder``. For ``exists`` a placeholder is no layer, for ``damage`` it is damage, for ``orphans`` no
orphan.
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
from ..kernel import files, oserrors, xattrs
from ..store.removal import Enough, empty_tree, remove_tree
from ..tree import lookup
from ..tree.measure import Usage, measure
from ..tree.merged import PLAIN, LayerStack, top_owners
from ..tree.own_tree import OwnTree
from ..tree.tree_tools import CloneResult, Suspended, TreeTools

Progress = t.Callable[[int, int], None]

LAYER_ID = re.compile(r"[0-9a-f]{64}")
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Filesystems with the usual access times of Linux, unless mount options change that.
_KEEP_ATIME = frozenset(
    ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "tmpfs", "xfs", "zfs")
)
_WRITE_TEXT = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC

SNAPSHOT, REFLINK, METACOPY, COPY = "snapshot", "reflink", "metacopy", "copy"
# In a staging folder: the strategy with which its layer is being created.
_STRATEGY_FILE = "way"

# Filesystems in which files cannot share data, with any kernel so far.
_NEVER_SHARING = frozenset(("ext2", "ext3", "ext4", "f2fs", "tmpfs", "reiserfs", "jfs"))

_ALWAYS_SHARING = frozenset(("btrfs", "bcachefs"))

_LABEL = "security.selinux"


class Strategy(t.NamedTuple):
    """A way to create a tree, and the reason why it is possible or the best here."""

    name: str
    reason: str


@dataclass(frozen=True)
class ShortNames:
    """How the runtimes of a host use the short names of layers of the overlay driver.

    :param needed: whether a runtime only finds layers by them
    :param restored: whether all runtimes restore lost names from the files ``link``
    """

    needed: bool = True
    restored: bool = True


@dataclass(frozen=True)
class DriverHome:
    """The location of a driver's data.

    :param options: the driver's own options, prefix stripped, keys in lower case
    :param view: the graphroot to work through, see :func:`.view.view_of`
    :param image_stores: graphroots of the image store and of read-only ones, where layers may lie too
    :param short_names: how the runtimes of this host use the names in ``l/`` of overlay; called only if a name is
        missing
    :param tree_tools: the functions that create trees; None for a driver that only reads and removes layers
    :param read_only: whether nothing at all may be written, as in check mode
    """

    graphroot: str
    runroot: str
    options: t.Mapping[str, str]
    rootless: bool
    view: str
    image_stores: t.Tuple[str, ...] = ()
    short_names: t.Callable[[], ShortNames] = ShortNames
    tree_tools: t.Optional[TreeTools] = None
    read_only: bool = False


@dataclass(frozen=True)
class Staged:
    """A tree that was built, or would be built in check mode.

    :param files: names of anything but directories
    :param apparent: apparent size in bytes of everything but directories, each inode once
    :param exclusive: bytes on disk that it does not share
    :param inodes: hard-linked files once, directories too
    """

    strategy: str
    reason: str
    files: int
    apparent: int
    exclusive: int
    inodes: int = 0


@dataclass(frozen=True)
class Trace:
    """The trace that a runtime leaves on a layer when it creates a container on it.

    :param value: changes with each new trace
    :param at: the time of the trace, in seconds since the epoch; None if unknown
    :param coarse: whether further containers leave no new trace within a day (relatime)
    """

    value: str
    at: t.Optional[float] = None
    coarse: bool = False


class Orphan:
    """Data in the driver's folder without a record.

    :param kind: "directory" or "link"
    :param changed: seconds since the epoch of the last change of its inode
    """

    def __init__(
        self, kind: str, name: str, path: str, changed: float, size: t.Callable[[bool], Usage]
    ) -> None:
        self.kind = kind
        self.name = name
        self.path = path
        self.changed = changed
        self._size = size

    def __repr__(self) -> str:
        return f"Orphan({self.kind!r}, {self.path!r})"

    def usage(self, exclusive: bool = False) -> Usage:
        """The disk space that it uses; walks the tree.

        :param exclusive: whether to find out which bytes nothing else shares
        :raises StorageError: it cannot be read
        """
        return self._size(exclusive)


class Driver(abc.ABC):
    """A kind of layer storage. Layer IDs are 64 hexadecimal digits; chains are top first."""

    name: t.ClassVar[str]
    # The folder that holds one entry per layer, below the graphroot.
    folders: t.ClassVar[t.Tuple[str, ...]]
    # The entry of a layer's directory that runtimes read only when they create a container on the layer, the
    # first that is there; and the mount flags with which that keeps no access time.
    _read_on_use: t.ClassVar[t.Tuple[str, ...]] = ("",)
    _unread_flags: t.ClassVar[int] = os.ST_NODIRATIME

    def __init__(self, home: DriverHome) -> None:
        self.home = home

    @property
    def folder(self) -> str:
        """The directory of the layers, as seen through the view."""
        return os.path.join(self.home.view, *self.folders)

    @property
    def tree_tools(self) -> TreeTools:
        """The tools for creating layers.

        :raises InternalError: the driver was opened without it
        """
        if self.home.tree_tools is None:
            raise InternalError(f"driver {self.name}", "was opened for reading and removal only")
        return self.home.tree_tools

    # Queries

    def exists(self, layer_id: str) -> bool:
        """Whether the store itself (no read-only one) has a directory for the layer.

        :raises StorageError: the driver's folder cannot be read
        """
        with self._explained(layer_id), self._opened_folder() as folder:
            return _is_directory(folder, self._checked(layer_id))

    def damage(self, layer_id: str, chain: t.Sequence[str] = ()) -> t.Optional[str]:
        """A description of the data that a layer lacks for runtimes; None if it is intact.

        :param chain: the IDs of the layers that must be there for it
        :raises StorageError: the driver's folder cannot be read
        """
        for item in (layer_id, *chain):
            with contextlib.ExitStack() as undo:
                if self._opened_layer(undo, item) is None:
                    return f"the directory of layer {item[:12]} is missing"
        return None

    def measure(self, layer_id: str, exclusive: bool = False) -> Usage:
        """The disk space that a layer's data uses, each inode once.

        :param exclusive: whether to find out which bytes nothing else shares
        :raises StorageError: the layer is missing or cannot be read
        """
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            return measure([self._need_layer(undo, layer_id)], exclusive=exclusive)

    def present(self, graphroot: t.Optional[str] = None) -> t.Set[str]:
        """The names of all directories in the driver's folder, those of its layers among them.

        :param graphroot: an image store to look into in place of the store itself
        :raises StorageError: the driver's folder cannot be read
        """
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._explained(self.folder))
            folder = undo.enter_context(self._opened_folder(graphroot))
            entries = undo.enter_context(os.scandir(folder))
            return {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}

    def top_owners(self, chain: t.Sequence[str]) -> t.List[t.Tuple[str, int, int]]:
        """The root directory ("") and the names in it, with their UID and GID on disk; empty if
        the owners are not stored on the files.

        :param chain: the layer and its parents, top first
        :raises StorageError: a layer of the chain is missing or cannot be read
        """
        with self._explained(chain[0]), self._readable(chain) as stack:
            return list(top_owners(stack))

    def traces(self, layer_ids: t.Iterable[str]) -> t.Dict[str, Trace]:
        """The traces of use on layers. Filesystems mounted with noatime have none. This library leaves none
        itself.

        :raises StorageError: the driver's folder cannot be read
        """
        found: t.Dict[str, Trace] = {}
        with self._explained(self.folder), self._opened_folder() as folder:
            mounted = os.statvfs(self.home.graphroot).f_flag
            kept = files.filesystem_type(self.home.graphroot) in _KEEP_ATIME
            if not kept or mounted & (os.ST_NOATIME | self._unread_flags):
                return found
            for layer_id in layer_ids:
                trace = self._trace(folder, layer_id, bool(mounted & os.ST_RELATIME))
                if trace is not None:
                    found[layer_id] = trace
        return found

    def _trace(self, folder: int, layer_id: str, relatime: bool) -> t.Optional[Trace]:
        if not LAYER_ID.fullmatch(layer_id):
            return None
        for name in self._read_on_use:
            with contextlib.suppress(OSError):
                path = os.path.join(layer_id, name)
                status = os.stat(path, dir_fd=folder, follow_symlinks=False)
                read = status.st_atime_ns > max(status.st_mtime_ns, status.st_ctime_ns)
                return Trace(str(status.st_atime_ns), status.st_atime, relatime and read)
        return None

    def measure_path(self, path: str, exclusive: bool = False) -> Usage:
        """The disk space that a path in the store uses.

        :param exclusive: whether to find out which bytes nothing else shares
        :raises StorageError: it cannot be read
        """
        with self._explained(path):
            return measure([path], exclusive=exclusive)

    @contextlib.contextmanager
    def own_trees(self, layer_ids: t.Sequence[str]) -> t.Iterator[t.List[OwnTree]]:
        """The files of layers themselves, without those of their parents, open for a change of owners.

        :raises UnsupportedDriver: their owners are not on the files, or depend on those of other layers
        :raises StorageError: a layer is missing or cannot be read
        """
        with contextlib.ExitStack() as undo:
            with self._explained(self.folder):
                trees = [self._own_tree(undo, layer_id) for layer_id in layer_ids]
            yield trees

    def _own_tree(self, undo: contextlib.ExitStack, layer_id: str) -> OwnTree:
        return OwnTree(layer_id, self._need_layer(undo, layer_id))

    def shows_owners_of_lower_layers(self, layer_id: str) -> bool:
        """Whether files of a mapped layer may be those of its template, with the owners that they have there.

        :raises StorageError: the layer is missing or cannot be read
        """
        return False

    @contextlib.contextmanager
    def tree(self, chain: t.Sequence[str]) -> t.Iterator[int]:
        """The root directory of a layer's whole tree, open, as a container sees it.

        :param chain: the layer and its parents, top first
        :raises UnsupportedDriver: owners are not on the files themselves
        :raises StorageError: a layer is missing or cannot be read
        """
        with self._explained(chain[0]), self._readable(chain) as stack:
            yield stack.fds[0]

    def read_text(self, chain: t.Sequence[str], path: str) -> t.Optional[str]:
        """The text of one file of a layer's tree, None when it has no such regular file.

        :param chain: the layer and its parents
        :param path: relative to the tree's root
        :raises StorageError: a layer is missing or cannot be read
        """
        with self._explained(chain[0]), self._readable(chain) as stack:
            return lookup.read_text(stack, path)

    def flush(self) -> None:
        """Write everything to disk, and free the space of deleted files as far as the filesystem supports it.

        :raises StorageError: something could not be written
        """
        with self._explained(self.home.graphroot), contextlib.ExitStack() as undo:
            directory = os.open(self.home.view, DIRECTORY & ~os.O_NOFOLLOW)
            undo.callback(os.close, directory)
            self._settle(directory)

    def _settle(self, directory: int) -> None:
        files.syncfs(directory)

    def dependencies(self, layer_id: str) -> t.List[str]:
        """The layers whose data this one needs on disk, nearest first; none where trees are whole.

        :raises StorageError: the layer cannot be read
        """
        return []

    def dependents(self, layer_id: str) -> t.List[str]:
        """The layers in the folder that need the data of this one: those with it among their ``dependencies``.

        :raises StorageError: the driver's folder cannot be read
        """
        return []

    def resting(self, names: t.Iterable[str]) -> t.Dict[str, t.List[str]]:
        """The layers that folders depend on by their own files, regardless of the records.

        :param names: of folders in the driver's folder
        :returns: for each folder that names such layers, their IDs, nearest first; without layers that cannot be
            identified and folders that cannot be read
        :raises StorageError: the driver's folder cannot be read
        """
        return {}

    def has_copy(self, layer_id: str) -> bool:
        """Whether the own layer of a container, whose record has other maps than its parent, contains a copy of the
        image: the runtime changed the owners in it instead of shifting them with a mount.

        :raises StorageError: the driver's folder cannot be read
        """
        return True

    def links(self) -> t.Dict[str, str]:
        """The short names that the driver maintains, each with its layer ("" if there is none)."""
        return {}

    def orphans(
        self,
        known_ids: t.Collection[str],
        thorough: bool = True,
        present: t.Optional[t.Set[str]] = None,
    ) -> t.List[Orphan]:
        """Layer directories without a record. Other names in the folder are never touched.

        :param known_ids: the IDs of all layers with a record, in whichever file
        :param thorough: whether to examine each short name even if each layer has one
        :param present: the result of :meth:`present`, if it was just called
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
        return Orphan(kind, name, path, changed, lambda exclusive: self.measure(name, exclusive))

    # Creating layers

    def strategies(self, chain: t.Sequence[str]) -> t.List[Strategy]:
        """The strategies that can create a mapped layer from a template, the cheapest first.

        :param chain: the template and its parents
        :raises UnsupportedDriver: the layers use a feature that is not handled here
        :raises StorageError: a layer of the chain is missing
        """
        with self._explained(chain[0]), contextlib.ExitStack() as undo:
            self._need_layer(undo, chain[0])
            return self._copying()

    def _copying(self) -> t.List[Strategy]:
        filesystem = files.filesystem_type(self.home.view) or "this filesystem"
        if filesystem not in _NEVER_SHARING and self._can_reflink(filesystem):
            return [
                Strategy(REFLINK, f"{filesystem} supports shared extents"),
                Strategy(COPY, "plain copies are always possible"),
            ]
        return [Strategy(COPY, f"{filesystem} does not support shared extents")]

    def _can_reflink(self, filesystem: str) -> bool:
        """Whether files can share their data. In check mode, only the type of the filesystem is known."""
        if not self.home.read_only:
            return self.tree_tools.can_reflink(self.home.view)
        if filesystem == "xfs":
            with contextlib.ExitStack() as undo:
                directory = os.open(self.home.view, DIRECTORY & ~os.O_NOFOLLOW)
                undo.callback(os.close, directory)
                geometry = files.xfs_geometry(directory)
                return geometry is not None and geometry.shares
        return filesystem in _ALWAYS_SHARING

    def predict(
        self,
        chain: t.Sequence[str],
        shift: Shift,
        strategy: str = "auto",
        progress: t.Optional[Progress] = None,
    ) -> t.Tuple[Strategy, CloneResult]:
        """Predict the strategy and the result of :meth:`stage`. Writes nothing.

        :param progress: called with files and bytes seen; may raise Suspended
        :returns: the strategy, and the contents of the tree; its ``exclusive`` is the size of a plain copy
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
        """Build the whole layer in a staging folder and sync it to disk. Takes no lock of the store.

        :param chain: the template and its parents, top first
        :param shift: from the template's mapping to the requested mapping
        :param strategy: a name of :meth:`strategies`, or "auto" for the first
        :param into: an existing folder of the caller's, on the view and the driver's filesystem; work that
            a suspended call with the same arguments left there is resumed
        :param layer_id: the ID that the layer will have
        :param progress: called with files and bytes done; may raise Suspended
        :raises UnsupportedDriver: the strategy, or a feature of the store, is not supported
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
            if read_text(staging, _STRATEGY_FILE) != chosen.name:
                remove_tree(target, self.destroy)
                write_text(staging, _STRATEGY_FILE, chosen.name)
            staged = self._build(chosen, chain, shift, staging, target, progress)
            files.syncfs(staging)
            return staged

    def commit(self, into: str, layer_id: str) -> None:
        """Move a staged layer to its place. Called with the store's locks held and its record, flagged
        as incomplete, written: a runtime that finds such a record removes the leftovers of a kill. The layer is durable
        when this returns, so that the record can be completed.

        :raises StorageError: a directory is already defined, or the rename failed
        """
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            folder = undo.enter_context(self._opened_folder())
            staging = os.open(into, DIRECTORY)
            undo.callback(os.close, staging)
            self._install(staging, folder, self._checked(layer_id))
            sync_names(folder)

    def detach(self, layer_id: str, trash_dir: str) -> None:
        """Move a layer's data out of the store. Called with the store's locks held and its record
        flagged as incomplete. Missing data is ignored. The change is durable when this returns, so
        that the record can be removed.

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

    def thin(self, layer_id: str, enough: Enough) -> None:
        """Delete files of a layer in place until the caller has enough free space. For full disks. Called with the
        store's locks held and its record flagged as incomplete, so that no program uses the remaining files as a layer.

        :param enough: called from time to time
        :raises StorageError: the driver's folder cannot be read
        """
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            folder = undo.enter_context(self._opened_folder())
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                layer = os.open(self._checked(layer_id), DIRECTORY, dir_fd=folder)
                undo.callback(os.close, layer)
                for name in self._contents(layer):
                    if enough():
                        return
                    empty_tree(
                        f"/proc/self/fd/{layer}/{name}" if name else self._path(layer_id), enough
                    )

    def _contents(self, layer: int) -> t.List[str]:
        """The folders of a layer's open directory that hold its files; "" for the directory itself."""
        return [""]

    def erase(self, layer_id: str) -> None:
        """Delete a layer's data in place, instead of :meth:`detach`, if there is no space for a trash folder. At
        most a placeholder remains.

        :raises StorageError: something of it cannot be deleted
        """
        with self._explained(layer_id):
            remove_tree(self._path(layer_id))
            with self._opened_folder() as folder:
                sync_names(folder)

    def _path(self, layer_id: str) -> str:
        return os.path.join(self.folder, self._checked(layer_id))

    def drop(self, orphan: Orphan, trash_dir: str) -> None:
        """Move an orphan out of the store, as :meth:`detach` does with a layer.

        :raises StorageError: the rename failed
        """
        self.detach(orphan.name, trash_dir)

    def destroy(self, parent: int, name: str) -> bool:
        """Delete an entry of an open directory as a whole, for example a subvolume on btrfs. The store's
        ``remove_tree`` calls this wherever a device number changes, and otherwise deletes file by file. A driver
        whose layers are filesystems or volumes must override it, because unlink(2) cannot delete them from the trash.

        :param parent: an open directory; need not be in the driver's folder
        :returns: whether this call deleted it; false if it does not exist
        """
        return False

    def is_placeholder(self, name: str) -> bool:
        """Whether the entry of that name is a placeholder. Drivers without placeholders do not override this.

        :param name: any name; only layer IDs can be placeholders
        :raises StorageError: the driver's folder cannot be read
        """
        return False

    def remove_placeholder(self, layer_id: str) -> bool:
        """Remove the placeholder of a layer that no longer has a record. Overridden together with
        ``is_placeholder``.

        :returns: whether a placeholder was removed
        :raises StorageError: it cannot be removed
        """
        return False

    # Methods that drivers override

    def _staged_name(self, layer_id: str) -> str:
        """The name of the layer in its staging folder."""
        return "layer"

    @abc.abstractmethod
    def _readable(self, chain: t.Sequence[str]) -> t.ContextManager[LayerStack]:
        """The template's tree, open for reading."""

    @contextlib.contextmanager
    def _whole_layer(self, chain: t.Sequence[str]) -> t.Iterator[LayerStack]:
        """``_readable`` for drivers whose layers are whole trees."""
        with contextlib.ExitStack() as undo:
            layer = self._need_layer(undo, chain[0])
            yield undo.enter_context(LayerStack([layer], PLAIN))

    def _survey(
        self, chain: t.Sequence[str], shift: Shift, progress: t.Optional[Progress]
    ) -> CloneResult:
        with self._readable(chain) as stack:
            return self.tree_tools.survey(stack, shift, progress=progress)

    def _build(
        self,
        strategy: Strategy,
        chain: t.Sequence[str],
        shift: Shift,
        staging: int,
        target: str,
        progress: t.Optional[Progress],
    ) -> Staged:
        """Build the layer as ``target``, an entry of the open directory ``staging``. An existing entry is a partial
        layer, and is completed.
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
        made = self.tree_tools.clone(
            stack, target, shift, strategy=strategy.name, progress=progress, again=again
        )
        return self._staged(strategy, made, made.exclusive)

    def _not_resumable(self, staging: int, progress: t.Optional[Progress]) -> t.Optional[Progress]:
        """A progress callback for work that cannot be resumed: after an interruption it starts from the beginning."""
        write_text(staging, _STRATEGY_FILE, "")
        if progress is None:
            return None
        reported_to = progress

        def report(files_done: int, bytes_done: int) -> None:
            try:
                reported_to(files_done, bytes_done)
            except Suspended as stop:
                if stop.given_up:
                    raise

        return report

    def _staged(self, strategy: Strategy, made: CloneResult, exclusive: int) -> Staged:
        return Staged(
            strategy.name, strategy.reason, made.files, made.apparent, exclusive, made.inodes
        )

    def _install(self, staging: int, folder: int, layer_id: str) -> None:
        name = self._staged_name(layer_id)
        os.rename(name, layer_id, src_dir_fd=staging, dst_dir_fd=folder)

    def _uninstall(self, folder: int, layer_id: str, trash: int) -> None:
        os.rename(layer_id, layer_id, src_dir_fd=folder, dst_dir_fd=trash)

    # Helpers

    def _choose(self, requested: str, supported: t.Sequence[Strategy]) -> Strategy:
        if requested == "auto":
            return supported[0]
        for strategy in supported:
            if strategy.name == requested:
                return Strategy(strategy.name, "as requested")
        names = ", ".join(strategy.name for strategy in supported)
        raise UnsupportedDriver(
            f"strategy {requested}",
            f"is not supported by driver {self.name} on "
            f"{files.filesystem_type(self.home.view) or 'this filesystem'} with the configuration of this store",
            f"Use auto, or one of: {names}.",
        )

    def _checked(self, layer_id: str) -> str:
        if not LAYER_ID.fullmatch(layer_id):
            raise StoreError(
                f"layer {layer_id[:80]!r}", "is not a layer ID of 64 hexadecimal digits"
            )
        return layer_id

    @contextlib.contextmanager
    def _opened_folder(self, graphroot: t.Optional[str] = None) -> t.Iterator[int]:
        """The folder of the layers, reached without following a link below the graphroot."""
        current = os.open(graphroot or self.home.view, DIRECTORY & ~os.O_NOFOLLOW)
        try:
            for name in self.folders:
                following = os.open(name, DIRECTORY, dir_fd=current)
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
                f"has no directory in {os.path.join(self.home.graphroot, *self.folders)}",
                "Pull or load its image again.",
                layer_id=layer_id,
            )
        return descriptor

    def _explained(self, subject: str) -> t.ContextManager[None]:
        """Turn the system's errors into those of this library.

        :param subject: a layer ID or a path
        """
        about = f"layer {subject[:12]}" if LAYER_ID.fullmatch(subject) else subject
        return oserrors.translate_oserror(self.home.graphroot, about)


def read_text(folder: int, name: str) -> t.Optional[str]:
    """The text of a small file in an open directory, None when there is none."""
    try:
        descriptor = files.open_regular(name, dir_fd=folder)
    except FileNotFoundError:
        return None
    try:
        return os.read(descriptor, 1000).decode("utf-8", "replace")
    finally:
        os.close(descriptor)


def write_text(folder: int, name: str, text: str) -> None:
    """Put a small file in an open directory, and replace an existing file."""
    descriptor = os.open(name, _WRITE_TEXT, 0o600, dir_fd=folder)
    with open(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)


def sync_names(directory: int) -> None:
    """Flush renamed, created and removed entries of an open directory to disk, if the filesystem can do so."""
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
