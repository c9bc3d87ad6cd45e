# make demo, make test: each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread of torch for each worker: more would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: help demo test test-slow lint bench bench-huge bench-quality bench-objectives clean

help:
	@echo "make demo       install, then the whole pipeline on the embedded demo base"
	@echo "make test       install, then lint and the default tests"
	@echo "make test-slow  the slow tests"
	@echo "make docs       the pages of the commands, from their help"
	@echo "make bench      streaming against cp, Taylor, SparseGPT, running layer by layer: memory and time (9 GB of disk)"
	@echo "make bench-huge the same on a checkpoint larger than its memory limit (23 GB of disk)"
	@echo "make bench-objectives  DPO and GRPO after SFT on the demo base, beside full LoRA"
	@echo "make bench-quality  how much of full LoRA's gain is kept (hours; ARGS=--quick: minutes)"

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/loram run recipes/demo.yaml

test: $(VENV)/installed lint
	$(PYTEST)

test-slow: $(VENV)/installed
	$(PYTEST) -m slow $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/installed
	$(BIN)/python -m loram_cli.cli.command_pages

bench: $(VENV)/installed
	$(BIN)/python tests/benchmarks/stream.py
	$(BIN)/python tests/benchmarks/taylor.py
	$(BIN)/python tests/benchmarks/sparsity.py
	$(BIN)/python tests/benchmarks/decode.py
	$(BIN)/python tests/benchmarks/quantized_load.py
	$(BIN)/python tests/benchmarks/offload.py

bench-huge: $(VENV)/installed
	$(BIN)/python tests/benchmarks/huge.py

bench-quality: $(VENV)/installed
	$(BIN)/python tests/benchmarks/quality.py $(ARGS)

bench-objectives: $(VENV)/installed
	$(BIN)/python tests/benchmarks/objectives.py loram-objectives $(ARGS)

clean:
	rm -rf $(VENV) loram-run build dist *.egg-info
