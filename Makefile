# Every target sets up what it needs in .venv; only python3 (3.11 or newer) and make
# have to be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := $(VENV)/bench
MODELS := $(VENV)/models
COMPILED := $(VENV)/compiled
EXTERNAL := $(VENV)/external
MAXTEXT := $(VENV)/maxtext
DOCS := $(VENV)/docs
LOWEST := $(VENV)/lowest
NEWEST := $(VENV)/newest
PACKAGE := $(VENV)/package
OUT ?= runs/demo
# The build of JAX for training and timing, such as JAX="jax[cuda13]" on a GPU.
JAX ?= jax

.DEFAULT_GOAL := help
.PHONY: help demo grpo distill test test-all test-models test-compiled \
  test-maxtext test-lowest test-newest newest-dependencies package release-check \
  lint docs bench bench-external bench-maxtext experiments clean FORCE

help:
	@echo "make demo           train a small language model on this Python's own source"
	@echo "make grpo           post-train it with a reward that a program computes"
	@echo "make distill        train a model of half the width with it as the teacher"
	@echo "make test           the test suite, without the slow tests"
	@echo "make test-all       the test suite, slow tests included"
	@echo "make test-models    train other people's models with this loss"
	@echo "make test-compiled  compile for TPUs and GPUs, which need not be there"
	@echo "make test-maxtext   train in MaxText with this loss"
	@echo "make lint           formatting, lint and types"
	@echo "make docs           the documentation as a site, in site/"
	@echo "make bench          times and memory against other implementations"
	@echo "make bench-external other packages' losses, compiled for a TPU that need not be there"
	@echo "make bench-maxtext  MaxText's training step, likewise, with its losses and with ours"
	@echo "make test-lowest    the package's tests with the oldest dependencies that it allows"
	@echo "make test-newest    the same with the newest"
	@echo "make package        build sdist and wheel, install each on its own, and try it there"
	@echo "make release-check  TAG, version and change log agree: make release-check TAG=v1.2.3"
	@echo "make experiments    what training under the losses does, in about three hours"
	@echo "make clean          remove .venv, site/, dist/ and the caches; runs/ stays"

demo: $(VENV)/.train
	$(BIN)/python examples/train_tpu.py --preset demo --out $(OUT) $(ARGS)

# On the model in OUT.
grpo distill: $(VENV)/.train
	$(BIN)/python examples/$@.py --checkpoint $(OUT) $(ARGS)

# Work is stolen, not dealt: a worker keeps a module, whose tests share programs.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --doctest-modules ava_jax tests $(ARGS)

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal --doctest-modules ava_jax tests $(ARGS)

# Each file on one worker: its tests share the runs that they compare with.
test-models: $(VENV)/.models
	$(MODELS)/bin/python -m pytest -n 2 --dist loadfile tests/models $(ARGS)

# One worker: the compilers use all cores, and the tests share compiled programs.
test-compiled: $(VENV)/.compiled
	$(COMPILED)/bin/python -m pytest tests/compiled $(ARGS)

# What a release promises of its dependencies: the package without the trainer.
CORE_TESTS := --doctest-modules ava_jax tests/losses tests/heads tests/test_public_api.py \
  $(addprefix tests/kernel/test_,blocks.py collectives.py divergence.py platforms.py \
  implementations.py) $(addprefix tests/terms/test_,compose.py user_terms.py)

test-lowest: $(VENV)/.lowest
	$(LOWEST)/bin/python -m pytest -n 1 -m "not slow" $(CORE_TESTS) $(ARGS)

# The newest JAX needs the newest Python: make PYTHON=python3.13 test-newest
test-newest: newest-dependencies
	$(NEWEST)/bin/python -m pytest -n 1 -m "not slow" $(CORE_TESTS) $(ARGS)

package: $(VENV)/.package
	$(PACKAGE)/bin/python tools/check_package.py

release-check:
	@$(PYTHON) tools/check_release.py $(TAG)

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# The variable silences a notice about the theme's successor, which is no warning.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict $(ARGS)

bench: $(VENV)/.bench
	$(BENCH)/bin/python -m benchmarks.run --scaling $(ARGS)

# This and the next two need Python 3.12: make PYTHON=python3.12 bench-maxtext
test-maxtext: $(VENV)/.maxtext
	$(MAXTEXT)/bin/python -m pytest tests/maxtext $(ARGS)

bench-external: $(VENV)/.external
	$(EXTERNAL)/bin/python -m benchmarks.external $(ARGS)

bench-maxtext: $(VENV)/.maxtext
	$(MAXTEXT)/bin/python -m benchmarks.maxtext own tiling plain everything train $(ARGS)

experiments: $(VENV)/.train
	$(BIN)/python -m experiments.run all --jobs 2 $(ARGS)
	$(BIN)/python -m experiments.tables

FORCE:

clean:
	rm -rf $(VENV) site dist .cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: ava_jax needs Python 3.11 or newer, and $(PYTHON) is" \
	    "$$($(PYTHON) --version 2>&1): run make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make a virtual environment (on Debian:" \
	    "apt install python3-venv)" >&2; exit 1; }

# The stamps remember that an extra is installed, so a second call goes straight to work;
# they do not remember another build of JAX.
ifneq ($(JAX),jax)
$(VENV)/.train $(VENV)/.bench: FORCE
endif

$(VENV)/.train: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train]' '$(JAX)'
	@touch $@

$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[test]'
	@touch $@ $(VENV)/.train

# An environment of its own: the site's packages are of no use to the tests.
$(VENV)/.docs: pyproject.toml
	@$(MAKE) --no-print-directory VENV=$(DOCS) $(DOCS)/bin/python
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -q -e '.[docs]'
	@touch $@

# An environment of its own: tokamax pins a typeguard that tyro, of the train extra,
# refuses.
$(VENV)/.bench: pyproject.toml
	@$(MAKE) --no-print-directory VENV=$(BENCH) $(BENCH)/bin/python
	$(BENCH)/bin/python -m pip install --disable-pip-version-check -q -e '.[bench]' '$(JAX)'
	@touch $@

# An environment of its own: transformers has to be an old one, and tunix brings much.
$(VENV)/.models: pyproject.toml
	@$(MAKE) --no-print-directory VENV=$(MODELS) $(MODELS)/bin/python
	$(MODELS)/bin/python -m pip install --disable-pip-version-check -q -e '.[models]'
	@touch $@

# An environment of its own: the TPU's compiler alone is 0.7 GB.
$(VENV)/.compiled: pyproject.toml
	@$(MAKE) --no-print-directory VENV=$(COMPILED) $(COMPILED)/bin/python
	$(COMPILED)/bin/python -m pip install --disable-pip-version-check -q -e '.[compiled]'
	@touch $@

# Environments of their own: Levanter refuses the newest JAX, and MaxText brings much.
$(VENV)/.external $(VENV)/.maxtext: $(VENV)/.%: pyproject.toml
	@$(MAKE) --no-print-directory VENV=$(VENV)/$* $(VENV)/$*/bin/python
	$(VENV)/$*/bin/python -m pip install --disable-pip-version-check -q -e '.[$*]'
	@touch $@

# Exactly the lower bounds of the core dependencies.
$(VENV)/.lowest: pyproject.toml tools/lower_bounds.py
	@$(MAKE) --no-print-directory VENV=$(LOWEST) $(LOWEST)/bin/python
	$(LOWEST)/bin/python tools/lower_bounds.py > $(LOWEST)/bounds.txt
	$(LOWEST)/bin/python -m pip install --disable-pip-version-check -q \
	  -c $(LOWEST)/bounds.txt -e '.[core-test]'
	@touch $@

# No stamp: what is newest changes.
newest-dependencies:
	@$(MAKE) --no-print-directory VENV=$(NEWEST) $(NEWEST)/bin/python
	$(NEWEST)/bin/python -m pip install --disable-pip-version-check -q \
	  --upgrade --upgrade-strategy eager -e '.[core-test]'

# Without the package: it is installed into environments of its own.
$(VENV)/.package:
	@$(MAKE) --no-print-directory VENV=$(PACKAGE) $(PACKAGE)/bin/python
	$(PACKAGE)/bin/python -m pip install --disable-pip-version-check -q \
	  build twine 'readme-renderer[md]'
	@touch $@
