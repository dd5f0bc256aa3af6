# make demo    install into .venv and run the main job on the embedded checkpoint and data set
# make test    install with the development tools and run the tests
# make check   what CI runs: lint, format, types, tests
# make test-oldest   the tests with the oldest supported versions of the dependencies, in an environment of their own
# make soak    the slow suites: all strategies through all doors, to the bit
# make wheel-check   build the wheel, install it into an empty environment, and use it outside the clone
# make bench DATA=FOLDER   images per second against the bare network and two peers (checkpoints/ and datasets/ in DATA), and the figure
# make docs    build docs/ into build/docs; a warning, such as a broken link, is an error
# make format  rewrite the files in the house format
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin

.PHONY: demo test check test-oldest soak bench wheel-check docs format

demo: $(VENV)/.installed
	$(BIN)/python recipes/linear_probe.py

# A worker that crashes ends the tests: pytest-xdist 3.8 would replace it, and then wait for ever (its issue 1378).
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n auto --dist loadfile --max-worker-restart 0

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) --no-print-directory test

# Older versions warn about what newer ones have settled, so warnings are not errors here.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -q -W default $(TESTS)

soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m soak

BENCH_CHECKPOINT ?= $(DATA)/checkpoints/mobilenetv2_100.tflite_quant_in1k
BENCH_DATASET ?= $(DATA)/datasets/trashnet
BENCH_RESULT ?= benchmarks/results/throughput_mobilenetv2.json

bench: $(VENV)/.installed-dev
	test -d "$(DATA)" || { echo "make bench: DATA=$(DATA) is no folder; it needs checkpoints/ and datasets/"; exit 2; }
	$(BIN)/python benchmarks/throughput.py --checkpoint "$(BENCH_CHECKPOINT)" --dataset "$(BENCH_DATASET)" \
		--output $(BENCH_RESULT) $(BENCH_FLAGS)
	$(BIN)/python benchmarks/draw_throughput.py benchmarks/results/throughput_*.json --output docs/throughput.svg

wheel-check:
	set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	$(PYTHON) -m venv "$$work/venv"; \
	"$$work/venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$$work" .; \
	"$$work/venv/bin/python" -m pip install --quiet "$$work"/*.whl; \
	mkdir "$$work/empty"; cd "$$work/empty"; export PATH="$$work/venv/bin:$$PATH"; \
	python -c 'import hf_transfer; print(hf_transfer.__file__)'; \
	hf-transfer train linear_probe; \
	accelerate launch -m hf_transfer train full --epochs 1; \
	sh -c "$$(hf-transfer advise --epochs 1 | tail -1)"

docs: $(VENV)/.installed-docs
	HF_HUB_OFFLINE=1 $(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(OLDEST)/.installed: pyproject.toml scripts/oldest.py
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(PYTHON) scripts/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/constraints.txt --editable '.[dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The stamps keep an installation until pyproject.toml changes.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(VENV)/.installed $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $(VENV)/.installed $@
