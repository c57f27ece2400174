# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Demonstrate the first start of a container with a user namespace, without and with this collection.

Usage: first_start.py PAGE

It shows podman's copy, a pre-mapped layer, an image that is pulled with the map, an image that users share, the waiting
time of a pull during copies, and the removal. It uses stores of temporary users, which are removed at the end; the
report about them is kept in the file PAGE.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import threading
import typing as t

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support import hosts, images, users
from support.images import Image
from support.lab import Lab
from support.stores import Store

USERNS = "keep-id"


def main() -> None:
    print("Preparing a laboratory: a real Debian image, and users with stores of their own")
    lab = Lab()
    try:
        image, other = hosts.debian_image(lab), _other_image(lab)
        with_copy, with_layer = _store(lab, image), _store(lab, image)
        print(f"Image {image.name}, {_megabytes(sum(image.sizes))} in {len(image.sizes)} layers")

        _title(f"podman run --userns={USERNS}, without this collection")
        with _Pulls(with_copy, other) as pulls:
            waited = _start(with_copy, image)
        blocked = pulls.longest
        print(f"First start: {waited:.2f} s, in which podman copied the image.")
        print(f"A pull of another image by the same user took {blocked:.2f} s meanwhile.")

        _title("A pre-mapped layer: userns.storage.layer_template")
        with _Pulls(with_layer, other) as pulls:
            _premap(lab, with_layer, image)
        print(f"A pull of another image took {pulls.longest:.2f} s meanwhile.")
        prepared, repeated = _start(with_layer, image), _start(with_layer, image)
        print(f"First start: {prepared:.2f} s. Second start: {repeated:.2f} s.")

        _title("An image pulled with the map: userns.storage.image_layers")
        mapped = _empty_store(lab)
        _pull_with_map(lab, mapped, image)
        on_mapped = _start(mapped, image)
        print(f"First start: {on_mapped:.2f} s.")

        _title("One image for all users: userns.storage.shared_images")
        first, second = _empty_store(lab), _empty_store(lab)
        _share(lab, image, [first, second])
        on_shared = [_start(store, image) for store in (first, second)]
        print(
            f"First start of one user: {on_shared[0]:.2f} s, of a second user: {on_shared[1]:.2f} s."
        )

        _title("Results")
        recorded, copied = _sizes(with_copy, image)
        _table(
            ("first start without this collection", f"{waited:.2f} s"),
            ("first start, pre-mapped", f"{prepared:.2f} s ({waited / prepared:.0f} times faster)"),
            ("first start, pulled with the map", f"{on_mapped:.2f} s"),
            ("first start of a second user, shared", f"{on_shared[1]:.2f} s"),
            ("pull meanwhile, podman copies", f"{blocked:.2f} s"),
            ("pull meanwhile, layer_template copies", f"{pulls.longest:.2f} s"),
            ("podman's copy, as podman records it", _megabytes(recorded)),
            ("podman's copy, on disk", _megabytes(copied)),
            ("pre-mapped layer, on disk", _megabytes(_sizes(with_layer, image)[1])),
            (
                "layers besides the image, pulled with the map",
                str(len(mapped.mapped_layers(image.name))),
            ),
            ("layers in the store of the second user, shared", str(len(second.layers()))),
        )

        _title("The report: ansible-playbook userns.storage.report")
        page = pathlib.Path(sys.argv[1])
        _report(lab, [with_copy, with_layer, mapped], page)
        print(f"Open in a browser: {page}")

        _title("The removal: userns.storage.layer_gc, then userns.storage.image_layers")
        before = _used(with_copy)
        _collect(lab, with_copy)
        collected = _used(with_copy)
        _remove(lab, with_copy, image)
        print(
            f"layer_gc freed {_megabytes(before - collected)}, the removal of the image "
            f"{_megabytes(collected - _used(with_copy))}."
        )
        _share(lab, image, [first, second], state="absent")
    finally:
        lab.close()


class _Pulls:
    """Pulls of a small image into a store, one after the other.

    :ivar longest: the longest time of a pull in seconds
    """

    def __init__(self, store: Store, image: Image) -> None:
        self._store, self._image = store, image
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._pull)
        self.longest = 0.0

    def __enter__(self) -> _Pulls:
        self._thread.start()
        return self

    def __exit__(self, *_reason: object) -> None:
        self._ended.set()
        self._thread.join()

    def _pull(self) -> None:
        while not self._ended.is_set():
            spent = self._store.timed(lambda: self._store.load(self._image))
            self.longest = max(self.longest, spent)
            self._store.skopeo("delete", f"containers-storage:{self._image.name}")


def _other_image(lab: Lab) -> Image:
    return images.build(lab.folder(), images.small_layers(), "localhost/other:1")


def _empty_store(lab: Lab) -> Store:
    user = users.add_user(lab)
    lab.on_close(lambda: users.remove_user(lab, user))
    store = Store(lab, "rootless-overlay", user=user)
    lab.on_close(store.close)
    # podman's initialisation of the store is not measured.
    store.podman("images")
    return store


def _store(lab: Lab, image: Image) -> Store:
    store = _empty_store(lab)
    store.load(image)
    # Without a user namespace, so that only the copy and the container are measured later.
    store.run(image.name, "true")
    return store


def _start(store: Store, image: Image) -> float:
    command = ("cat", "/proc/self/uid_map")
    return store.timed(lambda: store.run(image.name, *command, args=(f"--userns={USERNS}",)))


def _report(lab: Lab, stores: t.Sequence[Store], page: pathlib.Path) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    variables = {
        "report_title": "First starts",
        "report_rootful": False,
        "report_users": [_name(store) for store in stores],
        "report_html": str(page),
        "report_markdown": "none",
        # The report includes all layers that could be removed.
        "prune_max_copies_per_image": "0",
        "prune_min_age": "0",
    }
    _play(lab, "userns.storage.report", variables)


def _premap(lab: Lab, store: Store, image: Image) -> None:
    options = {"images": image.name, "userns": USERNS, "user": _name(store)}
    _task(lab, f"Pre-map the image for {USERNS} containers", "layer_template", options)


def _pull_with_map(lab: Lab, store: Store, image: Image) -> None:
    options = {"images": image.name, "source": image.source, "userns": USERNS}
    options["user"] = _name(store)
    _task(lab, f"Pull the image for {USERNS} containers", "image_layers", options)


def _share(lab: Lab, image: Image, stores: t.Sequence[Store], state: str = "present") -> None:
    roots = {"graphroot": str(lab.base / "shared/g"), "runroot": str(lab.base / "shared/r")}
    if state == "present":
        options = {"images": image.name, "source": image.source, "driver": "overlay", **roots}
        _task(lab, "Pull the image into the shared store", "image_layers", options)
    names = [_name(store) for store in stores]
    declared = {**roots, "users": names, "mappings": [{"userns": USERNS}], "state": state}
    if state == "absent":
        for store in stores:
            store.podman("rm", "--all", "--force")
    _task(lab, f"Share the image with {' and '.join(names)}: {state}", "shared_images", declared)


def _collect(lab: Lab, store: Store) -> None:
    options = {"user": _name(store), "max_copies_per_image": 0, "min_age": "0"}
    _task(lab, "Remove the mapped layers that no container uses", "layer_gc", options)


def _remove(lab: Lab, store: Store, image: Image) -> None:
    options = {"user": _name(store), "images": image.name, "state": "absent"}
    _task(lab, "Remove the image with all its layers", "image_layers", options)


def _name(store: Store) -> str:
    return t.cast(users.User, store.user).name


def _task(lab: Lab, name: str, module: str, options: t.Mapping[str, t.Any]) -> None:
    play = {"name": "Hosts for user namespaces", "hosts": "localhost", "gather_facts": False}
    playbook = lab.folder() / "task.json"
    task = {"name": name, f"userns.storage.{module}": options}
    playbook.write_text(json.dumps([{**play, "tasks": [task]}], indent=2))
    _play(lab, str(playbook))


def _play(lab: Lab, playbook: str, variables: t.Optional[t.Mapping[str, t.Any]] = None) -> None:
    folder = lab.folder()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "ANSIBLE_COLLECTIONS_PATH": str(lab.tree),
        "ANSIBLE_LOCALHOST_WARNING": "false",
        "ANSIBLE_INVENTORY_UNPARSED_WARNING": "false",
    }
    program = pathlib.Path(sys.executable).parent / "ansible-playbook"
    extra_vars = {"ansible_python_interpreter": "/usr/bin/python3", **(variables or {})}
    command = [
        str(program),
        str(playbook),
        "-i",
        "localhost,",
        "-c",
        "local",
        "-e",
        json.dumps(extra_vars),
    ]
    subprocess.run(command, check=True, env=environment, cwd=folder)


def _sizes(store: Store, image: Image) -> t.Tuple[int, int]:
    """Bytes of the image's mapped layer: the recorded size, and the size on disk."""
    (layer_id,) = store.mapped_layers(image.name)
    usage = subprocess.run(
        ["du", "-s", "--block-size=1", store.layer_folder(layer_id)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return store.layer(layer_id).get("diff-size", 0), int(usage.stdout.split()[0])


def _used(store: Store) -> int:
    """Bytes of the store on disk."""
    command = ["du", "-s", "--block-size=1", str(store.graphroot / store.driver)]
    return int(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[0]
    )


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _table(*rows: t.Tuple[str, str]) -> None:
    width = max(len(name) for name, _value in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _megabytes(size: int) -> str:
    return f"{size / 10**6:.1f} MB"


if __name__ == "__main__":
    main()
