# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Trace programs and their descendants: the kernel stops them at each system call that resolves a path.

The tracer records the filesystem UIDs of calls with paths below given folders, as UIDs of the host (/proc/PID/status
is translated to the reader's user namespace). So it distinguishes root from a process that is UID 0 only in a user's
namespace. It compares paths as given and, except in folders that only root can change, with all links resolved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import typing as t

from . import injection, system_calls

Json = t.Dict[str, t.Any]

# p: a path relative to the working directory; a: the descriptor of a folder followed by a path; -: another argument.
_FORMS = {
    "open": "p", "creat": "p", "openat": "a", "openat2": "a", "stat": "p", "lstat": "p", "newfstatat": "a",
    "statx": "a", "statfs": "p", "access": "p", "faccessat": "a", "faccessat2": "a", "readlink": "p",
    "readlinkat": "a", "chdir": "p", "chroot": "p", "execve": "p", "execveat": "a", "truncate": "p",
    "rename": "pp", "renameat": "aa", "renameat2": "aa", "link": "pp", "linkat": "aa", "symlink": "-p",
    "symlinkat": "-a", "unlink": "p", "unlinkat": "a", "mkdir": "p", "mkdirat": "a", "rmdir": "p", "mknod": "p",
    "mknodat": "a", "chmod": "p", "fchmodat": "a", "fchmodat2": "a", "chown": "p", "lchown": "p", "fchownat": "a",
    "utime": "p", "utimes": "p", "futimesat": "a", "utimensat": "a", "setxattr": "p", "lsetxattr": "p",
    "getxattr": "p", "lgetxattr": "p", "listxattr": "p", "llistxattr": "p", "removexattr": "p",
    "lremovexattr": "p", "inotify_add_watch": "-p", "fanotify_mark": "----p", "name_to_handle_at": "a", "mount": "pp",
    "umount2": "p", "pivot_root": "pp", "open_tree": "a", "move_mount": "aa", "mount_setattr": "a",
}  # fmt: skip
_NAMES = system_calls.names_by_number(_FORMS)
_ROOT_FOLDERS = tuple(
    f"{path}/" for path in ("/usr", "/lib", "/proc", "/sys", sys.prefix, sys.base_prefix)
)


@dataclasses.dataclass(frozen=True)
class Trace:
    """The result of a traced program.

    :ivar as_root: calls of root with paths below the folders, each as "PROGRAM: CALL(PATH)"
    :ivar as_others: the number of such calls of each other filesystem UID of the host
    """

    rc: int
    output: str
    as_root: t.Tuple[str, ...]
    as_others: t.Mapping[int, int]


def trace(
    command: t.Sequence[str],
    below: t.Iterable[t.Union[str, pathlib.Path]],
    *,
    env: t.Optional[t.Mapping[str, str]] = None,
    cwd: str = "/",
    until: t.Optional[t.Callable[[str], bool]] = None,
) -> Trace:
    """Run a program, and record the users who resolve paths below folders.

    :param until: for a program that does not exit by itself: a function of its output; the program is terminated
        when it returns true
    """
    with tempfile.TemporaryDirectory(prefix="trace", dir="/run") as folder:
        log, output = f"{folder}/log", f"{folder}/output"
        request = {"command": list(command), "below": [str(item) for item in below], "log": log}
        with open(output, "wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-B", "-m", "support.path_trace", json.dumps(request)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={
                    **(os.environ if env is None else env),
                    "PATH_TRACE_PYTHONPATH": (os.environ if env is None else env).get(
                        "PYTHONPATH", ""
                    ),
                    "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
                },
            )
        while until is not None and process.poll() is None:
            if until(pathlib.Path(output).read_text(errors="replace")):
                process.send_signal(signal.SIGTERM)
                break
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        process.wait()
        text = pathlib.Path(output).read_text(errors="replace")
        try:
            found = json.loads(pathlib.Path(log).read_text())
        except FileNotFoundError:
            raise RuntimeError(text) from None
    others = {int(uid): count for uid, count in found["others"].items()}
    return Trace(found["rc"], text, tuple(found["root"]), others)


class _Tracer:
    def __init__(self, command: t.Sequence[str], below: t.Sequence[str]) -> None:
        self.command = command
        self.below = tuple(below)
        self.root: t.List[str] = []
        self.others: t.Dict[int, int] = {}
        self.known: t.Set[int] = set()
        self.first = 0
        self.status = 0

    def run(self) -> Json:
        self.first = os.fork()
        if self.first == 0:
            self._child()
        signal.signal(signal.SIGTERM, lambda *_args: os.kill(self.first, signal.SIGTERM))
        self.known.add(self.first)
        os.waitpid(self.first, injection._WALL)
        injection._ptrace(injection._SETOPTIONS, self.first, 0, injection._OPTIONS)
        injection._ptrace(injection._CONT, self.first)
        while True:
            try:
                pid, status = os.waitpid(-1, injection._WALL)
            except ChildProcessError:
                break
            if not os.WIFSTOPPED(status):
                self.known.discard(pid)
                if pid == self.first:
                    # Processes that it leaves running, such as podman's pause process, end with the tracer.
                    self.status = os.waitstatus_to_exitcode(status)
                    break
                continue
            signal_number = self._stopped(pid, status)
            try:
                injection._ptrace(injection._CONT, pid, 0, signal_number)
            except ProcessLookupError:
                continue
        return {"rc": self.status, "root": self.root, "others": self.others}

    def _child(self) -> t.NoReturn:
        try:
            injection._ptrace(injection._TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            environ = dict(os.environ)
            environ["PYTHONPATH"] = environ.pop("PATH_TRACE_PYTHONPATH")
            system_calls.install_filter(_NAMES)
            os.execvpe(self.command[0], list(self.command), environ)
        finally:
            os._exit(127)

    def _stopped(self, pid: int, status: int) -> int:
        number, event = os.WSTOPSIG(status), status >> 16
        if event == injection._EVENT_SECCOMP:
            # The process may have ended, or its argument may be an invalid pointer.
            with contextlib.suppress(OSError, ValueError):
                self._record_call(pid)
            return 0
        if event:
            return 0
        if pid not in self.known and number == signal.SIGSTOP:
            self.known.add(pid)
            return 0
        return number

    def _record_call(self, pid: int) -> None:
        number, args = injection._call_of(pid)
        name = _NAMES[number]
        for path in self._paths(pid, name, args):
            # Links are resolved only where users other than root can create them.
            real = path if path.startswith(_ROOT_FOLDERS) else os.path.realpath(path)
            if self._is_below(path) or self._is_below(real):
                uid = injection._uid(pid)
                if uid:
                    self.others[uid] = self.others.get(uid, 0) + 1
                elif len(self.root) < 200:
                    self.root.append(f"{self._program(pid)}: {name}({path})")

    def _is_below(self, path: str) -> bool:
        return any(path == item or path.startswith(f"{item}/") for item in self.below)

    @staticmethod
    def _program(pid: int) -> str:
        with open(f"/proc/{pid}/cmdline", "rb") as arguments:
            return arguments.read()[:200].replace(b"\0", b" ").decode("utf-8", "replace").strip()

    @staticmethod
    def _paths(pid: int, name: str, args: t.Sequence[int]) -> t.Iterator[str]:
        memory = injection._Memory(pid)
        position = 0
        for form in _FORMS[name]:
            folder = injection._AT_FDCWD
            if form == "a":
                folder = args[position]
                position += 1
            # An empty path means the descriptor itself, which an earlier call has opened.
            given = memory.text(args[position]) if form in "pa" and args[position] else ""
            if given.startswith("/") and not given.startswith("/proc/"):
                yield os.path.normpath(given)
            elif given:
                yield memory.path(memory.descriptor(folder), args[position])
            position += 1


def _main(request: Json) -> int:
    found = _Tracer(request["command"], request["below"]).run()
    with open(request["log"], "w", encoding="utf-8") as log:
        json.dump(found, log)
    return 0


if __name__ == "__main__":
    sys.exit(_main(json.loads(sys.argv[1])))
