# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that the cost of reading a store of thousands of layers grows linearly with their number."""

from __future__ import annotations

import typing as t

from support import large_store
from support.lab import Lab
from support.stores import Store

# Folders are listed as a whole: there is no system call for each layer.
CALLS_PER_LAYER = 1
# About fifty are expected, half of them of the JSON reader.
FUNCTIONS_PER_LAYER = 100


def test_cost_of_gathering_is_linear_in_layers(
    lab: Lab, make_store: t.Callable[..., Store]
) -> None:
    trace = lab.folder() / "trace"
    strace = ("strace", "-f", "-qq", "-o", str(trace))
    counted = []
    for count in (10, 80):
        # The roots of other releases have no strace, and any podman can create the empty store.
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
    # There are eight times as many layers; a quadratic cost would be 64 times as high.
    assert many_functions < 10 * few_functions
    assert many_calls < 10 * few_calls
