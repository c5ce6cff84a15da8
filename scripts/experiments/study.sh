#!/usr/bin/env bash
# Where does SharpBalance help? On Fashion-MNIST with 0, 20 and 40 % wrong labels and 1,000 and 4,000 training images,
# SharpBalance (released) and (paper) against SAM, random sets of their size and plain training, by results/study/PLAN.md. Writes results/study/.
# On 2 cores it takes 6 hours for the first three settings, 14 for five; re-run it to resume, on another machine as well.
#   bash scripts/experiments/study.sh --settings noise_0.2_images_1000    # one of them, or some, separated by commas
#   bash scripts/experiments/study.sh --settings mine --data_path DIR     # your own images: 1,000 take an hour
# --to NAME writes results/NAME/ instead. scripts/experiment.py explains options and variables; other options go to main.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
settings=noise_0.2_images_1000,noise_0.4_images_1000,noise_0_images_1000
settings+=,noise_0.2_images_4000,noise_0_images_4000,noise_0.4_images_4000
to="" rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --settings | --to) [ $# -gt 1 ] || { echo "study.sh: $1: expected a name" >&2 && exit 2; } ;;
    esac
    case $1 in
        --settings) settings=$2 && shift 2 ;;
        --to) to=$2 && shift 2 ;;
        -h | --help) sed -n '2,/^\[/s/^# //p' "$0" && exit ;;
        *) rest+=("$1") && shift ;;
    esac
done
[ -n "$to" ] || { [ "$settings" = mine ] && to=mine || to=study; }
settings=${settings//,/ } number=0
count=$(wc -w <<<"$settings")
for setting in $settings; do
    number=$((number + 1)) more=()
    # rho, k and T_d of 4,000 images are those that were chosen with 1,000.
    case $setting in
        mine) preset=mine ;;
        *_4000) preset=study/$setting more=(--choices "results/$to/${setting%_4000}_1000") ;;
        *) preset=study/$setting ;;
    esac
    echo "study: setting $number of $((count)), $setting"
    python scripts/experiment.py "$preset" --runs "runs/$to/$setting" --measurements "measurements/$to/$setting" \
        --results "results/$to/$setting" ${more[@]+"${more[@]}"} ${rest[@]+"${rest[@]}"}
    python scripts/report.py "results/$to"
done
