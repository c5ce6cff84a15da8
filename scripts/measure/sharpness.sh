#!/usr/bin/env bash
# Sharpness of the members of a saved ensemble, on as many images as the authors' protocol has.
# RESUME and DATA_PATH may be set in the environment; further arguments go to measure_sharpness.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
RESUME=${RESUME:-runs/cifar100_sharpbalance}
DATA_PATH=${DATA_PATH:-data}

python measure_sharpness.py \
    --resume "$RESUME" \
    --data_path "$DATA_PATH" \
    --mode APGD_worst,APGD_average,hessian_t,hessian_e,fisher \
    "$@"
