#!/usr/bin/env bash
# The paper's comparison on CIFAR-100 and CIFAR-100-C: 9 seeds as 3 ensembles, 4 methods.
# Writes results/cifar100/.
# rho, k and T_d are those of the authors' training scripts.
# paper.sh lists the variables and says what arguments are for.
set -euo pipefail
DATA=cifar100
source "$(dirname "$0")/paper.sh"
