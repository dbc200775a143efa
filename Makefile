PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo ui evaluate docs test snippets slowest comfyui comfyui-speed matrix engines quantised lint format lines wheel clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'

demo: .venv/.installed-core  ## generate images with several concepts of the playground, offline
	$(BIN)/lora-compose demo

ui: .venv/.installed-ui  ## open the page: several LoRAs and a prompt, in a browser
	$(BIN)/lora-compose ui

evaluate: .venv/.installed-evaluation  ## score six methods on the playground, offline
	$(BIN)/lora-compose evaluate playground-quick

docs: .venv/.installed-docs  ## build the site of the docs into build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "build/site/index.html"

test: .venv/.installed-dev  ## run the tests
	$(BIN)/python -m pytest -n 2

snippets: .venv/.installed-dev  ## run all Python and all commands of README and docs, the slow ones too
	$(BIN)/python -m pytest -n 2 -m "slow or not slow" tests/test_snippets.py tests/test_commands_of_the_docs.py

slowest: .venv/.installed-dev  ## run the tests, and print which of them take most CPU time
	PYTHONPATH=tests $(BIN)/python -m pytest -n 2 -p cpu_seconds $(TESTS)

comfyui: .venv/.installed-dev  ## run the tests of the nodes: make comfyui COMFYUI_PATH=... (its requirements installed)
	@cat "$(COMFYUI_PATH)/comfyui_version.py"
	COMFYUI_PATH="$(COMFYUI_PATH)" $(BIN)/python -m pytest -m comfyui -rP tests/compose/comfyui

comfyui-speed: .venv/.installed-dev  ## print seconds per step beside ComfyUI's own LoRAs: make comfyui-speed COMFYUI_PATH=...
	@COMFYUI_PATH="$(COMFYUI_PATH)" PYTHONPATH=tests $(BIN)/python -m comfy_speed $(SPEED)

# The recorded latents are left out of the lowest: transformers fills new text encoders otherwise in each version.
matrix: build/matrix/newest/.installed build/matrix/lowest/.installed  ## run the tests on the newest and the lowest versions that pyproject.toml allows
	build/matrix/newest/bin/python -m pytest -n 2 $(TESTS)
	build/matrix/lowest/bin/python -m pytest -n 2 --ignore tests/test_goldens.py $(TESTS)

# In an environment of their own, since diffusers behaves otherwise where they are installed.
quantised: build/quantised/.installed  ## run the tests of quantised models with each library: bitsandbytes, torchao, gguf, quanto, SDNQ
	build/quantised/bin/python -m pytest -rs -m "slow or not slow" $(or $(TESTS),$(QUANTISED_TESTS))

# Their own versions of diffusers are too old for lora-compose, and their kernels need a GPU.
engines: build/engines/sglang/.installed build/engines/vllm-omni/.installed  ## run the diffusers back ends of SGLang and vLLM-Omni on the CPU
	build/engines/sglang/bin/python -m pytest -m slow -rs $(ENGINES_TEST) -k sglang
	build/engines/vllm-omni/bin/python -m pytest -m slow -rs $(ENGINES_TEST) -k vllm_omni

lint: .venv/.installed-dev  ## ruff check, ruff format --check, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.installed-dev  ## sort imports, fix what can be fixed, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lines:  ## print the lines of Python by folder, without the tests
	@git ls-files 'attention/*.py' 'pipelines/*.py' 'compose/*.py' | xargs wc -l | awk '$$2 != "total" { \
	  n = split($$2, path, "/"); lines[path[1]] += $$1; all += $$1; if (n > 2) lines[path[1] "/" path[2]] += $$1 } \
	  END { for (folder in lines) printf "%-24s %6d\n", folder, lines[folder] | "sort"; close("sort"); \
	  printf "%-24s %6d\n", "all", all }'

wheel: .venv/.installed-dev  ## build the wheel into dist/
	$(BIN)/python -m build --wheel

clean:  ## remove build results and caches (keeps .venv and outputs)
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find attention pipelines compose tests -name __pycache__ -type d -prune -exec rm -rf {} +

# One environment. A stamp says what was installed into it, so that the next run starts at once.
.venv/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "lora-compose needs Python 3.11 or newer, but $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Choose another one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; \
	}
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.installed-core: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --editable .
	@touch $@

.venv/.installed-evaluation: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --editable '.[evaluation]'
	@touch .venv/.installed-core $@

.venv/.installed-ui: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --editable '.[ui,evaluation]'
	@touch .venv/.installed-core .venv/.installed-evaluation $@

.venv/.installed-docs: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --editable '.[docs]'
	@touch .venv/.installed-core $@

.venv/.installed-dev: pyproject.toml | .venv/.created
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch .venv/.installed-core .venv/.installed-evaluation $@

# The engines' environments. vLLM is installed from its source for no device, so that nothing is compiled. For other
# versions of torch: make engines ENGINE_TORCH='torch==2.13.0 torchvision==0.28.0'
ENGINES := tests/fixtures/engines
ENGINES_TEST := tests/pipelines/families/test_engines_run.py
ENGINE_TORCH ?= torch torchvision
ENGINE_INSTALL = $(BIN)/uv pip install --python $(@D)/bin/python --excludes $(ENGINES)/left_out.txt \
  --overrides $(ENGINES)/versions.txt --overrides $(@D)/torch.txt $(ENGINE_TORCH)
build/engines/sglang/.installed build/engines/vllm-omni/.installed: pyproject.toml $(ENGINES)/left_out.txt $(ENGINES)/versions.txt | .venv/.installed-dev
	$(BIN)/uv venv --clear --python $(BIN)/python $(@D)
	printf '%s\n' $(ENGINE_TORCH) > $(@D)/torch.txt
	$(INSTALL_ENGINE)
	@touch $@

build/engines/sglang/.installed: INSTALL_ENGINE = $(ENGINE_INSTALL) 'sglang[diffusion]==0.5.23' triton --editable '.[dev]'

build/engines/vllm-omni/.installed: INSTALL_ENGINE = \
  $(ENGINE_INSTALL) jinja2 packaging setuptools setuptools-rust setuptools-scm wheel && \
  VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.30.0 $(ENGINE_INSTALL) --no-build-isolation-package vllm \
    --no-binary vllm vllm==0.30.0 vllm-omni==0.30.0 --editable '.[dev]'

QUANTISED_TESTS := tests/attention/test_quantised_layers.py tests/pipelines/families/test_quantised.py \
  tests/pipelines/families/test_transformer_memory.py tests/compose/generate/test_quantised_runs.py

build/quantised/.installed: pyproject.toml | .venv/.installed-dev
	$(BIN)/uv venv --clear --python $(BIN)/python $(@D)
	$(BIN)/uv pip install --python $(@D)/bin/python --editable '.[dev,quantize]' optimum-quanto sdnq
	@touch $@

# Environments of their own, of the newest and the lowest versions that pyproject.toml allows.
build/matrix/newest/.installed: RESOLUTION = highest
build/matrix/lowest/.installed: RESOLUTION = lowest-direct
build/matrix/%/.installed: pyproject.toml | .venv/.installed-dev
	$(BIN)/uv venv --clear --python $(BIN)/python build/matrix/$*
	$(BIN)/uv pip install --python build/matrix/$*/bin/python --resolution $(RESOLUTION) --editable '.[dev]'
	@touch $@
