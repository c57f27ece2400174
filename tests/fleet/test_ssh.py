# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules on a managed host that is reached by ssh, with each method by which Ansible runs modules."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import typing as t

import pytest
from support import managed_hosts
from support.modules import run_playbook
from support.slow_collection import create_slow_collection, whole_files
from support.stores import Store
from support.waiting import LIMIT, wait_until

if t.TYPE_CHECKING:
    from support.hosts import Host
    from support.images import Image
    from support.lab import Lab
    from support.users import User

Json = t.Dict[str, t.Any]
MAP = "0:100000:65536"
# About thirty jobs of a tree walk.
FILES = 4500


def _mitogen() -> t.Dict[str, str]:
    spec = importlib.util.find_spec("ansible_mitogen")
    assert spec is not None
    assert spec.origin is not None
    folder = pathlib.Path(spec.origin).parent / "plugins/strategy"
    return {"ANSIBLE_STRATEGY": "mitogen_linear", "ANSIBLE_STRATEGY_PLUGINS": str(folder)}


METHODS = {
    "pipelining": {"ANSIBLE_PIPELINING": "true"},
    "files": {"ANSIBLE_PIPELINING": "false"},
    "mitogen": _mitogen(),
}


@pytest.fixture(scope="module")
def remote(lab: Lab) -> managed_hosts.ManagedHost:
    """A host with an sshd."""
    return managed_hosts.ManagedHost(lab, "debian13")


@pytest.fixture(scope="module")
def inventory(lab: Lab, remote: managed_hosts.ManagedHost) -> pathlib.Path:
    """An inventory with that host."""
    return managed_hosts.inventory(lab.folder(), [remote])


@pytest.fixture
def store(lab: Lab, remote: managed_hosts.ManagedHost) -> t.Iterator[Store]:
    """A rootful store on that host."""
    made = Store(lab, "vfs", machine=remote.machine)
    yield made
    made.close()


@pytest.fixture(params=sorted(METHODS))
def method(request: pytest.FixtureRequest) -> t.Dict[str, str]:
    """Ansible's settings for a method of running modules."""
    return METHODS[request.param]


def _environ(lab: Lab, home: pathlib.Path, tree: t.Optional[pathlib.Path] = None) -> Json:
    tools = pathlib.Path(sys.executable).parent
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "ANSIBLE_COLLECTIONS_PATH": str(tree or lab.tree),
        "ANSIBLE_NOCOLOR": "1",
        # mitogen ignores the ssh options of the inventory that disable host key checking.
        "ANSIBLE_HOST_KEY_CHECKING": "false",
    }


def test_integration_targets_succeed(
    method: t.Dict[str, str], lab: Lab, inventory: pathlib.Path
) -> None:
    """All targets except that of the role prepare, which the molecule scenarios run by ssh."""
    folder = lab.folder()
    play = {
        "hosts": "all",
        "gather_facts": False,
        "roles": ["layer_template", "image_layers_info", "subordinate_ids"],
        "vars": {"setup_store_install": False},
    }
    (folder / "play.json").write_text(json.dumps([play]))
    environ = _environ(lab, folder)
    environ["ANSIBLE_ROLES_PATH"] = str(
        lab.tree / "ansible_collections/userns/storage/tests/integration/targets"
    )
    command = ["ansible-playbook", "-i", str(inventory), "play.json"]
    done = lab.machine.run(command, env={**environ, **method}, cwd=str(folder), check=False)
    assert done.rc == 0, done.stdout + done.stderr
    assert "failed=0" in done.stdout


def test_becoming_an_ordinary_user_works(
    method: t.Dict[str, str],
    lab: Lab,
    remote: managed_hosts.ManagedHost,
    inventory: pathlib.Path,
    small_image: Image,
    make_user: t.Callable[..., User],
) -> None:
    user = make_user(remote.machine)
    store = Store(lab, "rootless-overlay", machine=remote.machine, user=user)
    try:
        store.load(small_image)
        task = {
            "userns.storage.layer_template": {"images": small_image.name, "userns": "keep-id"},
            "become": True,
            "become_user": user.name,
            "become_method": "ansible.builtin.su",
        }
        results = run_playbook(
            lab,
            [task, task],
            inventory=str(inventory),
            environ={**method, **_environ(lab, lab.folder())},
        )
        first, second = results
        assert [item["action"] for item in first["layers"]] == ["created"], first
        assert first["stores"][0]["user"] == user.name
        assert [item["action"] for item in second["layers"]] == ["existing"]
        store.create(small_image.name, "--userns=keep-id")
        assert store.mapped_layers(small_image.name) == [first["layers"][0]["layer_id"]]
    finally:
        store.close()


def _module_args(store: Store, image: Image) -> Json:
    return {**store.module_args(), "images": image.name, "uidmap": [MAP]}


def test_async_task_succeeds(
    lab: Lab, inventory: pathlib.Path, store: Store, small_image: Image
) -> None:
    store.load(small_image)
    task = {
        "userns.storage.layer_template": _module_args(store, small_image),
        "async": 120,
        "poll": 1,
    }
    (result,) = run_playbook(lab, [task], inventory=str(inventory))
    assert [item["action"] for item in result["layers"]] == ["created"], result


@pytest.fixture(scope="module")
def slow_collection(lab: Lab) -> pathlib.Path:
    """The search path with a copy of the collection that works slowly."""
    return create_slow_collection(lab, 1)


@pytest.fixture
def project(
    lab: Lab,
    inventory: pathlib.Path,
    store: Store,
    many_files_image: t.Callable[[int], Image],
) -> t.Tuple[str, pathlib.Path]:
    """The name of an image in the store, and the folder with a play for it."""
    image = many_files_image(FILES)
    store.load(image)
    folder = lab.folder()
    (folder / "project").mkdir()
    (folder / "inventory").mkdir()
    shutil.copy(inventory, folder / "inventory/hosts.json")
    task = {"userns.storage.layer_template": _module_args(store, image)}
    play = {"hosts": "all", "gather_facts": False, "tasks": [task]}
    (folder / "project/play.json").write_text(json.dumps([play]))
    return image.name, folder


def _playbook(folder: pathlib.Path) -> t.List[str]:
    return ["ansible-playbook", "-i", "inventory/hosts.json", "project/play.json"]


def test_progress_is_displayed_beside_the_results(
    lab: Lab,
    store: Store,
    slow_collection: pathlib.Path,
    project: t.Tuple[str, pathlib.Path],
) -> None:
    image, folder = project
    environ = {**_environ(lab, folder, slow_collection), **METHODS["pipelining"]}
    done = lab.machine.run(_playbook(folder), env=environ, cwd=str(folder))
    lines = [line for line in done.stderr.splitlines() if line.startswith("debian13 | ")]
    assert lines
    assert f"{image} for {MAP}: " in lines[0]
    assert "% done" in lines[0]
    assert lines[0].startswith("debian13 | 0 of 1 layers created, ")
    assert "debian13 | " not in done.stdout
    assert "changed=1" in done.stdout
    assert len(store.mapped_layers(image)) == 1


def test_progress_does_not_change_json_of_a_callback(
    lab: Lab,
    collections_path: str,
    slow_collection: pathlib.Path,
    project: t.Tuple[str, pathlib.Path],
) -> None:
    image, folder = project
    environ = _environ(lab, folder, slow_collection)
    environ["ANSIBLE_COLLECTIONS_PATH"] += os.pathsep + collections_path
    environ["ANSIBLE_STDOUT_CALLBACK"] = "ansible.posix.json"
    done = lab.machine.run(_playbook(folder), env=environ, cwd=str(folder))
    assert f"; now {image} for {MAP}: " in done.stderr
    output = json.loads(done.stdout)
    assert output["stats"]["debian13"]["changed"] == 1
    (task,) = output["plays"][0]["tasks"]
    assert [item["action"] for item in task["hosts"]["debian13"]["layers"]] == ["created"]


def test_progress_is_in_the_events_of_ansible_runner(
    lab: Lab,
    store: Store,
    slow_collection: pathlib.Path,
    project: t.Tuple[str, pathlib.Path],
) -> None:
    image, folder = project
    command = ["ansible-runner", "run", str(folder), "-p", "play.json", "--ident", "1", "-q"]
    lab.machine.run(command, env=_environ(lab, folder, slow_collection))
    events = [
        json.loads(path.read_text()) for path in (folder / "artifacts/1/job_events").glob("*.json")
    ]
    shown = [event for event in events if f"; now {image} for " in event.get("stdout", "")]
    assert {item["event"] for item in shown} == {"verbose"}
    result = next(event for event in events if event["event"] == "runner_on_ok")["event_data"][
        "res"
    ]
    assert [item["action"] for item in result["layers"]] == ["created"]
    assert (result["changed"], result["partial"], result["remaining"]) == (True, False, 0)


def _pythons(machine: Host) -> t.List[str]:
    """The command lines of all Python processes on a host, including orphaned processes."""
    root = os.stat(f"{machine.root}/.")
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = os.stat(f"/proc/{entry}/root/.")
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                line = file.read().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        on_host = (status.st_dev, status.st_ino) == (root.st_dev, root.st_ino)
        if on_host and int(entry) != machine.pid and "python" in line:
            found.append(line)
    return found


@pytest.mark.parametrize(
    ("method", "number"),
    [("pipelining", signal.SIGINT), ("files", signal.SIGTERM), ("mitogen", signal.SIGINT)],
)
def test_interrupted_play_leaves_no_process_and_can_be_resumed(
    method: str,
    number: signal.Signals,
    lab: Lab,
    remote: managed_hosts.ManagedHost,
    store: Store,
    slow_collection: pathlib.Path,
    project: t.Tuple[str, pathlib.Path],
) -> None:
    image, folder = project
    environ = {**_environ(lab, folder, slow_collection), **METHODS[method]}
    play = lab.machine.popen(
        _playbook(folder),
        env=environ,
        cwd=str(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    staging = store.graphroot / "userns-storage/staging"
    wait_until(lambda: whole_files(staging), while_running=play)
    assert _pythons(remote.machine)
    # A terminal also signals the whole process group.
    os.killpg(play.pid, number)
    play.wait(LIMIT)
    wait_until(
        lambda: not _pythons(remote.machine), describe=lambda: _pythons(remote.machine), pause=0.1
    )
    assert store.mapped_layers(image) == []
    (suspended,) = os.listdir(staging)
    assert (staging / suspended / "suspended").exists()
    kept = whole_files(staging)
    done = lab.machine.run(_playbook(folder), env=environ, cwd=str(folder))
    assert "changed=1" in done.stdout
    assert os.listdir(staging) == []
    (layer,) = store.mapped_layers(image)
    with store.mounted(layer) as tree:
        assert kept <= whole_files(tree)
