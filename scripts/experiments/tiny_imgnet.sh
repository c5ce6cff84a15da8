#!/usr/bin/env bash
# The paper's comparison on TinyImageNet and Tiny-ImageNet-C: 9 seeds as 3 ensembles, 4 methods. Writes results/tiny_imgnet/.
# The authors' release has no rho and k for this data set; by default those for CIFAR-100 stand in. Choose --rho and
# --flat_ratio by the ensemble's validation accuracy, with which main.py ends.
# scripts/experiment.py explains options and variables; other options go to main.py. Nothing is
# downloaded: INSTALL.md says where the images are.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
python scripts/experiment.py tiny_imgnet "$@"
