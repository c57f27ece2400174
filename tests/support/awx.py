# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A stand-in for the interface of an AWX 24 controller. It is not a controller.

It answers the requests of the modules of awx.awx in the format that AWX's documentation of its interface describes:
lists with ``count``, ``next`` and ``results``, objects with ``url`` and ``related``, 201 for new objects, 204 for
associations. It stores objects, refuses the job templates, surveys, answers and schedules that AWX 24.6.1 refuses, and
records each request. Unknown requests are answered with 404.
"""

from __future__ import annotations

import json
import pathlib
import re
import threading
import typing as t
import urllib.parse
import zoneinfo
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

COLLECTION = pathlib.Path(__file__).resolve().parents[2]

Json = t.Dict[str, t.Any]

TOKEN = "stand-in"

# Collections, with the required fields of new objects.
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
# A file of a project is listed as a playbook if one of its lines matches, except in these folders.
_PLAYBOOK = re.compile(r"^\s*-?\s*(hosts|(ansible\.builtin\.)?import_playbook)\s*:", re.MULTILINE)
_NO_PLAYBOOKS = frozenset({"roles", "tasks", "group_vars", "host_vars"})
_RRULE = re.compile(
    r"DTSTART(?:;TZID=(?P<zone>[\w/+-]+))?:\d{8}T\d{6}(?P<utc>Z?) RRULE:(?P<rule>\S+)"
)
_TEXTS = ("text", "textarea", "password")
# The states of a project after an update.
_DONE = ("successful", "failed")


class Refused(Exception):
    """An error that is answered with 400."""


def offered_playbooks(project: pathlib.Path) -> t.List[str]:
    """The files of a project that a controller lists as playbooks."""
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
    if not survey["spec"]:
        raise Refused("'spec' doesn't contain any items.")
    seen = set()
    for number, question in enumerate(survey["spec"]):
        for key in ("type", "question_name", "variable", "required"):
            if key not in question:
                raise Refused(f"'{key}' missing from survey question {number}")
        if question["type"] not in _TYPES:
            raise Refused(
                f"'{question['type']}' in survey question {number} is not one of the allowed types"
            )
        if question["variable"] in seen or not question["variable"]:
            raise Refused(
                f"'variable' '{question['variable']}' duplicated or malformed in question {number}"
            )
        seen.add(question["variable"])
        default = question.get("default", "")
        fits = isinstance(default, _TYPES[question["type"]]) and not isinstance(default, bool)
        if default != "" and not fits:
            raise Refused(
                f"Default value {default!r} in question {number} is not of type {question['type']}"
            )
        if question["type"] == "multiplechoice":
            if not question.get("choices"):
                raise Refused(f"Question {number} has no choices")
            if default not in ["", *_choices(question)]:
                raise Refused(f"The default of question {number} is no choice of it")


def _choices(question: Json) -> t.List[str]:
    choices = question["choices"]
    return choices.splitlines() if isinstance(choices, str) else list(choices)


def _check_answer(question: Json, answers: t.Mapping[str, t.Any]) -> None:
    name, kind = question["variable"], question["type"]
    if name not in answers:
        if question["required"]:
            raise Refused(f"'{name}' value missing")
        return
    value = answers[name]
    if kind in _TEXTS and not isinstance(value, str):
        raise Refused(f"Value {value!r} for '{name}' expected to be a string.")
    if kind == "integer":
        if isinstance(value, bool) or not isinstance(value, int):
            raise Refused(f"Value {value!r} for '{name}' expected to be an integer.")
        if not question.get("min", value) <= value <= question.get("max", value):
            raise Refused(f"'{name}' value {value} is out of range")
    if kind == "multiplechoice" and value not in _choices(question):
        raise Refused(f"Value {value!r} for '{name}' expected to be one of {_choices(question)}.")


def survey_of(job: str) -> Json:
    """The survey of a job template of this collection."""
    found: Json = json.loads((COLLECTION / f"awx/surveys/{job}.json").read_text())
    return found


def launch_variables(survey: Json, answers: t.Mapping[str, t.Any]) -> Json:
    """The extra variables of a job that is launched with these answers: defaults, then answers of the survey.

    :raises Refused: a controller would answer 400
    """
    for question in survey["spec"]:
        _check_answer(question, answers)
    found = {
        question["variable"]: question["default"]
        for question in survey["spec"]
        if question.get("default") is not None
    }
    known = {question["variable"] for question in survey["spec"]}
    return {**found, **{name: value for name, value in answers.items() if name in known}}


class _Dumper(yaml.SafeDumper):
    """Marks every text as unsafe, as AWX does."""


_Dumper.add_representer(
    str, lambda dumper, value: dumper.represent_scalar("!unsafe", value, style="'")
)


def extravars(variables: Json) -> str:
    """Extra variables in the form in which AWX passes answers to a job."""
    return yaml.dump(variables, Dumper=_Dumper, allow_unicode=True)


def check_rrule(rrule: str) -> None:
    """Refuse the recurrence rule of a schedule that a controller would refuse."""
    found = _RRULE.fullmatch(rrule)
    if not found:
        raise Refused(f"rrule: {rrule} parsing failed validation")
    if not found["zone"] and not found["utc"]:
        raise Refused(
            "rrule: DTSTART cannot be a naive datetime. Require ;TZINFO= or YYYYMMDDTHHMMSSZZ."
        )
    if found["zone"] and found["zone"] not in zoneinfo.available_timezones():
        raise Refused(f"rrule: unknown time zone {found['zone']}")
    rule = dict(part.partition("=")[::2] for part in found["rule"].split(";"))
    if "INTERVAL" not in rule:
        raise Refused("rrule: INTERVAL required in rrule.")
    if rule.get("FREQ") not in ("MINUTELY", "HOURLY", "DAILY", "WEEKLY", "MONTHLY", "YEARLY"):
        raise Refused(f"rrule: {rule.get('FREQ')} is not supported.")


class StandIn:
    """The stand-in, which listens on loopback inside a with block.

    :ivar requests: a list of (method, path, body)
    :ivar objects: the stored objects by kind and number
    :ivar failing_updates: the number of following project updates that fail, like those from an unreachable source
    :ivar galaxy_reachable: if false, updates of projects that require collections fail
    """

    def __init__(self, project: pathlib.Path) -> None:
        """:param project: the folder of which every project is a checkout"""
        self.project = project
        self.failing_updates = 0
        self.galaxy_reachable = True
        self.updates: t.Dict[int, Json] = {}
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
                answered: t.Any = result
                data = b"" if answered is None else json.dumps(result).encode()
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
        number = self.number
        url = f"/api/v2/{kind}/{number}/"
        if kind == "inventories":
            # The module sends null, and a controller keeps an empty text.
            fields = {**fields, "kind": fields.get("kind") or ""}
        self.objects[kind][number] = {
            "id": number,
            "type": kind.rstrip("s"),
            "url": url,
            **fields,
        }
        if kind == "projects":
            self._update_project(number)
        return self.shown(kind, number)

    def _update_project(self, number: int) -> Json:
        """Start an update of a project. It ends after its first query."""
        fails = self.failing_updates > 0
        self.failing_updates -= fails
        needs_galaxy = (self.project / "collections/requirements.yml").exists()
        fails = fails or (needs_galaxy and not self.galaxy_reachable)
        self.number += 1
        update = {
            "id": self.number,
            "type": "project_update",
            "url": f"/api/v2/project_updates/{self.number}/",
            "project": number,
            "status": "pending",
            "failed": fails,
            "finished": None,
            "event_processing_finished": False,
            "scm_revision": "" if fails else "0123456789",
        }
        self.updates[self.number] = update
        self.objects["projects"][number].update(status="pending", current=self.number)
        return update

    def _proceed(self, update: Json) -> None:
        """End a pending update."""
        if update["status"] == "pending":
            update["status"] = _DONE[update["failed"]]
            update.update(finished="2026-01-01T00:00:00Z", event_processing_finished=True)
            project = self.objects["projects"][update["project"]]
            project["status"] = update["status"]
            if not update["failed"]:
                project["scm_revision"] = update["scm_revision"]

    @property
    def playbooks(self) -> t.List[str]:
        return offered_playbooks(self.project)

    def shown(self, kind: str, number: int) -> Json:
        found = dict(self.objects[kind][number])
        found["related"] = {}
        found["summary_fields"] = {}
        if kind == "projects":
            found.setdefault("scm_revision", "")
            found["related"]["update"] = f"{found['url']}update/"
            update = self.updates[found.pop("current")]
            if update["status"] == "pending":
                found["summary_fields"]["current_update"] = {"id": update["id"]}
        if kind == "job_templates":
            found["related"]["survey_spec"] = f"{found['url']}survey_spec/"
        return found

    def named(self, kind: str, name: str) -> Json:
        """The object of that name."""
        (found,) = (item for item in self.objects[kind].values() if item["name"] == name)
        return found

    def answer(self, method: str, path: str, body: t.Any) -> t.Tuple[int, t.Any]:
        parsed = urllib.parse.urlparse(path)
        segments = parsed.path.strip("/").split("/")
        query = dict(urllib.parse.parse_qsl(parsed.query))
        if method != "GET":
            self.requests.append((method, parsed.path, body))
        try:
            return self._answer(method, segments[2:], query, body)
        except Refused as refusal:
            return 400, {"__all__": [str(refusal)]}

    def _answer(
        self, method: str, segments: t.Sequence[str], query: t.Mapping[str, str], body: t.Any
    ) -> t.Tuple[int, t.Any]:
        kind = segments[0] if segments else ""
        if kind == "unified_job_templates" and method == "GET":
            return 200, self._list(["job_templates", "projects"], query)
        if kind == "project_updates" and method == "GET" and int(segments[1]) in self.updates:
            update = self.updates[int(segments[1])]
            answer = dict(update)
            self._proceed(update)
            return 200, answer
        if kind not in self.objects:
            return 404, {"detail": "Not found."}
        if len(segments) == 1:
            if method == "GET":
                return 200, self._list([kind], query)
            if method == "POST":
                self._check(kind, body)
                return 201, self.put(kind, body)
            return 405, {"detail": f'Method "{method}" not allowed.'}
        number = int(segments[1])
        if number not in self.objects[kind]:
            return 404, {"detail": "Not found."}
        if len(segments) == 3:
            return self._sub(method, kind, number, segments[2], body)
        if method == "PATCH":
            self._check(kind, {**self.objects[kind][number], **body})
            self.objects[kind][number].update(body)
            if kind == "inventories":
                item = self.objects[kind][number]
                item["kind"] = item["kind"] or ""
        shown = self.shown(kind, number)
        if kind == "projects":
            self._proceed(self.updates[self.objects[kind][number]["current"]])
        return 200, shown

    def _sub(
        self, method: str, kind: str, number: int, name: str, body: t.Any
    ) -> t.Tuple[int, t.Any]:
        if (kind, name) == ("job_templates", "survey_spec"):
            if method == "POST":
                check_survey(body)
                self.surveys[number] = body
            return 200, self.surveys.get(number, {})
        if (kind, name, method) == ("projects", "update", "POST"):
            return 202, self._update_project(number)
        found = self.associated.setdefault(f"{kind}/{number}/{name}", [])
        if method == "POST":
            found.append(body["id"])
            return 204, None
        return 200, {"count": len(found), "next": None, "results": [{"id": item} for item in found]}

    def _list(self, kinds: t.Sequence[str], query: t.Mapping[str, str]) -> Json:
        found = []
        for kind in kinds:
            for number, item in self.objects[kind].items():
                if all(
                    str(item.get(key)) == value for key, value in query.items() if "__" not in key
                ):
                    found.append(self.shown(kind, number))
        return {"count": len(found), "next": None, "previous": None, "results": found}

    def _check(self, kind: str, body: Json) -> None:
        for field in _REQUIRED[kind]:
            if body.get(field) in (None, ""):
                raise Refused(f"{field}: This field is required.")
        if kind == "job_templates":
            project = self.objects["projects"][body["project"]]
            # A project whose first update failed has no files.
            offered = self.playbooks if project.get("scm_revision") else []
            if body["playbook"] not in offered:
                raise Refused("playbook: Playbook not found for project.")
        if kind == "schedules":
            check_rrule(body["rrule"])
            survey = self.surveys.get(body["unified_job_template"], {"spec": []})
            for question in survey["spec"]:
                try:
                    _check_answer(question, body.get("extra_data") or {})
                except Refused as refusal:
                    raise Refused(f"variables_needed_to_start: {refusal}") from None
