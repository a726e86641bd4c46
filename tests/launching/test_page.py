"""The report's page: escaped, self-contained, and as a real browser opens it."""

import base64
import hashlib
import html.parser
import json
import re

import pytest

from tests.launching import browser
from tests.launching.fake_sweep import curve, finish, realistic, simple, sweep, write_json
from tests.launching.test_charts import contrast
from v4jax.launching import page
from v4jax.launching.figures import axis_figure, loss_figure
from v4jax.launching.page import write_report

VOID = {"meta", "link", "br"}
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp;</td>"


class Parsed(html.parser.HTMLParser):
    """A page as a parser sees it: tags with attributes, text by the tag around it."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        assert self.open == [], "a tag is not closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *tags):
        return [data for tag, data in self.texts if tag in tags]


def parsed(path) -> Parsed:
    return Parsed(path.read_text(encoding="utf-8"))


# ---- what it says ----


def test_a_whole_report(tmp_path):
    path = write_report(realistic(tmp_path))
    assert path == tmp_path / "report" / "index.html"
    text = path.read_text(encoding="utf-8")
    assert "24 runs: 21 done, 1 failed, 1 running, 1 missing." in text
    assert "Lowest control/loss" in text and "2.23 ± 0.03" in text  # 2.2, 2.23, 2.26 by hand
    assert "FloatingPointError: qat, step 31: loss is nan" in text
    assert "learning_rate, log" in text and "3f2a9c1" in text and "b7710de" in text
    assert "--steps=100" in text
    figures = parsed(path).text("h3")
    assert figures == [
        "control/loss over learning_rate",
        *[f"{part}: loss of its batches, by learning_rate" for part in PARTS],
        "control/loss over scopes",
        *[f"{part}: loss of its batches, by scopes" for part in PARTS],
    ]
    assert {file.name for file in path.parent.iterdir()} >= {"runs.csv", "table.csv"}
    before = path.read_bytes()
    assert write_report(tmp_path).read_bytes() == before


PARTS = ("pretrain", "control", "qat")


def test_another_metric_and_its_direction(tmp_path):
    numbers = {("a",): {"loss": 1, "recall": 0.5}, ("b",): {"loss": 2, "recall": 0.75}}
    simple(tmp_path, numbers, ("kind",))
    assert "Highest recall" in write_report(tmp_path, "recall", True).read_text("utf-8")
    with pytest.raises(ValueError, match="^--metric=nothing: no finished run has it"):
        write_report(tmp_path, "nothing")


def test_nothing_has_run_yet(tmp_path):
    sweep(tmp_path, [{"n": "1"}, {"n": "2"}])
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "2 runs: 2 missing." in text and "No finished run has a number yet." in text
    Parsed(text)


def test_where_the_metric_is_nowhere_finite_that_is_said_of_it_alone(tmp_path):
    simple(tmp_path, {("1",): {"loss": "NaN", "accuracy": 0.5}}, ("n",))
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No finished run has a finite loss yet." in text


def test_one_run_without_flags_and_a_damaged_file(tmp_path):
    (run,) = sweep(tmp_path, [{}]).runs
    finish(run, {"loss": 2.5})
    curve(run.folder, [3.0, 2.5])
    (run.folder / "old").mkdir()
    (run.folder / "old" / "metrics.jsonl").write_text("not JSON\n")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "all runs" in text and "old/metrics.jsonl, line 1: not a JSON object" in text


# ---- nothing of a run's becomes markup, nothing comes from elsewhere ----


def test_everything_is_escaped(tmp_path):
    plan = sweep(tmp_path, [{EVIL: EVIL, "seed": s} for s in "01"] + [{EVIL: "x"}], [EVIL])
    for run in plan.runs:
        finish(run, {EVIL + "loss": 1.0})
        curve(run.folder, [2.0, 1.0])
        config = {EVIL: EVIL + run.name}
        write_json(run.folder / "config.json", {"format": 2, "config": config})
    finish(plan.runs[2], None, "failed", error=f"{EVIL}\n{EVIL}")
    kept = json.loads((tmp_path / "sweep.json").read_text())
    kept["experiment"], kept["fixed"] = EVIL, [EVIL]
    (tmp_path / "sweep.json").write_text(json.dumps(kept))
    found = parsed(write_report(tmp_path))
    assert [tag for tag, _ in found.tags].count("script") == 1
    tags = {tag for tag, _ in found.tags}
    assert "img" not in tags and not any(
        name.startswith("on") for _, attributes in found.tags for name in attributes
    )
    assert sum(EVIL in text for text in found.text("h1", "code", "td", "h3", "pre", "title")) > 10


def test_it_names_no_address_and_its_policy_names_its_script_and_style(tmp_path):
    path = write_report(realistic(tmp_path))
    text, found = path.read_text(encoding="utf-8"), parsed(path)
    assert "http:" not in text and "https:" not in text and "url(" not in text
    links = [(tag, a[k]) for tag, a in found.tags for k in ("src", "href") if k in a]
    assert links == [("link", "data:,")]
    assert not any("style" in attributes for _, attributes in found.tags)  # it would be refused
    (policy,) = [a["content"] for tag, a in found.tags if a.get("http-equiv")]
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert len(page.SCRIPT.strip().splitlines()) <= 30


def test_its_text_stands_out_in_light_and_dark():
    schemes = re.findall(r"--paper: (#\w+); --ink: (#\w+); --soft: (#\w+);", page.STYLE)
    assert len(schemes) == 2
    for paper, *inks in schemes:
        assert all(contrast(paper, ink) >= 4.5 for ink in inks)


# ---- the figures ----


def test_an_axis_over_decades_is_logarithmic_and_words_have_places(tmp_path):
    numbers = {(r, k): {"loss": float(r)} for r in ("1e-4", "1e-2") for k in ("muon", "adamw")}
    found = simple(tmp_path, numbers, ("rate", "kind"))
    assert "rate, log" in axis_figure(found, "rate", "loss")
    assert "loss, log" in axis_figure(found, "kind", "loss")
    kinds = axis_figure(found, "kind", "loss")
    assert "kind, log" not in kinds and ">muon<" in kinds and ">adamw<" in kinds
    assert kinds.count('class="line"') == 4  # two lines, each drawn and in the legend


def test_a_zipped_axis_is_no_other_axis(tmp_path):
    numbers = {("1", "0.1"): {"loss": 3}, ("2", "0.2"): {"loss": 2}, ("4", "0.4"): {"loss": 1}}
    drawn = axis_figure(simple(tmp_path, numbers, ("rate", "decay")), "rate", "loss")
    assert drawn.count('class="line"') == 1 and "legend" not in drawn and "<circle" not in drawn


def test_a_setting_without_a_finite_value_is_counted_not_drawn(tmp_path):
    numbers = {("1",): {"loss": 3}, ("2",): {"loss": "NaN"}, ("3",): None, ("4",): {"loss": 1}}
    drawn = axis_figure(simple(tmp_path, numbers, ("n",)), "n", "loss")
    assert drawn.count('class="mark"') == 2 and "2 of 4 settings have no finite value." in drawn


def test_means_have_bars_where_there_are_seeds(tmp_path):
    numbers = {(n, s): {"loss": float(n) + float(s)} for n in "12" for s in "01"}
    drawn = axis_figure(simple(tmp_path, numbers, ("n", "seed")), "n", "loss")
    assert drawn.count('class="mark"') == 2 and drawn.count("<circle") == 4
    assert "Bars: one standard deviation over seeds" in drawn


def test_loss_curves_say_when_they_are_means():
    runs = [({"n": "1"}, "n=1", [(float(i), 1.0) for i in range(1000)])]
    drawn = loss_figure("control", runs, "n", ["1", "2"])
    assert "Each point is the mean of up to 4 logged ones." in drawn
    assert "mean" not in loss_figure("control", [({}, "r", [(1.0, 2.0)])], None)


def test_a_single_logged_loss_is_a_mark():
    single = [({"n": "1"}, "n=1", [(1.0, 2.0)])]
    assert 'class="mark"' in loss_figure("control", single, "n", ["1", "2"])
    assert 'class="mark"' not in loss_figure("control", [({}, "r", [(1.0, 2.0), (2.0, 1.0)])], None)


# ---- in a browser ----


@pytest.mark.skipif(browser.find() is None, reason="no chromium: apt-get install chromium")
def test_a_browser_opens_it_sorts_it_and_asks_for_nothing(tmp_path):
    path = write_report(realistic(tmp_path / "sweep"))
    with browser.browser(tmp_path / "profile") as tab:
        tab.resize(390, 800)
        tab.open(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        tab.resize(1280, 900)
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate("[...document.styleSheets].some(s => s.cssRules.length > 20)")
        column = (
            "[...document.querySelector('table.sortable').tBodies[0].rows]"
            ".map(row => row.cells[{}].textContent)"
        )
        head = "document.querySelectorAll('table.sortable th button')[{}].click()"
        tab.evaluate(head.format(0))
        rates = ["1e-4", "1e-3", "1e-2", "1e-1"]
        assert tab.evaluate(column.format(0)) == [rate for rate in rates for _ in "12"]
        tab.evaluate(head.format(0))
        assert tab.evaluate(column.format(0)) == [rate for rate in rates[::-1] for _ in "12"]
        for last in ("nan", "nan"):  # ascending and descending
            tab.evaluate(head.format(3))
            losses = tab.evaluate(column.format(3))
            means = [float(loss.partition(" ")[0]) for loss in losses[:-1]]
            assert losses[-1] == last
            assert means == sorted(means) or means == sorted(means, reverse=True)
        assert means[0] > means[-1]
        assert tab.evaluate("document.querySelector('th[aria-sort]').ariaSort") == "descending"
        assert set(tab.requests) == {path.as_uri()}
        assert tab.complaints == []


@pytest.mark.skipif(browser.find() is None, reason="no chromium: apt-get install chromium")
def test_the_policy_holds_in_a_browser(tmp_path):
    """The check above can fail: what the page forbids is a complaint here."""
    path = write_report(realistic(tmp_path / "sweep"))
    text = path.read_text(encoding="utf-8")
    planted = "<script>document.title = 'planted'</script><img src='http://127.0.0.1:9/x.png'>"
    path.write_text(text.replace("<h1>", planted + "<h1>"), encoding="utf-8")
    with browser.browser(tmp_path / "profile") as tab:
        tab.open(path.as_uri())
        assert tab.evaluate("document.title") == "fake: sweep"
        assert len(tab.complaints) == 2
