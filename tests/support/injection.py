# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Stop modules of this collection at any of the system calls that change the filesystem.

A server process imports the modules and forks a child for each run. A seccomp filter stops the child and
its descendants at each relevant system call. The tracer in the server counts these calls; at the selected
call it kills the processes, or makes the call fail without executing it. The kernel stops the calls, so
that none is missed, whether Python or C code makes it. Calls of programs that a module executes (podman
--version) are not counted.
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

from . import system_calls
from .waiting import LIMIT

if t.TYPE_CHECKING:
    from .lab import Lab
    from .machines import Account

Json = t.Dict[str, t.Any]
# The faults at the selected call: all processes or only the calling process are killed, or the call fails.
KILL, KILL_CALLER = "kill", "kill caller"
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EINTR")

_PACKAGE = "ansible_collections.userns.storage.plugins.modules"
# A program with the interface of a module.
CONVERSION = "support.conversion_main"
_MODULES = ("layer_template", "layer_gc", "image_layers", "image_layers_info", "shared_images")

# The positions of paths and descriptors among the arguments of each call: f is a descriptor, p a path relative
# to the working directory, a the descriptor of a directory followed by a path, - any other argument.
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

_NAMES = system_calls.names_by_number(_FORMS)

# FICLONE and FICLONERANGE; for btrfs, the creation of snapshots and subvolumes and their removal.
_WRITING_IOCTLS = (0x40049409, 0x4020940D, 0x50009417, 0x50009418, 0x5000940F, 0x5000943F)
_AT_FDCWD = 0xFFFFFF9C

_TRACEME, _POKEUSER, _CONT, _SETREGSET = 0, 6, 7, 0x4205
_SETOPTIONS, _GETEVENTMSG, _SYSCALL_INFO = 0x4200, 0x4201, 0x420E
# Report forks, clones, executions and stops of the filter; kill the traced processes when the tracer exits.
_OPTIONS = 0x2 | 0x4 | 0x8 | 0x10 | 0x80 | 0x100000
_EVENT_FORKS, _EVENT_EXEC, _EVENT_SECCOMP = (1, 2, 3), 4, 7
_WALL = 0x40000000
# pause or ppoll, and rt_sigtimedwait: the calls in which podman's pause process waits.
_PAUSES = ("73 ", "137 ") if os.uname().machine == "aarch64" else ("34 ", "128 ")

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.ptrace.restype = ctypes.c_long
_LIBC.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


@dataclasses.dataclass(frozen=True)
class Call:
    """A system call before its execution.

    :ivar paths: its absolute paths; two for a rename or a link
    :ivar content: the content of the file, if the call renames it to a file of records; otherwise ""
    :ivar uid: the filesystem UID of the process, as a UID of the host
    :ivar changes: whether the call changes the filesystem
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
    """A run that was completed or killed.

    :ivar points: the number of relevant calls, including the selected call
    :ivar at: the selected call; None if the run ended before it
    :ivar result: the result of the module; empty if it was killed
    :ivar calls: the calls, if they are recorded
    """

    points: int
    at: t.Optional[Call]
    result: Json
    calls: t.Tuple[Call, ...] = ()
    output: str = ""


class ModuleServer:
    """A server process that runs modules of this collection."""

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
        fault: str = "",
        record: bool = False,
        opens: bool = False,
        account: t.Optional[Account] = None,
    ) -> Run:
        """Run a module of this collection.

        :param below: only calls with paths below this folder are counted
        :param at: the number of the selected call, from 1; 0 for a complete run
        :param fault: the fault: KILL, KILL_CALLER or the name of an error
        :param record: whether the calls are recorded
        :param opens: whether calls that open files for reading are recorded, too; they are not counted
        :param account: the user who runs it; root if not given
        """
        request = {
            "module": module,
            "args": dict(args),
            "below": below,
            "at": at,
            "fault": fault,
            "record": record or opens,
            "opens": opens,
            "ids": [account.uid, account.gid] if account else None,
        }
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request).encode() + b"\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"the server exited with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return Run(
            answer["points"],
            _call(answer["at"]) if answer["at"] else None,
            _result(answer["output"]),
            tuple(map(_call, answer["calls"])),
            answer["output"],
        )

    def close(self) -> None:
        """Stop the server."""
        stdin = self._process.stdin
        if stdin is not None:
            stdin.close()
        self._process.wait(LIMIT)


def _root() -> Account:
    from .machines import ROOT

    return ROOT


def _call(fields: t.Sequence[t.Any]) -> Call:
    return Call(fields[0], tuple(fields[1]), fields[2], fields[3], fields[4])


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
            size = 4096 - (address + len(data)) % 4096
            data += self.read(address + len(data), size)
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
    """The number and the arguments of the call at which the seccomp filter has stopped a process."""
    buffer = ctypes.create_string_buffer(88)
    _ptrace(_SYSCALL_INFO, pid, len(buffer), ctypes.addressof(buffer))
    number, *args = struct.unpack_from("<7Q", buffer, 24)
    return number, args


def _changes(pid: int, name: str, args: t.Sequence[int]) -> bool:
    """Whether a call changes the filesystem."""
    if name in ("open", "openat", "openat2"):
        if name == "openat2":
            (flags,) = struct.unpack("<Q", _Memory(pid).read(args[2], 8))
        else:
            flags = args[1 if name == "open" else 2]
        return bool(flags & (os.O_CREAT | os.O_TRUNC)) or flags & os.O_TMPFILE == os.O_TMPFILE
    return name != "ioctl" or args[1] & 0xFFFFFFFF in _WRITING_IOCTLS


def _paths(pid: int, name: str, args: t.Sequence[int]) -> t.List[str]:
    """The paths of a call."""
    memory = _Memory(pid)
    paths, position = [], 0
    for form in _FORMS[name]:
        if form == "f":
            paths.append(memory.descriptor(args[position]))
        elif form == "p":
            paths.append(memory.path(memory.link("cwd"), args[position]))
        elif form == "a":
            paths.append(memory.path(memory.descriptor(args[position]), args[position + 1]))
            position += 1
        position += 1
    return paths


def _uid(pid: int) -> int:
    """The filesystem UID of a process."""
    with open(f"/proc/{pid}/status", encoding="utf-8") as status:
        line = next(line for line in status if line.startswith("Uid:"))
    return int(line.split()[4])


class _Tracer:
    """Traces a run. It waits for all children of this process, which must not have any others."""

    def __init__(self, request: Json) -> None:
        self.request = request
        self.below = request["below"].rstrip("/") + "/" if request["below"] else ""
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
            _child(self.request, writing)
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
        """The next event. podman's pause process, which never exits, is killed after all other processes have ended."""
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
        """Handle a stop; returns the signal with which the process continues."""
        number, event = os.WSTOPSIG(status), status >> 16
        if event == _EVENT_SECCOMP:
            self._handle_call(pid)
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

    def _handle_call(self, pid: int) -> None:
        if pid in self.foreign:
            return
        number, args = _call_of(pid)
        name = _NAMES[number]
        changes = _changes(pid, name, args)
        if not changes and not (self.request["opens"] and name.startswith("open")):
            return
        paths = _paths(pid, name, args)
        if self.below and not any((path + "/").startswith(self.below) for path in paths):
            return
        if self.request["record"]:
            self.calls.append([name, paths, self._content(pid, name, paths), _uid(pid), changes])
        if not changes:
            return
        self.points += 1
        if self.points != self.request["at"]:
            return
        self.at = [name, paths, "", 0, True]
        fault = self.request["fault"]
        if fault == KILL:
            for item in tuple(self.known):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(item, signal.SIGKILL)
        elif fault == KILL_CALLER:
            os.kill(pid, signal.SIGKILL)
        else:
            _fail_call(pid, getattr(errno, fault))

    @staticmethod
    def _content(pid: int, name: str, paths: t.Sequence[str]) -> str:
        if not name.startswith("rename") or not paths[1].endswith(".json"):
            return ""
        with open(f"/proc/{pid}/root{paths[0]}", encoding="utf-8") as content:
            return content.read()


def _fail_call(pid: int, number: int) -> None:
    """Make the call at which a process has stopped return an error without executing it."""
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


def _child(request: Json, output: int) -> t.NoReturn:
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if request["ids"]:
            uid, gid = request["ids"]
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        _ptrace(_TRACEME, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        system_calls.install_filter(_NAMES)
        arguments = {
            **request["args"],
            "_ansible_remote_tmp": "/tmp",
            "_ansible_keep_remote_files": False,
        }
        sys.argv = [request["module"], json.dumps({"ANSIBLE_MODULE_ARGS": arguments})]
        _imported(request["module"]).main()
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
            answer = {"error": repr(error)}
        os.write(answers, json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    _serve()
