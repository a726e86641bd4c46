"""Anticipatory routing: experts chosen by parameters of some steps before (report 4.2.3).

Step t trains on batch t. While the mode is on, from step `first` up to `end`, the experts of batch
t are those that the parameters of step t - lag choose, lag = min(t - first, delay), computed ahead
on that very batch; their weights, and everything else, are of the current parameters. So

    at `first`         batches first .. first + delay are looked at with the parameters there
    at a later step t  batch t + delay is
    the drain          nothing beyond batch end - 1 is: the last `delay` steps only use what is kept

which is one forward pass a step, without head and loss. What was chosen is kept in a ring of
delay + 1 batches, inside the state: `routes`, ids [delay + 1, R, B * T, K]; batch t is at slot
t % (delay + 1), a smaller batch fills the beginning.

Not said by the report, decided here: the selection bias is the older one too (the choice is by
score + bias); loads, the balance loss and the bias's next step count the experts really used; hash
layers are what they are; delay and length of the mode are `StabilityConfig`'s.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from v4jax.config import ModelConfig


class Active(NamedTuple):
    """The steps first .. end - 1, whose experts are chosen ahead."""

    first: int
    end: int

    def lag(self, step: int, delay: int) -> int | None:
        """How old the parameters are that choose the experts of `step`; None: it is outside."""
        return min(step - self.first, delay) if self.first <= step < self.end else None

    def ahead(self, step: int, delay: int) -> range:
        """The batches to look at before `step`."""
        if not self.first <= step < self.end:
            return range(0)
        first = step if step == self.first else step + delay
        return range(first, min(step + delay + 1, self.end))

    def phase(self, step: int, delay: int) -> str:
        """ "normal", "ramp" (the lag grows), "active" or "drain"."""
        if not self.first <= step < self.end:
            return "normal"
        if step >= self.end - delay:
            return "drain"
        return "ramp" if step < self.first + delay else "active"


class Clock:
    """What the mode costs: seconds between steps in it and out of it, as they were made."""

    def __init__(self) -> None:
        self._seconds: dict[bool, list[float]] = {False: [], True: []}
        self._last: tuple[bool, float] | None = None

    def saw(self, routed: bool) -> None:
        """Call after each step: whether it was of the mode. The first of a kind compiles."""
        now = time.perf_counter()
        if self._last is not None and self._last[0] == routed:
            self._seconds[routed].append(now - self._last[1])
        self._last = routed, now

    def line(self) -> str | None:
        """What to say of it; None where there is nothing to compare."""
        if not all(self._seconds.values()):
            return None
        plain, routed = (statistics.median(self._seconds[kind]) for kind in (False, True))
        return (
            f"anticipatory routing: {1e3 * routed:.0f} ms a step, {1e3 * plain:.0f} without: "
            f"{routed / plain:.2f} times (medians of {len(self._seconds[True])} and "
            f"{len(self._seconds[False])} steps)"
        )


def ring(config: ModelConfig, delay: int, tokens: int) -> jax.Array:
    """No batch of `tokens` tokens yet: ids [delay + 1, R, tokens, K], of the least width."""
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    wide = jnp.uint8 if config.n_routed_experts <= 256 else jnp.uint16
    return jnp.zeros((delay + 1, layers, tokens, config.num_experts_per_tok), wide)


def put(routes: jax.Array, batch: Any, ids: jax.Array) -> jax.Array:
    """The ring with the ids [R, B, T, K] of the batch numbered `batch`, int32 []."""
    flat = ids.reshape(ids.shape[0], -1, ids.shape[-1]).astype(routes.dtype)
    return jax.lax.dynamic_update_slice(routes, flat[None], (batch % routes.shape[0], 0, 0, 0))


def get(routes: jax.Array, batch: Any, shape: tuple[int, int]) -> jax.Array:
    """The ids int32 [R, B, T, K] of the batch numbered `batch`, whose shape is (B, T)."""
    flat = jax.lax.dynamic_index_in_dim(routes, batch % routes.shape[0], keepdims=False)
    layers, _, k = flat.shape
    return flat[:, : shape[0] * shape[1]].reshape(layers, *shape, k).astype(jnp.int32)
