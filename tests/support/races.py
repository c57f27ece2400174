# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run random operations of podman, buildah and this collection's modules on a store at the same time.

Each worker has containers and images of its own, which other workers do not use, and all workers share an
image. So no operation may fail, and the expected final state is everything that workers have created and not
removed. However, concurrent podman processes sometimes fail even without this collection: KNOWN lists these
failures and their reasons. Each was observed in races without modules of this collection (`run(ours=0)`).
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import os
import random
import re
import threading
import time
import traceback
import typing as t

from ansible_collections.userns.storage.plugins.module_utils._storage.operations.layer_flags import (
    ORIGIN,
    ORIGIN_FLAG,
)

from .images import Image
from .lab import Lab
from .machines import Machine, Result
from .modules import run_module
from .stores import Json, Store

ROOTFUL_MAPS = tuple(f"0:{start}:65536" for start in (100000, 200000, 300000))
# A contiguous map in two parts, for which every runtime creates a separate layer.
SPLIT_MAP = ("0:400000:1000", "1000:401000:64536")

EMPTY_COPY = "on an empty copy that podman created"

# Failures that podman and buildah cause each other: patterns of an operation with its error, and the reason.
KNOWN: t.Mapping[str, str] = {
    r"podman (run|start) .*crun: .*Permission denied": (
        "containers/storage changes the owner of the driver's folder to the root of the newest "
        "container, and the root of a container that starts at this time cannot enter it"
    ),
    r"(podman|buildah) (images|ps|containers)\b.*(not known|file does not exist)": (
        "it reads each image and container of its list, which may have changed in the meantime"
    ),
    rf"podman (run|start) .*{re.escape(EMPTY_COPY)}": (
        "podman sometimes regards a copy as complete although it has changed no owner, and then "
        "containers with that map fail"
    ),
}


class Race:
    """Concurrent workers on a store.

    :param seed: with the same seed, each worker selects the same operations
    :ivar failures: messages of failures, except known failures
    :ivar known: the number of known failures by reason
    :ivar done: the number of completed operations by name
    """

    def __init__(self, lab: Lab, store: Store, image: Image, seed: int) -> None:
        self.lab, self.store, self.image, self.seed = lab, store, image, seed
        self.failures: t.List[str] = []
        self.known: t.Counter[str] = collections.Counter()
        self.done: t.Counter[str] = collections.Counter()
        self.containers: t.Dict[str, str] = {}
        self.images: t.Set[str] = {image.name}
        # Held while names change, because podman alone loses names: rmi and skopeo read the names of an image and
        # write them back, and prune removes an image that a commit is about to name.
        self.naming = threading.Lock()
        self._guard = threading.Lock()
        self._until = 0.0
        self._steps = 0
        self._needed: t.Sequence[str] = ()

    def run(
        self,
        *,
        steps: int = 0,
        seconds: float = 0.0,
        podmans: int = 2,
        buildahs: int = 1,
        ours: int = 2,
        needed: t.Sequence[str] = (),
    ) -> None:
        """Run the workers, and wait for them.

        :param steps: the minimum number of operations of each worker
        :param seconds: for soak tests: the minimum duration
        :param needed: operations that must be completed before any worker stops
        """
        self._until = time.monotonic() + seconds
        self._steps = steps
        self._needed = needed
        workers: t.List[t.Tuple[str, t.Type[_Worker]]] = []
        workers += [(f"p{number}", _Podman) for number in range(podmans)]
        workers += [(f"b{number}", _Buildah) for number in range(buildahs)]
        workers += [(f"o{number}", _Ours) for number in range(ours)]
        threads = [
            threading.Thread(target=self._work, args=(kind(self, name),)) for name, kind in workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, worker: _Worker) -> None:
        steps = 0
        try:
            while (
                steps < self._steps
                or time.monotonic() < self._until
                or not all(self.done[item] for item in self._needed)
            ):
                worker.step()
                steps += 1
        except Exception:
            self.fail(f"{worker.name}: {traceback.format_exc()}")

    def fail(self, message: str) -> None:
        """Record a failure."""
        reasons = [
            reason for pattern, reason in KNOWN.items() if re.search(pattern, message, re.DOTALL)
        ]
        with self._guard:
            self.known.update(reasons[:1])
            if not reasons:
                self.failures.append(message)

    def count(self, operation: str) -> None:
        """Record a completed operation."""
        with self._guard:
            self.done[operation] += 1

    # Checks of the final state

    def check_final_state(self) -> None:
        """Remove all unused layers, and compare the store with the expected state."""
        final = {"min_age": "0", "max_copies_per_image": 0, "duplicates": True}
        args = {**self.store.module_args(), **final}
        run_module(self.lab, "layer_gc", args)
        result = run_module(self.lab, "layer_gc", args)
        if result["removed"]:
            self.fail(f"a second run of layer_gc removed layers: {result['removed']}")
        self._check_names()
        self._check_layers()
        self._check_disk()
        for name in sorted(self.containers):
            done = self.store.podman("inspect", "--size", "--type=container", name, check=False)
            if done.rc != 0 and self.containers[name] == "podman":
                self.fail(f"podman inspect {name}: {done.stderr}")

    def check(self, machine: Machine) -> None:
        """Run `containers-storage check` on a machine that has this command.

        It reports times and owners of mapped layers that runtimes have created, see docs/interop-matrix.md.
        It must report no problems of other layers, including mapped layers of this collection.
        """
        inside = ("podman", "unshare") if self.store.user else ()
        done = machine.run(
            [*inside, "containers-storage", "check"],
            account=self.store.account,
            env=self.store.env(),
            check=False,
        )
        if not re.search(r"^\d+ layer errors, ", done.stderr, re.MULTILINE) and done.rc != 0:
            self.fail(f"containers-storage check: {done.stdout}{done.stderr}")
        copies = {layer["id"] for layer in self.store.layers() if _copied_by_a_runtime(layer)}
        for line in dict.fromkeys(done.stdout.splitlines()):
            found = re.fullmatch(r" *layer (\w{64}): (.+)", line)
            known = found and found[1] in copies and found[2].endswith(", layer content modified")
            if found and not known:
                self.fail(f"containers-storage check: {line}")

    def _check_names(self) -> None:
        found = {container["names"][0] for container in self.store.containers()}
        self._compare("containers", found, set(self.containers))
        names = {name for image in self.store.images() for name in image.get("names") or ()}
        self._compare("names of images", names, self.images)
        done = self.store.podman("images", "--format={{.Repository}}:{{.Tag}}", check=False)
        if done.rc != 0:
            self.fail(f"podman images, after the race: {done.stderr}")
            return
        listed = set(done.stdout.split()) - {"<none>:<none>"}
        self._compare("images that podman lists", listed, self.images)

    def _compare(self, subject: str, found: t.Set[str], expected: t.Set[str]) -> None:
        if found != expected:
            missing, unexpected = sorted(expected - found), sorted(found - expected)
            self.fail(f"{subject}: {missing} are missing, and {unexpected} are unexpected")

    def _check_layers(self) -> None:
        layers = {item["id"]: item for item in self.store.layers()}
        needed: t.Set[str] = set()
        for image in self.store.images():
            for layer_id in [image["layer"], *(image.get("mapped-layers") or ())]:
                self._need(layers, needed, layer_id, f"image {image['id'][:12]}")
            self._check_maps(image, layers)
        for container in self.store.containers():
            self._need(layers, needed, container["layer"], f"container {container['names']}")
        for layer_id in sorted(set(layers) - needed):
            self.fail(f"layer {layer_id[:12]} is an orphan: {layers[layer_id]}")
        for layer in layers.values():
            if (layer.get("flags") or {}).get("incomplete"):
                self.fail(f"layer {layer['id'][:12]} is incomplete")

    def _need(
        self, layers: t.Mapping[str, Json], needed: t.Set[str], layer_id: str, user: str
    ) -> None:
        while layer_id:
            if layer_id not in layers:
                self.fail(f"layer {layer_id[:12]} of {user} is missing")
                return
            needed.add(layer_id)
            layer_id = layers[layer_id].get("parent") or ""

    def _check_maps(self, image: Json, layers: t.Mapping[str, Json]) -> None:
        maps = [
            json.dumps([layers[item].get("uidmap"), layers[item].get("gidmap")])
            for item in image.get("mapped-layers") or ()
            if item in layers
        ]
        if len(maps) != len(set(maps)):
            self.fail(f"image {image['id'][:12]} has two layers with the same map: {maps}")

    def _check_disk(self) -> None:
        known = self.store.layer_ids()
        for folder in (
            self.store.layer_folder("x").parent,
            self.store.graphroot / f"{self.store.driver}-layers",
        ):
            for name in os.listdir(folder):
                layer_id = name.partition(".")[0]
                if len(layer_id) == 64 and layer_id not in known:
                    self.fail(f"{folder / name} belongs to no layer")
        for layer_id in sorted(known):
            if not self.store.layer_folder(layer_id).is_dir():
                self.fail(f"the data of layer {layer_id[:12]} is missing")
        links = self.store.graphroot / "overlay" / "l"
        for path in links.iterdir() if links.is_dir() else ():
            if not path.exists():
                self.fail(f"{path} is a dangling link")
        for kind in ("staging", "trash"):
            folder = self.store.graphroot / "userns-storage" / kind
            if folder.is_dir() and os.listdir(folder):
                self.fail(f"{folder} contains {os.listdir(folder)}")


def _copied_by_a_runtime(layer: Json) -> bool:
    """Whether a runtime, and not this collection, has created a mapped layer."""
    ours = (layer.get("flags") or {}).get(ORIGIN_FLAG) == ORIGIN
    return bool(layer.get("uidmap")) and not ours


class _Worker:
    """Executes random operations."""

    steps: t.ClassVar[t.Mapping[str, int]] = {}

    def __init__(self, race: Race, name: str) -> None:
        self.race, self.name = race, name
        self.random = random.Random(f"{race.seed} {race.store.kind} {name}")
        self.numbers = itertools.count(1)
        self.own: t.List[str] = []
        self.own_images: t.List[str] = []
        self.plain: t.Set[str] = set()

    def step(self) -> None:
        """Execute an operation."""
        (operation,) = self.random.choices(list(self.steps), list(self.steps.values()))
        step: t.Callable[[], bool] = getattr(self, operation)
        if step():
            self.race.count(f"{type(self).__name__.strip('_').lower()} {operation}")

    def new_name(self) -> str:
        """A unique name."""
        return f"{self.name}n{next(self.numbers)}"

    def maps(self) -> t.List[str]:
        """podman's options for a random mapping."""
        if self.race.store.user:
            return [self.random.choice(["--userns=keep-id", "--userns=nomap", "--userns=host"])]
        parts = self.random.choice([*((m,) for m in ROOTFUL_MAPS), SPLIT_MAP, ()])
        return [f"--{kind}map={part}" for kind in ("uid", "gid") for part in parts]

    def succeeded(self, done: Result) -> bool:
        """Whether a command succeeded; a failure is recorded."""
        if done.rc != 0:
            command = " ".join(done.argv)
            self.race.fail(f"{self.name}: {command}: {done.stdout}{done.stderr}".strip())
        return done.rc == 0


class _Podman(_Worker):
    steps = {
        "create": 6, "start": 4, "run": 3, "remove": 5, "commit": 2, "load": 1, "remove_image": 2,
        "listing": 2, "prune": 1,
    }  # fmt: skip

    def podman(self, *args: str) -> bool:
        return self.succeeded(self.race.store.podman(*args, check=False))

    def run_on(self, find: t.Callable[[], t.Optional[Json]], *args: str) -> bool:
        """Run a container; the message of a failure states whether its mapped layer is an empty copy.

        :param find: returns the mapped layer of the container
        """
        store = self.race.store
        done = store.podman(*args, check=False)
        if done.rc != 0:
            layer = find()
            if layer and _copied_by_a_runtime(layer) and not store.own_entries(layer["id"]):
                done = dataclasses.replace(done, stderr=f"{done.stderr} {EMPTY_COPY}")
        return self.succeeded(done)

    def podman_on_names(self, *args: str) -> bool:
        with self.race.naming:
            return self.podman(*args)

    def create(self) -> bool:
        name = self.new_name()
        image = self.random.choice([self.race.image.name, *self.own_images])
        command = ["sh", "-c", "stat -c %u /etc/passwd"]
        if self.podman("create", "--name", name, *self.maps(), "--user=0", image, *command):
            self.own.append(name)
            if image == self.race.image.name:
                self.plain.add(name)
            self.race.containers[name] = "podman"
            return True
        return False

    def start(self) -> bool:
        if not self.own:
            return False
        name = self.random.choice(self.own)

        def find() -> t.Optional[Json]:
            layers = {layer["id"]: layer for layer in self.race.store.layers()}
            own = self.race.store.container(name)
            return layers.get(layers[own["layer"]].get("parent") or "")

        return self.run_on(find, "start", "--attach", name)

    def run(self) -> bool:
        maps = self.maps()
        starts = self.host_ids(maps)

        def find() -> t.Optional[Json]:
            # The container no longer exists; its layer is found by its map.
            mapped = self.race.store.mapped_layers(self.race.image.name)
            for layer in self.race.store.layers():
                hosts = [part["host_id"] for part in layer.get("uidmap") or ()]
                if layer["id"] in mapped and hosts == starts:
                    return layer
            return None

        return self.run_on(
            find, "run", "--rm", *maps, "--user=0", self.race.image.name,
            "sh", "-c", "test $(stat -c %u /home/user) = 1000 && echo x > /new",
        )  # fmt: skip

    def host_ids(self, maps: t.Sequence[str]) -> t.List[int]:
        """The first host IDs of the parts of the UID map that belongs to options, in the form of layer records."""
        user = self.race.store.user
        if user is None:
            return [int(item.split(":")[1]) for item in maps if item.startswith("--uidmap=")]
        return {
            "--userns=keep-id": [1, 0, user.uid + 1],
            "--userns=nomap": [1],
            "--userns=host": [],
        }[maps[0]]

    def remove(self) -> bool:
        if not self.own:
            return False
        name = self.own.pop(self.random.randrange(len(self.own)))
        del self.race.containers[name]
        return self.podman("rm", "-f", name)

    def commit(self) -> bool:
        # The shared image has no history, and podman refuses a second commit on top of such an image.
        plain = [item for item in self.own if item in self.plain]
        if not plain:
            return False
        name = f"localhost/{self.new_name()}:1"
        return self._image(name, "commit", "-q", self.random.choice(plain), name)

    def load(self) -> bool:
        name = f"localhost/{self.new_name()}:1"
        target = f"containers-storage:{name}"
        with self.race.naming:
            done = self.race.store.skopeo("copy", "-q", self.race.image.source, target, check=False)
        if self.succeeded(done):
            self.own_images.append(name)
            self.race.images.add(name)
            return True
        return False

    def _image(self, name: str, *args: str) -> bool:
        if self.podman_on_names(*args):
            self.own_images.append(name)
            self.race.images.add(name)
            return True
        return False

    def remove_image(self) -> bool:
        # Images of containers must not be removed.
        used = {c.get("image") for c in self.race.store.containers()}
        ids = {n: i["id"] for i in self.race.store.images() for n in i.get("names") or ()}
        free = [own_image for own_image in self.own_images if ids.get(own_image) not in used]
        if not free:
            return False
        name = self.random.choice(free)
        self.own_images.remove(name)
        self.race.images.discard(name)
        return self.podman_on_names("rmi", name)

    def listing(self) -> bool:
        return self.podman("images", "-a") and self.podman("ps", "-a")

    def prune(self) -> bool:
        return self.podman_on_names("image", "prune", "-f")


class _Buildah(_Worker):
    steps = {"begin": 3, "config": 2, "commit": 2, "end": 3, "listing": 1}

    def buildah(self, *args: str) -> bool:
        return self.succeeded(self.race.store.buildah(*args, check=False))

    def begin(self) -> bool:
        name = self.new_name()
        maps = []
        if not self.race.store.user:
            part = self.random.choice(ROOTFUL_MAPS)
            maps = [f"--userns-uid-map={part}", f"--userns-gid-map={part}"]
        if self.buildah("from", "--name", name, *maps, self.race.image.name):
            self.own.append(name)
            self.race.containers[name] = "buildah"
            return True
        return False

    def config(self) -> bool:
        return bool(self.own) and self.buildah("config", "--env=A=1", self.random.choice(self.own))

    def commit(self) -> bool:
        if not self.own:
            return False
        name = f"localhost/{self.new_name()}:1"
        with self.race.naming:
            done = self.buildah("commit", "-q", self.random.choice(self.own), name)
        if done:
            self.own_images.append(name)
            self.race.images.add(name)
        return done

    def end(self) -> bool:
        if not self.own:
            return False
        name = self.own.pop(self.random.randrange(len(self.own)))
        del self.race.containers[name]
        return self.buildah("rm", name)

    def listing(self) -> bool:
        return self.buildah("images") and self.buildah("containers")


class _Ours(_Worker):
    steps = {"present": 6, "absent": 3, "collect": 3, "inform": 2}

    def module(self, name: str, args: Json, allowed: t.Sequence[str] = ()) -> bool:
        store = self.race.store
        result = run_module(
            self.race.lab, name, {**store.module_args(), **args}, fails=None, environ=store.env()
        )
        if not result.get("failed"):
            return True
        if not any(part in result["msg"] for part in allowed):
            self.race.fail(f"{self.name}: {name} {args}: {result['msg']}")
        return False

    def mapping_args(self) -> Json:
        if self.race.store.user:
            return {"userns": self.random.choice(["keep-id", "nomap"])}
        return {"uidmap": list(self.random.choice([*((m,) for m in ROOTFUL_MAPS), SPLIT_MAP]))}

    def present(self) -> bool:
        return self.module(
            "layer_template", {"images": [self.race.image.name], **self.mapping_args()}
        )

    def absent(self) -> bool:
        args = {"images": [self.race.image.name], "state": "absent", **self.mapping_args()}
        # The removal must fail if a container uses the layer.
        return self.module("layer_template", args, ["is in use by"])

    def collect(self) -> bool:
        copies = self.random.choice([0, 1])
        return self.module("layer_gc", {"min_age": "0", "max_copies_per_image": copies})

    def inform(self) -> bool:
        return self.module("image_layers_info", {})
