# make demo       a real model on stock vLLM, captured and shown
# make test       lint and every test
# make test-deep  every test in its full length: crashes, load, fuzzing, older versions of vLLM
# make test-gpu   the tests that need a CUDA device, with the python that has torch (PYTHON=...)
# make gpu-check  those, then what capture costs on the device, in under six minutes (WHEELS=FOLDER)
# make gpu-wheels what gpu-check installs where there is no network (WHEELS=FOLDER)
# make wheels     wheels for Linux on x86-64 and aarch64 in dist/, checked, and tried in a fresh environment
# make bench      what capture costs, as ratios with their targets (BENCH="prefill decode --quick" for some)
# make test-fast  the essential tests of each room, in a minute: what tests/fast.txt lists
# make lint       ruff and mypy
# make format     let ruff rewrite the sources
#
# All work in a virtual environment at $(VENV), which is made when it is missing or out of date.

VENV ?= .venv
PYTHON ?= $(or $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null),python3)
TORCH ?= torch==2.13.0
# Most of a test with an engine or a server is waiting for one core. Tests of one file share what they start.
WORKERS ?= 2

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check
on_device := PYTHONPATH=backends:schemas
gpu_needs := pytest hypothesis hatchling numpy jsonschema fsspec safetensors xxhash rich transformers
in_workers := -n $(WORKERS) --dist loadfile --no-loadscope-reorder
sources := tlcore backends schemas tests examples

.PHONY: demo test test-deep test-gpu gpu-check gpu-wheels test-fast bench wheels azurite chromium lint format venv
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(python) examples/demo.py

test: lint azurite chromium
	$(python) -m pytest $(in_workers)

test-deep: lint azurite chromium $(VENV)/.wheels
	TLCORE_DEEP=1 $(python) -m pytest

# Only the files that have such tests: others need packages that may not be there.
test-gpu:
	$(on_device) $(PYTHON) -m pytest -m gpu $$(grep -rl "mark\.gpu" --include="test_*.py" tests)

# Torch and its CUDA are there; what else is missing comes from a folder. A failed test leaves the table to come.
gpu-check:
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --find-links "$(WHEELS)" $(gpu_needs))
	-$(PYTHON) tlcore/hotpath/build_hook.py
	@status=0; timeout 150 $(MAKE) test-gpu || status=$$?; \
	$(on_device) $(PYTHON) -m tests.benchmarks.gpu --json gpu-check.json || status=$$?; exit $$status

gpu-wheels:
	$(PYTHON) -m pip download --quiet --dest "$(WHEELS)" $(gpu_needs)

# The other tools that are measured beside tlcore are installed only here.
bench: $(VENV)/.bench
	$(python) -m tests.benchmarks $(BENCH)

# The compiler of these wheels, which can build for other machines, is installed only here.
wheels: $(VENV)/.wheels
	$(python) -m tests.wheels dist
	$(python) -m pytest tests/test_wheels.py

# The Azure emulator comes from npm; the other servers are Python packages.
azurite: $(VENV)/.installed
	$(python) -m tests.servers

# The browser that the reports are tested in: the system's, else (as root) Debian's.
chromium: $(VENV)/.installed
	$(python) -m tests.browser

test-fast: $(VENV)/.installed
	$(python) -m pytest $(in_workers) -m "not slow" @tests/fast.txt

lint: $(VENV)/.installed
	$(python) -m ruff check $(sources)
	$(python) -m ruff format --check $(sources)
	$(python) -m mypy

format: $(VENV)/.installed
	$(python) -m ruff check --fix $(sources)
	$(python) -m ruff format $(sources)

venv: $(VENV)/.installed

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.made
	$(pip) install "$(TORCH)"
	touch $@

requirements := $(addprefix tests/requirements/,vllm.txt dev.txt servers.txt)

$(VENV)/.requirements: $(requirements) $(VENV)/.torch
	$(pip) install --no-deps $(addprefix -r ,$(requirements))
	touch $@

$(VENV)/.bench: tests/requirements/bench.txt $(VENV)/.installed
	$(pip) install --no-deps -r tests/requirements/bench.txt
	touch $@

$(VENV)/.wheels: tests/requirements/wheels.txt $(VENV)/.installed
	$(pip) install --no-deps -r tests/requirements/wheels.txt
	touch $@

extension := $(wildcard tlcore/hotpath/*.[ch])

$(VENV)/.installed: pyproject.toml $(extension) $(VENV)/.requirements
	$(pip) install --no-deps --no-build-isolation --editable .
	touch $@
