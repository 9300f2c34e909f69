# make demo   environment, corpus, training, retrieval, report: runs/demo/report.html
# make test   environment and all tests     make lint   ruff and pyright
# make env    .venv alone                   make bench  what is timed, see benchmarks/README.md
# make lock   new exact versions            make test-all  the slow tests too
# make plan   every config on two pods against tests/golden/plan; make plan-golden writes those anew

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
TORCH := $(VENV)/torch
TPU := $(VENV)/tpu

.PHONY: env demo test test-all plan plan-golden lint bench lock clean

env: $(STAMP)

# uv installs what requirements.lock says in seconds; pip does it where uv cannot be had.
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

# pip and not uv: where no build is named, the two do not choose the same one of torch.
$(TORCH): $(STAMP) requirements-torch.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-torch.lock
	@touch $@

$(TPU): $(STAMP) requirements-tpu.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-tpu.lock
	@touch $@

# make demo ABLATION=no_contrast (L_v + L_t alone) or no_masking (L_vtc + L_vtm alone)
ABLATION ?=
demo:
	@started=$$(date +%s); $(MAKE) --no-print-directory env && \
	$(BIN)/python -m vtp_jax.demo --started $$started $(if $(ABLATION),--ablation $(ABLATION)) $(ARGS)

# A file's tests share what they make, so a file stays with one worker; dear files come first, in
# the order of tests/conftest.py, so that both workers end together.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test: env $(TORCH) $(TPU)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: env $(TORCH) $(TPU)
	$(PYTEST) $(ARGS)

plan: env $(TPU)
	$(PYTEST) --dist load -m plan $(ARGS)

# Writes the goldens whose programs have changed: about a minute for each, one by one.
plan-golden: env $(TPU)
	$(BIN)/python -m tests.plans $(ARGS)

lint: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: env
	$(BIN)/python -m benchmarks.run

lock:
	uv pip compile --universal --python-version 3.11 --no-header --extra dev setup.py -o requirements.lock

clean:
	rm -rf $(VENV) runs build dist *.egg-info
