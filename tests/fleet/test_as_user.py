# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""In complete plays that root runs for users, no path below a home is resolved with root's rights."""

from __future__ import annotations

import json
import re
import signal
import time
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
    account_named,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.service import watching
from ansible_collections.userns.storage.plugins.plugin_utils import _zipapp
from support import modules, path_trace
from support.machines import ROOT
from support.registry import Registry

LOCAL = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}


@pytest.fixture
def user_store(make_store: t.Any, small_image: t.Any) -> t.Any:
    """A user's store at its default location, with an image."""
    return make_store("rootless-vfs", small_image)


def assert_only_user_access(done: t.Any, user: t.Any, count: int) -> None:
    """Assert that only the user's IDs resolved paths below the home, and at least `count` of them."""
    assert done.trace.as_root == ()
    assert done.trace.as_others.get(user.uid, 0) >= count, done.trace
    own = {user.uid, *range(user.subuid_start, user.subuid_start + user.subuid_count)}
    assert set(done.trace.as_others) <= own


def inventory(**variables: t.Any) -> t.Dict[str, t.Any]:
    return {"all": {"hosts": {"one": {**LOCAL, "prepare_install": False, **variables}}}}


def test_prepare_opens_homes_as_the_user(
    play: t.Any, user_store: t.Any, small_image: t.Any
) -> None:
    hosts = inventory(
        prepare_users=user_store.user.name,
        prepare_driver="vfs",
        prepare_storage_options="vfs.ignore_chown_errors=false",
        prepare_images=f"{small_image.name} localhost/other:1={small_image.source}",
        prepare_mappings="keep-id",
        prepare_service="present",
    )
    for options in (["--check", "--diff"], []):
        below = [user_store.user.home, user_store.user.runtime_dir]
        done = play("userns.storage.prepare", hosts, *options, below=below)
        assert_only_user_access(done, user_store.user, 100)
        assert f"{user_store.user.name}: nothing runs, because systemd does not run" in done.output
        assert f"Nothing watches {user_store.graphroot}/" in done.output
        (line,) = re.findall(rf'"({user_store.user.name}: [0-9]+ image.*)"', done.output)
        predicted = "--check" in options
        assert line.startswith(
            f"{user_store.user.name}: 1 image {'would be ' if predicted else ''}pulled"
        )
        assert bool(re.search(r"; mapped layers: 1 created \([0-9.]+ [KM]iB\)$", line)) != predicted
        assert "watch /etc/userns-storage/ready" in done.output
    assert len(user_store.mapped_layers(small_image.name)) == 1


def test_prune_opens_homes_as_the_user(play: t.Any, user_store: t.Any) -> None:
    hosts = inventory(prune_users=user_store.user.name, prune_max_copies_per_image="0")
    done = play("userns.storage.prune", hosts, below=[user_store.user.home])
    assert_only_user_access(done, user_store.user, 20)
    assert re.search(
        rf'"{user_store.user.name}: [0-9]+ mapped layers? removed, 0 kept', done.output
    )


def test_report_opens_homes_as_the_user(play: t.Any, user_store: t.Any) -> None:
    done = play(
        "userns.storage.report", inventory(report_rootful=False), below=[user_store.user.home]
    )
    assert_only_user_access(done, user_store.user, 20)
    assert f"(item={user_store.user.name})" in done.output
    assert re.search(rf'"one: {user_store.user.name}: [0-9]+ images? and ', done.output)
    assert f"The page is {done.folder}/userns-storage-report.html" in done.output


def test_link_to_store_of_another_user_is_not_reported(
    play: t.Any, user_store: t.Any, make_user: t.Any, lab: t.Any
) -> None:
    other = make_user()
    path = f"{other.home}/.local/share/containers"
    lab.machine.run(["mkdir", "-p", path])
    lab.machine.run(["ln", "-s", str(user_store.graphroot), f"{path}/storage"])
    lab.machine.run(["chown", "-Rh", f"{other.uid}:{other.gid}", other.home])
    done = play("userns.storage.report", inventory(report_rootful=False), below=[other.home])
    assert done.trace.as_root == ()
    assert f"(item={user_store.user.name})" in done.output
    assert f"(item={other.name})" not in done.output


@pytest.mark.parametrize("command", ["ready", "collect", "watch"])
def test_service_opens_homes_as_the_user(
    command: str, user_store: t.Any, small_image: t.Any, lab: t.Any
) -> None:
    """The service runs as root for the store of a user."""
    folder = lab.folder()
    (folder / "program").write_bytes(_zipapp.build())
    store = {
        "user": user_store.user.name,
        "images": [small_image.name],
        "mappings": [{"userns": "keep-id"}],
        "policy": {"min_age": "0", "max_copies_per_image": 0},
    }
    (folder / "config").write_text(json.dumps({"stores": [store]}))
    arguments = ["/usr/bin/python3", f"{folder}/program", command, f"{folder}/config"]
    environ = lab.machine.environ(ROOT)
    if command == "collect":
        user_store.create(small_image.name, "--userns=keep-id")
        user_store.podman("rm", "--all")
    if command == "watch":
        arguments += ["--interval", "0.2", "--quiet", "0"]
    done = path_trace.trace(
        arguments,
        [user_store.user.home],
        env=environ,
        until=(lambda output: output.count("created layer") == 1) if command == "watch" else None,
    )
    assert done.rc == (-signal.SIGTERM if command == "watch" else 0), done.output
    assert done.as_root == ()
    assert done.as_others.get(user_store.user.uid, 0) > 20
    assert len(user_store.mapped_layers(small_image.name)) == (0 if command == "collect" else 1)


MODULES: t.Mapping[str, t.Dict[str, t.Any]] = {
    "layer_template": {"userns": "keep-id", "force": True},
    "image_layers": {},
    "image_layers_info": {"measure": "exclusive"},
    "layer_gc": {"orphans": "remove", "broken": "repair", "min_age": "0"},
    "storage_conf": {"settings": {"vfs.ignore_chown_errors": "false"}},
}


def run_traced(lab: t.Any, user_store: t.Any, name: str, args: t.Mapping[str, t.Any]) -> t.Any:
    """Run a module as root for the user, under the tracer."""
    command = modules._command(name, args, False, True, modules.SYSTEM_PYTHON)
    environ = lab.machine.environ(
        ROOT, {"PYTHONPATH": str(lab.tree), "PYTHONDONTWRITEBYTECODE": "1"}
    )
    return path_trace.trace(command, [user_store.user.home], env=environ)


@pytest.mark.parametrize("name", MODULES)
def test_module_opens_homes_as_the_user(
    name: str, user_store: t.Any, small_image: t.Any, lab: t.Any
) -> None:
    """The module runs in a valid store, and in a store with truncated records."""
    args: t.Dict[str, t.Any] = {"user": user_store.user.name, **MODULES[name]}
    if name != "storage_conf":
        # The options describe the whole store, so the programs need a file with its location.
        args.update(user_store.module_args(), images=[small_image.name])
    if name == "image_layers":
        args.update(images=["localhost/brought:1"], source=small_image.source)
    done = run_traced(lab, user_store, name, args)
    assert done.rc == 0, done.output
    assert done.as_root == ()
    assert done.as_others.get(user_store.user.uid, 0) > 0
    if name == "image_layers":
        assert (
            user_store.image("localhost/brought:1")["id"]
            == user_store.image(small_image.name)["id"]
        )
    records = user_store.graphroot / "vfs-images/images.json"
    records.write_text(records.read_text()[:-20])
    broken = run_traced(lab, user_store, name, args)
    assert broken.as_root == ()
    # image_layers_info describes such a store; the modules that use the records refuse it.
    assert (broken.rc != 0) == (name not in ("image_layers_info", "storage_conf")), broken.output


@pytest.mark.parametrize("name", ["image_layers", "layer_template"])
def test_authfile_below_home_is_opened_as_the_user(
    name: str, user_store: t.Any, small_image: t.Any, lab: t.Any
) -> None:
    registry = Registry(small_image, ("registry.example.org",))
    etc = lab.machine.path("/etc/containers")
    try:
        registry.configure(etc)
        authfile = user_store.user.write("auth.json", '{"auths": {}}')
        args = {"images": ["registry.example.org/one:1"], "authfile": str(authfile)}
        if name == "layer_template":
            args.update(MODULES[name], pull="missing")
        done = run_traced(
            lab,
            user_store,
            name,
            {**user_store.module_args(), "user": user_store.user.name, **args},
        )
        assert done.rc == 0, done.output
        assert done.as_root == ()
        assert user_store.image("registry.example.org/one:1")
    finally:
        registry.close()
        (etc / "registries.conf").unlink(missing_ok=True)


def test_shared_images_opens_homes_as_the_user(
    make_store: t.Any, small_image: t.Any, lab: t.Any
) -> None:
    real, own = make_store("overlay", small_image), make_store("rootless-overlay")
    args = {
        "graphroot": str(real.graphroot),
        "runroot": str(real.runroot),
        "users": [own.user.name],
        "mappings": [{"userns": "keep-id"}],
    }
    for state in ("present", "absent"):
        done = run_traced(lab, own, "shared_images", {**args, "state": state})
        assert done.rc == 0, done.output
        assert done.as_root == ()
        assert done.as_others.get(own.user.uid, 0) > 0


def test_watcher_that_its_user_kills_is_tolerated(
    user_store: t.Any, small_image: t.Any, lab: t.Any
) -> None:
    """Root's process continues with the other stores."""
    account = account_named(user_store.user.name)
    assert account is not None
    images = watching.ImagesOfUser(StoreRequest(account=account), account, 0.05)
    try:
        _wait(images.changed)
        lab.machine.run(["kill", "-STOP", str(images._pid)], account=user_store.user)
        assert not images.changed()
        lab.machine.run(["kill", "-KILL", str(images._pid)], account=user_store.user)
        _wait(lambda: images.changed() or images._descriptor < 0)
        assert not images.changed()
    finally:
        if images._descriptor >= 0:
            images.close()


def _wait(condition: t.Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.05)
