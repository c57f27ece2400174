# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This plugin util is PRIVATE to the userns.storage collection.
"""Kubernetes manifests: the pods in them, and the fields that podman kube play, the kubelet and CRI-O read.

YAML is parsed to a graph of nodes, of which only the requested fields are evaluated. Anchors that
refer to each other or to themselves are therefore never expanded.
"""

from __future__ import annotations

import typing as t

import yaml

from ._units import UnitError

# Larger than any manifest: etcd accepts at most 1.5 MB.
_MOST_CHARACTERS = 8_000_000
_DEEPEST = 100
_MOST_OBJECTS = 10_000
_DEEPEST_LIST = 10
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"

# The location of the pod template for each kind.
_TEMPLATES: t.Dict[str, t.Tuple[str, ...]] = {
    "Pod": (),
    **dict.fromkeys(
        ("Deployment", "DaemonSet", "StatefulSet", "ReplicaSet", "ReplicationController", "Job"),
        ("spec", "template"),
    ),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
_PODMAN_KINDS = ("Pod", "Deployment", "DaemonSet", "Job")
_PODMAN_ANNOTATION = "io.podman.annotations.userns"
_CRIO_ANNOTATIONS = ("userns-mode.crio.io", "io.kubernetes.cri-o.userns-mode")


class Pod:
    """An object that creates pods.

    :param location: its location, for messages
    :param entry: the object
    :param template: the pod in it
    :raises UnitError: a field is malformed
    """

    def __init__(self, location: str, kind: str, entry: yaml.Node, template: yaml.Node) -> None:
        self.location, self.kind = location, kind
        self._spec = t.cast(yaml.Node, _item(template, "spec"))
        self.private = _boolean(f"{location}: hostUsers", _item(self._spec, "hostUsers")) is False
        # podman uses the annotations of a deployment itself, the kubelet those of its template.
        name = _text(f"{location}: metadata.name", _item(entry, "metadata", "name")) or ""
        own = f"{_PODMAN_ANNOTATION}/{name if kind == 'Pod' else f'{name}-pod'}"
        self.podman = _annotation(location, entry, _PODMAN_ANNOTATION, own)
        self.podman_in_template = kind != "Pod" and bool(
            _annotation(location, template, _PODMAN_ANNOTATION)
        )
        self.crio = _annotation(location, template, *_CRIO_ANNOTATIONS)
        # podman kube play ignores the other kinds.
        self.made_by_podman = kind in _PODMAN_KINDS

    @property
    def images(self) -> t.List[str]:
        """The images of init containers and containers, without duplicates.

        :raises UnitError: there are none, or a container has none
        """
        images = []
        for key in ("initContainers", "containers"):
            for entry in _list(f"{self.location}: {key}", _item(self._spec, key)):
                node = _item(entry, "image")
                if (
                    not isinstance(node, yaml.ScalarNode)
                    or not node.value
                    or node.tag != f"{_TAG}str"
                ):
                    raise UnitError(f"{self.location}: one of {key} has no image")
                images.append(str(node.value))
        if not images:
            raise UnitError(f"{self.location} has no containers")
        return list(dict.fromkeys(images))

    def crio_options(self) -> t.Dict[str, t.Any]:
        """CRI-O's annotation as options of layer_template, see getSandboxIDMappings in its source.

        :raises UnitError: CRI-O would refuse it
        """
        kind, _colon, rest = (self.crio or "").partition(":")
        given = dict(part.partition("=")[::2] for part in rest.split(";") if rest)
        known = {"uidmapping", "gidmapping", "size", "keep-id", "map-to-root"}
        if kind not in ("auto", "private") or not all(given.values()) or set(given) - known:
            raise UnitError(
                f"{self.location}: {self.crio!r} is not a user namespace mode of CRI-O, such as auto:size=65536 "
                "or private:uidmapping=0:100000:65536"
            )
        user, group, groups = self._run_as()
        uids, gids = (
            given[key].split(",") if key in given else [] for key in ("uidmapping", "gidmapping")
        )
        if (uids or gids) and user is None:
            raise UnitError(
                f"{self.location}: CRI-O supports uidmapping and gidmapping only with runAsUser"
            )
        if kind == "private":
            if not uids and not gids:
                raise UnitError(
                    f"{self.location}: the maps of {self.crio!r} are defined in crio.conf, not in the manifest"
                )
            uids, gids = uids or list(gids), gids or list(uids)
            return {
                "uidmap": self._with(uids, [user]),
                "gidmap": self._with(gids, [group, *groups]),
            }
        keep, root = (given.get(key) == "true" for key in ("keep-id", "map-to-root"))
        if keep and root:
            raise UnitError(
                f"{self.location}: CRI-O does not support keep-id and map-to-root together"
            )
        if keep or root:
            uids += [f"{user if keep else 0}:{user}:1"] if user is not None else []
            gids += [f"{group if keep else 0}:{group}:1"] if group is not None else []
        else:
            uids, gids = self._with(uids, [user]), self._with(gids, [group])
        if keep:
            gids += [f"{number}:{number}:1" for number in groups]
        else:
            gids = self._with(gids, [*groups])
        size = given.get("size", "0")
        if not (size.isascii() and size.isdigit()):
            raise UnitError(f"{self.location}: size is {size!r}, not a number of IDs")
        options = [f"size={given['size']}"] if "size" in given else []
        options += [f"uidmapping={entry}" for entry in uids]
        options += [f"gidmapping={entry}" for entry in gids]
        return {"userns": ":".join(["auto", ",".join(options)]).rstrip(":")}

    def _run_as(self) -> t.Tuple[t.Optional[int], t.Optional[int], t.List[int]]:
        """The pod's user, group and supplementary groups, as passed by the kubelet."""
        context = _item(self._spec, "securityContext")
        user, group, filesystem = (
            _number(f"{self.location}: {key}", _item(context, key))
            for key in ("runAsUser", "runAsGroup", "fsGroup")
        )
        location = f"{self.location}: supplementalGroups"
        more = [
            _number(location, node)
            for node in _list(location, _item(context, "supplementalGroups"))
        ]
        return user, group, [number for number in (filesystem, *more) if number is not None]

    def _with(self, ranges: t.Sequence[str], ids: t.Iterable[t.Optional[int]]) -> t.List[str]:
        """The ranges, with an additional range for each host ID outside of them, at the lowest container ID after
        all."""
        result = list(ranges)
        for number in ids:
            try:
                parsed = [tuple(map(int, entry.split(":"))) for entry in result]
                inside = any(host <= (number or 0) < host + size for _id, host, size in parsed)
            except ValueError:
                raise UnitError(
                    f"{self.location}: {self.crio!r} has a range that is not CONTAINER:HOST:SIZE"
                ) from None
            if number is not None and not inside:
                end = max((start + size for start, _host, size in parsed), default=0)
                result.append(f"{end}:{number}:1")
        return result


class NotAManifest(UnitError):
    """The text is not YAML, or contains no Kubernetes object."""


def pods(name: str, text: str, notes: t.List[str]) -> t.List[Pod]:
    """All pods of a manifest, which may have several documents.

    :param notes: receives a line for each object that looks like a pod, but is not supported
    :raises NotAManifest: it is no manifest
    :raises UnitError: an object of it is malformed
    """
    found = []
    for number, node in enumerate(_documents(name, text)):
        if number >= _MOST_OBJECTS:
            raise UnitError(f"{name} has more than {_MOST_OBJECTS} documents")
        for kind, entry in _objects(name, node, 0, [_MOST_OBJECTS]):
            pod = _pod(f"{name}: {kind}", kind, entry, notes)
            if pod is not None:
                found.append(pod)
    return found


# Nodes of YAML


def _documents(name: str, text: str) -> t.List[yaml.Node]:
    if len(text) > _MOST_CHARACTERS:
        raise UnitError(
            f"{name} is larger than {_MOST_CHARACTERS // 1_000_000} MB, which is too large for a manifest"
        )
    if text.lstrip()[:1] in ("{", "["):
        # JSON allows tabs between tokens, which YAML forbids, and none inside strings.
        text = text.replace("\t", " ")
    try:
        # As bytes, because the parser does not support Ansible's string types.
        raw = text.encode()
        depth = 0
        for event in yaml.parse(raw, Loader=_LOADER):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > _DEEPEST:
                raise UnitError(f"{name} is nested more than {_DEEPEST} levels deep")
        nodes = list(yaml.compose_all(raw, Loader=_LOADER))
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise NotAManifest(f"{name} is neither a unit nor YAML: {error}") from error
    return [node for node in nodes if not _is_null(node)]


def _is_null(node: t.Optional[yaml.Node]) -> bool:
    return node is None or node.tag == f"{_TAG}null"


def _item(node: t.Optional[yaml.Node], *path: str) -> t.Optional[yaml.Node]:
    """The value below these keys; None if it is absent or null."""
    for key in path:
        node = _value(node, key, set())
        if _is_null(node):
            return None
    return node


def _value(node: t.Optional[yaml.Node], key: str, seen: t.Set[int]) -> t.Optional[yaml.Node]:
    # Each node once, because merged nodes may contain each other.
    if not isinstance(node, yaml.MappingNode) or id(node) in seen:
        return None
    seen.add(id(node))
    found: t.Optional[yaml.Node] = None
    merged: t.List[yaml.Node] = []
    for name, value in node.value:
        if isinstance(name, yaml.ScalarNode) and name.value == key:
            found = value
        elif name.tag == f"{_TAG}merge":
            merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
    if found is not None:
        return found
    return next(filter(None, (_value(entry, key, seen) for entry in merged)), None)


def _text(location: str, node: t.Optional[yaml.Node]) -> t.Optional[str]:
    if node is None:
        return None
    if not isinstance(node, yaml.ScalarNode) or node.tag != f"{_TAG}str":
        raise UnitError(f"{location} is not a text")
    return str(node.value)


def _list(location: str, node: t.Optional[yaml.Node]) -> t.List[yaml.Node]:
    if node is None:
        return []
    if not isinstance(node, yaml.SequenceNode):
        raise UnitError(f"{location} is not a list")
    return list(node.value)


def _number(location: str, node: t.Optional[yaml.Node]) -> t.Optional[int]:
    if node is None:
        return None
    text = node.value if isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}int" else ""
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) >= 2**32:
        raise UnitError(f"{location} is not an ID")
    return int(text)


def _boolean(location: str, node: t.Optional[yaml.Node]) -> t.Optional[bool]:
    if node is None:
        return None
    if not isinstance(node, yaml.ScalarNode) or node.tag != f"{_TAG}bool":
        raise UnitError(f"{location} is neither true nor false")
    return node.value.lower() in ("true", "yes", "on")


# Objects of Kubernetes


def _objects(
    name: str, node: yaml.Node, depth: int, left: t.List[int]
) -> t.Iterator[t.Tuple[str, yaml.Node]]:
    """The objects with their kinds; lists are expanded."""
    kind = _item(node, "kind")
    if not isinstance(kind, yaml.ScalarNode) or not kind.value:
        raise NotAManifest(
            f"{name} is neither a unit with a section [Container], [Pod] or [Kube] nor a manifest with a kind"
        )
    left[0] -= 1
    if left[0] < 0 or depth > _DEEPEST_LIST:
        raise UnitError(f"{name} has lists of more than {_MOST_OBJECTS} objects, or lists of lists")
    items = _item(node, "items")
    if isinstance(items, yaml.SequenceNode):
        for entry in items.value:
            yield from _objects(name, entry, depth + 1, left)
        return
    yield str(kind.value), node


def _pod(location: str, kind: str, entry: yaml.Node, notes: t.List[str]) -> t.Optional[Pod]:
    if kind not in _TEMPLATES:
        if isinstance(_item(entry, "spec", "template", "spec", "containers"), yaml.SequenceNode):
            notes.append(f"{location} has a pod template, but its kind is not supported")
        return None
    path = _TEMPLATES[kind]
    template = _item(entry, *path)
    if template is None or not isinstance(_item(template, "spec"), yaml.MappingNode):
        raise UnitError(f"{location} has no {'.'.join((*path, 'spec'))}")
    return Pod(location, kind, entry, template)


def _annotation(location: str, holder: t.Optional[yaml.Node], *names: str) -> t.Optional[str]:
    for name in names:
        found = _item(holder, "metadata", "annotations", name)
        if found is not None:
            return _text(f"{location}: annotation {name}", found)
    return None
