"""The command that benchmarks a step, on tiny shapes: what it prints, writes and refuses."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from tests.launched import launched
from v4jax.analysis.step_parts import parts
from v4jax.training import command

launch = functools.partial(launched, "benchmark_step", "--quick", JAX_PLATFORMS="cpu")


@pytest.mark.slow
def test_quick(tmp_path):
    run = launch("--only=parts,lengths", "--threads=1", f"--output={tmp_path}")
    assert run.returncode == 0, run.stderr
    for text in ("1 cores for this process", "hyper_connection", "moe", "of the measured peak"):
        assert text in run.stdout, text
    (page,) = tmp_path.glob("step-*.md")
    assert f"wrote {page}" in run.stdout
    report = json.loads(page.with_suffix(".json").read_text())
    assert [row["length"] for row in report["lengths"]["rows"]] == [64, 256]
    seconds = {p["scope"]: (p["forward"], p["backward"]) for p in report["parts"]["parts"]}
    for scope in ("attention", "moe", "hyper_connection"):
        assert min(seconds[scope]) > 0, scope


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--only=speed", "--only=speed: allowed: against, options, parts, lengths, start"),
        ("--threads=4096", "--threads=4096: allowed: up to"),
    ],
)
def test_wrong_input_is_one_line(flag, says):
    run = launch(flag)
    said = [line for line in run.stderr.splitlines() if not line.startswith("launch:")]
    assert run.returncode == 2 and len(said) == 1, run.stderr
    assert said[0].startswith(f"benchmark_step: {says}")


def test_time_goes_to_the_scope_that_takes_it():
    """A scope whose products are a hundred times the other's."""

    def loss(x, y):
        with jax.named_scope("long"):
            for _ in range(4):
                x = jnp.tanh(x @ x)
        with jax.named_scope("short"):
            return jnp.sum(x) + jnp.sum(jnp.tanh(y @ y))

    x, y = jnp.ones((400, 400)) / 400, jnp.ones((40, 40)) / 40
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, y).compile()
    found = {part.scope: part for part in parts(program, lambda: program(x, y))}
    for direction in ("forward", "backward"):
        long, short = (getattr(found[scope], direction) for scope in ("long", "short"))
        assert long > 3 * short > 0


def test_compilations_are_kept_in_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    try:
        command.cache_compilations()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "v4jax" / "jax")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
