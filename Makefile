# Two commands do everything: `make demo` and `make test`. Both make the virtual environment first, once.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
DEMO ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VENV_ARVIZ1 ?= .venv-arviz1
BIN_ARVIZ1 := $(VENV_ARVIZ1)/bin
READY_ARVIZ1 := $(VENV_ARVIZ1)/.ready
VENV_PEERS ?= .venv-peers
READY_PEERS := $(VENV_PEERS)/.ready
BENCH ?=

.PHONY: demo test test-slow test-docs test-arviz1 lint types docs tutorials bench bench-peers clean help

help:
	@echo "make demo       fit seven families to scikit-learn's digits, print one table, write $(OUT)/"
	@echo "make test       run the tests (make test-slow: the slow ones too; make test-docs: the slow code of docs and tutorials;"
	@echo "                make test-arviz1: to_arviz under ArviZ 1.x)"
	@echo "make lint       check style; make types: check types"
	@echo "make docs       make the documentation in docs/_build/html/"
	@echo "make tutorials  execute the tutorials again, in about twenty minutes, and save their output"
	@echo "make bench      measure speed against Pyro, NumPyro and others, in about 25 minutes (make bench BENCH='--only vae': a part)"
	@echo "make clean      remove $(VENV)/, $(VENV_ARVIZ1)/, $(VENV_PEERS)/, $(OUT)/ and caches"

$(READY): pyproject.toml constraints.txt
	@echo "== virtual environment in $(VENV)/ (downloads PyTorch for the CPU and about 150 packages from PyPI, once)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is older: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[eval,cli,nuts,lightning,dev,docs]'
	@touch $(READY)

# ArviZ 1.x asks for Python 3.12, and runs on 3.11 if its packages alone are put in.
$(READY_ARVIZ1): pyproject.toml constraints.txt constraints-arviz1.txt
	@echo "== virtual environment with ArviZ 1.x in $(VENV_ARVIZ1)/ (downloads PyTorch for the CPU and about 60 packages, once)"
	$(PYTHON) -m venv $(VENV_ARVIZ1)
	grep -v '^arviz==' constraints.txt > $(VENV_ARVIZ1)/others.txt
	$(BIN_ARVIZ1)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN_ARVIZ1)/python -m pip install --quiet --ignore-requires-python --no-deps -r constraints-arviz1.txt
	$(BIN_ARVIZ1)/python -m pip install --quiet -c $(VENV_ARVIZ1)/others.txt -c constraints-arviz1.txt -e '.[eval,cli,dev]'
	@touch $(READY_ARVIZ1)

# NumPyro and the others that `make bench` measures beside this package.
$(READY_PEERS): constraints.txt constraints-peers.txt
	@echo "== virtual environment of NumPyro, nflows, normflows and torchebm in $(VENV_PEERS)/ (downloads JAX and PyTorch for the CPU, once)"
	$(PYTHON) -m venv $(VENV_PEERS)
	$(VENV_PEERS)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VENV_PEERS)/bin/python -m pip install --quiet --no-deps -r constraints-peers.txt
	@touch $(READY_PEERS)

demo: $(READY)
	@echo "== fitting seven families of deep generative model to scikit-learn's digits, judged on held-out images"
	$(BIN)/python -m pyro_genmodels compare --data digits --out $(OUT) --force $(DEMO)

test: $(READY)
	@echo "== tests"
	$(BIN)/python -m pytest -q -n 2 --durations=10 -m "not slow and not gpu"

test-slow: $(READY)
	@echo "== tests, the slow ones too"
	$(BIN)/python -m pytest -q -n 2 --durations=10 -m "not gpu"

test-docs: $(READY)
	@echo "== the slow code of the documentation and the tutorials"
	$(BIN)/python -m pytest -q -n 2 -m slow -k runs tests/test_docs.py tests/test_tutorials.py tests/test_readme.py

test-arviz1: $(READY_ARVIZ1)
	@echo "== tests of to_arviz under ArviZ 1.x"
	$(BIN_ARVIZ1)/python -m pytest -q -n 2 -m "not slow and not gpu" \
	  tests/inference_data pyro_genmodels/inference_data tests/posteriors/test_posterior_comparison.py \
	  tests/posteriors/test_calibration.py tests/posteriors/test_leave_one_out.py tests/posteriors/test_predictive_checks.py

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

tutorials: $(READY)
	@echo "== tutorials, executed in full"
	$(BIN)/python tutorials/execute.py tutorials/[0-9]*.py

bench-peers: $(READY_PEERS)

bench: $(READY) $(READY_PEERS)
	@echo "== speed, into benchmarks/RESULTS.md"
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.speed --out benchmarks/RESULTS.md $(BENCH)

clean:
	rm -rf $(VENV) $(VENV_ARVIZ1) $(VENV_PEERS) $(OUT) build docs/_build docs/api docs/tutorials *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
