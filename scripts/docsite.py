# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Builds the site of guides, plugins and roles, without a network: docsite.py COLLECTION FOLDER.

The start page is FOLDER/build/html/index.html. antsibull-docs writes the pages of plugins and includes the guides, and
Sphinx converts them to HTML. The Markdown files of docs/ are included as well.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

NAME = "userns.storage"
REPOSITORY = "https://github.com/userns/userns.storage"

# Pages of Ansible's own documentation that the guides refer to, instead of an inventory from the network.
ANSIBLE = "https://docs.ansible.com/projects/ansible/devel/"
LABELS = {
    "action_plugins": ("plugins/action.html", "Action plugins"),
    "ansible_configuration_settings": (
        "reference_appendices/config.html",
        "Ansible Configuration Settings",
    ),
    "common_return_values": ("reference_appendices/common_return_values.html", "Return Values"),
    "ansible_collections.ansible.builtin.find_module": (
        "collections/ansible/builtin/find_module.html",
        "ansible.builtin.find",
    ),
    "ansible_collections.ansible.builtin.set_stats_module": (
        "collections/ansible/builtin/set_stats_module.html",
        "ansible.builtin.set_stats",
    ),
}

CONF = f"""
extensions += ['myst_parser']
intersphinx_mapping = {{'ansible': ('{ANSIBLE}', '../ansible.inv')}}
html_baseurl = ''
highlight_language = 'text'
pygments_style = 'default'
pygments_dark_style = 'monokai'
html_title = 'userns.storage'
html_copy_source = html_show_sourcelink = False
html_show_copyright = False
myst_heading_anchors = 3
html_static_path = ['static']
html_css_files = ['site.css']
"""
CSS = """
article h1 { font-size: 2em; }
article .toctree-wrapper .caption { display: none; }
article .table-wrapper td code.literal { overflow-wrap: anywhere; }
"""

INTRODUCTION = """
New readers start with :ref:`First steps <ansible_collections.userns.storage.docsite.first_steps>`, which explains the
problem that the collection solves, and checks whether a host has it. The other guides are independent of each other.
The :ref:`glossary <ansible_collections.userns.storage.docsite.glossary>` defines the terms.
"""
# Sections of the start page that list the Markdown files, each with the text that it is inserted before.
PAGES = {
    "Further guides": ("Background\n-", ("fleet", "ready", "mapping")),
    "Design and development": (
        ".. _plugin_index_for_",
        ("architecture", "durability", "threat-model", "interop-matrix", "releasing"),
    ),
}
SECTION = """\
{title}
{line}

.. toctree::
    :caption: {title}
    :maxdepth: 1

{entries}

"""


def main(collection: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    # antsibull-docs refuses folders that other users can write to.
    folder.mkdir(parents=True, mode=0o755)
    common_options = ["--use-current", "--squash-hierarchy", "--fail-on-error"]
    titles = ["--project", NAME, "--title", NAME, "--sphinx-theme", "furo"]
    run(folder, "antsibull-docs", "sphinx-init", *common_options, *titles, "--dest-dir", ".", NAME)
    with (folder / "conf.py").open("a") as conf:
        conf.write(CONF)
    (folder / "static").mkdir()
    (folder / "static/site.css").write_text(CSS)
    (folder / "ansible.inv").write_bytes(inventory())
    rst = folder / "rst"
    options = ["--config-file", "antsibull-docs.cfg"]
    pages = ["collection", "--cleanup", "everything", *common_options, "--dest-dir", "rst", NAME]
    run(folder, "antsibull-docs", *options, *pages)
    for page in rst.rglob("*.rst"):
        page.write_text(without_contents(page.read_text()))
    index = rst / "index.rst"
    index.write_text(with_short_names(index.read_text()))
    bring_markdown(collection / "docs", rst)
    run(
        folder,
        "sphinx-build",
        "-q",
        "-W",
        "--keep-going",
        "-n",
        "-c",
        ".",
        "-b",
        "html",
        "rst",
        "build/html",
    )


def run(folder: Path, *command: str) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")


def inventory() -> bytes:
    """The locations of these labels in Ansible's documentation, in Sphinx's format, version 2."""
    head = "# Sphinx inventory version 2\n# Project: Ansible\n# Version: devel\n"
    head += "# The remainder of this file is compressed using zlib.\n"
    lines = [f"{label} std:label -1 {page} {title}\n" for label, (page, title) in LABELS.items()]
    return head.encode() + zlib.compress("".join(lines).encode())


def without_contents(text: str) -> str:
    """Mark tables of contents for the theme, which has its own in a sidebar and otherwise prints a warning."""
    blocks = re.compile(r"^\.\. contents::\n((?: +:[^\n]*\n)+)", flags=re.MULTILINE)
    return blocks.sub(lambda match: match[0] if ":class:" in match[1] else "", text)


def with_short_names(index: str) -> str:
    """Group the navigation of all pages, and show modules, filters, lookups and roles by their short names."""
    for kind in ("module", "filter", "lookup", "role"):
        pattern = rf"(\.\. toctree::\n)((?: +:[^\n]*\n)+\n(?: +\w+_{kind}\n)+)"
        match = re.search(pattern, index)
        if match:
            entries = re.sub(rf"(\w+)_{kind}\n", rf"\1 <\1_{kind}>\n", match[2])
            caption = f"    :caption: {kind.capitalize()}s\n"
            index = index.replace(match[0], f"{match[1]}{caption}{entries}")
    for title, text in (("Guides", INTRODUCTION), ("Background", "")):
        heading, tree = f"\n{title}\n{'-' * len(title)}\n", "\n.. toctree::\n"
        before, heading, after = index.partition(heading)
        index = before + heading + text + after.replace(tree, f"{tree}    :caption: {title}\n", 1)
    return index.replace("\nUserns.Storage\n", f"\n{NAME}\n")


def bring_markdown(docs: Path, rst: Path) -> None:
    """Copy the Markdown files and their images to the directory of the guides, and replace links to the repository."""
    names = sorted(path.name for path in docs.glob("*.md"))
    guides = rst / "docsite"
    for path in [*docs.glob("*.md"), *docs.glob("*.svg")]:
        shutil.copy(path, guides)
    if (docs / "images").is_dir():
        shutil.copytree(docs / "images", guides / "images")
    for page in guides.glob("*.md"):
        page.write_text(page.read_text().replace("](docsite/rst/", "]("))
    for page in guides.glob("*.rst"):
        text = page.read_text()
        for name in names:
            target = name.replace(".md", ".html")
            text = text.replace(f"<{REPOSITORY}/blob/main/docs/{name}>", f"<{target}>")
        for picture in docs.glob("*.svg"):
            text = re.sub(rf"https://raw\S+/docs/{re.escape(picture.name)}", picture.name, text)
        page.write_text(text)
    index = (rst / "index.rst").read_text()
    listed = sorted(f"{name}.md" for _following, pages in PAGES.values() for name in pages)
    if listed != names:
        raise SystemExit(f"PAGES lists {listed}, but docs contains {names}.")
    for title, (following, pages) in PAGES.items():
        if following not in index:
            raise SystemExit(f"The start page has no {following!r}, before {title}.")
        entries = "\n".join(f"    docsite/{name}" for name in pages)
        section = SECTION.format(title=title, line="-" * len(title), entries=entries)
        index = index.replace(following, section + following, 1)
    (rst / "index.rst").write_text(index)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
