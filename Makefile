# make demo   see MeZO fine-tune a language model on this machine, offline once installed
# make test   the tests          make lint   ruff, mypy          make slow   the slow tests
#
# Both install what they need into .venv. With a CUDA device: make demo TORCH=torch

PYTHON ?= python3.11
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet
TORCH ?= torch==2.13.0+cpu
TORCH_CPU_INDEX = https://download.pytorch.org/whl/cpu
OUT ?= demo_output

.PHONY: demo test slow lint clean

demo: $(VENV)/.demo
	$(VENV)/bin/mezo demo --output_dir $(OUT)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

slow: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/.test
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

$(VENV)/.torch:
	command -v $(PYTHON) >/dev/null && $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	@echo "installing $(TORCH) and what mezo needs into $(VENV); this takes a few minutes"
	@# the CPU build: from the package index where it has one, else from PyTorch's own
	$(PIP) "$(TORCH)" 2>/dev/null || $(PIP) "$(TORCH)" --index-url $(TORCH_CPU_INDEX)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[demo]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[test,lint]"
	@touch $@

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
