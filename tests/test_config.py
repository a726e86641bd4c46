"""Invalid configs end in one line; presets have the released sizes; schedules; round trips."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from v4jax import config, presets
from v4jax.config import CSA, HCA, SLIDING, CompressRates, ModelConfig, RopeScaling
from v4jax.model import abstract_model, parameter_counts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size: got 0, allowed: an integer >= 1"),
        ({"vocab_size": 2.0}, "vocab_size: got 2.0, allowed: an integer >= 1"),
        ({"hc_mult": True}, "hc_mult: got True, allowed: an integer >= 1"),
        ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters: got 0, allowed: an integer >= 1"),
        ({"sliding_window": -1}, "sliding_window: got -1"),
        ({"hc_eps": 0.0}, "hc_eps: got 0.0, allowed: a number > 0"),
        ({"swiglu_limit": "10"}, "swiglu_limit: got '10', allowed: a number > 0 or None"),
        ({"rope_theta": float("nan")}, "rope_theta: got nan, allowed: a number > 0"),
        ({"layer_types": ()}, "layer_types: got (), allowed: at least one layer"),
        ({"layer_types": [SLIDING] * 4}, "allowed: a tuple"),
        ({"layer_types": (SLIDING,) * 3 + ("full",)}, "layer_types: got 'full', allowed: sliding"),
        ({"layer_types": (SLIDING,) * 3}, "mlp_layer_types: got ("),
        (
            {"mlp_layer_types": ("dense",) * 4},
            "mlp_layer_types: got 'dense', allowed: hash_moe | moe",
        ),
        (
            {"scoring_func": "softmax"},
            "scoring_func: got 'softmax', allowed: sqrtsoftplus | sigmoid",
        ),
        ({"init": "zeros"}, "init: got 'zeros', allowed: v4jax | transformers"),
        ({"remat": "all"}, "remat: got 'all', allowed: none | dots | full"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: got 7, allowed: an even number"),
        ({"qk_rope_head_dim": 64}, "head_dim: got 32, allowed: >= qk_rope_head_dim (64)"),
        ({"index_head_dim": 8}, "index_head_dim: got 8, allowed: >= qk_rope_head_dim (16)"),
        ({"o_groups": 3}, "o_groups: got 3, allowed: a divisor of num_attention_heads (4)"),
        (
            {"num_experts_per_tok": 9},
            "num_experts_per_tok: got 9, allowed: <= n_routed_experts (8)",
        ),
        ({"compress_rates": {"csa": 4}}, "compress_rates: got {'csa': 4}, allowed: a Compress"),
        ({"rope_scaling": {"factor": 4}}, "rope_scaling: got {'factor': 4}, allowed: a Rope"),
        ({"rope_scaling": RopeScaling(factor=0.0)}, "rope_scaling.factor: got 0.0, allowed: a num"),
        ({"scan_layers": 1}, "scan_layers: got 1, allowed: True | False"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers: got 2, allowed: 0 or 1"),
        (
            {"compress_rates": CompressRates(0, 8)},
            "compress_rates.compressed_sparse_attention: got 0",
        ),
    ],
)
def test_an_invalid_config_ends_in_one_line_that_names_the_field(changes, message):
    with pytest.raises(ValueError, match=f"^ModelConfig.*{re.escape(message)}") as error:
        dataclasses.replace(presets.nano(), **changes)
    assert "\n" not in str(error.value)


def test_round_trip_through_json():
    for preset in presets.PRESETS.values():
        cfg = preset()
        copy = config.from_dict(json.loads(json.dumps(config.to_dict(cfg))))
        assert copy == cfg and hash(copy) == hash(cfg)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": 3}, "ModelConfig.hidden: unknown field, known: vocab_size"),
        ({"vocab_size": None}, "ModelConfig.vocab_size: missing"),
    ],
)
def test_from_dict_names_unknown_and_missing_fields(fields, message):
    merged = config.to_dict(presets.nano()) | fields
    with pytest.raises(ValueError, match=re.escape(message)):
        config.from_dict({name: value for name, value in merged.items() if value is not None})


def schedule(layer_types, mlp_layer_types=None, scan_layers=True):
    mlp = mlp_layer_types or ("moe",) * len(layer_types)
    return dataclasses.replace(
        presets.nano(), layer_types=layer_types, mlp_layer_types=mlp, scan_layers=scan_layers
    ).schedule


def test_schedule():
    assert presets.flash().schedule == (3, 2, 20)
    assert presets.pro().schedule == (3, 2, 29)
    assert schedule((SLIDING,) * 5) == (0, 1, 5)
    assert schedule((SLIDING,) * 5, scan_layers=False) == (5, 0, 0)
    assert schedule((SLIDING, CSA, HCA)) == (3, 0, 0)
    assert schedule((HCA, CSA) * 3) == (0, 2, 3)
    assert schedule((CSA, HCA) * 2, ("hash_moe",) + ("moe",) * 3) == (4, 0, 0)
    assert schedule((CSA,) * 4, ("hash_moe",) * 2 + ("moe",) * 2) == (2, 1, 2)
    assert schedule((CSA,) * 3, ("hash_moe",) * 3) == (3, 0, 0)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_build_abstractly(name):
    cfg = presets.PRESETS[name]()
    model = abstract_model(cfg)
    assert len(model.layers) + len(model.units) * cfg.schedule[2] == cfg.num_hidden_layers
    assert model.lm_head.weight.shape == (cfg.vocab_size, cfg.hidden_size)


FLASH = """\
embedding                                      529,530,880
lm_head                                        529,530,880
indexers                                       225,730,176
compressors                                    261,464,576
attention core                               4,599,123,136
routers                                         45,088,768
routed experts                             277,025,390,592
shared experts                               1,082,130,432
hyper-connections                               33,818,898
stream head                                         65,541
layer and final norms                              356,352
total without MTP                          284,332,230,231
active                                      13,799,622,231
active without the embedding table          13,270,091,351
MTP module                                   6,610,048,891
total with MTP                             290,942,279,122
"""
PRO = """\
embedding                                      926,679,040
lm_head                                        926,679,040
indexers                                       501,384,960
compressors                                    670,128,640
attention core                              18,293,589,632
routers                                        167,903,232
routed experts                           1,547,396,186,112
shared experts                               4,029,677,568
hyper-connections                               83,954,910
stream head                                        114,693
layer and final norms                              881,664
total without MTP                        1,572,997,179,491
active                                      49,779,058,787
active without the embedding table          48,852,379,747
MTP module                                  25,840,145,979
total with MTP                           1,598,837,325,470
"""


def rows(text: str) -> dict[str, int]:
    """Printed lines -> counts; the order and width of the columns are free."""
    return {
        name: int(count.replace(",", ""))
        for name, count in (re.split(r"\s{2,}", line) for line in text.splitlines())
    }


@pytest.mark.parametrize(("name", "published"), [("flash", FLASH), ("pro", PRO)])
def test_the_released_sizes_are_printed(name, published, capsys):
    assert config.main([name]) == 0
    assert rows(capsys.readouterr().out) == rows(published)


def test_an_unknown_preset_ends_in_one_line(capsys):
    assert config.main(["giant"]) != 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "nano" in out


def test_the_parts_of_a_scanned_model_are_those_of_the_unrolled_one():
    cfg = presets.micro()
    unrolled = dataclasses.replace(cfg, scan_layers=False)
    assert parameter_counts(cfg) == parameter_counts(unrolled)


def test_config_is_frozen_and_hashable():
    cfg = presets.nano()
    assert isinstance(cfg, ModelConfig) and {cfg: 1}[presets.nano()] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.vocab_size = 3
