"""The spike detector on losses whose spikes are known."""

import json
import math

import numpy as np
import pytest

from v4jax.training.spikes import SpikeConfig, SpikeState, observe, predicted

CONFIG = SpikeConfig()


def falling(seed, steps=2000, noise=0.03, first=9.0):
    """A loss like a pre-training's: a power law with noise that is not independent of the level."""
    rng = np.random.default_rng(seed)
    curve = 2.0 + first * (np.arange(steps) + 3.0) ** -0.5
    return curve * (1 + noise * rng.standard_normal(steps))


def run(losses, config=CONFIG):
    spikes, state = [], SpikeState()
    for step, loss in enumerate(losses, 1):
        state, spike = observe(config, state, step, float(loss))
        spikes += [spike] if spike else []
    return spikes, state


def test_a_falling_loss_is_no_spike():
    false = sum(len(run(falling(seed))[0]) for seed in range(50))
    assert false == 0  # 100,000 losses: of normal residuals none is 6 sigma


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rise", [1, 4, 10])
def test_a_spike_is_seen_and_dated(seed, rise):
    """A jump of 25 % that takes `rise` steps to build up, on a loss that still falls steeply."""
    losses = falling(seed, 400, noise=0.01)
    begins = 150
    shape = np.clip((np.arange(400) - begins + 1) / rise, 0, 1) * (np.arange(400) < begins + 40)
    spikes, _ = run(losses * (1 + 0.25 * shape))
    assert len(spikes) == 1
    # Steps count from 1. A slow rise is seen once it leaves the noise; noise may begin it early.
    assert begins + 1 - 2 <= spikes[0].onset <= begins + 1 + rise // 2
    assert spikes[0].onset <= spikes[0].step <= begins + 1 + rise


def test_against_a_weighted_fit():
    """The line by numpy's polyfit over all losses, where nothing is suspect."""
    losses = falling(3, 80)
    state = SpikeState()
    for n in range(80):
        if n >= 3:
            weights = np.sqrt(CONFIG.decay ** np.arange(n - 1, -1, -1.0))
            line = np.polyfit(np.arange(n), losses[:n], 1, w=weights)
            np.testing.assert_allclose(predicted(state.sums, 0.0), np.polyval(line, n), rtol=1e-9)
            found = losses[n] - np.polyval(line, n)
        state, _ = observe(CONFIG, state, n + 1, float(losses[n]))
    np.testing.assert_allclose(state.residuals[-1], found, rtol=1e-6)
    assert len(state.residuals) == CONFIG.lookback


def test_a_slow_rise_does_not_hide_itself():
    """It is not learned from once it is suspect; 15 % over 60 steps is seen, and dated early."""
    losses = falling(0, 600, noise=0.005)
    losses[400:] *= 1 + 0.15 * np.clip(np.arange(200) / 60, 0, 1)
    (spike, *_), _ = run(losses)
    assert 401 <= spike.onset <= 425


def test_a_new_level_becomes_normal_and_one_alarm_is_enough():
    losses = falling(1, 1500, noise=0.01)
    losses[400:] *= 1.3  # for good
    spikes, state = run(losses)
    assert len(spikes) == 1 and spikes[0].onset == 401
    assert abs(predicted(state.sums, 0.0) - losses[-100:].mean()) < 0.05
    again = losses.copy()
    again[1200:1210] *= 1.5
    assert [spike.onset for spike in run(again)[0]] == [401, 1201]


def test_nothing_is_said_in_the_warmup_and_the_cooldown():
    losses = np.full(300, 3.0) + 0.01 * np.random.default_rng(0).standard_normal(300)
    losses[[50, 150, 200]] = 9.0
    assert [spike.step for spike in run(losses)[0]] == [151]
    assert [s.step for s in run(losses, SpikeConfig(cooldown=20))[0]] == [151, 201]
    assert [s.step for s in run(losses, SpikeConfig(warmup=20, cooldown=0))[0]] == [51, 151, 201]


def test_what_is_not_finite_changes_nothing():
    _, state = run(falling(0, 200))
    for value in (math.nan, math.inf, -math.inf):
        assert observe(CONFIG, state, 201, value) == (state, None)


def test_json_keeps_every_bit():
    losses = falling(5, 300)
    losses[250:] *= 1.4
    _, half = run(losses[:240])
    read = SpikeState.from_json(json.loads(json.dumps(half)))
    rest = [observe(CONFIG, half, 241, losses[240]), observe(CONFIG, read, 241, losses[240])]
    assert rest[0] == rest[1] and read == half and rest[0][1] is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", 1.0), ("suspect", 0.0), ("lookback", 0), ("warmup", 9), ("cooldown", -1),
     ("decay", 1.0)],
)  # fmt: skip
def test_wrong_values_are_one_line(name, value):
    with pytest.raises(ValueError, match=rf"^SpikeConfig\.{name}: got .*allowed: [^\n]*$"):
        SpikeConfig(**{name: value})
