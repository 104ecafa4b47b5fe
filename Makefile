# The newcomer's way in: `make repro` runs the pipeline, `make test` the tests; both set up .venv when needed.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test lint bench scene-encoder clean

repro: $(INSTALLED)
	gridcap repair
	dvc repro $(STAGE)

test: $(INSTALLED)
	python -m pytest $(TESTS)

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy

bench: $(INSTALLED)
	python -m benchmarks

# The embedded dataset's encoder lies in git; this trains it anew, in about a quarter of an hour.
scene-encoder: $(INSTALLED)
	python -m stages.train_scene_encoder --params data/scenes/params.yaml \
		--out data/scenes/encoder.safetensors --metrics data/scenes/encoder.json --work data/.work
	dvc commit --force data/scenes/dvc.yaml:encoder

clean:
	rm -rf data/.work

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
