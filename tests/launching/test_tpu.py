"""The commands for Cloud TPU VMs: they are printed, so what a shell makes of them is tested."""

import os
import shlex
import subprocess

import hypothesis
import pytest
from hypothesis import strategies as st

from v4jax import distributed
from v4jax.launching.plan import make_plan
from v4jax.launching.tpu import Tpu

NEEDED = {
    "accelerator_type": "v6e-16",
    "runtime_version": "v2-alpha-tpuv6e",
    "zone": "us-east5-b",
    "bucket": "gs://me/runs",
}


def plan_of(**settings):
    return make_plan("bf16_to_fp4", "/runs/switch", [settings], ["--steps=9"])


def test_the_commands_are_these():
    more = {"project": "p", "spot": "yes", "valid_until": "6h", "setup": "pip install ./v4jax[tpu]"}
    text = Tpu(NEEDED | more, 1).preview(plan_of(seed="1"))
    name = text.split("create ")[1].split()[0]
    assert name.startswith("r-") and name.endswith("-switch-seed-1")
    where = "--zone=us-east5-b --project=p"
    assert text == (
        "# seed=1\n"
        f"gcloud compute tpus queued-resources create {name} --node-id={name} "
        f"--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e {where} --spot "
        "--valid-until-duration=6h\n"
        f"gcloud compute tpus tpu-vm ssh {name} {where} --worker=all "
        "'--command=pip install ./v4jax[tpu] && cd v4jax && V4JAX_DETECT_PROCESSES=1 "
        "python launch.py --experiment=bf16_to_fp4 --steps=9 --seed=1 "
        "--workdir=gs://me/runs/switch/seed=1'\n"
        f"gcloud compute tpus queued-resources delete {name} {where} --force --quiet\n"
    )


def test_hosts_are_told_to_look_for_each_other():
    """By the variable that `v4jax.distributed` reads, in the environment of what runs there."""
    ssh = shlex.split(Tpu(NEEDED, 1).preview(plan_of(seed="1")).split("\n")[2])
    host = ssh[-1].removeprefix("--command=")
    program = f"cd() {{ :; }}; python() {{ env; }}\n{host}"
    shown = subprocess.run(
        ["bash", "-c", program], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    ).stdout
    environ = dict(line.split("=", 1) for line in shown.splitlines())
    assert distributed.arguments(environ) is not None
    assert distributed.arguments({}) is None


@hypothesis.given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
@hypothesis.settings(max_examples=25)
def test_a_host_gets_the_run_s_arguments_whatever_is_in_them(value):
    text = Tpu(NEEDED, 1).preview(plan_of(text=value))
    # Two shells read it, the user's and a host's, which prints what python would get.
    fakes = (
        'gcloud() { for w in "$@"; do case $w in --command=*) printf %s "${w#*=}";; esac; done; }'
    )
    sent = subprocess.run(["bash", "-c", f"{fakes}\n{text}"], capture_output=True).stdout
    host = b'cd() { :; }; python() { printf "%s\\0" "$@"; }\n' + sent
    got = subprocess.run(["bash", "-c", host], capture_output=True).stdout.decode().split("\0")
    assert got[:4] == ["launch.py", "--experiment=bf16_to_fp4", "--steps=9", f"--text={value}"]
    assert got[4].startswith("--workdir=gs://me/runs/switch/") and got[5:] == [""]


def test_a_sweep_s_own_bucket_is_where_its_runs_are():
    plan = make_plan("bf16_to_fp4", "gs://b/switch", [{"seed": "0"}])
    given = {name: value for name, value in NEEDED.items() if name != "bucket"}
    assert " --workdir=gs://b/switch/seed=0'" in Tpu(given, 1).preview(plan)
    with pytest.raises(ValueError, match="--bucket: --executor=tpu needs it"):
        Tpu(given, 1).preview(plan_of(seed="0"))


def test_every_run_has_its_own_slice_and_folder():
    plan = make_plan("bf16_to_fp4", "/runs/switch", [{"seed": "0"}, {"seed": "1"}])
    lines = [shlex.split(line, comments=True) for line in Tpu(NEEDED, 1).preview(plan).split("\n")]
    created = [line[5] for line in lines if "create" in line]
    assert len(set(created)) == 2
    assert [line[5] for line in lines if "ssh" in line] == created
    assert [line[5] for line in lines if "delete" in line] == created


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        ({}, "--accelerator_type: --executor=tpu needs it: slice, such as v6e-16"),
        (NEEDED | {"gpus": "1"}, "--gpus: --executor=tpu has no such resource"),
        (NEEDED | {"bucket": "/runs"}, "--bucket=/runs: allowed: gs://BUCKET/PATH"),
        (NEEDED | {"spot": "true"}, "--spot=true: allowed: yes, no"),
        (NEEDED | {"valid_until": "soon"}, "--valid_until=soon: allowed: a number with"),
        (NEEDED | {"zone": "a; rm -r ."}, "--zone=a; rm -r .: allowed: a name"),
    ],
)
def test_a_wrong_resource_ends_in_one_line(resources, words):
    with pytest.raises(ValueError) as caught:
        Tpu(resources, 1)
    assert words in str(caught.value) and "\n" not in str(caught.value)
