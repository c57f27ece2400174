# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""If users replace storage.conf with something else, root acts only with the rights of these users."""

from __future__ import annotations

import collections
import os
import pathlib
import re
import shutil
import subprocess
import typing as t

import pytest
from support.lab import Lab
from support.users import User

Json = t.Dict[str, t.Any]
SECRET = "only-root-may-read-this"
SETTINGS = {"overlay.mountopt": "nodev"}


@pytest.fixture
def user(make_user: t.Callable[..., User]) -> User:
    return make_user()


@pytest.fixture
def secret(lab: Lab) -> pathlib.Path:
    """A file that only root may read. It is valid TOML, so only its permissions protect it."""
    path = lab.folder(0o755) / "secret"
    path.write_text(f'[storage]\ndriver = "overlay"\n# {SECRET}\n')
    path.chmod(0o600)
    return path


@pytest.fixture
def declare(run_module: t.Callable[..., Json], user: User) -> t.Callable[..., Json]:
    """Run the module for the user."""

    def run(**options: t.Any) -> Json:
        run_options = {
            name: options.pop(name) for name in ("check", "diff", "fails") if name in options
        }
        return run_module(
            "storage_conf", {"user": user.name, "settings": SETTINGS, **options}, **run_options
        )

    return run


def tree_state(folder: t.Union[str, pathlib.Path]) -> t.Dict[str, t.Any]:
    """All files of a folder, with owners, modes and content."""
    found = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        state = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (state.st_uid, state.st_gid, state.st_mode, content)
    return found


def link(user: User, path: str, target: t.Union[str, pathlib.Path]) -> None:
    """Create a link below the home directory as the user."""
    location = pathlib.Path(user.home) / path
    subprocess.run(
        ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups", "sh", "-c",
         f"mkdir -p {location.parent} && ln -s {target} {location}"],
        check=True,
    )  # fmt: skip


def assert_refused(result: Json, user: User) -> None:
    """Assert that the error contains the user and a command that root can run."""
    assert user.name in result["msg"]
    assert f"runuser -l {user.name} " in result["msg"] or "getent passwd" in result["msg"]
    assert SECRET not in str(result)


def test_link_to_folder_of_root_is_refused(declare: t.Any, user: User) -> None:
    os.makedirs("/etc/containers", exist_ok=True)
    link(user, ".config/containers", "/etc/containers")
    before = tree_state("/etc/containers")
    predicted = declare(fails=None, check=True)
    result = declare(fails=True, check=False)
    for item in (predicted, result):
        if item.get("failed"):
            assert_refused(item, user)
    assert "/etc/containers" in result["msg"]
    assert tree_state("/etc/containers") == before


@pytest.mark.parametrize("path", [".config/containers/storage.conf", ".config"])
def test_link_to_file_of_root_is_refused(
    declare: t.Any, user: User, secret: pathlib.Path, path: str
) -> None:
    if path == ".config":
        (secret.parent / "containers").mkdir(mode=0o700)
        shutil.copy2(secret, secret.parent / "containers/storage.conf")
        link(user, path, secret.parent)
    else:
        link(user, path, secret)
    before = tree_state(secret.parent)
    assert_refused(declare(fails=True, diff=True), user)
    assert tree_state(secret.parent) == before
    assert SECRET.encode() not in b"".join(item[3] for item in tree_state(user.home).values())


def test_pipe_is_refused(declare: t.Any, user: User) -> None:
    path = user.write(".config/containers/storage.conf", "")
    path.unlink()
    os.mkfifo(path)
    os.chown(path, user.uid, user.gid)
    result = declare(fails=True)
    assert "storage.conf" in result["msg"]
    assert path.is_fifo()


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/tty", "/proc/self/mem", "/nowhere"])
def test_link_to_device_or_missing_file_is_refused(declare: t.Any, user: User, target: str) -> None:
    link(user, ".config/containers/storage.conf", target)
    assert "storage.conf" in declare(fails=True)["msg"]


# A module opens the file several times. With a link in each short pause, no module would ever succeed.
_SWAP = """
import os, random, sys, time
folder, secret = sys.argv[1:]
good = '[storage]\\ndriver = "overlay"\\n'
while True:
    pause = random.choice((0.0005, 0.005, 0.05, 0.5))
    for _swap in range(int(0.5 / pause)):
        with open(f"{folder}/good", "w") as file:
            file.write(good)
        os.rename(f"{folder}/good", f"{folder}/storage.conf")
        time.sleep(pause)
        os.symlink(secret, f"{folder}/bad")
        os.rename(f"{folder}/bad", f"{folder}/storage.conf")
"""


def test_file_replaced_while_read_discloses_no_secret(
    declare: t.Any, user: User, secret: pathlib.Path
) -> None:
    folder = user.write(".config/containers/storage.conf", "").parent
    before = tree_state(secret.parent)
    swapper = subprocess.Popen(
        ["/usr/bin/python3", "-c", _SWAP, str(folder), str(secret)],
        user=user.uid,
        group=user.gid,
        extra_groups=[],
    )
    ended: t.Counter[str] = collections.Counter()
    try:
        # Runs succeed when they find the user's file, and are refused when they find the link.
        while ended["changed"] < 5 or ended["refused"] < 5:
            number = sum(ended.values())
            assert number < 200, ended
            result = declare(settings={"overlay.size": f"{number}G"}, fails=None, diff=True)
            assert SECRET not in str(result)
            if result.get("failed"):
                assert user.name in result["msg"]
                ended["refused"] += 1
            else:
                assert result["changed"]
                ended["changed"] += 1
    finally:
        swapper.kill()
        swapper.wait()
    assert tree_state(secret.parent) == before
    found = tree_state(user.home)
    assert SECRET.encode() not in b"".join(item[3] for item in found.values())
    assert {item[0] for item in found.values()} == {user.uid}


def test_users_own_link_is_kept(declare: t.Any, user: User) -> None:
    """Dotfile managers create such links; the file that the link refers to is changed."""
    real = user.write("dotfiles/storage.conf", "# mine\n[storage]\n")
    real.chmod(0o640)
    link(user, ".config/containers/storage.conf", real)
    first = declare(diff=True)
    assert first["changed"]
    assert not declare()["changed"]
    assert (pathlib.Path(user.home) / ".config/containers/storage.conf").is_symlink()
    assert (
        real.read_text() == '# mine\n[storage]\n\n[storage.options.overlay]\nmountopt = "nodev"\n'
    )
    assert real.stat().st_mode & 0o777 == 0o640
    backup = pathlib.Path(first["backup_file"])
    assert backup.read_text() == "# mine\n[storage]\n"
    assert {item[0] for item in tree_state(user.home).values()} == {user.uid}


def test_check_mode_writes_nothing(declare: t.Any, user: User) -> None:
    before = tree_state(user.home)
    predicted = declare(check=True, diff=True)
    assert predicted["changed"]
    assert tree_state(user.home) == before
    result = declare(diff=True)
    assert [item["after"] for item in result["diff"]] == [
        item["after"] for item in predicted["diff"]
    ]
    assert not declare(check=True)["changed"]


@pytest.mark.parametrize("home", ["/", "/nonexistent", "/root", "relative"])
def test_home_not_owned_by_user_is_refused(
    run_module: t.Callable[..., Json], user: User, lab: Lab, home: str
) -> None:
    lab.machine.run(["sed", "-i", f"s#:{user.home}:#:{home}:#", "/etc/passwd"])
    try:
        assert_refused(
            run_module("storage_conf", {"user": user.name, "settings": SETTINGS}, fails=True), user
        )
        assert not os.path.exists("/.config/containers")
        assert not os.path.exists("/root/.config/containers/storage.conf")
    finally:
        lab.machine.run(
            ["sed", "-i", f"s#:{home}:/bin/bash#:{user.home}:/bin/bash#", "/etc/passwd"]
        )


def test_supplementary_groups_of_user_are_used(declare: t.Any, user: User, lab: Lab) -> None:
    lab.machine.run(["groupadd", f"{user.name}g"])
    lab.machine.run(["usermod", "-aG", f"{user.name}g", user.name])
    folder = pathlib.Path(user.home) / ".config/containers"
    user.write(".config/containers/x", "")
    shutil.chown(folder, "root", f"{user.name}g")
    folder.chmod(0o770)
    try:
        assert declare()["changed"]
        assert (folder / "storage.conf").stat().st_uid == user.uid
    finally:
        lab.machine.run(["groupdel", f"{user.name}g"])


def test_umask_of_root_is_ignored(declare: t.Any, user: User) -> None:
    before = os.umask(0o077)
    try:
        assert declare()["changed"]
    finally:
        os.umask(before)
    path = pathlib.Path(user.home) / ".config/containers/storage.conf"
    assert path.stat().st_mode & 0o777 == 0o644
    assert path.parent.stat().st_mode & 0o777 == 0o755


def test_driver_of_users_existing_store_is_not_changed(declare: t.Any, user: User) -> None:
    user.write(".local/share/containers/storage/vfs-layers/layers.json", "[]")
    result = declare(settings={"driver": "overlay"}, fails=True)
    assert "was written by the driver vfs" in result["msg"]
    # When root runs the command, it must not remove root's own store.
    assert result["msg"].endswith(f"runuser -l {user.name} -s /bin/sh -c 'podman system reset'")
    assert not (pathlib.Path(user.home) / ".config").exists()


def test_store_that_links_to_folder_of_root_is_not_followed(
    declare: t.Any, user: User, secret: pathlib.Path
) -> None:
    secret.parent.chmod(0o700)
    link(user, ".local/share/containers", secret.parent)
    before = tree_state(secret.parent)
    assert declare()["changed"]
    assert tree_state(secret.parent) == before


@pytest.mark.parametrize("shell", ["/bin/bash", "/usr/sbin/nologin"])
def test_command_in_message_works_for_root(
    run_module: t.Callable[..., Json], user: User, lab: Lab, shell: str
) -> None:
    """The command works in root's home with any shell of the user; root owns no file in the user's home."""
    lab.machine.run(["usermod", "-s", shell, user.name])
    result = run_module("image_layers_info", {"user": user.name}, fails=True)
    match = re.search(r"(runuser .*)\. If they differ", result["msg"])
    assert match, result["msg"]
    # podman images replaces podman info, which may not read the cgroups here.
    command = match[1].replace("podman info --format", "podman images --noheading --format")
    command = command.replace("{{.Store.GraphRoot}}", "{{.ID}}")
    assert command != match[1]
    environ = {"XDG_RUNTIME_DIR": "/run/user/0"}
    lab.machine.run(["sh", "-c", command], cwd="/root", env=environ)
    found = tree_state(user.home)
    assert f"{user.home}/.local/share/containers/storage/overlay-images" in found
    assert 0 not in {item[0] for item in found.values()}
