# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Match shell patterns of users with the names of images and mappings."""

from __future__ import annotations

import fnmatch
import re
import typing as t


class Patterns:
    """Shell patterns for image names and IDs, compiled once."""

    def __init__(self, patterns: t.Sequence[str]) -> None:
        self.given = bool(patterns)
        self._compiled = [
            (pattern, re.compile(fnmatch.translate(pattern)).match) for pattern in patterns
        ]

    def hit(self, terms: t.Iterable[str]) -> t.Optional[str]:
        """The first pattern that matches any of the terms."""
        known = list(terms)
        for pattern, match in self._compiled:
            if any(match(term) for term in known):
                return pattern
        return None


def image_terms(image_ids: t.Sequence[str], names: t.Sequence[str]) -> t.List[str]:
    """All references of users to an image: its full and short IDs, its names, with and without
    registry and tag.
    """
    terms: t.List[str] = []
    for image_id in image_ids:
        terms += [image_id, image_id[:12], "sha256:" + image_id]
    for name in names:
        terms.append(name)
        untagged = name.split("@")[0]
        head, slash, tail = untagged.rpartition("/")
        bare = tail.split(":")[0]
        terms += [untagged, tail, bare, f"{head}{slash}{bare}"]
        repository = f"{head}{slash}{bare}"
        for registry in ("localhost/", "docker.io/library/", "docker.io/"):
            if untagged.startswith(registry):
                terms += [untagged[len(registry) :], repository[len(registry) :]]
                break
        # The usual short form of names of Docker Hub.
        for official in (untagged, repository):
            if official.startswith("docker.io/library/"):
                terms.append(official.replace("library/", "", 1))
    return terms


def map_terms(uidmap: t.Sequence[str], gidmap: t.Sequence[str]) -> t.List[str]:
    """The texts of a mapping that patterns are matched against: ``0:100000:65536``, ranges joined by commas; uid and
    gid maps joined by a slash.
    """
    uid, gid = ",".join(uidmap), ",".join(gidmap)
    return [f"{uid}/{gid}"] + ([uid] if uid == gid else [uid, gid])
