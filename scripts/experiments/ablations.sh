#!/usr/bin/env bash
# What of SharpBalance does it: its sets against random ones of their size, and against SAM, ASAM and averaged weights,
# all at the end of training. Uses the runs of cifar100.sh again. Writes results/cifar100_ablations/; --data names another
# data set, for which --epochs and --initial_epochs are to be given too.
# scripts/experiment.py explains options and variables; other options go to main.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
python scripts/experiment.py ablations "$@"
