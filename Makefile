# Every target sets up what it needs: `make demo` and `make test` work on a fresh machine with Python 3.11+.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# threads that wait sleep: on a machine that has other work too, spinning ones make everything many times slower
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := setup

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: setup
	$(BIN)/quantkit demo

# make release MODEL=bielik-7b-instruct-v0.1 FORMATS="gptq awq": each recipe of the model built, judged and published, and
# a report of them all; a recipe's gate that fails stops its own publication (exit 3). Every step can be run alone, and
# again, and several at once (make -j2). See docs/publish.md.
MODEL ?= bielik-nano
FORMATS ?= gptq
OUT ?= artifacts
# repositories are ORG/MODEL-FORMAT, or without ORG those of the recipes
ORG ?=
# a folder for JUnit XML of the gates
JUNIT ?=
BUILD_FLAGS ?=
PUBLISH_FLAGS ?=
RECIPES := $(filter-out base,$(basename $(notdir $(wildcard recipes/$(MODEL)/*.toml))))

.PHONY: setup demo release build validate report publish $(RECIPES) test lint docs docs-check test-engines test-slow test-gpu clean

release: publish report
build: $(FORMATS:%=build-%)
validate: $(FORMATS:%=validate-%)
publish: $(FORMATS:%=publish-%)

# `make gptq` is `make build-gptq`
$(RECIPES): %: build-%

report: build
	$(BIN)/quantkit report $(FORMATS:%=$(OUT)/$(MODEL)-%) --out $(OUT)/$(MODEL)-report

# no file stands for an artifact: quantkit compares the record with recipe and source, and does nothing if they agree
build-%: setup
	$(BIN)/quantkit build $(MODEL)/$* --out $(OUT)/$(MODEL)-$* $(if $(JUNIT),--junit $(JUNIT)/$(MODEL)-$*.xml) $(BUILD_FLAGS)

validate-%: build-%
	$(BIN)/quantkit validate $(OUT)/$(MODEL)-$* $(if $(JUNIT),--junit $(JUNIT)/$(MODEL)-$*.xml)

publish-%: build-%
	$(BIN)/quantkit publish $(OUT)/$(MODEL)-$* $(if $(ORG),--repo $(ORG)/$(MODEL)-$*) $(PUBLISH_FLAGS)

test: lint docs-check
	$(BIN)/pytest

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python docs/generate.py

docs-check: setup
	$(BIN)/python docs/generate.py --check

# the upstream packages read what quantkit writes, and build; their environments are made once, under ~/.cache
test-engines: setup
	$(BIN)/pytest -m "slow and not gpu" tests/engines tests/test_upstream.py

# minutes each; `harness` installs lm-evaluation-harness, which one of them compares with
test-slow: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,harness]"
	$(BIN)/pytest -m "slow and not gpu"

test-gpu: setup
	$(BIN)/pytest -m gpu

clean:
	rm -rf $(VENV) build dist artifacts .pytest_cache .mypy_cache .ruff_cache
