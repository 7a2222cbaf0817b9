# Needs only Python >= 3.11 and make. `make test` builds its own environment first.

PYTHON ?= python3

# What the locks are made for. Torch is always installed first and on its own: left to a
# dependency, pip may pick a newer build of several gigabytes.
TORCH := 2.13.0
TL4 := 4.3.0
TL3 := 3.9.0

LOCK4 := requirements/dev-tl4.txt
LOCK3 := requirements/dev-tl3.txt

PIP := -m pip --disable-pip-version-check --no-input
# Two processes share the tests; torch is told to use one thread in each.
PYTEST_ARGS ?= -n 2 --dist worksteal --durations=20
DEMO_ARGS ?=
VALIDATE_ARGS ?= --nulls 200 --planted 20 --out build/validation

# Without compiled files every process compiles what it imports anew: half of a tutorial's time.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env env-tl3 test test-tl3 test-long tutorials lint format types docs
.PHONY: demo validate bench coverage release space lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: .venv/.installed ## make .venv (TransformerLens 4)
env-tl3: .venv-tl3/.installed ## make .venv-tl3 (TransformerLens 3.9)

test: .venv/.installed ## run the tests on TransformerLens 4
	.venv/bin/python -m pytest $(PYTEST_ARGS)

# Shapes and types are checked by `make test`, on the same functions; slow tests read models as
# the others do.
test-tl3: .venv-tl3/.installed ## run what touches TransformerLens on 3.9
	.venv-tl3/bin/python -m pytest -o addopts="-ra --strict-config --strict-markers" \
		-m "transformer_lens and not long and not slow" $(PYTEST_ARGS)

test-long: .venv/.installed ## run the long forms of tests, which `make test` leaves out
	HYPERLENS_EXAMPLES=300 .venv/bin/python -m pytest -m "long or hypothesis" $(PYTEST_ARGS)

tutorials: .venv/.installed ## run every tutorial on fewer and shorter texts
	.venv/bin/python -m pytest -m tutorial tests/test_tutorials.py $(PYTEST_ARGS)

lint: .venv/.installed ## check style and formatting
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

format: .venv/.installed ## fix style and formatting
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

types: .venv/.installed ## check types
	.venv/bin/mypy

docs: .venv/.installed ## build the API reference, warnings are errors
	.venv/bin/python -m sphinx -q -W --keep-going -b html docs build/docs

demo: .venv/.installed ## hyperfit the embedded model, compare, write the report
	.venv/bin/hyperlens demo $(DEMO_ARGS)

release: ## build sdist and wheel into dist/, and check them and the page that they show
	$(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/python $(PIP) install -q build twine
	rm -rf dist
	.venv-release/bin/python -m build --outdir dist
	.venv-release/bin/python -m twine check --strict dist/*
	$(PYTHON) scripts/check_release.py dist

space: .venv/.installed ## the demo's page as the folder of a static Hugging Face Space, build/space
	.venv/bin/python scripts/make_space.py build/space $(DEMO_ARGS)

validate: .venv/.installed ## every experiment on planted pairs whose truth is known (see docs/validation.md)
	.venv/bin/hyperlens validate $(VALIDATE_ARGS)

BENCH_ARGS ?= --vocab 4096,32000,128256 --d-model 256 --sequences 8 --length 64 --epochs 3 --rounds 1 --threads 1
bench: .venv/.installed ## how fast late-stage LoRA trains at vocabularies of real models, and in how much memory
	.venv/bin/python benchmarks/train_speed.py $(BENCH_ARGS)

# A pair and texts: make coverage COVERAGE_ARGS="BASE TUNED TEXTS..."
COVERAGE_ARGS ?=
coverage: .venv/.installed ## how often intervals hold the truth and tests err, on texts of yours (see docs/intervals.md)
	.venv/bin/python benchmarks/coverage.py $(COVERAGE_ARGS)
	.venv/bin/python benchmarks/paired_tests.py $(COVERAGE_ARGS)

lock: ## resolve both locks anew
	$(call resolve,$(TL4),$(LOCK4))
	$(call resolve,$(TL3),$(LOCK3))

clean: ## remove environments, caches and builds
	rm -rf .venv .venv-tl3 .venv-lock .venv-release build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again. The lock is whole,
# so nothing has to be resolved; what is imported gets compiled then, and the rest never.
.venv/.installed: $(LOCK4) pyproject.toml
	@$(check_python)
	.venv/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	.venv/bin/python $(PIP) install -q --no-compile torch==$(TORCH)
	.venv/bin/python $(PIP) install -q --no-compile --no-deps -r $(LOCK4)
	.venv/bin/python $(PIP) check
	.venv/bin/python $(PIP) install -q --no-deps --no-build-isolation -e .
	touch $@

# What the two locks have in common is not installed twice: the second environment holds what is
# its own, and looks for everything else in the first.
.venv-tl3/.installed: $(LOCK3) .venv/.installed
	rm -rf .venv-tl3
	.venv/bin/python -m venv --without-pip .venv-tl3
	grep -vxFf $(LOCK4) $(LOCK3) | grep -v '^#' > .venv-tl3/own.txt
	.venv/bin/python $(PIP) --python .venv-tl3/bin/python install -q --no-compile --no-deps -r .venv-tl3/own.txt
	.venv/bin/python -c "$$SEES_FIRST" .venv-tl3/bin/python
	touch $@

# Its own packages come first, and are found first.
define SEES_FIRST
import pathlib, subprocess, sys, sysconfig
where = "import sysconfig; print(sysconfig.get_path('purelib'))"
own = subprocess.run([sys.argv[1], "-c", where], capture_output=True, text=True, check=True).stdout
first = sysconfig.get_path("purelib")
line = f"import site; site.addsitedir({first!r})\n"
(pathlib.Path(own.strip()) / "first_environment.pth").write_text(line)
endef
export SEES_FIRST

define check_python
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hyperlens needs Python 3.11 or later: make PYTHON=python3.11 ...")'
endef

# $(1) TransformerLens version, $(2) lock
define resolve
	@$(check_python)
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python $(PIP) install -q torch==$(TORCH)
	.venv-lock/bin/python $(PIP) install -q torch==$(TORCH) transformer-lens==$(1) '.[dev]'
	mkdir -p requirements
	{ echo '# Everything pinned, for TransformerLens $(1) and torch $(TORCH). Made by `make lock`;'; \
	  echo '# the versions to lock for stand at the top of the Makefile.'; \
	  .venv-lock/bin/python $(PIP) freeze --all --exclude pip --exclude hyperlens \
	    | sed 's/^\(torch==[^+]*\)+.*/\1/'; } > $(2).new
	mv $(2).new $(2)
	rm -rf .venv-lock
endef
