# Every command a developer types. They run in .venv, which `python3 run.py` makes.
PYTHON := .venv/bin/python

.PHONY: build check test bench bench-quick bench-kernels profile chaos chaos-quick slow lock clean

# Compiled modules, in place (SLUICE_CYTHON_DEBUG=1 for the build that checks bounds)
build:
	$(PYTHON) setup.py --quiet build_ext --inplace

check:
	$(PYTHON) -m pytest -q tests/test_layering.py tests/test_sourcecode.py

test:
	python3 run.py test

# What takes long: faults that have to outlast leases and time-outs
slow:
	$(PYTHON) -m pytest -q -m slow

# Every published number in one run, about 25 minutes; bench-quick: goals 1, 3 and 6 in under two
bench:
	$(PYTHON) -m bench

bench-quick:
	$(PYTHON) -m bench --quick

# The compiled kernels alone, with pytest-benchmark
bench-kernels:
	$(PYTHON) -m pytest -q bench --benchmark-only

# Where an engine's CPU goes under load: flame graph and tables in build/profile
profile:
	$(PYTHON) -m bench.profile

# The delivery contract under every fault of the matrix, about an hour; chaos-quick: every process fault once, within three minutes
chaos:
	$(PYTHON) -m bench.chaos

chaos-quick:
	$(PYTHON) -m bench.chaos --quick

# Universal and hash-locked; needs uv. No index address and no path of this machine may get into it.
lock:
	uv --no-config pip compile --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
		--python-version 3.11 \
		--extra embedded --extra dev --extra build --output-file requirements.lock pyproject.toml

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find ext bench -name '*.so' -delete -o -name '*.c' -delete
