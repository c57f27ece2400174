# Copyright (c) 2026, the userns.storage contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The report of a fleet: its totals, its page in a browser, and its Markdown."""

from __future__ import annotations

import os
import pathlib
import typing as t

import pytest
from ansible_collections.userns.storage.plugins.filter.fleet_report import fleet_report
from ansible_collections.userns.storage.plugins.plugin_utils import _fleet
from support import ansible_core_versions, fleets

if t.TYPE_CHECKING:
    from support.browser import Browser

ROOT = pathlib.Path(__file__).resolve().parents[2]
VIA = "Failed to connect to the host via ssh"
MOMENT = "25 November 2026, 03:00 UTC"
HOSTILE_TEXT = "<script>document.title='x'</script>\"'><img src=x onerror=alert(1)>|*`_[a](b)"

# The lowest contrast of each kind of text with its background, by the formula of WCAG 2.
CONTRAST = """
const parse=c=>{const m=c.match(/[\\d.]+/g).map(Number);return m.length<4?[...m,1]:m};
const light=c=>{const f=v=>{v/=255;return v<=.04045?v/12.92:((v+.055)/1.055)**2.4};
return .2126*f(c[0])+.7152*f(c[1])+.0722*f(c[2])};
const behind=e=>{for(;e;e=e.parentElement){const c=parse(getComputedStyle(e).backgroundColor);if(c[3]>0)return c}
return [255,255,255,1]};
const found={};
const texts="h1,h2,h3,p,td,th,code,.tile b,.tile span,.pill,.num,.name,.legend span,.soft,footer";
for(const e of document.querySelectorAll(texts)){
if(!e.checkVisibility())continue;
const a=light(parse(getComputedStyle(e).color)),b=light(behind(e));
const ratio=(Math.max(a,b)+.05)/(Math.min(a,b)+.05);
const key=e.tagName+"."+e.className;found[key]=Math.min(found[key]??99,ratio)}
return found
"""
# The elements that extend beyond the right edge of the window.
OVERFLOWING = """
const out=e=>e.checkVisibility()&&e.getBoundingClientRect().right>innerWidth+.1;
return [...document.querySelectorAll("body *")].filter(out)
.map(e=>e.tagName+"."+e.getAttribute("class")+" "+e.getBoundingClientRect().right+" "+e.textContent.slice(0,40))
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> t.Dict[int, pathlib.Path]:
    """The pages of fleets of 3 and of 500 hosts."""
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    for count in (3, 500):
        facts = fleets.hostvars(count)
        found[count] = folder / f"{count}.html"
        found[count].write_text(fleet_report(list(facts), facts, "html", moment=MOMENT))
    return found


@pytest.mark.parametrize("width", [1280, 768, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("count", [3, 500])
def test_browser_displays_the_page(
    browser: Browser,
    pages: t.Dict[int, pathlib.Path],
    tmp_path: pathlib.Path,
    count: int,
    dark: bool,
    width: int,
) -> None:
    browser.show(pages[count], width, 900, dark)
    opened = browser.run(
        "const e=document.querySelectorAll('details.host');"
        "for(let i=0;i<Math.min(3,e.length);i++)e[i].open=true;return e.length"
    )
    assert opened > 0
    assert browser.run("return document.querySelectorAll('.host').length") == count
    assert browser.run(OVERFLOWING) == []
    assert browser.run("return document.documentElement.scrollWidth") == width
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    assert browser.console_messages() == []
    found = browser.run(CONTRAST)
    assert len(found) > 10
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark
    picture = tmp_path / "page.png"
    browser.picture(picture)
    assert picture.stat().st_size > 10_000
    # USERNS_STORAGE_PICTURES=FOLDER saves the pictures for inspection.
    keep = os.environ.get("USERNS_STORAGE_PICTURES")
    if keep:
        browser.run("for(const e of document.querySelectorAll('details'))e.open=false")
        browser.picture(
            pathlib.Path(keep) / f"report-{count}-{'dark' if dark else 'light'}-{width}.png"
        )


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core, which finds accessibility problems."""
    folder: pathlib.Path = ansible_core_versions.workshop().npm_package("axe-core", "4.14.1")
    return (folder / "axe.min.js").read_text()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_page_is_accessible(
    browser: Browser, pages: t.Dict[int, pathlib.Path], axe: str, dark: bool, width: int
) -> None:
    browser.show(pages[3], width, 900, dark)
    browser.run("for(const e of document.querySelectorAll('details'))e.open=true")
    found = browser.run(
        axe + ";return axe.run(document).then(r=>({passed:r.passes.length,"
        "violations:r.violations.map(v=>[v.id,...v.nodes.map(n=>n.html)])}))"
    )
    assert found["violations"] == []
    assert found["passed"] > 15


def test_keyboard_opens_host_and_cells_have_labels(
    browser: Browser, pages: t.Dict[int, pathlib.Path]
) -> None:
    browser.show(pages[3], 390, 900)
    assert browser.run(
        "const s=document.querySelector('details.host>summary');s.focus();"
        "const focused=document.activeElement===s;s.click();return focused&&s.parentElement.open"
    )
    # All cells except those in the first column display the name of their column before the value.
    unlabelled = browser.run(
        "return [...document.querySelectorAll('td')].filter(e=>!e.dataset.of||e.dataset.of!=='image'&&"
        "getComputedStyle(e,'::before').content==='none').length"
    )
    assert unlabelled == 0
    names = browser.run(
        "return [...document.querySelectorAll('.row .num .of')].map(e=>e.textContent)"
    )
    assert set(names) == {
        *("images: ", "mapped layers: ", "recorded: ", "would be freed: ", "missing: "),
    }


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (f"{VIA}: ssh: connect to host a port 22: No route to host", "ssh: No route to host (port 22)"),
        (f"{VIA}: Warning: Permanently added 'a' (ED25519) to the list of known hosts.\r\n"
         "bob@a: Permission denied (publickey,password).", "ssh: Permission denied (publickey,password)"),
        (f"{VIA}: ssh: Could not resolve hostname a: Name or service not known",
         "ssh: Could not resolve hostname a: Name or service not known"),
        ("Timeout", "Timeout"),
        ({"a": 1}, "(dict)"),
    ],
)  # fmt: skip
def test_reason_for_unreachable_host_is_short(message: t.Any, shown: str) -> None:
    facts = {"a": {"report_reached": {"unreachable": True, "msg": message}}}
    assert _fleet.fleet(["a"], facts).hosts[0].message == shown


def test_chart_has_a_correct_bar_for_each_host(
    browser: Browser, pages: t.Dict[int, pathlib.Path]
) -> None:
    browser.show(pages[3], 1280, 900)
    facts = fleets.hostvars(3)
    fleet = _fleet.fleet(list(facts), facts)
    shown = browser.run(
        "return [...document.querySelectorAll('#chart .bar')].map(b=>({name:b.querySelector('.name').textContent,"
        "own:+(b.querySelector('.own')?.getAttribute('width')??0),kept:+(b.querySelector('.kept')?.getAttribute('width')??0),"
        "freed:+(b.querySelector('.freed')?.getAttribute('width')??0),mark:b.querySelector('.mark').getAttribute('d')}))"
    )
    hosts = {host.name: host for host in fleet.hosts if host.stores}
    top = max(host.sums.on_disk for host in hosts.values())
    assert [item["name"] for item in shown] == sorted(
        hosts, key=lambda name: -hosts[name].sums.on_disk
    )
    for item in shown:
        sums = hosts[item["name"]].sums
        assert item["own"] + item["kept"] + item["freed"] == pytest.approx(
            1000 * sums.on_disk / top, abs=0.2
        )
        assert item["freed"] == pytest.approx(1000 * sums.freed / top, abs=0.1)
        assert item["mark"] == f"M{1000 * sums.recorded / top:.1f} 0v10"


def test_search_hides_other_hosts(browser: Browser, pages: t.Dict[int, pathlib.Path]) -> None:
    browser.show(pages[500], 1280, 900)
    search = (
        "const f=document.getElementById('search');f.value=arguments[0];f.dispatchEvent(new Event('input'));"
        "return [...document.querySelectorAll('.host')].filter(e=>e.checkVisibility())"
        ".map(e=>e.querySelector('.name').textContent)"
    )
    assert browser.run(search, "NODE123") == ["node123.example.org"]
    assert len(browser.run(search, "no route to host")) == 20
    assert len(browser.run(search, "")) == 500


def test_names_are_escaped(browser: Browser, tmp_path: pathlib.Path) -> None:
    facts = fleets.hostvars(3)
    name = next(name for name, host in facts.items() if "report_found" in host)
    facts[HOSTILE_TEXT] = facts.pop(name)
    store = facts[HOSTILE_TEXT]["report_found"]["results"][0]
    store["report_store"] = HOSTILE_TEXT
    store["images"][0]["names"] = [HOSTILE_TEXT]
    store["images"][0]["problem"] = HOSTILE_TEXT
    for gc in facts[HOSTILE_TEXT]["prune_collected"]["results"]:
        gc["notes"] = [HOSTILE_TEXT]
    page = tmp_path / "page.html"
    page.write_text(
        fleet_report(list(facts), facts, "html", title=HOSTILE_TEXT, moment=HOSTILE_TEXT)
    )
    browser.show(page, 1280, 900)
    assert browser.run("return document.querySelector('h1').textContent") == HOSTILE_TEXT
    assert browser.run("return document.title") == HOSTILE_TEXT
    assert browser.run(
        "return [document.scripts.length,document.images.length,document.links.length]"
    ) == [1, 0, 0]
    assert browser.console_messages() == []
    text = fleet_report(list(facts), facts, "markdown", title=HOSTILE_TEXT)
    rows = [line for line in text.splitlines() if line.startswith("| \\<script")]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 9


@pytest.mark.parametrize("count", [3, 500])
def test_page_is_self_contained(pages: t.Dict[int, pathlib.Path], count: int) -> None:
    page = pages[count].read_text()
    for word in ("src=", "href=", "url(", "@import", "http:", "<link"):
        assert word not in page, word
    assert page.count("<script>") == 1
    assert len(page) < 8_000_000


def test_markdown_has_a_row_for_each_host() -> None:
    facts = fleets.hostvars(500)
    text = fleet_report(list(facts), facts, "markdown", moment=MOMENT)
    for name, host in facts.items():
        (row,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
        if host["report_reached"].get("unreachable"):
            assert "**unreachable** ssh: No route to host (port 22)" in row
    assert len(text) < 200_000


def test_totals_are_the_sums_of_gathered_results() -> None:
    facts = fleets.hostvars(50)
    found = [
        item for host in facts.values() for item in host.get("report_found", {}).get("results", [])
    ]
    complete = [item for item in found if "totals" in item]
    collected = [
        item
        for host in facts.values()
        for item in host.get("prune_collected", {}).get("results", [])
    ]
    created = [
        item for host in facts.values() for item in host.get("prepare_made", {}).get("layers", [])
    ]
    totals = fleet_report(list(facts), facts, "totals")
    assert totals == {
        "hosts": 50,
        "hosts_unreachable": 2,
        "hosts_failed": 4,
        "images": sum(len(item["images"]) for item in complete),
        "mapped_layers": sum(item["totals"]["mapped"]["layers"] for item in complete),
        "bytes_recorded": sum(item["totals"]["recorded"] for item in complete),
        "bytes_on_disk": sum(item["totals"]["exclusive"] for item in complete),
        "bytes_of_mapped_layers": sum(item["totals"]["mapped"]["exclusive"] for item in complete),
        "bytes_reclaimable": sum(item["space_reclaimed"] for item in collected),
        "layers_reclaimable": sum(len(item["removed"]) for item in collected),
        "layers_missing": sum(item["action"] == "created" for item in created),
        "bytes_saved_by_sharing": 0,
    }
    assert totals["bytes_reclaimable"] > 0


def test_states_of_hosts_are_determined() -> None:
    facts: t.Dict[str, t.Any] = {
        "never": {},
        "silent": {"report_reached": {"ping": "pong"}},
        "lost": {
            "report_reached": {"ping": "pong"},
            "report_found": {"results": [{"unreachable": True, "msg": "gone"}]},
        },
        "empty": {
            "report_reached": {"ping": "pong"},
            "report_found": {
                "results": [{"report_store": "root", "msg": "no store", "graphroot": "/g"}]
            },
        },
        "other": {
            "report_reached": {"ping": "pong"},
            "report_found": {
                "results": [
                    {
                        "report_store": "root",
                        "msg": "of btrfs",
                        "graphroot": "/g",
                        "drivers": ["btrfs"],
                    }
                ]
            },
        },
    }
    fleet = _fleet.fleet(list(facts), facts)
    assert {host.name: host.state for host in fleet.hosts} == {
        "never": "silent",
        "silent": "silent",
        "lost": "unreachable",
        "empty": "ok",
        "other": "failed",
    }
    page = fleet_report(list(facts), facts)
    for name in facts:
        assert f">{name}<" in page


def test_empty_fleet_is_reported() -> None:
    assert "0 of 0" in fleet_report([], {})
    assert fleet_report([], {}, "totals")["hosts"] == 0
