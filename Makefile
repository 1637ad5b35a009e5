# Two commands do all the set-up: `make sample` and `make test`. Each makes .venv where there is none.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := $(wildcard csrc/*) setup.py pyproject.toml constraints.txt
# says what is done and how long it took
STEP = t=$$(date +%s); printf '== %s\n' $(1); $(2) || exit 1; printf '   %s s\n' $$(($$(date +%s) - t))

# what `make bench` measures, and where it leaves its results; `make bench BENCH=--quick` is a first look
BENCH ?= --against all --dtype bf16
SUITES ?=
OUT := bench/out
# files of tests at a time: half of their time goes by waiting for processes; `make test JOBS=0` takes turns
JOBS ?= 2
COMMA := ,

.PHONY: sample test lint types sanitize bench bench-suites bench-gate bench-kernels bench-sampler bench-unet bench-adapters clean

sample: $(VENV)/installed  ## a picture of 64 digits from the embedded checkpoint
	@$(call STEP,'sampling 64 digits into $(CURDIR)/digits.png',$(BIN)/stepfuse sample --model digits -n 64 --steps 50 --seed 0 --out digits.png)

test: $(VENV)/tested lint types  ## lint, types and every test
	@$(call STEP,'tests',$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile)

lint: $(VENV)/tested
	@$(call STEP,'ruff',$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .)

types: $(VENV)/tested
	@$(call STEP,'mypy --strict',$(BIN)/mypy)

# a package like stepfuse, links to the same sources, but with modules of its own: the installed ones
# stay as they are. The runtimes of the sanitizers must be there before anything else is loaded, and
# Python's own leaks are none of ours.
SANITIZED := build/sanitize
RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
CHECKED = env PYTHONPATH=$(CURDIR)/$(SANITIZED) LD_PRELOAD='$(RUNTIMES)' ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=print_stacktrace=1 STEPFUSE_ISA=$(1) $(BIN)/python -m pytest -q -p no:cacheprovider \
	tests/kernels/test_cpp.py tests/kernels/test_fuzz.py
BEST = $(shell $(BIN)/python -c 'from stepfuse._cpu_baseline import supported; print(supported()[0])')

sanitize: $(SANITIZED)/built  ## the C++ under the sanitizers of addresses and of undefined behaviour
	@$(call STEP,'the baseline module under the sanitizers',$(call CHECKED,baseline))
	@$(call STEP,'the module of this machine under the sanitizers',$(call CHECKED,$(BEST)))

$(SANITIZED)/built: $(SOURCES) | $(VENV)/tested
	@mkdir -p $(SANITIZED)/stepfuse
	@ln -sfn $(addprefix $(CURDIR)/src/stepfuse/,$(filter-out %.so __pycache__,$(notdir $(wildcard src/stepfuse/*)))) $(SANITIZED)/stepfuse/
	@$(call STEP,'building the C++ modules with sanitizers',$(BIN)/python setup.py --quiet build_ext --sanitize --force --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects)
	@touch $@

bench: bench-suites  ## everything; results in bench/out: bench.json, and report.html to look at
	@$(call STEP,'whole loops of digits',$(BIN)/stepfuse bench --model digits $(BENCH) --out $(OUT)/parts)
	@$(call STEP,'one file and one report',$(BIN)/python -m stepfuse.bench.report $(OUT)/parts/record.json --suites $(OUT)/parts/suites.json --static --json $(OUT)/bench.json --out $(OUT)/report.html)
	@echo 'wrote $(OUT)/bench.json and $(OUT)/report.html'

bench-suites: $(VENV)/benched  ## kernels, unet, sampler and adapters under pytest-benchmark
	@mkdir -p $(OUT)/parts
	@$(call STEP,'suites',$(BIN)/python -m pytest bench --benchmark-only -q --benchmark-columns=median$(COMMA)iqr$(COMMA)rounds --benchmark-json=$(OUT)/parts/suites.json $(SUITES))

bench-gate:  ## fails where the suites are slower than in BASELINE, beside their references
	@$(BIN)/python -m stepfuse.bench.gate $(BASELINE) $(OUT)/parts/suites.json

bench-kernels: $(VENV)/benched
	@$(BIN)/python -m stepfuse.bench.bench_group_norm_silu
	@$(BIN)/python -m stepfuse.bench.bench_group_norm_silu --hot --no-compile
	@$(BIN)/python -m stepfuse.bench.bench_denoise_step
	@$(BIN)/python -m stepfuse.bench.bench_add_noise
	@$(BIN)/python -m stepfuse.bench.bench_philox
	@$(BIN)/python -m stepfuse.bench.bench_convolve
	@$(BIN)/python -m stepfuse.bench.bench_attention
	@$(BIN)/python -m stepfuse.bench.bench_concatenate
	@$(BIN)/python -m stepfuse.bench.roofline

bench-sampler: $(VENV)/benched
	@$(BIN)/python -m stepfuse.bench.bench_sampler

bench-unet: $(VENV)/benched
	@$(BIN)/python -m stepfuse.bench.bench_unet

bench-adapters: $(VENV)/benched
	@$(BIN)/python -m stepfuse.bench.bench_adapters

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f src/stepfuse/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(call STEP,'making $(CURDIR)/$(VENV)',$(PYTHON) -m venv $(VENV))

$(VENV)/installed: $(VENV)/bin/python $(SOURCES)
	@$(call STEP,'installing stepfuse and building its C++ modules',$(PIP) --editable .)
	@touch $@

# by name: the project itself is installed, so that what an extra asks for is all that is missing,
# and the C++ modules are not built again
$(VENV)/tested: $(VENV)/installed
	@$(call STEP,'installing the test extras',$(PIP) 'stepfuse[test]')
	@touch $@

$(VENV)/benched: $(VENV)/tested
	@$(call STEP,'installing the bench extras',$(PIP) 'stepfuse[bench]')
	@touch $@
