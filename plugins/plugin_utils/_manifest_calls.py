# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Calls of layer_template for the pods of Kubernetes manifests, as podman kube play and the kubelet run them."""

from __future__ import annotations

import typing as t

from ansible_collections.userns.storage.plugins.plugin_utils import _manifests, _units
from ansible_collections.userns.storage.plugins.plugin_utils._layer_calls import (
    Call,
    Mapping,
    Settings,
    checked_image,
)
from ansible_collections.userns.storage.plugins.plugin_utils._units import UnitError


class ManifestReader:
    """Reads manifests with the same settings."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def calls(
        self, name: str, text: str, podman: bool = False, userns: t.Optional[str] = None
    ) -> t.List[Call]:
        """Calls of a manifest's pods.

        :param podman: whether podman kube play reads it, regardless of the runtime
        :param userns: the namespace of all pods, which overrides their annotations
        """
        podman = podman or self._settings.runtime.startswith("podman")
        result = []
        for pod in _manifests.pods(name, text, self._settings.notes):
            mappings = self._by_podman(pod, userns) if podman else self._by_kubelet(pod)
            if not mappings and not pod.private:
                continue
            # A pod without images is an error, whether or not it has a map.
            images = [self._image_of_pod(pod, image) for image in pod.images]
            if not podman and self._settings.pause_image:
                images.append(self._settings.pause_image)
            if mappings:
                result.append({"images": list(dict.fromkeys(images)), "mappings": mappings})
        return result

    def _by_podman(self, pod: _manifests.Pod, userns: t.Optional[str]) -> t.List[Mapping]:
        value = userns or pod.podman
        if pod.podman_in_template and not value:
            self._settings.notes.append(
                f"{pod.location}: podman reads the annotation for the user namespace in metadata of the "
                f"{pod.kind}, not in its template"
            )
        if not value and pod.podman is None and pod.private:
            value = "auto"
        if value == "private" and not userns:
            value = "auto"
        mapping = self._settings.checked(pod.location, {"userns": value} if value else {})
        if mapping and not pod.made_by_podman:
            self._settings.notes.append(
                f"{pod.location}: podman kube play does not create pods of a {pod.kind}"
            )
            return []
        return [mapping] if mapping else []

    def _by_kubelet(self, pod: _manifests.Pod) -> t.List[Mapping]:
        runtime = self._settings.runtime or "cri-o"
        if pod.private:
            # The kubelet sends the map, and CRI-O ignores the annotation.
            return self._kubelet_mappings(pod, runtime)
        if pod.crio is None or pod.crio == "host":
            return []
        mapping = self._settings.checked(pod.location, pod.crio_options())
        return [{**mapping, "runtime": runtime}] if mapping else []

    def _kubelet_mappings(self, pod: _manifests.Pod, runtime: str) -> t.List[Mapping]:
        """The known maps that the kubelet assigns to a node's pods."""
        kubelet = self._settings.kubelet
        if kubelet.is_random:
            self._settings.notes.append(
                f"{pod.location}: no mapping, because the kubelet gives each new pod a random range of its IDs, so "
                "layers cannot be created in advance for it. On overlay with Linux 5.19 or later it needs none. Pass "
                "the files /var/lib/kubelet/pods/*/userns in pod_maps for the pods that exist"
            )
        elif kubelet.has_no_pods:
            self._settings.notes.append(
                f"{pod.location}: no mapping, because pod_maps is empty: no pod of this node has a user namespace"
            )
        elif kubelet.covers_ranges:
            self._settings.notes.append(
                f"{pod.location}: the kubelet selects a range at random. The {self._settings.slots} ranges from "
                "first_id on are only of use if the kubelet has no others"
            )
        return [{**mapping, "runtime": runtime} for mapping in kubelet.maps]

    def _image_of_pod(self, pod: _manifests.Pod, image: str) -> str:
        location = f"{pod.location}: image {image}"
        if "{{" in image:
            raise UnitError(f"{location} has a template: render the manifest first")
        return checked_image(
            pod.location, _units.expand_variables(location, image, self._settings.variables)
        )
