# Copyright (c) 2026, the userns.storage contributors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Image references as containers/image reads, completes and records them (its package docker/reference)."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, replace

from ..errors import ConfigError
from ..printable import printable

DOCKER, LOCAL = "docker.io", "localhost"
_DOCKER_PREFIX = "docker://"
_OFFICIAL = "library"
# The maximum length of registry and repository together.
_LONGEST_NAME = 255

_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*(?::[0-9]+)?")
_PART = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-*)[a-z0-9]+)*")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_ID = re.compile(r"[0-9a-f]{64}")
_DIGITS = {"sha256": 64, "sha384": 96, "sha512": 128}


@dataclass(frozen=True)
class Reference:
    """An image's name in its parts.

    :param domain: the registry's host and port; empty in a short name
    :param path: the repository there
    :param tag: empty if there is none
    :param digest: such as ``sha256:...``; empty if there is none
    """

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def repository(self) -> str:
        """Registry and path."""
        return f"{self.domain}/{self.path}" if self.domain else self.path

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.repository}{tag}{digest}"


def parse(text: str) -> Reference:
    """Read a reference, and complete names of Docker Hub: ``docker.io/redis`` is ``docker.io/library/redis``.

    A prefix ``docker://`` is ignored. No registry and no tag are added.

    :raises ConfigError: it is no reference
    """
    name = text[len(_DOCKER_PREFIX) :] if text.startswith(_DOCKER_PREFIX) else text
    name, at, digest = name.partition("@")
    repository, tag = split_tag(name)
    if at and not is_digest(digest):
        raise _refusal(text, "its digest is not of the form sha256: and 64 hexadecimal digits")
    if name.endswith(":") or (tag and not _TAG.fullmatch(tag)):
        raise _refusal(text, "a tag has up to 128 letters, digits, points, hyphens and underscores")
    domain = ""
    if has_registry(repository):
        domain, _slash, repository = repository.partition("/")
        if not _DOMAIN.fullmatch(domain):
            raise _refusal(text, f"{domain!r} is not a registry")
    if repository != repository.lower():
        raise _refusal(text, "a repository has no uppercase letters")
    if not all(map(_PART.fullmatch, repository.split("/"))):
        raise _refusal(
            text,
            "a repository has lowercase letters and digits, with single separators between them",
        )
    if domain == f"index.{DOCKER}":
        domain = DOCKER
    found = _completed(Reference(domain, repository, tag, digest))
    if len(found.repository) > _LONGEST_NAME:
        raise _refusal(text, f"registry and repository have more than {_LONGEST_NAME} characters")
    return found


def recorded(text: str, domain: str) -> str:
    """The name of an image in the store's records: with registry, and with ``latest`` as the default tag.

    :param domain: the registry of a short name
    :raises ConfigError: it is no reference, or has a digest, which cannot be part of a recorded name
    """
    found = parse(text)
    if found.digest:
        raise ConfigError(
            f"image {printable(text)}",
            "has a digest, which cannot be used as an image name",
            "Write NAME:TAG.",
        )
    if not found.domain and domain == DOCKER and _ID.fullmatch(found.path):
        raise _refusal(text, "64 hexadecimal digits are an image's ID, not its name")
    full = _completed(replace(found, domain=found.domain or domain, tag=found.tag or "latest"))
    if len(full.repository) > _LONGEST_NAME:
        raise _refusal(text, f"registry and repository have more than {_LONGEST_NAME} characters")
    return str(full)


def split_tag(name: str) -> t.Tuple[str, str]:
    """Split a name without digest into repository and tag; the tag may be empty."""
    head, colon, tail = name.rpartition(":")
    if not colon or "/" in tail:
        return name, ""
    return head, tail


def has_registry(repository: str) -> bool:
    """Whether the first part of the name is a registry's host."""
    first, slash, _rest = repository.partition("/")
    return bool(slash) and ("." in first or ":" in first or first == LOCAL)


def is_digest(text: str) -> bool:
    """Whether it is a digest of an algorithm that containers/image knows."""
    algorithm, _colon, digits = text.partition(":")
    return _DIGITS.get(algorithm) == len(digits) and bool(re.fullmatch("[0-9a-f]+", digits))


def _completed(found: Reference) -> Reference:
    if found.domain == DOCKER and "/" not in found.path:
        return replace(found, path=f"{_OFFICIAL}/{found.path}")
    return found


def _refusal(text: str, cause: str) -> ConfigError:
    return ConfigError(
        f"image {printable(text)}",
        f"is not an image reference: {cause}",
        "Use a form such as docker.io/library/redis:8.",
    )
