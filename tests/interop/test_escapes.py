# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test that systemd and podman read escaped texts in units and in storage.conf as the original texts."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import typing as t

import jinja2
import pytest
from ansible_collections.userns.storage.plugins.filter.systemd_command import systemd_command
from ansible_collections.userns.storage.plugins.filter.systemd_value import systemd_value
from ansible_collections.userns.storage.plugins.module_utils._storage.store import toml
from ansible_collections.userns.storage.plugins.plugin_utils import _escapes
from support.lab import Lab

TEXTS = (
    *("plain", "a b", " a ", "%h %n %%", "$HOME ${HOME} $$", "a\\", "\\x41", '"', "'", 'a"b\'c\\"d', "a;b", ";"),
    *("-x", "#x", "[Service]", "\t", "\x1b[2J", "\x9b31m", "\u202ex", "\u2028", "\u200b", "größe 日本", "😀"),
    *("`id`", "$(id)", "*", "~", "&", "|", "<", "\\;", "{{ x }}", "=", "a=b", "\x7f", "\\\\", "%", "$", "\x0b\x0c"),
)  # fmt: skip
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v", "s": " "}


def texts() -> t.List[str]:
    """TEXTS, and random texts of characters that are special in units."""
    generator = random.Random(11)
    alphabet = "ab%$\\\"' ;#=[]{}\t\x1b\x9b\u202e\u2028ü😀-/nx0{}"
    generated = [
        "".join(generator.choices(alphabet, k=generator.randint(1, 12))) for _number in range(300)
    ]
    return [*TEXTS, *generated]


def loaded(lab: Lab, units: t.Mapping[str, str]) -> str:
    """The output of systemd-analyze, in which systemd dumps these units as it loaded them."""
    folder = lab.folder()
    for name, text in units.items():
        (folder / name).write_text(text)
    environment = {**os.environ, "SYSTEMD_LOG_LEVEL": "debug", "SYSTEMD_UNIT_PATH": f"{folder}:"}
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(folder / name) for name in units)],
        env=environment,
        capture_output=True,
        check=False,
    )
    return (result.stdout + result.stderr).decode()


def command_lines(dump: str) -> t.Dict[str, t.List[str]]:
    """The arguments of each service's command: specifiers are expanded, variables are not."""
    found = {}
    for block in re.split(r"^\t*-> Unit ", dump, flags=re.MULTILINE)[1:]:
        line = re.search(r"Command Line: (.*)", block)
        if line:
            found[block.partition(":")[0]] = _arguments(line[1])
    return found


def _arguments(line: str) -> t.List[str]:
    """Split a command line that systemd quoted for a shell, with escape sequences of C for control characters."""
    arguments = re.findall(r'"(?:[^"\\]|\\.)*"|[^ ]+', line)
    return [_unquote(argument) for argument in arguments]


def _unquote(argument: str) -> str:
    inner = argument[1:-1] if argument.startswith('"') else argument
    raw = re.sub(
        rb"\\(?:x([0-9a-f]{2})|([0-3][0-7]{2})|(.))",
        lambda match: (
            bytes([int(match[1], 16)])
            if match[1]
            else bytes([int(match[2], 8)])
            if match[2]
            else _ESCAPES.get(match[3].decode("latin-1"), match[3].decode("latin-1")).encode(
                "latin-1"
            )
        ),
        inner.encode(),
    )
    return raw.decode()


def test_systemd_reads_original_commands(lab: Lab) -> None:
    texts_by_unit = {f"t{number}.service": text for number, text in enumerate(texts())}
    units = {
        name: f"[Service]\nType=oneshot\nExecStart={systemd_command(['/usr/bin/printf', text, 'end'])}\n"
        for name, text in texts_by_unit.items()
    }
    found = command_lines(loaded(lab, units))
    for name, text in texts_by_unit.items():
        program, argument, end = found[name]
        assert (program, end) == ("/usr/bin/printf", "end")
        # When the command runs, $$ becomes a dollar sign. A single $ would start a variable.
        assert "$" not in argument.replace("$$", ""), argument
        assert argument.replace("$$", "$") == text, units[name]


def test_different_texts_give_different_command_lines(lab: Lab) -> None:
    """Escaping is unique for each text, which the dump of systemd does not show."""
    lines = {systemd_command(["/usr/bin/printf", text]) for text in texts()}
    assert len(lines) == len(set(texts()))


def test_systemd_reads_original_paths(lab: Lab) -> None:
    paths = [f"/srv/{text.replace('/', '')}/images.json" for text in texts()]
    paths = [path for path in paths if path == os.path.normpath(path)]
    units = {}
    for number, path in enumerate(paths):
        units[f"p{number}.path"] = f"[Path]\nPathChanged={systemd_value(path)}\n"
        units[f"p{number}.service"] = "[Service]\nType=oneshot\nExecStart=/bin/true\n"
    dump = loaded(lab, units)
    found = {
        block.partition(":")[0]: re.search(r"PathChanged: (.*)", block)
        for block in re.split(r"^\t*-> Unit ", dump, flags=re.MULTILINE)[1:]
    }
    for number, path in enumerate(paths):
        match = found[f"p{number}.path"]
        assert match is not None, path
        assert match[1] == path


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\\\n", "\0"])
def test_path_cannot_add_directive(lab: Lab, end: str) -> None:
    """The template of the role is rendered with a graph root that another user has chosen."""
    path = f"/srv/x{end}[Service]{end}ExecStart=/bin/false{end}[Path]{end}PathChanged=/x"
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["userns.storage.systemd_value"] = _escapes.systemd_value
    environment.filters["comment"] = lambda text: f"# {text}"
    environment.filters["bool"] = bool
    template = lab.tree / "ansible_collections/userns/storage/roles/service/templates/ready.path.j2"
    variables = {"ansible_managed": "x", "service_store": "alice", "service_of_root": False}
    render = environment.from_string(template.read_text()).render
    rendered = render(service_images="/srv/a%h/images.json", service_uid=1000, **variables)
    assert "PathChanged=/srv/a%%h/images.json\n" in rendered
    with pytest.raises(ValueError, match="line break"):
        render(service_images=path, service_uid=1000, **variables)
    # Without the filter the path would add a directive: for systemd each of these ends a line.
    if end != "\\\n":
        raw = f"[Path]\nPathChanged={path}\n"
        assert "PathChanged: /x\n" in loaded(
            lab, {"q.path": raw, "q.service": "[Service]\nExecStart=/x\n"}
        )


def test_podman_reads_original_paths_in_storage_conf(lab: Lab) -> None:
    for text in (
        "a b",
        'q"uote',
        "back\\slash",
        "größe 😀",
        "\x1b[2J",
        "\u202e",
        "#x",
        "line\nend",
        "\x7f",
    ):
        folder = lab.folder()
        graphroot = folder / text
        conf = folder / "storage.conf"
        conf.write_text(
            f'[storage]\ndriver = "vfs"\ngraphroot = {toml.quoted(str(graphroot))}\nrunroot = "{folder}/run"\n'
        )
        result = lab.machine.run(
            ["podman", "info", "--format", "{{json .Store.GraphRoot}}"],
            env={"CONTAINERS_STORAGE_CONF": str(conf)},
        )
        assert json.loads(result.stdout) == str(graphroot)
