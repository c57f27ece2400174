# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where programs run: the laboratory's own mount namespace, or the root of another Debian."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
import subprocess
import typing as t

# Seconds, to end what hangs; what a program may take is no test's matter.
DEFAULT_TIMEOUT = 1200.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclasses.dataclass(frozen=True)
class Account:
    """Who runs a program; root when a machine is given none."""

    name: str
    uid: int
    gid: int
    home: str
    runtime_dir: str = ""


ROOT = Account("root", 0, 0, "/root")


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished program left behind."""

    argv: t.Tuple[str, ...]
    rc: int
    stdout: str
    stderr: str

    def check(self) -> Result:
        """Return the result itself, or raise CommandFailed when the exit status is not 0."""
        if self.rc != 0:
            raise CommandFailed(self)
        return self


class CommandFailed(AssertionError):
    """A program that had to succeed did not; the message holds all it said."""

    def __init__(self, result: Result) -> None:
        self.result = result
        super().__init__(
            f"{shlex.join(result.argv)}\nexit status {result.rc}\n{result.stdout}\n{result.stderr}"
        )


DEFAULT_SIGNALS = "--default-signal=HUP,INT"


class Machine:
    """Runs programs with a clean environment; subclasses say in which root and namespaces."""

    name = "local"
    # Words put before each command to get into the machine.
    prefix: t.Tuple[str, ...] = ()
    # Its root directory as the laboratory sees it.
    root = "/"

    def path(self, name: str) -> pathlib.Path:
        """Where the laboratory finds what this machine has at an absolute path."""
        return pathlib.Path(self.root, name.lstrip("/"))

    def command(
        self,
        argv: t.Sequence[str],
        *,
        account: t.Optional[Account] = None,
        env: t.Optional[t.Mapping[str, str]] = None,
        cwd: t.Optional[str] = None,
    ) -> t.List[str]:
        """The full command line that runs `argv` on this machine as `account`."""
        who = account or ROOT
        words = [*self.prefix]
        if who.uid != 0:
            words += ["setpriv", f"--reuid={who.uid}", f"--regid={who.gid}", "--clear-groups", "--"]
        # Below nohup the tests would hand down that hangups are ignored.
        words += ["env", "-i", DEFAULT_SIGNALS, "-C", cwd or (who.home if who.uid else "/")]
        words += [f"{key}={value}" for key, value in self.environ(who, env).items()]
        return [*words, *argv]

    @staticmethod
    def environ(
        account: Account, extra: t.Optional[t.Mapping[str, str]] = None
    ) -> t.Dict[str, str]:
        """A login's environment for `account` and nothing of the test runner's own."""
        environ = {
            "PATH": _PATH,
            "HOME": account.home,
            "USER": account.name,
            "LOGNAME": account.name,
            "LANG": "C.UTF-8",
        }
        if account.runtime_dir:
            environ["XDG_RUNTIME_DIR"] = account.runtime_dir
        environ.update(extra or {})
        return environ

    def run(
        self,
        argv: t.Sequence[str],
        *,
        account: t.Optional[Account] = None,
        env: t.Optional[t.Mapping[str, str]] = None,
        cwd: t.Optional[str] = None,
        stdin: t.Optional[str] = None,
        check: bool = True,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> Result:
        """Run `argv` to its end (`timeout` in seconds); a failure raises unless `check` is false."""
        done = subprocess.run(
            self.command(argv, account=account, env=env, cwd=cwd),
            input=(stdin or "").encode("utf-8", "surrogateescape"),
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        result = Result(
            tuple(argv),
            done.returncode,
            done.stdout.decode("utf-8", "surrogateescape"),
            done.stderr.decode("utf-8", "surrogateescape"),
        )
        return result.check() if check else result

    def popen(
        self,
        argv: t.Sequence[str],
        *,
        account: t.Optional[Account] = None,
        env: t.Optional[t.Mapping[str, str]] = None,
        cwd: t.Optional[str] = None,
        **options: t.Any,
    ) -> subprocess.Popen[bytes]:
        """Start `argv` in a session of its own and return at once."""
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(
            self.command(argv, account=account, env=env, cwd=cwd), start_new_session=True, **options
        )

    def version(self, program: str) -> t.Tuple[int, ...]:
        """The version `program` gives itself, as numbers: (4, 3, 1). It is asked once."""
        known: t.Dict[str, t.Tuple[int, ...]] = vars(self).setdefault("versions", {})
        if program not in known:
            text = self.run([program, "--version"]).stdout
            word = next(word for word in text.split() if word[0].isdigit())
            numbers = word.split("+")[0].split("-")[0].rstrip(",").split(".")
            known[program] = tuple(int(number) for number in numbers)
        return known[program]


def busy_pids(marker: str) -> t.List[int]:
    """PIDs that name `marker` in command line or environment, with their descendants.

    The marker is a path that this process has made up, so whoever names it was started for it.
    """
    wanted = os.fsencode(marker)
    parents: t.Dict[int, int] = {}
    marked: t.Set[int] = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        pid = int(entry)
        try:
            with open(f"/proc/{pid}/stat", "rb") as stat:
                parents[pid] = int(stat.read().rpartition(b")")[2].split()[1])
            for name in ("cmdline", "environ"):
                with open(f"/proc/{pid}/{name}", "rb") as content:
                    if wanted in content.read():
                        marked.add(pid)
        except OSError:
            continue

    def line(pid: int) -> t.Iterator[int]:
        while pid > 0:
            yield pid
            pid = parents.get(pid, 0)

    spared = set(line(os.getpid()))
    marked -= spared
    return sorted(pid for pid in parents if pid not in spared and marked.intersection(line(pid)))
