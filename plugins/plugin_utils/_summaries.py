# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Summarize what a role did: one line for each store."""

from __future__ import annotations

import collections
import typing as t

from ._amounts import human
from ._fleet import FAILED, SILENT, UNREACHABLE, Fleet, Store
from ._values import Facts, dict_of, dicts_of, list_of, number_of, results_of, text_of

# The results of layer_template, in the order in which they are listed.
_ACTIONS = ("created", "existing", "removed", "not_needed", "refused", "pending")


def store_lines(
    stores: t.Sequence[t.Any],
    images: t.Sequence[t.Any] = (),
    layers: t.Any = None,
    removals: t.Any = None,
    shared: t.Any = None,
    failures: t.Sequence[t.Sequence[t.Any]] = (),
    predicted: bool = False,
) -> t.List[str]:
    """One line for each store.

    :param stores: the owners of the stores
    :param images: registered results of image_layers in loops over the owners
    :param layers: the registered result of layer_template
    :param removals: the registered result of layer_gc in a loop over the owners
    :param shared: the registered result of shared_images
    :param failures: pairs of an owner and a message
    :param predicted: whether the run was in check mode
    """
    parts: t.Dict[str, t.List[str]] = {text_of(store): [] for store in stores}
    brought: t.Dict[str, t.Counter[str]] = collections.defaultdict(collections.Counter)
    for registered in images:
        for result in results_of(registered, "result of image_layers"):
            brought[_owner(result)].update(
                text_of(action) for action in list_of(result, "actions", "result of image_layers")
            )
    made = dict_of(layers, "result of layer_template")
    entries = dicts_of(made, "layers", "result of layer_template")
    removed = {
        _owner(result): result for result in results_of(removals, "result of layer_gc") if result
    }
    users = dicts_of(dict_of(shared, "result of shared_images"), "users", "result of shared_images")
    failed: t.Dict[str, t.List[str]] = collections.defaultdict(list)
    for owner, message in failures:
        failed[text_of(owner)].append(text_of(message))
    for store in dicts_of(made, "stores", "result of layer_template"):
        if store.get("error"):
            failed[text_of(store.get("user"))].append(text_of(store["error"]))
    for owner, found in parts.items():
        found += _of_images(brought[owner], predicted)
        mine = [entry for entry in entries if text_of(entry.get("user")) == owner]
        found += _of_layers(mine, predicted)
        if "removed" in removed.get(owner, {}):
            found += _of_removal(removed[owner], predicted)
        found += (
            _of_sharing(user, predicted) for user in users if text_of(user.get("user")) == owner
        )
        found += [f"failed: {message}" for message in dict.fromkeys(failed[owner])]
    return [
        f"{owner}: {'; '.join(found) if found else 'nothing to do'}"
        for owner, found in parts.items()
    ]


def fleet_lines(found: Fleet) -> t.List[str]:
    """One line for each store of each host of a report, and one for each host that could not be examined."""
    lines = []
    for host in found.hosts:
        if host.state in (FAILED, SILENT, UNREACHABLE) and not host.stores:
            lines.append(f"{host.name}: {host.state}: {host.message}")
        elif not host.stores:
            lines.append(f"{host.name}: no store")
        lines += [f"{host.name}: {_of_store(store)}" for store in host.stores]
    return lines


def _of_store(store: Store) -> str:
    if store.problem:
        return f"{store.user}: failed: {store.problem}"
    sums = store.sums
    parts = [
        f"{store.user}: {_count(sums.images, 'image')} and {_count(sums.mapped_layers, 'mapped layer')} "
        f"use {human(sums.on_disk)}"
    ]
    if sums.freed_layers:
        parts.append(
            f"prune would remove {_count(sums.freed_layers, 'layer')} and free {human(sums.freed)}"
        )
    if sums.missing:
        parts.append(f"{_count(sums.missing, 'layer')} missing for the next start")
    return "; ".join(parts)


def _of_images(actions: t.Mapping[str, int], predicted: bool) -> t.Iterator[str]:
    for action in ("pulled", "converted", "tagged"):
        if actions.get(action):
            yield _done(_count(actions[action], "image"), actions[action], action, predicted)


def _of_layers(entries: t.Sequence[Facts], predicted: bool) -> t.Iterator[str]:
    counted = collections.Counter(text_of(entry.get("action")) for entry in entries)
    parts = []
    for action in _ACTIONS:
        if not counted[action]:
            continue
        text = f"{counted[action]} {action.replace('_', ' ')}"
        if action in ("created", "removed") and predicted:
            text = f"{counted[action]} would be {action}"
        if action == "created":
            size = sum(
                number_of(entry.get("size_exclusive"))
                for entry in entries
                if entry.get("action") == action
            )
            text += f" ({human(size)})"
        parts.append(text)
    if parts:
        yield f"mapped layers: {', '.join(parts)}"


def _of_removal(result: Facts, predicted: bool) -> t.Iterator[str]:
    removed, kept, repaired, images = (
        len(list_of(result, key, "result of layer_gc"))
        for key in ("removed", "kept", "repaired", "removed_images")
    )
    text = _done(_count(removed, "mapped layer"), removed, "removed", predicted)
    yield f"{text}, {kept} kept"
    if images:
        yield _done(_count(images, "superseded image"), images, "removed", predicted)
    if repaired:
        yield _done(_count(repaired, "leftover"), repaired, "removed", predicted)
    if removed or repaired or images:
        freed = human(number_of(result.get("space_reclaimed")))
        inodes = number_of(result.get("inodes_reclaimed"))
        yield f"{freed} and {_count(inodes, 'inode')} {'would be ' if predicted else ''}freed"
    best = max(
        dicts_of(result, "would_free", "result of layer_gc"),
        key=lambda item: number_of(item.get("bytes")),
        default=None,
    )
    if best:
        rule = f"{text_of(best.get('rule'))}={text_of(best.get('value')) or 'true'}"
        yield f"no rule is set; {rule} would free {human(number_of(best.get('bytes')))}"
    if number_of(result.get("remaining")):
        yield f"{number_of(result['remaining'])} left for the next run"


def _of_sharing(user: Facts, predicted: bool) -> str:
    action = text_of(user.get("action"))
    if action == "refused":
        return f"failed: {text_of(user.get('reason'))}"
    if action == "removed":
        return f"shared images: {'would be ' if predicted else ''}removed"
    images = _count(len(list_of(user, "images", "result of shared_images")), "image")
    mounts = _count(number_of(user.get("mounts")), "mount")
    state = "existing" if action == "existing" else "would be shared" if predicted else "shared"
    return f"shared images: {images}, {mounts}, {state}"


def _owner(result: Facts) -> str:
    """The owner of the store, which is the first element of the task's loop item."""
    item = result.get(text_of(result.get("ansible_loop_var") or "item"))
    return text_of(item[0] if isinstance(item, (list, tuple)) and item else item)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _done(counted: str, number: int, action: str, predicted: bool) -> str:
    return f"{counted} {'would be ' if predicted and number else ''}{action}"
