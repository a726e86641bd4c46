"""Muon and AdamW against float64 numpy, and the table of leaves against one written by hand."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from v4jax.training import optimizer
from v4jax.training.muon import COEFFICIENTS, newton_schulz, scale_by_muon
from v4jax.training.optimizer import (
    OptimizerConfig,
    build_optimizer,
    describe,
    label,
    label_tree,
)

# D 12, N 4, H 8, R 10, G 2 groups of 3, M 2, E 3, F 5, V 20, I 2, J 6, U 3 repeats.
MODEL = types.SimpleNamespace(hc_mult=2, o_groups=2, head_dim=8)
REPEATS = 3

# suffix: (shape in one block, group, decay, parts: the rows of each independent matrix)
EVERY_BLOCK = {
    "input_layernorm/weight": ((12,), "adamw", False, None),
    "post_attention_layernorm/weight": ((12,), "adamw", False, None),
    "attn_hc/fn": ((8, 24), "muon", True, (2, 2, 4)),
    "attn_hc/base": ((8,), "adamw", False, None),
    "attn_hc/scale": ((3,), "adamw", False, None),
    "ffn_hc/fn": ((8, 24), "muon", True, (2, 2, 4)),
    "ffn_hc/base": ((8,), "adamw", False, None),
    "ffn_hc/scale": ((3,), "adamw", False, None),
    "self_attn/q_a_proj/weight": ((10, 12), "muon", True, (10,)),
    "self_attn/q_a_norm/weight": ((10,), "adamw", False, None),
    "self_attn/q_b_proj/weight": ((32, 10), "muon", True, (32,)),
    "self_attn/kv_proj/weight": ((8, 12), "muon", True, (8,)),
    "self_attn/kv_norm/weight": ((8,), "adamw", False, None),
    "self_attn/o_a_proj/weight": ((6, 16), "muon", True, (3, 3)),
    "self_attn/o_b_proj/weight": ((12, 6), "muon", True, (12,)),
    "self_attn/sinks": ((4,), "adamw", False, None),
    "mlp/gate/weight": ((3, 12), "muon", True, (3,)),
    "mlp/experts/gate_up_proj": ((3, 10, 12), "muon", True, (5, 5)),
    "mlp/experts/down_proj": ((3, 12, 5), "muon", True, (12,)),
    "mlp/shared_experts/gate_proj/weight": ((5, 12), "muon", True, (5,)),
    "mlp/shared_experts/up_proj/weight": ((5, 12), "muon", True, (5,)),
    "mlp/shared_experts/down_proj/weight": ((12, 5), "muon", True, (12,)),
}
HCA = {
    "self_attn/compressor/kv_proj/weight": ((8, 12), "muon", True, (8,)),
    "self_attn/compressor/gate_proj/weight": ((8, 12), "muon", True, (8,)),
    "self_attn/compressor/position_bias": ((7, 8), "adamw", False, None),
    "self_attn/compressor/kv_norm/weight": ((8,), "adamw", False, None),
}
INDEXER = {
    "self_attn/compressor/indexer/kv_proj/weight": ((12, 12), "muon", True, (6, 6)),
    "self_attn/compressor/indexer/gate_proj/weight": ((12, 12), "muon", True, (6, 6)),
    "self_attn/compressor/indexer/position_bias": ((4, 12), "adamw", False, None),
    "self_attn/compressor/indexer/kv_norm/weight": ((6,), "adamw", False, None),
    "self_attn/compressor/indexer/q_b_proj/weight": ((12, 10), "muon", True, (12,)),
    "self_attn/compressor/indexer/weights_proj/weight": ((2, 12), "muon", True, (2,)),
}
CSA = {
    "self_attn/compressor/kv_proj/weight": ((16, 12), "muon", True, (8, 8)),
    "self_attn/compressor/gate_proj/weight": ((16, 12), "muon", True, (8, 8)),
    "self_attn/compressor/position_bias": ((4, 16), "adamw", False, None),
    "self_attn/compressor/kv_norm/weight": ((8,), "adamw", False, None),
    **INDEXER,
}
TOP = {
    "embed_tokens/weight": ((20, 12), "adamw", True, None),
    "lm_head/weight": ((20, 12), "adamw", True, None),
    "norm/weight": ((12,), "adamw", False, None),
    "hc_head/hc_fn": ((2, 24), "muon", True, (2,)),
    "hc_head/hc_base": ((2,), "adamw", False, None),
    "hc_head/hc_scale": ((1,), "adamw", False, None),
    "mtp/enorm/weight": ((12,), "adamw", False, None),
    "mtp/hnorm/weight": ((12,), "adamw", False, None),
    "mtp/norm/weight": ((12,), "adamw", False, None),
    "mtp/e_proj/weight": ((12, 12), "muon", True, (12,)),
    "mtp/h_proj/weight": ((12, 12), "muon", True, (12,)),
    "mtp/hc_head/hc_fn": ((2, 24), "muon", True, (2,)),
    "mtp/hc_head/hc_base": ((2,), "adamw", False, None),
    "mtp/hc_head/hc_scale": ((1,), "adamw", False, None),
}
BLOCKS = {
    "layers/0": EVERY_BLOCK,
    "layers/1": EVERY_BLOCK | CSA,
    "units/0": EVERY_BLOCK | HCA,
    "units/1": EVERY_BLOCK | CSA,
    "mtp/block": EVERY_BLOCK,
}


def expected_table():
    """{path: (shape, group, decay, parts, number of matrices)} of the whole fake tree."""
    table = {
        path: (shape, group, decay, parts, len(parts or ()))
        for path, (shape, group, decay, parts) in TOP.items()
    }
    for prefix, block in BLOCKS.items():
        lead = (REPEATS,) if prefix.startswith("units") else ()
        for suffix, (shape, group, decay, parts) in block.items():
            matrices = len(parts or ()) * (REPEATS if lead else 1) * (3 if len(shape) == 3 else 1)
            table[f"{prefix}/{suffix}"] = (lead + shape, group, decay, parts, matrices)
    return table


EXPECTED = expected_table()
PATHS_OF_THE_SMALL_TREE = (
    "embed_tokens/weight",
    "norm/weight",
    "layers/1/mlp/experts/gate_up_proj",
    "layers/1/attn_hc/fn",
    "layers/1/attn_hc/base",
    "layers/1/self_attn/o_a_proj/weight",
    "layers/1/self_attn/compressor/kv_proj/weight",
    "layers/1/self_attn/compressor/indexer/kv_proj/weight",
    "layers/1/self_attn/compressor/indexer/position_bias",
    "units/0/mlp/experts/down_proj",
    "mtp/e_proj/weight",
)


def nest(flat):
    """{"a/0/b": x} -> {"a": {0: {"b": x}}}, integer keys as nnx.to_pure_dict gives them."""
    tree = {}
    for path, value in flat.items():
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("/"))
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def flatten(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {})
        flat.update({} if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def random_flat(seed, paths, scale=1.0):
    rng = np.random.default_rng(seed)
    return {path: np.float32(scale * rng.normal(size=EXPECTED[path][0])) for path in paths}


def factor(step):
    """A learning rate schedule that differs at every step."""
    return 1.0 / (1.0 + step)


# ---- The straightforward reference, float64, one matrix at a time ----


HYBRID = [(3.4445, -4.7750, 2.0315)] * 8 + [(2.0, -1.5, 0.5)] * 2


def reference_orthogonal(x, rows=HYBRID):
    x = x / np.linalg.norm(x)
    for a, b, c in rows:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def reference_muon(gradients, w, parts, rates, decay=0.1):
    """Algorithm 1 on one leaf: every leading index and every part of the rows on its own."""
    w, gradients = np.array(w, np.float64), [np.array(g, np.float64) for g in gradients]
    for lead in np.ndindex(w.shape[:-2]):
        borders = np.cumsum((0, *parts))
        for start, stop in zip(borders[:-1], borders[1:], strict=True):
            where = (*lead, slice(start, stop))
            momentum = np.zeros_like(w[where])
            for g, eta in zip(gradients, rates, strict=True):
                momentum = 0.95 * momentum + g[where]
                o = reference_orthogonal(0.95 * momentum + g[where])
                o = o * np.sqrt(max(o.shape)) * 0.18
                w[where] = w[where] * (1 - eta * decay) - eta * o
    return w


def reference_adamw(gradients, w, decay, rates):
    w, m, v = np.array(w, np.float64), 0.0, 0.0
    for t, (g, eta) in enumerate(zip(gradients, rates, strict=True), start=1):
        g = np.array(g, np.float64)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-20)
        w = w * (1 - eta * (0.1 if decay else 0.0)) - eta * direction
    return w


def reference_clip(flat):
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in flat.values()))
    return {path: g / max(norm, 1.0) for path, g in flat.items()}


def train(params, gradients, config, schedule=factor, state=None, **options):
    """`len(gradients)` updates under jit. Returns (flat params, state)."""
    params = nest({path: jnp.asarray(p) for path, p in params.items()})
    tx = build_optimizer(params, MODEL, config, schedule, **options)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params) if state is None else state
    for grads in gradients:
        params, state = step(params, state, nest(grads))
    # Copies: on CPU a numpy view of a buffer would be donated with it.
    return {path: np.array(p) for path, p in flatten(params).items()}, state


def assert_follows_reference(paths, steps=4):
    config = OptimizerConfig(learning_rate=0.05)
    params = random_flat(0, paths)
    gradients = [random_flat(1 + t, paths, scale=0.3) for t in range(steps)]
    got, _ = train(params, gradients, config)
    clipped = [reference_clip(g) for g in gradients]
    rates = [0.05 * factor(t) for t in range(steps)]
    for path in paths:
        _, group, decay, parts, _ = EXPECTED[path]
        history = [g[path] for g in clipped]
        if group == "muon":
            want = reference_muon(history, params[path], parts, rates)
        else:
            want = reference_adamw(history, params[path], decay, rates)
        # An element's changes are about 0.05 (1 + 1/2 + ...) 0.18 = 0.02 with Muon, 0.1 with AdamW.
        np.testing.assert_allclose(got[path], want, atol=2e-5, rtol=0, err_msg=path)


# ---- Newton-Schulz ----


def assert_orthogonalizes(shape, dtype=jnp.float32, tolerance=6e-4, rows=COEFFICIENTS["hybrid"]):
    x = np.random.default_rng(0).normal(size=shape)
    got = np.float64(newton_schulz(jnp.asarray(x, jnp.float32), dtype, rows))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    assert s.min() / np.linalg.norm(x, axis=(1, 2)).max() > 1e-3  # within what 8 + 2 rows lift
    np.testing.assert_allclose(np.linalg.svd(got, compute_uv=False), 1.0, atol=tolerance)
    np.testing.assert_allclose(got, u @ vt, atol=tolerance)


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 7, 9), (2, 1, 5), (2, 9, 7)])
def test_newton_schulz_is_u_vt(shape):
    assert_orthogonalizes(shape)


def test_newton_schulz_in_bfloat16():
    assert_orthogonalizes((3, 16, 64), jnp.bfloat16, tolerance=2e-2)
    with pytest.raises(AssertionError):  # and it really is bfloat16
        assert_orthogonalizes((3, 16, 64), jnp.bfloat16, tolerance=6e-4)


def test_newton_schulz_equals_the_float64_iteration():
    for shape in ((24, 40), (32, 32)):
        x = np.random.default_rng(1).normal(size=shape)
        got = newton_schulz(jnp.asarray(x, jnp.float32)[None])[0]
        np.testing.assert_allclose(got, reference_orthogonal(x), atol=3e-5)


def test_five_rows_or_the_first_eight_are_not_enough():
    for rows in (COEFFICIENTS["five"], COEFFICIENTS["hybrid"][:8]):
        with pytest.raises(AssertionError):
            assert_orthogonalizes((3, 16, 64), rows=rows)


def test_newton_schulz_does_not_depend_on_scale_and_is_safe_at_zero_and_nan():
    x = np.random.default_rng(2).normal(size=(1, 4, 6)).astype(np.float32)
    want = newton_schulz(jnp.asarray(x))
    for scale in (1e-30, 1e30):  # the squares underflow, overflow
        np.testing.assert_allclose(
            newton_schulz(jnp.asarray(x * np.float32(scale))), want, atol=1e-5
        )
    poisoned = jnp.asarray(np.concatenate([0 * x, np.nan * x, x]))
    zero, nan, other = newton_schulz(poisoned)
    assert (zero == 0).all() and jnp.isnan(nan).all()
    np.testing.assert_array_equal(other, want[0])


# ---- The table ----


def test_every_leaf_is_where_the_hand_written_table_says():
    params = nest({path: jax.ShapeDtypeStruct(v[0], jnp.float32) for path, v in EXPECTED.items()})
    leaves = {leaf.path: leaf for leaf in label_tree(params, MODEL, OptimizerConfig())}
    assert leaves.keys() == EXPECTED.keys()
    for path, (shape, group, decay, parts, matrices) in EXPECTED.items():
        leaf = leaves[path]
        assert (leaf.shape, leaf.group, leaf.decay) == (shape, group, decay), path
        assert (leaf.split, leaf.matrices) == (parts or (), matrices), path


def test_every_row_of_the_table_is_used_and_no_leaf_has_two():
    for row in optimizer.ROWS:
        assert any(re.fullmatch(row.path, path) for path in EXPECTED), row.path
    for path in EXPECTED:
        assert sum(re.fullmatch(row.path, path) is not None for row in optimizer.ROWS) == 1, path


@pytest.mark.parametrize(
    ("path", "shape", "named"),
    [
        ("layers/0/self_attn/surprise/weight", (4, 4), "surprise"),
        ("layers/0/input_layernorm/weight/value", (4,), "value"),
        ("encoder/layers/0/self_attn/sinks", (4,), "encoder"),
        ("layers/0/attn_hc/fn", (7, 24), "attn_hc"),
        ("layers/0/mlp/experts/gate_up_proj", (3, 9, 12), "gate_up_proj"),
        ("layers/0/self_attn/compressor/kv_proj/weight", (12, 12), "compressor/kv_proj"),
        ("layers/0/self_attn/compressor/kv_proj/weight", (24, 12), "compressor/kv_proj"),
        ("layers/0/self_attn/q_a_proj/weight", (4,), "q_a_proj"),
    ],
)
def test_a_leaf_that_does_not_fit_is_named(path, shape, named):
    with pytest.raises(ValueError, match=f"^optimizer: .*{named}") as error:
        label(path, shape, MODEL)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=named):
        tree = nest({path: jax.ShapeDtypeStruct(shape, jnp.float32)})
        build_optimizer(tree, MODEL, OptimizerConfig(), factor)


def test_describe_lists_every_leaf():
    params = nest({path: jax.ShapeDtypeStruct(v[0], jnp.float32) for path, v in EXPECTED.items()})
    lines = describe(label_tree(params, MODEL, OptimizerConfig(train_mtp=False))).splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines}
    assert len(lines) == len(EXPECTED) + 1 and cells["leaf"][-1] == "decay"
    assert cells["units/1/mlp/experts/gate_up_proj"] == ["3x3x10x12", "muon", "18", "yes"]
    assert cells["norm/weight"] == ["12", "adamw", "-", "no"]
    assert cells["mtp/e_proj/weight"] == ["12x12", "frozen", "-", "no"]


# ---- The update ----


@pytest.mark.slow
def test_every_leaf_follows_the_reference_over_several_steps():
    assert_follows_reference(tuple(EXPECTED))


def replaced_row(path, **changes):
    rows = optimizer.ROWS
    return tuple(row._replace(**changes) if re.fullmatch(row.path, path) else row for row in rows)


def nesterov_adam(b1, b2, eps):
    return ORIGINAL_ADAM(b1, b2, eps, nesterov=True)


ORIGINAL_ADAM = optax.scale_by_adam
EMBED, BIAS = "embed_tokens/weight", "layers/1/self_attn/compressor/indexer/position_bias"
SPLIT_PATHS = [path for path in PATHS_OF_THE_SMALL_TREE if len(EXPECTED[path][3] or ()) > 1]
TWO = ("mtp/e_proj/weight", "norm/weight")  # a matrix and a vector
PLANTED = {  # name: (leaf that shows it, what is replaced, by what)
    **{f"no split: {p}": (p, "ROWS", replaced_row(p, split=optimizer.whole)) for p in SPLIT_PATHS},
    "fn in halves": (
        "layers/1/attn_hc/fn",
        "ROWS",
        replaced_row("layers/1/attn_hc/fn", split=optimizer.halves),
    ),
    "norms decayed": ("norm/weight", "ROWS", replaced_row("norm/weight", decay=True)),
    "position bias decayed": (
        BIAS,
        "ROWS",
        replaced_row(BIAS, decay=True),
    ),
    "embedding not decayed": (EMBED, "ROWS", replaced_row(EMBED, decay=False)),
    "embedding on Muon": (EMBED, "ROWS", replaced_row(EMBED, group="muon")),
    "matrix on AdamW": (TWO[0], "ROWS", replaced_row(TWO[0], group="adamw")),
    "five plain rows": (TWO[0], "COEFFICIENTS", {"hybrid": COEFFICIENTS["five"]}),
    "Nesterov Adam": (TWO[1], "optax.scale_by_adam", nesterov_adam),
    "no clipping": (TWO[0], "optax.clip_by_global_norm", lambda norm: optax.identity()),
}


@pytest.mark.parametrize("mistake", PLANTED)
def test_planted_mistakes_are_caught(mistake, monkeypatch):
    path, where, wrong = PLANTED[mistake]
    assert_follows_reference((path,), steps=3)
    monkeypatch.setattr(f"v4jax.training.optimizer.{where}", wrong)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_follows_reference((path,), steps=3)


@pytest.mark.parametrize(
    "wrong", [{"momentum": 0.9}, {"update_rms": 0.2}, {"b2": 0.999}, {"weight_decay": 0.0}]
)
def test_wrong_hyperparameters_are_caught(wrong, monkeypatch):
    original = OptimizerConfig
    monkeypatch.setitem(
        assert_follows_reference.__globals__,
        "OptimizerConfig",
        lambda **kwargs: original(**{**kwargs, **wrong}),
    )
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_follows_reference((EMBED, *TWO), steps=2)


def test_wrong_momentum_forms_are_caught(monkeypatch):
    """An EMA, and Muon without Nesterov's look-ahead, differ from Algorithm 1."""
    g = [random_flat(t, ["mtp/e_proj/weight"])["mtp/e_proj/weight"] for t in range(3)]
    w = np.zeros((12, 12))
    right = reference_muon(g, w, (12,), [0.05] * 3)
    plain = w
    momentum = np.zeros_like(w)
    for gradient in g:
        momentum = 0.95 * momentum + gradient
        o = reference_orthogonal(momentum) * np.sqrt(12) * 0.18
        plain = plain * (1 - 0.005) - 0.05 * o
    assert np.abs(plain - right).max() > 1e-3  # 50 times the tolerance of the comparison above


def test_update_rms_is_0_18():
    paths = [path for path in PATHS_OF_THE_SMALL_TREE if EXPECTED[path][1] == "muon"]
    splits = {path: EXPECTED[path][3] for path in paths}
    tx = scale_by_muon(splits)
    grads = nest(random_flat(3, paths, scale=1e-4))
    directions = flatten(jax.jit(lambda g: tx.update(g, tx.init(g))[0])(grads))
    checked = 0
    for path, direction in directions.items():
        borders = np.cumsum((0, *splits[path]))
        for start, stop in zip(borders[:-1], borders[1:], strict=True):
            part = np.float64(direction[..., start:stop, :])
            rms = np.sqrt(np.mean(part**2, axis=(-2, -1)))
            # A square matrix's smallest singular value may be below what 10 rows lift to 1.
            tight = part.shape[-2] != part.shape[-1]
            np.testing.assert_allclose(rms, 0.18, rtol=1e-3 if tight else 0.1, err_msg=path)
            checked += rms.size
    assert checked == sum(EXPECTED[path][4] for path in paths)


def test_a_part_or_an_expert_alone_gives_the_same_update():
    path = "units/0/mlp/experts/gate_up_proj"
    grads = random_flat(4, [path])
    tx = scale_by_muon({path: (5, 5)})
    together = flatten(jax.jit(lambda g: tx.update(g, tx.init(g))[0])(nest(grads)))[path]
    one = scale_by_muon({"w": (5,)})
    alone = jax.jit(lambda g: one.update(g, one.init(g))[0])
    for unit, expert, half in np.ndindex(REPEATS, 3, 2):
        rows = slice(5 * half, 5 * half + 5)
        want = alone({"w": grads[path][unit, expert, rows]})["w"]
        np.testing.assert_allclose(together[unit, expert, rows], want, atol=1e-6)


@pytest.mark.parametrize("matrices", ["muon", "adamw"])
def test_adamw_leaves_equal_optax_adamw(matrices):
    """Under matrices="adamw" a decayed leaf of every kind is one of them."""
    paths = ["embed_tokens/weight", "lm_head/weight"]
    if matrices == "adamw":
        paths = [path for path in PATHS_OF_THE_SMALL_TREE if EXPECTED[path][2]]
    params = random_flat(5, paths)
    gradients = [random_flat(6 + t, paths, scale=1e-4) for t in range(5)]  # never clipped
    config = OptimizerConfig(learning_rate=0.01, matrices=matrices)
    got, state = train(params, gradients, config, lambda count: 1.0)
    assert flatten(state.adamw.mu).keys() == set(paths)
    tx = optax.adamw(0.01, 0.9, 0.95, eps=1e-20, weight_decay=0.1)
    want, state = nest(params), tx.init(nest(params))
    for grads in gradients:
        updates, state = tx.update(nest(grads), state, want)
        want = optax.apply_updates(want, updates)
    for path, value in flatten(want).items():
        np.testing.assert_allclose(got[path], value, atol=1e-6)


def test_eps_is_small_enough_for_small_gradients():
    """With eps 1e-8 an update from gradients of 1e-10 would be a hundred times too small."""
    grads = {"norm/weight": np.full(12, 1e-10, np.float32)}
    got, _ = train(
        {"norm/weight": np.ones(12, np.float32)}, [grads], OptimizerConfig(), lambda _: 1
    )
    np.testing.assert_allclose(got["norm/weight"], 1 - 2e-3, rtol=1e-6)


def test_one_batched_iteration_for_each_matrix_shape():
    paths = tuple(EXPECTED)
    params = nest({path: jax.ShapeDtypeStruct(EXPECTED[path][0], jnp.float32) for path in paths})
    tx = build_optimizer(params, MODEL, OptimizerConfig(), factor)
    jaxpr = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params)
    scans = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    shapes = [eqn.outvars[0].aval.shape for eqn in scans]
    want = {}
    for shape, _, _, parts, _ in EXPECTED.values():
        for rows in parts or ():
            nm = tuple(sorted((rows, shape[-1])))
            want[nm] = want.get(nm, 0) + int(np.prod(shape[:-2]))
    assert sorted(shapes) == sorted((count, *nm) for nm, count in want.items())


# ---- Clipping ----


@pytest.mark.parametrize(("scale", "clipped"), [(1e-3, False), (100.0, True)])
def test_clip_by_global_norm(scale, clipped):
    paths = PATHS_OF_THE_SMALL_TREE
    gradients = random_flat(7, paths, scale)
    norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for g in gradients.values()))
    assert (norm > 1) == clipped
    _, state = train(random_flat(0, paths), [gradients], OptimizerConfig())
    momentum = flatten(state.muon.momentum)
    first_moment = flatten(state.adamw.mu)
    for path, g in gradients.items():
        got = momentum[path] if path in momentum else first_moment[path] / np.float32(0.1)
        np.testing.assert_allclose(got, g / max(norm, 1.0), rtol=2e-6, err_msg=path)
        assert (path in momentum) != (path in first_moment)


# ---- Frozen leaves ----


@pytest.mark.parametrize(
    ("flag", "frozen"),
    [("train_indexer", lambda p: "/indexer/" in p), ("train_mtp", lambda p: p.startswith("mtp/"))],
)
def test_frozen_leaves_neither_move_nor_decay_nor_have_state(flag, frozen):
    paths = PATHS_OF_THE_SMALL_TREE
    assert any(map(frozen, paths))
    params = random_flat(0, paths)
    grads = {p: 1e3 * g if frozen(p) else 1e-3 * g for p, g in random_flat(1, paths).items()}
    config = OptimizerConfig(**{flag: False})
    got, state = train(params, [grads] * 3, config)
    stateful = flatten(state.muon.momentum).keys() | flatten(state.adamw.mu).keys()
    for path in paths:
        same = np.array_equal(got[path], params[path])
        assert same == frozen(path), path
        assert (path in stateful) != frozen(path), path
    # Their gradients do not reach the others through the norm.
    without = {p: g for p, g in params.items() if not frozen(p)}
    alone, _ = train(without, [{p: grads[p] for p in without}] * 3, config)
    for path in without:
        np.testing.assert_array_equal(got[path], alone[path])


def test_a_zero_gradient_moves_a_trained_leaf_by_decay_only():
    paths = PATHS_OF_THE_SMALL_TREE
    params = random_flat(0, paths)
    grads = {path: np.zeros_like(p) for path, p in params.items()}
    got, _ = train(params, [grads], OptimizerConfig(learning_rate=0.5), lambda _: 1.0)
    for path in paths:
        want = params[path] * (0.95 if EXPECTED[path][2] else 1.0)
        np.testing.assert_allclose(got[path], want, rtol=1e-6, err_msg=path)


# ---- State ----


def test_state_is_a_float32_tree_that_survives_flattening_and_orbax(tmp_path):
    paths = PATHS_OF_THE_SMALL_TREE
    params, gradients = random_flat(0, paths), [random_flat(t, paths) for t in range(3)]
    whole, _ = train(params, gradients, OptimizerConfig())
    half, state = train(params, gradients[:2], OptimizerConfig())
    leaves, treedef = jax.tree.flatten(state)
    assert {leaf.dtype.name for leaf in leaves} == {"float32", "int32"}
    assert int(state.step) == 2
    rebuilt = jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert jax.tree.structure(restored) == treedef
    for continued in (rebuilt, restored):
        got, _ = train(half, gradients[2:], OptimizerConfig(), state=continued)
        for path in paths:
            np.testing.assert_array_equal(got[path], whole[path], err_msg=path)


def test_same_inputs_same_bits_and_abstract_init():
    paths = PATHS_OF_THE_SMALL_TREE
    params, grads = random_flat(0, paths), [random_flat(1, paths)]
    first, state = train(params, grads, OptimizerConfig())
    again, _ = train(params, grads, OptimizerConfig())
    assert all(np.array_equal(first[path], again[path]) for path in paths)
    structs = nest({p: jax.ShapeDtypeStruct(v.shape, v.dtype) for p, v in params.items()})
    tx = build_optimizer(structs, MODEL, OptimizerConfig(), factor)
    abstract = jax.eval_shape(tx.init, structs)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, abstract)


def test_bfloat16_parameters_keep_their_dtype_and_float32_state():
    path = "mtp/e_proj/weight"
    params = {path: jnp.ones((12, 12), jnp.bfloat16)}
    got, state = train(params, [{path: jnp.ones((12, 12), jnp.bfloat16)}], OptimizerConfig())
    assert got[path].dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}


# ---- Config ----


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("momentum", 1.0),
        ("b2", 1),
        ("eps", "1e-20"),  # what YAML 1.1 makes of 1e-20
        ("clip_norm", 0),
        ("update_rms", True),
        ("ns_dtype", "float16"),
        ("matrices", "sgd"),
        ("indexer_learning_rate", 0.0),
        ("clip", "leaf"),
        ("newton_schulz", "ten"),
    ],
)
def test_bad_values_end_in_one_line_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=rf"^OptimizerConfig\.{field}: got .*allowed: ") as error:
        dataclasses.replace(OptimizerConfig(), **{field: value})
    assert "\n" not in str(error.value)
