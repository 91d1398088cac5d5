# On the first run each command creates .venv and installs its dependencies there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/ready

# The PyTorch, and NumPy if one is named, of make test-torch.
TORCH ?= 2.6.0
NUMPY ?=
OTHER := .venv-torch-$(TORCH)

FRAMEWORKS := .venv-frameworks

SANITIZED := build/sanitized

.PHONY: cross-check benchmark test test-frameworks test-sanitized test-torch test-cuda notebooks docs \
	lint

# Compares with the real tf.keras. Options go into ARGS: make cross-check ARGS="--cases 10000"
cross-check: $(READY)
	$(BIN)/python scripts/cross_check.py --html cross-check.html --json cross-check.json $(ARGS)

# Compares time and memory with other implementations, beside busy processes too, sixteen minutes;
# ARGS="--quick" for two.
benchmark: $(READY)
	$(BIN)/python scripts/benchmark --busy $(ARGS)

# The second run has Triton's kernels in its interpreter, on the CPU.
test: $(READY)
	$(BIN)/python -m pytest -n auto $(ARGS)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/test_kernels.py tests/test_cuda.py \
		tests/test_crosscheck.py::test_every_path_agrees_with_keras

# The snippets of docs/frameworks.md, with the frameworks, in an environment of 3 GB of its own.
test-frameworks:
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --upgrade pip
	$(FRAMEWORKS)/bin/python -m pip install -c constraints.txt -e '.[metrics]' --group test \
		--group frameworks
	$(FRAMEWORKS)/bin/python -m pip install -c constraints.txt --no-deps --group frameworks-alone
	$(FRAMEWORKS)/bin/python -m pytest -n auto tests/test_frameworks.py $(ARGS)

# cpu.c with sanitizers, on Linux with gcc: the first access outside of an array, overflow or shift
# too far ends the run. With the instructions of every x86-64, and with AVX2 where there is.
test-sanitized: $(READY)
	mkdir -p $(SANITIZED)
	for march in "" $$(grep -qw avx2 /proc/cpuinfo && echo -march=x86-64-v3); do \
		file=$(SANITIZED)/_cpu$$march.so; \
		gcc -std=gnu11 -O3 -g -fopenmp-simd -fno-math-errno -fno-trapping-math -fPIC -shared \
			-Wall -Wextra -Werror -fsanitize=address,undefined -fno-sanitize-recover=all \
			-DNO_CLONES $$march \
			-I$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('include'))") \
			torch_sce/kernels/cpu.c -o $$file -lm && \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
			ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 $(BIN)/python -m pytest \
			-p no:faulthandler -s --extension $$file tests/test_native.py $(ARGS) || exit 1; \
	done

# The tests that need no TensorFlow on another PyTorch, in an environment of several GB:
# make test-torch TORCH=2.6.0 NUMPY=1.26.4 PYTHON=python3.12
test-torch:
	$(PYTHON) -m venv $(OTHER)
	$(OTHER)/bin/python -m pip install --upgrade pip
	$(OTHER)/bin/python -m pip install torch==$(TORCH) $(if $(NUMPY),numpy==$(NUMPY),numpy) \
		-e '.[metrics,report]' --group test
	$(OTHER)/bin/python -m pytest --without-tensorflow -n auto $(ARGS)

# Executes the notebooks, some minutes; ARGS=--overwrite keeps what they print and draw.
notebooks: $(READY)
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=600 --durations=0 notebooks/*.ipynb $(ARGS)

# The rows on a GPU, and what only a GPU can show; tf.keras's answers are recorded.
test-cuda: $(READY)
	$(BIN)/python -m pytest --device cuda tests/test_kernels.py tests/test_cuda.py tests/test_gpu.py
	$(BIN)/python scripts/cross_check.py --oracle recorded --device cuda

# The tables of docs/ that are made from the package, and the API reference in build/docs.
docs: $(READY)
	$(BIN)/python scripts/build_docs.py

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# Once more if the dependencies, the version or the C code have changed.
$(READY): pyproject.toml setup.py constraints.txt torch_sce/__init__.py torch_sce/kernels/cpu.c \
		torch_sce/kernels/cpu_rows.h
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -c constraints.txt -e '.[metrics,tensorflow,report,triton]' --group dev
	touch $(READY)
