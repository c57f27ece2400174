# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Copy an image into a store with the skopeo, buildah or podman of the host.

These programs run outside the private namespaces of this library, as the owner of the store.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import typing as t
from dataclasses import dataclass, field

from .. import as_user
from ..errors import ConfigError, StorageError, StoreError, StoreUnwritten
from ..printable import command
from ..store import toml
from ..store.conf_values import canonical
from ..store.config import StoreConfig
from ..store.references import parse
from . import temporary_containers
from .store_opening import StoreRequest, configured

# Error messages of skopeo and podman for missing or wrong credentials.
_LOGIN = re.compile(r"unauthorized|authentication required|access to the resource is denied", re.I)
_REGISTRY = "docker://"
_AUTH_VARIABLE = "REGISTRY_AUTH_FILE"
_CONF_VARIABLE = "CONTAINERS_STORAGE_CONF"
# Placeholders of files in memory. No argument can contain a NUL byte.
_AUTH_FILE = "\0auth.json"
_STORAGE_CONF = "\0storage.conf"


@dataclass(frozen=True)
class Credentials:
    """The credentials for a registry.

    :param authfile: a file in the format of containers-auth.json(5) that the store's owner can read; empty: the
        default file of that user
    :param username: empty: the login in the file
    """

    authfile: str = ""
    username: str = ""
    password: str = field(default="", repr=False)


NO_CREDENTIALS = Credentials()

_DIGEST = re.compile(r"[a-z0-9]+:[0-9a-f]{32,}")
_ID = re.compile(r"[0-9a-f]{64}")

# The directory for copies of sources during a pull.
_TEMPORARY, _COPIES = "/var/tmp", "userns-storage"
# buildah and podman pull from all sources of skopeo except a store.
_STORE = "containers-storage"
# [driver@graphroot+runroot:options]; containers-transports(5).
_SOURCE_STORE = re.compile(
    r"\[(?:(?P<driver>[^]@]*)@)?(?P<graphroot>[^]+:]+)(?:\+(?P<runroot>[^]:]+))?"
)
# They name such an image after its path or its annotation, and fail if that is no name.
_NAMED_BY_SOURCE = ("oci", "oci-archive")


@dataclass(frozen=True)
class SourceImage:
    """An image of a source, from its configuration.

    :ivar image_id: its ID in any store, which is the digest of its configuration
    :ivar diff_ids: the digests of its layers, lowest first
    """

    image_id: str
    diff_ids: t.Tuple[str, ...]


class Tools:
    """skopeo, or else podman, with the store as their default store."""

    def __init__(
        self,
        store: StoreRequest,
        driver: str,
        graphroot: str,
        runroot: str,
        storage_conf: str,
        credentials: Credentials = NO_CREDENTIALS,
    ) -> None:
        self.store = store
        self.driver = driver
        self.graphroot = graphroot
        self.runroot = runroot
        # See _pinned().
        self.storage_conf = storage_conf
        self.credentials = credentials

    @classmethod
    def at(
        cls,
        store: StoreRequest,
        found: t.Mapping[str, t.Any],
        credentials: Credentials = NO_CREDENTIALS,
    ) -> Tools:
        """The tools for a store whose :func:`location` is known."""
        return cls(
            store,
            found["driver"],
            found["graphroot"],
            found["runroot"],
            found["storage_conf"],
            credentials,
        )

    @property
    def can_describe(self) -> bool:
        """Whether the program is installed that :meth:`source_image` needs."""
        return shutil.which("skopeo") is not None

    def source_image(self, source: str) -> SourceImage:
        """The source's image. Writes nothing.

        :raises ConfigError: skopeo is not installed, or the file with credentials does not exist
        :raises StoreError: the source cannot be read
        """
        self._need("skopeo")
        self._need_store(source)
        login = self._login(source)
        argv = ["skopeo", "inspect", "--config", "--raw", *login, self._with_store(source)]
        answer = self._run(argv, source, named=False)
        try:
            found = json.loads(answer.stdout)["rootfs"]["diff_ids"]
        except (ValueError, RecursionError, KeyError, TypeError):
            found = None
        texts = found if isinstance(found, list) else []
        diff_ids = [text for text in texts if isinstance(text, str) and _DIGEST.fullmatch(text)]
        # Output that is incomplete cannot be used.
        return SourceImage(answer.digest, tuple(diff_ids if len(diff_ids) == len(texts) else ()))

    def copy(self, source: str, name: str) -> None:
        """Copy an image from a source (skopeo's transport and reference) to the store.

        :raises ConfigError: neither skopeo nor podman is installed
        :raises StoreError: the image could not be copied
        """
        self._need_store(source)
        login = self._login(source)
        if shutil.which("skopeo"):
            inside = ["podman", "unshare"] if self.store.account is not None else []
            if inside:
                self._need("podman")
            target = f"containers-storage:{name}"
            self._run([*inside, "skopeo", "copy", "--quiet", *login, source, target], source)
            return
        self._need("podman")
        pulled = self._run(["podman", "pull", "--quiet", *login, source], source).stdout.split()
        if not pulled:
            raise StoreError(
                f"source {source}",
                "podman pulled it but did not report the ID of the image",
                f"Run it manually: {self._by_hand(['podman', 'pull', source])}",
            )
        self._run(["podman", "tag", pulled[-1], name], source)

    def pull(self, source: str, uidmap: t.Sequence[str], gidmap: t.Sequence[str]) -> str:
        """Pull an image so that its own layers carry a map, and return its ID.

        buildah and podman create the layers with the map for containers. They choose the names of
        the image themselves.

        :raises ConfigError: neither buildah nor podman is installed
        :raises StoreError: the image could not be pulled
        """
        self._need_store(source)
        transport = source.partition(":")[0]
        if transport != _STORE:
            try:
                return self._pull(source, uidmap, gidmap)
            except StoreError:
                if transport not in _NAMED_BY_SOURCE or not self.can_describe:
                    raise
        return self._pull_copy(source, uidmap, gidmap)

    def _pull(self, source: str, uidmap: t.Sequence[str], gidmap: t.Sequence[str]) -> str:
        login = self._login(source)
        if shutil.which("buildah"):
            argv = ["buildah", *_options("--userns-uid-map", uidmap)]
            argv += [*_options("--userns-gid-map", gidmap), "pull", "--policy", "always"]
            return self._pulled(argv, source, self._run([*argv, "--quiet", *login, source], source))
        self._need("podman")
        podman = ["podman", "--events-backend", "none"]
        listed = self._run([*podman, "ps", "--all", "--format", "{{.Names}}"], source)
        for left in filter(temporary_containers.is_name, listed.stdout.split()):
            if not temporary_containers.is_running(left):
                self._run([*podman, *temporary_containers.remove_arguments(left)], source)
        name = temporary_containers.new_name()
        options = [*_options("--uidmap", uidmap), *_options("--gidmap", gidmap)]
        argv = [
            *podman,
            *temporary_containers.create_arguments(name, "always"),
            "--quiet",
            *options,
        ]
        try:
            self._run([*argv, *login, source, "true"], source)
            inspect = [*podman, "container", "inspect", "--format", "{{.Image}}", name]
            return self._pulled(argv, source, self._run(inspect, source))
        finally:
            self._run([*podman, *temporary_containers.remove_arguments(name)], source)

    def _pull_copy(self, source: str, uidmap: t.Sequence[str], gidmap: t.Sequence[str]) -> str:
        """Pull from a copy of the source in a directory of the account's own."""
        self._need("skopeo")
        account = self.store.account
        inside = ["podman", "unshare"] if account is not None else []
        # Leftovers of killed runs. No pull takes a day.
        left = ["-maxdepth", "1", "-type", "d", "-name", f"{_COPIES}-??????????", "-mmin", "+1440"]
        owner = str(account.uid if account is not None else os.geteuid())
        remove = ["-user", owner, "-exec", "rm", "-rf", "--", "{}", "+"]
        with contextlib.suppress(StorageError):
            self._run(["find", _TEMPORARY, *left, *remove], source, named=False)
        argv = ["mktemp", "-d", f"{_TEMPORARY}/{_COPIES}-XXXXXXXXXX"]
        folder = self._run(argv, source, named=False).stdout.strip()
        try:
            target = f"dir:{folder}/image"
            self._run([*inside, "skopeo", "copy", "--quiet", source, target], source)
            return self._pull(target, uidmap, gidmap)
        finally:
            self._run(["rm", "-rf", "--", folder], source, named=False)

    def _pulled(self, argv: t.Sequence[str], source: str, answer: as_user.Finished) -> str:
        """The image ID that a program printed."""
        found = answer.stdout.split()
        if not found or not _ID.fullmatch(found[-1]):
            raise StoreError(
                f"source {source}",
                f"{argv[0]} pulled it but did not report the ID of the image",
                f"Run it manually: {self._by_hand([*argv, source])}",
            )
        return found[-1]

    @staticmethod
    def _need(program: str) -> None:
        if shutil.which(program) is None:
            raise ConfigError(
                program, "is not installed on this host", f"Install the package {program}."
            )

    def _run(self, argv: t.Sequence[str], source: str, named: bool = True) -> as_user.Finished:
        """Run a program.

        :param named: whether a storage.conf with all settings of the store makes it the program's default store
        """
        account = self.store.account
        variables, files = {}, {}
        if named:
            variables = {_CONF_VARIABLE: _STORAGE_CONF, "CONTAINERS_STORAGE_CONF_OVERRIDE": ""}
            # The owner of the store controls the text.
            files[_STORAGE_CONF] = self.storage_conf.encode("utf-8", "surrogateescape")
        elif self.store.storage_conf and not self._named():
            variables = {_CONF_VARIABLE: self.store.storage_conf}
        if _AUTH_FILE in argv:
            files[_AUTH_FILE] = self._auth_file(source)
        done = as_user.execute(argv, account, variables, files=files)
        if done.rc != 0:
            stderr_lines = done.stderr.splitlines()
            whose = f" for user {account.name}" if account is not None else ""
            hint = f"Run it manually: {self._by_hand(argv)}"
            if _LOGIN.search(done.stderr) and source.startswith(_REGISTRY):
                hint = self._login_hint(source)
            raise StoreError(
                f"source {source}{whose}",
                f"{argv[0]} could not read the image: {stderr_lines[-1] if stderr_lines else 'no reason'}",
                hint,
                command=_without_login(argv),
                rc=done.rc,
                stderr=done.stderr,
            )
        return done

    def _by_hand(self, argv: t.Sequence[str]) -> str:
        """The command line for an administrator, with all options of the store."""
        location = f"{self.driver}@{self.graphroot}+{self.runroot}"
        full: t.List[str] = []
        # The program asks for the password, or uses the login of its user.
        for word in _without_login(argv):
            transport, colon, rest = word.partition(":")
            if transport == "containers-storage" and colon and not rest.startswith("["):
                word = f"{transport}:[{location}]{rest}"
            full.append(word)
        if full[0] == "podman" and full[1] != "unshare":
            where = ("--root", self.graphroot, "--runroot", self.runroot)
            full[1:1] = [*where, "--storage-driver", self.driver]
        return as_user.typed(self.store.account, command(*full))

    def _login_hint(self, source: str) -> str:
        login = as_user.typed(self.store.account, command("podman", "login", _registry(source)))
        return f"Set username and password, or authfile, or log in on the host: {login}"

    def _login(self, source: str) -> t.List[str]:
        """The options with which skopeo and podman find the credentials for a source.

        :raises ConfigError: the file with credentials does not exist, or the store's owner cannot read it
        """
        if not source.startswith(_REGISTRY):
            return []
        if self.credentials.username:
            return ["--authfile", _AUTH_FILE]
        path = self.credentials.authfile or self._authfile_of_task()
        if path and not self._can_read(path):
            raise ConfigError(
                f"authfile {path}",
                "does not exist on this host, or the owner of the store cannot read it",
                f"Create it: {command('podman', 'login', '--authfile', path, _registry(source))}",
            )
        return ["--authfile", path] if path else []

    def _auth_file(self, source: str) -> bytes:
        """The username and password in the format of containers-auth.json(5)."""
        login = f"{self.credentials.username}:{self.credentials.password}".encode()
        auth = {"auth": base64.b64encode(login).decode()}
        return json.dumps({"auths": {_registry(source): auth}}).encode()

    def _authfile_of_task(self) -> str:
        """The file in the task's environment, if the store's owner can read it."""
        path = os.environ.get(_AUTH_VARIABLE, "")
        return path if path and (self.store.account is None or self._can_read(path)) else ""

    def _need_store(self, source: str) -> None:
        """Check that the store of a source exists, because the programs would create it.

        :raises StoreError: it does not
        """
        transport, _colon, rest = source.partition(":")
        if transport != _STORE:
            return
        driver, graphroot, runroot = self.driver, self.graphroot, ""
        named = _SOURCE_STORE.match(rest)
        if named:
            driver, graphroot = canonical(named["driver"] or ""), named["graphroot"]
            runroot = named["runroot"] or ""
        # With an imagestore, the images are there.
        kinds = [f"{driver or '*'}-{kind}" for kind in ("images", "layers", "containers")]
        names = ["-name", kinds[0], "-o", "-name", kinds[1], "-o", "-name", kinds[2]]
        argv = ["find", f"{graphroot}/", "-maxdepth", "1", "-type", "d", "(", *names, ")"]
        if not as_user.execute(argv, self.store.account, {}).stdout.strip():
            raise StoreError(
                f"source {source}",
                f"there is no container store in {graphroot}"
                + (f" with the driver {driver}" if driver else ""),
                "Correct the path, which the owner of the target store must be able to read.",
            )
        if runroot and as_user.execute(["test", "-d", runroot], self.store.account, {}).rc != 0:
            raise StoreError(
                f"source {source}",
                f"the runroot {runroot} does not exist",
                "Use the runroot of that store, or create it as the owner of the target store: "
                f"{command('mkdir', runroot)}",
            )

    def _can_read(self, path: str) -> bool:
        """Whether the store's owner can read a file. Root does not access a user's directories."""
        account = self.store.account
        if account is None:
            return os.path.exists(path)
        return as_user.execute(["test", "-r", path], account, {}).rc == 0

    def _named(self) -> bool:
        """Whether options name another store than the default."""
        store = self.store
        return bool(store.graphroot or store.runroot or store.driver or store.storage_options)

    def _with_store(self, source: str) -> str:
        """A source in the store itself with all options, so that reading needs no configuration file."""
        transport, colon, rest = source.partition(":")
        if transport != "containers-storage" or rest.startswith("[") or not self._named():
            return source
        return f"{transport}{colon}[{self.driver}@{self.graphroot}+{self.runroot}]{rest}"


def _without_login(argv: t.Sequence[str]) -> t.List[str]:
    """A command line without the option for a file that is only in memory."""
    found = list(argv)
    if _AUTH_FILE in found:
        at = found.index(_AUTH_FILE)
        del found[at - 1 : at + 1]
    return found


def _registry(source: str) -> str:
    """The registry of a source, as in the keys of an authfile."""
    return parse(source[len(_REGISTRY) :]).domain or "docker.io"


def _options(name: str, values: t.Sequence[str]) -> t.List[str]:
    return [word for value in values for word in (name, value)]


def location(config: StoreConfig) -> t.Dict[str, t.Any]:
    """The location of a store, for :meth:`Tools.at`.

    :raises ConfigError: a path cannot be written in TOML
    """
    return {
        "driver": config.driver,
        "graphroot": config.graphroot,
        "runroot": config.runroot,
        "storage_conf": _pinned(config),
    }


def location_of_unwritten(store: StoreRequest, error: StoreUnwritten) -> t.Dict[str, t.Any]:
    """The :func:`location` of a store that no runtime has written yet; with its future driver.

    :raises ConfigError: a path cannot be written in TOML
    """
    return {**location(configured(store)), **_roots(error.facts)}


def unwritten_store(store: StoreRequest, found: t.Mapping[str, t.Any]) -> t.Dict[str, t.Any]:
    """The result entry of a store that no runtime has written yet.

    :param found: its :func:`location`, or the facts of ``StoreUnwritten``
    """
    rootless = store.account is not None
    return {**_roots(found), "backing_filesystem": "", "rootless": rootless, "shifting": None}


def _roots(found: t.Mapping[str, t.Any]) -> t.Dict[str, t.Any]:
    return {name: found[name] for name in ("driver", "graphroot", "runroot")}


def _pinned(config: StoreConfig) -> str:
    """The text of a storage.conf with all settings of a store.

    skopeo and podman of a host may read the host's files differently, and would then use different stores.

    :raises ConfigError: a path cannot be written in TOML
    """
    lines = [
        "[storage]",
        f"driver = {toml.quoted(config.driver)}",
        f"graphroot = {toml.quoted(config.graphroot)}",
        f"runroot = {toml.quoted(config.runroot)}",
    ]
    if config.rootless:
        # Before storage 1.59, the only path of such a file that is used for users.
        lines.append(f"rootless_storage_path = {toml.quoted(config.graphroot)}")
    if config.imagestore:
        lines.append(f"imagestore = {toml.quoted(config.imagestore)}")
    if config.transient:
        lines.append("transient_store = true")
    lines.append("[storage.options]")
    for name, stores in (
        ("additionalimagestores", config.additional_image_stores),
        ("additionallayerstores", config.additional_layer_stores),
    ):
        if stores:
            lines.append(f"{name} = [{', '.join(toml.quoted(store) for store in stores)}]")
    lines.append(f"[storage.options.{toml.key(config.driver)}]")
    lines += [f"{toml.key(name)} = {toml.quoted(value)}" for name, value in config.options.items()]
    return "\n".join(lines) + "\n"
