#!/usr/bin/env bash
# Trains a deep ensemble, a SAM ensemble and a SharpBalance ensemble of 3 networks each on scikit-learn's 8x8 digits and
# compares them in a table and a picture. Makes .venv on its first call. Writes runs/quickstart/ and
# measurements/quickstart/; given again, it goes on or shows the table at once. RUNS and MEASUREMENTS name other folders.
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
RUNS=${RUNS:-runs/quickstart}
MEASUREMENTS=${MEASUREMENTS:-measurements/quickstart}
for method in deep_ensemble deep_ensemble_sam sharpbalance; do
    case $method in
        deep_ensemble) flags=() ;;
        deep_ensemble_sam) flags=(--sam --rho 0.1) ;;
        sharpbalance) flags=(--sam --rho 0.1 --flat_ratio 0.5) ;;
    esac
    python main.py --data digits "${flags[@]}" --save_path "$RUNS/$method"
    echo
done
for method in deep_ensemble deep_ensemble_sam sharpbalance; do
    echo "measuring $method"
    python measure_diversity.py --resume "$RUNS/$method" --save "$MEASUREMENTS/$method" >/dev/null
    python measure_sharpness.py --resume "$RUNS/$method" --save "$MEASUREMENTS/$method" \
        --mode APGD_worst --norms l2 --batch_num 20 >/dev/null
done
echo
python scripts/summarize.py "$MEASUREMENTS"/{deep_ensemble,deep_ensemble_sam,sharpbalance}
python scripts/plot.py tradeoff --from "$MEASUREMENTS"/{deep_ensemble,deep_ensemble_sam,sharpbalance} \
    --to "$RUNS/tradeoff"
