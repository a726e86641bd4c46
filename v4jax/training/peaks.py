"""What the makers of accelerators say of them: FLOP/s by dtype, and bytes/s."""

import dataclasses
from collections.abc import Mapping

import jax


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


def published(device: jax.Device) -> Peaks | None:
    """The row for the device; None for a CPU, of which there is none, and for unknown kinds."""
    for name, found in ACCELERATORS.items():
        if device.device_kind.startswith(name):
            return found
    return None
