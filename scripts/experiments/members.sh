#!/usr/bin/env bash
# More members: one ensemble of nine by each method, of which the figure ensemble_size shows every size from 1 to 9.
# SharpBalance's sets depend on all members, so that nine are not three times three. Writes results/cifar100_nine/; --data
# names another data set. scripts/experiment.py explains options and variables; other options go to main.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
python scripts/experiment.py members "$@"
