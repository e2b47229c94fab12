# make demo    compress SmolLM2-135M to 2 bits, let it write, measure its perplexity against F16 (bench/demo.py)
# make test    lint and tests, with the patched llama.cpp that they need
# make cuda-link    compile and link ggml-cuda with nvcc from PyPI, no GPU (tests/cuda/link.py: half an hour of a core)
#
# All first make a virtual environment in .venv, and the first two build the patched llama.cpp in the cache; the second
# time both are there. Needs Python >= 3.10 with venv, a C++ compiler, cmake and make.
#
# Variables:
#   PYTHON   the Python that makes .venv                                              make test PYTHON=python3.12
#   TORCH    what pip installs as torch, with options. On Linux PyPI's torch brings CUDA libraries along (gigabytes);
#            without an NVIDIA GPU take the smaller wheel:
#                                   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
#   DBF_GGUF_CACHE   the cache for downloads and builds, else ~/.cache/dbf-gguf

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
PY := $(VENV)/bin/python
# Named after what it stands for: other requirements, or a clone that was moved, make another one.
READY := $(VENV)/.ready-$(shell (cat pyproject.toml; pwd) | cksum | cut -d' ' -f1)
IS_READY = [ -e $(READY) ] && $(PY) -c '' 2>/dev/null

.PHONY: demo test cuda-link setup check-tools clean

demo: setup
	@$(PY) -m dbf_gguf build
	@$(PY) bench/demo.py

test: setup
	@$(PY) -m ruff check .
	@$(PY) -m dbf_gguf build
	@$(PY) -m pytest

cuda-link: setup
	@$(PY) tests/cuda/link.py

# One line that names all that is missing.
check-tools:
	@if $(IS_READY); then exit 0; fi; \
	missing=; packages=; need() { missing="$$missing$${missing:+, }$$1"; packages="$$packages$${2:+ $$2}"; }; \
	has() { for tool; do command -v $$tool >/dev/null 2>&1 && return; done; return 1; }; \
	if ! has $(PYTHON); then need "Python ($(PYTHON))" "python3 python3-venv"; \
	elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
		need "Python 3.10 or newer ($(PYTHON) is older; name another with PYTHON=)"; \
	elif ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then need "Python's venv and ensurepip" python3-venv; fi; \
	has $${CC:-cc gcc clang} && has $${CXX:-c++ g++ clang++} || need "a C and C++ compiler" g++; \
	has cmake || need cmake cmake; \
	if [ -n "$$missing" ]; then \
		echo "missing: $$missing$${packages:+ (on Debian or Ubuntu: apt-get install$$packages)}" >&2; exit 1; \
	fi

# `.unfinished` stands while pip works. If it is found at the start, that setup was cut off in the middle, and what lies
# there is not trusted. (pip keeps what it downloaded, so starting anew is cheap.) Compiled by all cores at once, and in any
# case: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every process would compile torch anew, for seconds.
setup: check-tools
	@if $(IS_READY); then exit 0; fi; set -e; \
	if [ -e $(VENV)/.unfinished ] || { [ -e $(VENV) ] && ! $(PY) -m pip --version >/dev/null 2>&1; }; then \
		echo "$(VENV) is unfinished: starting anew"; rm -rf $(VENV); \
	fi; \
	mkdir -p $(VENV); touch $(VENV)/.unfinished; rm -f $(VENV)/.ready-*; \
	[ -e $(PY) ] || $(PYTHON) -m venv $(VENV); \
	echo "installing $(TORCH) (minutes)"; \
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check $(TORCH); \
	echo "installing dbf-gguf and what it needs"; \
	$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -e '.[test]'; \
	$(PY) -m compileall -qq -j 0 $(VENV)/lib >/dev/null 2>&1 || true; \
	touch $(READY); rm -f $(VENV)/.unfinished

clean:
	rm -rf $(VENV) demo
