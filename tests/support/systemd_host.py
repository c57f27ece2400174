# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A Debian root with a running systemd as PID 1 of its own namespaces."""

from __future__ import annotations

import os
import pathlib
import subprocess
import time

from .hosts import Host
from .machines import Machine
from .waiting import LIMIT, wait_until

# Units that would affect the machine outside the namespaces, or hide the laboratory's folder.
_MASKED = (
    *("dev-hugepages.mount", "dev-mqueue.mount", "proc-sys-fs-binfmt_misc.automount", "tmp.mount"),
    *("sys-fs-fuse-connections.mount", "sys-kernel-config.mount", "sys-kernel-debug.mount"),
    *("sys-kernel-tracing.mount", "systemd-firstboot.service", "systemd-modules-load.service"),
    *("systemd-random-seed.service", "systemd-remount-fs.service", "systemd-sysctl.service"),
    *("systemd-tmpfiles-clean.timer", "systemd-tmpfiles-setup-dev-early.service"),
    *("systemd-tmpfiles-setup-dev.service", "systemd-tmpfiles-setup.service"),
    *("systemd-udev-trigger.service", "systemd-udevd.service", "systemd-udevd-control.socket"),
    *("systemd-udevd-kernel.socket",),
)

# A control group that is the whole tree of the new namespace.
_ENTER = """\
set -e
mount -t cgroup2 none /sys/fs/cgroup
mkdir "/sys/fs/cgroup$1"
echo $$ > "/sys/fs/cgroup$1/cgroup.procs"
exec unshare --pid --fork --cgroup --ipc --uts --kill-child sh -c "$2"
"""

_BOOT = """\
set -e
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
umount -l /sys
mount -t sysfs -o ro sysfs /sys
mount -t cgroup2 none /sys/fs/cgroup
mount -t tmpfs -o mode=0755 dev /mnt
for name in fuse full null random tty urandom zero; do
    touch /mnt/$name
    mount --bind /dev/$name /mnt/$name
done
mkdir /mnt/pts /mnt/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 devpts /mnt/pts
ln -s pts/ptmx /mnt/ptmx
ln -s /proc/self/fd /mnt/fd
umount -l /dev
mount --move /mnt /dev
exec env -i container=lab PATH=/usr/sbin:/usr/bin /usr/lib/systemd/systemd --unit=basic.target
"""


# A user's manager without the login manager, which would require D-Bus.
_DROP_INS = {
    "user-runtime-dir@.service": """\
[Service]
ExecStart=
ExecStart=install -d -m 0700 -o %i -g %i /run/user/%i
ExecStop=
""",
    "user@.service": """\
[Service]
Environment=XDG_RUNTIME_DIR=/run/user/%i
""",
}


class SystemdHost(Machine):
    """A host with a running systemd until `close` is called."""

    def __init__(self, host: Host) -> None:
        self.name = host.name
        folder = "/etc/systemd/system"
        host.run(["mkdir", "-p", folder])
        for unit in _MASKED:
            host.run(["ln", "-sf", "/dev/null", f"{folder}/{unit}"])
        for unit, text in _DROP_INS.items():
            host.run(["mkdir", "-p", f"{folder}/{unit}.d"])
            host.run(["tee", f"{folder}/{unit}.d/lab.conf"], stdin=text)
        own = pathlib.Path("/proc/self/cgroup").read_text().rpartition("0::")[2].split("\n")[0]
        self._group = f"{own.rstrip('/')}/us-boot-{os.getpid()}-{host.pid}"
        self._host = host
        self._process = host.popen(
            ["unshare", "--mount", "sh", "-c", _ENTER, "sh", self._group, _BOOT],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + LIMIT
        while True:
            children = pathlib.Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
            pids = children.read_text().split() if children.exists() else []
            if pids:
                kinds = ("--mount", "--pid", "--cgroup", "--ipc")
                self.prefix = ("nsenter", f"--target={pids[0]}", *kinds, "--")
                state = self.run(["systemctl", "is-active", "basic.target"], check=False)
                if state.stdout == "active\n":
                    break
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                raise RuntimeError("systemd did not start")
            time.sleep(0.1)
        self.root = f"/proc/{pids[0]}/root"

    def close(self) -> None:
        """Stop it with all its processes."""
        self._process.kill()
        self._process.wait()
        script = (
            'mount -t cgroup2 none /sys/fs/cgroup && cd "/sys/fs/cgroup$1" && '
            "find . -depth -type d ! -name . -exec rmdir {} + ; cd / ; "
            'rmdir "/sys/fs/cgroup$1"'
        )
        command = ["unshare", "--mount", "sh", "-c", script, "sh", self._group]
        wait_until(lambda: self._host.run(command, check=False).rc == 0, pause=0.1)
