# make study [PROFILE=quick]   the whole experiment      make test   lint and tests
# make report                  figures, README tables, report/, poster/ from results/
# make lab                     JupyterLab                make clean  remove what was made here (never results of other profiles)
PROFILE ?= quick
PYTHON ?= python3
export PYTHONUNBUFFERED = 1

study: .venv/ready
	.venv/bin/effnet study $(PROFILE)

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pytest

report: .venv/ready
	.venv/bin/python report/compose.py

lab: .venv/ready
	.venv/bin/jupyter lab --notebook-dir=. notebooks/00_architecture.ipynb

# The environment is complete only when .venv/ready exists: an interrupted installation starts over
.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf .venv results/quick *.egg-info build .pytest_cache .ruff_cache __pycache__ tests/__pycache__

.PHONY: study test report lab clean
