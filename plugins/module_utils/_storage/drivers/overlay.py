# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The overlay driver, for native overlay mounts only.

The mapped layer contains the whole merged tree. In the driver's files it is a child of its template:
``lower`` names the template first. In the records it is a sibling of the template.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import os
import re
import stat
import typing as t

from ..errors import StoreError, UnsupportedDriver, UntestedRuntime
from ..idmap.mapping import Shift
from ..kernel import files, mounts
from ..printable import printable
from ..store.removal import remove_tree
from ..tree import lookup
from ..tree.measure import Usage, measure
from ..tree.merged import PLAIN, LayerStack, NeedsMount
from ..tree.own_tree import OwnTree
from ..tree.tree_tools import CloneResult
from .base import (
    COPY,
    DIRECTORY,
    LAYER_ID,
    METACOPY,
    Driver,
    Orphan,
    Progress,
    Staged,
    Strategy,
    copy_label,
    read_text,
    sync_names,
    write_text,
)

_LINK = re.compile(r"[A-Z2-7]{26}")
_LINK_TARGET = re.compile(r"\.\./([0-9a-f]{64})/diff")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# Far more than the 500 lower layers that containers/storage allows.
_LONGEST_TEXT = 1 << 17
_MOST_LOWERS = 500
# In a staging folder: the reason why its template is read through a mount.
_MOUNTED = "mounted"
# In the directory of a layer whose files lie elsewhere: in an image of composefs, or in an additional layer store.
_COMPOSEFS = "composefs-data"
_ADDITIONAL = "additionallayer"
# What containers/storage 1.38 to 1.64 puts into the directory of a layer; merged.1 exists while a mount is replaced.
# On NFS a deleted file that is still open is named .nfs.
_KNOWN = re.compile(
    rf"diff\d*|link|lower|lower-layers|work|merged(\.1)?|mapped|empty|{_COMPOSEFS}|{_ADDITIONAL}|\.nfs.*"
)


class OverlayDriver(Driver):
    """GRAPHROOT/overlay/ID/ with diff, link and lower; GRAPHROOT/overlay/l/ with the short names."""

    name = "overlay"
    folders = ("overlay",)
    _read_on_use = ("link", "lower-layers")
    _unread_flags = 0
    _names: t.Optional[t.Dict[str, str]] = None

    # Queries

    def damage(self, layer_id: str, chain: t.Sequence[str] = ()) -> t.Optional[str]:
        """The missing part: a directory, a short name, or a layer that ``lower`` names."""
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            directory = self._opened_layer(undo, layer_id)
            if directory is None:
                return f"the directory of layer {layer_id[:12]} is missing"
            self._refuse_newer(directory)
            if not _has_directory(directory, "diff") and not _exists(directory, _ADDITIONAL):
                return f"diff of layer {layer_id[:12]} is missing"
            link = _read(directory, "link")
            # Every runtime reads it to create a container on the layer.
            if link is None:
                return f"link of layer {layer_id[:12]} is missing"
            if not _LINK.fullmatch(link):
                return f"link of layer {layer_id[:12]} is not 26 letters and digits"
            links, named = self._lower_links(directory), self._lower_ids(directory)
            resolved = [self._resolve(item) for item in links]
            lowers = [item for item in resolved if item is not None]
            lost = [link_name for link_name, target in zip(links, resolved) if target is None]
            found = ""
            if lost:
                found = f"lower of layer {layer_id[:12]} names {lost[0]}, which is missing"
            elif self._resolve(f"l/{link}") != layer_id:
                found = f"l/{link}, the short name of layer {layer_id[:12]}, is missing"
            # Runtimes that read lower-layers do not need short names and do not restore them. Others restore those
            # that a link file names.
            if found and ((named is None and lost) or self.home.short_names().needed):
                return found
            if named is None:
                for item in links:
                    if (
                        self._resolve(item, use_link_files=False) is None
                        and not self.home.short_names().restored
                    ):
                        return f"lower of layer {layer_id[:12]} names {item}, which is missing"
            if named is not None:
                if links and not lost and named != lowers:
                    return f"lower and lower-layers of layer {layer_id[:12]} contradict each other"
                lowers = named
            for item in dict.fromkeys((*lowers, *chain)):
                if item == layer_id:
                    continue
                lower = self._opened_layer(undo, item)
                if lower is None:
                    return f"the directory of layer {item[:12]}, on which it depends, is missing"
                if not _has_directory(lower, "diff") and not _exists(lower, _ADDITIONAL):
                    return f"diff of layer {item[:12]}, on which it depends, is missing"
        return None

    def has_copy(self, layer_id: str) -> bool:
        """Whether there is a ``diff1``, to which a runtime moves the old ``diff`` when it changes owners."""
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            return _exists(self._need_layer(undo, layer_id), "diff1")

    def top_owners(self, chain: t.Sequence[str]) -> t.List[t.Tuple[str, int, int]]:
        """See the base class; empty if the owners are not stored on the files."""
        with self._explained(chain[0]), contextlib.ExitStack() as undo:
            if self.home.options.get("force_mask"):
                return []
            for layer_id in self._disk_chain(undo, chain):
                layer = self._need_layer(undo, layer_id)
                if _exists(layer, _COMPOSEFS) or _exists(layer, _ADDITIONAL):
                    return []
        return super().top_owners(chain)

    def _own_tree(self, undo: contextlib.ExitStack, layer_id: str) -> OwnTree:
        self._refuse_unsupported(undo, [layer_id], whole=False)
        layer = self._need_layer(undo, layer_id)
        if _exists(layer, "diff1"):
            raise UnsupportedDriver(
                f"layer {layer_id[:12]}",
                "is a mapped copy of another layer, so it shows files of that layer",
                "Remove the image and pull it again.",
            )
        diff = os.open("diff", DIRECTORY, dir_fd=layer)
        undo.callback(os.close, diff)
        return OwnTree(layer_id, diff, whiteouts=True)

    def shows_owners_of_lower_layers(self, layer_id: str) -> bool:
        """See the base class; a runtime copies up only the files whose owners it changes."""
        return self.has_copy(layer_id)

    @contextlib.contextmanager
    def tree(self, chain: t.Sequence[str]) -> t.Iterator[int]:
        """See the base class; reads through a read-only mount."""
        with self._explained(chain[0]), contextlib.ExitStack() as undo:
            self._refuse_unsupported(undo, chain)
            yield undo.enter_context(self._mounted(chain)).fds[0]

    def dependencies(self, layer_id: str) -> t.List[str]:
        """The layers in ``lower``: on disk, a mapped layer depends on its template."""
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            return self._lowers(self._need_layer(undo, layer_id))

    def dependents(self, layer_id: str) -> t.List[str]:
        """The layers whose ``lower`` names this one, containers' layers among them."""
        self._checked(layer_id)
        found = []
        with self._explained(layer_id), self._opened_folder() as folder:
            for name in sorted(os.listdir(folder)):
                if not LAYER_ID.fullmatch(name) or name == layer_id:
                    continue
                with contextlib.suppress(OSError, StoreError):
                    directory = os.open(name, DIRECTORY, dir_fd=folder)
                    try:
                        if layer_id in self._lowers(directory):
                            found.append(name)
                    finally:
                        os.close(directory)
        return found

    def resting(self, names: t.Iterable[str]) -> t.Dict[str, t.List[str]]:
        """See the base class; from ``lower-layers``, else from ``lower`` and the short names."""
        found: t.Dict[str, t.List[str]] = {}
        short: t.Dict[str, t.Optional[str]] = {}
        with self._explained(self.folder), self._opened_folder() as folder:
            for name in names:
                with contextlib.ExitStack() as undo:
                    try:
                        layer = os.open(name, DIRECTORY, dir_fd=folder)
                        undo.callback(os.close, layer)
                        ids = self._lower_ids(layer)
                        links = self._lower_links(layer) if ids is None else []
                    except (OSError, StoreError):
                        continue
                for link in links:
                    if link not in short:
                        short[link] = self._resolve(link)
                if ids is None:
                    ids = [item for item in map(short.get, links) if item]
                if ids:
                    found[name] = ids
        return found

    def links(self) -> t.Dict[str, str]:
        """The names in l/, each with its layer."""
        found: t.Dict[str, str] = {}
        with self._explained(self.folder), contextlib.ExitStack() as undo:
            folder = _opened_links(undo, undo.enter_context(self._opened_folder()))
            if folder is not None:
                for name in sorted(os.listdir(folder)):
                    found[name] = _link_target(folder, name) or ""
        return found

    def _orphans(
        self, folder: int, names: t.Set[str], known_ids: t.Collection[str], thorough: bool
    ) -> t.List[Orphan]:
        """Directories without a record, and short names of layers that have no directory."""
        found = super()._orphans(folder, names, known_ids, thorough)
        with contextlib.ExitStack() as undo:
            links = _opened_links(undo, folder)
            if links is None:
                return found
            if not thorough:
                others = names.difference(known_ids)
                layers = len(names) - sum(LAYER_ID.fullmatch(name) is None for name in others)
                if layers == len(os.listdir(links)):
                    return found
            for name, target in self.links().items():
                if not _LINK.fullmatch(name) or not target:
                    continue
                if target in known_ids or _has_directory(folder, target):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    changed = os.stat(name, dir_fd=links, follow_symlinks=False).st_ctime
                    path = os.path.join(self.folder, "l", name)
                    found.append(Orphan("link", name, path, changed, _nothing))
        return found

    # Creating layers

    def strategies(self, chain: t.Sequence[str]) -> t.List[Strategy]:
        """Files without data if the store is mounted with metacopy=on and files cannot share data."""
        with self._explained(chain[0]), contextlib.ExitStack() as undo:
            self._refuse_unsupported(undo, chain)
            strategies = self._copying()
            if self._metacopy():
                reason = (
                    "the store mounts with metacopy=on, so mapped files need no copy of the data"
                )
                # Shared data is as cheap, and does not depend on other layers.
                strategies.insert(len(strategies) - 1, Strategy(METACOPY, reason))
            return strategies

    def drop(self, orphan: Orphan, trash_dir: str) -> None:
        """Move an orphan out of the store; a short name is deleted at once."""
        if orphan.kind != "link":
            super().drop(orphan, trash_dir)
            return
        with self._explained(orphan.path), contextlib.ExitStack() as undo:
            folder = _opened_links(undo, undo.enter_context(self._opened_folder()))
            if folder is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(orphan.name, dir_fd=folder)

    def _refuse_unsupported(
        self, undo: contextlib.ExitStack, chain: t.Sequence[str], whole: bool = True
    ) -> None:
        """Refuse features that are not handled here.

        :param whole: whether to look at all layers that the first of the chain needs
        """
        folder = undo.enter_context(self._opened_folder())
        sticky = (_read(folder, ".has-mount-program") or "").strip() == "true"
        if self.home.options.get("mount_program") or sticky:
            raise UnsupportedDriver(
                self.folder,
                "is used through a mount program (fuse-overlayfs), for which this collection does not create layers",
                "It shifts IDs at mount time, so a contiguous map needs no mapped layer; for other "
                "maps use a store without mount_program.",
            )
        if self.home.options.get("force_mask"):
            raise UnsupportedDriver(
                self.folder,
                "is used with force_mask, so the files do not have their real owners and modes",
                "Use a store without force_mask.",
            )
        for layer_id in self._disk_chain(undo, chain) if whole else chain:
            directory = self._need_layer(undo, layer_id)
            self._refuse_newer(directory)
            if _exists(directory, _COMPOSEFS):
                raise UnsupportedDriver(
                    f"layer {layer_id[:12]}",
                    "is stored as composefs, whose files cannot have other owners",
                    "Disable use_composefs and pull the image again.",
                )
            if _exists(directory, _ADDITIONAL):
                raise UnsupportedDriver(
                    f"layer {layer_id[:12]}",
                    "lies in an additional layer store, which is mounted on demand",
                    "Remove additionallayerstores from the configuration and pull the image again.",
                )

    def _metacopy(self) -> bool:
        """Whether runtimes are known to mount this store with metacopy=on.

        The options known here may be incomplete, because of another loader or a variable of another process. Therefore
        the file counts that each runtime leaves in the runroot after a test of its own options. Metacopy is not used
        if any such file reports it as off.
        """
        options = self.home.options.get("mountopt", "")
        given = [
            mount_option
            for mount_option in self._mount_options()
            if mount_option.startswith("metacopy=")
        ]
        if self.home.rootless or (given and given[-1] != "metacopy=on"):
            return False
        try:
            notes = os.listdir(os.path.join(self.home.runroot, "overlay"))
        except OSError:
            return False
        off = any(note.startswith("metacopy(") and note.endswith(")-false") for note in notes)
        return f"metacopy({options})-true" in notes and not off

    def _mount_options(self) -> t.List[str]:
        return [part.strip() for part in self.home.options.get("mountopt", "").split(",")]

    def _options_of_ours(self, *names: str) -> t.List[str]:
        """The mount options that determine how layers are read and written."""
        return [
            mount_option
            for mount_option in self._mount_options()
            if mount_option.partition("=")[0] in names
        ]

    def read_text(self, chain: t.Sequence[str], path: str) -> t.Optional[str]:
        """The text of one file of a layer's tree, through a mount if necessary."""
        try:
            return super().read_text(chain, path)
        except NeedsMount:
            with self._mounted(chain) as stack:
                return lookup.read_text(stack, path)

    def _survey(
        self, chain: t.Sequence[str], shift: Shift, progress: t.Optional[Progress]
    ) -> CloneResult:
        try:
            return super()._survey(chain, shift, progress)
        except NeedsMount:
            with self._mounted(chain) as stack:
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
        with contextlib.ExitStack() as undo:
            template = self._need_layer(undo, chain[0])
            name = os.path.basename(target)
            again = os.path.lexists(target)
            if not again:
                os.mkdir(name, 0o700, dir_fd=staging)
            layer = os.open(name, DIRECTORY, dir_fd=staging)
            undo.callback(os.close, layer)
            if not again:
                copy_label(template, layer)
                for folder in ("diff", "work", "merged"):
                    os.mkdir(folder, 0o700, dir_fd=layer)
                self._write_names(undo, template, layer, chain)
            if strategy.name == METACOPY:
                made = self._without_data(
                    undo, chain, shift, staging, layer, target, progress, again
                )
                return self._staged(strategy, made, made.exclusive)
            diff = os.path.join(target, "diff")
            why = read_text(staging, _MOUNTED) if again else None
            if why is None:
                try:
                    with self._readable(chain) as stack:
                        return self._cloned(stack, diff, shift, strategy, progress, again)
                except NeedsMount as error:
                    why, again = error.cause, False
                    remove_tree(diff)
                    os.mkdir("diff", 0o700, dir_fd=layer)
                    write_text(staging, _MOUNTED, why)
            # Files of an overlay mount cannot share data.
            plain = Strategy(COPY, f"{why}, so the template is read through a mount")
            with self._mounted(chain) as stack:
                return self._cloned(stack, diff, shift, plain, progress, again)

    def _without_data(
        self,
        undo: contextlib.ExitStack,
        chain: t.Sequence[str],
        shift: Shift,
        staging: int,
        layer: int,
        target: str,
        progress: t.Optional[Progress],
        again: bool,
    ) -> CloneResult:
        """Create files that show the data of the layers below.

        They go to ``diff1`` below an empty ``diff``, as runtimes do it. For an export, runtimes read content from
        the ``diff`` of a layer and its lowers, where a file without data would consist of zeros.
        """
        if not again:
            os.rename("diff", "diff1", src_dir_fd=layer, dst_dir_fd=layer)
        content = os.path.join(target, "diff1")
        try:
            with self._readable(chain) as stack:
                made = self.tree_tools.clone(
                    stack, content, shift, METACOPY, progress=progress, again=again
                )
        except NeedsMount:
            remove_tree(content)
            os.mkdir("diff1", 0o700, dir_fd=layer)
            use_link_files = self._not_resumable(staging, progress)
            made = self._copied_up(undo, chain, shift, layer, use_link_files)
        os.mkdir("diff", 0o700, dir_fd=layer)
        opened = [os.open(name, DIRECTORY, dir_fd=layer) for name in ("diff1", "diff")]
        for item in opened:
            undo.callback(os.close, item)
        _copy_root(*opened)
        return made

    def _write_names(
        self, undo: contextlib.ExitStack, template: int, layer: int, chain: t.Sequence[str]
    ) -> None:
        """Write link, lower and lower-layers: old runtimes read the first two, new ones the last."""
        link = _read(template, "link")
        links = [f"l/{link}", *self._lower_links(template)]
        if link is None or not _LINK.fullmatch(link):
            raise StoreError(
                f"layer {chain[0][:12]}",
                "has no short name in its file link",
                "Pull or load its image again.",
            )
        if len(links) > _MOST_LOWERS - 1:
            raise UnsupportedDriver(
                f"layer {chain[0][:12]}",
                f"has {len(links) - 1} parent layers, and a mapped layer would exceed the limit",
                "Build the image with fewer layers (podman build --squash).",
            )
        own = base64.b32encode(os.urandom(17)).decode("ascii")[:26]
        ids = self._disk_chain(undo, chain)
        for name, text in (
            ("link", own),
            ("lower", ":".join(links)),
            ("lower-layers", ":".join(ids)),
        ):
            descriptor = os.open(name, _NEW, 0o644, dir_fd=layer)
            with open(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fchmod(descriptor, 0o644)
                copy_label(template, descriptor)

    def _copied_up(
        self,
        undo: contextlib.ExitStack,
        chain: t.Sequence[str],
        shift: Shift,
        layer: int,
        progress: t.Optional[Progress],
    ) -> CloneResult:
        """Let the kernel create such files: change the owners through a writable mount."""
        lowers = self._directories(undo, chain)
        opened = [os.open(name, DIRECTORY, dir_fd=layer) for name in ("diff1", "work", "merged")]
        for item in opened:
            undo.callback(os.close, item)
        upper, work, merged = opened
        _copy_root(lowers[0], upper)
        options = ["metacopy=on", *self._options_of_ours("redirect_dir", "index", "xino")]
        mounts.overlay(merged, lowers, upper, work, options)
        try:
            root = os.open("merged", DIRECTORY, dir_fd=layer)
            try:
                made = self.tree_tools.shift_in_place(root, shift, relink=True, progress=progress)
            finally:
                os.close(root)
        finally:
            mounts.unmount_surely(f"/proc/self/fd/{layer}/merged")
        # With index=on it would record the old path of the upper directory.
        remove_tree(f"/proc/self/fd/{layer}/work")
        os.mkdir("work", 0o700, dir_fd=layer)
        return made._replace(exclusive=measure([upper]).allocated)

    def _install(self, staging: int, folder: int, layer_id: str) -> None:
        with contextlib.ExitStack() as undo:
            layer = os.open(self._staged_name(layer_id), DIRECTORY, dir_fd=staging)
            undo.callback(os.close, layer)
            link = _read(layer, "link")
            links = _opened_links(undo, folder)
            if link is None or links is None:
                raise StoreError(self.folder, "has lost its directory l or the staged link")
            # The directory first: whoever removes it finds the name of the link there.
            super()._install(staging, folder, layer_id)
            os.symlink(f"../{layer_id}/diff", link, dir_fd=links)
            sync_names(links)

    def _uninstall(self, folder: int, layer_id: str, trash: int) -> None:
        self._unlink_short_name(folder, layer_id)
        super()._uninstall(folder, layer_id, trash)

    def _unlink_short_name(self, folder: int, layer_id: str) -> None:
        """Called before the directory is removed, because only the directory contains the name."""
        with contextlib.ExitStack() as undo:
            layer = os.open(layer_id, DIRECTORY, dir_fd=folder)
            undo.callback(os.close, layer)
            link = _read(layer, "link")
            links = _opened_links(undo, folder)
            if links is not None and link is not None and _is_link_of(links, link, layer_id):
                os.unlink(link, dir_fd=links)

    def erase(self, layer_id: str) -> None:
        """See the base class; the short name is removed first."""
        with self._explained(layer_id), contextlib.ExitStack() as undo:
            folder = undo.enter_context(self._opened_folder())
            undo.enter_context(contextlib.suppress(FileNotFoundError))
            self._unlink_short_name(folder, self._checked(layer_id))
        super().erase(layer_id)

    def _contents(self, layer: int) -> t.List[str]:
        return [name for name in os.listdir(layer) if name.startswith("diff")]

    # Reading

    @contextlib.contextmanager
    def _readable(self, chain: t.Sequence[str]) -> t.Iterator[LayerStack]:
        with contextlib.ExitStack() as undo:
            directories = self._directories(undo, chain)
            family = "user" if self.home.rootless else "trusted"
            yield undo.enter_context(LayerStack(directories, family))

    @contextlib.contextmanager
    def _mounted(self, chain: t.Sequence[str]) -> t.Iterator[LayerStack]:
        """The template as the kernel merges it, for layers that cannot be merged here."""
        with contextlib.ExitStack() as undo:
            directories = self._directories(undo, chain)
            template = self._need_layer(undo, chain[0])
            options = ["userxattr"]
            if not self.home.rootless:
                # With the options of the runtime, so that the content is what containers see.
                options = self._options_of_ours("metacopy", "redirect_dir", "xino")
            view = mounts.overlay_view(template, "diff", directories, options)
            undo.callback(os.close, view)
            yield undo.enter_context(LayerStack([view], PLAIN))

    def _disk_chain(self, undo: contextlib.ExitStack, chain: t.Sequence[str]) -> t.List[str]:
        """The template and the layers it depends on, by the driver's files: a mapped layer depends on more layers
        than its record names."""
        template = self._need_layer(undo, chain[0])
        links = self._lower_links(template)
        ids = self._lower_ids(template)
        if ids is None:
            resolved = [self._resolve(link) for link in links]
            ids = [item for item in resolved if item is not None]
            if len(ids) != len(links):
                # Old runtimes restore a lost short name; the layers are known from the records.
                if len(links) != len(chain) - 1:
                    raise StoreError(
                        f"layer {chain[0][:12]}",
                        "names layers in its file lower that are missing",
                        "Pull or load its image again.",
                    )
                ids = list(chain[1:])
        return [chain[0], *ids]

    def _directories(self, undo: contextlib.ExitStack, chain: t.Sequence[str]) -> t.List[int]:
        """Descriptors of all diff, diff1, diff2 ... of the chain, top first."""
        found = []
        for layer_id in self._disk_chain(undo, chain):
            layer = self._need_layer(undo, layer_id)
            name, number = "diff", 0
            while number == 0 or _exists(layer, name):
                descriptor = os.open(name, DIRECTORY, dir_fd=layer)
                undo.callback(os.close, descriptor)
                found.append(descriptor)
                number += 1
                name = f"diff{number}"
        return found

    def _lowers(self, directory: int) -> t.List[str]:
        ids = self._lower_ids(directory)
        if ids is not None:
            return ids
        resolved = [self._resolve(link) for link in self._lower_links(directory)]
        return [item for item in resolved if item is not None]

    @staticmethod
    def _refuse_newer(directory: int) -> None:
        """Check that a layer's directory contains only files of known versions.

        :raises UntestedRuntime: it contains something else
        """
        unknown = sorted(name for name in os.listdir(directory) if not _KNOWN.fullmatch(name))
        if unknown:
            raise _newer(directory, f"has {printable(unknown[0], 80)}, which")

    def _lower_links(self, directory: int) -> t.List[str]:
        """The entries of ``lower``, each ``l/`` and a short name.

        :raises UntestedRuntime: an entry has another form
        """
        text = _read(directory, "lower")
        if not text:
            return []
        links = text.split(":")
        for link in links:
            if not link.startswith("l/") or not _LINK.fullmatch(link[2:]):
                raise _newer(
                    directory, f"has {link[:80]!r} in lower, which is not l/ and a short name and"
                )
        return links

    def _lower_ids(self, directory: int) -> t.Optional[t.List[str]]:
        """The entries of ``lower-layers``; None without that file, which old runtimes do not write.

        :raises UntestedRuntime: an entry is no layer ID
        """
        text = _read(directory, "lower-layers")
        if text is None:
            return None
        ids = text.split(":") if text else []
        for identifier in ids:
            if not LAYER_ID.fullmatch(identifier):
                raise _newer(
                    directory, f"has {identifier[:80]!r} in lower-layers, which is no layer ID and"
                )
        return ids

    def _resolve(self, link: str, use_link_files: bool = True) -> t.Optional[str]:
        """The layer that l/NAME links to, in the store or in a read-only store.

        :param use_link_files: whether the file ``link`` of a layer is used if the name is lost
        """
        for graphroot in (self.home.view, *self.home.image_stores):
            with contextlib.ExitStack() as undo:
                try:
                    folder = undo.enter_context(self._opened_folder(graphroot))
                except FileNotFoundError:
                    continue
                links = _opened_links(undo, folder)
                found = None if links is None else _link_target(links, link[2:])
                if found is not None:
                    return found
                if links is not None and _exists(links, link[2:]):
                    use_link_files = False  # Runtimes do not change existing entries.
        return self._names_in_link_files().get(link[2:]) if use_link_files else None

    def _names_in_link_files(self) -> t.Dict[str, str]:
        """The short name of each layer of the store from its file ``link``; read once, if a name is missing."""
        if self._names is None:
            self._names = {}
            with self._opened_folder() as folder:
                for layer_id in filter(LAYER_ID.fullmatch, sorted(os.listdir(folder))):
                    with contextlib.ExitStack() as undo, contextlib.suppress(OSError):
                        layer = os.open(layer_id, DIRECTORY, dir_fd=folder)
                        undo.callback(os.close, layer)
                        name = _read(layer, "link")
                        if name and _LINK.fullmatch(name):
                            self._names[name] = layer_id
        return self._names


def _newer(directory: int, problem: str) -> UntestedRuntime:
    """The error about a form of layers that no known version writes."""
    return UntestedRuntime(
        os.readlink(f"/proc/self/fd/{directory}"),
        f"{problem} is newer than this version of the collection knows, or was put there by something else",
        "Update the collection. Until then this layer is neither copied nor removed by it.",
    )


def _opened_links(undo: contextlib.ExitStack, folder: int) -> t.Optional[int]:
    try:
        descriptor = os.open("l", DIRECTORY, dir_fd=folder)
    except FileNotFoundError:
        return None
    undo.callback(os.close, descriptor)
    return descriptor


def _link_target(links: int, name: str) -> t.Optional[str]:
    """The layer ID that a short name leads to; None if it leads nowhere or elsewhere."""
    try:
        target = os.readlink(name, dir_fd=links)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EINVAL):
            return None
        raise
    found = _LINK_TARGET.fullmatch(target)
    return found.group(1) if found else None


def _is_link_of(links: int, name: str, layer_id: str) -> bool:
    return _LINK.fullmatch(name) is not None and _link_target(links, name) == layer_id


def _read(directory: int, name: str) -> t.Optional[str]:
    """A small file of the driver's; None if it is not there."""
    try:
        descriptor = files.open_regular(name, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        return os.read(descriptor, _LONGEST_TEXT).decode("ascii", "replace")
    finally:
        os.close(descriptor)


def _exists(directory: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _has_directory(directory: int, name: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _copy_root(source: int, target: int) -> None:
    """Owner, label, mode and times of a layer's root directory."""
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    copy_label(source, target)
    os.fchmod(target, stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def _nothing(_exclusive: bool) -> Usage:
    return Usage(inodes=1, files=1, apparent=0, allocated=0, exclusive=0)
