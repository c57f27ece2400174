# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The forms of the results of operations, as the documentation of the modules describes them.

Data from a process that works in a user's store must have one of these forms, or is refused. Contents of a store
can therefore never become another field of a module's result, such as ``ansible_facts``.
"""

from __future__ import annotations

import typing as t

from ..errors import WorkerError
from ..userns.channel import FACTS_FORM
from ..userns.shapes import (
    Check,
    Items,
    Maybe,
    Record,
    choice,
    flag,
    real,
    table,
    text,
    whole,
    word,
)

TEXTS = Items(text)

DRIVER = word("[a-z0-9-]{1,32}")
_STORE_FIELDS: t.Mapping[str, Check] = {
    "graphroot": text,
    "runroot": text,
    "driver": DRIVER,
    "backing_filesystem": text,
    "rootless": flag,
    "shifting": Maybe(flag),
}
STORE = Record(_STORE_FIELDS)
# The details of an error, and warnings, which become those of the module.
ERROR: t.Mapping[str, Check] = {"error": text, "facts": FACTS_FORM}

# layer_template
_MAPS = table(Items(Record({"uidmap": TEXTS, "gidmap": TEXTS})))
TEMPLATE = Record(
    {
        "changed": flag,
        "layers": Items(
            Record(
                {
                    "user": text,
                    "image_id": text,
                    "image_names": TEXTS,
                    "layer_id": text,
                    "template_id": text,
                    "uidmap": TEXTS,
                    "gidmap": TEXTS,
                    "action": choice(
                        *("created", "existing", "removed", "not_needed", "refused", "pending")
                    ),
                    "reason": text,
                    "advice": text,
                    "strategy": Maybe(text),
                    "files": Maybe(whole),
                    "size_expected": Maybe(whole),
                    "size_apparent": Maybe(whole),
                    "size_exclusive": Maybe(whole),
                    "seconds": real,
                    "lock_seconds": real,
                    "progress": Maybe(
                        Record(
                            {
                                "files": whole,
                                "bytes": whole,
                                "bytes_expected": whole,
                                "seconds_resuming": real,
                            }
                        )
                    ),
                }
            )
        ),
        "partial": flag,
        "remaining": whole,
        "store": STORE,
        "stores": Items(Record({"user": text, **_STORE_FIELDS})),
        "diff": Record({"before": _MAPS, "after": _MAPS}),
    },
    {**ERROR, "warnings": TEXTS, "pulled": TEXTS},
)

LACKING = Record(
    {"images": TEXTS, "driver": text, "graphroot": text, "runroot": text, "storage_conf": text}
)


def refuse_other_users(result: t.Mapping[str, t.Any], user: str) -> None:
    """Refuse a result about a store of another user.

    :param user: the owner of the store, "root" for the rootful store
    :raises WorkerError: it names another user
    """
    for key in ("layers", "stores"):
        for entry in result.get(key, ()):
            if entry.get("user", user) != user:
                raise WorkerError(
                    f"user {user}",
                    "the process that works in the store sent a result for another user",
                    "If nobody has interfered with that process, please report this.",
                )
