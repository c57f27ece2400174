#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: layer_gc
short_description: Remove unused mapped layers
version_added: 1.0.0
description:
  - Removes mapped layers, which are ID-mapped copies of images for containers with user namespaces. No podman command removes a mapped
    layer while its image exists.
  - A layer is removed if at least one rule selects it and nothing protects it. Each rule selects layers independently of the other rules.
    If no rule is set, nothing is removed, and RV(would_free) lists how much each rule would free.
  - The module never removes a layer that a container or another layer uses, running or not and of any program; an image's own layer;
    anything in a read-only store; a layer with a lease; and layers that O(keep_images), O(keep_mappings) and O(min_age) protect.
  - Layers are removed in this order, duplicates, layers with maps that no user can use any more, the layers that have been unused for the
    longest time, and the largest layers. The order matters for the rules for space and for the limits.
  - Runtimes do not record when a layer was last used. Each run of a module of this collection therefore records the layers in use in the
    collection's own ledger. Containers that are created and removed between two runs are detected by their traces on the layer, which are
    the access time of a file that runtimes read, and the generation of a btrfs subvolume.
  - The clock of the host counts as unreliable after it was set, or after the host was off for a long time. The module then removes nothing
    because of its age, no lease ends, and O(min_age) protects all layers that were not observed for that time. RV(notes) reports this. The
    clock counts as reliable again once it is back to the right time, or after a day in which modules examined the store.
  - The module detaches a layer under the locks of the store, which takes milliseconds, and deletes its files without holding the locks.
  - The module removes nothing from a store whose records do not match each other or the files on disk. It then fails if it was to remove
    anything, and RV(contradictions) lists the inconsistencies.
extends_documentation_fragment:
  - userns.storage._attributes
  - userns.storage._attributes.action
  - userns.storage._attributes.actiongroup_store
  - userns.storage._store
attributes:
  check_mode:
    support: full
    details:
      - Writes nothing, and returns the same plan with predicted numbers.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  images:
    description:
      - Remove only layers of these images, given by name, ID, or shell patterns for these such as V(quay.io/*).
    type: list
    elements: str
    default: []
  layers:
    description:
      - A rule. Removes these layers, by the IDs that M(userns.storage.image_layers_info) returns. Missing layers are ignored.
    type: list
    elements: str
    default: []
  keep_images:
    description:
      - Protects the layers of these images.
    type: list
    elements: str
    default: []
  keep_mappings:
    description:
      - Protects layers with these maps. V(0:100000:65536) is matched against the UID map and against the GID map, with ranges separated by
        commas. V(0:1:1000,1000:0:1/0:1:100,100:0:1) is matched against both maps together. Shell patterns such as V(0:100000:*) are
        supported.
    type: list
    elements: str
    default: []
  min_age:
    description:
      - Protects layers that were created or seen in use more recently than this. It protects layers of containers that are being created or
        recreated.
      - Ages have the format of M(ansible.builtin.find), for example V(90s), V(10m), V(2h), V(3d) or V(2w). A number without a unit is in
        seconds.
    type: str
    default: 10m
  duplicates:
    description:
      - A rule. Removes layers if their image has another layer with the same or an equivalent map.
      - Keeps layers of this collection with equivalent maps as long as neither a container nor a layer of the runtime shows which form of
        the map the runtime uses, because old versions of podman need a layer for each form.
      - Old versions of podman write the same map in several forms and may create such a layer again.
    type: bool
    default: false
  unusable_maps:
    description:
      - A rule. Removes layers with ranges that are no longer in C(/etc/subuid) and C(/etc/subgid). For a rootless store these are the
        ranges of its user, for the rootful store the ranges of all users.
    type: bool
    default: false
  unused_for:
    description:
      - A rule. Removes layers that were not in use for this long.
      - Only time in which the store was observed counts. This is the time between two runs of any of these modules that are at most 36
        hours apart, so run one of the modules at least once a day. Time in which the host was off or the store was not observed does not
        count for any layer, and neither does a change of the clock. RV(notes) lists such gaps and the earliest time from which the rule has
        an effect.
      - On a filesystem mounted with C(relatime), which is the default, a layer may count as used for up to one day longer than it was. With
        C(noatime) and the drivers overlay and vfs, only time in which no container was created or removed counts, and RV(notes) reports
        this.
      - Reading the files of a layer counts as a use, for example by a backup of the store.
    type: str
  created_before:
    description:
      - A rule. Removes layers that were created before this, given as an age such as V(4w) or as a date such as V(2026-03-01T12:00:00Z).
      - It has no effect while the clock of the host is unreliable.
    type: str
  max_copies_per_image:
    description:
      - A rule. Maximum number of mapped layers per image. Protected layers are counted first.
    type: int
  max_used_space:
    description:
      - A rule. Removes layers until all mapped layers together use no more than this.
      - Sizes have the format V(10G), V(512MB), V(1.5GiB), or are in bytes. V(10%) is a percentage of the filesystem.
      - If O(images) or O(origin=ours) is set, only the layers that these select are counted.
    type: str
  min_free_space:
    description:
      - A rule. Removes layers until this much of the filesystem is free. If it is already free, the rule removes nothing.
    type: str
  high_threshold:
    description:
      - A rule, used together with O(low_threshold). If the usage of the filesystem reaches this percentage, in bytes or in inodes, the rule
        removes layers until the usage is down to O(low_threshold).
    type: float
  low_threshold:
    description:
      - The percentage of usage at which the rule O(high_threshold) stops removing layers. Both options must be set together.
    type: float
  superseded_images:
    description:
      - Removes images that were superseded more than this long ago, with all their layers. An image is superseded if newer images took all
        its names, for example because the image was pulled again or rebuilt. Each update of an image leaves such an image and its mapped
        layers.
      - An image counts as superseded from the time at which the image that took one of its names was pulled or built. If no image has these
        names, the image's own time counts.
      - Keeps images that a container of any program uses, on which other images are based, that O(keep_images) selects by a former name or
        that O(images) does not select, whose mapped layers have a lease or were seen in use since, and all images in stores that other
        stores read. It has no effect while the clock of the host is unreliable.
      - Images that never had a name, such as those of a build cache, are not removed. See C(podman image prune).
    type: str
  reserved_space:
    description:
      - A limit. Stops all rules once the mapped layers use no more than this.
    type: str
  max_freed:
    description:
      - A limit. Stops all rules once this much space is freed.
    type: str
  origin:
    description:
      - With V(ours), remove only layers that M(userns.storage.layer_template) created, and keep all layers that runtimes created.
    type: str
    choices: [any, ours]
    default: any
  shared:
    description:
      - Whether other stores use this store as an additional image store. Their containers may use layers of this store without any record
        in it. In a shared store, only the rule O(layers) removes layers, and O(broken) does not repair layers that containers may use.
      - If not set, the module looks for a file C(userns-storage/shared) in the graph root, for C(additionalimagestores) in C(storage.conf)
        and its drop-ins below C(/etc/containers), C(/usr/share/containers) and C(~/.config/containers) of its own user, for
        C(storage_option) in the configuration of CRI-O, for C(imagestore) in both, and for mounted containers of other stores. It cannot
        see the configuration of other users. In a store that others use, create the file with C(touch
        GRAPHROOT/userns-storage/shared), or set this option to V(true).
      - With V(false), all rules apply, even if the store appears to be shared.
    type: bool
  orphans:
    description:
      - What to do with layer directories without a record, short names without a target, and complete mapped layers that no image lists.
        The last are only considered one day after their creation.
      - Files that an interrupted run of this collection left behind are removed by any run that may remove something.
    type: str
    choices: [report, remove]
    default: report
  broken:
    description:
      - What to do with mapped layers that are missing or unusable. V(repair) removes entries of missing layers from the image's record,
        which cause C(podman images) to fail for the whole store. It also removes mapped layers without usable data, mapped layers with
        names that belong to IDs outside their map (V(foreign_root)), and layers whose creation never finished.
      - An image's own layers are never changed.
    type: str
    choices: [report, repair]
    default: report
  time_limit:
    description:
      - Start no further removal after this many seconds, and return the number of remaining items in RV(remaining). This option is intended
        for maintenance windows.
      - A removal in progress is completed, and each run removes at least one item. The time for examining the store before the removal is
        not limited.
      - The next run creates a new plan, to which O(max_freed) applies again.
      - If not set, the task continues with the same plan until it is complete, and displays its progress for each host, at most every ten
        seconds. After four hours, it fails, and the next run continues.
    type: int
notes:
  - On the controller, an action plugin of the same name calls the module repeatedly with its own O(time_limit) and displays the progress
    between the calls. From the second call on it passes O(layers) instead of all rules. No process continues to run on the host after the
    play is interrupted. In check mode, with C(async), and with O(time_limit), it calls the module once.
seealso:
  - module: userns.storage.image_layers_info
    description: Lists the mapped layers of a store and their sizes, without removing any.
  - module: userns.storage.layer_template
    description: Creates mapped layers, with a lease that protects them from this module.
  - module: userns.storage.image_layers
    description: Removes images with all their layers.
  - ref: ansible_collections.userns.storage.docsite.gc_policies
    description: Describes the rules with example policies, also like those of the kubelet and of BuildKit.
  - ref: ansible_collections.userns.storage.docsite.troubleshooting
    description: What to do if the disk fills up, and if podman fails with C(layer not known).
  - name: podman-system-prune
    description: The manual page of podman's own command, which removes images and containers, but no mapped layers of other images.
    link: https://docs.podman.io/en/latest/markdown/podman-system-prune.1.html
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: Determine how much each rule would free, without removing anything
  userns.storage.layer_gc:
  register: gc

- name: Display it
  ansible.builtin.debug:
    var: gc.would_free

- name: Remove layers that were not used for four weeks, and more if the disk fills up
  userns.storage.layer_gc:
    unused_for: 4w
    high_threshold: 85
    low_threshold: 80
    keep_images: docker.io/library/postgres:*

- name: Remove images that were replaced by an update more than two weeks ago, with all their layers
  userns.storage.layer_gc:
    user: alice
    superseded_images: 2w

- name: Keep at most two mapped layers for each image of alice's store
  userns.storage.layer_gc:
    user: alice
    max_copies_per_image: 2

- name: Keep layers whose maps begin with the subordinate IDs, such as those of keep-id containers, in the stores of two users
  userns.storage.layer_gc:
    users: [alice, bob]
    unused_for: 2w
    keep_mappings: "0:1:*"

- name: Remove as much as possible in a maintenance window of five minutes
  userns.storage.layer_gc:
    unused_for: 4w
    time_limit: 300

- name: Repair a store in which podman images fails with "layer not known"
  userns.storage.layer_gc:
    broken: repair
    orphans: remove
"""

RETURN = r"""
removed:
  description: The mapped layers that were removed, or would be removed in check mode, in the order of removal.
  returned: always
  type: list
  elements: dict
  contains: &entry
    id:
      description: The ID of the layer.
      type: str
    image_ids:
      description: The IDs of the images that list the layer.
      type: list
      elements: str
    image_names:
      description: The names of these images.
      type: list
      elements: str
    uidmap:
      description: The UID map of the layer.
      type: list
      elements: str
      sample: ['0:100000:65536']
    gidmap:
      description: The GID map of the layer.
      type: list
      elements: str
    size:
      description: The number of bytes that the removal of this item alone frees, as precisely as the filesystem allows.
      type: int
    size_min:
      description: The minimum number of bytes that the removal of this item alone frees.
      type: int
    size_max:
      description: The maximum number of bytes that the removal of this item alone frees.
      type: int
    inodes:
      description: The number of inodes in use.
      type: int
    unused_seconds:
      description:
        - The number of seconds for which the layer is known to be unused. Only time in which the store was observed counts, see
          O(unused_for).
        - C(null) if the layer was never observed before.
      type: int
    rule:
      description: The reason for the decision. This is the name of the option, or V(in_use), V(dependents), V(lease), V(read_only),
        V(newer_format), V(shared) or V(none). V(newer_format) is for layers in a form that only newer runtimes know, V(time_limit) for
        layers whose removal is left to the next run, V(contradictions) for all layers of a store with RV(contradictions).
      type: str
    wanted_by:
      description: All rules that select the layer for removal.
      type: list
      elements: str
    reason:
      description: A description of the reason.
      type: str
      sample: not seen in use for 4 weeks, last on 2026-02-01T12:00:00Z
    origin:
      description: V(ours) if M(userns.storage.layer_template) created the layer, otherwise V(runtime).
      type: str
    containers:
      description: The containers that use the layer.
      type: list
      elements: dict
      contains:
        id:
          description: The ID of the container.
          type: str
        name:
          description: The name of the container.
          type: str
        known_to_podman:
          description: Whether podman created the container. Only C(podman ps --external) lists containers of buildah, CRI-O and other programs.
          type: bool
kept:
  description: The mapped layers that are kept.
  returned: always
  type: list
  elements: dict
  contains: *entry
removed_images:
  description: The superseded images that were removed with their layers, or would be removed in check mode.
  returned: always
  type: list
  elements: dict
  contains: &image
    id:
      description: The ID of the image.
      type: str
    former_names:
      description: The names that the image had.
      type: list
      elements: str
      sample: [docker.io/library/postgres:17]
    superseded:
      description: The time from which the image counts as superseded, in RFC 3339 format in UTC. C(null) if it is unknown.
      type: str
      sample: '2026-03-01T12:00:00Z'
    layers:
      description: The IDs of the layers that are removed with the image, mapped layers first, without those in RV(removed).
      type: list
      elements: str
    size:
      description: The number of bytes on disk that only these layers use.
      type: int
    inodes:
      description: The number of inodes that these layers use.
      type: int
    rule:
      description: V(superseded_images), or the protection that keeps the image.
      type: str
    reason:
      description: A description of the reason.
      type: str
kept_images:
  description: The superseded images that are kept, at most 1,000. Empty unless O(superseded_images) is set.
  returned: always
  type: list
  elements: dict
  contains: *image
failures:
  description: The items that could not be removed. The module fails after it has processed all other items.
  returned: always
  type: list
  elements: dict
  contains:
    <<: *entry
    former_names:
      description: The names that a superseded image had.
      type: list
      elements: str
    superseded:
      description: The time from which such an image counts as superseded. C(null) if it is unknown.
      type: str
    layers:
      description: The layers of such an image.
      type: list
      elements: str
    kind:
      description: The same values as in RV(repaired[].kind), for items other than mapped layers that a rule selected.
      type: str
    path:
      description: The path of such an item.
      type: str
repaired:
  description: The damaged items and leftovers that were removed.
  returned: always
  type: list
  elements: dict
  contains: &finding
    kind:
      description:
        - V(entry), V(missing), V(damaged), V(foreign_root) or V(incomplete), see O(broken); V(unreferenced), V(directory) or V(link), see
          O(orphans); V(staging), V(trash) or V(records) for files of an interrupted run of this collection.
      type: str
    id:
      description: The ID of the layer, or the name of the item.
      type: str
    path:
      description: The path of the item. C(null) for items that are identified by their ID.
      type: str
    image_ids:
      description: The IDs of the images that list the layer.
      type: list
      elements: str
    size:
      description: The number of bytes that the removal of this item alone frees, as precisely as the filesystem allows.
      type: int
    size_min:
      description: The minimum number of bytes that the removal of this item alone frees.
      type: int
    size_max:
      description: The maximum number of bytes that the removal of this item alone frees.
      type: int
    inodes:
      description: The number of inodes that the removal of this item frees.
      type: int
    rule:
      description: The reason for the decision.
      type: str
    reason:
      description: A description of the reason.
      type: str
findings:
  description: The damaged items and leftovers that are kept.
  returned: always
  type: list
  elements: dict
  contains: *finding
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
space_reclaimed:
  description: The number of bytes by which the free space of the filesystem increased. Predicted in check mode.
  returned: always
  type: int
space_reclaimed_min:
  description: The minimum number of bytes that the filesystem gains. It equals RV(space_reclaimed) except in check mode.
  returned: always
  type: int
space_reclaimed_max:
  description: The maximum number of bytes that the filesystem gains. It equals RV(space_reclaimed) except in check mode.
  returned: always
  type: int
inodes_reclaimed:
  description: The number of inodes by which the free inodes of the filesystem increased. Predicted in check mode.
  returned: always
  type: int
target_met:
  description: Whether the module freed all the space that the rules for space require, or can free it in check mode. If not, the module
    warns.
  returned: always
  type: bool
partial:
  description: Whether O(time_limit) left work for the next run.
  returned: always
  type: bool
remaining:
  description: The number of layers and other items that are left for the next run.
  returned: always
  type: int
seconds_planning:
  description: The number of seconds that the module needed to examine the store and to create the plan.
  returned: always
  type: float
notes:
  description: Remarks on the rules, such as the time from which O(unused_for) has an effect, the time that it does not count, and whether
    the clock is unreliable.
  returned: always
  type: list
  elements: str
would_free:
  description: The space that each rule would free on its own, with the given protections. Empty if a rule is set, and for a store from
    which nothing may be removed, because of RV(contradictions) or an C(imagestore).
  returned: always
  type: list
  elements: dict
  contains:
    rule:
      description: The name of the option.
      type: str
    value:
      description: The value used for the prediction.
      type: raw
    layers:
      description: The number of layers that the rule would remove.
      type: int
    bytes:
      description: The number of bytes on disk that only these layers use.
      type: int
    inodes:
      description: The number of inodes that these layers use.
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

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._module import (
    STORE_ARGUMENTS,
    STORE_EXCLUSIVE,
    run,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import (
    gc_policy,
    layer_gc,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.options import (
    argument_spec,
    given,
)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            **argument_spec(gc_policy.OPTIONS),
            "time_limit": {"type": "int"},
            **STORE_ARGUMENTS,
        },
        mutually_exclusive=STORE_EXCLUSIVE,
        required_together=gc_policy.pairs(),
        supports_check_mode=True,
    )
    limit = module.params["time_limit"]
    deadline = time.monotonic() + limit if limit is not None else 0.0
    run(
        module,
        lambda store: layer_gc.GcRequest(
            store=store,
            options=given(gc_policy.OPTIONS, module.params),
            check=module.check_mode,
            deadline=deadline,
            awaited=True,
        ),
        layer_gc.collect,
    )


if __name__ == "__main__":
    main()
