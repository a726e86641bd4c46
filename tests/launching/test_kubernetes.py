"""Runs as JobSets: the manifests against JobSet's own schema, and what is said to kubectl.

There is no cluster here: admission by an API server, and the controllers, are not tested.
"""

import copy
import dataclasses
import json
import re
import shlex
from pathlib import Path

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

from tests.launching import jobset_schema
from v4jax.launching import jobset, kubernetes
from v4jax.launching.experiments import ROOT
from v4jax.launching.plan import make_plan
from v4jax.launching.run_folder import Command, RunFolder

VALIDATOR = jobset_schema.validator()
NEEDED = {"image": "eu.gcr.io/me/v4jax:1", "volume": "work:/runs"}
GPU = NEEDED | {"hosts": "2", "gpus": "8", "queue": "research", "memory": "512Gi", "cpu": "64"}
TPU = NEEDED | {"tpu": "tpu-v6e-slice", "topology": "4x4", "slices": "2", "namespace": "ml"}


def plan_of(*settings, workdir="/runs/switch", experiment="bf16_to_fp4"):
    return make_plan(experiment, workdir, settings, ["--steps=9"])


def manifest(resources, experiment="bf16_to_fp4", **settings):
    jobset.check(resources)
    return jobset.manifest(resources, plan_of(settings or {"seed": "1"}).runs[0], experiment)


def complaints(made):
    return [error.message for error in VALIDATOR.iter_errors(made)]


def test_the_manifest_for_hosts_with_gpus_is_this_one():
    name = manifest(GPU)["metadata"]["name"]
    assert re.fullmatch("r-[0-9a-f]{8}-switch-seed-1", name)
    assert (
        kubernetes.to_yaml(manifest(GPU))
        == f"""\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: {name}
  labels:
    app.kubernetes.io/part-of: v4jax
    kueue.x-k8s.io/queue-name: research
spec:
  failurePolicy:
    maxRestarts: 0
    rules:
    - name: again
      action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons:
      - PodFailurePolicy
  network:
    enableDNSHostnames: true
    publishNotReadyAddresses: true
  ttlSecondsAfterFinished: 604800
  replicatedJobs:
  - name: w
    replicas: 1
    template:
      spec:
        parallelism: 2
        completions: 2
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: main
              operator: In
              values:
              - 75
          - action: FailJob
            onPodConditions:
            - type: DisruptionTarget
              status: 'True'
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            containers:
            - name: main
              image: eu.gcr.io/me/v4jax:1
              workingDir: /v4jax
              command:
              - python
              - launch.py
              - --experiment=bf16_to_fp4
              - --steps=9
              - --seed=1
              - --workdir=/runs/switch/seed=1
              env:
              - name: PYTHONUNBUFFERED
                value: '1'
              - name: V4JAX_PREEMPTIBLE
                value: '1'
              - name: JAX_COORDINATOR_ADDRESS
                value: {name}-w-0-0.{name}:8476
              - name: V4JAX_NUM_PROCESSES
                value: '2'
              - name: V4JAX_PROCESS_ID
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']
              resources:
                limits:
                  cpu: '64'
                  memory: 512Gi
                  nvidia.com/gpu: 8
              volumeMounts:
              - name: work
                mountPath: /runs
              - name: shm
                mountPath: /dev/shm
              ports:
              - containerPort: 8476
            volumes:
            - name: work
              persistentVolumeClaim:
                claimName: work
            - name: shm
              emptyDir:
                medium: Memory
"""
    )


def test_the_manifest_for_tpu_slices():
    made = manifest(TPU | {"selector": "pool=a"})
    assert complaints(made) == []
    assert made["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert made["metadata"]["namespace"] == "ml"
    (slices,) = made["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    # 4 x 4 chips, four a host.
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 4, 4)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "pool": "a",
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    # GKE tells JAX who is who; our own variables would contradict it.
    names = [one["name"] for one in container["env"]]
    assert names == ["PYTHONUNBUFFERED", "V4JAX_PREEMPTIBLE"]


@pytest.mark.parametrize(
    ("topology", "more", "hosts", "chips"),
    [
        ("1x1", {}, 1, 1),
        ("2x2", {}, 1, 4),
        ("2x4", {}, 2, 4),
        ("2x4", {"chips_per_host": "8"}, 1, 8),
        ("16x16", {}, 64, 4),
        ("2x2x4", {}, 4, 4),
    ],
)
def test_hosts_of_a_slice(topology, more, hosts, chips):
    made = manifest(TPU | {"topology": topology, "slices": "1"} | more)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    assert (job["completions"], container["resources"]["limits"]["google.com/tpu"]) == (
        hosts,
        chips,
    )
    assert "hostNetwork" not in job["template"]["spec"]


COUNTS = st.integers(1, 64).map(str)
OPTIONAL = {
    "namespace": st.just("ml"),
    "queue": st.just("research"),
    "cpu": COUNTS,
    "memory": st.just("64Gi"),
    "grace": COUNTS,
    "selector": st.just("a=b,example.com/c=d"),
    "directory": st.just("/code"),
}
GPUS = st.fixed_dictionaries({}, optional=OPTIONAL | {"hosts": COUNTS, "gpus": COUNTS})
TPUS = st.fixed_dictionaries(
    {"tpu": st.just("tpu-v6e-slice"), "topology": st.sampled_from(["1x1", "4x4", "2x2x4"])},
    optional=OPTIONAL | {"slices": COUNTS},
)


@hypothesis.settings(max_examples=25)
@hypothesis.given(GPUS | TPUS, st.text(st.characters(codec="utf-8"), max_size=200))
def test_every_manifest_is_valid_and_reads_back_as_it_was(resources, value):
    made = manifest(NEEDED | resources, text=value)
    text = kubernetes.to_yaml(made)
    assert "&" not in re.sub("--text=.*", "", text, flags=re.DOTALL)  # no anchors
    assert yaml.safe_load(text) == made
    assert complaints(made) == []
    # JobSet names pods SET-JOB-INDEX-INDEX-xxxxx, and the part before the last as a host.
    name, (jobs,) = made["metadata"]["name"], made["spec"]["replicatedJobs"]
    last = f"{jobs['replicas'] - 1}-{jobs['template']['spec']['completions'] - 1}"
    assert re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", name)
    assert len(f"{name}-{jobs['name']}-{last}-xxxxx") <= 63


@hypothesis.given(st.lists(st.text(min_size=1, max_size=60), min_size=2, max_size=6, unique=True))
def test_two_runs_have_two_names(values):
    runs = plan_of(*({"text": value} for value in values)).runs
    assert len({jobset.jobset_name(run) for run in runs}) == len(values)


def planted(path, key, value=None):
    """The manifest with `key` in `path` renamed to `value`, or set to it if that is no name."""
    made = copy.deepcopy(manifest(GPU))
    place = made["spec"]
    for step in path:
        place = place[step]
    if isinstance(value, str) and value.isalpha():
        place[value] = place.pop(key)
    else:
        place[key] = value
    return made


JOB = ("replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")


@pytest.mark.parametrize(
    "made",
    [
        planted(("failurePolicy",), "maxRestarts", "maxRestart"),
        planted(("failurePolicy", "rules", 0), "action", "Restart "),
        planted(JOB, "parallelism", "paralelism"),
        planted(JOB, "completions", "2"),
        planted((*JOB, "podFailurePolicy", "rules", 0), "action", "failJob"),
        planted(POD, "terminationGracePeriodSeconds", "120"),
        planted((*POD, "containers", 0), "workingDir", "workdir"),
        planted((*POD, "containers", 0, "env", 0), "value", 1),
        planted((*POD, "containers", 0), "command", "python"),
    ],
)
def test_a_planted_mistake_is_found_by_the_schema(made):
    assert complaints(manifest(GPU)) == []
    assert len(complaints(made)) >= 1


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({"gpu": "1"}, "--gpu: --executor=k8s has no such resource"),
        ({"volume": "a:/b"}, "--image: --executor=k8s needs it"),
        (NEEDED | {"volume": "work"}, "--volume=work: allowed: CLAIM:PATH"),
        (NEEDED | {"hosts": "0"}, "--hosts=0: allowed: a whole number"),
        (NEEDED | {"tpu": "tpu-v6e-slice"}, "--tpu, --topology: one needs the other"),
        (NEEDED | {"slices": "2"}, "--slices: not without --tpu"),
        (TPU | {"gpus": "2"}, "--gpus: not with --tpu"),
        (TPU | {"topology": "4"}, "--topology=4: allowed: numbers of chips"),
        (TPU | {"chips_per_host": "5"}, "--chips_per_host=5: allowed: what divides"),
        (NEEDED | {"image": "a\nb"}, "--image='a\\nb': allowed: a name"),
    ],
)
def test_a_wrong_resource_ends_in_one_line(resources, words):
    with pytest.raises(ValueError) as caught:
        kubernetes.Kubernetes(resources, 1)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_sweep_outside_the_volume_is_refused():
    with pytest.raises(ValueError, match="--workdir=/runs/switch is not below /other"):
        manifest(NEEDED | {"volume": "work:/other"})


def test_a_sweep_in_a_bucket_needs_no_volume_and_any_other_does():
    plan = make_plan("bf16_to_fp4", "gs://b/switch", [{"seed": "0"}])
    made = jobset.manifest({"image": "a"}, plan.runs[0], "bf16_to_fp4")
    assert complaints(made) == []
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"][-1] == "--workdir=gs://b/switch/seed=0"
    assert [one["name"] for one in pod["volumes"]] == ["shm"]
    assert [one["name"] for one in pod["containers"][0]["volumeMounts"]] == ["shm"]
    with pytest.raises(ValueError, match="--volume=work:/runs: allowed: none"):
        jobset.manifest(NEEDED, plan.runs[0], "bf16_to_fp4")
    with pytest.raises(ValueError, match="--volume: --executor=k8s needs it"):
        manifest({"image": "a"})


def test_experiments_are_named_as_the_image_has_them():
    assert jobset.in_image("x") == ["python", "launch.py", "--experiment=x"]
    assert jobset.in_image(f"{ROOT}/experiments/x.py") == jobset.in_image("x")
    assert jobset.in_image(f"{ROOT}/mine/x.py")[2] == "--experiment=mine/x.py"
    with pytest.raises(ValueError, match="--experiment=/home/me/x.py: allowed: a file in"):
        jobset.in_image("/home/me/x.py")


def test_the_preview_is_all_manifests():
    plan = plan_of({"seed": "0"}, {"seed": "1"})
    shown = kubernetes.Kubernetes(GPU, 1).preview(plan)
    assert list(yaml.safe_load_all(shown)) == [
        jobset.manifest(GPU, run, "bf16_to_fp4") for run in plan.runs
    ]


# ---- kubectl ----

FAKE = """\
#!/bin/sh
# Keeps JobSets as files: name -> terminalState.
cd {folder}
echo "$*" >>calls
[ -e down ] && {{ echo "Unable to connect to the server: EOF" >&2; exit 1; }}
[ "$1" = --namespace=ml ] || exit 9
shift
case "$1 $2" in
apply*)
    name=$(sed -n 's/^  name: //p' "${{2#--filename=}}" | head -n 1)
    echo "<none>" >"sets/$name" ;;
"get jobsets") for f in sets/*; do [ -e "$f" ] && echo "${{f#sets/}}   $(cat "$f")"; done; exit 0 ;;
"get jobset") [ -e "sets/$3" ] && echo "jobset.jobset.x-k8s.io/$3"; exit 0 ;;
"delete jobset") rm -f "sets/$3" ;;
logs*) echo "[pod/x/main] the last words" ;;
esac
"""


@dataclasses.dataclass
class Cluster:
    folder: Path

    def end(self, name, state):
        (self.folder / "sets" / name).write_text(f"{state}\n")

    @property
    def sets(self):
        return sorted(path.name for path in (self.folder / "sets").iterdir())

    @property
    def calls(self):
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    folder = tmp_path / "cluster"
    (folder / "sets").mkdir(parents=True)
    program = folder / "kubectl"
    program.write_text(FAKE.format(folder=shlex.quote(str(folder))))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(kubernetes, "FRESH", 0.0)
    return Cluster(folder)


def started(tmp_path):
    plan = plan_of({"seed": "0"}, workdir=tmp_path / "sweep")
    executor = kubernetes.Kubernetes(TPU | {"volume": f"work:{tmp_path}"}, 1)
    command = Command(("python",), "/", {}, f"{ROOT}/experiments/bf16_to_fp4.py")
    folder = RunFolder(plan.runs[0].folder, command, 1, "token")
    folder.prepare()
    return executor, plan.runs[0], folder, executor.start(plan.runs[0], folder)


@pytest.mark.parametrize(("state", "code"), [("Completed", 0), ("Failed", 1)])
def test_a_run_is_applied_and_its_end_and_log_are_seen(cluster, tmp_path, state, code):
    executor, run, folder, handle = started(tmp_path)
    kept = yaml.safe_load((folder.launch / "jobset.yaml").read_text())
    assert complaints(kept) == []
    assert cluster.sets == [handle.job] == [kept["metadata"]["name"]]
    assert executor.poll(handle) is None
    cluster.end(handle.job, state)
    assert executor.poll(handle) == code
    assert folder.tail() == "[pod/x/main] the last words"


def test_a_jobset_outlives_its_launcher_and_can_be_stopped(cluster, tmp_path):
    executor, run, folder, handle = started(tmp_path)
    successor = kubernetes.Kubernetes(TPU | {"volume": f"work:{tmp_path}"}, 1)
    found = successor.attach(run, folder)
    assert found == handle and successor.poll(found) is None
    successor.stop(found)
    assert cluster.sets == []
    assert any("delete jobset" in call and "--cascade=foreground" in call for call in cluster.calls)
    assert successor.attach(run, folder) is None
    assert successor.poll(found) == 1  # it is gone


def test_one_question_serves_many_polls(cluster, tmp_path, monkeypatch):
    executor, _, _, handle = started(tmp_path)
    monkeypatch.setattr(kubernetes, "FRESH", 60.0)
    before = len(cluster.calls)
    assert [executor.poll(handle) for _ in range(20)] == [None] * 20
    assert len(cluster.calls) == before + 1


def test_a_cluster_that_does_not_answer_is_told_of_once(cluster, tmp_path, capsys):
    executor, _, folder, handle = started(tmp_path)
    (cluster.folder / "down").touch()
    assert [executor.poll(handle) for _ in range(3)] == [None] * 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "kubectl failed: Unable to connect to the server" in lines[0]
    with pytest.raises(ValueError, match="kubectl failed: Unable to connect"):
        started(tmp_path)
    (cluster.folder / "down").unlink()
    cluster.end(handle.job, "Completed")
    assert executor.poll(handle) == 0


def test_without_kubectl_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="kubectl is not on this machine"):
        started(tmp_path)


def test_the_schema_says_where_it_is_from():
    comment = json.loads(Path(jobset_schema.__file__).with_suffix(".json").read_text())["$comment"]
    assert "kubernetes-sigs/jobset" in comment and "Apache License 2.0" in comment
