# Two commands do everything on a fresh machine: `make demo` and `make test`.
IS_NEW_ENOUGH := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
# Tried, not just found: a version manager may leave a python3.11 on the path that does not start.
PYTHON ?= $(shell for p in python3.11 python3; do $$p $(IS_NEW_ENOUGH) 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
DEVELOPMENT := $(VENV)/.development-installed
EVAL_VENV := .venv-eval
EVALUATION := $(EVAL_VENV)/.evaluation-installed
PAGE := $(VENV)/.page-installed

.PHONY: demo app app-env test install eval-env lint format types clean

demo: $(RUNTIME)  ## install, and generate a video
	$(BIN)/python scripts/demo.py

app: app-env  ## install, and open a page in which videos are generated live
	$(BIN)/python scripts/app.py --config configs/toyworld/inference.yaml \
	  --hybrid_checkpoint models/toyworld/hybrid_75.safetensors --open_browser

test: lint types  ## install, lint, check types, test
	$(BIN)/python -m pytest -n 2

install: $(DEVELOPMENT)

app-env: $(PAGE)  ## install what the page needs, and open nothing

# Beside the main environment, never in it: torchvision must fit the build of torch.
eval-env: $(EVALUATION)  ## install what metrics with networks need

$(EVALUATION): setup.py
	@"$(PYTHON)" $(IS_NEW_ENOUGH) 2>/dev/null || { echo >&2 "error: Python 3.11 or newer is needed: set PYTHON"; exit 2; }
	"$(PYTHON)" -m venv $(EVAL_VENV)
	$(EVAL_VENV)/bin/python -m pip install -q --disable-pip-version-check -e ".[eval]"
	@$(EVAL_VENV)/bin/python -c "import torchvision" 2>/dev/null || { echo >&2 "error: torchvision does not import \
	beside this build of torch: install both from one index into $(EVAL_VENV), then run make eval-env again"; exit 2; }
	touch $@

lint: $(DEVELOPMENT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEVELOPMENT)
	$(BIN)/mypy

format: $(DEVELOPMENT)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@"$(PYTHON)" $(IS_NEW_ENOUGH) 2>/dev/null || { echo >&2 "error: Python 3.11 or newer is needed, tried \
	$(or $(PYTHON),python3.11 and python3): install it, or set PYTHON"; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

# torch goes first and alone, at its pinned version: nothing else may choose another build of it.
$(RUNTIME): requirements.txt setup.py | $(BIN)/python
	$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep -o '^torch==[^ ]*' requirements.txt)"
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -e .
	touch $@

$(DEVELOPMENT): requirements-dev.txt $(RUNTIME)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	touch $@

# requirements.txt is a constraint here: nothing may choose another version of what was tested. Gradio 6.31 asks for
# Pillow below 13, which cannot read some TIFF files, and works with the newer one: that comes back.
$(PAGE): setup.py $(RUNTIME)
	pillow="$$($(BIN)/python -m pip freeze | grep '^pillow==')" && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check -c requirements.txt -e ".[demo]" && \
	  $(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --no-warn-conflicts "$$pillow"
	touch $@

clean:
	rm -rf $(VENV) $(EVAL_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
