"""Accelerators that need not be here: `compile_for` runs their whole compiler on any Linux machine.

    compiled = compile_for("v5e", f, jax.ShapeDtypeStruct((256, 128), jnp.bfloat16), ...)
    compiled.memory_analysis(), compiled.as_text(), vmem_bytes(compiled)

For TPUs that is XLA and Mosaic out of libtpu (layouts, types, VMEM); for the H100 it is XLA, Triton
and Mosaic GPU out of the CUDA 12 plugin, and ptxas down to SASS. Lowering alone lets broken kernels
pass. Values, races and times still need the device. `make test-aot` has an environment with it all.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

TPUS = ("v5e", "v6e", "v7x")
GPUS = ("h100",)
TARGETS = TPUS + GPUS
FIGURES: list[str] = []  # one line a compilation of the running test; conftest.py prints them

_SLICES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}
_TPU_COMPILER = ("libtpu",)
_GPU_COMPILER = ("jax_cuda12_plugin", "nvidia.cuda_nvcc")
# XLA's GpuTargetConfig. What a block may hold (shared memory, registers) decides whether a kernel
# compiles; clock and bandwidth only guide XLA's own fusions.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  l2_cache_size: 52428800  memory_bandwidth: 3352320000000  device_memory_size: 84929347584
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compile_for(
    target: str, f: Callable, *arguments: Any, spills: bool = True
) -> jax.stages.Compiled:
    """`f` compiled for `target` (of TARGETS).

    f: a function of arrays or of trees of them, jitted or not; what is static is bound beforehand
        (functools.partial). It names its implementation: jax.default_backend() is "cpu" here.
    arguments: trees of jax.ShapeDtypeStruct or arrays. Each lies on one device of the target, but
        for a ShapeDtypeStruct with a sharding of its own, over a mesh of `devices(target)`.
    spills: False makes it an error that a GPU kernel has more values alive than registers.

    Skips the running test where the target's compiler is not installed; fails it there when
    REQUIRE_TARGETS=1 is in the environment, as `make test-aot` has it. Raises what the compiler
    raises, jax.errors.JaxRuntimeError or, on jax 0.10.2 and TPUs, now and then Pallas' MosaicError.
    """
    first = devices(target)[0]

    def place(x: Any) -> jax.ShapeDtypeStruct:
        own = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
        sharding = own or SingleDeviceSharding(first)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    # What lowering reads when it asks for the device: the newest jax derives Triton's compute
    # capability from it, and pltpu.get_tpu_info the size of VMEM. Without it both find the CPU.
    device = AbstractDevice(
        device_kind=first.device_kind,
        num_cores=first.num_cores if target in TPUS else None,
        platform="tpu" if target in TPUS else "gpu",
    )
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        lowered = jax.jit(f).lower(*jax.tree.map(place, arguments))
    options: dict[str, Any] | None = None
    if target in GPUS:
        # XLA's autotuner would time its candidates on the device.
        options = {"xla_gpu_autotune_level": 0}
        options["xla_gpu_fail_ptx_compilation_on_register_spilling"] = not spills
    start = time.perf_counter()
    compiled = lowered.compile(options)
    FIGURES.append(_figures(target, compiled, time.perf_counter() - start))
    return compiled


def vmem_bytes(compiled: jax.stages.Compiled) -> int:
    """VMEM that the largest kernel in `compiled` (for a TPU) takes, windows and scratch.

    XLA's own kernels count too. An operand that XLA moves into VMEM as a whole has no windows.
    """
    configs = re.findall(r'"used_scoped_memory_configs":(\[[^]]*\])', compiled.as_text() or "")
    return max((int(c["size"]) for text in configs for c in json.loads(text)), default=0)


def devices(target: str) -> Sequence[jax.Device]:
    """The devices of a small slice of `target`: four chips of a TPU (v7x: 8 devices), four H100."""
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}, not one of {', '.join(TARGETS)}")
    modules = _TPU_COMPILER if target in TPUS else _GPU_COMPILER
    absent = [name for name in modules if not _installed(name)]
    if absent:
        reason = f"{target}: no {' and no '.join(absent)} here; make test-aot brings its own"
        (pytest.fail if os.environ.get("REQUIRE_TARGETS") == "1" else pytest.skip)(reason)
    return _devices(target)


def _figures(target: str, compiled: jax.stages.Compiled, seconds: float) -> str:
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    if target in TPUS:
        sizes["VMEM"] = vmem_bytes(compiled)
    columns = (f"{name} {size / 2**20:9.3f}" for name, size in sizes.items())
    return f"{target:5}{seconds:6.2f} s  MiB: {'  '.join(columns)}"


@functools.cache
def _devices(target: str) -> Sequence[jax.Device]:
    if target in TPUS:
        return topologies.get_topology_desc(_SLICES[target], "tpu").devices
    options = {"topology": "1x1x4", "target_config": _H100}
    return topologies.get_topology_desc(platform="cuda", **options).devices


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
