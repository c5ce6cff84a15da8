#!/usr/bin/env bash
# Checks the code: ruff (lint and format) and the tests. Arguments go to pytest: bash scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest "$@"
