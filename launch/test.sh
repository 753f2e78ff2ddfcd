#!/usr/bin/env bash
# The checks that every change must pass: lint, format, import contracts, and the fast tests.
#
#   bash launch/test.sh [PYTEST_ARGUMENTS...]      for example: bash launch/test.sh tests/test_configs.py -x
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment "$(runtime_requirements)" requirements-dev.txt

.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/lint-imports
.venv/bin/python -m pytest -n logical --dist loadfile "$@"
