"""y_e = x_e w_e^T for tokens sorted by expert, over float weights or FP4 ones that stay packed.

    forward    y_e  = x_e  ŵ_e^T        ŵ the weights as they are, or as their bytes decode
    backward   dx_e = dy_e ŵ_e          the very ŵ of the forward
               dw_e = dy_e^T x_e        in float32; of packed weights, straight through to `master`

Implementations:
    loop        a loop over experts and, inside, over tiles of their tokens; packed experts are
                decoded one at a time. The fastest on CPU: `lax.ragged_dot` is lowered there to a
                dense product over all experts.
    tpu, gpu    Pallas kernels; packed weights are decoded in tiles, on the chip.
    ragged      `lax.ragged_dot`; packed weights are decoded as a whole.
    reference   each expert's product over all tokens, masked: reads like the equation.

Forward-mode differentiation (jvp, hessian) is for ragged and reference; the others have a reverse
rule of their own and say so.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas import expert_matmul_cpu
from kernels_pallas.compat import summed_like
from kernels_pallas.dispatch import choose, needs, platform
from kernels_pallas.planar import Planar, to_packed, to_planar
from v4jax.numerics import Packed, Quantized, dequantize, is_mxfp4, pack


def expert_matmul(
    x: Array,
    w: Array | Quantized | Packed | Planar,
    group_sizes: Array,
    *,
    implementation: str | None = None,
    master: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Grouped matmul: x [T, K] sorted by expert, w [E, N, K], group_sizes int32 [E] -> [T, N].

    Expert e's rows are the group_sizes[e] after those of the experts before it; rows past
    sum(group_sizes) are 0. Result in x's dtype, accumulated in float32. Differentiable in x and in
    float weights.

    w: float (rounded to x's dtype, its gradient from float32 sums), or MXFP4 as
        `quantize`, `pack` or `to_planar` give it.
    implementation: one of the above; None takes the best for the platform.
    master: float32 [E, N, K], for packed weights alone: not read, and receives their gradient
        straight through. Without it packed weights are frozen.
    interpret: run the Pallas kernels of tpu and gpu in the interpreter, on any platform.

    Raises ValueError, one line, on shapes that do not fit, an unknown implementation, or one that
    cannot do this.
    """
    w = pack(w) if isinstance(w, Quantized) else w
    w = w if isinstance(w, (Packed, Planar)) else jnp.asarray(w)
    _check(x, w, group_sizes, master)
    name = choose("expert_matmul", implementation, _candidates(x, w, group_sizes, interpret))
    if name in ("ragged", "reference"):
        if not isinstance(w, Array):
            decoded = dequantize(to_packed(w) if isinstance(w, Planar) else w)
            w = decoded if master is None else _straight_through(master, decoded)
        return {"ragged": _ragged, "reference": _reference}[name](x, w.astype(x.dtype), group_sizes)
    if isinstance(w, Packed) and name in ("tpu", "gpu"):
        w = to_planar(w)
    return _matmul(_backend(name, interpret), x, w, master, group_sizes)


def _shape(w) -> tuple[int, ...]:
    """[E, N, K] of float, Packed or Planar weights."""
    return (*w.codes.shape[:-1], 2 * w.codes.shape[-1]) if isinstance(w, Packed) else w.shape


def _check(x, w, group_sizes, master) -> None:
    if isinstance(w, (Packed, Planar)) and not is_mxfp4(w.format):
        raise ValueError(f"expert_matmul: packed weights are {w.format.name}, allowed: mxfp4")
    shape = _shape(w)
    if x.ndim != 2 or len(shape) != 3 or x.shape[1] != shape[2] or group_sizes.shape != shape[:1]:
        raise ValueError(
            f"expert_matmul: x [T, K], w [E, N, K], group_sizes [E] do not fit: "
            f"{x.shape}, {shape}, {group_sizes.shape}"
        )
    if not shape[0]:
        raise ValueError("expert_matmul: w is of no expert, allowed: 1 or more")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"expert_matmul: x is {x.dtype}, allowed: a floating-point type")
    if group_sizes.dtype != jnp.int32:
        raise ValueError(f"expert_matmul: group_sizes is {group_sizes.dtype}, allowed: int32")
    if master is None:
        return
    if not isinstance(w, (Packed, Planar)):
        raise ValueError("expert_matmul: master is for packed weights; these are float themselves")
    if master.shape != shape or master.dtype != jnp.float32:
        raise ValueError(
            f"expert_matmul: master is {master.dtype} {master.shape}, allowed: float32 {shape}"
        )


def _candidates(x, w, group_sizes, interpret) -> dict[str, str | None]:
    """Implementation -> None or why it cannot run, best first."""
    kernels: dict[str, str | None] = {name: needs(name, interpret) for name in ("tpu", "gpu")}
    for name, reason in kernels.items():
        if reason is None:
            planar = jax.eval_shape(to_planar, w) if isinstance(w, Packed) else w
            kernels[name] = _module(name).refusal(x, planar, group_sizes)
    if platform() == "cpu":
        return {"loop": None, "ragged": None, "reference": None} | kernels
    return kernels | {"ragged": None, "loop": None, "reference": None}


# ---- references ----


def _ragged(x, w, group_sizes):
    rhs = jnp.swapaxes(w, 1, 2)
    y = jax.lax.ragged_dot(x, rhs, group_sizes, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(x.shape[0])[:, None] < jnp.sum(group_sizes), y, 0).astype(x.dtype)


def _reference(x, w, group_sizes):
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
    of = jax.nn.one_hot(expert, w.shape[0], dtype=jnp.float32)
    y = jnp.einsum("TK,ENK,TE->TN", x.astype(jnp.float32), w.astype(jnp.float32), of)
    return y.astype(x.dtype)


@jax.custom_jvp
def _straight_through(master, decoded):
    """The decoded weights, whose derivative is the master's."""
    return decoded


_straight_through.defjvp(lambda primals, tangents: (primals[1], tangents[0]))


# ---- back ends ----


@dataclasses.dataclass(frozen=True)
class Backend:
    """rows(x, w, group_sizes, transpose=) and weights(dy, x, group_sizes): products of one kind."""

    rows: Callable[..., Array]
    weights: Callable[..., Array]


@functools.cache
def _backend(name: str, interpret: bool) -> Backend:
    module = _module(name)
    return Backend(
        *(functools.partial(f, interpret=interpret) for f in (module.rows, module.weights))
    )


def _module(name: str):
    """The file of a back end, imported when it is first used: Pallas takes long to import."""
    if name == "loop":
        return expert_matmul_cpu
    return importlib.import_module(f"kernels_pallas.expert_matmul_{name}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(backend, x, w, master, group_sizes):
    """w: float, Packed or Planar."""
    return backend.rows(x, _in_dtype(w, x.dtype), group_sizes)


def _forward(backend, x, w, master, group_sizes):
    # No float copy of packed weights; of the master only its type, in an empty array.
    trained = None if master is None else master[:0]
    return _matmul(backend, x, w, master, group_sizes), (x, w, trained, group_sizes)


def _backward(backend, residuals, dy):
    x, w, trained, group_sizes = residuals
    dx = summed_like(backend.rows(dy, _in_dtype(w, x.dtype), group_sizes, transpose=True), x)
    primal = trained if isinstance(w, (Packed, Planar)) else w
    if primal is None:
        return dx, None, None, None
    dw = summed_like(backend.weights(dy, x, group_sizes), primal).astype(primal.dtype)
    return (dx, dw, None, None) if primal is w else (dx, None, dw, None)


_matmul.defvjp(_forward, _backward)


def _in_dtype(w, dtype):
    return w.astype(dtype) if isinstance(w, Array) else w
