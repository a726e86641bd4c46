"""Remedies against oscillation, against loops over elements in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jax_model import quick_jit
from tests.training.tiny import same_bits
from v4jax.layers.context import UNROUNDED
from v4jax.numerics import FP8_128X128, MXFP4, MXFP4_FLOOR
from v4jax.quantization import Resolved, quantize_params
from v4jax.training import remedies
from v4jax.training.remedies import PLAIN, RemedyConfig

GRID = np.array([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
WEIGHT = Resolved({"a/w": MXFP4}, UNROUNDED)


def tree(w):
    return {"a": {"bias": jnp.ones(3), "w": jnp.asarray(w)}, "b": jnp.ones((2, 2))}


@functools.cache
def compiled(config):
    """(start, applied, rounded) of one weight of MXFP4."""
    return (
        quick_jit(lambda w: remedies.start(config, tree(w), WEIGHT)),
        quick_jit(lambda old, new, memory: remedies.applied(config, old, new, WEIGHT, memory)),
        quick_jit(lambda w, memory, step: remedies.rounded(config, w, WEIGHT, memory, step, 0)),
    )


# ---- one block of 32 numbers, in float64 ----


def scale_of(block):
    return 2.0 ** np.ceil(np.log2(np.abs(block).max() / 6))


def toward(x, target):
    """Of the grid's two numbers around x, the one nearer to the target; a tie goes to the even code
    (0, 1, 2, 4), as where a weight lies in the middle of its bin and the scale doubles."""
    low, high = max(g for g in GRID if g <= x), min(g for g in GRID if g >= x)
    if target - low == high - target:
        return low if abs(low) in (0, 1, 2, 4) else high
    return low if target - low < high - target else high


def nearest(x):
    return toward(x, x)


def simulate(config, start, moves, momentum=0.01):
    """The masters after each of `moves` [steps, 32], upon `start` [32]; what is remembered."""
    w, scale = start.astype(np.float64), scale_of(start)
    ema = w.copy()
    q = np.array([nearest(x / scale) for x in w])
    average, frozen = q * scale, np.zeros(32, bool)
    last, frequency = np.zeros(32), np.zeros(32)
    way, master_way, share = np.zeros(32), np.zeros(32), 0.0
    path, events = [], {"frozen": 0, "reset": 0}
    for step, move in enumerate(moves, 1):
        new = np.where(frozen, w, (w + move).astype(np.float32))
        new_scale = scale_of(new)
        for i in range(32):
            # What the forward pass computed with before this update, and what with after it.
            if config.ema_decay:
                was = toward(w[i] / scale, ema[i] / scale)
                ema[i] = config.ema_decay * ema[i] + (1 - config.ema_decay) * new[i]
                now = toward(new[i] / new_scale, ema[i] / new_scale)
            else:
                was, now = nearest(w[i] / scale), nearest(new[i] / new_scale)
            change = np.sign(now - was) if scale == new_scale else 0
            turned = change != 0 and change == -last[i]
            frequency[i] = momentum * turned + (1 - momentum) * frequency[i]
            last[i] = change or last[i]
            way[i] += abs(now * new_scale - was * scale)
            master_way[i] += abs(new[i] - w[i])
            average[i] = momentum * now * new_scale + (1 - momentum) * average[i]
            q[i] = now
        for i in range(32):
            if config.freeze_above and frequency[i] > config.freeze_above and not frozen[i]:
                new[i] = toward(new[i] / new_scale, average[i] / new_scale) * new_scale
                frozen[i], events["frozen"] = True, events["frozen"] + 1
        if step % (config.reset_every or 50) == 0:
            far = (way > 0) & (way >= 8 * master_way)
            share = far.mean()
            for i in np.flatnonzero(far & ~frozen):
                if config.reset_every:
                    new[i] = q[i] * new_scale
                    ema[i] = new[i]
                    events["reset"] += 1
            way[:], master_way[:] = 0, 0
        w, scale = new, scale_of(new)
        path.append(w.copy())
    ways = {"rounded_way": way, "master_way": master_way, "far": share}
    state = {"direction": last, "frequency": frequency, **ways}
    state |= {"frozen": frozen, "average": average, "ema": ema}
    return np.array(path), state, events


def walk(seed, steps=60):
    """A block's start, and moves that make a third of its weights swing around a boundary."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(-5, 5, 32)
    start[:10] = rng.choice([0.25, -0.75, 1.25, 1.75, -2.5, 3.5], 10) + 0.005
    start[31] = 5.9
    moves = 0.02 * rng.standard_normal((steps, 32))
    moves[:, :10] = -0.01 * (-1) ** np.arange(steps)[:, None] * rng.uniform(0.8, 1.4, (steps, 10))
    moves[:, 10:14] = 0.02  # these drift
    moves[steps // 2, 31] = 1.0  # the scale doubles
    return start.astype(np.float32), moves


@pytest.mark.parametrize(
    "options",
    [
        {"track": True},
        {"freeze_above": 0.03},
        {"reset_every": 7},
        {"ema_decay": 0.9, "track": True},
        {"freeze_above": 0.025, "reset_every": 9, "ema_decay": 0.3},
    ],
    ids=str,
)
def test_masters_and_memory_against_a_loop(options):
    config = RemedyConfig(**options)
    begin, apply, _ = compiled(config)
    start, moves = walk(1)
    if config.freeze_above and config.ema_decay:  # held at 1.5 by a mean of 1.5, a tie's side
        moves[:, 31] = 0  # would hang on the last bit where the scale doubles
    expected, state, events = simulate(config, start, moves)
    params, memory = tree(start[None]), begin(start[None])
    for move, masters in zip(moves, expected, strict=True):
        w = params["a"]["w"]
        proposed = tree((np.asarray(w) + move).astype(np.float32))
        params, memory = apply(params, proposed, memory)
        np.testing.assert_allclose(params["a"]["w"][0], masters, rtol=2e-6, atol=2e-6)
    assert int(memory.pop("updates")) == len(moves)
    assert memory.keys() == {name for name in state if name in memory}
    for name, of in memory.items():
        np.testing.assert_allclose(np.ravel(of["a/w"]), state[name], atol=1e-5, err_msg=name)
    assert ("frozen" in memory) == bool(config.freeze_above)
    for event, wanted in (("frozen", config.freeze_above), ("reset", config.reset_every)):
        assert 0 < events[event] < 100 if wanted else not events[event]
    assert state["frequency"].max() > 0.01


def test_a_frozen_weight_stays_and_the_others_move_on():
    config = RemedyConfig(freeze_above=0.03)
    begin, apply, round_ = compiled(config)
    start, moves = walk(2)
    moves[:, 31] = 0  # else the scale doubles
    params, memory, held = tree(start[None]), begin(start[None]), {}
    for move in moves:
        w = np.asarray(params["a"]["w"])
        params, memory = apply(params, tree((w + move).astype(np.float32)), memory)
        frozen = np.flatnonzero(memory["frozen"]["a/w"])
        for i in frozen:
            assert held.setdefault(i, params["a"]["w"][0, i]) == params["a"]["w"][0, i]
    assert 4 < len(held) < 20
    values = round_(params, memory, jnp.int32(0))["a"]["w"][0]
    np.testing.assert_array_equal(values[frozen], params["a"]["w"][0, frozen])


def test_ema_rounding_swings_less():
    """Masters that jump over a boundary and back: to nearest they flip, by their mean not."""
    start, moves = walk(3, steps=40)
    flips = {}
    for decay in (0.0, 0.95):
        config = RemedyConfig(ema_decay=decay, track=True)
        begin, apply, _ = compiled(config)
        params, memory = tree(start[None]), begin(start[None])
        for move in moves:
            w = np.asarray(params["a"]["w"])
            params, memory = apply(params, tree((w + move).astype(np.float32)), memory)
        flips[decay] = float(np.sum(memory["rounded_way"]["a/w"][0, :10]))
    assert flips[0.95] < 0.3 * flips[0.0]


def test_ema_rounding_takes_the_side_of_the_mean():
    config = RemedyConfig(ema_decay=0.5)
    begin, _, round_ = compiled(config)
    rng = np.random.default_rng(0)
    w = rng.uniform(-6, 6, (1, 32)).astype(np.float32)
    ema = (w + rng.standard_normal(w.shape)).astype(np.float32)
    memory = begin(w) | {"ema": {"a/w": jnp.asarray(ema)}}
    scale = scale_of(w)
    expected = [toward(x / scale, e / scale) * scale for x, e in zip(w[0], ema[0], strict=True)]
    found = round_(tree(w), memory, jnp.int32(0))
    np.testing.assert_array_equal(found["a"]["w"][0], expected)
    assert (found["a"]["w"] != quantize_params(tree(w), WEIGHT.weights)["a"]["w"]).sum() > 3
    # What it is deployed as keeps its values when it is rounded once more.
    deployed = quick_jit(lambda *x: remedies.deployed(config, x[0], WEIGHT, x[1]))(tree(w), memory)
    assert same_bits(deployed, found)
    assert same_bits(quantize_params(deployed, WEIGHT.weights), deployed)


def test_stochastic_rounding_is_of_seed_step_and_path_alone():
    config = RemedyConfig(rounding="stochastic")
    both = Resolved({"a/w": MXFP4, "a/v": MXFP4}, UNROUNDED)
    w = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    params = {"a": {"v": jnp.asarray(w), "w": jnp.asarray(w)}}
    draw = quick_jit(
        lambda params, step, seed: remedies.rounded(config, params, both, {}, step, seed)
    )
    first = draw(params, 5, 0)
    alone = Resolved({"a/w": MXFP4}, UNROUNDED)  # what else is rounded has no say
    again = quick_jit(lambda p: remedies.rounded(config, p, alone, {}, 5, 0))(params)
    assert same_bits(again["a"]["w"], first["a"]["w"])
    assert same_bits(first, draw(params, 5, 0))
    others = [first["a"]["v"], draw(params, 6, 0)["a"]["w"], draw(params, 5, 1)["a"]["w"]]
    for other in others:
        assert 0.1 < np.mean(np.asarray(other) != np.asarray(first["a"]["w"])) < 0.6
    mean = np.mean([draw(params, step, 0)["a"]["w"] for step in range(400)], axis=0)
    spread = np.abs(w).max() / 3  # no bin is wider
    np.testing.assert_allclose(mean, w, atol=6 * 0.5 * spread / 20)
    assert same_bits(
        remedies.deployed(config, params, both, {}), quantize_params(params, both.weights)
    )


@pytest.mark.parametrize("fmt", [MXFP4, MXFP4_FLOOR], ids=["ceil", "floor"])
def test_dampening_is_the_gradient_of_the_squared_distance_within_bins(fmt):
    resolved, config = Resolved({"a/w": fmt}, UNROUNDED), RemedyConfig(dampening=0.3)
    w = np.random.default_rng(0).standard_t(3, (4, 32)).astype(np.float32)
    grads = jax.tree.map(lambda x: 0.5 * jnp.ones_like(x), tree(w))
    values = quantize_params(tree(w), resolved.weights)
    found = quick_jit(
        lambda grads, w, values: remedies.adjusted(config, grads, w, values, resolved)
    )(grads, tree(w), values)
    saturated = 0
    both = np.asarray(values["a"]["w"]), np.asarray(found["a"]["w"])
    for row, value, grad in zip(w, *both, strict=True):
        power = np.floor(np.log2(np.abs(row).max()))
        scale = 2.0 ** (power - 2) if fmt is MXFP4_FLOOR else scale_of(row)
        for x, q, g in zip(row.astype(float), value, grad, strict=True):
            inside = abs(x) <= 6 * scale
            saturated += not inside
            assert g == pytest.approx(0.5 + (2 * 0.3 * (x - float(q)) if inside else 0), abs=1e-5)
    assert bool(saturated) == (fmt is MXFP4_FLOOR)
    assert same_bits(found["a"]["bias"], grads["a"]["bias"])


def test_without_a_remedy_nothing_is_remembered_or_changed():
    w = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    params, values = tree(w), quantize_params(tree(w), WEIGHT.weights)
    assert remedies.start(PLAIN, params, WEIGHT) == {} == remedies.metrics({})
    assert same_bits(remedies.rounded(PLAIN, params, WEIGHT, {}, jnp.int32(3), 0), values)
    assert remedies.adjusted(PLAIN, values, params, values, WEIGHT) is values
    assert remedies.applied(PLAIN, params, values, WEIGHT, {}) == (values, {})
    every = RemedyConfig(freeze_above=0.1, reset_every=5, ema_decay=0.9)
    none = Resolved({}, UNROUNDED)
    assert remedies.start(every, params, none) == {}
    assert remedies.rounded(every, params, none, {}, jnp.int32(0), 0) is not None


def test_other_formats_are_rounded_as_ever():
    both = Resolved({"a/w": MXFP4, "b": FP8_128X128}, UNROUNDED)
    w = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    params = tree(w) | {"b": jnp.asarray(w + 0.3)}
    expected = quantize_params(params, both.weights)
    for config in (RemedyConfig(rounding="stochastic"), RemedyConfig(ema_decay=0.9)):
        memory = remedies.start(config, params, both)
        found = quick_jit(functools.partial(remedies.rounded, config, resolved=both, seed=0))(
            params=params, memory=memory, step=0
        )
        assert same_bits(found["b"], expected["b"])
    assert "b" not in remedies.start(RemedyConfig(track=True), params, both)["frequency"]


def test_the_memory_keeps_its_types():
    """As a checkpoint wants it: no weak types, and a step's output fits its input."""
    config = RemedyConfig(freeze_above=0.1, reset_every=5, ema_decay=0.9)
    begin, apply, _ = compiled(config)
    start, moves = walk(0)
    memory = begin(start[None])
    _, after = apply(tree(start[None]), tree((start + moves[0]).astype(np.float32)[None]), memory)
    for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(after), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, False) and not b.weak_type
    assert jax.tree.structure(memory) == jax.tree.structure(after)
    assert {x.dtype for x in jax.tree.leaves(memory)} == set(
        map(np.dtype, ("int32", "int8", "bool", "float32"))
    )


def test_what_is_remembered_is_told_by_parts():
    paths = {"layers/0/mlp/experts/down_proj": (2, 4, 32), "layers/1/mlp/experts/down_proj": (32,),
             "mtp/e_proj/weight": (32, 32)}  # fmt: skip
    rng = np.random.default_rng(0)
    memory = {
        "direction": {path: jnp.zeros(shape, jnp.int8) for path, shape in paths.items()},
        "frequency": {p: jnp.asarray(rng.uniform(0, 0.04, s)) for p, s in paths.items()},
        "far": {path: jnp.float32(i) for i, path in enumerate(paths)},
        "frozen": {p: jnp.asarray(rng.uniform(size=s) < 0.3) for p, s in paths.items()},
    }
    found = remedies.metrics(memory)
    experts = [path for path in paths if "experts" in path]
    for name, condition in (("frozen", lambda x: x), ("frequency", lambda x: x > 0.02)):
        whole = np.concatenate([np.ravel(memory[name][path]) for path in experts])
        label = {"frequency": "oscillating_often"}.get(name, name)
        key = f"fp4/routed_experts/{label}"
        assert float(found[key]) == pytest.approx(condition(whole).mean(), rel=1e-5)
    assert float(found["fp4/routed_experts/oscillating_far"]) == pytest.approx(32 / (256 + 32))
    assert float(found["fp4/MTP_projections/oscillating_far"]) == 2
    assert len(found) == 6


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"dampening": -1}, "dampening: got -1, allowed: a number >= 0"),
        ({"dampening": True}, "dampening: got True, allowed: a number >= 0"),
        ({"freeze_above": 1.0}, r"freeze_above: got 1.0, allowed: a number in \[0, 1\)"),
        ({"reset_every": 1}, "reset_every: got 1, allowed: 0, or an integer >= 2: one update is"),
        ({"reset_every": 2.0}, "reset_every: got 2.0, allowed: 0, or an integer >= 2"),
        ({"ema_decay": float("nan")}, "ema_decay: got nan, allowed: a number in"),
        ({"rounding": "up"}, r"rounding: got 'up', allowed: nearest \| stochastic"),
        (
            {"rounding": "stochastic", "ema_decay": 0.9},
            "ema_decay: got 0.9, allowed: 0 with rounding='stochastic', which picks the side",
        ),
        (
            {"rounding": "stochastic", "dampening": 0.1},
            "dampening: got 0.1, allowed: 0 with rounding='stochastic', whose mean is the master",
        ),
    ],
)
def test_what_cannot_be_is_refused(options, line):
    with pytest.raises(ValueError, match=f"^RemedyConfig.{line}") as error:
        RemedyConfig(**options)
    assert "\n" not in str(error.value)
