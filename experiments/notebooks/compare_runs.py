# %% [markdown]
# # Compare the runs of a sweep
#
# `SWEEP` is a folder that `launch.py --sweep` made; runs may still be at work. Without one, this
# makes a sweep of 18 runs of the toy in `mxfp4_by_hand.py`: two learning rates, three places of the
# switch to FP4, three seeds. The tables and figures are those of `python launch.py report`.

# %%
import pathlib
import subprocess
import sys

import v4jax
from v4jax.launching import show
from v4jax.launching.results import best, group_columns, read_results, run_columns
from v4jax.training.metrics import table

SWEEP = pathlib.Path("../../runs/switch")  # any sweep's --workdir
METRIC = None  # the number to judge by; None takes a loss, or the first there is

# %%
if not SWEEP.exists():
    SWEEP = pathlib.Path("toy_sweep")
    launcher = pathlib.Path(v4jax.__file__).parents[1] / "launch.py"
    command = f"--experiment=toy_switch --workdir={SWEEP} --executor=in_process"
    axes = ["learning_rate=0.01,0.03", "qat_start=0.3,0.6,0.9", "seed=0:3"]
    done = subprocess.run(
        [sys.executable, launcher, *command.split(), *(f"--sweep={axis}" for axis in axes)],
        capture_output=True,
        text=True,
    )
    print(done.stderr[-500:])
    done.check_returncode()

results = read_results(SWEEP)
show.summary(results, METRIC)

# %% [markdown]
# ## Means over seeds
#
# A row for every setting; runs that differ in their seed alone are one. The spread is the sample
# standard deviation: what a difference between rows has to be measured against.

# %%
show.table(results, METRIC)

# %% [markdown]
# ## Over each axis
#
# A point is a mean over seeds, a bar one standard deviation, small dots are single seeds; a line is
# one combination of the other axes.

# %%
show.over_axes(results, METRIC)

# %% [markdown]
# ## Losses
#
# Every run's training loss, by the value of one axis, for each part of a run: here the control in
# float32 and the arm that switches.

# %%
axis = list(results.axes)[-1]
show.losses(results, axis)

# %% [markdown]
# ## The numbers themselves
#
# `group_columns` has a row for every setting and `run_columns` one for every run, as columns:
# `pandas.DataFrame(dict(run_columns(results)))` if you like. `best` names the best of either.

# %%
names, columns = zip(*group_columns(results), strict=True)
print(table(list(zip(*columns, strict=True)), names))
metric = METRIC or results.metrics[0]
found = best(results, metric)
if found is not None:
    group, run = found
    print("best mean:", dict(group.settings), group.summary(metric))
    print("best run: ", run.run.name, run.numbers[metric])
print("columns of every run:", ", ".join(name for name, _ in run_columns(results)))
