#!/usr/bin/env bash
# What of SharpBalance does it: its sets against random ones of their size, and against SAM, ASAM and averaged weights,
# all at the end of training. The runs of cifar100.sh are used again.
# Writes results/${DATA}_ablations/; DATA is cifar100, or cifar10 or tiny_imgnet.
# paper.sh lists the variables and says what arguments are for.
set -euo pipefail
DATA=${DATA:-cifar100}
METHODS=${METHODS:-sam sharpbalance sharpbalance_paper random same asam eoa}
CHECKPOINT=${CHECKPOINT:-last}
MEASUREMENTS=${MEASUREMENTS:-measurements/${DATA}_ablations}
RESULTS=${RESULTS:-results/${DATA}_ablations}
source "$(dirname "$0")/paper.sh"
