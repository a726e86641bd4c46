"""What a run runs on: device, versions, date. Numbers are worth little without."""

import datetime
import importlib.metadata
import os
import pathlib
import platform

import jax

from v4jax.training.files import write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ml_dtypes", "numpy", "grain")


def write_environment(folder: pathlib.Path) -> None:
    """Writes `<folder>/machine.json`: the environment of the run's last start."""
    write_json(folder / "machine.json", environment())


def environment() -> dict:
    """Device, cores, interpreter, package versions and date; how many devices and processes."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    device = jax.devices()[0]
    kind = device.device_kind
    return {
        "device": _processor() if device.platform == "cpu" else kind,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "jax": versions["jax"],
        "flax": versions["flax"],
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The processor's name, as Linux tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        return f"CPU, {names[0]}" if names else "CPU"
    except OSError:
        return f"CPU, {platform.processor() or platform.machine()}"
