# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Builds the collection's tarball reproducibly, and prints its path: build [FOLDER].

ansible-galaxy packs it. Afterwards the names are sorted, and all times of files and of the archive are set to
SOURCE_DATE_EPOCH, or to the time of the last commit.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

import workshop


def main(arguments: list[str]) -> None:
    workshop.need("base")
    tools = workshop.environment("tools")
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or last_commit())
    with workshop.collection_tree("build") as tree:
        print(build(tree, Path(*arguments).absolute(), tools / "bin/ansible-galaxy", epoch))


def last_commit() -> str:
    command = ["git", "-c", f"safe.directory={workshop.ROOT}", "log", "-1", "--format=%ct"]
    return workshop.call(command, folder=workshop.ROOT).strip()


def build(tree: Path, folder: Path, galaxy: Path, epoch: int) -> Path:
    """Pack the collection in a folder to a tarball in another folder.

    :param epoch: the time of all entries, in seconds since 1970
    :returns: the path of the tarball
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        workshop.call([galaxy, "collection", "build", "--output-path", scratch, tree])
        (packed,) = Path(scratch).glob("*.tar.gz")
        target = folder / packed.name
        target.write_bytes(normal(packed.read_bytes(), epoch))
    return target


def normal(packed: bytes, epoch: int) -> bytes:
    """The archive with sorted names and the same time for all entries."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        members = {member.name: member for member in archive}
        texts = {
            name: stream.read()
            for name, member in members.items()
            if (stream := archive.extractfile(member)) is not None
        }
    files = json.loads(texts["FILES.json"])
    files["files"].sort(key=lambda item: item["name"])
    texts["FILES.json"] = _json(files)
    manifest = json.loads(texts["MANIFEST.json"])
    checksum = hashlib.sha256(texts["FILES.json"]).hexdigest()
    manifest["file_manifest_file"]["chksum_sha256"] = checksum
    texts["MANIFEST.json"] = _json(manifest)
    first = ("MANIFEST.json", "FILES.json")
    unpacked, result = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=unpacked, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in (*first, *sorted(set(members) - set(first))):
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.mtime = members[name].type, members[name].mode, epoch
            member.size = len(texts.get(name, b""))
            archive.addfile(member, io.BytesIO(texts.get(name, b"")))
    with gzip.GzipFile(filename="", fileobj=result, mode="wb", mtime=epoch) as compressed:
        compressed.write(unpacked.getvalue())
    return result.getvalue()


def _json(data: object) -> bytes:
    return json.dumps(data, indent=1).encode()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except workshop.SetupError as error:
        sys.exit(f"error: {error}")
