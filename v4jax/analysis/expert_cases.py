"""Cases of the experts' grouped matmul, over float and packed weights, forward and backward."""

import dataclasses
import functools
import importlib.util
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import expert_matmul
from kernels_pallas.planar import to_planar
from v4jax.analysis.kernel_benchmark import Case, Claim, Side
from v4jax.analysis.roofline import Phase, Work
from v4jax.numerics import MXFP4, bytes_of, dequantize, pack, quantize


@dataclasses.dataclass(frozen=True)
class Experts:
    """tokens T over experts E, weights [E, outputs N, inputs K]; even: as many for each, else
    Dirichlet(4) shares, the fullest expert then has about twice the mean."""

    tokens: int
    experts: int
    inputs: int
    outputs: int
    even: bool = False

    def __str__(self) -> str:
        routing = "even" if self.even else "Dirichlet(4)"
        return (
            f"T {self.tokens:,}, {self.experts} experts, {self.inputs} -> {self.outputs}, "
            f"{routing} routing"
        )

    def arrays(self, dtype) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """x [T, K], w [E, N, K], group_sizes [E], dy [T, N]."""
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = (self.tokens, self.inputs), self.weights, (self.tokens, self.outputs)
        x, w, dy = (jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True))
        rng = np.random.default_rng(0)
        shares = np.ones(self.experts) if self.even else rng.dirichlet([4.0] * self.experts)
        ends = np.round(np.cumsum(shares / shares.sum()) * self.tokens).astype(np.int32)
        return x, w, jnp.asarray(np.diff(ends, prepend=0), jnp.int32), dy

    @property
    def weights(self) -> tuple[int, int, int]:
        return self.experts, self.outputs, self.inputs

    def work(self, dtype: str, fp4: bool, backward: bool = False) -> Work:
        """Forward, and with `backward` dx and dw too."""
        flops = 2.0 * self.tokens * self.inputs * self.outputs
        width = np.dtype(jnp.dtype(dtype)).itemsize
        x, y = (width * self.tokens * n for n in (self.inputs, self.outputs))
        w = bytes_of(self.weights, MXFP4 if fp4 else dtype)
        forward = Phase(flops, x + w + y, dtype)
        if not backward:
            return (forward,)
        master = bytes_of(self.weights, "float32" if fp4 else dtype)
        return forward, Phase(flops, y + w + x, dtype), Phase(flops, y + x + master, dtype)


def _both(forward):
    """(x, w, group_sizes, dy) -> y, dx, dw of forward(x, w, group_sizes)."""

    def run(x, w, group_sizes, dy):
        y, pull = jax.vjp(lambda x, w: forward(x, w, group_sizes), x, w)
        return (y, *pull(dy))

    return run


def _dense(x, w, group_sizes):
    """All tokens by one expert: the same FLOPs, without groups."""
    return x @ w[0].T


def _decoded(x, packed, group_sizes):
    """A float copy of all experts, made in each call."""
    return expert_matmul(x, dequantize(packed, x.dtype), group_sizes)


def _by(implementation: str | None):
    return functools.partial(expert_matmul, implementation=implementation)


def experts_cpu(size: Experts) -> Iterator[Case]:
    """The expert loop beside ragged_dot and beside one dense product."""
    claims = {
        False: (Claim("ours", ("ragged_dot",), 10), Claim("ours", ("one dense matmul",), 1 / 1.5)),
        True: (Claim("ours", ("ragged_dot",), 10), Claim("ours", ("one dense matmul",), 1 / 2.2)),
    }
    forms = {"ours": _by(None), "ragged_dot": _by("ragged"), "one dense matmul": _dense}
    for backward in (False, True):

        def build(backward=backward) -> dict[str, Side]:
            x, w, sizes, dy = size.arrays(jnp.float32)
            work = size.work("float32", False, backward)
            arguments = (x, w, sizes, dy) if backward else (x, w, sizes)
            return {
                name: Side(_both(form) if backward else form, arguments, work)
                for name, form in forms.items()
            }

        what = "forward and backward" if backward else "forward"
        yield Case(f"expert matmul, {what}", f"{size}, float32", claims[backward], build)


def packed_cpu(size: Experts) -> Case:
    """Weights that stay packed in memory, beside resident float32."""

    def build() -> dict[str, Side]:
        x, w, sizes, _ = size.arrays(jnp.float32)
        packed = pack(quantize(w, MXFP4))
        float32, fp4 = (size.work("float32", fp4) for fp4 in (False, True))
        return {
            "float32": Side(_by(None), (x, w, sizes), float32, 1),
            "FP4, decoded whole": Side(_decoded, (x, packed, sizes), fp4, 1),
            "FP4, expert by expert": Side(_by(None), (x, packed, sizes), fp4, 1),
        }

    claims = (
        Claim("FP4, decoded whole", ("float32",), 1 / 1.4, "roofline"),
        Claim("FP4, expert by expert", ("float32",), 1 / 2.6, "roofline"),
    )
    return Case("expert matmul, packed weights", str(size), claims, build)


def regime_cpu(tokens_an_expert: int, experts: int, inputs: int, outputs: int) -> Case:
    """How many tokens an expert gets decides what FP4 weights cost."""
    size = Experts(tokens_an_expert * experts, experts, inputs, outputs, even=True)

    def build() -> dict[str, Side]:
        x, w, sizes, _ = size.arrays(jnp.float32)
        packed = pack(quantize(w, MXFP4))
        float32, fp4 = (size.work("float32", fp4) for fp4 in (False, True))
        return {
            "float32": Side(_by(None), (x, w, sizes), float32),
            "FP4": Side(_by(None), (x, packed, sizes), fp4),
            "one dense matmul": Side(_dense, (x, w, sizes), float32),
        }

    claims = (
        Claim("FP4", ("float32",)),
        Claim("float32", ("one dense matmul",)),
    )
    return Case(f"expert matmul, m = {tokens_an_expert} an expert", str(size), claims, build)


def experts_gpu(size: Experts, reach: float | None, backward: bool) -> Case:
    """Packed FP4 weights beside the fastest grouped matmul of BF16 weights at hand."""
    forms = {"ragged_dot": _by("ragged"), "own, BF16": _by("gpu")}
    if not backward and importlib.util.find_spec("tokamax"):
        forms["tokamax"] = _tokamax

    def build() -> dict[str, Side]:
        x, w, sizes, dy = size.arrays(jnp.bfloat16)
        last = (dy,) if backward else ()
        bf16, fp4 = (size.work("bfloat16", fp4, backward) for fp4 in (False, True))
        sides = {
            name: Side(_both(form) if backward else form, (x, w, sizes, *last), bf16, 1)
            for name, form in forms.items()
        }
        master = w.astype(jnp.float32) if backward else None
        packed = to_planar(pack(quantize(w, MXFP4)))
        if backward:
            sides["FP4"] = Side(_trained, (x, packed, sizes, dy, master), fp4, 1)
        else:
            sides["FP4"] = Side(_by(None), (x, packed, sizes), fp4, 1)
        return sides

    what = "forward and backward" if backward else "forward"
    # With few tokens bytes are the limit, which formats move; with many, products of BF16 in both.
    few = not backward and size.tokens <= 64 * size.experts
    claim = Claim("FP4", tuple(forms), reach, "roofline" if few else "measured")
    return Case(f"expert matmul, {what}", f"{size}, BF16 activations", (claim,), build)


def _trained(x, packed, sizes, dy, master):
    """Forward and backward over packed weights, whose gradient goes to the master."""
    forward = lambda x, w, sizes: expert_matmul(x, packed, sizes, master=w)  # noqa: E731
    return _both(forward)(x, master, sizes, dy)


def _tokamax(x, w, group_sizes):
    import tokamax

    return tokamax.ragged_dot(x, jnp.swapaxes(w, 1, 2), group_sizes)
