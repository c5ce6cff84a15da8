#!/usr/bin/env bash
# How many plain members an ensemble is worth: on Fashion-MNIST with a fifth of the labels wrong five plain deep ensembles
# of nine members, and the study's five of three by SAM and SharpBalance (released) and (paper). The table "worth of" in
# results/fashion_mnist_members/ has the number of plain members of the same calibrated NLL, beside the cost of training.
# SharpBalance's sets depend on all members, so that nine are not three times three.
# scripts/experiment.py explains options and variables; other options go to main.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
python scripts/experiment.py members "$@"
