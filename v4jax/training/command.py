"""What every experiment's command line shares: quick values, quiet logs, cache, one-line errors."""

import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from v4jax.exit_codes import REFUSED
from v4jax.training import whereabouts
from v4jax.training.files import BucketError, Refused


def run(main: Callable[[], None], quick: Mapping[str, Any]) -> None:
    """Parses the flags and calls `main`. Wrong input ends in one line and exit code 2, a
    bucket that does not answer in 1; training that a SIGTERM ended, with everything saved, in 75
    (`v4jax.distributed`).

    quick: flag -> value that --quick sets where the user did not.
    """

    def parsed(argv: list[str]) -> None:
        values = flags.FLAGS
        if values.quick:
            shrink(quick)
            compile_quickly()
        if not values["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
        cache_compilations()
        whereabouts.answer_signals()
        from v4jax import distributed

        with distributed.errors_end_at_once():
            _run(main)

    app.run(parsed, flags_parser=_parse)


def shrink(quick: Mapping[str, Any]) -> None:
    """Sets the flags of `quick` that the user did not set."""
    for name, value in quick.items():
        if flags.FLAGS[name].using_default_value:
            flags.FLAGS[name].value = value


def _run(main: Callable[[], None]) -> None:
    try:
        main()
    except (ValueError, FloatingPointError, OSError) as error:
        if flags.FLAGS.traceback:
            raise
        # A network may be back when the run is tried again: that is a failure, not wrong input.
        again = isinstance(error, BucketError) and not isinstance(error, Refused)
        _refuse(error, code=1 if again else REFUSED)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"{rest[1]}: not a flag; flags are --name=value")
    except flags.Error as error:
        _refuse(error)
    except SystemExit:
        sys.exit(0)  # --help was asked for and given; absl ends it with 1
    return rest


def _refuse(error: Exception, code: int = REFUSED) -> NoReturn:
    print(f"{pathlib.Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
    sys.exit(code)


flags.DEFINE_bool("traceback", False, "[run] Show where an error arose, not just what it is.")


def fraction_or_steps(name: str) -> int | float:
    """The value of flag `name`: a fraction up to 1, a number of steps above."""
    value: float = flags.FLAGS[name].value or 0.0
    if value > 1 and not float(value).is_integer():
        raise ValueError(f"--{name}={value}: allowed: a fraction in [0, 1], or whole steps above 1")
    return int(value) if value > 1 else float(value)


def starts(name: str) -> tuple[tuple[int | float, int], ...]:
    """The value of the list flag `name`: START:VALUE each; a start is a fraction up to 1, or a step
    above."""
    found: list[tuple[int | float, int]] = []
    for text in flags.FLAGS[name].value or ():
        start, colon, value = text.partition(":")
        try:
            at = float(start)
            found.append((int(at) if at == 0 or at > 1 else at, int(value)))
        except ValueError:
            raise ValueError(
                f"--{name}={text}: allowed: START:VALUE, such as 0:64 or 0.5:256"
            ) from None
    return tuple(found)


def check_among(name: str, allowed: Sequence[str]) -> None:
    """Raises ValueError, one line, where the list flag `name` holds anything else."""
    for value in flags.FLAGS[name].value or ():
        if value not in allowed:
            raise ValueError(f"--{name}: {value!r}, allowed: {', '.join(allowed)}")


def step_range(name: str, total: int) -> range | None:
    """The value of flag `name`, first:end as in Python, of the steps 1 to `total`; None without."""
    text = flags.FLAGS[name].value
    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end) <= total + 1):
        raise ValueError(
            f"--{name}={text}: allowed: first:end within 1:{total + 1}; 10:15 is steps 10 to 14"
        )
    return range(int(first), int(end))


def compile_quickly() -> None:
    """Has XLA spend less time on compiling, and more on running: right for a few small steps.

    XLA reads its flags when a backend starts, so no array may exist yet.
    """
    flag = "--xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{flag} {os.environ.get('XLA_FLAGS', '')}".strip()


def cache_compilations() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second start does not compile.

    JAX_COMPILATION_CACHE_DIR says where else; empty, it turns this off.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "v4jax", "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def use_cores(count: int | None) -> int:
    """Keeps this process to its first `count` cores, before JAX starts; None: all. How many.

    Raises ValueError, one line, where there are fewer.
    """
    if not hasattr(os, "sched_setaffinity"):
        if count is not None:
            raise ValueError(f"--threads={count}: only Linux can limit the cores of a process")
        return os.cpu_count() or 1
    mine = sorted(os.sched_getaffinity(0))
    if count is not None:
        if count > len(mine):
            raise ValueError(f"--threads={count}: allowed: up to {len(mine)}, as many as are here")
        mine = mine[:count]
        os.sched_setaffinity(0, mine)
    return len(mine)
