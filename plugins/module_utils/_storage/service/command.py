# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The program userns-storage: maintains stores without Ansible, from a configuration that Ansible has written."""

from __future__ import annotations

import argparse
import os
import sys
import time
import typing as t

from ..errors import ConfigError, StorageError, size_text
from ..kernel.priority import set_idle_priority
from ..operations import layer_template, shared_images
from ..operations.shared_declarations import declarations
from ..printable import printable
from ..userns import running as userns
from . import store_tasks
from .settings import StoreSettings, load
from .watching import Images, ImagesOfUser

DONE, FAILED, BAD_CONFIG = 0, 1, 78

# After this many rounds, a store that changes all the time waits for its next change.
_MOST_ROUNDS = 10
# Characters.
_LONGEST_LINE = 16_000

_NO_IMAGES = "no store has images and mappings, so {}. Add both to a store."
# The messages for a configuration without work for a command.
_NOTHING = {
    "ready": _NO_IMAGES.format("no layer is created"),
    "watch": _NO_IMAGES.format("nothing is watched"),
    "collect": "no store has a policy, so nothing is removed. Add a policy to a store.",
}

_EPILOG = """\
exit status:
  0   the store matches the configuration
  1   an item failed; all other items were processed
  2   the command line is wrong
  78  the configuration cannot be read or is invalid
"""


def main(arguments: t.Sequence[str]) -> int:
    """Run a command line.

    :returns: the exit status
    """
    options = _parser().parse_args(arguments)
    if options.command == "share":
        return _share()
    try:
        stores = load(options.config)
        kept = load(options.keep) if os.path.exists(getattr(options, "keep", None) or "") else ()
    except ConfigError as error:
        _complain(str(error))
        return BAD_CONFIG
    if options.command == "check":
        return DONE
    collects = options.command == "collect"
    declared = [store for store in stores if (store.policy if collects else store.ready)]
    if not declared:
        _complain(f"{options.config}: {_NOTHING[options.command]}")
        return BAD_CONFIG if options.command == "watch" else DONE
    set_idle_priority()
    if collects:
        outcomes = [_collect(store, kept) for store in declared]
    elif options.command == "ready":
        outcomes = [_ready(store, options.quiet) for store in declared]
    else:
        _watch(declared, options.quiet, options.interval)
    return DONE if all(outcomes) else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="userns-storage",
        description="Keep container stores ready for user namespaces.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        made.add_argument("config", metavar="CONFIG", help="a JSON file, or a directory of them")
        return made

    ready = command("ready", "create the declared mapped layers that are missing")
    watch = command(
        "watch", "create them now and after each change of the images, until terminated"
    )
    collect = command("collect", "remove mapped layers according to the policy")
    command("check", "check the configuration without changing anything")
    text = "create the mounts of all shared images, and follow changes of their stores"
    commands.add_parser("share", help=text, description=text)
    for subcommand, quiet in ((ready, 0.0), (watch, 5.0)):
        subcommand.add_argument(
            "--quiet",
            type=_seconds,
            default=quiet,
            metavar="SECONDS",
            help="seconds without a change of the images before the work starts (default: %(default)g)",
        )
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="seconds between two checks (default: %(default)g)",
    )
    collect.add_argument(
        "--keep",
        metavar="CONFIG",
        help="keep the layers that this configuration file declares, if it exists",
    )
    return parser


def _share() -> int:
    try:
        declared = declarations()
    except StorageError as error:
        _complain(str(error))
        return BAD_CONFIG
    good = True
    for declaration in declared:
        try:
            result = shared_images.restore(declaration)
        except StorageError as error:
            _complain(f"{declaration.graphroot}: {error}")
            good = False
            continue
        for user in result["users"]:
            if user["action"] == shared_images.REFUSED:
                _complain(f"{user['user']}: {user['reason']}")
                good = False
            elif user["action"] != shared_images.EXISTING:
                _say(f"{user['user']}: {user['mounts']} mounts for {len(user['images'])} images")
            if user["action"] != shared_images.REFUSED and user["reason"]:
                _say(f"{user['user']}: {user['reason']}")
        try:
            store_tasks.remove_images(shared_images.store_request(declaration), result["released"])
        except StorageError as error:
            _complain(f"{declaration.graphroot}: {error}")
            good = False
    return DONE if good else FAILED


def _seconds(text: str) -> float:
    found = float(text)
    if not 0 <= found < 86400:
        raise ValueError(text)
    return found


def _ready(settings: StoreSettings, quiet: float) -> bool:
    """Whether nothing was refused in the store."""
    good = True
    if settings.ready is None:
        return good
    for number in range(_MOST_ROUNDS):
        try:
            done: t.Dict[str, t.Any] = userns.run(
                store_tasks.make_ready,
                (settings.ready, settings.images, quiet if number == 0 else 0.0),
                settings.store.account,
            )
        except StorageError as error:
            _complain(f"{settings.user}: {error}")
            return False
        good = _tell_ready(settings.user, done["result"])
        # Changes during the work were not detected otherwise.
        if done["settled"]:
            break
    return good


def _tell_ready(user: str, result: t.Optional[t.Dict[str, t.Any]]) -> bool:
    if result is None:
        return True
    for layer in result["layers"]:
        where = f"{_image(layer['image_names'], layer['image_id'])} for {_map(layer)}"
        if layer["action"] == layer_template.CREATED:
            _say(
                f"{user}: created layer {layer['layer_id'][:12]} of {where}, by {layer['strategy']}, "
                f"{size_text(layer['size_exclusive'])}, {layer['seconds']:.1f} s"
            )
        elif layer["action"] == layer_template.REFUSED:
            _complain(f"{user}: refused {where}: {layer['reason']}")
    return not result.get("error")


def _watch(stores: t.Sequence[StoreSettings], quiet: float, interval: float) -> t.NoReturn:
    """Never returns."""
    for store in stores:
        mappings = len(store.ready.mappings) if store.ready else 0
        _say(
            f"{store.user}: watching the store for {', '.join(store.images)}, "
            f"{mappings} mapping{'' if mappings == 1 else 's'} each"
        )
    watched = [(store, _images(store, interval)) for store in stores]
    begun: t.Set[int] = set()
    while True:
        for number, (settings, images) in enumerate(watched):
            try:
                changed = images.changed()
            except StorageError as error:
                _complain(f"{settings.user}: {error}")
                continue
            if changed:
                _ready(settings, quiet if number in begun else 0.0)
                begun.add(number)
        time.sleep(interval)


def _images(settings: StoreSettings, interval: float) -> t.Union[Images, ImagesOfUser]:
    account = settings.store.account
    if account is None or account.uid == os.geteuid():
        return Images(lambda: _token_path(settings))
    return ImagesOfUser(settings.store, account, interval)


def _token_path(settings: StoreSettings) -> str:
    path: str = userns.run(store_tasks.token_path, (settings.store,), settings.store.account)
    return path


def _collect(settings: StoreSettings, kept: t.Sequence[StoreSettings]) -> bool:
    if settings.policy is None:
        return True
    ready = [(item.ready, item.images) for item in kept if item.ready and _same(item, settings)]
    user = settings.user
    try:
        result = userns.run(store_tasks.collect, (settings.policy, ready), settings.store.account)
    except StorageError as error:
        _complain(f"{user}: {error}")
        return False
    if result is None:
        return True
    for layer in result["removed"]:
        where = f"{_image(layer['image_names'], '')} for {_map(layer)}"
        _say(f"{user}: removed layer {layer['id'][:12]} of {where}: {layer['reason']}")
    for finding in result["repaired"]:
        what = finding["path"] or finding["id"]
        _say(f"{user}: removed {finding['kind']} {what}: {finding['reason']}")
    if result["changed"]:
        _say(f"{user}: freed {size_text(result['space_reclaimed'])}")
    for warning in result.get("warnings", ()):
        _complain(f"{user}: {warning}")
    for failure in result["failures"]:
        _complain(f"{user}: kept layer {failure['id'][:12]}: {failure['reason']}")
    return not result.get("error")


def _same(store_settings: StoreSettings, other: StoreSettings) -> bool:
    return (store_settings.user, store_settings.store.graphroot) == (
        other.user,
        other.store.graphroot,
    )


def _image(names: t.Sequence[str], image_id: str) -> str:
    return names[0] if names else f"image {image_id[:12]}"


def _map(layer: t.Mapping[str, t.Any]) -> str:
    uid, gid = ",".join(layer["uidmap"]), ",".join(layer["gidmap"])
    return uid if uid == gid else f"{uid}/{gid}"


def _say(line: str) -> None:
    sys.stdout.write(f"{printable(line, _LONGEST_LINE)}\n")
    sys.stdout.flush()


def _complain(line: str) -> None:
    sys.stderr.write(f"{printable(line, _LONGEST_LINE)}\n")
    sys.stderr.flush()
