#!/usr/bin/env bash
# Five ensembles of three members for each of four methods on digits, measured on clean and corrupted images, compared
# in tables and figures. About half an hour on 2 cores; given again, it goes on where it was.
# RUNS, MEASUREMENTS, RESULTS and DATA_PATH name other folders than runs/digits, measurements/digits, results/digits and
# data.
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
RUNS=${RUNS:-runs/digits}
MEASUREMENTS=${MEASUREMENTS:-measurements/digits}
RESULTS=${RESULTS:-results/digits}
DATA_PATH=${DATA_PATH:-data}

python scripts/make_corrupted.py --data digits --data_path "$DATA_PATH"
for seeds in "11 12 13" "21 22 23" "31 32 33" "41 42 43" "51 52 53"; do
    for method in deep_ensemble sam sharpbalance sharpbalance_paper; do
        case $method in
            deep_ensemble) flags=() ;;
            sam) flags=(--sam --rho 0.1) ;;
            sharpbalance) flags=(--sam --rho 0.1 --flat_ratio 0.5) ;;
            sharpbalance_paper) flags=(--sam --rho 0.1 --flat_ratio 0.5 --partition paper) ;;
        esac
        name=${method}_${seeds%% *}
        python main.py --data digits --data_path "$DATA_PATH" "${flags[@]}" --seed "$seeds" --save_path "$RUNS/$name"
        python measure_diversity.py --resume "$RUNS/$name" --save "$MEASUREMENTS/$name" --checkpoint last \
            --split test,corrupted
        python measure_sharpness.py --resume "$RUNS/$name" --save "$MEASUREMENTS/$name" --checkpoint last \
            --mode APGD_worst --batch_num 20
    done
done
mkdir -p "$RESULTS"
# Of what was measured, what tables and figures need goes to RESULTS, small enough for git.
python - "$MEASUREMENTS" "$RESULTS/measurements" <<'END'
import sys
from pathlib import Path

from utils.results import keep

for folder in sorted(Path(sys.argv[1]).iterdir()):
    keep(folder, Path(sys.argv[2]) / folder.name)
END
python scripts/summarize.py "$RESULTS"/measurements/* --format markdown --to "$RESULTS/tables.md"
for figure in tradeoff benchmark; do
    python scripts/plot.py "$figure" --from "$RESULTS"/measurements/* --to "$RESULTS/$figure"
done
