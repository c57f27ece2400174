# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""layer_template with check_with_runtime: the real podman accepts a new layer, or all is undone.

A podman that is newer than was tested does not exist yet. It is simulated by `runtime: "podman 99.0"`, which is what
maps are predicted for then, while the container is created by the podman that is installed. Where that writes maps in
another form than podman 99.0 would, the layer is one that podman does not use.
"""

from __future__ import annotations

import json
import os
import pathlib
import typing as t

import pytest
from support.cases import Case
from support.hosts import Host
from support.lab import Lab

Json = t.Dict[str, t.Any]
MakeCase = t.Callable[..., Case]
Machines = t.Callable[[str], t.Any]

UNTESTED: Json = {"runtime": "podman 99.0", "check_with_runtime": "untested"}
# podman 4.3 records these two entries, podman 4.7 and later one.
ADJACENT = ["0:100000:1000", "1000:101000:64536"]


@pytest.fixture
def machines(lab: Lab, host: t.Callable[[str], Host]) -> Machines:
    return lambda name: lab.machine if name == "local" else host(name)


def state(case: Case) -> Json:
    """All that podman knows, and what is mounted."""
    store = case.store
    volumes = store.podman("volume", "ls", "--format", "json").stdout
    containers = store.podman("ps", "--all", "--external", "--format", "json").stdout
    events = store.podman("events", "--stream=false", "--since", "1h", "--format", "{{.Status}}")
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        mounted = [line for line in mounts if str(store.graphroot) in line]
    return {
        "containers": [load["Id"] for load in json.loads(containers)],
        "volumes": json.loads(volumes or "[]"),
        "events": events.stdout.split(),
        "records": store.containers(),
        "layers": sorted(store.layer_ids()),
        "mapped": case.mapped(),
        "images": [image["names"] for image in store.images()],
        "mounts": mounted,
        "folders": sorted(
            str(path.relative_to(store.graphroot))
            for pattern in (f"{store.driver}-containers/*", f"{store.driver}/*", "volumes/*")
            for path in store.graphroot.glob(pattern)
            # podman makes these when it first needs them, and leaves them.
            if not path.name.endswith((".lock", ".json")) and path.name != "tempdirs"
        ),
    }


def other_form(case: Case) -> Json:
    """Options with which maps are predicted in another form than the case's podman writes."""
    if case.store.machine.version("podman") < (4, 7):
        return UNTESTED
    return {"runtime": "podman 4.3.1", "check_with_runtime": "always"}


def only(result: Json) -> Json:
    (entry,) = result["layers"]
    return t.cast(Json, entry)


@pytest.mark.parametrize("name", ["local", "sid"])
@pytest.mark.parametrize("kind", ["vfs", "rootless-as-root", "rootless-as-user"])
def test_podman_takes_the_layer(
    kind: str, name: str, make_case: MakeCase, machines: Machines
) -> None:
    case = make_case(kind, machine=machines(name))
    if kind != "vfs":
        # A map that all versions write in the same form.
        wanted: Json = {"uidmap": ["0:1:65000"]}
        args = ["--uidmap=0:1:65000", "--gidmap=0:1:65000"]
    else:
        wanted, args = {}, case.podman_args
    before = state(case)
    foreseen = case.layer_template(options={"check": True}, **wanted, **UNTESTED)
    assert only(foreseen)["action"] == "created"
    assert state(case) == before

    result = case.layer_template(**wanted, **UNTESTED)
    entry = only(result)
    assert result["changed"]
    assert entry["action"] == "created"
    assert "podman used it for a container" in entry["reason"]
    after = state(case)
    for key in ("containers", "volumes", "events", "records", "images", "mounts"):
        assert after[key] == before[key], key
    assert case.mapped() == [entry["layer_id"]]
    assert set(after["layers"]) - set(before["layers"]) == {entry["layer_id"]}

    # It is checked again while no container uses it, and that changes nothing.
    again = case.layer_template(**wanted, **UNTESTED)
    assert not again["changed"]
    assert "podman used it for a container" in only(again)["reason"]
    assert state(case) == after
    own = case.store.container(case.store.create(case.image.name, *args))["layer"]
    assert case.store.layer(own)["parent"] == entry["layer_id"]
    used = case.layer_template(**wanted, **UNTESTED)
    assert only(used)["reason"] == "A layer with this map exists."
    case.assert_podman_is_well()


# The map that is predicted for the version in `runtime`, and the podman that is there, which writes another form.
@pytest.mark.parametrize(
    ("kind", "name", "args"),
    [
        ("vfs", "local", UNTESTED),
        ("rootless-as-root", "local", UNTESTED),
        ("vfs", "sid", {"runtime": "podman 4.3.1", "check_with_runtime": "always"}),
        ("rootless-as-user", "sid", {"runtime": "podman 4.3.1", "check_with_runtime": "always"}),
    ],
)
def test_podman_does_not_take_the_layer(
    kind: str, name: str, args: Json, make_case: MakeCase, machines: Machines
) -> None:
    case = make_case(kind, machine=machines(name))
    wanted = ["0:1:1000", "1000:1001:64000"] if kind != "vfs" else ADJACENT
    args = other_form(case) if name == "local" else args
    before = state(case)
    refusal = case.layer_template(uidmap=wanted, options={"fails": True}, **args)
    assert "podman did not use it for a container with this mapping" in refusal["msg"]
    assert "it was removed again" in refusal["msg"]
    entry = only(refusal)
    assert (entry["action"], entry["layer_id"]) == ("refused", "")
    assert not refusal["changed"]
    assert state(case) == before
    case.assert_podman_is_well()


def test_what_a_killed_task_has_left_goes_with_the_next(make_case: MakeCase) -> None:
    """Its container, and the layer that nobody has checked."""
    case = make_case("vfs")
    before = state(case)
    runtime = other_form(case)["runtime"]
    case.layer_template(uidmap=ADJACENT, runtime=runtime, allow_untested_runtime=True)
    (unchecked,) = case.mapped()
    dead = "userns-storage-check-4194304-1-0123abcd"
    start = pathlib.Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    live = f"userns-storage-check-{os.getpid()}-{start}-0123abcd"
    for name in (dead, live, "userns-storage-check"):
        case.store.create(case.image.name, "--name", name)
    refusal = case.layer_template(uidmap=ADJACENT, options={"fails": True}, **other_form(case))
    assert "it was removed again" in refusal["msg"]
    assert refusal["changed"], "a layer that was there is gone"
    assert unchecked not in case.store.layer_ids()
    names = {name for container in case.store.containers() for name in container["names"]}
    assert names == {live, "userns-storage-check"}
    case.store.podman("rm", live, "userns-storage-check")
    left = {key: value for key, value in state(case).items() if key != "events"}
    assert left == {key: value for key, value in before.items() if key != "events"}


def test_refusals(make_case: MakeCase) -> None:
    case = make_case("vfs")
    before = case.store.snapshot_of_disk()
    wanted: Json = {"runtime": "buildah 99.0", "check_with_runtime": "always"}
    refusal = case.layer_template(options={"fails": True}, **wanted)
    assert "only podman can create a container without starting it" in refusal["msg"]
    assert before.changes(case.store.snapshot_of_disk()) == []
    # Removals are not what a container checks.
    case.create()
    refusal = case.layer_template(state="absent", options={"fails": True}, **UNTESTED)
    assert "in use" in refusal["msg"]
    case.store.podman("rm", "--all")
    refusal = case.layer_template(state="absent", options={"fails": True}, **UNTESTED)
    assert "allow_untested_runtime" in refusal["msg"]
    # podman itself cannot create the container.
    broken = case.store.base / "broken.conf"
    broken.write_text("[engine]\nruntime = [\n")
    case.layer_template(state="absent")
    refusal = case.layer_template(
        check_with_runtime="always",
        options={"fails": True, "environ": {"CONTAINERS_CONF": str(broken)}},
    )
    assert "podman could not" in refusal["msg"]
    assert "Run it manually: podman --events-backend none" in refusal["msg"]
    assert case.mapped() == []
