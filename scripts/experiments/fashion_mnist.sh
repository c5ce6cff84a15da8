#!/usr/bin/env bash
# The paper's claims on Fashion-MNIST with a fifth of the labels wrong: measures the study's networks, and SAM at three rho,
# on clean, corrupted and other images, and writes results/fashion_mnist/: tables, figures and a verdict on each claim.
# About an hour on 2 cores without the study's checkpoints, half an hour with them; re-run it to resume.
# scripts/experiment.py explains options and variables; other options go to main.py.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/../setup.sh" requirements.txt
python scripts/experiment.py fashion_mnist/noisy_labels "$@"
python scripts/report.py "$(dirname "${RESULTS:-results/fashion_mnist/noisy_labels}")"
