# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare the discovery of stores with `podman info` and `buildah info` of four releases."""

from __future__ import annotations

import json
import pathlib
import typing as t

import pytest
from support import discovery
from support.hosts import Host
from support.images import Image
from support.lab import Lab
from support.modules import run_module
from support.users import User

MACHINES = ("local", "trixie", "sid", "experimental")
# The machines whose podman reads drop-ins.
MERGING = ("sid", "experimental")
TABLE = json.loads((pathlib.Path(__file__).parents[1] / "data/storage-conf.json").read_text())

Json = t.Dict[str, t.Any]

ETC = "/etc/containers/storage.conf"
USR = "/usr/share/containers/storage.conf"
OWN = "HOME/.config/containers/storage.conf"


def row(
    case: str,
    rootless: bool,
    files: t.Dict[str, str],
    modes: t.Optional[t.Dict[str, int]] = None,
    **environment: str,
) -> Json:
    """A row of the table, with the modes of some files."""
    return {
        "case": case,
        "rootless": rootless,
        "files": files,
        "modes": modes or {},
        "environment": environment,
    }


def conf(more: str = "", **keys: str) -> str:
    """The content of a storage.conf."""
    lines = [f'{key} = "{value}"' for key, value in keys.items()]
    return "\n".join(["[storage]", *lines, more]) + "\n"


OVERLAY = '[storage.options.overlay]\nmountopt = "{}"\n'

ROOTFUL = [
    row("vendor's file", False, {USR: conf(driver="vfs", graphroot="BASE/v")}),
    row("etc hides vendor's", False, {USR: conf(driver="vfs"), ETC: conf(graphroot="BASE/e")}),
    row(
        "same name: etc hides usr",
        False,
        {
            f"{USR}.d/10.conf": conf(graphroot="BASE/usr", runroot="BASE/r"),
            f"{ETC}.d/10.conf": conf(graphroot="BASE/etc"),
        },
    ),
    row(
        "names sort across folders",
        False,
        {
            f"{USR}.d/20.conf": conf(graphroot="BASE/usr20"),
            f"{ETC}.d/10.conf": conf(graphroot="BASE/etc10", driver="vfs"),
        },
    ),
    row(
        "rootful folder against the common one, same name",
        False,
        {
            f"{ETC}.d/10.conf": conf(graphroot="BASE/common"),
            "/etc/containers/storage.rootful.conf.d/10.conf": conf(graphroot="BASE/rootful"),
        },
    ),
    row(
        "usr rootful against etc common, same name",
        False,
        {
            "/usr/share/containers/storage.rootful.conf.d/10.conf": conf(graphroot="BASE/usr"),
            f"{ETC}.d/10.conf": conf(graphroot="BASE/etc"),
        },
    ),
    row(
        "rootless folders are not for root",
        False,
        {
            "/etc/containers/storage.rootless.conf.d/10.conf": conf(graphroot="BASE/no"),
            "/etc/containers/storage.rootless.conf.d/0/10.conf": conf(graphroot="BASE/no0"),
        },
    ),
    row(
        "root's own drop-in above etc",
        False,
        {
            f"{ETC}.d/10.conf": conf(graphroot="BASE/etc", driver="vfs"),
            "/root/.config/containers/storage.conf.d/10.conf": conf(graphroot="BASE/own"),
        },
    ),
    row("not .conf", False, {f"{ETC}.d/10.conf.bak": conf(graphroot="BASE/no")}),
    row(
        "a link as drop-in",
        False,
        {"BASE/real": conf(graphroot="BASE/linked"), f"{ETC}.d/10.conf": "-> BASE/real"},
    ),
    row(
        "a dangling link hides the vendor's file",
        False,
        {f"{USR}.d/10.conf": conf(graphroot="BASE/usr"), f"{ETC}.d/10.conf": "-> /dev/null"},
    ),
    row(
        "metacopy on in the main file, off in a drop-in",
        False,
        {
            ETC: conf(OVERLAY.format("nodev,metacopy=on"), driver="overlay", graphroot="BASE/m"),
            f"{ETC}.d/99.conf": OVERLAY.format("nodev,metacopy=off"),
        },
    ),
    row(
        "a key is set back to nothing",
        False,
        {
            ETC: conf(graphroot="BASE/e", driver="vfs"),
            f"{ETC}.d/99.conf": conf(graphroot="", driver=""),
        },
    ),
    row(
        "lists are replaced",
        False,
        {
            "BASE/s1/x": "",
            "BASE/s2/x": "",
            ETC: conf('[storage.options]\nadditionalimagestores = ["BASE/s1"]', driver="overlay"),
            f"{ETC}.d/1.conf": '[storage.options]\nadditionalimagestores = ["BASE/s2"]\n',
        },
    ),
    row(
        "common options for the driver",
        False,
        {ETC: conf('[storage.options]\nskip_mount_home = "true"\n', driver="overlay")},
    ),
    row(
        "common and own option of one name",
        False,
        {
            ETC: conf(
                '[storage.options]\nmountopt = "nodev"\n' + OVERLAY.format("nosuid"),
                driver="overlay",
                graphroot="BASE/c",
            )
        },
    ),
    row(
        "two drivers' tables",
        False,
        {
            ETC: conf(
                OVERLAY.format("nodev") + '[storage.options.vfs]\nignore_chown_errors = "true"\n',
                driver="vfs",
                graphroot="BASE/t",
            )
        },
    ),
    row("STORAGE_DRIVER", False, {ETC: conf(driver="overlay")}, STORAGE_DRIVER="vfs"),
    row(
        "STORAGE_OPTS",
        False,
        {ETC: conf(OVERLAY.format("nodev"), driver="overlay")},
        STORAGE_OPTS="overlay.mountopt=nosuid",
    ),
    row(
        "named file and override",
        False,
        {"BASE/a.conf": conf(graphroot="BASE/a"), "BASE/b.conf": conf(driver="vfs")},
        CONTAINERS_STORAGE_CONF="BASE/a.conf",
        CONTAINERS_STORAGE_CONF_OVERRIDE="BASE/b.conf",
    ),
    row("named file is missing", False, {}, CONTAINERS_STORAGE_CONF="BASE/none.conf"),
    row("override is missing", False, {}, CONTAINERS_STORAGE_CONF_OVERRIDE="BASE/none.conf"),
    row("not TOML", False, {ETC: "[storage\n"}),
    row("drop-in that is not TOML", False, {f"{ETC}.d/1.conf": "[storage\n"}),
    row("wrong type", False, {ETC: "[storage]\ngraphroot = 1\n"}),
    row("keys in other case", False, {ETC: '[Storage]\nGraphRoot = "BASE/case"\n'}),
    row("transient", False, {ETC: "[storage]\ntransient_store = true\n"}),
    row("overlay2", False, {ETC: conf(driver="overlay2", graphroot="BASE/o2")}),
    row("rootless_storage_path is not for root", False, {ETC: conf(rootless_storage_path="BASE/r")}),
    row("variables", False, {ETC: conf(graphroot="BASE/$UID/$USER", runroot="BASE/${USER}r")}),
    row("empty XDG_CONFIG_HOME", False, {ETC: conf(driver="vfs")}, XDG_CONFIG_HOME=""),
    row("XDG_CONFIG_HOME", False, {"BASE/x/containers/storage.conf": conf(graphroot="BASE/xdg")},
        XDG_CONFIG_HOME="BASE/x"),
    row("priority", False, {ETC: "[storage]\ndriver_priority = ['overlay', 'vfs']\n"}),
    row(
        "an existing vfs store",
        False,
        {"/var/lib/containers/storage/vfs-images/x": "", "/var/lib/containers/storage/vfs/x": ""},
    ),
]  # fmt: skip

ROOTLESS = [
    row("nothing", True, {}),
    row("only driver in etc", True, {ETC: conf(driver="vfs")}),
    row("options in etc", True, {ETC: conf(OVERLAY.format("nodev"), driver="overlay")}),
    row("$HOME and $USER in etc", True, {ETC: conf(graphroot="$HOME/s/$USER", runroot="BASE/r")}),
    row("vendor's graphroot", True, {USR: conf(graphroot="BASE/v$UID")}),
    row(
        "graphroot against rootless_storage_path",
        True,
        {ETC: conf(graphroot="BASE/g", rootless_storage_path="BASE/r")},
    ),
    row(
        "rootless_storage_path in a drop-in, graphroot in the main file",
        True,
        {
            ETC: conf(graphroot="BASE/g"),
            "/etc/containers/storage.rootless.conf.d/1.conf": conf(rootless_storage_path="BASE/r"),
        },
    ),
    row(
        "all three rootless folders, same name",
        True,
        {
            f"{ETC}.d/1.conf": conf(graphroot="BASE/common"),
            "/etc/containers/storage.rootless.conf.d/1.conf": conf(graphroot="BASE/rootless"),
            "/etc/containers/storage.rootless.conf.d/UID/1.conf": conf(graphroot="BASE/uid"),
        },
    ),
    row(
        "the user's drop-in is last among equals",
        True,
        {
            "/etc/containers/storage.rootless.conf.d/UID/1.conf": conf(graphroot="BASE/uid"),
            f"{OWN}.d/1.conf": conf(graphroot="BASE/own"),
        },
    ),
    row(
        "a later name in etc counts above the user's drop-in",
        True,
        {f"{ETC}.d/9.conf": conf(graphroot="BASE/etc"), f"{OWN}.d/1.conf": conf(graphroot="BASE/o")},
    ),
    row(
        "rootful folder is not for users",
        True,
        {"/etc/containers/storage.rootful.conf.d/1.conf": conf(graphroot="/no", runroot="/no")},
    ),
    row("another user's folder", True,
        {"/etc/containers/storage.rootless.conf.d/99/1.conf": conf(graphroot="BASE/no")}),
    row("own file alone", True, {OWN: conf(driver="vfs", graphroot="$HOME/own", runroot="BASE/r")}),
    row("own rootless_storage_path", True, {OWN: conf(rootless_storage_path="$HOME/rsp")}),
    row("own file, drop-in in etc", True, {OWN: conf(driver="vfs"),
                                           f"{ETC}.d/1.conf": conf(graphroot="BASE/d$UID")}),
    row("XDG_DATA_HOME", True, {}, XDG_DATA_HOME="HOME/data"),
    row("XDG_CONFIG_HOME", True, {"BASE/x/containers/storage.conf": conf(graphroot="BASE/xdg")},
        XDG_CONFIG_HOME="BASE/x"),
    row("empty XDG_CONFIG_HOME", True, {OWN: conf(graphroot="BASE/own")}, XDG_CONFIG_HOME=""),
    row(
        "named file with paths",
        True,
        {"BASE/x.conf": conf(driver="vfs", graphroot="BASE/n", runroot="BASE/nr")},
        CONTAINERS_STORAGE_CONF="BASE/x.conf",
    ),
    row("an existing vfs store without a database", True,
        {"HOME/.local/share/containers/storage/vfs-images/x": "",
         "HOME/.local/share/containers/storage/vfs/x": ""}),
    row("STORAGE_DRIVER", True, {}, STORAGE_DRIVER="vfs"),
    row("ignore_chown_errors in etc", True,
        {ETC: conf('[storage.options.overlay]\nignore_chown_errors = "true"\n', driver="overlay")}),
    row("priority in etc", True, {ETC: "[storage]\ndriver_priority = ['vfs']\n"}),
]  # fmt: skip

# Comparing some hundred generated rows has found these differences.
GENERATED = [
    row(
        "tables of one name in different case",
        False,
        {
            USR: '[Storage]\nGraphRoot = "BASE/case"\nRunRoot = "BASE/r"\n'
            '[storage]\ndriver = "overlay"\n' + OVERLAY.format("nodev")
        },
    ),
    row("a link to itself as drop-in", False, {f"{ETC}.d/10.conf": "-> 10.conf"}),
    row("STORAGE_DRIVER without a file", False, {}, STORAGE_DRIVER="vfs"),
    row("STORAGE_OPTS without a file", False, {}, STORAGE_OPTS="overlay.mountopt=nosuid"),
    row("named file is an empty text", False, {}, CONTAINERS_STORAGE_CONF=""),
    row("named file is an empty text, rootless", True, {}, CONTAINERS_STORAGE_CONF=""),
    row("etc may not be read", True, {ETC: conf(graphroot="BASE/e")}, {ETC: 0}),
    row("own folder may not be entered", True, {OWN: conf(driver="vfs")},
        {"HOME/.config/containers": 0}),
    row(
        "a drop-in may not be read",
        True,
        {"/etc/containers/storage.rootless.conf.d/1.conf": conf(driver="vfs")},
        {"/etc/containers/storage.rootless.conf.d/1.conf": 0},
    ),
]  # fmt: skip

# podman before storage 1.63 reads a user's own file instead of the system's file; buildah reads both.
USER_AND_SYSTEM_FILE = [
    {**item, "program": program, "runtime": program}
    for program in ("podman", "buildah")
    for item in (
        row(
            "rootless_storage_path in etc, own file without paths",
            True,
            {
                ETC: conf(rootless_storage_path="BASE/rsp", runroot="BASE/r"),
                OWN: conf(driver="vfs", runroot="$HOME/r"),
            },
        ),
        row(
            "etc may not be read, own file",
            True,
            {ETC: conf(graphroot="BASE/e"), OWN: conf(driver="vfs", graphroot="BASE/o", runroot="BASE/r")},
            {ETC: 0},
        ),
        row("etc is a directory, own file", True,
            {f"{ETC}/x": "", OWN: conf(driver="vfs", runroot="$HOME/r")}),
    )
]  # fmt: skip

# Loaders that do not merge drop-ins refuse such lists.
APPENDING = [
    row(
        "lists append",
        False,
        {
            "BASE/s1/x": "",
            "BASE/s2/x": "",
            "BASE/s3/x": "",
            ETC: conf('[storage.options]\nadditionalimagestores = ["BASE/s1"]', driver="overlay"),
            f"{ETC}.d/1.conf": "[storage.options]\nadditionalimagestores = ['BASE/s2', {append=true}]",
            f"{ETC}.d/2.conf": "[storage.options]\nadditionalimagestores = ['BASE/s3']",
        },
    ),
    row(
        "a list stops appending",
        False,
        {
            "BASE/s1/x": "",
            "BASE/s2/x": "",
            ETC: conf("[storage.options]\nadditionalimagestores = ['BASE/s1', {append=true}]",
                      driver="overlay"),
            f"{ETC}.d/2.conf": "[storage.options]\nadditionalimagestores = ['BASE/s2', {append=false}]",
        },
    ),
    row("append in the main file", False, {ETC: "[storage]\ndriver_priority = ['vfs', {append=true}]"}),
]  # fmt: skip

BUILDAH = [
    {**item, "program": "buildah"}
    for item in (
        row("defaults", False, {}),
        row("etc", False, {ETC: conf(driver="vfs", graphroot="BASE/e", runroot="BASE/r")}),
        row("drop-in", False, {f"{ETC}.d/1.conf": conf(graphroot="BASE/d")}),
        row("etc, rootless", True, {ETC: conf(driver="vfs", graphroot="BASE/e$UID")}),
        row("own, rootless", True, {OWN: conf(driver="vfs", graphroot="BASE/o")}),
    )
]


@pytest.fixture(scope="module")
def machines(lab: Lab, host: t.Callable[[str], Host]) -> t.Callable[[str], t.Any]:
    """The laboratory's machine or a host, by name."""
    return lambda name: lab.machine if name == "local" else host(name)


@pytest.mark.parametrize("name", MACHINES)
def test_discovery_agrees_with_runtime(
    name: str, lab: Lab, machines: t.Callable[[str], t.Any], make_user: t.Callable[..., User]
) -> None:
    machine = machines(name)
    rows = [
        *TABLE,
        *ROOTFUL,
        *ROOTLESS,
        *GENERATED,
        *USER_AND_SYSTEM_FILE,
        *(APPENDING if name in MERGING else ()),
        *BUILDAH,
    ]
    user = make_user(machine)
    answers = discovery.compare(rows, machine, lab.tree, user)
    wrong = []
    refused = []
    for table_row, answer in zip(rows, answers):
        if "failed" in answer:
            wrong.append(f"{table_row['case']}: {answer['failed']}")
            continue
        theirs = answer["theirs"]
        if "error" in theirs:
            refused.append(table_row["case"])
            if "runroot must be set" in theirs["error"] and name not in MERGING:
                # Programs before storage 1.63 do not start on a file without runroot.
                continue
        for moment in ("before", "after"):
            ours = answer[moment]
            if "error" in theirs or "error" in ours:
                same = ("error" in theirs) == ("error" in ours)
            else:
                same = all(ours[key] == value for key, value in theirs.items())
            if not same:
                wrong.append(
                    f"{table_row['case']} ({'rootless' if table_row['rootless'] else 'rootful'}), {moment}:\n"
                    f"    runtime {theirs}\n    ours    {ours}"
                )
        if name in MERGING and "podman_info" in table_row:
            expected = discovery.filled(table_row["podman_info"], *_fill_arguments(user))
            fields = {"graphRoot": "graphroot", "runRoot": "runroot", "graphDriverName": "driver"}
            for key, field in fields.items():
                if theirs.get(field) != expected[key]:
                    wrong.append(
                        f"{table_row['case']}: the table says {expected[key]}, podman {theirs}"
                    )
    assert wrong == [], "\n".join(wrong)
    # podman itself refuses only a small number of rows.
    assert len(refused) < (12 if name in MERGING else 36), refused


@pytest.mark.parametrize("rootless", [False, True])
def test_image_is_pulled_into_store_of_podman(
    rootless: bool,
    lab: Lab,
    machines: t.Callable[[str], t.Any],
    make_user: t.Callable[..., User],
    small_image: Image,
) -> None:
    """Debian's skopeo 1.22 does not read drop-ins, but podman of the same release does."""
    machine = machines("sid")
    user = make_user(machine)
    folder = pathlib.Path(user.home) / "g"
    drop_in = f"/etc/containers/storage.{'rootless' if rootless else 'rootful'}.conf.d/1-test.conf"
    text = conf(
        OVERLAY.format("nodev"),
        driver="overlay",
        graphroot=str(folder),
        runroot=f"/run/{'user/' + str(user.uid) if rootless else 'pulled-into'}/r",
    )
    machine.run(["mkdir", "-p", str(pathlib.Path(drop_in).parent)])
    machine.run(["tee", drop_in], stdin=text)
    try:
        args: Json = {"images": [small_image.name], "source": small_image.source}
        if rootless:
            args["user"] = user.name
        for changed in (True, False):
            done = run_module(lab, "image_layers", args, machine=machine)
            assert done["changed"] == changed
            assert done["store"]["graphroot"] == str(folder)
        found = [path.name for path in folder.iterdir()]
        assert "overlay-images" in found
        command = ["podman", "images", "--noheading", "--format={{.Repository}}:{{.Tag}}"]
        listed = machine.run(command, account=user if rootless else None).stdout.split()
        assert listed == [small_image.name]
        if not rootless:
            markers = machine.run(["ls", "/run/pulled-into/r/overlay"]).stdout.split()
            assert [marker for marker in markers if marker.startswith("metacopy(")] == [
                "metacopy(nodev)-false"
            ]
    finally:
        machine.run(["rm", drop_in])


def _fill_arguments(user: User) -> t.Tuple[str, Json]:
    base = str(pathlib.Path(user.home).parent / "b")
    return base, {"home": user.home, "uid": user.uid}
