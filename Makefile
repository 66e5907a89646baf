# Each target makes its own .venv on a machine with Python 3.10-3.13 and g++.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python3.10,$(if $(shell command -v $(p)),$(p))))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints/ci.txt
SOURCES := pyproject.toml setup.py constraints/ci.txt $(wildcard csrc/*.* csrc/*/*.*)
OUT ?= demo-run
# Of the operators and of what calls them: under the sanitizers, and without a compiler.
KERNEL_TESTS := $(patsubst %,tests/test_%.py,kd_loss divergences dist cam distance principal concepts quantiles dissection)
# Tests side by side; many kernels use threads of their own.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist

.PHONY: demo test bench lint wheel sanitize nocompiler ci clean

demo: .venv/.cli
	$(BIN)/fastxkd demo --out $(OUT)

test: .venv/.test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PARALLEL) loadfile

bench: .venv/.bench
	$(BIN)/python -m benchmarks $(BENCH)

lint: .venv/.test .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
	$(BIN)/mypy

wheel: .venv/.base
	$(PIP) build
	$(BIN)/python -m build --wheel

# The kernels under the address and undefined-behaviour sanitizers, in a copy of the tree.
sanitize: .venv/.test
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r csrc fastxkd tests setup.py pyproject.toml conftest.py README.md LICENSE build/sanitize/
	rm -f build/sanitize/fastxkd/*.so
	cd build/sanitize && FASTXKD_SANITIZE=1 FASTXKD_CPU=1 FASTXKD_CUDA=0 \
	  ../../$(BIN)/python setup.py -q build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  FASTXKD_SANITIZE=1 FASTXKD_FUZZ_CASES=40 OMP_WAIT_POLICY=passive \
	  ../../$(BIN)/python -m pytest $(PARALLEL) worksteal -m "not slow" -p no:cacheprovider \
	  --capture=sys $(KERNEL_TESTS) tests/test_fuzz.py

# A machine without a compiler: the package installs, says so, and runs on the reference. -S and the
# path keep the checkout's own installation out, whose kernels would be found otherwise.
nocompiler: .venv/.test
	rm -rf build/nocompiler && mkdir -p build/nocompiler
	cp -r csrc fastxkd tests setup.py pyproject.toml conftest.py README.md LICENSE build/nocompiler/
	rm -f build/nocompiler/fastxkd/*.so
	cd build/nocompiler && env -u FASTXKD_CPU FASTXKD_CUDA=0 CC=false CXX=false \
	  ../../$(BIN)/python setup.py -q build_ext --inplace
	site=$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") && \
	  cd build/nocompiler && export PYTHONPATH="$$site" OMP_WAIT_POLICY=passive && \
	  ../../$(BIN)/python -S -c "import fastxkd; assert {b.kernel for b in fastxkd.backends()} == {'reference'}" && \
	  ../../$(BIN)/python -S -m pytest -m "not slow" -p no:cacheprovider $(KERNEL_TESTS)

ci: lint test sanitize nocompiler

clean:
	rm -rf .venv build dist *.egg-info fastxkd/*.so

.venv/.base:
	@test -n "$(PYTHON)" || { echo "fastxkd needs Python 3.10-3.13 on the path"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) "setuptools>=69" "pybind11>=2.13" wheel
	touch $@

# torch is installed first and by its pin, so that the build that follows finds it and takes no other.
.venv/.cli: .venv/.base $(SOURCES)
	$(PIP) torch -e ".[cli]" --no-build-isolation
	touch $@

.venv/.test: .venv/.base $(SOURCES)
	$(PIP) torch -e ".[test]" --no-build-isolation
	touch $@

.venv/.bench: .venv/.test
	$(PIP) -e ".[bench]" --no-build-isolation
	touch $@

.venv/.lint: .venv/.base pyproject.toml constraints/ci.txt
	$(PIP) -r constraints/lint.txt
	touch $@
