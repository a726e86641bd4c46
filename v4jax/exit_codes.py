"""Exit codes with a meaning for whoever started a run; all others are failures."""

DONE = 0

REFUSED = 2
"""Bad input, said in one line: trying again cannot help."""

AGAIN = 75
"""A checkpoint is written; the same command goes on."""
