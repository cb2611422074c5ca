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

# make release MODEL=bielik-7b-instruct-v0.1 FORMATS="gptq awq": each recipe of the model built and judged, a report drawn of
# them all, and what passed published. A recipe that fails stops none of the others; make fails at the end. Every step can
# be run alone, and again, and several at once (make -j2). See docs/publish.md.
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
REPORT := $(OUT)/$(MODEL)-report
# recipes that a goal names, as publish-gptq does; FORMATS where none does
NAMED := $(patsubst publish-%,%,$(filter publish-%,$(MAKECMDGOALS)))
# what is to be published is refused before it is built where it could not be
BOUND := $(if $(filter publish publish-%,$(MAKECMDGOALS)),--release)

.PHONY: setup demo release build validate report publish drawn $(RECIPES) test lint docs docs-check test-engines test-slow \
	test-gpu clean clean-artifacts

# what fails, fails at the end: the other recipes, the report and what passed come first
release:
	+@$(MAKE) --no-print-directory --keep-going build publish report

build: $(FORMATS:%=build-%)
validate: $(FORMATS:%=validate-%)
publish: $(FORMATS:%=publish-%)

# `make gptq` is `make build-gptq`
$(RECIPES): %: build-%

# no file stands for an artifact: quantkit compares the record with recipe and source, and does nothing if they agree.
# How a step ended stands in a file, so that the steps after it can go on with what there is, and make fails with it.
built-%: setup
	@mkdir -p $(OUT)
	@(set -x; $(BIN)/quantkit build $(MODEL)/$* --out $(OUT)/$(MODEL)-$* $(if $(JUNIT),--junit $(JUNIT)/$(MODEL)-$*.xml) \
		$(BOUND) $(BUILD_FLAGS)); echo $$? > $(OUT)/.$(MODEL)-$*.exit

build-%: built-%
	@exit $$(cat $(OUT)/.$(MODEL)-$*.exit)

validate-%: build-%
	$(BIN)/quantkit validate $(OUT)/$(MODEL)-$* $(if $(JUNIT),--junit $(JUNIT)/$(MODEL)-$*.xml)

# of every artifact of the model that is there, whether it passed or not
drawn: $(patsubst %,built-%,$(or $(NAMED),$(FORMATS)))
	@there=; for one in $(RECIPES:%=$(OUT)/$(MODEL)-%); do if [ -f $$one/quantkit.json ]; then there="$$there $$one"; fi; done; \
	if [ "$$there" ]; then (set -x; $(BIN)/quantkit report $$there --out $(REPORT)); \
	else echo "no artifact of $(MODEL) in $(OUT): nothing to report on" >&2; false; fi; echo $$? > $(OUT)/.$(MODEL)-report.exit

report: drawn
	@exit $$(cat $(OUT)/.$(MODEL)-report.exit)

# a gate that failed (3) is left to publish, which takes the variants that passed; whatever else failed left nothing to take
publish-%: built-% drawn
	@ended=$$(cat $(OUT)/.$(MODEL)-$*.exit); [ $$ended -eq 0 ] || [ $$ended -eq 3 ] || exit $$ended; \
	drawn=; [ "$$(cat $(OUT)/.$(MODEL)-report.exit)" != 0 ] || drawn="--report $(REPORT)"; \
	set -x; $(BIN)/quantkit publish $(OUT)/$(MODEL)-$* $(if $(ORG),--repo $(ORG)/$(MODEL)-$*) $$drawn $(PUBLISH_FLAGS)

# two at a time: most of them wait for a process of their own, and each takes two threads at most
test: lint docs-check
	$(BIN)/pytest -n 2 --dist worksteal

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
	$(BIN)/pytest -n 2 --dist worksteal -m "slow and not gpu" tests/engines tests/test_upstream.py

# minutes each; `harness` installs lm-evaluation-harness, which one of them compares with
test-slow: setup
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,harness]"
	@for daemon in slurmctld slurmd munged; do command -v $$daemon >/dev/null || \
		echo "no $$daemon: Slurm will NOT be tested (apt-get install slurmctld slurmd slurm-client munge)"; done
	$(BIN)/pytest -rs -m "slow and not gpu"

test-gpu: setup
	$(BIN)/pytest -m gpu

# artifacts may have taken days: they go by their own name only, those of MODEL in OUT
clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache

clean-artifacts:
	rm -rf $(foreach one,$(RECIPES) report,$(OUT)/$(MODEL)-$(one) $(OUT)/$(MODEL)-$(one).work $(OUT)/.$(MODEL)-$(one).exit)
