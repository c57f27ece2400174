# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import signal
import time

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import termination
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import work_budget
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.work_budget import (
    WorkBudget,
    in_order,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.tree.tree_tools import (
    Suspended,
)


@pytest.fixture(autouse=True)
def nobody_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_budget, "_told", [])


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(termination, "_STDOUT", writer)


def test_without_a_deadline_it_only_takes_note() -> None:
    one = WorkBudget()
    one(3, 40)
    assert (one.files, one.bytes, one.over) == (3, 40, False)


def test_it_suspends_only_what_has_come_further() -> None:
    one = WorkBudget(time.monotonic() - 1)
    one.resume(10, 100)
    one(10, 100)
    for made_progress in ((11, 90), (10, 101)):
        with pytest.raises(Suspended) as stop:
            one(*made_progress)
        assert not stop.value.given_up


def test_it_knows_how_long_it_took_to_come_that_far(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 5.0, 8.0, 20.0))
    one = WorkBudget()
    monkeypatch.setattr(work_budget.time, "monotonic", lambda: next(clock))
    one.resume(10, 100)
    one(4, 30)
    one(10, 100)
    one(11, 110)
    assert one.resume_seconds == 8.0


def test_closed_stdout_ends_all_work(deaf: None) -> None:
    one = WorkBudget(awaited=True)
    one.resume(10, 100)
    assert one.over
    with pytest.raises(Suspended) as stop:
        one(1, 1)
    assert stop.value.given_up
    with pytest.raises(Suspended):
        one.look_only(1, 1)
    assert one.files == 1


def test_who_is_not_awaited_needs_no_listener(deaf: None) -> None:
    one = WorkBudget()
    one(1, 1)
    assert not one.over


def test_signals_are_kept_until_the_work_has_ended() -> None:
    before = {
        item: signal.getsignal(item) for item in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    }
    try:
        with in_order():
            os.kill(os.getpid(), signal.SIGTERM)
            assert WorkBudget().given_up
        # The same may come twice, from a terminal and from whoever passes it on.
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_what_is_ignored_stays_so() -> None:
    interrupt = signal.getsignal(signal.SIGINT)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with in_order():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not WorkBudget().given_up
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is interrupt
    finally:
        signal.signal(signal.SIGHUP, before)
