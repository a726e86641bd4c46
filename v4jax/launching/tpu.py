"""Runs on Cloud TPU VMs: the commands that start them, printed. Nothing here starts anything.

A queued resource is a TPU slice that one waits for; the run's command then goes to all its hosts,
where V4JAX_DETECT_PROCESSES has JAX ask who the others are. The hosts' disks go with the slice, so
a run's folder is in a bucket: --workdir, or a folder of its name in --bucket. `kubernetes` has TPU
slices of GKE.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from v4jax.launching import experiments
from v4jax.launching.jobset import in_image, jobset_name
from v4jax.launching.plan import Plan, Run
from v4jax.launching.resources import check_resources
from v4jax.training.files import in_bucket

RESOURCES: Mapping[str, str] = {
    "accelerator_type": "slice, such as v6e-16",
    "runtime_version": "software of the hosts, such as v2-alpha-tpuv6e",
    "zone": "zone, such as us-east5-b",
    "bucket": "gs://..., where the runs' folders are, unless --workdir is one",
    "project": "project that pays; default: gcloud's",
    "spot": "yes: cheaper, and may be taken away",
    "valid_until": "how long to wait for the slice, such as 6h",
    "directory": "where the hosts have this repository; default v4jax",
    "setup": "a command on every host before the run, such as one that installs it",
}

NEEDED = ("accelerator_type", "runtime_version", "zone")
ALLOWED = {
    "bucket": (r"gs://[\w./-]+", "gs://BUCKET/PATH"),
    "spot": (r"yes|no", "yes, no"),
    "valid_until": (r"\d+[smhd]", "a number with s, m, h or d"),
    "setup": (r".+", "one line"),
    "directory": (r"[\w./~-]+", "a path"),
}


class Tpu:
    """Prints commands for gcloud. Raises ValueError, one line, on bad resources."""

    RESOURCES = RESOURCES

    def __init__(self, resources: Mapping[str, str], slots: int):
        name = (r"[\w.-]+", "a name")
        check_resources("tpu", resources, RESOURCES, allowed=ALLOWED, otherwise=name, needed=NEEDED)
        self._given = dict(resources)

    def preview(self, plan: Plan, retries: int = 0) -> str:
        """A shell script: for each run, the commands that get a slice, run on it, give it back."""
        experiment = experiments.located(plan.experiment)
        runs = [self.commands(plan, run, experiment) for run in plan.runs]
        blocks = [
            f"# {run.name}\n" + "\n".join(lines) for run, lines in zip(plan.runs, runs, strict=True)
        ]
        return "\n\n".join(blocks) + "\n"

    def _bucket(self, plan: Plan) -> str:
        """The sweep's folder, in a bucket."""
        if in_bucket(plan.workdir):
            return str(plan.workdir)
        if "bucket" not in self._given:
            raise ValueError(f"--bucket: --executor=tpu needs it: {RESOURCES['bucket']}")
        return f"{self._given['bucket'].rstrip('/')}/{plan.workdir.name}"

    def commands(self, plan: Plan, run: Run, experiment: str) -> list[str]:
        """The three commands of one run. Run the second when the slice is ACTIVE, and again, with
        a new slice, after a pre-emption: the run goes on from its checkpoint."""
        given, name = self._given, jobset_name(run)
        where = [f"--zone={given['zone']}"]
        where += [f"--project={given['project']}"] if "project" in given else []
        create = [
            *("gcloud", "compute", "tpus", "queued-resources", "create", name),
            f"--node-id={name}",
            f"--accelerator-type={given['accelerator_type']}",
            f"--runtime-version={given['runtime_version']}",
            *where,
        ]
        create += ["--spot"] if given.get("spot") == "yes" else []
        if "valid_until" in given:
            create.append(f"--valid-until-duration={given['valid_until']}")
        workdir = f"{self._bucket(plan)}/{run.name}"
        started = [*in_image(experiment), *run.arguments, f"--workdir={workdir}"]
        steps = [given["setup"]] if "setup" in given else []
        steps.append(f"cd {given.get('directory', 'v4jax')}")
        steps.append(f"V4JAX_DETECT_PROCESSES=1 {shlex.join(started)}")
        ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, *where, "--worker=all"]
        ssh.append(f"--command={' && '.join(steps)}")
        delete = ["gcloud", "compute", "tpus", "queued-resources", "delete", name, *where]
        return [shlex.join(line) for line in (create, ssh, [*delete, "--force", "--quiet"])]
