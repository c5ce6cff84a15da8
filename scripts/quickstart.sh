#!/usr/bin/env bash
# Trains a deep ensemble, a SAM ensemble and a SharpBalance ensemble of 3 networks each on scikit-learn's 8x8 digits and
# compares them in a table and a figure. Makes .venv on its first call. Writes runs/quickstart/ and
# measurements/quickstart/; re-run it to resume, or to see the table again. RUNS and MEASUREMENTS name other folders.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
python scripts/experiment.py quickstart "$@"
