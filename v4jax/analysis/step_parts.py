"""Where a compiled program's time goes, by the model's named scopes: from a profiler trace.

XLA names each operation by the scopes that it was traced in, and the profiler names the operation
of each event. An operation's own time is that of its event less that of the events inside.
"""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

_LAYER = re.compile(r"(layer|unit)_\d+|mtp")
_AROUND = {"", "while", "body", "closed_call", "checkpoint", "rematted_computation"}
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{op_name="([^"]+)"', re.M)


class Part(NamedTuple):
    """scope: the model's, "" outside any. seconds: a call, forward and backward."""

    scope: str
    forward: float
    backward: float


def parts(program, run: Callable[[], Any], calls: int = 5) -> list[Part]:
    """Seconds a call of each scope, longest first. program: what `run` runs, compiled, for names.

    On a CPU with several threads the seconds are those of all threads together.
    """
    scopes = dict(_INSTRUCTION.findall(program.as_text()))
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(run())
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        own = _own_times(jax.profiler.ProfileData.from_file(str(file)), scopes)
    found: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for name, nanoseconds in own.items():
        backward, scope = _scope(scopes[name])
        found[scope][backward] += nanoseconds * 1e-9 / calls
    made = [Part(scope, *seconds) for scope, seconds in found.items()]
    return sorted(made, key=lambda part: -part.forward - part.backward)


def _own_times(data, scopes) -> dict[str, float]:
    own: dict[str, float] = collections.defaultdict(float)
    for plane in data.planes:
        for line in plane.lines:
            named = ((event, event.name.split(" ")[0].lstrip("%")) for event in line.events)
            events = [
                (event.start_ns, -event.duration_ns, name)
                for event, name in named
                if name in scopes
            ]
            around: list[tuple[float, str]] = []  # (end, name) of the events that hold this one
            for start, negative, name in sorted(events):
                while around and around[-1][0] <= start:
                    around.pop()
                if around:
                    own[around[-1][1]] += negative
                own[name] -= negative
                around.append((start - negative, name))
    return own


def _scope(path: str) -> tuple[bool, str]:
    """(backward, scope) of an operation name, of whatever layer.

    "jit(step)/transpose(jvp(layer_0))/moe/experts/mul" is (True, "moe").
    """
    first, *names = re.sub(r"^(jit\([^)]*\)/?)+", "", path).split("/")
    inside = re.fullmatch(r"(transpose\()?jvp\((.*?)\)+", first)
    if inside is None:
        return False, ""
    scope = inside[2]
    while names and (scope in _AROUND or _LAYER.fullmatch(scope)):
        scope = re.sub(r"^jvp\((.*)\)$", r"\1", names.pop(0))
    if not names or not re.fullmatch(r"\w+", scope):  # a jitted function, an einsum
        return False, ""
    return inside[1] is not None, scope
