"""What `experiments/benchmark_kernels.py` times, by platform."""

from v4jax.analysis.expert_cases import Experts, experts_cpu, experts_gpu, packed_cpu, regime_cpu
from v4jax.analysis.kernel_benchmark import Case
from v4jax.analysis.selector_cases import Selector, selector_cpu, selector_gpu

REGIMES = (1, 4, 16, 64, 256, 1024)


def cpu_cases(quick: bool = False) -> list[Case]:
    """Everything for a CPU. quick: of tiny shapes, whose numbers mean nothing."""
    if quick:
        size = Experts(96, 4, 64, 32)
        return [
            *experts_cpu(size),
            packed_cpu(Experts(8, 4, 64, 32)),
            regime_cpu(4, 4, 64, 32),
            selector_cpu(Selector(32, 64, 2, 32, 8)),
        ]
    return [
        *experts_cpu(Experts(4096, 16, 256, 256)),
        packed_cpu(Experts(64, 16, 512, 512)),
        selector_cpu(Selector(2048, 2048, 16, 128, 512)),
        selector_cpu(Selector(2048, 2048, 16, 128, 512, causal=True)),
        *(regime_cpu(m, 16, 256, 256) for m in REGIMES),
    ]


def gpu_cases(quick: bool = False) -> list[Case]:
    """Everything for a GPU: shapes of V4-Flash, with 32 of its experts. quick: as above."""
    if quick:
        size = Experts(64, 4, 64, 64, even=True)
        return [
            *(experts_gpu(size, None, backward) for backward in (False, True)),
            selector_gpu(Selector(16, 128, 2, 32, 16)),
        ]
    gate_up, down = (4096, 4096), (2048, 4096)
    return [
        *(
            experts_gpu(Experts(m * 32, 32, *shape, even=True), reach, backward)
            for shape in (gate_up, down)
            for m in REGIMES
            for backward, reach in ((False, 2.5 if m <= 64 else None), (True, 0.9))
            if not backward or m == 1024
        ),
        *(
            selector_gpu(Selector(2048, entries, 64, 128, top_k))
            for entries in (8192, 65536)
            for top_k in (512, 1024)
        ),
    ]
