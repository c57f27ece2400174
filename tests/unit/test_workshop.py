# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The cache of the scripts contains only complete folders, and failures of programs are messages.

The downloads of pip and npm need a network, so functions of this file take their place.
"""

from __future__ import annotations

import io
import pathlib
import sys
import tarfile
import typing as t
import zipfile

import pytest
from support.ansible_core_versions import workshop as load

workshop: t.Any = load()


@pytest.fixture(autouse=True)
def cache(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty cache."""
    monkeypatch.setattr(workshop, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


class Killed(BaseException):
    """Ends a function in the middle of its work."""


def killed(*_arguments: t.Any, **_options: t.Any) -> t.NoReturn:
    raise Killed


def pip_download(command: t.Sequence[str], **_options: t.Any) -> str:
    """A wheel with two collections."""
    folder = pathlib.Path(command[command.index("--dest") + 1])
    with zipfile.ZipFile(folder / "ansible-1-py3-none-any.whl", "w") as wheel:
        for name in ("awx/awx", "ansible/posix"):
            for file in ("README.md", "plugins/modules/x.py"):
                wheel.writestr(f"ansible_collections/{name}/{file}", name)
    return ""


def npm_pack(_command: t.Sequence[str], folder: pathlib.Path) -> str:
    """A package with one file."""
    with tarfile.open(folder / "thing-1.0.0.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/index.js")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"{}"))
    return ""


def test_collections_of_a_killed_run_are_not_taken_for_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workshop, "call", pip_download)
    extract = zipfile.ZipFile.extractall

    def stop_midway(wheel: zipfile.ZipFile, path: t.Any, members: t.Any) -> None:
        extract(wheel, path, members[:1])
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(zipfile.ZipFile, "extractall", stop_midway)
        # As SIGKILL, which nothing removes anything after.
        patched.setattr(workshop.shutil, "rmtree", lambda *_words, **_options: None)
        with pytest.raises(Killed):
            workshop.bundled("awx.awx")
    folder = workshop.bundled("awx.awx", "ansible.posix")
    assert sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    ) == [
        f"ansible_collections/{name}/{file}"
        for name in ("ansible/posix", "awx/awx")
        for file in ("README.md", "plugins/modules/x.py")
    ]
    with pytest.raises(workshop.SetupError, match=r"no package with the collection no\.thing"):
        workshop.bundled("no.thing")
    # Nothing is downloaded again.
    monkeypatch.setattr(workshop, "call", killed)
    assert workshop.bundled("awx.awx") == folder


def test_npm_package_of_killed_run_is_incomplete(
    cache: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workshop, "call", npm_pack)
    monkeypatch.setattr(workshop.shutil, "which", lambda _name: "/usr/bin/npm")
    with monkeypatch.context() as patched:
        patched.setattr(tarfile.TarFile, "extractall", killed)
        with pytest.raises(Killed):
            workshop.npm_package("thing", "1.0.0")
    folder = workshop.npm_package("thing", "1.0.0")
    assert [path.name for path in folder.iterdir()] == ["index.js"]
    assert [path.name for path in (cache / "npm").iterdir()] == ["thing-1.0.0"]


def test_failure_of_program_is_reported_with_its_output() -> None:
    script = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    with pytest.raises(workshop.SetupError, match=r"-c .* failed with status 3:\nout\nerr"):
        workshop.call([sys.executable, "-c", script])
    with pytest.raises(workshop.SetupError, match="/nonexistent/program cannot be run: .*No such"):
        workshop.call(["/nonexistent/program"])
    assert workshop.call([sys.executable, "-c", "print('out')"]) == "out\n"
