"""Health of FP4 weights against counters in numpy over ml_dtypes, element by element."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from tests.training import tiny
from v4jax.model import Transformer
from v4jax.numerics import FORMATS, MXFP4, MXFP4_FLOOR
from v4jax.quantization import ALL_LINEARS, NO_QUANTIZATION, PARTS, Quantization, flat_paths
from v4jax.training import weight_health

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
measure = jax.jit(weight_health.measure, static_argnums=2)
track = jax.jit(weight_health.track, static_argnums=(3, 4))


def by_hand(block, floor=False):
    """(q, s) of 32 numbers, by ml_dtypes' own rounding; the scale by logarithms."""
    largest = np.abs(block).max()
    power = np.floor(np.log2(largest)) - 2 if floor else np.ceil(np.log2(largest / 6))
    scale = 2.0**power
    clipped = np.clip(block.astype(np.float64) / scale, -6, 6)
    return clipped.astype(ml_dtypes.float4_e2m1fn).astype(np.float64), scale


def edges(value):
    """The bin of |q|: its lower and upper boundary."""
    i = int(np.flatnonzero(GRID == abs(value))[0])
    low = -(GRID[1] / 2) if i == 0 else (GRID[i - 1] + GRID[i]) / 2
    high = 7.0 if i == 7 else (GRID[i] + GRID[i + 1]) / 2
    return low, high


def weights(seed, rows=3, columns=64, step=0.03):
    rng = np.random.default_rng(seed)
    before = rng.standard_t(3, (rows, columns)).astype(np.float32)
    before[0, :5] = 0
    before[1, 32:] *= 1e-3
    after = before + step * rng.standard_normal(before.shape).astype(np.float32)
    after[0, :3] = 0
    return before, after


@pytest.mark.parametrize("fmt", [MXFP4, MXFP4_FLOOR], ids=["ceil", "floor"])
@pytest.mark.parametrize("seed", range(4))
def test_every_share_against_a_loop(seed, fmt):
    before, after = weights(seed)
    counts = dict.fromkeys(("flipped", "scale_flipped", "at_edge", "saturated", "underflowing"), 0)
    moved, error, power = 0.0, 0.0, 0.0
    for a, b in zip(before.reshape(-1, 32), after.reshape(-1, 32), strict=True):
        (qa, sa), (qb, sb) = (by_hand(x, fmt is MXFP4_FLOOR) for x in (a, b))
        for i in range(32):
            low, high = edges(qb[i])
            ratio = abs(float(b[i])) / sb
            reach = [abs(ratio - x) for x in (low, high) if 0 < x < 6]
            counts["flipped"] += sa == sb and qa[i] != qb[i]
            counts["scale_flipped"] += sa != sb
            counts["at_edge"] += min(reach) < 0.005 * (high - low)
            counts["saturated"] += ratio > 6
            counts["underflowing"] += qb[i] == 0 and b[i] != 0
            low, high = edges(qa[i])
            moved += abs(float(b[i]) - float(a[i])) / ((high - low) * sa)
            error += (float(b[i]) - qb[i] * sb) ** 2
            power += float(b[i]) ** 2
    found = {name: float(x) for name, x in measure(before, after, fmt).items()}
    for name, count in counts.items():
        assert found[name] == pytest.approx(count / before.size, abs=1e-6), name
    assert found["update_over_bin"] == pytest.approx(moved / before.size, rel=1e-5)
    assert found["snr_db"] == pytest.approx(10 * np.log10(power / error), rel=1e-4)
    assert counts["flipped"] and counts["underflowing"]
    assert bool(counts["saturated"]) == (fmt is MXFP4_FLOOR)


def test_the_loop_would_see_a_scale_flip():
    """A block whose largest element grows: all its elements count there, none as flipped."""
    before = np.full((1, 64), 1.0, np.float32)
    after = before.copy()
    after[0, 0] = 16.0
    found = measure(before, after, MXFP4)
    assert (float(found["scale_flipped"]), float(found["flipped"])) == (0.5, 0.0)


def test_weights_on_a_boundary_are_at_the_edge():
    for boundary in weight_health.BOUNDARIES:
        for offset, inside in ((0.0, True), (1e-3, True), (0.05, False)):
            block = np.full((1, 32), 4.2, np.float32)
            block[0, 0], block[0, 1] = 6.0, boundary + offset
            share = float(measure(block, block, MXFP4)["at_edge"])
            assert share == (1 / 32 if inside else 0.0), (boundary, offset)


def count_oscillations(path, momentum):
    """Nagel's frequency and TetraJet-v2's two ways, element by element."""
    steps = [np.stack([by_hand(block)[0] for block in w.reshape(-1, 32)]).ravel() for w in path]
    scales = [np.repeat([by_hand(block)[1] for block in w.reshape(-1, 32)], 32) for w in path]
    n = path[0].size
    frequency, last = np.zeros(n), np.zeros(n)
    rounded, master = np.zeros(n), np.zeros(n)
    for t in range(1, len(path)):
        for i in range(n):
            change = np.sign(steps[t][i] - steps[t - 1][i])
            if scales[t][i] != scales[t - 1][i]:
                change = 0
            turned = change != 0 and change == -last[i]
            frequency[i] = momentum * turned + (1 - momentum) * frequency[i]
            last[i] = change or last[i]
            rounded[i] += abs(steps[t][i] * scales[t][i] - steps[t - 1][i] * scales[t - 1][i])
            master[i] += abs(float(path[t].ravel()[i]) - float(path[t - 1].ravel()[i]))
    return frequency, rounded, master


def test_oscillation_against_a_loop():
    rng = np.random.default_rng(0)
    start = rng.standard_normal((2, 64)).astype(np.float32)
    path = [start]
    for t in range(40):  # some jump to and fro, some drift, a block's scale changes on the way
        path.append(start + 0.04 * (-1) ** t + 0.02 * rng.standard_normal(start.shape))
        path[-1] = path[-1].astype(np.float32)
    path[20][0, 3] = 40.0
    state = weight_health.fresh(jnp.asarray(start))
    for before, after in zip(path, path[1:], strict=False):
        state = track(state, before, after, MXFP4, 0.1)
    frequency, rounded, master = count_oscillations(path, 0.1)
    np.testing.assert_allclose(np.ravel(state.frequency), frequency, atol=1e-6)
    np.testing.assert_allclose(np.ravel(state.rounded_way), rounded, rtol=1e-5)
    np.testing.assert_allclose(np.ravel(state.master_way), master, rtol=1e-5)
    found = weight_health.oscillating(state, frequency=0.2, ratio=2.0)
    assert float(found["oscillating_often"]) == pytest.approx((frequency > 0.2).mean())
    far = (rounded > 0) & (rounded >= 2 * master)
    assert float(found["oscillating_far"]) == pytest.approx(far.mean())
    assert 0 < (frequency > 0.2).mean() < 1 and 0 < far.mean() < 1


@given(st.integers(0, 2**32 - 1))
def test_a_weight_that_does_not_move_is_still(seed):
    before, _ = weights(seed % 1000)
    found = measure(before, before, MXFP4)
    assert float(found["flipped"]) == float(found["scale_flipped"]) == 0
    assert float(found["update_over_bin"]) == 0
    state = track(weight_health.fresh(jnp.asarray(before)), before, before, MXFP4, 0.01)
    assert not any(np.any(x) for x in state)


def test_a_run_is_watched_by_parts():
    """Parts add up over their weights; the masters of a whole step of the tiny model."""
    model = tiny.model()
    params = nnx.to_pure_dict(nnx.state(Transformer(model, rngs=nnx.Rngs(0)), nnx.Param))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.01 * rng.standard_normal(x.shape, np.float32), params)
    watch = weight_health.Watch(ALL_LINEARS, params)
    kept = watch.keep(params)
    found = watch.measure(kept, moved)
    parts = {name.split("/")[1] for name in found}
    assert parts == {
        "routed_experts", "shared_experts", "attention", "MTP_projections",
    }  # fmt: skip
    before, after = flat_paths(params), flat_paths(moved)
    for part in ("routed_experts", "MTP_projections"):
        name = next(name for name in PARTS if name.replace(" ", "_") == part)
        paths = [path for path in before if re.fullmatch(PARTS[name][0], path)]
        assert len(paths) > 1
        a, b = (
            np.concatenate([np.asarray(x[path]).reshape(-1, 32) for path in paths])
            for x in (before, after)
        )
        for kind, value in measure(a, b, MXFP4).items():
            assert float(found[f"fp4/{part}/{kind}"]) == pytest.approx(float(value), rel=1e-5), kind
    assert set(kept) == {path for path in before if any(
        re.fullmatch(pattern, path) for pattern, _ in PARTS.values())}  # fmt: skip
    assert not weight_health.Watch(NO_QUANTIZATION, params)
    assert not weight_health.Watch(Quantization(((r".*/experts/.*", "fp8_128x128"),)), params)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.bits == 4])
def test_every_fp4_format_can_be_measured(name):
    before, after = weights(0)
    assert all(np.isfinite(x) for x in measure(before, after, FORMATS[name]).values())


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="^weight_health: fp8_1x128 is not an FP4 format$"):
        weight_health.hold(jnp.ones((1, 128)), FORMATS["fp8_1x128"])
