#!/usr/bin/python

# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: layer_gc
short_description: Collect mapped layers that nobody uses
version_added: 1.0.0
description:
  - Removes mapped layers, the ID-mapped copies of images that containers with user namespaces run on. No command of podman frees
    one while its image stays.
  - A layer goes when any rule wants it and nothing protects it. Rules add up, each chooses on its own. With no rule given nothing
    is removed, and RV(would_free) says what each rule would free.
  - Never removed are a layer that a container or another layer rests on, running or not and of whichever program; an image's own
    layer; anything in a read-only store; a layer under a lease; and what O(keep_images), O(keep_mappings) and O(min_age) protect.
  - Duplicates go first, then maps nobody can use any more, then the longest unseen, then the largest. This matters for the rules of space
    and for the limits.
  - Runtimes do not note when a layer was used. The modules of this collection note at each run what is in use, in a ledger of their own.
  - A layer is detached under the store's locks in milliseconds and deleted outside them.
extends_documentation_fragment:
  - userns.storage._attributes
  - userns.storage._attributes.actiongroup_store
  - userns.storage._store
attributes:
  check_mode:
    support: full
    details:
      - Writes nothing at all, and returns the same plan with the figures predicted.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  images:
    description:
      - Only layers of these images may go. Names, IDs, or shell patterns of these such as V(quay.io/*).
    type: list
    elements: str
    default: []
  layers:
    description:
      - A rule. Removes these layers, by the IDs that M(userns.storage.image_layers_info) tells. One that is gone already is no error.
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
      - Protects layers with these maps. V(0:100000:65536) is held against the UID map and the GID map, ranges joined by commas, and
        V(0:1:1000,1000:0:1/0:1:100,100:0:1) against both. Shell patterns are taken, such as V(0:100000:*).
    type: list
    elements: str
    default: []
  min_age:
    description:
      - Protects layers made, or seen in use, less than this ago. It covers a container that is just being created, or made again.
      - Ages are written as M(ansible.builtin.find) takes them, V(90s), V(10m), V(2h), V(3d) or V(2w), in seconds without a unit.
    type: str
    default: 10m
  duplicates:
    description:
      - A rule. Removes layers whose image has another one with the same map, or with one that means the same.
      - Old podmans write the same map in more than one way and may make such a layer again.
    type: bool
    default: false
  unusable_maps:
    description:
      - A rule. Removes layers whose ranges are no longer in C(/etc/subuid) and C(/etc/subgid), of the user for a rootless store, of anybody
        for the rootful one.
    type: bool
    default: false
  unused_for:
    description:
      - A rule. Removes layers that were not seen in use for this long.
      - It rests on the ledger. Until that has watched the store for as long, the rule does not act, and RV(notes) says from when it will.
    type: str
  created_before:
    description:
      - A rule. Removes layers made before this, an age such as V(4w) or a date such as V(2026-03-01T12:00:00Z).
    type: str
  max_copies_per_image:
    description:
      - A rule. Leaves each image so many mapped layers, of which those that are protected count first.
    type: int
  max_used_space:
    description:
      - A rule. Removes layers until all mapped layers together hold no more than this.
      - Sizes are written V(10G), V(512MB), V(1.5GiB) or in bytes; V(10%) is a share of the filesystem.
      - If O(images) or O(origin=ours) is given, only the layers chosen so count.
    type: str
  min_free_space:
    description:
      - A rule. Removes layers until the filesystem has this much free. Nothing goes while it has.
    type: str
  high_threshold:
    description:
      - A rule, with O(low_threshold). When the filesystem is full to this percentage, in bytes or in inodes, layers go until it is
        full to O(low_threshold) only.
    type: float
  low_threshold:
    description:
      - See O(high_threshold).
    type: float
  reserved_space:
    description:
      - A limit. No rule goes on once the mapped layers hold no more than this.
    type: str
  max_freed:
    description:
      - A limit. No rule goes on once this much is freed.
    type: str
  origin:
    description:
      - V(ours) leaves alone what the runtimes made, and only layers of M(userns.storage.layer_template) may go.
    type: str
    choices: [any, ours]
    default: any
  orphans:
    description:
      - What to do about layer directories without a record, short names that lead nowhere, and whole mapped layers that no image lists
        (these only a day after they were made).
      - What a killed run of this collection has left goes in any run that may remove something.
    type: str
    choices: [report, remove]
    default: report
  broken:
    description:
      - What to do about mapped layers that are gone or unusable. V(repair) takes entries of layers that are gone out of the image's
        record, with which C(podman images) fails for the whole store, and removes mapped layers without usable data, and layers that
        were never finished.
      - An image's own layers are never touched.
    type: str
    choices: [report, repair]
    default: report
  time_limit:
    description:
      - Begin with nothing more after so many seconds, and tell in RV(remaining) what is left to do. This is for maintenance windows.
      - What is being removed is removed to the end, and each run removes something. Looking through the store before is not limited.
      - The next run makes a plan of its own, with O(max_freed) for itself.
      - Without it the task goes on with one plan until all is done, and shows every ten seconds or more how far it is, for each host.
    type: int
notes:
  - On the controller an action plugin of the same name calls the module again and again with a O(time_limit) of its own and shows a line
    in between, from the second time on with O(layers) in the place of all rules. Nothing runs on when the play is interrupted. In check
    mode, with C(async) and with O(time_limit) it calls the module once.
seealso:
  - module: userns.storage.image_layers_info
  - module: userns.storage.layer_template
author:
  - The userns.storage contributors (@userns-storage)
"""

EXAMPLES = r"""
- name: See what could be freed
  userns.storage.layer_gc:
  register: gc

- name: Remove what was not used for four weeks, and more if the disk fills up
  userns.storage.layer_gc:
    unused_for: 4w
    high_threshold: 85
    low_threshold: 80
    keep_images: docker.io/library/postgres:*

- name: Keep at most two mapped layers for each image of alice's store
  userns.storage.layer_gc:
    user: alice
    max_copies_per_image: 2

- name: Remove what can be removed in the five minutes of a maintenance window
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
  description: The mapped layers that were removed, or would be in check mode, in the order of removal.
  returned: always
  type: list
  elements: dict
  contains: &entry
    id:
      description: The layer's ID.
      type: str
    image_ids:
      description: The images that list it.
      type: list
      elements: str
    image_names:
      description: Their names.
      type: list
      elements: str
    uidmap:
      description: Its UID map.
      type: list
      elements: str
      sample: ['0:100000:65536']
    gidmap:
      description: Its GID map.
      type: list
      elements: str
    size:
      description: Bytes on disk that only it holds.
      type: int
    inodes:
      description: Inodes that it holds.
      type: int
    rule:
      description: What decided, the option's name, or V(in_use), V(dependents), V(lease), V(read_only) or V(none). V(time_limit) is
        for what was to go and is left to the next run.
      type: str
    wanted_by:
      description: All rules that want it gone.
      type: list
      elements: str
    reason:
      description: Why, in words.
      type: str
      sample: not seen in use for 4 weeks, last on 2026-02-01T12:00:00Z
    origin:
      description: V(ours) if M(userns.storage.layer_template) made it, else V(runtime).
      type: str
    containers:
      description: The containers on it.
      type: list
      elements: dict
      contains:
        id:
          description: The container's ID.
          type: str
        name:
          description: Its name.
          type: str
        known_to_podman:
          description: Whether podman made it.
          type: bool
kept:
  description: The mapped layers that stay.
  returned: always
  type: list
  elements: dict
  contains: *entry
failures:
  description: What could not be removed. The module then fails, after all the rest was done.
  returned: always
  type: list
  elements: dict
  contains: *entry
repaired:
  description: What was damaged or left over, and was taken away.
  returned: always
  type: list
  elements: dict
  contains: &finding
    kind:
      description:
        - V(entry), V(missing), V(damaged) or V(incomplete), see O(broken); V(unreferenced), V(directory) or V(link), see O(orphans);
          V(staging), V(trash) or V(records), left by a killed run of this collection.
      type: str
    id:
      description: The layer's ID, or a name.
      type: str
    path:
      description: Where it lies. None for what is known by its ID.
      type: str
    image_ids:
      description: The images that list it.
      type: list
      elements: str
    size:
      description: Bytes on disk.
      type: int
    inodes:
      description: Inodes.
      type: int
    rule:
      description: What decided.
      type: str
    reason:
      description: Why, in words.
      type: str
findings:
  description: What is damaged or left over, and stays.
  returned: always
  type: list
  elements: dict
  contains: *finding
space_reclaimed:
  description: Bytes that the filesystem has more than before. Predicted in check mode.
  returned: always
  type: int
inodes_reclaimed:
  description: Inodes that the filesystem has more than before. Predicted in check mode.
  returned: always
  type: int
target_met:
  description: Whether all that the rules of space asked for was, or in check mode can be, freed. There is a warning if not.
  returned: always
  type: bool
partial:
  description: Whether O(time_limit) has left something to the next run.
  returned: always
  type: bool
remaining:
  description: How many layers and other things it has left.
  returned: always
  type: int
seconds_planning:
  description: How long it took to look through the store and to decide.
  returned: always
  type: float
notes:
  description: What else there is to say about the rules, such as from when O(unused_for) acts.
  returned: always
  type: list
  elements: str
would_free:
  description: What each rule alone would free, with the protections as given. Empty if a rule is given.
  returned: always
  type: list
  elements: dict
  contains:
    rule:
      description: The option.
      type: str
    value:
      description: The value tried.
      type: raw
    layers:
      description: How many layers would go.
      type: int
    bytes:
      description: Bytes on disk that only they hold.
      type: int
    inodes:
      description: Inodes that they hold.
      type: int
store:
  description: The store that was worked on.
  returned: always
  type: dict
  contains:
    graphroot:
      description: Its graph root.
      type: str
    runroot:
      description: Its run root.
      type: str
    driver:
      description: Its graph driver.
      type: str
    backing_filesystem:
      description: The filesystem under the graph root.
      type: str
    rootless:
      description: Whether it is a user's own.
      type: bool
    shifting:
      description: Not asked here, always None.
      type: bool
"""

import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.userns.storage.plugins.module_utils._module import STORE_ARGUMENTS, run
from ansible_collections.userns.storage.plugins.module_utils._storage.operations import gc


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {"type": "list", "elements": "str", "default": []},
            "layers": {"type": "list", "elements": "str", "default": []},
            "keep_images": {"type": "list", "elements": "str", "default": []},
            "keep_mappings": {"type": "list", "elements": "str", "default": []},
            "min_age": {"type": "str", "default": "10m"},
            "duplicates": {"type": "bool", "default": False},
            "unusable_maps": {"type": "bool", "default": False},
            "unused_for": {"type": "str"},
            "created_before": {"type": "str"},
            "max_copies_per_image": {"type": "int"},
            "max_used_space": {"type": "str"},
            "min_free_space": {"type": "str"},
            "high_threshold": {"type": "float"},
            "low_threshold": {"type": "float"},
            "reserved_space": {"type": "str"},
            "max_freed": {"type": "str"},
            "origin": {"type": "str", "choices": ["any", "ours"], "default": "any"},
            "orphans": {"type": "str", "choices": ["report", "remove"], "default": "report"},
            "broken": {"type": "str", "choices": ["report", "repair"], "default": "report"},
            "time_limit": {"type": "int"},
            **STORE_ARGUMENTS,
        },
        required_together=[("high_threshold", "low_threshold")],
        supports_check_mode=True,
    )
    params = module.params
    limit = params["time_limit"]
    deadline = time.monotonic() + limit if limit is not None else 0.0
    run(
        module,
        lambda store: gc.GcRequest(
            store=store,
            images=tuple(params["images"]),
            layers=tuple(params["layers"]),
            keep_images=tuple(params["keep_images"]),
            keep_mappings=tuple(params["keep_mappings"]),
            min_age=params["min_age"],
            duplicates=params["duplicates"],
            unusable_maps=params["unusable_maps"],
            unused_for=params["unused_for"] or "",
            created_before=params["created_before"] or "",
            max_copies_per_image=params["max_copies_per_image"],
            max_used_space=params["max_used_space"] or "",
            reserved_space=params["reserved_space"] or "",
            min_free_space=params["min_free_space"] or "",
            high_threshold=params["high_threshold"],
            low_threshold=params["low_threshold"],
            max_freed=params["max_freed"] or "",
            origin=params["origin"],
            orphans=params["orphans"],
            broken=params["broken"],
            check=module.check_mode,
            deadline=deadline,
            awaited=True,
        ),
        gc.collect,
    )


if __name__ == "__main__":
    main()
