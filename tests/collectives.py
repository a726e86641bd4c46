"""What devices exchange, read off a compiled program's text."""

import re
from typing import NamedTuple

KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|collective-broadcast"


class Collective(NamedTuple):
    """A collective operation: what it does, and the shapes of its results on one device."""

    kind: str
    shapes: tuple[tuple[int, ...], ...]


def collectives(text: str) -> list[Collective]:
    """All of `jax.stages.Compiled.as_text()`; an asynchronous one counts where it starts."""
    found = []
    for line in text.splitlines():
        made = re.search(rf"= (.*?) (ragged-all-to-all|{KINDS})(?:-start)?\(", line)
        if made:
            shapes = re.findall(r"\w\[([\d,]*)\]", made[1])
            found.append(
                Collective(
                    made[2], tuple(tuple(map(int, s.split(","))) if s else () for s in shapes)
                )
            )
    return found


def of_tokens(found: list[Collective], *lengths: int) -> list[Collective]:
    """Those of arrays with an axis, other than 1, that is a multiple of one of `lengths`."""
    return [
        one
        for one in found
        if any(size % n == 0 for shape in one.shapes for size in shape for n in lengths)
    ]
