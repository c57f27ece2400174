# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""Configure additional image stores, which root maintains, in the configuration of a user's runtimes.

From containers/storage 1.63 on there are drop-ins for one UID below /etc, see containers-storage.conf(5). Earlier
versions ignore additional stores in /etc when they run for a user, so the user's own file must name them.
"""

from __future__ import annotations

import contextlib
import json
import os
import typing as t

from ..kernel.oserrors import translate_oserror
from ..store.config import Account
from . import storage_conf
from .storage_conf import ConfRequest

_FOLDER = "/etc/containers/storage.rootless.conf.d"
_NAME = "50-userns-storage-shared.conf"


class RuntimeConfiguration:
    """The configuration of additional image stores for the runtimes of one user.

    :param folder: the folder of all stores that root maintains for this user
    :param drop_ins: whether the runtimes read drop-ins; if not, the user's own file is edited as that user
    :ivar listed: the configured additional image stores of the user; only needed without drop-ins
    """

    def __init__(self, account: Account, folder: str, drop_ins: bool) -> None:
        self._account = account
        self._prefix = os.path.join(folder, "")
        self._drop_ins = drop_ins
        self._path = os.path.join(_FOLDER, str(account.uid), _NAME)
        self.listed: t.Tuple[str, ...] = ()

    def differs(self, stores: t.Sequence[str]) -> bool:
        """Whether the configuration differs from these stores. Writes nothing."""
        if not self._drop_ins:
            return self._expected(stores) != list(self.listed)
        try:
            with open(self._path, encoding="utf-8") as file:
                return file.read() != (_drop_in(stores) if stores else "")
        except FileNotFoundError:
            return bool(stores)
        except (OSError, UnicodeDecodeError):
            return True

    def write(self, stores: t.Sequence[str]) -> str:
        """Configure these stores, and no other stores that root maintains.

        :returns: the file with the configuration
        :raises StorageError: it cannot be written
        """
        if self._drop_ins:
            _write_drop_in(self._path, stores)
            return self._path
        settings: t.Dict[str, t.Any] = {}
        if self.differs(stores):
            settings["additionalimagestores"] = self._expected(stores)
        request = ConfRequest(account=self._account, settings=settings, merges=False)
        path: str = storage_conf.declare(request)["file"]
        return path

    def _expected(self, stores: t.Sequence[str]) -> t.List[str]:
        return [store for store in self.listed if not store.startswith(self._prefix)] + list(stores)


def _drop_in(stores: t.Sequence[str]) -> str:
    listed = ", ".join(json.dumps(store) for store in stores)
    return (
        "# Written by the Ansible module userns.storage.shared_images.\n"
        "[storage.options]\n"
        f"additionalimagestores = [{listed}, {{append=true}}]\n"
    )


def _write_drop_in(path: str, stores: t.Sequence[str]) -> None:
    folder = os.path.dirname(path)
    with translate_oserror(path):
        if not stores:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            for empty in (folder, _FOLDER):
                with contextlib.suppress(OSError):
                    os.rmdir(empty)
            return
        os.makedirs(folder, 0o755, exist_ok=True)
        temporary = f"{path}.new"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(_drop_in(stores))
        os.chmod(temporary, 0o644)
        os.rename(temporary, path)
