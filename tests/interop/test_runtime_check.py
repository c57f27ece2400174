# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test layer_template with check_with_runtime: podman accepts a new layer, or the layer is removed.

`runtime: "podman 99.0"` simulates a podman that is newer than the tested versions: maps are predicted for that version,
but the installed podman creates the container. If the installed podman writes maps in another form than podman 99.0
would, it does not use the layer.
"""

from __future__ import annotations

import json
import os
import pathlib
import typing as t

import pytest
from support.hosts import Host
from support.lab import Lab
from support.store_cases import Case

Json = t.Dict[str, t.Any]
MakeCase = t.Callable[..., Case]
Machines = t.Callable[[str], t.Any]

UNTESTED: Json = {"runtime": "podman 99.0", "check_with_runtime": "untested"}
# podman 4.3 records these two entries; podman 4.7 and later record a single entry.
ADJACENT = ["0:100000:1000", "1000:101000:64536"]


@pytest.fixture
def machines(lab: Lab, host: t.Callable[[str], Host]) -> Machines:
    return lambda name: lab.machine if name == "local" else host(name)


def podman_state(case: Case) -> Json:
    """The objects that podman knows, and the mounts and folders of the store."""
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
            # podman creates these when it first needs them, and keeps them.
            if not path.name.endswith((".lock", ".json")) and path.name != "tempdirs"
        ),
    }


def runtime_with_other_form(case: Case) -> Json:
    """Options that predict maps in another form than the case's podman writes."""
    if case.store.machine.version("podman") < (4, 7):
        return UNTESTED
    return {"runtime": "podman 4.3.1", "check_with_runtime": "always"}


def only_layer(result: Json) -> Json:
    (entry,) = result["layers"]
    return t.cast(Json, entry)


@pytest.mark.parametrize("name", ["local", "sid"])
@pytest.mark.parametrize("kind", ["vfs", "rootless-as-root", "rootless-as-user"])
def test_layer_that_podman_uses_is_kept(
    kind: str, name: str, make_case: MakeCase, machines: Machines
) -> None:
    case = make_case(kind, machine=machines(name))
    if kind != "vfs":
        # A map that all versions write in the same form.
        mapping: Json = {"uidmap": ["0:1:65000"]}
        args = ["--uidmap=0:1:65000", "--gidmap=0:1:65000"]
    else:
        mapping, args = {}, case.podman_args
    before = podman_state(case)
    predicted = case.layer_template(options={"check": True}, **mapping, **UNTESTED)
    assert only_layer(predicted)["action"] == "created"
    assert podman_state(case) == before

    result = case.layer_template(**mapping, **UNTESTED)
    entry = only_layer(result)
    assert result["changed"]
    assert entry["action"] == "created"
    assert "podman used it for a container" in entry["reason"]
    after = podman_state(case)
    for key in ("containers", "volumes", "events", "records", "images", "mounts"):
        assert after[key] == before[key], key
    assert case.mapped() == [entry["layer_id"]]
    assert set(after["layers"]) - set(before["layers"]) == {entry["layer_id"]}

    # Each run checks the layer until a container uses it; the check changes nothing.
    repeated = case.layer_template(**mapping, **UNTESTED)
    assert not repeated["changed"]
    assert "podman used it for a container" in only_layer(repeated)["reason"]
    assert podman_state(case) == after
    own = case.store.container(case.store.create(case.image.name, *args))["layer"]
    assert case.store.layer(own)["parent"] == entry["layer_id"]
    used = case.layer_template(**mapping, **UNTESTED)
    assert only_layer(used)["reason"] == "A layer with this map exists."
    case.assert_podman_works()


# `runtime` names a version that writes maps in another form than the installed podman.
@pytest.mark.parametrize(
    ("kind", "name", "args"),
    [
        ("vfs", "local", UNTESTED),
        ("rootless-as-root", "local", UNTESTED),
        ("vfs", "sid", {"runtime": "podman 4.3.1", "check_with_runtime": "always"}),
        ("rootless-as-user", "sid", {"runtime": "podman 4.3.1", "check_with_runtime": "always"}),
    ],
)
def test_layer_that_podman_does_not_use_is_removed(
    kind: str, name: str, args: Json, make_case: MakeCase, machines: Machines
) -> None:
    case = make_case(kind, machine=machines(name))
    uidmap = ["0:1:1000", "1000:1001:64000"] if kind != "vfs" else ADJACENT
    args = runtime_with_other_form(case) if name == "local" else args
    before = podman_state(case)
    refusal = case.layer_template(uidmap=uidmap, options={"fails": True}, **args)
    assert "podman did not use it for a container with this mapping" in refusal["msg"]
    assert "it was removed again" in refusal["msg"]
    entry = only_layer(refusal)
    assert (entry["action"], entry["layer_id"]) == ("refused", "")
    assert not refusal["changed"]
    assert podman_state(case) == before
    case.assert_podman_works()


def test_leftovers_of_killed_task_are_removed_by_next_task(make_case: MakeCase) -> None:
    """The leftovers are the container and the unchecked layer."""
    case = make_case("vfs")
    before = podman_state(case)
    runtime = runtime_with_other_form(case)["runtime"]
    case.layer_template(uidmap=ADJACENT, runtime=runtime, allow_untested_runtime=True)
    (unchecked,) = case.mapped()
    dead = "userns-storage-check-4194304-1-0123abcd"
    start = pathlib.Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    live = f"userns-storage-check-{os.getpid()}-{start}-0123abcd"
    for name in (dead, live, "userns-storage-check"):
        case.store.create(case.image.name, "--name", name)
    refusal = case.layer_template(
        uidmap=ADJACENT, options={"fails": True}, **runtime_with_other_form(case)
    )
    assert "it was removed again" in refusal["msg"]
    assert refusal["changed"], "the existing layer was removed"
    assert unchecked not in case.store.layer_ids()
    names = {name for container in case.store.containers() for name in container["names"]}
    assert names == {live, "userns-storage-check"}
    case.store.podman("rm", live, "userns-storage-check")
    remaining = {key: value for key, value in podman_state(case).items() if key != "events"}
    assert remaining == {key: value for key, value in before.items() if key != "events"}


def test_impossible_checks_are_refused(make_case: MakeCase) -> None:
    case = make_case("vfs")
    before = case.store.disk_state()
    options: Json = {"runtime": "buildah 99.0", "check_with_runtime": "always"}
    refusal = case.layer_template(options={"fails": True}, **options)
    assert "only podman can create a container without starting it" in refusal["msg"]
    assert before.changes(case.store.disk_state()) == []
    # A container cannot check a removal.
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
