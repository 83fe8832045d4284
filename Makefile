# make demo: install and run the demo. make test: install and run the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check docs assets clean

demo: .venv/installed
	$(BIN)/stagepatch demo

test: .venv/installed
	$(BIN)/pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: .venv/installed
	$(BIN)/mkdocs build

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Make the bundled files anew (half an hour on two cores).
assets: .venv/installed
	$(BIN)/stagepatch pretrain --config configs/digits/pretrain.yaml
	cp -r runs/digits-dit/transformer runs/digits-dit/scheduler src/stagepatch/assets/digits-dit/
	$(BIN)/python experiments/train_digits_classifier.py

clean:
	rm -rf .venv runs
