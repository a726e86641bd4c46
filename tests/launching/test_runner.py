"""The loop over runs, with an executor that does nothing but end as it is told."""

import dataclasses
import errno
import itertools
import os
import signal

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.launching.sweeping import FAKE, disguised_claim, plan_of, states
from v4jax.launching import claim, run_folder, runner
from v4jax.launching.plan import make_plan
from v4jax.launching.run_folder import RunFolder, State
from v4jax.launching.runner import run_plan
from v4jax.training import files


class Notes:
    """A display that keeps what is said."""

    def __init__(self):
        self.notes = []

    def update(self, runs):
        self.runs = runs

    def note(self, text):
        self.notes.append(text)

    def close(self):
        self.closed = True


@dataclasses.dataclass
class Scripted:
    """Ends each run's attempts with its codes, in turn, then with 0."""

    codes: dict[str, list[int]]
    started: list[str] = dataclasses.field(default_factory=list)
    most: int = 0
    running: int = 0

    def start(self, run, folder):
        assert RunFolder(run.folder).read_state().state == "running"
        assert claim.owner_of(folder.claims).token == folder.token
        attempt = folder.attempt - 1
        folder.log.write_text(f"attempt {folder.attempt}\nits end\n")
        self.started.append(run.name)
        self.running += 1
        self.most = max(self.most, self.running)
        codes = self.codes.get(run.name, [])
        return [codes[attempt] if attempt < len(codes) else 0]

    def poll(self, handle):
        self.running -= 1
        return handle[0]

    def stop(self, handle):
        pass


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(runner, "POLL", 0.0)
    monkeypatch.setattr(runner, "_added_environment", dict)
    monkeypatch.setattr(run_folder, "source_version", lambda: (None, b""))
    monkeypatch.setattr(run_folder, "packages", dict)


def run(plan, executor, parallel=2, retries=2):
    notes = Notes()
    return run_plan(plan, executor, parallel=parallel, retries=retries, show=notes), notes


def fate(codes, retries):
    """(state, attempts, failures) of a run whose attempts end so: told apart from the runner."""
    failures = 0
    for attempt, code in enumerate(itertools.chain(codes, itertools.repeat(0)), 1):
        if code == 0:
            return "done", attempt, failures
        if code == 75:
            continue
        failures += 1
        if code == 2 or failures > retries:
            return "failed", attempt, failures
    raise AssertionError


codes = st.lists(st.lists(st.sampled_from([0, 1, 2, 75, -9]), max_size=6), max_size=4)


@hypothesis.given(codes, st.integers(0, 3), st.integers(1, 3))
@hypothesis.settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_every_run_ends_as_its_exits_say(tmp_path_factory, codes, retries, parallel):
    plan = plan_of(tmp_path_factory.mktemp("sweep"), len(codes))
    executor = Scripted({run.name: each for run, each in zip(plan.runs, codes, strict=True)})
    code, notes = run(plan, executor, parallel, retries)
    ends = [fate(each, retries) for each in codes]
    assert [(s.state, s.attempt, s.failures) for s in states(plan)] == ends
    assert code == int(any(state == "failed" for state, _, _ in ends))
    assert len(executor.started) == sum(attempts for _, attempts, _ in ends)
    assert executor.most <= parallel
    assert sum("its end" in note for note in notes.notes) == sum(n for _, _, n in ends)
    assert [claim.owner_of(RunFolder(r.folder).claims) for r in plan.runs] == [None] * len(codes)
    assert notes.closed


def test_a_failure_is_told_with_the_end_of_its_log(tmp_path):
    plan = plan_of(tmp_path, 1)
    code, notes = run(plan, Scripted({"seed=0": [1, -11]}), retries=1)
    first, second = notes.notes
    assert code == 1
    assert first.startswith("seed=0: exit code 1, trying again (1 of 1); the end of ")
    assert first.endswith("attempts/1/log.txt:\n    attempt 1\n    its end")
    assert second.startswith("seed=0: ended by SIGSEGV, given up")
    (state,) = states(plan)
    assert (state.exit, state.error) == (-11, "attempt 2\nits end")


def test_finished_runs_are_kept_and_failed_ones_get_their_tries_again(tmp_path):
    plan = plan_of(tmp_path, 3)
    executor = Scripted({"seed=1": [1, 1, 1, 75, 1, 0], "seed=2": [2, 0]})
    assert run(plan, executor, retries=1)[0] == 1
    assert [(s.state, s.attempt) for s in states(plan)] == [
        ("done", 1),
        ("failed", 2),
        ("failed", 1),
    ]
    executor.started.clear()
    code, notes = run(plan, executor, retries=1)
    assert code == 1
    assert notes.notes[0] == "1 of 3 runs are done and kept"
    assert executor.started == ["seed=1", "seed=2", "seed=1", "seed=1"]
    assert [s.state for s in states(plan)] == ["done", "failed", "done"]
    assert run(plan, executor, retries=1)[0] == 0
    before = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/launch/state.json"))]
    executor.started.clear()
    assert run(plan, executor)[0] == 0
    assert executor.started == []
    after = [path.stat().st_mtime_ns for path in sorted(tmp_path.glob("*/launch/state.json"))]
    assert before == after


def test_a_run_that_asks_for_more_for_ever_is_given_up(tmp_path):
    plan = plan_of(tmp_path, 1)
    code, notes = run(plan, Scripted({"seed=0": [75] * 100}), retries=0)
    assert code == 1
    assert "asked 10 times to be started again and made no step" in notes.notes[-1]
    assert states(plan)[0].attempt == 11


def test_a_run_of_a_dead_launcher_goes_on_with_its_failures_counted(tmp_path):
    plan = plan_of(tmp_path, 1)
    folder = RunFolder(plan.runs[0].folder)
    claim.take(folder.claims)
    disguised_claim(folder.claims, pid=2**22 + 1)  # more than Linux gives
    folder.write_state(State("running", attempt=4, failures=2))
    assert run(plan, Scripted({"seed=0": [0] * 4 + [1]}), retries=2)[0] == 1
    (state,) = states(plan)
    assert (state.state, state.attempt, state.failures) == ("failed", 5, 3)


def test_all_held_by_another_is_one_line(tmp_path):
    plan = plan_of(tmp_path, 2)
    for one in plan.runs:
        assert claim.take(RunFolder(one.folder).claims)
    with pytest.raises(ValueError, match="another launcher runs all that is left") as error:
        run(plan, Scripted({}))
    assert f"process {os.getpid()}" in str(error.value) and "\n" not in str(error.value)


def test_runs_of_another_launcher_are_waited_for(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, 2)
    held = claim.take(RunFolder(plan.runs[0].folder).claims)
    monkeypatch.setattr(runner, "ELSEWHERE", 0.01)

    class Freeing(Scripted):
        def poll(self, handle):
            if self.started == ["seed=1"]:
                held.release()
            return super().poll(handle)

    executor = Freeing({})
    assert run(plan, executor)[0] == 0
    assert executor.started == ["seed=1", "seed=0"]


def test_a_run_that_another_took_is_stopped_and_left_to_it(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, 1)
    folder = RunFolder(plan.runs[0].folder)
    monkeypatch.setattr(claim, "BEAT", 0.0)
    monkeypatch.setattr(runner, "ELSEWHERE", 0.01)
    stopped = []

    class Slow(Scripted):
        def poll(self, handle):
            if not stopped:  # another machine has seen no beat, and takes it
                disguised_claim(folder.claims, machine="elsewhere")
                os.utime(folder.claims / "1", (1, 1))
                self.other = claim.take(folder.claims)
            return None

        def stop(self, handle):
            stopped.append(handle)
            folder.write_state(State("done", attempt=2))
            self.other.release()

    code, notes = run(plan, Slow({}))
    assert (code, len(stopped)) == (0, 1)
    assert "its claim was lost to another launcher" in notes.notes[0]
    assert states(plan) == [State("done", attempt=2)]


def test_the_end_of_a_run_that_another_took_is_the_others_to_tell(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, 1)
    folder = RunFolder(plan.runs[0].folder)
    monkeypatch.setattr(runner, "ELSEWHERE", 0.01)

    class Late(Scripted):
        def poll(self, handle):
            disguised_claim(folder.claims, machine="elsewhere")
            os.utime(folder.claims / "1", (1, 1))
            other = claim.take(folder.claims)
            folder.write_state(State("done", attempt=2))
            other.release()
            return 1

    assert run(plan, Late({}))[0] == 0
    assert states(plan) == [State("done", attempt=2)]


def test_a_run_that_ended_elsewhere_in_the_last_instant_is_not_run_again(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, 1)
    take = claim.take

    def late(folder):
        RunFolder(plan.runs[0].folder).write_state(State("done", attempt=1))
        return take(folder)

    monkeypatch.setattr(claim, "take", late)
    executor = Scripted({})
    assert run(plan, executor)[0] == 0
    assert executor.started == []
    assert claim.owner_of(RunFolder(plan.runs[0].folder).claims) is None


def test_a_failed_run_that_another_launcher_tried_again_has_had_its_tries(tmp_path):
    plan = plan_of(tmp_path, 2)
    folder = RunFolder(plan.runs[1].folder)
    folder.write_state(State("failed", attempt=1, failures=1, exit=1))

    class Beside(Scripted):
        def poll(self, handle):
            folder.write_state(State("failed", attempt=2, failures=1, exit=1))
            return 0

    executor = Beside({})
    assert run(plan, executor, parallel=1)[0] == 1
    assert executor.started == ["seed=0"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGHUP, 129)]
)
def test_a_signal_stops_what_runs_and_is_no_failure(tmp_path, number, code):
    class Stopping(Scripted):
        def poll(self, handle):
            if handle[0] is None and not self.sent:
                self.sent = True
                signal.raise_signal(number)
            return handle[0]

        sent = False

        def stop(self, handle):
            handle[0] = 75

    plan = plan_of(tmp_path, 3)
    handler = signal.getsignal(number)
    executor = Stopping({"seed=0": [None], "seed=1": [None]})
    assert run(plan, executor)[0] == code
    assert signal.getsignal(number) is handler
    assert [(s.state, s.failures, s.exit) for s in states(plan)] == [
        ("preempted", 0, 75), ("preempted", 0, 75), ("pending", 0, None),
    ]  # fmt: skip
    assert run(plan, Scripted({}))[0] == 0


def test_a_job_that_outlived_its_launcher_is_attached_to(tmp_path):
    plan = plan_of(tmp_path, 1)
    folder = RunFolder(plan.runs[0].folder)
    folder.write_state(State("running", attempt=3, failures=1, job="17"))

    class Scheduler(Scripted):
        def attach(self, run, folder):
            assert (folder.attempt, folder.read_state().job) == (3, "17")
            self.running += 1
            return [0]

    executor = Scheduler({})
    assert run(plan, executor)[0] == 0
    assert executor.started == []
    assert (states(plan)[0].state, states(plan)[0].attempt) == ("done", 3)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    plan = plan_of(tmp_path, 3)
    stopped = []

    class Full(Scripted):
        def poll(self, handle):
            def write(path, content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

            if handle[0] == 0 and len(self.started) > 2:
                monkeypatch.setattr(files, "write_whole", write)
                monkeypatch.setattr(claim, "write_whole", write)
            return handle[0]

        def stop(self, handle):
            stopped.append(handle)

    with pytest.raises(ValueError) as error:
        run(plan, Full({"seed=1": [None]}))
    assert str(error.value).startswith(f"--workdir={tmp_path}: No space left on device")
    assert "nothing is lost" in str(error.value) and "\n" not in str(error.value)
    assert len(stopped) == 1
    monkeypatch.undo()
    # This process lives still: its claims are as if it were dead.
    for one in plan.runs:
        if claim.owner_of(RunFolder(one.folder).claims):
            disguised_claim(RunFolder(one.folder).claims, pid=2**22 + 1)
    assert [s.state for s in states(plan)] == ["done", "running", "running"]
    assert run(plan, Scripted({}))[0] == 0


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    plan = plan_of(tmp_path / "file", 1)
    with pytest.raises(ValueError, match=f"--workdir={tmp_path}/file: Not a directory") as error:
        run(plan, Scripted({}))
    assert "\n" not in str(error.value)


def test_what_is_started_is_the_experiments_command_line(tmp_path):
    seen = []

    class Looking(Scripted):
        def start(self, run, folder):
            seen.append(folder.command)
            return super().start(run, folder)

    plan = plan_of(tmp_path, 1, steps=5)
    assert run(plan, Looking({}))[0] == 0
    assert seen[0].argv[1:] == (
        str(FAKE), "--steps=5", "--seed=0", f"--workdir={tmp_path}/seed=0",
    )  # fmt: skip
    assert seen[0].directory == os.getcwd()
    assert (tmp_path / "seed=0/launch/experiment.py").read_bytes() == FAKE.read_bytes()


def test_runs_that_share_a_pretraining_wait_for_the_first_to_make_it(tmp_path):
    """Four runs, two pre-trainings: the second of each starts when the first has passed it."""
    settings = [{"qat_start": start, "seed": seed} for seed in "01" for start in "34"]
    plan = make_plan(str(FAKE), tmp_path, settings)
    plan = dataclasses.replace(plan, after_switch=("qat_start",))
    together = []

    class Phases(Scripted):
        def start(self, run, folder):
            alive.append(run)
            together.append(tuple(sorted(one.name for one in alive)))
            phase = run.folder / "pretrain"
            phase.mkdir()
            (phase / "metrics.jsonl").write_text('{"step": 1}\n')
            super().start(run, folder)
            return [run, 0]

        def poll(self, handle):
            run, looks = handle
            handle[1] += 1
            if looks == 2:
                (run.folder / "control").mkdir()
                (run.folder / "control/metrics.jsonl").write_text('{"step": 4}\n')
            if looks < 5:
                return None
            alive.remove(run)
            return 0

    alive = []
    code, _ = run(plan, Phases({}), parallel=4)
    assert code == 0
    first = {"qat_start=3,seed=0", "qat_start=3,seed=1"}
    assert set(together[1]) == first  # not qat_start=4,seed=0, though slots were free
    assert set(together[3]) > first  # nor after the end: after the pre-training


def test_without_flags_after_a_switch_nothing_is_shared(tmp_path):
    plan = plan_of(tmp_path, 2)
    assert not plan.share(*plan.runs)
    assert not dataclasses.replace(plan, after_switch=("x",)).share(*plan.runs)
    assert dataclasses.replace(plan, after_switch=("seed",)).share(*plan.runs)
