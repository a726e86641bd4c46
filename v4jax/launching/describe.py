"""The process that looks into one experiment's file: python -m v4jax.launching.describe

Reads a question (`experiments.Question`) as JSON from stdin and writes the answer as JSON to
stdout, {"error": one line} if it is no. The file is imported, so what is under its `if __name__ ==
"__main__":` stays out; JAX is imported only if the file, or its describe(), does so.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags

from v4jax.launching import sweep

FLAGS = flags.FLAGS


def load(experiment: str) -> ModuleType:
    """Imports the file of an experiment, a name in experiments/ or a path, as its start would.

    Raises:
      ValueError: it cannot be imported, or has no guard that keeps an import from running it.
    """
    try:
        if not experiment.endswith(".py"):
            return importlib.import_module(f"experiments.{experiment}")
        tree = ast.parse(Path(experiment).read_text(encoding="utf-8"), Path(experiment).name)
        if not any(isinstance(n, ast.If) and "__name__" in ast.unparse(n.test) for n in tree.body):
            raise ValueError('has no `if __name__ == "__main__":`; without it an import runs it')
        sys.path.insert(0, os.path.dirname(experiment))  # as when it is started by its path
        spec = importlib.util.spec_from_file_location("experiment", experiment)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["experiment"] = module
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as error:
        kind = "" if type(error) is ValueError else f"cannot be imported: {type(error).__name__}: "
        raise ValueError(f"--experiment={experiment}: {kind}{_line(error)}") from error


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The fields of `experiments.Answer`; see there.

    Raises:
      ValueError: one line: what the experiment does not take.
    """
    module = load(question["experiment"])
    label = Path(question["experiment"]).stem
    others = question["others"]
    if question["runs"] and "workdir" not in FLAGS:
        raise ValueError(f"--sweep: {label} has no flag --workdir, which gives a run its folder")
    for name in question["swept"]:
        if name not in FLAGS:
            raise ValueError(f"--sweep: {label} has no flag {name}{_hint(name, list(FLAGS))}")
        if name != FLAGS[name].name:  # by two names, one run would be two
            raise ValueError(f"--sweep: {name} is short for {FLAGS[name].name}; write that")
    if question["runs"] and "workdir" in question["swept"]:
        raise ValueError("--sweep: workdir is not for a sweep to set: each run has its own folder")
    for name in question["taken"]:
        if name in FLAGS:
            raise ValueError(
                f"--{name}: both {label} and the launcher have it, and it went to the launcher; "
                f"to set {label}'s, write --sweep {name}=VALUE"
            )
    fixed, wrong = _given(label, question["fixed"], others)
    functions = {name: _settings(module, name, wrong) for name in question["functions"]}
    for name in set(question["swept"]).intersection(fixed):
        raise ValueError(f"--{name}: is in a --sweep too; give it once")
    columns, values = [], []
    for arguments in question["runs"]:
        _parse(label, arguments, others)
        set_here = [name for name in question["swept"] if FLAGS[name].present]
        values.append({name: "\n".join(_spelled(name)) for name in set_here})
        if question["columns"] and hasattr(module, "describe"):
            columns.append(_columns(module))
    spelled = [line for lines in fixed.values() for line in lines]
    return {
        "functions": functions,
        "fixed": spelled,
        "values": values,
        "columns": columns,
        "after_switch": list(getattr(module, "AFTER_SWITCH", ())),
        "growing": list(getattr(module, "GROWING", ())),
    }


def _parse(label: str, arguments: list[str], others: list[str]) -> None:
    """Sets the flags from `arguments` alone, or raises ValueError in one line."""
    FLAGS.unparse_flags()  # values of an earlier parse would stay
    try:
        rest = FLAGS([label, *arguments])
    except flags.UnrecognizedFlagError as error:
        hint = _hint(error.flagname, [*FLAGS, *others])
        if not hint and others:
            hint = f"; the launcher's own are: {', '.join(others)}"
        raise ValueError(f"--{error.flagname}: {label} has no such flag{hint}") from error
    except flags.Error as error:
        raise ValueError(_line(error)) from error
    if len(rest) > 1:
        raise ValueError(f"{rest[1]}: not a flag; flags are --name=value")


def _given(
    label: str, arguments: list[str], others: list[str]
) -> tuple[dict[str, list[str]], ValueError | None]:
    """Flag -> its spelling on a command line, for the flags that `arguments` set; and why they
    cannot be read, if they cannot."""
    wrong = None
    try:
        _parse(label, arguments, others)
    except ValueError as error:
        # A flag that is required may be in the sweep; a wrong value ends the first run's parse.
        if not isinstance(error.__cause__, flags.IllegalFlagValueError):
            raise
        wrong = error
    given = {}
    for name in sorted(FLAGS):
        flag = FLAGS[name]
        if flag.present and flag.name == name:  # not its short name
            given[name] = _spelled(name)
    return given, wrong


def _spelled(name: str) -> list[str]:
    """The flag and its value as words of a command line, in one spelling."""
    flag = FLAGS[name]
    known = flag.serializer or flag.boolean
    return (flag.serialize() if known else f"--{name}={flag.value}").split("\n")


def _hint(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)  # cores is not nodes
    return f"; did you mean {near[0]}?" if near else ""


def _settings(module: ModuleType, name: str, wrong: ValueError | None) -> list[dict[str, str]]:
    """What the file's function `name` returns, as text. wrong: why it cannot read its flags."""
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"--sweep {name}(): the experiment's file has no function {name}")
    try:
        return [{flag: sweep.text(value) for flag, value in row.items()} for row in function()]
    except flags.UnparsedFlagAccessError as error:
        raise (wrong or error) from None
    except Exception as error:
        raise ValueError(
            f"--sweep {name}(): a list of dicts flag -> value is needed; {_line(error)}"
        ) from error


def _columns(module: ModuleType) -> dict[str, Any]:
    """What the file's describe() says of the run whose flags are parsed."""
    try:
        columns = module.describe()
        return {str(name): value for name, value in columns.items()}
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"describe(): {kind}{_line(error)}") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def main() -> None:
    """Answers the question on stdin."""
    question = json.load(sys.stdin)
    # What the file prints must not get between the answer's lines.
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        reply = answer(question)
    except ValueError as error:
        reply = {"error": str(error)}
    with output:
        json.dump(reply, output, default=str)


if __name__ == "__main__":
    main()
