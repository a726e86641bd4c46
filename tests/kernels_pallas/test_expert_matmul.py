"""Every implementation of the experts' grouped matmul against a float64 loop."""

from __future__ import annotations

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas import expert_matmul
from kernels_pallas.dispatch import compiling_for
from kernels_pallas.expert_matmul_cpu import SMALL, TILE
from kernels_pallas.planar import to_planar
from tests.jax_model import quick_jit
from tests.kernels_pallas.expert_backend import expected
from v4jax.numerics import MXFP4_FLOOR, NVFP4, dequantize, pack, quantize

expert_matmul_module = importlib.import_module("kernels_pallas.expert_matmul")
IMPLEMENTATIONS = ("loop", "ragged", "reference")
KINDS = {"quantized": lambda q: q, "packed": pack, "planar": lambda q: to_planar(pack(q))}

# Group sizes and rows in x: empty experts, one that takes all, tails beside the tile's size, rows
# that belong to no expert.
GROUPS = {
    "ragged": ([3, 0, TILE + 6, 5], None),
    "one takes all": ([0, 2 * TILE + 1, 0], None),
    "whole tiles": ([TILE, TILE], None),
    "a row short, a row more": ([TILE - 1, TILE + 1, 1], None),
    "fewer than rows": ([5, 0, TILE, 2], 2 * TILE),
    "none": ([0, 0], 3),
    "no rows at all": ([0, 0], 0),
    "one expert": ([5], 5),
    "fewer rows than a tile": ([1, 2], 4),
    "the last tile moved back": ([TILE, 3, SMALL - 1, 2], None),
}
DEPTH, WIDTH = 12, 7
FP4_DEPTH = 96  # whole blocks, and no whole pair of them


@functools.partial(quick_jit, static_argnums=(4, 5))
def run(x, w, sizes, g, implementation, of_w=True):
    """y, dx and, unless the weights are packed, dw of sum(g * y)."""
    if of_w:
        y, pull = jax.vjp(
            lambda x, w: expert_matmul(x, w, sizes, implementation=implementation), x, w
        )
    else:
        y, pull = jax.vjp(lambda x: expert_matmul(x, w, sizes, implementation=implementation), x)
    return y, *pull(g)


def arrays(sizes, total, depth, dtype, seed=0):
    """x, w, sizes, g."""
    rng = np.random.default_rng(seed)
    shapes = ((total, depth), (len(sizes), WIDTH, depth), (total, WIDTH))
    x, w, g = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    return x, w, jnp.asarray(sizes, jnp.int32), g


def check(actual, x, w, sizes, g, dtype):
    exact = expected(*(np.asarray(a, np.float64) for a in (x, w)), sizes, np.asarray(g, np.float64))
    tolerance = 1e-5 if dtype == "float32" else 2**-8
    for got, value in zip(actual, exact, strict=False):
        assert got.dtype == dtype
        scale = np.abs(value).max(initial=1e-30)
        np.testing.assert_allclose(
            np.asarray(got, np.float64), value, rtol=0, atol=tolerance * scale
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("implementation", [None, *IMPLEMENTATIONS])
def test_value_and_gradients(implementation, name, dtype):
    sizes, total = GROUPS[name]
    total = sum(sizes) if total is None else total
    x, w, group_sizes, g = arrays(sizes, total, DEPTH, dtype)
    check(run(x, w, group_sizes, g, implementation), x, w, sizes, g, dtype)


@settings(max_examples=40)
@given(st.data())
def test_any_grouping(data):
    """Of 200 rows, which end inside a tile; the loop skips experts without rows."""
    total, experts = 200, 5
    cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=5, max_size=5)))
    sizes = np.diff([0, *cuts]).tolist()
    assert len(sizes) == experts and sum(sizes) <= total
    x, w, group_sizes, g = arrays(sizes, total, DEPTH, "float32")
    check(run(x, w, group_sizes, g, "loop"), x, w, sizes, g, "float32")


def test_sizes_may_be_traced():
    x, w = jnp.ones((4, 3)), jnp.ones((2, 5, 3)) * jnp.asarray([1.0, 2.0])[:, None, None]
    run = jax.jit(expert_matmul)
    for sizes in ([1, 3], [4, 0], [0, 2]):
        rows = [3.0] * sizes[0] + [6.0] * sizes[1]
        rows += [0.0] * (4 - len(rows))
        np.testing.assert_allclose(run(x, w, jnp.asarray(sizes))[:, 0], rows)


def test_weights_are_rounded_to_the_type_of_x_and_their_gradient_is_not():
    """BF16 tokens over float32 masters: dw is a float32 sum, not one rounded to BF16."""
    sizes = [40, 0, 90]
    x, w, group_sizes, g = arrays(sizes, 130, DEPTH, "bfloat16")
    master = w.astype(jnp.float32) + 2.0**-12  # rounds to w, or next to it
    y, dx, dw = run(x, master, group_sizes, g, "loop")
    rounded = master.astype(jnp.bfloat16)
    assert y.dtype == dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
    same = run(x, rounded, group_sizes, g, "loop")
    assert np.array_equal(y, same[0]) and np.array_equal(dx, same[1])
    exact = expected(
        *(np.asarray(a, np.float64) for a in (x, rounded)), sizes, np.asarray(g, float)
    )
    np.testing.assert_allclose(dw, exact[2], rtol=0, atol=1e-6 * np.abs(exact[2]).max())


# ---- packed weights ----


@pytest.fixture(scope="module")
def fp4():
    """x, float weights, their MXFP4, sizes, g; an empty expert, a block of zeros, spare rows."""
    sizes = [3, 0, TILE + 6, 5]
    x, w, group_sizes, g = arrays(sizes, sum(sizes) + 7, FP4_DEPTH, "float32")
    w = w.at[0, 0, :32].set(0.0)
    return x, w, quick_jit(quantize)(w), group_sizes, g


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_packed_weights_compute_what_their_values_do_bit_for_bit(fp4, implementation, kind, dtype):
    x, _, q, sizes, g = fp4
    x, g, packed = x.astype(dtype), g.astype(dtype), KINDS[kind](q)
    y, dx, _ = run(x, dequantize(q), sizes, g, implementation)
    found = run(x, packed, sizes, g, implementation, False)
    assert found[0].dtype == found[1].dtype == dtype
    assert np.array_equal(found[0], y) and np.array_equal(found[1], dx)


@pytest.mark.parametrize("kind", ["packed", "planar"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_master_gets_the_gradient_of_the_float_weights(fp4, implementation, kind):
    x, w, q, sizes, g = fp4
    packed = KINDS[kind](q)

    def pulled(
        x, master, packed
    ):  # not closed over: XLA of jax 0.10.2 folds constants of FP4 wrong
        call = functools.partial(expert_matmul, implementation=implementation)
        y, pull = jax.vjp(lambda x, m: call(x, packed, sizes, master=m), x, master)
        return y, *pull(g)

    y, dx, dw = run(x, dequantize(q), sizes, g, implementation)
    found = quick_jit(pulled)(x, w, packed)
    for a, b in zip(found, (y, dx, dw), strict=True):
        # Of two programs of XLA's own products the last bits may differ.
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if implementation == "loop" else 1e-4)
    assert found[2].dtype == jnp.float32 and np.array_equal(
        found[2][1], np.zeros((WIDTH, FP4_DEPTH))
    )
    nothing = quick_jit(pulled)(x, jnp.full_like(w, jnp.nan), packed)  # the master is never read
    assert all(np.array_equal(a, b) for a, b in zip(found, nothing, strict=True))


@pytest.mark.parametrize("with_master", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_residuals_hold_no_float_weights(fp4, kind, with_master):
    x, w, q, sizes, _ = fp4
    packed = KINDS[kind](q)

    def residuals(x, packed, w):
        master = w if with_master else None
        return jax.vjp(lambda x, m: expert_matmul(x, packed, sizes, master=m), x, master)[1]

    kept = jax.tree.leaves(jax.eval_shape(residuals, x, packed, w))
    bytes_kept = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
    floats = [leaf for leaf in kept if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert [leaf.shape for leaf in floats if leaf.size] == [x.shape]
    # 96 columns of FP4, 128 where planes hold pairs of blocks.
    assert bytes_kept < x.nbytes + w.size * 0.75 + 100


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_pallas_kernels_plug_in(name):
    """Values, dx and the master's gradient through the public operation, in the interpreter."""
    sizes = [3, 0, 9]
    x, w, group_sizes, g = arrays(sizes, 14, FP4_DEPTH, "float32")
    packed = pack(quantize(w))

    def pulled(x, master):
        call = functools.partial(expert_matmul, implementation=name, interpret=True)
        y, pull = jax.vjp(lambda x, m: call(x, packed, group_sizes, master=m), x, master)
        return y, *pull(g)

    check(jax.jit(pulled)(x, w), x, dequantize(packed), sizes, g, "float32")


def test_the_choice_is_the_platforms_and_names_what_cannot_run():
    x, w = jnp.zeros((4, 3), jnp.float16), jnp.zeros((2, 5, 3), jnp.float16)
    candidates = expert_matmul_module._candidates
    sizes = jnp.zeros(2, jnp.int32)
    assert next(iter(candidates(x, w, sizes, False))) == "loop"
    for name in ("tpu", "gpu"):
        with compiling_for(name):
            found = candidates(x, w, sizes, False)
            assert found[name] == "x is float16, allowed: bfloat16, float32"
            assert candidates(*(a.astype(jnp.bfloat16) for a in (x, w)), sizes, False)[name] is None
            assert [key for key, reason in found.items() if reason is None][0] == "ragged"


# ---- transformations ----


def test_vmap_scan_and_remat(fp4):
    x, w, q, sizes, g = fp4
    packed = pack(q)
    stacked = jnp.stack([x, 2 * x]), jnp.stack([sizes, sizes[::-1]]), jnp.stack([g, g])

    def loss(x, w, sizes, g):
        return jnp.sum(g * expert_matmul(x, packed, sizes, master=w))

    gradient = jax.grad(loss, (0, 1))
    wanted = [quick_jit(gradient)(x, w, s, g) for x, s, g in zip(*stacked, strict=True)]
    wanted = jax.tree.map(lambda *a: np.stack(a), *wanted)

    def scanned(w, each):
        return w, jax.grad(jax.checkpoint(loss), (0, 1))(each[0], w, *each[1:])

    mapped = quick_jit(jax.vmap(gradient, (0, None, 0, 0)))(stacked[0], w, *stacked[1:])
    for found in (mapped, quick_jit(lambda w, s: jax.lax.scan(scanned, w, s)[1])(w, stacked)):
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_shard_map_over_tokens_gathers_none(fp4, packed):
    """Eight devices with tokens of their own and all experts: only dw is summed over them."""
    _, w, q, _, _ = fp4
    each, devices = 24, 8
    x, _, _, g = arrays([0], each * devices, FP4_DEPTH, "float32", 1)
    sizes = jnp.asarray(
        np.random.default_rng(2).multinomial(each - 3, [0.25] * 4, devices), jnp.int32
    )
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    shard, whole = PartitionSpec("data"), PartitionSpec()

    def local(x, weights, w, sizes):
        return expert_matmul(x, weights, sizes, master=w) if packed else expert_matmul(x, w, sizes)

    def gradients(x, weights, w, sizes, g):
        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=(shard, whole, whole, shard), out_specs=shard
        )
        loss = lambda x, w: jnp.sum(g * mapped(x, weights, w, sizes.reshape(-1)))  # noqa: E731
        return jax.grad(loss, (0, 1))(x, w)

    weights = pack(q)
    on_mesh = jax.sharding.NamedSharding(mesh, shard)
    x_on, g_on, sizes_on = (jax.device_put(a, on_mesh) for a in (x, g, sizes))
    compiled = jax.jit(gradients).lower(x_on, weights, w, sizes_on, g_on).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    dx, dw = jax.jit(gradients)(x_on, weights, w, sizes_on, g_on)
    values, total = dequantize(q) if packed else w, np.zeros(w.shape)
    for i in range(devices):
        rows = slice(i * each, (i + 1) * each)
        args = (np.asarray(a, np.float64) for a in (x[rows], values))
        exact = expected(*args, sizes[i].tolist(), np.asarray(g[rows], np.float64))
        np.testing.assert_allclose(dx[rows], exact[1], rtol=0, atol=1e-4)
        total += exact[2]
    np.testing.assert_allclose(dw, total, rtol=0, atol=1e-4)


def test_forward_mode_is_for_the_implementations_without_a_rule_of_their_own(fp4):
    x, w, q, sizes, g = fp4

    def tangent(implementation):
        f = functools.partial(expert_matmul, w=pack(q), group_sizes=sizes)
        return jax.jvp(lambda x, m: f(x, implementation=implementation, master=m), (x, w), (x, w))[
            1
        ]

    y = expert_matmul(x, pack(q), sizes) + expert_matmul(x, w, sizes)
    np.testing.assert_allclose(tangent("reference"), y, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="forward-mode"):
        tangent("loop")


# ---- errors ----


@pytest.mark.parametrize(
    ("shapes", "implementation", "message"),
    [
        (((4, 3), (2, 5, 4), (2,)), None, r"\(4, 3\), \(2, 5, 4\), \(2,\)"),
        (((4, 3), (2, 5, 3), (3,)), None, "do not fit"),
        (((4, 3), (2, 5, 3), (2,)), "fast", "implementation='fast', allowed: None, loop, ragged"),
        (
            ((4, 3), (2, 5, 3), (2,)),
            "tpu",
            "needs a TPU, this is cpu; possible: None, loop, ragged",
        ),
        (
            ((4, 3), (2, 5, 3), (2,)),
            "gpu",
            "needs a GPU, this is cpu; possible: None, loop, ragged",
        ),
    ],
)
def test_bad_input_ends_in_one_line(shapes, implementation, message):
    x, w = jnp.zeros(shapes[0]), jnp.zeros(shapes[1])
    with pytest.raises(ValueError, match=message) as error:
        expert_matmul(x, w, jnp.zeros(shapes[2], jnp.int32), implementation=implementation)
    assert "\n" not in str(error.value) and str(error.value).startswith("expert_matmul: ")


def test_nan_of_a_neighbour_stays_out_of_an_experts_gradient():
    """Tiles hold rows of other experts, and of nobody."""
    x, w, sizes, dy = arrays([9, 6, 0, 3], 24, 8, "float32")
    bad = x.at[9:15].set(jnp.nan).at[18:].set(jnp.nan)
    dw, clean = (run(x, w, sizes, dy, "loop")[2] for x in (bad, x))
    np.testing.assert_array_equal(dw[jnp.asarray([0, 2, 3])], clean[jnp.asarray([0, 2, 3])])
    assert np.isnan(dw[1]).any()


def test_weights_of_numpy():
    x, sizes = jnp.ones((4, 8)), jnp.asarray([1, 3], jnp.int32)
    for by in IMPLEMENTATIONS:
        found = expert_matmul(x, np.ones((2, 3, 8), np.float32), sizes, implementation=by)
        np.testing.assert_array_equal(found, 8.0)


def test_bad_types_end_in_one_line(fp4):
    x, w, q, sizes, _ = fp4
    cases = [
        ("packed weights are nvfp4, allowed: mxfp4", (x, pack(quantize(w, NVFP4)), sizes), {}),
        ("w is of no expert, allowed: 1 or more", (x, w[:0], sizes[:0]), {}),
        ("group_sizes is float32, allowed: int32", (x, w, sizes.astype(jnp.float32)), {}),
        ("x is int32, allowed: a floating-point type", (x.astype(jnp.int32), w, sizes), {}),
        ("master is for packed weights", (x, w, sizes), {"master": w}),
        ("master is bfloat16", (x, q, sizes), {"master": w.astype(jnp.bfloat16)}),
        (r"master is float32 \(3, 7, 96\), allowed", (x, q, sizes), {"master": w[:3]}),
    ]
    for message, args, kwargs in cases:
        with pytest.raises(ValueError, match=f"^expert_matmul: {message}") as error:
            expert_matmul(*args, **kwargs)
        assert "\n" not in str(error.value)
    expert_matmul(x, quantize(w, MXFP4_FLOOR), sizes)  # another rule, the same bits
