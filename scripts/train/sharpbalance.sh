#!/usr/bin/env bash
# A SharpBalance ensemble; rho and flat_ratio are those of the authors' script for CIFAR-100. Samples are assigned after
# half of the epochs, as there: 100 of 200. Their program does so an epoch later: --initial_epochs 101 is its run.
# DATA, DATA_PATH and SAVE_PATH may be set in the environment; further arguments go to main.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
DATA=${DATA:-cifar100}
DATA_PATH=${DATA_PATH:-data}
SAVE_PATH=${SAVE_PATH:-runs/${DATA}_sharpbalance}

python main.py \
    --data "$DATA" \
    --data_path "$DATA_PATH" \
    --model resnet18 \
    --seed "13 17 27" \
    --sam True \
    --rho 0.2 \
    --flat_ratio 0.5 \
    --save_path "$SAVE_PATH" \
    "$@"
