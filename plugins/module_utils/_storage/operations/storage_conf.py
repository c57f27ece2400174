# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The module storage_conf: set keys in the configuration that a store's runtime reads.

Runtimes with containers/storage before 1.63 read a single file. Later versions merge drop-ins into it, and rootless
runtimes read ``/etc/containers/storage.conf`` in full. There, keys are written to a drop-in, those of the rootful store
to a drop-in that rootless runtimes do not read. Source: containers-storage.conf(5) and pkg/configfile of
containers/storage.

Files below a user's home directory are read and written with that user's permissions.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
import typing as t
from dataclasses import dataclass, replace

from ..errors import ConfigError, PermissionDenied, StorageError, StoreError
from ..kernel.oserrors import LOOK_INTO_LOG, translated
from ..printable import command, printable, user_command
from ..runtime.detect import installed
from ..store import conf_edit, toml
from ..store.conf_values import ADMIN_FILE, VENDOR_FILE
from ..store.config import Account
from ..userns import running as userns
from ..userns.shapes import Items, Record, flag, text
from .store_opening import StoreRequest, configured

# The timeout for a home directory on a network that does not respond is shorter than for work in a store.
_LIMITS = userns.Limits(silence=30.0, stall=60.0, total=300.0)
_NAME = "50-userns-storage.conf"
_ROOTFUL, _ROOTLESS, _BOTH = "storage.rootful.conf.d", "storage.rootless.conf.d", "storage.conf.d"
_COMMENT = "# Keys set by the Ansible module userns.storage.storage_conf.\n"
_LARGEST = 2**20
# Causes that the path of the file does not explain.
_OF_FILESYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_METACOPY = "/sys/module/overlay/parameters/metacopy"
# Runtimes before 1.63 require these in the file of the rootful store, and ignore them there for rootless users.
_PATHS = {"graphroot": "/var/lib/containers/storage", "runroot": "/run/containers/storage"}
# The beginning of the files that containers/storage ships.
_SHIPPED = "# This file is the configuration file for all tools\n"
_SHIPPED_KEYS: t.Mapping[str, t.Any] = {"additionalimagestores": [], "overlay.mountopt": "nodev"}


@dataclass(frozen=True)
class ConfRequest:
    """The options of a task.

    :param account: the owner of the store; None for the rootful store
    :param settings: keys as for :func:`..store.conf_edit.edit`
    :param metacopy: add the mount option if the kernel and the store's driver support it; only for rootful stores
    :param backup: keep a copy of a changed file
    :param check: only predict the changes
    :param merges: whether the runtime merges drop-ins; None to detect it from the host's runtime
    """

    account: t.Optional[Account]
    settings: t.Mapping[str, t.Any]
    metacopy: bool = False
    backup: bool = True
    check: bool = False
    merges: t.Optional[bool] = None


def declare(request: ConfRequest) -> t.Dict[str, t.Any]:
    """Set the keys.

    :returns: the module's result
    :raises StorageError: a file cannot be read, written or edited, or an existing store would become unreachable
    """
    merges = request.merges if request.merges is not None else _merges()
    if merges is None:
        return _without_runtime(request, request.account.name if request.account else "root")
    result: t.Dict[str, t.Any] = userns.run_as(
        _apply, (replace(request, merges=merges),), request.account, _LIMITS
    )
    if merges:
        result["warnings"] += _harmful_paths(result["moved"])
    return result


def _merges() -> t.Optional[bool]:
    """Whether the host's runtime merges drop-ins; None if there is no runtime.

    Programs are not run: with a broken storage.conf podman does not even report its version, and this task may be
    meant to fix it.
    """
    return next((can.reads_drop_ins for _name, can, _found in installed()), None)


def _without_runtime(request: ConfRequest, user: str) -> t.Dict[str, t.Any]:
    changes = bool(request.settings or request.metacopy)
    if changes and not request.check:
        raise ConfigError(
            "podman",
            "is not installed, and its version determines which files it reads",
            "Install it first, for example with the role userns.storage.prepare.",
        )
    warning = "podman is not installed yet, and its version determines the file for the keys."
    return {
        "changed": changes,
        "user": user,
        "file": "",
        "backup_file": "",
        "moved": "",
        "driver": "",
        "warnings": [warning] if changes else [],
        "diff": [],
    }


# With the permissions of the store's owner


@userns.returns(
    Record(
        {
            **dict.fromkeys(("user", "file", "backup_file", "moved", "driver"), text),
            "changed": flag,
            "warnings": Items(text),
            "diff": Items(
                Record(dict.fromkeys(("before", "after", "before_header", "after_header"), text))
            ),
        }
    )
)
def _apply(request: ConfRequest) -> t.Dict[str, t.Any]:
    """Read, edit and write. Runs as the store's owner."""
    user = request.account.name if request.account else "root"
    files = _Files(user, _folder(request.account), request.check, request.backup)
    # First, so that errors in a file of this user are reported for this user.
    files.read(f"{files.folder}/storage.conf")
    config = configured(StoreRequest(account=request.account))
    written = _drivers_of(config.graphroot)
    settings = dict(request.settings)
    driver = str(settings.get("driver", "") or (written[0] if written else config.driver))
    if written and driver not in written:
        reset = "podman system reset"
        if request.account:
            reset = user_command(user, reset)
        raise StoreError(
            f"the store of {user}",
            f"was written by the driver {' and '.join(written)}, and with {driver} in storage.conf "
            "its images would be inaccessible",
            "Remove the driver from the settings; or save the images that are needed, and remove the store with all "
            f"its containers and images: {reset}",
            drivers=written,
        )
    if request.metacopy and request.account is None and driver == "overlay" and _has_metacopy():
        settings["overlay.mountopt"] = _with_metacopy(settings.get("overlay.mountopt"))
    result: t.Dict[str, t.Any] = {"user": user, "driver": driver, "warnings": []}
    edit = _edit_drop_in if request.merges else _edit_main_file
    result.update(edit(request, files, driver, settings))
    return result


def _edit_main_file(
    request: ConfRequest, files: _Files, driver: str, settings: t.Dict[str, t.Any]
) -> t.Dict[str, t.Any]:
    """Edit the file that runtimes before 1.63 read."""
    path = f"{files.folder}/storage.conf"
    old = files.read(path)
    if not settings:
        return _outcome(path, [], {})
    text = old
    if text is None:
        vendor = files.read(VENDOR_FILE) if request.account is None else None
        text = vendor if vendor is not None else _first_text(request.account, driver)
    new = conf_edit.edit(text, settings, path)
    if new == old:
        return _outcome(path, [], {})
    return _outcome(path, [_diff(path, old, new)], {"backup_file": files.write(path, old, new)})


def _edit_drop_in(
    request: ConfRequest, files: _Files, driver: str, settings: t.Dict[str, t.Any]
) -> t.Dict[str, t.Any]:
    """Edit the drop-in of this module, for runtimes that merge drop-ins."""
    kind = _ROOTFUL if request.account is None else _ROOTLESS
    # Of a user's own configuration, only this folder is read.
    path = f"{files.folder}/{_BOTH if request.account else _ROOTFUL}/{_NAME}"
    main = f"{files.folder}/storage.conf"
    old = files.read(path)
    diffs: t.List[t.Dict[str, str]] = []
    facts: t.Dict[str, t.Any] = {}
    main_text = files.read(main) if request.account is None else None
    earlier = _earlier(main_text, settings) if main_text is not None else None
    inherited = _inherited(files, kind, main if earlier is not None else "")
    new = old
    if old is not None or earlier or not conf_edit.says(inherited, settings):
        new = conf_edit.edit(old if old is not None else _COMMENT, earlier or {}, path)
        new = conf_edit.edit(new, settings, path, inherited)
    if new is not None and new != old:
        diffs.append(_diff(path, old, new))
        facts["backup_file"] = files.write(path, old, new)
    if earlier is not None and main_text is not None:
        diffs.append(_diff(main, main_text, ""))
        facts.update(moved=main, backup_file=files.set_aside(main))
        if earlier.get("driver", "overlay") != "overlay":
            facts["warnings"] = [
                f"Rootless runtimes have read `driver = {earlier['driver']!r}` in {main}, which was moved to {path} "
                "and now applies only to root. Set the driver for each user who needs it."
            ]
    return _outcome(path, diffs, facts)


def _outcome(
    path: str, diffs: t.List[t.Dict[str, str]], facts: t.Mapping[str, t.Any]
) -> t.Dict[str, t.Any]:
    nothing = {"backup_file": "", "moved": "", "warnings": []}
    return {"changed": bool(diffs), "file": path, "diff": diffs, **nothing, **facts}


def _diff(path: str, old: t.Optional[str], new: str) -> t.Dict[str, str]:
    return {"before": old or "", "after": new, "before_header": path, "after_header": path}


def _folder(account: t.Optional[Account]) -> str:
    if account is None:
        return os.path.dirname(ADMIN_FILE)
    base = os.environ.get("XDG_CONFIG_HOME") or ""
    if not os.path.isabs(base):
        home = os.environ.get("HOME") or account.home
        if not os.path.isdir(home):
            raise ConfigError(
                f"user {account.name}",
                f"has no home directory: {printable(home)} does not exist, or {account.name} may not access it",
                f"Check: getent passwd {account.name}; create it, for example with mkhomedir_helper {account.name}.",
            )
        base = os.path.join(home, ".config")
    return f"{base}/containers"


def _drivers_of(graphroot: str) -> t.List[str]:
    """The drivers that have records in the graphroot."""
    try:
        names = os.listdir(graphroot)
    except OSError:
        return []
    ends = ("-layers", "-images")
    return sorted({name.rpartition("-")[0] for name in names if name.endswith(ends)})


def _has_metacopy() -> bool:
    return os.path.exists(_METACOPY)


def _with_metacopy(given: t.Any) -> str:
    if not isinstance(given, str) or not given:
        return "+metacopy=on"
    plus = "+" if given.startswith("+") else ""
    return plus + conf_edit.joined(given[len(plus) :], "metacopy=on")


def _first_text(account: t.Optional[Account], driver: str) -> str:
    """The beginning of a new file. It names the driver, because no other file does."""
    lines = ["[storage]", f'driver = "{driver}"']
    if account is None:
        lines += [f'{key} = "{_PATHS[key]}"' for key in ("runroot", "graphroot")]
    return "".join(f"{line}\n" for line in lines)


def _earlier(text: str, settings: t.Mapping[str, t.Any]) -> t.Optional[t.Dict[str, t.Any]]:
    """The keys that an earlier version of the role prepare set in the rootful main file; None for any other file.

    That version started with a short text or with the file that containers/storage ships, and added keys. Apart
    from them, such a file contains only defaults, so nothing is lost when they are moved.
    """
    try:
        keys = conf_edit.set_keys(text)
    except ConfigError:
        return None
    paths = {key: keys.pop(f"storage:{key}", None) for key in _PATHS}
    if any(value not in (None, _PATHS[key]) for key, value in paths.items()):
        return None
    own = re.match(
        r'\[storage\]\ndriver = "[a-z0-9]+"\nrunroot = "[^"]+"\ngraphroot = "[^"]+"\n', text
    )
    if own and "#" not in text and not any(key.startswith("storage:") for key in keys):
        return keys
    if not text.startswith(_SHIPPED):
        return None
    changed = {key: value for key, value in keys.items() if not _as_shipped(key, value)}
    return changed if set(changed) <= {"driver", *settings} else None


def _as_shipped(key: str, value: t.Any) -> bool:
    return key.startswith("pull_options.") or _SHIPPED_KEYS.get(key) == value


def _inherited(files: _Files, kind: str, without: str) -> toml.Table:
    """The text that runtimes read before the drop-in, if it can be read; for lists that are extended."""
    shared = os.path.dirname(VENDOR_FILE)
    folders = tuple(dict.fromkeys((shared, os.path.dirname(ADMIN_FILE), files.folder)))
    mains = (f"{folder}/storage.conf" for folder in reversed(folders))
    main = next((path for path in mains if path != without and os.path.exists(path)), "")
    # Of drop-ins with the same name, the one in the last directory is used.
    named: t.Dict[str, str] = {}
    for folder in folders:
        for sort in (_BOTH, kind):
            with contextlib.suppress(OSError):
                for name in os.listdir(f"{folder}/{sort}"):
                    if name.endswith(".conf"):
                        named[name] = f"{folder}/{sort}/{name}"
    named.pop(_NAME, None)
    merged: toml.Table = {}
    for path in (main, *(named[name] for name in sorted(named))):
        # The runtime itself reports a broken file.
        with contextlib.suppress(ConfigError, StoreError):
            text = files.read(path) if path else None
            merged = conf_edit.merged(merged, toml.loads((text or "").encode(), path))
    return merged


class _Files:
    """Reads and writes small text files with the permissions of this process."""

    def __init__(self, user: str, folder: str, check: bool, backup: bool) -> None:
        self.user = user
        self.folder = folder
        self._check = check
        self._backup = backup

    def read(self, path: str) -> t.Optional[str]:
        """The content; None if there is no file.

        :raises StoreError: it cannot be read, is not a regular file, or larger than 1 MiB
        """
        try:
            # Without waiting for the other end of a pipe, and without a controlling terminal.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            if os.path.islink(path):
                raise self._wrong(path, "is a link to a missing file") from None
            return None
        except OSError as error:
            raise self._refused(path, "read", error) from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise self._wrong(path, "is not a regular file")
            data = os.read(descriptor, _LARGEST + 1)
        except OSError as error:
            raise self._refused(path, "read", error) from error
        finally:
            os.close(descriptor)
        if len(data) > _LARGEST:
            raise self._wrong(path, f"is larger than {_LARGEST} bytes")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._wrong(path, "is not UTF-8 text") from None

    def write(self, path: str, old: t.Optional[str], new: str) -> str:
        """Replace a file, or create it with its folders; returns the path of the backup.

        :raises StorageError: it cannot be written
        """
        if self._check:
            return ""
        try:
            self._make_folders(os.path.dirname(path))
            # A link of the user, as from dotfile managers, is kept.
            real = os.path.realpath(path)
            before = os.stat(real) if old is not None else None
            kept = self._keep(real, old) if old is not None and before and self._backup else ""
            self._replace(real, new, before)
        except OSError as error:
            raise self._refused(path, "written", error) from error
        return kept

    def set_aside(self, path: str) -> str:
        """Rename a file to the name of its backup; returns that name.

        :raises StorageError: it cannot be renamed
        """
        kept = _backup_name(path)
        if not self._check:
            try:
                os.rename(path, kept)
                _sync_folder(os.path.dirname(path))
            except OSError as error:
                raise self._refused(path, "renamed", error) from error
        return kept

    def _make_folders(self, folder: str) -> None:
        """Create the folders of the configuration below an existing home directory or /etc."""
        missing = []
        while not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for item in reversed(missing):
            os.mkdir(item, 0o755)

    def _keep(self, real: str, old: str) -> str:
        kept = _backup_name(real)
        try:
            # It keeps its owner, mode and attributes.
            os.link(real, kept, follow_symlinks=False)
        except OSError:
            self._replace(kept, old, os.stat(real))
        return kept

    @staticmethod
    def _replace(path: str, text: str, before: t.Optional[os.stat_result]) -> None:
        temporary = f"{path}.userns-storage-{os.getpid()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600)
        try:
            try:
                if before is not None:
                    with contextlib.suppress(PermissionError):
                        os.fchown(descriptor, before.st_uid, before.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(before.st_mode) & 0o777 if before else 0o644)
                data = memoryview(text.encode())
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        _sync_folder(os.path.dirname(path))

    def _refused(self, path: str, done: str, error: OSError) -> StorageError:
        real = os.path.realpath(path)
        leads = f", which leads to {printable(real)}," if real != os.path.normpath(path) else ""
        subject = f"user {self.user}: {printable(path)}{leads}"
        if error.errno in _OF_FILESYSTEM:
            refused = translated(error, os.path.dirname(real), subject)
            # The error can be about a temporary file.
            refused.facts["path"] = path
            return refused
        cause = f"cannot be {done}: {os.strerror(error.errno or 0).lower()}"
        kind = PermissionDenied if error.errno in (errno.EACCES, errno.EPERM) else StoreError
        hint = LOOK_INTO_LOG if error.errno == errno.EIO else self._look(path)
        return kind(subject, cause, hint, path=path, errno=error.errno)

    def _wrong(self, path: str, cause: str) -> StoreError:
        return StoreError(
            f"user {self.user}: {printable(path)}", cause, self._look(path), path=path
        )

    def _look(self, path: str) -> str:
        line = command("namei", "-l", path)
        return f"Check: {line if self.user == 'root' else user_command(self.user, line)}"


def _backup_name(path: str) -> str:
    """The name that Ansible's own modules use."""
    return f"{path}.{os.getpid()}.{time.strftime('%Y-%m-%d@%H:%M:%S')}~"


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network filesystems cannot sync folders.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


# As the user who runs the module


def _harmful_paths(moved: str) -> t.List[str]:
    """A warning if every rootless runtime reads the rootful store's paths from the system's main file."""
    path = next(
        (item for item in (ADMIN_FILE, VENDOR_FILE) if item != moved and os.path.exists(item)), ""
    )
    if not path:
        return []
    try:
        with open(path, "rb") as file:
            keys = conf_edit.set_keys(file.read(_LARGEST).decode("utf-8", "replace"), path)
    except (OSError, ConfigError):
        return []
    values = {key: keys.get(f"storage:{key}") for key in _PATHS}
    bad = [
        key
        for key, value in values.items()
        if isinstance(value, str) and value and "$" not in value
    ]
    if not bad:
        return []
    return [
        f"{path} sets {' and '.join(bad)}. Rootless podman of this version also reads this, and "
        f"fails for each user who may not write there. Move {'them' if len(bad) > 1 else 'it'} "
        "below [storage] of a file "
        f"{os.path.dirname(ADMIN_FILE)}/{_ROOTFUL}/10-paths.conf, which only root's podman reads."
    ]
