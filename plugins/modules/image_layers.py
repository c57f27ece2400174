#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: image_layers
short_description: Pull or remove an image and all its layers
version_added: 1.0.0
description:
  - Pulls an image from a registry, an archive or a directory into a container store, and sets its names.
  - Removes an image with all its layers, mapped layers first. Layers that other images share are kept.
  - The module pulls images with C(skopeo) on the host, or with C(podman) if C(skopeo) is not installed.
  - With a user namespace, such as O(userns=keep-id), it pulls the image so that the image's own layers carry the map, which means that
    their files have the owners that containers in this user namespace need. These containers then start without a copy, and no second copy
    of the image takes up space.
extends_documentation_fragment:
  - userns.storage._attributes
  - userns.storage._attributes.actiongroup_store
  - userns.storage._mapping.userns
  - userns.storage._store
attributes:
  check_mode:
    support: full
    details:
      - Writes nothing. The module queries O(source) to determine whether its image differs from the image in the store, and which of its
        layers are in the store with another map.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  images:
    description:
      - With O(state=present), the names of the image after the task, such as V(localhost/app:1). Names without a registry are completed
        with V(localhost/) if O(source) is set, and with V(docker.io/) otherwise. If another image has such a name, the name moves to this
        image.
      - Names are recorded in the same form as by the runtimes. V(docker.io/redis) becomes V(docker.io/library/redis:latest).
      - Without O(source), each name stands for an image of its own, which is pulled from the registry in the name.
      - With O(state=absent), names, IDs or digests. If an image has further names, only the given name is removed. With an ID or a digest,
        the image is removed with all its names.
    type: list
    elements: str
    required: true
    aliases: [image, name]
  source:
    description:
      - The source of the image in the format of C(skopeo copy), such as V(oci:/srv/images/app:1), V(oci-archive:/srv/app.tar),
        V(docker-archive:/srv/app.tar), V(dir:/srv/app) or V(docker://registry.example.org/app:1).
      - The owner of the store must be able to read the source.
    type: str
  state:
    description:
      - V(present) pulls the image into the store and sets its names.
      - V(absent) removes the image. It fails while containers use the image, including stopped containers and containers of other programs.
    type: str
    choices: [present, absent]
    default: present
  pull:
    description:
      - When to pull an image if the store already contains an image with one of the names. V(missing) never pulls it, V(newer) pulls it if
        the source has a different image, and V(always) pulls it in any case.
      - The module reports a change only if the result is a different image or a different name.
    type: str
    choices: [missing, newer, always]
    default: missing
  authfile:
    description:
      - Path on the host of a file with credentials for registries, in the format of C(podman login --authfile). The owner of the store must
        be able to read it.
      - If not set, the module uses E(REGISTRY_AUTH_FILE) from the environment of the task if the owner of the store can read that file, and
        otherwise the credentials that C(podman login) of the owner saved.
      - Mutually exclusive with O(username).
    type: path
  username:
    description:
      - The user name for the registry of each image.
    type: str
  password:
    description:
      - The password or token for O(username).
      - While the image is pulled, the module keeps the credentials in memory. They are not written to any file and do not appear in the
        command line of any process. Root and the owner of the store can read them during this time, so use credentials that this user may
        know.
    type: str
  convert:
    description:
      - Whether to change images that are already in the store with another map, or without a map, in place. Requires one of the options
        O(userns), O(uidmap), O(gidmap), O(subuidname) and O(subgidname).
      - The module changes the owners of all files and the records of all layers while the store is locked, so that other programs wait.
        RV(conversions[].expected_lock_seconds) is an estimate of this time, also in check mode. The conversion needs no disk space for a copy.
      - If the task is killed or the host loses power while the store is locked, the images are lost and must be pulled again, and nothing else is
        lost. Do not convert an image that cannot be pulled or built again.
      - The module fails, changes nothing and names the cause if a container of any program uses an image, if an image is mounted or shared by
        M(userns.storage.shared_images), if images that are not listed in O(images) share its layers, also images of an additional image store,
        or if it has files of IDs that are not in the map.
      - Mapped layers of the image for the same map, and mapped layers of which a part is in the image's own layers, are removed. The runtime
        creates them again if it needs them.
    type: bool
    default: false
  measure:
    description:
      - How to measure the layers, as in M(userns.storage.image_layers_info).
    type: str
    choices: [none, apparent, exclusive]
    default: apparent
notes:
  - With one of the options O(userns), O(uidmap), O(gidmap), O(subuidname) and O(subgidname), O(state=present) also means that all layers of
    the image carry the map in the form in which O(runtime) requests it. The module verifies this in the records of the store. If an image
    has another map, the module fails, changes nothing, and returns the map of each layer in RV(mappings). If the runtime shifts IDs at
    mount time, or the user namespace changes no ID, the layers must not carry a map. With O(state=absent), these options have no effect.
  - The module then pulls with C(buildah), or with C(podman) if C(buildah) is not installed. podman pulls an image with a map only for a
    container, so the module creates a container that never starts and removes it again.
  - A layer inherits the map of the layer below it. If the store already contains the lower layers of an image with another map, because
    another image shares them, the image cannot get the map, and the module fails before it pulls the image. Only if C(skopeo) is not
    installed does the module detect this after the pull.
  - An image has a single map. For containers with another map or without a user namespace, the runtimes copy it, see
    RV(images[].identity_copy). Use M(userns.storage.layer_template) for images whose containers have several maps.
  - O(userns=auto) cannot be used, because each container gets a range of IDs of its own.
seealso:
  - module: userns.storage.image_layers_info
  - module: userns.storage.layer_gc
  - module: userns.storage.layer_template
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Pull an image from an archive
  userns.storage.image_layers:
    images:
      - localhost/app:1
      - localhost/app:stable
    source: oci-archive:/srv/images/app-1.tar

- name: Keep an image up to date with its registry
  userns.storage.image_layers:
    image: docker.io/library/postgres:17
    pull: newer

- name: Pull an image from a registry that requires a login
  userns.storage.image_layers:
    image: registry.example.org/toolbox:latest
    username: robot
    password: "{{ registry_token }}"
  vars:
    registry_token: a token from a vault

- name: Let alice's keep-id containers start without a copy, even if the image has been pulled before
  userns.storage.image_layers:
    image: registry.example.org/toolbox:latest
    userns: keep-id
    convert: true
    user: alice

- name: Remove an image with all its mapped layers
  userns.storage.image_layers:
    image: localhost/app:1
    state: absent
"""

RETURN = r"""
images:
  description:
    - The images, as returned by M(userns.storage.image_layers_info). With O(state=absent), their state before the removal.
    - In check mode, images that do not exist yet are omitted.
  returned: always
  type: list
  elements: dict
  contains:
    id:
      description: The ID of the image.
      type: str
      sample: 5d0da3dc976460b72c77d94c8a1ad043720b0416bfc16c52c45d4847e53fadb6
    names:
      description: The names of the image.
      type: list
      elements: str
      sample: [docker.io/library/postgres:17]
    digests:
      description: The digests of the image's manifests.
      type: list
      elements: str
    created:
      description: The time at which the image's record was created, in RFC 3339 format in UTC.
      type: str
      sample: '2026-03-01T12:00:00Z'
    read_only_store:
      description: The additional image store that contains the image. C(null) for an image in the store itself.
      type: str
    problem:
      description: A description of the damage to the image's own layers. C(null) if they are intact.
      type: str
    uidmap:
      description:
        - The UID map that the image's own layers carry, in the order of the record. Empty if they carry no map, as usual. If the layers
          have different maps, it is the map of the top layer.
      type: list
      elements: str
    gidmap:
      description: The GID map that the image's own layers carry, in the same way as C(uidmap).
      type: list
      elements: str
    identity_copy:
      description:
        - The ID of the layer in RV(images[].mapped_layers) that has no map, although the image's own layers carry a map. Containers without
          a user namespace use it. It is a full copy of the image, and its sizes are in that list. C(null) if there is none.
      type: str
    layers:
      description: The image's own layers, starting with the top layer.
      type: list
      elements: dict
      contains: &layer
        id:
          description: The ID of the layer.
          type: str
        uidmap:
          description: The UID map with which the files of the layer are stored, in the order of the record. Empty if there is no map.
          type: list
          elements: str
          sample: ['0:100000:65536']
        gidmap:
          description: The GID map with which the files of the layer are stored, in the order of the record. Empty if there is no map.
          type: list
          elements: str
        created:
          description: The time at which the layer was created, in RFC 3339 format in UTC.
          type: str
        recorded_size:
          description: The size in bytes according to the layer's record, which C(podman images) and C(podman system df) add up.
          type: int
        size_apparent:
          description:
            - The apparent size of the layer's files in bytes, counting hard-linked files once. C(null) if O(measure=none) or if the layer
              cannot be read.
          type: int
        size_exclusive:
          description:
            - The number of bytes on disk that only this layer uses. C(null) if O(measure=none), V(0) if O(measure=apparent).
          type: int
        size_exclusive_min:
          description: The minimum number of bytes that a removal frees. It equals C(size_exclusive) if the filesystem provides the exact
            number. Otherwise the number of freed bytes lies between the minimum and the maximum.
          type: int
        size_exclusive_max:
          description: The maximum number of bytes that a removal frees. It equals C(size_exclusive) if the filesystem provides the exact
            number. Otherwise the number of freed bytes lies between the minimum and the maximum.
          type: int
        inodes:
          description: The number of inodes that the layer uses. C(null) if O(measure=none).
          type: int
        status:
          description:
            - V(ok); V(missing) for a record without data or an entry without a record; V(incomplete) for a layer whose creation never
              finished; V(damaged) for data that no runtime can use, or whose owners are still those of the image; V(foreign_root) if the
              root directory or a name in it belongs to IDs outside the map; V(different) if the layer differs from the image, see
              O(userns.storage.image_layers_info#module:verify); V(newer_format) for data in a format that this version of the collection
              does not support and therefore does not check.
          type: str
        problem:
          description: A description of the status. C(null) for V(ok).
          type: str
        containers:
          description: The containers that use the layer, running or not, of all programs.
          type: list
          elements: dict
          contains: &container
            id:
              description: The ID of the container.
              type: str
            name:
              description: The name of the container.
              type: str
            known_to_podman:
              description: Whether podman created the container. Only C(podman ps --external) lists containers of buildah, CRI-O and other
                programs.
              type: bool
    mapped_layers:
      description:
        - The mapped layers of the image, in the order of the record. Each has the keys of RV(images[].layers) and the following keys.
      type: list
      elements: dict
      contains:
        <<: *layer
        duplicate_of:
          description: The ID of another layer of the image with the same or an equivalent map, if this layer is a duplicate of it. C(null)
            otherwise.
          type: str
        depends_on:
          description: The IDs of the layers whose data on disk this layer needs. They cannot be removed before this layer.
          type: list
          elements: str
        origin:
          description: V(ours) if M(userns.storage.layer_template) created the layer, otherwise V(runtime).
          type: str
        last_used:
          description: The time at which this collection last saw the layer in use, in RFC 3339 format in UTC. C(null) if it never did.
          type: str
        lease:
          description: The time until which the layer is kept even if no container uses it. C(null) without a lease.
          type: str
        verification:
          description: This module does not determine this value. It is always C(null).
          type: dict
    removal:
      description:
        - The effect of removing the image with O(userns.storage.image_layers#module:state=absent). C(null) if containers use the image or
          if it is in a read-only store.
      type: dict
      contains:
        layers:
          description: The IDs of the layers that are removed with the image, mapped layers first. Layers that other images need are kept.
          type: list
          elements: str
        size_apparent:
          description: The apparent size of the files of these layers in bytes. C(null) if O(measure=none).
          type: int
        size_exclusive:
          description: The number of bytes that the removal frees, as precisely as the filesystem allows. It includes data that only these
            layers share with each other. C(null) unless O(measure=exclusive).
          type: int
        size_exclusive_min:
          description: The minimum number of bytes that the removal frees. C(null) unless O(measure=exclusive).
          type: int
        size_exclusive_max:
          description: The maximum number of bytes that the removal frees. C(null) unless O(measure=exclusive).
          type: int
        inodes:
          description: The number of inodes that the removal frees. C(null) unless O(measure=exclusive).
          type: int
    private_copies:
      description:
        - Containers whose own layer contains another full copy of the image with a different map, such as containers on images in read-only
          stores.
      type: list
      elements: dict
      contains:
        <<: *container
        layer:
          description: The ID of the container's layer.
          type: str
        size_apparent:
          description: The apparent size of the files in bytes.
          type: int
        size_exclusive:
          description: The number of bytes on disk that are not shared with anything else.
          type: int
        size_exclusive_min:
          description: The minimum number of bytes that a removal frees. It equals C(size_exclusive) if the filesystem provides the exact
            number. Otherwise the number of freed bytes lies between the minimum and the maximum.
          type: int
        size_exclusive_max:
          description: The maximum number of bytes that a removal frees. It equals C(size_exclusive) if the filesystem provides the exact
            number. Otherwise the number of freed bytes lies between the minimum and the maximum.
          type: int
        inodes:
          description: The number of inodes in use.
          type: int
mappings:
  description: The map that the own layers of each image carry, or will carry in check mode, and the map that they must carry.
  returned: O(state=present), when one of the options O(userns), O(uidmap), O(gidmap), O(subuidname) and O(subgidname) is set
  type: list
  elements: dict
  contains:
    image_id:
      description: The ID of the image. Empty if the image is not in the store and C(skopeo) is not installed.
      type: str
    image_names:
      description: The names from O(images).
      type: list
      elements: str
    uidmap:
      description: The UID map that the layers must carry, in the form in which the runtime writes it. Empty for no map.
      type: list
      elements: str
      sample: ["0:1:1000", "1000:0:1", "1001:1001:64536"]
    gidmap:
      description: The GID map that the layers must carry, in the form in which the runtime writes it. Empty for no map.
      type: list
      elements: str
    status:
      description:
        - V(mapped) if all layers carry the map; V(not_needed) if no map is needed and the layers carry none; V(different) if a layer carries
          another map. The module then fails.
      type: str
    reason:
      description: A description of the reason.
      type: str
    layers:
      description:
        - The image's own layers in the store, starting with the top layer. For an image that is not in the store, the lower layers that its
          pull would reuse.
      type: list
      elements: dict
      contains:
        id:
          description: The ID of the layer.
          type: str
        uidmap:
          description: The UID map with which the files of the layer are stored, in the order of the record. Empty if there is no map.
          type: list
          elements: str
          sample: ['0:100000:65536']
        gidmap:
          description: The GID map with which the files of the layer are stored, in the order of the record. Empty if there is no map.
          type: list
          elements: str
        images:
          description: The other images that share the layer, at most 100.
          type: list
          elements: str
conversions:
  description: The images that were changed in place, or would be changed in check mode. Images that share layers are changed together.
  returned: O(state=present), when one of the options O(userns), O(uidmap), O(gidmap), O(subuidname) and O(subgidname) is set
  type: list
  elements: dict
  contains:
    images:
      description: The IDs of the images.
      type: list
      elements: str
    layers:
      description: The IDs of the layers that get the map, starting with the lowest.
      type: list
      elements: str
    removed_layers:
      description: The IDs of mapped layers that are removed.
      type: list
      elements: str
    inodes:
      description: The number of files and directories that get another owner.
      type: int
    expected_lock_seconds:
      description: The estimated time during which the store is locked, in seconds. It is measured by reading the layers.
      type: float
    lock_seconds:
      description: The time during which the store was locked, in seconds. C(0) in check mode.
      type: float
actions:
  description: The actions that were performed, or would be performed in check mode. They are V(converted), V(pulled), V(tagged),
    V(untagged) and V(removed).
  returned: always
  type: list
  elements: str
removed_layers:
  description: The IDs of the removed layers, in the order of removal.
  returned: O(state=absent)
  type: list
  elements: str
stores:
  description:
    - The results for the single stores, each with its user and the keys that the module returns without O(users).
    - A store in which the module could not work has only the keys C(user) and C(error).
    - Outside of this list, the module returns the lists of all stores together, with the key C(user) in each entry, and the sums of all
      numbers.
  returned: with O(users)
  type: list
  elements: dict
  contains:
    user:
      description: The owner of the store, V(root) for the rootful store.
      type: str
    error:
      description: The reason why the module failed for this store.
      returned: when it failed
      type: str
store:
  description: The store that the module used.
  returned: without O(users)
  type: dict
  contains:
    graphroot:
      description: The graph root of the store.
      type: str
    runroot:
      description: The run root of the store.
      type: str
    driver:
      description: The graph driver of the store.
      type: str
    backing_filesystem:
      description: The filesystem of the graph root.
      type: str
    rootless:
      description: Whether the store is a user's rootless store.
      type: bool
    shifting:
      description: This module does not determine this value. It is always C(null).
      type: bool
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._mappings import (
    MAPPING_EXCLUSIVE,
    USERNS_ARGUMENTS,
    read_userns,
)
from ansible_collections.userns.storage.plugins.module_utils._module import (
    STORE_ARGUMENTS,
    STORE_EXCLUSIVE,
    run_outside,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    image_layers,
    image_tools,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {
                "type": "list",
                "elements": "str",
                "required": True,
                "aliases": ["image", "name"],
            },
            "source": {"type": "str"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "pull": {
                "type": "str",
                "choices": ["missing", "newer", "always"],
                "default": "missing",
            },
            "authfile": {"type": "path"},
            "username": {"type": "str"},
            "password": {"type": "str", "no_log": True},
            "measure": {
                "type": "str",
                "choices": ["none", "apparent", "exclusive"],
                "default": "apparent",
            },
            "convert": {"type": "bool", "default": False},
            **USERNS_ARGUMENTS,
            **STORE_ARGUMENTS,
        },
        mutually_exclusive=[*MAPPING_EXCLUSIVE, *STORE_EXCLUSIVE, ("authfile", "username")],
        required_together=[("username", "password")],
        required_if=[("convert", True, tuple(USERNS_ARGUMENTS), True)],
        supports_check_mode=True,
    )
    params = module.params
    run_outside(
        module,
        lambda store: image_layers.ImagesRequest(
            store=store,
            images=tuple(params["images"]),
            source=params["source"] or "",
            state=params["state"],
            pull=params["pull"],
            measure=params["measure"],
            check=module.check_mode,
            credentials=image_tools.Credentials(
                params["authfile"] or "", params["username"] or "", params["password"] or ""
            ),
            mapping=read_userns(params),
            convert=params["convert"],
        ),
        image_layers.declare,
    )


if __name__ == "__main__":
    main()
