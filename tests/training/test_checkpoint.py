"""Checkpoints against kills, damaged files, other models and other devices.

Run as a program, this file is the process that test_kill_9 kills.
"""

import json
import logging
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from v4jax.training import checkpoint, run_config
from v4jax.training.checkpoint import Checkpointer, DamagedError, SaveError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def small_state(seed=0):
    """Two arrays of random bits and a counter, all different for every seed."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 32, (40, 30), np.uint32)
    return {
        "params": {"layers": {0: {"w": jnp.asarray(bits)}}, "b": jnp.asarray(bits[0] & 0xFF)},
        "step": seed,
    }


def bits(tree):
    """Path -> (dtype, shape, bytes): equality of every bit."""
    flat = checkpoint._flatten(tree)[0]
    hosts = {path: checkpoint._to_host(path, leaf) for path, leaf in flat.items()}
    return {path: (h.dtype, h.shape, h.key_impl, h.data.tobytes()) for path, h in hosts.items()}


def abstract(tree):
    def leaf(x):
        return x if type(x) in (int, float) else jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree.map(leaf, tree)


def save(folder, *steps, max_to_keep=10):
    with Checkpointer(folder, max_to_keep=max_to_keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, small_state(step), {"data": step})


def restore(folder, state=None, step=None):
    with Checkpointer(folder) as checkpointer:
        return checkpointer.restore(small_state() if state is None else state, step)


# ---- what goes in comes out ----

DTYPES = (
    *("bool", "int4", "int8", "int32", "uint8", "uint16", "uint32", "float16", "bfloat16"),
    *("float32", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1fn"),
)


def test_every_bit_of_every_dtype(tmp_path):
    codes = jnp.arange(256, dtype=jnp.uint8)
    state = {
        "dtypes": {name: codes.reshape(4, 64).astype(name) for name in DTYPES},
        "scalars": {name: jnp.ones((), name) for name in DTYPES},
        "codes": {  # every code of 8 and 4 bits, and floats that equality or arithmetic would lose
            "f8": jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn),
            "e8": jax.lax.bitcast_convert_type(codes, jnp.float8_e8m0fnu),
            "f4": jax.lax.bitcast_convert_type(codes, jnp.float4_e2m1fn),
            "odd": jax.lax.bitcast_convert_type(
                jnp.asarray([0x80000000, 0x7FC00001, 0xFF800001, 1], jnp.uint32), jnp.float32
            ),
        },
        "keys": [jax.random.key(3), jax.random.split(jax.random.key(1, impl="rbg"), 5)],
        "legacy_key": jax.random.PRNGKey(3),
        "numbers": (7, -(2**40), 0.1, float("nan")),
    }
    before = bits(state)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(20, state, {"data": 3, "tuple": (1, 2)}, wait=True)
        restored = checkpointer.restore(abstract(state))
    assert restored.step == 20 and restored.meta == {"data": 3, "tuple": [1, 2]}
    assert bits(restored.state) == before
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert [type(x) for x in restored.state["numbers"]] == [int, int, float, float]
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored.state["dtypes"]))
    draw = jax.random.normal(restored.state["keys"][0], (3,))
    assert (draw == jax.random.normal(state["keys"][0], (3,))).all()


def test_optimizer_states_come_back_as_they_are(tmp_path):
    params = {"a": jnp.ones((3, 4)), "b": {"c": jnp.zeros((5,))}}
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.partition({"x": optax.adam(1e-3), "y": optax.sgd(0.1, 0.9)}, {"a": "x", "b": "y"}),
    )
    opt = tx.init(params)
    opt = tx.update(jax.tree.map(jnp.sin, params), opt, params)[1]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"opt": opt}, {}, wait=True)
        restored = checkpointer.restore({"opt": jax.eval_shape(tx.init, params)})
    assert jax.tree.structure(restored.state["opt"]) == jax.tree.structure(opt)
    assert bits(restored.state["opt"]) == bits(opt)


def test_leaves_go_to_the_given_shardings(tmp_path):
    def mesh(shape):
        return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    w = jnp.arange(64.0).reshape(8, 8)
    put = NamedSharding(mesh((4, 2)), P("data", "model"))
    state = {"w": jax.device_put(w, put), "f4": jax.device_put(w.astype("float4_e2m1fn"), put)}
    wanted = NamedSharding(mesh((2, 4)), P("model", None))
    target = {
        "w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=wanted),
        "f4": jax.ShapeDtypeStruct(w.shape, "float4_e2m1fn", sharding=wanted),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {}, wait=True)
        restored = checkpointer.restore(target).state
        assert all(leaf.sharding == wanted for leaf in restored.values())
        assert bits(restored) == bits(state)
        assert len(checkpointer.restore(abstract({"w": w, "f4": state["f4"]})).state["w"].devices())


def test_checksums_are_of_the_bytes_and_nothing_else(tmp_path):
    w = jnp.asarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    for run in ("a", "b"):
        with Checkpointer(tmp_path / run) as checkpointer:
            checkpointer.save(1, {"w": w}, {}, wait=True)
    a, b = (json.loads((tmp_path / run / "1/record.json").read_text()) for run in ("a", "b"))
    crc32 = zlib.crc32(b"".join(np.float32(x).tobytes() for x in range(6)))
    assert (
        a["leaves"] == b["leaves"] == {"w": {"dtype": "float32", "shape": [2, 3], "crc32": crc32}}
    )


def test_saved_arrays_may_be_donated_at_once(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
    state = {str(i): jnp.full((256, 256), i, jnp.float32) for i in range(8)}
    wanted = {}
    with Checkpointer(tmp_path) as checkpointer:
        for i in (1, 2, 3):
            state = step(state)
            wanted[i] = bits(state)
            checkpointer.save(i, state, {})
            for _ in range(5):
                state = step(state)
        for i in (1, 2, 3):
            assert bits(checkpointer.restore(state, i).state) == wanted[i]


# ---- steps, retention, background ----


def test_no_checkpoint_is_none_and_reading_writes_nothing(tmp_path):
    assert restore(tmp_path / "absent") is None and not (tmp_path / "absent").exists()
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.steps() == [] and checkpointer.restore({}) is None
    assert list(tmp_path.iterdir()) == []


def test_the_newest_and_the_kept_stay(tmp_path):
    with Checkpointer(tmp_path, max_to_keep=2, keep=(3,)) as checkpointer:
        for step in range(1, 7):
            checkpointer.save(step, small_state(step), {})
        checkpointer.wait()
        assert checkpointer.steps() == [3, 5, 6]
        assert checkpointer.restore(small_state()).step == 6
        assert bits(checkpointer.restore(small_state(), 3).state) == bits(small_state(3))
        with pytest.raises(ValueError, match=r"no checkpoint of step 4 in .*; there: 3, 5, 6"):
            checkpointer.restore(small_state(), 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "5", "6"]


def test_a_saved_step_stays_as_it_is(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.save(1, small_state(1), {})
        assert not checkpointer.save(1, small_state(2), {})
        assert bits(checkpointer.restore(small_state()).state) == bits(small_state(1))


def test_only_the_main_process_writes_and_all_meet_when_it_has(tmp_path, monkeypatch):
    met = []
    monkeypatch.setattr(checkpoint.distributed, "barrier", met.append)
    for main in (True, False):
        monkeypatch.setattr(checkpoint.distributed, "is_main", lambda main=main: main)
        with Checkpointer(tmp_path / str(main)) as checkpointer:
            assert checkpointer.save(3, small_state(3), {}, wait=True)
            assert checkpointer.steps() == ([3] if main else [])
    assert met == ["checkpoint 3"] * 2 and not (tmp_path / "False").exists()


def test_all_skip_the_step_that_the_main_process_has(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.distributed, "from_main", lambda value: True)
    with Checkpointer(tmp_path) as checkpointer:
        assert not checkpointer.save(3, small_state(3), {}, wait=True)
        assert checkpointer.steps() == []


def test_after_an_error_a_process_meets_no_other(tmp_path, monkeypatch):
    met = []
    monkeypatch.setattr(checkpoint.distributed, "barrier", met.append)
    with pytest.raises(KeyError), Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small_state(1), {})
        raise KeyError("an error of this process alone")
    assert checkpointer.steps() == [1] and met == []


def test_training_goes_on_while_a_save_runs(tmp_path, monkeypatch):
    release, write = threading.Event(), checkpoint.write_atomically

    def slow(path, text):
        assert release.wait(30)
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_atomically", slow)
    meta = {"data": [1]}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small_state(1), meta)
        meta["data"].append(2)
        assert checkpointer.steps() == []
        release.set()
        checkpointer.wait()
        assert checkpointer.steps() == [1]
        assert checkpointer.restore(small_state()).meta == {"data": [1]}


@pytest.mark.parametrize("where", ["wait", "save", "close", "restore"])
def test_the_error_of_a_background_save_comes_at_the_next_call(tmp_path, monkeypatch, where):
    def full(path, text):
        raise OSError(28, "No space left on device")

    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, small_state(1), {}, wait=True)
    monkeypatch.setattr(checkpoint, "write_atomically", full)
    checkpointer.save(2, small_state(2), {})
    assert checkpointer._running[1].exception()  # it has failed, and nobody was told
    monkeypatch.undo()
    calls = {
        "wait": checkpointer.wait,
        "close": checkpointer.close,
        "save": lambda: checkpointer.save(3, small_state(3), {}),
        "restore": lambda: checkpointer.restore(small_state()),
    }
    with pytest.raises(SaveError, match=r"checkpoint 2 of .* was not saved: OSError.*No space"):
        calls[where]()
    if where == "close":
        return
    assert (tmp_path / "tmp-2").is_dir() and checkpointer.steps() == [1]
    checkpointer.save(3, small_state(3), {}, wait=True)  # and it goes on, and cleans up
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]
    checkpointer.close()


def test_bad_arguments_are_refused_before_anything_runs(tmp_path):
    w = jnp.ones((2,))
    cases = [
        ({"a": np.ones(2)}, {}, "a is a ndarray; allowed: jax arrays, int, float"),
        ({"a": True}, {}, "a is a bool; allowed"),
        ({"a": {"b": jnp.asarray(1.0)}}, {}, "a/b is weakly typed"),
        ({"a": {"b": w}, "a/b": w}, {}, "two leaves of the state have the path a/b"),
        ({"a": w}, {"x": float("nan")}, "not a JSON value"),
        ({"a": w}, {"x": w}, "not a JSON value"),
    ]
    with Checkpointer(tmp_path) as checkpointer:
        for state, meta, message in cases:
            with pytest.raises((ValueError, TypeError), match=message):
                checkpointer.save(1, state, meta)
        assert checkpointer._running is None
    with pytest.raises(ValueError, match="max_to_keep is 0; allowed: 1 or more"):
        Checkpointer(tmp_path, max_to_keep=0)


# ---- another model is not damage ----


def test_another_structure_is_an_error_that_names_the_leaves(tmp_path, caplog):
    save(tmp_path, 1, 2)
    state = small_state()
    state["params"]["layers"][0]["w"] = jax.ShapeDtypeStruct((40, 31), jnp.uint32)
    state["params"]["c"] = state["params"].pop("b")
    with open(next((tmp_path / "2/state/d").iterdir()), "wb"):
        pass  # damaged as well: the record is enough to tell that the model is another
    with pytest.raises(ValueError) as error:
        restore(tmp_path, state)
    assert not isinstance(error.value, DamagedError) and not caplog.records
    assert str(error.value) == (
        f"checkpoint 2 of {tmp_path} does not fit this configuration: "
        "params/b is in the checkpoint only, params/c is not in the checkpoint, "
        "params/layers/0/w is uint32[40, 30], not uint32[40, 31]"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
def test_another_dtype_is_never_cast(tmp_path, dtype):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones((2, 3)), "n": 3}, {}, wait=True)
        with pytest.raises(ValueError, match=rf"w is float32\[2, 3\], not {dtype}\[2, 3\]$"):
            checkpointer.restore({"w": jax.ShapeDtypeStruct((2, 3), dtype), "n": 3})
        with pytest.raises(ValueError, match=r"n is int\[\], not int32\[\]$"):
            checkpointer.restore({"w": jnp.ones((2, 3)), "n": jnp.int32(3)})
        with pytest.raises(ValueError, match="w is float32"):
            checkpointer.restore({"w": jax.random.key(0), "n": 3}, step=1)


def test_many_differing_leaves_stay_one_line(tmp_path):
    save(tmp_path, 1)
    state = small_state() | {f"x{i:03}": jnp.ones(1) for i in range(100)}
    with pytest.raises(ValueError, match=r"x007 is not in the checkpoint, and 92 more$"):
        restore(tmp_path, state)


# ---- damage ----


def flip(data, at):
    changed = bytearray(data)
    changed[at] ^= 0x10
    return bytes(changed)


DAMAGE = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "grown": lambda data: data + b"\0",
    "first byte": lambda data: flip(data, 0),
    "middle byte": lambda data: flip(data, len(data) // 2),
    "last byte": lambda data: flip(data, -1),
    "zeros": lambda data: bytes(len(data)),
}


def expect_fallback(folder, caplog, capfd):
    """The newest checkpoint, 2, is told to be damaged in one line, and 1 is restored."""
    caplog.clear()
    restored = restore(folder)
    assert restored.step == 1 and restored.meta == {"data": 1}
    assert bits(restored.state) == bits(small_state(1))
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    message = warning.getMessage()
    start = f"checkpoint 2 of {folder} is damaged: "
    assert message.startswith(start) and "\n" not in message
    assert message.endswith("; trying the next older one")
    assert capfd.readouterr() == ("", "")  # neither Orbax nor TensorStore says more
    return message.removeprefix(start)


@pytest.mark.parametrize("damage", [*DAMAGE, "deleted", "a folder"])
def test_any_damage_to_any_file_falls_back(tmp_path, caplog, capfd, damage):
    save(tmp_path, 1, 2)
    files = sorted(path for path in (tmp_path / "2").rglob("*") if path.is_file())
    names = {path.name for path in files}
    assert {"record.json", "_METADATA", "manifest.ocdbt"} <= names and len(files) >= 7
    for path in files:
        data = path.read_bytes()
        if damage in DAMAGE and DAMAGE[damage](data) == data:
            continue  # an empty file cannot be emptied
        if damage not in DAMAGE or not data:
            path.unlink()
            if damage == "a folder":
                path.mkdir()
        else:
            path.write_bytes(DAMAGE[damage](data))
        reason = expect_fallback(tmp_path, caplog, capfd)
        if path.name != "record.json":
            assert path.name in reason
            resized = ("empty", "truncated", "one byte short", "grown")
            assert ("bytes, not" in reason) == (damage in resized and len(data) > 0)
        with pytest.raises(DamagedError, match="checkpoint 2 of .* is damaged"):
            restore(tmp_path, step=2)
        if path.is_dir():
            path.rmdir()
        path.write_bytes(data)
    caplog.clear()
    assert restore(tmp_path).step == 2 and not caplog.records


@pytest.mark.parametrize("part", ["state", "state/d", "state/ocdbt.process_0", "everything"])
def test_missing_folders_fall_back(tmp_path, caplog, capfd, part):
    save(tmp_path, 1, 2)
    folder = tmp_path / "2" / ("" if part == "everything" else part)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    if part != "everything":
        folder.rmdir()
    expect_fallback(tmp_path, caplog, capfd)


def test_the_values_are_checked_beside_the_files(tmp_path, monkeypatch):
    """Were a wrong file blessed, by whatever mistake, its values would still not pass."""
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_check_files", lambda folder, files: None)
    assert bits(restore(tmp_path).state) == bits(small_state(1))
    (data,) = (path for path in tmp_path.rglob("*/d/*") if path.stat().st_size > 3000)
    whole, silent = data.read_bytes(), 0
    for at in range(50, len(whole), len(whole) // 16):
        data.write_bytes(flip(whole, at))
        try:
            assert bits(restore(tmp_path, step=1).state) == bits(small_state(1))  # not of any use
        except DamagedError as error:
            silent += "wrong values in params/layers/0/w" in str(error)
    assert silent  # Orbax restored wrong values without a word


def test_several_damaged_and_all_damaged(tmp_path, caplog):
    save(tmp_path, 1, 2, 3, 4)
    (tmp_path / "4/record.json").unlink()
    (tmp_path / "3/record.json").write_text("{}")
    assert restore(tmp_path).step == 2
    assert [r.getMessage().split(" of ")[0] for r in caplog.records] == [
        "checkpoint 4",
        "checkpoint 3",
    ]
    (tmp_path / "2/state/_METADATA").unlink()
    (tmp_path / "1/record.json").write_text("null")
    with pytest.raises(DamagedError, match="^no whole checkpoint: checkpoint 4 of .*checkpoint 1"):
        restore(tmp_path)


def test_damaged_steps_are_set_aside_and_saved_anew(tmp_path):
    save(tmp_path, 1, 2, 3)
    for step in (2, 3):
        (tmp_path / f"{step}/record.json").unlink()
    with Checkpointer(tmp_path, max_to_keep=1) as checkpointer:
        assert checkpointer.restore(small_state()).step == 1
        assert checkpointer.steps() == [1, 2, 3]  # reading changes nothing
        assert checkpointer.save(2, small_state(22), {}, wait=True)
        assert checkpointer.steps() == [2]  # not 3, though it was newer
        assert bits(checkpointer.restore(small_state()).state) == bits(small_state(22))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "damaged-2", "damaged-3"]


# ---- formats ----


def test_a_newer_format_is_an_error_not_damage(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(run_config, "FORMAT", 9)
    save(tmp_path, 1)
    run_config.write_config(tmp_path, {"a": 1})
    monkeypatch.undo()
    for read in (lambda: restore(tmp_path), lambda: run_config.read_config(tmp_path)):
        with pytest.raises(ValueError, match="has format 9; this version of v4jax reads 1 to 3"):
            read()
    assert not caplog.records


def test_format_1_had_no_choice_of_optimizer_or_sparse_attention():
    old = {"model": {"hc_mult": 4}, "optimizer": {"b1": 0.9}, "seed": 1}
    new, _ = run_config.migrate(1, old, {})
    assert new["model"] == {"hc_mult": 4, "sparse_attention": "auto"}
    assert new["optimizer"].items() >= {"b1": 0.9, "matrices": "muon"}.items()
    assert run_config.migrate(1, {"seed": 1}, {})[0] == {"seed": 1}


def test_older_formats_are_migrated_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(run_config, "FORMAT", 1)
    run_config.write_config(tmp_path, {"size": 40})
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, small_state(1), {"config": {"size": 40}}, wait=True)

    def rename_field(config, flat):
        return {"hidden_size": config["size"]}, flat

    def rename_leaf(config, flat):
        assert "hidden_size" in config
        return config, {path.replace("params/b", "params/bias"): x for path, x in flat.items()}

    monkeypatch.setattr(run_config, "FORMAT", 3)
    monkeypatch.setattr(run_config, "MIGRATIONS", [rename_field, rename_leaf])
    state = small_state(1)
    state["params"]["bias"] = state["params"].pop("b")
    restored = restore(tmp_path, state)
    assert bits(restored.state) == bits(state)
    assert restored.meta == {"config": {"hidden_size": 40}}
    assert run_config.read_config(tmp_path) == {"hidden_size": 40}
    with pytest.raises(ValueError, match="params/b is not in the checkpoint, params/bias is in"):
        restore(tmp_path)


def test_there_is_a_migration_to_every_format():
    assert len(run_config.MIGRATIONS) == run_config.FORMAT - 1


# ---- kill -9 ----


def big_state(step):
    """6 MB whose every bit depends on the step."""
    rng = np.random.default_rng(step)
    w = rng.standard_normal((12, 128, 1024), np.float32)
    return {"w": {i: jax.device_put(x) for i, x in enumerate(w)}, "step": jnp.int32(step)}


def train(folder, die_before_commit_of):
    """Resumes, checks what it resumed from, and saves step after step until it is killed."""
    with Checkpointer(folder, max_to_keep=2) as checkpointer:
        restored = checkpointer.restore(big_state(0))
        first = 0 if restored is None else restored.step
        if restored is not None:
            assert restored.meta == {"data": first} and bits(restored.state) == bits(
                big_state(first)
            )
        print("resumed", first, flush=True)
        for step in range(first + 1, 1000):
            if step == die_before_commit_of:
                checkpointer.wait()
                checkpoint.write_atomically = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            checkpointer.save(step, big_state(step), {"data": step})
            if step > 1:
                print("saved", step - 1, flush=True)  # save() returned: the one before is on disk


def start(folder, die_before_commit_of=-1):
    return subprocess.Popen(
        [sys.executable, __file__, str(folder), str(die_before_commit_of)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def expect_whole(folder, process, lines=()):
    """After the kill: the newest is the step reported as saved, or the next, with all its bits."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    reported = max(int(line.split()[1]) for line in [*lines, *out.splitlines()])
    restored = restore(folder, big_state(0))
    assert restored.step in (reported, reported + 1)
    assert bits(restored.state) == bits(big_state(restored.step))
    assert restored.meta == {"data": restored.step}
    return restored.step


@pytest.mark.slow
def test_kill_9_at_random_instants(tmp_path, caplog):
    """Five kills in a row in one run: each process goes on where the killed one had got to."""
    rng, newest = random.Random(0), 0
    for _ in range(5):
        process, lines = start(tmp_path), []
        try:
            while len(lines) < 3:  # where it resumed, that it is still there, and a step more
                lines.append(process.stdout.readline())
                assert lines[-1], process.stderr.read()
            time.sleep(rng.uniform(0, 0.5))
        finally:
            process.kill()
        reached = expect_whole(tmp_path, process, lines)
        assert reached >= newest
        newest = reached
        left = [path.name for path in tmp_path.iterdir() if not path.name.isdecimal()]
        assert len(left) <= 1 and all(name.startswith("tmp-") for name in left)
    assert newest >= 5 and not caplog.records


@pytest.mark.slow
def test_kill_9_just_before_a_checkpoint_is_there(tmp_path, caplog):
    process = start(tmp_path, die_before_commit_of=3)
    assert expect_whole(tmp_path, process) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "tmp-3"]
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, big_state(3), {"data": 3})
    assert (
        sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3"] and not caplog.records
    )


if __name__ == "__main__":
    train(sys.argv[1], int(sys.argv[2]))
