PYTHON ?= python3
RUN := .venv/bin/python
export OMP_WAIT_POLICY ?= PASSIVE  # threads that wait should sleep

.PHONY: help book test sync execute pretrained bench gpu-check format lint clean

help:           ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

book: .venv/ok  ## build the book: open _build/html/index.html
	rm -rf _build
	.venv/bin/jupyter-book build book/ -W --keep-going

test: .venv/ok  ## prove the library, the book and every output shown in it
	$(RUN) -m pytest

sync: .venv/ok  ## write package and notebooks from the chapters
	$(RUN) book/_tools/export.py
	$(RUN) book/_tools/notebooks.py

execute: .venv/ok  ## run all chapters again, or CHAPTER=NN_name; say what changed
	$(RUN) book/_tools/export.py
	$(RUN) book/_tools/notebooks.py --execute $(CHAPTER)

pretrained: .venv/ok  ## with a network: documented values of OpenAI's ViT-B/32
	$(RUN) tests/bench/pretrained.py

bench: .venv/ok  ## beside other libraries, in one run; minutes; to data/results
	$(RUN) tests/bench/tokenizer.py --out data/results/tokenizer.json
	$(RUN) tests/bench/memory.py --out data/results/memory.json

gpu-check: .venv/ok  ## on a machine with a GPU: parity, memory, speed
	$(RUN) tests/bench/gpu.py --out data/results/gpu.json

format: .venv/ok  ## format the chapters' code and the hand-written Python
	$(RUN) book/_tools/format.py
	$(RUN) -m ruff format .

lint: .venv/ok  ## look for mistakes without running anything
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean:          ## remove what was built, but not .venv
	rm -rf _build dist .pytest_cache .ruff_cache .hypothesis

.venv/ok: pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@
