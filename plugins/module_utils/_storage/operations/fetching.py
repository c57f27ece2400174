# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Bringing an image into a store with the host's own skopeo or podman.

These programs run outside the private namespaces of this library, as the account whose store it is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import typing as t

from .. import userns
from ..errors import ConfigError, StoreError
from .opening import StoreRequest

_LAST_WORDS = 2000
_SYSTEM_CONF = "/etc/containers/storage.conf"


class Tools:
    """skopeo, or else podman, with the store as their default one."""

    def __init__(self, store: StoreRequest, driver: str, graphroot: str, runroot: str) -> None:
        self.store = store
        self.driver = driver
        self.graphroot = graphroot
        self.runroot = runroot

    def image_id(self, source: str) -> str:
        """The ID that the source's image has in any store: the digest of its configuration.

        :raises StoreError: the source cannot be read
        """
        self._need("skopeo")
        config = self._run(["skopeo", "inspect", "--config", "--raw", source], source)
        return hashlib.sha256(config).hexdigest()

    def copy(self, source: str, name: str) -> None:
        """Bring an image from a source (skopeo's transport and reference) into the store.

        :raises ConfigError: neither skopeo nor podman is installed
        :raises StoreError: the image could not be brought
        """
        if shutil.which("skopeo"):
            inside = ["podman", "unshare"] if self.store.account is not None else []
            if inside:
                self._need("podman")
            words = [*inside, "skopeo", "copy", "--quiet", source, f"containers-storage:{name}"]
            self._run(words, source)
            return
        self._need("podman")
        answer = self._run(["podman", "pull", "--quiet", source], source).decode("utf-8", "replace")
        self._run(["podman", "tag", answer.split()[-1], name], source)

    @staticmethod
    def _need(program: str) -> None:
        if shutil.which(program) is None:
            raise ConfigError(
                program, "is not installed on this host", f"Install the package {program}."
            )

    def _run(self, words: t.Sequence[str], source: str) -> bytes:
        with self._environment() as environ:
            options: t.Dict[str, t.Any] = {}
            account = self.store.account
            if account is not None and os.geteuid() == 0:
                options = {"user": account.uid, "group": account.gid, "extra_groups": []}
            done = subprocess.run(
                list(words),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
                cwd="/",
                env=environ,
                **options,
            )
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip()[-_LAST_WORDS:]
            raise StoreError(
                f"source {source}",
                f"{words[0]} could not read it: {said.splitlines()[-1] if said else 'no reason'}",
                f"Try it by hand: {' '.join(words)}",
                command=list(words),
                rc=done.returncode,
                stderr=said,
            )
        return bytes(done.stdout)

    @contextlib.contextmanager
    def _environment(self) -> t.Iterator[t.Dict[str, str]]:
        """Variables with which the programs find the store by themselves."""
        store, account = self.store, self.store.account
        environ = dict(os.environ)
        if account is not None:
            environ = userns.environment(os.environ, account, os.geteuid() == account.uid)
        with contextlib.ExitStack() as undo:
            if store.graphroot or store.runroot or store.driver or store.storage_options:
                folder = undo.enter_context(tempfile.TemporaryDirectory(prefix="userns-storage-"))
                path = os.path.join(folder, "storage.conf")
                with open(path, "w", encoding="utf-8") as stream:
                    stream.write(self._storage_conf())
                if account is not None and os.geteuid() == 0:
                    os.chown(folder, account.uid, account.gid)
                    os.chown(path, account.uid, account.gid)
                environ["CONTAINERS_STORAGE_CONF"] = path
            elif store.storage_conf:
                environ["CONTAINERS_STORAGE_CONF"] = store.storage_conf
            elif account is None and os.path.exists(_SYSTEM_CONF):
                # skopeo 1.9 (Debian 12) takes the distribution's own file before this one, as podman never does.
                environ.setdefault("CONTAINERS_STORAGE_CONF", _SYSTEM_CONF)
            yield environ

    def _storage_conf(self) -> str:
        """A storage.conf of the store as it was found; JSON's strings are TOML's as well."""
        lines = [
            "[storage]",
            f"driver = {json.dumps(self.driver)}",
            f"graphroot = {json.dumps(self.graphroot)}",
            f"runroot = {json.dumps(self.runroot)}",
            f"[storage.options.{self.driver}]",
        ]
        for option in self.store.storage_options:
            key, _mark, value = option.partition("=")
            lines.append(f"{key.rpartition('.')[2]} = {json.dumps(value)}")
        return "\n".join(lines) + "\n"
