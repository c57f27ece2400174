# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Calls of layer_template for the containers of quadlet units, as podman's own generator reads them."""

from __future__ import annotations

import re
import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils import _manifests, _units
from ansible_collections.userns.storage.plugins.plugin_utils._layer_calls import (
    Call,
    Mapping,
    Settings,
    checked_image,
)
from ansible_collections.userns.storage.plugins.plugin_utils._manifest_calls import ManifestReader
from ansible_collections.userns.storage.plugins.plugin_utils._units import Unit, UnitError

# Options of podman and layer_template, with their keys in units.
_KEYS = {
    "userns": "UserNS",
    "uidmap": "UIDMap",
    "gidmap": "GIDMap",
    "subuidname": "SubUIDMap",
    "subgidname": "SubGIDMap",
}
_LISTS = ("uidmap", "gidmap")
# The highest ID, for sizes.
_HIGHEST = 2**32 - 1
_MANIFESTS = (".yaml", ".yml", ".json")
# Options of podman itself that select another store.
_OTHER_STORE = re.compile(
    r"--(root|runroot|storage-driver|storage-opt|imagestore|connection|remote|url)(=|$)"
)
_MOST_NAMES = 20


class QuadletReader:
    """Reads units, and the manifests that go with them, with the same settings.

    :param pod: the text of the .pod unit that a .container unit references, if it is not among the files
    """

    def __init__(self, settings: Settings, pod: t.Optional[str] = None) -> None:
        self._settings = settings
        self._pod = pod
        self._manifest_reader = ManifestReader(settings)
        self._units: t.Dict[str, Unit] = {}
        self._manifests: t.Dict[str, str] = {}

    def text(self, name: str, text: str) -> t.List[Call]:
        """Calls of one text, a unit or a manifest.

        :param name: its name in messages
        :raises UnitError: it is malformed
        :raises MapError: a mapping in it is invalid
        """
        first = next(
            (line.strip() for line in text.split("\n") if line.strip()[:1] not in ("", "#", ";")),
            "",
        )
        if not re.fullmatch(r"\[[^\]]*\]", first):
            return self._manifest_reader.calls(name, text)
        unit = Unit(name, text, named=False)
        self._settings.notes += unit.notes
        readers = (("Container", self._container), ("Pod", self._pod_alone), ("Kube", self._kube))
        for section, read in readers:
            if section in unit.sections:
                return read(unit)
        raise UnitError(
            f"{name} has no section [Container], [Pod] or [Kube], only [{']['.join(unit.sections)}]"
        )

    def files(self, files: t.Mapping[str, str]) -> t.List[Call]:
        """Calls of all files, by path. The containers use the pods and images, the .kube units the manifests.

        :raises UnitError: a file is malformed
        :raises MapError: a mapping in it is invalid
        """
        counted: t.Set[str] = set()
        for path, text in files.items():
            name = path.rpartition("/")[2]
            if name.rpartition(".")[2] in _units.SECTIONS and name not in self._units:
                counted.add(path)
                unit = Unit(name, text)
                for dropin in _units.dropins(name, files):
                    counted.add(dropin)
                    unit.add(dropin, files[dropin])
                self._settings.notes += unit.notes
                self._units[name] = unit
            elif name.endswith(_MANIFESTS):
                counted.add(path)
                self._manifests[path] = text
        used: t.Set[str] = set()
        calls = []
        for name, unit in self._units.items():
            if unit.kind == "container" and not self._is_replaced(name):
                calls += self._container(unit)
            elif unit.kind == "kube" and not self._is_replaced(name):
                used |= set(self._named_manifests(unit))
                calls += self._kube(unit)
        foreign = [path for path in files if path not in counted]
        for path, text in self._manifests.items():
            if path in used:
                continue
            try:
                calls += self._manifest_reader.calls(path, text)
            except _manifests.NotAManifest:
                foreign.append(path)
        if foreign:
            more = f" and {len(foreign) - _MOST_NAMES} more" if len(foreign) > _MOST_NAMES else ""
            self._settings.notes.append(
                "ignored because they are neither units, nor drop-ins of units, nor manifests: "
                f"{', '.join(foreign[:_MOST_NAMES])}{more}"
            )
        return calls

    def _is_replaced(self, name: str) -> bool:
        """Whether it is a template whose instances are among the files."""
        start, at, end = name.partition("@.")
        return bool(at) and any(
            other.startswith(f"{start}@") and other.endswith(f".{end}") and other != name
            for other in self._units
        )

    def _container(self, unit: Unit) -> t.List[Call]:
        mapping = self._mapping(unit, "Container")
        arguments = _arguments(unit, "Container")
        pod = unit.last("Container", "Pod")
        if pod or "pod" in arguments:
            if mapping:
                raise UnitError(f"{unit.name} is in a pod, so only the pod can have maps")
            mapping = self._mapping_of_pod(unit, pod or arguments["pod"][-1])
        if not mapping or unit.last("Container", "Rootfs"):
            return []
        if mapping.get("userns") == "auto" and unit.last("Container", "User"):
            self._settings.notes.append(
                f"{unit.name}: podman derives the size of the namespace from User. "
                "Set the size, for example UserNS=auto:size=65536"
            )
        return [{"images": [self._image(unit)], "mappings": [mapping]}]

    def _pod_alone(self, unit: Unit) -> t.List[Call]:
        mapping = self._mapping(unit, "Pod")
        return [{"images": [], "mappings": [mapping]}] if mapping else []

    def _mapping_of_pod(self, unit: Unit, pod: str) -> t.Optional[Mapping]:
        found = self._units.get(pod)
        if found is None and self._pod is not None:
            found = Unit(pod, self._pod, named=False)
        if found is None:
            raise UnitError(
                f"{unit.name} uses the maps of the pod {pod}: "
                "pass the text of the pod in pod, or all units as a dictionary"
            )
        return self._mapping(found, "Pod")

    def _named_manifests(self, unit: Unit) -> t.List[str]:
        """The paths among the files that a .kube unit names."""
        whole = self._expanded(unit, "Yaml", unit.last("Kube", "Yaml"))
        names = [self._expanded(unit, "Yaml", word) for word in unit.words("Kube", "Yaml")]
        found = []
        # Before podman 5.6 the value was a single path, which may contain blanks.
        for name in [whole] if self._path(whole) else names:
            path = self._path(name)
            if path is None:
                raise UnitError(
                    f"{unit.name} references the manifest {name}: pass all files as a dictionary"
                )
            found.append(path)
        if not found:
            raise UnitError(f"{unit.name} has no manifest in Yaml")
        return found

    def _path(self, name: str) -> t.Optional[str]:
        """The key in the files for a path in a unit."""
        plain = re.sub(r"^(\./)+", "", name)
        alike = [
            path for path in self._manifests if path.rpartition("/")[2] == plain.rpartition("/")[2]
        ]
        for path in alike:
            if path == plain or path.endswith(f"/{plain}"):
                return path
        return alike[0] if len(alike) == 1 and plain else None

    def _kube(self, unit: Unit) -> t.List[Call]:
        for key in ("UIDMap", "GIDMap", "SubUIDMap", "SubGIDMap"):
            if unit.all("Kube", key):
                raise UnitError(
                    f"{unit.name}: quadlet does not support {key} in [Kube], only UserNS"
                )
        options = self._options(unit, "Kube", manual=False)
        if set(options) - {"userns"}:
            raise UnitError(f"{unit.name}: podman kube play does not support maps, only --userns")
        paths = self._named_manifests(unit)
        return [
            call
            for path in paths
            for call in self._manifest_reader.calls(
                path, self._manifests[path], True, options.get("userns")
            )
        ]

    def _image(self, unit: Unit) -> str:
        image = self._expanded(unit, "Image", unit.last("Container", "Image"))
        if not image:
            raise UnitError(f"{unit.name} has no Image=")
        kind = image.rpartition(".")[2]
        if kind not in ("image", "build") or "/" in image:
            return checked_image(f"{unit.name}: Image", image)
        other = self._units.get(image)
        if other is None:
            raise UnitError(
                f"{unit.name} uses the image of the unit {image}: pass all units as a dictionary"
            )
        if kind == "build":
            # Containers use the first tag of a build.
            name = next(iter(other.all("Build", "ImageTag")), "")
        else:
            name = other.last("Image", "ImageTag") or other.last("Image", "Image")
        if not name:
            raise UnitError(f"{image} does not set the name of its image")
        # It is in the container's own command.
        key = f"ImageTag of {image}"
        return checked_image(f"{unit.name}: {key}", self._expanded(unit, key, name))

    def _mapping(self, unit: Unit, section: str) -> t.Optional[Mapping]:
        """The options of layer_template for a section's keys; None if it has no namespace of its own."""
        return self._settings.checked(unit.name, self._options(unit, section))

    def _options(self, unit: Unit, section: str, manual: bool = True) -> Mapping:
        given: t.Dict[str, t.List[str]] = {}
        for option, key in _KEYS.items():
            lists = option in _LISTS
            values = unit.words(section, key) if lists else [unit.last(section, key)]
            given[option] = [self._expanded(unit, key, value) for value in values if value]
        remapped = any(unit.has(section, key) for key in ("RemapUsers", "RemapUid", "RemapGid"))
        if not any(given.values()):
            for option, values in _remapped(unit, section, manual).items():
                given[option] = [self._expanded(unit, "RemapUsers", value) for value in values]
        elif remapped:
            raise UnitError(f"{unit.name} has keys of both kinds, UserNS or maps and RemapUsers")
        for option, values in _arguments(unit, section).items():
            if option != "pod":
                given[option] += [self._expanded(unit, "PodmanArgs", value) for value in values]
        for line in (unit.arguments(section, "GlobalArgs"), unit.arguments(section, "PodmanArgs")):
            if any(map(_OTHER_STORE.match, line)):
                self._settings.notes.append(
                    f"{unit.name} does not use the default store: set graphroot in layer_template"
                )
        return {
            option: values if option in _LISTS else values[-1]
            for option, values in given.items()
            if values
        }

    def _expanded(self, unit: Unit, key: str, value: str) -> str:
        return unit.expanded(key, value, self._settings.specifiers, self._settings.variables)


def _remapped(unit: Unit, section: str, manual: bool) -> t.Dict[str, t.List[str]]:
    """The keys of podman 4.4, before there was a key for each option."""
    kind = unit.bare(section, "RemapUsers")
    uids, gids = (unit.words(section, key) for key in ("RemapUid", "RemapGid"))
    size = _size(unit, section)
    if not kind:
        if uids or gids:
            raise UnitError(f"{unit.name} has RemapUid or RemapGid without RemapUsers")
        return {}
    if kind == "manual" and manual:
        return {"uidmap": uids, "gidmap": gids}
    if kind == "auto":
        options = [f"uidmapping={entry}" for entry in uids]
        options += [f"gidmapping={entry}" for entry in gids]
        options += [f"size={size}"] if size else []
    elif kind == "keep-id":
        if len(uids) > 1 or len(gids) > 1:
            raise UnitError(
                f"{unit.name}: RemapUsers=keep-id requires exactly one RemapUid and one RemapGid"
            )
        options = [f"uid={entry}" for entry in uids] + [f"gid={entry}" for entry in gids]
    else:
        kinds = "manual, auto or keep-id" if manual else "auto or keep-id"
        raise UnitError(f"{unit.name}: RemapUsers is {kind!r}, not {kinds}")
    return {"userns": [":".join([kind, ",".join(options)]).rstrip(":")]}


def _size(unit: Unit, section: str) -> int:
    """RemapUidSize, as strtol(3) reads it."""
    text = unit.last(section, "RemapUidSize")
    match = re.fullmatch(r"\+?(?:0[xX]([0-9a-fA-F]{1,8})|(0[0-7]{0,11})|([1-9][0-9]{0,9}))", text)
    if text and match is None:
        raise UnitError(f"{unit.name}: RemapUidSize is {text!r}, not a number of IDs")
    if match is None:
        return 0
    size = int(match[1], 16) if match[1] else int(match[2], 8) if match[2] else int(match[3])
    if size > _HIGHEST:
        raise UnitError(f"{unit.name}: RemapUidSize is {text}, more than there are")
    return size


def _arguments(unit: Unit, section: str) -> t.Dict[str, t.List[str]]:
    """The values of podman's options for user namespaces, and of --pod, in PodmanArgs."""
    result: t.Dict[str, t.List[str]] = {}
    arguments = iter(unit.arguments(section, "PodmanArgs"))
    for argument in arguments:
        option, equals, value = argument.partition("=")
        option = option[2:] if option.startswith("--") else ""
        if option not in (*_KEYS, "pod"):
            continue
        if not equals:
            value = next(arguments, "")
        if not value:
            raise UnitError(f"{unit.name}: PodmanArgs has --{option} without a value")
        result.setdefault(option, []).append(value)
    return result
