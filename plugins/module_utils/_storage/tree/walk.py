# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Walk over the merged view of a stack of layers with several processes.

The first process, the leader, distributes jobs and keeps the shared state: the directories that wait
for parts, and the hard-linked files that were found. Everything else is done by workers
that share only the queue of jobs:

* directories: list each directory, process its entries, descend for a while, return the remaining directories
* names: process some names of a directory: parts of very long directories, and hard-linked files
* finish: complete a directory after all of its parts
"""

from __future__ import annotations

import abc
import contextlib
import errno
import itertools
import marshal
import os
import pickle
import select
import signal
import socket
import struct
import time
import traceback
import typing as t

from ..errors import InternalError, StorageError, TreeError
from ..kernel import namespaces, termination
from ..kernel.oserrors import shown, translate_oserror
from .merged import LayerStack, attribute_names
from .tree_tools import Suspended

# Kinds of entries in a directory's listing.
FILE, SYMLINK, SPECIAL = range(3)

Totals = t.List[int]
FILES, DIRECTORIES, INODES, APPARENT, ALLOCATED = range(5)

Layers = t.Tuple[int, ...]
# A name and its kind.
Entry = t.Tuple[str, int]
# Device, inode, name and kind of a file with more than one name.
LinkedEntry = t.Tuple[int, int, str, int]
# The data that a visitor gets back when a waiting directory is finished.
Token = t.Tuple[int, ...]
# Four sorted lists: unmapped UIDs and GIDs, foreign UIDs and GIDs.
IDs = t.List[t.List[int]]
Progress = t.Callable[[int, int], None]

MOST_IDS = 100
MOST_WORKERS = 8

_JOB_ENTRIES = 128
# While there are too few jobs for all workers, jobs return directories earlier.
_FIRST_ENTRIES = 24
_PART = 128
_MOST_DIRECTORIES = 16
# A job does not descend to longer paths, so that its state stays small.
_LONG_PATH = 4096
_LONGEST_MESSAGE = 1 << 17
_PROGRESS_SECONDS = 0.5

_FRAME = struct.Struct("=L")

_DIRECTORY_JOB, _NAMES_JOB, _FINISH_JOB = range(3)
_PART_MESSAGE, _DONE_MESSAGE, _FAIL_MESSAGE, _TOTALS_MESSAGE = range(4)

# Messages of workers: (kind, ...) as below, marshalled between processes of the same interpreter.
Message = t.Tuple[t.Any, ...]
Emit = t.Callable[[Message], None]


class Visitor(abc.ABC):
    """Processes each directory and entry; all methods may raise OSError.

    Entries are processed between ``enter`` and ``leave`` of their directory. A visitor must release all state of
    a directory in ``leave``; errors end the walking process.
    """

    def __init__(self, stack: LayerStack, label: str) -> None:
        self.stack = stack
        self.label = label
        self.totals: Totals = [0, 0, 0, 0, 0]
        # To be called during long entries, with the totals so far.
        self.tell: t.Callable[[], None] = lambda: None

    def ids(self) -> t.Optional[IDs]:
        """IDs that cannot be mapped, at most ``MOST_IDS`` of each kind; None if there are none."""
        return None

    @abc.abstractmethod
    def init_worker(self) -> None:
        """Initialise a worker process."""

    @abc.abstractmethod
    def enter(self, path: str, fd: int, attributes: t.List[str]) -> Token:
        """Start a directory. ``fd`` is that of its topmost layer and stays open until ``leave``."""

    @abc.abstractmethod
    def reenter(self, path: str) -> None:
        """Return to a directory for some of its entries."""

    @abc.abstractmethod
    def directory(self, fd: int, name: str) -> None:
        """Process a subdirectory, in the topmost layer that has it; its ``enter`` follows later."""

    @abc.abstractmethod
    def entry(self, fd: int, name: str, kind: int, linked: bool) -> t.Optional[t.Tuple[int, int]]:
        """Process an entry that is no directory.

        :param fd: the directory in the layer that provides the entry
        :param linked: process it even if it has several names
        :returns: device and inode of a file with several names that was not processed
        """

    @abc.abstractmethod
    def leave(self, whole: bool) -> None:
        """End a directory; ``whole`` if it was entered with ``enter`` and no part is missing."""

    @abc.abstractmethod
    def finish(self, path: str, fd: int, token: Token) -> None:
        """Complete a directory that was not whole at its ``leave``."""

    @abc.abstractmethod
    def link(self, path: str, fd: int, links: t.List[t.Tuple[str, str, str]]) -> None:
        """Create hard links to existing files: (name, path of the other, name of the other)."""


class _Node:
    """A directory; its path is only built on demand, so that deep trees are as cheap as flat trees."""

    __slots__ = ("above", "layers", "name")

    def __init__(self, above: t.Optional[_Node], name: str, layers: Layers) -> None:
        self.above = above
        self.name = name
        self.layers = layers

    def path(self) -> str:
        parts = []
        node: t.Optional[_Node] = self
        while node is not None:
            if node.name:
                parts.append(node.name)
            node = node.above
        return "/".join(reversed(parts))


class _Held:
    """A directory that waits for its parts."""

    __slots__ = ("listed", "node", "outstanding", "token")

    def __init__(self, node: _Node, token: Token) -> None:
        self.node = node
        self.token = token
        self.outstanding = 0
        self.listed = False


class _Job:
    __slots__ = ("entries", "held", "kind", "layer", "linked", "nodes")

    def __init__(
        self,
        kind: int,
        nodes: t.List[_Node],
        held: t.Optional[_Held] = None,
        layer: int = 0,
        entries: t.Sequence[Entry] = (),
        linked: bool = False,
    ) -> None:
        self.kind = kind
        self.nodes = nodes
        self.held = held
        self.layer = layer
        self.entries = entries
        self.linked = linked

    def message(self, serial: int, budget: int) -> Message:
        """The parameters of a worker.

        :param budget: number of entries after which it returns further directories
        """
        if self.kind == _DIRECTORY_JOB:
            directories = [(node.path(), node.layers) for node in self.nodes]
            return (serial, self.kind, directories, budget)
        path, layers = self.nodes[0].path(), self.nodes[0].layers
        if self.kind == _NAMES_JOB:
            return (serial, self.kind, path, layers, self.layer, self.entries, self.linked)
        token = self.held.token if self.held is not None else ()
        return (serial, self.kind, path, layers, token)


class Worker:
    """Does jobs with a visitor, in any process."""

    def __init__(self, visitor: Visitor, sharing: int) -> None:
        self.visitor = visitor
        self.stack = visitor.stack
        self.sharing = sharing
        self._budget = 0
        self._at = ""
        self._name = ""
        # Of the current job, in the order of the "done" message.
        self._left: t.List[t.Tuple[int, str, Layers]] = []
        self._held: t.List[t.Tuple[int, str, Layers, Token]] = []
        self._links: t.List[t.Tuple[int, str, Layers, Token, int, t.List[LinkedEntry]]] = []

    def execute(self, message: Message, emit: Emit) -> None:
        """Do a job and send its result."""
        serial, kind = message[:2]
        self._left, self._held, self._links = [], [], []
        self.visitor.tell = lambda: emit((_TOTALS_MESSAGE, self._totals()))
        try:
            if kind == _DIRECTORY_JOB:
                self._directories(serial, message[2], message[3], emit)
            elif kind == _NAMES_JOB:
                self._names(*message[2:])
            else:
                self._finish(*message[2:])
        except OSError as error:
            path = "/".join(part for part in (self.visitor.label, self._at, self._name) if part)
            emit(_failure(OSError(error.errno, error.strerror, shown(path))))
            return
        except StorageError as error:
            path = "/".join(part for part in (self._at, self._name) if part)
            error.facts.setdefault("path", shown(path))
            emit(_failure(error))
            return
        ids = self.visitor.ids()
        emit((_DONE_MESSAGE, serial, self._left, self._held, self._links, self._totals(), ids))

    def _totals(self) -> Totals:
        totals, self.visitor.totals = self.visitor.totals, [0, 0, 0, 0, 0]
        return totals

    def _directories(
        self, serial: int, directories: t.List[t.Tuple[str, Layers]], budget: int, emit: Emit
    ) -> None:
        self._budget = budget
        # Index of the job's directory, and the path from there.
        todo = [(index, "", layers) for index, (_path, layers) in enumerate(directories)]
        todo.reverse()
        first = len(todo)
        while todo:
            index, suffix, layers = todo.pop()
            base = directories[index][0]
            path = f"{base}/{suffix}" if base and suffix else base or suffix
            if first > 0:
                first -= 1
            elif self._budget <= 0 or len(path) > _LONG_PATH:
                self._left.append((index, suffix, layers))
                continue
            todo.extend(self._directory(serial, index, suffix, path, layers, emit))

    def _directory(
        self, serial: int, index: int, suffix: str, path: str, layers: Layers, emit: Emit
    ) -> t.List[t.Tuple[int, str, Layers]]:
        """Process a directory; returns its subdirectories."""
        stack, visitor = self.stack, self.visitor
        self._at, self._name = path, ""
        children: t.Dict[str, t.List[int]] = {}
        closed: t.Set[str] = set()
        token: Token = ()
        whole = True
        top = -1
        entered = 0
        try:
            for position, layer in enumerate(layers):
                fd = stack.open(layer, path)
                try:
                    attributes = attribute_names(fd)
                    content = stack.content(attributes)
                    opaque = stack.is_opaque(fd, attributes)
                    # The kernel merges the roots of layers even if one is opaque.
                    last = position + 1 == len(layers) or (opaque and path != "")
                    if position == 0:
                        token = visitor.enter(path, fd, content)
                    linked: t.List[LinkedEntry] = []
                    part: t.List[Entry] = []
                    for name, kind in self._merge(fd, layer, last, children, closed):
                        entered += 1
                        if entered > _PART and self.sharing > 1:
                            part.append((name, kind))
                            if len(part) < _PART:
                                continue
                            turn = entered // _PART % self.sharing
                            if turn:
                                whole = False
                                where = (index, suffix, layers, token, layer)
                                emit((_PART_MESSAGE, serial, *where, part))
                            else:
                                self._entries(fd, part, False, linked)
                            part = []
                            continue
                        self._name = name
                        found = visitor.entry(fd, name, kind, False)
                        if found is not None:
                            linked.append((*found, name, kind))
                    self._entries(fd, part, False, linked)
                    if linked:
                        whole = False
                        self._links.append((index, suffix, layers, token, layer, linked))
                finally:
                    if position == 0:
                        top = fd
                    else:
                        os.close(fd)
                if last:
                    break
            self._name = ""
            visitor.leave(whole)
        finally:
            if top >= 0:
                os.close(top)
        if not whole:
            self._held.append((index, suffix, layers, token))
        self._budget -= entered + len(children) + 1
        prefix = f"{suffix}/" if suffix else ""
        return [(index, prefix + name, tuple(found)) for name, found in children.items()]

    def _merge(
        self,
        fd: int,
        layer: int,
        last: bool,
        children: t.Dict[str, t.List[int]],
        closed: t.Set[str],
    ) -> t.Iterator[Entry]:
        """The entries that a layer adds to a directory, without subdirectories.

        :param children: subdirectories found so far, with the layers of which they consist
        :param closed: names that hide those of lower layers
        """
        stack, visitor = self.stack, self.visitor
        with os.scandir(fd) as entries:
            for entry in entries:
                name = entry.name
                if name in closed:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    found = children.get(name)
                    if found is not None:
                        found.append(layer)
                        continue
                    children[name] = [layer]
                    self._name = name
                    visitor.directory(fd, name)
                    continue
                if entry.is_file(follow_symlinks=False):
                    kind = FILE
                elif entry.is_symlink():
                    kind = SYMLINK
                else:
                    kind = SPECIAL
                    self._name = name
                    try:
                        status = os.lstat(name, dir_fd=fd)
                    except FileNotFoundError:
                        # A mounted overlay lists some whiteouts, which do not exist there.
                        continue
                    if stack.is_whiteout(status):
                        closed.add(name)
                        continue
                if not last:
                    closed.add(name)
                if name not in children:
                    yield name, kind

    def _entries(
        self, fd: int, entries: t.Iterable[Entry], linked: bool, found: t.List[LinkedEntry]
    ) -> None:
        entry = self.visitor.entry
        for name, kind in entries:
            self._name = name
            other = entry(fd, name, kind, linked)
            if other is not None:
                found.append((*other, name, kind))

    def _names(
        self, path: str, layers: Layers, layer: int, entries: t.Iterable[Entry], linked: bool
    ) -> None:
        self._at, self._name = path, ""
        fd = self.stack.open(layer, path)
        try:
            self.visitor.reenter(path)
            found: t.List[LinkedEntry] = []
            self._entries(fd, entries, linked, found)
            if found:
                self._links.append((0, "", layers, (), layer, found))
            self._name = ""
            self.visitor.leave(False)
        finally:
            os.close(fd)

    def _finish(self, path: str, layers: Layers, token: Token) -> None:
        self._at, self._name = path, ""
        fd = self.stack.open(layers[0], path)
        try:
            self.visitor.finish(path, fd, token)
        finally:
            os.close(fd)


def _failure(error: BaseException) -> Message:
    return (_FAIL_MESSAGE, pickle.dumps(error))


class _Process(t.NamedTuple):
    pid: int
    results: int
    buffer: bytearray


class Walk:
    """Runs a visitor over a whole stack.

    :param workers: number of processes; None for one per usable processor
    :param progress: called from time to time with files and bytes done so far
    """

    def __init__(
        self,
        visitor: Visitor,
        workers: t.Optional[int] = None,
        progress: t.Optional[Progress] = None,
    ) -> None:
        self._visitor = visitor
        self._count = workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
        self._own = Worker(visitor, self._count)
        self._progress = progress
        self._last_report = time.monotonic()
        self.totals: Totals = [0, 0, 0, 0, 0]
        self._ids: t.Tuple[t.Set[int], ...] = (set(), set(), set(), set())
        self._pending: t.List[_Job] = []
        self._running: t.Dict[int, _Job] = {}
        self._serials = itertools.count()
        self._held: t.Dict[t.Tuple[int, int, str], _Held] = {}
        # By layer, device and inode: the name under which a file was processed.
        self._first: t.Dict[t.Tuple[int, int, int], t.Tuple[_Node, str]] = {}
        self._links: t.Dict[_Node, t.List[t.Tuple[str, _Node, str]]] = {}
        self._processes: t.List[_Process] = []
        self._jobs: t.Optional[socket.socket] = None

    def run(self) -> Totals:
        """Walk, and return the visitor's totals.

        :raises StorageError: the first error; all workers have ended
        """
        with translate_oserror(kind=TreeError):
            try:
                stack = self._visitor.stack
                root = _Node(None, "", tuple(range(len(stack))))
                self._pending.append(_Job(_DIRECTORY_JOB, [root]))
                self._loop()
                self._link()
            finally:
                self._stop_workers()
        with contextlib.suppress(Suspended):
            # The work is done.
            self._tell(last=True)
        return self.totals

    @property
    def ids(self) -> IDs:
        """All unmapped IDs that workers found, see ``Visitor.ids``."""
        return [sorted(numbers)[:MOST_IDS] for numbers in self._ids]

    def _loop(self) -> None:
        while self._pending or self._running:
            if not self._processes:
                # Now there is work for two processes.
                if self._count > 1 and len(self._pending) > 1:
                    self._start_workers()
                else:
                    self._do(self._next())
                    continue
            while self._pending and len(self._running) < 2 * len(self._processes):
                if not self._send(self._next()):
                    break
            if self._running:
                self._receive()

    def _next(self) -> _Job:
        """Take the newest job, so that a tree is finished branch by branch; small jobs are joined."""
        job = self._pending.pop()
        if job.kind == _DIRECTORY_JOB and self._processes:
            most = min(_MOST_DIRECTORIES, len(self._pending) // (2 * len(self._processes)))
            while len(job.nodes) < most and self._pending:
                if self._pending[-1].kind != _DIRECTORY_JOB:
                    break
                job.nodes.extend(self._pending.pop().nodes)
        return job

    def _budget(self) -> int:
        return _JOB_ENTRIES if len(self._pending) >= 2 * self._count else _FIRST_ENTRIES

    def _do(self, job: _Job) -> None:
        """Do a job in this process."""
        serial = next(self._serials)
        self._running[serial] = job
        self._own.execute(job.message(serial, self._budget()), self._hear)

    def _send(self, job: _Job) -> bool:
        """Queue a job for the next free worker; false if the queue is full."""
        serial = next(self._serials)
        data = marshal.dumps(job.message(serial, self._budget()))
        if len(data) > _LONGEST_MESSAGE or self._jobs is None:
            self._split_or_do(job)
            return True
        try:
            self._jobs.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                self._split_or_do(job)
                return True
            if error.errno in (errno.EAGAIN, errno.ENOBUFS) and self._running:
                self._pending.append(job)
                return False
            if error.errno in (errno.EPIPE, errno.ECONNRESET):
                self._raise_lost()
            raise
        self._running[serial] = job
        return True

    def _split_or_do(self, job: _Job) -> None:
        """Send a job that is too long for a message in pieces, or do it in this process."""
        if len(job.nodes) > 1:
            for node in job.nodes:
                self._send(_Job(_DIRECTORY_JOB, [node]))
        else:
            self._do(job)

    def _receive(self) -> None:
        """Wait for messages of workers and process them."""
        poll = select.poll()
        by_fd = {}
        for process in self._processes:
            poll.register(process.results, select.POLLIN)
            by_fd[process.results] = process
        # The caller may stop the walk even while workers are silent because of a large file.
        ready = poll.poll(_PROGRESS_SECONDS * 1000 if self._progress else None)
        if not ready:
            self._tell()
        for fd, _event in ready:
            process = by_fd[fd]
            data = os.read(fd, 1 << 20)
            if not data:
                self._raise_lost(process)
            buffer = process.buffer
            buffer += data
            start = 0
            while len(buffer) - start >= _FRAME.size:
                (length,) = _FRAME.unpack_from(buffer, start)
                end = start + _FRAME.size + length
                if len(buffer) < end:
                    break
                with memoryview(buffer) as view:
                    message = marshal.loads(view[start + _FRAME.size : end])
                start = end
                self._hear(message)
            del buffer[:start]

    def _raise_lost(self, process: t.Optional[_Process] = None) -> t.NoReturn:
        """Raise an error about a worker that ended early."""
        reason = "ended"
        if process is not None:
            self._processes.remove(process)
            os.close(process.results)
            _pid, status = os.waitpid(process.pid, 0)
            if os.WIFSIGNALED(status):
                reason = f"was killed by {termination.signal_text(os.WTERMSIG(status))}"
        raise TreeError(
            self._visitor.label,
            f"a worker process {reason} before its work was done",
            "Look for the kernel's out-of-memory killer (dmesg), then run it again.",
        )

    def _hear(self, message: Message) -> None:
        if message[0] == _FAIL_MESSAGE:
            raise pickle.loads(message[1])
        if message[0] == _TOTALS_MESSAGE:
            self._add(message[1])
            return
        if message[0] == _PART_MESSAGE:
            serial, index, suffix, layers, token, layer, entries = message[1:]
            held = self._hold(serial, index, suffix, layers, token)
            held.outstanding += 1
            self._pending.append(_Job(_NAMES_JOB, [held.node], held, layer, entries))
            return
        serial, left, listed, links, totals, ids = message[1:]
        job = self._running[serial]
        for index, suffix, layers in left:
            node = _Node(job.nodes[index], suffix, layers)
            self._pending.append(_Job(_DIRECTORY_JOB, [node]))
        for index, suffix, layers, token, layer, entries in links:
            held = job.held or self._hold(serial, index, suffix, layers, token)
            self._meet_links(held, layer, entries)
        for index, suffix, _layers, _token in listed:
            held = self._held.pop((serial, index, suffix))
            held.listed = True
            self._complete(held)
        if job.kind == _NAMES_JOB and job.held is not None:
            job.held.outstanding -= 1
            self._complete(job.held)
        del self._running[serial]
        if ids is not None:
            for numbers, found in zip(self._ids, ids):
                numbers.update(found[: MOST_IDS - len(numbers)])
        self._add(totals)

    def _add(self, totals: Totals) -> None:
        for index, number in enumerate(totals):
            self.totals[index] += number
        self._tell()

    def _hold(self, serial: int, index: int, suffix: str, layers: Layers, token: Token) -> _Held:
        key = (serial, index, suffix)
        held = self._held.get(key)
        if held is None:
            base = self._running[serial].nodes[index]
            node = _Node(base, suffix, layers) if suffix else base
            held = self._held[key] = _Held(node, token)
        return held

    def _complete(self, held: _Held) -> None:
        if held.listed and not held.outstanding:
            self._pending.append(_Job(_FINISH_JOB, [held.node], held))

    def _meet_links(self, held: _Held, layer: int, entries: t.List[LinkedEntry]) -> None:
        """Process the first name of a file, and record the others."""
        firsts = []
        for device, inode, name, kind in entries:
            key = (layer, device, inode)
            other = self._first.get(key)
            if other is None:
                self._first[key] = (held.node, name)
                firsts.append((name, kind))
            else:
                self._links.setdefault(held.node, []).append((name, *other))
        for start in range(0, len(firsts), _PART):
            held.outstanding += 1
            part = firsts[start : start + _PART]
            self._pending.append(_Job(_NAMES_JOB, [held.node], held, layer, part, True))

    def _link(self) -> None:
        """Create the hard links after all files exist."""
        stack, visitor = self._visitor.stack, self._visitor
        for node, links in self._links.items():
            path = node.path()
            try:
                fd = stack.open(node.layers[0], path)
                try:
                    visitor.link(path, fd, [(name, at.path(), other) for name, at, other in links])
                finally:
                    os.close(fd)
            except OSError as error:
                path = "/".join(part for part in (visitor.label, path) if part)
                raise OSError(error.errno, error.strerror, shown(path)) from None

    def _tell(self, last: bool = False) -> None:
        if self._progress is None:
            return
        now = time.monotonic()
        if last or now - self._last_report >= _PROGRESS_SECONDS:
            self._last_report = now
            self._progress(self.totals[FILES] + self.totals[DIRECTORIES], self.totals[APPARENT])

    def _start_workers(self) -> None:
        """Fork the workers."""
        self._jobs, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            for _number in range(self._count):
                results, result_fd = os.pipe()
                leader = os.getpid()
                pid = os.fork()
                if pid == 0:
                    try:
                        self._jobs.close()
                        os.close(results)
                        for process in self._processes:
                            os.close(process.results)
                        _serve(Worker(self._visitor, self._count), leader, theirs, result_fd)
                    finally:
                        os._exit(1)
                os.close(result_fd)
                self._processes.append(_Process(pid, results, bytearray()))

    def _stop_workers(self) -> None:
        """End the workers; the work of busy workers is dropped."""
        if self._jobs is not None:
            self._jobs.close()
            self._jobs = None
        for process in self._processes:
            if self._running:
                os.kill(process.pid, signal.SIGKILL)
            os.close(process.results)
        for process in self._processes:
            os.waitpid(process.pid, 0)
        self._processes = []


def _serve(worker: Worker, leader: int, jobs: socket.socket, result_fd: int) -> None:
    """Run a worker: process jobs until the leader closes the queue or dies."""
    namespaces.die_with_parent(leader)
    for number in termination.SIGNALS:
        # The leader handles signals, and ends the workers when it ends.
        signal.signal(number, signal.SIG_IGN)
    worker.visitor.totals = [0, 0, 0, 0, 0]
    worker.visitor.init_worker()

    def emit(message: Message) -> None:
        data = marshal.dumps(message)
        view = memoryview(_FRAME.pack(len(data)) + data)
        while view:
            view = view[os.write(result_fd, view) :]

    while True:
        data = jobs.recv(2 * _LONGEST_MESSAGE)
        if not data:
            os._exit(0)
        try:
            worker.execute(marshal.loads(data), emit)
        except Exception as error:
            emit(
                _failure(
                    InternalError(
                        "a worker process",
                        f"failed with {type(error).__name__}: {error}",
                        "This is a bug in the collection; please report it.",
                        trace=traceback.format_exc(),
                    )
                )
            )
            return
