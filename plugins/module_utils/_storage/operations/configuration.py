# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The configuration of a store, read as the runtime of this host reads it."""

from __future__ import annotations

import typing as t
from dataclasses import replace

from ..capabilities import LOADERS, TESTED_STORAGE, Capabilities
from ..errors import ConfigError, UntestedRuntime
from ..runtime.detect import detect, find_program, installed
from ..runtime.storage_version import FoundVersion
from ..store import libpod_db
from ..store.config import CRI_O, Account, StoreConfig, StoreOverrides, discover

_Result = t.Union[StoreConfig, ConfigError]

_GIVE = (
    "Set the store's path in `graphroot` and `runroot`, or the program in `runtime`, for example "
    'runtime: "podman 5.8.6" or runtime: cri-o.'
)


def configuration(
    overrides: StoreOverrides,
    environ: t.Mapping[str, str],
    account: t.Optional[Account],
    runtime: str = "",
) -> StoreConfig:
    """The store that a runtime of this host uses. Runs no program if all loaders read the same settings.

    :param account: the owner of the rootless store; None for the rootful store
    :param runtime: the program to use, by name or path, optionally with a version; otherwise podman, buildah and
        CRI-O must agree on the store
    :raises ConfigError: the files cannot be read, or it is unknown which store is meant
    """
    rootless = account is not None

    def read(can: Capabilities) -> _Result:
        try:
            return discover(overrides, environ, account, rootless, can)
        except ConfigError as error:
            return error

    if runtime:
        found = detect(runtime)
        if found is not None:
            return _checked(read(found.capabilities))
    if not rootless and find_program(CRI_O):
        # crio.conf may name another store than storage.conf.
        return _checked(_agreed(read, rootless))
    first, *others = (_comparable(read(can)) for can in LOADERS)
    if all(item == first for item in others):
        result = read(replace(LOADERS[-1], keeps_database=True))
        if isinstance(result, ConfigError) or not libpod_db.ambiguous(result.graphroot):
            return _checked(result)
    return _checked(_agreed(read, rootless))


def untested(rootless: bool, runtime: str = "") -> t.Optional[UntestedRuntime]:
    """Why a store of this host may not be written: a program is newer than the tested versions; None otherwise.

    :param runtime: the program to check; otherwise all installed programs
    :raises ConfigError: the version of a program cannot be determined
    """
    if runtime:
        detected = detect(runtime)
        found = (
            []
            if detected is None
            else [(detected.name, detected.capabilities, detected.storage_version)]
        )
    else:
        found = [(name, can, version.version) for name, can, version in _programs(rootless)]
    above = [(version, name) for name, can, version in found if not can.tested]
    if not above:
        return None
    version, name = max(above)
    return UntestedRuntime(
        f"{name} with containers/storage {'.'.join(map(str, version))}",
        "is newer than this version of the collection was tested with "
        f"({'.'.join(map(str, TESTED_STORAGE))}), so the store is read-only for this task",
        "Update the collection, or set allow_untested_runtime: true.",
    )


def _programs(rootless: bool) -> t.Iterator[t.Tuple[str, Capabilities, FoundVersion]]:
    """The programs that may use this kind of store."""
    return (item for item in installed() if not (rootless and item[0] == "cri-o"))


def _agreed(read: t.Callable[[Capabilities], _Result], rootless: bool) -> _Result:
    """The configuration that the programs of this host read."""
    answers: t.List[t.Tuple[str, _Result]] = []
    labels: t.Dict[t.Tuple[str, ...], str] = {}
    for name, can, found in _programs(rootless):
        # Only podman uses the paths in podman's database.
        result = read(replace(can, keeps_database=False))
        label = f"{name} (containers/storage {'.'.join(map(str, found.version))})"
        labels.setdefault(_location(result), label)
        answers.append((name, read(can)))
    if not answers:
        readings = {_location(read(can)) for can in LOADERS}
        raise ConfigError(
            "store",
            "no runtime is installed on this host, and versions use different locations for the store: "
            + " or ".join(sorted(" ".join(reading) for reading in readings)),
            _GIVE,
        )
    if len(labels) > 1:
        raise ConfigError(
            "store",
            "the programs of this host read the configuration differently: "
            + "; ".join(f"{label} uses {' '.join(location)}" for location, label in labels.items()),
            _GIVE,
        )
    return answers[0][1]


def _location(result: _Result) -> t.Tuple[str, ...]:
    if isinstance(result, ConfigError):
        return (str(result),)
    return (result.graphroot, result.runroot, result.driver)


def _comparable(result: _Result) -> t.Any:
    """The settings on which two loaders must agree."""
    if isinstance(result, ConfigError):
        return str(result)
    return replace(result, sources={}, files=())


def _checked(result: _Result) -> StoreConfig:
    if isinstance(result, ConfigError):
        raise result
    return result
