# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Call a module several times, each with a time limit, and merge the results."""

from __future__ import annotations

import abc
import dataclasses
import math
import time
import typing as t

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ._escapes import terminal

Json = t.Dict[str, t.Any]

# Seconds between two progress lines.
SHORTEST = 10
# The maximum time of a call, and of all calls for a store together (seconds): the time for which root waits for work
# in a user's store.
_LONGEST = 3600
_TOTAL = 14_400
# A call first examines existing work. Its time limit is this multiple of that time, so that it makes progress.
_TIMES = 4
# The maximum number of consecutive calls without progress. Images that change during a call may undo its progress.
_MOST_IN_VAIN = 360

display = Display()


class SliceResults(abc.ABC):
    """The merged results so far."""

    def __init__(self) -> None:
        self.result: Json = {}
        # The user in whose store the next call works; empty if each call works in all stores of the task.
        self.user = ""
        self._given_up = False

    def add(self, result: Json) -> Json:
        """Add the result of a call, and return the merged result."""
        before, self.result = self.result, dict(result)
        if before:
            self.result["changed"] = bool(before.get("changed")) or bool(result.get("changed"))
            warnings = [*before.get("warnings", ()), *result.get("warnings", ())]
            if warnings:
                self.result["warnings"] = list(dict.fromkeys(warnings))
            if "diff" in before:
                after: Json = result.get("diff") or before["diff"]
                self.result["diff"] = {**after, "before": before["diff"]["before"]}
            self.join(before)
        return self.result

    @property
    def resuming(self) -> float:
        """The time that the last call took to examine existing work, in seconds."""
        return 0

    def following(self, arguments: Json) -> Json:
        """The arguments of the next call, derived from those of the task."""
        return arguments

    @property
    def remaining(self) -> t.Any:
        """The number of remaining items in the current store."""
        return self.result.get("remaining")

    @property
    def goes_on(self) -> bool:
        """Whether another call is needed."""
        return bool(self.result.get("partial")) and not self._given_up

    def give_up(self, why: str) -> None:
        """Make no more calls for the current store."""
        self._given_up = True
        self.result.update(failed=True, msg=why)

    @property
    def left(self) -> t.Tuple[float, float]:
        """A value that decreases with each call: the number of remaining items, and a number for the current item."""
        return (self.result.get("remaining", 0), 0)

    @abc.abstractmethod
    def join(self, before: Json) -> None:
        """Add the earlier results to the last result."""

    @abc.abstractmethod
    def line(self, passed: float) -> str:
        """The progress line while there is more to do.

        :param passed: seconds since the first call
        """


class SlicedAction(ActionBase):
    """Calls the module of the same name repeatedly, and displays its progress after each call.

    Each call resumes the work of the last call, so that no work continues after an interruption of the play.
    """

    _requires_connection = True
    _supports_check_mode = True
    _supports_async = True

    def results(self) -> SliceResults:
        """The object that merges the results of the calls."""
        raise NotImplementedError

    def whole(self, arguments: t.Mapping[str, t.Any]) -> bool:
        """Whether a single call is enough."""
        return arguments.get("time_limit") is not None

    def run(
        self,
        tmp: t.Optional[str] = None,
        task_vars: t.Optional[t.Dict[str, t.Any]] = None,
    ) -> Json:
        """Run the module until nothing remains."""
        skipped: Json = super().run(tmp, task_vars)
        if skipped.get("skipped"):
            return skipped
        arguments = self._task.args
        if self._task.async_val or self._task.check_mode or self.whole(arguments):
            return self._call(arguments, task_vars)
        return self.repeated(arguments, task_vars)

    def repeated(
        self, arguments: t.Mapping[str, t.Any], task_vars: t.Optional[t.Dict[str, t.Any]]
    ) -> Json:
        """Call the module until nothing remains."""
        host = (task_vars or {}).get("inventory_hostname", "localhost")
        results = self.results()
        efforts: t.Dict[str, _Effort] = {}
        started, passed = time.monotonic(), 0.0
        while True:
            called = results.following(dict(arguments)) if results.result else arguments
            effort = efforts.setdefault(results.user, _Effort())
            # These numbers come from a store whose owner controls its contents.
            limit = max(SHORTEST, int(min(results.resuming * _TIMES, _LONGEST)))
            result = self._call({**called, "time_limit": limit}, task_vars)
            # Each call makes progress. If several calls make none, further calls will not either.
            stuck = not result.get("changed") and results.remaining == result.get("remaining")
            joined = results.add(result)
            before, passed = passed, time.monotonic() - started
            effort.add(results.left, passed - before)
            if results.goes_on:
                why = (
                    f"The module made no progress within {limit} seconds."
                    if stuck
                    else effort.endless
                )
                if why:
                    results.give_up(why)
            # A refusal in one store does not stop work in the others.
            if not results.goes_on or joined.get("unreachable"):
                module_args = joined.get("invocation", {}).get("module_args", {})
                if "time_limit" in module_args:
                    module_args["time_limit"] = None
                if "users" in arguments and "users" in module_args:
                    module_args["users"] = arguments["users"]
                return joined
            if not self._task.no_log:
                # On standard error, because some callbacks write JSON to standard output.
                line = terminal(f"{host} | {results.line(passed)}")
                display.display(line, stderr=True)

    def _call(
        self, arguments: t.Mapping[str, t.Any], task_vars: t.Optional[t.Dict[str, t.Any]]
    ) -> Json:
        in_background = self._task.async_val and not self._connection.has_native_async
        called: Json = self._execute_module(
            module_args=dict(arguments), task_vars=task_vars, wrap_async=bool(in_background)
        )
        return called


@dataclasses.dataclass
class _Effort:
    """The effort of the calls for a store.

    :ivar seconds: their total time
    """

    seconds: float = 0.0
    _least: t.Tuple[float, float] = (math.inf, math.inf)
    _in_vain: int = 0

    def add(self, left: t.Tuple[float, float], seconds: float) -> None:
        """Record a call.

        :param left: the remaining work, which decreases with each call
        """
        self._in_vain = 0 if left < self._least else self._in_vain + 1
        self._least = min(self._least, left)
        self.seconds += seconds

    @property
    def endless(self) -> str:
        """Why no more calls are made; empty if there are more."""
        if self._in_vain > _MOST_IN_VAIN:
            why = f"{self._in_vain} calls in a row have brought it no nearer to its end"
        elif self.seconds > _TOTAL:
            why = f"it has not ended after {self.seconds / 3600:.0f} hours"
        else:
            return ""
        return (
            f"The task was stopped: {why}. See whether somebody changes the store's images or layers all the time, "
            "then run the task again; it goes on with what is there."
        )
