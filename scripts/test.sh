#!/usr/bin/env bash
# Checks the code: ruff (lint and format) and the tests. Arguments go to pytest: bash scripts/test.sh -m slow
# bash scripts/test.sh --isa runs the tests three times, with the CPU instructions that older processors lack switched
# off: floats then differ in their last bits, as they do from one machine to the next.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh
set -euo pipefail
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
ruff format --check .
# Each worker keeps to one CPU thread, and takes whole files: their runs are trained once.
tests=(python -m pytest -n auto --dist loadfile)
if [[ ${1:-} == --isa ]]; then
    ATEN_CPU_CAPABILITY=default "${tests[@]}" "${@:2}"
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 "${tests[@]}" "${@:2}"
    shift
fi
"${tests[@]}" "$@"
