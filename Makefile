# make study [PROFILE=quick]   the whole experiment      make test   lint and tests
# make report                  figures, README tables, report/, poster/ from results/
# make lab                     JupyterLab                make clean  remove what was made here (never results of other profiles)
# make gpu-check               on a GPU, ten minutes: its tests, B0's speed, two epochs of a real run
# make test-slow               the slow tests: whole notebooks, kills, several processes; a browser if Chromium is here
# make coverage                all these tests except the browser's, with the lines that they reach
PROFILE ?= quick
PYTHON ?= python3
export PYTHONUNBUFFERED = 1
# As root, as in a container, JupyterLab starts only if told to
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)

study: .venv/ready
	.venv/bin/effnet study $(PROFILE)

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pytest -n 2 --dist loadgroup

test-slow: .venv/ready
	.venv/bin/pytest -n 2 --dist loadgroup -m "slow and not browser"
	.venv/bin/pytest -m browser -rs tests/test_browser.py

coverage: .venv/ready
	.venv/bin/pytest -n 2 --dist loadgroup -m "not browser" --cov --cov-report=term:skip-covered --cov-fail-under=95

gpu-check: .venv/ready
	.venv/bin/pytest -m gpu -rs
	.venv/bin/effnet bench --quick
	.venv/bin/effnet pilot tiny-imagenet epochs=2

report: .venv/ready
	.venv/bin/python -m effnet_study.documents.compose

lab: .venv/ready
	.venv/bin/jupyter lab $(AS_ROOT) --notebook-dir=. --LabApp.default_url=/lab/tree/notebooks/00_architecture.ipynb

# The environment is complete only when .venv/ready exists: an interrupted installation starts over, and so does one that
# another Python began
.venv/ready: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	@v='import sys; print(sys.version_info[:2])'; \
		[ "$$(.venv/bin/python -c "$$v" 2>&1)" = "$$($(PYTHON) -c "$$v")" ] || rm -rf .venv
	$(PYTHON) -m venv .venv
	@echo "installing some 7 GB into .venv, which takes minutes"
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	.venv/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf .venv results/quick *.egg-info build .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: study test test-slow coverage gpu-check report lab clean
