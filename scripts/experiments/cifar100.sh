#!/usr/bin/env bash
# The paper's comparison on CIFAR-100 and CIFAR-100-C: 9 seeds as 3 ensembles, 4 methods. Writes results/cifar100/.
# rho, k and T_d are the flags of the authors' training scripts; their program then assigns samples an epoch later, which is
# --initial_epochs 101 here.
# scripts/experiment.py explains options and variables; other options go to main.py, for instance --download.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
python scripts/experiment.py cifar100 "$@"
