#!/usr/bin/env bash
# Injects faults into tiny runs and checks that nothing is lost; takes about half an hour on 2 idle cores. Arguments go to the harness:
# bash scripts/faults.sh --faults 2000 --seed 7
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
OMP_NUM_THREADS=1 python -m tests.faults.harness "$@"
