# make demo, make test: each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread of torch for each worker: more would only wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
BENCHMARKS := tests/benchmarks

.PHONY: help demo test test-fast test-slow lint docs clean
.PHONY: bench bench-huge bench-quality bench-experts bench-gain bench-objectives bench-gpu

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | while IFS="$$(printf '\t')" read -r name text; \
		do printf 'make %-18s%s\n' "$$name" "$$text"; done

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/installed ## the whole pipeline on the embedded demo base
	$(BIN)/loram run recipes/demo.yaml

test: $(VENV)/installed lint ## lint and the default tests: all but the slow ones
	$(PYTEST) $(ARGS)

test-fast: $(VENV)/installed ## unit tests only, for the working loop
	$(PYTEST) -m "not slow and not integration" --durations=5 $(ARGS)

test-slow: $(VENV)/installed ## the slow tests (ARGS=--slow-minutes=8: as many as that allows)
	$(PYTEST) -m slow $(ARGS)

lint: $(VENV)/installed ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed ## the pages of the commands, from their help
	$(BIN)/python -m loram_cli.cli.command_pages
	$(BIN)/python -m loram_cli.cli.which_way_page

bench: $(VENV)/installed ## streaming against cp, Taylor, SparseGPT, decoding, offload, packing (9 GB of disk)
	$(BIN)/python $(BENCHMARKS)/stream.py
	$(BIN)/python $(BENCHMARKS)/taylor.py
	$(BIN)/python $(BENCHMARKS)/sparsity.py
	$(BIN)/python $(BENCHMARKS)/decode.py
	$(BIN)/python $(BENCHMARKS)/quantized_load.py
	$(BIN)/python $(BENCHMARKS)/offload.py
	$(BIN)/python $(BENCHMARKS)/experts_reached.py
	$(BIN)/python $(BENCHMARKS)/stream_training.py
	$(BIN)/python $(BENCHMARKS)/packing.py

bench-huge: $(VENV)/installed ## streaming a checkpoint larger than its memory limit (23 GB of disk)
	$(BIN)/python $(BENCHMARKS)/huge.py $(ARGS)

bench-quality: $(VENV)/installed ## how much of full LoRA's gain is kept (hours; ARGS=--quick: minutes)
	$(BIN)/python $(BENCHMARKS)/quality.py $(ARGS)

bench-experts: $(VENV)/installed ## the same for experts that are dropped, on a mixture that it trains first
	test -f bench-experts/base/config.json || \
		$(BIN)/python $(BENCHMARKS)/train_base.py --mixture --out bench-experts/base
	$(BIN)/python $(BENCHMARKS)/experts.py --base bench-experts/base $(ARGS)

bench-gain: $(VENV)/installed ## gain kept by each small model of a real base, for each byte (ARGS=--help)
	$(BIN)/python $(BENCHMARKS)/gain $(ARGS)

bench-objectives: $(VENV)/installed ## DPO and GRPO after SFT on the demo base, beside full LoRA
	$(BIN)/python $(BENCHMARKS)/objectives.py loram-objectives $(ARGS)

bench-gpu: $(VENV)/installed ## all of it on one 80 GB GPU, 11 minutes (ARGS=--cpu-rehearsal: without one)
	$(BIN)/python $(BENCHMARKS)/gpu $(ARGS)

clean: ## remove the environment, builds and ./loram-run
	rm -rf $(VENV) loram-run build dist *.egg-info
