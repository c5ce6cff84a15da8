#!/usr/bin/env bash
# The paper's claims on Fashion-MNIST: trains ensembles by all methods, measures them on clean and corrupted images, and
# writes tables, figures and a verdict on each claim. Re-run the same command to resume.
#   bash scripts/reproduce_fashion_mnist.sh night   # to results/fashion_mnist: about 7 hours on 2 cores
#   bash scripts/reproduce_fashion_mnist.sh hour    # 1,000 images with wrong labels, to results/fashion_mnist_hour
# Options that follow go to scripts/experiment.py and to main.py, for instance --data_path DIR or --download.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
case ${1:-} in
    night) to=fashion_mnist settings="noisy_labels clean_labels" less=() ;;
    hour) to=fashion_mnist_hour settings=noisy_labels less=(--images 1000 --ensembles 3 --corrupted 200) ;;
    *) echo "reproduce_fashion_mnist.sh: expected night or hour, got '${1:-}'" >&2 && exit 2 ;;
esac
for setting in $settings; do
    python scripts/experiment.py "fashion_mnist/$setting" --runs "runs/$to/$setting" --results "results/$to/$setting" \
        --measurements "measurements/$to/$setting" ${less[@]+"${less[@]}"} "${@:2}"
done
python scripts/report.py "results/$to"
