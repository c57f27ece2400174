# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the library predicts is what podman writes: the literal map, and whether it makes a layer.

Each cell predicts the map of a request, lets the real podman create a container, and compares its
records. Requests that this podman refuses must be refused by the library too.
"""

from __future__ import annotations

import dataclasses
import pathlib
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.grammar import (
    Userns,
    UsernsContext,
    parse_request,
    parse_userns,
    resolve_auto_extras,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.mapping import Mapping
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.subids import (
    Sources,
    SubIDRange,
    SubIDs,
    namespace_mapping,
    ranges_of,
    subordinate_ids,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime import auto, forms
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.detect import (
    Runtime,
    runtime,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.runtime.shifting import (
    Shifting,
    shifting,
)

if t.TYPE_CHECKING:
    from support.images import Image
    from support.lab import Lab
    from support.machines import Machine
    from support.stores import Store

MACHINES = ("local", "trixie", "sid")
ROOTFUL = ("overlay", "overlay-forced", "vfs")
ROOTLESS = ("rootless-overlay", "rootless-fuse", "rootless-vfs")
NAME = "localhost/forms:1"
OWNER = "forms"
# It has ranges, but no account.
GHOST = "ghost"
PASSWD = """\
root:x:0:0::/root:/bin/sh
app:x:1500:1501::/:/bin/sh
nobody:x:65534:65534::/:/bin/sh
"""
GROUP = "root:x:0:\nteam:x:2500:\nnogroup:x:65534:\n"


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request, in words of the library, and so of podman's command line."""

    userns: str | None = None
    uidmap: tuple[str, ...] = ()
    gidmap: tuple[str, ...] = ()
    subuidname: str | None = None
    subgidname: str | None = None
    user: str = ""

    def words(self) -> list[str]:
        """The options for podman."""
        words = [f"--userns={self.userns}"] if self.userns else []
        words += [f"--uidmap={item}" for item in self.uidmap]
        words += [f"--gidmap={item}" for item in self.gidmap]
        words += [f"--subuidname={self.subuidname}"] if self.subuidname else []
        words += [f"--subgidname={self.subgidname}"] if self.subgidname else []
        words += [f"--user={self.user}"] if self.user else []
        return words

    def __str__(self) -> str:
        return " ".join(self.words()).replace("--", "")


ROOTFUL_ASKS = (
    Ask(uidmap=("0:100000:2000",)),
    Ask(uidmap=("0:100000:2000",), gidmap=("0:200000:2000",)),
    Ask(gidmap=("0:200000:2000",)),
    # Host order, container order, and neither is that of the command line.
    Ask(uidmap=("1000:100000:1000", "0:200000:1000")),
    Ask(uidmap=("500:100500:1500", "0:100000:500")),
    Ask(uidmap=("0:100500:500", "500:100000:500")),
    Ask(uidmap=("500:100000:500", "0:100500:500"), gidmap=("9:300000:9", "0:400000:9")),
    Ask(uidmap=("9:300000:9", "0:400000:9"), gidmap=("500:100000:500", "0:100500:500")),
    Ask(uidmap=("0:0:4294967295",)),
    Ask(uidmap=("0:100000:10:10:200000:10",)),
    Ask(uidmap=("0:100000:2000", "+1000:5000:1")),
    Ask(uidmap=("0:100000:2000", "+1000:5000:10", "+u1005:7000")),
    Ask(uidmap=("0:100000:2000", "+1500:100200:100")),
    Ask(uidmap=("u0:100000:2000", "g0:200000:2000")),
    Ask(uidmap=("u0:100000:2000",)),
    Ask(uidmap=("0:100000",)),
    Ask(uidmap=("+0:100000:2000",)),
    Ask(uidmap=("0:@100000:2000",)),
    Ask(subuidname=OWNER),
    Ask(subgidname=OWNER),
    Ask(subuidname=OWNER, uidmap=("100000:50000:10",)),
    Ask(subuidname=GHOST),
    Ask(subuidname="nobodyhasthis"),
    Ask(userns="host"),
    Ask(userns="keep-id"),
    Ask(userns="keep-id:size=100"),
    Ask(userns="keep-id:uid=5,gid=6"),
    Ask(userns="nomap"),
    Ask(userns="auto"),
    Ask(userns="auto", user="5000:6000"),
    Ask(userns="auto", user="app:5001"),
    Ask(userns="auto", user="70000"),
    Ask(userns="auto:size=500"),
    Ask(userns="auto:size=70000"),
    Ask(userns="auto:uidmapping=0:5000:1"),
    Ask(userns="auto:uidmapping=1000:5000:1,gidmapping=7:6000:2,gidmapping=3:8000:1"),
    Ask(userns="auto:uidmapping=1000:@5000"),
    Ask(userns="auto:size=9999999"),
    Ask(userns="host", uidmap=("0:1:10",)),
    Ask(userns="foo"),
    Ask(uidmap=("0:1:x",)),
    Ask(uidmap=("0:1:10", "5:100:10")),
)
ROOTLESS_ASKS = (
    Ask(userns="keep-id"),
    Ask(userns="keep-id:uid=0,gid=0"),
    Ask(userns="keep-id:uid=200,gid=210"),
    Ask(userns="keep-id:uid=70000"),
    Ask(userns="keep-id:size=5000"),
    Ask(userns="keep-id:size=1000"),
    Ask(userns="nomap"),
    Ask(userns="auto"),
    Ask(userns="auto:size=500"),
    Ask(userns="auto:uidmapping=0:0:1"),
    Ask(userns="host"),
    Ask(uidmap=("0:1:1000",)),
    Ask(uidmap=("0:1:1000", "1000:0:1")),
    Ask(uidmap=("1000:0:1", "0:1:1000")),
    Ask(uidmap=("0:1:1000", "1000:2001:1000"), gidmap=("0:5001:1000",)),
    Ask(uidmap=("+1000:0:1",)),
    Ask(uidmap=("+1000:@{uid}:1",)),
    Ask(uidmap=("u+1000:@{uid}", "u+5:7:2")),
    Ask(uidmap=("0:@{sub}:300",)),
    Ask(uidmap=("u0:0:1",)),
    Ask(gidmap=("g0:0:1",)),
    Ask(uidmap=("0:1:10", "+20:100:5")),
    Ask(uidmap=("0:0:70000",)),
    Ask(uidmap=("0:@4000000000:1",)),
)


# Machine, kind of store, and request.
CELLS = [
    pytest.param((machine, kind), ask, id=f"{machine}-{kind}-{ask}")
    for machine in MACHINES
    for kinds, asks in ((ROOTFUL, ROOTFUL_ASKS), (ROOTLESS, ROOTLESS_ASKS))
    for kind in kinds
    for ask in asks
]


@pytest.fixture(scope="module")
def image(lab: Lab) -> Image:
    """One with accounts, and files of several owners."""
    from support import images

    layers: list[images.Layer] = [
        {
            "etc": images.directory(),
            "etc/passwd": images.file(PASSWD),
            "etc/group": images.file(GROUP),
        },
        images.shell(),
        {"srv": images.directory(uid=33, gid=44), "srv/one": images.file("1", uid=20, gid=1200)},
    ]
    return images.build(lab.folder(), layers, NAME)


@pytest.fixture(scope="module")
def machines(lab: Lab) -> t.Iterator[t.Callable[[str], Machine]]:
    """The laboratory itself and the other Debians, each with ranges for a name."""
    from support.hosts import Host

    made: dict[str, Machine] = {}

    def give(name: str) -> Machine:
        if name not in made:
            machine = lab.machine if name == "local" else Host(lab, name)
            for kind in ("subuid", "subgid"):
                path = pathlib.Path(getattr(machine, "root", "/")) / "etc" / kind
                before = path.read_text() if path.exists() else ""
                path.write_text(
                    f"{before}{OWNER}:3000000000:500\n{OWNER}:2900000000:70000\n"
                    "containers:2000000000:300000\ncontainers:1900000000:500\n"
                    f"{GHOST}:2800000000:700\n"
                )
            for owner in (OWNER, "containers"):
                machine.run(["useradd", "--system", "--no-create-home", owner])
            made[name] = machine
        return made[name]

    yield give
    for owner in (OWNER, "containers", GHOST):
        lab.machine.run(["userdel", owner], check=False)
        lab.machine.run(["sed", "-i", f"/^{owner}:/d", "/etc/subuid", "/etc/subgid"])
    for machine in made.values():
        if isinstance(machine, Host):
            machine.close()


@dataclasses.dataclass
class Place:
    """A store with the image, and all the library has to know of it."""

    store: Store
    runtime: Runtime
    root: str

    @property
    def sources(self) -> Sources:
        """The machine's files about subordinate IDs."""
        names = ("subuid", "subgid", "nsswitch.conf", "passwd")
        return Sources(
            *(f"{self.root}/etc/{name}" for name in names),
            getsubids=(*self.store.machine.prefix, "getsubids"),
        )

    def names(self, name: str, kind: str) -> tuple[SubIDRange, ...]:
        """Ranges of a name on that machine."""
        return ranges_of(name, None, kind, True, self.sources)

    def context(self) -> UsernsContext:
        """Who asks on that machine."""
        user = self.store.user
        if user is None:
            return forms.context(self.runtime, False, 0, 0, names=self.names)
        available = namespace_mapping(user.uid, user.gid, self.subids())
        return forms.context(self.runtime, True, user.uid, user.gid, available, self.names)

    def subids(self) -> SubIDs:
        """Those that automatic namespaces come from, and those of a rootless user's namespace."""
        user = self.store.user
        if user is None:
            return subordinate_ids("containers", None, sources=self.sources)
        return subordinate_ids(user.name, user.uid, sources=self.sources)

    def predict(self, ask: Ask) -> tuple[Mapping, Shifting]:
        """The map as it will be recorded, and whether a layer is made for it."""
        context = self.context()
        request = parse_request(ask.userns, ask.uidmap, ask.gidmap, ask.subuidname, ask.subgidname)
        if request.userns is not None and request.kind == "auto":
            size, extra = self.auto(request.userns, ask.user)
            used = [read(one) for one in self.store.containers()]
            spans = auto.available_ids(context.rootless, self.subids())
            mapping = auto.allocate(size, spans, used, extra)
        else:
            mapping = request.resolve(context)
        return self.shaped(mapping)

    def auto(self, userns: Userns, user: str = "") -> tuple[int, Mapping]:
        """Size and additional maps of an automatic namespace."""
        sets = [one.get(key, []) for one in self.store.layers() for key in ("uidset", "gidset")]
        texts = {"etc/passwd": PASSWD, "etc/group": GROUP}
        # The laboratory starts root's programs in /, and users' at home.
        started = None if self.store.user else pathlib.Path("/etc/group").read_text()
        ids = auto.image_ids(sets, texts.get, started)
        size = auto.namespace_size(self.runtime, auto.AutoLimits(), ids, userns.size, user)
        return size, resolve_auto_extras(userns, self.context())

    def shaped(self, mapping: Mapping) -> tuple[Mapping, Shifting]:
        """A map in the runtime's form, and whether a layer is made for it."""
        answer = shifting(
            self.store.driver,
            self.store.options,
            self.store.user is not None,
            str(self.store.graphroot),
            str(self.store.runroot),
            mapping,
            self.runtime,
            self.store.env(),
        )
        return forms.shape(mapping, self.runtime, answer.sorts), answer


@pytest.fixture(scope="module")
def places(
    lab: Lab, image: Image, machines: t.Callable[[str], Machine]
) -> t.Iterator[t.Callable[[tuple[str, str]], Place]]:
    """One store per machine and kind, kept for all requests."""
    from support import stores, users

    made: dict[tuple[str, str], Place] = {}

    def give(key: tuple[str, str]) -> Place:
        if key not in made:
            machine = machines(key[0])
            user = users.add_user(lab, machine) if key[1].startswith("rootless") else None
            store = stores.Store(lab, key[1], machine=machine, user=user)
            version = ".".join(str(number) for number in machine.version("podman"))
            made[key] = Place(store, runtime("podman", version), str(getattr(machine, "root", "")))
            store.load(image)
        return made[key]

    yield give
    for place in made.values():
        place.store.close()
        if place.store.user:
            users.remove_user(lab, place.store.user, place.store.machine)


def read(record: t.Mapping[str, t.Any]) -> Mapping:
    """The mapping of a layer or container record."""
    return Mapping(IDMap.from_record(record.get("uidmap")), IDMap.from_record(record.get("gidmap")))


def fill(ask: Ask, place: Place) -> Ask:
    """Put the user's own numbers into a request."""
    user = place.store.user
    if user is None:
        return ask
    return dataclasses.replace(
        ask,
        uidmap=tuple(one.format(uid=user.uid, sub=user.subuid_start) for one in ask.uidmap),
    )


@pytest.mark.parametrize(("key", "ask"), CELLS)
def test_podman_writes_what_was_predicted(
    places: t.Callable[[tuple[str, str]], Place], key: tuple[str, str], ask: Ask
) -> None:
    place = places(key)
    store = place.store
    ask = fill(ask, place)
    before = set(store.mapped_layers(NAME))
    try:
        mapping, answer = place.predict(ask)
        error = None
    except StorageError as refused:
        mapping, answer, error = Mapping(), None, refused
    done = store.podman("create", *ask.words(), NAME, "true", check=False)
    try:
        if error is not None or answer is None:
            # IDs that the user does not have are met only when the container starts.
            if done.rc == 0:
                started = store.podman("start", done.stdout.split()[-1], check=False)
                assert started.rc != 0, f"podman accepted what was refused: {error}"
                assert store.run(NAME, "echo", "works") == "works\n"
            return
        assert done.rc == 0, f"predicted {mapping}: {done.stderr}"
        container = store.container(done.stdout.split()[-1])
        assert str(read(container)) == str(mapping)
        made = set(store.mapped_layers(NAME)) - before
        if answer.shifts:
            assert not made
        else:
            assert str(mapping) in {
                str(read(store.layer(one))) for one in store.mapped_layers(NAME)
            }
            assert str(read(store.layer(container["layer"]))) == str(mapping)
    finally:
        if done.rc == 0:
            store.podman("rm", "-f", done.stdout.split()[-1])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", ["overlay-forced", "rootless-overlay"])
def test_slots_are_those_of_the_containers_that_run_at_once(
    places: t.Callable[[tuple[str, str]], Place], machine: str, kind: str
) -> None:
    place = places((machine, kind))
    store = place.store
    size, extra = place.auto(parse_userns("auto"))
    spans = auto.available_ids(store.user is not None, place.subids())

    def slots() -> list[str]:
        held = [read(one) for one in store.containers()]
        found = auto.slots(3, size, spans, held, held, extra)
        return [str(place.shaped(one)[0]) for one in found]

    def create() -> str:
        return store.create(NAME, "--userns=auto")

    expected = slots()
    made = [create()]
    try:
        assert sorted(slots()) == sorted(expected)
        made += [create(), create()]
        assert [str(read(store.container(one))) for one in made] == expected
        store.podman("rm", made.pop(1))
        assert sorted(slots()) == sorted(expected)
        made.insert(1, create())
        assert [str(read(store.container(one))) for one in made] == expected
    finally:
        store.podman("rm", "-f", *made)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", ["overlay-forced", "vfs"])
@pytest.mark.parametrize(
    "ask",
    [
        Ask(uidmap=("1000:100000:1000", "0:200000:1000")),
        Ask(uidmap=("500:100500:500", "0:100000:500"), gidmap=("0:300000:500",)),
        Ask(uidmap=("0:300000:500",)),
        Ask(userns="auto"),
        Ask(userns="auto:size=700,uidmapping=5:6000:1"),
    ],
    ids=str,
)
def test_buildah_writes_what_was_predicted(
    places: t.Callable[[tuple[str, str]], Place], machine: str, kind: str, ask: Ask
) -> None:
    podman = places((machine, kind))
    store = podman.store
    version = ".".join(str(number) for number in store.machine.version("buildah"))
    place = dataclasses.replace(podman, runtime=runtime("buildah", version))
    mapping, answer = place.predict(ask)
    assert not answer.shifts
    words = [f"--userns={ask.userns}"] if ask.userns else []
    words += [f"--userns-uid-map={one}" for one in ask.uidmap]
    words += [f"--userns-gid-map={one}" for one in ask.gidmap]
    name = store.buildah("from", *words, NAME).stdout.split()[-1]
    try:
        assert str(read(store.container(name))) == str(mapping)
        assert str(mapping) in {str(read(store.layer(one))) for one in store.mapped_layers(NAME)}
    finally:
        store.buildah("rm", name)


@pytest.mark.parametrize("machine", MACHINES)
def test_buildah_refuses_a_gid_map_alone(
    places: t.Callable[[tuple[str, str]], Place], machine: str
) -> None:
    podman = places((machine, "vfs"))
    version = ".".join(str(number) for number in podman.store.machine.version("buildah"))
    place = dataclasses.replace(podman, runtime=runtime("buildah", version))
    done = place.store.buildah("from", "--userns-gid-map=0:300000:500", NAME, check=False)
    assert done.rc != 0
    with pytest.raises(StorageError, match="needs a UID map"):
        place.predict(Ask(gidmap=("0:300000:500",)))
