# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fixtures for stores and for runs of layer_gc, and the summary of the interop matrix."""

from __future__ import annotations

import json
import os
import pathlib
import typing as t

import pytest

if t.TYPE_CHECKING:
    from support.images import Image
    from support.lab import Lab
    from support.store_cases import Case
    from support.stores import Json, Store


@pytest.fixture
def tmp_path(lab: Lab) -> pathlib.Path:
    """A folder with the same path on the machine under test."""
    return lab.folder()


@pytest.fixture
def make_case(make_store: t.Callable[..., Store], small_image: Image) -> t.Callable[..., Case]:
    """Creates a Case from a key of SETUPS or a kind of store; takes an image and options of the store."""
    from support.store_cases import SETUPS, Case

    def make(setup: str, image: t.Optional[Image] = None, **options: t.Any) -> Case:
        kind, as_user = SETUPS.get(setup, (setup, False))
        image = image or small_image
        return Case(make_store(kind, image, **options), image, as_user)

    return make


@pytest.fixture(params=["vfs", "overlay-forced", "rootless-as-user", "rootless-as-root"])
def case(request: pytest.FixtureRequest, make_case: t.Callable[..., Case]) -> Case:
    """Each kind of use in SETUPS, with a new store that contains localhost/small:1."""
    return make_case(request.param)


@pytest.fixture(scope="session")
def heavy_image(lab: Lab) -> Image:
    """Two layers, 30 MB in 63 files; localhost/heavy:1."""
    from support.unused_layers import build_heavy_image

    return build_heavy_image(lab)


@pytest.fixture
def collect(run_module: t.Callable[..., Json]) -> t.Callable[..., Json]:
    """Runs layer_gc on a store, by default without a minimum age."""

    def run(store: Store, *, check: bool = False, fails: bool = False, **args: t.Any) -> Json:
        all_args = {**store.module_args(), "min_age": "0", **args}
        return run_module("layer_gc", all_args, check=check, fails=fails)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the cells of the interop matrix that were tested, and update the file that USERNS_STORAGE_MATRIX names."""
    from support import matrix

    found = matrix.Matrix()
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == "matrix" and report.when == "call":
                    release, versions, mode, column, cells = json.loads(value)
                    found.versions[release] = versions
                    for form, result in cells.items():
                        found.cells[release, mode, column, form] = result
    if not found.cells:
        return
    terminalreporter.section("interop matrix")
    terminalreporter.write_line(matrix.render(found))
    path = os.environ.get(matrix.OUTPUT_VARIABLE)
    if path:
        matrix.merge(pathlib.Path(path), found)
