"""Who is who among processes, from flags and environments, without starting any."""

import subprocess
import sys

import pytest

from v4jax import distributed
from v4jax.distributed import arguments

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "2",
}
JOBSET = {
    "JAX_COORDINATOR_ADDRESS": "v4-w-0-0.v4:8476",
    "V4JAX_NUM_PROCESSES": "2",
    "V4JAX_PROCESS_ID": "1",
}
COMMON = {"heartbeat_timeout_seconds": 30, "initialization_timeout": 300}
ALONE = COMMON | {
    "coordinator_address": "127.0.0.1:0",
    "coordinator_bind_address": "127.0.0.1:0",
    "num_processes": 1,
    "process_id": 0,
    "cluster_detection_method": "deactivate",
}


def test_nothing_said_is_one_process_without_a_service():
    assert arguments({}) is None
    assert arguments({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None  # no srun: the shell


def test_a_process_alone_where_asked():
    assert arguments({}, preemptible=True) == ALONE
    assert arguments({"V4JAX_PREEMPTIBLE": "1"}) == ALONE
    assert arguments({"V4JAX_PREEMPTIBLE": "0"}) is None
    assert arguments(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) == ALONE
    one = {"V4JAX_NUM_PROCESSES": "1", "V4JAX_PROCESS_ID": "0"}
    assert arguments(one) == ALONE
    assert arguments(one | {"JAX_COORDINATOR_ADDRESS": "host:1"}) == ALONE


def test_a_jobset_says_all():
    assert arguments(JOBSET) == COMMON | {
        "coordinator_address": "v4-w-0-0.v4:8476",
        "num_processes": 2,
        "process_id": 1,
        "cluster_detection_method": "deactivate",
    }


def test_flags_go_over_the_environment_and_that_over_detection():
    found = arguments(JOBSET | SLURM, coordinator="a:1", num_processes=4, process_id=3)
    assert found is not None
    assert (found["coordinator_address"], found["num_processes"], found["process_id"]) == (
        "a:1",
        4,
        3,
    )
    found = arguments(JOBSET | SLURM | {"SLURM_NTASKS": "8"})
    assert found is not None and found["num_processes"] == 2


@pytest.mark.parametrize(
    ("address", "bind"),
    [
        ("127.0.0.1:9", "127.0.0.1:9"),
        ("127.9.9.9:9", "127.9.9.9:9"),
        ("localhost:9", "127.0.0.1:9"),
        ("[::1]:9", "[::1]:9"),
        ("node1:9", None),
        ("127node:9", None),
    ],
)
def test_a_loopback_coordinator_listens_on_the_loopback_alone(address, bind):
    found = arguments({}, coordinator=address, num_processes=2, process_id=0)
    assert found is not None and found.get("coordinator_bind_address") == bind
    slurm = arguments(SLURM | {"JAX_COORDINATOR_ADDRESS": address})
    assert slurm is not None and slurm.get("coordinator_bind_address") == bind
    chosen = {"JAX_COORDINATOR_BIND_ADDRESS": "10.0.0.1:9"}  # read by JAX itself
    found = arguments(chosen, coordinator=address, num_processes=2, process_id=0)
    assert found is not None and "coordinator_bind_address" not in found


def test_slurm_is_detected_by_jax_and_a_task_a_node_sees_all_gpus():
    assert arguments(SLURM) == COMMON | {"local_device_ids": []}
    assert arguments(SLURM | {"SLURM_NTASKS": "8"}) == COMMON  # JAX: one GPU a task
    older = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NUM_NODES"} | {"SLURM_NNODES": "2"}
    assert arguments(older) == COMMON | {"local_device_ids": []}
    found = arguments(SLURM | {"JAX_COORDINATOR_ADDRESS": "n0:5"})
    assert found == COMMON | {"local_device_ids": [], "coordinator_address": "n0:5"}


def test_jax_takes_no_local_devices_for_all_of_them(monkeypatch):
    """An empty list must neither start JAX's choice of one device nor hide any."""
    from jax._src.clusters import ClusterEnv

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    detect = ClusterEnv.auto_detect_unset_distributed_params
    address, count, index, local = detect(None, None, None, [], None, 1)
    assert (count, index, local) == (2, 1, []) and address.startswith("n0:")
    assert detect(None, None, None, None, None, 1)[3] == [0]


@pytest.mark.parametrize(
    "environ",
    [
        {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"V4JAX_DETECT_PROCESSES": "1"},
    ],
)
def test_tpu_slices_and_open_mpi_are_left_to_jax(environ):
    assert arguments(environ) == COMMON


def test_one_tpu_host_is_one_process():
    assert arguments({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None


def test_the_heartbeat():
    found = arguments(JOBSET | {"V4JAX_HEARTBEAT_SECONDS": "10"})
    assert found is not None and found["heartbeat_timeout_seconds"] == 10


@pytest.mark.parametrize(
    ("environ", "flags", "message"),
    [
        ({}, {"num_processes": 2}, "--process_id: missing"),
        ({"V4JAX_PROCESS_ID": "0"}, {}, "--num_processes: missing"),
        ({}, {"num_processes": 2, "process_id": 0}, "needs --coordinator=host:port"),
        ({}, {"num_processes": 2, "process_id": 2, "coordinator": "a:1"}, "allowed: 0 to 1"),
        ({}, {"num_processes": 2, "process_id": 0, "coordinator": "a"}, "--coordinator=a: allowed"),
        ({}, {"coordinator": "a:1"}, "needs --num_processes and --process_id"),
        ({"V4JAX_NUM_PROCESSES": "two"}, {}, "V4JAX_NUM_PROCESSES=two: allowed: a whole number"),
        ({"V4JAX_NUM_PROCESSES": "0"}, {}, "V4JAX_NUM_PROCESSES=0: allowed: a whole number from 1"),
        ({"V4JAX_HEARTBEAT_SECONDS": "-1"}, {}, "V4JAX_HEARTBEAT_SECONDS=-1"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(environ, flags, message):
    with pytest.raises(ValueError) as caught:
        arguments(environ, **flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_coordinator_ends_in_one_line():
    with pytest.raises(ValueError, match="--coordinator=no-such-host.invalid:80: "):
        distributed.await_name("no-such-host.invalid:80", seconds=0)
    distributed.await_name("127.0.0.1:80", seconds=0)
    distributed.await_name("[::1]:80", seconds=0)


def test_alone_everything_among_processes_is_nothing():
    assert distributed.is_main() and not distributed.preempted()
    distributed.barrier("nobody")
    distributed.agree(3, "the step")
    assert distributed.from_main(7) == 7


def test_errors_alone_pass_through_and_pre_emption_exits_with_75(capsys):
    with pytest.raises(KeyError), distributed.errors_end_at_once():
        raise KeyError("a")
    with pytest.raises(SystemExit) as caught, distributed.errors_end_at_once():
        raise distributed.Preempted("saved at step 3")
    assert caught.value.code == 75 and capsys.readouterr().err == "saved at step 3\n"


def test_the_exit_code_of_an_uncaught_pre_emption():
    program = "from v4jax import distributed; raise distributed.Preempted('saved')"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 75


def test_between_trainings_a_sigterm_ends_the_run(monkeypatch):
    distributed.end_if_preempted("now")
    monkeypatch.setattr(distributed, "preempted", lambda: True)
    with pytest.raises(distributed.Preempted) as caught:
        distributed.end_if_preempted("while waiting")
    assert caught.value.code == 75 and caught.value.message.startswith("SIGTERM, while waiting; ")
