# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures of the laboratory. Tests without them need neither root nor container programs."""

from __future__ import annotations

import functools
import os
import pathlib
import sys
import typing as t

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))

if t.TYPE_CHECKING:
    from support.hosts import Host, Sshd
    from support.images import Image
    from support.lab import Lab
    from support.stores import Store
    from support.users import User


@pytest.fixture
def count_calls() -> t.Callable[[t.Callable[[], t.Any]], int]:
    """support.call_count.count_calls, which counts the function calls of an action."""
    from support import call_count

    return call_count.count_calls


@pytest.fixture(scope="session")
def lab() -> t.Iterator[Lab]:
    """The laboratory. It moves this process into a private mount namespace.

    With USERNS_STORAGE_RELEASE (trixie, sid or experimental), tests use the programs of that Debian release.
    """
    from support.hosts import Host
    from support.lab import Lab

    laboratory = Lab()
    try:
        release = os.environ.get("USERNS_STORAGE_RELEASE")
        if release:
            laboratory.machine = Host(laboratory, release)
        yield laboratory
    finally:
        laboratory.close()


@pytest.fixture(scope="session")
def small_image(lab: Lab) -> Image:
    """localhost/small:1: four small layers with all attributes that a mapped layer must preserve."""
    from support import images

    return images.build(lab.folder(), images.small_layers(), "localhost/small:1")


@pytest.fixture(scope="session")
def many_files_image(lab: Lab) -> t.Callable[[int], Image]:
    """A function that builds localhost/many:COUNT, an image of COUNT small files."""
    from support import images

    @functools.cache
    def make(count: int) -> Image:
        return images.build(
            lab.folder(), images.many_files_layers(count), f"localhost/many:{count}"
        )

    return make


@pytest.fixture(scope="session")
def debian_image(lab: Lab) -> Image:
    """localhost/debian:trixie: three layers with 6,800 files and 200 MB."""
    from support import hosts

    return hosts.debian_image(lab)


@pytest.fixture(scope="session")
def host(lab: Lab) -> t.Iterator[t.Callable[[str], Host]]:
    """A function that returns the host of a Debian release with a newer podman: trixie, sid or experimental.

    The tests of a session share one host of each release.
    """
    from support import hosts

    running: t.Dict[str, Host] = {}

    def get(suite: str) -> Host:
        if suite not in running:
            running[suite] = hosts.Host(lab, suite)
        return running[suite]

    yield get
    for machine in running.values():
        machine.close()


@pytest.fixture
def sshd(lab: Lab) -> t.Iterator[t.Callable[[t.Any], Sshd]]:
    """A function that starts the sshd of a machine on a loopback port: sshd(machine)."""
    from support import hosts

    running: t.List[Sshd] = []

    def start(machine: t.Any) -> Sshd:
        running.append(hosts.Sshd(lab, machine))
        return running[-1]

    yield start
    while running:
        running.pop().close()


@pytest.fixture
def make_user(lab: Lab) -> t.Iterator[t.Callable[..., User]]:
    """A function that adds temporary users with subordinate IDs: make_user(machine=None, subordinate=65536)."""
    from support import users

    created: t.List[t.Tuple[User, t.Any]] = []

    def make(machine: t.Any = None, **options: t.Any) -> User:
        user = users.add_user(lab, machine, **options)
        created.append((user, machine))
        return user

    yield make
    while created:
        user, machine = created.pop()
        users.remove_user(lab, user, machine)


@pytest.fixture
def make_store(lab: Lab, make_user: t.Callable[..., User]) -> t.Iterator[t.Callable[..., Store]]:
    """A function that creates private stores: make_store(kind, *images, machine=None, user=None, options=None ...)."""
    from support import stores

    created: t.List[Store] = []

    def make(kind: str, *images: Image, **options: t.Any) -> Store:
        if stores.KINDS[kind][2] and not options.get("user"):
            options["user"] = make_user(options.get("machine"))
        store = stores.Store(lab, kind, **options)
        created.append(store)
        for image in images:
            store.load(image)
        return store

    yield make
    while created:
        created.pop().close()


@pytest.fixture
def run_module(lab: Lab) -> t.Callable[..., t.Dict[str, t.Any]]:
    """support.modules.run_module for the laboratory."""
    from support import modules

    return functools.partial(modules.run_module, lab)


@pytest.fixture
def run_playbook(lab: Lab) -> t.Callable[..., t.List[t.Dict[str, t.Any]]]:
    """support.modules.run_playbook for the laboratory."""
    from support import modules

    return functools.partial(modules.run_playbook, lab)
