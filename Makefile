# Two commands do everything: `make demo` and `make test`. Both make the virtual environment first, once.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
DEMO ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-slow lint types docs clean help

help:
	@echo "make demo       fit three families to scikit-learn's digits, print one table, write $(OUT)/"
	@echo "make test       run the tests (make test-slow: the slow ones too)"
	@echo "make lint       check style; make types: check types"
	@echo "make docs       make the documentation in docs/_build/html/"
	@echo "make clean      remove $(VENV)/, $(OUT)/ and caches"

$(READY): pyproject.toml constraints.txt
	@echo "== virtual environment in $(VENV)/ (downloads PyTorch for the CPU and about 120 packages from PyPI, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[eval,cli,dev,docs]'
	@touch $(READY)

demo: $(READY)
	@echo "== fitting three families of deep generative model to scikit-learn's digits, judged on held-out images"
	$(BIN)/python -m pyro_genmodels compare --data digits --out $(OUT) $(DEMO)

test: $(READY)
	@echo "== tests"
	$(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu"

test-slow: $(READY)
	@echo "== tests, the slow ones too"
	$(BIN)/python -m pytest -q -n 2 -m "not gpu"

lint: $(READY)
	@echo "== style"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	@echo "== types"
	$(BIN)/mypy pyro_genmodels

docs: $(READY)
	@echo "== documentation in docs/_build/html/"
	$(BIN)/python -m sphinx -W -n --keep-going -q docs docs/_build/html

clean:
	rm -rf $(VENV) $(OUT) build docs/_build docs/api docs/tutorials *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
