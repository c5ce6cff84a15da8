#!/usr/bin/env bash
# In which regime SAM gains with clean labels, on validation: an ensemble of three by plain SGD and by SAM with two rhos,
# for three choices of width and augmentation, on 2,000 images of Fashion-MNIST, judged on 2,000 others. About three
# quarters of an hour on 2 cores; re-run it to resume. Writes results/regime/*/validation.md.
# scripts/experiment.py explains options and variables; other options go to main.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
for regime in "16 flip" "8 flip" "8 standard"; do
    read -r width augmentation <<<"$regime"
    name=regime/width_${width}_$augmentation
    python scripts/experiment.py regime --width "$width" --augmentation "$augmentation" --runs "runs/$name" \
        --results "results/$name" "$@"
done
