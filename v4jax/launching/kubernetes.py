"""Runs on Kubernetes: one JobSet a run, on hosts with GPUs or on TPU slices.

A run's manifest is kept as `<run>/launch/jobset.yaml` and goes to `kubectl apply`. The JobSet
controller must be in the cluster; `--queue` names a queue of Kueue. The container image holds this
repository in `--directory`; the sweep's folder lies in a bucket that the pods may write, or on a
volume that pods and launcher have at the same path.

A pod that leaves with 75 (a checkpoint is written, run me again), or that the cluster evicts, has
the JobSet start again, any number of times. All other failures end it; the launcher tries again.
The processes of a run find each other by explicit variables, so pods need no rights in the cluster;
on TPU slices GKE sets its own, which JAX reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from v4jax.launching import experiments, jobset
from v4jax.launching.asking import ask
from v4jax.launching.jobset import jobset_name, manifest
from v4jax.launching.plan import Plan, Run
from v4jax.launching.run_folder import RunFolder
from v4jax.training.files import on_disk, write_whole

TIMEOUT = 60.0
"""Seconds to wait for kubectl's answer."""

FRESH = 5.0
"""Seconds for which an answer serves: polling many runs asks once."""


@dataclasses.dataclass(frozen=True)
class Handle:
    """A JobSet, by its name."""

    job: str
    folder: RunFolder


class Kubernetes:
    """A JobSet a run. Raises ValueError, one line, on bad resources. `slots` is the launcher's."""

    RESOURCES = jobset.RESOURCES

    def __init__(self, resources: Mapping[str, str], slots: int):
        jobset.check(resources)
        self._given = dict(resources)
        self._silent = False
        self._asked = -FRESH
        self._listed: dict[str, str] = {}  # JobSet -> how it ended, "<none>" while it has not

    def preview(self, plan: Plan, retries: int = 0) -> str:
        """The manifests of all runs, as `kubectl apply -f -` takes them."""
        source = experiments.located(plan.experiment)
        return "---\n".join(to_yaml(manifest(self._given, run, source)) for run in plan.runs)

    def start(self, run: Run, folder: RunFolder) -> Handle:
        """Creates the run's JobSet. Raises ValueError, one line, where kubectl fails."""
        assert folder.command is not None and folder.command.source is not None
        made = manifest(self._given, run, folder.command.source)
        path = folder.launch / "jobset.yaml"
        write_whole(path, to_yaml(made).encode())
        handle = Handle(made["metadata"]["name"], folder)
        self.stop(handle)  # an earlier attempt's, which has ended
        with on_disk(path) as file:
            self._ask("apply", f"--filename={file}")
        self._asked = -FRESH
        return handle

    def attach(self, run: Run, folder: RunFolder) -> Handle | None:
        """The handle of the run's JobSet if there is one: its launcher died, it may still run."""
        handle = Handle(jobset_name(run), folder)
        found = self._ask("get", "jobset", handle.job, "--ignore-not-found", "--output=name")
        return handle if found.strip() else None

    def poll(self, handle: Handle) -> int | None:
        """0 or 1 once the JobSet has ended, also 1 if it is gone; else None.

        Its pods' output is then in the attempt's log. Where the cluster does not answer, that is
        said once, and the answer is None.
        """
        try:
            ended = self._states().get(handle.job, "gone")
        except ValueError as error:
            if not self._silent:
                print(f"launch: {error}; the runs go on, asking again", file=sys.stderr)
            self._silent = True
            return None
        self._silent = False
        if ended == "<none>":
            return None
        with contextlib.suppress(ValueError, OSError):  # pods may be gone, and with them this
            selector = f"--selector=jobset.sigs.k8s.io/jobset-name={handle.job}"
            options = ("--prefix", "--tail=-1", "--max-log-requests=1000")
            write_whole(handle.folder.log, self._ask("logs", selector, *options).encode())
        return 0 if ended == "Completed" else 1

    def stop(self, handle: Handle) -> None:
        """Deletes the JobSet and waits for its pods, which get SIGTERM, SIGKILL `--grace` later."""
        grace = int(self._given.get("grace", 120))
        options = ("--ignore-not-found", "--cascade=foreground", f"--timeout={grace + 60}s")
        self._ask("delete", "jobset", handle.job, *options, timeout=grace + 60 + TIMEOUT)
        self._asked = -FRESH

    def _states(self) -> dict[str, str]:
        """JobSet -> how it ended, of all that are ours: one question for all runs."""
        if time.monotonic() - self._asked > FRESH:
            columns = "custom-columns=NAME:.metadata.name,STATE:.status.terminalState"
            selector = f"--selector={jobset.LABEL}={jobset.OURS}"
            text = self._ask("get", "jobsets", selector, "--no-headers", f"--output={columns}")
            self._listed = dict(line.split() for line in text.splitlines())
            self._asked = time.monotonic()
        return self._listed

    def _ask(self, *words: str, timeout: float = TIMEOUT) -> str:
        space = [f"--namespace={self._given['namespace']}"] if "namespace" in self._given else []
        return kubectl([*space, *words], timeout)


def to_yaml(made: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(made, sort_keys=False, width=100)


def kubectl(words: Sequence[str], timeout: float = TIMEOUT) -> str:
    """What kubectl answers. Raises ValueError, one line, where it does not."""
    absent = "; --dry_run prints what it would get"
    return ask(["kubectl", *words], timeout, here="--executor=k8s: kubectl", absent=absent)
