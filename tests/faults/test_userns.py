# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Functions that run in namespaces of root and of users: their IDs, their results and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import pwd
import re
import signal
import subprocess
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import (
    InternalError,
    LayerInUse,
    NamespaceError,
    StorageError,
    StoreError,
    WorkerError,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    rootless_stores_info,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import Account
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import channel, shapes
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import (
    running as userns,
)
from support import namespace_functions
from support.machines import DEFAULT_SIGNALS
from support.namespace_functions import crash, state
from support.waiting import LIMIT, wait_until

if t.TYPE_CHECKING:
    from support.lab import Lab
    from support.users import User

MakeUser = t.Callable[..., "User"]

# The text of a module that users import, because they cannot read root's files.
INSIDE = pathlib.Path(namespace_functions.__file__).read_text()


def refuse() -> None:
    raise LayerInUse(
        "layer abc", "is in use", "Wait.", users=[{"id": "c1", "name": "db"}], odd={1, 2}
    )


def kill_own_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def return_class() -> t.Any:
    return subprocess.Popen


def mount_tmpfs(path: str) -> bool:
    from support import mounts

    mounts.mount("-t", "tmpfs", "inside", path)
    return os.path.ismount(path)


def account(user: User) -> t.Any:
    return Account(user.name, user.uid, user.gid, user.home)


def test_root_gets_own_mount_namespace(lab: Lab) -> None:
    answer = userns.run(state)
    assert answer["mounts"] != os.readlink("/proc/self/ns/mnt")
    assert answer["users"] == os.readlink("/proc/self/ns/user")
    assert answer["pid"] != os.getpid()
    assert answer["environ"] == dict(os.environ)
    folder = lab.folder()
    assert userns.run(mount_tmpfs, [str(folder)])
    assert not os.path.ismount(folder)


def test_root_becomes_the_user(lab: Lab, make_user: MakeUser, monkeypatch: t.Any) -> None:
    user = make_user()
    home = pathlib.Path(user.home)
    monkeypatch.setenv("XDG_DATA_HOME", "/root/data")
    monkeypatch.setenv("SECRET_OF_ROOT", "x")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    answer = userns.run(state, [str(home / "made")], account(user))
    assert answer["ids"] == [0] * 6
    assert answer["uid_map"] == ["0", str(user.uid), "1", "1", str(user.subuid_start), "65536"]
    assert answer["gid_map"] == ["0", str(user.gid), "1", "1", str(user.subuid_start), "65536"]
    assert answer["mounts"] != os.readlink("/proc/self/ns/mnt")
    assert int(answer["capabilities"], 16) & (1 << 21)
    assert answer["cwd"] == "/"
    seen = os.stat(home / "made")
    assert (seen.st_uid, seen.st_gid) == (user.subuid_start + 4, user.subuid_start + 5)
    assert answer["file"] == [5, 6]
    environ = answer["environ"]
    assert environ["HOME"] == user.home
    assert environ["USER"] == environ["LOGNAME"] == user.name
    assert environ["XDG_RUNTIME_DIR"] == f"/run/user/{user.uid}"
    assert environ["LC_ALL"] == "C.UTF-8"
    assert "SECRET_OF_ROOT" not in environ
    assert "XDG_DATA_HOME" not in environ


def test_root_has_only_the_rights_of_the_user(lab: Lab, make_user: MakeUser) -> None:
    user = make_user()
    secret = lab.folder() / "secret"
    secret.write_text("root's own")
    secret.chmod(0o600)
    with pytest.raises(InternalError, match="PermissionError"):
        userns.run(open_it, [str(secret)], account(user))


def open_it(path: str) -> None:
    with open(path, encoding="utf-8"):
        pass


def test_supplementary_groups_are_kept(lab: Lab, make_user: MakeUser) -> None:
    user, other = make_user(), make_user()
    lab.machine.run(["usermod", "-aG", other.name, user.name])
    folder = lab.folder()
    (folder / "shared").write_text("for the group")
    os.chown(folder / "shared", 0, other.gid)
    (folder / "shared").chmod(0o640)
    userns.run(open_it, [str(folder / "shared")], account(user))


def test_storage_errors_keep_class_and_fields(lab: Lab, make_user: MakeUser) -> None:
    with pytest.raises(LayerInUse) as caught:
        userns.run(refuse, [], account(make_user()))
    # Facts of an unknown form are not transferred.
    assert caught.value.facts == {"users": [{"id": "c1", "name": "db"}]}
    assert str(caught.value) == "layer abc: is in use. Wait."


def test_other_errors_contain_the_traceback() -> None:
    with pytest.raises(InternalError, match="ValueError: as it happens") as caught:
        userns.run(crash)
    assert "in crash" in caught.value.facts["trace"]


def test_killed_child_is_reported() -> None:
    with pytest.raises(WorkerError, match="killed by signal 9"):
        userns.run(kill_own_process)


def test_results_cannot_contain_code() -> None:
    with pytest.raises(StoreError, match="is not plain data"):
        userns.run(return_class)


# Messages that a compromised process may send instead of a result
FORGED: t.Mapping[str, t.Tuple[bytes, t.Any]] = {
    "no namespace": (channel.FORBIDDEN, {"errno": 1, "step": "unshare"}),
    "no namespace, unknown error": (channel.FORBIDDEN, {"errno": 10**20, "step": "unshare"}),
    "negative error": (channel.FORBIDDEN, {"errno": -1, "step": "unshare"}),
    "repeated entry into a namespace": (channel.ENTERED, {"pid": 1}),
    "huge PID": (channel.ENTERED, {"pid": 10**20}),
    "an error with a huge number": (
        channel.ERROR,
        {"kind": "StoreError", "subject": "", "cause": "", "hint": "", "facts": {"errno": 10**29}},
    ),
    "a result of another form": (channel.RESULT, {"ansible_facts": {}}),
}


def open_files() -> t.List[t.Tuple[str, str]]:
    """The descriptors of this process and their targets."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


@userns.returns(shapes.text)
def send_forged(kind: str, value: t.Any, inherited: t.Sequence[str]) -> str:
    """Write a message to each pipe of this process that its grandparents do not have."""
    data = json.dumps(value).encode()
    for name, target in open_files():
        if target.startswith("pipe:") and target not in inherited:
            with contextlib.suppress(OSError):
                os.write(int(name), channel._HEADER.pack(kind.encode(), len(data)) + data)
    signal.pause()
    return ""


@pytest.mark.parametrize("forged", FORGED)
@pytest.mark.parametrize("run", [userns.run, userns.run_as])
def test_forged_messages_cause_storage_errors(
    lab: Lab, make_user: MakeUser, run: t.Any, forged: str
) -> None:
    user = make_user()
    kind, value = FORGED[forged]
    inherited = [target for _name, target in open_files()]
    with pytest.raises(StorageError, match=f"user {user.name}|^: ") as raised:
        run(send_forged, (kind.decode(), value, inherited), account(user))
    assert not isinstance(raised.value, InternalError)


def test_unresponsive_home_does_not_hide_other_users(
    lab: Lab, make_user: MakeUser, monkeypatch: t.Any
) -> None:
    """A user may kill the process that inspects the user's home directory."""
    hostile, other = sorted((make_user(), make_user()), key=lambda user: user.uid)
    entries = [pwd.getpwnam(user.name) for user in (hostile, other)]
    in_home = [pwd.struct_passwd((*entry[:5], f"/home/{entry[0]}", entry[6])) for entry in entries]
    monkeypatch.setattr(pwd, "getpwall", lambda: in_home)
    monkeypatch.setattr(
        rootless_stores_info,
        "_graphroot",
        lambda item: (
            os.kill(os.getpid(), signal.SIGKILL) if item.name == hostile.name else "/found"
        ),
    )
    found = rootless_stores_info.find()
    assert [item["user"] for item in found["stores"]] == [other.name]
    assert [item["user"] for item in found["failures"]] == [hostile.name]
    # The wait is limited if many homes do not respond, for example because their server is down.
    monkeypatch.setattr(rootless_stores_info, "_PATIENCE", 0.0)
    found = rootless_stores_info.find()
    assert found["stores"] == []
    assert "too many home directories in /home do not respond" in found["failures"][1]["reason"]


def test_missing_subordinate_ids_are_reported(lab: Lab, make_user: MakeUser) -> None:
    user = make_user(subordinate=0)
    with pytest.raises(NamespaceError) as caught:
        userns.run(state, [], account(user))
    assert "/etc/subuid" in str(caught.value)
    assert re.search(rf"{user.name}:\d+:65536", str(caught.value))


# Separate processes of the user


def as_user(
    lab: Lab, user: User, script: str, **options: t.Any
) -> subprocess.CompletedProcess[str]:
    """Run Python statements as a user who is logged in; the module `inside` has the text of INSIDE."""
    command = command_as_user(lab, user, script, **options)
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)


def command_as_user(lab: Lab, user: User, script: str, **options: t.Any) -> t.List[str]:
    folder = lab.folder()
    (folder / "inside.py").write_text(INSIDE)
    head = (
        f"import json, sys; sys.path[:0] = [{str(lab.tree)!r}, {str(folder)!r}]\n"
        "from ansible_collections.userns.storage.plugins.module_utils._storage.userns import running as userns\n"
        "import inside\n"
    )
    command: t.List[str] = lab.machine.command(
        ["/usr/bin/python3", "-B", "-c", head + script], account=user, **options
    )
    return command


def test_user_gets_own_namespace(lab: Lab, make_user: MakeUser) -> None:
    user = make_user()
    done = as_user(lab, user, "print(json.dumps(userns.run(inside.state)))")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ids"] == [0] * 6
    assert answer["uid_map"] == ["0", str(user.uid), "1", "1", str(user.subuid_start), "65536"]
    assert answer["mounts"] != os.readlink("/proc/self/ns/mnt")


THROUGH_PODMAN = (
    "login = userns.caller(__import__('os').getuid())\n"
    "def run(function, *arguments):\n"
    "    reason = userns.Forbidden(13, 'mounting')\n"
    "    return userns.run_through_podman(function, arguments, login, reason)\n"
)


def test_function_runs_through_podman(lab: Lab, make_user: MakeUser) -> None:
    user = make_user()
    script = THROUGH_PODMAN + (
        f"answer = run(inside.state, '{user.home}/made')\n"
        "try:\n"
        "    run(inside.crash)\n"
        "except Exception as error:\n"
        "    assert 'ValueError' in str(error), error\n"
        "print(json.dumps(answer))\n"
    )
    done = as_user(lab, user, script)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ids"] == [0] * 6
    seen = os.stat(pathlib.Path(user.home) / "made")
    assert (seen.st_uid, seen.st_gid) == (user.subuid_start + 4, user.subuid_start + 5)
    assert "inside" not in done.stderr


def test_failure_of_podman_is_reported(lab: Lab, make_user: MakeUser) -> None:
    user = make_user()
    folder = lab.folder()
    (folder / "podman").write_text("#!/bin/sh\necho no namespaces here >&2\nexit 125\n")
    (folder / "podman").chmod(0o755)
    script = THROUGH_PODMAN + "run(inside.state)\n"
    done = as_user(lab, user, script, env={"PATH": f"{folder}:/usr/bin:/bin"})
    assert done.returncode != 0
    assert "NamespaceError" in done.stderr
    assert "no namespaces here" in done.stderr


@pytest.mark.parametrize("how", ["output closed", "output closed below nohup", "terminated"])
def test_child_of_podman_ends_with_the_module(lab: Lab, make_user: MakeUser, how: str) -> None:
    """The child ends if the output of the module is closed, and if the module is terminated."""
    user = make_user()
    pid_file = pathlib.Path(user.home) / "pid"
    command = command_as_user(lab, user, THROUGH_PODMAN + f"run(inside.stay, {str(pid_file)!r})\n")
    if how.endswith("nohup"):
        command[command.index(DEFAULT_SIGNALS)] = "--ignore-signal=HUP,INT"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        child = int(wait_for_content(pid_file))
        if how == "terminated":
            process.terminate()
        assert process.stdout is not None
        process.stdout.close()
        assert process.wait(LIMIT) != 0
    assert_ended(child)


def test_another_user_is_refused(lab: Lab, make_user: MakeUser) -> None:
    user, other = make_user(), make_user()
    script = f"userns.run(inside.state, [], userns.caller({other.uid}))"
    done = as_user(lab, user, script)
    assert f"become_user: {other.name}" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_child_ends_with_its_parent(lab: Lab, make_user: MakeUser, number: signal.Signals) -> None:
    user = make_user()
    pid_file = lab.folder() / "pid"
    parent = os.fork()
    if parent == 0:
        try:
            userns.run(write_pid_and_wait, [str(pid_file)], account(user))
        finally:
            os._exit(1)
    os.chown(pid_file.parent, user.uid, user.gid)
    child = int(wait_for_content(pid_file))
    os.kill(parent, number)
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == -number
    assert_ended(child)


def assert_ended(child: int) -> None:
    wait_until(lambda: _ended(child))


def _ended(pid: int) -> bool:
    """Whether a process has ended, even if its parent has not collected its status yet."""
    try:
        return ") Z " in pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def write_pid_and_wait(path: str) -> None:
    def write_pid() -> bool:
        with contextlib.suppress(PermissionError):
            return pathlib.Path(path).write_text(str(os.getpid())) > 0
        return False

    wait_until(write_pid)
    signal.pause()


def wait_for_content(path: pathlib.Path) -> str:
    """Wait until a file has content; returns the content."""
    return wait_until(lambda: path.exists() and path.read_text()) or ""


def test_store_is_not_opened_as_root(lab: Lab, make_user: MakeUser) -> None:
    """strace shows that only the child opens files of the store, after it has switched to the user's IDs."""
    user = make_user()
    folder = pathlib.Path(user.home) / "store"
    folder.mkdir()
    os.chown(folder, user.uid, user.gid)
    trace = lab.folder() / "trace"
    script = (
        f"import sys; sys.path[:0] = {[str(lab.tree), str(trace.parent)]!r}\n"
        "from ansible_collections.userns.storage.plugins.module_utils._storage.userns import running as userns\n"
        f"login = userns.caller({user.uid})\n"
        f"import inside\nuserns.run(inside.state, [{str(folder / 'file')!r}], login)\n"
    )
    (trace.parent / "inside.py").write_text(INSIDE)
    command = ["strace", "-f", "-o", str(trace), "-e", "trace=openat,unshare,setresuid,setresgid"]
    subprocess.run([*command, "/usr/bin/python3", "-B", "-c", script], check=True, timeout=LIMIT)
    lines = trace.read_text().splitlines()
    child = next(line.split()[0] for line in lines if "unshare(" in line)
    own = [line for line in lines if line.split()[0] == child]
    position = {
        what: next(number for number, line in enumerate(own) if what in line)
        for what in ("unshare(", "setresgid(0", "setresuid(0", str(folder))
    }
    assert list(position) == sorted(position, key=lambda what: position[what])
    assert not any(user.home in line for line in lines if line.split()[0] != child)
    assert os.stat(folder / "file").st_uid == user.subuid_start + 4
