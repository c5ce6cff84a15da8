#!/usr/bin/env bash
# Checks the code: ruff (lint and format) and the tests. Arguments go to pytest: bash scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
ruff format --check .
# Each worker keeps to one CPU thread, and takes whole files: their runs are trained once.
python -m pytest -n auto --dist loadfile "$@"
