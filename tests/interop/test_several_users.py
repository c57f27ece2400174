# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test modules for several users, images and maps: a refusal for one of them does not stop the others."""

from __future__ import annotations

import typing as t

import pytest
from support.images import Image
from support.lab import Lab
from support.modules import run_module
from support.store_cases import Case
from support.users import User

MakeCase = t.Callable[..., Case]
Json = t.Dict[str, t.Any]


@pytest.fixture
def pair(make_case: MakeCase) -> t.List[Case]:
    """Two users' stores, each with the small image."""
    return [make_case("rootless-overlay") for _number in range(2)]


def owner(case: Case) -> str:
    """The name of the store's user."""
    assert case.store.user is not None
    return case.store.user.name


def call(lab: Lab, users: t.Sequence[str], image: Image, **more: t.Any) -> Json:
    """Run layer_template as root for the keep-id containers of users."""
    options = more.pop("options", {})
    args = {"images": [image.name], "userns": "keep-id", "users": list(users), **more}
    return run_module(lab, "layer_template", args, **options)


def actions(result: Json) -> t.List[t.Tuple[str, str]]:
    """The user and the action of each layer."""
    return [(entry["user"], entry["action"]) for entry in result["layers"]]


def test_each_users_podman_uses_its_layer(lab: Lab, pair: t.List[Case]) -> None:
    users = [owner(case) for case in pair]
    image = pair[0].image
    before = [case.store.disk_state() for case in pair]
    predicted = call(lab, users, image, options={"check": True, "diff": True})
    for case, state in zip(pair, before):
        assert state.changes(case.store.disk_state()) == []
    # A repeated name has no effect.
    made = call(lab, [*users, users[0]], image, options={"diff": True})
    for result in (predicted, made):
        assert result["changed"] is True
        assert actions(result) == [(user, "created") for user in users]
        assert "store" not in result
        assert [item["user"] for item in result["stores"]] == users
        assert [item["graphroot"] for item in result["stores"]] == [
            str(case.store.graphroot) for case in pair
        ]
    assert predicted["diff"] == made["diff"]
    for case in pair:
        maps = {"uidmap": case.map, "gidmap": case.map}
        assert made["diff"]["before"][owner(case)] == {image.name: []}
        assert made["diff"]["after"][owner(case)] == {image.name: [maps]}
    for case, entry in zip(pair, made["layers"]):
        assert entry["uidmap"] == case.map
        container = case.store.container(case.create())
        assert case.mapped() == [entry["layer_id"]]
        assert case.store.layer(container["layer"])["parent"] == entry["layer_id"]
    repeated = call(lab, users, image)
    assert repeated["changed"] is False
    assert actions(repeated) == [(user, "existing") for user in users]


def test_failure_for_a_user_does_not_stop_others(
    lab: Lab, pair: t.List[Case], make_user: t.Callable[..., User]
) -> None:
    first, last = (owner(case) for case in pair)
    bare = make_user(subordinate=0).name
    users = [first, bare, "nobody-of-that-name", last]
    for check in (True, False):
        result = call(lab, users, pair[0].image, options={"fails": True, "check": check})
        assert result["changed"] is True
        assert actions(result) == [(first, "created"), (last, "created")]
        assert [item["user"] for item in result["stores"]] == users
        assert [("error" in item) for item in result["stores"]] == [False, True, True, False]
        assert result["msg"].startswith("2 of 4 ")
        assert f"{bare}: has no subordinate UIDs" in result["msg"]
        assert "nobody-of-that-name: no such user" in result["msg"]
    assert [len(case.mapped()) for case in pair] == [1, 1]


def test_users_excludes_options_for_one_store(lab: Lab, small_image: Image) -> None:
    for other in ("user", "graphroot", "runroot"):
        result = call(lab, ["root"], small_image, options={"fails": True}, **{other: "/nowhere"})
        assert "mutually exclusive" in result["msg"]
        assert other in result["msg"]


def test_empty_users_changes_nothing(lab: Lab, small_image: Image) -> None:
    result = call(lab, [], small_image)
    assert (result["changed"], result["layers"], result["stores"]) == (False, [], [])


def test_only_root_can_create_layers_for_others(lab: Lab, pair: t.List[Case]) -> None:
    mine, other = pair
    users = [owner(mine), owner(other)]
    options = {"fails": True, "user": mine.store.user}
    result = call(lab, users, mine.image, options=options)
    assert actions(result) == [(users[0], "created")]
    assert "become: true" in result["stores"][1]["error"]
    assert [len(case.mapped()) for case in pair] == [1, 0]


@pytest.mark.parametrize("check", [True, False])
def test_refused_pair_does_not_stop_others(check: bool, make_case: MakeCase) -> None:
    case = make_case("vfs")
    mappings = [
        {"uidmap": ["0:100000:1000"]},
        {"uidmap": ["0:100000:65536"]},
        {"userns": "auto:size=4000000000"},
        {"subuidname": "nobody-of-that-name"},
        {"uidmap": ["0:300000:65536"]},
    ]
    args = {"images": ["localhost/never:1", case.image.name], "mappings": mappings}
    result = case.call("layer_template", args, fails=True, check=check)
    assert [entry["action"] for entry in result["layers"]] == [
        *("refused", "refused", "created", "refused", "refused", "created"),
    ]
    reasons = [entry["reason"] for entry in result["layers"]]
    assert "localhost/never:1" in reasons[0]
    assert result["layers"][0]["image_names"] == ["localhost/never:1"]
    assert result["layers"][0]["image_id"] == ""
    assert "which are not covered by the map" in reasons[1]
    assert "nobody-of-that-name" in reasons[4]
    assert result["changed"] is True
    assert result["msg"].startswith("4 of 6 layers failed. ")
    for number in (0, 1, 3, 4):
        assert reasons[number] in result["msg"]
    made = [entry["layer_id"] for entry in result["layers"] if entry["layer_id"]]
    assert case.mapped() == made
    assert len(made) == (0 if check else 2)


def test_invalid_mapping_changes_nothing(make_case: MakeCase) -> None:
    case = make_case("vfs")
    before = case.store.disk_state()
    for text, invalid in (
        ("0:1:x", {"uidmap": ["0:1:x"]}),
        ("keep-it", {"userns": "keep-it"}),
        ("tape", {"userns": "auto", "runtime": "tape"}),
    ):
        mappings = [{"uidmap": ["0:100000:65536"]}, invalid]
        args = {"images": [case.image.name], "mappings": mappings}
        result = case.call("layer_template", args, fails=True)
        assert text in result["msg"]
        assert not result.get("changed")
        assert before.changes(case.store.disk_state()) == []


def test_result_has_advice(make_case: MakeCase) -> None:
    copied = make_case("vfs").layer_template()["layers"][0]
    assert "overlay driver needs no copies" in copied["advice"]
    shifted = make_case("overlay").layer_template()["layers"][0]
    assert shifted["advice"] in shifted["reason"]


def test_other_modules_accept_several_users(lab: Lab, pair: t.List[Case]) -> None:
    """image_layers_info, layer_gc, storage_conf and image_layers return each store's result and the merged result."""
    users = [owner(case) for case in pair]
    missing = "nobody-of-that-name"
    image = pair[0].image
    for case in pair:
        case.create()
        case.store.podman("rm", "--all", "--force")
    found = run_module(lab, "image_layers_info", {"users": [*users, missing]}, fails=True)
    assert [store["user"] for store in found["stores"]] == [*users, missing]
    assert found["msg"].startswith(f"1 of 3 users failed. For {missing}: ")
    assert [entry["user"] for entry in found["images"]] == users
    assert all(len(entry["mapped_layers"]) == 1 for entry in found["images"])
    assert found["stores"][0]["store"]["graphroot"] == str(pair[0].store.graphroot)
    assert "store" not in found
    assert "error" in found["stores"][2]

    rules = {"users": users, "max_copies_per_image": 0, "min_age": "0"}
    predicted = run_module(lab, "layer_gc", rules, check=True, diff=True)
    assert all(len(case.mapped()) == 1 for case in pair)
    done = run_module(
        lab, "layer_gc", {**rules, "users": [users[0], missing, users[1]]}, fails=True
    )
    assert predicted["changed"] is done["changed"] is True
    assert set(predicted["diff"]["before"]) == set(users)
    assert [entry["user"] for entry in done["removed"]] == users
    assert done["inodes_reclaimed"] == sum(
        store["inodes_reclaimed"] for store in done["stores"] if "error" not in store
    )
    assert all(case.mapped() == [] for case in pair)

    settings = {"users": users, "settings": "overlay.mountopt=nodev", "backup": False}
    assert run_module(lab, "storage_conf", settings)["changed"] is True
    assert run_module(lab, "storage_conf", settings)["changed"] is False

    removed = run_module(
        lab, "image_layers", {"users": users, "images": [image.name], "state": "absent"}
    )
    assert removed["actions"] == ["removed", "removed"]
    assert [entry["user"] for entry in removed["images"]] == users
    exclusive = {"users": users, "user": users[0], "images": ["x"]}
    refused = run_module(lab, "image_layers", exclusive, fails=True)
    assert "mutually exclusive" in refused["msg"]
