# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Test the interop matrix: the real runtime uses the layers that the library predicts and creates.

Each test is a column of docs/interop-matrix.md: all forms on one kind of store of one release. Forms
that the runtime refuses must be refused by the library, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import pickle
import traceback
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import StorageError
from ansible_collections.userns.storage.plugins.module_utils._storage.idmap.ranges import IDMap
from ansible_collections.userns.storage.plugins.module_utils._storage.kernel import namespaces
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    layer_template,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.mapping_options import (
    MappingOptions,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.store_opening import (
    StoreRequest,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.config import Account
from ansible_collections.userns.storage.plugins.module_utils._storage.userns import (
    running as userns,
)
from support import images, matrix, mounts, users
from support.hosts import Host
from support.lab import COLLECTION, Lab
from support.machines import ROOT, Machine, Result
from support.matrix import BROKEN, COPIES, GHOST, LAYER, NO_MAP, OWNER, REFUSED, SHIFTS, Form
from support.stores import Store
from support.users import User

NAME, NAME_WITH_USER = "localhost/forms:1", "localhost/forms:user"
PASSWD = """\
root:x:0:0::/root:/bin/sh
app:x:1500:1501::/:/bin/sh
nobody:x:65534:65534::/:/bin/sh
"""
GROUP = "root:x:0:\nteam:x:2500:\nnogroup:x:65534:\n"
# The exit status reports a wrong owner, since the output of a short container may be lost.
NOT_OWNED = 3
COMMAND = ("sh", "-c", f'[ "$(stat -c %u:%g /srv/one)" = 20:1200 ] || exit {NOT_OWNED}')
# podman's exit statuses for a container that does not start.
NOT_STARTED = (125, 126, 127)
WRITTEN_TABLE = COLLECTION / "docs" / "interop-matrix.md"

Json = t.Dict[str, t.Any]
Key = t.Tuple[str, str, str]

COLUMNS = [
    pytest.param(*[(release, mode, column)] * 2, id=f"{release}-{mode.lower()}-{column}")
    for release in matrix.RELEASES
    for mode, columns in matrix.COLUMNS.items()
    for column in columns
]


@pytest.fixture(scope="module")
def form_images(lab: Lab) -> t.List[images.Image]:
    """An image with accounts and files of several owners, without and with a USER."""
    layers: t.List[images.Layer] = [
        {
            "etc": images.directory(),
            "etc/passwd": images.file(PASSWD),
            "etc/group": images.file(GROUP),
        },
        images.shell(),
        {"srv": images.directory(uid=33, gid=44), "srv/one": images.file("1", uid=20, gid=1200)},
    ]
    return [
        images.build(lab.folder(), layers, NAME),
        images.build(lab.folder(), layers, NAME_WITH_USER, {"User": matrix.USER}),
    ]


@pytest.fixture(scope="module")
def machines(lab: Lab) -> t.Iterator[t.Callable[[str], Machine]]:
    """Machines of the Debian releases, with subordinate IDs for names; the laboratory itself if it is Debian 12."""
    made: t.Dict[str, Machine] = {}

    def get(release: str) -> Machine:
        if release not in made:
            local = release == "bookworm" and lab.machine.version("podman")[:2] == (4, 3)
            machine = made[release] = lab.machine if local else Host(lab, release)
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
        return made[release]

    yield get
    for owner in (OWNER, "containers", GHOST):
        lab.machine.run(["userdel", owner], check=False)
        lab.machine.run(["sed", "-i", f"/^{owner}:/d", "/etc/subuid", "/etc/subgid"])
    for machine in made.values():
        if isinstance(machine, Host):
            machine.close()


def version(machine: Machine, program: str) -> str:
    """The program and its version as a value of the option `runtime`."""
    return f"{program} {'.'.join(map(str, machine.version(program)))}"


@pytest.fixture
def store(
    request: pytest.FixtureRequest, lab: Lab, machines: t.Callable[[str], Machine]
) -> t.Iterator[Store]:
    """The store of a column."""
    release, mode, column = request.param
    kind, options = matrix.COLUMNS[mode][column]
    machine = machines(release)
    user = users.add_user(lab, machine) if mode == matrix.ROOTLESS else None
    if kind == "rootless-btrfs" and user:
        store = _on_btrfs(lab, machine, user)
    else:
        store = Store(lab, kind, machine=machine, user=user, options=options)
    try:
        yield store
    finally:
        store.close()
        if user:
            users.remove_user(lab, user, machine)


def _on_btrfs(lab: Lab, machine: Machine, user: User) -> Store:
    """A user's store on a separate btrfs filesystem; users may remove subvolumes only with a mount option."""
    folder = lab.folder()
    image, disk = folder / "disk.img", pathlib.Path(user.home) / ".local/share/containers"
    with open(image, "wb") as content:
        content.truncate(600 << 20)
    lab.local.run(["mkfs.btrfs", "-q", str(image)])
    user.write(".local/share/containers/.keep", "")
    mounts.mount("-o", "loop,user_subvol_rm_allowed", str(image), str(disk))
    os.chown(disk, user.uid, user.gid)
    store = Store(lab, "rootless-vfs", machine=machine, user=user)
    store.driver = "btrfs"
    user.write(".config/containers/storage.conf", '[storage]\ndriver = "btrfs"\n')
    return store


# Prediction and pre-mapping in the machine


def call_inside(
    machine: Machine, environ: t.Mapping[str, str], function: t.Callable[..., t.Any], *args: t.Any
) -> t.Any:
    """Call a function with an environment in a child process inside the machine."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if isinstance(machine, Host):
                namespaces.setns(os.open(f"/proc/{machine.pid}/ns/mnt", os.O_RDONLY))
            os.environ.clear()
            os.environ.update(environ)
            outcome = (function(*args), "")
        except BaseException:
            outcome = (None, traceback.format_exc())
        with os.fdopen(writer, "wb") as sink:
            pickle.dump(outcome, sink)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as source:
        result, trace = pickle.load(source)
    os.waitpid(child, 0)
    assert not trace, trace
    return result


def declare_each(requests: t.Sequence[layer_template.TemplateRequest]) -> t.List[Json]:
    """The results of layer_template's operation for each request, or its errors."""
    results: t.List[Json] = []
    for request in requests:
        try:
            results.append(layer_template.declare(request))
        except StorageError as error:
            results.append({"error": str(error)})
    return results


WHOLE_HOST = ["0:0:4294967295"]


class Column:
    """Forms of a column, tried on one store."""

    def __init__(self, store: Store, forms: t.Sequence[Form]) -> None:
        self.store, self.forms = store, forms
        self.runtimes = {name: version(store.machine, name) for name in ("podman", "buildah")}
        self.found: t.Dict[str, str] = {}

    def run(self) -> None:
        """Try all fixed maps at once, then each form whose map depends on other containers."""
        self._run_forms([form for form in self.forms if not form.depends_on_containers])
        for form in self.forms:
            if form.depends_on_containers:
                self._run_forms([form])

    def _run_forms(self, forms: t.Sequence[Form]) -> None:
        premapped = list(zip(forms, self._premap(forms)))
        before = self._mapped()
        # Forms to refuse come last: a runtime may create a layer before it refuses the container.
        for refused in (False, True):
            batch = [
                (form, answer, self._create(form))
                for form, answer in premapped
                if bool(answer.get("error")) == refused
            ]
            self._read_records()
            if not refused:
                own = sorted(_maps_of(self._layers[layer]) for layer in self._mapped() - before)
                # A map of the whole host to itself is not needed, but the runtime copies the image for it.
                own = [maps for maps in own if maps != (WHOLE_HOST, WHOLE_HOST)]
                assert own == [], f"the runtime created layers of its own: {own}"
            for form, answer, created in batch:
                self.found[str(form)] = self._verdict(form, answer, created)
        for program in {form.program for form in forms}:
            self.store.tool(program, "rm", "-a", *(["-f"] if program == "podman" else []))
        assert self.store.containers() == []

    def _read_records(self) -> None:
        self._containers = {
            name: container
            for container in self.store.containers()
            for name in (container["id"], *container["names"])
        }
        self._layers = {layer["id"]: layer for layer in self.store.layers()}

    def _verdict(self, form: Form, answer: Json, created: t.Sequence[Result]) -> str:
        # Without a store or a readable map there are no entries.
        entries = answer.get("layers") or [{"action": "refused", "reason": answer["error"]}]
        if len(entries) == 1 and entries[0]["action"] == "refused":
            entries *= len(created)
        try:
            assert len(entries) == len(created)
            cells = [self._cell(form, entry, done) for entry, done in zip(entries, created)]
            if form.slots > 1 and self.store.kind in ("overlay-forced", "rootless-overlay"):
                self._assert_slots_are_stable(form, entries, created)
        except AssertionError as failure:
            return f"WRONG: {failure}"
        return " and ".join(dict.fromkeys(cells))

    def _assert_slots_are_stable(
        self, form: Form, entries: t.Sequence[Json], created: t.Sequence[Result]
    ) -> None:
        """Assert that the slots do not depend on which containers exist."""

        def slots() -> t.List[t.Any]:
            (answer,) = self._premap([form])
            assert answer["changed"] is False
            return sorted((item["uidmap"], item["gidmap"]) for item in answer["layers"])

        expected = [(entry["uidmap"], entry["gidmap"]) for entry in entries]
        assert slots() == sorted(expected)
        self.store.podman("rm", _container_id(created[1]))
        assert slots() == sorted(expected)
        (replacement,) = self._create(dataclasses.replace(form, slots=1))
        assert _maps_of(self.store.container(_container_id(replacement))) == expected[1]

    def _cell(self, form: Form, entry: Json, done: Result) -> str:
        if entry["action"] != "refused":
            return self._verify_predicted(form, entry, done)
        if done.rc != 0:
            return REFUSED
        if "mount program" in entry["reason"]:
            return self._verify_copied(entry, done)
        # IDs that the user does not have, and layers that the kernel cannot mount, are errors only at the start.
        if form.program == "buildah":
            started = self.store.buildah("mount", _container_id(done), check=False)
            refused = started.rc != 0
        else:
            started = self.store.podman("start", "-a", _container_id(done), check=False)
            refused = started.rc in NOT_STARTED
        assert refused, f"the runtime accepts a form that was refused: {entry['reason']}\n{started}"
        return BROKEN

    def _expanded(self, form: Form) -> Form:
        user = self.store.user
        numbers = {"uid": user.uid, "sub": user.subuid_start} if user else {}
        return dataclasses.replace(
            form, uidmap=tuple(item.format(**numbers) for item in form.uidmap)
        )

    def _premap(self, forms: t.Sequence[Form]) -> t.List[Json]:
        store, user = self.store, self.store.user
        account = Account(user.name, user.uid, user.gid, user.home) if user else None
        requests = [
            layer_template.TemplateRequest(
                store=StoreRequest(account=account),
                images=(NAME_WITH_USER if form.user else NAME,),
                mappings=(
                    MappingOptions(
                        form.userns,
                        form.uidmap,
                        form.gidmap,
                        form.subuidname,
                        form.subgidname,
                        self.runtimes[form.program],
                        form.slots,
                    ),
                ),
                overflow=True,
            )
            for form in map(self._expanded, forms)
        ]
        environ = store.machine.environ(store.account or ROOT, store.env())
        answers = call_inside(
            store.machine, environ, userns.run, declare_each, (requests,), account
        )
        return t.cast(t.List[Json], answers)

    def _create(self, form: Form) -> t.List[Result]:
        form = self._expanded(form)
        args = [*form.options(), NAME_WITH_USER if form.user else NAME]
        if form.program == "buildah":
            command = ["buildah", "from", *args]
        else:
            command = ["podman", "create", *args, *COMMAND]
        return [self.store.tool(*command, check=False) for _number in range(form.slots)]

    def _mapped(self) -> t.Set[str]:
        """The mapped layers of both images."""
        return {
            mapped_layer
            for name in (NAME, NAME_WITH_USER)
            for mapped_layer in self.store.mapped_layers(name)
        }

    def _verify_predicted(self, form: Form, entry: Json, done: Result) -> str:
        predicted = (entry["uidmap"], entry["gidmap"])
        assert done.rc == 0, f"predicted {predicted}: {done.stderr}"
        container = self._containers[_container_id(done)]
        assert _maps_of(container) == predicted
        own = self._layers[container["layer"]]
        if entry["action"] in ("created", "existing"):
            assert own["parent"] == entry["layer_id"], "the runtime used another layer"
            assert _maps_of(self._layers[own["parent"]]) == predicted
            assert _maps_of(own) == predicted
            if form.start:
                started = self.store.podman("start", "-a", _container_id(done), check=False)
                assert started.rc == 0, started
            return LAYER
        assert entry["action"] == "not_needed", entry
        if predicted == (WHOLE_HOST, WHOLE_HOST) and own["parent"] in self._mapped():
            # The map has no effect, but the runtime copies the image for it.
            return COPIES
        assert own["parent"] == self.store.image(entry["image_id"])["layer"]
        return SHIFTS if entry["uidmap"] or entry["gidmap"] else NO_MAP

    def _verify_copied(self, entry: Json, done: Result) -> str:
        container = self._containers[_container_id(done)]
        own = self._layers[container["layer"]]
        for record in (container, own, self._layers[own["parent"]]):
            assert _maps_of(record) == (entry["uidmap"], entry["gidmap"])
        assert own["parent"] in self._mapped()
        return COPIES


def _container_id(done: Result) -> str:
    return done.stdout.split()[-1]


def _maps_of(record: Json) -> t.Tuple[t.List[str], t.List[str]]:
    """The maps of a record, with its entries in their order."""
    uid, gid = (IDMap.from_record(record.get(key)).to_strings() for key in ("uidmap", "gidmap"))
    return uid, gid


@pytest.mark.parametrize(("key", "store"), COLUMNS, indirect=["store"])
def test_runtime_uses_prepared_layer(
    key: Key,
    store: Store,
    form_images: t.List[images.Image],
    record_property: t.Callable[[str, object], None],
) -> None:
    release, mode, name = key
    for image in form_images:
        store.load(image)
    forms = matrix.FORMS[mode] if matrix.OUTPUT_VARIABLE in os.environ else matrix.selected(*key)
    column = Column(store, forms)
    column.run()
    versions = ", ".join(column.runtimes.values())
    record_property("matrix", json.dumps([release, versions, mode, name, column.found]))
    wrong = {
        form: text
        for form, text in column.found.items()
        if not matrix.OUTCOMES.keys() >= set(matrix.outcomes(text))
    }
    assert not wrong, "\n".join(f"{form}: {text}" for form, text in wrong.items())
    written = matrix.parse(WRITTEN_TABLE.read_text())
    # The table is valid for the versions that it names; Debian may have newer ones now.
    if written.versions.get(release) == versions:
        expected = {form: written.cells.get((*key, form)) for form in column.found}
        assert column.found == expected, matrix.HOW_TO_WRITE


def test_selection_has_each_form_in_each_column_and_release() -> None:
    for mode, columns in matrix.COLUMNS.items():
        tried = {
            (str(form), release, column)
            for release in matrix.RELEASES
            for column in columns
            for form in matrix.selected(release, mode, column)
        }
        forms = set(map(str, matrix.FORMS[mode]))
        assert {(f, c) for f, _r, c in tried} == {(f, c) for f in forms for c in columns}
        assert {(f, r) for f, r, _c in tried} == {(f, r) for f in forms for r in matrix.RELEASES}


def test_written_table_is_complete_and_canonical() -> None:
    text = WRITTEN_TABLE.read_text()
    written = matrix.parse(text)
    assert matrix.render(written) == text
    expected = {
        (release, mode, column, str(form))
        for release in matrix.RELEASES
        for mode, columns in matrix.COLUMNS.items()
        for column in columns
        for form in matrix.FORMS[mode]
    }
    assert set(written.cells) == expected
    assert {word for cell in written.cells.values() for word in matrix.outcomes(cell)} == set(
        matrix.OUTCOMES
    )
    assert len(expected) >= 150
