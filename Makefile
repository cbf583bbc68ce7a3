# make run | test | lab: each sets up what is missing first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PROFILE ?= sample
DATA ?=
BIN := .venv/bin
ENV := PATH="$(CURDIR)/$(BIN):$$PATH" GRADIO_ANALYTICS_ENABLED=False DVC_NO_ANALYTICS=1
STAMP := .venv/.set-up

.PHONY: help setup run test lab test-deps

help:
	@echo "make run     set up, then run the pipeline (PROFILE=sample, or PROFILE=clinical DATA=folder)"
	@echo "make test    set up, then run all tests"
	@echo "make lab     open the notebooks in JupyterLab"

setup: $(STAMP)

$(STAMP): requirements.lock settings.ini setup.py
	@echo "Setting up .venv from requirements.lock (about a minute, 7 GB)"
	@test -x $(BIN)/python || python3 -m venv .venv || { echo "Python's venv is missing: apt-get install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip sync --quiet --python $(BIN)/python requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

run: setup
ifeq ($(PROFILE),sample)
	@$(ENV) dvc repro
else
	@$(if $(DATA),$(BIN)/python -c "import sys; from cxr_pred.data.fetch import link_data; print(link_data(sys.argv[1]))" "$(DATA)",true)
	@$(ENV) dvc repro profiles/$(PROFILE)/dvc.yaml
endif

test: setup
	@$(ENV) python -m pytest -q -rs --timeout=1200 tests

lab: setup
	@$(ENV) jupyter lab nbs

test-deps:
	apt-get update -q && apt-get install -y -q --no-install-recommends chromium
