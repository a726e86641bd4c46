"""What every test process starts with; this file is imported before anything can touch a device.

Eight host devices, so that sharding is tested as it is: on more than one device. XLA's compilation
cache lies in .cache/jax of the repository (JAX_COMPILATION_CACHE_DIR names another place) and is
shared by pytest's workers and by the processes that tests start: those inherit the environment, but
not the number of devices.
"""

import os
import types
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else two processes with libtpu abort
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(CACHE / "hypothesis"))
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from tests import gcs  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

# The first example of a shape compiles, so a deadline would measure XLA; failures must repeat.
hypothesis.settings.register_profile("v4jax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("v4jax")


LONGEST = (
    "test_processes", "test_resume", "test_meshes", "test_experiment", "test_planted_mistakes",
    "test_going_back", "test_anticipation", "test_model_against_reference", "test_indexer_recall",
    "test_benchmark_step", "test_step",
)  # fmt: skip
"""Files that take minutes. They come first: what comes last should leave no worker waiting."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture
def cloud(monkeypatch):
    """A cloud with the bucket gs://b, for this process and those that it starts."""
    with gcs.serve() as served:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", served.host)
        yield served


@pytest.fixture
def at_once(monkeypatch):
    """gcsfs does not wait before it tries again."""

    async def sleep(_):
        pass

    pytest.importorskip("gcsfs")
    monkeypatch.setattr("gcsfs.retry.asyncio", types.SimpleNamespace(sleep=sleep))
