#!/usr/bin/env bash
# Accuracy, likelihood, calibration and diversity of a saved ensemble, on the test set and, where it is found, the
# corrupted one.
# RESUME and DATA_PATH may be set in the environment; further arguments go to measure_diversity.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
RESUME=${RESUME:-runs/cifar100_sharpbalance}
DATA_PATH=${DATA_PATH:-data}

python measure_diversity.py \
    --resume "$RESUME" \
    --data_path "$DATA_PATH" \
    --mode predict,disagreement,KL,CKA \
    "$@"
