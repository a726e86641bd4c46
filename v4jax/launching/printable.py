"""What runs have printed, made fit for a terminal's table, a page and a CSV file."""

from __future__ import annotations

import re
import unicodedata


def clean(text: str) -> str:
    """Without a terminal's colours and without what is not text, lines kept."""
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)
    odd = "\N{REPLACEMENT CHARACTER}"
    return "".join(
        c if c in "\n\t" or unicodedata.category(c)[0] != "C" else odd for c in text
    ).strip()


def last_line(text: str) -> str:
    """The last line, or ""."""
    return text.rstrip().rpartition("\n")[2].strip()
