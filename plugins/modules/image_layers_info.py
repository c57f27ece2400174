#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: image_layers_info
short_description: List the layers of images with their actual disk usage
version_added: 1.0.0
description:
  - Lists the images of a container store with their layers, including the mapped layers. Mapped layers are ID-mapped copies of images for
    containers with user namespaces, and no podman command lists them.
  - A mapped layer is a copy of the whole image, but its record contains only the size of the image's top layer. This module measures the
    files on disk.
  - The module does not fail on a damaged store. Damaged items have a status and a description of the problem, and all other items are
    listed as usual. RV(contradictions) lists records that cannot be read, or that do not match each other or the files on disk.
  - The module does not change anything. It holds only shared locks of the store, for milliseconds.
extends_documentation_fragment:
  - userns.storage._attributes
  - userns.storage._attributes.info_module
  - userns.storage._attributes.actiongroup_store
  - userns.storage._store
options:
  images:
    description:
      - The images to list, by name, ID or digest, or by shell patterns for these such as V(quay.io/*).
      - References that match no image are ignored.
      - If empty, the module lists all images, and also RV(orphans).
    type: list
    elements: str
    default: []
  measure:
    description:
      - How to measure the disk usage.
      - V(none) does not read the contents of layers, and therefore detects neither V(damaged) nor V(foreign_root) layers.
      - V(apparent) adds up the file sizes. V(exclusive) also determines the number of bytes on disk that only this layer uses, which are
        the bytes that its removal frees. On filesystems that can share data, it reads the extents of every file.
    type: str
    choices: [none, apparent, exclusive]
    default: apparent
  verify:
    description:
      - Compare each mapped layer, entry by entry, with the image's own layer that it was created from. The comparison covers file types,
        owners, modes, sizes, device numbers, link targets, hard links, access control lists, capabilities and other attributes. It does not
        read the content of files.
      - A layer that differs has the status V(different), and RV(images[].mapped_layers[].verification) lists the differences.
      - The comparison reads both directory trees completely.
    type: bool
    default: false
seealso:
  - module: userns.storage.image_layers
  - module: userns.storage.layer_gc
  - module: userns.storage.layer_template
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Measure the actual disk usage of all layers on this host
  userns.storage.image_layers_info:
    measure: exclusive
  register: store

- name: Show the disk usage
  ansible.builtin.debug:
    msg: >-
      {{ store.totals.mapped.layers }} mapped layers hold {{ store.totals.mapped.exclusive | human_readable }},
      of which {{ store.totals.reclaimable | human_readable }} can be freed

- name: List the toolbox images of alice
  userns.storage.image_layers_info:
    images: "*/toolbox*"
    user: alice
"""

RETURN = r"""
images:
  description: The images, in the order of the store.
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
          description: The result of the comparison with the image. C(null) without O(verify), or if the layer cannot be read, in which case
            RV(images[].mapped_layers[].problem) contains the reason.
          type: dict
          contains:
            entries:
              description: The number of entries in the image.
              type: int
            different:
              description: The number of entries that differ, or are missing from the layer or from the image.
              type: int
            times_only:
              description: The number of entries that differ only in their modification time. These do not count as damage, because some
                runtimes change the modification times of directories.
              type: int
            differences:
              description: The first 20 entries that differ.
              type: list
              elements: dict
              contains:
                path:
                  description: The path of the entry, relative to the root of the image.
                  type: str
                problems:
                  description: Descriptions of the differences.
                  type: list
                  elements: str
                  sample: ['belongs to 0:0, not to 100000:100000']
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
orphans:
  description:
    - Items that use disk space or a name and belong to no image. Empty if O(images) is set.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description:
        - V(directory) for data without a record; V(link) for a short name of the overlay driver without a target; V(staging), V(trash) and
          V(records) for files of an interrupted run of this collection; V(layer) for a mapped layer that no image lists, with all keys of
          RV(images[].mapped_layers).
      type: str
    id:
      description: The ID of the layer, or the name of the item.
      type: str
    path:
      description: The path of the item. C(null) for V(layer).
      type: str
    age:
      description: The number of seconds since the last change.
      type: int
    size_apparent:
      description: The apparent size of the files in bytes. C(null) if O(measure=none).
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
used_as:
  description:
    - How this host is known to use the store, as its main store or as a store that other stores read. The module reads the configuration of
      podman and CRI-O, and for a rootless store that of its user. It does not read the configuration of other users.
    - If there is an entry of a kind other than V(main), containers of other stores may use the layers. M(userns.storage.layer_gc) then only
      removes layers that are listed in O(userns.storage.layer_gc#module:layers), see O(userns.storage.layer_gc#module:shared).
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description: V(main) if the program creates containers in the store, V(imagestore) if it stores the images of another store,
        V(additional) if it is an additional image store of another store, V(declared) if the marker file declares that other stores use it,
        V(mounted) if a container of another store that uses its layers is mounted, V(unknown) if a file of the configuration cannot be read.
      type: str
      sample: additional
    program:
      description: V(cri-o) for the configuration of CRI-O, V(podman) for C(storage.conf), which other programs also read. Empty for
        V(declared) and V(mounted).
      type: str
      sample: cri-o
    source:
      description: The file or environment variable that configures this use, V(default), or the mount point.
      type: str
      sample: /etc/crio/crio.conf.d/50-userns-storage.conf
    description:
      description: A description of the use.
      type: str
      sample: /etc/crio/crio.conf.d/50-userns-storage.conf lists this store in storage_option
contradictions:
  description:
    - Records of the store that do not match each other or the files on disk, for example after a power failure or a partially restored
      backup. Empty for a consistent store.
    - While this list is not empty, M(userns.storage.layer_gc), M(userns.storage.image_layers) and M(userns.storage.layer_template) remove
      nothing from the store.
  returned: always
  type: list
  elements: dict
  contains:
    kind:
      description:
        - V(unreadable) for a file of records or a database of podman that cannot be read; V(empty) for a file of records without content;
          V(foreign) for a file that contains records of another type; V(duplicate) for two files that describe the same ID differently;
          V(no_record) for a layer, image or container that is referenced but has no record; V(no_data) if none of the recorded layers is on
          disk; V(no_owner) for a layer that may be in use but that no record references.
      type: str
      sample: no_record
    path:
      description: The path of the inconsistent file or directory.
      type: str
      sample: /var/lib/containers/storage/overlay-containers/containers.json
    problem:
      description: A description of the inconsistency.
      type: str
      sample: container db (3f1c9a7be0d4) has layer 9b2f6c01d7aa, which has no record
    hint:
      description: How to solve the problem.
      type: str
    ids:
      description: The IDs of the affected layers, images and containers.
      type: list
      elements: str
totals:
  description: Sums over all layers of the listed images, counting each layer once.
  returned: always
  type: dict
  contains:
    recorded:
      description: The size in bytes according to the records.
      type: int
    apparent:
      description: The apparent size of the files in bytes.
      type: int
    exclusive:
      description: The number of bytes on disk that are used by a single layer. Data that layers share with each other is not included.
      type: int
    inodes:
      description: The number of inodes that the layers use.
      type: int
    mapped:
      description: The same sums for the mapped layers only.
      type: dict
      contains:
        layers:
          description: The number of mapped layers.
          type: int
        recorded:
          description: The size in bytes according to the records.
          type: int
        apparent:
          description: The apparent size of the files in bytes.
          type: int
        exclusive:
          description: The number of bytes on disk that are used by a single layer.
          type: int
        inodes:
          description: The number of inodes that these layers use.
          type: int
    reclaimable:
      description: The number of bytes that the removal of all mapped layers without containers frees. Requires O(measure=exclusive).
      type: int
    reclaimable_inodes:
      description: The number of inodes that the removal of these layers frees.
      type: int
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
from ansible_collections.userns.storage.plugins.module_utils._module import (
    STORE_ARGUMENTS,
    STORE_EXCLUSIVE,
    run,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    image_layers_info,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {"type": "list", "elements": "str", "default": []},
            "measure": {
                "type": "str",
                "choices": ["none", "apparent", "exclusive"],
                "default": "apparent",
            },
            "verify": {"type": "bool", "default": False},
            **STORE_ARGUMENTS,
        },
        mutually_exclusive=STORE_EXCLUSIVE,
        supports_check_mode=True,
    )
    params = module.params
    run(
        module,
        lambda store: image_layers_info.InfoRequest(
            store=store,
            images=tuple(params["images"]),
            measure=params["measure"],
            verify=params["verify"],
        ),
        image_layers_info.info,
    )


if __name__ == "__main__":
    main()
