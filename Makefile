# `make demo` and `make test` need Python >= 3.11, pip and make; they set up everything else in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check docs bench bench-scale skyrl clean

demo: $(VENV)/.local
	$(BIN)/fwasync demo

test: check docs
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict --quiet

# Measures for some ten minutes, and writes docs/benchmarks.md; the other SDKs have environments of their own.
bench: $(VENV)/.dev
	$(BIN)/python benchmarks/environments.py
	$(BIN)/python benchmarks/bench.py

# Measures for longer, and draws the curves of docs/scale.md.
bench-scale: $(VENV)/.dev
	$(BIN)/python benchmarks/environments.py
	$(BIN)/python benchmarks/draw_scale.py --measure

# A trainer service of others, in an environment of its own (2 GB): trains on it with everything that we have.
skyrl: $(VENV)/.dev
	$(BIN)/pytest tests/foreign/skyrl.py

clean:
	rm -rf $(VENV) .venv-skyrl .venv-bench-tinker .venv-older .venv-fireworks .venv-ray site

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fwasync needs Python 3.11 or newer, and this is " + sys.version.split()[0] + "; say `make PYTHON=python3.12 ...`")'
	$(PYTHON) -m venv $(VENV)

# Stamps: reinstall when what is to be installed changed. The local service without torch is enough for the demo.
$(VENV)/.local: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable '.[local]'
	touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.local
