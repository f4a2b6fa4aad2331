# Each target makes what it needs; a second run finds it there.

PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& echo $$python && break; done)
RUN := .venv/bin/python
INSTALLED := .venv/installed.stamp

# SGLang starts three processes that import thousands of files each. Without
# their compiled form every start takes half a minute longer.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint docs report venv model clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: venv model ## answer questions over reused documents, beside plain SGLang
	@$(RUN) -m eval.demo
	@$(RUN) -m eval.hybrid_demo

# A failed lint does not hide the tests' result; either fails the target.
test: venv model ## lint, then all tests; ARGS="-k word" goes to pytest
	@status=0; \
	$(MAKE) --no-print-directory lint || status=1; \
	echo "test: running pytest"; \
	$(RUN) -m pytest -n 2 $(ARGS) || status=1; \
	exit $$status

# Some two hours on two cores.
test-all: test ## test, then long ones, SGLang's own test kits, more fuzzing, the soak
	@echo "test-all: tests that take minutes"
	@$(RUN) -m pytest -m long
	@echo "test-all: SGLang's test kits, on stock and on ours"
	@$(RUN) -m pytest -m kits
	@echo "test-all: ten minutes of each fuzzer"
	@PIC_FUZZ_SECONDS=600 $(RUN) -m pytest tests/test_hostile.py -k fuzzed
	@$(RUN) -m eval.soak

lint: venv ## ruff and mypy
	@echo "lint: checking style and types"
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --quiet --check .
	@$(RUN) -m mypy

docs: venv ## the documentation's site, in build/docs
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet && echo "docs: build/docs/index.html"

report: venv model ## all evaluations in quick form, into docs/results.md (45 minutes)
	@$(RUN) -m eval.report

venv: $(INSTALLED) ## virtual environment in .venv with SGLang (about 10 GB)

model: venv ## SmolLM2-135M-Instruct in the local cache
	@directory=$$($(RUN) -m eval.models.smollm2) && echo "model: $$directory"

clean: ## remove build output and tool caches; keep .venv and the model
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/uv:
	@test -n "$(PYTHON)" || { echo "venv: Python 3.10 or newer is needed, 3.11 preferred"; exit 1; }
	@echo "venv: making .venv with $(PYTHON)"
	@$(PYTHON) -m venv .venv
	@$(RUN) -m pip install --quiet --disable-pip-version-check uv

$(INSTALLED): pyproject.toml | .venv/bin/uv
	@echo "venv: installing SGLang and this project, a download of several GB the first time"
	@.venv/bin/uv pip install --python $(RUN) --editable '.[dev]'
	@touch $@
