# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of the limits of a run: deadline, closed standard output and signals."""

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
def no_signal_received(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_budget, "_received", [])


@pytest.fixture
def closed_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(termination, "_STDOUT", writer)


def test_budget_without_deadline_only_records_progress() -> None:
    budget = WorkBudget()
    budget(3, 40)
    assert (budget.files, budget.bytes, budget.over) == (3, 40, False)


def test_work_is_suspended_only_after_new_progress() -> None:
    budget = WorkBudget(time.monotonic() - 1)
    budget.resume(10, 100)
    budget(10, 100)
    for made_progress in ((11, 90), (10, 101)):
        with pytest.raises(Suspended) as stop:
            budget(*made_progress)
        assert not stop.value.given_up


def test_time_to_reach_previous_progress_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((0.0, 5.0, 8.0, 20.0))
    budget = WorkBudget()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    budget.resume(10, 100)
    budget(4, 30)
    budget(10, 100)
    budget(11, 110)
    assert budget.resume_seconds == 8.0


def test_closed_stdout_ends_all_work(closed_stdout: None) -> None:
    budget = WorkBudget(awaited=True)
    budget.resume(10, 100)
    assert budget.over
    with pytest.raises(Suspended) as stop:
        budget(1, 1)
    assert stop.value.given_up
    with pytest.raises(Suspended):
        budget.look_only(1, 1)
    assert budget.files == 1


def test_closed_stdout_is_ignored_if_result_is_not_awaited(closed_stdout: None) -> None:
    budget = WorkBudget()
    budget(1, 1)
    assert not budget.over


def test_signals_do_not_interrupt_work() -> None:
    before = {
        item: signal.getsignal(item) for item in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    }
    try:
        with in_order():
            os.kill(os.getpid(), signal.SIGTERM)
            assert WorkBudget().given_up
        # The same signal may arrive twice: from a terminal, and from a process that forwards it.
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_ignored_signals_stay_ignored() -> None:
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
