# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration loader of containers/storage 1.63 and later: main file, drop-ins and an override, merged.

Follows containers/storage 1.63 and 1.64 (pkg/configfile/parse.go, types/options.go).
"""

from __future__ import annotations

import os
import typing as t

from ..errors import ConfigError
from . import conf_values, toml
from .conf_values import (
    COMMON_OPTIONS,
    DRIVER_OPTIONS,
    OVERRIDE_VARIABLE,
    STORE_LISTS,
    AutoUserns,
    Caller,
    Checked,
    Settings,
    canonical,
    is_there,
    read_file,
)

_SUFFIX = ".conf"
_TEXTS = ("driver", "graphroot", "runroot", "rootless_storage_path", "imagestore")
_NUMBERS = ("auto-userns-min-size", "auto-userns-max-size")
_OWNER = "root-auto-userns-user"

# A value and the file that set it.
_Value = t.Tuple[t.Any, str]


def load(caller: Caller) -> Settings:
    """The settings that a runtime reads.

    :raises ConfigError: a file is missing, unreadable or malformed
    """
    merged = _Merged()
    files = _files(caller)
    for path in files:
        merged.add(read_file(path), path)
    settings = merged.settings(caller)
    settings.files = tuple(files)
    return settings


def _files(caller: Caller) -> t.List[str]:
    """The files that are read, in the order in which they are merged."""
    explicit = caller.explicit_file
    result = [explicit] if explicit else [*_main_file(caller), *_drop_ins(caller)]
    override = caller.environ.get(OVERRIDE_VARIABLE, "")
    return [*result, override] if override else result


def _main_file(caller: Caller) -> t.List[str]:
    for path in (caller.config_file(), conf_values.ADMIN_FILE, conf_values.VENDOR_FILE):
        if is_there(path):
            return [path]
    return []


def _drop_ins(caller: Caller) -> t.List[str]:
    """The drop-ins sorted by name; of files with the same name in several folders, only that of the last folder is
    used."""
    found: t.Dict[str, str] = {}
    for folder in drop_in_folders(caller):
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ConfigError(
                folder, f"cannot be read: {error.strerror}", "Check its path and permissions."
            ) from error
        for entry in entries:
            if entry.name.endswith(_SUFFIX) and not entry.is_dir(follow_symlinks=False):
                found[entry.name] = entry.path
    # A broken link is ignored, although it masks other files of its name.
    return [path for _name, path in sorted(found.items()) if is_there(path)]


def drop_in_folders(caller: Caller) -> t.List[str]:
    """The folders of drop-ins, from the least to the most important."""
    result = []
    for main in (conf_values.VENDOR_FILE, conf_values.ADMIN_FILE):
        special = f"{main[: -len(_SUFFIX)]}.{'rootless' if caller.uid else 'rootful'}{_SUFFIX}.d"
        result += [f"{main}.d", special]
        if caller.uid:
            result.append(os.path.join(special, str(caller.uid)))
    return [*result, f"{caller.config_file()}.d"]


class _Merged:
    """Files merged key by key; later files take precedence."""

    def __init__(self) -> None:
        self.storage: t.Dict[str, _Value] = {}
        self.options: t.Dict[str, _Value] = {}
        self.drivers: t.Dict[str, t.Dict[str, _Value]] = {name: {} for name in DRIVER_OPTIONS}
        self.lists: t.Dict[str, t.List[str]] = {}
        self.list_sources: t.Dict[str, str] = {}
        # Once a list was appended to, later files append to it too, unless they set the attribute to false.
        self.appending: t.Dict[str, bool] = {}

    def add(self, content: toml.Table, path: str) -> None:
        """Merge another file."""
        reader = Checked(path)
        storage = reader.table(content, "storage")
        options = reader.table(storage, "options")
        self._texts(reader, storage, _TEXTS, self.storage)
        flag = reader.flag(storage, "transient_store")
        if flag is not None:
            self.storage["transient_store"] = (flag, path)
        self._list(reader, storage, "driver_priority")
        for name, _key in STORE_LISTS:
            self._list(reader, options, name)
        self._texts(reader, options, (*COMMON_OPTIONS, "mountopt", _OWNER), self.options)
        for name in _NUMBERS:
            number = reader.number(options, name)
            if number is not None:
                self.options[name] = (number, path)
        mask = Checked.find(options, "force_mask")
        if isinstance(mask, int) and not isinstance(mask, bool):
            self.options["force_mask"] = (mask, path)
        for driver, names in DRIVER_OPTIONS.items():
            self._texts(reader, reader.table(options, driver), names, self.drivers[driver])

    @staticmethod
    def _texts(
        reader: Checked, table: toml.Table, names: t.Iterable[str], values: t.Dict[str, _Value]
    ) -> None:
        for name in names:
            text = reader.text(table, name)
            if text is not None:
                values[name] = (text, reader.path)

    def _list(self, reader: Checked, table: toml.Table, name: str) -> None:
        found = reader.appended(table, name)
        if found is None:
            return
        texts, append = found
        if append is not None:
            self.appending[name] = append
        before = self.lists.get(name, []) if self.appending.get(name) else []
        self.lists[name] = [*before, *texts]
        self.list_sources[name] = reader.path

    def settings(self, caller: Caller) -> Settings:
        """The merged settings of the files and the environment."""
        settings = Settings(priority=tuple(self.lists.get("driver_priority", ())))
        if caller.environ.get("STORAGE_DRIVER"):
            settings.default("driver", caller.environ["STORAGE_DRIVER"], "STORAGE_DRIVER")
        for name in ("driver", "graphroot", "runroot", "imagestore"):
            value, path = self.storage.get(name, ("", ""))
            if value:
                settings.default(name, value, path)
        settings.driver = canonical(settings.driver)
        value, path = self.storage.get("rootless_storage_path", ("", ""))
        if value and caller.rootless:
            settings.default("graphroot", value, f"{path} (rootless_storage_path)")
        if caller.rootless:
            settings.default("graphroot", caller.data_folder())
            settings.default("runroot", caller.runtime_folder())
        settings.default("graphroot", conf_values.GRAPHROOT)
        settings.default("runroot", conf_values.RUNROOT)
        settings.transient = bool(self.storage.get("transient_store", (False, ""))[0])
        settings.auto_userns = self._auto_userns()
        self._driver_options(settings, caller.environ)
        return settings

    def _auto_userns(self) -> AutoUserns:
        usual = AutoUserns()
        minimum, maximum, owner = (
            self.options.get(name, (None, ""))[0] for name in (*_NUMBERS, _OWNER)
        )
        return AutoUserns(minimum or usual.minimum, maximum or usual.maximum, owner or usual.owner)

    def _driver_options(self, settings: Settings, environ: t.Mapping[str, str]) -> None:
        sources = []
        for name, key in STORE_LISTS:
            settings.options += [f"{key}={item}" for item in self.lists.get(name, ())]
            sources += [self.list_sources[name]] if name in self.list_sources else []
        for name in (*COMMON_OPTIONS, "force_mask", "mountopt"):
            value, path = self.options.get(name, ("", ""))
            if value:
                text = f"{value:o}" if isinstance(value, int) else value
                settings.options.append(f"{name}={text}")
                sources.append(path)
        for driver, names in DRIVER_OPTIONS.items():
            for name in names:
                value, path = self.drivers[driver].get(name, ("", ""))
                if value:
                    settings.options.append(f"{driver}.{name}={value}")
                    sources.append(path)
        if sources:
            settings.sources["options"] = ", ".join(dict.fromkeys(sources))
        if "STORAGE_OPTS" in environ:
            settings.options = [part for part in environ["STORAGE_OPTS"].split(",") if part]
            settings.sources["options"] = "STORAGE_OPTS"
