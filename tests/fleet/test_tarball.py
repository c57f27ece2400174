# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The tarball is reproducible, and the installed collection works on its own."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import types
import typing as t

import pytest

if t.TYPE_CHECKING:
    from fleet.conftest import Play
    from support.images import Image
    from support.stores import Store

ROOT = pathlib.Path(__file__).resolve().parents[2]
GALAXY = pathlib.Path(sys.executable).parent / "ansible-galaxy"
EPOCH = 1_800_000_000
MAP = "0:100000:65536"
# The folders that a host or a controller needs.
NEEDED = {"meta", "plugins", "roles", "playbooks"}


@pytest.fixture(scope="module")
def tarball() -> types.ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    return importlib.import_module("tarball")


@pytest.fixture(scope="module")
def packed(tarball: types.ModuleType, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    found: pathlib.Path = tarball.build(ROOT, tmp_path_factory.mktemp("first"), GALAXY, EPOCH)
    return found


def other_tree(target: pathlib.Path) -> None:
    """Copy the files in another order, with another time and with another umask."""
    for path in sorted(ROOT.rglob("*"), reverse=True):
        copy = target / path.relative_to(ROOT)
        if path.is_file() and "__pycache__" not in path.parts and ".git" not in path.parts:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
            copy.chmod(0o700 if os.access(path, os.X_OK) and path.stat().st_mode & 0o100 else 0o600)
            os.utime(copy, (1, 1))


def test_same_files_result_in_the_same_bytes(
    tarball: types.ModuleType, packed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other_tree(tmp_path / "tree")
    rebuilt = tarball.build(tmp_path / "tree", tmp_path / "out", GALAXY, EPOCH)
    assert rebuilt.name == packed.name
    with tarfile.open(packed) as first, tarfile.open(rebuilt) as second:
        assert first.getnames() == second.getnames()
        assert {member.mtime for member in first} == {EPOCH}
    assert rebuilt.read_bytes() == packed.read_bytes()


def test_tarball_has_the_content_of_ansible_galaxy_build(
    packed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = [str(GALAXY), "collection", "build", "--output-path", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    contents = []
    for path in (packed, tmp_path / packed.name):
        with tarfile.open(path) as archive:
            contents.append(
                {
                    member.name: (
                        member.mode,
                        member.type,
                        (archive.extractfile(member) or _EMPTY_FILE).read(),
                    )
                    for member in archive
                    if member.name not in ("MANIFEST.json", "FILES.json")
                }
            )
    assert contents[0] == contents[1]


class _EmptyFile:
    def read(self) -> bytes:
        return b""


_EMPTY_FILE = _EmptyFile()


@pytest.fixture
def installed(packed: pathlib.Path, tmp_path: pathlib.Path) -> t.Dict[str, str]:
    """An environment in which Ansible finds only the installed collection, reduced to the needed folders."""
    target = tmp_path / "installed"
    # Otherwise the collection under test counts as installed.
    environ = {"ANSIBLE_COLLECTIONS_PATH": str(target), "PYTHONPATH": ""}
    command = [str(GALAXY), "collection", "install", "--offline", "-p", str(target), str(packed)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **environ})
    (tree,) = target.glob("ansible_collections/userns/storage")
    for path in tree.iterdir():
        if path.is_dir() and path.name not in NEEDED:
            shutil.rmtree(path)
        elif not path.is_dir():
            path.unlink()
    assert {path.name for path in tree.iterdir()} == NEEDED
    return environ


def test_installed_collection_works_on_its_own(
    installed: t.Dict[str, str],
    play: t.Callable[..., Play],
    make_store: t.Callable[..., Store],
    small_image: Image,
    tmp_path: pathlib.Path,
) -> None:
    store = make_store("vfs", small_image)
    tasks = [
        {"userns.storage.layer_template": {"images": "localhost/small:1", "uidmap": [MAP]}},
        {"userns.storage.image_layers_info": {"measure": "exclusive"}, "register": "found"},
        {"ansible.builtin.assert": {"that": "found.totals.mapped.layers == 1"}},
        {"userns.storage.layer_gc": {"max_copies_per_image": 0, "min_age": "0"}, "register": "gc"},
        {"ansible.builtin.assert": {"that": "gc.removed | length == 1"}},
    ]
    playbook = tmp_path / "play.json"
    playbook.write_text(json.dumps([{"hosts": "all", "gather_facts": False, "tasks": tasks}]))
    host = {
        "ansible_connection": "local",
        "ansible_python_interpreter": "/usr/bin/python3",
        "prepare_install": False,
        "prepare_images": "localhost/small:1",
        "prepare_mappings": MAP,
        "prune_max_copies_per_image": "0",
        "prune_min_age": "0",
        "report_users": "",
    }
    inventory = {"all": {"hosts": {"one": host}}}
    environ = {**store.env(), **installed}
    names = [f"userns.storage.{name}" for name in ("prepare", "report", "prune")]
    done = play(playbook, inventory, *names, environ=environ)
    assert str(tmp_path / "installed/ansible_collections/userns/storage/roles") in done.output
    assert done.recap("one")["failed"] == 0
    assert store.mapped_layers("localhost/small:1") == []
    assert MAP in (done.folder / "userns-storage-report.html").read_text()
