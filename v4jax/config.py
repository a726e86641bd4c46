"""The model's configuration: one frozen dataclass with Hugging Face's field names.

    python -m v4jax.config pro        # parameters of a preset, part by part

Report sections 2 and 4.2.1 give the meaning of each field; `presets.py` gives values.
"""

import dataclasses
import math

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
LAYER_TYPES = (SLIDING, CSA, HCA)
MLP_LAYER_TYPES = ("hash_moe", "moe")
SCORING_FUNCS = ("sqrtsoftplus", "sigmoid")
INITS = ("v4jax", "transformers")
REMAT_POLICIES = ("none", "dots", "full")
SPARSE_ATTENTIONS = ("auto", "masked", "gathered")


@dataclasses.dataclass(frozen=True)
class CompressRates:
    """Tokens per compressed entry, by attention kind (report 2.3: m and m')."""

    compressed_sparse_attention: int = 4
    heavily_compressed_attention: int = 128


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """YaRN on the compressed kinds' rotary table. There is no mscale anywhere in V4."""

    factor: float = 16.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 65536


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the model's function and parameters.

    Names are Hugging Face's `DeepseekV4Config` where it has one. `layer_types` and
    `mlp_layer_types` have one entry a layer; the repeating unit that is stacked and scanned is
    derived from them. Construction raises ValueError, one line, on values that cannot work.
    """

    vocab_size: int
    hidden_size: int
    layer_types: tuple[str, ...]
    mlp_layer_types: tuple[str, ...]
    moe_intermediate_size: int
    num_attention_heads: int
    head_dim: int
    q_lora_rank: int
    qk_rope_head_dim: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    compress_rates: CompressRates = CompressRates()
    scoring_func: str = "sqrtsoftplus"
    routed_scaling_factor: float = 1.5
    swiglu_limit: float | None = 10.0  # None: no clamp
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = None
    num_nextn_predict_layers: int = 1
    initializer_range: float = 0.02
    # Ours, not Hugging Face's:
    shared_expert_swiglu_limit: bool = True  # the first release built it without the limit
    init: str = "v4jax"  # or "transformers": its plain initialisation
    scan_layers: bool = False  # stack the repeating unit and scan over it
    remat: str = "none"  # a block's backward recomputes: nothing, all but its linear maps, all
    sparse_attention: str = "auto"  # how CSA's selected entries are read: layers/sparse_attention

    def __post_init__(self):
        validate(self)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_types)

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """(attention kind, mlp kind) of each layer."""
        return tuple(zip(self.layer_types, self.mlp_layer_types, strict=True))

    @property
    def schedule(self) -> tuple[int, int, int]:
        """(prefix, unit, repeats): `prefix` unrolled layers, then `unit` layers `repeats` times.

        The split with the fewest distinct layers; without `scan_layers` all are prefix. Hash
        layers are never stacked: each has a table of its own.
        """
        total = self.num_hidden_layers
        best = (total, 0, 0)
        if not self.scan_layers:
            return best
        for unit in range(1, total // 2 + 1):
            if any(mlp == "hash_moe" for _, mlp in self.layers[total - unit :]):
                break
            repeats = 1
            while (repeats + 1) * unit <= total and (
                self.layers[total - (repeats + 1) * unit : total - repeats * unit]
                == self.layers[total - unit :]
            ):
                repeats += 1
            candidate = (total - unit * repeats, unit, repeats)
            if repeats > 1 and sum(candidate[:2]) < sum(best[:2]):
                best = candidate
        return best


def _require(condition: bool, field: str, value, allowed: str):
    if not condition:
        raise ValueError(f"ModelConfig.{field}: got {value!r}, allowed: {allowed}")


def validate(cfg: ModelConfig) -> None:
    """Raises ValueError with one line that names the field, its value and what is allowed."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if field.type in (int, "int"):
            least = 0 if field.name == "num_nextn_predict_layers" else 1
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= least
            _require(ok, field.name, value, f"an integer >= {least}")
        if field.type in (float, "float"):
            _require(_positive(value), field.name, value, "a number > 0")
        if field.type in (float | None, "float | None"):
            _require(value is None or _positive(value), field.name, value, "a number > 0 or None")
        if field.type in (bool, "bool"):
            _require(isinstance(value, bool), field.name, value, "True | False")
    rates, scaling = cfg.compress_rates, cfg.rope_scaling
    _require(isinstance(rates, CompressRates), "compress_rates", rates, "a CompressRates")
    if scaling is not None:
        _require(isinstance(scaling, RopeScaling), "rope_scaling", scaling, "a RopeScaling or None")
        for name, value in dataclasses.asdict(scaling).items():
            _require(_positive(value), f"rope_scaling.{name}", value, "a number > 0")
    _require(len(cfg.layer_types) >= 1, "layer_types", cfg.layer_types, "at least one layer")
    for name, allowed in (("layer_types", LAYER_TYPES), ("mlp_layer_types", MLP_LAYER_TYPES)):
        value = getattr(cfg, name)
        _require(isinstance(value, tuple), name, value, "a tuple")
        for entry in value:
            _require(entry in allowed, name, entry, " | ".join(allowed))
    _require(
        len(cfg.mlp_layer_types) == len(cfg.layer_types),
        "mlp_layer_types",
        cfg.mlp_layer_types,
        f"one entry for each of the {len(cfg.layer_types)} entries of layer_types",
    )
    for name, allowed in (
        ("scoring_func", SCORING_FUNCS),
        ("init", INITS),
        ("remat", REMAT_POLICIES),
        ("sparse_attention", SPARSE_ATTENTIONS),
    ):
        _require(getattr(cfg, name) in allowed, name, getattr(cfg, name), " | ".join(allowed))
    rope = cfg.qk_rope_head_dim
    _require(rope % 2 == 0, "qk_rope_head_dim", rope, "an even number")
    for name in ("head_dim", "index_head_dim"):
        value = getattr(cfg, name)
        _require(value >= rope, name, value, f">= qk_rope_head_dim ({rope})")
    _require(
        cfg.num_attention_heads % cfg.o_groups == 0,
        "o_groups",
        cfg.o_groups,
        f"a divisor of num_attention_heads ({cfg.num_attention_heads})",
    )
    _require(
        cfg.num_experts_per_tok <= cfg.n_routed_experts,
        "num_experts_per_tok",
        cfg.num_experts_per_tok,
        f"<= n_routed_experts ({cfg.n_routed_experts})",
    )
    depth = cfg.num_nextn_predict_layers
    _require(depth in (0, 1), "num_nextn_predict_layers", depth, "0 or 1 (V4's depth)")
    for kind in (CSA, HCA):
        rate = getattr(cfg.compress_rates, kind)
        ok = isinstance(rate, int) and not isinstance(rate, bool) and rate >= 1
        _require(ok, f"compress_rates.{kind}", rate, "an integer >= 1")


def _positive(value) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def to_dict(cfg: ModelConfig) -> dict:
    """A JSON-able dict that `from_dict` turns back into an equal config."""
    return dataclasses.asdict(cfg)


def from_dict(fields: dict) -> ModelConfig:
    """Inverse of `to_dict`. Raises ValueError naming an unknown or a missing field."""
    known = {f.name: f for f in dataclasses.fields(ModelConfig)}
    for name in fields:
        if name not in known:
            raise ValueError(f"ModelConfig.{name}: unknown field, known: {', '.join(known)}")
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING:
            raise ValueError(f"ModelConfig.{name}: missing")
    values = dict(fields)
    for name in ("layer_types", "mlp_layer_types"):
        values[name] = tuple(values[name])
    if isinstance(values.get("compress_rates"), dict):
        values["compress_rates"] = CompressRates(**values["compress_rates"])
    if isinstance(values.get("rope_scaling"), dict):
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
    return ModelConfig(**values)


def main(argv: list[str]) -> int:
    """Prints the parameters of a preset, part by part. Builds abstractly: no memory, seconds."""
    from v4jax import presets
    from v4jax.model import parameter_counts

    if len(argv) != 1 or argv[0] not in presets.PRESETS:
        print(f"usage: python -m v4jax.config {{{'|'.join(presets.PRESETS)}}}")
        return 2
    counts = parameter_counts(presets.PRESETS[argv[0]]())
    width = max(map(len, counts))
    for part, count in counts.items():
        print(f"{part:<{width}}  {count:>21,}")
    return 0


if __name__ == "__main__":
    import sys

    raise SystemExit(main(sys.argv[1:]))
