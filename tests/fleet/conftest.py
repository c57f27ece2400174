# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the fleet tests."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import typing as t

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
Json = t.Dict[str, t.Any]


@pytest.fixture(scope="session")
def collections_path() -> str:
    """The search path for this collection and for collections of the community package."""
    paths = [
        os.environ.get("ANSIBLE_COLLECTIONS_PATH", ""),
        os.environ.get("USERNS_STORAGE_COLLECTIONS", ""),
    ]
    return os.pathsep.join(filter(None, paths))


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[t.Any]:
    """A headless Chromium."""
    from support.browser import Browser

    window = Browser(tmp_path_factory.mktemp("profile"))
    yield window
    window.close()


@pytest.fixture
def play(collections_path: str, tmp_path: pathlib.Path) -> t.Callable[..., Play]:
    """play(playbook, inventory, *options, environ=None): run ansible-playbook in a new folder.

    `python` is the interpreter of another ansible-core. With the paths `below`, the play runs under
    support.path_trace, whose result is the attribute `trace`.
    """

    def run(
        playbook: t.Any,
        inventory: Json,
        *options: str,
        environ: t.Optional[t.Mapping[str, str]] = None,
        fails: bool = False,
        below: t.Sequence[t.Any] = (),
        python: t.Any = sys.executable,
    ) -> Play:
        hosts = tmp_path / "inventory.json"
        hosts.write_text(json.dumps(inventory))
        command = [str(python), "-m", "ansible", "playbook", "-i", str(hosts), str(playbook)]
        env = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": collections_path,
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_HOME": str(tmp_path / "ansible"),
            "ANSIBLE_SHOW_CUSTOM_STATS": "1",
            "PWD": str(tmp_path),
            **(environ or {}),
        }
        if below:
            from support import path_trace

            trace = path_trace.trace([*command, *options], below, env=env, cwd=str(tmp_path))
            if (trace.rc != 0) != fails:
                raise AssertionError(f"rc {trace.rc}\n{trace.output}")
            return Play(trace.output, tmp_path, trace)
        done = subprocess.run(
            [*command, *options],
            cwd=tmp_path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if (done.returncode != 0) != fails:
            raise AssertionError(f"rc {done.returncode}\n{done.stdout}")
        return Play(done.stdout, tmp_path)

    return run


class Play:
    """A completed run of ansible-playbook: its output and its folder."""

    def __init__(self, output: str, folder: pathlib.Path, trace: t.Any = None) -> None:
        self.output, self.folder, self.trace = output, folder, trace

    def recap(self, host: str) -> t.Dict[str, int]:
        """The counts of a host: ok, changed, unreachable, failed ..."""
        lines = self.output.rpartition("PLAY RECAP")[2].splitlines()
        (line,) = (item for item in lines if item.partition(":")[0].strip() == host)
        counts = line.partition(":")[2].split()
        return {name: int(count) for name, count in (word.split("=") for word in counts)}
