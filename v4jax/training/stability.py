"""What a run does about steps that go wrong: its choices, and what a step decides by itself.

A step whose loss or gradient is not finite is not applied, ever. Asked to, a step is also left out
whose loss or gradient norm is an outlier among the last ones (OLMo's rule: above mean +
`skip_sigma` standard deviations of the last 128, once 64 are known). What needs more than the step
itself, going back to a checkpoint, is `recovery.py`'s.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from v4jax.training.spikes import SpikeConfig

ON_SPIKE = ("note", "rollback", "anticipate")
WINDOW, LEAST = 128, 64


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """Choices of a run. Construction raises a ValueError of one line.

    on_spike: "note" says it; "rollback" goes back before its onset and leaves out the data from
    there to the spike, each further time more; "anticipate" goes back and routes by older
    parameters for a while (report 4.2.3, `anticipation.py`). anticipate_from: route so from that
    step on, spike or none.
    delay_steps: how much older. active_steps: for how many steps. skip_sigma: see the module; 0: no
    step is left out. max_nonfinite: so many steps in a row that are not finite, and the run goes
    back and leaves out their data. max_rollbacks: after so many it ends, or only notes spikes.
    """

    on_spike: str = "note"
    anticipate_from: int | None = None
    delay_steps: int = 16
    active_steps: int = 500
    skip_sigma: float = 0.0
    max_nonfinite: int = 3
    max_rollbacks: int = 3
    spikes: SpikeConfig = SpikeConfig()

    def __post_init__(self):
        def require(name: str, holds: bool, allowed: str):
            if not holds:
                value = getattr(self, name)
                raise ValueError(f"StabilityConfig.{name}: got {value!r}, allowed: {allowed}")

        def whole(value, least: int) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value >= least

        require("on_spike", self.on_spike in ON_SPIKE, " | ".join(ON_SPIKE))
        at = self.anticipate_from
        require("anticipate_from", at is None or whole(at, 0), "None, or a step from 0 on")
        for name, least in (("delay_steps", 0), ("max_nonfinite", 1), ("max_rollbacks", 0)):
            require(name, whole(getattr(self, name), least), f"an integer >= {least}")
        longer = whole(self.active_steps, 1) and self.active_steps > self.delay_steps
        require("active_steps", longer, f"an integer above delay_steps ({self.delay_steps})")
        sigma = self.skip_sigma
        number = isinstance(sigma, (int, float)) and math.isfinite(sigma) and sigma >= 0
        require("skip_sigma", number, "a number >= 0")

    @property
    def anticipates(self) -> bool:
        """Whether a run may ever route by older parameters."""
        return self.on_spike == "anticipate" or self.anticipate_from is not None


def no_steps() -> dict[str, Any]:
    """What `unusual` remembers: the last losses and norms, float32 [128], and how many, int32."""
    return {
        "losses": jnp.zeros(WINDOW, jnp.float32),
        "norms": jnp.zeros(WINDOW, jnp.float32),
        "seen": jnp.zeros((), jnp.int32),
    }


def unusual(
    recent: dict[str, Any], sigma: float, loss: jax.Array, norm: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """(Whether loss or norm, float32 [], is an outlier, bool []; the memory after this step).

    Outliers are remembered too, or a lasting change would be left out for ever; what is not finite
    is not.
    """
    seen = recent["seen"]
    known = jnp.arange(WINDOW) < seen
    count = jnp.minimum(seen, WINDOW)

    def beyond(values, x):
        mean = jnp.sum(values * known) / jnp.maximum(count, 1)
        square = jnp.sum(jnp.square(values - mean) * known) / jnp.maximum(count - 1, 1)
        return x > mean + sigma * jnp.sqrt(square)

    outlier = beyond(recent["losses"], loss) | beyond(recent["norms"], norm)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    here = (jnp.arange(WINDOW) == seen % WINDOW) & finite
    return (count >= LEAST) & outlier, {
        "losses": jnp.where(here, loss, recent["losses"]),
        "norms": jnp.where(here, norm, recent["norms"]),
        "seen": seen + finite,
    }
