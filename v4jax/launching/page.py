"""A sweep's report: one HTML page that needs nothing else, and its numbers as CSV and Parquet.

The page opens without a network and forbids itself any: its only script, which sorts the tables, is
named by its hash in the page's own content policy. All that comes from runs is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from v4jax.launching import charts, figures
from v4jax.launching.differences import Difference, differences
from v4jax.launching.printable import clean, last_line
from v4jax.launching.results import (
    Results,
    Summary,
    as_number,
    best,
    choose_metric,
    read_results,
    summarize,
    write_tables,
)
from v4jax.training.files import as_path, write_whole

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1e21; --soft: #5b6068;
  --rule: #d6d9de; --shade: #f4f5f7; --bad: #a61b1b; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e6e7e9; --soft: #a3a8b0;
  --rule: #3a3e45; --shade: #1f2227; --bad: #ff9a8f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem clamp(0.8rem, 3vw, 2.5rem) 3rem;
  background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 0.3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 0 0 0.2rem; }
p { margin: 0.3rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: 0.875rem; }
.best { border-left: 4px solid var(--c0); padding: 0.3rem 0 0.3rem 0.9rem; margin: 1rem 0; }
.big { font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
.soft + .wide { margin-top: 0.5rem; }
th, td { padding: 0.3rem 0.7rem; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { white-space: nowrap; background: var(--shade); }
.n { text-align: right; white-space: nowrap; }
.few td { overflow-wrap: anywhere; }
.few td:first-child { min-width: 10rem; }
.few td:last-child { min-width: 16rem; }
details { margin: 0.6rem 0; }
td details { margin: 0; }
tr.top td { font-weight: 600; }
th button { all: unset; cursor: pointer; }
th button::after { content: " \\2195"; color: var(--soft); font-weight: 400; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
th button:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 2px solid var(--c0);
  outline-offset: 2px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.2rem 1.8rem; }
figure { margin: 0; max-width: 34rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; margin: 0.2rem 0;
  padding: 0; font-size: 0.875rem; }
.legend svg { vertical-align: middle; margin-right: 0.35rem; }
.bad { color: var(--bad); }
code, pre { font: 0.85em ui-monospace, monospace; }
pre { white-space: pre-wrap; background: var(--shade); padding: 0.6rem; margin: 0.3rem 0; }
summary { cursor: pointer; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  for (const button of table.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.parentElement, column = head.cellIndex;
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const text = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows].map(row => [text(row), row]);
      const numbers = rows.every(([value]) => !isNaN(value));
      rows.sort(([a], [b]) => (a === "") - (b === "") ||  // what is missing stays last
        sign * (numbers ? a - b : a.localeCompare(b, "en", {numeric: true})));
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  }
}
"""


def write_report(folder: str | Path, metric: str | None = None, highest: bool = False) -> Path:
    """Writes `<folder>/report/`: index.html, runs.csv, table.csv, runs.parquet; returns the page.

    Args:
      folder: a sweep's --workdir. Its runs may still be at work: the report is of what is there.
      metric: the number to judge runs by, see `choose_metric`. highest: the more the better.

    Raises:
      ValueError: one line: no sweep is there, or no run has the metric.
      OSError: the folder cannot be written.
    """
    results = read_results(folder)
    metric = choose_metric(results, metric)
    out = as_path(folder) / "report"
    files = write_tables(results, out)
    page = _page(results, metric, highest, [path.name for path in files])
    write_whole(out / "index.html", page.encode("utf-8", "backslashreplace"))
    return out / "index.html"


def _page(results: Results, metric: str | None, highest: bool, files: Sequence[str]) -> str:
    plan, style = results.plan, charts.STYLE + STYLE
    title = f"{plan.experiment}: {plan.workdir.name}"
    losses, notes = figures.losses(results)
    sections = [
        summary_section(results, metric, highest),
        group_table(results, metric, highest),
        _figures(results, metric, losses),
        _unfinished(results, notes),
        _differences(differences(plan.runs)),
        _run_table(results),
        f'<p class="soft">Beside this page: {_e(", ".join(files))}.</p>',
    ]
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(SCRIPT)}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{_e(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<h1>{_e(title)}</h1>\n"
        f"{''.join(sections)}<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _e(value: object) -> str:
    return html.escape(clean(str(value)))


def _number(value: float) -> str:
    return f"{value:.5g}".replace("-", "\N{MINUS SIGN}")


def _spread(summary: Summary) -> str:
    spread = "" if summary.spread is None else f" ± {summary.spread:.2g}"
    return _number(summary.mean) + spread


def _settings(settings: Mapping[str, str]) -> str:
    return ", ".join(f"{flag}={value}" for flag, value in settings.items()) or "all runs"


# ---- the sections ----


def summary_section(results: Results, metric: str | None, highest: bool) -> str:
    """How many runs there are in which state, and the best of them by `metric`."""
    states = ", ".join(f"{count} {state}" for state, count in results.states.most_common())
    count = len(results.results)
    lines = [f"<p>{count} run{'s' * (count != 1)}: {_e(states)}.</p>\n"]
    if fixed := results.plan.fixed:
        lines.append(f'<p class="soft">All runs: <code>{_e(" ".join(fixed))}</code></p>\n')
    found = best(results, metric, highest) if metric else None
    if found is None or metric is None:
        what = "number" if metric is None else f"finite {metric}"
        return "".join([*lines, f"<p>No finished run has a {_e(what)} yet.</p>\n"])
    group, result = found
    summary = group.summary(metric)
    assert summary is not None
    seeds = "one run" if summary.seeds == 1 else f"mean of {summary.seeds} seeds"
    lines.append(
        f'<div class="best"><p>{"Highest" if highest else "Lowest"} {_e(metric)}</p>'
        f'<p><span class="big">{_e(_spread(summary))}</span> ({seeds}) at '
        f"<code>{_e(_settings(group.settings))}</code></p>"
        f'<p class="soft">Single run: {_e(_number(result.numbers[metric]))} at '
        f"<code>{_e(result.run.name)}</code></p></div>\n"
    )
    return "".join(lines)


def group_table(results: Results, metric: str | None, highest: bool) -> str:
    """A row for every setting, with means and spreads over its seeds; the best by `metric` bold."""
    names = sorted(results.metrics, key=lambda name: name != metric)  # the chosen one first
    found = best(results, metric, highest) if metric else None
    heads = [*results.axes, "done", *names]
    rows = []
    for group in results.groups():
        done = sum(result.state == "done" for result in group.results)
        cells = [_cell(group.settings.get(axis, "")) for axis in results.axes]
        cells.append(f'<td class="n" data-v="{done}">{done} of {len(group.results)}</td>')
        cells += [_summary_cell(group.summary(name), done) for name in names]
        top = ' class="top"' if found and group == found[0] else ""
        rows.append(f"<tr{top}>{''.join(cells)}</tr>")
    caption = (
        "Mean ± sample standard deviation (n − 1) over the seeds that are done. A column's head "
        "sorts. The best row is bold."
    )
    return _section("Results", _table(heads, rows, caption))


def _summary_cell(summary: Summary | None, done: int) -> str:
    if summary is None:
        return '<td class="n" data-v="">–</td>'
    value = repr(summary.mean) if math.isfinite(summary.mean) else ""
    fewer = f" (n={summary.seeds})" if summary.seeds != done else ""
    return f'<td class="n" data-v="{value}">{_e(_spread(summary))}{fewer}</td>'


def _cell(value: str) -> str:
    kind = ' class="n"' if as_number(value) is not None else ""
    return f"<td{kind}>{_e(value)}</td>"


def _run_table(results: Results) -> str:
    flags, names = list(results.plan.axes), results.metrics
    rows = []
    for result in results.results:
        cells = [_cell(result.run.name), _cell(result.state)]
        cells += [_cell(result.run.settings.get(flag, "")) for flag in flags]
        for name in names:
            value = result.numbers.get(name)
            cells.append(_summary_cell(summarize([] if value is None else [value]), 1))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    table = _table(["run", "state", *flags, *names], rows, "Every run. A column's head sorts.")
    return f"<details><summary>All {len(rows)} runs</summary>{table}</details>\n"


def _figures(results: Results, metric: str | None, losses: Mapping[str, figures.Curves]) -> str:
    sections = []
    for axis, values in results.axes.items():
        if len(values) < 2:
            continue
        drawn = [figures.axis_figure(results, axis, metric)] if metric else []
        if len(values) <= charts.SERIES:
            drawn += [figures.loss_figure(p, runs, axis, values) for p, runs in losses.items()]
        sections.append(_section(f"Over {axis}", f'<div class="charts">{"".join(drawn)}</div>'))
    if losses and not any(2 <= len(v) <= charts.SERIES for v in results.axes.values()):
        drawn = [figures.loss_figure(part, runs, None) for part, runs in losses.items()]
        sections.append(_section("Training", f'<div class="charts">{"".join(drawn)}</div>'))
    return "".join(sections)


def _unfinished(results: Results, notes: Sequence[str]) -> str:
    rows = []
    for result in results.results:
        if result.state == "done" and not result.why:
            continue
        what = _e(last_line(result.why)) or "–"
        if "\n" in result.why:
            what = f"<details><summary>{what}</summary><pre>{_e(result.why)}</pre></details>"
        cells = f"{_cell(result.run.name)}{_cell(result.state)}{_cell(str(result.attempt))}"
        rows.append(f"<tr>{cells}<td>{what}</td></tr>")
    parts = []
    if rows:
        table = _table(["run", "state", "starts", "last line of its error"], rows, "", "few")
        parts.append(table)
    parts += [f'<p class="bad">{_e(note)}</p>' for note in notes]
    return _section("Runs without numbers", "".join(parts)) if parts else ""


def _differences(found: Sequence[Difference]) -> str:
    if not found:
        return ""
    rows = []
    for difference in found:
        if difference.follows:
            values = ", ".join(f"<code>{_e(_cut(value))}</code>" for value in difference.values)
        else:
            values = "<br>".join(
                f'<code>{_e(_cut(value))}</code> <span class="soft">{_e(_some(names))}</span>'
                for value, names in difference.values.items()
            )
        why = f"--{difference.follows}" if difference.follows else "–"
        rows.append(f"<tr>{_cell(difference.name)}{_cell(why)}<td>{values}</td></tr>")
    caption = "Configurations, commit and versions, where they are not the same in all runs."
    heads = ["what", "follows the flag", "values"]
    return _section("Differences", _table(heads, rows, caption, "few"))


def _cut(text: str, most: int = 120) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "; ".join(names[:most]) + more


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_e(title)}</h2>\n{body}</section>\n"


def _table(heads: Sequence[str], rows: Sequence[str], caption: str, kind: str = "sortable") -> str:
    button = kind == "sortable"
    names = [f'<button type="button">{_e(h)}</button>' if button else _e(h) for h in heads]
    # A column stands to the right where its first cell does.
    first = next(iter(rows), "").split("<td")[1:] or [""] * len(names)
    kinds = [' class="n"' if cell.startswith(' class="n"') else "" for cell in first]
    head = "".join(
        f'<th scope="col"{kind}>{name}</th>' for name, kind in zip(names, kinds, strict=True)
    )
    words = f'<p class="soft">{_e(caption)}</p>\n' if caption else ""
    return (
        f'{words}<div class="wide" tabindex="0" role="region" '
        f'aria-label="{_e(caption or heads[0])}"><table class="{kind}"><thead><tr>{head}</tr>'
        f"</thead>\n<tbody>{''.join(rows)}</tbody></table></div>\n"
    )
