# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The interop matrix: all forms of user namespace options, and the table of their outcomes.

The table is docs/interop-matrix.md. `parse` reads it and `render` writes it; each is the inverse of the other.
"""

from __future__ import annotations

import collections
import dataclasses
import pathlib
import re
import typing as t

# The environment variable with the path of the file to which the table is written.
OUTPUT_VARIABLE = "USERNS_STORAGE_MATRIX"
OWNER = "forms"
# A name with subordinate ranges, but without an account.
GHOST = "ghost"
USER = "5000:6000"

RELEASES = {
    "bookworm": "Debian 12",
    "trixie": "Debian 13",
    "sid": "Debian sid",
    "experimental": "Debian experimental",
}
ROOTFUL, ROOTLESS = "Rootful", "Rootless"
# By mode and column: the kind of store and the options of the driver.
COLUMNS: t.Dict[str, t.Dict[str, t.Tuple[str, t.Dict[str, str]]]] = {
    ROOTFUL: {
        "overlay": ("overlay", {}),
        "overlay, copies forced": ("overlay-forced", {}),
        "fuse-overlayfs": ("overlay", {"mount_program": "/usr/bin/fuse-overlayfs"}),
        "vfs": ("vfs", {}),
        "btrfs": ("btrfs", {}),
    },
    ROOTLESS: {
        "overlay": ("rootless-overlay", {}),
        "fuse-overlayfs": ("rootless-fuse", {}),
        "vfs": ("rootless-vfs", {}),
        "btrfs": ("rootless-btrfs", {}),
    },
}

# The outcomes in cells. Any other text is a failure.
LAYER, SHIFTS, NO_MAP = "layer", "shifts", "no map"
COPIES, REFUSED, BROKEN = "copies", "refused", "broken"
OUTCOMES = {
    LAYER: "the module predicted the map exactly and created its layer; the runtime used it and created no other",
    SHIFTS: "the module predicted the map exactly, and that no layer is needed; the runtime created none",
    NO_MAP: "the module predicted that there is no map; no layer was created",
    COPIES: "the module predicted the map exactly, and that the runtime copies the image for it; the runtime copied "
    "it. The module does not create copies for a mount program, and reports this",
    REFUSED: "the runtime refuses the options when a container is created; the module also refuses them",
    BROKEN: "the runtime creates a container that it then cannot start; the module refuses the options",
}


@dataclasses.dataclass(frozen=True)
class Form:
    """Options for a user namespace.

    :param uidmap: may contain "{uid}", the user's UID, and "{sub}", the user's first subordinate UID
    :param slots: the number of containers that are created one after the other
    :param user: whether the image has a USER
    :param start: whether the container is started to check the owners of files
    """

    userns: str = ""
    uidmap: t.Tuple[str, ...] = ()
    gidmap: t.Tuple[str, ...] = ()
    subuidname: str = ""
    subgidname: str = ""
    program: str = "podman"
    slots: int = 1
    user: bool = False
    start: bool = False

    def options(self) -> t.List[str]:
        """The options on the program's command line."""
        uid, gid = ("uidmap", "gidmap")
        if self.program == "buildah":
            uid, gid = ("userns-uid-map", "userns-gid-map")
        options = [f"--userns={self.userns}"] if self.userns else []
        options += [f"--{uid}={item}" for item in self.uidmap]
        options += [f"--{gid}={item}" for item in self.gidmap]
        options += [f"--subuidname={self.subuidname}"] if self.subuidname else []
        options += [f"--subgidname={self.subgidname}"] if self.subgidname else []
        return options

    def __str__(self) -> str:
        text = f"`{'' if self.program == 'podman' else 'buildah '}{' '.join(self.options())}`"
        if self.slots > 1:
            text += f", {self.slots} containers at once"
        return f"{text}, image with USER {USER}" if self.user else text

    @property
    def depends_on_containers(self) -> bool:
        """Whether its map depends on existing containers."""
        return self.userns.startswith("auto")


def _buildah(*forms: Form) -> t.Tuple[Form, ...]:
    return tuple(dataclasses.replace(form, program="buildah") for form in forms)


FORMS = {
    ROOTFUL: (
        Form(uidmap=("0:100000:2000",), start=True),
        Form(uidmap=("0:100000:2000",), gidmap=("0:200000:2000",)),
        Form(gidmap=("0:200000:2000",)),
        # Host order and container order, both different from the order on the command line.
        Form(uidmap=("1000:100000:1000", "0:200000:1000"), start=True),
        Form(uidmap=("500:100500:1500", "0:100000:500")),
        Form(uidmap=("0:100500:500", "500:100000:500")),
        Form(uidmap=("500:100000:500", "0:100500:500"), gidmap=("9:300000:9", "0:400000:9")),
        Form(uidmap=("9:300000:9", "0:400000:9"), gidmap=("500:100000:500", "0:100500:500")),
        Form(uidmap=("0:0:4294967295",)),
        Form(uidmap=("0:100000:10:10:200000:10",)),
        Form(uidmap=("0:100000:2000", "+1000:5000:1")),
        Form(uidmap=("0:100000:2000", "+1000:5000:10", "+u1005:7000")),
        Form(uidmap=("0:100000:2000", "+1500:100200:100")),
        Form(uidmap=("u0:100000:2000", "g0:200000:2000")),
        Form(uidmap=("u0:100000:2000",)),
        Form(uidmap=("0:100000",)),
        Form(uidmap=("+0:100000:2000",)),
        Form(uidmap=("0:@100000:2000",)),
        Form(subuidname=OWNER),
        Form(subgidname=OWNER),
        Form(subuidname=OWNER, uidmap=("100000:50000:10",)),
        Form(subuidname=GHOST),
        Form(subuidname="nobodyhasthis"),
        Form(userns="host"),
        Form(userns="keep-id"),
        Form(userns="keep-id:size=100"),
        Form(userns="keep-id:uid=5,gid=6"),
        Form(userns="nomap"),
        Form(userns="auto"),
        Form(userns="auto", slots=3),
        Form(userns="auto", user=True),
        Form(userns="auto:size=500"),
        Form(userns="auto:size=70000"),
        Form(userns="auto:uidmapping=0:5000:1"),
        Form(userns="auto:uidmapping=1000:5000:1,gidmapping=7:6000:2,gidmapping=3:8000:1"),
        Form(userns="auto:uidmapping=1000:@5000"),
        Form(userns="auto:size=9999999"),
        Form(userns="host", uidmap=("0:1:10",)),
        Form(userns="foo"),
        Form(uidmap=("0:1:x",)),
        Form(uidmap=("0:1:10", "5:100:10")),
        *_buildah(
            Form(uidmap=("1000:100000:1000", "0:200000:1000")),
            Form(uidmap=("500:100500:500", "0:100000:500"), gidmap=("0:300000:500",)),
            Form(uidmap=("0:300000:500",)),
            Form(gidmap=("0:300000:500",)),
            Form(userns="auto"),
            Form(userns="auto:size=700,uidmapping=5:6000:1"),
        ),
    ),
    ROOTLESS: (
        Form(userns="keep-id", start=True),
        Form(userns="keep-id:uid=0,gid=0"),
        Form(userns="keep-id:uid=200,gid=210"),
        Form(userns="keep-id:uid=70000"),
        # Larger than the UID of any user, which the map then surrounds without a gap.
        Form(userns="keep-id:size=65000"),
        Form(userns="keep-id:size=1000"),
        Form(userns="nomap"),
        Form(userns="auto"),
        Form(userns="auto", slots=3),
        Form(userns="auto", user=True),
        Form(userns="auto:size=500"),
        Form(userns="auto:uidmapping=0:0:1"),
        Form(userns="host"),
        Form(uidmap=("0:1:1000",)),
        Form(uidmap=("0:1:1000", "1000:0:1")),
        Form(uidmap=("1000:0:1", "0:1:1000")),
        Form(uidmap=("0:1:1000", "1000:2001:1000"), gidmap=("0:5001:1000",)),
        Form(uidmap=("0:1:1000", "1000:2001:1000"), start=True),
        Form(uidmap=("+1000:0:1",)),
        Form(uidmap=("+1000:@{uid}:1",)),
        Form(uidmap=("u+1000:@{uid}", "u+5:7:2")),
        Form(uidmap=("0:@{sub}:300",)),
        Form(uidmap=("u0:0:1",)),
        Form(gidmap=("g0:0:1",)),
        Form(uidmap=("0:1:10", "+20:100:5")),
        Form(uidmap=("0:0:70000",)),
        Form(uidmap=("0:@4000000000:1",)),
        *_buildah(
            Form(uidmap=("0:1:1000",)),
            Form(uidmap=("1000:0:1", "0:1:1000")),
            Form(userns="keep-id"),
        ),
    ),
}


def selected(release: str, mode: str, column: str) -> t.Tuple[Form, ...]:
    """Every second form, so that each form is tested in each column and in each release, but not in each combination.

    All forms are tested when the table is regenerated.
    """
    shift = list(RELEASES).index(release) + list(COLUMNS[mode]).index(column)
    return FORMS[mode][shift % 2 :: 2]


# The table

# The outcome by release, mode, column and form.
Cells = t.Dict[t.Tuple[str, str, str, str], str]

_HEAD = """\
<!--
Copyright (c) 2026, the userns.storage contributors
GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
SPDX-License-Identifier: GPL-3.0-or-later
-->

# Interop matrix

The predictions of `layer_template`, compared with real runtimes. `tests/interop/test_matrix.py` writes this page, and
fails if its results differ from it. For each combination of options for a user namespace, and on each kind of store,
`layer_template` prepares the image for the version of the runtime. Then the real runtime creates a container, and the
test reads the records of the store.

| cell | meaning |
| --- | --- |
"""
_COMMAND = f"{OUTPUT_VARIABLE}=$PWD/docs/interop-matrix.md scripts/test interop"
_TAIL = f"""\
To generate this page again, run `{_COMMAND}`.

Without this variable, `scripts/test interop` tests every second cell: each form in each column and in each release.
"""
HOW_TO_WRITE = f"If the new results are right, generate the table again: {_COMMAND}"


@dataclasses.dataclass
class Matrix:
    """The table: versions of the programs by release, and all cells."""

    versions: t.Dict[str, str] = dataclasses.field(default_factory=dict)
    cells: Cells = dataclasses.field(default_factory=dict)


def outcomes(cell: str) -> t.List[str]:
    """The outcomes in a cell, which differ if several containers have different outcomes."""
    return cell.split(" and ")


def render(matrix: Matrix) -> str:
    """The table as Markdown."""
    counts = collections.Counter(word for cell in matrix.cells.values() for word in outcomes(cell))
    lines = [f"| {word} | {text} |" for word, text in OUTCOMES.items()]
    totals = ", ".join(f"{counts[word]} {word}" for word in OUTCOMES)
    lines += [
        "",
        "If several containers run at the same time, a cell can contain a different result for each of them.",
    ]
    lines += ["", f"{len(matrix.cells)} cells: {totals}.", ""]
    for release, name in RELEASES.items():
        if release not in matrix.versions:
            continue
        lines += [f"## {name}: {matrix.versions[release]}", ""]
        for mode, columns in COLUMNS.items():
            lines += [f"### {mode}, {name}", ""]
            lines.append("| " + " | ".join([matrix.versions[release], *columns]) + " |")
            lines.append("| --- " * (len(columns) + 1) + "|")
            for form in map(str, FORMS[mode]):
                row = [matrix.cells.get((release, mode, column, form), "") for column in columns]
                lines.append("| " + " | ".join([form, *row]) + " |")
            lines.append("")
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


def parse(text: str) -> Matrix:
    """The cells of a table that `render` has written."""
    matrix = Matrix()
    release = mode = ""
    columns: t.List[str] = []
    for line in text.splitlines():
        heading = re.match(r"(##+) (.*)", line)
        if heading and heading[1] == "##":
            name, _colon, versions = heading[2].partition(": ")
            release = next(key for key, known in RELEASES.items() if known == name)
            matrix.versions[release] = versions
        elif heading:
            mode, columns = heading[2].partition(",")[0], []
        elif mode and line.startswith("| ") and not line.startswith("| ---"):
            # No form contains a vertical bar, and no cell is empty.
            first, *rest = line.strip("| ").split(" | ")
            if not columns:
                columns = rest
                continue
            for column, word in zip(columns, rest):
                matrix.cells[release, mode, column, first] = word
    return matrix


def merge(path: pathlib.Path, found: Matrix) -> None:
    """Update the table at `path`; cells of forms that no longer exist are removed."""
    matrix = parse(path.read_text()) if path.exists() else Matrix()
    matrix.versions.update(found.versions)
    matrix.cells.update(found.cells)
    known = {
        (release, mode, column, str(form))
        for release in RELEASES
        for mode, columns in COLUMNS.items()
        for column in columns
        for form in FORMS[mode]
    }
    matrix.cells = {key: word for key, word in matrix.cells.items() if key in known}
    path.write_text(render(matrix))
