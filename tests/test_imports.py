"""Imports go one way, and importing anything of ours is cheap and touches no device."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A package or module, its level, and the third-party packages it may use (None: any but torch's).
# A module imports from lower levels and from its own entry; two entries of one level do not meet.
LEVELS: dict[str, tuple[int, set[str] | None]] = {
    "v4jax.style": (0, set()),
    "v4jax.numerics": (0, {"jax", "ml_dtypes", "numpy"}),
    "kernels_pallas": (1, {"absl", "jax", "ml_dtypes", "numpy"}),
    "v4jax.config": (2, None),
    "v4jax.exit_codes": (2, set()),
    "v4jax.distributed": (3, {"jax"}),
    "v4jax.parallel": (3, None),
    "v4jax.layers": (4, None),
    "v4jax.model": (5, None),
    "v4jax.presets": (6, None),
    "v4jax.packing": (6, None),
    "v4jax.quantization": (6, None),
    "v4jax.training": (7, None),
    "v4jax.inference": (7, None),
    "v4jax.interop": (7, None),
    "v4jax.analysis": (8, None),
    "v4jax.launching": (8, {"absl", "pyarrow", "yaml"}),
    "experiments": (9, None),
    "launch": (9, set()),
    "v4jax": (8, set()),  # v4jax/__init__.py: a lazy table of names, imports nothing
}
OURS = {"v4jax", "kernels_pallas", "experiments", "launch", "tests"}
EXEMPT = ("TYPE_CHECKING", "typing.TYPE_CHECKING", "__name__ == '__main__'")
NEVER = {"torch", "transformers", "tensorflow", "tests"}  # those are for the tests, or for nobody


def entry(module: str) -> str | None:
    """The longest key of LEVELS that is `module` or a package around it; v4jax only for itself."""
    while module not in LEVELS and "." in module:
        module = module.rpartition(".")[0]
        if module == "v4jax":
            return None
    return module if module in LEVELS else None


def sources() -> list[Path]:
    folders = [ROOT / "v4jax", ROOT / "kernels_pallas", ROOT / "experiments"]
    return [
        *sorted(path for folder in folders for path in folder.rglob("*.py")),
        ROOT / "launch.py",
    ]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, full name) of each import in the file, those inside functions included.

    Exempt: `if TYPE_CHECKING:`, and `main` or `if __name__ == "__main__":`: there it is a program.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in EXEMPT:
            continue
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.relative_to(ROOT).parts
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:  # `from v4jax import model` names a module, so keep both parts
                yield node.lineno, f"{source}.{alias.name}" if source in OURS else source
        yield from imports(node, path)


def complaint(module: str, imported: str) -> str | None:
    """Why `module` may not import `imported`, or None."""
    top = imported.partition(".")[0]
    here = entry(module)
    assert here is not None
    level, allowed = LEVELS[here]
    if top in NEVER:
        return f"{top} belongs to the tests"
    if top in sys.stdlib_module_names:
        return None
    if top not in OURS:
        return None if allowed is None or top in allowed else f"{here} may use {sorted(allowed)}"
    there = entry(imported) or "v4jax"
    if there == here or LEVELS[there][0] < level:
        return None
    return f"{here} (level {level}) may not import {there} (level {LEVELS[there][0]})"


def violations(path: Path, text: str) -> list[str]:
    if entry(module_name(path)) is None:
        return [f"{path.relative_to(ROOT)}: give it a place in LEVELS of tests/test_imports.py"]
    lines = text.splitlines()
    found = []
    for line, imported in imports(ast.parse(text), path):
        reason = complaint(module_name(path), imported)
        if reason:
            found.append(f"{path.relative_to(ROOT)}:{line}: {lines[line - 1].strip()}  <- {reason}")
    return list(dict.fromkeys(found))


def test_imports_go_one_way():
    found = [line for path in sources() for line in violations(path, path.read_text("utf-8"))]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("v4jax/numerics/formats.py", "from flax import nnx"),
        ("v4jax/numerics/formats.py", "def f():\n    from v4jax.config import ModelConfig"),
        ("kernels_pallas/experts.py", "import v4jax.layers.experts"),
        ("v4jax/layers/router.py", "from v4jax import model"),
        ("v4jax/layers/router.py", "from ..training import step"),
        ("v4jax/training/step.py", "import torch"),
        ("v4jax/training/step.py", "from v4jax import Transformer"),
        ("v4jax/new_idea.py", "import jax"),
        ("v4jax/__init__.py", "import jax"),
        ("launch.py", "import jax"),
    ],
)
def test_a_planted_violation_is_found(path, text):
    assert len(violations(ROOT / path, text)) == 1


def test_allowed_imports_are_not_complained_about():
    text = (
        "import json\nimport jax.numpy as jnp\nfrom flax import nnx\nfrom v4jax.config import A\n"
        "from . import rope\nfrom .rope import rotate\nfrom kernels_pallas import grouped\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from v4jax.model import B\n"
        "if __name__ == '__main__':\n    from v4jax import presets\n"
    )
    assert violations(ROOT / "v4jax/layers/attention.py", text) == []


def in_a_new_process(program: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_v4jax_loads_neither_jax_nor_flax():
    loaded = in_a_new_process("import sys, v4jax; print(*sorted(sys.modules))").split()
    assert not {"jax", "jaxlib", "flax", "numpy", "optax", "orbax", "grain"} & set(loaded)


def test_importing_every_module_touches_no_device():
    """A jnp constant at module level would: then flags and jax.distributed come too late.

    A notebook is run by importing it, so it is not.
    """
    modules = [module_name(path) for path in sources() if "notebooks" not in path.parts]
    program = f"""
import importlib, json
from absl import flags
for name in {modules!r}:
    importlib.import_module(name)
    if name.startswith("experiments."):  # a program each, with flags of its own
        for flag in flags.FLAGS.get_flags_for_module(name):
            delattr(flags.FLAGS, flag.name)
from jax._src import xla_bridge
print(json.dumps(xla_bridge.backends_are_initialized()))
"""
    assert json.loads(in_a_new_process(program)) is False
