# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Slow down a copy of the collection, so that tests can interrupt its work on any machine, and inspect partial
trees.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import typing as t

if t.TYPE_CHECKING:
    from .lab import Lab

_ROOT = pathlib.Path(__file__).resolve().parents[2]
# The first statement of a job.
_JOB = "        serial, kind = message[:2]\n"

_SLICE = ("plugins/plugin_utils/_slices.py", "SHORTEST = 10\n", "SHORTEST = {}\n")
_CHANGES = (
    (
        "plugins/module_utils/_storage/tree/walk.py",
        "_PROGRESS_SECONDS = 0.5\n",
        "_PROGRESS_SECONDS = 0.05\n",
    ),
    (
        "plugins/module_utils/_storage/tree/walk.py",
        "MOST_WORKERS = 8\n",
        "MOST_WORKERS = 2\n",
    ),
    (
        "plugins/module_utils/_storage/tree/walk.py",
        _JOB,
        f"{_JOB}        time.sleep(0.2)\n",
    ),
)


def create_slow_collection(lab: Lab, seconds: int) -> pathlib.Path:
    """Create a slow copy of the collection that often reports progress.

    A job of a walk has about a hundred entries and takes at least 0.2 seconds. At most four jobs are in progress,
    so that a run that must stop immediately completes at most five jobs on any machine.

    :param seconds: the time limit that the action plugins set
    :returns: a folder for ANSIBLE_COLLECTIONS_PATH, or for PYTHONPATH before that of the laboratory
    """
    base = lab.folder(0o755)
    tree = base / "ansible_collections/userns/storage"
    for name in ("plugins", "meta"):
        shutil.copytree(_ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(_ROOT / "galaxy.yml", tree)
    for name, old, new in (*_CHANGES, (*_SLICE[:2], _SLICE[2].format(seconds))):
        path = tree / name
        text = path.read_text()
        assert text.count(old) == 1, (name, old)
        path.write_text(text.replace(old, new))
    return base


def whole_files(tree: pathlib.Path) -> t.Set[int]:
    """The inodes of the complete files in a partial tree of an image of `many_files_layers`."""
    found = set()
    for folder, _folders, names in os.walk(tree):
        for name in names:
            status = os.lstat(os.path.join(folder, name))
            if name.isdigit() and status.st_mtime < 1700000000:
                found.add(status.st_ino)
    return found
