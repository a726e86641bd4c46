"""How an operation picks its implementation: at trace time, by name or the best that can run.

Not `lax.platform_dependent`: every branch of that is traced, and exporting it for several platforms
fails where one of them has a Pallas kernel.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Mapping

import jax
from absl import logging

_TARGET: contextvars.ContextVar[str | None] = contextvars.ContextVar("target", default=None)


def choose(
    operation: str,
    implementation: str | None,
    candidates: Mapping[str, str | None],
    detail: str = "",
) -> str:
    """The implementation to trace.

    candidates: name -> None, or a clause that says why it cannot run ("needs a TPU, this is cpu").
    Their order is the preference, so an operation orders them by platform and shape.
    implementation: a name, which is taken as it is, or None for the first that can run.
    detail: shape class and dtypes, for the log: each (operation, choice, detail) that None led to
    is logged once, at INFO.
    Raises ValueError, one line, for an unknown name and for one that cannot run here.
    """
    possible = [name for name, reason in candidates.items() if reason is None]
    if implementation is None:
        if not possible:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in candidates.items())
            raise ValueError(f"{operation}: nothing can run this: {reasons}")
        _log_once(operation, possible[0], platform(), detail)
        return possible[0]
    if implementation not in candidates:
        raise ValueError(
            f"{operation}: implementation={implementation!r}, allowed: None, "
            + ", ".join(candidates)
        )
    reason = candidates[implementation]
    if reason is not None:
        raise ValueError(
            f"{operation}: implementation={implementation!r} cannot run: {reason}; possible: None, "
            + ", ".join(possible)
        )
    return implementation


def platform() -> str:
    """ "cpu", "gpu" or "tpu": JAX's default backend, or what `compiling_for` names."""
    return _TARGET.get() or jax.default_backend()


def tpu_has_fp8() -> bool:
    """Whether this is a TPU whose matrix unit takes FP8: from the seventh generation on."""
    return jax.default_backend() == "tpu" and "7" in jax.devices()[0].device_kind


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """Choices inside are made for the platform `target`, to compile ahead of time for a device that
    this machine lacks. Trace a fresh function inside: `jax.jit` reuses what it traced outside.
    """
    token = _TARGET.set(target)
    try:
        yield
    finally:
        _TARGET.reset(token)


def needs(target: str, interpret: bool = False) -> str | None:
    """None where a kernel for platform `target` can run, else why not, as `choose` wants it.

    interpret: it runs in Pallas' interpreter, on any platform.
    """
    here = platform()
    return None if interpret or here == target else f"needs a {target.upper()}, this is {here}"


@functools.cache
def _log_once(operation: str, choice: str, where: str, detail: str) -> None:
    logging.info("%s: %s on %s%s", operation, choice, where, detail and f" ({detail})")


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it: twice the speed of float32, else slower than it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:  # not Linux
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
