# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stop a task at any point, and check the store, the runtimes and the next run of the task.

How the files of the fault injection work together, for a task on a store::

    test_interrupted_tasks.py, scripts/bench   select the stores, the tasks and the number of points
      |
    task_stops.stop_everywhere            creates a Scene for each task and selects points
      |
    task_stops.Scene.begin                saves the store and completes the task: counts the points, and records
      |                                   the expected outcome
      |     for each point and each kind of fault (KILL, KILL_CALLER, ERRORS):
    task_stops.Scene.stop                 runs the task on the restored store
      |
      +-- injection.ModuleServer.run      sends a request to the server process
      |     +-- injection._serve          forks a child for each run, with a seccomp filter
      |     +-- injection._Tracer         counts the relevant calls of the child and its descendants; at the
      |     |                             selected call, it kills them or makes the call fail with an error
      |     +-- the module                runs as on a managed host, unaware of the tracer
      |
      +-- Scene._check_stop               checks the resulting state: nothing in use was changed; after an error,
      |                                   the module has returned an error of this collection
      +-- Scene._check_runtime            tests each state once with each runtime (4.3, 5.4): podman works, and
      |                                   reports only problems that it can repair itself
      +-- Scene._check_next_run           runs the same task again: it has the recorded outcome

    power_loss_model.py replays recorded calls (Run.calls) on a model of a disk that loses unsynced data.
    fill_filesystem.py really fills a filesystem; slow_collection.py slows the modules down, so that tests can
    interrupt them.

Two states of a store are equal if they differ only in random names (layer IDs, short names, trash), times
of writing and tokens. Runtimes do not distinguish such states either, so each state is tested once with each
runtime, independent of the number of stops that lead to it.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import re
import stat
import time
import typing as t

from . import images
from .images import Image
from .injection import ERRORS, KILL, KILL_CALLER, ModuleServer, Run
from .lab import Lab
from .machines import Machine
from .store_copies import StoreCopies
from .stores import Store

OTHER_IMAGE = "localhost/other:1"
MAP, OTHER_MAP = "0:100000:65536", "0:300000:65536"
_IDS = re.compile(r"[0-9a-f]{64}")
_LINKS = re.compile(r"(?<![A-Z2-7])[A-Z2-7]{26}(?![A-Z2-7])")
_TRASH = re.compile(r"-[0-9a-f]{16}(?![0-9a-f])")

# podman system df mounts each layer: it creates or removes these paths, and becomes the owner of the root directory.
_PODMAN_PATHS = re.compile(r"overlay/[^/]*/(diff|empty|merged|work(/.*)?)")
# The observed uses of layers are not part of the outcome of a task; empty folders may be created.
_IGNORED = frozenset(
    f"userns-storage/{name}"
    for name in ("ledger.json", "staging", "trash", "reserve-0", "reserve-1", "reserve-2")
)
# Times are only compared inside trees.
_INSIDE_TREE = re.compile(r"(overlay/[^/]+/diff\d*|vfs/dir/[^/]+|btrfs/subvolumes/[^/]+)/")

# The messages of containers-storage about an empty subvolume that is the placeholder of a layer on btrfs.
_UNACCOUNTED = re.compile(
    r"check (layer \w+:( layer in lower level storage driver not accounted for)?|\d+ layer errors, .*)"
)

State = t.Mapping[str, t.Tuple[t.Any, ...]]


def tiny_image(lab: Lab, name: str = "localhost/tiny:1") -> Image:
    """An image of two layers with a dozen entries, at least one of each kind. None of its programs can be started."""
    base = {
        "bin": images.directory(),
        "bin/ping": images.file(b"p", 0o755, xattrs={"security.capability": images.capability(13)}),
        "bin/sh": images.symlink("su"),
        "bin/su": images.file(b"x", 0o4755),
        "etc": images.directory(),
        "etc/group": images.file("root:x:0:\n"),
        "etc/hostname": images.file(name),
        "etc/passwd": images.file("root:x:0:0::/:/bin/sh\n"),
        "home": images.directory(0o700, 1000, 1000),
        "home/a": images.file("a\n", 0o600, 1000, 1000),
        "home/b": images.link("home/a"),
        "run": images.directory(),
        "run/f": images.fifo(0o600, 1, 1),
    }
    top = {
        "etc/group": images.whiteout(),
        "home/new": images.file(b"\0" * 8192 + b"e", uid=1000, xattrs={"user.x": b"y"}),
    }
    return images.build(lab.folder(), [base, top], name)


class Scene:
    """A store with an image, a container that uses a mapped layer of it, and a task to stop.

    :ivar tried: the number of stops of each kind
    :ivar shown: the number of states that were tested with runtimes
    :ivar problems: messages of failed checks
    """

    def __init__(
        self, store: Store, image: Image, modules: ModuleServer, machines: t.Sequence[Machine]
    ) -> None:
        self.store, self.image, self.modules = store, image, modules
        self.machines = machines
        self.tried: t.Counter[str] = collections.Counter()
        self.shown = 0
        self.problems: t.List[str] = []
        self.copies = StoreCopies(store)
        self._known: t.FrozenSet[str] = frozenset()
        self._links: t.FrozenSet[str] = frozenset()
        self._checked: t.Set[t.Tuple[t.FrozenSet[t.Any], bool]] = set()
        self._messages: t.Dict[str, t.Set[str]] = {}
        maps = [f"--uidmap={OTHER_MAP}", f"--gidmap={OTHER_MAP}"]
        store.create(image.name, *(["--userns=nomap"] if store.user else maps), "--name=uses")

    # The task

    def do(self, module: str, args: t.Mapping[str, t.Any]) -> None:
        """Complete a task that changes the store."""
        self._set_task(module, args)
        done = self._run()
        assert done.result.get("changed"), done.output

    def begin(self, module: str, args: t.Mapping[str, t.Any]) -> int:
        """Set the task to stop, starting from the current state of the store; returns the number of its points."""
        self._set_task(module, args)
        self._known = frozenset(self.store.layer_ids() | {i["id"] for i in self.store.images()})
        links = self.store.graphroot / "overlay" / "l"
        self._links = frozenset(os.listdir(links)) if links.is_dir() else frozenset()
        self._checked.clear()
        self.copies.save("before")
        self.before = self.state()
        for machine in self.machines:
            self._messages[machine.name] = self._runtime_messages(machine)
            self.copies.restore("before")
        done = self._run()
        assert done.result.get("changed"), done.output
        self.after = self.state()
        repeated = self._run()
        assert repeated.result.get("changed") is False, repeated.output
        assert self._differences(self.after, self.state()) == []
        for machine in self.machines:
            # In an intermediate state, a runtime may also print its messages about the final state.
            self._messages[machine.name] |= self._runtime_messages(machine)
        self.copies.restore("before")
        return done.points

    def _set_task(self, module: str, args: t.Mapping[str, t.Any]) -> None:
        self.module = module
        self.args = {**self.store.module_args(), **args}
        if self.store.user:
            # A rootless store uses keep-id instead of a range of the host.
            self.args.pop("uidmap", None)
            self.args.update({"userns": "keep-id"} if module == "layer_template" else {})
        if module == "layer_template":
            # Otherwise each of several hundred runs would detect the version.
            version = ".".join(map(str, self.store.machine.version("podman")))
            self.args["runtime"] = f"podman {version}"
        self._removes = module == "layer_gc" or args.get("state") == "absent"
        self.below = str(self.store.graphroot)

    def _run(self, at: int = 0, fault: str = "") -> Run:
        return self.modules.run(self.module, self.args, below=self.below, at=at, fault=fault)

    def stop(self, fault: str, at: int) -> bool:
        """Stop the task at a point and check the result; returns False if it has fewer points."""
        run = self._run(at, fault)
        if run.at is None:
            self.copies.restore("before")
            return False
        self.tried[fault] += 1
        where = f"{self.store.kind} {self.module} {fault} at {at} {run.at}"
        try:
            self._check_stop(run, fault)
        except AssertionError as error:
            self.problems.append(f"{where}: {error}")
        self.copies.restore("before")
        return True

    def _check_stop(self, run: Run, fault: str) -> None:
        result_state = self.state()
        self._assert_nothing_else_changed(result_state)
        outside = frozenset(
            item for item in result_state.items() if not item[0].startswith("userns-storage")
        )
        if fault not in (KILL, KILL_CALLER):
            self._check_error(run, result_state)
        if fault == KILL_CALLER:
            # The process that waits for the killed process reports an error.
            assert "Traceback" not in run.output, run.output
        if (outside, True) not in self._checked:
            self.copies.save("left")
            for machine in self.machines:
                self._check_runtime(machine)
                self.copies.restore("left")
            self.shown += 1
            self._checked.add((outside, True))
        complete_state = frozenset(result_state.items())
        if (complete_state, False) not in self._checked:
            self._check_next_run()
            self._checked.add((complete_state, False))

    def _check_error(self, run: Run, result_state: State) -> None:
        """Check that an error leads to a clear message and the old state, or to the new state."""
        result = run.result
        assert result, run.output
        message = str(result.get("msg", "success"))
        assert "exception" not in result, run.output
        assert "Traceback" not in run.output, run.output
        assert "unexpected" not in message, message
        now, old, new = (
            {key: value for key, value in item.items() if not key.startswith("userns-storage")}
            for item in (result_state, self.before, self.after)
        )
        if result.get("failed") and (now == old or self._removes):
            # A removal may be incomplete; the next run completes it.
            return
        differences = self._differences(new, now)
        assert differences == [], (
            f"{message!r} leaves neither the old nor the new state: {differences}"
        )

    def _check_next_run(self) -> None:
        """Check that the next run reaches the expected state without leftovers, if no pull can still use the trash."""
        trash = self.store.graphroot / "userns-storage" / "trash"
        yesterday = time.time() - 90000
        for entry in trash.iterdir() if trash.is_dir() else ():
            os.utime(entry, (yesterday, yesterday))
        run = self._run()
        assert "changed" in run.result, run.output
        assert not run.result.get("failed"), run.output
        differences = self._differences(self.after, self.state())
        assert differences == [], f"the next run does not reach the expected state: {differences}"
        self._assert_nothing_else_changed(self.state())

    # Runtimes

    def _check_runtime(self, machine: Machine) -> None:
        placeholders = self._placeholders()
        new = self._runtime_messages(machine) - self._messages[machine.name]
        if placeholders:
            new = {line for line in new if not _UNACCOUNTED.fullmatch(line)}
        assert new == set(), f"{machine.name}: {sorted(new)}"
        state = self.state()
        self._assert_nothing_else_changed(state)
        incomplete = [
            layer["id"]
            for layer in self.store.layers()
            if (layer.get("flags") or {}).get("incomplete")
        ]
        assert incomplete == [], f"{machine.name} has left incomplete layers: {incomplete}"
        self._check_next_run()

    def _placeholders(self) -> t.List[str]:
        """Empty subvolumes that are placeholders of layers without a record."""
        if self.store.driver != "btrfs":
            return []
        layers = self.store.layer_ids()
        folder = self.store.layer_folder("x").parent
        return [
            name
            for name in os.listdir(folder)
            if name not in layers and not os.listdir(folder / name)
        ]

    def _runtime_messages(self, machine: Machine) -> t.Set[str]:
        """The messages of podman and containers-storage about the store, without IDs and times."""
        store, messages = self.store, set()
        local = machine is store.lab.machine
        commands: t.List[t.List[str]] = [
            ["podman", "images", "-a", "--no-trunc", "--format={{.ID}} {{.Repository}}"],
            ["podman", "ps", "-a", "--external", "--no-trunc", "--format={{.ID}} {{.Image}}"],
            ["podman", "system", "df", "-v"],
        ]
        if not local:
            commands.append(["containers-storage", "check"])
        for command in commands:
            done = machine.run(command, account=store.account, env=store.env(), check=False)
            assert done.rc == 0 or command[-1] == "check", f"{command}: {done.stdout}{done.stderr}"
            text = done.stderr if command[-1] == "-v" else done.stdout + done.stderr
            messages.add(f"{command[1]} {done.rc}")
            messages.update(
                f"{command[1]} {_IDS.sub(self._stable_id, line)}" for line in _lines(text)
            )
        return messages

    # The store

    def _stable_id(self, found: t.Match[str]) -> str:
        return found[0][:12] if found[0] in self._known else "NEW"

    def _normalised(self, text: str) -> str:
        text = _IDS.sub(self._stable_id, text)
        text = _LINKS.sub(lambda found: found[0] if found[0] in self._links else "LINK", text)
        return _TRASH.sub("-N", text)

    def state(self) -> State:
        """The files of the driver, the records and the files of this collection in the store, in comparable form."""
        driver, root = self.store.driver, self.store.graphroot
        found: t.Dict[str, t.Tuple[t.Any, ...]] = {}
        for kind in ("layers", "images", "containers"):
            for path in sorted((root / f"{driver}-{kind}").glob("*")):
                if path.suffix == ".json":
                    self._records(found, kind, path)
                elif path.suffix not in (".lock", ".json"):
                    found[self._normalised(f"{driver}-{kind}/{path.name}")] = ("data",)
        for folder in (driver, "userns-storage"):
            self._entries(found, str(root / folder), folder)
        return found

    def _entries(self, found: t.Dict[str, t.Tuple[t.Any, ...]], folder: str, shown: str) -> None:
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return
        for entry in entries:
            name = f"{shown}/{self._normalised(entry.name)}"
            if not _PODMAN_PATHS.fullmatch(name) and name not in _IGNORED:
                found[name] = self._entry(entry, shown)
            if entry.is_dir(follow_symlinks=False):
                self._entries(found, entry.path, name)

    def _records(
        self, found: t.Dict[str, t.Tuple[t.Any, ...]], kind: str, path: pathlib.Path
    ) -> None:
        for record in json.loads(path.read_text() or "[]") or []:
            if record["id"] not in self._known:
                record = {key: value for key, value in record.items() if key != "created"}
            text = self._normalised(json.dumps(record, sort_keys=True))
            found[f"{kind} {self._normalised(record['id'])}"] = (path.name, text)

    def _entry(self, entry: os.DirEntry[str], parent: str) -> t.Tuple[t.Any, ...]:
        info = entry.stat(follow_symlinks=False)
        kind = stat.S_IFMT(info.st_mode)
        shown: t.Tuple[t.Any, ...] = (oct(info.st_mode), info.st_uid, info.st_gid)
        if kind == stat.S_IFLNK:
            return (*shown, self._normalised(os.readlink(entry.path)))
        if kind == stat.S_IFREG:
            names = tuple(sorted(os.listxattr(entry.path, follow_symlinks=False)))
            shown = (*shown, info.st_size, info.st_nlink, names)
        return (*shown, info.st_mtime_ns) if _INSIDE_TREE.match(f"{parent}/") else shown

    @staticmethod
    def _differences(expected: State, found: State) -> t.List[str]:
        return [
            f"{key}: {expected.get(key)} became {found.get(key)}"
            for key in sorted({*expected, *found})
            if expected.get(key) != found.get(key)
        ]

    def _assert_nothing_else_changed(self, state: State) -> None:
        """Check that everything that the complete task does not change is unchanged."""
        for key, value in self.before.items():
            if key.startswith("userns-storage") or self.after.get(key) != value:
                continue
            assert state.get(key) == value, f"{key}: {value} became {state.get(key)}"


def _lines(text: str) -> t.Iterator[str]:
    """The lines of messages without times, and without those about incomplete layers that a runtime removes."""
    for line in text.splitlines():
        if "Found incomplete layer" not in line:
            yield re.sub(r"time=\"[^\"]*\"", "", line).strip()


# All faults of a call.
FAULTS = (KILL, KILL_CALLER, *ERRORS)
# The tasks to stop.
TASKS: t.Mapping[str, t.Tuple[str, t.Mapping[str, t.Any]]] = {
    "present": ("layer_template", {"images": ["localhost/tiny:1"], "uidmap": [MAP]}),
    "absent": (
        "layer_template",
        {"images": ["localhost/tiny:1"], "uidmap": [MAP], "state": "absent"},
    ),
    "gc": ("layer_gc", {"min_age": "0", "max_copies_per_image": 0}),
    "image": ("image_layers", {"images": [OTHER_IMAGE], "state": "absent"}),
    # The second name belongs to another image before. The source is that of the first name, whose image exists.
    "names": (
        "image_layers",
        {"images": ["localhost/tiny:1", OTHER_IMAGE], "source": "oci:/not/read:1"},
    ),
}


def spread(points: int, most: int) -> t.List[int]:
    """At most `most` of the points, including the first and the last."""
    if points <= most:
        return list(range(1, points + 1))
    return [1 + index * (points - 1) // (most - 1) for index in range(most)]


def stop_everywhere(
    lab: Lab,
    make_store: t.Callable[..., Store],
    kind: str,
    task: str,
    machines: t.Sequence[Machine],
    thorough: bool,
    most: int = 12,
) -> Scene:
    """Stop a task at its points.

    :param thorough: test each fault at each point. Otherwise the task is killed at selected points; the other faults
        are tested in turn, with vfs at all selected points and with other drivers at every third
    :param most: the number of selected points, from the first to the last
    """
    image = tiny_image(lab)
    store = make_store(kind, image)
    modules = ModuleServer(lab)
    try:
        scene = Scene(store, image, modules, machines)
        if task == "image":
            store.load(tiny_image(lab, OTHER_IMAGE))
            module, args = TASKS["present"]
            scene.do(module, {**args, "images": [OTHER_IMAGE]})
        elif task == "names":
            store.load(tiny_image(lab, OTHER_IMAGE))
        elif task != "present":
            scene.do(*TASKS["present"])
        points = scene.begin(*TASKS[task])
        # The number of points may differ a little from run to run.
        selected = range(1, points + 50) if thorough else spread(points, most)
        for number, at in enumerate(selected):
            faults: t.Tuple[str, ...] = (KILL, FAULTS[1 + number % (len(FAULTS) - 1)])
            if thorough:
                faults = FAULTS
            elif store.driver != "vfs" and number % 3:
                faults = (KILL,)
            stopped = [scene.stop(fault, at) for fault in faults]
            if not all(stopped):
                break
    finally:
        modules.close()
    stops = ", ".join(f"{number} {fault}" for fault, number in scene.tried.items())
    failed = f"{len(scene.problems)} failed checks" if scene.problems else "all checks passed"
    print(
        f"{kind} {task}: {points} points; {stops}; {failed}; {scene.shown} states tested with podman"
    )
    return scene
