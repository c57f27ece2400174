# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare the store that podman, buildah and this collection use with given files and variables.

Runs inside a machine, as root: ``python3 -m support.discovery`` with rows as JSON on standard input. Each row gets a
mount namespace with an empty /etc/containers, /usr/share/containers, home and so on. Then the collection, the
real program, and the collection again determine the store; the last time with the files of the program.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import traceback
import typing as t

from . import mounts

Json = t.Dict[str, t.Any]

# Hidden by an empty directory.
_HIDDEN = (
    "/etc/containers",
    "/usr/share/containers",
    "/var/lib/containers",
    "/run/containers",
    "/run/libpod",
    "/root/.config",
    "/root/.local",
)


def compare(
    rows: t.Sequence[Json], machine: t.Any, tree: pathlib.Path, user: t.Any
) -> t.List[Json]:
    """Run rows on a machine.

    :param rows: ``files``, ``environment`` and ``rootless`` of each, optionally ``modes`` of files and the option
        ``runtime``; BASE, HOME and UID stand for those of the machine
    :param tree: the folder of ansible_collections, as the machine sees it
    :returns: for each row ``theirs`` (graphroot, runroot, driver, options, image_stores, or error), ``before`` and
        ``after``: the same of this collection
    """
    folder = tree / "ansible_collections/userns/storage/tests"
    task = {
        "rows": list(rows),
        "base": str(pathlib.Path(user.home).parent / "b"),
        "user": {"name": user.name, "uid": user.uid, "gid": user.gid, "home": user.home},
    }
    done = machine.run(
        ["python3", "-m", "support.discovery"],
        env={"PYTHONPATH": f"{tree}:{folder}", "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=json.dumps(task),
    )
    answers: t.List[Json] = json.loads(done.stdout)
    return answers


def filled(value: t.Any, base: str, user: Json) -> t.Any:
    """Replace BASE, HOME and UID, except in names of variables: $UID, ${HOME}, XDG_CONFIG_HOME."""
    if isinstance(value, dict):
        return {filled(key, base, user): filled(item, base, user) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, base, user) for item in value]
    if not isinstance(value, str):
        return value
    names = {"BASE": base, "HOME": user["home"], "UID": str(user["uid"])}
    return re.sub(r"(?<![${_])(BASE|HOME|UID)", lambda match: names[match.group(1)], value)


def _tmpfs(path: str, owner: t.Tuple[int, int], mode: str = "0755") -> None:
    os.makedirs(path, exist_ok=True)
    options = f"mode={mode},uid={owner[0]},gid={owner[1]}"
    mounts.mount("-t", "tmpfs", "-o", options, "row", path)


def _prepare(row: Json, base: str, user: Json) -> None:
    mounts.unshare_mounts()
    owner = (user["uid"], user["gid"])
    for path in _HIDDEN:
        _tmpfs(path, (0, 0))
    _tmpfs(base, owner, "0777")
    _tmpfs(user["home"], owner)
    _tmpfs(f"/run/user/{user['uid']}", owner, "0700")
    if row["rootless"]:
        _readable_controllers()
    for path, text in filled(row["files"], base, user).items():
        target = pathlib.Path(path)
        missing = [item for item in (target, *target.parents) if not item.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            target.symlink_to(text[3:])
        else:
            target.write_text(text)
        if path.startswith((user["home"], base)):
            for item in missing:
                os.chown(item, *owner, follow_symlinks=False)
    for path, mode in filled(row.get("modes", {}), base, user).items():
        os.chmod(path, mode)


def _readable_controllers() -> None:
    """Make the controllers of the cgroup readable for podman info of a user."""
    own = pathlib.Path("/proc/self/cgroup").read_text().splitlines()[-1].partition("::")[2]
    first, *rest = [part for part in own.split("/") if part]
    folder = pathlib.Path("/sys/fs/cgroup", first)
    mounts.mount("-t", "tmpfs", "row", str(folder))
    folder = folder.joinpath(*rest)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cgroup.controllers").write_text("cpu memory pids\n")


def _environment(row: Json, base: str, user: Json) -> t.Dict[str, str]:
    environ = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": "/root", "USER": "root"}
    if row["rootless"]:
        environ.update(
            HOME=user["home"], USER=user["name"], XDG_RUNTIME_DIR=f"/run/user/{user['uid']}"
        )
    environ.update(filled(row["environment"], base, user))
    return environ


def _theirs(program: str, environ: t.Mapping[str, str]) -> Json:
    command = {"podman": ["podman", "info", "--format=json"], "buildah": ["buildah", "info"]}[
        program
    ]
    done = subprocess.run(
        command, env=dict(environ), capture_output=True, text=True, check=False, cwd="/tmp"
    )
    if done.returncode != 0:
        return {"error": done.stderr.strip()[-500:]}
    info = json.loads(done.stdout)["store"]
    if program == "buildah":
        return {
            "graphroot": info["GraphRoot"],
            "runroot": info["RunRoot"],
            "driver": info["GraphDriverName"],
        }
    options: t.Dict[str, str] = {}
    stores: t.List[str] = []
    # The driver's own options override common options of the same name.
    for key, value in sorted((info["graphOptions"] or {}).items(), key=lambda item: "." in item[0]):
        prefix, _dot, rest = key.lower().rpartition(".")
        if prefix not in ("", info["graphDriverName"], f"{info['graphDriverName']}2"):
            continue
        if rest.endswith("additionalimagestores"):
            # With several stores, the older key contains only the last.
            stores = [part for text in value for part in text.split(",")]
        elif rest.endswith("imagestore"):
            stores = stores or value.split(",")
        elif not rest.endswith("additionallayerstore"):
            options[rest] = value["Executable"] if isinstance(value, dict) else value
    return {
        "graphroot": info["graphRoot"],
        "runroot": info["runRoot"],
        "driver": info["graphDriverName"],
        "options": options,
        "image_stores": [os.path.normpath(store) for store in stores],
        "transient": info.get("transientStore", False),
    }


def _ours(row: Json, program: str, environ: t.Mapping[str, str], user: Json) -> Json:
    from ansible_collections.userns.storage.plugins.module_utils._storage.errors import ConfigError
    from ansible_collections.userns.storage.plugins.module_utils._storage.operations.configuration import (
        configuration,
    )
    from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import (
        Account,
        StoreOverrides,
    )

    account = Account(user["name"], user["uid"], user["gid"], user["home"])
    try:
        found = configuration(
            StoreOverrides(),
            environ,
            account if row["rootless"] else None,
            # Without a name, podman and buildah of the machine are found.
            row.get("runtime", program if program != "podman" else ""),
        )
    except ConfigError as error:
        return {"error": str(error)}
    return {
        "graphroot": found.graphroot,
        "runroot": found.runroot,
        "driver": found.driver,
        "options": found.options,
        "image_stores": list(found.additional_image_stores),
        "transient": found.transient,
        "imagestore": found.imagestore,
        "files": list(found.files),
    }


def _switch_user(user: Json) -> None:
    os.setgroups([])
    os.setresgid(user["gid"], user["gid"], user["gid"])
    os.setresuid(user["uid"], user["uid"], user["uid"])


def _run(row: Json, base: str, user: Json) -> Json:
    _prepare(row, base, user)
    environ = _environment(row, base, user)
    program = row.get("program", "podman")
    if row["rootless"]:
        _switch_user(user)
    # As at a login, with the machine's own variables for the user's folders.
    os.environ.clear()
    os.environ.update(environ)
    before = _ours(row, program, environ, user)
    theirs = _theirs(program, environ)
    after = _ours(row, program, environ, user)
    if row["rootless"]:
        # podman's pause process.
        pause = pathlib.Path(f"/run/user/{user['uid']}/libpod/tmp/pause.pid")
        with contextlib.suppress(OSError, ValueError):
            os.kill(int(pause.read_text()), signal.SIGKILL)
    return {"before": before, "theirs": theirs, "after": after}


def _main() -> None:
    task = json.load(sys.stdin)
    answers = []
    for row in task["rows"]:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            with os.fdopen(writer, "w") as stream:
                try:
                    json.dump(_run(row, task["base"], task["user"]), stream)
                except BaseException:
                    json.dump({"failed": traceback.format_exc()}, stream)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as stream:
            answers.append(json.load(stream))
        os.waitpid(pid, 0)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    _main()
