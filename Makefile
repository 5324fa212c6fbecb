# `make help` explains every target. Each target that needs the environment makes it first; a second time that costs 0.1 s.
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-builtin-rules
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(foreach name,python3.11 python3 python,$(shell command -v $(name))))
BIN    := .venv/bin
API    := fabrictune/v1/.generated
RUN    ?= examples/quickstart.yaml

# Images often forbid Python to keep what it has compiled; vLLM then compiles for 20 s each time that it is imported.
unexport PYTHONDONTWRITEBYTECODE

# No test and no example asks a hub for anything.
export HF_HUB_OFFLINE ?= 1

##@ First

.PHONY: run
run: setup ## Set up, start everything here, carry the example from rows to a served model, and chat with it
	$(BIN)/fabrictune run $(RUN) --up

.PHONY: stop
stop: ## Stop what `make run` left running
	@if [ -x $(BIN)/fabrictune ]; then $(BIN)/fabrictune down; else echo "Nothing is set up here, so nothing runs."; fi

.PHONY: setup
setup: environment $(API) ## Make .venv from the lock (ENGINE=cpu|cuda overrides what is found, PYTHON=… names a Python 3.11)

.PHONY: environment
environment:
	@if [ -z "$(PYTHON)" ]; then echo "setup: no Python found; Python 3.11 is needed (Debian 12: apt-get install python3.11 python3.11-venv)" >&2; exit 1; fi
	@$(PYTHON) scripts/setup.py

.PHONY: test
test: setup ## Run every test: real gRPC, a real S3 server, a real (tiny) training, a real vLLM (minutes)
	$(BIN)/pytest tests/unit tests/chart -n 2 --dist loadgroup
	$(BIN)/pytest tests/integration --durations=15

##@ While you work

.PHONY: test-fast
test-fast: setup ## Run the tests of units and of the chart that take seconds (a minute in all)
	$(BIN)/pytest tests/unit tests/chart -m "not slow and not heavy" -n 2 --dist loadgroup

.PHONY: lint
lint: setup ## ruff, mypy --strict, who may import whom (import-linter), buf lint, buf breaking
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python scripts/protos.py check

.PHONY: format
format: setup ## Let ruff fix and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: proto
proto: setup ## Generate fabrictune/v1 from protos/ (only when they changed; `make setup` does it too)

$(API): $(wildcard protos/fabrictune/v1/*.proto) scripts/protos.py | environment
	@$(BIN)/python scripts/protos.py generate
	@touch $@
	@echo "proto: generated fabrictune/v1"

.PHONY: check
check: lint fresh chart test ## What CI runs: lint, freshness of generated files, the chart, every test

.PHONY: fresh
fresh: setup ## Fail when a file in git that is made from others is stale
	$(BIN)/python scripts/protos.py fresh
	$(BIN)/python scripts/lock.py --check
	$(BIN)/python scripts/chart.py --check

.PHONY: bench
bench: setup ## Measure speed and memory (bench/), and print tables
	$(BIN)/python -m bench

##@ On Kubernetes

.PHONY: chart
chart: setup ## Guard the Helm chart: lint, strict schemas of Kubernetes 1.31 to 1.37, golden files, every value (UPDATE=1 renews)
	$(BIN)/python scripts/chart.py $(if $(UPDATE),--update)

images_options = $(IMAGES) $(foreach option,TOOL TAG REGISTRY BASE VARIANT LOAD,$(if $($(option)),--$(shell echo $(option) | tr A-Z a-z)="$($(option))"))

.PHONY: images
images: ## Build the container images with buildah or docker (IMAGES="pipeline …", TAG, REGISTRY, BASE, VARIANT=cuda)
	@$(PYTHON) scripts/images.py build $(images_options)

.PHONY: images-load
images-load: ## Save the images to build/images/*.tar, and load them into kind, k3d or with LOAD="command"
	@$(PYTHON) scripts/images.py load $(images_options)

.PHONY: images-lint
images-lint: setup ## hadolint over every Dockerfile
	$(BIN)/python scripts/images.py lint

.PHONY: e2e
e2e: setup ## Install into the cluster of KUBECONFIG, run, scale, break and uninstall (images must be there; E2E_VALUES=…)
	@if [ -z "$${KUBECONFIG:-}" ]; then echo "e2e: no cluster. Set KUBECONFIG (kind create cluster --kubeconfig FILE makes one), and see docs/kubernetes.md for the images." >&2; exit 2; fi
	$(BIN)/pytest tests/e2e -p no:cacheprovider $(E2E)

##@ Now and then

.PHONY: locks
locks: setup ## Resolve locks/*.txt anew after a change of pyproject.toml (UPGRADE=1 takes newer versions)
	$(BIN)/python scripts/lock.py $(if $(UPGRADE),--upgrade)

.PHONY: proto-accept
proto-accept: setup ## Make the present protos the ones that later changes must stay compatible with
	$(BIN)/python scripts/protos.py accept

.PHONY: wheel
wheel: setup ## Build the client's wheel into dist/
	$(BIN)/python -m hatchling build -t wheel

.PHONY: hooks
hooks: setup ## Install the pre-commit hooks (ruff, ruff format, protos) into this clone
	$(BIN)/pre-commit install

.PHONY: clean
clean: ## Remove caches and what was generated; CLEAN=all removes .venv and .fabrictune/ (models, data) too
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis $(API)
	rm -f fabrictune/v1/*_pb2*.py*
	find fabrictune services tests scripts bench -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
	$(if $(filter all,$(CLEAN)),rm -rf .venv .fabrictune)

.PHONY: help
help: ## This list
	@awk 'BEGIN {FS = ":.*## "; print "Usage: make TARGET"} \
	  /^##@ / {printf "\n%s\n", substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
