# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""layer_template stopped at its time limit, or because nobody waits for it any more, goes on in the next run."""

from __future__ import annotations

import os
import signal
import subprocess
import typing as t

import pytest
from support import paces
from support.images import Image
from support.machines import busy_pids
from support.modules import run_playbook
from support.waiting import LIMIT, wait_until

if t.TYPE_CHECKING:
    from support.cases import Case
    from support.lab import Lab

MakeCase = t.Callable[..., t.Any]
# Some thirty jobs of a walk, of which a run that has to stop at once does five at most.
FILES = 3600


@pytest.fixture(scope="session")
def slow(lab: Lab) -> str:
    """Where Python finds the collection that takes its time."""
    return f"{paces.slow_collection(lab, 0)}{os.pathsep}{lab.tree}"


@pytest.fixture
def slowly(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules of all cases take their time."""
    from support.cases import Case

    options = Case._options

    def slowed(case: Case, given: t.Dict[str, t.Any]) -> t.Dict[str, t.Any]:
        found = options(case, given)
        return {**found, "environ": {**found["environ"], "PYTHONPATH": slow}}

    monkeypatch.setattr(Case, "_options", slowed)


@pytest.fixture(params=["overlay-forced", "rootless-as-user"])
def large(
    request: pytest.FixtureRequest,
    make_case: MakeCase,
    many_files_image: t.Callable[[int], Image],
) -> Case:
    """A rootful and a rootless store, each with an image of many files."""
    case: Case = make_case(request.param, many_files_image(FILES))
    return case


def staging(case: Case) -> t.List[str]:
    """What lies in the staging folder of a store."""
    folder = case.store.graphroot / "userns-storage/staging"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def assert_whole(case: Case, layer_id: str) -> None:
    """The layer has all that its template has, with the owners that its map makes of the image's."""
    store = case.store
    record = store.layer(layer_id)
    owners = {name: store.host_id(record["uidmap"], uid) for name, uid in (("", 0), ("data", 1000))}
    count = 0
    with store.mounted(layer_id) as tree, store.mounted(case.template()) as model:
        for parent, folders, files in os.walk(model):
            there = os.path.join(tree, os.path.relpath(parent, model))
            assert sorted(os.listdir(there)) == sorted([*folders, *files])
            for name in [*folders, *files]:
                wanted, found = (os.lstat(os.path.join(item, name)) for item in (parent, there))
                path = os.path.relpath(os.path.join(parent, name), model)
                assert found.st_mode == wanted.st_mode, path
                assert found.st_mtime_ns == wanted.st_mtime_ns, path
                assert found.st_uid == owners["data" if path.startswith("data/") else ""], path
                if name in files:
                    count += 1
                    assert found.st_size == wanted.st_size, path
                if path.startswith("data/") and name in files:
                    with open(os.path.join(there, name), encoding="ascii") as content:
                        assert content.read() == f"{name}\n" * 20, path
    assert count > FILES


def stopped(case: Case, **args: t.Any) -> t.Dict[str, t.Any]:
    """One run that has to leave something to the next; returns what it says of the layer."""
    result = case.layer_template(time_limit=0, **args)
    (layer,) = result["layers"]
    assert (layer["action"], result["remaining"], result["changed"]) == ("pending", 1, True)
    assert result["partial"]
    found: t.Dict[str, t.Any] = layer
    return found


def test_goes_on_from_where_it_was_stopped(large: Case, slowly: None) -> None:
    done = 0
    layer: t.Dict[str, t.Any] = {}
    for _stop in range(4):
        layer = stopped(large)
        assert large.mapped() == []
        assert len(staging(large)) == 1
        # Each run comes further than the last one, or none would ever end.
        assert layer["progress"]["files"] > done
        done = layer["progress"]["files"]
        assert 0 < layer["progress"]["bytes"] <= layer["progress"]["bytes_expected"]
    assert layer["progress"]["seconds_resuming"] > 0
    gc = large.call("layer_gc", {"orphans": "remove", "broken": "repair"})
    assert not gc["changed"]
    kept = inodes(large)
    result = large.layer_template(options={"diff": True})
    (layer,) = result["layers"]
    assert (layer["action"], result["remaining"], result["changed"]) == ("created", 0, True)
    assert result["diff"]["before"] != result["diff"]["after"]
    assert staging(large) == []
    assert layer["files"] > FILES
    assert_whole(large, layer["layer_id"])
    # What was there was not made again.
    assert len(kept) > 100
    assert kept <= inodes_of(large, layer["layer_id"])
    large.create()
    assert large.mapped() == [layer["layer_id"]]
    again = large.layer_template(time_limit=0)
    assert (again["changed"], again["partial"]) == (False, False)


def inodes(case: Case) -> t.Set[int]:
    """Those of the files in the staging folder that are whole, which is all but the last few."""
    return paces.whole_files(case.store.graphroot / "userns-storage/staging")


def inodes_of(case: Case, layer_id: str) -> t.Set[int]:
    """Those of all files of a layer."""
    with case.store.mounted(layer_id) as tree:
        names = [os.path.join(at, name) for at, _folders, found in os.walk(tree) for name in found]
        return {os.lstat(name).st_ino for name in names}


def test_check_mode_tells_of_the_whole(
    make_case: MakeCase, many_files_image: t.Callable[[int], Image], slowly: None
) -> None:
    case = make_case("vfs", many_files_image(FILES))
    stopped(case)
    before = staging(case)
    result = case.layer_template(options={"check": True, "diff": True}, time_limit=0)
    (layer,) = result["layers"]
    assert (layer["action"], layer["progress"], result["partial"]) == ("created", None, False)
    assert layer["files"] > FILES
    assert staging(case) == before


def test_another_map_does_not_go_on_with_it(
    make_case: MakeCase, many_files_image: t.Any, slowly: None
) -> None:
    case = make_case("vfs", many_files_image(FILES))
    stopped(case)
    other = case.layer_template(uidmap=["0:300000:65536"])
    assert other["layers"][0]["action"] == "created"
    # Nor does what is to become of IDs that are not mapped.
    assert len(staging(case)) == 1
    stopped(case, unmapped_ids="overflow")
    assert case.layer_template()["layers"][0]["action"] == "created"
    assert staging(case) == []
    for layer in case.mapped():
        assert_whole(case, layer)


def test_work_on_an_image_that_was_pulled_again_restarts(
    make_case: MakeCase, many_files_image: t.Any, slowly: None
) -> None:
    """Its layers have the IDs of before, but other short names, which the half made layer has written down."""
    case = make_case("overlay-forced", many_files_image(FILES))
    template = case.template()
    layer = stopped(case)
    old = inodes(case)
    case.store.podman("rmi", case.image.name)
    assert case.layer_template(options={"fails": True})["failed"]
    case.store.load(case.image)
    assert case.template() == template == layer["template_id"]
    (made,) = case.layer_template()["layers"]
    assert made["action"] == "created"
    assert staging(case) == []
    assert_whole(case, made["layer_id"])
    assert old.isdisjoint(inodes_of(case, made["layer_id"]))
    assert case.shell("test -e /data/00000/0 && echo there") == "there\n"
    assert case.mapped() == [made["layer_id"]]


def test_each_run_gets_something_done(make_case: MakeCase) -> None:
    case = make_case("vfs")
    maps = [{"uidmap": [f"0:{first}00000:65536"]} for first in (1, 2, 3)]
    asked = {"images": [case.image.name], "mappings": maps, "time_limit": 0}
    result = case.call("layer_template", asked)
    assert [item["action"] for item in result["layers"]] == ["created", "pending", "pending"]
    assert (result["partial"], result["remaining"], result["changed"]) == (True, 2, True)
    result = case.call("layer_template", asked)
    assert [item["action"] for item in result["layers"]] == ["existing", "created", "pending"]
    assert result["layers"][2]["progress"] is None


def begun(case: Case) -> subprocess.Popen[bytes]:
    """A run that has begun to make its layer."""
    process = case.start("layer_template", {"images": [case.image.name], **case.wanted})
    wait_until(lambda: inodes(case))
    return process


def assert_gone_on_with(case: Case) -> None:
    """Nothing runs any more, and the next run goes on with what there is."""
    assert busy_pids(str(case.store.graphroot)) == []
    assert case.mapped() == []
    (left,) = staging(case)
    assert (case.store.graphroot / "userns-storage/staging" / left / "suspended").exists()
    kept = inodes(case)
    (layer,) = case.layer_template()["layers"]
    assert layer["action"] == "created"
    assert_whole(case, layer["layer_id"])
    assert staging(case) == []
    assert kept <= inodes_of(case, layer["layer_id"])


def test_stops_when_no_process_waits_for_the_result(large: Case, slowly: None) -> None:
    process = begun(large)
    assert process.stdout is not None
    process.stdout.close()
    process.wait(LIMIT)
    assert_gone_on_with(large)


@pytest.mark.parametrize(
    ("number", "whom"),
    [(signal.SIGTERM, "it"), (signal.SIGHUP, "all"), (signal.SIGINT, "all")],
)
def test_stops_on_a_signal(
    number: signal.Signals,
    whom: str,
    make_case: MakeCase,
    many_files_image: t.Callable[[int], Image],
    slowly: None,
) -> None:
    """By a signal to the module, or as a terminal does it, to all of its processes."""
    case = make_case("vfs", many_files_image(FILES))
    process = begun(case)
    if whom == "it":
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    process.communicate(timeout=LIMIT)
    assert process.returncode == -number
    assert_gone_on_with(case)


def test_killed_work_restarts(
    make_case: MakeCase, many_files_image: t.Callable[[int], Image], slowly: None
) -> None:
    """No entry can be trusted that was being made, and who would have said so is dead."""
    case = make_case("vfs", many_files_image(FILES))
    stopped(case)
    kept = inodes(case)
    process = case.start("layer_template", {"images": [case.image.name], **case.wanted})
    folder = case.store.graphroot / "userns-storage/staging" / staging(case)[0]
    wait_until(lambda: not (folder / "suspended").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    (layer,) = case.layer_template()["layers"]
    assert layer["action"] == "created"
    assert_whole(case, layer["layer_id"])
    assert staging(case) == []
    assert kept.isdisjoint(inodes_of(case, layer["layer_id"]))


def three_layers(case: Case) -> t.List[str]:
    """The image's layers, by the map."""
    maps = [{"uidmap": [f"0:{first}00000:65536"]} for first in (1, 2, 3)]
    asked = {"images": [case.image.name], "mappings": maps}
    return [item["layer_id"] for item in case.call("layer_template", asked)["layers"]]


def test_collecting_stops_between_two_layers(make_case: MakeCase) -> None:
    case = make_case("vfs-tmpfs")
    layers = three_layers(case)
    policy = {"max_copies_per_image": 0, "min_age": "0", "time_limit": 0}
    predicted = case.call("layer_gc", policy, check=True)
    assert (len(predicted["removed"]), predicted["partial"]) == (3, False)
    first = case.call("layer_gc", policy)
    assert (first["changed"], first["partial"], first["remaining"]) == (True, True, 2)
    assert [item["id"] for item in first["removed"]] == [predicted["removed"][0]["id"]]
    assert [item["rule"] for item in first["kept"]] == ["time_limit"] * 2
    assert first["space_reclaimed"] > 0
    named = {"layers": [first["kept"][1]["id"], "0" * 64], "min_age": "0"}
    second = case.call("layer_gc", named)
    assert [item["rule"] for item in second["removed"]] == ["layers"]
    assert [item["rule"] for item in second["kept"]] == ["none"]
    assert case.mapped() == [second["kept"][0]["id"]]
    kept = case.call("layer_gc", {"layers": layers})
    assert [item["rule"] for item in kept["kept"]] == ["min_age"]
    last = case.call("layer_gc", policy)
    assert (last["changed"], last["partial"], last["remaining"]) == (True, False, 0)
    assert case.mapped() == []
    assert not case.call("layer_gc", policy)["changed"]


def test_a_task_goes_on_until_all_is_collected(make_case: MakeCase, lab: Lab, slow: str) -> None:
    """In slices of no time, of which each removes one layer; as much goes as in one call."""
    case = make_case("vfs-tmpfs")
    layers = three_layers(case)
    sizes = case.call("layer_gc", {"max_copies_per_image": 0, "min_age": "0"}, check=True)
    policy = {
        "max_copies_per_image": 0,
        "min_age": "0",
        # By itself each call would free as much.
        "max_freed": sizes["removed"][0]["size"] + 1,
    }
    task = {"userns.storage.layer_gc": {**case.store.module_args(), **policy}}
    environ = {"ANSIBLE_COLLECTIONS_PATH": slow}
    checked, result, again = run_playbook(
        lab, [{**task, "check_mode": True}, task, {**task, "check_mode": True}], environ=environ
    )
    assert len(checked["removed"]) == len(result["removed"]) == 2
    assert [item["rule"] for item in result["kept"]] == ["max_freed"]
    assert (result["changed"], result["partial"], result["remaining"]) == (True, False, 0)
    assert result["space_reclaimed"] >= sum(item["size"] for item in result["removed"])
    assert case.mapped() == [item["id"] for item in again["removed"]]
    assert set(layers) == {item["id"] for item in (*result["removed"], *again["removed"])}
