# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The jobs as AWX runs them, the definition of the execution environment, and the configuration of AWX."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
import typing as t

import pytest
import yaml
from support import ansible_core_versions, awx

if t.TYPE_CHECKING:
    from fleet.conftest import Play
    from support.images import Image
    from support.stores import Store

ROOT = pathlib.Path(__file__).resolve().parents[2]
JOBS = ("prepare", "prune", "report")
MAP = "0:100000:65536"


class Controller:
    """Runs jobs with ansible-runner in the three steps of AWX: transmit, worker, process."""

    def __init__(self, folder: pathlib.Path, environ: t.Mapping[str, str]) -> None:
        self.folder, self.environ = folder, environ
        self.number = 0

    def launch(
        self,
        job: str,
        answers: t.Mapping[str, t.Any],
        *options: str,
        hosts: t.Any = None,
        variables: t.Optional[t.Mapping[str, t.Any]] = None,
    ) -> t.Dict[str, t.Any]:
        """Launch a job with answers to its survey and with inventory variables; returns its artifacts."""
        self.number += 1
        base = self.folder / f"job{self.number}"
        private, remote = base / "private", base / "remote"
        shutil.copytree(ROOT / "awx", private / "project")
        (private / "inventory").mkdir()
        local = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
        all_vars = {**local, **(variables or {})}
        inventory = {"all": {"hosts": hosts or {"store1": {}}, "vars": all_vars}}
        (private / "inventory/hosts.json").write_text(json.dumps(inventory))
        (private / "env").mkdir()
        (private / "env/extravars").write_text(
            awx.extravars(awx.launch_variables(awx.survey_of(job), answers))
        )
        (private / "env/cmdline").write_text(" ".join(options))
        (private / "env/envvars").write_text(json.dumps({**self.environ, "ANSIBLE_NOCOLOR": "1"}))
        remote.mkdir()
        program = [sys.executable, "-m", "ansible_runner"]
        transmitted = self._step(
            [*program, "transmit", str(private), "-p", f"{job}.yml", "--ident", "job"]
        )
        worked = self._step([*program, "worker", "--private-data-dir", str(remote)], transmitted)
        output = self._step([*program, "process", str(private), "--ident", "job"], worked).decode()
        artifacts = private / "artifacts/job"
        if (artifacts / "rc").read_text() != "0":
            raise AssertionError(output)
        events = [
            json.loads(file.read_text()) for file in (artifacts / "job_events").glob("*.json")
        ]
        (stats,) = (event for event in events if event["event"] == "playbook_on_stats")
        found: t.Dict[str, t.Any] = stats["event_data"]["artifact_data"]
        return found

    @staticmethod
    def _step(command: t.Sequence[str], data: bytes = b"") -> bytes:
        done = subprocess.run(command, input=data, capture_output=True, check=False)
        if done.returncode != 0:
            raise AssertionError(
                f"{command}: rc {done.returncode}\n{done.stdout!r}\n{done.stderr.decode()}"
            )
        return done.stdout


@pytest.fixture
def store(make_store: t.Callable[..., t.Any], small_image: t.Any) -> t.Any:
    return make_store("vfs", small_image)


@pytest.fixture
def controller(store: t.Any, tmp_path: pathlib.Path, collections_path: str) -> Controller:
    environ = {**store.env(), "ANSIBLE_COLLECTIONS_PATH": collections_path}
    return Controller(tmp_path, environ)


def test_jobs_prepare_report_and_prune(
    controller: Controller, store: Store, tmp_path: pathlib.Path
) -> None:
    answers = {
        "prepare_images": "localhost/small:1\n",
        "prepare_mappings": f"{MAP}\n0:200000:65536",
        "prepare_install": "false",
        "prepare_lease": "30d",
    }
    predicted = controller.launch("prepare", answers, "--check", "--diff")
    assert predicted["userns_storage_layers_created"] == 2
    assert predicted["userns_storage_hosts_not_predicted"] == 0
    created = controller.launch("prepare", answers)
    assert created["userns_storage_hosts_prepared"] == 1
    assert created["userns_storage_layers_created"] == 2
    assert created["userns_storage_bytes_mapped"] > 0
    repeated = controller.launch("prepare", answers)
    assert repeated["userns_storage_layers_created"] == 0
    assert repeated["userns_storage_layers_existing"] == 2

    page = tmp_path / "page.html"
    report = controller.launch(
        "report",
        {"report_html": str(page), "report_users": "none"},
        variables={
            **answers,
            "prune_max_copies_per_image": "1",
            "prune_min_age": "0",
            "prepare_mappings": f"{MAP}\n0:400000:65536",
        },
    )
    totals = report["userns_storage_report"]
    assert totals["hosts"] == 1
    assert totals["mapped_layers"] == 2
    # Both layers have a lease.
    assert totals["layers_reclaimable"] == 0
    assert totals["layers_missing"] == 1
    assert totals["bytes_on_disk"] > totals["bytes_of_mapped_layers"] > 0
    assert "`localhost/small:1`" in report["userns_storage_report_markdown"]
    assert "0:400000:65536" in page.read_text()

    pruned = controller.launch("prune", {"prune_max_copies_per_image": "0", "prune_min_age": "0"})
    assert pruned["userns_storage_layers_removed"] == 0
    assert pruned["userns_storage_layers_kept"] == 2


def test_prune_removes_and_counts(controller: Controller, store: Store) -> None:
    # The answer `none` disables the setting of the inventory.
    answers = {
        "prepare_images": "localhost/small:1",
        "prepare_mappings": f"{MAP}\n0:200000:65536",
        "prepare_install": "false",
        "prepare_lease": "none",
    }
    controller.launch("prepare", answers, variables={"prepare_lease": "30d"})
    # ansible-core 2.19 reads the answers as numbers, and the age as a string.
    policy = {"prune_max_copies_per_image": "1", "prune_min_age": "0", "prune_orphans": "report"}
    predicted = controller.launch("prune", policy, "--check")
    # Without answers, the inventory defines what is removed, and a survey can disable that.
    inventory = {"prune_max_copies_per_image": 0, "prune_min_age": 0}
    disabled = controller.launch(
        "prune", {"prune_max_copies_per_image": "none"}, variables=inventory
    )
    default_age = controller.launch("prune", {"prune_min_age": ""}, variables=inventory)
    done = controller.launch("prune", {}, variables={**inventory, "prune_max_copies_per_image": 1})
    repeated = controller.launch("prune", policy)
    assert (
        disabled["userns_storage_layers_removed"]
        == default_age["userns_storage_layers_removed"]
        == 0
    )
    for item in (predicted, done):
        assert item["userns_storage_hosts_pruned"] == 1
        assert item["userns_storage_layers_removed"] == 1
        assert item["userns_storage_layers_kept"] == 1
    # The measured values may be smaller, since other processes use the filesystem too.
    assert predicted["userns_storage_inodes_reclaimed"] > 0
    assert repeated["userns_storage_layers_removed"] == 0


def test_check_mode_sets_artifacts_for_image_not_yet_pulled(
    controller: Controller, small_image: Image
) -> None:
    source = f"localhost/other:1=oci:{small_image.path}"
    found = controller.launch(
        "prepare",
        {"prepare_images": source, "prepare_mappings": MAP, "prepare_install": "false"},
        "--check",
    )
    assert found["userns_storage_hosts_prepared"] == 1
    assert found["userns_storage_hosts_not_predicted"] == 1
    assert found["userns_storage_layers_created"] == 0


# Blank answers, numbers and switches, which versions of ansible-core convert differently.
ANSWERS = {
    "prune_users": "",
    "prune_unused_for": "",
    "prune_created_before": "",
    "prune_max_used_space": "none",
    "prune_high_threshold": "95",
    "prune_low_threshold": "0",
    "prune_min_age": "0",
    "prune_max_copies_per_image": "1",
    "prune_keep_images": "none",
    "prune_duplicates": "true",
    "prune_shared": "",
    "prune_time_limit": "",
    "report_users": "all",
    "report_html": "",
    "report_markdown": "none",
    "report_host": "",
    "report_title": "",
    "prepare_images": "localhost/small:1",
    "prepare_mappings": f"{MAP}\n0:200000:65536",
    "prepare_users": "",
    "prepare_lease": "",
    "prepare_install": "false",
    "prepare_storage_options": "",
}


@pytest.mark.parametrize("core", ["oldest", "own", "newest"])
def test_answers_have_same_meaning_in_each_ansible_core_version(
    play: t.Callable[..., Play], store: Store, tmp_path: pathlib.Path, core: str
) -> None:
    answers = tmp_path / "answers.yml"
    answers.write_text(awx.extravars(ANSWERS))
    local = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
    hosts: t.Dict[str, t.Dict[str, t.Any]] = {"one": {}, "two": {}}
    jobs = tmp_path / "jobs.yml"
    jobs.write_text("".join(f"- import_playbook: {ROOT}/awx/{job}.yml\n" for job in JOBS))
    done = play(
        jobs,
        {"all": {"hosts": hosts, "vars": local}},
        "-e",
        f"@{answers}",
        environ=store.env(),
        python=ansible_core_versions.python_with_core(core),
    )
    text = done.output.partition("RUN: ")[2]
    stats, _end = json.JSONDecoder().raw_decode(text)
    # Both hosts have the same store: its two layers are created for the first host and found for the second,
    # and the policy keeps one layer. The totals are sums of numbers, not concatenated strings.
    assert stats["userns_storage_hosts_prepared"] == 2
    assert stats["userns_storage_layers_created"] + stats["userns_storage_layers_existing"] == 4
    assert stats["userns_storage_layers_removed"] == 1
    assert stats["userns_storage_report"]["hosts"] == 2
    assert (tmp_path / "userns-storage-report.html").exists()
    assert not (tmp_path / "userns-storage-report.md").exists()


def test_report_is_written_on_another_host(
    play: t.Callable[..., Play], store: Store, tmp_path: pathlib.Path
) -> None:
    """The task on the other host has the privileges of the play."""
    page = tmp_path / "page.html"
    local = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
    local["ansible_become_method"] = "ansible.builtin.su"
    answers = {"report_users": "none", "report_host": "web", "report_prune": False}
    files = {"report_html": str(page), "report_markdown": "none"}
    role = {"role": "userns.storage.report", "vars": {**answers, **files}}
    jobs = tmp_path / "report.json"
    jobs.write_text(
        json.dumps([{"hosts": "one", "become": True, "gather_facts": False, "roles": [role]}])
    )
    inventory = {"all": {"hosts": {"one": {}, "web": {}}, "vars": local}}
    done = play(jobs, inventory, environ=store.env())
    assert done.recap("one")["failed"] == 0
    assert "Container stores" in page.read_text()


def test_totals_of_several_hosts_are_added(controller: Controller, store: Store) -> None:
    """The two hosts are names of the same machine, with different mappings."""
    hosts = {"one": {"prepare_mappings": MAP}, "two": {"prepare_mappings": "0:200000:65536"}}
    answers = {"prepare_images": "localhost/small:1", "prepare_install": "false"}
    created = controller.launch("prepare", answers, hosts=hosts)
    assert created["userns_storage_hosts_prepared"] == 2
    assert created["userns_storage_layers_created"] == 2


def test_awx_offers_the_playbook_of_every_job() -> None:
    assert set(awx.offered_playbooks(ROOT / "awx")) == {
        *(f"{job}.yml" for job in JOBS),
        "configure.yml",
    }


def test_ansible_builder_accepts_the_execution_environment(tmp_path: pathlib.Path) -> None:
    """Without a registry, the test only checks that ansible-builder accepts it and writes the build context."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ansible_builder", "create"),
            *(
                "--file",
                str(ROOT / "awx/execution-environment.yml"),
                "--context",
                str(tmp_path / "context"),
            ),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FROM" in (tmp_path / "context/Containerfile").read_text()
    galaxy = yaml.safe_load((tmp_path / "context/_build/requirements.yml").read_text())
    assert [item["name"] for item in galaxy["collections"]] == ["userns.storage"]


@pytest.fixture
def stand_in() -> t.Iterator[awx.StandIn]:
    with awx.StandIn(ROOT / "awx") as running:
        yield running


def configure(
    play: t.Callable[..., t.Any], stand_in: awx.StandIn, *options: str, fails: bool = False
) -> t.Any:
    environ = {"CONTROLLER_HOST": stand_in.url, "CONTROLLER_OAUTH_TOKEN": awx.TOKEN}
    local = {
        "localhost": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    }
    inventory = {"all": {"hosts": local}}
    return play(ROOT / "awx/configure.yml", inventory, *options, environ=environ, fails=fails)


def test_configuration_passes_syntax_check(
    play: t.Callable[..., Play], stand_in: awx.StandIn
) -> None:
    configure(play, stand_in, "--syntax-check")
    assert stand_in.requests == []


def test_configuration_creates_all_objects_once(
    play: t.Callable[..., Play], stand_in: awx.StandIn
) -> None:
    """The test uses a stand-in for the API of a controller, see support/awx.py."""
    first = configure(play, stand_in)
    assert first.recap("localhost")["changed"] == 5
    jobs = {item["playbook"]: item for item in stand_in.objects["job_templates"].values()}
    assert set(jobs) == {f"{job}.yml" for job in JOBS}
    for job in JOBS:
        template = jobs[f"{job}.yml"]
        assert template["survey_enabled"]
        assert template["ask_job_type_on_launch"]
        assert template["become_enabled"]
        assert stand_in.surveys[template["id"]] == awx.survey_of(job)
        assert template["project"] == stand_in.named("projects", "userns.storage")["id"]
    nightly = stand_in.named("schedules", "userns.storage nightly prune")
    assert nightly["unified_job_template"] == jobs["prune.yml"]["id"]
    assert "FREQ=DAILY" in nightly["rrule"]
    assert nightly["extra_data"] == {"prune_unused_for": "4w"}
    project = stand_in.named("projects", "userns.storage")
    environment = stand_in.named("execution_environments", "userns.storage")
    assert project["default_environment"] == environment["id"]

    count = len(stand_in.requests)
    second = configure(play, stand_in)
    assert second.recap("localhost")["changed"] == 0
    assert stand_in.requests[count:] == []


def test_failed_project_update_is_repeated(
    play: t.Callable[..., Play], stand_in: awx.StandIn
) -> None:
    """If the update fails once, it is repeated in the same run, otherwise by the next run."""
    stand_in.failing_updates = 2
    failed = configure(play, stand_in, fails=True)
    assert "Update the project again" in failed.output
    assert "The Project Update - userns.storage, failed" in failed.output
    checked = configure(play, stand_in, "--check")
    assert checked.recap("localhost")["failed"] == 0
    recovered = configure(play, stand_in)
    assert recovered.recap("localhost")["failed"] == 0
    assert len(stand_in.objects["job_templates"]) == 3
    assert configure(play, stand_in).recap("localhost")["changed"] == 0
    stand_in.failing_updates = 1
    stand_in.objects["projects"].clear()
    stand_in.objects["job_templates"].clear()
    stand_in.objects["schedules"].clear()
    assert configure(play, stand_in).recap("localhost")["failed"] == 0


def test_project_needs_no_access_to_galaxy(
    play: t.Callable[..., Play], stand_in: awx.StandIn
) -> None:
    stand_in.galaxy_reachable = False
    assert configure(play, stand_in).recap("localhost")["changed"] == 5


def test_check_mode_predicts_changes_on_empty_controller(
    play: t.Callable[..., Play], stand_in: awx.StandIn
) -> None:
    predicted = configure(play, stand_in, "--check", "--diff")
    recap = predicted.recap("localhost")
    assert recap["failed"] == 0
    # Execution environment, project, inventory, and the objects that depend on them.
    assert recap["changed"] == 4
    assert "The job templates and the schedule would be created." in predicted.output
    assert stand_in.requests == []


def test_check_mode_writes_nothing_to_the_controller(
    play: t.Callable[..., Play], stand_in: awx.StandIn
) -> None:
    configure(play, stand_in)
    count = len(stand_in.requests)
    repeated = configure(play, stand_in, "--check", "--diff")
    assert repeated.recap("localhost")["changed"] == 0
    assert len(stand_in.requests) == count


def _schedule(stand_in: awx.StandIn, **fields: t.Any) -> int:
    template = stand_in.named("job_templates", "demo")
    body = {"name": "s", "rrule": RRULE, "unified_job_template": template["id"], **fields}
    status, _answer = stand_in.answer("POST", "/api/v2/schedules/", body)
    return status


def _survey(stand_in: awx.StandIn, *questions: t.Mapping[str, t.Any]) -> int:
    template = stand_in.named("job_templates", "demo")
    body = {"name": "", "description": "", "spec": list(questions)}
    path = f"/api/v2/job_templates/{template['id']}/survey_spec/"
    status, _answer = stand_in.answer("POST", path, body)
    return status


RRULE = "DTSTART;TZID=UTC:20260101T023000 RRULE:FREQ=DAILY;INTERVAL=1"
QUESTION = {"type": "integer", "question_name": "q", "variable": "q", "required": True}
CHOICE = {**QUESTION, "type": "multiplechoice", "choices": ["a", "b"]}
# AWX 24.6.1 responded in this way to each of these requests.
ROWS: t.Dict[str, t.Tuple[int, t.Callable[[awx.StandIn], int]]] = {
    "schedule without required answers": (
        400,
        lambda s: _survey(s, QUESTION) and _schedule(s),
    ),
    "schedule with required answers": (
        201,
        lambda s: _survey(s, QUESTION) and _schedule(s, extra_data={"q": 1}),
    ),
    "a default does not answer a required question": (
        400,
        lambda s: _survey(s, {**QUESTION, "default": 3}) and _schedule(s),
    ),
    "rrule without INTERVAL": (400, lambda s: _schedule(s, rrule=RRULE.replace(";INTERVAL=1", ""))),
    "rrule with a naive DTSTART": (
        400,
        lambda s: _schedule(s, rrule=RRULE.replace(";TZID=UTC", "")),
    ),
    "rrule with Z": (
        201,
        lambda s: _schedule(s, rrule=RRULE.replace(";TZID=UTC", "").replace(" RRULE", "Z RRULE")),
    ),
    "rrule with an unknown TZID": (
        400,
        lambda s: _schedule(s, rrule=RRULE.replace("UTC", "Nowhere/X")),
    ),
    "rrule with SECONDLY": (400, lambda s: _schedule(s, rrule=RRULE.replace("DAILY", "SECONDLY"))),
    "empty survey spec": (400, _survey),
    "unknown type of a question": (400, lambda s: _survey(s, {**QUESTION, "type": "txet"})),
    "choices as a string": (200, lambda s: _survey(s, {**CHOICE, "choices": "a\nb"})),
    "blank in the name of a variable": (200, lambda s: _survey(s, {**QUESTION, "variable": "a b"})),
    "integer default out of range": (
        200,
        lambda s: _survey(s, {**QUESTION, "min": 1, "max": 2, "default": 9}),
    ),
    "question without a default": (
        200,
        lambda s: _survey(s, QUESTION, {**CHOICE, "variable": "r"}),
    ),
}


@pytest.mark.parametrize("row", list(ROWS))
def test_stand_in_responds_like_awx(stand_in: awx.StandIn, row: str) -> None:
    stand_in.put("job_templates", {"name": "demo"})
    expected, request = ROWS[row]
    assert request(stand_in) == expected


def test_stand_in_stores_inventory_like_awx(stand_in: awx.StandIn) -> None:
    """A null kind is stored as an empty string, so a module that sends null again detects a difference."""
    _status, created = stand_in.answer(
        "POST", "/api/v2/inventories/", {"name": "i", "organization": 1, "kind": None}
    )
    assert created["kind"] == ""


REFUSED_ANSWERS = [
    (QUESTION, {}),
    (QUESTION, {"q": "1"}),
    (QUESTION, {"q": None}),
    (QUESTION, {"q": ""}),
    ({**QUESTION, "min": 1, "max": 5}, {"q": 9}),
    (CHOICE, {"q": True}),
    (CHOICE, {"q": "c"}),
]


@pytest.mark.parametrize(("question", "answers"), REFUSED_ANSWERS)
def test_invalid_answers_are_refused(
    question: t.Mapping[str, t.Any], answers: t.Mapping[str, t.Any]
) -> None:
    with pytest.raises(awx.Refused):
        awx.launch_variables({"spec": [question]}, answers)


def test_valid_answers_are_accepted() -> None:
    text = {**QUESTION, "type": "text"}
    assert awx.launch_variables({"spec": [text]}, {"q": "", "other": 1}) == {"q": ""}
    # An empty default is passed on too.
    optional = {**text, "required": False}
    assert awx.launch_variables({"spec": [{**optional, "default": ""}]}, {}) == {"q": ""}
    assert awx.launch_variables({"spec": [optional]}, {}) == {}


@pytest.mark.parametrize("job", JOBS)
def test_survey_without_answers_sets_no_variables(job: str) -> None:
    assert awx.launch_variables(awx.survey_of(job), {}) == {}


def test_missing_playbooks_are_refused(play: t.Callable[..., Play], stand_in: awx.StandIn) -> None:
    with pytest.raises(AssertionError, match=r"Playbook not found for project"):
        configure(play, stand_in, "-e", "awx_playbook_folder=other/")
