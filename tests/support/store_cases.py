# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A store, an image and a user namespace, and calls of modules of this collection for them."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import stat
import subprocess
import typing as t

from .images import Entry, Image
from .modules import run_module, start_module
from .stores import Json, Store

# The kinds of use: the kind of store, and whether the modules run as the store's own user.
SETUPS: t.Dict[str, t.Tuple[str, bool]] = {
    "vfs": ("vfs", False),
    "overlay-forced": ("overlay-forced", False),
    "rootless-as-user": ("rootless-overlay", True),
    "rootless-as-root": ("rootless-overlay", False),
}

ROOTFUL_MAP = "0:100000:65536"


def namespace_args(store: Store, text: str = ROOTFUL_MAP) -> t.List[str]:
    """podman's options for a map; in rootless stores the map is keep-id."""
    return ["--userns=keep-id"] if store.user else [f"--uidmap={text}", f"--gidmap={text}"]


@dataclasses.dataclass
class Case:
    """A store with an image, and the user namespace of its containers."""

    store: Store
    image: Image
    as_user: bool = False

    @property
    def keep_id(self) -> bool:
        """Whether the namespace is keep-id (rootless) or a range of the host's (rootful)."""
        return self.store.user is not None

    @property
    def podman_args(self) -> t.List[str]:
        """podman's options for the namespace."""
        return namespace_args(self.store)

    @property
    def mapping_args(self) -> Json:
        """The modules' options for the same namespace."""
        return {"userns": "keep-id"} if self.keep_id else {"uidmap": [ROOTFUL_MAP]}

    @property
    def map(self) -> t.List[str]:
        """The map in the form podman writes, for users and for groups alike."""
        if self.store.user is None:
            return [ROOTFUL_MAP]
        uid, size = self.store.user.uid, self.store.user.subuid_count
        return [f"0:1:{uid}", f"{uid}:0:1", f"{uid + 1}:{uid + 1}:{size - uid}"]

    def call(self, module: str, args: t.Mapping[str, t.Any], **options: t.Any) -> Json:
        """Run a module on the store; options are those of run_module."""
        return run_module(self.store.lab, module, self._args(args), **self._options(options))

    def start(self, module: str, args: t.Mapping[str, t.Any]) -> subprocess.Popen[bytes]:
        """Start a module on the store; see start_module and finish_module."""
        return start_module(self.store.lab, module, self._args(args), **self._options({}))

    def _args(self, args: t.Mapping[str, t.Any]) -> Json:
        return {**({} if self.as_user else self.store.module_args()), **args}

    def _options(self, options: Json) -> Json:
        return {
            "environ": self.store.module_environ(),
            "machine": self.store.machine,
            "user": self.store.user if self.as_user else None,
            **options,
        }

    def layer_template(self, *, options: t.Optional[Json] = None, **args: t.Any) -> Json:
        """layer_template for the case's image and namespace, with `args` added or replaced."""
        arguments: Json = {"images": [self.image.name], **args}
        if not {"userns", "uidmap", "gidmap"}.intersection(args):
            arguments.update(self.mapping_args)
        return self.call("layer_template", arguments, **(options or {}))

    def info(self, *, options: t.Optional[Json] = None, **args: t.Any) -> Json:
        """image_layers_info on the case's store."""
        return self.call("image_layers_info", args, **(options or {}))

    def create(self, *args: str) -> str:
        """Create a container with the namespace; returns its ID."""
        return self.store.create(self.image.name, *self.podman_args, *args)

    def shell(self, script: str) -> str:
        """Start a container with the namespace as its root, and run a script."""
        return self.store.shell(self.image.name, script, [*self.podman_args, "--user=0"])

    def template(self) -> str:
        """ID of the image's own layer."""
        return str(self.store.image(self.image.name)["layer"])

    def mapped(self) -> t.List[str]:
        """IDs of the image's mapped layers."""
        return self.store.mapped_layers(self.image.name)

    def assert_podman_works(self) -> None:
        """Check that podman's listings succeed."""
        self.store.podman("images", "-a")
        self.store.podman("system", "df", "-v")

    def assert_tree(self, layer_id: str) -> None:
        """Check that a mapped layer contains exactly the content of the image's layers, with the map applied.

        Owners, modes, contents, link texts and counts, extended attributes; mtimes to the nanosecond
        as the template has them.
        """
        store = self.store
        record = store.layer(layer_id)
        described = self.image.tree()
        with store.mounted(layer_id) as tree, store.mounted(self.template()) as model:
            assert names_below(tree) == set(described)
            for path, entry in described.items():
                info, origin = os.lstat(tree / path), os.lstat(model / path)
                expected = (
                    store.host_id(record.get("uidmap", ()), entry.uid),
                    store.host_id(record.get("gidmap", ()), entry.gid),
                )
                assert (info.st_uid, info.st_gid) == expected, path
                assert stat.S_IFMT(info.st_mode) == stat.S_IFMT(origin.st_mode), path
                if path == ".":
                    # The overlay driver sets its own mode on the root directory.
                    assert oct(info.st_mode) == oct(origin.st_mode)
                    continue
                assert info.st_mtime_ns == origin.st_mtime_ns, path
                if entry.kind != "symlink":
                    assert oct(info.st_mode & 0o7777) == oct(entry.mode), path
                if entry.kind != "dir":
                    assert info.st_nlink == origin.st_nlink, path
                _assert_content(tree / path, entry)


def names_below(tree: pathlib.Path) -> t.Set[str]:
    """All paths of a tree, relative to it, and "." for the tree itself."""
    return {"."} | {
        os.path.relpath(os.path.join(parent, name), tree)
        for parent, folders, files in os.walk(tree)
        for name in [*folders, *files]
    }


def _assert_content(path: pathlib.Path, entry: Entry) -> None:
    if entry.kind == "symlink":
        assert os.readlink(path) == entry.target, path
    if entry.kind == "file":
        assert path.read_bytes() == entry.content, path
    if entry.kind in ("file", "dir"):
        found = {
            key: os.getxattr(path, key, follow_symlinks=False)
            for key in os.listxattr(path, follow_symlinks=False)
            if key.startswith("user.") and not key.startswith("user.overlay.")
        }
        found.update(
            (key, os.getxattr(path, key, follow_symlinks=False))
            for key in ("security.capability",)
            if key in os.listxattr(path, follow_symlinks=False)
        )
        expected = dict(entry.xattrs)
        # Capabilities of a user namespace have its root's ID after the same sets.
        assert {key: _sets(key, value) for key, value in found.items()} == {
            key: _sets(key, value) for key, value in expected.items()
        }, path


def _sets(key: str, value: bytes) -> bytes:
    return value[:1] + value[4:20] if key == "security.capability" else value
