# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""crio.conf and its drop-ins: the store of CRI-O, for which storage.conf only sets defaults.

Follows pkg/config and internal/criocli of CRI-O 1.20 to 1.36: the main file, then all files below the drop-in
directory in lexical order, then the variables of the service. An empty value keeps the earlier value, except for
imagestore, which it clears. The options of all files are combined.
"""

from __future__ import annotations

import contextlib
import os
import typing as t
from dataclasses import dataclass

from ..errors import ConfigError
from . import toml
from .conf_values import AutoUserns, Caller, Checked, Settings, canonical, read_file

MAIN_FILE = "/etc/crio/crio.conf"
DROP_IN_FOLDER = "/etc/crio/crio.conf.d"
FILE_VARIABLE = "CONTAINER_CONFIG"
FOLDER_VARIABLE = "CONTAINER_CONFIG_DIR"
# Field of Settings: the key of [crio], and the variable that overrides it.
_KEYS: t.Mapping[str, t.Tuple[str, str]] = {
    "graphroot": ("root", "CONTAINER_ROOT"),
    "runroot": ("runroot", "CONTAINER_RUNROOT"),
    "driver": ("storage_driver", "CONTAINER_STORAGE_DRIVER"),
    "imagestore": ("imagestore", "CONTAINER_IMAGESTORE"),
}
_OPTIONS, _OPTIONS_VARIABLE = "storage_option", "CONTAINER_STORAGE_OPT"
_PAUSE_VARIABLE = "CONTAINER_PAUSE_IMAGE"
_CORRECT = "Correct the file; `crio config` shows the configuration in effect."


@dataclass(frozen=True)
class CrioFile:
    """The settings of one file for CRI-O's store.

    :ivar values: by field of Settings; None if the file does not have the key
    :ivar options: driver options, NAME=VALUE
    :ivar pause_image: the image of the infrastructure containers of pods
    """

    path: str
    values: t.Mapping[str, t.Optional[str]]
    options: t.Tuple[str, ...]
    pause_image: str


def load(settings: Settings, caller: Caller) -> Settings:
    """Apply CRI-O's own settings.

    :param settings: the settings of storage.conf; modified
    :raises ConfigError: a file is unreadable or malformed
    """
    # CRI-O uses no other key of storage.conf for its store.
    settings.transient, settings.priority, settings.auto_userns = False, (), AutoUserns()
    named = caller.environ.get(FILE_VARIABLE)
    read = []
    for path in files(caller.environ):
        if path == named or os.path.lexists(path):
            _apply(settings, read_crio_file(path))
            read.append(path)
    for field, (_key, variable) in _KEYS.items():
        if caller.environ.get(variable):
            setattr(settings, field, caller.environ[variable])
            settings.sources[field] = variable
    if caller.environ.get(_OPTIONS_VARIABLE):
        settings.options = caller.environ[_OPTIONS_VARIABLE].split(",")
        settings.sources["options"] = _OPTIONS_VARIABLE
    settings.driver = canonical(settings.driver)
    settings.files = (*settings.files, *read)
    return settings


def files(environ: t.Mapping[str, str]) -> t.Iterator[str]:
    """The files, later ones taking precedence; the main file may not exist.

    :raises ConfigError: the drop-in directory cannot be read
    """
    yield environ.get(FILE_VARIABLE) or MAIN_FILE
    folder = environ.get(FOLDER_VARIABLE) or DROP_IN_FOLDER
    if os.path.isdir(folder):
        yield from _below(folder)


def pause_image(environ: t.Mapping[str, str]) -> str:
    """The image of the infrastructure containers of pods; empty for CRI-O's default, or if the file is malformed."""
    found = ""
    with contextlib.suppress(ConfigError):
        for path in files(environ):
            if os.path.lexists(path):
                found = read_crio_file(path).pause_image or found
    return environ.get(_PAUSE_VARIABLE) or found


def read_crio_file(path: str) -> CrioFile:
    """Parse a file.

    :raises ConfigError: it is unreadable or malformed
    """
    try:
        checked = Checked(path)
        table = checked.table(read_file(path), "crio")
        values = {field: _text(path, table, key) for field, (key, _name) in _KEYS.items()}
        options = checked.texts(table, _OPTIONS)
        pause_image = _text(path, checked.table(table, "image"), "pause_image") or ""
    except ConfigError as error:
        raise ConfigError(path, error.cause, _CORRECT, path=path) from error
    return CrioFile(path, values, tuple(options), pause_image)


def _text(path: str, table: toml.Table, key: str) -> t.Optional[str]:
    return Checked(path).text(table, key)


def _apply(settings: Settings, file: CrioFile) -> None:
    for field, value in file.values.items():
        if value or (field == "imagestore" and value is not None):
            setattr(settings, field, value)
            settings.sources[field] = file.path
    if file.options:
        # If an option occurs twice, the last one is used.
        last = dict.fromkeys(reversed([*settings.options, *file.options]))
        settings.options = list(reversed(last))
        settings.sources["options"] = file.path


def _below(folder: str) -> t.Iterator[str]:
    """All files below a directory, in the order of the full path; links to directories are not followed."""
    try:
        names = sorted(os.listdir(folder), key=os.fsencode)
    except OSError as error:
        raise ConfigError(
            folder, f"cannot be read: {error.strerror}", "Check its permissions.", path=folder
        ) from error
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            yield from _below(path)
        else:
            yield path
