#!/usr/bin/env bash
# A deep ensemble, trained with the paper's recipe.
# DATA, DATA_PATH and SAVE_PATH may be set in the environment; further arguments go to main.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
DATA=${DATA:-cifar100}
DATA_PATH=${DATA_PATH:-data}
SAVE_PATH=${SAVE_PATH:-runs/${DATA}_deep_ensemble}

python main.py \
    --data "$DATA" \
    --data_path "$DATA_PATH" \
    --model resnet18 \
    --seed "13 17 27" \
    --save_path "$SAVE_PATH" \
    "$@"
