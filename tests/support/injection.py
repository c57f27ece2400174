# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Our modules, stopped at any one of the system calls with which they change the filesystem.

A server process holds the modules imported and forks a child for each run. A seccomp filter stops the
child, and all that it forks, at each call of interest; the server's tracer counts them, and at the
one that is wanted kills the lot, or has the call fail without being made. No call escapes: it is the
kernel that stops them, whatever Python or C code makes them. Programs that a module executes (podman
--version) are none of its own and not counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import importlib
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time
import typing as t

from .waiting import LIMIT

if t.TYPE_CHECKING:
    from .lab import Lab
    from .machines import Account

Json = t.Dict[str, t.Any]
# What a call is made to do: not to be made at all, because its processes are killed, or to fail.
KILL, KILL_ONE = "kill", "kill one"
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EINTR")

_PACKAGE = "ansible_collections.userns.storage.plugins.modules"
# A program that is called as a module is.
CONVERSION = "support.conversion_main"
_MODULES = ("layer_template", "layer_gc", "image_layers", "image_layers_info", "shared_images")

# Where the path or the descriptor of a call is among its arguments: f a descriptor, p a path below
# the working directory, a a descriptor of a directory followed by a path.
_FORMS = {
    "write": "f", "pwrite64": "f", "writev": "f", "pwritev": "f", "pwritev2": "f",
    "sendfile": "f", "copy_file_range": "--f", "splice": "--f", "fallocate": "f",
    "ftruncate": "f", "truncate": "p", "fsync": "f", "fdatasync": "f", "syncfs": "f", "sync": "",
    "open": "p", "creat": "p", "openat": "a", "openat2": "a", "ioctl": "f",
    "rename": "pp", "renameat": "aa", "renameat2": "aa", "link": "pp", "linkat": "aa",
    "symlink": "-p", "symlinkat": "-a", "unlink": "p", "unlinkat": "a", "mkdir": "p",
    "mkdirat": "a", "rmdir": "p", "mknod": "p", "mknodat": "a", "chmod": "p", "fchmod": "f",
    "fchmodat": "a", "fchmodat2": "a", "chown": "p", "lchown": "p", "fchown": "f",
    "fchownat": "a", "utimensat": "a", "utimes": "p", "futimesat": "a", "setxattr": "p",
    "lsetxattr": "p", "fsetxattr": "f", "removexattr": "p", "lremovexattr": "p",
    "fremovexattr": "f",
}  # fmt: skip

_X86_64 = {
    "write": 1, "open": 2, "ioctl": 16, "pwrite64": 18, "writev": 20, "sendfile": 40, "fsync": 74,
    "fdatasync": 75, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84,
    "creat": 85, "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91, "chown": 92,
    "fchown": 93, "lchown": 94, "mknod": 133, "sync": 162, "setxattr": 188, "lsetxattr": 189,
    "fsetxattr": 190, "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "utimes": 235,
    "openat": 257, "mkdirat": 258, "mknodat": 259, "fchownat": 260, "futimesat": 261,
    "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266, "fchmodat": 268,
    "splice": 275, "utimensat": 280, "fallocate": 285, "pwritev": 296, "syncfs": 306,
    "renameat2": 316, "copy_file_range": 326, "pwritev2": 328, "openat2": 437, "fchmodat2": 452,
}  # fmt: skip
_AARCH64 = {
    "setxattr": 5, "lsetxattr": 6, "fsetxattr": 7, "removexattr": 14, "lremovexattr": 15,
    "fremovexattr": 16, "ioctl": 29, "mknodat": 33, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36,
    "linkat": 37, "renameat": 38, "truncate": 45, "ftruncate": 46, "fallocate": 47, "fchmod": 52,
    "fchmodat": 53, "fchownat": 54, "fchown": 55, "openat": 56, "write": 64, "writev": 66,
    "pwrite64": 68, "pwritev": 70, "sendfile": 71, "splice": 76, "sync": 81, "fsync": 82,
    "fdatasync": 83, "utimensat": 88, "syncfs": 267, "renameat2": 276, "copy_file_range": 285,
    "pwritev2": 287, "openat2": 437, "fchmodat2": 452,
}  # fmt: skip
_NUMBERS = _AARCH64 if os.uname().machine == "aarch64" else _X86_64
_NAMES = {number: name for name, number in _NUMBERS.items()}

# FICLONE and FICLONERANGE; of btrfs snapshot, subvolume and their end.
_WRITING_IOCTLS = (0x40049409, 0x4020940D, 0x50009417, 0x50009418, 0x5000940F, 0x5000943F)
_AT_FDCWD = 0xFFFFFF9C

_TRACEME, _POKEUSER, _CONT, _SETREGSET = 0, 6, 7, 0x4205
_SETOPTIONS, _GETEVENTMSG, _SYSCALL_INFO = 0x4200, 0x4201, 0x420E
# Forks, clones, executions and the filter's stops are told; the traced die with the tracer.
_OPTIONS = 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000
_EVENT_FORKS, _EVENT_EXEC, _EVENT_SECCOMP = (1, 2, 3), 4, 7
_WALL = 0x40000000
# pause or ppoll, and rt_sigtimedwait, with which podman's pause process waits.
_PAUSES = ("73 ", "137 ") if os.uname().machine == "aarch64" else ("34 ", "128 ")

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.restype = ctypes.c_long
_LIBC.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call that was about to be made.

    :ivar paths: what it is about, absolute; two for a rename or a link
    :ivar content: of the file that is about to get the name of a file of records, else ""
    :ivar uid: with whose rights on files, as the host counts users
    :ivar changes: whether it would change anything
    """

    name: str
    paths: t.Tuple[str, ...]
    content: str = ""
    uid: int = 0
    changes: bool = True

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.paths)})"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has ended, or was ended.

    :ivar points: calls of interest that were made, or would have been
    :ivar at: the call that was not made; None if the run ended before it came
    :ivar result: what the module printed; empty when it was killed
    :ivar calls: all of them, where they were to be recorded
    """

    points: int
    at: t.Optional[Call]
    result: Json
    calls: t.Tuple[Call, ...] = ()
    output: str = ""


class Modules:
    """A server for our modules. Not for a process that has children of its own to wait for."""

    def __init__(self, lab: Lab, environ: t.Optional[t.Mapping[str, str]] = None) -> None:
        path = [str(lab.tree), str(pathlib.Path(__file__).parents[1])]
        self._process = subprocess.Popen(
            [sys.executable, "-B", "-m", "support.injection"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **lab.machine.environ(_root()),
                "PYTHONPATH": os.pathsep.join(path),
                **(environ or {}),
            },
            cwd="/",
        )

    def run(
        self,
        module: str,
        args: t.Mapping[str, t.Any],
        *,
        below: str = "",
        at: int = 0,
        what: str = "",
        record: bool = False,
        opens: bool = False,
        account: t.Optional[Account] = None,
    ) -> Run:
        """Run one of our modules.

        :param below: only calls about paths below this folder are points
        :param at: the number of the call to stop at, from 1; 0 lets all be made
        :param what: KILL, KILL_ONE or the name of an error
        :param record: whether the calls are to be kept
        :param opens: whether those that open something to read it are kept too; they are no points
        :param account: who runs it; root if not given
        """
        asked = {
            "module": module,
            "args": dict(args),
            "below": below,
            "at": at,
            "what": what,
            "record": record or opens,
            "opens": opens,
            "ids": [account.uid, account.gid] if account else None,
        }
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(asked).encode() + b"\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended with {self._process.wait()}")
        answer = json.loads(line)
        if "fault" in answer:
            raise RuntimeError(answer["fault"])
        return Run(
            answer["points"],
            _call(answer["at"]) if answer["at"] else None,
            _result(answer["output"]),
            tuple(map(_call, answer["calls"])),
            answer["output"],
        )

    def close(self) -> None:
        """End the server."""
        stdin = self._process.stdin
        if stdin is not None:
            stdin.close()
        self._process.wait(LIMIT)


def _root() -> Account:
    from .machines import ROOT

    return ROOT


def _call(found: t.Sequence[t.Any]) -> Call:
    return Call(found[0], tuple(found[1]), found[2], found[3], found[4])


def _result(output: str) -> Json:
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            result: Json = json.loads(line)
            return result
    return {}


# The server


def _ptrace(request: int, pid: int, address: int = 0, data: int = 0) -> int:
    found = _LIBC.ptrace(request, pid, address, data)
    if found < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), f"ptrace {request:#x}")
    return int(found)


def _install_filter() -> None:
    """Have the kernel stop this process, and all that it forks, at each call of interest."""
    numbers = sorted(_NAMES)
    code = [(0x20, 0, 0, 0)]
    for place, number in enumerate(numbers):
        code.append((0x15, len(numbers) - place, 0, number))
    code += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FF00000)]
    body = b"".join(struct.pack("<HBBI", *item) for item in code)
    buffer = ctypes.create_string_buffer(body, len(body))
    program = struct.pack("@HxxxxxxP", len(code), ctypes.addressof(buffer))
    if _LIBC.prctl(22, ctypes.c_ulong(2), ctypes.c_char_p(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


class _Memory:
    """The working directory, descriptors and strings of a stopped process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def read(self, address: int, size: int) -> bytes:
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            return memory.read(size)

    def text(self, address: int) -> str:
        data = b""
        while b"\0" not in data:
            room = 4096 - (address + len(data)) % 4096
            data += self.read(address + len(data), room)
        return os.fsdecode(data[: data.index(b"\0")])

    def link(self, name: str) -> str:
        try:
            return os.readlink(f"/proc/{self.pid}/{name}")
        except OSError:
            return ""

    def descriptor(self, number: int) -> str:
        number &= 0xFFFFFFFF
        return self.link("cwd" if number == _AT_FDCWD else f"fd/{number}")

    def path(self, base: str, address: int) -> str:
        if not address:
            return base
        name = self.text(address)
        prefix = "/proc/self/fd/"
        if name.startswith(prefix):
            number, _slash, rest = name[len(prefix) :].partition("/")
            found = self.link(f"fd/{number}")
            return os.path.join(found, rest) if rest else found
        return os.path.normpath(os.path.join(base, name))


def _call_of(pid: int) -> t.Tuple[int, t.List[int]]:
    """The number and the arguments of the call that the seccomp filter has stopped."""
    buffer = ctypes.create_string_buffer(88)
    _ptrace(_SYSCALL_INFO, pid, len(buffer), ctypes.addressof(buffer))
    number, *args = struct.unpack_from("<7Q", buffer, 24)
    return number, args


def _changes(pid: int, name: str, args: t.Sequence[int]) -> bool:
    """Whether a call would change anything."""
    if name in ("open", "openat", "openat2"):
        if name == "openat2":
            (flags,) = struct.unpack("<Q", _Memory(pid).read(args[2], 8))
        else:
            flags = args[1 if name == "open" else 2]
        return bool(flags & (os.O_CREAT | os.O_TRUNC)) or flags & os.O_TMPFILE == os.O_TMPFILE
    return name != "ioctl" or args[1] & 0xFFFFFFFF in _WRITING_IOCTLS


def _paths(pid: int, name: str, args: t.Sequence[int]) -> t.List[str]:
    """What a call is about."""
    memory = _Memory(pid)
    paths, place = [], 0
    for form in _FORMS[name]:
        if form == "f":
            paths.append(memory.descriptor(args[place]))
        elif form == "p":
            paths.append(memory.path(memory.link("cwd"), args[place]))
        elif form == "a":
            paths.append(memory.path(memory.descriptor(args[place]), args[place + 1]))
            place += 1
        place += 1
    return paths


def _uid(pid: int) -> int:
    """With whose rights on files a process works."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        line = next(line for line in status if line.startswith("Uid:"))
    return int(line.split()[4])


class _Tracer:
    """Sees one run through."""

    def __init__(self, asked: Json) -> None:
        self.asked = asked
        self.below = asked["below"].rstrip("/") + "/" if asked["below"] else ""
        self.points = 0
        self.at: t.Optional[t.List[t.Any]] = None
        self.calls: t.List[t.List[t.Any]] = []
        self.known: t.Set[int] = set()
        self.foreign: t.Set[int] = set()
        self.living: t.Set[int] = set()

    def run(self) -> Json:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(self.asked, writing)
        os.close(writing)
        self.known.add(pid)
        self.living.add(pid)
        os.waitpid(pid, _WALL)
        _ptrace(_SETOPTIONS, pid, 0, _OPTIONS)
        _ptrace(_CONT, pid)
        while True:
            try:
                stopped, status = self._next()
            except ChildProcessError:
                break
            if os.WIFSTOPPED(status):
                with contextlib.suppress(ProcessLookupError):
                    _ptrace(_CONT, stopped, 0, self._stopped(stopped, status))
            else:
                self.known.discard(stopped)
                self.living.discard(stopped)
        output = b""
        while True:
            piece = os.read(reading, 65536)
            if not piece:
                break
            output += piece
        os.close(reading)
        return {
            "points": self.points,
            "at": self.at,
            "calls": self.calls,
            "output": output.decode("utf-8", "replace"),
        }

    def _next(self) -> t.Tuple[int, int]:
        """The next event. podman's pause process, which never ends itself, is killed after all other processes."""
        while self.living and self.living <= self.foreign:
            pid, status = os.waitpid(-1, _WALL | os.WNOHANG)
            if pid:
                return pid, status
            for item in self.living:
                with contextlib.suppress(OSError):
                    if pathlib.Path(f"/proc/{item}/syscall").read_text().startswith(_PAUSES):
                        os.kill(item, signal.SIGKILL)
            time.sleep(0.02)
        return os.waitpid(-1, _WALL)

    def _stopped(self, pid: int, status: int) -> int:
        """Look at a stop; the signal to go on with."""
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_SECCOMP:
            self._called(pid)
            return 0
        if event in _EVENT_FORKS:
            message = ctypes.c_ulong()
            _ptrace(_GETEVENTMSG, pid, 0, ctypes.addressof(message))
            self.living.add(message.value)
            if pid in self.foreign:
                self.foreign.add(message.value)
            return 0
        if event == _EVENT_EXEC:
            self.foreign.add(pid)
            return 0
        if pid not in self.known and number == signal.SIGSTOP:
            self.known.add(pid)
            return 0
        return number

    def _called(self, pid: int) -> None:
        if pid in self.foreign:
            return
        number, args = _call_of(pid)
        name = _NAMES[number]
        changes = _changes(pid, name, args)
        if not changes and not (self.asked["opens"] and name.startswith("open")):
            return
        paths = _paths(pid, name, args)
        if self.below and not any((path + "/").startswith(self.below) for path in paths):
            return
        if self.asked["record"]:
            self.calls.append([name, paths, self._content(pid, name, paths), _uid(pid), changes])
        if not changes:
            return
        self.points += 1
        if self.points != self.asked["at"]:
            return
        self.at = [name, paths, "", 0, True]
        what = self.asked["what"]
        if what == KILL:
            for item in tuple(self.known):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(item, signal.SIGKILL)
        elif what == KILL_ONE:
            os.kill(pid, signal.SIGKILL)
        else:
            _refuse(pid, getattr(errno, what))

    @staticmethod
    def _content(pid: int, name: str, paths: t.Sequence[str]) -> str:
        if not name.startswith("rename") or not paths[1].endswith(".json"):
            return ""
        with open(f"/proc/{pid}/root{paths[0]}", encoding="utf-8") as content:
            return content.read()


def _refuse(pid: int, number: int) -> None:
    """Have the call that a process has stopped at return an error without being made."""
    if os.uname().machine == "aarch64":
        for kind, value in ((0x404, struct.pack("<i", -1)), (1, struct.pack("<q", -number))):
            buffer = ctypes.create_string_buffer(value, len(value))
            vector = struct.pack("@PP", ctypes.addressof(buffer), len(value))
            data = ctypes.create_string_buffer(vector, len(vector))
            _ptrace(_SETREGSET, pid, kind, ctypes.addressof(data))
        return
    # orig_rax and rax of struct user.
    _ptrace(_POKEUSER, pid, 15 * 8, ctypes.c_ulong(-1).value)
    _ptrace(_POKEUSER, pid, 10 * 8, ctypes.c_ulong(-number).value)


def _child(asked: Json, output: int) -> t.NoReturn:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if asked["ids"]:
            uid, gid = asked["ids"]
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        _install_filter()
        words = {
            **asked["args"],
            "_ansible_remote_tmp": "/tmp",
            "_ansible_keep_remote_files": False,
        }
        sys.argv = [asked["module"], json.dumps({"ANSIBLE_MODULE_ARGS": words})]
        _imported(asked["module"]).main()
    except SystemExit:
        pass
    except BaseException as error:
        os.write(2, repr(error).encode())
    finally:
        sys.stdout.flush()
        os._exit(0)


def _imported(name: str) -> t.Any:
    return importlib.import_module(name if "." in name else f"{_PACKAGE}.{name}")


def _serve() -> None:
    for name in (*_MODULES, CONVERSION):
        _imported(name)
    # Ansible imports these at the end of a module's run.
    for name in ("ansible.module_utils._internal._json", "ansible.module_utils.common.warnings"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    answers = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin.buffer:
        try:
            answer = _Tracer(json.loads(line)).run()
        except Exception as error:
            answer = {"fault": repr(error)}
        os.write(answers, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    _serve()
