# Everything a developer runs. `make demo` and `make test` set up what they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARTS := core proto linux runtime snapshotter registry network shim daemon client cri cli systemd
PACKAGES := $(foreach part,$(PARTS),-p wherry.$(part))
# the link tree of a strict editable install holds one link a file: a file that comes or goes wants a new one
FILES := $(shell git ls-files -co --exclude-standard $(PARTS) 2>/dev/null | LC_ALL=C sort | cksum | cut -d' ' -f1)
# modules are compiled below, once; a daemon that compiles its imports at each start would pay for it each time
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-v2 lint types bench fmt proto install clean

help:
	@echo 'make demo      the main job, on this machine, in a few seconds (root)'
	@echo 'make test      ruff, import rules, mypy and pytest (root)'
	@echo 'make test-v2   the same engine on pure cgroup v2 under systemd, in a VM (qemu)'
	@echo 'make bench     side by side with containerd; CHECK=1 fails where a limit is missed'
	@echo 'make fmt       format the code'
	@echo 'make proto     generate the code of the wire contracts'

$(VENV)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Wherry needs Python 3.11 or newer; say which with PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || { echo 'python3 -m venv failed; on Debian: apt-get install python3-venv' >&2; exit 1; }
	touch $@

$(VENV)/installed-$(FILES): $(VENV)/python pyproject.toml
	rm -f $(VENV)/installed-*
	$(BIN)/pip install -q -e '.[dev]' --config-settings editable_mode=strict
	touch $@

install: $(VENV)/installed-$(FILES)
	@$(BIN)/python -m compileall -q build/__editable__* >/dev/null

demo: install
	@$(BIN)/python -m wherry.cli.demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: install
	$(BIN)/mypy $(PACKAGES)
	$(BIN)/mypy tests bench examples

# in two processes: the first one's tests fork, and a process that has used grpcio has threads and fork handlers of its own
test: lint types
ifdef TESTS
	$(BIN)/python -m pytest $(TESTS)
else
	$(BIN)/python -m pytest tests/linux tests/runtime
	$(BIN)/python -m pytest --ignore tests/vm --ignore tests/linux --ignore tests/runtime
endif

test-v2: install
	$(BIN)/python -m pytest tests/vm

bench: install
	$(BIN)/python -m bench $(if $(CHECK),--check)

fmt: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: install
	$(BIN)/python proto/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
