# make gate    the main job: judge the shipped kernels (uses a CUDA GPU where there is one)
# make test    the whole test suite
# make bench   time the kernels beside the composite, after the gate (needs a CUDA GPU)
# make check   ruff, mypy, pre-commit
PYTHON ?= python3
BIN := .venv/bin

.PHONY: gate test bench check clean

gate: .venv/gate.stamp
	$(BIN)/mxref gate

test: .venv/test.stamp
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

bench: .venv/test.stamp
	$(BIN)/mxref bench --samples .benchmarks

check: .venv/check.stamp
	$(BIN)/pre-commit run --all-files

# Each stamp adds its extras to one environment, pinned by constraints.txt.
.venv/gate.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/check.stamp: .venv/test.stamp
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info gate-report
