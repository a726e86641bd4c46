"""What an executor is given beside the runs: options of launch.py, checked before a start."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

Pattern = tuple[str, str]
"""A regular expression that the whole value must match, and what to say is allowed."""

COUNT: Pattern = (r"[1-9]\d*", "a whole number from 1 on")


def check_resources(
    executor: str,
    given: Mapping[str, str],
    known: Mapping[str, str],
    *,
    allowed: Mapping[str, Pattern] | None = None,
    otherwise: Pattern = (r"(?s).*", "anything"),
    needed: Collection[str] = (),
) -> None:
    """Raises ValueError, one line, on an unknown resource, a wrong value, or one that is missing.

    known: option -> help. allowed: option -> its values; `otherwise` holds for those not there.
    """
    for name in given:
        if name not in known:
            there = "; ".join(f"--{option} ({text})" for option, text in known.items()) or "none"
            raise ValueError(
                f"--{name}: --executor={executor} has no such resource; it has {there}"
            )
    for name, value in given.items():
        pattern, text = (allowed or {}).get(name, otherwise)
        if not re.fullmatch(pattern, value):
            shown = value if value.isprintable() else repr(value)
            raise ValueError(f"--{name}={shown}: allowed: {text}")
    for name in needed:
        if name not in given:
            raise ValueError(f"--{name}: --executor={executor} needs it: {known[name]}")
