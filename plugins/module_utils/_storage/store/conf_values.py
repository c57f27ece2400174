# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Common parts of both loaders of storage.conf: settings, caller, reading and checking of files."""

from __future__ import annotations

import copy
import functools
import os
import re
import typing as t
from dataclasses import dataclass, field

from ..errors import ConfigError
from ..kernel import files
from . import toml

STORAGE_CONF = "containers/storage.conf"
ADMIN_FILE = "/etc/containers/storage.conf"
VENDOR_FILE = "/usr/share/containers/storage.conf"
GRAPHROOT = "/var/lib/containers/storage"
RUNROOT = "/run/containers/storage"
FILE_VARIABLE = "CONTAINERS_STORAGE_CONF"
OVERRIDE_VARIABLE = "CONTAINERS_STORAGE_CONF_OVERRIDE"

# Options of [storage.options] that set the driver's own options of the same name.
COMMON_OPTIONS = ("size", "mount_program", "skip_mount_home", "ignore_chown_errors")
DRIVER_OPTIONS: t.Dict[str, t.Tuple[str, ...]] = {
    "btrfs": ("min_space", "size"),
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
    "zfs": ("fsname", "mountopt", "size"),
}
STORE_LISTS = (
    ("additionalimagestores", "imagestore"),
    ("additionallayerstores", "additionallayerstore"),
)

_SIZE_LIMIT = 1024 * 1024


@dataclass(frozen=True)
class AutoUserns:
    """The settings of storage.conf for ``userns=auto``.

    :ivar minimum: ``auto-userns-min-size``, in IDs
    :ivar maximum: ``auto-userns-max-size``, in IDs
    :ivar owner: ``root-auto-userns-user``: the name in /etc/subuid and /etc/subgid whose ranges
        root's containers take
    """

    minimum: int = 1024
    maximum: int = 65536
    owner: str = "containers"


@dataclass
class Settings:
    """The settings that a runtime reads from files and environment; paths as written.

    :ivar graphroot: empty for none
    :ivar priority: drivers to try, in order, if ``driver`` is empty
    :ivar options: driver options in the runtime's order, NAME=VALUE
    :ivar sources: the origin of each field that is set: a file with the key, or a variable
    :ivar files: all files that were read, in order
    """

    graphroot: str = ""
    runroot: str = ""
    driver: str = ""
    priority: t.Tuple[str, ...] = ()
    rootless_path: str = ""
    imagestore: str = ""
    transient: bool = False
    options: t.List[str] = field(default_factory=list)
    auto_userns: AutoUserns = AutoUserns()
    sources: t.Dict[str, str] = field(default_factory=dict)
    files: t.Tuple[str, ...] = ()

    def default(self, name: str, value: str, source: str = "default") -> None:
        """Set a field that is not set yet."""
        if not getattr(self, name):
            setattr(self, name, value)
            self.sources[name] = source


@dataclass(frozen=True)
class Caller:
    """The user and the environment of the runtime.

    :ivar named_file: the file given as an option instead of CONTAINERS_STORAGE_CONF; empty for none
    :ivar uid: host UID, 0 for the rootful store
    """

    environ: t.Mapping[str, str]
    rootless: bool
    uid: int
    account_home: str
    named_file: str = ""

    @property
    def explicit_file(self) -> str:
        """The file that is read instead of all others; empty for none."""
        return self.named_file or self.environ.get(FILE_VARIABLE, "")

    @property
    def home(self) -> str:
        """Home directory."""
        return self.environ.get("HOME") or self.account_home

    def config_file(self) -> str:
        """The user's own storage.conf."""
        base = self.environ.get("XDG_CONFIG_HOME") or os.path.join(self.home, ".config")
        return os.path.join(base, STORAGE_CONF)

    def data_folder(self) -> str:
        """The default location of a rootless store."""
        data = self.environ.get("XDG_DATA_HOME")
        if not data:
            data = os.path.join(os.path.realpath(self.home), ".local", "share")
        return os.path.join(data, "containers", "storage")

    def runtime_folder(self) -> str:
        """The default runroot of a rootless store."""
        given = self.environ.get("XDG_RUNTIME_DIR")
        if given:
            return os.path.join(os.path.realpath(given), "containers")
        usual = f"/run/user/{self.uid}"
        if _private_to(usual, self.uid):
            return os.path.join(usual, "containers")
        base = self.environ.get("TMPDIR") or "/tmp"
        names = [f"{name}-{self.uid}" for name in ("storage-run", "podman-run", "containers-user")]
        for name in names:
            if _private_to(os.path.join(base, name), self.uid):
                return os.path.join(base, name, "containers")
        return os.path.join(base, names[0], "containers")

    def expand(self, path: str, name: str, source: str) -> str:
        """A path of storage.conf with its variables replaced, as runtimes do.

        :param name: of the setting
        :param source: the origin of the setting
        :raises ConfigError: it is not absolute, or a variable is not set
        """
        if "\0" in path:
            raise ConfigError(source, f"has a NUL in {name}", "Correct the file.")
        missing: t.List[str] = []

        def value(match: t.Match[str]) -> str:
            variable = match.group(1) or match.group(2) or ""
            if variable not in self.environ:
                missing.append(variable)
            return self.environ.get(variable, "")

        written = path
        path = path.replace("$UID", str(self.uid))
        path = re.sub(r"\$(?:\{([^}]*)\}|([A-Za-z0-9_]+))", value, path)
        if missing:
            raise ConfigError(
                source,
                f"sets {name} to {written!r}, but the variable {missing[0]} is not set",
                f"Set {missing[0]} in the task's environment as it is where the runtime starts, or "
                "set the path in `graphroot` and `runroot`.",
                variable=missing[0],
            )
        if not os.path.isabs(path):
            raise ConfigError(
                source, f"sets {name} to {path!r}, not an absolute path", "Correct the file."
            )
        return os.path.realpath(path) if os.path.exists(path) else os.path.normpath(path)


def is_there(path: str) -> bool:
    """Whether a file exists; symbolic links are followed.

    :raises ConfigError: unknown, as in a directory that this process may not enter
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(
            path, f"cannot be read: {error.strerror}", "Check its path and permissions."
        ) from error
    return True


def read_file(path: str) -> toml.Table:
    """Parse a storage.conf.

    :raises ConfigError: it is missing, unreadable, too large or not TOML
    """
    try:
        # The file may be a link, as in home directories with managed dotfiles.
        data = files.read_regular(path, _SIZE_LIMIT, follow=True, null=True)
    except FileNotFoundError:
        raise ConfigError(
            path,
            "does not exist",
            f"Correct `storage_conf`, {FILE_VARIABLE} or {OVERRIDE_VARIABLE}.",
        ) from None
    except OSError as error:
        raise ConfigError(
            path, f"cannot be read: {error.strerror}", "Check its path and permissions."
        ) from error
    # Callers may modify the result.
    return copy.deepcopy(_parsed(data, path))


@functools.lru_cache(maxsize=64)
def _parsed(data: bytes, path: str) -> toml.Table:
    """The parsed content, cached because runs for many users read the same files."""
    return toml.loads(data, path)


class Checked:
    """Reads values from tables; a value of a wrong type is an error, as it is for runtimes.

    Keys are case-insensitive, as for runtimes.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def _wrong(self, key: str, kind: str) -> ConfigError:
        return ConfigError(
            self.path,
            f"sets {key!r} to something that is not {kind}",
            "Correct the file; man 5 containers-storage.conf shows its form.",
            path=self.path,
        )

    @staticmethod
    def find(table: toml.Table, key: str) -> t.Any:
        """A value; None if the key is absent."""
        if key in table:
            return table[key]
        return next((value for name, value in table.items() if name.lower() == key), None)

    def table(self, table: toml.Table, key: str) -> toml.Table:
        """A table; empty if absent. Tables whose names differ only in case are the same table."""
        result: toml.Table = {}
        for name, value in table.items():
            if name.lower() == key:
                if not isinstance(value, dict):
                    raise self._wrong(key, "a table")
                result.update(value)
        return result

    def text(self, table: toml.Table, key: str) -> t.Optional[str]:
        """A text; None if absent."""
        value = self.find(table, key)
        if value is not None and not _is_text(value):
            raise self._wrong(key, "a text in quotes without NUL characters")
        text: t.Optional[str] = value
        return text

    def texts(self, table: toml.Table, key: str) -> t.List[str]:
        """A list of texts; empty if absent."""
        value = self.find(table, key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(map(_is_text, value)):
            raise self._wrong(key, "a list of texts without NUL characters")
        return value

    def appended(
        self, table: toml.Table, key: str
    ) -> t.Optional[t.Tuple[t.List[str], t.Optional[bool]]]:
        """A list of texts that may contain ``{append = true}``: the texts and that attribute; None if absent."""
        value = self.find(table, key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self._wrong(key, "a list of texts")
        texts: t.List[str] = []
        append: t.Optional[bool] = None
        for item in value:
            if _is_text(item):
                texts.append(item)
            elif (
                isinstance(item, dict)
                and not item.keys() - {"append"}
                and all(isinstance(value, bool) for value in item.values())
            ):
                append = item.get("append", append)
            else:
                raise self._wrong(key, "a list of texts, with {append = true} at most")
        return texts, append

    def flag(self, table: toml.Table, key: str) -> t.Optional[bool]:
        """True or false; None if absent."""
        value = self.find(table, key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def number(self, table: toml.Table, key: str) -> t.Optional[int]:
        """A number of IDs; None if absent."""
        value = self.find(table, key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
            raise self._wrong(key, "a whole number below 4294967296")
        return value


def _is_text(value: t.Any) -> bool:
    # Paths and options cannot contain NUL.
    return isinstance(value, str) and "\0" not in value


def canonical(driver: str) -> str:
    """The driver's name; overlay2 is an alias of overlay."""
    return "overlay" if driver == "overlay2" else driver


def split_options(
    driver: str, options: t.Iterable[str], others: t.Collection[str] = ()
) -> t.Tuple[t.Dict[str, str], t.Tuple[str, ...], t.Tuple[str, ...]]:
    """Split driver options as runtimes write them; the last option of a name is used.

    :param others: drivers whose options are ignored
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
        else:
            if canonical(name.partition(".")[0]) in others and "." in name:
                continue
        if name in ("imagestore", "additionalimagestore"):
            images += [os.path.normpath(part) for part in value.split(",") if part]
        elif name == "additionallayerstore":
            layers += [part for part in value.split(",") if part]
        elif name:
            result[name] = value
    return result, tuple(dict.fromkeys(images)), tuple(dict.fromkeys(layers))


def _private_to(path: str, uid: int) -> bool:
    """Whether a runtime would trust the directory: owned by the user, not writable for others."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return found.st_uid == uid and found.st_mode & 0o722 == 0o700
