"""Compilers for devices that are not here: kept from looking for one, and from caching.

The run ends with the figures of every compilation: its seconds, its memory on the device, its VMEM.

Comes after tests/conftest.py and before anything starts a backend. `make test` never collects this
folder (norecursedirs in setup.cfg), so no other test sees these settings.
"""

import os

import jax
import pytest

from tests.kernels_pallas.aot import targets

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # else libtpu asks a cloud's server which TPU this is
os.environ["TPU_ACCELERATOR_TYPE"] = "v5litepod-4"  # this and the next only silence warnings
os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"

# A compiler without a device writes entries that it cannot read back.
jax.config.update("jax_enable_compilation_cache", False)


@pytest.fixture(autouse=True)
def keep_figures(request):
    targets.FIGURES.clear()
    yield
    request.node.user_properties += [("figures", line) for line in targets.FIGURES]


def pytest_terminal_summary(terminalreporter):
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    lines = [
        f"{line}  {report.nodeid.partition('aot/')[2]}"
        for report in reports
        if getattr(report, "when", None) == "teardown"  # the others have them not yet, or again
        for name, line in report.user_properties
        if name == "figures"
    ]
    if lines:
        terminalreporter.section("compiled")
        terminalreporter.write_line("\n".join(lines))
