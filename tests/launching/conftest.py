"""Tests that start a cluster or kill processes run alone: they wait for others to act."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()) or item.path.name == "test_kill.py":
            item.add_marker("alone")
