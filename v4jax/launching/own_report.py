"""The process that makes a study's report: python -m v4jax.launching.own_report EXPERIMENT WORKDIR

It imports the experiment's file, as `describe` does, and calls its report(workdir) for the sweep in
that folder. Exit code 0; 1, after one line, where the runs cannot be reported on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from v4jax.launching.describe import load
from v4jax.training.files import absolute


def main(experiment: str, workdir: str) -> int:
    """Calls it; the exit code."""
    try:
        load(experiment).report(absolute(workdir))
    except (ValueError, OSError) as error:
        print(f"{Path(experiment).stem}: report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
