# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A registry on a loopback port that has one image, under every name."""

from __future__ import annotations

import hashlib
import http.server
import json
import pathlib
import threading
import typing as t

from .images import Image


class Registry:
    """Serves until it is closed.

    :param hosts: the registries that it stands for once `configure` has been called
    """

    def __init__(self, image: Image, hosts: t.Sequence[str]) -> None:
        layout = image.path
        index = json.loads((layout / "index.json").read_text())
        digest = index["manifests"][0]["digest"].partition(":")[2]
        manifest = (layout / "blobs/sha256" / digest).read_bytes()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                kind, _slash, name = self.path.rpartition("/")
                body, media = b"{}", "application/json"
                if kind.endswith("/manifests"):
                    body, media = manifest, "application/vnd.oci.image.manifest.v1+json"
                elif kind.endswith("/blobs"):
                    body = (layout / "blobs/sha256" / name.partition(":")[2]).read_bytes()
                    media = "application/octet-stream"
                self.send_response(200)
                self.send_header("Content-Type", media)
                self.send_header("Content-Length", str(len(body)))
                sha = hashlib.sha256(body).hexdigest()
                self.send_header("Docker-Content-Digest", f"sha256:{sha}")
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, format: str, *args: t.Any) -> None:
                pass

        self.hosts = hosts
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def configure(self, etc: pathlib.Path) -> None:
        """Have the programs of a machine take this for those registries: its folder etc/containers."""
        place = f"127.0.0.1:{self.server.server_port}"
        parts = [
            f'[[registry]]\nprefix = "{host}"\nlocation = "{place}"\ninsecure = true\n'
            for host in self.hosts
        ]
        (etc / "registries.conf").write_text("\n".join(parts))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
