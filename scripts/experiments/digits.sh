#!/usr/bin/env bash
# Five ensembles of three members by each of four methods on digits, measured on clean and corrupted images, and compared
# in tables and figures. Writes results/digits/. About ten minutes on 2 cores; re-run it to resume.
# scripts/experiment.py explains options and variables; other options go to main.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
python scripts/experiment.py digits "$@"
