# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Images with unusual configurations and account files in real stores cause no failure for other images."""

from __future__ import annotations

import hashlib
import json
import pathlib
import typing as t

import pytest
from support import images
from support.images import Image
from support.lab import Lab
from support.stores import Store

MakeStore = t.Callable[..., Store]
RunModule = t.Callable[..., t.Dict[str, t.Any]]
Json = t.Dict[str, t.Any]

BLANK: Json = {}
CONFIGS: t.Sequence[Json] = (
    {"created": "9999-12-31T23:59:59.999999999Z"},
    {"created": "0001-01-01T00:00:00Z"},
    {"created": "9999-12-31T23:59:59-23:59"},
    {"created": None},
    {"history": [{"created": "0001-01-01T00:00:00Z", "created_by": "x" * 10_000}] * 300},
    {"author": "\x1b[2J\u202e\n{{ lookup('env', 'HOME') }}"},
    {"config": {"Env": [f"V{number}={'x' * 1000}" for number in range(1000)]}},
    {"config": {"Labels": {f"l{number}": "\x1b]0;x\x07\n" * 100 for number in range(1000)}}},
    {"config": {"Labels": {"\0": "\0", "": "", "__ansible_type": "x"}}},
    *(
        {"config": {"User": user}}
        for user in (
            *(
                ":",
                "0:0:0",
                "-1",
                "99999999999999999999:4294967295",
                "4294967295",
                "app",
                "app:odd",
            ),
            *(
                "1_0",
                " 5",
                "5 ",
                "\u0663",
                "\u202eapp",
                "a" * 5000,
                "app\nroot",
                "\0",
                "+1:+1",
                "0x10",
            ),
        )
    ),
)
ACCOUNTS: t.Sequence[str] = (
    "app:x:99999999999999999999:1::/:\n",
    "app:x:4294967295:4294967295::/:\n",
    "app:x:-1:-1::/:\nroot\n\n:::::::\n",
    "app:x:1\x00:1\x00:\x00:/:\n",
    "app:x:\x1b[2J7\x07:1::/:\r\n",
    "app:x:1_0:\u0663::/:\n",
    "app:x:5:5:" + "x" * 1_000_000 + ":/:\n",
    "".join(f"app:x:{number}:{number}::/:\n" for number in range(20_000)),
)


def with_config(image: Image, change: Json) -> Image:
    """Change the configuration in an OCI layout, and the names of its blobs accordingly."""

    def read(reference: Json) -> Json:
        found: Json = json.loads((blobs / reference["digest"].split(":")[1]).read_bytes())
        return found

    def write(reference: Json, body: Json) -> None:
        data = json.dumps(body).encode()
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        reference.update(digest=f"sha256:{digest}", size=len(data))

    blobs, path = image.path / "blobs/sha256", image.path / "index.json"
    index = json.loads(path.read_bytes())
    manifest = read(index["manifests"][0])
    config = read(manifest["config"])
    write(
        manifest["config"],
        {**config, **change, "config": {**config["config"], **change.get("config", BLANK)}},
    )
    write(index["manifests"][0], manifest)
    path.write_text(json.dumps(index))
    return image


def odd_images(lab: Lab) -> t.Iterator[Image]:
    for number, change in enumerate(CONFIGS):
        layer = {"etc": images.directory(), "etc/passwd": images.file("app:x:7:8::/:/x\n")}
        yield with_config(images.build(lab.folder(), [layer], f"localhost/odd:c{number}"), change)
    for number, text in enumerate(ACCOUNTS):
        layer = {
            "etc": images.directory(),
            "etc/passwd": images.file(text),
            "etc/group": images.file(text),
        }
        name = f"localhost/odd:a{number}"
        yield images.build(lab.folder(), [layer], name, {"User": "app:app"})
    layer = {
        "etc": images.directory(),
        "etc/passwd": images.symlink("/etc/shadow"),
        "etc/group": images.directory(),
    }
    yield images.build(lab.folder(), [layer], "localhost/odd:link", {"User": "app:app"})


@pytest.fixture
def range_for_auto() -> t.Iterator[None]:
    """Add the user whose IDs automatic namespaces get to the files in the laboratory's /etc."""
    lines = {"passwd": "containers:x:61998:61998::/nonexistent:/usr/sbin/nologin\n"}
    lines.update(dict.fromkeys(("subuid", "subgid"), "containers:2000000000:300000\n"))
    paths = {pathlib.Path("/etc", name): line for name, line in lines.items()}
    original = {path: path.read_text() for path in paths}
    for path, line in paths.items():
        path.write_text(original[path] + line)
    yield
    for path, text in original.items():
        path.write_text(text)


@pytest.mark.usefixtures("range_for_auto")
@pytest.mark.parametrize(("kind", "userns"), [("vfs", "auto"), ("rootless-vfs", "keep-id")])
def test_unusual_images_do_not_affect_other_images(
    kind: str,
    userns: str,
    lab: Lab,
    make_store: MakeStore,
    run_module: RunModule,
    small_image: Image,
) -> None:
    store = make_store(kind, small_image)
    odd = []
    for image in odd_images(lab):
        target = f"containers-storage:{image.name}"
        if store.skopeo("copy", "-q", image.source, target, check=False).rc == 0:
            odd.append(image.name)
    # skopeo cannot copy some of these images to a store.
    assert len(odd) > 25, odd
    store_args = store.module_args()

    info = run_module("image_layers_info", {**store_args, "measure": "exclusive"})
    assert info["contradictions"] == []
    assert {name for image in info["images"] for name in image["names"]} >= {*odd, small_image.name}

    mapped = run_module(
        "layer_template",
        {**store_args, "images": [*odd, small_image.name], "userns": userns, "force": True},
        fails=None,
    )
    actions = {name: item for item in mapped["layers"] for name in item["image_names"]}
    assert actions[small_image.name]["action"] == "created", mapped.get("msg")
    for name in odd:
        assert actions[name]["action"] == "created" or actions[name]["reason"], actions[name]
    assert "unexpectedly" not in mapped.get("msg", "")
    assert "exception" not in mapped

    collected = run_module("layer_gc", {**store_args, "min_age": "0", "max_copies_per_image": 0})
    assert collected["contradictions"] == []
    created = {item["layer_id"] for item in mapped["layers"] if item["action"] == "created"}
    assert {item["id"] for item in collected["removed"]} == created
    assert collected["failures"] == []
