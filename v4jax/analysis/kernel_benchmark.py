"""Operations timed beside others: roofline first, then the ratio; and that on paper.

A case holds sides that compute the same on the same data, and claims about two of them each. The
work of a side is the least that its operation must do with its formats, not what its
implementation happens to do. A ratio is how many times as fast a candidate is as its baseline. One
above its ceiling is not a success but a mistake, and `check` raises on it.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from v4jax.analysis import benchmark_page, roofline, timing
from v4jax.analysis.report import bullets, jsonable
from v4jax.analysis.roofline import Peaks, Work
from v4jax.analysis.timing import Timed
from v4jax.training.metrics import table


@dataclasses.dataclass(frozen=True)
class Side:
    """function(*arguments): arrays in, arrays out. weights: which argument is the weights, if any:
    their bytes are printed, beside those of the program at its peak."""

    function: Callable[..., Any]
    arguments: tuple
    work: Work
    weights: int | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """candidate beside the fastest of baselines. reach: how many times as fast it should be.

    ceiling: of the ratio. "roofline": both at their limits, where the two differ by their formats
    alone. "measured": the candidate at its limit, the baseline as it is, where the baseline does
    other things, of which no least is known (a sort, products that are thrown away).
    """

    candidate: str
    baselines: tuple[str, ...]
    reach: float | None = None
    ceiling: Literal["roofline", "measured"] = "measured"


@dataclasses.dataclass(frozen=True)
class Case:
    """sides: by label. build makes the data, so that one case's are there at a time."""

    operation: str
    shape: str
    claims: tuple[Claim, ...]
    build: Callable[[], dict[str, Side]]


class AboveCeiling(Exception):
    """A measured ratio that cannot be."""


def measure(case: Case, peaks: Peaks, rounds: int, at_least: float) -> dict:
    """Times all sides of a case in turn: its rows, one a claim, and the memory of its weights.

    rounds, at_least: as `timing.alternate` takes them.
    """
    sides = case.build()
    programs = {
        name: jax.jit(side.function).lower(*side.arguments).compile()
        for name, side in sides.items()
    }
    calls = {
        name: lambda program=programs[name], side=side: program(*side.arguments)
        for name, side in sides.items()
    }
    timed = timing.alternate(calls, rounds, at_least)
    return {
        "operation": case.operation,
        "shape": case.shape,
        "rows": [_row(claim, sides, timed, peaks) for claim in case.claims],
        "sides": {
            name: {
                "seconds": found.spread()._asdict(),
                "roofline_seconds": roofline.seconds(sides[name].work, peaks),
                "cpu_over_wall": found.busy(),
            }
            for name, found in timed.items()
        },
        "memory": {
            name: _memory(side, programs[name])
            for name, side in sides.items()
            if side.weights is not None
        },
    }


def _row(
    claim: Claim, sides: Mapping[str, Side], timed: Mapping[str, Timed], peaks: Peaks
) -> dict[str, Any]:
    baseline = min(claim.baselines, key=lambda name: timed[name].spread().median)
    ours, theirs = timed[claim.candidate], timed[baseline]
    ratio = timing.ratio(theirs, ours)
    limit = roofline.seconds(sides[claim.candidate].work, peaks)
    if claim.ceiling == "roofline":
        ceiling = roofline.seconds(sides[baseline].work, peaks) / limit
    else:
        ceiling = theirs.spread().median / limit
    work = sides[claim.candidate].work
    return {
        "candidate": claim.candidate,
        "baseline": baseline,
        "bytes": sum(phase.bytes for phase in work),
        "flops": sum(phase.flops for phase in work),
        "ceiling": ceiling,
        "ceiling_of": claim.ceiling,
        "ratio": ratio._asdict(),
        "reach": claim.reach,
        "reached": None if claim.reach is None else ratio.median >= claim.reach,
        "share_of_roofline": limit / ours.spread().median,
    }


def _memory(side: Side, program) -> dict[str, int]:
    """Bytes of the weights as they lie, and of all buffers of the program at once."""
    assert side.weights is not None
    leaves = jax.tree.leaves(side.arguments[side.weights])
    found = program.memory_analysis()
    peak = (
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        - found.alias_size_in_bytes
    )  # fmt: skip
    return {
        "weights": sum(leaf.nbytes for leaf in leaves),
        "temporary": found.temp_size_in_bytes,
        "peak": peak,
    }


def check(found: Sequence[Mapping[str, Any]]) -> None:
    """Raises AboveCeiling, one line, for the first row whose ratio is above its ceiling."""
    for case in found:
        for row in case["rows"]:
            ratio = row["ratio"]["median"]
            if ratio > row["ceiling"]:
                raise AboveCeiling(
                    f"{case['operation']} ({case['shape']}): {row['candidate']} is {ratio:.2f} "
                    f"times as fast as {row['baseline']}, above the ceiling of "
                    f"{row['ceiling']:.2f}: the timing or the count of work is wrong, or the "
                    "baseline is not a good one"
                )


# ---- on paper ----


def case_text(case: Mapping[str, Any]) -> str:
    """A case's table, and its memory."""
    rows = []
    for row in case["rows"]:
        ratio = "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["ratio"])
        seconds = case["sides"][row["candidate"]]["seconds"]["median"]
        rows.append(
            (
                row["candidate"],
                row["baseline"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['flops'] / 1e9:.3f}",
                f"{row['ceiling']:.2f}",
                ratio,
                _reach(row),
                f"{1e3 * seconds:.3f}",
                f"{row['share_of_roofline']:.0%}",
                f"{case['sides'][row['candidate']]['cpu_over_wall']:.2f}",
            )
        )
    headers = (
        "candidate", "against", "MB", "GFLOP", "ceiling", "times as fast", "reach", "ms",
        "of roofline", "CPU s / s",
    )  # fmt: skip
    parts = [table(rows, headers)]
    if case["memory"]:
        memory = [
            (name, *(f"{one[key]:,}" for key in ("weights", "temporary", "peak")))
            for name, one in case["memory"].items()
        ]
        parts.append(table(memory, ("weights as", "resident bytes", "temporary", "peak bytes")))
    return "\n\n".join(parts)


def _reach(row: Mapping[str, Any]) -> str | None:
    """ ">= 10: yes"; a reach below 1 as the times that it may take as long."""
    if row["reach"] is None:
        return None
    reach, met = row["reach"], "yes" if row["reached"] else "no"
    if reach >= 1:
        return f">= {reach:g}: {met}"
    return f">= {reach:.2f} (within {1 / reach:.2g}x): {met}"


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a page of docs/benchmarks."""
    report = jsonable(report)
    sections = [
        f"# Kernels on {report['what']['device']}",
        header(report),
        LEGEND,
        *(
            f"## {case['operation']}: {case['shape']}\n\n{case_text(case)}"
            for case in report["cases"]
        ),
        bullets("## Not run", report["not_run"]),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def header(report: Mapping[str, Any]) -> str:
    """What was run, on what, how loaded it was, and its peaks."""
    report = jsonable(report)
    peaks = report["peaks"]
    flops = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in peaks["flops"].items())
    rates = ", ".join(f"{rate / 1e9:.3g}" for rate in peaks["bandwidths"].values())
    return benchmark_page.header(
        report,
        f"Peaks: {flops} GFLOP/s; {rates} GB/s ({peaks['source']})",
        f"{report['what']['rounds']} rounds, all sides of a case in turn; ratios: median "
        "[quartiles] over the rounds; first calls excluded",
    )


LEGEND = """Bytes and FLOPs are the least that the operation needs with the candidate's formats; the
roofline is what the device's peaks allow for them. The ceiling of a ratio: where the two sides
differ by their formats alone, the ratio of their rooflines; elsewhere the baseline as measured over
the candidate's roofline. A ratio above its ceiling fails the run. CPU s / s: CPU seconds of this
process a second, below its threads where something else had their cores."""


def write(folder: pathlib.Path, report: Mapping[str, Any]) -> pathlib.Path:
    """The report as a page and JSON in `folder`; returns the path of the page."""
    return benchmark_page.write(folder, "kernels", report, markdown(report))
