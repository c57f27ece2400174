# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Fuzz the readers of fuzz.py with atheris, which is guided by the code that its inputs reach.

A separate process runs them, because libFuzzer ends its process. The first byte of each input
selects the reader for the rest.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import re
import subprocess
import sys
import tempfile
import typing as t


@dataclasses.dataclass(frozen=True)
class FuzzResult:
    """The result: the number of ``inputs``; the error of a failing input in ``error``, or ""."""

    inputs: int
    error: str


def available() -> bool:
    """Whether this Python has atheris, which is only available as wheels, see tests/requirements/tools.txt."""
    return importlib.util.find_spec("atheris") is not None


def fuzz_readers(names: t.Sequence[str], seed: int, limit: str) -> FuzzResult:
    """Run readers with inputs that only depend on the seed if the number of inputs is limited.

    :param limit: libFuzzer's option: ``-runs=NUMBER`` or ``-max_total_time=SECONDS``
    """
    from .fuzz import SEEDS

    with tempfile.TemporaryDirectory(prefix="us-fuzz-", dir="/dev/shm") as folder:
        base = pathlib.Path(folder)
        for part in ("corpus", "work", "found"):
            (base / part).mkdir()
        for index, name in enumerate(names):
            for number, data in enumerate(SEEDS[name]):
                (base / "corpus" / f"{name}{number}").write_bytes(bytes([index]) + data)
        command = [
            sys.executable,
            "-m",
            f"{__package__}.fuzz_atheris",
            ",".join(names),
            folder,
            limit,
        ]
        command += [f"-seed={seed % 2**31 or 1}", f"-artifact_prefix={base}/found/", "-timeout=600"]
        command += ["-max_len=4096", "-verbosity=0", "-print_final_stats=1", str(base / "corpus")]
        done = subprocess.run(
            command,
            cwd=pathlib.Path(__file__).parents[1],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        error = ""
        if done.returncode != 0:
            inputs = [repr(path.read_bytes()) for path in (base / "found").iterdir()]
            error = (
                f"{done.stdout[-4000:]}{done.stderr[-4000:]}\nfailing inputs: {' '.join(inputs)}"
            )
    executed = re.search(r"number_of_executed_units: *(\d+)", done.stderr)
    return FuzzResult(int(executed[1]) if executed else 0, error)


def _fuzz(names: t.Sequence[str], folder: str, *options: str) -> None:
    # There is no atheris for some versions of Python.
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["ansible_collections"]):
        from . import fuzz
    work = pathlib.Path(folder) / "work"

    def test_one_input(data: bytes) -> None:
        if data:
            fuzz.read(names[data[0] % len(names)], data[1:], work)

    atheris.Setup([sys.argv[0], *options], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    _fuzz(sys.argv[1].split(","), *sys.argv[2:])
