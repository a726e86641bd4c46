"""How fast a device could be at most: its peaks, and the least that an operation must do.

    seconds >= sum over phases of  max(FLOPs / peak of the dtype,  bytes / bandwidth)

A phase is what must end before the next can begin: the selection among scores that were written,
for example, after the scores. An accelerator's peaks are its maker's; a CPU's are measured, in the
process that uses them.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4jax.analysis.timing import alternate


class Phase(NamedTuple):
    """flops: of matrix products, in `dtype`. bytes: read and written, each once."""

    flops: float
    bytes: float
    dtype: str = "float32"


Work = tuple[Phase, ...]


@dataclasses.dataclass(frozen=True)
class Peaks:
    """flops: FLOP/s by dtype. bandwidths: bytes/s by the least size of the data, in bytes.

    source: where the figures are from.
    """

    flops: Mapping[str, float]
    bandwidths: Mapping[int, float]
    source: str

    def bandwidth(self, size: float) -> float:
        """Bytes/s on `size` bytes of data: the best measured on as much or more, since smaller data
        lie in faster memory."""
        fitting = [rate for least, rate in self.bandwidths.items() if least >= size]
        return max(fitting) if fitting else min(self.bandwidths.values())


_NVIDIA = "NVIDIA's data sheet of the SXM5 module, without sparsity"
_TPU = "jax.experimental.pallas.tpu.get_tpu_info of jax 0.12, a TensorCore"


def _accelerator(source: str, terabytes: float, **teraflops: float) -> Peaks:
    flops = {name: rate * 1e12 for name, rate in teraflops.items()}
    return Peaks(flops, {0: terabytes * 1e12}, source)


_HOPPER = {"float32": 67.0, "bfloat16": 989.0, "float8": 1979.0, "int8": 1979.0}
# By what jax.Device.device_kind begins with.
ACCELERATORS: dict[str, Peaks] = {
    "NVIDIA H100": _accelerator(_NVIDIA, 3.35, **_HOPPER),
    "NVIDIA H200": _accelerator(_NVIDIA, 4.8, **_HOPPER),
    "TPU v5 lite": _accelerator(_TPU, 0.82, bfloat16=197, int8=394),
    "TPU v5": _accelerator(_TPU, 1.23, bfloat16=229.5, int8=459),
    "TPU v6": _accelerator(_TPU, 1.64, bfloat16=920, float8=920, int8=1840),
    "TPU7x": _accelerator(_TPU, 3.7, bfloat16=1155, float8=2300),
}


def peaks(quick: bool = False) -> Peaks:
    """Those of JAX's default device. quick: measures a CPU with little care.

    Raises ValueError, one line, for an accelerator that no table here has.
    """
    device = jax.devices()[0]
    if device.platform == "cpu":
        return measured((256,), 8, 2) if quick else measured((512, 1024, 2048), 256, 7)
    for name, found in ACCELERATORS.items():
        if device.device_kind.startswith(name):
            return found
    raise ValueError(
        f"no peaks are known of {device.device_kind!r}, only of: {', '.join(ACCELERATORS)}; "
        "add them to v4jax/analysis/roofline.py with their source"
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
