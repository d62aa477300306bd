# make train: install, then train and test the default model.   make train ARGS="loss=nce user.num_layers=4"
# make test:  install, then the whole test suite.               make check: lint, format and types
.PHONY: install install-dev train test check

PYTHON ?= python3
VENV ?= .venv
export PYTHON VENV

train: install
	$(VENV)/bin/python -m hllm.train $(ARGS)

test: install-dev
	scripts/test $(ARGS)

check: install-dev
	scripts/check

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml scripts/constraints.txt scripts/install
	scripts/install
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	scripts/install dev
	touch $@
