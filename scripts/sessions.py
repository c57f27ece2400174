# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs nox sessions, two at a time, each with a log, and adds up the numbers of tests.

``sessions.py [SESSION...]`` runs the named sessions, or all; a single session writes to the terminal.
``sessions.py demo|bench [ARGUMENT...]`` passes its arguments on.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import workshop

LOGS = workshop.WORK / "logs"
RESULTS = workshop.WORK / "results"
LANES = 2
# A session that writes nothing to its log for this time (in seconds) is stopped. The total time is not limited, because
# a machine may be slow.
SILENCE_LIMIT = 90 * 60


@dataclasses.dataclass(frozen=True)
class Session:
    """One or more sessions of nox under one name.

    :param needs: kinds of Debian packages
    :param folder: the folder of its tests; the session is omitted if the folder does not exist
    :param alone: no other session may run at the same time, because it measures time or disk space, or uses several
        processes
    :param parts: the names of its nox sessions, if they differ
    """

    name: str
    needs: tuple[str, ...] = ()
    folder: str = "."
    alone: bool = False
    parts: tuple[str, ...] = ()

    @property
    def present(self) -> bool:
        return (workshop.ROOT / self.folder).exists()


# The long sessions first, so that both lanes end together; sessions that must run alone come last.
TESTS = (
    Session("fleet", ("peers", "browser"), "tests/fleet"),
    Session("faults", ("peers",), "tests/faults"),
    Session("guides", ("peers",), "tests/guides"),
    Session("molecule", ("peers",), "extensions/molecule"),
    Session("sanity"),
    Session("integration", ("peers",), "tests/integration/targets"),
    Session("sanity-oldest"),
    Session("integration-oldest", ("peers",), "tests/integration/targets"),
    Session("galaxy"),
    Session("units", ("peers",)),
    Session("units-python39", ("peers",)),
    Session("types"),
    Session("docs-check"),
    Session("docs-site"),
    Session("ansible-lint"),
    Session("lint", ("lint",), parts=("style", "lint")),
    Session("extra-checks"),
    Session("interop", ("peers",), "tests/interop", alone=True),
)
# Run only when named, because they take hours.
LONG = (Session("generations", ("peers",), "tests/interop", alone=True),)
SHOWS = (Session("demo", ("peers",)), Session("bench", ("peers",)))


@dataclasses.dataclass
class Running:
    session: Session
    process: subprocess.Popen[bytes]
    started: float
    log: Path


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in {"-h", "--help"}:
        print(__doc__)
        print("Sessions:", " ".join(session.name for session in (*TESTS, *LONG)))
        return 0
    signal.signal(signal.SIGTERM, lambda *_ignored: sys.exit(143))
    for show in SHOWS:
        if arguments[:1] == [show.name]:
            environment = prepare([show])
            return subprocess.run(
                nox(show, *arguments[1:]), env=environment, cwd=workshop.ROOT, check=False
            ).returncode
    chosen = choose(arguments)
    environment = prepare(chosen)
    shutil.rmtree(RESULTS, ignore_errors=True)
    RESULTS.mkdir(parents=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    if len(chosen) == 1:
        return run_alone(chosen[0], environment)
    return many(chosen, environment)


def choose(names: list[str]) -> list[Session]:
    if not names:
        return [session for session in TESTS if session.present]
    known = {session.name: session for session in (*TESTS, *LONG)}
    requested = [name.replace("_", "-") for name in names]
    unknown = [name for name in requested if name not in known]
    if unknown:
        raise workshop.SetupError(
            f"no session {', '.join(unknown)}. There are: {' '.join(known)}, and demo, bench."
        )
    return [session for session in known.values() if session.name in requested]


def prepare(sessions: t.Sequence[Session]) -> dict[str, str]:
    """Install the requirements of the sessions; returns their environment."""
    workshop.need("base", *{kind for session in sessions for kind in session.needs})
    tools = workshop.environment("tools")
    return {
        **os.environ,
        "PATH": workshop.clean_path(tools / "bin"),
        "VIRTUAL_ENV": str(tools),
        "PYTHONUNBUFFERED": "1",
    }


def nox(session: Session, *arguments: str) -> list[str]:
    command = ["nox", "--non-interactive", "-s", *(session.parts or (session.name,))]
    return [*command, "--", *arguments] if arguments else command


def run_alone(session: Session, environment: dict[str, str]) -> int:
    started = time.monotonic()
    done = subprocess.run(nox(session), env=environment, cwd=workshop.ROOT, check=False)
    return conclude([count(session, done.returncode, time.monotonic() - started)])


def many(sessions: list[Session], environment: dict[str, str]) -> int:
    waiting = [session for session in sessions if not session.alone]
    lonely = [session for session in sessions if session.alone]
    running: list[Running] = []
    counts: list[tuple[int, int]] = []
    try:
        while waiting or lonely or running:
            while len(running) < LANES and (following := next_of(waiting, running)):
                waiting.remove(following)
                running.append(start(following, environment))
            if lonely and not waiting and not running:
                running.append(start(lonely.pop(0), environment))
            time.sleep(0.1)
            for one_running in list(running):
                code = one_running.process.poll()
                seconds = time.monotonic() - one_running.started
                if code is None and time.time() - one_running.log.stat().st_mtime > SILENCE_LIMIT:
                    stop(one_running)
                    code = 1
                if code is not None:
                    running.remove(one_running)
                    counts.append(count(one_running.session, code, seconds, one_running.log))
    finally:
        for one_running in running:
            stop(one_running)
    return conclude(counts)


def next_of(waiting: list[Session], running: list[Running]) -> t.Optional[Session]:
    """The first waiting session that may start now. Two sessions of the same folder never run at the same time, because
    they change the same parts of the machine."""
    taken = {item.session.folder for item in running} - {"."}
    return next((session for session in waiting if session.folder not in taken), None)


def start(session: Session, environment: dict[str, str]) -> Running:
    log = LOGS / f"{session.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            nox(session),
            env={**environment, "NO_COLOR": "1", "ANSIBLE_NOCOLOR": "1"},
            cwd=workshop.ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(session, process, time.monotonic(), log)


def stop(running: Running) -> None:
    """Stop a session with all its processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(running.process.pid, number)
            running.process.wait(10)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    running.process.poll()


def count(
    session: Session, code: int, seconds: float, log: t.Optional[Path] = None
) -> tuple[int, int]:
    """The numbers of passed and failed tests from the file of a session; without a file, the session is one test."""
    passed = failed = 0
    for part in session.parts or (session.name,):
        file = RESULTS / f"{part}.json"
        result = json.loads(file.read_text()) if file.exists() else {"passed": 0, "failed": 0}
        passed, failed = passed + result["passed"], failed + result["failed"]
    if code != 0:
        failed = failed or 1
    elif not passed:
        passed = 1
    if code != 0 and log is not None:
        print(f"\n===== {session.name}: complete log =====", flush=True)
        sys.stdout.buffer.write(log.read_bytes())
        print(f"===== {session.name} =====\n", flush=True)
    verdict = "FAILED" if failed else "passed"
    print(f"{session.name:<20} {verdict} {seconds:7.1f} s  {passed:5d} / {failed}", flush=True)
    return passed, failed


def conclude(counts: list[tuple[int, int]]) -> int:
    passed = sum(item[0] for item in counts)
    failed = sum(item[1] for item in counts)
    print(f"\n{passed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except workshop.SetupError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
