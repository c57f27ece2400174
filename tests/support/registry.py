# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Registries on a loopback port: one serves an image under every name, one receives images, one is docker-registry."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import http.server
import io
import itertools
import json
import os
import pathlib
import shutil
import socket
import subprocess
import tarfile
import threading
import typing as t
import urllib.parse

from .images import Image
from .waiting import wait_until


class Registry:
    """Serves an image under every name until it is closed.

    :param hosts: the registries that it replaces after a call of `configure`
    :param hold: the digest of a blob whose downloads wait until `go_on` is set; `waits` is set when a download waits
    """

    def __init__(self, image: Image, hosts: t.Sequence[str], hold: str = "") -> None:
        self.waits, self.go_on = threading.Event(), threading.Event()
        waits, go_on = self.waits, self.go_on
        layout = image.path
        index = json.loads((layout / "index.json").read_text())
        manifest_digest = index["manifests"][0]["digest"]
        manifest = (layout / "blobs/sha256" / manifest_digest.partition(":")[2]).read_bytes()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                kind, _slash, name = self.path.rpartition("/")
                body: t.BinaryIO = io.BytesIO(b"{}")
                media, digest = "application/json", ""
                if kind.endswith("/manifests"):
                    body, media = io.BytesIO(manifest), "application/vnd.oci.image.manifest.v1+json"
                    digest = manifest_digest
                elif kind.endswith("/blobs"):
                    body = (layout / "blobs/sha256" / name.partition(":")[2]).open("rb")
                    media, digest = "application/octet-stream", name
                with body:
                    size = body.seek(0, os.SEEK_END)
                    body.seek(0)
                    self.send_response(200)
                    self.send_header("Content-Type", media)
                    self.send_header("Content-Length", str(size))
                    if digest:
                        self.send_header("Docker-Content-Digest", digest)
                    self.end_headers()
                    if self.command == "GET" and hold and name == hold:
                        waits.set()
                        go_on.wait(120)
                    if self.command == "GET":
                        shutil.copyfileobj(body, self.wfile, 1 << 20)

            def do_HEAD(self) -> None:
                self.do_GET()

            def log_message(self, format: str, *args: t.Any) -> None:
                pass

        self.hosts = hosts
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def configure(self, etc: pathlib.Path) -> None:
        """Make programs use this registry instead of `hosts`.

        :param etc: the folder etc/containers of a machine
        """
        location = f"127.0.0.1:{self.server.server_port}"
        parts = [
            f'[[registry]]\nprefix = "{host}"\nlocation = "{location}"\ninsecure = true\n'
            for host in self.hosts
        ]
        (etc / "registries.conf").write_text("\n".join(parts))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Receiver:
    """A registry that stores pushed images in memory and serves them until it is closed.

    :ivar address: "127.0.0.1:PORT"
    :ivar blobs: by digest
    :ivar manifests: media types and contents by digest
    :ivar tags: digests by "name:tag"
    """

    def __init__(self) -> None:
        self.blobs: t.Dict[str, bytes] = {}
        self.manifests: t.Dict[str, t.Tuple[str, bytes]] = {}
        self.tags: t.Dict[str, str] = {}
        uploads: t.Dict[str, bytes] = {}
        numbers = itertools.count(1)
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = b""
                while True:
                    size = int(self.rfile.readline().split(b";")[0], 16)
                    body += self.rfile.read(size)
                    self.rfile.readline()
                    if size == 0:
                        return body

            def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_GET(self) -> None:
                kind, _slash, name = self.path.rpartition("/")
                digest = registry.tags.get(f"{kind[4:-10]}:{name}", name)
                if self.path == "/v2/":
                    self._answer(200, b"{}")
                elif kind.endswith("/blobs") and name in registry.blobs:
                    self._answer(200, registry.blobs[name])
                elif kind.endswith("/manifests") and digest in registry.manifests:
                    media, body = registry.manifests[digest]
                    self._answer(200, body, Content_Type=media, Docker_Content_Digest=digest)
                else:
                    self._answer(404, b"{}")

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                self._body()
                location = f"{self.path.partition('?')[0].rstrip('/')}/{next(numbers)}"
                uploads[location] = b""
                self._answer(202, Location=location, Range="0-0")

            def do_PATCH(self) -> None:
                uploads[self.path] += self._body()
                end = max(len(uploads[self.path]) - 1, 0)
                self._answer(202, Location=self.path, Range=f"0-{end}")

            def do_PUT(self) -> None:
                body = self._body()
                location, _mark, query = self.path.partition("?")
                if location in uploads:
                    body = uploads.pop(location) + body
                digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
                expected = urllib.parse.parse_qs(query).get("digest", [digest])
                if expected != [digest]:
                    self._answer(400)
                    return
                kind, _slash, name = location.rpartition("/")
                if kind.endswith("/manifests"):
                    registry.manifests[digest] = (self.headers["Content-Type"], body)
                    registry.tags[f"{kind[4:-10]}:{name}"] = digest
                else:
                    registry.blobs[digest] = body
                self._answer(201, Location=location, Docker_Content_Digest=digest)

            def log_message(self, format: str, *args: t.Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def layers(self, name: str) -> t.List[tarfile.TarFile]:
        """The layers of the image that was pushed as "name:tag", as open archives, the lowest layer first."""
        manifest = json.loads(self.manifests[self.tags[name]][1])
        blobs = [self.blobs[item["digest"]] for item in manifest["layers"]]
        return [tarfile.open(fileobj=io.BytesIO(blob), errors="surrogateescape") for blob in blobs]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class PrivateRegistry:
    """Debian's docker-registry with TLS and a single account, until it is closed.

    :ivar address: "127.0.0.1:PORT"
    :ivar certificate: the file with its certificate
    """

    def __init__(self, folder: pathlib.Path, name: str, password: str) -> None:
        """:param folder: a folder for its files"""
        self.certificate, key = folder / "registry.crt", folder / "registry.key"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
                *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
                *("-keyout", str(key), "-out", str(self.certificate)),
            ],
            check=True,
            capture_output=True,
        )
        (folder / "htpasswd").write_text(f"{name}:{_bcrypt(password)}\n")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        settings = {
            "version": 0.1,
            "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "registry")}},
            "http": {
                "addr": self.address,
                "tls": {"certificate": str(self.certificate), "key": str(key)},
            },
            "auth": {"htpasswd": {"realm": "tests", "path": str(folder / "htpasswd")}},
        }
        (folder / "registry.yml").write_text(json.dumps(settings))
        with open(folder / "registry.log", "wb") as log:
            self.process = subprocess.Popen(
                ["docker-registry", "serve", str(folder / "registry.yml")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._listens, describe=(folder / "registry.log").read_text)

    def _listens(self) -> bool:
        if self.process.poll() is not None:
            raise RuntimeError(f"docker-registry exited with status {self.process.returncode}")
        host, _colon, port = self.address.partition(":")
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return True
        return False

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def _bcrypt(password: str) -> str:
    """The hash of a password in the format that docker-registry reads, created by crypt(3)."""
    crypt = ctypes.CDLL("libcrypt.so.1").crypt
    crypt.restype = ctypes.c_char_p
    hashed: bytes = crypt(password.encode(), b"$2b$05$userns.storage.tests..")
    return hashed.decode()
