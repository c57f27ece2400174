# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run tasks on localhost with the ansible-core of the tests, also below ansible-test."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import typing as t

ROOT = pathlib.Path(__file__).resolve().parents[2]
# ansible-test's copy of ansible-core contains no programs, only the functions that they call.
_PROGRAM = "import sys; from ansible.cli.playbook import main; sys.exit(main())"


def run_tasks(
    folder: pathlib.Path, tasks: t.Sequence[t.Mapping[str, t.Any]], environ: t.Mapping[str, str]
) -> str:
    """Run tasks in a playbook without privileges or facts; returns the standard output.

    :param folder: an empty folder for the playbook and temporary files
    :param environ: further environment variables
    """
    play = folder / "play.json"
    play.write_text(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))
    environment = {**os.environ, "HOME": str(folder), **environ}
    environment["ANSIBLE_LOCAL_TEMP"] = environment["ANSIBLE_REMOTE_TEMP"] = str(folder / "tmp")
    if ROOT.parent.parent.name == "ansible_collections":
        environment["ANSIBLE_COLLECTIONS_PATH"] = str(ROOT.parents[2])
    command = [sys.executable, "-c", _PROGRAM, "-i", "localhost,", "-c", "local", str(play)]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
