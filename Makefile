# `make repro` runs the pipeline and `make test` the tests; both set up .venv first.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test test-all check fast-test lint deps docs bench scene-encoder clean

repro: $(INSTALLED)
	gridcap repair
	dvc repro $(STAGE)

# Three processes keep two cores busy while one waits for a browser or a server.
test: $(INSTALLED)
	python -m pytest --numprocesses 3 --dist loadfile -m "not exhaustive" $(TESTS)

# All tests, also those that take long: before a release.
test-all: $(INSTALLED)
	python -m pytest $(TESTS)

# Lint and the fast tests, side by side: for every change while you work.
check: $(INSTALLED)
	$(MAKE) --no-print-directory --output-sync --jobs 2 lint fast-test

fast-test: $(INSTALLED)
	python -m pytest -q --numprocesses 2 --dist loadfile -m "not slow and not browser and not java and not exhaustive" $(TESTS)

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy

# Update the module lists in dvc.yaml from the imports.
deps: $(INSTALLED)
	python -m pipeline.import_graph

# Update the pages that are generated from the code.
docs: $(INSTALLED)
	python -m docs.generate

bench: $(INSTALLED)
	python -m benchmarks

# Retrain the encoder of the embedded dataset.
scene-encoder: $(INSTALLED)
	python -m stages.train_scene_encoder --params data/scenes/params.yaml \
		--out data/scenes/encoder.safetensors --metrics data/scenes/encoder.json --work data/.work
	dvc commit --force data/scenes/dvc.yaml:encoder

# Delete unfinished work, and finished shards: `encode` takes those that DVC has from its cache.
clean:
	rm -rf data/.work

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
