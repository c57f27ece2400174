# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test pulls from a registry with TLS and a password: Debian's docker-registry on a loopback port."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import typing as t

import pytest
from support import hosts, matrix
from support.injection import ModuleServer
from support.lab import Lab
from support.machines import Machine
from support.registry import PrivateRegistry
from support.store_cases import Case

if t.TYPE_CHECKING:
    from support.hosts import Host

MakeCase = t.Callable[..., Case]
NAME, PASSWORD = "robot", "s3cret pass:word"


def trust(registry: PrivateRegistry, machine: Machine) -> None:
    """Let the programs of a machine accept the registry's certificate."""
    folder = machine.path(f"/etc/containers/certs.d/{registry.address}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ca.crt").write_text(registry.certificate.read_text())


@pytest.fixture
def registry(lab: Lab, tmp_path: pathlib.Path, make_case: MakeCase) -> t.Iterator[PrivateRegistry]:
    """A registry with the small image as team/small:1, whose certificate the laboratory trusts."""
    running = PrivateRegistry(tmp_path, NAME, PASSWORD)
    trust(running, lab.machine)
    image = make_case("vfs").image
    lab.machine.run(
        [
            *("skopeo", "copy", "--quiet", "--dest-creds", f"{NAME}:{PASSWORD}"),
            *(f"oci:{image.path}", f"docker://{running.address}/team/small:1"),
        ]
    )
    yield running
    running.close()


def authfile(path: pathlib.Path, address: str, password: str = PASSWORD) -> pathlib.Path:
    """Write a file as podman login does."""
    auth = base64.b64encode(f"{NAME}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {address: {"auth": auth}}}))
    return path


def pull(case: Case, address: str, **more: t.Any) -> t.Dict[str, t.Any]:
    options = more.pop("options", {})
    args = {"images": [f"{address}/team/small:1"], "measure": "none", "pull": "newer", **more}
    return case.call("image_layers", args, **options)


@pytest.mark.parametrize("setup", ["vfs", "rootless-as-root", "rootless-as-user"])
def test_image_is_pulled_with_username_and_password(
    make_case: MakeCase, registry: PrivateRegistry, setup: str
) -> None:
    case = make_case(setup)
    address = registry.address
    refused = pull(case, address, options={"fails": True})
    assert "podman login" in refused["msg"]
    assert f"login {address}" in refused["msg"]
    assert "Set username and password, or authfile" in refused["msg"]
    if setup == "rootless-as-root":
        assert case.store.user is not None
        assert f"runuser -l {case.store.user.name} " in refused["msg"]
    wrong = pull(case, address, username=NAME, password="something else", options={"fails": True})
    assert "something else" not in json.dumps(wrong["msg"])
    login = {"username": NAME, "password": PASSWORD}
    predicted = pull(case, address, **login, options={"check": True})
    assert predicted["actions"] == ["pulled"]
    pulled = pull(case, address, **login)
    assert pulled["changed"] is True
    repeated = pull(case, address, **login)
    assert repeated["changed"] is False
    # No result contains the password.
    results = json.dumps([refused, wrong, predicted, pulled, repeated])
    assert PASSWORD not in results
    assert base64.b64encode(f"{NAME}:{PASSWORD}".encode()).decode() not in results


@pytest.mark.parametrize("release", matrix.RELEASES)
def test_username_and_password_are_only_in_memory(
    lab: Lab,
    make_case: MakeCase,
    registry: PrivateRegistry,
    host: t.Callable[[str], Host],
    release: str,
) -> None:
    """All programs of a pull can use them, also in the user's namespace, and no process keeps them."""
    machine = hosts.of_release(lab, release, host)
    trust(registry, machine)
    case = make_case("rootless-as-root", machine=machine)
    login = {"username": NAME, "password": PASSWORD}
    assert pull(case, registry.address, **login)["changed"] is True
    case.store.podman("rmi", "--all", "--force")
    done = pull(case, registry.address, **login, userns="keep-id")
    assert [item["status"] for item in done["mappings"]] == ["mapped"]
    user = case.store.user
    assert user is not None
    own = {user.uid, *range(user.subuid_start, user.subuid_start + user.subuid_count)}
    names = []
    # Other tests that run at the same time have files in memory for other users.
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (process / "status").read_text()
            (line,) = [line for line in status.splitlines() if line.startswith("Uid:")]
            if own & set(map(int, line.split()[1:])):
                names += [os.readlink(link) for link in (process / "fd").iterdir()]
    # podman's pause process still runs.
    assert names
    assert [name for name in names if "memfd:userns-storage" in name] == []
    for folder in ("/run", "/tmp", "/var/tmp"):
        assert [*machine.path(folder).glob("userns-storage-*")] == []


def test_username_and_password_are_never_in_a_file(
    lab: Lab, make_case: MakeCase, registry: PrivateRegistry
) -> None:
    # The tracer runs the modules in the laboratory itself, where they start its programs.
    trust(registry, lab.local)
    case = make_case("rootless-as-root", machine=lab.local)
    user = case.store.user
    assert user is not None
    args = {"images": [f"{registry.address}/team/small:1"], "pull": "always", "user": user.name}
    module_args = {**case.store.module_args(), **args, "username": NAME, "password": PASSWORD}
    modules = ModuleServer(lab)
    try:
        run = modules.run("image_layers", module_args, below="", record=True)
        assert run.result.get("changed"), run.output
        # Without such files, a kill cannot leave one.
        made = {path for call in run.calls for path in call.paths if "/userns-storage-" in path}
        assert made == set()
    finally:
        modules.close()


def test_image_is_pulled_with_authfile(make_case: MakeCase, registry: PrivateRegistry) -> None:
    case = make_case("rootless-as-root")
    user = case.store.user
    assert user is not None
    address = registry.address
    own = authfile(pathlib.Path(user.home, "auth.json"), address)
    os.chmod(own, 0o600)
    os.chown(own, user.uid, user.gid)
    missing = pull(case, address, authfile="/no/auth.json", options={"fails": True})
    assert missing["msg"].startswith("authfile /no/auth.json: does not exist on this host")
    assert f"podman login --authfile /no/auth.json {address}" in missing["msg"]
    hidden = authfile(case.store.machine.path("/run/hidden-auth.json"), address)
    os.chmod(hidden, 0o600)
    unreadable = pull(case, address, authfile="/run/hidden-auth.json", options={"fails": True})
    assert "the owner of the store cannot read it" in unreadable["msg"]
    hidden.unlink()
    pulled = pull(case, address, authfile=str(own))
    assert pulled["actions"] == ["pulled"]


def test_environment_variable_of_task_names_authfile(
    lab: Lab, make_case: MakeCase, registry: PrivateRegistry
) -> None:
    """The variable applies to root's store, and to a user's store if that user can read the file."""
    path = authfile(lab.machine.path("/run/auth.json"), registry.address)
    environ = {"REGISTRY_AUTH_FILE": "/run/auth.json"}
    for setup, mode in (("vfs", 0o600), ("rootless-as-root", 0o644)):
        case = make_case(setup)
        os.chmod(path, mode)
        pulled = pull(case, registry.address, options={"environ": environ})
        assert pulled["actions"] == ["pulled"]
    os.chmod(path, 0o600)
    refused = pull(
        make_case("rootless-as-root"),
        registry.address,
        options={"environ": environ, "fails": True},
    )
    assert "Set username and password, or authfile" in refused["msg"]
    path.unlink()


def test_podman_pulls_without_skopeo(
    lab: Lab, make_case: MakeCase, registry: PrivateRegistry
) -> None:
    """podman itself reads the same credentials."""
    case = make_case("vfs")
    login = {"username": NAME, "password": PASSWORD}
    folder = lab.machine.path("/run/programs")
    folder.mkdir()
    (folder / "podman").symlink_to("/usr/bin/podman")
    environ = {"PATH": "/run/programs:/usr/sbin:/sbin"}
    pulled = pull(case, registry.address, pull="missing", **login, options={"environ": environ})
    assert pulled["actions"] == ["pulled"]


@pytest.mark.parametrize("setup", ["vfs", "rootless-as-root"])
def test_layer_template_pulls_missing_images(
    make_case: MakeCase, registry: PrivateRegistry, setup: str
) -> None:
    case = make_case(setup)
    name = f"{registry.address}/team/small:1"
    login = {"username": NAME, "password": PASSWORD}
    missing = case.layer_template(images=[name], options={"fails": True})
    assert "is not in the store" in missing["msg"]
    requested: t.Dict[str, t.Any] = {"images": [case.image.name, name], "pull": "missing", **login}
    # The small image itself is in the store, but not under this name.
    predicted = case.layer_template(**requested, options={"check": True})
    assert predicted["pulled"] == [name]
    assert predicted["changed"] is True
    made = case.layer_template(**requested)
    assert made["pulled"] == [name]
    assert made["layers"][-1]["action"] == "created"
    repeated = case.layer_template(**requested)
    assert (repeated["pulled"], repeated["changed"]) == ([], False)
    # Only vfs makes each start slow.
    assert ("uses the driver vfs" in str(made.get("warnings"))) == (setup == "vfs")
