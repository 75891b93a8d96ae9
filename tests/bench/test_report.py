"""The report: what it says, that nothing from outside gets into it as markup, and that a browser shows all of it."""

import copy
import json
import re
import shutil
import subprocess

import pytest

from fakes import Scripted, row
from outpace.bench import BenchConfig, bench
from outpace.bench.methods import PLAIN
from outpace.bench.report import (
    compare,
    comparison_markdown,
    load_result,
    render_html,
    render_markdown,
    words,
    write_report,
)
from outpace.bench.report.figures import figures, styles
from outpace.bench.report.files import paths_for
from outpace.errors import ConfigError, MissingExtraError, ResultError

HOSTILE = "</script><script>console.error('taken over')</script><img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# what a page complains about, and what sticks out of it, is written where --dump-dom shows it
PROBE = """<script>(() => {
const root = document.documentElement, said = [];
const note = (text) => { said.push(String(text)); root.dataset.complaints = said.join(" | "); };
for (const name of ["error", "warn"]) {
  const before = console[name];
  console[name] = (...all) => { note(all.join(" ")); before(...all); };
}
addEventListener("error", (event) => note(event.message));
addEventListener("unhandledrejection", (event) => note(event.reason));
addEventListener("load", () => setTimeout(() => {
  root.dataset.overflow = root.scrollWidth - root.clientWidth;
  root.dataset.width = root.clientWidth;
}, 1500));
})();</script>"""
# a window cannot be as narrow as a phone, a frame can
FRAME = """<body style="margin:0">
<iframe id="f" src="page.html{fragment}" style="width:{width}px;height:9000px;border:0"></iframe>
<script>const timer = setInterval(() => {{
  const inner = document.getElementById("f").contentDocument.documentElement, own = document.documentElement;
  if (!inner.dataset.width) return;
  clearInterval(timer);
  Object.assign(own.dataset, inner.dataset);
  own.innerHTML = inner.innerHTML;
}}, 200)</script>"""


@pytest.fixture(scope="module")
def result(spoken, tmp_path_factory):
    """A real run on the tiny model: two cells, two drafters, stock decoding, replays."""
    from outpace.bench.suites import load_suite

    path = tmp_path_factory.mktemp("suite") / "own.jsonl"
    lines = [
        {"task": task, "prompt": f"{task} {i}"} for task in ("chat", "code", "maths") for i in ("abc", "xyz", "ab")
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    config = BenchConfig(
        drafters=("prompt_lookup:min_ngram=1", "suffix"), stock=("transformers",), temperatures=(0.0, 0.9),
        modes=("fixed",), max_new_tokens=16, repetitions=1, replays=2, bootstrap=200, warm_up_runs=0, ceilings=True,
    )  # fmt: skip
    return bench(spoken, config, load_suite(str(path)))


@pytest.fixture
def hostile(result):
    """The same with markup in everything that comes from outside."""
    found = copy.deepcopy(result)
    found["target"]["name"] = HOSTILE
    found["suite"]["note"] = HOSTILE
    found["replays"][0]["prompt"] = HOSTILE
    found["replays"][0]["answers"][0]["rounds"][0]["own"] = HOSTILE
    broken = row(found, "suffix")
    broken["headline"], broken["refusal"] = None, f"3 of 9 trials failed: {HOSTILE}"
    broken["parity"]["differs"] = 1
    return found


def test_markdown_holds_every_method_and_condition(result):
    text = render_markdown(result)
    for name in ("plain", "prompt_lookup:min_ngram=1", "suffix", "transformers", "ceiling: always right"):
        assert text.count(f"| {name} |") == 4  # two tables in two cells
    assert "Batch 1, temperature 0.9, fixed length" in text
    assert "Floor of a pass" in text
    assert "Keeping the books costs" in text
    assert "baseline" in text


def test_a_refusal_takes_the_place_of_the_figure(result):
    found = copy.deepcopy(result)
    one = row(found, "suffix")
    one["headline"], one["refusal"] = None, "2 of 9 answers differ from plain decoding beyond near ties"
    line = next(line for line in render_markdown(found).splitlines() if line.startswith("| suffix | - |"))
    assert "no figure: 2 of 9 answers differ" in line


def test_words():
    assert words.ratio({"ratio": 1.5, "low": 1.2, "high": 1.9}) == "1.50x (1.20 to 1.90)"
    assert words.ratio({"ratio": 1.5, "low": None, "high": None}) == "1.50x"
    assert words.ratio(None) == "-"
    assert [words.milliseconds(v) for v in (1.234, 12.34, 123.4, None)] == ["1.23 ms", "12.3 ms", "123 ms", "-"]
    none = {
        "equal": 0,
        "near tie": 0,
        "differs": 0,
        "not audited": 0,
        "not comparable": 4,
        "same text": 0,
        "other text": 0,
    }
    assert words.parity(none) == "not comparable"
    assert words.parity({**none, "equal": 4}) == "all 4 equal"
    assert words.parity({**none, "equal": 3, "near tie": 1, "differs": 2}) == "3/6 equal, 1 near tie, 2 DIFFER"
    assert words.parity({**none, "same text": 3, "other text": 1}) == "3/4 same text"


def test_the_page_is_one_file_that_asks_nobody_for_anything(hostile):
    page = render_html(hostile)
    own = page.replace(_plotly(), "")
    assert "taken over')</script>" not in own.replace("\\u003c", "")
    assert HOSTILE not in own
    assert own.count("<script") == 3
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", own)
    assert not re.search(r"@import|url\(\s*[\"']?http", own)
    assert '<meta name="viewport"' in own
    assert 'lang="en"' in own


def _plotly():
    from plotly.offline import get_plotlyjs

    return get_plotlyjs().replace("</script", "<\\/script")


def test_figures_hold_the_numbers(result):
    cell = result["cells"][0]
    style = styles(result["methods"])
    drawn = figures(cell, PLAIN, 0.001, style)
    assert set(drawn) == {"tasks", "depth", "split", "cost"}
    ratios = {t["name"]: t["x"] for t in drawn["tasks"]["data"]}
    suffix = [task["speedup"]["ratio"] for task in row(result, "suffix")["tasks"]]
    assert ratios["suffix"] == suffix
    assert len({(s.colour, s.symbol) for s in style.values()}) == len(style)
    depth = next(t for t in drawn["depth"]["data"] if t["name"] == "suffix")
    assert depth["y"] == row(result, "suffix")["accept_given_reached"][: len(depth["y"])]
    bars = {t["name"] for t in drawn["split"]["data"]}
    assert {"draft", "pass", "walk", "other", "not split"} <= bars


def test_a_report_is_written_whole_or_not_at_all(result, tmp_path, monkeypatch):
    out = tmp_path / "r.html"
    files = write_report(result, out)
    assert [file.name for file in files] == ["r.html", "r.md", "r.json"]
    assert load_result(tmp_path / "r.json") == json.loads(json.dumps(result))
    before = (tmp_path / "r.json").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(ResultError, match="No space left"):
        write_report(result, out)
    assert (tmp_path / "r.json").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.html", "r.json", "r.md"]


def test_the_suffix_of_out_decides_what_is_written(tmp_path):
    assert [p.name for p in paths_for("a/r.html").values()] == ["r.jsonl", "r.html", "r.md", "r.json"]
    assert [p.name for p in paths_for("a/r.json").values()] == ["r.jsonl", "r.json"]
    with pytest.raises(ConfigError, match=r"must end in \.html, \.md, \.json"):
        paths_for("r.pdf")


def test_what_is_no_result_is_refused(tmp_path):
    path = tmp_path / "r.json"
    with pytest.raises(ResultError, match="cannot read"):
        load_result(path)
    path.write_text("[]")
    with pytest.raises(ResultError, match="not a result"):
        load_result(path)
    path.write_text('{"kind": "outpace-bench", "format": 99}')
    with pytest.raises(ResultError, match="format 99"):
        load_result(path)


def test_without_plotly_the_install_line_is_told(result, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'outpace\[bench\]'"):
        render_html(result)


class TestCompare:
    def test_a_change_is_measured_prompt_by_prompt(self, play, suite, clock):
        config = BenchConfig(drafters=(), stock=(), max_new_tokens=10, repetitions=1, warm_up_runs=0, bootstrap=200)
        methods = [Scripted(PLAIN, clock), Scripted("fast", clock, ms=lambda r: 5.0)]
        first = play(methods, config, suite, clock)
        methods[1] = Scripted("fast", clock, ms=lambda r: 4.0)
        second = play(methods, config, suite, clock)
        found = compare(first, second)
        change = found["cells"][0]["methods"][1]
        assert change["speed"]["ratio"] == pytest.approx(1.25)
        assert change["speed"]["claim"] == "faster"
        assert found["differences"] == []
        assert "| fast | 2.00x" in comparison_markdown(found)

    def test_what_makes_two_results_incomparable_is_said(self, result):
        other = copy.deepcopy(result)
        other["machine"]["torch"] = "9.9"
        other["suite"]["sha256"] = "x"
        found = compare(result, other)
        assert any(line.startswith("machine.torch") for line in found["differences"])
        assert any("other questions" in line for line in found["differences"])
        other["cells"] = [{**other["cells"][0], "batch": 64}]
        with pytest.raises(ResultError, match="nothing in common"):
            compare(result, other)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian: apt-get install chromium)")
class TestPage:
    """In headless Chromium: everything is drawn, in both themes and on a phone, and the console stays silent."""

    @pytest.fixture(scope="class")
    def look(self, tmp_path_factory):
        """Render a page and return what the document looks like after its scripts have run."""
        folder = tmp_path_factory.mktemp("pages")

        def dump(page, *, fragment="", width=1200):
            path = folder / "page.html"
            path.write_text(page.replace("<head>", f"<head>{PROBE}", 1), encoding="utf-8")
            source = path
            if width < 500:  # a window cannot be so narrow, a frame can
                source = folder / "frame.html"
                source.write_text(FRAME.format(fragment=fragment, width=width))
            done = subprocess.run(
                [
                    CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
                    "--enable-logging=stderr", "--hide-scrollbars", f"--window-size={max(width, 500)},1400",
                    "--virtual-time-budget=12000", f"--user-data-dir={folder / 'profile'}", "--dump-dom",
                    f"{source.as_uri()}{fragment if source is path else ''}",
                ],
                capture_output=True, text=True, timeout=180, check=True,
            )  # fmt: skip
            console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
            return done.stdout, console

        return dump

    @pytest.mark.parametrize("theme", ["light", "dark"])
    def test_everything_is_there_and_the_console_is_silent(self, look, result, theme):
        document, console = look(render_html(result), fragment=f"#theme={theme}")
        assert console == []
        assert "data-complaints" not in document
        assert f'data-theme="{theme}"' in document
        assert 'data-overflow="0"' in document
        assert document.count("js-plotly-plot") >= 4
        assert document.count("main-svg") >= 4
        assert len(re.findall(r"<table", document)) >= 6
        assert 'class="round"' in document
        assert "per round." in document

    def test_on_a_phone_nothing_sticks_out(self, look, result):
        document, console = look(render_html(result), fragment="#theme=light", width=390)
        assert console == []
        assert 'data-width="390"' in document
        assert 'data-overflow="0"' in document
        assert document.count("js-plotly-plot") >= 4

    def test_markup_from_outside_stays_text(self, look, hostile):
        document, console = look(render_html(hostile))
        assert console == []
        assert "data-complaints" not in document
        assert document.count("<img") == 0
        assert document.count("js-plotly-plot") >= 4

    def test_an_empty_run_has_a_page(self, look, result):
        empty = {**result, "cells": [], "replays": []}
        document, console = look(render_html(empty))
        assert console == []
        assert "Nothing was measured" in document
