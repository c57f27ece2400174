# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The environment variables of processes that work as an account, and the paths of the host's programs."""

from __future__ import annotations

import os
import shutil
import typing as t

from ..store.config import Account

# Variables with a path are only used if the path belongs to the account.
_PATH_VARIABLES = ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME")
_FILE_VARIABLES = ("CONTAINERS_STORAGE_CONF", "CONTAINERS_STORAGE_CONF_OVERRIDE", "CONTAINERS_CONF")
# The other variables of root that have the same meaning for another account.
_NEUTRAL = (
    *("PATH", "TZ", "LANG", "LANGUAGE", "STORAGE_DRIVER", "STORAGE_OPTS"),
    *("_CONTAINERS_OVERLAY_DISABLE_IDMAP", "_TEST_FORCE_SUPPORT_SHIFTING"),
)


def environment(environ: t.Mapping[str, str], account: Account, *, own: bool) -> t.Dict[str, str]:
    """The variables for a process that works as an account.

    :param environ: of the calling process
    :param own: whether the calling process belongs to the account; otherwise only neutral variables are kept
    """
    if own:
        result = dict(environ)
    else:
        kept = (*_NEUTRAL, *_PATH_VARIABLES, *_FILE_VARIABLES)
        result = {
            name: value for name, value in environ.items() if name in kept or name.startswith("LC_")
        }
    for name in _PATH_VARIABLES:
        if name in result and not _belongs(result[name], (account.uid,)):
            del result[name]
    for name in _FILE_VARIABLES:
        if not own and name in result and not _belongs(result[name], (account.uid, 0)):
            del result[name]
    if not (own and _belongs(result.get("HOME", ""), (account.uid,))):
        result["HOME"] = account.home
    result["USER"] = result["LOGNAME"] = account.name
    runtime = f"/run/user/{account.uid}"
    if "XDG_RUNTIME_DIR" not in result and _belongs(runtime, (account.uid,)):
        result["XDG_RUNTIME_DIR"] = runtime
    return result


def find_program(name: str) -> t.Optional[str]:
    """The path of a program: from PATH, or from the directories that distributions use."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/bin", "/bin", "/usr/sbin"])
    return shutil.which(name, path=path)


def _belongs(path: str, owners: t.Container[int]) -> bool:
    try:
        return os.stat(path).st_uid in owners
    except (OSError, ValueError):
        return False
