# Two commands on a fresh machine: `make demo` (a wav becomes a face you can watch) and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
RUN    := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt

NATIVE := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
PACKAGE := $(shell find jambatalk jambatalk_kernels -type f -not -name '*.pyc' 2>/dev/null)

.PHONY: demo test check lint docs clean

demo: $(VENV)/.installed
	$(RUN) -m jambatalk.infer -o demo.html

test: $(VENV)/.installed-test
	$(RUN) -m pytest -q -m "not slow" tests

# What `make test` leaves out: sanitizers, every instruction set, long property tests; the linter, mypy.
check: $(VENV)/.installed-test lint
	$(RUN) -m pytest -q -m slow tests

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .
	$(RUN) -m mypy

# The API reference, from the docstrings, into build/docs.
docs: $(VENV)/.installed
	$(INSTALL) pdoc
	$(RUN) -m pdoc --docformat google --output-directory build/docs jambatalk_kernels jambatalk

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The build is isolated (pyproject.toml pins torch for its headers), so this is what `pip install .` does anywhere.
$(VENV)/.installed: EXTRA := demo
$(VENV)/.installed-test: EXTRA := demo,test
$(VENV)/.installed $(VENV)/.installed-test: $(VENV)/bin/python $(NATIVE) $(PACKAGE)
	$(INSTALL) torch==2.13.0
	$(INSTALL) --upgrade --upgrade-strategy only-if-needed ".[$(EXTRA)]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info demo.html
