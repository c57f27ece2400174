# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""All that is read of others, fed by atheris, which sees what code its input reaches.

``soak_fuzz.py NAME FOLDER [libFuzzer's options]`` feeds one reader of tests/support/fuzz.py.
"""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


def soak(minutes: float, seed: int) -> int:
    """Feed all readers, for so long altogether; the number of those that did not stand it."""
    if importlib.util.find_spec("atheris") is None:
        print("atheris has no wheel for this Python; tests/faults/test_fuzz.py does without it")
        return 0
    from support.fuzz import READERS, SEEDS

    failed = 0
    for name in READERS:
        with tempfile.TemporaryDirectory(prefix="us-fuzz-", dir="/dev/shm") as folder:
            base = pathlib.Path(folder)
            for part in ("corpus", "work", "found"):
                (base / part).mkdir()
            for number, seed_text in enumerate(SEEDS[name]):
                (base / "corpus" / str(number)).write_bytes(seed_text)
            seconds = max(int(minutes * 60 / len(READERS)), 1)
            done = subprocess.run(
                [
                    sys.executable, __file__, name, folder, f"-max_total_time={seconds}",
                    f"-seed={seed % 2**31 or 1}", f"-artifact_prefix={base}/found/", "-timeout=10",
                    "-max_len=4096", "-verbosity=0", "-print_final_stats=1", str(base / "corpus"),
                ],
                capture_output=True, text=True, errors="replace", check=False,
            )  # fmt: skip
            runs = [line for line in done.stderr.splitlines() if "number_of_executed" in line]
            told = runs[0].split()[-1] if runs else "?"
            print(f"{name}: {told} inputs", flush=True)
            if done.returncode != 0:
                failed += 1
                print(done.stdout[-4000:], done.stderr[-4000:])
                for path in (base / "found").iterdir():
                    print(f"{name} does not stand {path.read_bytes()!r}", flush=True)
    return failed


def feed(name: str, folder: str) -> None:
    """Feed one reader until libFuzzer has had enough."""
    import atheris

    with atheris.instrument_imports(include=["ansible_collections"]):
        from support import fuzz
    work = pathlib.Path(folder) / "work"
    atheris.Setup([sys.argv[0], *sys.argv[3:]], lambda data: fuzz.read(name, data, work))
    atheris.Fuzz()


if __name__ == "__main__":
    feed(sys.argv[1], sys.argv[2])
