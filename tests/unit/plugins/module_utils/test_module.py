# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Tests of how modules return results: untrusted text is displayed as text, and exceptions are reported."""

from __future__ import annotations

import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils import _module
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import Account

# Clears the screen, then imitates a line of Ansible's output.
HOSTILE = "\x1b[2J\x9b1A\u202e\r\nok: [forged]\n"


class ModuleExit(Exception):
    """Raised when the module exits."""


class Module:
    """The part of AnsibleModule that is used when a module exits."""

    def __init__(self, diff: bool = True) -> None:
        self._diff = diff
        self.params: t.Dict[str, t.Any] = {}
        self.warnings: t.List[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def exit_json(self, **result: t.Any) -> t.NoReturn:
        raise ModuleExit(result)

    def fail_json(self, **result: t.Any) -> t.NoReturn:
        raise ModuleExit({"failed": True, **result})


def end(result: t.Dict[str, t.Any], module: t.Optional[Module] = None) -> t.Dict[str, t.Any]:
    with pytest.raises(ModuleExit) as caught:
        _module.leave(t.cast(t.Any, module or Module()), result)
    shown: t.Dict[str, t.Any] = caught.value.args[0]
    return shown


def assert_harmless(text: str, lines: t.Optional[int] = 1) -> None:
    """Assert that lines after the first are indented, and that no character moves the cursor."""
    assert text.replace("\n", "").isprintable(), ascii(text)
    assert lines is None or text.count("\n") < lines
    assert all(line.startswith("  ") for line in text.split("\n")[1:])


@pytest.mark.parametrize("name", ["trace", "stderr"])
def test_texts_of_several_lines_are_indented(name: str) -> None:
    shown = end({"error": HOSTILE, "facts": {name: HOSTILE * 1000}})
    assert_harmless(shown["msg"])
    text = shown["exception" if name == "trace" else name]
    assert text.startswith("  ")
    assert_harmless(text, 202)
    assert "ok: [forged]" in text
    assert "trace" not in shown


def test_diff_is_escaped() -> None:
    entry = {"before": HOSTILE, "after": "a\tb\n", "before_header": HOSTILE}
    shown = end({"changed": True, "diff": [entry]})["diff"][0]
    assert shown["before"] == "\\x1b[2J\\x9b1A\\u202e\\r\nok: [forged]\n"
    assert shown["after"] == "a\tb\n"
    assert_harmless(shown["before_header"])
    tables = {"before": {"a": ["b"]}, "after": {}}
    assert end({"changed": True, "diff": tables})["diff"] == tables
    assert "diff" not in end({"changed": True, "diff": tables}, Module(diff=False))


def test_warnings_are_escaped() -> None:
    module = Module()
    end({"changed": False, "warnings": [HOSTILE]}, module)
    assert_harmless(module.warnings[0])


class TestUnexpectedExceptions:
    """An unexpected exception is an error of the module or, with several users, of one user only."""

    def module(self, **params: t.Any) -> Module:
        module = Module()
        defaults: t.Dict[str, t.Any] = {"user": None, "users": None, "lock_timeout": 1.0}
        module.params = {**dict.fromkeys(_module.STORE_ARGUMENTS), **defaults, **params}
        return module

    def run(self, module: Module, operation: t.Callable[[t.Any], t.Any]) -> t.Dict[str, t.Any]:
        with pytest.raises(ModuleExit) as caught:
            _module.run_outside(t.cast(t.Any, module), lambda store: store, operation)
        shown: t.Dict[str, t.Any] = caught.value.args[0]
        return shown

    def test_exception_for_the_only_store_fails_the_module(self) -> None:
        shown = self.run(self.module(), lambda _request: t.cast(t.Any, {})["missing"])
        assert "failed unexpectedly with KeyError: 'missing'" in shown["msg"]
        assert "test_module.py" in shown["exception"]

    def test_exception_for_one_user_does_not_stop_the_others(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_module, "account_named", lambda name: Account(name, 1, 1, "/"))

        def operation(store: t.Any) -> t.Dict[str, t.Any]:
            if store.account.name == "alice":
                raise RecursionError("too deep")
            return {"changed": True}

        shown = self.run(self.module(users=["alice", "bob"]), operation)
        assert "failed unexpectedly with RecursionError: too deep" in shown["msg"]
        alice, bob = shown["stores"]
        assert "too deep" in alice["error"]
        assert (bob["user"], bob.get("error"), shown["changed"]) == ("bob", None, True)
