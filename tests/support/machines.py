# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run programs in the mount namespace of the laboratory or in the root of another Debian release."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shlex
import subprocess
import typing as t

# Seconds. It only ends programs that hang; no test depends on the duration of a program.
DEFAULT_TIMEOUT = 1200.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclasses.dataclass(frozen=True)
class Account:
    """The user who runs a program."""

    name: str
    uid: int
    gid: int
    home: str
    runtime_dir: str = ""


ROOT = Account("root", 0, 0, "/root")


@dataclasses.dataclass(frozen=True)
class Result:
    """The exit status and the output of a program."""

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
    """A program that must succeed has failed; the message contains its output."""

    def __init__(self, result: Result) -> None:
        self.result = result
        super().__init__(
            f"{shlex.join(result.argv)}\nexit status {result.rc}\n{result.stdout}\n{result.stderr}"
        )


DEFAULT_SIGNALS = "--default-signal=HUP,INT"


class Machine:
    """Runs programs in a clean environment; subclasses define the root and the namespaces."""

    name = "local"
    # The arguments before each command that enter the machine.
    prefix: t.Tuple[str, ...] = ()
    # Its root directory as the laboratory sees it.
    root = "/"

    def path(self, name: str) -> pathlib.Path:
        """The path in the laboratory of an absolute path of this machine."""
        return pathlib.Path(self.root, name.lstrip("/"))

    def command(
        self,
        argv: t.Sequence[str],
        *,
        account: t.Optional[Account] = None,
        env: t.Optional[t.Mapping[str, str]] = None,
        cwd: t.Optional[str] = None,
    ) -> t.List[str]:
        """The complete command ancestors that runs `argv` on this machine as `account` (root if not given)."""
        user = account or ROOT
        arguments = [*self.prefix]
        if user.uid != 0:
            arguments += [
                "setpriv",
                f"--reuid={user.uid}",
                f"--regid={user.gid}",
                "--clear-groups",
                "--",
            ]
        # If the tests run below nohup, programs would inherit that SIGHUP is ignored.
        arguments += ["env", "-i", DEFAULT_SIGNALS, "-C", cwd or (user.home if user.uid else "/")]
        arguments += [f"{key}={value}" for key, value in self.environ(user, env).items()]
        return [*arguments, *argv]

    @staticmethod
    def environ(
        account: Account, extra: t.Optional[t.Mapping[str, str]] = None
    ) -> t.Dict[str, str]:
        """The environment of a login of `account`, without variables of the test runner."""
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
        """Run a program (`timeout` in seconds).

        :raises CommandFailed: the program fails, unless `check` is false
        """
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
        """Start a program in a new session without waiting for it."""
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.Popen(
            self.command(argv, account=account, env=env, cwd=cwd), start_new_session=True, **options
        )

    def version(self, program: str) -> t.Tuple[int, ...]:
        """The version that a program reports, as numbers such as (4, 3, 1). It is cached."""
        known: t.Dict[str, t.Tuple[int, ...]] = vars(self).setdefault("versions", {})
        if program not in known:
            text = self.run([program, "--version"]).stdout
            word = next(word for word in text.split() if word[0].isdigit())
            numbers = word.split("+")[0].split("-")[0].rstrip(",").split(".")
            known[program] = tuple(int(number) for number in numbers)
        return known[program]


def busy_pids(marker: str) -> t.List[int]:
    """PIDs of processes with `marker` in the command ancestors or environment, and of their descendants.

    The marker is a path that this process has created, so only processes that were started for it contain it.
    """
    searched = os.fsencode(marker)
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
                    if searched in content.read():
                        marked.add(pid)
        except OSError:
            continue

    def ancestors(pid: int) -> t.Iterator[int]:
        while pid > 0:
            yield pid
            pid = parents.get(pid, 0)

    excluded = set(ancestors(os.getpid()))
    marked -= excluded
    return sorted(
        pid for pid in parents if pid not in excluded and marked.intersection(ancestors(pid))
    )
