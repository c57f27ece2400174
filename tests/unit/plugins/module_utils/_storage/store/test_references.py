# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tests of parsing image references. tests/interop/test_references.py compares the results with podman."""

from __future__ import annotations

import contextlib

import pytest
from ansible_collections.userns.storage.plugins.module_utils._storage.errors import ConfigError
from ansible_collections.userns.storage.plugins.module_utils._storage.operations.image_patterns import (
    image_terms,
)
from ansible_collections.userns.storage.plugins.module_utils._storage.store.references import (
    Reference,
    has_registry,
    parse,
    recorded,
    split_tag,
)
from hypothesis import given
from hypothesis import strategies as st

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis", Reference("", "redis")),
        ("org/redis:8", Reference("", "org/redis", "8")),
        ("docker.io/redis", Reference("docker.io", "library/redis")),
        ("docker.io/org/redis", Reference("docker.io", "org/redis")),
        ("index.docker.io/redis:8", Reference("docker.io", "library/redis", "8")),
        ("docker://quay.io/x:1", Reference("quay.io", "x", "1")),
        ("localhost/x", Reference("localhost", "x")),
        ("localhost:5000/x", Reference("localhost:5000", "x")),
        ("quay.io:443/a/b:t", Reference("quay.io:443", "a/b", "t")),
        (f"x@{DIGEST}", Reference("", "x", "", DIGEST)),
        (f"docker.io/x:1@{DIGEST}", Reference("docker.io", "library/x", "1", DIGEST)),
        ("x@sha512:" + "0" * 128, Reference("", "x", "", "sha512:" + "0" * 128)),
    ],
)
def test_reference_is_parsed_and_formatted(text: str, expected: Reference) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "no uppercase letters") for text in ("Redis", "quay.io/Org/x", "docker.io/A")),
        *((text, "a tag has up to 128") for text in ("x:", "x:-1", "x:ä", "x:1+2", "x:" + "a" * 129)),
        *((text, "its digest") for text in ("x@", "x@y", "x@sha256:ab", "x@md5:" + "a" * 32, "x@sha256:" + "A" * 64)),
        *((text, "lowercase letters and digits") for text in ("", " ", "-x", "x_", "x//y", "x y", "x\n", "a___b")),
        *((text, "is not a registry") for text in ("q_y.io/x", "-a.b/x", "a..b/x", "a.b:/x", "[::1]:5000/x", ".io/x")),
        ("a.b/" + "c" * 252, "more than 255 characters"),
        ("docker.io/" + "c" * 238, "more than 255 characters"),
    ],
)  # fmt: skip
def test_invalid_references_are_rejected(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text)


def test_recorded_names_are_complete() -> None:
    assert recorded("redis", "docker.io") == "docker.io/library/redis:latest"
    assert recorded("redis:8", "localhost") == "localhost/redis:8"
    assert recorded("quay.io/x", "localhost") == "quay.io/x:latest"
    assert recorded("f" * 64, "localhost") == f"localhost/{'f' * 64}:latest"
    with pytest.raises(ConfigError, match="64 hexadecimal digits are an image's ID"):
        recorded("f" * 64, "docker.io")
    with pytest.raises(ConfigError, match="has a digest"):
        recorded(f"x@{DIGEST}", "docker.io")


@given(st.text("ab1./:@-_A sha256", max_size=24) | st.text(max_size=12))
def test_recorded_name_is_recorded_unchanged(text: str) -> None:
    with contextlib.suppress(ConfigError):
        name = recorded(text, "docker.io")
        assert recorded(name, "localhost") == name
        assert str(parse(name)) == name


def test_patterns_match_short_names_of_docker_hub() -> None:
    found = image_terms((), ["docker.io/library/nextcloud:stable"])
    for name in (
        *("docker.io/library/nextcloud:stable", "docker.io/nextcloud:stable", "nextcloud:stable"),
        *("docker.io/library/nextcloud", "docker.io/nextcloud", "nextcloud"),
    ):
        assert name in found


def test_tag_and_registry_of_a_name_are_found() -> None:
    assert split_tag("registry:5000/a") == ("registry:5000/a", "")
    assert split_tag("registry:5000/a:1") == ("registry:5000/a", "1")
    assert has_registry("registry:5000/a")
    assert has_registry("localhost/a")
    assert not has_registry("org/a")
    assert not has_registry("a.b")
