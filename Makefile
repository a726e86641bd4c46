# v4jax. `make demo` and `make test` need nothing but a Python 3.11, 3.12 or 3.13: .venv is made by them.
#   PYTHON=...  the interpreter of .venv (default: the newest of the three that this machine has)
#   INTEROP_PYTHON=...  the same for .venv-interop (default: the oldest)
#   EXTRAS=dev,cuda13   what .venv gets besides the project itself (setup.cfg lists them)
#   ARGS=...    more flags: for the demo's experiment (ARGS=--quick), for pytest (ARGS="-k sinkhorn")

export PYTHON
ARGS ?=
WORKDIR ?= $(if $(findstring --quick,$(ARGS)),runs/quick,runs/demo)
WORKERS ?= 2
EXTRAS ?= dev

ENVIRONMENT := tools/environment.sh make
PYTEST := .venv/bin/python -m pytest --durations=10

# In the order that tests/conftest.py gives the files: the longest first.
SPREAD := -n $(WORKERS) --dist=loadfile --no-loadscope-reorder

.PHONY: help demo test test-slow test-interop test-aot lint lock clean venv venv-interop venv-aot

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1 - /p' Makefile

demo: venv ## pre-train in BF16, switch to FP4, compare: under ten minutes on two cores, result in runs/demo
	.venv/bin/python launch.py --experiment=bf16_to_fp4 --workdir=$(WORKDIR) $(ARGS)

# Most of its time is XLA's, so it compiles with few optimizations. The slow tests, and CI's of the
# numerics and kernels on a second Python, compile as a user's run does; so do those of ARGS.
# With ARGS one run of all, slow ones too: a selection (ARGS="-k sinkhorn") says what it wants.
test: venv ## every test that is fast
ifeq ($(strip $(ARGS)),)
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PYTEST) $(SPREAD) -m "not slow and not alone"
else
	$(PYTEST) $(ARGS)
endif

test-slow: venv ## the others: trainings, kills, sweeps, a Slurm, notebooks, what measures time
	$(PYTEST) $(SPREAD) -m "slow and not alone"
	$(PYTEST) -m alone

test-interop: venv-interop ## parity with transformers, in an environment with torch of its own
	.venv-interop/bin/python -m pytest --durations=10 tests/interop $(ARGS)

test-aot: venv-aot ## compile the kernels for v5e, v6e, v7x and the H100, none of which need be here
	REQUIRE_TARGETS=1 .venv-aot/bin/python -m pytest --durations=10 $(SPREAD) \
	    tests/kernels_pallas/aot $(ARGS)

lint: venv ## ruff (rules and format) and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

lock: venv ## write constraints.txt anew: the newest versions for Python 3.11 to 3.13 that fit setup.cfg
	.venv/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv/bin/uv pip compile setup.cfg --all-extras --universal --python-version 3.11 --upgrade \
	    --quiet --no-annotate --no-config --custom-compile-command "make lock" --output-file constraints.txt

clean: ## remove what these targets made, except runs/
	rm -rf .venv .venv-interop .venv-aot .venv-second .venv-aot-second .cache build v4jax.egg-info

venv:
	@$(ENVIRONMENT) .venv $(EXTRAS)

# Torch is slow to support a new Python, so the oldest comes first here. What PyPI serves for Linux
# brings CUDA along; the CPU build is enough, and pip prefers it where PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL name a place that has it.
venv-interop:
	@PYTHON='$(INTEROP_PYTHON)' $(ENVIRONMENT) .venv-interop dev,interop 3.11 3.12 3.13

venv-aot:
	@$(ENVIRONMENT) .venv-aot dev,aot
