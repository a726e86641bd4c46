"""What --sweep says, as a list of settings: a dict of flag -> value for every run.

    learning_rate=1e-3,3e-4                   a grid: specs multiply, the last one runs fastest
    learning_rate=1e-3,3e-4 warmup=0.1,0.2    one spec: its flags go together, value by value
    seed=0:3   steps=0:100:25                 Python's ranges: 0 1 2, and 0 25 50 75
    scopes=[paper,all_linears],[paper]        brackets keep their text as it is; [] is empty text
    learning_rate=loguniform(1e-4,1e-2)       --draws values: uniform(a,b), loguniform(a,b),
                                              intuniform(a,b) with both ends, choice(a,b,...)
    pairs()                                   what the experiment file's function `pairs` returns

All draws of a sweep go together, as one axis. A draw depends on --sweep_seed, its flag and its
index alone, so more draws keep the old ones.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 100_000  # runs of a sweep: beyond, a slip of the pen would only fill the memory
DRAWS = ("uniform", "loguniform", "intuniform", "choice")
_FUNCTION = re.compile(r"([A-Za-z_]\w*)\(\s*\)")
_CALL = re.compile(r"([A-Za-z_]\w*)\((.*)\)", re.DOTALL)
_RANGE = re.compile(r"[+-]?\d[^:]*:|:")  # what can only be meant as one

Point = dict[str, str]  # the settings that one place on an axis gives


def functions_of(specs: Sequence[str]) -> list[str]:
    """The names of the functions that `specs` take their runs from."""
    return [match[1] for spec in specs if (match := _FUNCTION.fullmatch(spec.strip()))]


def expand(
    specs: Sequence[str],
    draws: int = 1,
    seed: int = 0,
    functions: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> list[dict[str, str]]:
    """The settings of every run, in order; flags of a run stand in the order of `specs`.

    functions: name -> what the experiment's function of that name returned.

    Raises:
      ValueError: one line that names the spec, what is wrong with it and what is allowed.
    """
    if draws < 1:
        raise ValueError(f"--draws={draws}: allowed: 1 or more")
    axes: list[list[Point]] = []
    drawn: int | None = None  # the place among the axes of the one that all draws share
    owner: dict[str, str] = {}  # flag -> the spec that has it
    for spec in specs:
        try:
            points, draws_here = _axis(spec, draws, seed, functions or {})
            for flag in dict.fromkeys(flag for point in points for flag in point):
                if flag in owner:
                    raise ValueError(f"{flag} is in {owner[flag]!r} too; a flag has one spec")
                owner[flag] = spec
        except ValueError as error:
            raise ValueError(f"--sweep {spec!r}: {error}") from None
        if draws_here and drawn is not None:
            axes[drawn] = [old | new for old, new in zip(axes[drawn], points, strict=True)]
            continue
        if draws_here:
            drawn = len(axes)
        axes.append(points)
    if draws > 1 and drawn is None:
        raise ValueError(f"--draws={draws}: no --sweep draws; one would be lr=uniform(0,1)")
    if (runs := math.prod(map(len, axes))) > MOST:
        raise ValueError(f"--sweep: this makes {runs} runs; allowed: up to {MOST}")
    return [
        {flag: value for point in points for flag, value in point.items()}
        for points in itertools.product(*axes)
    ]


def text(value: Any) -> str:
    """A value as a flag's text: lists with commas, true and false in lower case.

    Raises:
      ValueError: a value that a flag cannot have, such as None.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value))  # NumPy's own repr names its type
    if isinstance(value, list | tuple):
        return ",".join(map(text, value))
    if hasattr(value, "item"):  # a number of NumPy's
        return text(value.item())
    raise ValueError(f"{value!r} is not text, a number, true or false, or a list of these")


def _axis(
    spec: str, draws: int, seed: int, functions: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[list[Point], bool]:
    """The points of one spec, and whether some of them were drawn."""
    if match := _FUNCTION.fullmatch(spec.strip()):
        if match[1] not in functions:
            raise ValueError(f"the experiment has no function {match[1]}")
        points = [{flag: text(value) for flag, value in row.items()} for row in functions[match[1]]]
        if not points:
            raise ValueError("the function returned no runs")
        return points, False
    columns: dict[str, list[str]] = {}
    drawn = False
    for assignment in filter(None, _split(spec, " \t\n")):
        flag, equals, values = assignment.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", flag):
            raise ValueError(f"{assignment!r} is not flag=values, such as seed=0:3 or lr=1e-3,3e-4")
        if flag in columns:
            raise ValueError(f"{flag} is there twice")
        items = [item.strip() for item in _split(values, ",")]
        call = _CALL.fullmatch(items[0]) if len(items) == 1 else None
        if call and call[1] in DRAWS:
            drawn = True
            arguments = [argument.strip() for argument in _split(call[2], ",")]
            columns[flag] = [
                _draw(call[1], arguments, _bits(seed, flag, index)) for index in range(draws)
            ]
        else:
            columns[flag] = [value for item in items for value in _values(item)]
    if not columns:
        raise ValueError("is empty; a spec is flag=values, such as seed=0:3")
    lengths = {flag: len(values) for flag, values in columns.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{flag} has {length}" for flag, length in lengths.items())
        raise ValueError(f"flags of one spec go together and need as many values each: {counts}")
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows], drawn


def _values(item: str) -> Sequence[str]:
    """The values of one item between commas: a range's numbers, a bracket's inside, or itself."""
    if item.startswith("["):
        depths = itertools.accumulate((char == "[") - (char == "]") for char in item)
        if list(depths).index(0) != len(item) - 1:
            raise ValueError(f"{item!r}: a bracket holds a whole value, as in [a,b],[c]")
        return [item[1:-1]]
    if not item:
        raise ValueError("a value is missing; [] stands for empty text")
    if match := _CALL.fullmatch(item):
        if match[1] in DRAWS:
            raise ValueError(f"{item!r}: a draw is the only value of its flag")
        raise ValueError(f"{item!r}: draws are {', '.join(DRAWS)}; [{item}] keeps it as it is")
    if not _RANGE.match(item):
        return [item]
    try:
        numbers = range(*map(int, item.split(":")))
    except (TypeError, ValueError):  # four parts; not a number; a step of 0
        raise ValueError(
            f"{item!r}: a range is start:stop or start:stop:step in whole numbers, its step not 0; "
            f"[{item}] keeps it as it is"
        ) from None
    if not numbers:
        raise ValueError(f"{item!r}: the range is empty")
    if numbers[MOST:]:
        raise ValueError(f"{item!r}: allowed: up to {MOST} values")
    return [str(number) for number in numbers]


def _bits(seed: int, flag: str, index: int) -> int:
    """64 random bits, always the same for the same three."""
    digest = hashlib.sha256(f"{seed} {flag} {index}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def _draw(kind: str, arguments: Sequence[str], bits: int) -> str:
    """The value that `bits`, uniform in [0, 2**64), stand for."""
    if kind == "choice":
        choices = [value for argument in arguments for value in _values(argument)]
        return choices[bits * len(choices) >> 64]
    number = int if kind == "intuniform" else float
    try:
        low, high = map(number, arguments)
    except ValueError:
        whole = "whole " if number is int else ""
        raise ValueError(f"{kind}({','.join(arguments)}): takes two {whole}numbers") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{kind}({low},{high}): the first number must be below the second")
    if isinstance(low, int) and isinstance(high, int):
        return str(low + (bits * (high - low + 1) >> 64))
    share = (bits >> 11) / 2**53
    if kind == "loguniform":
        if low <= 0:
            raise ValueError(f"{kind}({low},{high}): both numbers must be above 0")
        value = math.exp(math.log(low) * (1 - share) + math.log(high) * share)
    else:
        value = low * (1 - share) + high * share
    rounded = f"{value:.6g}"  # short enough for a folder's name
    return rounded if low <= float(rounded) <= high else repr(min(max(value, low), high))


def _split(text: str, at: str) -> list[str]:
    """`text` cut at the characters `at`, but not inside brackets or parentheses."""
    pieces, closers = [""], [""]
    for char in text:
        inside = closers[-1]
        if char == inside:
            closers.pop()
        elif char == "[" or (char == "(" and inside != "]"):
            closers.append("]" if char == "[" else ")")
        elif char in "])" and inside != "]":  # within brackets, parentheses are only text
            raise ValueError(f"{text!r}: {char} closes nothing")
        if char in at and closers == [""]:
            pieces.append("")
        else:
            pieces[-1] += char
    if closers != [""]:
        raise ValueError(f"{text!r}: {closers[-1]} is missing")
    return pieces
