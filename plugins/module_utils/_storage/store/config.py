# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Where the store is and how it is set up: storage.conf, environment, defaults, podman's database.

Follows containers/storage 1.43 to 1.62 (pkg/config, types/options.go) and podman's own rules of
what its database and its command line override.
"""

from __future__ import annotations

import os
import re
import typing as t
from dataclasses import dataclass, field, replace

from ..errors import ConfigError
from . import libpod_db, toml


@dataclass(frozen=True)
class Account:
    """The account in whose name a runtime would run."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True)
class StoreOverrides:
    """What the caller gave explicitly, as podman's global options; empty means not given."""

    storage_conf: str = ""
    graphroot: str = ""
    runroot: str = ""
    driver: str = ""
    storage_options: t.Tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreConfig:
    """One store as a runtime would open it.

    :ivar options: the driver's options, without the driver's name, lower-case keys
    :ivar additional_image_stores: read-only stores, in order
    :ivar sources: for each field, where its value comes from
    """

    graphroot: str
    runroot: str
    driver: str
    options: t.Dict[str, str] = field(default_factory=dict)
    imagestore: str = ""
    additional_image_stores: t.Tuple[str, ...] = ()
    additional_layer_stores: t.Tuple[str, ...] = ()
    transient: bool = False
    rootless: bool = False
    auto_userns: t.Dict[str, t.Any] = field(default_factory=dict)
    sources: t.Dict[str, str] = field(default_factory=dict)


STORAGE_CONF = "containers/storage.conf"
ADMIN_FILE = "/etc/containers/storage.conf"
VENDOR_FILE = "/usr/share/containers/storage.conf"

_GRAPHROOT = "/var/lib/containers/storage"
_RUNROOT = "/run/containers/storage"

_ROOTLESS_DRIVERS = ("btrfs", "overlay", "overlay2", "vfs")
# Tried in this order where none is set; vfs is never taken for being there already.
_PRIORITY = ("overlay", "btrfs", "zfs", "vfs")
_ROOTLESS_OVERLAY_KERNEL = (5, 13)
_EXPLICIT_PATHS_COUNT = (1, 59)

_SIZE_LIMIT = 1024 * 1024

# Options of [storage.options] that stand for the driver's own of the same name.
_COMMON_OPTIONS = ("size", "mount_program", "skip_mount_home", "ignore_chown_errors", "mountopt")
_DRIVER_OPTIONS: t.Dict[str, t.Tuple[str, ...]] = {
    "overlay": (
        "ignore_chown_errors",
        "mount_program",
        "mountopt",
        "size",
        "inodes",
        "skip_mount_home",
        "force_mask",
        "use_composefs",
        "sync",
    ),
    "vfs": ("ignore_chown_errors", "sync"),
    "btrfs": ("min_space", "size"),
    "zfs": ("fsname", "mountopt", "size"),
}


@dataclass
class _Settings:
    """One storage.conf, or what stands in for it."""

    source: str
    graphroot: str = ""
    runroot: str = ""
    driver: str = ""
    priority: t.Tuple[str, ...] = ()
    rootless_path: str = ""
    imagestore: str = ""
    transient: bool = False
    options: t.List[str] = field(default_factory=list)
    auto_userns: t.Dict[str, t.Any] = field(default_factory=dict)
    sources: t.Dict[str, str] = field(default_factory=dict)


def discover(
    overrides: StoreOverrides,
    environ: t.Mapping[str, str],
    account: t.Optional[Account],
    rootless: bool,
    storage_version: t.Optional[t.Tuple[int, ...]] = None,
) -> StoreConfig:
    """The store that podman would use with these options and this environment. Creates nothing.

    :param account: whose store it is; not needed for the rootful one
    :param rootless: whether the runtime would run without the host's root rights
    :param storage_version: the runtime's version of containers/storage; where it matters and is
        None, what has been written decides
    :raises ConfigError: a file is missing, unreadable or malformed, or settings contradict
    """
    rootless = rootless and not _is_root(account)
    return _Discovery(overrides, environ, account, rootless, storage_version).run()


def _is_root(account: t.Optional[Account]) -> bool:
    return account is not None and account.uid == 0


class _Discovery:
    def __init__(
        self,
        overrides: StoreOverrides,
        environ: t.Mapping[str, str],
        account: t.Optional[Account],
        rootless: bool,
        storage_version: t.Optional[t.Tuple[int, ...]],
    ) -> None:
        if rootless and account is None:
            raise ConfigError("rootless store", "belongs to no account", "Set `user`.")
        self.overrides = overrides
        self.environ = environ
        self.account = account
        self.rootless = rootless
        self.storage_version = storage_version
        self.uid = account.uid if account and rootless else 0

    def run(self) -> StoreConfig:
        settings = self._rootless_settings() if self.rootless else self._rootful_settings()
        settings = self._with_overrides(settings)
        settings = self._with_database(settings)
        graphroot = settings.graphroot
        if settings.imagestore and settings.imagestore == graphroot:
            raise ConfigError(
                settings.source,
                f"names {graphroot} as both graphroot and imagestore",
                "Drop `imagestore` or give it another path.",
            )
        driver = settings.driver
        if not driver:
            driver = self._picked_driver(settings)
            settings.sources["driver"] = "chosen as the runtime does"
        options, images, layers = split_options(driver, settings.options)
        auto = {"user": "containers", "min_size": 1024, "max_size": 65536}
        auto.update(settings.auto_userns)
        return StoreConfig(
            graphroot=graphroot,
            runroot=settings.runroot,
            driver=driver,
            options=options,
            imagestore=settings.imagestore,
            additional_image_stores=images,
            additional_layer_stores=layers,
            transient=settings.transient,
            rootless=self.rootless,
            auto_userns=auto,
            sources=settings.sources,
        )

    # Files

    def _explicit_file(self) -> str:
        if self.overrides.storage_conf:
            return self.overrides.storage_conf
        return self.environ.get("CONTAINERS_STORAGE_CONF", "")

    def _user_file(self) -> str:
        base = self.environ.get("XDG_CONFIG_HOME") or os.path.join(self._home(), ".config")
        return os.path.join(base, STORAGE_CONF)

    def _home(self) -> str:
        return self.environ.get("HOME") or (self.account.home if self.account else "/")

    def _system_settings(self) -> _Settings:
        candidates = [ADMIN_FILE, VENDOR_FILE]
        if self.environ.get("XDG_CONFIG_HOME"):
            candidates.insert(0, os.path.join(self.environ["XDG_CONFIG_HOME"], STORAGE_CONF))
        for path in candidates:
            if os.path.exists(path):
                return self._read(path)
        return self._with_environment(_Settings("default"))

    def _rootful_settings(self) -> _Settings:
        explicit = self._explicit_file()
        settings = self._read(explicit) if explicit else self._system_settings()
        for name, default in (("graphroot", _GRAPHROOT), ("runroot", _RUNROOT)):
            if not getattr(settings, name):
                setattr(settings, name, default)
                settings.sources[name] = "default"
        return self._expanded(settings)

    def _rootless_settings(self) -> _Settings:
        explicit = self._explicit_file()
        system = self._read(explicit) if explicit else self._system_settings()
        path = explicit or self._user_file()
        own = self._inherited(system, bool(explicit))
        if os.path.exists(path):
            settings = self._read(path)
            if explicit and self._paths_are_ignored(settings, own):
                return self._expanded(own)
            if not settings.runroot:
                settings.runroot = own.runroot
                settings.sources["runroot"] = own.sources["runroot"]
            if not settings.graphroot:
                settings.graphroot = settings.rootless_path or own.graphroot
                settings.sources["graphroot"] = (
                    settings.source if settings.rootless_path else own.sources["graphroot"]
                )
            return self._expanded(settings)
        return self._expanded(own)

    def _paths_are_ignored(self, settings: _Settings, own: _Settings) -> bool:
        """Whether the runtime takes only driver and options from CONTAINERS_STORAGE_CONF.

        podman and buildah with containers/storage before 1.59 do when they run rootless.
        """
        if self.storage_version is not None:
            return self.storage_version < _EXPLICIT_PATHS_COUNT
        theirs = self._expand(settings.graphroot or own.graphroot, "graphroot", settings.source)
        default = self._expand(own.graphroot, "graphroot", own.source)
        return not _written(theirs) and _written(default)

    def _inherited(self, system: _Settings, explicit: bool) -> _Settings:
        """What a user without a file of their own gets: little of the system's.

        :param explicit: ``system`` is a file that was named, whose options all count
        """
        result = _Settings(system.source, auto_userns=dict(system.auto_userns))
        result.runroot = os.path.join(self._runtime_dir(), "containers")
        result.sources["runroot"] = "default"
        if system.rootless_path:
            result.graphroot = system.rootless_path
            result.sources["graphroot"] = system.source
        else:
            data = self.environ.get("XDG_DATA_HOME")
            if not data:
                data = os.path.join(os.path.realpath(self._home()), ".local", "share")
            result.graphroot = os.path.join(data, "containers", "storage")
            result.sources["graphroot"] = "default"
        if system.driver in _ROOTLESS_DRIVERS:
            result.driver = system.driver
            result.sources["driver"] = system.sources.get("driver", system.source)
        if self.environ.get("STORAGE_DRIVER"):
            result.driver = _canonical(self.environ["STORAGE_DRIVER"])
            result.sources["driver"] = "STORAGE_DRIVER"
        if explicit:
            result.options = list(system.options)
            result.imagestore = system.imagestore
        elif result.driver == "overlay":
            kept = [one for one in system.options if "ignore_chown_errors" in one]
            result.options = kept[:1]
        if not result.driver:
            result.priority = system.priority
        if self.environ.get("STORAGE_OPTS"):
            result.options = result.options + self.environ["STORAGE_OPTS"].split(",")
        if result.options:
            result.sources["options"] = system.source
        return result

    def _runtime_dir(self) -> str:
        given = self.environ.get("XDG_RUNTIME_DIR")
        if given:
            return os.path.realpath(given)
        usual = f"/run/user/{self.uid}"
        if _private_to(usual, self.uid):
            return usual
        base = self.environ.get("TMPDIR") or "/tmp"
        names = [f"{name}-{self.uid}" for name in ("storage-run", "podman-run", "containers-user")]
        for name in names:
            if _private_to(os.path.join(base, name), self.uid):
                return os.path.join(base, name)
        return os.path.join(base, names[0])

    def _read(self, path: str) -> _Settings:
        try:
            with open(path, "rb") as file:
                data = file.read(_SIZE_LIMIT + 1)
        except FileNotFoundError:
            raise ConfigError(
                path, "does not exist", "Correct `storage_conf` or CONTAINERS_STORAGE_CONF."
            ) from None
        except OSError as error:
            raise ConfigError(
                path, f"cannot be read: {error.strerror}", "Check its path and permissions."
            ) from error
        if len(data) > _SIZE_LIMIT:
            raise ConfigError(path, f"is larger than {_SIZE_LIMIT} bytes", "Correct the file.")
        driver = self.environ.get("STORAGE_DRIVER", "")
        return self._with_environment(_settings_of(toml.loads(data, path), path, driver))

    def _with_environment(self, settings: _Settings) -> _Settings:
        driver = self.environ.get("STORAGE_DRIVER")
        if driver:
            settings.driver = driver
            settings.sources["driver"] = "STORAGE_DRIVER"
        settings.driver = _canonical(settings.driver)
        if "STORAGE_OPTS" in self.environ:
            text = self.environ["STORAGE_OPTS"]
            settings.options = text.split(",") if text else []
            settings.sources["options"] = "STORAGE_OPTS"
        return settings

    def _expanded(self, settings: _Settings) -> _Settings:
        for name in ("graphroot", "runroot", "imagestore"):
            path = getattr(settings, name)
            if path:
                setattr(settings, name, self._expand(path, name, settings.source))
        return settings

    def _expand(self, path: str, name: str, source: str) -> str:
        if "\0" in path:
            raise ConfigError(source, f"has a NUL in {name}", "Correct the file.")
        path = path.replace("$UID", str(self.uid))
        path = re.sub(
            r"\$(?:\{([^}]*)\}|([A-Za-z0-9_]+))",
            lambda match: self.environ.get(match.group(1) or match.group(2) or "", ""),
            path,
        )
        if not os.path.isabs(path):
            raise ConfigError(
                source, f"sets {name} to {path!r}, not an absolute path", "Correct the file."
            )
        return os.path.realpath(path) if os.path.exists(path) else os.path.normpath(path)

    # What goes above the files

    def _with_overrides(self, settings: _Settings) -> _Settings:
        """As podman treats --root, --runroot, --storage-driver and --storage-opt."""
        overrides = self.overrides
        for name in ("graphroot", "runroot"):
            path = getattr(overrides, name)
            if path:
                if not os.path.isabs(path):
                    raise ConfigError(f"{name} {path!r}", "is not an absolute path")
                setattr(settings, name, os.path.normpath(path))
                settings.sources[name] = "option"
        if overrides.driver:
            settings.driver = _canonical(overrides.driver)
            settings.sources["driver"] = "option"
        if overrides.graphroot or overrides.driver:
            settings.options = []
            settings.sources["options"] = "option"
        if overrides.storage_options:
            settings.options = [one for one in overrides.storage_options if one]
            settings.sources["options"] = "option"
        return settings

    def _with_database(self, settings: _Settings) -> _Settings:
        """As podman merges its database: above the files, beneath its command line."""
        found = libpod_db.recorded(settings.graphroot, settings.runroot, settings.transient)
        if found is None:
            return settings
        settings = replace(settings, sources=dict(settings.sources))
        for name in ("graphroot", "runroot", "driver"):
            value = getattr(found, name)
            if value and not getattr(self.overrides, name) and value != getattr(settings, name):
                if name != "driver" and not os.path.isabs(value):
                    continue
                setattr(settings, name, value)
                settings.sources[name] = f"podman's database {found.path}"
        return settings

    def _picked_driver(self, settings: _Settings) -> str:
        """The driver a runtime takes where none is set."""
        try:
            names = sorted(os.listdir(settings.graphroot))
        except OSError:
            names = []
        order = settings.priority or _PRIORITY
        if self.rootless and not settings.priority:
            for name in names:
                if name.endswith("-images"):
                    return _canonical(name[: -len("-images")])
            return "overlay" if _rootless_overlay(self.environ) else "vfs"
        for name in order:
            if name in names and (name != "vfs" or settings.priority):
                return name
        return order[0]


def _settings_of(content: toml.Table, path: str, driver: str) -> _Settings:
    """One parsed storage.conf as settings, its driver options in containers/storage's order.

    :param driver: the driver that counts instead of the file's, if any
    """
    reader = _Checked(path)
    storage = reader.table(content, "storage")
    options = reader.table(storage, "options")
    settings = _Settings(
        path,
        graphroot=reader.text(storage, "graphroot"),
        runroot=reader.text(storage, "runroot"),
        driver=driver or reader.text(storage, "driver"),
        priority=tuple(reader.texts(storage, "driver_priority")),
        rootless_path=reader.text(storage, "rootless_storage_path"),
        imagestore=reader.text(storage, "imagestore") or reader.text(options, "imagestore"),
        transient=reader.flag(storage, "transient_store"),
    )
    driver = settings.driver
    for name, key in (
        ("additionalimagestores", "imagestore"),
        ("additionallayerstores", "additionallayerstore"),
    ):
        settings.options += [f"{driver}.{key}={one}" for one in reader.texts(options, name)]
    for name in _COMMON_OPTIONS:
        value = reader.text(options, name)
        if value:
            settings.options.append(f"{driver}.{name}={value}")
    mask = options.get("force_mask")
    if isinstance(mask, int) and not isinstance(mask, bool) and mask > 0:
        settings.options.append(f"{driver}.force_mask={mask:o}")
    own = reader.table(options, _canonical(driver)) if driver else {}
    for name in _DRIVER_OPTIONS.get(_canonical(driver), ()):
        value = reader.text(own, name)
        if value:
            settings.options.append(f"{driver}.{name}={value}")
    user = reader.text(options, "root-auto-userns-user")
    if user:
        settings.auto_userns["user"] = user
    for name in ("min", "max"):
        size = reader.number(options, f"auto-userns-{name}-size")
        if size:
            settings.auto_userns[f"{name}_size"] = size
    for name in ("graphroot", "runroot", "driver", "imagestore"):
        if getattr(settings, name):
            settings.sources[name] = path
    if settings.options:
        settings.sources["options"] = path
    return settings


class _Checked:
    """Reads values out of tables; a value of a wrong type is an error, as it is for runtimes."""

    def __init__(self, path: str) -> None:
        self.path = path

    def _wrong(self, key: str, kind: str) -> ConfigError:
        return ConfigError(
            self.path,
            f"sets {key!r} to something that is not {kind}",
            "Correct the file; man 5 containers-storage.conf shows its form.",
            path=self.path,
        )

    def table(self, table: toml.Table, key: str) -> toml.Table:
        value = table.get(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, "a table")
        return value

    def text(self, table: toml.Table, key: str) -> str:
        value = table.get(key, "")
        if not isinstance(value, str):
            raise self._wrong(key, "a text in quotes")
        return value

    def texts(self, table: toml.Table, key: str) -> t.List[str]:
        value = table.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self._wrong(key, "a list of texts")
        return value

    def flag(self, table: toml.Table, key: str) -> bool:
        value = table.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def number(self, table: toml.Table, key: str) -> int:
        value = table.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
            raise self._wrong(key, "a whole number below 4294967296")
        return value


def split_options(
    driver: str, options: t.Iterable[str]
) -> t.Tuple[t.Dict[str, str], t.Tuple[str, ...], t.Tuple[str, ...]]:
    """Driver options as runtimes write them, taken apart; the last of a name counts.

    :returns: the options without the driver's name, additional image stores, additional layer
        stores
    """
    result: t.Dict[str, str] = {}
    images: t.List[str] = []
    layers: t.List[str] = []
    for option in options:
        key, _mark, value = option.partition("=")
        name = key.strip().lower()
        for prefix in (f"{driver}.", f"{driver}2.", "."):
            if name.startswith(prefix):
                name = name[len(prefix) :]
                break
        if name in ("imagestore", "additionalimagestore"):
            images += [os.path.normpath(one) for one in value.split(",") if one]
        elif name == "additionallayerstore":
            layers += [one for one in value.split(",") if one]
        elif name:
            result[name] = value
    return result, tuple(dict.fromkeys(images)), tuple(dict.fromkeys(layers))


def _canonical(driver: str) -> str:
    return "overlay" if driver == "overlay2" else driver


def _written(graphroot: str) -> bool:
    """Whether a runtime has used that graphroot."""
    try:
        return any(name.endswith("-layers") for name in os.listdir(graphroot))
    except OSError:
        return False


def _private_to(path: str, uid: int) -> bool:
    """Whether a runtime would trust the directory: the user's own, closed to others' writing."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return found.st_uid == uid and found.st_mode & 0o722 == 0o700


def _rootless_overlay(environ: t.Mapping[str, str]) -> bool:
    folders = (environ.get("PATH") or os.defpath).split(os.pathsep)
    if any(os.access(os.path.join(folder, "fuse-overlayfs"), os.X_OK) for folder in folders):
        return True
    release = re.match(r"([0-9]+)\.([0-9]+)", os.uname().release)
    return release is not None and (
        (int(release.group(1)), int(release.group(2))) >= _ROOTLESS_OVERLAY_KERNEL
    )
