# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# This module util is PRIVATE to the userns.storage collection.
"""The program userns-storage: keeps stores ready without Ansible, by a configuration that Ansible wrote."""

from __future__ import annotations

import argparse
import os
import sys
import time
import typing as t

from .. import userns
from ..errors import ConfigError, StorageError
from ..kernel.priority import step_back
from ..operations import template
from . import work
from .settings import StoreSettings, load

DONE, FAILED, BAD_CONFIG = 0, 1, 78

# A store in use all the time is left to the next change after so many rounds.
_MOST_ROUNDS = 10
_LOOK_AGAIN = 60.0

_EPILOG = """\
exit status:
  0   all is as the configuration says
  1   something was refused or failed; the rest was done
  2   the command line is wrong
  78  the configuration cannot be read, or says what cannot be
"""


def main(arguments: t.Sequence[str]) -> int:
    """Carry out one command line.

    :returns: the exit status
    """
    options = _parser().parse_args(arguments)
    try:
        stores = load(options.config)
        kept = load(options.keep) if os.path.exists(getattr(options, "keep", None) or "") else ()
    except ConfigError as error:
        _complain(str(error))
        return BAD_CONFIG
    if options.command == "check":
        return DONE
    step_back()
    if options.command == "collect":
        outcomes = [_collect(one, kept) for one in stores if one.policy]
    elif options.command == "ready":
        outcomes = [_ready(one, options.quiet) for one in stores if one.ready]
    else:
        return _watch([one for one in stores if one.ready], options.quiet, options.interval)
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
        made.add_argument("config", metavar="CONFIG", help="a JSON file")
        return made

    ready = command("ready", "make the mapped layers that are declared and not there")
    watch = command("watch", "do so now and after each change of the images, until ended")
    collect = command("collect", "remove mapped layers by the policy")
    command("check", "read the configuration, and do nothing")
    for one, quiet in ((ready, 0.0), (watch, 5.0)):
        one.add_argument(
            "--quiet",
            type=_seconds,
            default=quiet,
            metavar="SECONDS",
            help="begin when the images have not changed for so long (%(default)g)",
        )
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="look so often (%(default)g)",
    )
    collect.add_argument(
        "--keep", metavar="CONFIG", help="leave what this configuration, if it is there, declares"
    )
    return parser


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
            done: work.Round = userns.run(
                work.make_ready,
                (settings.ready, settings.images, quiet if number == 0 else 0.0),
                settings.store.account,
            )
        except StorageError as error:
            _complain(f"{settings.user}: {error}")
            return False
        good = _tell_ready(settings.user, done)
        # Whoever came meanwhile has not been noticed by anybody else.
        if done.settled:
            break
    return good


def _tell_ready(user: str, done: work.Round) -> bool:
    if done.result is None:
        return True
    for layer in done.result["layers"]:
        where = f"{_image(layer['image_names'], layer['image_id'])} for {_map(layer)}"
        if layer["action"] == template.CREATED:
            _say(
                f"{user}: made layer {layer['layer_id'][:12]} of {where}, by {layer['strategy']}, "
                f"{layer['size_exclusive']} bytes, {layer['seconds']:.1f} s"
            )
        elif layer["action"] == template.REFUSED:
            _complain(f"{user}: refused {where}: {layer['reason']}")
    return not done.result.get("error")


def _watch(stores: t.Sequence[StoreSettings], quiet: float, interval: float) -> int:
    """Never returns while there is a store to watch."""
    seen: t.Dict[int, t.Tuple[str, bytes]] = {}
    looked: t.Dict[int, float] = {}
    while stores:
        for number, one in enumerate(stores):
            path, last = seen.get(number, ("", b""))
            this = work.token(path) if path else b""
            now = time.monotonic()
            # Without a token the store may not be there yet, or be another one by now.
            if this and this == last:
                continue
            if not this and number in looked and now - looked[number] < _LOOK_AGAIN:
                continue
            looked[number] = now
            try:
                path = userns.run(work.token_path, (one.store,), one.store.account)
            except StorageError as error:
                _complain(f"{one.user}: {error}")
                continue
            # Read before the work, so that no change after it is missed. The own ones cost one look more.
            seen[number] = (path, work.token(path))
            _ready(one, quiet if last else 0.0)
        time.sleep(interval)
    return DONE


def _collect(settings: StoreSettings, kept: t.Sequence[StoreSettings]) -> bool:
    if settings.policy is None:
        return True
    ready = [(one.ready, one.images) for one in kept if one.ready and _same(one, settings)]
    user = settings.user
    try:
        result = userns.run(work.collect, (settings.policy, ready), settings.store.account)
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
        _say(f"{user}: took away {finding['kind']} {what}: {finding['reason']}")
    if result["changed"]:
        _say(f"{user}: freed {result['space_reclaimed']} bytes")
    for warning in result.get("warnings", ()):
        _complain(f"{user}: {warning}")
    for failure in result["failures"]:
        _complain(f"{user}: kept layer {failure['id'][:12]}: {failure['reason']}")
    return not result.get("error")


def _same(one: StoreSettings, other: StoreSettings) -> bool:
    return (one.user, one.store.graphroot) == (other.user, other.store.graphroot)


def _image(names: t.Sequence[str], image_id: str) -> str:
    return names[0] if names else f"image {image_id[:12]}"


def _map(layer: t.Mapping[str, t.Any]) -> str:
    uid, gid = ",".join(layer["uidmap"]), ",".join(layer["gidmap"])
    return uid if uid == gid else f"{uid}/{gid}"


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _complain(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
