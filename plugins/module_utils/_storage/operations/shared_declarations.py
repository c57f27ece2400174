# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Declarations of shared stores in files below /etc: which images are shared with which users."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import typing as t
from dataclasses import asdict, dataclass, field

from ..errors import ConfigError
from ..kernel.oserrors import translate_error_of_root_file
from .mapping_options import OPTIONS, MappingOptions
from .options import given

UNIT = "userns-storage.service"
GRAPHROOT = "/var/lib/userns-storage/images"
# All paths here and the folders above them belong to root. This path is short, because the paths of all layers
# of a container must fit into one page when they are mounted. Errors about a missing mount contain it, and
# therefore the name of the unit that creates the mounts.
STORES = f"/var/lib/{UNIT}"


def store_key(graphroot: str) -> str:
    """A short, stable name for a real store."""
    return hashlib.sha256(os.fsencode(graphroot)).hexdigest()[:4]


_DECLARATIONS = "/etc/userns-storage/shared"
# See store_key().
_NAME = re.compile(r"[0-9a-f]{4}\.json")
_LARGEST_DECLARATION = 1 << 20


@dataclass(frozen=True)
class Share:
    """The images and mappings that are shared with a user."""

    uid: int
    images: t.Tuple[str, ...]
    mappings: t.Tuple[MappingOptions, ...]


@dataclass(frozen=True)
class Declaration:
    """The declaration for a real store: the content of a file below /etc."""

    graphroot: str
    runroot: str
    driver: str
    storage_conf: str = ""
    storage_options: t.Tuple[str, ...] = ()
    users: t.Mapping[str, Share] = field(default_factory=dict)


def read_declaration(graphroot: str) -> t.Optional[Declaration]:
    """Read the declaration for a real store; None if there is none.

    :raises ConfigError: the file was not written by this collection
    :raises StorageError: it cannot be read
    """
    return _read(_declaration_path(graphroot))


def _read(path: str) -> t.Optional[Declaration]:
    with translate_error_of_root_file(path):
        try:
            with open(path, "rb") as file:
                data = file.read(_LARGEST_DECLARATION)
        except FileNotFoundError:
            return None
    try:
        content = json.loads(data)
        users = {
            name: Share(
                int(share["uid"]),
                tuple(share["images"]),
                tuple(MappingOptions(**given(OPTIONS, mapping)) for mapping in share["mappings"]),
            )
            for name, share in content.pop("users").items()
        }
        content["storage_options"] = tuple(content["storage_options"])
        return Declaration(**content, users=users)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            path,
            f"cannot be read: {error}",
            "Move it away and run the task again that shares the images.",
        ) from error


def declarations() -> t.List[Declaration]:
    """All declarations of this host, in the order of their file names.

    :raises ConfigError: a file was not written by this collection
    :raises StorageError: a file cannot be read
    """
    names: t.List[str] = []
    with translate_error_of_root_file(_DECLARATIONS), contextlib.suppress(FileNotFoundError):
        names = sorted(os.listdir(_DECLARATIONS))
    # Files with other names are not declarations.
    paths = [os.path.join(_DECLARATIONS, name) for name in names if _NAME.fullmatch(name)]
    found = [(path, _read(path)) for path in paths]
    # Copies under other names do not count.
    return [
        declaration
        for path, declaration in found
        if declaration is not None and path == _declaration_path(declaration.graphroot)
    ]


def _declaration_path(graphroot: str) -> str:
    return os.path.join(_DECLARATIONS, f"{store_key(graphroot)}.json")


def write_declaration(declaration: Declaration) -> None:
    """Write the file of a declaration, or remove it if it has no users left.

    :raises StorageError: it cannot be written
    """
    path = _declaration_path(declaration.graphroot)
    with translate_error_of_root_file(path):
        if declaration.users:
            _write(path, declaration)
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        with contextlib.suppress(OSError):
            for folder in (_DECLARATIONS, os.path.dirname(_DECLARATIONS)):
                os.rmdir(folder)


def _write(path: str, declaration: Declaration) -> None:
    content = asdict(declaration)
    os.makedirs(_DECLARATIONS, 0o755, exist_ok=True)
    data = json.dumps(content, indent=2, sort_keys=True) + "\n"
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(data)
        file.flush()
        os.fdatasync(file.fileno())
    os.rename(temporary, path)
