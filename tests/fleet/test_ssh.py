# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The modules on a managed host that is reached by ssh, in each way that Ansible has to run them there."""

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
from support import managed, paces
from support.modules import run_playbook
from support.stores import Store
from support.waiting import LIMIT, wait_until

if t.TYPE_CHECKING:
    from support.hosts import Host
    from support.images import Image
    from support.lab import Lab
    from support.users import User

Json = t.Dict[str, t.Any]
MAP = "0:100000:65536"
# Some thirty jobs of a walk.
FILES = 4500


def _mitogen() -> t.Dict[str, str]:
    spec = importlib.util.find_spec("ansible_mitogen")
    assert spec is not None
    assert spec.origin is not None
    folder = pathlib.Path(spec.origin).parent / "plugins/strategy"
    return {"ANSIBLE_STRATEGY": "mitogen_linear", "ANSIBLE_STRATEGY_PLUGINS": str(folder)}


WAYS = {
    "pipelining": {"ANSIBLE_PIPELINING": "true"},
    "files": {"ANSIBLE_PIPELINING": "false"},
    "mitogen": _mitogen(),
}


@pytest.fixture(scope="module")
def remote(lab: Lab) -> managed.Managed:
    """A host with an sshd."""
    return managed.Managed(lab, "debian13")


@pytest.fixture(scope="module")
def inventory(lab: Lab, remote: managed.Managed) -> pathlib.Path:
    """That host, for Ansible."""
    return managed.inventory(lab.folder(), [remote])


@pytest.fixture
def store(lab: Lab, remote: managed.Managed) -> t.Iterator[Store]:
    """A rootful store on it."""
    made = Store(lab, "vfs", machine=remote.machine)
    yield made
    made.close()


@pytest.fixture(params=sorted(WAYS))
def way(request: pytest.FixtureRequest) -> t.Dict[str, str]:
    """Ansible's settings for one way to run a module."""
    return WAYS[request.param]


def _environ(lab: Lab, home: pathlib.Path, tree: t.Optional[pathlib.Path] = None) -> Json:
    tools = pathlib.Path(sys.executable).parent
    return {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(home),
        "ANSIBLE_COLLECTIONS_PATH": str(tree or lab.tree),
        "ANSIBLE_NOCOLOR": "1",
        # mitogen does not look at the inventory's options of ssh for that.
        "ANSIBLE_HOST_KEY_CHECKING": "false",
    }


def test_integration_targets(way: t.Dict[str, str], lab: Lab, inventory: pathlib.Path) -> None:
    """All but that of the role prepare, which molecule's scenarios run by ssh."""
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
    words = ["ansible-playbook", "-i", str(inventory), "play.json"]
    done = lab.machine.run(words, env={**environ, **way}, cwd=str(folder), check=False)
    assert done.rc == 0, done.stdout + done.stderr
    assert "failed=0" in done.stdout


def test_becoming_an_ordinary_user(
    way: t.Dict[str, str],
    lab: Lab,
    remote: managed.Managed,
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
            environ={**way, **_environ(lab, lab.folder())},
        )
        first, second = results
        assert [item["action"] for item in first["layers"]] == ["created"], first
        assert first["stores"][0]["user"] == user.name
        assert [item["action"] for item in second["layers"]] == ["existing"]
        store.create(small_image.name, "--userns=keep-id")
        assert store.mapped_layers(small_image.name) == [first["layers"][0]["layer_id"]]
    finally:
        store.close()


def _asked(store: Store, image: Image) -> Json:
    return {**store.module_args(), "images": image.name, "uidmap": [MAP]}


def test_async(lab: Lab, inventory: pathlib.Path, store: Store, small_image: Image) -> None:
    store.load(small_image)
    task = {
        "userns.storage.layer_template": _asked(store, small_image),
        "async": 120,
        "poll": 1,
    }
    (result,) = run_playbook(lab, [task], inventory=str(inventory))
    assert [item["action"] for item in result["layers"]] == ["created"], result


@pytest.fixture(scope="module")
def slow(lab: Lab) -> pathlib.Path:
    """Where the collection is found that takes its time."""
    return paces.slow_collection(lab, 1)


@pytest.fixture
def project(
    lab: Lab,
    inventory: pathlib.Path,
    store: Store,
    many_files_image: t.Callable[[int], Image],
) -> t.Tuple[str, pathlib.Path]:
    """The name of an image in the store, and where a play for it is."""
    image = many_files_image(FILES)
    store.load(image)
    folder = lab.folder()
    (folder / "project").mkdir()
    (folder / "inventory").mkdir()
    shutil.copy(inventory, folder / "inventory/hosts.json")
    task = {"userns.storage.layer_template": _asked(store, image)}
    play = {"hosts": "all", "gather_facts": False, "tasks": [task]}
    (folder / "project/play.json").write_text(json.dumps([play]))
    return image.name, folder


def _playbook(folder: pathlib.Path) -> t.List[str]:
    return ["ansible-playbook", "-i", "inventory/hosts.json", "project/play.json"]


def test_progress_is_shown_beside_the_results(
    lab: Lab,
    store: Store,
    slow: pathlib.Path,
    project: t.Tuple[str, pathlib.Path],
) -> None:
    image, folder = project
    environ = {**_environ(lab, folder, slow), **WAYS["pipelining"]}
    done = lab.machine.run(_playbook(folder), env=environ, cwd=str(folder))
    lines = [line for line in done.stderr.splitlines() if line.startswith("debian13 | ")]
    assert lines
    assert f"{image} for {MAP}: " in lines[0]
    assert "% done" in lines[0]
    assert lines[0].startswith("debian13 | 0 of 1 layers created, ")
    assert "debian13 | " not in done.stdout
    assert "changed=1" in done.stdout
    assert len(store.mapped_layers(image)) == 1


def test_progress_leaves_a_callback_its_json(
    lab: Lab,
    collections_path: str,
    slow: pathlib.Path,
    project: t.Tuple[str, pathlib.Path],
) -> None:
    image, folder = project
    environ = _environ(lab, folder, slow)
    environ["ANSIBLE_COLLECTIONS_PATH"] += os.pathsep + collections_path
    environ["ANSIBLE_STDOUT_CALLBACK"] = "ansible.posix.json"
    done = lab.machine.run(_playbook(folder), env=environ, cwd=str(folder))
    assert f"; now {image} for {MAP}: " in done.stderr
    told = json.loads(done.stdout)
    assert told["stats"]["debian13"]["changed"] == 1
    (task,) = told["plays"][0]["tasks"]
    assert [item["action"] for item in task["hosts"]["debian13"]["layers"]] == ["created"]


def test_progress_is_among_the_events_of_a_runner(
    lab: Lab,
    store: Store,
    slow: pathlib.Path,
    project: t.Tuple[str, pathlib.Path],
) -> None:
    image, folder = project
    words = ["ansible-runner", "run", str(folder), "-p", "play.json", "--ident", "1", "-q"]
    lab.machine.run(words, env=_environ(lab, folder, slow))
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
    """Command lines of the Pythons that run on a host, whoever has inherited them."""
    root = os.stat(f"{machine.root}/.")
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            status = os.stat(f"/proc/{entry}/root/.")
            with open(f"/proc/{entry}/cmdline", "rb") as words:
                line = words.read().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        here = (status.st_dev, status.st_ino) == (root.st_dev, root.st_ino)
        if here and int(entry) != machine.pid and "python" in line:
            found.append(line)
    return found


@pytest.mark.parametrize(
    ("way", "number"),
    [("pipelining", signal.SIGINT), ("files", signal.SIGTERM), ("mitogen", signal.SIGINT)],
)
def test_an_interrupted_play_leaves_nothing_running(
    way: str,
    number: signal.Signals,
    lab: Lab,
    remote: managed.Managed,
    store: Store,
    slow: pathlib.Path,
    project: t.Tuple[str, pathlib.Path],
) -> None:
    image, folder = project
    environ = {**_environ(lab, folder, slow), **WAYS[way]}
    play = lab.machine.popen(
        _playbook(folder),
        env=environ,
        cwd=str(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    staging = store.graphroot / "userns-storage/staging"
    wait_until(lambda: paces.whole_files(staging), while_running=play)
    assert _pythons(remote.machine)
    # As a terminal does it, to the whole process group.
    os.killpg(play.pid, number)
    play.wait(LIMIT)
    wait_until(
        lambda: not _pythons(remote.machine), describe=lambda: _pythons(remote.machine), pause=0.1
    )
    assert store.mapped_layers(image) == []
    (left,) = os.listdir(staging)
    assert (staging / left / "suspended").exists()
    kept = paces.whole_files(staging)
    done = lab.machine.run(_playbook(folder), env=environ, cwd=str(folder))
    assert "changed=1" in done.stdout
    assert os.listdir(staging) == []
    (layer,) = store.mapped_layers(image)
    with store.mounted(layer) as tree:
        assert kept <= paces.whole_files(tree)
