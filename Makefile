PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: quickstart test check docs bench mutants clean

quickstart: $(STAMP)
	$(BIN)/ecoprompt evaluate quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile --cov --cov-report=term --durations=10

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

docs: $(STAMP)
	$(BIN)/python docs/generate.py

bench: $(STAMP)
	$(BIN)/python tests/bench/tofu_mini.py
	$(BIN)/python tests/bench/gate.py
	$(BIN)/python tests/bench/guard.py
	$(BIN)/python tests/bench/evaluation.py --every 4
	$(BIN)/python tests/bench/book.py
	$(BIN)/python tests/bench/search.py --seeds 2 --starts 0.1 100 --methods adaptive
	$(BIN)/python tests/bench/harness.py
	$(BIN)/python tests/bench/choices.py
	$(BIN)/python tests/bench/startup.py
	$(BIN)/python tests/bench/report.py
	$(BIN)/python tests/bench/zeroth.py

mutants: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt cosmic-ray==8.7.0
	$(BIN)/python tests/bench/mutants.py

clean:
	rm -rf .venv results

# torch first and by itself: its version is pinned to one that has a CPU build, and nothing else may choose another.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,plot]'
	touch $(STAMP)
