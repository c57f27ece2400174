# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The location and the settings of a store: storage.conf, environment variables, defaults, podman's database.

The files are read by the loader of the runtime's version, see ``conf_single`` and ``conf_merged``. This module adds
the settings with which podman overrides them: its command line and its database.
"""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass, field, replace

from ..capabilities import Capabilities
from ..errors import ConfigError
from ..printable import command, user_command
from . import conf_crio, conf_merged, conf_single, libpod_db
from .conf_values import (
    DRIVER_OPTIONS,
    FILE_VARIABLE,
    OVERRIDE_VARIABLE,
    AutoUserns,
    Caller,
    Settings,
    canonical,
    split_options,
)

__all__ = ["Account", "AutoUserns", "StoreConfig", "StoreOverrides", "discover"]

# Origins of settings other than files and variables.
OPTION = "option"
DEFAULT = "default"
DATABASE = "podman's database"
CRI_O = "cri-o"


@dataclass(frozen=True)
class Account:
    """The account as which a runtime would run."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True)
class StoreOverrides:
    """Explicit settings of the caller, as podman's global options; empty if not given."""

    storage_conf: str = ""
    graphroot: str = ""
    runroot: str = ""
    driver: str = ""
    storage_options: t.Tuple[str, ...] = ()


@dataclass(frozen=True)
class StoreConfig:
    """A store as a runtime would open it.

    :ivar options: the driver's options, without the driver's name, lower-case keys
    :ivar additional_image_stores: read-only stores, in order
    :ivar sources: the origin of each field
    :ivar user: the name of a rootless store's owner
    :ivar files: the files that were read, in the order in which they were merged
    :ivar runtime: "cri-o" if the store is known to belong to CRI-O, for commands in messages; otherwise empty
    :ivar podman: the start of a podman command line for this store; only the program's name if
        podman uses the store by default
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
    auto_userns: AutoUserns = field(default_factory=AutoUserns)
    sources: t.Dict[str, str] = field(default_factory=dict)
    user: str = ""
    files: t.Tuple[str, ...] = ()
    runtime: str = ""
    podman: t.Tuple[str, ...] = field(default=("podman",), compare=False)

    def origin(self, name: str) -> str:
        """The origin of a field, a clause for messages."""
        source = self.sources.get(name, DEFAULT)
        if source == OPTION:
            return f"{name} is set as an option"
        if source == DEFAULT:
            read = ", ".join(self.files)
            return f"{name} is the default; " + (f"{read} sets none" if read else "no file sets it")
        return f"{name} is set by {source}"

    def missing(self) -> str:
        """What to do if this store does not exist, whole sentences; never a command that creates another store."""
        source = self.sources.get("graphroot", DEFAULT)
        if source == OPTION:
            return "Correct `graphroot`, or remove it to use the store of the runtime."
        ask = 'podman info --format "{{.Store.GraphRoot}}"'
        if self.runtime == CRI_O:
            ask = "crio status info"
        if self.user:
            runtime_dir = command(f"XDG_RUNTIME_DIR={os.path.dirname(self.runroot)}")
            ask = user_command(self.user, f"env {runtime_dir} {ask}")
        if source.startswith(DATABASE):
            return (
                "podman's database overrides storage.conf. If the store was moved, move it back, or reset podman. "
                f"Ask podman for its path: {ask}"
            )
        return f"Compare with the output of {ask}. If they differ, set `graphroot` and `runroot`."


# Variables without which podman may use another store.
_NAMING = (FILE_VARIABLE, OVERRIDE_VARIABLE, "STORAGE_DRIVER", "STORAGE_OPTS")
# Tried in this order if no driver is set; vfs is never used only because its directory exists.
_PRIORITY = ("overlay", "btrfs", "zfs", "vfs")


def discover(
    overrides: StoreOverrides,
    environ: t.Mapping[str, str],
    account: t.Optional[Account],
    rootless: bool,
    can: Capabilities,
) -> StoreConfig:
    """The store that a runtime would use with these options in this environment. Creates nothing.

    :param account: the owner of the store; not needed for the rootful store
    :param rootless: whether the runtime would run without root privileges on the host
    :param can: the capabilities of the runtime
    :raises ConfigError: a file is missing, unreadable or malformed, or settings contradict
    """
    rootless = rootless and not (account is not None and account.uid == 0)
    if rootless and account is None:
        raise ConfigError("rootless store", "belongs to no account", "Set `user`.")
    caller = Caller(
        environ,
        rootless,
        account.uid if account and rootless else 0,
        account.home if account else "/root",
        overrides.storage_conf,
    )
    found = _Discovery(overrides, caller, can).run()
    return replace(found, user=account.name) if account and rootless else found


def _is_same(path: str, other: str) -> bool:
    """Whether two paths name the same directory, also through a link or a bind mount."""
    try:
        return path == other or os.path.samefile(path, other)
    except OSError:
        return False


class _Discovery:
    def __init__(self, overrides: StoreOverrides, caller: Caller, can: Capabilities) -> None:
        self.overrides = overrides
        self.caller = caller
        self.can = can

    def run(self) -> StoreConfig:
        can, caller = self.can, self.caller
        settings = conf_merged.load(caller) if can.reads_drop_ins else conf_single.load(caller, can)
        if can.reads_crio_conf and not caller.rootless:
            conf_crio.load(settings, caller)
        self._override(settings)
        self._expand(settings)
        if can.keeps_database:
            self._merge_database(settings)
        graphroot = settings.graphroot
        if settings.imagestore and _is_same(settings.imagestore, graphroot):
            if settings.sources["graphroot"] == OPTION:
                raise ConfigError(
                    f"graphroot {graphroot}",
                    f"is the imagestore that {settings.sources['imagestore']} sets, in which another store keeps its "
                    "images",
                    "Leave out graphroot to use that store.",
                )
            raise ConfigError(
                settings.sources["imagestore"],
                f"sets {graphroot} as both graphroot and imagestore",
                "Remove `imagestore` or set it to another path.",
            )
        driver = settings.driver
        if not driver:
            driver = _picked_driver(settings)
            settings.sources["driver"] = "chosen as the runtime does"
        others = [name for name in DRIVER_OPTIONS if name != driver] if can.reads_drop_ins else []
        options, images, layers = split_options(driver, settings.options, others)
        given = [f"{driver}.{name}={value}" for name, value in options.items()]
        given += [f"{driver}.imagestore={path}" for path in images]
        return StoreConfig(
            graphroot=graphroot,
            runroot=settings.runroot,
            driver=driver,
            options=options,
            imagestore=settings.imagestore,
            additional_image_stores=images,
            additional_layer_stores=layers,
            transient=settings.transient,
            rootless=caller.rootless,
            auto_userns=settings.auto_userns,
            sources=settings.sources,
            files=settings.files,
            runtime=CRI_O if can.reads_crio_conf and not caller.rootless else "",
            podman=self._podman(graphroot, settings.runroot, driver, given),
        )

    def _podman(
        self, graphroot: str, runroot: str, driver: str, options: t.Sequence[str]
    ) -> t.Tuple[str, ...]:
        overrides = self.overrides
        if (
            overrides.graphroot
            or overrides.runroot
            or overrides.driver
            or overrides.storage_options
        ):
            argv = ["podman", "--root", graphroot, "--runroot", runroot]
            argv += ["--storage-driver", driver]
            for option in options:
                argv += ["--storage-opt", option]
            return tuple(argv)
        variables = {
            name: value
            for name, value in ((name, self.caller.environ.get(name)) for name in _NAMING)
            if value is not None
        }
        if self.caller.explicit_file:
            variables[FILE_VARIABLE] = self.caller.explicit_file
        if not variables:
            return ("podman",)
        return ("env", *(f"{name}={value}" for name, value in variables.items()), "podman")

    def _override(self, settings: Settings) -> None:
        """Apply --root, --runroot, --storage-driver and --storage-opt as podman does."""
        overrides = self.overrides
        for name in ("graphroot", "runroot"):
            path = getattr(overrides, name)
            if path:
                if not os.path.isabs(path):
                    raise ConfigError(f"{name} {path!r}", "is not an absolute path")
                setattr(settings, name, os.path.normpath(path))
                settings.sources[name] = OPTION
        if overrides.driver:
            settings.driver = canonical(overrides.driver)
            settings.sources["driver"] = OPTION
        if overrides.graphroot or overrides.driver:
            settings.options = []
            settings.sources["options"] = OPTION
        if overrides.storage_options:
            settings.options = [
                storage_option for storage_option in overrides.storage_options if storage_option
            ]
            settings.sources["options"] = OPTION

    def _expand(self, settings: Settings) -> None:
        for name in ("graphroot", "runroot"):
            source = settings.sources[name]
            if source != OPTION:
                setattr(settings, name, self.caller.expand(getattr(settings, name), name, source))
        if settings.imagestore and not os.path.isabs(settings.imagestore):
            raise ConfigError(
                settings.sources["imagestore"],
                f"sets imagestore to {settings.imagestore!r}, not an absolute path",
                "Correct the file.",
            )

    def _merge_database(self, settings: Settings) -> None:
        """Apply podman's database: it overrides the files, and the command line overrides it."""
        found = libpod_db.recorded(
            settings.graphroot, settings.runroot, settings.transient, self.can.sqlite_first
        )
        if found is None:
            return
        for name in ("graphroot", "runroot", "driver"):
            value = getattr(found, name)
            if value and not getattr(self.overrides, name) and value != getattr(settings, name):
                if name != "driver" and not os.path.isabs(value):
                    continue
                setattr(settings, name, value)
                settings.sources[name] = f"{DATABASE} {found.path}"


def _picked_driver(settings: Settings) -> str:
    """The driver that a runtime uses if none is set."""
    try:
        names = os.listdir(settings.graphroot)
    except OSError:
        names = []
    order = settings.priority or _PRIORITY
    for name in order:
        if name in names and (name != "vfs" or settings.priority):
            return name
    return order[0]
