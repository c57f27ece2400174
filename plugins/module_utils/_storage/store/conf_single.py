# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration loader of containers/storage before 1.63, which reads a single file.

Follows containers/storage 1.38 to 1.62 (pkg/config, types/options.go).
"""

from __future__ import annotations

import os
import re
import typing as t

from ..capabilities import Capabilities, rootless_overlay
from ..errors import ConfigError
from . import conf_values, toml
from .conf_values import (
    COMMON_OPTIONS,
    DRIVER_OPTIONS,
    FILE_VARIABLE,
    STORE_LISTS,
    AutoUserns,
    Caller,
    Checked,
    Settings,
    canonical,
    is_there,
    read_file,
)

_ROOTLESS_DRIVERS = ("btrfs", "overlay", "overlay2", "vfs")


def load(caller: Caller, can: Capabilities) -> Settings:
    """The settings that a runtime reads.

    :raises ConfigError: a file is missing, unreadable or malformed
    """
    return _Loader(caller, can).run()


class _Loader:
    def __init__(self, caller: Caller, can: Capabilities) -> None:
        self.caller = caller
        self.can = can
        self.files: t.List[str] = []

    def run(self) -> Settings:
        if not self.caller.named_file and self.caller.environ.get(FILE_VARIABLE) == "":
            raise ConfigError(
                FILE_VARIABLE,
                "is set but empty, and runtimes of this host do not start with it",
                f"Unset {FILE_VARIABLE} in the environment, or set it to the path of a file.",
            )
        settings = self._rootless() if self.caller.rootless else self._rootful()
        settings.files = tuple(dict.fromkeys(self.files))
        return settings

    def _rootful(self) -> Settings:
        explicit = self.caller.explicit_file
        settings = self._read(explicit) if explicit else self._system()
        settings.default("graphroot", conf_values.GRAPHROOT)
        settings.default("runroot", conf_values.RUNROOT)
        return settings

    def _system(self) -> Settings:
        candidates = [conf_values.ADMIN_FILE, conf_values.VENDOR_FILE]
        by_default = self.can.sets_config_home and self.caller.rootless
        if self.caller.environ.get("XDG_CONFIG_HOME") or by_default:
            candidates.insert(0, self.caller.config_file())
        for path in candidates:
            if is_there(path):
                return self._read(path)
        # Without a file, variables are not used either.
        return Settings()

    def _rootless(self) -> Settings:
        explicit = self.caller.explicit_file
        system = self._read(explicit) if explicit else self._system()
        inherited = self._inherited(system, bool(explicit))
        path = explicit or self.caller.config_file()
        if not is_there(path) or (explicit and not self.can.named_file_sets_paths):
            return inherited
        settings = self._read(path)
        settings.default("runroot", inherited.runroot, inherited.sources["runroot"])
        if settings.rootless_path:
            source = settings.sources["rootless_path"]
            settings.default("graphroot", settings.rootless_path, source)
        settings.default("graphroot", inherited.graphroot, inherited.sources["graphroot"])
        return settings

    def _inherited(self, system: Settings, explicit: bool) -> Settings:
        """The settings of a user without a file of their own: few settings of the system's file.

        :param explicit: ``system`` is a file that was named explicitly; all of its options are used
        """
        environ = self.caller.environ
        result = Settings()
        result.default("runroot", self.caller.runtime_folder())
        if system.rootless_path:
            result.default("graphroot", system.rootless_path, system.sources["rootless_path"])
        result.default("graphroot", self.caller.data_folder())
        if environ.get("STORAGE_DRIVER"):
            result.default("driver", canonical(environ["STORAGE_DRIVER"]), "STORAGE_DRIVER")
        elif system.driver in _ROOTLESS_DRIVERS:
            result.default("driver", system.driver, system.sources["driver"])
        if explicit:
            result.options = list(system.options)
            if self.can.rootless_prefers_overlay and system.imagestore:
                result.default("imagestore", system.imagestore, system.sources["imagestore"])
        elif result.driver == "overlay":
            kept = [option for option in system.options if "ignore_chown_errors" in option]
            result.options = kept[:1]
        if result.options:
            result.sources["options"] = system.sources["options"]
        if environ.get("STORAGE_OPTS"):
            result.options = result.options + environ["STORAGE_OPTS"].split(",")
            result.sources["options"] = "STORAGE_OPTS"
        if not result.driver:
            if self.can.rootless_inherits_priority:
                result.priority = system.priority
            if not result.priority:
                result.default(
                    "driver", self._rootless_driver(result), "chosen as the runtime does"
                )
        return result

    def _rootless_driver(self, settings: Settings) -> str:
        if not self.can.rootless_prefers_overlay:
            return "vfs"
        source = settings.sources["graphroot"]
        try:
            names = sorted(os.listdir(self.caller.expand(settings.graphroot, "graphroot", source)))
        except (OSError, ConfigError):
            # A path that cannot be expanded is an error only if it is used.
            names = []
        for name in names:
            if name.endswith("-images"):
                return canonical(name[: -len("-images")])
        return "overlay" if _rootless_overlay(self.caller.environ) else "vfs"

    def _read(self, path: str) -> Settings:
        content = read_file(path)
        self.files.append(path)
        driver = self.caller.environ.get("STORAGE_DRIVER", "")
        settings = _settings_of(content, path, driver)
        if not self.can.reads_transient_store:
            settings.transient, settings.priority = False, ()
        return self._with_environment(settings)

    def _with_environment(self, settings: Settings) -> Settings:
        driver = self.caller.environ.get("STORAGE_DRIVER")
        if driver:
            settings.driver = driver
            settings.sources["driver"] = "STORAGE_DRIVER"
        settings.driver = canonical(settings.driver)
        if "STORAGE_OPTS" in self.caller.environ:
            text = self.caller.environ["STORAGE_OPTS"]
            settings.options = text.split(",") if text else []
            settings.sources["options"] = "STORAGE_OPTS"
        return settings


def _settings_of(content: toml.Table, path: str, driver: str) -> Settings:
    """The settings of a parsed storage.conf, with driver options in the order of containers/storage.

    :param driver: the driver that replaces that of the file, if any
    """
    reader = Checked(path)
    storage = reader.table(content, "storage")
    options = reader.table(storage, "options")
    settings = Settings(
        graphroot=reader.text(storage, "graphroot") or "",
        runroot=reader.text(storage, "runroot") or "",
        driver=driver or reader.text(storage, "driver") or "",
        priority=tuple(reader.texts(storage, "driver_priority")),
        rootless_path=reader.text(storage, "rootless_storage_path") or "",
        imagestore=reader.text(storage, "imagestore") or "",
        transient=reader.flag(storage, "transient_store") or False,
    )
    driver = settings.driver
    for name, key in STORE_LISTS:
        settings.options += [f"{driver}.{key}={text}" for text in reader.texts(options, name)]
    for name in COMMON_OPTIONS:
        value = reader.text(options, name)
        if value:
            settings.options.append(f"{driver}.{name}={value}")
    mask = Checked.find(options, "force_mask")
    if isinstance(mask, int) and not isinstance(mask, bool) and mask > 0:
        settings.options.append(f"{driver}.force_mask={mask:o}")
    value = reader.text(options, "mountopt")
    if value:
        settings.options.append(f"{driver}.mountopt={value}")
    own = reader.table(options, canonical(driver)) if driver else {}
    for name in DRIVER_OPTIONS.get(canonical(driver), ()):
        value = reader.text(own, name)
        if value:
            settings.options.append(f"{driver}.{name}={value}")
    # Empty and 0 mean the default, as in containers/storage.
    usual = settings.auto_userns
    settings.auto_userns = AutoUserns(
        minimum=reader.number(options, "auto-userns-min-size") or usual.minimum,
        maximum=reader.number(options, "auto-userns-max-size") or usual.maximum,
        owner=reader.text(options, "root-auto-userns-user") or usual.owner,
    )
    for name in ("graphroot", "runroot", "driver", "imagestore"):
        if getattr(settings, name):
            settings.sources[name] = path
    if settings.rootless_path:
        settings.sources["rootless_path"] = f"{path} (rootless_storage_path)"
    if settings.options:
        settings.sources["options"] = path
    return settings


def _rootless_overlay(environ: t.Mapping[str, str]) -> bool:
    folders = (environ.get("PATH") or os.defpath).split(os.pathsep)
    if any(os.access(os.path.join(folder, "fuse-overlayfs"), os.X_OK) for folder in folders):
        return True
    release = re.match(r"([0-9]+)\.([0-9]+)", os.uname().release)
    return release is not None and rootless_overlay(tuple(map(int, release.groups())))
