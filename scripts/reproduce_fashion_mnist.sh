#!/usr/bin/env bash
# Tests the paper's claims on Fashion-MNIST: trains ensembles by all methods, measures them on clean and corrupted
# images, and writes tables, figures and a verdict on each claim to results/fashion_mnist/.
#   bash scripts/reproduce_fashion_mnist.sh --minutes 600     # the largest plan that fits; given again, it goes on
#   bash scripts/reproduce_fashion_mnist.sh --redraw          # from the result files that are there, in a minute
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements.txt
python scripts/reproduce_fashion_mnist.py "$@"
