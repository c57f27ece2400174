# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that layer_gc removes superseded images from stores of podman."""

from __future__ import annotations

import json
import os
import time
import typing as t

import pytest
from support import hosts, images, matrix
from support.images import Image
from support.lab import Lab
from support.store_cases import Case
from support.stores import Store

if t.TYPE_CHECKING:
    from support.hosts import Host

MakeStore = t.Callable[..., Store]
Json = t.Dict[str, t.Any]
NAME = "localhost/app:1"
DAY = 86400


def version(lab: Lab, number: int) -> Image:
    """A version of an image; all versions have a common base layer."""
    base = {**images.shell(), "etc": images.directory(), "etc/base": images.file("base")}
    return images.build(lab.folder(), [base, {"etc/version": images.file(f"{number}\n")}], NAME)


class Updated:
    """A store in which the image was updated, with a mapped layer of the old version."""

    def __init__(self, lab: Lab, store: Store) -> None:
        self.store = store
        old, new = version(lab, 1), version(lab, 2)
        self.case = Case(store, old)
        self.old = store.load(old)
        (entry,) = self.case.layer_template()["layers"]
        self.mapped = entry["layer_id"]
        self.new = store.load(new)
        (self.replaced,) = (image for image in store.images() if image["id"] == self.old)

    def age(self, days: int) -> None:
        """Set the creation times of all layers to a number of days ago."""
        path = self.store.graphroot / f"{self.store.driver}-layers/layers.json"
        before = path.stat()
        records = json.loads(path.read_text())
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * DAY))
        for record in records:
            record["created"] = moment
        path.write_text(json.dumps(records))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def collect(self, check: bool = False, **options: t.Any) -> Json:
        rules = {"superseded_images": "2w", "min_age": "0", **options}
        return self.case.call("layer_gc", rules, check=check, diff=True)


@pytest.mark.parametrize(
    ("release", "kind"),
    [
        ("bookworm", "vfs"),
        ("bookworm", "btrfs"),
        ("trixie", "rootless-overlay"),
        ("sid", "overlay-forced"),
        ("experimental", "overlay-forced"),
    ],
)
def test_superseded_image_is_removed(
    release: str, kind: str, lab: Lab, make_store: MakeStore, host: t.Callable[[str], Host]
) -> None:
    assert release in matrix.RELEASES
    machine = hosts.of_release(lab, release, host)
    updated = Updated(lab, make_store(kind, machine=machine))
    store = updated.store
    assert not updated.replaced.get("names")
    top = updated.replaced["layer"]
    # The rule is off by default, and keeps images that were superseded recently.
    assert updated.collect(superseded_images=None)["kept_images"] == []
    recent = updated.collect()
    assert (recent["changed"], [item["rule"] for item in recent["kept_images"]]) == (
        False,
        ["superseded_images"],
    )
    updated.age(20)
    predicted = updated.collect(check=True)
    assert predicted["changed"]
    (entry,) = predicted["removed_images"]
    assert (entry["id"], entry["former_names"]) == (updated.old, [NAME])
    assert entry["layers"] == [updated.mapped, top]
    assert entry["size"] > 0
    done = updated.collect()
    assert done["removed_images"] == predicted["removed_images"]
    assert done["diff"] == predicted["diff"]
    assert [image["id"] for image in store.images()] == [updated.new]
    assert store.layer_ids().isdisjoint({updated.mapped, top})
    # The new version uses the base layer, too.
    assert len(store.layers()) == 2
    for layer_id in (updated.mapped, top):
        assert store.remaining_paths(layer_id) == []
    assert store.run(NAME, "cat", "/etc/version") == "2\n"
    assert updated.collect()["changed"] is False


class TestKept:
    """Superseded images that are kept, with the reason in the result."""

    @pytest.fixture
    def updated(self, lab: Lab, make_store: MakeStore) -> Updated:
        updated = Updated(lab, make_store("vfs"))
        updated.age(20)
        return updated

    def kept(self, updated: Updated, **options: t.Any) -> Json:
        before = updated.store.images(), updated.store.layer_ids()
        assert updated.collect(check=True, **options)["removed_images"] == []
        result = updated.collect(**options)
        assert result["removed_images"] == []
        assert (updated.store.images(), updated.store.layer_ids()) == before
        (entry,) = result["kept_images"]
        return t.cast(Json, entry)

    def test_image_in_use_is_kept(self, updated: Updated) -> None:
        updated.store.podman("create", "--name=web", updated.old, "true")
        entry = self.kept(updated)
        assert (entry["rule"], entry["reason"]) == ("in_use", "in use by container web")

    def test_image_in_use_through_mapped_layer_is_kept(self, updated: Updated) -> None:
        updated.case.image = updated.case.image.__class__(
            **{**vars(updated.case.image), "name": updated.old}
        )
        updated.case.create("--name=web")
        assert self.kept(updated)["rule"] == "in_use"

    def test_base_of_another_image_is_kept(self, updated: Updated, lab: Lab) -> None:
        store = updated.store
        base = version(lab, 1)
        built = images.build(
            lab.folder(), [*base.layers, {"etc/more": images.file("m")}], "localhost/built:1"
        )
        store.load(built)
        updated.age(20)
        entry = self.kept(updated)
        assert (entry["rule"], "localhost/built:1" in entry["reason"]) == ("dependents", True)

    @pytest.mark.parametrize(
        ("options", "rule"),
        [
            ({"keep_images": ["*/app:*"]}, "keep_images"),
            ({"images": ["docker.io/*"]}, "images"),
            ({"origin": "ours"}, "origin"),
            ({"shared": True}, "shared"),
            ({"superseded_images": "4w"}, "superseded_images"),
            ({"min_age": "4w"}, "superseded_images"),
        ],
    )
    def test_image_excluded_by_options_is_kept(
        self, updated: Updated, options: Json, rule: str
    ) -> None:
        assert self.kept(updated, **options)["rule"] == rule

    def test_leased_image_is_kept(self, updated: Updated) -> None:
        updated.case.layer_template(images=[updated.old], state="absent")
        updated.case.layer_template(images=[updated.old], lease="30d")
        assert self.kept(updated)["rule"] == "lease"

    def test_image_with_new_name_is_not_superseded(self, updated: Updated) -> None:
        updated.store.podman("tag", updated.old, "localhost/app:old")
        result = updated.collect()
        assert (result["removed_images"], result["kept_images"]) == ([], [])

    def test_image_with_its_first_name_again_is_not_superseded(self, updated: Updated) -> None:
        """The image that had the name in between is superseded."""
        store = updated.store
        store.podman("tag", updated.old, NAME)
        assert store.image(NAME)["id"] == updated.old
        result = updated.collect()
        (entry,) = result["removed_images"]
        assert (entry["id"], entry["former_names"]) == (updated.new, [NAME])
        assert result["kept_images"] == []
        assert [image["id"] for image in store.images()] == [updated.old]
        assert store.mapped_layers(NAME) == [updated.mapped]
        assert store.run(NAME, "cat", "/etc/version") == "1\n"

    def test_image_that_never_had_a_name_is_not_superseded(
        self, updated: Updated, lab: Lab
    ) -> None:
        store = updated.store
        store.podman("rmi", updated.old)
        folder = lab.folder()
        (folder / "Containerfile").write_text(f"FROM {NAME}\nLABEL of=nothing\n")
        store.buildah("bud", "--layers", "-q", "--no-cache", str(folder))
        assert any(not image.get("names") for image in store.images())
        result = updated.collect()
        assert (result["removed_images"], result["kept_images"]) == ([], [])
