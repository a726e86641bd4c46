"""Cases of the indexer's selector: query and key rounded, scored, the best entries selected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import index_scores, index_select, select_topk
from kernels_pallas.select_topk import Output
from v4jax.analysis.kernel_benchmark import Case, Claim, Side
from v4jax.analysis.roofline import Phase, Work


@dataclasses.dataclass(frozen=True)
class Selector:
    """queries T, entries S, heads I of width J, top_k. causal: query t sees entries up to t, else
    each sees all."""

    queries: int
    entries: int
    heads: int
    width: int
    top_k: int
    causal: bool = False

    def __str__(self) -> str:
        seen = "causal" if self.causal else "all visible"
        return (
            f"T {self.queries:,}, S {self.entries:,}, {self.heads} heads x {self.width}, "
            f"k {self.top_k:,}, {seen}"
        )

    @property
    def offset(self) -> int:
        return 0 if self.causal else self.entries

    def arrays(self, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
        """q [1, T, I, J], k [1, S, J], w [1, T, I]."""
        keys = jax.random.split(jax.random.key(0), 3)
        q = jax.random.normal(keys[0], (1, self.queries, self.heads, self.width), dtype)
        k = jax.random.normal(keys[1], (1, self.entries, self.width), dtype)
        return q, k, jax.random.normal(keys[2], q.shape[:3], jnp.float32)

    def flops(self) -> float:
        pairs = self.queries * self.entries
        if self.causal:
            pairs = sum(min(t + 1, self.entries) for t in range(self.queries))
        return 2.0 * self.heads * self.width * pairs

    def separate(self, dtype: str) -> Work:
        """Float32 scores are written, then read once by the selection of indices."""
        q, k, w = self._bytes(dtype)
        scores, out = 4.0 * self.queries * self.entries, 4.0 * self.queries * self.top_k
        return Phase(self.flops(), q + k + w + scores, dtype), Phase(0, scores + out)

    def fused(self, dtype: str, compute: str, output: str) -> Work:
        """Query and key of `dtype` are rounded; then scored and selected, no score written."""
        q, k, w = self._bytes(dtype)
        q_rounded, k_rounded, _ = self._bytes(compute)
        rounded = q_rounded + k_rounded
        pairs = self.queries * self.entries
        listed = 4 * self.queries * self.top_k
        out = {
            "mask": pairs, "threshold": 8 * self.queries, "indices": listed, "ascending": listed
        }  # fmt: skip
        phases = Phase(self.flops(), rounded + w + out[output], compute)
        return (phases,) if dtype == compute else (Phase(0, q + k + rounded), phases)

    def _bytes(self, dtype: str) -> tuple[float, float, float]:
        width = 1 if dtype == "float8" else np.dtype(jnp.dtype(dtype)).itemsize
        q = float(width) * self.queries * self.heads * self.width
        return q, float(width) * self.entries * self.width, 4.0 * self.queries * self.heads


CPU_OUTPUTS: tuple[Output, ...] = ("mask", "threshold", "indices", "ascending")


def selector_cpu(size: Selector) -> Case:
    """FP4 query and key, BF16 or float32 scores, beside einsum and lax.top_k in float32.

    And float32 throughout, by the same operation: what FP4 itself has to do with it.
    """
    forms: dict[str, tuple[Output, str | None, str]] = {
        f"{output}: {label}": (output, fmt, dtype)
        for label, fmt, dtype in (
            ("FP4 QK, BF16 scores", "mxfp4", "bfloat16"),
            ("FP4 QK, float32 scores", "mxfp4", "float32"),
            ("float32 QK and scores", None, "float32"),
        )
        for output in CPU_OUTPUTS
    }

    def baseline(q, k, w):
        products = jnp.einsum("BTIJ,BSJ->BTIS", q, k)
        scores = jnp.einsum("BTIS,BTI->BTS", jax.nn.relu(products), w)
        if size.causal:
            scores = jnp.where(jnp.tri(size.queries, size.entries, dtype=bool), scores, -jnp.inf)
        return jax.lax.top_k(scores, size.top_k)

    def build() -> dict[str, Side]:
        arrays = size.arrays(jnp.float32)
        sides = {"einsum, lax.top_k": Side(baseline, arrays, size.separate("float32"))}
        for name, (output, fmt, dtype) in forms.items():
            # BF16 holds FP4 values exactly.
            work = size.fused("float32", "bfloat16" if fmt else "float32", output)
            sides[name] = Side(_selects(size, output, fmt, dtype), arrays, work)
        return sides

    reach = {"mask": 2.5, "threshold": 2.5, "indices": 2.0, "ascending": 2.0}
    claims = tuple(
        Claim(name, ("einsum, lax.top_k",), reach[output] if fmt else None)
        for name, (output, fmt, _) in forms.items()
    )
    return Case("selector: quantize, score, select", str(size), claims, build)


def _selects(size: Selector, output: Output, qk_format: str | None, score_dtype: str):
    def run(q, k, w):
        return index_select(
            q, k, w, size.top_k, 1,
            qk_format=qk_format, score_dtype=score_dtype, output=output, offset=size.offset,
        )  # fmt: skip

    return run


def selector_gpu(size: Selector) -> Case:
    """FP4 query and key with BF16 scores, beside BF16 query and key, float32 scores, a top-k."""

    def separate(implementation):
        def run(q, k, w):
            scores = index_scores(q, k, w, 1, offset=size.offset)
            return select_topk(scores, size.top_k, implementation=implementation)

        return run

    baselines = {"BF16 QK, lax.top_k": "top_k", "BF16 QK, own top-k": None}
    outputs: tuple[Output, ...] = ("indices", "mask")

    def build() -> dict[str, Side]:
        arrays = size.arrays(jnp.bfloat16)
        work = size.separate("bfloat16")
        sides = {name: Side(separate(by), arrays, work) for name, by in baselines.items()}
        for output in outputs:
            fused = size.fused("bfloat16", "float8", output)
            sides[f"FP4, {output}"] = Side(
                _selects(size, output, "mxfp4", "bfloat16"), arrays, fused
            )
        return sides

    claims = tuple(Claim(f"FP4, {output}", tuple(baselines), 2.0, "roofline") for output in outputs)
    return Case("selector: quantize, score, select", str(size), claims, build)
