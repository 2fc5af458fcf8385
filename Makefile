# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer: they make .venv.
PYTHON ?= $(shell for v in 3.11 3.12 3.13 3.14; do python$$v -c '' 2>&- && echo python$$v && break; done)
VENV := .venv
BIN := $(VENV)/bin
# What semid needs, and what its tests need.
RUNTIME := $(VENV)/.runtime
READY := $(VENV)/.ready
# The CPU build of torch: on Linux, PyPI has the one with gigabytes of CUDA.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
LOWEST := .venv-lowest

# Two processes or more bring more than threads inside one: the tests' matrices are tiny.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal
MARKS ?= not slow and not gpu and not browser and not cluster

.PHONY: demo screenshots test lowest golden slow cluster browser fuzz faults flags bench mutation quick notebooks docs results lint format clean

$(RUNTIME): pyproject.toml constraints.txt
	$(or $(PYTHON),python3) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --retries 1 --no-deps --extra-index-url $(TORCH_INDEX) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(READY): $(RUNTIME)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(RUNTIME)  ## the main job on a synthetic catalogue: demo/report.html, in a browser if there is one
	$(BIN)/semid demo --output demo --overwrite
	@echo "\nThe report: file://$(CURDIR)/demo/report.html"
	@if [ -n "$$DISPLAY$$WAYLAND_DISPLAY" ] || [ "$$(uname)" = Darwin ]; then \
	  $(BIN)/python -m webbrowser "file://$(CURDIR)/demo/report.html" >/dev/null 2>&1 || true; fi

screenshots: $(READY) demo  ## docs/images anew, in headless Chromium
	$(BIN)/python .ci/screenshots.py demo/report.html docs/images

test: $(READY)  ## the fast tests
	$(PYTEST) -m '$(MARKS)'

lowest:  ## the fast tests on Python 3.11 with the lower bounds of pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[dev]'
	$(LOWEST)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m '$(MARKS)'

slow: $(READY)  ## tests on real data at full size, minutes
	$(BIN)/python -m pytest -m slow

cluster: $(READY)  ## nodes of a Ray cluster lost at random moments of fits and encodes: half an hour
	$(BIN)/python -m pytest -m cluster -rP

browser: $(READY)  ## tests of the pages in headless Chromium
	$(BIN)/python -m pytest -m "browser and not slow"

fuzz: $(READY)  ## 20,000 broken inputs and odd options: counts, and each kind of failure
	$(BIN)/python tests/fuzz --examples 20000 --processes 2

faults: $(READY)  ## 200 kills at random moments of every command that writes, and 50 pairs of runs
	$(BIN)/python tests/faults.py --kills 200 --pairs 50

golden: $(READY)  ## tests/golden.json, the record of all results, anew; prints what changed
	$(BIN)/python tests/test_golden.py

flags: $(READY)  ## src/semid/cli/flags.json anew, after option fields changed
	$(BIN)/python -c "from semid.cli.flags import write_flags; write_flags()"

bench: $(READY)  ## speed and quality beside the peers, into benchmarks/results: half an hour
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python benchmarks

mutation: $(READY)  ## share of single faults that the tests notice, per package: an hour on two cores
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,mutation]'
	$(BIN)/python benchmarks/mutation.py $(MUTATION)

quick: $(READY)  ## every reproduction at toy size, into results-quick/
	for paper in drq moc behavior retrieval predict; do \
	  $(BIN)/semid reproduce $$paper --quick --quiet || exit 1; \
	done

results: $(READY)  ## docs/results from the committed runs under results/
	for ledger in results/*/runs.jsonl; do \
	  $(BIN)/semid reproduce $$(basename $$(dirname $$ledger)) --from results --publish \
	    --output docs/results || exit 1; \
	done
	$(BIN)/python -c "from semid.reproduce.predict import write_evidence; write_evidence('results')"

notebooks: $(READY)  ## docs/notebooks executed anew, with their outputs
	OMP_NUM_THREADS=1 $(BIN)/jupyter nbconvert --execute --inplace --to notebook docs/notebooks/*.ipynb

docs: $(READY)  ## the documentation site, strictly, into site/
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/jupyter nbconvert --to markdown docs/notebooks/*.ipynb
	$(BIN)/zensical build --strict --clean

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

clean:
	rm -rf $(VENV) .venv-* demo build dist
