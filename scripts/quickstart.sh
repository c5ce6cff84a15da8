#!/usr/bin/env bash
# Trains a deep ensemble, a SAM ensemble and a SharpBalance ensemble of 3 networks each on scikit-learn's 8x8 digits and
# compares them in a table. Makes .venv on its first call. Writes runs/quickstart/; given again, it goes on or shows
# the table at once. RUNS names another folder.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
RUNS=${RUNS:-runs/quickstart}
for method in deep_ensemble deep_ensemble_sam sharpbalance; do
    case $method in
        deep_ensemble) flags=() ;;
        deep_ensemble_sam) flags=(--sam --rho 0.1) ;;
        sharpbalance) flags=(--sam --rho 0.1 --flat_ratio 0.5) ;;
    esac
    python main.py --data digits "${flags[@]}" --save_path "$RUNS/$method"
    echo
done
python scripts/summarize.py "$RUNS"/{deep_ensemble,deep_ensemble_sam,sharpbalance}
