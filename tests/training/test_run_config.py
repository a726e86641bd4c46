"""config.json: written whole, compared field by field, hashed."""

import json
import subprocess
import sys

import pytest

from tests.training import tiny
from v4jax.training.run import read_run_config
from v4jax.training.run_config import check_config, config_hash, read_config, write_config

CONFIG = {"model": {"hidden_size": 64, "layers": ("csa", "hca")}, "seed": 0, "data": None}


def test_write_then_read_and_check(tmp_path):
    folder = tmp_path / "runs" / "demo"
    assert read_config(folder) is None and check_config(folder, CONFIG) is False
    write_config(folder, CONFIG)
    assert read_config(folder) == {**CONFIG, "model": {"hidden_size": 64, "layers": ["csa", "hca"]}}
    assert check_config(folder, CONFIG) is True
    assert check_config(folder, dict(reversed(CONFIG.items()))) is True
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_another_configuration_is_one_line_with_both_values(tmp_path):
    write_config(tmp_path, CONFIG)
    other = {"model": {"hidden_size": 128, "layers": ["csa"]}, "seed": 0, "steps": 5, "data": None}
    with pytest.raises(ValueError) as error:
        check_config(tmp_path, other)
    assert str(error.value) == (
        f"{tmp_path} holds a run of another configuration; choose another folder or delete it: "
        "model.hidden_size is 64 there, 128 here, "
        'model.layers is ["csa", "hca"] there, ["csa"] here, '
        "steps is absent there, 5 here"
    )


def test_types_count(tmp_path):
    write_config(tmp_path, {"a": 1, "b": "x"})
    with pytest.raises(ValueError, match=r"a is 1 there, 1\.0 here$"):
        check_config(tmp_path, {"a": 1.0, "b": "x"})
    with pytest.raises(ValueError, match=r"a is 1 there, true here$"):
        check_config(tmp_path, {"a": True, "b": "x"})


def test_what_json_cannot_hold_is_refused(tmp_path):
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises(ValueError, match="not a JSON value"):
            write_config(tmp_path, bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "3"])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        check_config(tmp_path, CONFIG)


def test_the_hash_is_of_the_json_value_only():
    known = config_hash({"a": [1, 2], "b": {"c": 0.1}})
    assert known == config_hash({"b": {"c": 0.1}, "a": (1, 2)}) == "b6d92150802e"
    assert known != config_hash({"a": [1, 2], "b": {"c": 0.2}})
    code = (
        "from v4jax.training.run_config import *; print(config_hash({'b': {'c': .1}, 'a': [1, 2]}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == known


def test_a_run_of_format_2_is_read_as_what_it_was(tmp_path):
    """As the second format had it, but for what a third one renames or adds."""
    config = tiny.config("data")
    old = json.loads(json.dumps(config.to_dict()))
    old = {name: old[name] for name in FORMAT_2} | {
        name: {field: old[name][field] for field in fields}
        for name, fields in FORMAT_2.items()
        if fields
    }
    old["schedule"]["dense_steps"] = config.schedule.dense_until
    (tmp_path / "config.json").write_text(json.dumps({"format": 2, "config": old}))
    assert read_run_config(tmp_path) == config
    assert check_config(tmp_path, config.to_dict())


# The fields of a run's configuration, and of what is in it, in format 2; () is all there are.
FORMAT_2: dict[str, tuple[str, ...]] = {
    "model": (),
    "schedule": (
        *("total_steps", "warmup_steps", "decay_start", "final_fraction"),
        *("mtp_weight", "mtp_weight_decayed"),
    ),
    "optimizer": (
        *("learning_rate", "weight_decay", "momentum", "update_rms", "b1", "b2", "eps"),
        *("clip_norm", "ns_dtype", "matrices", "train_indexer", "train_mtp"),
    ),
    "objective": ("balance", "index", "bias_speed"),
    "sequence_length": (),
    "batch_size": (),
    "seed": (),
    "data": (),
    "compute_dtype": (),
    "quantization": (),
    "parent": (),
}
