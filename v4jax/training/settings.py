"""Everything that determines a run's numbers: `RunConfig`."""

import dataclasses

from v4jax import config as model_config
from v4jax.config import ModelConfig
from v4jax.quantization import NO_QUANTIZATION, Quantization
from v4jax.training.losses import Objective
from v4jax.training.optimizer import OptimizerConfig
from v4jax.training.remedies import RemedyConfig
from v4jax.training.run_config import config_hash
from v4jax.training.schedule import ScheduleConfig
from v4jax.training.spikes import SpikeConfig
from v4jax.training.stability import StabilityConfig

COMPUTE_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run's numbers, on one machine.

    data: hash of the tokenized training documents. parent: "<config hash>@<step>" of the run that
    this one branches off, or "".
    """

    model: ModelConfig
    schedule: ScheduleConfig
    optimizer: OptimizerConfig
    objective: Objective
    sequence_length: int
    batch_size: int
    seed: int
    data: str
    compute_dtype: str = "float32"
    quantization: Quantization = NO_QUANTIZATION
    stability: StabilityConfig = StabilityConfig()
    remedies: RemedyConfig = RemedyConfig()
    parent: str = ""

    def __post_init__(self):
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(
                f"RunConfig.compute_dtype: got {self.compute_dtype!r}, allowed: "
                + " | ".join(COMPUTE_DTYPES)
            )
        if self.optimizer.train_indexer and not self.objective.index:
            raise ValueError(
                "RunConfig.optimizer.train_indexer: got True, allowed: False, as objective.index "
                "is 0: without a gradient the indexer would only decay"
            )
        mtp = self.schedule.mtp_weight or self.schedule.mtp_weight_decayed
        if self.optimizer.train_mtp and self.model.num_nextn_predict_layers and not mtp:
            raise ValueError(
                "RunConfig.optimizer.train_mtp: got True, allowed: False, as MTP weights are 0: "
                "without a gradient the module would only decay"
            )

    def to_dict(self) -> dict:
        """A JSON-able dict that `from_dict` turns back into an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "RunConfig":
        """Inverse of `to_dict`, also after JSON."""
        rules = tuple(tuple(rule) for rule in fields["quantization"]["rules"])
        return cls(
            **fields
            | {
                "model": model_config.from_dict(fields["model"]),
                "schedule": ScheduleConfig(**fields["schedule"]),
                "optimizer": OptimizerConfig(**fields["optimizer"]),
                "objective": Objective(**fields["objective"]),
                "quantization": Quantization(rules),
                "remedies": RemedyConfig(**fields["remedies"]),
                "stability": StabilityConfig(
                    **fields["stability"] | {"spikes": SpikeConfig(**fields["stability"]["spikes"])}
                ),
            }
        )

    @property
    def hash(self) -> str:
        """12 hex digits."""
        return config_hash(self.to_dict())
