# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run modules of this collection, directly as a process or with ansible-playbook."""

from __future__ import annotations

import json
import os
import pathlib
import shlex
import subprocess
import sys
import typing as t

from .lab import Lab
from .machines import Account, Machine, Result
from .waiting import LIMIT

Json = t.Dict[str, t.Any]
SYSTEM_PYTHON = "/usr/bin/python3"
_PACKAGE = "ansible_collections.userns.storage.plugins.modules"


_SERVICE = (
    "import sys; from ansible_collections.userns.storage.plugins.module_utils._storage.service.command "
    "import main; sys.exit(main(sys.argv[1:]))"
)


def service_command(*arguments: str) -> t.List[str]:
    """The command line of a command of the service. The collection must be on PYTHONPATH."""
    return [SYSTEM_PYTHON, "-c", _SERVICE, *arguments]


class ModuleCrash(AssertionError):
    """The module ended without a JSON result; the message contains its output."""


def parsed(result: Result) -> Json:
    """The result that a module has printed."""
    for line in reversed(result.stdout.splitlines()):
        if line.startswith("{"):
            parsed: Json = json.loads(line)
            return parsed
    raise ModuleCrash(f"rc {result.rc}\n{result.stdout}\n{result.stderr}")


def _command(
    name: str, args: t.Mapping[str, t.Any], check: bool, diff: bool, python: str
) -> t.List[str]:
    builtin, _dot, short = name.rpartition(".")
    package = "ansible.modules" if builtin == "ansible.builtin" else _PACKAGE
    arguments: Json = {
        **args,
        "_ansible_check_mode": check,
        "_ansible_diff": diff,
        "_ansible_no_log": False,
        "_ansible_remote_tmp": "/tmp",
        "_ansible_keep_remote_files": False,
    }
    return [python, "-m", f"{package}.{short}", json.dumps({"ANSIBLE_MODULE_ARGS": arguments})]


def _environ(lab: Lab, environ: t.Optional[t.Mapping[str, str]]) -> t.Dict[str, str]:
    return {"PYTHONPATH": str(lab.tree), "PYTHONDONTWRITEBYTECODE": "1", **(environ or {})}


def run_module(
    lab: Lab,
    name: str,
    args: t.Mapping[str, t.Any],
    *,
    check: bool = False,
    diff: bool = False,
    user: t.Optional[Account] = None,
    python: str = SYSTEM_PYTHON,
    environ: t.Optional[t.Mapping[str, str]] = None,
    machine: t.Optional[Machine] = None,
    fails: t.Optional[bool] = False,
    timeout: float = LIMIT,
    prefix: t.Sequence[str] = (),
) -> Json:
    """Run plugins/modules/NAME.py in a process of `python` as root or `user`; returns its result.

    :param name: a module of this collection, or ansible.builtin.NAME
    :param prefix: arguments before the command, like those of a become method
    :param fails: whether the module must fail; None if success and failure are both allowed
    """
    done = (machine or lab.machine).run(
        [*prefix, *_command(name, args, check, diff, python)],
        account=user,
        env=_environ(lab, environ),
        check=False,
        timeout=timeout,
    )
    outcome = parsed(done)
    failed = bool(outcome.get("failed"))
    if fails is not None and failed != fails:
        text = json.dumps({k: v for k, v in outcome.items() if k != "invocation"}, indent=1)
        raise AssertionError(f"{name}: failed is {failed}\n{text}\n{done.stderr}")
    return outcome


def start_module(
    lab: Lab,
    name: str,
    args: t.Mapping[str, t.Any],
    *,
    user: t.Optional[Account] = None,
    python: str = SYSTEM_PYTHON,
    environ: t.Optional[t.Mapping[str, str]] = None,
    machine: t.Optional[Machine] = None,
) -> subprocess.Popen[bytes]:
    """Start a module like `run_module`, but without waiting for it; both outputs are pipes."""
    return (machine or lab.machine).popen(
        _command(name, args, False, False, python),
        account=user,
        env=_environ(lab, environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish_module(process: subprocess.Popen[bytes], timeout: float = LIMIT) -> Json:
    """Wait for a module that `start_module` has started; returns its result."""
    output, errors = process.communicate(timeout=timeout)
    command = ("module",)
    return parsed(Result(command, process.returncode, output.decode(), errors.decode()))


def _shell(lab: Lab, folder: pathlib.Path) -> pathlib.Path:
    """A shell that first enters the machine of the laboratory, unless its caller already runs there."""
    there = lab.machine.run(["readlink", "/proc/self/ns/mnt"]).stdout.strip()
    enter = shlex.join(lab.machine.prefix)
    path = folder / "sh"
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$(readlink /proc/self/ns/mnt)" = {shlex.quote(there)} ] && exec /bin/sh "$@"\n'
        f'exec {enter} /bin/sh "$@"\n'
    )
    path.chmod(0o755)
    return path


def run_playbook(
    lab: Lab,
    tasks: t.Sequence[Json],
    *,
    check: bool = False,
    diff: bool = False,
    inventory: str = "localhost,",
    variables: t.Optional[t.Mapping[str, t.Any]] = None,
    environ: t.Optional[t.Mapping[str, str]] = None,
    python: str = SYSTEM_PYTHON,
    timeout: float = LIMIT,
) -> t.List[Json]:
    """Run tasks with the real ansible-playbook; returns the results of all tasks, including failures."""
    folder = lab.folder()
    plays = []
    names = [f"result_{number}" for number in range(len(tasks))]
    body: t.List[Json] = [
        {"ignore_errors": True, **task, "register": name} for task, name in zip(tasks, names)
    ]
    copy = {
        "content": "{{ [" + ", ".join(names) + "] | to_json }}",
        "dest": str(folder / "results.json"),
        "mode": "0600",
    }
    body.append(
        {"ansible.builtin.copy": copy, "delegate_to": "localhost", "become": False,
         "check_mode": False, "diff": False}
    )  # fmt: skip
    plays.append({"hosts": "all", "gather_facts": False, "tasks": body})
    playbook = folder / "play.json"
    playbook.write_text(json.dumps(plays))
    settings: Json = {"ansible_python_interpreter": python}
    if inventory == "localhost,":
        settings["ansible_connection"] = "local"
        if lab.machine is not lab.local:
            settings["ansible_shell_executable"] = str(_shell(lab, folder))
    command = [str(pathlib.Path(sys.executable).parent / "ansible-playbook"), str(playbook)]
    command += ["-i", inventory, "-e", json.dumps({**settings, **(variables or {})})]
    command += ["--check"] * check + ["--diff"] * diff
    # A machine of another release sees the laboratory's folder, but not its /tmp.
    scratch = "/tmp" if lab.machine is lab.local else str(lab.folder(0o1777))
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "ANSIBLE_COLLECTIONS_PATH": str(lab.tree),
        "ANSIBLE_HOST_KEY_CHECKING": "false",
        "ANSIBLE_LOCAL_TEMP": str(folder / "local"),
        "ANSIBLE_REMOTE_TEMP": scratch,
        "ANSIBLE_SYSTEM_TMPDIRS": scratch,
        "ANSIBLE_NOCOLOR": "1",
        **(environ or {}),
    }
    done = lab.local.run(command, env=env, cwd=str(folder), check=False, timeout=timeout)
    path = folder / "results.json"
    if not path.exists():
        raise ModuleCrash(f"rc {done.rc}\n{done.stdout}\n{done.stderr}")
    results: t.List[Json] = json.loads(path.read_text())
    return results
