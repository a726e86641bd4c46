"""The notebooks run from top to bottom in a kernel of their own, and draw what they say."""

import base64
import os
import warnings
from pathlib import Path

import pytest

with warnings.catch_warnings():  # nobody can mend theirs here
    warnings.simplefilter("ignore")
    jupytext = pytest.importorskip("jupytext")
    import nbclient
    import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "experiments" / "notebooks"
# Figures that each ends with: PNG from matplotlib, HTML with SVG from the report of sweeps.
FIGURES = {"look_inside": (3, 0), "mxfp4_by_hand": (4, 0), "compare_runs": (0, 2)}

slow = pytest.mark.slow
kernel = pytest.mark.filterwarnings("default")  # of the client, such as loopback without encryption


def execute(text: str, folder: Path):
    """The notebook of a percent script, executed in `folder`; raises where a cell does."""
    notebook = jupytext.reads(text, fmt="py:percent")
    environ = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    environ.pop("MPLBACKEND", None)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environ)
    return notebook


def outputs(notebook, kind: str) -> list[str]:
    return [
        output["data"][kind]
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if kind in output.get("data", {})
    ]


def test_every_notebook_is_tested():
    assert {path.stem for path in NOTEBOOKS.glob("*.py")} == set(FIGURES)
    assert not list(NOTEBOOKS.glob("*.ipynb"))


@slow
@kernel
@pytest.mark.parametrize("name", FIGURES)
def test_it_runs_from_top_to_bottom_and_draws(name, tmp_path):
    notebook = execute((NOTEBOOKS / f"{name}.py").read_text("utf-8"), tmp_path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    nbformat.validate(notebook)
    pictures, pages = outputs(notebook, "image/png"), outputs(notebook, "text/html")
    charts = [page for page in pages if "<svg" in page]
    assert (len(pictures), len(charts)) == FIGURES[name]
    for picture in pictures:
        assert len(base64.b64decode(picture)) > 10_000
    errors = [o for cell in code for o in cell.outputs if o.output_type == "error"]
    assert not errors


@slow
@kernel
def test_a_cell_that_raises_fails_the_notebook(tmp_path):
    text = "# %%\n1 + 1\n# %%\nraise RuntimeError('planted')\n# %%\nopen('after', 'w')\n"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="planted"):
        execute(text, tmp_path)
    assert not (tmp_path / "after").exists()
