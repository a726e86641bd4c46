"""How fast a device could be at most: its peaks, and the least that an operation must do.

    seconds >= sum over phases of  max(FLOPs / peak of the dtype,  bytes / bandwidth)

A phase is what must end before the next can begin: the selection among scores that were written,
for example, after the scores. An accelerator's peaks are its maker's; a CPU's are measured, in the
process that uses them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.analysis.timing import alternate
from v4jax.training.peaks import ACCELERATORS, Peaks, published


class Phase(NamedTuple):
    """flops: of matrix products, in `dtype`. bytes: read and written, each once."""

    flops: float
    bytes: float
    dtype: str = "float32"


Work = tuple[Phase, ...]


def peaks(quick: bool = False) -> Peaks:
    """Those of JAX's default device. quick: measures a CPU with little care.

    Raises ValueError, one line, for an accelerator that no table here has.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measured((256,), 8, 2) if quick else measured((512, 1024, 2048), 256, 7)
    found = published(device)
    if found is not None:
        return found
    raise ValueError(
        f"no peaks are known of {device.device_kind!r}, only of: {', '.join(ACCELERATORS)}; "
        "add them to v4jax/training/peaks.py with their source"
    )


def measured(sizes: tuple[int, ...], megabytes: int, rounds: int) -> Peaks:
    """The best matmul of square matrices of `sizes`, and the best of copying and of reading float32
    arrays of 1, 4, .. up to `megabytes` MB, with the threads that JAX has here.

    BF16 operands are at least as fast as float32: where they are not, one would convert them.
    """
    rng = np.random.default_rng(0)
    flops = {"float32": 0.0, "bfloat16": 0.0}
    for size in sizes:
        a = jnp.asarray(rng.standard_normal((size, size), np.float32))
        calls = {name: functools.partial(_product, a.astype(name)) for name in flops}
        for name, timed in alternate(calls, rounds).items():
            flops[name] = max(flops[name], 2 * size**3 / timed.seconds.min())
    flops["bfloat16"] = max(flops.values())
    copy, total = jax.jit(lambda x: x + 1), jax.jit(lambda x: x.reshape(-1, 1024).max(0))
    bandwidths = {}
    for step in range(0, megabytes.bit_length(), 2):
        x = jnp.zeros(2**step * 2**18)
        found = alternate({"copy": lambda x=x: copy(x), "read": lambda x=x: total(x)}, rounds)
        rates = (2 * x.nbytes / found["copy"].seconds.min(), x.nbytes / found["read"].seconds.min())
        bandwidths[2 * x.nbytes] = max(rates)
    source = (
        f"measured in this process: matmuls of {', '.join(map(str, sizes))} squared; copies of, "
        f"and maxima over, arrays of 1 to {megabytes} MB"
    )
    return Peaks(flops, bandwidths, source)


@jax.jit
def _product(a):
    return jnp.dot(a, a, preferred_element_type=jnp.float32)


def seconds(work: Work, peaks: Peaks) -> float:
    """The least that the work can take."""
    return sum(
        max(
            phase.flops / peaks.flops[phase.dtype] if phase.flops else 0.0,
            phase.bytes / peaks.bandwidth(phase.bytes),
        )
        for phase in work
    )
