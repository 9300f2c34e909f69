# make demo         environment, corpus, training, retrieval, report: runs/demo/report.html
# make test         environment and the fast tests
# make test-all     the slow tests too
# make plan         compiles every config for a pod and compares with tests/golden/plan
# make plan-golden  rewrites the texts in tests/golden/plan that have moved (ARGS=NAME: of one)
# make tables       rewrites the tables in README.md and docs/ that are made from code
# make lint         ruff and pyright
# make bench        times the demo's step and its data (benchmarks/README.md)
# make env          .venv only
# make lock         resolves requirements.lock anew
# make clean        removes .venv, runs and builds

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TORCH := $(VENV)/torch
TPU := $(VENV)/tpu

.PHONY: env demo test test-all plan plan-golden tables lint bench lock clean

env: $(STAMP)

# uv installs requirements.lock in seconds; pip is the fallback where uv is not available.
$(STAMP): setup.py requirements.lock
	$(PYTHON) -m venv $(VENV)
	@if $(BIN)/python -m pip install --quiet --disable-pip-version-check uv; then \
	  $(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock && \
	  $(BIN)/python -m uv pip install --quiet --python $(BIN)/python --no-deps -e .; \
	else \
	  $(BIN)/python -m pip install --quiet -r requirements.lock && \
	  $(BIN)/python -m pip install --quiet --no-deps -e .; \
	fi
	@touch $@

# pip and not uv: where no build is named, the two choose different builds of torch.
$(TORCH): $(STAMP) requirements-torch.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-torch.lock
	@touch $@

$(TPU): $(STAMP) requirements-tpu.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-tpu.lock
	@touch $@

# make demo ABLATION=no_contrast (L_v + L_t only) or no_masking (L_vtc + L_vtm only)
ABLATION ?=
demo:
	@started=$$(date +%s); $(MAKE) --no-print-directory env && \
	$(BIN)/python -m vtp_jax.demo --started $$started $(if $(ABLATION),--ablation $(ABLATION)) $(ARGS)

# Tests of a method share compiled programs, as do tests of a file: one worker runs all tests of a
# method, and otherwise whole files. What took longest in the last run comes first (tests/seconds.py).
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: env $(TORCH) $(TPU)
	$(PYTEST) -m "not slow and not plan" $(ARGS)

test-all: env $(TORCH) $(TPU)
	$(PYTEST) -m "not plan" $(ARGS)

plan: env $(TPU)
	$(PYTEST) --dist load -m plan tests/test_plan.py $(ARGS)

plan-golden: env $(TPU)
	$(BIN)/python -m tests.plans $(ARGS)

tables: env
	$(BIN)/python -m tests.tables

lint: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: env
	$(BIN)/python -m benchmarks.run

lock:
	uv pip compile --universal --python-version 3.11 --no-header --extra dev setup.py -o requirements.lock

clean:
	rm -rf $(VENV) runs build dist *.egg-info
