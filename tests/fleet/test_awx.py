# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The three jobs as AWX runs them, what builds its execution environment, and its configuration as code."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys
import typing as t

import pytest
import yaml
from support import awx

ROOT = pathlib.Path(__file__).resolve().parents[2]
JOBS = ("prepare", "prune", "report")
MAP = "0:100000:65536"


class Controller:
    """Runs jobs with ansible-runner in the three steps of AWX: transmit, worker, process."""

    def __init__(self, folder: pathlib.Path, environ: t.Mapping[str, str]) -> None:
        self.folder, self.environ = folder, environ
        self.number = 0

    def launch(
        self, job: str, answers: t.Mapping[str, t.Any], *options: str, hosts: t.Any = None
    ) -> t.Dict[str, t.Any]:
        """Run a job and return the artifacts it leaves."""
        self.number += 1
        base = self.folder / f"job{self.number}"
        private, remote = base / "private", base / "remote"
        shutil.copytree(ROOT / "awx", private / "project")
        (private / "inventory").mkdir()
        local = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
        inventory = {"all": {"hosts": hosts or {"store1": {}}, "vars": local}}
        (private / "inventory/hosts.json").write_text(json.dumps(inventory))
        (private / "env").mkdir()
        (private / "env/extravars").write_text(json.dumps(answers))
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
        (stats,) = (one for one in events if one["event"] == "playbook_on_stats")
        found: t.Dict[str, t.Any] = stats["event_data"]["artifact_data"]
        return found

    @staticmethod
    def _step(command: t.Sequence[str], given: bytes = b"") -> bytes:
        done = subprocess.run(command, input=given, capture_output=True, check=False)
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


def defaults(job: str) -> t.Dict[str, t.Any]:
    survey = json.loads((ROOT / f"awx/surveys/{job}.json").read_text())
    return {one["variable"]: one["default"] for one in survey["spec"] if "default" in one}


def test_the_three_jobs(controller, store, tmp_path):
    wanted = {
        **defaults("prepare"),
        "prepare_images": "localhost/small:1\n",
        "prepare_mappings": f"{MAP}\n0:200000:65536/0:300000:65536",
    }
    predicted = controller.launch("prepare", wanted, "--check", "--diff")
    assert predicted["userns_storage_layers_created"] == 2
    made = controller.launch("prepare", wanted)
    assert made["userns_storage_hosts_prepared"] == 1
    assert made["userns_storage_layers_created"] == 2
    assert made["userns_storage_bytes_mapped"] > 0
    again = controller.launch("prepare", wanted)
    assert again["userns_storage_layers_created"] == 0
    assert again["userns_storage_layers_existing"] == 2

    page = tmp_path / "page.html"
    report = controller.launch(
        "report",
        {
            **defaults("report"),
            **wanted,
            "report_html": str(page),
            "report_users": "",
            "prune_max_copies_per_image": "1",
            "prune_min_age": "0",
            "prepare_mappings": f"{MAP}\n0:400000:65536",
        },
    )
    totals = report["userns_storage_report"]
    assert totals["hosts"] == 1
    assert totals["mapped_layers"] == 2
    # Both have a lease.
    assert totals["layers_reclaimable"] == 0
    assert totals["layers_missing"] == 1
    assert totals["bytes_on_disk"] > totals["bytes_of_mapped_layers"] > 0
    assert "`localhost/small:1`" in report["userns_storage_report_markdown"]
    assert "0:400000:65536" in page.read_text()

    kept = controller.launch(
        "prune", {**defaults("prune"), "prune_max_copies_per_image": "0", "prune_min_age": "0"}
    )
    assert kept["userns_storage_layers_removed"] == 0
    assert kept["userns_storage_layers_kept"] == 2


def test_prune_removes_and_counts(controller, store):
    # As a survey gives an empty lease.
    wanted = {
        **defaults("prepare"),
        "prepare_images": "localhost/small:1",
        "prepare_mappings": f"{MAP}\n0:200000:65536",
        "prepare_lease": "",
    }
    controller.launch("prepare", wanted)
    policy = {**defaults("prune"), "prune_max_copies_per_image": "1", "prune_min_age": "0"}
    predicted = controller.launch("prune", policy, "--check")
    done = controller.launch("prune", policy)
    again = controller.launch("prune", policy)
    for one in (predicted, done):
        assert one["userns_storage_hosts_pruned"] == 1
        assert one["userns_storage_layers_removed"] == 1
        assert one["userns_storage_layers_kept"] == 1
    # What is measured of a filesystem that others use too may be less.
    assert predicted["userns_storage_inodes_reclaimed"] > 0
    assert again["userns_storage_layers_removed"] == 0


def test_totals_of_several_hosts_add_up(controller, store):
    """Two names of the one host here, which differ in what they ask for."""
    hosts = {"one": {"prepare_mappings": MAP}, "two": {"prepare_mappings": "0:200000:65536"}}
    wanted = {**defaults("prepare"), "prepare_images": "localhost/small:1"}
    del wanted["prepare_mappings"]
    made = controller.launch("prepare", wanted, hosts=hosts)
    assert made["userns_storage_hosts_prepared"] == 2
    assert made["userns_storage_layers_created"] == 2


def test_every_job_is_a_file_that_awx_offers():
    assert set(awx.offered_playbooks(ROOT / "awx")) == {
        *(f"{job}.yml" for job in JOBS),
        "configure.yml",
    }


def test_the_execution_environment_can_be_built_from_its_definition(tmp_path):
    """As far as a machine without a registry gets: ansible-builder accepts it and writes what it builds from."""
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
    assert [one["name"] for one in galaxy["collections"]] == ["userns.storage"]


@pytest.fixture
def stand_in() -> t.Iterator[awx.StandIn]:
    with awx.StandIn(ROOT / "awx") as running:
        yield running


def configure(play: t.Callable[..., t.Any], stand_in: awx.StandIn, *options: str) -> t.Any:
    environ = {"CONTROLLER_HOST": stand_in.url, "CONTROLLER_OAUTH_TOKEN": awx.TOKEN}
    local = {
        "localhost": {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    }
    return play(ROOT / "awx/configure.yml", {"all": {"hosts": local}}, *options, environ=environ)


def test_the_configuration_is_sound(play, stand_in):
    configure(play, stand_in, "--syntax-check")
    assert stand_in.requests == []


def test_the_configuration_makes_all_and_once(play, stand_in):
    """Against a stand-in for a controller's interface, see support/awx.py; it is no controller."""
    first = configure(play, stand_in)
    assert first.recap("localhost")["changed"] == 5
    jobs = {one["playbook"]: one for one in stand_in.objects["job_templates"].values()}
    assert set(jobs) == {f"{job}.yml" for job in JOBS}
    for job in JOBS:
        template = jobs[f"{job}.yml"]
        assert template["survey_enabled"]
        assert template["ask_job_type_on_launch"]
        assert template["become_enabled"]
        survey = json.loads((ROOT / f"awx/surveys/{job}.json").read_text())
        assert stand_in.surveys[template["id"]] == survey
        assert template["project"] == stand_in.named("projects", "userns.storage")["id"]
    nightly = stand_in.named("schedules", "userns.storage nightly prune")
    assert nightly["unified_job_template"] == jobs["prune.yml"]["id"]
    assert "FREQ=DAILY" in nightly["rrule"]

    made = len(stand_in.requests)
    second = configure(play, stand_in)
    assert second.recap("localhost")["changed"] == 0
    assert stand_in.requests[made:] == []


def test_check_mode_writes_nothing_to_the_controller(play, stand_in):
    configure(play, stand_in)
    made = len(stand_in.requests)
    again = configure(play, stand_in, "--check", "--diff")
    assert again.recap("localhost")["changed"] == 0
    assert len(stand_in.requests) == made


def test_the_stand_in_refuses_what_a_controller_refuses(play, stand_in):
    survey = json.loads((ROOT / "awx/surveys/prune.json").read_text())
    survey["spec"][0]["type"] = "txet"
    with pytest.raises(awx.Refused, match="not one of the allowed types"):
        awx.check_survey(survey)
    with pytest.raises(AssertionError, match=r"other/prepare\.yml not found for project"):
        configure(play, stand_in, "-e", "awx_playbook_folder=other/")
