# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read the examples of the documentation, and run them one after the other as a reader would.

A block of YAML is a playbook, tasks, or the content of a file; a block for the console contains commands. A hidden
comment before a block may have the form ``.. example: WORDS`` or ``<!-- example: WORDS -->``:

``file NAME``
    It is saved under that name for later commands; in rst the caption contains the name.
``not run, REASON``
    Only its syntax is checked.
``fails``
    One of its tasks, or its last command, fails, as described in the text.
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import typing as t

import yaml
from ansible.parsing.splitter import parse_kv

from . import images, mounts, users
from .lab import COLLECTION, Lab
from .machines import Account, Result
from .registry import Registry
from .stores import Store

Json = t.Dict[str, t.Any]
# The users whose stores the examples use, besides root.
USERS = ("alice", "bob", "runner")
# The registries from which they pull.
REGISTRIES = ("docker.io", "registry.example.org")
IMAGES = (
    "registry.example.org/toolbox:latest",
    "registry.example.org/builder:latest",
    "registry.example.org/very/large:latest",
    "docker.io/library/postgres:17",
    "docker.io/library/redis:8",
    "docker.io/library/nginx:1.29",
    "localhost/app:1",
)
_LOCAL = "ansible_connection=local ansible_python_interpreter=/usr/bin/python3"
_INVENTORIES = {
    # Without packages, which are installed. mitogen calls sudo even for root. The driver is that of root's store here.
    "hosts.ini": f"ws1.example.org {_LOCAL} ansible_become_method=ansible.builtin.su prepare_install=false "
    "prepare_additional_store_driver=vfs\n",
    "elsewhere.ini": f"web.example.org {_LOCAL} ansible_become_method=ansible.builtin.su\n",
}
_ONLY = "-i hosts.ini -i elsewhere.ini --limit ws1.example.org"
# Files that examples read.
_UNIT = "[Container]\nImage=docker.io/library/nginx:1.29\nUserNS=auto:size=65536\n"
_ROLE = "argument_specs: {main: {options: {web_port: {type: int}}}}\n"
_FILES = {
    "web.container": _UNIT,
    "quadlets/web.container": _UNIT,
    "roles/web/meta/argument_specs.yml": _ROLE,
}
_SETTINGS = ("storage.conf", "containers.conf", "registries.conf")
_RUN = ("tasks", "playbook", "console")
_ROOTS = ("README.md", "awx/README.md", "docs/*.md", "docs/**/*.rst", "roles/*/README.md")
_PLUGINS = ("plugins/modules/*.py", "plugins/filter/*.py")
_LANGUAGES = ("yaml", "console")
# alice@ws1$ is the user of that name, root@ws1# is root on the host; $ or no prompt is the controller.
_PROMPT = re.compile(r"^(?:(?P<user>\w+)@\w+)?[$#] (?P<command>.*)$")
_KEYWORDS = {"name", "register", "vars", "loop", "when", "become", "become_user", "async", "poll"}


@dataclasses.dataclass(frozen=True)
class Block:
    """An example.

    :param document: the file that contains it, relative to the collection
    :param note: the text of the comment before it
    """

    document: str
    line: int
    language: str
    text: str
    note: str = ""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"

    @property
    def file(self) -> str:
        """The name under which the reader saves it; empty for none."""
        return self.note[5:] if self.note.startswith("file ") else ""

    @property
    def skipped(self) -> str:
        """Why it is not run; empty if it is run."""
        return self.note[9:] if self.note.startswith("not run, ") else ""

    @property
    def fails(self) -> bool:
        """Whether it is expected to end with an error."""
        return self.note == "fails"

    @property
    def data(self) -> t.Any:
        """The parsed YAML."""
        return yaml.safe_load(self.text)

    @property
    def kind(self) -> str:
        """The kind: console, text, playbook, tasks or data."""
        if self.language != "yaml":
            return self.language if self.language in _LANGUAGES else "text"
        data = self.data
        if isinstance(data, list) and all(isinstance(item, dict) for item in data):
            plays = [
                bool({"hosts", "ansible.builtin.import_playbook"} & set(item)) for item in data
            ]
            if all(plays):
                return "playbook"
            if not any(plays) and all(module_of(item) for item in data):
                return "tasks"
        return "data"

    def commands(self) -> t.List[t.Tuple[str, str]]:
        """The users ("" on the controller) and their commands. Lines without a prompt are output,
        or commands if no line has a prompt."""
        lines = self._lines()
        found = [match for match in map(_PROMPT.match, lines) if match]
        if not found:
            return [("", line) for line in lines if line and not line.startswith("#")]
        return [(match["user"] or "", match["command"]) for match in found]

    def answers(self, command: str) -> t.List[str]:
        """The lines that a command prints, as the example shows them."""
        lines = iter(self._lines())
        for line in lines:
            match = _PROMPT.match(line)
            if match and match["command"] == command:
                break
        return [
            line
            for line in itertools.takewhile(lambda line: not _PROMPT.match(line), lines)
            if line
        ]

    def _lines(self) -> t.List[str]:
        return self.text.replace("\\\n", " ").splitlines()


def module_of(task: t.Mapping[str, t.Any]) -> str:
    """The module that a task calls."""
    names = [key for key in task if key not in _KEYWORDS and "." in key]
    return names[0] if len(names) == 1 else ""


def blocks() -> t.List[Block]:
    """All examples of the documentation, and the EXAMPLES of the plugins."""
    found: t.List[Block] = []
    for pattern in (*_ROOTS, *_PLUGINS):
        for path in sorted(COLLECTION.glob(pattern)):
            text = path.read_text()
            name = str(path.relative_to(COLLECTION))
            read = {".md": _markdown, ".rst": _rst, ".py": _plugin}[path.suffix]
            found += read(name, text)
    return found


def _markdown(document: str, text: str) -> t.Iterator[Block]:
    note, fence, start = "", "", 0
    kept: t.List[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if fence and line.strip() == "```":
            yield Block(document, start, fence, textwrap.dedent("\n".join(kept)) + "\n", note)
            fence = note = ""
        elif fence:
            kept.append(line)
        elif line.startswith("```"):
            fence, start, kept = line[3:].strip() or "text", number, []
        elif line.startswith("<!-- example: "):
            note = line[len("<!-- example: ") :].partition(" -->")[0]
        elif line.strip():
            note = ""


def _rst(document: str, text: str) -> t.Iterator[Block]:
    lines = [*text.splitlines(), "end"]
    note, position = "", 0
    while position < len(lines):
        line = lines[position]
        match = re.match(r"( *)\.\. (?:code-block|example): ?:? ?(.*)$", line)
        position += 1
        if match is None:
            note = "" if line.strip() else note
        elif ".. example" in line:
            note = match[2]
        else:
            start, inner = position, []
            while position < len(lines) and (
                not lines[position].strip()
                or len(lines[position]) - len(lines[position].lstrip()) > len(match[1])
            ):
                inner.append(lines[position])
                position += 1
            inside = textwrap.dedent("\n".join(inner)).splitlines()
            while inside and (option := re.match(r":([a-z-]+): *(.*)", inside[0])):
                note = f"file {option[2]}" if option[1] == "caption" else note
                inside.pop(0)
            yield Block(document, start, match[2], "\n".join(inside).strip("\n") + "\n", note)
            note = ""


def _plugin(document: str, text: str) -> t.Iterator[Block]:
    match = re.search(r'^EXAMPLES = r"""\n(.*?)^"""', text, flags=re.MULTILINE | re.DOTALL)
    if match:
        yield Block(document, text[: match.start()].count("\n") + 2, "yaml", match[1])


class Reader(abc.ABC):
    """Runs the examples of documents in order.

    :ivar folder: the reader's folder on the controller
    """

    lab: Lab
    folder: pathlib.Path

    def run(self, document: t.Sequence[Block]) -> t.List[Block]:
        """Run the blocks of a document; returns the blocks that were run."""
        self._begin()
        for block in document:
            if block.skipped:
                continue
            if block.file:
                self._save(block)
            elif block.kind == "tasks":
                self._tasks(block)
            elif block.kind == "playbook":
                self._playbook(block)
            elif block.kind == "console":
                commands = block.commands()
                for number, (user, command) in enumerate(commands, 1):
                    self._type(block, user, command, block.fails and number == len(commands))
        self._end()
        return [block for block in document if not block.skipped and block.kind in _RUN]

    def _environ(self) -> t.Dict[str, str]:
        """The environment of Ansible's programs on the controller."""
        own = str(pathlib.Path(sys.executable).parent)
        return {
            "PATH": f"{own}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "ANSIBLE_COLLECTIONS_PATH": str(self.lab.tree),
            "ANSIBLE_NOCOLOR": "1",
        }

    @staticmethod
    def _failed(done: Result) -> bool:
        """Whether a command failed. Ansible does not fail if a play has no hosts."""
        return done.rc != 0 or "no hosts matched" in done.stdout

    @abc.abstractmethod
    def _begin(self) -> None:
        """Prepare for a document."""

    @abc.abstractmethod
    def _end(self) -> None:
        """Finish a document."""

    def _save(self, block: Block) -> None:
        """Save a block under its name."""
        path = self.folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)

    @abc.abstractmethod
    def _tasks(self, block: Block) -> None:
        """Run tasks."""

    @abc.abstractmethod
    def _playbook(self, block: Block) -> None:
        """Run a playbook without a name."""

    @abc.abstractmethod
    def _type(self, block: Block, user: str, command: str, fails: bool) -> None:
        """Run a command as a user of the host or, if the user is empty, on the controller."""


class ExampleHost(Reader):
    """The machine that the examples require: users with stores and images, files, an inventory.

    Everything is in the laboratory, including root's own store and the registries.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.image = images.build(lab.folder(), images.small_layers(), "localhost/small:1")
        self.image_id = images.image_id(images.small_layers())
        self.users: t.Dict[str, Account] = {}
        self.stores: t.Dict[str, Store] = {"root": Store(lab, "vfs")}
        lab.on_close(self.stores["root"].close)
        for name in USERS:
            user = users.add_user(lab, name=name)
            lab.on_close(functools.partial(users.remove_user, lab, user))
            self.users[name] = user
            self.stores[name] = Store(lab, "rootless-overlay", user=user)
            lab.on_close(self.stores[name].close)
        # Root's store is the default store of programs.
        etc = pathlib.Path("/etc/containers")
        etc.mkdir(exist_ok=True)
        self._before = {
            path: path.read_bytes() if path.exists() else None
            for path in (etc / name for name in _SETTINGS)
        }
        shutil.copy(self.stores["root"].storage_conf, etc / "storage.conf")
        shutil.copy(self.stores["root"].containers_conf, etc / "containers.conf")
        # As on a host on which root uses automatic namespaces.
        for file in ("/etc/subuid", "/etc/subgid"):
            with open(file, "a", encoding="utf-8") as ranges:
                ranges.write("containers:1000000000:1048576\n")
        registry = Registry(self.image, REGISTRIES)
        registry.configure(etc)
        lab.on_close(registry.close)
        # Not in the laboratory's /var, which is an overlay and does not support idmapped mounts.
        shared = pathlib.Path("/var/lib/userns-storage")
        shared.mkdir()
        mounts.mount("--bind", str(lab.folder()), str(shared))
        mounts.mount("-t", "tmpfs", "lab", "/srv")
        for folder in ("images", "www"):
            pathlib.Path("/srv", folder).mkdir()
        lab.machine.run(
            ["skopeo", "copy", "-q", self.image.source, "oci-archive:/srv/images/app-1.tar"]
        )
        self.folder = lab.folder()
        # The playbooks, and steps of a further playbook, for the next call of ansible-playbook.
        self.playbooks: t.List[str] = []
        self.steps: t.List[Json] = []

    def close(self) -> None:
        """Restore the settings of the laboratory's programs, which other tests use, too."""
        for path, content in self._before.items():
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.write_bytes(content)

    def _begin(self) -> None:
        """Restore the initial state: a new folder, no containers, all images and no others."""
        self.folder = self.lab.folder()
        self.playbooks, self.steps = [], []
        for store in self.stores.values():
            if store.containers():
                store.podman("rm", "--all", "--force")
            for image in store.images():
                if image["id"] != self.image_id:
                    store.podman("rmi", "--force", image["id"])
            names = {name for image in store.images() for name in image.get("names") or ()}
            missing = [name for name in IMAGES if name not in names]
            if missing:
                store.load(self.image, missing[0])
                store.podman("tag", missing[0], *missing[1:], missing[0])
        for name, text in {**_FILES, **_INVENTORIES}.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def _tasks(self, block: Block) -> None:
        self.steps += [{**task, "name": f"{block}: {task['name']}"} for task in block.data]

    def _playbook(self, block: Block) -> None:
        self._end_steps()
        self.playbooks.append(f"{len(self.playbooks)}.yml")
        (self.folder / self.playbooks[-1]).write_text(block.text)

    def _save(self, block: Block) -> None:
        # The inventory of the laboratory is used instead.
        if block.file not in _INVENTORIES:
            super()._save(block)

    def _type(self, block: Block, user: str, command: str, fails: bool) -> None:
        """Run a command, if possible in a playbook together with adjacent examples."""
        name = f"{block}: {command}"
        if user:
            # In a file, because Ansible would evaluate podman's templates.
            script = self.folder / f"{len(self.playbooks)}-{len(self.steps)}.sh"
            script.write_text(command)
            arguments = self.lab.machine.command(
                ["bash", "-e", str(script)],
                account=self.users.get(user),
                env=self.stores[user].env(),
            )
            self.steps.append({"name": name, "ansible.builtin.command": {"argv": arguments}})
            return
        arguments = shlex.split(command)
        if arguments[:3] == ["ansible-playbook", "-i", "hosts.ini"] and "-" not in {
            word[0] for word in arguments[3:]
        }:
            self._end_steps()
            self.playbooks += arguments[3:]
            return
        if arguments[0] != "ansible":
            self._end()
            self._ansible(command, str(block))
            return
        # A separate process for each command would take most of the time.
        known = argparse.ArgumentParser()
        known.add_argument("pattern", choices=["all"])
        for short, long in (("-i", "--inventory"), ("-m", "--module"), ("-a", "--args")):
            known.add_argument(short, long, default="")
        for switch in ("--become", "--check"):
            known.add_argument(switch, action="store_true")
        given = known.parse_args(arguments[1:])
        step: Json = {"name": name, given.module: parse_kv(given.args)}
        step["become"] = given.become
        if given.check:
            step["check_mode"] = True
        if fails:
            step.update(register="failing", failed_when="failing is not failed")
        self.steps.append(step)

    def _end_steps(self) -> None:
        if self.steps:
            play = {"name": "Steps", "hosts": "all", "gather_facts": False, "tasks": self.steps}
            self.playbooks.append(f"{len(self.playbooks)}.json")
            (self.folder / self.playbooks[-1]).write_text(json.dumps([play]))
            self.steps = []

    def _end(self) -> None:
        self._end_steps()
        if self.playbooks:
            names = " ".join(self.playbooks)
            self.playbooks = []
            self._ansible(f"ansible-playbook {_ONLY} {names}", names)

    def _ansible(self, command: str, where: str) -> None:
        environ = {
            **self._environ(),
            "ANSIBLE_DEPRECATION_WARNINGS": "false",
            # Examples gather facts themselves if they need them, which takes a second each time.
            "ANSIBLE_GATHERING": "explicit",
            # Modules start faster with mitogen.
            **_mitogen(),
        }
        done = self.lab.machine.run(
            ["bash", "-ec", command], env=environ, cwd=str(self.folder), check=False
        )
        if self._failed(done):
            raise AssertionError(f"{where}: {command}: rc {done.rc}\n{done.stdout}\n{done.stderr}")


def _mitogen() -> t.Dict[str, str]:
    spec = importlib.util.find_spec("ansible_mitogen")
    if spec is None or spec.origin is None:
        return {"ANSIBLE_PIPELINING": "true"}
    folder = pathlib.Path(spec.origin).parent / "plugins/strategy"
    return {"ANSIBLE_STRATEGY": "mitogen_linear", "ANSIBLE_STRATEGY_PLUGINS": str(folder)}


def check_syntax(
    found: t.Sequence[Block], folder: pathlib.Path, environ: t.Mapping[str, str]
) -> None:
    """Check the syntax of all playbooks and tasks, including those that are not run."""
    names = []
    for number, block in enumerate(found):
        if block.kind not in ("playbook", "tasks"):
            continue
        plays = block.data
        if block.kind == "tasks":
            plays = [{"hosts": "all", "gather_facts": False, "tasks": plays}]
        # A playbook may import another playbook of the reader.
        plays = [
            play for play in plays if "hosts" in play or "." not in play.get("import_playbook", ".")
        ]
        if plays:
            names.append(f"{number}.json")
            (folder / names[-1]).write_text(json.dumps(plays))
    command = [sys.executable, "-m", "ansible", "playbook", "--syntax-check", "-i", "localhost,"]
    done = subprocess.run(
        [*command, *names],
        cwd=folder,
        env={**os.environ, **environ, "ANSIBLE_HOME": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(done.stdout)
