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
# Builds that fit each other. Another pair, from another index: make eval-env EVAL_TORCH="--index-url … torch torchvision"
EVAL_TORCH ?= torch==2.14.1 torchvision==0.29.1
VBENCH_VENV := .venv-vbench
# VBench pins a tokenizer that has no builds for later versions.
VBENCH_PYTHON ?= python3.11
FASTVIDEO_VENV := .venv-fastvideo
PIP_INSTALL := -m pip install -q --disable-pip-version-check
PAGE := $(VENV)/.page-installed

.PHONY: demo app app-env docs test install eval-env vbench-env fastvideo-env lint format types clean

demo: $(RUNTIME)  ## install, and generate a video
	$(BIN)/python scripts/demo.py

app: app-env  ## install, and open a page in which videos are generated live
	$(BIN)/python scripts/app.py --config configs/toyworld/inference.yaml \
	  --hybrid_checkpoint models/toyworld/hybrid_75.safetensors --open_browser

test: lint types  ## install, lint, check types, test
	$(BIN)/python -m pytest -n 2

docs: $(DEVELOPMENT)  ## install, and build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict

install: $(DEVELOPMENT)

app-env: $(PAGE)  ## install what the page needs, and open nothing

# Beside the main environment, never in it: torchvision must fit the build of torch, which may be another one there.
eval-env: $(EVALUATION)  ## install what metrics with networks need

# The project itself comes without its pins of torch; everything else that it asks for is read from it.
REQUIRED := import re; from importlib.metadata import requires; \
	print(*(line.split(";")[0].strip() for line in requires("arl2") \
	if re.match("[A-Za-z0-9_-]+", line)[0] not in ("torch", "torchvision") \
	and ("extra" not in line or "\"eval\"" in line.replace(chr(39), chr(34)))), sep="\n")

$(EVALUATION): setup.py
	@"$(PYTHON)" $(IS_NEW_ENOUGH) 2>/dev/null || { echo >&2 "error: Python 3.11 or newer is needed: set PYTHON"; exit 2; }
	"$(PYTHON)" -m venv $(EVAL_VENV)
	$(EVAL_VENV)/bin/python $(PIP_INSTALL) $(EVAL_TORCH)
	@$(EVAL_VENV)/bin/python -c "import torchvision" 2>/dev/null || { echo >&2 "error: torchvision does not import \
	beside this build of torch: set EVAL_TORCH to a pair of one index, then run make eval-env again"; exit 2; }
	$(EVAL_VENV)/bin/python $(PIP_INSTALL) --no-deps -e .
	$(EVAL_VENV)/bin/python -c '$(REQUIRED)' > $(EVAL_VENV)/requirements.txt
	$(EVAL_VENV)/bin/python -m pip freeze | grep -E "^(torch|torchvision)==" > $(EVAL_VENV)/constraints.txt
	$(EVAL_VENV)/bin/python $(PIP_INSTALL) -c $(EVAL_VENV)/constraints.txt -r $(EVAL_VENV)/requirements.txt
	$(EVAL_VENV)/bin/python -c "import open_clip, timm, torchmetrics, pyiqa.archs.musiq_arch"
	touch $@

vbench-env: $(VBENCH_VENV)/.installed  ## install VBench and VBench-Long

# The last two are what VBench-Long imports and vbench does not ask for.
$(VBENCH_VENV)/.installed:
	"$(VBENCH_PYTHON)" -m venv $(VBENCH_VENV)
	$(VBENCH_VENV)/bin/python $(PIP_INSTALL) torch==2.9.1 torchvision==0.24.1 "numpy<2"
	$(VBENCH_VENV)/bin/python $(PIP_INSTALL) vbench==0.1.5 scenedetect==0.7.2 moviepy==1.0.3
	$(VBENCH_VENV)/bin/python -c "import vbench.motion_smoothness"
	touch $@

fastvideo-env: $(FASTVIDEO_VENV)/.installed  ## install what FastVideo's evaluation needs

# Without its kernels, which are built for one GPU and which evaluation does not use. vbench has the code of some metrics.
UNUSED := ["fastvideo-kernel", "flashinfer-python", "nvidia-cutlass-dsl", "gradio", "ray", "wandb", "moviepy", "flask"]
RESOLVED := import json, sys; found = [p["metadata"] for p in json.load(sys.stdin)["install"]]; \
	print(*(p["name"] + "==" + p["version"] for p in found if p["name"].lower() not in $(UNUSED)), sep="\n")

$(FASTVIDEO_VENV)/.installed:
	"$(PYTHON)" -m venv $(FASTVIDEO_VENV)
	$(FASTVIDEO_VENV)/bin/python $(PIP_INSTALL) --dry-run --ignore-installed --report $(FASTVIDEO_VENV)/report.json \
	  "fastvideo[eval]==0.2.1" > /dev/null
	$(FASTVIDEO_VENV)/bin/python -c '$(RESOLVED)' < $(FASTVIDEO_VENV)/report.json > $(FASTVIDEO_VENV)/requirements.txt
	$(FASTVIDEO_VENV)/bin/python $(PIP_INSTALL) --no-deps -r $(FASTVIDEO_VENV)/requirements.txt
	$(FASTVIDEO_VENV)/bin/python $(PIP_INSTALL) --no-deps vbench==0.1.5 decord==0.6.0
	$(FASTVIDEO_VENV)/bin/fastvideo eval list > /dev/null
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
	rm -rf $(VENV) $(EVAL_VENV) $(VBENCH_VENV) $(FASTVIDEO_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
