PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-once test chaos chaos-short bench bench-quick bench-background versions lint format docs package clean

# Real data through real flows on SQLite, then the admin until Ctrl-C; PORT=8001 is for another port.
demo: $(VENV)/demo.stamp
	$(BIN)/python manage.py demo $(if $(PORT),--port $(PORT))

# The same for scripts: ends after the runs.
demo-once: $(VENV)/demo.stamp
	$(BIN)/python manage.py demo --once

# The suite on SQLite and on each database server that answers. Half of the time is waiting, so there
# are more processes than most machines' cores.
test: $(VENV)/test.stamp
	$(BIN)/python tests/on_every_database.py -q -n 4 --dist worksteal

# The quick part of it on the newest Python that is here, the newest Django, and behind a router.
.PHONY: corner
corner:
	$(PYTHON) tests/on_newest.py $(VENV)/newest -q -n 4

# The suite over the supported Pythons and Djangos, on SQLite.
versions: $(VENV)/versions.stamp
	$(BIN)/nox

# How soon flows start in the background, and how fast a backlog is done: PostgreSQL, Redis.
bench-background: $(VENV)/test.stamp
	$(BIN)/python -m bench.background

# The tests that docs/explanation/guarantees.md names for each promise, and the table of their outcomes.
.PHONY: proof
proof: $(VENV)/test.stamp
	$(BIN)/python -m tests.proof -q -n 2

# Every statement, all pairs, networks, and 10,000 flows with 1,000 faults, on each database.
chaos: $(VENV)/test.stamp
	$(BIN)/python -m tests.chaos long

# Some of the cases of every statement, some of the pairs, and some faults at random, on each database
# that answers.
chaos-short: $(VENV)/test.stamp
	$(BIN)/python -m tests.chaos short

# Changes to the protocol's code that no test notices. ARGS="--files heartbeat.py" limits it.
.PHONY: mutants
mutants: $(VENV)/test.stamp
	$(BIN)/python -m tests.mutants $(ARGS)

# A real cluster, each of whose processes is killed 20 times, on the ORM broker and on Redis.
.PHONY: kill-cluster
kill-cluster: $(VENV)/test.stamp
	EBBS_TEST_KILLS=20 $(BIN)/pytest tests/test_cluster_kills.py -q -n 2

# A million flows and ten million attempts, and how long each page of the admin takes with them:
# on SQLite, or with EBBS_TEST_DATABASE=postgresql.
.PHONY: seed-million
seed-million: $(VENV)/test.stamp
	$(BIN)/python -m bench.seed_million
	$(BIN)/python -m bench.admin_pages

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/djlint --lint --quiet ebbs_and_flows/templates

# Published vulnerabilities: of the lowest versions that are admitted, by a list that needs no
# network; of what is installed, by pip-audit, which is skipped where its service cannot be reached.
.PHONY: audit
audit: $(VENV)/audit.stamp
	$(BIN)/python tests/audit.py

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation, into docs/_build/html; a warning is an error.
docs: $(VENV)/docs.stamp
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html

# Builds the distributions, checks what they hold, and uses the wheel in a new project, from an
# environment that holds nothing else.
package: $(VENV)/lint.stamp
	rm -rf build dist $(VENV)/empty
	$(BIN)/python -m build --quiet
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/distributed.py
	$(PYTHON) -m venv $(VENV)/empty
	$(VENV)/empty/bin/pip install --quiet dist/*.whl
	cd $(VENV) && empty/bin/python ../tests/installed.py

# Ours, the limits and the peers, on this machine's PostgreSQL, SQLite and Redis: an hour. Writes
# docs/benchmarks.md.
bench: $(VENV)/test.stamp
	$(BIN)/python -m bench

bench-quick: $(VENV)/test.stamp
	$(BIN)/python -m bench --quick

clean:
	rm -rf $(VENV) build dist docs/_build demo_project/var *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.stamp: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable ".[$*]"
	touch $@
