# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The forms of the results of all operations except layer_template, see ``results``."""

from __future__ import annotations

import typing as t

from ..userns.channel import FACTS
from ..userns.shapes import (
    Check,
    Either,
    Items,
    Maybe,
    Record,
    choice,
    flag,
    nothing,
    real,
    scalar,
    table,
    text,
    whole,
)
from .results import DRIVER, ERROR, STORE, TEXTS

_SIZES: t.Mapping[str, Check] = dict.fromkeys(
    ("size_apparent", "size_exclusive", "size_exclusive_min", "size_exclusive_max", "inodes"),
    Maybe(whole),
)
_CONTAINER_FIELDS: t.Mapping[str, Check] = {"id": text, "name": text, "known_to_podman": flag}
CONTAINER = Record(_CONTAINER_FIELDS)
_LAYER_FIELDS: t.Mapping[str, Check] = {
    "id": text,
    "uidmap": TEXTS,
    "gidmap": TEXTS,
    "created": Maybe(text),
    "recorded_size": Maybe(whole),
    **_SIZES,
    "status": text,
    "problem": Maybe(text),
    "containers": Items(CONTAINER),
}
LAYER = Record(_LAYER_FIELDS)
_MAPPED_FIELDS: t.Mapping[str, Check] = {
    **_LAYER_FIELDS,
    "duplicate_of": Maybe(text),
    "depends_on": TEXTS,
    "origin": choice("ours", "runtime"),
    "last_used": Maybe(text),
    "lease": Maybe(text),
    "verification": Maybe(
        Record(
            {
                "entries": whole,
                "different": whole,
                "times_only": whole,
                "differences": Items(Record({"path": text, "problems": TEXTS})),
            }
        )
    ),
}
MAPPED_LAYER = Record(_MAPPED_FIELDS)
IMAGE = Record(
    {
        "id": text,
        "names": TEXTS,
        "digests": TEXTS,
        "created": Maybe(text),
        "read_only_store": Maybe(text),
        "problem": Maybe(text),
        "uidmap": TEXTS,
        "gidmap": TEXTS,
        "identity_copy": Maybe(text),
        "layers": Items(LAYER),
        "mapped_layers": Items(MAPPED_LAYER),
        "removal": Maybe(Record({"layers": TEXTS, **_SIZES})),
        "private_copies": Items(Record({**_CONTAINER_FIELDS, "layer": text, **_SIZES})),
    }
)
_ORPHAN_FIELDS: t.Mapping[str, Check] = {"kind": text, "path": Maybe(text), "age": Maybe(whole)}
ORPHAN = Either(
    Record({**_ORPHAN_FIELDS, "id": text, **_SIZES}), Record({**_ORPHAN_FIELDS, **_MAPPED_FIELDS})
)
_SUMS: t.Mapping[str, Check] = dict.fromkeys(("recorded", "apparent", "exclusive", "inodes"), whole)

# image_layers_info
INFO = Record(
    {
        "changed": flag,
        "images": Items(IMAGE),
        "orphans": Items(ORPHAN),
        "totals": Record(
            {
                **_SUMS,
                "mapped": Record({"layers": whole, **_SUMS}),
                "reclaimable": whole,
                "reclaimable_inodes": whole,
            }
        ),
        "contradictions": FACTS["contradictions"],
        "store": STORE,
        "used_as": Items(Record(dict.fromkeys(("kind", "program", "source", "description"), text))),
    }
)

# image_layers, which enters the store for single steps
_IMAGES_SHOWN = Record({"images": Items(Record({"id": text, "names": TEXTS}))})
IMAGES_LOOKED_UP = Record(
    {
        "holders": table(text),
        "current": Maybe(text),
        "names": TEXTS,
        "layers": flag,
        "driver": DRIVER,
        "graphroot": text,
        "runroot": text,
        "storage_conf": text,
    }
)
CONVERSION = Record(
    {
        "layers": TEXTS,
        "removed_layers": TEXTS,
        "inodes": whole,
        "expected_lock_seconds": real,
        "lock_seconds": real,
    }
)
_FORM_LAYERS = Items(Record({"id": text, "uidmap": TEXTS, "gidmap": TEXTS, "images": TEXTS}))
IMAGE_FORM = Record(
    {
        "uidmap": TEXTS,
        "gidmap": TEXTS,
        "reason": text,
        "present": flag,
        "read_only_store": Maybe(text),
        "layers": _FORM_LAYERS,
        "fits": flag,
        "holders": table(text),
        "programs": table(text),
    }
)
IMAGES_REPORTED = Record({"images": Items(IMAGE), "store": STORE})
IMAGES_REMOVED = Record(
    {
        "changed": flag,
        "images": Items(IMAGE),
        "actions": TEXTS,
        "removed_layers": TEXTS,
        "store": STORE,
        "diff": Record({"before": _IMAGES_SHOWN, "after": _IMAGES_SHOWN}),
    }
)
NOTHING = nothing

# layer_gc
ENTRY = Record(
    {
        "id": text,
        "image_ids": TEXTS,
        "image_names": TEXTS,
        "uidmap": TEXTS,
        "gidmap": TEXTS,
        "size": whole,
        "size_min": whole,
        "size_max": whole,
        "inodes": whole,
        "unused_seconds": Maybe(whole),
        "rule": text,
        "wanted_by": TEXTS,
        "reason": text,
        "origin": choice("ours", "runtime"),
        "containers": Items(CONTAINER),
    }
)
FINDING = Record(
    {
        "kind": text,
        "id": text,
        "path": Maybe(text),
        "image_ids": TEXTS,
        "size": whole,
        "size_min": whole,
        "size_max": whole,
        "inodes": whole,
        "rule": text,
        "reason": text,
    }
)
_LAYERS_SHOWN = Record(
    {
        "mapped_layers": Items(
            Record({"id": text, "image_names": TEXTS, "uidmap": TEXTS, "gidmap": TEXTS})
        ),
        "superseded_images": Items(Record({"id": text, "former_names": TEXTS})),
    }
)
SUPERSEDED = Record(
    {
        "id": text,
        "former_names": TEXTS,
        "superseded": Maybe(text),
        "layers": TEXTS,
        "size": whole,
        "inodes": whole,
        "rule": text,
        "reason": text,
    }
)
GC = Record(
    {
        "changed": flag,
        "removed": Items(ENTRY),
        "kept": Items(ENTRY),
        "removed_images": Items(SUPERSEDED),
        "kept_images": Items(SUPERSEDED),
        "failures": Items(Either(ENTRY, FINDING, SUPERSEDED)),
        "repaired": Items(FINDING),
        "findings": Items(FINDING),
        "space_reclaimed": whole,
        "space_reclaimed_min": whole,
        "space_reclaimed_max": whole,
        "inodes_reclaimed": whole,
        "target_met": flag,
        "partial": flag,
        "remaining": whole,
        "seconds_planning": real,
        "notes": TEXTS,
        "would_free": Items(
            Record(
                {"rule": text, "value": scalar, "layers": whole, "bytes": whole, "inodes": whole}
            )
        ),
        "contradictions": FACTS["contradictions"],
        "store": STORE,
        "diff": Record({"before": _LAYERS_SHOWN, "after": _LAYERS_SHOWN}),
    },
    {**ERROR, "warnings": TEXTS},
)
