"""Mistakes that others made (and a few of the same kind), planted one at a time: a test must fail.

Each mistake is a change of v4jax's source, made in a copy of the packages; then the test that is
meant to catch it runs on the copy. It must fail by its numbers, and pass on an unchanged copy.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = "v4jax/layers"
OURS = ("v4jax", "kernels_pallas")  # what is copied, changed and imported afresh

# Tests by module and call. The first is a model of two CSA layers, hash and top-k experts, YaRN,
# 2 Sinkhorn iterations and hc_eps 1e-2: with 20 and 1e-6 three of the mistakes stay below 1e-4.
MODEL = ("tests.test_model_against_reference", "test_random_model", "csa, at a window's end")
PACKED = ("tests.test_model_against_reference", "test_padding_may_lie_anywhere")
HC_GRADIENT = ("tests.layers.test_hyper_connections", "test_gradient_of_a_layer", 4)
ROPE_GRADIENT = ("tests.layers.test_rope", "test_the_gradient_is_the_transpose")
SPARSE = "tests.layers.test_sparse_attention"
FORMS = (SPARSE, "test_both_forms_equal_the_loop_and_each_others_gradients", False, "one piece", 0)
GATHERED = (f"{SPARSE}_models", "test_a_gathered_model_against_the_reference")
YARN = ("tests.layers.test_rope", "test_yarn_table", "ramp past the pairs")
TESTS = (MODEL, PACKED, HC_GRADIENT, ROPE_GRADIENT, FORMS, GATHERED, YARN)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """Replacements in one file; each old text must occur in it exactly once."""

    file: str
    changes: tuple[tuple[str, str], ...]
    caught_by: tuple = MODEL


def mistake(file: str, old: str, new: str, caught_by=MODEL) -> Mistake:
    return Mistake(f"{LAYERS}/{file}", ((old, new),), caught_by)


MISTAKES = {
    "mixing matrix not transposed": mistake(
        "hyper_connections.py", "comb[j, k][..., None] * s ", "comb[k, j][..., None] * s "
    ),
    "post without the factor 2": mistake(
        "hyper_connections.py", "post = 2 * jax.nn.sigmoid(", "post = jax.nn.sigmoid("
    ),
    "sinkhorn starts with rows": mistake(
        "hyper_connections.py",
        "comb = sinkhorn(_softmax(comb) + c.hc_eps, c.iterations, c.hc_eps)",
        "comb = jnp.swapaxes(_softmax(comb) + c.hc_eps, 0, 1);"
        " comb = jnp.swapaxes(sinkhorn(comb, c.iterations, c.hc_eps), 0, 1)",
    ),
    "one sinkhorn pair too many": mistake(
        "hyper_connections.py", "length=iterations - 1)", "length=iterations)"
    ),
    "no eps in the input weights": mistake(
        "hyper_connections.py", "scale[0] + base[:m]) + c.hc_eps", "scale[0] + base[:m])"
    ),
    "no eps in the stream head": mistake(
        "hyper_connections.py",
        "self.hc_base[...][:, None, None]) + self.hc_eps",
        "self.hc_base[...][:, None, None])",
    ),
    "mixing's gradient not transposed": mistake(
        "hyper_connections.py", "comb[j, k][..., None] * x ", "comb[k, j][..., None] * x ",
        HC_GRADIENT,
    ),
    "the norm's gradient without its factor 2": mistake(
        "hyper_connections.py", "(2 * g_squares)", "g_squares", HC_GRADIENT
    ),
    "rope's gradient turned the same way": mistake(
        "rope.py", "_rotate(g, cos, -sin)", "_rotate(g, cos, sin)", ROPE_GRADIENT
    ),
    "no inverse rope on the output": mistake(
        "attention.py", "rope.rotate(o, heads, inverse=True)", "o"
    ),
    "entry at position w for w * m": mistake(
        "windows.py", "position=jnp.broadcast_to(entry * rate, shape)",
        "position=jnp.broadcast_to(entry, shape)",
    ),
    "entry at position w for w * m, packed": mistake(
        "windows.py", "position=jnp.maximum(position, 0)",
        "position=jnp.maximum(position, 0) // rate", PACKED,
    ),
    "entry visible one token late": Mistake(
        "kernels_pallas/visibility.py", (("(token + 1) // ratio", "token // ratio"),)
    ),
    "entry visible one token late, packed": Mistake(
        "kernels_pallas/visibility.py",
        (("first = end - (position + 1) // ratio", "first = end - position // ratio"),),
        PACKED,
    ),
    "an entry that is not there is looked up": mistake(
        "sparse_attention.py", "attended >= 0", "attended >= -1", FORMS
    ),
    "looked-up entries beside their places": mistake(
        "sparse_attention.py", "jnp.maximum(index, 0)", "jnp.maximum(index - 1, 0)", FORMS
    ),
    "indexer learns at other entries than it selected": mistake(
        "indexer.py", "take_entries(keys, index)", "take_entries(keys, index[..., ::-1])", GATHERED
    ),
    "csa halves swapped": mistake(
        "compressor.py", "previous = jnp.roll(x[",
        "x = jnp.roll(x, self.width, axis=-1); previous = jnp.roll(x[",
    ),
    "main theta on every layer": mistake(
        "rope.py", "cfg.qk_rope_head_dim, cfg.compress_rope_theta,",
        "cfg.qk_rope_head_dim, cfg.rope_theta,",
    ),
    "half-split rope": Mistake(
        f"{LAYERS}/rope.py",
        (
            ("reshape(*x.shape[:-1], r // 2, 2)", "reshape(*x.shape[:-1], 2, r // 2)"),
            ("pairs[..., 0], pairs[..., 1]", "pairs[..., 0, :], pairs[..., 1, :]"),
            ("odd * cos + even * sin], axis=-1)", "odd * cos + even * sin], axis=-2)"),
        ),
    ),
    "sink scaled by head_dim^-0.5": mistake(
        "sparse_attention.py", "sinks = sinks[:, None]", "sinks = sinks[:, None] * h**-0.5"
    ),
    "window of W + 1 tokens": mistake(
        "sparse_attention.py", "(query - key < window)", "(query - key <= window)"
    ),
    "bias inside the routing weights": mistake(
        "router.py", '"BTKE,BTE->BTK", hot, scores)',
        '"BTKE,BTE->BTK", hot, scores if self.kind == "hash_moe" else'
        " scores + self.e_score_correction_bias[...])",
    ),
    "no clamp on the shared expert": mistake(
        "experts.py", "cfg.swiglu_limit if cfg.shared_expert_swiglu_limit else None", "None"
    ),
    "gate clamped from below too": mistake(
        "experts.py", "jnp.minimum(gate, limit)", "jnp.clip(gate, -limit, limit)"
    ),
    "no yarn": mistake("rope.py", "if yarn is not None:", "if False:"),
    "yarn's upper end clamped to r/2 - 1": mistake(
        "rope.py", "math.ceil(dim(yarn.beta_slow)), r - 1)",
        "math.ceil(dim(yarn.beta_slow)), r // 2 - 1)", YARN,
    ),
}  # fmt: skip


def outcome(folder: Path, planted: Mistake | None, test: tuple) -> str:
    """Copies the packages to `folder`, plants the mistake, runs the test there: what came of it.

    "passed", or the failure as "Type: message".
    """
    for package in OURS:
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    if planted is not None:
        path = folder / planted.file
        text = path.read_text("utf-8")
        for old, new in planted.changes:
            assert text.count(old) == 1, f"{planted.file} has {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        path.write_text(text, "utf-8")
    for name in [n for n in sys.modules if n.partition(".")[0] in (*OURS, "tests")]:
        if name != "tests.test_planted_mistakes":
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(test[0])
        assert Path(sys.modules["v4jax"].__file__).is_relative_to(folder)
        getattr(module, test[1])(*test[2:])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        sys.path.remove(str(folder))
    return "passed"


def run_all() -> dict[str, str]:
    """Every test on an unchanged copy, then every mistake with its test."""
    runs = {f"unchanged, {test}": (None, test) for test in TESTS}
    runs |= {name: (planted, planted.caught_by) for name, planted in MISTAKES.items()}
    results = {}
    for name, (planted, test) in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = outcome(Path(folder).resolve(), planted, test)
    return results


@pytest.mark.slow
def test_each_planted_mistake_is_caught(subtests):
    program = "import json, tests.test_planted_mistakes as t; print(json.dumps(t.run_all()))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(run.stdout.splitlines()[-1])
    for name, result in results.items():
        with subtests.test(name):
            if name.startswith("unchanged"):
                assert result == "passed"
            else:
                assert result.startswith("AssertionError") and "Not equal to tolerance" in result
    assert len(results) == len(MISTAKES) + len(TESTS)
