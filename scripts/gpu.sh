#!/usr/bin/env bash
# Tries and times this repository on a GPU, and writes runs/gpu.json. Arguments go to the script:
# bash scripts/gpu.sh --images 50000
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
python scripts/gpu.py "$@"
