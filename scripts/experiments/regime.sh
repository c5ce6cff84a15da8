#!/usr/bin/env bash
# In which regime SAM gains with clean labels, on validation: an ensemble of three by plain SGD and by SAM with two
# rhos, for each of three choices of width and augmentation, on the 2,000 images that
# scripts/reproduce_fashion_mnist.sh trains on, judged on 2,000 training images that no other experiment sees. About
# three quarters of an hour on 2 cores; given again, it goes on where it was. Writes results/fashion_mnist/regime.md.
# RUNS, RESULTS and DATA_PATH name other folders than runs/regime, results/fashion_mnist and data; JOBS another number
# of commands side by side than 2. Arguments go to main.py.
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
export RUNS=${RUNS:-runs/regime} RESULTS=${RESULTS:-results/fashion_mnist} OMP_NUM_THREADS=1
DATA_PATH=${DATA_PATH:-data}

mkdir -p "$RUNS" "$RESULTS"
python - "$DATA_PATH" <<'END'
import os
import sys

import numpy as np

from utils.data import load_data

data = load_data("fashion_mnist", sys.argv[1])
order = np.random.RandomState(0).permutation(len(data.train) + len(data.val))
np.save(f"{os.environ['RUNS']}/train.npy", np.sort(order[500:2500]))  # before them: the reproduction's validation images
np.save(f"{os.environ['RUNS']}/val.npy", np.sort(order[-2000:]))
END
for regime in "16 flip" "8 flip" "8 standard"; do
    read -r width augmentation <<<"$regime"
    for rho in 0.1 0.05 0; do
        flags=(--sam --rho "$rho")
        if [ "$rho" = 0 ]; then flags=(); fi
        printf "%q " python main.py --data fashion_mnist --data_path "$DATA_PATH" --train_idx_path "$RUNS/train.npy" \
            --val_idx_path "$RUNS/val.npy" --width "$width" --augmentation "$augmentation" "${flags[@]}" \
            --batch_size 64 --threads 1 --seed 11 12 13 --save_path "$RUNS/width_${width}_${augmentation}_rho_$rho" "$@"
        printf "\0"
    done
done | xargs -0 -n 1 -P "${JOBS:-2}" bash -c 'eval "$0"'
python - <<'END'
import json
import os
import statistics
from pathlib import Path

lines = [
    "# In which regime SAM gains with clean labels",
    "",
    "`bash scripts/experiments/regime.sh`: one ensemble of 3 for each row, ResNet-18, 2,000 training images, 30 "
    "epochs, batch 64, learning rate 0.1 in steps; judged at the end of training on 2,000 other training images "
    "(standard error of an ensemble's accuracy 0.7 points, of a difference about as much). flip: mirroring only; "
    "standard: crops as well. Training accuracy: on augmented images, in the last epoch.",
    "",
    "| width | augmentation | rho | training accuracy | member | ensemble | ensemble NLL | disagreement |",
    "|---|---|---|---|---|---|---|---|",
]
for folder in sorted(Path(os.environ["RUNS"]).glob("width_*"), key=lambda p: p.name.split("_")[1:3] + [p.name]):
    _, width, augmentation, _, rho = folder.name.split("_")
    last = json.loads((folder / "summary.json").read_text())["last"]
    logs = [json.loads(path.read_text().splitlines()[-1]) for path in folder.glob("seed_*/log.jsonl")]
    train, member = (
        [100 * row[key] for row in rows] for rows, key in ((logs, "train_acc"), (last["members"], "val_acc"))
    )
    one = last["ensemble"]
    lines.append(
        f"| {width} | {augmentation} | {rho} | {statistics.mean(train):.1f} % | {statistics.mean(member):.1f} ± "
        f"{statistics.stdev(member):.1f} % | {100 * one['val_acc']:.1f} % | {one['val_loss']:.3f} | "
        f"{100 * one['val_disagreement']:.1f} % |"
    )
path = Path(os.environ["RESULTS"]) / "regime.md"
path.write_text("\n".join(lines) + "\n")
print(f"wrote {path}")
END
