# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The module shared_images: share the images of one store of root with users, with the owners that each user needs.

Runs as root in the host's mount namespace, because the mounts must persist. A process with the
user's IDs accesses everything that belongs to the user.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import mmap
import os
import typing as t
from dataclasses import dataclass, field

from ..errors import (
    ConfigError,
    LayerInUse,
    PermissionDenied,
    StorageError,
    StoreError,
    StoreUnwritten,
    UnsupportedDriver,
)
from ..idmap.mapping import Mapping
from ..idmap.subids import namespace_mapping, subordinate_ids
from ..kernel import acls, mounts, namespaces
from ..kernel.oserrors import translate_error_of_root_file, translate_oserror
from ..printable import user_command
from ..runtime.forms import recorded_form
from ..store.config import Account
from ..store.records import Image
from ..store.shared_store import SHORT_NAME, SharedStore
from .mapping_options import MappingOptions
from .mapping_resolver import AutoEvidence, MappingRequest, image_user
from .shared_configuration import RuntimeConfiguration
from .shared_content import (
    Mount,
    Plan,
    User,
    Wish,
    label,
    names_of,
)
from .shared_declarations import (
    GRAPHROOT,
    STORES,
    UNIT,
    Declaration,
    Share,
    read_declaration,
    store_key,
    write_declaration,
)
from .shared_source import DRIVER, RealStore
from .shared_users import UserStore
from .store_opening import StoreRequest, account_named

_LOCK = "/run/userns-storage-shared.lock"
_PLACEHOLDER = f"The images of this store are not mounted. See: systemctl status {UNIT}\n"
_ATTRIBUTES = mounts.MOUNT_ATTR_RDONLY | mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV
_DETACHED = mounts.MNT_DETACH | mounts.UMOUNT_NOFOLLOW
# The limit of containers/storage.
_MOST_LAYERS = 500
# Characters in the options of a container's mount: ID/work of its own layer with the option's name, and
# the rest with a SELinux label.
_LONGEST_OWN = 64 + len("/work,workdir=")
_OTHER_OPTIONS = 160
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

SHARED = "shared"
EXISTING = "existing"
REMOVED = "removed"
REFUSED = "refused"


@dataclass(frozen=True)
class SharedRequest:
    """What a task declares.

    :param store: the real store, root's
    :param images: shell patterns for image names and IDs
    :param users: login names; with ``absent``, an empty list means all declared users
    :param mappings: the mappings besides that of plain containers
    :param state: "present" or "absent"
    :param check: only predict the changes
    """

    store: StoreRequest
    images: t.Tuple[str, ...] = ("*",)
    users: t.Tuple[str, ...] = ()
    mappings: t.Tuple[MappingOptions, ...] = ()
    state: str = "present"
    check: bool = False


@dataclass
class Outcome:
    """The result for a user."""

    user: str
    action: str = EXISTING
    reason: str = ""
    store: str = ""
    images: t.List[t.Dict[str, t.Any]] = field(default_factory=list)
    mounts: int = 0
    mounts_made: int = 0
    configuration: str = ""
    error: t.Optional[StorageError] = None

    def result(self) -> t.Dict[str, t.Any]:
        """As the module returns it."""
        return {
            "user": self.user,
            "action": self.action,
            "reason": self.reason,
            "store": self.store,
            "images": self.images,
            "mounts": self.mounts,
            "mounts_made": self.mounts_made,
            "bytes_copied": 0,
            "configuration": self.configuration,
        }


class _UserWork:
    """The current and the requested state for a user and a real store, and the changes between them."""

    def __init__(self, real: RealStore, account: Account, share: t.Optional[Share]) -> None:
        self.real = real
        self.account = account
        self.share = share
        key = store_key(real.config.graphroot)
        self.folder = os.path.join(STORES, str(account.uid))
        self.store = SharedStore(os.path.join(self.folder, key))
        self.outcome = Outcome(account.name, store=self.store.path)
        self.configuration = RuntimeConfiguration(
            account, self.folder, real.runtime.capabilities.reads_drop_ins
        )
        self._before: t.Dict[str, t.Any] = {
            "images": sorted(name for image in self.store.images() for name in image.names),
            "mounts": len(self._mounted()),
        }
        self.plan = Plan()
        self.kept: t.List[Image] = []

    def prepare(self) -> None:
        """Plan the changes. Writes nothing.

        :raises StorageError: images cannot be shared with the user
        """
        user = UserStore.of(self.account, self.real.request.lock_timeout)
        self.configuration.listed = user.image_stores
        if self.share is not None:
            self._refuse_unsupported(user)
        outer = namespace_mapping(
            self.account.uid,
            self.account.gid,
            subordinate_ids(self.account.name, self.account.uid),
        )
        wishes = self._wishes(user)
        present = user.images.union(image.id for image in self.store.images())
        self.plan = self.real.planner.plan(
            User(self.account.name, outer, self._most_layers(user), present, user.mapped),
            wishes,
            self._shows_everything(wishes),
        )
        refused = {refusal.image_id for refusal in self.plan.refusals if refusal.mapping is None}
        self.kept = [wish.image for wish in wishes if wish.image.id not in refused]
        self.outcome.images = [self._image_result(wish) for wish in wishes]
        self.outcome.mounts = len(self.plan.mounts)

    def _most_layers(self, user: UserStore) -> int:
        """The maximum number of layers in the mount options of a container."""
        runtime = self.real.runtime
        if runtime.capabilities.mounts_long_paths:
            return _MOST_LAYERS
        lower = len(os.path.join(self.store.path, DRIVER, "l", "")) + SHORT_NAME + len(":")
        own = len(os.path.join(user.graphroot, DRIVER, "")) + _LONGEST_OWN
        return (mmap.PAGESIZE - _OTHER_OPTIONS - 2 * own) // lower

    def _shows_everything(self, wishes: t.Sequence[Wish]) -> bool:
        """Whether a single mount may show the whole real store, because all of its images are shared."""
        if self.share is None or self.real.snapshot.containers:
            return False
        if "*" in self.share.images:
            return True
        offered = {wish.image.id for wish in wishes if wish.offered}
        return self.real.config.graphroot == GRAPHROOT and offered.issuperset(
            image.id for image in self.real.snapshot.images.values() if not image.store
        )

    def _refuse_unsupported(self, user: UserStore) -> None:
        if user.driver != DRIVER:
            raise UnsupportedDriver(
                f"user {self.account.name}",
                f"has a store of driver {user.driver} in {user.graphroot}, and images can be shared "
                "with stores of overlay only",
                "Save the images that are needed, remove the user's store with all its containers and images, and "
                f'set driver = "overlay" in storage.conf: '
                f"{user_command(self.account.name, 'podman system reset')}",
            )
        if user.mount_program:
            raise UnsupportedDriver(
                f"user {self.account.name}",
                "has a store with mount_program, which shifts IDs by itself",
                "Remove mount_program from storage.conf. Linux 5.13 and later mount overlays of users.",
            )

    def _wishes(self, user: UserStore) -> t.List[Wish]:
        wishes: t.Dict[str, Wish] = {}
        if self.share is not None:
            resolver = _Resolver(self.real, self.account, user, self.share.mappings)
            for image in self.real.images(self.share.images):
                wishes[image.id] = Wish(image, resolver.mappings(image))
        recorded = {layer.id: layer for layer in self.store.layers()}
        for recorded_image in self.store.images():
            image = recorded_image
            ids = {image.layer, *image.mapped_layers}
            real = self.real.snapshot.images.get(image.id)
            if real is not None:
                with contextlib.suppress(StorageError):
                    ids.update(layer.id for layer in self.real.planner.chain(real))
            needing = [
                dependent
                for dependent in user.dependents
                if dependent["image"] == image.id
                or (dependent["layer"] and dependent["layer"] in ids)
            ]
            wish = wishes.get(image.id)
            used = [
                recorded[layer_id].mapping
                for layer_id in image.mapped_layers
                if layer_id in recorded
                and any(dependent["layer"] == layer_id for dependent in needing)
            ]
            if wish is not None:
                wish.mappings += [mapping for mapping in used if mapping not in wish.mappings]
            elif needing:
                self._refuse_end(image, needing)
                if real is not None:
                    wishes[image.id] = Wish(real, used, offered=False)
        return list(wishes.values())

    def _refuse_end(self, image: Image, needing: t.Sequence[t.Mapping[str, str]]) -> None:
        """Record the users of an image that should be removed. This is an error if nothing else is shared.

        :raises LayerInUse: the user's store is to be removed
        """
        names = ", ".join(f"{dependent['kind']} {dependent['name']}" for dependent in needing[:5])
        reason = f"{label(image)} is needed by {names} of user {self.account.name}"
        if self.share is None:
            raise LayerInUse(
                f"image {label(image)}",
                f"is needed by {names} of user {self.account.name}",
                f"Remove them first, for example: {user_command(self.account.name, 'podman rm NAME')}",
                image_id=image.id,
                users=[dict(dependent) for dependent in needing],
            )
        self.outcome.reason = f"{self.outcome.reason} {reason}; it stays.".strip()

    def _image_result(self, wish: Wish) -> t.Dict[str, t.Any]:
        refusals = [
            str(refusal.error)
            for refusal in self.plan.refusals
            if refusal.image_id == wish.image.id
        ]
        return {
            "id": wish.image.id,
            "names": names_of(wish.image),
            "offered": wish.offered,
            "mappings": [
                {"uidmap": mapping.uid.to_strings(), "gidmap": mapping.gid.to_strings()}
                for mapping in wish.mappings
            ],
            "refused": refusals,
        }

    @property
    def before(self) -> t.Dict[str, t.Any]:
        """The current images and mounts of the user's store."""
        return self._before

    @property
    def after(self) -> t.Dict[str, t.Any]:
        """The requested images and mounts of the user's store."""
        if self.outcome.error is not None:
            return self._before
        names = sorted(
            name for image in self.outcome.images if image["offered"] for name in image["names"]
        )
        return {"images": names, "mounts": len(self.plan.mounts)}

    # Differences

    def differs(self) -> bool:
        """Whether there is anything to change. Writes nothing."""
        configured = not self.configuration.differs(self._stores())
        if self.share is None:
            return not configured or os.path.lexists(self.store.path) or bool(self._mounted())
        missing = [mount for mount in self.plan.mounts if not self._is_mounted(mount)]
        self.outcome.mounts_made = len(missing)
        stale = self._stale_mounts()
        return not configured or bool(missing or stale) or self.store.differs(self.plan.content)

    def _stores(self) -> t.List[str]:
        """The requested stores of the user, including those of other real stores."""
        others = []
        with contextlib.suppress(FileNotFoundError):
            others = [os.path.join(self.folder, name) for name in os.listdir(self.folder)]
        stores = set(others) - {self.store.path}
        return sorted(stores | ({self.store.path} if self.share is not None else set()))

    def _source(self, mount: Mount) -> str:
        return os.path.join(self.real.overlay, mount.layer_id).rstrip("/")

    def _point(self, mount: Mount) -> str:
        view = self.store.mount_point(mount.view.name(self.real.overlay))
        return os.path.join(view, mount.layer_id).rstrip("/")

    def _mounted(self) -> t.List[str]:
        """The mount points of this store, nested mounts first."""
        prefix = f"{self.store.mount_points}/"
        points = (entry.mount_point for entry in mounts.entries())
        return sorted((point for point in points if point.startswith(prefix)), reverse=True)

    def _is_mounted(self, mount: Mount) -> bool:
        path = self._point(mount)
        with contextlib.suppress(OSError):
            return path in self._mounted() and os.path.samestat(
                os.stat(path), os.stat(self._source(mount))
            )
        return False

    def _stale_mounts(self) -> t.List[str]:
        expected = {self._point(mount) for mount in self.plan.mounts}
        return [path for path in self._mounted() if path not in expected]

    # Changes

    def apply(self) -> None:
        """Create mounts, then records, and remove those that are not needed any more.

        :raises StorageError: something cannot be created or removed
        """
        if self.share is None:
            self._remove()
            return
        with translate_oserror(self.store.path):
            _make_folders(STORES, self.folder, self.account)
            for path in self._stale_mounts():
                # There can be no further mounts below a mount of the whole store.
                if any(self._point(mount).startswith(f"{path}/") for mount in self.plan.mounts):
                    mounts.umount(path, _DETACHED)
        self.store.write_mount_points(self.plan.content, _PLACEHOLDER)
        with translate_oserror(self.store.path):
            mounted = set(self._mounted())
            for mount in self.plan.mounts:
                if not self._is_mounted(mount):
                    self._mount(mount, mounted)
        self.store.write(self.plan.content)
        self.outcome.configuration = self.configuration.write(self._stores())
        self._unmount(self._stale_mounts())
        self.store.drop_others(self.plan.content)

    def _mount(self, mount: Mount, mounted: t.Container[str]) -> None:
        path, source = self._point(mount), self._source(mount)
        if path in mounted:
            mounts.umount(path, _DETACHED)
        view = mount.view
        with namespaces.user_namespace(view.uid.ranges, view.gid.ranges) as namespace:
            try:
                mounts.idmapped(source, path, namespace, _ATTRIBUTES)
            except OSError as error:
                raise StoreError(
                    source,
                    f"cannot be mounted for user {self.account.name}: {error.strerror}",
                    "See: dmesg | tail",
                ) from error

    def _unmount(self, points: t.Iterable[str]) -> None:
        with translate_error_of_root_file(self.store.path):
            for path in points:
                mounts.umount(path, _DETACHED)

    def _remove(self) -> None:
        self.outcome.configuration = self.configuration.write(self._stores())
        self.store.clear()
        self._unmount(self._mounted())
        self.store.remove()
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)
            os.rmdir(STORES)


def _make_folders(base: str, folder: str, account: Account) -> None:
    """Create a folder that root owns and one user may read."""
    os.makedirs(base, 0o755, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    descriptor = os.open(folder, _DIRECTORY)
    try:
        acls.set_access(descriptor, acls.owner_and_user(account.uid, acls.READ | acls.EXECUTE))
    except OSError as error:
        if error.errno not in (errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
        raise UnsupportedDriver(
            folder,
            "lies on a filesystem without access control lists, so it cannot be opened to one user",
            "Mount that filesystem with the option acl.",
        ) from error
    finally:
        os.close(descriptor)


class _Resolver:
    """The maps of a user's mappings for images of the real store."""

    def __init__(
        self,
        real: RealStore,
        account: Account,
        user: UserStore,
        mappings: t.Sequence[MappingOptions],
    ) -> None:
        self._real = real
        self._user = user
        self._requests = [MappingRequest(item, account, real.programs) for item in mappings]

    def mappings(self, image: Image) -> t.List[Mapping]:
        """The maps of an image without duplicates, in the requested order, without that of plain containers.

        :raises StorageError: a map is not possible
        """
        found: t.Dict[Mapping, None] = {}
        for request in self._requests:
            for mapping in request.mappings(lambda: self._evidence(image)):
                if not mapping.identity:
                    found[recorded_form(mapping, request.runtime, False)] = None
        return list(found)

    def _evidence(self, image: Image) -> t.Optional[AutoEvidence]:
        if not image.layer:
            return None
        files = self._real.account_files(image)
        return AutoEvidence(
            self._user.auto,
            self._real.planner.chain(image),
            lambda path: files[path],
            image_user(self._real.store, image),
            [mapping for _image, mapping in self._user.maps],
            [mapping for image_id, mapping in self._user.maps if image_id == image.id],
        )


def declare(request: SharedRequest) -> t.Dict[str, t.Any]:
    """Ensure the requested state of the users' stores; a failure for a user does not stop the others.

    :returns: the module's result
    :raises StorageError: the real store cannot be shared, or a user does not exist
    """
    if os.geteuid() != 0:
        raise PermissionDenied(
            "shared_images", "makes mounts for users", "Run the task with become: true."
        )
    with _alone(request.check):
        return _declare(request)


def _declare(request: SharedRequest) -> t.Dict[str, t.Any]:
    real = _real_store(request.store, request.state == "present")
    before = read_declaration(real.config.graphroot)
    shares = dict(before.users) if before else {}
    names = request.users or tuple(shares)
    accounts = {name: _account(name, shares.get(name)) for name in dict.fromkeys(names)}
    for name, account in accounts.items():
        if request.state == "present":
            shares[name] = Share(account.uid, request.images, request.mappings)
        else:
            shares.pop(name, None)
    works = [_UserWork(real, account, shares.get(name)) for name, account in accounts.items()]
    changed = _carry_out(real, works, request.check)
    for work in works:
        if work.outcome.error:
            # The user keeps the current store.
            shares.pop(work.account.name, None)
            if before and work.account.name in before.users:
                shares[work.account.name] = before.users[work.account.name]
    after = Declaration(
        real.config.graphroot,
        real.config.runroot,
        real.config.driver,
        request.store.storage_conf,
        request.store.storage_options,
        shares,
    )
    released: t.List[str] = []
    if not request.check:
        if after != before:
            write_declaration(after)
        released = _settle_pins(real, after)
    changed = changed or (after != before and bool(after.users or before))
    return _result(real, works, changed, released)


def _settle_pins(real: RealStore, declaration: Declaration) -> t.List[str]:
    """Protect the images in users' stores from removal; returns the IDs of those that are no longer needed."""
    key = store_key(real.config.graphroot)
    held = {
        image.id
        for share in declaration.users.values()
        for image in SharedStore(os.path.join(STORES, str(share.uid), key)).images()
    }
    released = real.pin(held)
    real.drop_copies([image for image in real.snapshot.images.values() if image.id in held])
    return released


def restore(declaration: Declaration) -> t.Dict[str, t.Any]:
    """Restore the mounts of all users of a declaration, and apply changes of the real store.

    :returns: as :func:`declare`
    :raises StorageError: the real store cannot be shared
    """
    with _alone(False):
        return _restore(declaration)


def store_request(declaration: Declaration) -> StoreRequest:
    """The real store that a declaration names."""
    return StoreRequest(
        storage_conf=declaration.storage_conf,
        graphroot=declaration.graphroot,
        runroot=declaration.runroot,
        driver=declaration.driver,
        storage_options=declaration.storage_options,
    )


def _restore(declaration: Declaration) -> t.Dict[str, t.Any]:
    real = _real_store(store_request(declaration))
    works = [
        _UserWork(real, _account(name, share), share) for name, share in declaration.users.items()
    ]
    changed = _carry_out(real, works, False)
    released = _settle_pins(real, declaration)
    return _result(real, works, changed, released)


@contextlib.contextmanager
def _alone(check: bool) -> t.Iterator[None]:
    """Exclude other runs on this host; check mode needs no lock."""
    if check:
        yield
        return
    with translate_oserror(_LOCK):
        descriptor = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _real_store(request: StoreRequest, needed: bool = True) -> RealStore:
    try:
        return RealStore(request, needed)
    except StoreUnwritten as error:
        raise StoreUnwritten(
            error.subject,
            "holds no image yet, so there is nothing to share",
            "Fill it with userns.storage.image_layers and the same graphroot, runroot and driver.",
            **error.facts,
        ) from error


def _account(name: str, share: t.Optional[Share]) -> Account:
    try:
        account = account_named(name)
    except ConfigError:
        if share is None:
            raise
        # The user no longer exists; the user's store must still be removed.
        return Account(name, share.uid, share.uid, "/nonexistent")
    if account is None:
        raise ConfigError(
            f"user {name}", "is root, whose own store is shared", "Name users other than root."
        )
    return account


def _carry_out(real: RealStore, works: t.Sequence[_UserWork], check: bool) -> bool:
    changed = False
    ready = []
    for work in works:
        try:
            work.prepare()
            differs = work.differs()
        except StorageError as error:
            work.outcome.action, work.outcome.error = REFUSED, error
            work.outcome.reason = str(error)
            continue
        if differs:
            work.outcome.action = REMOVED if work.share is None else SHARED
            ready.append(work)
            changed = True
    if check or not ready:
        return changed
    real.copy_records({image.id: image for work in ready for image in work.kept}.values())
    for work in ready:
        try:
            work.apply()
        except StorageError as error:
            work.outcome.action, work.outcome.error = REFUSED, error
            work.outcome.reason = str(error)
    return changed


def _unit_enabled() -> bool:
    """Whether a target starts the unit that creates the mounts at boot."""
    return bool(glob.glob(f"/etc/systemd/system/*.wants/{UNIT}"))


def _result(
    real: RealStore, works: t.Sequence[_UserWork], changed: bool, released: t.List[str]
) -> t.Dict[str, t.Any]:
    result: t.Dict[str, t.Any] = {
        "changed": changed,
        "users": [work.outcome.result() for work in works],
        "released": released,
        "store": {
            "graphroot": real.config.graphroot,
            "runroot": real.config.runroot,
            "driver": real.config.driver,
        },
        "diff": {
            side: {work.account.name: getattr(work, side) for work in works}
            for side in ("before", "after")
        },
    }
    warnings = [
        f"For user {work.account.name}: {reason}"
        for work in works
        for image in work.outcome.images
        for reason in image["refused"]
    ]
    if (
        any(work.share is not None and not work.outcome.error for work in works)
        and not _unit_enabled()
    ):
        warnings.append(
            f"The mounts end with this boot, since {UNIT} is not enabled. The role userns.storage.share installs it."
        )
    if warnings:
        result["warnings"] = warnings
    errors = [work.outcome.error for work in works if work.outcome.error]
    if errors:
        result["error"] = " ".join(map(str, errors))
    return result
