# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""layer_template stopped at its time limit, or because nobody waits for it any more, goes on in the next run."""

from __future__ import annotations

import os
import time
import typing as t

import pytest
from support.images import Image
from support.machines import busy_pids

if t.TYPE_CHECKING:
    from support.cases import Case

MakeCase = t.Callable[..., t.Any]
# More than any machine makes in the half second after which a run first looks at the clock.
FILES = 12000


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
                wanted, found = (os.lstat(os.path.join(one, name)) for one in (parent, there))
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


def test_goes_on_from_where_it_was_stopped(large: Case) -> None:
    done = 0
    stops = 0
    while True:
        result = large.layer_template(time_limit=0)
        (layer,) = result["layers"]
        if not result["partial"]:
            break
        stops += 1
        assert (layer["action"], result["remaining"], result["changed"]) == ("pending", 1, True)
        assert large.mapped() == []
        assert len(staging(large)) == 1
        # Each run comes further than the last one, or none would ever end.
        assert layer["progress"]["files"] > done
        done = layer["progress"]["files"]
        assert 0 < layer["progress"]["bytes"] <= layer["progress"]["bytes_expected"]
        gc = large.call("layer_gc", {"orphans": "remove", "broken": "repair"})
        assert not gc["changed"]
    assert stops > 0
    assert (layer["action"], result["remaining"]) == ("created", 0)
    assert staging(large) == []
    assert layer["files"] > FILES
    assert_whole(large, layer["layer_id"])
    large.create()
    assert large.mapped() == [layer["layer_id"]]
    again = large.layer_template(time_limit=0)
    assert (again["changed"], again["partial"]) == (False, False)


def test_another_map_does_not_go_on_with_it(make_case: MakeCase, many_files_image: t.Any) -> None:
    case = make_case("vfs", many_files_image(FILES))
    assert case.layer_template(time_limit=0)["partial"]
    other = case.layer_template(uidmap=["0:300000:65536"])
    assert other["layers"][0]["action"] == "created"
    assert case.layer_template(strategy="copy")["layers"][0]["action"] == "created"
    for layer in case.mapped():
        assert_whole(case, layer)


def test_each_run_gets_something_done(make_case: MakeCase) -> None:
    case = make_case("vfs")
    maps = [{"uidmap": [f"0:{first}00000:65536"]} for first in (1, 2, 3)]
    result = case.layer_template(mappings=maps, time_limit=0, uidmap=None)
    assert [one["action"] for one in result["layers"]] == ["created", "pending", "pending"]
    assert (result["partial"], result["remaining"], result["changed"]) == (True, 2, True)
    result = case.layer_template(mappings=maps, time_limit=0, uidmap=None)
    assert [one["action"] for one in result["layers"]] == ["existing", "created", "pending"]
    assert result["layers"][2]["progress"] is None


def test_stops_when_nobody_waits_for_the_result(large: Case) -> None:
    process = large.start("layer_template", {"images": [large.image.name], **large.wanted})
    until = time.monotonic() + 60
    while not staging(large):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert process.stdout is not None
    process.stdout.close()
    process.wait(30)
    assert busy_pids(str(large.store.graphroot)) == []
    assert large.mapped() == []
    (left,) = staging(large)
    assert (large.store.graphroot / "userns-storage/staging" / left / "suspended").exists()
    result = large.layer_template()
    assert result["layers"][0]["action"] == "created"
    assert_whole(large, result["layers"][0]["layer_id"])
    assert staging(large) == []
