# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Compare images that are shared with users with copies in the stores of users."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import stat
import time
import typing as t

from benchmarks.measurements import Row, Say, median, ratio, seconds
from support import images, users
from support.images import Image
from support.lab import Lab
from support.modules import SYSTEM_PYTHON, run_module, service_command
from support.stores import Json, Store
from support.users import User

KEEP_ID = ("--userns=keep-id",)
# The folder in which shared_images creates stores.
STORES = pathlib.Path("/var/lib/userns-storage.service")
SHARE_IMAGES = pathlib.Path(__file__).with_name("share_images.py")
MANY_USERS = 20
_BLOCK = 4096
_READ = (
    "s=$(date +%s%N); find / -xdev -type f -exec cat {} + >/dev/null; echo $(($(date +%s%N) - s))"
)


class Shared:
    """A store of root with an image, and the users with whom it is shared."""

    def __init__(self, lab: Lab, image: Image) -> None:
        self.lab, self.image = lab, image
        self.store = Store(lab, "overlay", on_disk=True)
        self.store.load(image)
        self._users: t.List[User] = []
        self._stores: t.List[Store] = []

    def user(self) -> User:
        """A new user."""
        self._users.append(users.add_user(self.lab, None))
        return self._users[-1]

    def own_store(self) -> Store:
        """The store of a new user who has used podman, but not the image."""
        store = Store(self.lab, "rootless-overlay", user=self.user())
        self._stores.append(store)
        store.podman("images")
        return store

    def share(self, names: t.Sequence[str], **options: t.Any) -> Json:
        """Run shared_images for containers without a user namespace and with keep-id."""
        args = {
            "graphroot": str(self.store.graphroot),
            "runroot": str(self.store.runroot),
            "users": list(names),
            "mappings": [{"userns": "keep-id"}],
            **options,
        }
        return run_module(self.lab, "shared_images", args)

    def share_one_by_one(self, names: t.Sequence[str]) -> t.List[float]:
        """Share with each of the users separately; returns the seconds for each user."""
        arguments = [str(self.store.graphroot), str(self.store.runroot), *names]
        env = {"PYTHONPATH": str(self.lab.tree), "PYTHONDONTWRITEBYTECODE": "1"}
        done = self.lab.machine.run([SYSTEM_PYTHON, str(SHARE_IMAGES), *arguments], env=env)
        spent: t.List[float] = json.loads(done.stdout)
        return spent

    def image_bytes(self) -> int:
        """The bytes of the image's layers on disk."""
        return disk_usage(self.store.graphroot / "overlay")

    def close(self) -> None:
        """Remove all stores and users."""
        for store in self._stores:
            store.podman("rm", "--all", "--force", "--time=0")
        if self._users:
            self.share([], state="absent")
        for store in self._stores:
            store.close()
        for user in self._users:
            users.remove_user(self.lab, user, None)
        self.store.close()


def disk_usage(*folders: pathlib.Path) -> int:
    """Bytes below folders, without mounts: files count as whole blocks, all other entries as a block.

    A file with several hard links counts once.
    """
    total = 0
    counted: t.Set[t.Tuple[int, int]] = set()
    for folder in folders:
        if not folder.exists():
            continue
        device = folder.stat().st_dev
        for parent, names, files in os.walk(folder):
            names[:] = [name for name in names if os.lstat(f"{parent}/{name}").st_dev == device]
            for name in (*names, *files):
                status = os.lstat(f"{parent}/{name}")
                if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
                    if (status.st_dev, status.st_ino) in counted:
                        continue
                    counted.add((status.st_dev, status.st_ino))
                blocks = -(-status.st_size // _BLOCK) if stat.S_ISREG(status.st_mode) else 1
                total += blocks * _BLOCK
    return total


@contextlib.contextmanager
def _shared(lab: Lab, image: Image) -> t.Iterator[Shared]:
    shared = Shared(lab, image)
    try:
        yield shared
    finally:
        shared.close()


def _start(store: Store, image: Image) -> float:
    return store.timed(lambda: store.run(image.name, "true", args=KEEP_ID))


def _read(store: Store, image: Image, layers: pathlib.Path) -> float:
    """The seconds in which a container reads all files of its image, without cached pages."""
    _drop_pages(layers)
    return int(store.shell(image.name, _READ, args=(*KEEP_ID, "--user=0:0"))) / 1e9


def _drop_pages(folder: pathlib.Path) -> None:
    os.sync()
    for parent, _folders, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                descriptor = os.open(
                    os.path.join(parent, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                )
                try:
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)


def starts(lab: Lab, image: Image, rounds: int, say: Say) -> t.Iterator[Row]:
    """Compare the first start of a user, and reading, with an existing copy in the user's store."""
    say("the first start on a shared image")
    with _shared(lab, image) as shared:
        copied = shared.own_store()
        copied.load(image)
        _start(copied, image)
        first, warm, through, own = [], [], [], []
        for _number in range(rounds):
            store = shared.own_store()
            assert store.user is not None
            shared.share([store.user.name])
            first.append(_start(store, image))
            warm.append(_start(copied, image))
            if store.layers() or len(copied.mapped_layers(image.name)) != 1:
                raise RuntimeError("a layer was added")
            through.append(_read(store, image, shared.store.graphroot / "overlay"))
            own.append(_read(copied, image, copied.graphroot / "overlay"))
    yield Row(
        "shared images",
        "first keep-id start of a user, against podman's on a copy that is there",
        ratio(first, warm),
        1.3,
        detail={"shared": seconds(first), "copied": seconds(warm)},
    )
    yield Row(
        "shared images",
        "reading the whole image, against a copied layer",
        ratio(through, own),
        1.1,
        detail={"shared": seconds(through), "copied": seconds(own)},
    )


def disk(lab: Lab, image: Image, say: Say) -> t.Iterator[Row]:
    """Measure the disk space for many users."""
    say(f"an image shared with {MANY_USERS} users")
    with _shared(lab, image) as shared:
        names = [shared.user().name for _number in range(MANY_USERS)]
        size = shared.image_bytes()
        folders = (STORES, pathlib.Path("/etc/userns-storage"), shared.store.graphroot)
        before = disk_usage(*folders)
        done = shared.share(names)
        written = disk_usage(*folders) - before
        if any(user["bytes_copied"] for user in done["users"]):
            raise RuntimeError("something was copied")
        yield Row(
            "shared images",
            f"disk for {MANY_USERS} users with 2 mappings each, of the image's size",
            round(written / size * 100, 2),
            2,
            "%",
            {
                "bytes": written,
                "image_bytes": size,
                "mounts": sum(user["mounts"] for user in done["users"]),
            },
        )


def one_more_user(lab: Lab, large_image: Image, rounds: int, say: Say) -> t.Iterator[Row]:
    """Measure the time to share images of different sizes and numbers of layers with a further user."""

    def thin(count: int) -> Image:
        more = [{f"layer{number}": images.file("x\n")} for number in range(count - 1)]
        return images.build(
            lab.folder(), [*images.many_files_layers(1), *more[1:]], f"localhost/layers:{count}"
        )

    for image, description in (
        (thin(5), "5 small layers"),
        (thin(50), "50 small layers"),
        (large_image, "3 layers of 200 MB"),
    ):
        say(f"one more user, {description}")
        with _shared(lab, image) as shared:
            shared.share([shared.user().name])
            spent = shared.share_one_by_one([shared.user().name for _number in range(rounds)])
        yield Row(
            "shared images",
            f"one more user, {description}",
            round(median(spent), 3),
            0.1,
            "s",
            {"seconds": seconds(spent)},
        )


def many_users(lab: Lab, say: Say) -> t.Iterator[Row]:
    """Measure mounts, the work at boot, podman ps and a login for 50 users and 30 images."""
    user_count, image_count = 50, 30
    say(f"{image_count} images shared with {user_count} users")
    image = images.build(lab.folder(), images.many_files_layers(1), "localhost/many:0")
    with _shared(lab, image) as shared:
        for number in range(1, image_count):
            shared.store.load(
                images.build(
                    lab.folder(),
                    [*images.many_files_layers(1), {f"image{number}": images.file(f"{number}\n")}],
                    f"localhost/many:{number}",
                )
            )
        alone = shared.own_store()
        first = alone.user
        assert first is not None
        others = [shared.user().name for _number in range(user_count - 1)]

        def listing() -> float:
            return median(alone.timed(lambda: alone.podman("ps", "--all")) for _number in range(10))

        def login() -> float:
            command = ["su", "-", first.name, "-c", "true"]
            return median(alone.timed(lambda: lab.machine.run(command)) for _number in range(10))

        before = listing(), login()
        done = shared.share([first.name, *others])
        after = listing(), login()
        mounts = sum(user["mounts"] for user in done["users"])
        for line in lab.machine.run(["cat", "/proc/self/mountinfo"]).stdout.splitlines():
            point = line.split()[4]
            if point.startswith(str(STORES)):
                lab.machine.run(["umount", "-l", point])
        env = {"PYTHONPATH": str(lab.tree), "PYTHONDONTWRITEBYTECODE": "1"}
        started = time.perf_counter()
        lab.machine.run(service_command("share"), env=env)
        boot = time.perf_counter() - started
    where = f"{user_count} users, {image_count} images"
    yield Row("shared images", f"mounts, {where}", mounts, user_count * 2 + 5, "")
    yield Row("shared images", f"mounting all at boot, {where}", round(boot, 2), None, "s")
    for action, index in (("podman ps", 0), ("a login", 1)):
        yield Row(
            "shared images",
            f"{action}, {where}, against before",
            after[index] / before[index],
            None,
            detail={"before": round(before[index], 4), "after": round(after[index], 4)},
        )


def measure(lab: Lab, large_image: Image, rounds: int, say: Say) -> t.Iterator[Row]:
    """All measurements of shared images."""
    yield from starts(lab, large_image, rounds, say)
    yield from disk(lab, large_image, say)
    yield from one_more_user(lab, large_image, rounds, say)
    yield from many_users(lab, say)
