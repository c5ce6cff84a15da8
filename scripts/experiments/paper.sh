# Sourced by the other scripts here (but digits.sh and regime.sh), which set DATA: a comparison of methods by the
# paper's recipe.
#
# Trains ensembles of ResNet-18 by each method, measures them on clean and, where the -C set is found, corrupted images,
# and writes tables and figures. By default that is the paper's comparison: 3 ensembles of 3 by 4 methods, 36 networks
# of 200 epochs. Given again, it goes on where it was, and passes over finished ensembles. Arguments go to main.py,
# after the recipe's own, for instance --download.
#
# METHODS   of deep_ensemble, sam, sharpbalance (as released), sharpbalance_paper (by the paper's text), random and same
#           (SAM on random sets of SharpBalance's size, for each member or once for all), asam, eoa (averaged weights)
# RUNS, MEASUREMENTS, RESULTS, DATA_PATH   other folders than runs/$DATA, measurements/$DATA, results/$DATA, data
# RHO, FLAT_RATIO, INITIAL_EPOCHS          of SAM and SharpBalance, other than the paper's 0.2, 0.5, 100 for CIFAR-100
# ASAM_RHO                                 of asam, 0.5
# CHECKPOINT                               best or last; eoa, which is measured at its averages, compares with last
# NPROC                                    processes (and GPUs, if there are as many) that train an ensemble; 1
# SEEDS                                    of the ensembles: SEEDS="13 17 27,43 59 223"
# MEASURE_FLAGS, SHARPNESS_FLAGS           more flags, for measure_diversity*.py and for measure_sharpness.py
#
# The tables and figures hold all that is finished in MEASUREMENTS, so that parts may be made one after another, or by
# several machines at once. The cached logits of a corrupted set take 1 GB on CIFAR-10, 11 on CIFAR-100, 22 on
# TinyImageNet.

# Without an argument of its own, setup.sh would see the first one of the script.
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" requirements.txt
RUNS=${RUNS:-runs/$DATA}
MEASUREMENTS=${MEASUREMENTS:-measurements/$DATA}
RESULTS=${RESULTS:-results/$DATA}
DATA_PATH=${DATA_PATH:-data}
RHO=${RHO:-0.2}
FLAT_RATIO=${FLAT_RATIO:-0.5}
INITIAL_EPOCHS=${INITIAL_EPOCHS:-100}
NPROC=${NPROC:-1}
CHECKPOINT=${CHECKPOINT:-best}
METHODS=${METHODS:-deep_ensemble sam sharpbalance sharpbalance_paper}
MEASURE_FLAGS=${MEASURE_FLAGS:-}
SHARPNESS_FLAGS=${SHARPNESS_FLAGS:-}
known="deep_ensemble sam sharpbalance sharpbalance_paper random same asam eoa"
IFS=, read -ra ensembles <<<"${SEEDS:-13 17 27,113 117 127,43 59 223}"

train=(python)
[ "$NPROC" = 1 ] || train=(torchrun --standalone --nproc-per-node "$NPROC")
find_corrupted='import sys; from pathlib import Path; from utils.data import find_corrupted as find
print(find(sys.argv[1], Path(sys.argv[2])) or "")'
splits=test,corrupted
if [ -z "$(python -c "$find_corrupted" "$DATA" "$DATA_PATH")" ]; then
    splits=test
    echo "no corrupted copy of $DATA in $DATA_PATH or beside the data set: measuring on clean images only"
fi

sharpbalance=(--sam --rho "$RHO" --flat_ratio "$FLAT_RATIO" --initial_epochs "$INITIAL_EPOCHS")
for seeds in "${ensembles[@]}"; do
    for method in $METHODS; do
        case $method in
            deep_ensemble) flags=() ;;
            sam) flags=(--sam --rho "$RHO") ;;
            sharpbalance) flags=("${sharpbalance[@]}" --partition released) ;;
            sharpbalance_paper) flags=("${sharpbalance[@]}" --partition paper) ;;
            random | same) flags=("${sharpbalance[@]}" --partition released --select "$method" --match_size) ;;
            asam) flags=(--sam --sam_adaptive --rho "${ASAM_RHO:-0.5}") ;;
            eoa) flags=(--average_from "$INITIAL_EPOCHS") ;;
            *)
                echo "METHODS: '$method' is none of ${known// /, }" >&2
                exit 2
                ;;
        esac
        flags=(--data "$DATA" --model resnet18 "${flags[@]}" --seed "$seeds" "$@")
        read -r first _ <<<"$seeds"
        run=$RUNS/${method}_$first to=$MEASUREMENTS/${method}_$first
        # Finding all caches of a corrupted set again still means reading and hashing its images: what was finished by
        # the same settings, with all its files and no checkpoint that is newer, is not called again.
        wanted="main.py ${flags[*]}; $splits $MEASURE_FLAGS; $SHARPNESS_FLAGS; $CHECKPOINT"
        if [ -f "$to/diversity.json" ] && [ -f "$to/variance.json" ] && [ -f "$to/sharpness.json" ] &&
            [ "$(cat "$to/finished" 2>/dev/null)" = "$wanted" ] &&
            [ -z "$(find "$run" -name "*.pth.tar" -newer "$to/finished" 2>/dev/null)" ]; then
            echo "$to: finished"
            continue
        fi
        rm -f "$to/finished"
        "${train[@]}" main.py "${flags[@]}" --data_path "$DATA_PATH" --save_path "$run"
        measured=(--resume "$run" --data_path "$DATA_PATH" --save "$to" --checkpoint "$CHECKPOINT")
        [ "$method" != eoa ] || measured+=(--checkpoint averaged)
        python measure_diversity.py "${measured[@]}" --split $splits $MEASURE_FLAGS
        python measure_diversity_variance.py "${measured[@]}" --split $splits $MEASURE_FLAGS
        python measure_sharpness.py "${measured[@]}" --mode APGD_worst,APGD_average,hessian_t,hessian_e,fisher,NTK \
            $SHARPNESS_FLAGS
        mkdir -p "$to"
        echo "$wanted" >"$to/finished"
    done
done

mkdir -p "$RESULTS"
folders=("$MEASUREMENTS"/*/finished)
folders=("${folders[@]%/finished}")
python scripts/summarize.py "${folders[@]}" --format markdown --to "$RESULTS/tables.md"
figures="tradeoff benchmark ensemble_size"
[ $splits = test ] || figures="$figures severity"
for figure in $figures; do
    python scripts/plot.py "$figure" --from "${folders[@]}" --to "$RESULTS/$figure"
done
