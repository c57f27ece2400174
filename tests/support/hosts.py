# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Other Debian releases as hosts: cached roots made by debootstrap, entered by pivot_root."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import typing as t

from . import images, mounts
from .lab import Lab, cache_dir
from .machines import Machine
from .waiting import LIMIT, wait_until

SUITES = ("trixie", "sid", "experimental")
_PACKAGES = (
    *("acl", "attr", "btrfs-progs", "buildah", "containers-storage", "crun", "fuse-overlayfs"),
    *("libcap2-bin", "netavark", "openssh-server", "passwd", "podman", "python3", "skopeo"),
    "uidmap",
)
_INSTALL = f"""\
set -e
export DEBIAN_FRONTEND=noninteractive
apt-get -q update
apt-get -q -y install --no-install-recommends {" ".join(_PACKAGES)}
apt-get clean
"""
_TAR_OPTIONS = ("--xattrs", "--numeric-owner")
# Additional packages of bare hosts: one is a minimal installation, the other similar to a cloud image.
_BARE = {"bookworm": "", "trixie": "python3-apt sudo"}
# The package lists are removed, as on an old image; the packages that the role prepare installs are in apt's cache.
_INSTALL_BARE = """\
set -e
export DEBIAN_FRONTEND=noninteractive
apt-get -q update
apt-get -q -y install --no-install-recommends openssh-server python3 $PACKAGES
apt-get clean
apt-get -q -y install --download-only python3-apt podman skopeo uidmap containers-storage
rm -r /var/lib/apt/lists/*
"""
# Experimental only has single packages for sid, so its root is that of sid with these packages replaced.
_BASES = {"experimental": "sid"}
_UPGRADE = """\
set -e
export DEBIAN_FRONTEND=noninteractive
sed -n 's/ sid / experimental /p' /etc/apt/sources.list > /etc/apt/sources.list.d/experimental.list
apt-get -q update
apt-get -q -y install --no-install-recommends -t experimental podman buildah
apt-get clean
"""


@contextlib.contextmanager
def _building(target: pathlib.Path) -> t.Iterator[pathlib.Path]:
    """A temporary name beside `target`, which is renamed to it at the end; one builder at a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        part = target.parent / f"{target.name}.part"
        if not target.exists() and part.is_dir():
            shutil.rmtree(part)
        yield part
        if not target.exists():
            os.rename(part, target)


def _quietly(command: t.Sequence[str], **options: t.Any) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-4000:]}")


def minbase(suite: str = "trixie") -> pathlib.Path:
    """The tar archive of a debootstrap minbase root (200 MB), created on first use."""
    target = cache_dir() / "images" / f"{suite}-minbase.tar"
    if not target.exists():
        with _building(target) as part:
            if not target.exists():
                root = part.with_name(part.name + ".root")
                shutil.rmtree(root, ignore_errors=True)
                _quietly(["debootstrap", "--variant=minbase", suite, str(root)])
                # A mirror frozen in time serves releases whose date of expiry is past.
                settings = root / "etc/apt/apt.conf.d/99archive"
                settings.write_text("Acquire::Check-Valid-Until false;\n")
                shutil.rmtree(root / "var/cache/apt", ignore_errors=True)
                _quietly(["tar", "-C", str(root), *_TAR_OPTIONS, "-cf", str(part), "."])
                shutil.rmtree(root)
    return target


def _unpack(suite: str, root: pathlib.Path) -> None:
    """Create a minbase root on which services do not start."""
    root.mkdir()
    _quietly(["tar", "-C", str(root), *_TAR_OPTIONS, "-xpf", str(minbase(suite))])
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)


def root(suite: str) -> pathlib.Path:
    """The cached root of a Debian release with podman and related programs, created on first use."""
    target = cache_dir() / "roots" / suite
    if not target.exists():
        with _building(target) as part:
            if not target.exists():
                if suite in _BASES:
                    _quietly(["cp", "-a", "--reflink=auto", str(root(_BASES[suite])), str(part)])
                    _inside(part, _UPGRADE)
                else:
                    _unpack(suite, part)
                    _inside(part, _INSTALL)
    return target


def bare(suite: str) -> pathlib.Path:
    """The cached root of a Debian release with Python, an SSH server and little more.

    The packages that the role prepare installs are already downloaded.
    """
    target = cache_dir() / "roots" / f"{suite}-bare"
    if not target.exists():
        with _building(target) as part:
            if not target.exists():
                _unpack(suite, part)
                _inside(part, _INSTALL_BARE.replace("$PACKAGES", _BARE[suite]))
    return target


def _inside(root_folder: pathlib.Path, commands: str) -> None:
    """Run shell commands in a root, with nothing but /proc mounted, in a private mount namespace."""
    script = (
        'mount --make-rprivate / && mount -t proc proc "$1/proc" && exec chroot "$1" sh -c "$2"'
    )
    _quietly(["unshare", "-m", "sh", "-c", script, "sh", str(root_folder), commands])


def debian_image(lab: Lab, suite: str = "trixie") -> images.Image:
    """A real image of three layers, 200 MB and 6,800 files; kept in the cache as an OCI layout."""
    target = cache_dir() / "images" / f"{suite}-oci"
    name = f"localhost/debian:{suite}"
    if not target.exists():
        archive = minbase(suite)
        with _building(target) as part:
            if not target.exists():
                added = [
                    {"srv": images.directory(), "srv/app": images.file("app\n" * 1000, uid=1000)},
                    {"usr/share/doc": images.whiteout(), "etc/release": images.file("1\n")},
                ]
                tars = [
                    archive.read_bytes(),
                    *map(images.layer_tar, images.complete([{}, *added])[1:]),
                ]
                images.write_oci(part, tars)
    sizes = tuple(
        (target / "blobs/sha256" / layer["digest"].partition(":")[2]).stat().st_size
        for layer in _manifest(target)["layers"]
    )
    # Bind-mounted, because users and hosts of the laboratory cannot access the cache.
    shown = lab.folder() / "oci"
    shown.mkdir()
    mounts.mount("--bind", str(target), str(shown))
    return images.Image(shown, name, (), sizes)


def _manifest(layout: pathlib.Path) -> t.Dict[str, t.Any]:
    index = json.loads((layout / "index.json").read_text())
    digest = index["manifests"][0]["digest"].partition(":")[2]
    manifest: t.Dict[str, t.Any] = json.loads((layout / "blobs/sha256" / digest).read_text())
    return manifest


class Host(Machine):
    """A Debian root as a separate machine, as long as the object exists.

    It shares with the laboratory the kernel, the network, the PIDs and the laboratory's folder, at
    the same path, so that stores inside can be used from outside and vice versa. It has its own mount
    namespace and root, an overlay over the cached root, which is not changed.

    :param lower: the cached root, by default the root with podman
    """

    def __init__(self, lab: Lab, suite: str, lower: t.Optional[pathlib.Path] = None) -> None:
        self.lab, self.name = lab, suite
        self._holder = subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"{__package__}.hosts",
                str(lower or root(suite)),
                str(lab.base),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise RuntimeError(str(self._holder.communicate()[1]))
        self.pid = self._holder.pid
        self.prefix = ("nsenter", f"--target={self.pid}", "--mount", "--")
        self.root = f"/proc/{self.pid}/root"

    def close(self) -> None:
        """Stop the host with all its processes; its mounts disappear with the last process."""
        if self._holder.returncode is not None:
            return
        own = os.stat(self.root)
        self._holder.kill()
        self._holder.wait()
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(path / "root"), own):
                    os.kill(int(path.name), signal.SIGKILL)


def of_release(lab: Lab, release: str, host: t.Callable[[str], Host]) -> Machine:
    """A machine of that release: the laboratory itself if it is bookworm, otherwise a host.

    :param host: returns the running host of a suite
    """
    if release == "bookworm" and lab.machine.version("podman")[:2] == (4, 3):
        return lab.machine
    return host(release)


class Sshd:
    """An sshd of a machine on a loopback port, with its own keys.

    `inventory` is a line for Ansible; `user` names who may log in (root, and any user of the machine
    whose keys `authorise` has written).
    """

    def __init__(self, lab: Lab, machine: Machine) -> None:
        self.lab, self.machine = lab, machine
        self.folder = lab.folder(0o755)
        self.key = self.folder / "id"
        for name in ("host", "id"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            lab.machine.run(command)
        (self.folder / "keys").write_text((self.folder / "id.pub").read_text())
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        config = {
            "ListenAddress": "127.0.0.1",
            "Port": str(self.port),
            "HostKey": str(self.folder / "host"),
            "PidFile": str(self.folder / "pid"),
            "AuthorizedKeysFile": str(self.folder / "keys"),
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "UsePAM": "no",
            "StrictModes": "no",
            "Subsystem": "sftp internal-sftp",
        }
        path = self.folder / "sshd_config"
        path.write_text("".join(f"{key} {value}\n" for key, value in config.items()))
        machine.run(["mkdir", "-p", "-m", "0755", "/run/sshd"])
        log = self.folder / "log"
        self._process = machine.popen(
            ["/usr/sbin/sshd", "-D", "-E", str(log), "-f", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(
            self._accepts,
            while_running=self._process,
            describe=lambda: log.read_text() if log.exists() else "sshd did not start",
        )

    def _accepts(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def variables(self) -> t.Dict[str, t.Any]:
        """Ansible's connection variables for it."""
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": "-o UserKnownHostsFile=/dev/null -o StrictHostKeyChecking=no",
        }

    def close(self) -> None:
        """Stop it with all its sessions."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(LIMIT)
        self.lab.kill(self.folder)


def _hold(lower: str, shared: str) -> None:
    """Become the host's first process: create its mounts, report that, and wait until the laboratory ends."""
    mounts.prctl(mounts.PR_SET_PDEATHSIG, signal.SIGKILL)
    # Later mounts of the laboratory below its folder propagate here, but not in the other direction.
    mounts.unshare_mounts("slave")
    base = tempfile.mkdtemp(prefix="host", dir="/run")
    # The upper directory is in memory, except for the stores, which must not be on an overlay.
    mounts.mount("-t", "tmpfs", "-o", "mode=0755", "host", base)
    for name in ("upper", "work", "root"):
        os.mkdir(f"{base}/{name}")
    target = f"{base}/root"
    options = f"lowerdir={lower},upperdir={base}/upper,workdir={base}/work"
    mounts.mount("-t", "overlay", "-o", options, "host", target)
    for folder in ("/proc", "/sys", "/dev"):
        mounts.mount("--rbind", folder, target + folder)
    mounts.mount("-t", "tmpfs", "-o", "mode=1777,nosuid,nodev", "host", f"{target}/dev/shm")
    mounts.mount("-t", "tmpfs", "-o", "mode=0755,nosuid,nodev", "host", f"{target}/run")
    for name in ("lock", "user"):
        os.mkdir(f"{target}/run/{name}")
    os.makedirs(target + shared, exist_ok=True)
    mounts.mount("--rbind", shared, target + shared)
    os.makedirs(f"{target}/.old")
    os.chdir(target)
    mounts.pivot_root(".", ".old")
    os.chdir("/")
    mounts.detach("/.old")
    os.rmdir("/.old")
    # As under systemd: what is unmounted here goes away in the namespaces of users' runtimes, too.
    mounts.mount("--make-rshared", "/")
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    # The laboratory keeps the other end of this pipe open.
    sys.stdin.read()


if __name__ == "__main__":
    _hold(*sys.argv[1:])
