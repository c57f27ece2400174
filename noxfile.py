# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# /// script
# dependencies = ["nox>=2025.2.9", "antsibull-nox>=1.10"]
# ///
"""The test sessions.

``scripts/test NAME`` installs the requirements of a session and runs it. ``nox -s NAME`` runs a session whose
requirements are installed.

Sessions do not use virtual environments of nox. They share the environment in which nox runs
(tests/requirements/tools.txt). Sessions that need another version of ansible-core or Python use an environment from
the cache of scripts/workshop.py.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import antsibull_nox
import nox
import nox.command

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))
import tarball
import workshop

ROOT = workshop.ROOT
OWN = f"{sys.version_info[0]}.{sys.version_info[1]}"

# The session `generations` tests the programs of the machine itself, then those of these Debian releases.
GENERATIONS = ("", "trixie", "sid", "experimental")
# Interop tests that use hosts of all releases in every run.
OF_ALL_RELEASES = ("lab", "matrix", "generations")

# The Python versions that each version of ansible-core supports, from the oldest supported ansible-core.
LINES = {
    "2.16": ("3.10", "3.11", "3.12"),
    "2.18": ("3.11", "3.12", "3.13"),
    "2.20": ("3.12", "3.13", "3.14"),
}

SEED = '''\
"""Replaces the script that ansible-test would download to install pip in a new environment."""
import os, subprocess, sys

os.environ.pop("GET_PIP", None)
# In a separate process, because ensurepip disables the configuration of pip.
subprocess.check_call([sys.executable, "-m", "ensurepip", "--default-pip"])
arguments = [argument for argument in sys.argv[1:] if argument not in ("--no-setuptools", "--no-wheel")]
sys.exit(subprocess.call([sys.executable, "-m", "pip", "install"] + arguments))
'''

# Prints the major and minor version of ansible-core in an environment, and the versions of pip that its ansible-test
# installs for these versions of Python.
VERSIONS = """\
import importlib.metadata, sys, types
from ansible_test._internal.python_requirements import get_venv_packages

print(".".join(importlib.metadata.version("ansible-core").split(".")[:2]))
for pip in {get_venv_packages(types.SimpleNamespace(version=version))["pip"] for version in sys.argv[1:]}:
    print(pip)
"""

nox.options.default_venv_backend = "none"
antsibull_nox.load_antsibull_nox_toml()


def run(session: nox.Session, *command: str | Path, **environment: str) -> None:
    session.run(*map(str, command), external=True, env=environment)


def run_each(session: nox.Session, *commands: tuple[str, ...]) -> None:
    """Run all commands, even after one has failed; the session fails at the end."""
    failed = []
    for command in commands:
        try:
            run(session, *command)
        except nox.command.CommandFailed:
            failed.append(command[0])
    report(session, len(commands) - len(failed), len(failed))
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def report(session: nox.Session, passed: int, failed: int) -> None:
    """Write the counts to the file that scripts/sessions.py reads."""
    folder = workshop.WORK / "results"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"passed": passed, "failed": failed})
    (folder / f"{session.name}.json").write_text(text)


def report_junit(session: nox.Session, folder: Path) -> None:
    passed = failed = 0
    for file in folder.glob("*.xml"):
        for case in ElementTree.parse(file).iter("testcase"):
            skipped = case.find("skipped") is not None
            # Sanity tests are skipped if there are no files to check, for example PowerShell, and integration tests
            # skip the tasks that were not requested. In other sessions, a skipped test counts as failed.
            bad = any(case.find(kind) is not None for kind in ("failure", "error"))
            bad = bad or (skipped and not session.name.startswith(("sanity", "integration")))
            passed, failed = passed + (not bad and not skipped), failed + bad
    report(session, passed, failed)
    if failed:
        session.log(f"{failed} failed, or could not run")


def home(tools: Path) -> Path:
    """Create a home directory for ansible-test, with a cache that contains the scripts that it would download.

    :param tools: the virtual environment of ansible-test
    """
    versions = workshop.call([tools / "bin/python", "-c", VERSIONS, *workshop.pythons()])
    line, *pips = versions.split()
    folder = workshop.CACHE / "home" / line
    cache = folder / ".ansible/test/cache"
    cache.mkdir(parents=True, exist_ok=True)
    for version in pips:
        (cache / f"get_pip_{version.replace('.', '_')}.py").write_text(SEED)
    settings = folder / ".config/pip/pip.conf"
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text(pip_settings())
    return folder


def pip_settings() -> str:
    """The configuration of pip, from files and environment variables. ansible-test itself ignores both."""
    settings = {}
    for line in workshop.call([sys.executable, "-m", "pip", "config", "list"]).splitlines():
        name, _equals, value = line.partition("=")
        section, _dot, key = name.rpartition(".")
        if section in {"global", "install", ":env:"} and key != "config-file":
            settings[key] = str(ast.literal_eval(value)).replace("\n", "\n    ")
    return "[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())


def ansible_test(
    session: nox.Session,
    kind: str,
    *options: str,
    tools: Path = Path(sys.prefix),
    where: tuple[str, ...] = ("--local",),
) -> None:
    """Run ansible-test without containers, in a copy of the collection."""
    own_home = home(tools)
    with workshop.collection_tree(session.name) as tree:
        output = tree / "tests/output"
        shutil.rmtree(output, ignore_errors=True)
        environment = {"HOME": str(own_home), "PATH": workshop.clean_path(tools / "bin")}
        if kind == "integration":
            # Without this option, ansible-test skips the tests that change the machine, and only prints a warning.
            options = ("--allow-destructive", *options)
        try:
            with session.chdir(tree):
                command = (tools / "bin/python", tools / "bin/ansible-test", kind)
                run(session, *command, *where, *options, **environment)
        finally:
            report_junit(session, output / "junit")


def oldest(name: str = "oldest") -> Path:
    """An environment with the oldest supported ansible-core that an available Python can run, 2.16 if possible."""
    at_hand = workshop.pythons()
    for line, versions in LINES.items():
        for version in (OWN, *versions):
            if version in versions and version in at_hand:
                return workshop.environment(
                    name, f"ansible-core~={line}.0", python=at_hand[version]
                )
    raise workshop.SetupError(f"none of the Pythons {', '.join(at_hand)} runs an ansible-core")


def version_of(tools: Path) -> str:
    return next(tools.glob("lib/python3.*")).name.removeprefix("python")


# Static checks


@nox.session
def style(session: nox.Session) -> None:
    """Run ruff, shellcheck, codespell, proselint and the linter of the changelog, and simulate a release."""
    run_each(
        session,
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        (
            "shellcheck",
            *(f"scripts/{name}" for name in ("build", "test", "demo", "bench")),
            ".ci/run",
        ),
        ("antsibull-changelog", "lint"),
        ("codespell", *(str(file) for file in prose())),
    )
    tools = workshop.environment("prose")
    texts = [str(file) for file in prose() if is_guide(file) or file.suffix == ".py"]
    run(session, tools / "bin/python", ROOT / "scripts/prose.py", *texts)
    with workshop.collection_tree(session.name) as tree, session.chdir(tree):
        run(session, "antsibull-changelog", "release", "--version", "1.0.0")
        run(session, "antsibull-changelog", "lint-changelog-yaml", "changelogs/changelog.yaml")


def prose() -> list[Path]:
    """The files that codespell checks: all files of the repository except images and JSON data."""
    return sorted(
        file for file in workshop.tracked() if file.suffix not in {".svg", ".png", ".json", ".gif"}
    )


def is_guide(file: Path) -> bool:
    """Whether a file is a guide, a README or a changelog fragment, and not a generated table."""
    fragment = file.parent.name == "fragments" and file.suffix == ".yml"
    return fragment or (file.suffix in {".md", ".rst"} and file.name != "interop-matrix.md")


@nox.session
def types(session: nox.Session) -> None:
    """Run mypy in strict mode on the plugins, the scripts and the tests."""
    cache = f"--cache-dir={ROOT / '.mypy_cache'}"
    scripts = ("docsite", "sessions", "tarball", "workshop")
    own = ("noxfile.py", *(f"scripts/{name}.py" for name in scripts))
    run(session, "mypy", cache, *own, MYPYPATH=str(ROOT / "scripts"))
    python = workshop.environment("prose") / "bin/python"
    run(session, "mypy", cache, "--python-executable", python, "scripts/prose.py")
    with workshop.collection_tree(session.name) as tree:
        base = tree.parents[2]
        with session.chdir(base):
            config = f"--config-file={tree / 'pyproject.toml'}"
            run(session, "mypy", cache, config, (tree / "plugins").relative_to(base))
            tests = (tree / "tests").relative_to(base)
            run(session, "mypy", cache, config, tests, MYPYPATH=str(tree / "tests"))


@nox.session
def sanity(session: nox.Session) -> None:
    """Run ansible-test sanity with the newest ansible-core for this Python, on all available versions of Python."""
    ansible_test(session, "sanity", "--junit", *session.posargs)


@nox.session(name="sanity-oldest")
def sanity_oldest(session: nox.Session) -> None:
    """Run ansible-test sanity with the oldest supported ansible-core, on all files except the tests."""
    tools = oldest()
    ansible_test(session, "sanity", "--junit", "--exclude", "tests/", *session.posargs, tools=tools)


@nox.session(name="docs-check")
def docs_check(session: nox.Session) -> None:
    """Run antsibull-docs on the documentation of plugins and roles and on the guides."""
    with workshop.collection_tree(session.name) as tree, session.chdir(tree):
        refs = ("--validate-collection-refs", "all", "--check-extra-docs-refs")
        command = ("antsibull-docs", "lint-collection-docs", "--plugin-docs", *refs, ".")
        run(session, *command, ANSIBLE_COLLECTIONS_PATH=str(tree.parents[2]))


@nox.session(name="docs-site")
def docs_site(session: nox.Session) -> None:
    """Build the site of guides, plugins and roles: .nox/docs-site/build/html/index.html."""
    tools = workshop.environment("docs")
    with workshop.collection_tree(session.name) as tree:
        script, folder = tree / "scripts/docsite.py", workshop.WORK / "docs-site"
        environment = {
            "ANSIBLE_COLLECTIONS_PATH": str(tree.parents[2]),
            "PATH": workshop.clean_path(tools / "bin"),
        }
        run(session, tools / "bin/python", script, tree, folder, **environment)


@nox.session(name="ansible-lint")
def ansible_lint(session: nox.Session) -> None:
    """Run ansible-lint, production profile, on roles, playbooks and tests."""
    with workshop.collection_tree(session.name) as tree, session.chdir(tree):
        command = ("ansible-lint", "--profile", "production", "--offline", "--strict")
        path = os.pathsep.join(map(str, (tree.parents[2], workshop.bundled("awx.awx"))))
        run(session, *command, ANSIBLE_COLLECTIONS_PATH=path)


@nox.session
def galaxy(session: nox.Session) -> None:
    """Build the collection and run Galaxy's importer, with its certification checks, on it.

    flake8 is disabled, as on Galaxy, because it rejects the line breaks of formatters. The session `style` runs ruff.
    """
    tools = workshop.environment("galaxy")
    with workshop.collection_tree(session.name) as tree:
        out = tree.parents[2]
        for old in out.glob("*.tar.gz"):
            old.unlink()
        tarball.build(tree, out, Path(sys.prefix) / "bin/ansible-galaxy", 0)
        config = out / "importer.cfg"
        config.write_text(
            "[galaxy-importer]\n"
            "ANSIBLE_LOCAL_TMP = ~/.ansible/tmp\n"
            "CHECK_REQUIRED_TAGS = True\n"
            "LOG_LEVEL_MAIN = INFO\n"
            "RUN_ANSIBLE_DOC = True\n"
            "RUN_ANSIBLE_LINT = True\n"
            "RUN_ANSIBLE_TEST = False\n"
        )
        done = subprocess.run(
            [tools / "bin/python", "-m", "galaxy_importer.main", *out.glob("*.tar.gz")],
            cwd=out,
            env={
                **os.environ,
                "GALAXY_IMPORTER_CONFIG": str(config),
                "HOME": str(home(Path(sys.prefix))),
                "PATH": workshop.clean_path(tools / "bin"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    print(done.stdout)
    messages = [
        line
        for line in done.stdout.splitlines()
        if line.startswith(("WARNING:", "ERROR:")) or "skipping" in line.lower()
    ]
    if done.returncode != 0 or messages:
        session.error("the importer complains:\n" + "\n".join(messages))


# Tests that run code


@nox.session
def units(session: nox.Session) -> None:
    """Run the unit tests with the newest ansible-core for this Python.

    Without arguments, it also measures the branch coverage of the plugins; pyproject.toml contains the minimum.
    """
    measured = () if session.posargs else ("--cov", "--cov-report=term:skip-covered")
    pytest(session, "tests/unit", "-n", "2", *measured)


@nox.session(name="units-python39")
def units_python39(session: nox.Session) -> None:
    """Run the unit tests of module_utils on Python 3.9, the oldest supported version, if it is available."""
    python = workshop.pythons().get("3.9")
    if python is None:
        session.log("no Python 3.9 is at hand")
        return
    tools = workshop.environment("units", requirements="../unit/requirements", python=python)
    # No supported ansible-core runs on Python 3.9, but its module_utils do.
    link = workshop.WORK / "python39/ansible"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(next(Path(sys.prefix).glob("lib/python3.*/site-packages/ansible")))
    folder = "tests/unit/plugins/module_utils/_storage"
    pytest(session, folder, "-n", "2", tools=tools, path=(link.parent,))


@nox.session
def integration(session: nox.Session) -> None:
    """Run the integration tests with the newest ansible-core for this Python; modules run on the newest Python."""
    integrate(session, Path(sys.prefix), -1)


@nox.session(name="integration-oldest")
def integration_oldest(session: nox.Session) -> None:
    """Run the integration tests with the oldest supported ansible-core; modules run on the oldest Python."""
    integrate(session, oldest(), 0)


def integrate(session: nox.Session, tools: Path, index: int) -> None:
    """Run the integration tests with the ansible-core of an environment.

    :param tools: the environment
    :param index: the index of the Python for modules in the list of available versions that this ansible-core supports,
        from the oldest
    """
    ask = (
        "from ansible_test._util.target.common import constants as known;"
        "print(*known.CONTROLLER_PYTHON_VERSIONS, *known.REMOTE_ONLY_PYTHON_VERSIONS)"
    )
    known = set(workshop.call([tools / "bin/python", "-c", ask]).split())
    at_hand = sorted(workshop.pythons(), key=lambda version: int(version.partition(".")[2]))
    python = [version for version in at_hand if version in known][index]
    controller = ("--controller", f"origin:python={version_of(tools)}")
    where = (*controller, "--target", f"controller:python={python}")
    ansible_test(session, "integration", *session.posargs, tools=tools, where=where)


@nox.session
def interop(session: nox.Session) -> None:
    """Run the tests with real programs: podman, buildah, skopeo, containers-storage."""
    pytest(session, "tests/interop", "-n", "2")


@nox.session(default=False)
def generations(session: nox.Session) -> None:
    """Run the interop tests with the programs of the machine, then with those of trixie, sid and experimental."""
    failed = [
        release or "the machine's own" for release in GENERATIONS if not passes(session, release)
    ]
    if failed:
        session.error(f"failed with the programs of: {', '.join(failed)}")


def passes(session: nox.Session, release: str) -> bool:
    """Whether the interop tests pass with the programs of a Debian release, or of the machine itself if it is empty."""
    session.log(f"programs: {release or 'of the machine itself'}")
    names = OF_ALL_RELEASES if release else ()
    left_out = [f"--ignore=tests/interop/test_{name}.py" for name in names]
    try:
        pytest(session, "tests/interop", "-n", "2", *left_out, release=release)
    except nox.command.CommandFailed:
        return False
    return True


@nox.session
def faults(session: nox.Session) -> None:
    """Run the tests with killed processes, races, full disks and hostile input."""
    pytest(session, "tests/faults")


@nox.session
def molecule(session: nox.Session) -> None:
    """Run all molecule scenarios, or the named ones, on hosts of four Debian releases."""
    tools = workshop.environment("molecule")
    output = workshop.WORK / "junit" / session.name
    shutil.rmtree(output, ignore_errors=True)
    with workshop.collection_tree(session.name) as tree:
        try:
            with session.chdir(tree):
                path = workshop.clean_path(tools / "bin")
                environment = {"MOLECULE_RESULTS": str(output), "PATH": path}
                driver = "tests/molecule/run.py"
                run(session, tools / "bin/python", driver, *session.posargs, **environment)
        finally:
            report_junit(session, output)


@nox.session(default=False)
def demo(session: nox.Session) -> None:
    """Demonstrate first starts without and with this collection, a pull during copies, and the removal of layers."""
    show(session, "tests/demo/first_start.py", str(workshop.WORK / "demo/report.html"))


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure the values of the README's figures, and write docs/benchmarks.json and docs/benchmarks.svg."""
    show(session, "tests/benchmarks/run.py", "--docs", str(ROOT / "docs"))


def show(session: nox.Session, *script: str) -> None:
    with workshop.collection_tree(session.name) as tree, session.chdir(tree):
        found = str(tree.parents[2])
        command = (sys.executable, *script, *session.posargs)
        run(session, *command, ANSIBLE_COLLECTIONS_PATH=found, PYTHONPATH=found)


@nox.session
def fleet(session: nox.Session) -> None:
    """Run roles and playbooks as AWX does, and test the configuration of AWX and the report in a browser."""
    collections = workshop.bundled("awx.awx", "ansible.posix")
    os.environ["USERNS_STORAGE_COLLECTIONS"] = str(collections)
    pytest(session, "tests/fleet", tools=workshop.environment("fleet"))


@nox.session
def guides(session: nox.Session) -> None:
    """Follow the guides on hosts on which nothing is installed."""
    pytest(session, "tests/guides", tools=workshop.environment("fleet"))


def pytest(
    session: nox.Session,
    folder: str,
    *options: str,
    tools: Path = Path(sys.prefix),
    path: tuple[Path, ...] = (),
    release: str = "",
) -> None:
    """Run pytest in a copy of the collection that Python and Ansible can import.

    :param folder: the tests to run if the arguments of the session name none
    :param tools: the environment of pytest
    :param path: additional directories for PYTHONPATH
    :param release: the Debian release whose programs are tested, or empty for the programs of the machine itself
    """
    output = workshop.WORK / "junit" / session.name
    if not release:
        shutil.rmtree(output, ignore_errors=True)
    named = any((ROOT / word.partition("::")[0]).exists() for word in session.posargs)
    with workshop.collection_tree(session.name) as tree:
        try:
            with session.chdir(tree):
                session.run(
                    str(tools / "bin/python"),
                    *("-m", "pytest", "-p", "no:cacheprovider", "--timeout=3600"),
                    *(() if named else (folder,)),
                    *options,
                    *session.posargs,
                    f"--junitxml={output / (release or 'tests')}.xml",
                    external=True,
                    env={
                        "ANSIBLE_COLLECTIONS_PATH": str(tree.parents[2]),
                        "PATH": workshop.clean_path(tools / "bin"),
                        "PYTHONPATH": os.pathsep.join(map(str, (tree.parents[2], *path))),
                        **({"USERNS_STORAGE_RELEASE": release} if release else {}),
                    },
                )
        finally:
            report_junit(session, output)
