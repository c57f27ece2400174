# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Convert images in place by calling the operation in a process of the machine of the store."""

from __future__ import annotations

import json
import pathlib
import typing as t

from .modules import SYSTEM_PYTHON
from .stores import Json, Store

_PROGRAM = (pathlib.Path(__file__).parent / "conversion_main.py").read_text()


def texts(record: Json, key: str) -> t.List[str]:
    """A map of a record in the form of options."""
    return [
        f"{item['container_id']}:{item['host_id']}:{item['size']}" for item in record.get(key) or ()
    ]


def conversion_args(
    store: Store,
    images: t.Sequence[str],
    uidmap: t.Sequence[str],
    gidmap: t.Optional[t.Sequence[str]] = None,
) -> Json:
    """The arguments of the program that converts images by their names or IDs.

    :param gidmap: the same as uidmap if not given
    """
    ids = [name if len(name) == 64 else store.image(name)["id"] for name in images]
    gids = list(uidmap if gidmap is None else gidmap)
    return {**store.module_args(), "images": ids, "uidmap": list(uidmap), "gidmap": gids}


def convert(
    store: Store,
    images: t.Sequence[str],
    uidmap: t.Sequence[str],
    gidmap: t.Optional[t.Sequence[str]] = None,
    check: bool = False,
) -> Json:
    """Convert images by their names; arguments as for `conversion_args`.

    :returns: the operation's result, or its ``msg``, ``kind`` and ``facts``; and the ``seconds`` it took
    """
    args = {**conversion_args(store, images, uidmap, gidmap), "_ansible_check_mode": check}
    text = json.dumps({"ANSIBLE_MODULE_ARGS": args})
    env = {"PYTHONPATH": str(store.lab.tree), "PYTHONDONTWRITEBYTECODE": "1"}
    if not store.user:
        env.update({key: value for key, value in store.env().items() if key.startswith("_CONT")})
    done = store.machine.run([SYSTEM_PYTHON, "-c", _PROGRAM, text], env=env, check=False)
    assert done.rc == 0, done
    result: Json = json.loads(done.stdout.splitlines()[-1])
    return result
