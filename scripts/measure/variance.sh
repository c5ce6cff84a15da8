#!/usr/bin/env bash
# Bias and variance of a saved ensemble's outputs.
# RESUME and DATA_PATH may be set in the environment; further arguments go to measure_diversity_variance.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
RESUME=${RESUME:-runs/cifar100_sharpbalance}
DATA_PATH=${DATA_PATH:-data}

python measure_diversity_variance.py \
    --resume "$RESUME" \
    --data_path "$DATA_PATH" \
    --mode variance,variance_mse \
    "$@"
