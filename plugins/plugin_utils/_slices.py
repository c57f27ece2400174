# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Several calls of a module, each stopped by its time limit, told as one."""

from __future__ import annotations

import abc
import time
import typing as t

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

Json = t.Dict[str, t.Any]

# Seconds between two lines.
SHORTEST = 10
# A call first looks through what others have made. It gets so many times as long, so that it gets on.
_TIMES = 4

display = Display()


class Told(abc.ABC):
    """The results so far, as one."""

    def __init__(self) -> None:
        self.result: Json = {}

    def add(self, result: Json) -> Json:
        """Join the result of one more call, and return that of all."""
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
        """Seconds that the last call took to look through what others have made."""
        return 0

    def following(self, arguments: Json) -> Json:
        """The arguments of the next call, from those of the task."""
        return arguments

    @abc.abstractmethod
    def join(self, before: Json) -> None:
        """Put into the last result what it lacks of all before."""

    @abc.abstractmethod
    def line(self, passed: float) -> str:
        """What to show while there is more to do.

        :param passed: seconds since the first call
        """


class SlicedAction(ActionBase):
    """Calls the module of the same name again and again, and shows in between how far it is.

    Each call goes on from where the last one was stopped; so nothing runs on when the play is interrupted.
    """

    _requires_connection = True
    _supports_check_mode = True
    _supports_async = True

    def told(self) -> Told:
        """What joins the results of these calls."""
        raise NotImplementedError

    def whole(self, arguments: t.Mapping[str, t.Any]) -> bool:
        """Whether one call does it."""
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
        host = (task_vars or {}).get("inventory_hostname", "localhost")
        told = self.told()
        started = time.monotonic()
        while True:
            limit = max(SHORTEST, int(told.resuming * _TIMES))
            called = told.following(arguments) if told.result else arguments
            result = self._call({**called, "time_limit": limit}, task_vars)
            stuck = not result.get("changed") and told.result.get("remaining") == result.get(
                "remaining"
            )
            joined = told.add(result)
            if stuck and joined.get("partial"):
                # Each call gets something done. Where none does, none ever will.
                joined.update(failed=True, msg=f"Nothing was done within {limit} seconds.")
                return joined
            # What was refused in one place does not keep the module from the others.
            if not joined.get("partial") or joined.get("unreachable"):
                asked = joined.get("invocation", {}).get("module_args", {})
                if "time_limit" in asked:
                    asked["time_limit"] = None
                return joined
            if not self._task.no_log:
                # On standard error, for there are callbacks that put JSON on the other.
                display.display(f"{host} | {told.line(time.monotonic() - started)}", stderr=True)

    def _call(
        self, arguments: t.Mapping[str, t.Any], task_vars: t.Optional[t.Dict[str, t.Any]]
    ) -> Json:
        in_background = self._task.async_val and not self._connection.has_native_async
        called: Json = self._execute_module(
            module_args=dict(arguments), task_vars=task_vars, wrap_async=bool(in_background)
        )
        return called
