# make demo: install and run the demo. make test: install and run the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all test-quantization test-inception test-browser faults fuzz check docs assets bench bench-quick papers-small clean

demo: .venv/installed
	$(BIN)/stagepatch demo

test: .venv/installed
	$(BIN)/pytest

# Those of tests/slow.txt too.
test-all: .venv/installed
	$(BIN)/pytest --all

# Broken files of every kind, ten thousand of each: hours.
fuzz: .venv/installed
	FUZZ_CASES=10000 $(BIN)/pytest --numprocesses=0 tests/test_fuzz.py

# Of libraries that are not in `dev`, since each makes every import of diffusers or peft slower.
test-quantization: .venv/quantization
	PYTHONPATH=.venv/quantization $(BIN)/pytest --numprocesses=0 tests/checkpoints/test_memory.py

.venv/quantization: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $@ bitsandbytes torchao

# Our Inception-v3 layer by layer against torch-fidelity's.
test-inception: .venv/fidelity
	PYTHONPATH=.venv/fidelity $(BIN)/pytest --numprocesses=0 tests/evaluation/test_inception.py

.venv/fidelity: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $@ torch-fidelity
	rm -rf $@/tests

# Pages in Debian's Chromium, which is installed if there is none (as root); playwright's 170 MB are not in `dev`.
test-browser: .venv/browser
	PYTHONPATH=.venv/browser $(BIN)/pytest --numprocesses=0 tests/report/test_browser.py

.venv/browser: .venv/installed
	command -v chromium || (apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium) >/dev/null
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt --target $@ playwright greenlet pyee

# Every file operation of every command as a point of death, for docs/reliability.md: hours.
faults: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m tests.faults.points

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

# Make the bundled files anew (an hour and a half on two cores; the images need Debian's dataset-fashion-mnist).
assets: .venv/installed
	$(BIN)/python experiments/make_fashion.py
	$(BIN)/python experiments/train_classifiers.py digits fashion fashion_vit
	for data in digits fashion; do \
		$(BIN)/stagepatch pretrain --config configs/$$data/pretrain.yaml && \
		cp -r runs/$$data-dit/transformer runs/$$data-dit/scheduler src/stagepatch/assets/$$data-dit/ || exit 1; \
	done

# Every table of the papers, small: from pretraining to table, an hour and a half on two cores beside other work.
papers-small: .venv/installed
	PATH="$(abspath $(BIN)):$$PATH" bash experiments/papers_small.sh

# The fashion bench, its main tables: some two and a half hours on two idle cores; and its short form: six minutes.
bench bench-quick: .venv/installed
	PATH="$(abspath $(BIN)):$$PATH" bash experiments/fashion_bench.sh $(if $(findstring quick,$@),--quick)

clean:
	rm -rf .venv runs
