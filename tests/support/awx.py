# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for the interface of an AWX 24 controller. It is no controller.

It answers what the modules of awx.awx ask, in the form that AWX's own documentation of its interface describes:
lists with ``count``, ``next`` and ``results``, objects with ``url`` and ``related``, 201 for what is new, 204 for
associations. It keeps what it is given, refuses what a controller would refuse of our job templates, surveys and
schedules, and records each request. What it does not know it answers with 404.
"""

from __future__ import annotations

import json
import pathlib
import re
import threading
import typing as t
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Json = t.Dict[str, t.Any]

TOKEN = "stand-in"

# Collections, and what cannot be left out of a new object.
_REQUIRED: t.Dict[str, t.Tuple[str, ...]] = {
    "organizations": ("name",),
    "execution_environments": ("name", "image"),
    "projects": ("name", "organization", "scm_type"),
    "inventories": ("name", "organization"),
    "job_templates": ("name", "project", "inventory", "playbook"),
    "schedules": ("name", "rrule", "unified_job_template"),
    "credentials": ("name",),
    "labels": ("name",),
    "instance_groups": ("name",),
}
_TYPES = {
    "text": str,
    "textarea": str,
    "password": str,
    "integer": int,
    "float": float,
    "multiplechoice": str,
    "multiselect": str,
}
# A project's file is offered as a playbook if a line of it looks like this, and not from these folders.
_PLAYBOOK = re.compile(r"^\s*-?\s*(hosts|(ansible\.builtin\.)?import_playbook)\s*:", re.MULTILINE)
_NO_PLAYBOOKS = frozenset({"roles", "tasks", "group_vars", "host_vars"})
_RRULE = re.compile(r"DTSTART(;TZID=[\w/]+)?:\d{8}T\d{6}Z? RRULE:FREQ=\w+(;\w+=[\w,]+)*")


class Refused(Exception):
    """What the stand-in answers with 400."""


def offered_playbooks(project: pathlib.Path) -> t.List[str]:
    """The files of a project that a controller offers as playbooks."""
    return sorted(
        str(file.relative_to(project))
        for file in project.rglob("*.y*ml")
        if not _NO_PLAYBOOKS & set(file.relative_to(project).parts[:-1])
        and _PLAYBOOK.search(file.read_text())
    )


def check_survey(survey: Json) -> None:
    """Refuse a survey that a controller would refuse."""
    for key in ("name", "description", "spec"):
        if key not in survey:
            raise Refused(f"'{key}' missing from survey spec.")
    seen = set()
    for number, one in enumerate(survey["spec"]):
        for key in ("type", "question_name", "variable", "required"):
            if key not in one:
                raise Refused(f"'{key}' missing from survey question {number}")
        if one["type"] not in _TYPES:
            raise Refused(
                f"'{one['type']}' in survey question {number} is not one of the allowed types"
            )
        if one["variable"] in seen or not re.fullmatch(r"\w+", one["variable"]):
            raise Refused(
                f"'variable' '{one['variable']}' duplicated or malformed in question {number}"
            )
        seen.add(one["variable"])
        default = one.get("default", "")
        fits = isinstance(default, _TYPES[one["type"]]) and not isinstance(default, bool)
        if default != "" and not fits:
            raise Refused(
                f"Default value {default!r} in question {number} is not of type {one['type']}"
            )
        if one["type"] == "multiplechoice":
            if not isinstance(one.get("choices"), list) or not one["choices"]:
                raise Refused(f"Question {number} has no choices")
            if default not in ["", *one["choices"]]:
                raise Refused(f"The default of question {number} is no choice of it")
        low, high = one.get("min", default), one.get("max", default)
        if one["type"] == "integer" and default != "" and not low <= default <= high:
            raise Refused(f"The default of question {number} is out of range")


class StandIn:
    """The stand-in, listening on loopback while it is a context.

    Attributes: url; requests, a list of (method, path, body); objects, what it keeps.
    """

    def __init__(self, project: pathlib.Path) -> None:
        """:param project: the folder that every project is a checkout of"""
        self.playbooks = offered_playbooks(project)
        self.requests: t.List[t.Tuple[str, str, t.Any]] = []
        self.objects: t.Dict[str, t.Dict[int, Json]] = {name: {} for name in _REQUIRED}
        self.surveys: t.Dict[int, Json] = {}
        self.associated: t.Dict[str, t.List[int]] = {}
        self.number = 0
        self.put("organizations", {"name": "Default"})
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_ignored: t.Any) -> None:
                pass

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or "null")
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    status, result = (
                        401,
                        {"detail": "Authentication credentials were not provided."},
                    )
                else:
                    status, result = stand_in.answer(self.command, self.path, body)
                data = b"" if result is None else json.dumps(result).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("X-API-Product-Name", "AWX")
                self.send_header("X-API-Product-Version", "24.6.1")
                self.end_headers()
                self.wfile.write(data)

            def __getattr__(self, name: str) -> t.Any:
                if name.startswith("do_"):
                    return self.answer
                raise AttributeError(name)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_error: t.Any) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, kind: str, fields: Json) -> Json:
        self.number += 1
        url = f"/api/v2/{kind}/{self.number}/"
        self.objects[kind][self.number] = {
            "id": self.number,
            "type": kind.rstrip("s"),
            "url": url,
            **fields,
        }
        return self.shown(kind, self.number)

    def shown(self, kind: str, number: int) -> Json:
        found = dict(self.objects[kind][number])
        found["related"] = {}
        found["summary_fields"] = {}
        if kind == "projects":
            found["scm_revision"] = ""
        if kind == "job_templates":
            found["related"]["survey_spec"] = f"{found['url']}survey_spec/"
        return found

    def named(self, kind: str, name: str) -> Json:
        """The one object of that name."""
        (found,) = (one for one in self.objects[kind].values() if one["name"] == name)
        return found

    def answer(self, method: str, path: str, body: t.Any) -> t.Tuple[int, t.Any]:
        parsed = urllib.parse.urlparse(path)
        words = parsed.path.strip("/").split("/")
        query = dict(urllib.parse.parse_qsl(parsed.query))
        if method != "GET":
            self.requests.append((method, parsed.path, body))
        try:
            return self._answer(method, words[2:], query, body)
        except Refused as refusal:
            return 400, {"__all__": [str(refusal)]}

    def _answer(
        self, method: str, words: t.Sequence[str], query: t.Mapping[str, str], body: t.Any
    ) -> t.Tuple[int, t.Any]:
        kind = words[0] if words else ""
        if kind == "unified_job_templates" and method == "GET":
            return 200, self._list(["job_templates", "projects"], query)
        if kind not in self.objects:
            return 404, {"detail": "Not found."}
        if len(words) == 1:
            if method == "GET":
                return 200, self._list([kind], query)
            if method == "POST":
                self._check(kind, body)
                return 201, self.put(kind, body)
            return 405, {"detail": f'Method "{method}" not allowed.'}
        number = int(words[1])
        if number not in self.objects[kind]:
            return 404, {"detail": "Not found."}
        if len(words) == 3:
            return self._sub(method, kind, number, words[2], body)
        if method == "PATCH":
            self._check(kind, {**self.objects[kind][number], **body})
            self.objects[kind][number].update(body)
        return 200, self.shown(kind, number)

    def _sub(
        self, method: str, kind: str, number: int, name: str, body: t.Any
    ) -> t.Tuple[int, t.Any]:
        if (kind, name) == ("job_templates", "survey_spec"):
            if method == "POST":
                check_survey(body)
                self.surveys[number] = body
            return 200, self.surveys.get(number, {})
        found = self.associated.setdefault(f"{kind}/{number}/{name}", [])
        if method == "POST":
            found.append(body["id"])
            return 204, None
        return 200, {"count": len(found), "next": None, "results": [{"id": one} for one in found]}

    def _list(self, kinds: t.Sequence[str], query: t.Mapping[str, str]) -> Json:
        found = []
        for kind in kinds:
            for number, one in self.objects[kind].items():
                if all(
                    str(one.get(key)) == value for key, value in query.items() if "__" not in key
                ):
                    found.append(self.shown(kind, number))
        return {"count": len(found), "next": None, "previous": None, "results": found}

    def _check(self, kind: str, body: Json) -> None:
        for field in _REQUIRED[kind]:
            if body.get(field) in (None, ""):
                raise Refused(f"{field}: This field is required.")
        if kind == "job_templates" and body["playbook"] not in self.playbooks:
            raise Refused(
                f"playbook: {body['playbook']} not found for project; there are {self.playbooks}"
            )
        if kind == "schedules" and not _RRULE.fullmatch(body["rrule"]):
            raise Refused(f"rrule: {body['rrule']} parsing failed validation")
