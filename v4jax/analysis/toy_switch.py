"""The switch on a toy: a linear map learned in float32, then in FP4 through a straight gradient.

    loss(W) = mean over inputs x of |(W - W*) x|^2 / mean |W* x|^2

W* [64, 64] is normal, and so are the inputs, but for `loudness` in a few directions. Where inputs
are loud in few directions, errors of W may cancel there: training in FP4 finds such roundings,
rounding after training does not look for them. At `switch` the learning rate begins to fall, as in
the experiment bf16_to_fp4; without a format the arm goes on in float32.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from v4jax.numerics import MXFP4, Format, fake_quantize

WIDTH, ROWS, LOUD = 64, 1024, 4


@dataclasses.dataclass(frozen=True)
class Toy:
    """Updates of Adam, its learning rate, the step of the switch; loudness: see the module."""

    steps: int = 600
    switch: int = 300
    learning_rate: float = 0.03
    loudness: float = 2.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """losses: float [steps], each before its update. loss: at the end, of the masters; and
    `rounded_loss`, of the masters rounded to MXFP4."""

    losses: np.ndarray
    loss: float
    rounded_loss: float


def train(toy: Toy, fmt: Format | None) -> Outcome:
    """Float32 up to the switch, then with W rounded to `fmt` in every forward pass; None: never."""
    fields = dataclasses.asdict(toy)
    losses, exact, rounded = _train(fields.pop("steps"), fmt, **fields)
    return Outcome(np.asarray(losses, float), float(exact), float(rounded))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(steps: int, fmt: Format | None, switch, learning_rate, loudness, seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    target = jax.random.normal(keys[0], (WIDTH, WIDTH))
    directions = jax.random.normal(keys[1], (LOUD, WIDTH))
    loud = loudness * jax.random.normal(keys[2], (ROWS, LOUD)) @ directions
    inputs = jax.random.normal(keys[3], (ROWS, WIDTH)) + loud
    norm = jnp.mean(jnp.square(inputs @ target.T))

    def loss(w):
        return jnp.mean(jnp.square(inputs @ (w - target).T)) / norm

    def in_format(w, step):
        if fmt is None:
            return loss(w)
        # fake_quantize passes the gradient straight on to w.
        return loss(jnp.where(step >= switch, fake_quantize(w, fmt), w))

    def rate(step):
        done = jnp.clip((step - switch) / (steps - switch), 0, 1)
        return learning_rate * (0.5 + 0.5 * jnp.cos(jnp.pi * done))

    optimizer = optax.adam(rate)

    def update(carry, step):
        w, state = carry
        value, gradient = jax.value_and_grad(in_format)(w, step)
        change, state = optimizer.update(gradient, state)
        return (optax.apply_updates(w, change), state), value

    start = jnp.zeros_like(target)
    (w, _), losses = jax.lax.scan(update, (start, optimizer.init(start)), jnp.arange(steps))
    return losses, loss(w), loss(fake_quantize(w, MXFP4))
