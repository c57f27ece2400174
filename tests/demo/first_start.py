# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The first start of a container with a user namespace, without and with a pre-mapped layer: first_start.py PAGE.

Everything happens in stores of temporary users that are gone afterwards; the report about them stays in the file PAGE.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import typing as t

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from support import hosts, users
from support.images import Image
from support.lab import Lab
from support.stores import Store

USERNS = "keep-id"


def main() -> None:
    print("Getting a laboratory ready: a real Debian image, two users with stores of their own")
    lab = Lab()
    try:
        image = hosts.debian_image(lab)
        with_copy, with_layer = _store(lab, image), _store(lab, image)
        print(f"Image {image.name}, {_megabytes(sum(image.sizes))} in {len(image.sizes)} layers")

        _title(f"podman run --userns={USERNS}, as it is")
        waited = _start(with_copy, image)
        print(
            f"First start: {waited:.2f} s. podman copied the image, while all its other commands waited."
        )

        _title("The same with a pre-mapped layer: ansible-playbook")
        _premap(lab, with_layer, image)
        prepared = _start(with_layer, image)
        again = _start(with_layer, image)
        print(f"First start: {prepared:.2f} s. Second start: {again:.2f} s.")

        _title("What it came to")
        said, held = _sizes(with_copy, image)
        _table(
            ("first start, podman alone", f"{waited:.2f} s"),
            ("first start, pre-mapped", f"{prepared:.2f} s ({waited / prepared:.0f} times faster)"),
            ("second start, pre-mapped", f"{again:.2f} s"),
            ("the hidden copy, as podman records it", _megabytes(said)),
            ("the hidden copy, on the disk", _megabytes(held)),
            ("our layer, on the disk", _megabytes(_sizes(with_layer, image)[1])),
        )

        _title("The report about both stores: ansible-playbook userns.storage.report")
        page = pathlib.Path(sys.argv[1])
        _report(lab, [with_copy, with_layer], page)
        print(f"Open in a browser: {page}")
    finally:
        lab.close()


def _store(lab: Lab, image: Image) -> Store:
    user = users.add_user(lab)
    lab.on_close(lambda: users.remove_user(lab, user))
    store = Store(lab, "rootless-overlay", user=user)
    lab.on_close(store.close)
    store.load(image)
    # Without a namespace of its own: nothing but the container's first start is measured later.
    store.run(image.name, "true")
    return store


def _start(store: Store, image: Image) -> float:
    command = ("cat", "/proc/self/uid_map")
    return store.timed(lambda: store.run(image.name, *command, args=(f"--userns={USERNS}",)))


def _report(lab: Lab, stores: t.Sequence[Store], page: pathlib.Path) -> None:
    page.parent.mkdir(parents=True, exist_ok=True)
    variables = {
        "report_title": "Two first starts",
        "report_rootful": False,
        "report_users": [t.cast(users.User, store.user).name for store in stores],
        "report_html": str(page),
        "report_markdown": "",
        # What could be collected, if nothing were to stay.
        "prune_max_copies_per_image": "0",
        "prune_min_age": "0",
    }
    _play(lab, "userns.storage.report", variables)


def _premap(lab: Lab, store: Store, image: Image) -> None:
    user = t.cast(users.User, store.user)
    task = {
        "name": f"Pre-map the image for {USERNS} containers of {user.name}",
        "userns.storage.layer_template": {
            "images": image.name,
            "userns": USERNS,
            "user": user.name,
        },
    }
    play = {"name": "Hosts ready for user namespaces", "hosts": "localhost", "gather_facts": False}
    folder = lab.folder()
    playbook = folder / "premap.json"
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
    given = {"ansible_python_interpreter": "/usr/bin/python3", **(variables or {})}
    command = [program, playbook, "-i", "localhost,", "-c", "local", "-e", json.dumps(given)]
    subprocess.run(command, check=True, env=environment, cwd=folder)


def _sizes(store: Store, image: Image) -> t.Tuple[int, int]:
    """Bytes of the image's mapped layer: as recorded, and on the disk."""
    (layer_id,) = store.mapped_layers(image.name)
    said = subprocess.run(
        ["du", "-s", "--block-size=1", store.layer_folder(layer_id)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return store.layer(layer_id).get("diff-size", 0), int(said.stdout.split()[0])


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
