"""The JobSet of a run: resources and a run -> a manifest for `kubectl apply`. Pure.

JobSet is jobset.x-k8s.io/v1alpha2. A slice of a TPU, or all hosts with GPUs, are one Job of it.
"""

from __future__ import annotations

import hashlib
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from v4jax.exit_codes import AGAIN
from v4jax.launching.experiments import ROOT
from v4jax.launching.plan import Run
from v4jax.launching.resources import COUNT, check_resources
from v4jax.training.files import in_bucket

PORT = 8476  # of the coordinator
WEEK = 7 * 86400  # for so long, an ended JobSet can be looked at
WORKERS = "w"
LABEL, OURS = "app.kubernetes.io/part-of", "v4jax"

RESOURCES: Mapping[str, str] = {
    "image": "container image",
    "directory": "where the image has this repository; default /v4jax",
    "volume": "CLAIM:PATH, a persistent volume claim and where pods have it; --workdir lies in it, "
    "or in a bucket, and there is none",
    "namespace": "namespace; default: kubectl's",
    "queue": "local queue of Kueue",
    "hosts": "pods of each run, one a node; default 1; not with --tpu",
    "gpus": "GPUs of each pod",
    "tpu": "kind of TPU slice, such as tpu-v6e-slice",
    "topology": "its chips, such as 4x4",
    "slices": "slices of each run; default 1",
    "chips_per_host": "chips of each host of a slice; default 4, or all of a smaller slice",
    "cpu": "cores of each pod",
    "memory": "memory of each pod, such as 64Gi",
    "selector": "labels that the nodes must have: KEY=VALUE,...",
    "grace": "seconds between SIGTERM and SIGKILL; default 120",
}

ALLOWED = {
    **dict.fromkeys(("hosts", "gpus", "slices", "chips_per_host", "cpu", "grace"), COUNT),
    "topology": (r"[1-9]\d*(x[1-9]\d*){1,2}", "numbers of chips, such as 4x4 or 2x2x4"),
    "memory": (r"\d+(Mi|Gi|Ti|M|G|T)", "a size such as 64Gi"),
    "volume": (r"[a-z0-9.-]+:/.+", "CLAIM:PATH, the path absolute"),
    "directory": (r"/.*", "an absolute path"),
    "selector": (r"[\w./-]+=[\w.-]*(,[\w./-]+=[\w.-]*)*", "KEY=VALUE,..."),
}


def check(resources: Mapping[str, str]) -> None:
    """Raises ValueError, one line, on a resource or a value that makes no manifest."""
    check_resources(
        "k8s",
        resources,
        RESOURCES,
        allowed=ALLOWED,
        otherwise=(r"[\w./:@-]+", "a name"),
        needed=("image",),
    )
    tpu = "tpu" in resources
    if tpu != ("topology" in resources):
        raise ValueError("--tpu, --topology: one needs the other")
    for name in ("hosts", "gpus") if tpu else ("slices", "chips_per_host"):
        if name in resources:
            raise ValueError(f"--{name}: not {'with' if tpu else 'without'} --tpu")
    if tpu and _chips(resources["topology"]) % _chips_per_host(resources):
        raise ValueError(
            f"--chips_per_host={_chips_per_host(resources)}: allowed: what divides the chips of "
            f"--topology={resources['topology']}"
        )


def manifest(given: Mapping[str, str], run: Run, experiment: str) -> dict[str, Any]:
    """The JobSet of a run.

    given: resources that `check` has seen. experiment: its name, or the absolute path of its file.

    Raises ValueError, one line, where the experiment is not in the image, or the run's folder not
    on the volume.
    """
    name = jobset_name(run)
    metadata: dict[str, Any] = {"name": name, "labels": {LABEL: OURS}}
    if "namespace" in given:
        metadata["namespace"] = given["namespace"]
    if "queue" in given:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = given["queue"]
    if "tpu" in given:  # a slice is a node pool: no pods of others in it, and none elsewhere
        topology = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        metadata["annotations"] = {topology: "cloud.google.com/gke-nodepool"}
        hosts = _chips(given["topology"]) // _chips_per_host(given)
    else:
        hosts = _int(given, "hosts", 1)
    again = {
        "name": "again",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    pod = _pod(given, _container(given, run, experiment, name, hosts))
    jobs = {
        "name": WORKERS,
        "replicas": _int(given, "slices", 1),
        "template": {"spec": _job(hosts, pod)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            # All other failures are for the launcher, which counts and shows them.
            "failurePolicy": {"maxRestarts": 0, "rules": [again]},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "ttlSecondsAfterFinished": WEEK,
            "replicatedJobs": [jobs],
        },
    }


def _container(
    given: Mapping[str, str], run: Run, experiment: str, name: str, hosts: int
) -> dict[str, Any]:
    mount = _mount(given, run)
    limits: dict[str, Any] = {key: given[key] for key in ("cpu", "memory") if key in given}
    container: dict[str, Any] = {
        "name": "main",
        "image": given["image"],
        "workingDir": given.get("directory", "/v4jax"),
        "command": [*in_image(experiment), *run.arguments, f"--workdir={run.folder}"],
        "env": [
            {"name": "PYTHONUNBUFFERED", "value": "1"},
            {"name": "V4JAX_PREEMPTIBLE", "value": "1"},  # SIGTERM saves, and exits with 75
        ],
        "resources": {"limits": limits},
        "volumeMounts": [
            *([{"name": "work", "mountPath": mount}] if mount else []),
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if "tpu" in given:
        limits["google.com/tpu"] = _chips_per_host(given)
        container["securityContext"] = {"privileged": True}
    else:
        if "gpus" in given:
            limits["nvidia.com/gpu"] = int(given["gpus"])
        if hosts > 1:
            container["ports"] = [{"containerPort": PORT}]
            container["env"] += _processes(f"{name}-{WORKERS}-0-0.{name}:{PORT}", hosts)
    return container


def _mount(given: Mapping[str, str], run: Run) -> str | None:
    """Where pods have the volume that --workdir is on; None where that is in a bucket."""
    volume, workdir = given.get("volume"), run.folder.parent
    if in_bucket(workdir):
        if volume is not None:
            raise ValueError(
                f"--volume={volume}: allowed: none, as --workdir={workdir} is a bucket"
            )
        return None
    if volume is None:
        raise ValueError(
            f"--volume: --executor=k8s needs it where --workdir is no bucket: {RESOURCES['volume']}"
        )
    mount = volume.partition(":")[2]
    if not workdir.is_relative_to(mount):
        raise ValueError(
            f"--volume={volume}: --workdir={workdir} is not below {mount}, so what a run writes "
            "would go with its pod"
        )
    return mount


def _pod(given: Mapping[str, str], container: dict[str, Any]) -> dict[str, Any]:
    volumes = []
    if "volume" in given:
        claim = {"claimName": given["volume"].partition(":")[0]}
        volumes.append({"name": "work", "persistentVolumeClaim": claim})
    pod: dict[str, Any] = {
        "restartPolicy": "Never",  # podFailurePolicy asks for it
        "terminationGracePeriodSeconds": _int(given, "grace", 120),
        "containers": [container],
        "volumes": [
            *volumes,
            {"name": "shm", "emptyDir": {"medium": "Memory"}},  # 64 MiB is too little for NCCL
        ],
    }
    labels = [label for label in given.get("selector", "").split(",") if label]
    selector = dict(label.split("=", 1) for label in labels)
    if "tpu" in given:
        selector["cloud.google.com/gke-tpu-accelerator"] = given["tpu"]
        selector["cloud.google.com/gke-tpu-topology"] = given["topology"]
        if _int(given, "slices", 1) > 1:  # slices talk over the hosts' network
            pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    return pod | ({"nodeSelector": selector} if selector else {})


def _job(hosts: int, pod: dict[str, Any]) -> dict[str, Any]:
    """The Job of a slice, or of all hosts. Its PodFailurePolicy is what the JobSet goes by."""
    evicted = [{"type": "DisruptionTarget", "status": "True"}]
    again = {"containerName": "main", "operator": "In", "values": [AGAIN]}
    return {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": again},
                {"action": "FailJob", "onPodConditions": evicted},
            ]
        },
        "template": {"spec": pod},
    }


def _processes(address: str, count: int) -> list[dict[str, Any]]:
    """The environment by which the processes of a run find each other."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": address},
        {"name": "V4JAX_NUM_PROCESSES", "value": str(count)},
        {"name": "V4JAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]


def in_image(experiment: str) -> list[str]:
    """The command that starts an experiment where this repository is the working directory.

    Raises ValueError, one line, where the experiment's file is not in the repository.
    """
    path = pathlib.Path(experiment)
    if path.suffix == ".py":
        if not path.is_relative_to(ROOT):
            raise ValueError(f"--experiment={path}: allowed: a file in {ROOT}, as the image has it")
        inside = path.relative_to(ROOT)
        named = inside.parent == pathlib.Path("experiments")
        experiment = inside.stem if named else inside.as_posix()
    return ["python", "launch.py", f"--experiment={experiment}"]


def jobset_name(run: Run) -> str:
    """A name for the run's JobSet: a DNS label, short enough that its pods' names are some too."""
    digest = hashlib.sha256(str(run.folder).encode()).hexdigest()[:8]
    text = re.sub("[^a-z0-9]+", "-", f"{run.folder.parent.name}-{run.name}".lower()).strip("-")
    return f"r-{digest}-{text}"[:42].rstrip("-")


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


def _chips_per_host(given: Mapping[str, str]) -> int:
    return _int(given, "chips_per_host", min(4, _chips(given["topology"])))


def _int(given: Mapping[str, str], name: str, default: int) -> int:
    return int(given.get(name, default))
