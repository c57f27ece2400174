# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Calls the module of this name in slices of time, and shows in between how far it is."""

from __future__ import annotations

import time
import typing as t

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.userns.storage.plugins.plugin_utils import _slices

display = Display()


class ActionModule(ActionBase):
    """Each slice goes on from where the last one was stopped; so nothing runs on when the play is interrupted."""

    _requires_connection = True
    _supports_check_mode = True
    _supports_async = True

    def run(
        self,
        tmp: t.Optional[str] = None,
        task_vars: t.Optional[t.Dict[str, t.Any]] = None,
    ) -> t.Dict[str, t.Any]:
        """Run the module until nothing remains."""
        result: t.Dict[str, t.Any] = super().run(tmp, task_vars)
        if result.get("skipped"):
            return result
        arguments = self._task.args
        whole = self._task.async_val or self._task.check_mode
        asked = arguments.get("time_limit") is not None or arguments.get("state") == "absent"
        if whole or asked:
            return self._call(arguments, task_vars)
        host = (task_vars or {}).get("inventory_hostname", "localhost")
        started = time.monotonic()
        slices = _slices.Slices(started)
        while True:
            limit = slices.next_limit(time.monotonic())
            joined = slices.add(self._call({**arguments, "time_limit": limit}, task_vars))
            if not joined.get("partial") or joined.get("failed") or joined.get("unreachable"):
                told = joined.get("invocation", {}).get("module_args", {})
                if "time_limit" in told:
                    told["time_limit"] = None
                return joined
            # On standard error, for there are callbacks that put JSON on the other.
            display.display(f"{host} | {slices.line(time.monotonic())}", stderr=True)

    def _call(
        self, arguments: t.Mapping[str, t.Any], task_vars: t.Optional[t.Dict[str, t.Any]]
    ) -> t.Dict[str, t.Any]:
        called: t.Dict[str, t.Any] = self._execute_module(
            module_args=dict(arguments),
            task_vars=task_vars,
            wrap_async=bool(self._task.async_val),
        )
        return called
