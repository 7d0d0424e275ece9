# Freshet: `make demo` and `make test` do all the set-up from a fresh clone.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
UV := $(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt
STAMP := .venv/.installed
# Bytecode is kept even where the environment forbids it: without it each process compiles all it imports, 2 s of CPU.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install browser demo test lint format ci constraints clean

help:  ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(STAMP)  ## .venv with .venv/bin/freshet

$(BIN)/uv:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 to 3.13 on PATH; install one, or: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.5,<1"

# torch without CUDA is 200 MB instead of 3 GB; its index is asked once, for 20 s, and the plain one serves otherwise.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/uv
	@if UV_HTTP_RETRIES=0 UV_HTTP_TIMEOUT=20 timeout 20 $(UV) --dry-run --quiet --torch-backend=cpu torch >/dev/null 2>&1 \
		&& $(UV) --torch-backend=cpu --editable '.[dev]'; then :; \
	else echo "make: no CPU-only torch to be had, taking the one of the plain index"; $(UV) --editable '.[dev]'; fi
	@echo "make: compiling the kernels once"
	@$(BIN)/python -c 'import serving.app, streaming.replay.prequential, streaming.worker, streaming.training.process as t; serving.app.warm(); streaming.replay.prequential.warm(); streaming.worker.warm(); t.warm()'
	@touch $@

browser:  ## Debian's Chromium, which the tests of the pages drive, where none is on PATH
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
		sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$sudo apt-get update --quiet && DEBIAN_FRONTEND=noninteractive $$sudo apt-get install --quiet --yes chromium; }

demo: install  ## start everything, let simulated users arrive, print the page's address
	$(BIN)/freshet demo

test: install  ## all tests, on a real Kafka and a real Redis
	$(BIN)/pytest

lint: install  ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: install  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ci: lint test  ## what .ci/run does

constraints: | $(BIN)/uv  ## write the pins anew
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-emit-index-url --no-emit-find-links \
		--no-annotate --custom-compile-command 'make constraints' pyproject.toml -o constraints.txt

clean:  ## remove what was built (the cache of Kafka's jars stays)
	rm -rf .venv .freshet .freshet-* .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
