# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tests of the payload that a task sends to a host. It must be small, since every task transfers it.

The limit for the files of this collection is 320 kB, compressed as they are sent. The files of ansible-core,
which are part of every module, do not count.
"""

from __future__ import annotations

import base64
import functools
import io
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(path.stem for path in (ROOT / "plugins/modules").glob("*.py"))
LIMIT = 320_000

# A separate process, because Ansible's loader affects all later imports.
CONTROLLER = """
import sys
from ansible.executor.module_common import modify_module
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader, module_loader
from ansible.template import Templar

init_plugin_loader()
name = "userns.storage." + sys.argv[1]
found = module_loader.find_plugin_with_context(name)
built = modify_module(
    module_name=name,
    module_path=found.plugin_resolved_path,
    module_args={},
    templar=Templar(loader=DataLoader(), variables={}),
    task_vars={
        "ansible_python_interpreter": "/usr/bin/python3",
        "ansible_playbook_python": sys.executable,
    },
    module_compression="ZIP_DEFLATED",
    remote_is_local=True,
)
sys.stdout.buffer.write(built[0] if isinstance(built, tuple) else built.b_module_data)
"""


@functools.cache
def payload(name: str) -> bytes:
    """The file that Ansible creates on the controller and sends to run a module."""
    environment = dict(os.environ)
    if ROOT.parent.parent.name == "ansible_collections":
        environment["ANSIBLE_COLLECTIONS_PATH"] = str(ROOT.parents[2])
    done = subprocess.run(
        [sys.executable, "-c", CONTROLLER, name],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def archive(data: bytes) -> zipfile.ZipFile:
    """The zip archive in a payload."""
    encoded = max(re.findall(rb"[A-Za-z0-9+/=]{1000,}", data), key=len)
    return zipfile.ZipFile(io.BytesIO(base64.b64decode(encoded)))


@pytest.mark.parametrize("name", MODULES)
def test_payload_is_small(name: str) -> None:
    data = payload(name)
    with archive(data) as packed:
        own = [item for item in packed.infolist() if "/userns/storage/" in item.filename]
    # zip stores the name of each file twice, with a local header (30 bytes) and a central header (46 bytes).
    size = sum(item.compress_size + 2 * len(item.filename) + 76 for item in own)
    print(f"{name}: {len(data)} bytes; of this collection {len(own)} files, {size} bytes packed")
    assert any(item.filename.endswith(f"plugins/modules/{name}.py") for item in own)
    assert size < LIMIT


@pytest.mark.parametrize("name", sorted({*MODULES} - {"layer_template"}))
def test_only_layer_template_contains_the_code_that_creates_layers(name: str) -> None:
    with archive(payload(name)) as packed:
        names = packed.namelist()
    for file in (
        "operations/layer_template.py",
        "operations/layer_building.py",
        "tree/clone.py",
        "tree/walk.py",
    ):
        assert not [item for item in names if item.endswith(f"_storage/{file}")], file
