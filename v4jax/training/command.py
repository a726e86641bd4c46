"""What every experiment's command line shares: quick values, quiet logs, cache, one-line errors."""

import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import app, flags, logging


def run(main: Callable[[], None], quick: Mapping[str, Any]) -> None:
    """Parses the flags and calls `main`. A ValueError ends in one line and exit code 2.

    quick: flag -> value that --quick sets where the user did not.
    """

    def parsed(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"{argv[1]}: not a flag; flags are --name=value")
        values = flags.FLAGS
        if values.quick:
            for name, value in quick.items():
                if values[name].using_default_value:
                    values[name].value = value
        if not values["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells of every file
        cache_compilations()
        try:
            main()
        except (ValueError, FloatingPointError) as error:
            if values.traceback:
                raise
            print(f"{pathlib.Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(parsed)


flags.DEFINE_bool("traceback", False, "[run] Show where an error arose, not just what it is.")


def fraction_or_steps(name: str) -> int | float:
    """The value of flag `name`: a fraction up to 1, a number of steps above."""
    value: float = flags.FLAGS[name].value or 0.0
    if value > 1 and value != int(value):
        raise ValueError(f"--{name}={value}: allowed: a fraction in [0, 1], or whole steps above 1")
    return int(value) if value > 1 else float(value)


def cache_compilations() -> None:
    """Keeps compiled programs in .cache/jax, so that a second start does not compile again.

    JAX_COMPILATION_CACHE_DIR says where else; empty, it turns this off.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(".cache/jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
