# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that layer_template resumes work that stopped at the time limit or because no process waits for the result."""

from __future__ import annotations

import os
import signal
import subprocess
import typing as t

import pytest
from support.images import Image
from support.machines import busy_pids
from support.modules import run_playbook
from support.slow_collection import create_slow_collection, whole_files
from support.waiting import LIMIT, wait_until

if t.TYPE_CHECKING:
    from support.lab import Lab
    from support.store_cases import Case

MakeCase = t.Callable[..., t.Any]
# A walk has about thirty jobs, of which a run with a time limit of zero does at most five.
FILES = 3600


@pytest.fixture(scope="session")
def slow(lab: Lab) -> str:
    """A search path with the slow collection before the collection of the laboratory."""
    return f"{create_slow_collection(lab, 0)}{os.pathsep}{lab.tree}"


@pytest.fixture
def slow_modules(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the cases run the slow modules."""
    from support.store_cases import Case

    options = Case._options

    def slow_options(case: Case, given: t.Dict[str, t.Any]) -> t.Dict[str, t.Any]:
        found = options(case, given)
        return {**found, "environ": {**found["environ"], "PYTHONPATH": slow}}

    monkeypatch.setattr(Case, "_options", slow_options)


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
    """The entries of the store's staging folder."""
    folder = case.store.graphroot / "userns-storage/staging"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def assert_complete(case: Case, layer_id: str) -> None:
    """Assert that a layer has the content of its template, with the owners translated by its map."""
    store = case.store
    record = store.layer(layer_id)
    owners = {name: store.host_id(record["uidmap"], uid) for name, uid in (("", 0), ("data", 1000))}
    count = 0
    with store.mounted(layer_id) as tree, store.mounted(case.template()) as model:
        for parent, folders, files in os.walk(model):
            copy = os.path.join(tree, os.path.relpath(parent, model))
            assert sorted(os.listdir(copy)) == sorted([*folders, *files])
            for name in [*folders, *files]:
                expected, found = (os.lstat(os.path.join(item, name)) for item in (parent, copy))
                path = os.path.relpath(os.path.join(parent, name), model)
                assert found.st_mode == expected.st_mode, path
                assert found.st_mtime_ns == expected.st_mtime_ns, path
                assert found.st_uid == owners["data" if path.startswith("data/") else ""], path
                if name in files:
                    count += 1
                    assert found.st_size == expected.st_size, path
                if path.startswith("data/") and name in files:
                    with open(os.path.join(copy, name), encoding="ascii") as content:
                        assert content.read() == f"{name}\n" * 20, path
    assert count > FILES


def interrupt_run(case: Case, **args: t.Any) -> t.Dict[str, t.Any]:
    """Run layer_template with a time limit of zero; returns the result for the layer, which is incomplete."""
    result = case.layer_template(time_limit=0, **args)
    (layer,) = result["layers"]
    assert (layer["action"], result["remaining"], result["changed"]) == ("pending", 1, True)
    assert result["partial"]
    found: t.Dict[str, t.Any] = layer
    return found


def test_interrupted_work_is_resumed(large: Case, slow_modules: None) -> None:
    done = 0
    layer: t.Dict[str, t.Any] = {}
    for _stop in range(4):
        layer = interrupt_run(large)
        assert large.mapped() == []
        assert len(staging(large)) == 1
        # Each run makes progress; otherwise the work would never end.
        assert layer["progress"]["files"] > done
        done = layer["progress"]["files"]
        assert 0 < layer["progress"]["bytes"] <= layer["progress"]["bytes_expected"]
    assert layer["progress"]["seconds_resuming"] > 0
    gc = large.call("layer_gc", {"orphans": "remove", "broken": "repair"})
    assert not gc["changed"]
    kept = staged_inodes(large)
    result = large.layer_template(options={"diff": True})
    (layer,) = result["layers"]
    assert (layer["action"], result["remaining"], result["changed"]) == ("created", 0, True)
    assert result["diff"]["before"] != result["diff"]["after"]
    assert staging(large) == []
    assert layer["files"] > FILES
    assert_complete(large, layer["layer_id"])
    # Existing files are not created again.
    assert len(kept) > 100
    assert kept <= layer_inodes(large, layer["layer_id"])
    large.create()
    assert large.mapped() == [layer["layer_id"]]
    repeated = large.layer_template(time_limit=0)
    assert (repeated["changed"], repeated["partial"]) == (False, False)


def staged_inodes(case: Case) -> t.Set[int]:
    """Inode numbers of the complete files in the staging folder, which are all except the last few."""
    return whole_files(case.store.graphroot / "userns-storage/staging")


def layer_inodes(case: Case, layer_id: str) -> t.Set[int]:
    """Inode numbers of all files of a layer."""
    with case.store.mounted(layer_id) as tree:
        names = [os.path.join(at, name) for at, _folders, found in os.walk(tree) for name in found]
        return {os.lstat(name).st_ino for name in names}


def test_check_mode_ignores_time_limit(
    make_case: MakeCase, many_files_image: t.Callable[[int], Image], slow_modules: None
) -> None:
    case = make_case("vfs", many_files_image(FILES))
    interrupt_run(case)
    before = staging(case)
    result = case.layer_template(options={"check": True, "diff": True}, time_limit=0)
    (layer,) = result["layers"]
    assert (layer["action"], layer["progress"], result["partial"]) == ("created", None, False)
    assert layer["files"] > FILES
    assert staging(case) == before


def test_partial_layer_is_not_used_for_other_options(
    make_case: MakeCase, many_files_image: t.Any, slow_modules: None
) -> None:
    case = make_case("vfs", many_files_image(FILES))
    interrupt_run(case)
    other = case.layer_template(uidmap=["0:300000:65536"])
    assert other["layers"][0]["action"] == "created"
    # The partial layer is not used for another value of unmapped_ids either.
    assert len(staging(case)) == 1
    interrupt_run(case, unmapped_ids="overflow")
    assert case.layer_template()["layers"][0]["action"] == "created"
    assert staging(case) == []
    for layer in case.mapped():
        assert_complete(case, layer)


def test_work_on_image_that_was_pulled_again_restarts(
    make_case: MakeCase, many_files_image: t.Any, slow_modules: None
) -> None:
    """The layers have the same IDs but other short names, and the partial layer refers to the old short names."""
    case = make_case("overlay-forced", many_files_image(FILES))
    template = case.template()
    layer = interrupt_run(case)
    old = staged_inodes(case)
    case.store.podman("rmi", case.image.name)
    assert case.layer_template(options={"fails": True})["failed"]
    case.store.load(case.image)
    assert case.template() == template == layer["template_id"]
    (made,) = case.layer_template()["layers"]
    assert made["action"] == "created"
    assert staging(case) == []
    assert_complete(case, made["layer_id"])
    assert old.isdisjoint(layer_inodes(case, made["layer_id"]))
    assert case.shell("test -e /data/00000/0 && echo there") == "there\n"
    assert case.mapped() == [made["layer_id"]]


def test_each_run_completes_a_layer(make_case: MakeCase) -> None:
    case = make_case("vfs")
    maps = [{"uidmap": [f"0:{first}00000:65536"]} for first in (1, 2, 3)]
    args = {"images": [case.image.name], "mappings": maps, "time_limit": 0}
    result = case.call("layer_template", args)
    assert [item["action"] for item in result["layers"]] == ["created", "pending", "pending"]
    assert (result["partial"], result["remaining"], result["changed"]) == (True, 2, True)
    result = case.call("layer_template", args)
    assert [item["action"] for item in result["layers"]] == ["existing", "created", "pending"]
    assert result["layers"][2]["progress"] is None


def start_copy(case: Case) -> subprocess.Popen[bytes]:
    """Start layer_template, and wait until it copies files."""
    process = case.start("layer_template", {"images": [case.image.name], **case.mapping_args})
    wait_until(lambda: staged_inodes(case))
    return process


def assert_resumable(case: Case) -> None:
    """Assert that no process runs, and that the next run resumes the partial layer."""
    assert busy_pids(str(case.store.graphroot)) == []
    assert case.mapped() == []
    (partial,) = staging(case)
    assert (case.store.graphroot / "userns-storage/staging" / partial / "suspended").exists()
    kept = staged_inodes(case)
    (layer,) = case.layer_template()["layers"]
    assert layer["action"] == "created"
    assert_complete(case, layer["layer_id"])
    assert staging(case) == []
    assert kept <= layer_inodes(case, layer["layer_id"])


def test_module_stops_when_no_process_waits_for_result(large: Case, slow_modules: None) -> None:
    process = start_copy(large)
    assert process.stdout is not None
    process.stdout.close()
    process.wait(LIMIT)
    assert_resumable(large)


@pytest.mark.parametrize(
    ("number", "target"),
    [(signal.SIGTERM, "module"), (signal.SIGHUP, "group"), (signal.SIGINT, "group")],
)
def test_module_stops_on_signal(
    number: signal.Signals,
    target: str,
    make_case: MakeCase,
    many_files_image: t.Callable[[int], Image],
    slow_modules: None,
) -> None:
    """The signal is sent to the module, or to its process group, as terminals do."""
    case = make_case("vfs", many_files_image(FILES))
    process = start_copy(case)
    if target == "module":
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    process.communicate(timeout=LIMIT)
    assert process.returncode == -number
    assert_resumable(case)


def test_killed_work_restarts(
    make_case: MakeCase, many_files_image: t.Callable[[int], Image], slow_modules: None
) -> None:
    """After a kill it is not known which entries are complete."""
    case = make_case("vfs", many_files_image(FILES))
    interrupt_run(case)
    kept = staged_inodes(case)
    process = case.start("layer_template", {"images": [case.image.name], **case.mapping_args})
    folder = case.store.graphroot / "userns-storage/staging" / staging(case)[0]
    wait_until(lambda: not (folder / "suspended").exists())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT)
    (layer,) = case.layer_template()["layers"]
    assert layer["action"] == "created"
    assert_complete(case, layer["layer_id"])
    assert staging(case) == []
    assert kept.isdisjoint(layer_inodes(case, layer["layer_id"]))


def create_three_layers(case: Case) -> t.List[str]:
    """Create mapped layers for three maps; returns their IDs in the order of the maps."""
    maps = [{"uidmap": [f"0:{first}00000:65536"]} for first in (1, 2, 3)]
    args = {"images": [case.image.name], "mappings": maps}
    return [item["layer_id"] for item in case.call("layer_template", args)["layers"]]


def test_collection_stops_between_layers(make_case: MakeCase) -> None:
    case = make_case("vfs-tmpfs")
    layers = create_three_layers(case)
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


def test_task_collects_in_several_calls(make_case: MakeCase, lab: Lab, slow: str) -> None:
    """Each call has a time limit of zero and removes a layer; together they remove as much as a single call."""
    case = make_case("vfs-tmpfs")
    layers = create_three_layers(case)
    sizes = case.call("layer_gc", {"max_copies_per_image": 0, "min_age": "0"}, check=True)
    policy = {
        "max_copies_per_image": 0,
        "min_age": "0",
        # The limit applies to the whole task: a call alone would free this amount.
        "max_freed": sizes["removed"][0]["size"] + 1,
    }
    task = {"userns.storage.layer_gc": {**case.store.module_args(), **policy}}
    environ = {"ANSIBLE_COLLECTIONS_PATH": slow}
    checked, result, remaining = run_playbook(
        lab, [{**task, "check_mode": True}, task, {**task, "check_mode": True}], environ=environ
    )
    assert len(checked["removed"]) == len(result["removed"]) == 2
    assert [item["rule"] for item in result["kept"]] == ["max_freed"]
    assert (result["changed"], result["partial"], result["remaining"]) == (True, False, 0)
    assert result["space_reclaimed"] >= sum(item["size"] for item in result["removed"])
    assert case.mapped() == [item["id"] for item in remaining["removed"]]
    assert set(layers) == {item["id"] for item in (*result["removed"], *remaining["removed"])}
