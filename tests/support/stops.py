# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What must hold when a module of ours is stopped anywhere: the store looked at, podman asked, the work done again.

How the files of the fault injection work together, for one task on one store::

    test_stops.py, scripts/bench          which stores, which tasks, how many points
      |
    stops.stop_everywhere                 a Scene for each task; a list of points
      |
    stops.Scene.begin                     saves the store, runs the task to its end: counts the points, records
      |                                   the wanted outcome
      |     for each point and each kind of fault (KILL, KILL_ONE, ERRORS):
    stops.Scene.stop                      restores the store, then
      |
      +-- injection.Modules.run           asks the server process ...
      |     +-- injection._serve          ... which forks a child for each run, with a seccomp filter
      |     +-- injection._Tracer         counts the calls of interest of the child and its descendants, and at the
      |     |                             wanted one kills them, or has the call fail with an error
      |     +-- the module                runs as on a managed host, and knows nothing of this
      |
      +-- Scene._look                     the state that is left: nothing in use was touched; a module that had
      |                                   an error answered with one of ours
      +-- Scene._shown_to                 each state once to each runtime (4.3, 5.4): podman works, and finds nothing
      |                                   more than it can repair itself
      +-- Scene._again                    the same task again, to its end: the outcome recorded at first

    power.py replays recorded calls (Run.calls) on a model of a disk that loses what was not synced.
    full.py fills a filesystem for real; paces.py slows the modules down, to stop them half-way in time.

Two states of a store are the same when they differ in nothing but the names that are drawn anew each
time (layer IDs, short names, trash), times of writing and tokens. A runtime sees no difference between
them either, so each state is shown to it once, however many stops lead to it.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import re
import shutil
import stat
import subprocess
import time
import typing as t

from . import images, subvolumes
from .images import Image
from .injection import ERRORS, KILL, KILL_ONE, Modules, Run
from .lab import Lab
from .machines import Machine
from .stores import Store

OTHER_IMAGE = "localhost/other:1"
MAP, OTHER_MAP = "0:100000:65536", "0:300000:65536"
_IDS = re.compile(r"[0-9a-f]{64}")
_LINKS = re.compile(r"(?<![A-Z2-7])[A-Z2-7]{26}(?![A-Z2-7])")
_TRASH = re.compile(r"-[0-9a-f]{16}(?![0-9a-f])")

# podman system df mounts each layer: it makes or removes these, and gives the root to itself.
_OF_PODMAN = re.compile(r"overlay/[^/]*/(diff|empty|merged|work(/.*)?)")
# What a task finds out about uses is none of its outcome; its empty folders come and stay.
_OURS = frozenset(
    f"userns-storage/{name}"
    for name in ("ledger.json", "staging", "trash", "reserve-0", "reserve-1", "reserve-2")
)
# Inside of trees, times count.
_INNER = re.compile(r"(overlay/[^/]+/diff\d*|vfs/dir/[^/]+|btrfs/subvolumes/[^/]+)/")

# What containers-storage has to say of an empty subvolume that holds a layer's place on btrfs.
_UNACCOUNTED = re.compile(
    r"check (layer \w+:( layer in lower level storage driver not accounted for)?|\d+ layer errors, .*)"
)

State = t.Mapping[str, t.Tuple[t.Any, ...]]


def tiny_image(lab: Lab, name: str = "localhost/tiny:1") -> Image:
    """Two layers of a dozen entries, one of each kind. Nothing in it can be started."""
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
    """A store with one image, a container that uses a mapped layer of it, and one task to be stopped.

    :ivar tried: how many stops of each kind there were
    :ivar shown: how many states were shown to the runtimes
    :ivar problems: what did not hold, in words; should stay empty
    """

    def __init__(
        self, store: Store, image: Image, modules: Modules, machines: t.Sequence[Machine]
    ) -> None:
        self.store, self.image, self.modules = store, image, modules
        self.machines = machines
        self.tried: t.Counter[str] = collections.Counter()
        self.shown = 0
        self.problems: t.List[str] = []
        self._saved = store.base / ("disk/saved" if (store.base / "disk").is_dir() else "saved")
        self._known: t.FrozenSet[str] = frozenset()
        self._links: t.FrozenSet[str] = frozenset()
        self._good: t.Set[t.Tuple[t.FrozenSet[t.Any], bool]] = set()
        self._words: t.Dict[str, t.Set[str]] = {}
        maps = [f"--uidmap={OTHER_MAP}", f"--gidmap={OTHER_MAP}"]
        store.create(image.name, *(["--userns=nomap"] if store.user else maps), "--name=uses")

    # The task

    def do(self, module: str, args: t.Mapping[str, t.Any]) -> None:
        """Have a task done that changes the store."""
        self._take(module, args)
        done = self._run()
        assert done.result.get("changed"), done.output

    def begin(self, module: str, args: t.Mapping[str, t.Any]) -> int:
        """Take a task that is to be stopped, from the store as it is now on; the number of its points."""
        self._take(module, args)
        self._known = frozenset(self.store.layer_ids() | {i["id"] for i in self.store.images()})
        links = self.store.graphroot / "overlay" / "l"
        self._links = frozenset(os.listdir(links)) if links.is_dir() else frozenset()
        self._good.clear()
        self.save("before")
        self.before = self.state()
        for machine in self.machines:
            self._words[machine.name] = self._told(machine)
            self.restore("before")
        done = self._run()
        assert done.result.get("changed"), done.output
        self.after = self.state()
        again = self._run()
        assert again.result.get("changed") is False, again.output
        assert self._difference(self.after, self.state()) == []
        for machine in self.machines:
            # Half-way, a runtime may say what it would say in the end.
            self._words[machine.name] |= self._told(machine)
        self.restore("before")
        return done.points

    def _take(self, module: str, args: t.Mapping[str, t.Any]) -> None:
        self.module = module
        self.args = {**self.store.module_args(), **args}
        if self.store.user:
            # The namespace that podman gives its user by itself, in place of a range of the host's.
            self.args.pop("uidmap", None)
            self.args.update({"userns": "keep-id"} if module == "layer_template" else {})
        if module == "layer_template":
            # Not asked anew in each of some hundred runs.
            version = ".".join(map(str, self.store.machine.version("podman")))
            self.args["runtime"] = f"podman {version}"
        self.takes_away = module == "layer_gc" or args.get("state") == "absent"
        self.below = str(self.store.graphroot)

    def _run(self, at: int = 0, what: str = "") -> Run:
        return self.modules.run(self.module, self.args, below=self.below, at=at, what=what)

    def stop(self, what: str, at: int) -> bool:
        """Stop the task at one point and see what is left; False when it has fewer points."""
        run = self._run(at, what)
        if run.at is None:
            self.restore("before")
            return False
        self.tried[what] += 1
        where = f"{self.store.kind} {self.module} {what} at {at} {run.at}"
        try:
            self._look(run, what)
        except AssertionError as error:
            self.problems.append(f"{where}: {error}")
        self.restore("before")
        return True

    def _look(self, run: Run, what: str) -> None:
        left = self.state()
        self._nothing_in_use_was_touched(left)
        outside = frozenset(
            item for item in left.items() if not item[0].startswith("userns-storage")
        )
        if what not in (KILL, KILL_ONE):
            self._answer(run, left)
        if what == KILL_ONE:
            # The process that waits for the killed one lives and tells.
            assert "Traceback" not in run.output, run.output
        if (outside, True) not in self._good:
            self.save("left")
            for machine in self.machines:
                self._shown_to(machine)
                self.restore("left")
            self.shown += 1
            self._good.add((outside, True))
        whole = frozenset(left.items())
        if (whole, False) not in self._good:
            self._again()
            self._good.add((whole, False))

    def _answer(self, run: Run, left: State) -> None:
        """After an error: a clear message and the old state, or the new state."""
        result = run.result
        assert result, run.output
        message = str(result.get("msg", "success"))
        assert "exception" not in result, run.output
        assert "Traceback" not in run.output, run.output
        assert "unexpected" not in message, message
        now, old, new = (
            {key: value for key, value in item.items() if not key.startswith("userns-storage")}
            for item in (left, self.before, self.after)
        )
        if result.get("failed") and (now == old or self.takes_away):
            # What is to go may have been given up half-way; who comes next removes the rest.
            return
        wrong = self._difference(new, now)
        assert wrong == [], f"{message!r} leaves neither the old nor the new state: {wrong}"

    def _again(self) -> None:
        """The next run ends in the wanted state and leaves no rubbish, once no pull can rest on what was to go."""
        trash = self.store.graphroot / "userns-storage" / "trash"
        yesterday = time.time() - 90000
        for entry in trash.iterdir() if trash.is_dir() else ():
            os.utime(entry, (yesterday, yesterday))
        run = self._run()
        assert "changed" in run.result, run.output
        assert not run.result.get("failed"), run.output
        wrong = self._difference(self.after, self.state())
        assert wrong == [], f"the next run ends elsewhere: {wrong}"
        self._nothing_in_use_was_touched(self.state())

    # Runtimes

    def _shown_to(self, machine: Machine) -> None:
        held = self._held()
        new = self._told(machine) - self._words[machine.name]
        if held:
            new = {line for line in new if not _UNACCOUNTED.fullmatch(line)}
        assert new == set(), f"{machine.name}: {sorted(new)}"
        state = self.state()
        self._nothing_in_use_was_touched(state)
        half = [
            layer["id"]
            for layer in self.store.layers()
            if (layer.get("flags") or {}).get("incomplete")
        ]
        assert half == [], f"{machine.name} has left {half}"
        self._again()

    def _held(self) -> t.List[str]:
        """Empty subvolumes that hold the place of a layer without a record."""
        if self.store.driver != "btrfs":
            return []
        layers = self.store.layer_ids()
        folder = self.store.layer_folder("x").parent
        return [
            name
            for name in os.listdir(folder)
            if name not in layers and not os.listdir(folder / name)
        ]

    def _told(self, machine: Machine) -> t.Set[str]:
        """All that podman and containers-storage say about the store, IDs and times apart."""
        store, words = self.store, set()
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
            words.add(f"{command[1]} {done.rc}")
            words.update(f"{command[1]} {_IDS.sub(self._name, line)}" for line in _lines(text))
        return words

    # The store

    def _name(self, found: t.Match[str]) -> str:
        return found[0][:12] if found[0] in self._known else "NEW"

    def _plain(self, text: str) -> str:
        text = _IDS.sub(self._name, text)
        text = _LINKS.sub(lambda found: found[0] if found[0] in self._links else "LINK", text)
        return _TRASH.sub("-N", text)

    def state(self) -> State:
        """All that is of the driver, of the records and of ours in the store, in comparable form."""
        driver, root = self.store.driver, self.store.graphroot
        found: t.Dict[str, t.Tuple[t.Any, ...]] = {}
        for kind in ("layers", "images", "containers"):
            for path in sorted((root / f"{driver}-{kind}").glob("*")):
                if path.suffix == ".json":
                    self._records(found, kind, path)
                elif path.suffix not in (".lock", ".json"):
                    found[self._plain(f"{driver}-{kind}/{path.name}")] = ("data",)
        for folder in (driver, "userns-storage"):
            self._entries(found, str(root / folder), folder)
        return found

    def _entries(self, found: t.Dict[str, t.Tuple[t.Any, ...]], folder: str, shown: str) -> None:
        try:
            entries = list(os.scandir(folder))
        except FileNotFoundError:
            return
        for entry in entries:
            name = f"{shown}/{self._plain(entry.name)}"
            if not _OF_PODMAN.fullmatch(name) and name not in _OURS:
                found[name] = self._entry(entry, shown)
            if entry.is_dir(follow_symlinks=False):
                self._entries(found, entry.path, name)

    def _records(
        self, found: t.Dict[str, t.Tuple[t.Any, ...]], kind: str, path: pathlib.Path
    ) -> None:
        for record in json.loads(path.read_text() or "[]") or []:
            if record["id"] not in self._known:
                record = {key: value for key, value in record.items() if key != "created"}
            text = self._plain(json.dumps(record, sort_keys=True))
            found[f"{kind} {self._plain(record['id'])}"] = (path.name, text)

    def _entry(self, entry: os.DirEntry[str], parent: str) -> t.Tuple[t.Any, ...]:
        info = entry.stat(follow_symlinks=False)
        kind = stat.S_IFMT(info.st_mode)
        shown: t.Tuple[t.Any, ...] = (oct(info.st_mode), info.st_uid, info.st_gid)
        if kind == stat.S_IFLNK:
            return (*shown, self._plain(os.readlink(entry.path)))
        if kind == stat.S_IFREG:
            names = tuple(sorted(os.listxattr(entry.path, follow_symlinks=False)))
            shown = (*shown, info.st_size, info.st_nlink, names)
        return (*shown, info.st_mtime_ns) if _INNER.match(f"{parent}/") else shown

    @staticmethod
    def _difference(wanted: State, found: State) -> t.List[str]:
        return [
            f"{key}: {wanted.get(key)} became {found.get(key)}"
            for key in sorted({*wanted, *found})
            if wanted.get(key) != found.get(key)
        ]

    def _nothing_in_use_was_touched(self, state: State) -> None:
        """All that neither the task nor its opposite would change is as it was."""
        for key, value in self.before.items():
            if key.startswith("userns-storage") or self.after.get(key) != value:
                continue
            assert state.get(key) == value, f"{key}: {value} became {state.get(key)}"

    def save(self, name: str) -> None:
        """Keep a copy of the store."""
        target = self._saved / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        self._copy(self.store.graphroot, target)

    def restore(self, name: str) -> None:
        """Put a copy of the store in its place."""
        for entry in os.scandir(self.store.graphroot):
            self._remove(entry.path)
        self._copy(self._saved / name, self.store.graphroot)

    def _copy(self, source: pathlib.Path, target: pathlib.Path) -> None:
        if self.store.driver == "btrfs":
            subvolumes.copy(str(source), str(target))
            return
        subprocess.run(["cp", "-a", "--reflink=auto", f"{source}/.", str(target)], check=True)

    @staticmethod
    def _remove(path: str) -> None:
        if not os.path.isdir(path) or os.path.islink(path):
            os.unlink(path)
            return
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        with contextlib.suppress(OSError):
            # It may be a mount of podman's.
            os.rmdir(path)


def _lines(text: str) -> t.Iterator[str]:
    """What is said, save times, and that a runtime does away with what a kill has left."""
    for line in text.splitlines():
        if "Found incomplete layer" not in line:
            yield re.sub(r"time=\"[^\"]*\"", "", line).strip()


# All that a call can be made to do.
WAYS = (KILL, KILL_ONE, *ERRORS)
# The tasks that are stopped.
TASKS: t.Mapping[str, t.Tuple[str, t.Mapping[str, t.Any]]] = {
    "present": ("layer_template", {"images": ["localhost/tiny:1"], "uidmap": [MAP]}),
    "absent": (
        "layer_template",
        {"images": ["localhost/tiny:1"], "uidmap": [MAP], "state": "absent"},
    ),
    "gc": ("layer_gc", {"min_age": "0", "max_copies_per_image": 0}),
    "image": ("image_layers", {"images": [OTHER_IMAGE], "state": "absent"}),
    # The second name is another image's until then. The source has the first, which is there.
    "names": (
        "image_layers",
        {"images": ["localhost/tiny:1", OTHER_IMAGE], "source": "oci:/not/read:1"},
    ),
}


def spread(points: int, most: int) -> t.List[int]:
    """At most so many of the points, the first and the last among them."""
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

    :param thorough: at each point in each way; otherwise by killing it and, in turn, in one of the others, the latter
        at all chosen points with vfs and at each third with other drivers
    :param most: how many points to choose where it is not thorough, from the first to the last
    """
    image = tiny_image(lab)
    store = make_store(kind, image)
    modules = Modules(lab)
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
        chosen = range(1, points + 50) if thorough else spread(points, most)
        for number, at in enumerate(chosen):
            ways: t.Tuple[str, ...] = (KILL, WAYS[1 + number % (len(WAYS) - 1)])
            if thorough:
                ways = WAYS
            elif store.driver != "vfs" and number % 3:
                ways = (KILL,)
            stopped = [scene.stop(way, at) for way in ways]
            if not all(stopped):
                break
    finally:
        modules.close()
    told = ", ".join(f"{number} {what}" for what, number in scene.tried.items())
    failed = f"{len(scene.problems)} not survived" if scene.problems else "all survived"
    print(
        f"{kind} {task}: {points} points; {told}; {failed}; {scene.shown} states shown to podmans"
    )
    return scene
