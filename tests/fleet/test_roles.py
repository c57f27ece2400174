# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The roles on fleets with unreachable or failing hosts, and with the storage.conf of the rootful store."""

from __future__ import annotations

import hashlib
import json
import pathlib
import shutil
import subprocess
import typing as t

import pytest

if t.TYPE_CHECKING:
    from fleet.conftest import Play
    from support.browser import Browser
    from support.images import Image
    from support.lab import Lab
    from support.stores import Store
    from support.users import User

LOCAL = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
MAP = "0:100000:65536"


def remove_service_files() -> None:
    """Remove the configuration and the units of the service from the laboratory's /etc."""
    shutil.rmtree("/etc/userns-storage", ignore_errors=True)
    for path in pathlib.Path("/etc/systemd/user").rglob("userns-storage-*"):
        path.unlink()


def test_report_has_rows_for_unreachable_and_failed_hosts(
    play: t.Callable[..., Play],
    make_store: t.Callable[..., Store],
    make_user: t.Callable[..., User],
    small_image: Image,
    browser: Browser,
) -> None:
    user = make_user()
    user_store = make_store("rootless-vfs", small_image, user=user)
    store = make_store("vfs", small_image)
    store.podman(
        "create", "--name", "c", "--uidmap", MAP, "--gidmap", MAP, "localhost/small:1", "/bin/x"
    )
    user_store.podman(
        "create",
        "--uidmap",
        "0:0:1000",
        "--uidmap",
        "1000:1000:1000",
        "localhost/small:1",
        "/bin/x",
    )
    user_store.podman("rm", "--all")
    inventory = {
        "all": {
            "hosts": {
                "gone": {
                    "ansible_connection": "ssh",
                    "ansible_host": "127.0.0.1",
                    "ansible_port": 1,
                },
                "broken": {"ansible_python_interpreter": "/nonexistent/python"},
                "well": {
                    "prepare_images": "localhost/small:1 localhost/nowhere:1",
                    "prepare_mappings": f"{MAP}\n0:200000:65536",
                    "prune_max_copies_per_image": "0",
                    "prune_min_age": "0",
                    "report_users": user.name,
                },
            },
            "vars": LOCAL,
        }
    }
    environ = dict(store.env())
    done = play("userns.storage.report", inventory, environ=environ)
    for host in ("gone", "broken", "well"):
        recap = done.recap(host)
        assert recap["failed"] == 0, host
        assert recap["unreachable"] == 0, host
    text = (done.folder / "userns-storage-report.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert "**unreachable** " in rows["gone"]
    assert "Connection refused" in rows["gone"]
    assert "**failed** " in rows["broken"]
    assert "/nonexistent/python" in rows["broken"]
    assert "| ok |" in rows["well"]
    # One of the two layers is in use; one map and one image are missing.
    collected = text.partition("## Would be freed")[2].partition(
        "## Mapped layers missing for the next start"
    )[0]
    assert collected.count("localhost/small:1") == 1
    assert user.name in collected
    missing = text.partition("## Mapped layers missing for the next start")[2]
    assert "`0:200000:65536`" in missing
    assert "localhost/nowhere:1" in missing
    browser.show(done.folder / "userns-storage-report.html", 1280, 900)
    names = "return [...document.querySelectorAll('.host .name')].map(e=>e.textContent)"
    assert browser.run(names) == ["gone", "broken", "well"]
    assert browser.console_messages() == []


def test_report_respects_limit_and_writes_nothing_in_check_mode(
    play: t.Callable[..., Play], make_store: t.Callable[..., Store], small_image: Image
) -> None:
    store = make_store("vfs", small_image)
    inventory = {"all": {"hosts": {"one": {}, "two": {}}, "vars": {**LOCAL, "report_users": ""}}}
    done = play(
        "userns.storage.report", inventory, "--check", "--limit", "two", environ=dict(store.env())
    )
    assert done.recap("two")["changed"] == 2
    assert not list(done.folder.glob("userns-storage-report*"))


def test_prune_removes_named_layers_within_time_limit(
    play: t.Callable[..., Play], make_store: t.Callable[..., Store], small_image: Image
) -> None:
    store = make_store("vfs", small_image)
    for number in (100000, 200000):
        mapped = f"0:{number}:65536"
        store.podman("create", "--uidmap", mapped, "--gidmap", mapped, small_image.name, "/bin/x")
    store.podman("rm", "--all")
    kept, named = store.mapped_layers(small_image.name)
    variables = {"prune_layers": named, "prune_min_age": "0", "prune_time_limit": "60"}
    inventory = {"all": {"hosts": {"one": {**LOCAL, **variables}}}}
    environ = dict(store.env())
    first, second = (
        play("userns.storage.prune", inventory, environ=environ).recap("one") for _run in range(2)
    )
    assert (first["failed"], first["changed"]) == (0, 1)
    assert (second["failed"], second["changed"]) == (0, 0)
    assert store.mapped_layers(small_image.name) == [kept]


@pytest.fixture
def etc_containers(lab: t.Any, tmp_path: pathlib.Path) -> t.Iterator[pathlib.Path]:
    """An empty folder, mounted on /etc/containers in the laboratory only."""
    folder = tmp_path / "etc"
    folder.mkdir()
    subprocess.run(["mount", "--bind", str(folder), "/etc/containers"], check=True)
    yield folder
    subprocess.run(["umount", "/etc/containers"], check=True)


@pytest.fixture
def empty_store(lab: t.Any, tmp_path: pathlib.Path) -> t.Iterator[pathlib.Path]:
    """An empty folder, mounted on /var/lib/containers in the laboratory only."""
    folder = tmp_path / "lib"
    folder.mkdir()
    pathlib.Path("/var/lib/containers").mkdir(exist_ok=True)
    subprocess.run(["mount", "--bind", str(folder), "/var/lib/containers"], check=True)
    yield folder
    subprocess.run(["umount", "/var/lib/containers"], check=True)


def prepare(
    play: t.Callable[..., t.Any], *options: str, fails: bool = False, **variables: t.Any
) -> t.Any:
    host = {**LOCAL, "prepare_install": False, **variables}
    return play("userns.storage.prepare", {"all": {"hosts": {"one": host}}}, *options, fails=fails)


def test_rootful_storage_conf_keeps_all_other_bytes(
    play: t.Callable[..., Play], etc_containers: pathlib.Path, empty_store: pathlib.Path
) -> None:
    text = pathlib.Path("/usr/share/containers/storage.conf").read_text()
    variables: t.Dict[str, t.Any] = {"prepare_metacopy": True, "prepare_driver": "overlay"}
    assert prepare(play, "--check", "--diff", **variables).recap("one")["changed"] == 1
    assert list(etc_containers.iterdir()) == []
    assert prepare(play, **variables).recap("one")["changed"] == 1
    written = (etc_containers / "storage.conf").read_text()
    added = [line for line in written.splitlines() if line not in text.splitlines()]
    assert added == ['mountopt = "nodev,metacopy=on"'] or added == ['mountopt = "metacopy=on"']
    assert prepare(play, **variables).recap("one")["changed"] == 0

    (etc_containers / "storage.conf").write_text('# mine\n[storage]\n  driver = "overlay" # kept')
    assert prepare(play, **variables).recap("one")["changed"] == 1
    assert (etc_containers / "storage.conf").read_text() == (
        '# mine\n[storage]\n  driver = "overlay" # kept\n\n[storage.options.overlay]\nmountopt = "metacopy=on"\n'
    )
    (backup,) = etc_containers.glob("storage.conf.*")
    assert backup.read_text() == '# mine\n[storage]\n  driver = "overlay" # kept'


def test_driver_of_existing_store_is_never_changed(
    play: t.Callable[..., Play], etc_containers: pathlib.Path, empty_store: pathlib.Path
) -> None:
    # podman leaves these folders in a store with the driver vfs.
    (empty_store / "storage/vfs-layers").mkdir(parents=True)
    (empty_store / "storage/vfs-images").mkdir()
    done = prepare(play, fails=True, prepare_driver="overlay")
    assert "was written by the driver vfs" in done.output
    assert list(etc_containers.iterdir()) == []


def test_hostile_users_do_not_stop_the_other_users(
    play: t.Any, lab: t.Any, make_user: t.Any, make_store: t.Any, small_image: t.Any
) -> None:
    """Users whose storage.conf is a pipe or an endless file fail; the last user gets everything."""
    hostile, user = [make_user(), make_user()], make_user()
    for account, command in zip(hostile, (["mkfifo"], ["ln", "-s", "/dev/zero"])):
        path = pathlib.Path(account.home) / ".config/containers/storage.conf"
        lab.machine.run(["mkdir", "-p", str(path.parent)], account=account)
        lab.machine.run([*command, str(path)], account=account)
    store = make_store("rootless-vfs", small_image, user=user)
    names = [account.name for account in (*hostile, user)]
    # Other tests of the session may have left files.
    remove_service_files()
    try:
        done = prepare(
            play,
            fails=True,
            prepare_users=names,
            prepare_rootful=False,
            prepare_driver="vfs",
            prepare_images=f"localhost/other:1={small_image.source}",
            prepare_mappings="keep-id",
            prepare_service="present",
        )
        jobs = [path.stem for path in pathlib.Path("/etc/userns-storage/ready").iterdir()]
    finally:
        remove_service_files()
    assert jobs == [user.name]
    (layer,) = store.mapped_layers("localhost/other:1")
    assert done.recap("one")["failed"] == 1
    assert_ends_with_failures(done, "Fail if a store could not be prepared", hostile, user)

    variables = {"prune_users": names, "prune_max_copies_per_image": "0", "prune_min_age": "0"}
    hosts = {"all": {"hosts": {"one": {**LOCAL, "prune_rootful": False, **variables}}}}
    done = play("userns.storage.prune", hosts, fails=True)
    assert layer not in store.layer_ids()
    assert_ends_with_failures(done, "Fail if one of several stores failed", hostile, user)


def assert_ends_with_failures(
    done: t.Any, task: str, hostile: t.Sequence[t.Any], user: t.Any
) -> None:
    """Assert that the last task reports each hostile user, and not the other user."""
    ending = done.output.rpartition(task)[2]
    for account in hostile:
        assert f"For {account.name}: " in ending
    assert f"For {user.name}: " not in ending


def test_additional_store_provides_images_with_mapped_layers(
    play: t.Callable[..., Play],
    lab: Lab,
    etc_containers: pathlib.Path,
    empty_store: pathlib.Path,
    small_image: Image,
) -> None:
    policy = etc_containers / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    graphroot = lab.folder(0o755) / "images"
    name = hashlib.sha256(str(graphroot).encode()).hexdigest()[:8]
    crio = pathlib.Path(f"/etc/crio/crio.conf.d/50-userns-storage-{name}.conf")
    archive = lab.folder(0o755) / "small.tar"
    lab.machine.run(["skopeo", "copy", "-q", small_image.source, f"oci-archive:{archive}"])
    variables: t.Dict[str, t.Any] = {
        "prepare_additional_store": str(graphroot),
        "prepare_additional_store_runroot": str(graphroot.parent / "run"),
        "prepare_additional_store_readers": "podman\ncri-o 1.36.3",
        "prepare_images": f"localhost/small:1=oci-archive:{archive}",
        "prepare_mappings": MAP,
        "prepare_force": True,
    }
    prepare(play, "--check", **variables)
    assert not graphroot.exists()
    assert list(etc_containers.iterdir()) == [policy]
    assert not crio.exists()
    prepare(play, **variables)
    repeated = prepare(play, **variables)
    assert repeated.recap("one")["changed"] == 0, repeated.output
    # The rootful store itself gets no image.
    assert not (empty_store / "storage/overlay-images/images.json").exists()
    assert f'storage_option = ["overlay.imagestore={graphroot}"]' in crio.read_text()
    assert (
        f'additionalimagestores = ["{graphroot}"]' in (etc_containers / "storage.conf").read_text()
    )
    shown = lab.machine.run(["podman", "images", "--format", "{{.Repository}} {{.ReadOnly}}"])
    assert shown.stdout == "localhost/small true\n"
    # Both readers use the same form of this map.
    (images,) = graphroot.glob("overlay-images/images.json")
    (record,) = json.loads(images.read_text())
    assert len(record["mapped-layers"]) == 1

    prepare(play, **{**variables, "prepare_additional_store_state": "absent"})
    assert not crio.exists()
    assert "additionalimagestores = []" in (etc_containers / "storage.conf").read_text()
    assert images.exists()


def test_readers_of_additional_store_are_checked_first(
    play: t.Callable[..., Play], etc_containers: pathlib.Path
) -> None:
    done = prepare(
        play,
        fails=True,
        prepare_additional_store="/nonexistent/images",
        prepare_additional_store_readers="docker",
    )
    assert "prepare_additional_store_readers" in done.output
    assert list(etc_containers.iterdir()) == []


# Listens on the socket of the user's systemd without responding, and stops each systemctl process.
STOPPER = """
import os, signal, socket, sys
os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(100)
print("ready", flush=True)
while True:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/comm") as file:
                if file.read() == "systemctl\\n":
                    os.kill(int(name), signal.SIGSTOP)
        except OSError:
            pass
"""


def test_play_ends_if_user_stops_systemctl(
    play: t.Any, lab: t.Any, make_user: t.Any, tmp_path: pathlib.Path
) -> None:
    """Root's play ends with an error."""
    user = make_user()
    variables = {
        "service_state": "present",
        "service_job": "collect",
        "service_store": user.name,
        "service_config": {"policy": {"max_copies_per_image": 0}},
        "service_calendar": "daily",
        "service_linger": False,
    }
    role = {"name": "userns.storage.service"}
    tasks = [{"name": "Install", "ansible.builtin.include_role": role, "vars": variables}]
    (tmp_path / "play.json").write_text(
        json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}])
    )
    command = ["/usr/bin/python3", "-c", STOPPER, f"/run/user/{user.uid}/systemd/private"]
    stopper = lab.machine.popen(command, account=user, env={}, stdout=subprocess.PIPE)
    try:
        assert stopper.stdout.readline() == b"ready\n"
        hosts = {"all": {"hosts": {"one": LOCAL}}}
        patience = ("-e", '{"service_patience": 1}')
        done = play(tmp_path / "play.json", hosts, *patience, fails=True)
    finally:
        stopper.kill()
        stopper.wait()
        remove_service_files()
    ending = done.output.rpartition("Reload the user's systemd manager")[2]
    assert "non-zero return code" in ending, done.output
    assert done.recap("one")["failed"] == 1


def test_tags_select_steps(
    play: t.Callable[..., Play],
    make_store: t.Callable[..., Store],
    make_user: t.Callable[..., User],
    small_image: Image,
) -> None:
    """The tags select a user's images, then their layers, then the removal of the layers; the checks always run."""
    user = make_user()
    store = make_store("rootless-overlay", user=user)
    variables = {
        **LOCAL,
        "prepare_users": user.name,
        "prepare_images": f"{small_image.name}={small_image.source}",
        "prepare_mappings": "keep-id",
        "prune_users": user.name,
        "prune_rootful": False,
        "prune_max_copies_per_image": "0",
        "prune_min_age": "0",
    }

    def run(name: str, tags: str, fails: bool = False, **more: t.Any) -> Play:
        inventory = {"all": {"hosts": {"one": {**variables, **more}}}}
        return play(f"userns.storage.{name}", inventory, "--tags", tags, fails=fails)

    run("prepare", "images")
    assert [image["names"] for image in store.images()] == [[small_image.name]]
    assert store.mapped_layers(small_image.name) == []
    done = run("prepare", "layers")
    assert f"{user.name}: " in done.output
    (created,) = store.mapped_layers(small_image.name)
    run("prune", "service")
    assert store.mapped_layers(small_image.name) == [created]
    run("prune", "layers")
    assert store.mapped_layers(small_image.name) == []
    done = run("prepare", "service", fails=True, prepare_user=user.name)
    assert "prepare_user (did you mean prepare_users?)" in done.output
