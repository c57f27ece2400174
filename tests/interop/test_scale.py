# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A store of thousands of layers: what reading it costs grows with the layers, and no faster."""

from __future__ import annotations

import typing as t

from support import large_store
from support.lab import Lab
from support.stores import Store

# Folders are listed as a whole, so that a layer costs no system call of its own.
CALLS_PER_LAYER = 1
# Some fifty, half of them the JSON reader's.
FUNCTIONS_PER_LAYER = 100


def test_gathering_costs_the_same_for_each_layer(
    lab: Lab, make_store: t.Callable[..., Store]
) -> None:
    trace = lab.folder() / "trace"
    strace = ("strace", "-f", "-qq", "-o", str(trace))
    counted = []
    for count in (10, 80):
        # Other releases have no strace, and it does not matter who has created the empty store.
        store = make_store("overlay-forced", machine=lab.local)
        store.podman("images")
        large_store.populate(store, count)
        found = large_store.gather(lab, store, before=strace, count_calls=True)
        layers = count * large_store.DEEP
        assert (found["images"], found["mapped"]) == (count, count * large_store.MAPPED)
        assert found["layers"] + found["mapped"] == layers
        assert found["bad"] == []
        assert found["orphans"] == 0
        with open(trace, encoding="utf-8", errors="replace") as lines:
            counted.append((layers, found["calls"], sum(1 for _line in lines)))
    (few, few_functions, few_calls), (many, many_functions, many_calls) = counted
    print(f"{few} layers: {few_functions} functions, {few_calls} system calls")
    print(f"{many} layers: {many_functions} functions, {many_calls} system calls")
    assert (many_calls - few_calls) / (many - few) < CALLS_PER_LAYER
    assert (many_functions - few_functions) / (many - few) < FUNCTIONS_PER_LAYER
    # Eight times as many layers; what is quadratic would be 64 times as much.
    assert many_functions < 10 * few_functions
    assert many_calls < 10 * few_calls
