#!/usr/bin/env bash
# More members: an ensemble of nine by each method, of which the figure ensemble_size shows every size from 1 to 9.
# SharpBalance's sets depend on all members, so that nine are not three times three.
# Writes results/${DATA}_nine/; DATA is cifar100, or cifar10 or tiny_imgnet.
# paper.sh lists the variables and says what arguments are for.
set -euo pipefail
DATA=${DATA:-cifar100}
SEEDS=${SEEDS:-13 17 27 113 117 127 43 59 223}
RUNS=${RUNS:-runs/${DATA}_nine}
MEASUREMENTS=${MEASUREMENTS:-measurements/${DATA}_nine}
RESULTS=${RESULTS:-results/${DATA}_nine}
source "$(dirname "$0")/paper.sh"
