#!/usr/bin/env bash
# A quarter of an hour on one card, without a network: train the small model, then measure the large one.
#
#   benchmarks/card.sh [--rehearse] train [OUT]      ends by itself within 9 minutes
#   benchmarks/card.sh [--rehearse] measure [OUT]    ends by itself within 3 minutes 30
#
# PUSA_CARD_SECONDS sets another limit, and PUSA_CARD_CACHE a folder that keeps what is compiled for the next run;
# --rehearse (or PUSA_CARD_REHEARSAL=1) does the same with toys on a CPU. It runs from a copy of the tracked files, with
# the folder beside them that benchmarks/carry.py makes (CARRY, default carry/).
# A stage that fails says why and the next one runs; the exit code is 1 then. Everything that is printed also goes to
# OUT/train.log or OUT/measure.log (OUT: card-out/), one JSON line per stage says how it ended, and
# benchmarks/carry.py unpack OUT FOLDER rebuilds the model.
# shellcheck disable=SC2329 # functions are called by their names
set -u
SECONDS=0

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }

rehearsal=${PUSA_CARD_REHEARSAL:-}
[ "${1-}" = --rehearse ] && { rehearsal=1; shift; }
verb=${1-}
case $verb in
    train) limit=540 ;;
    measure) limit=210 ;;
    *) usage ;;
esac
[ $# -le 2 ] || usage
# A rehearsal is for the machinery, not for the clock: a CPU may be busy with other things.
[ -z "$rehearsal" ] || limit=900
limit=${PUSA_CARD_SECONDS:-$limit}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${2:-card-out}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
carry=${CARRY:-$root/carry}
python=${PYTHON:-$(command -v python3)}
log=$out/$verb.log
failed=0

die() { echo "card.sh: $*" | tee -a "$log" >&2; exit 2; }
[ -n "$python" ] || die "there is no python3 on the PATH: set PYTHON to the one that has torch"
[ -f "$carry/pictures.safetensors" ] || die "$carry/pictures.safetensors is not there: make that folder with benchmarks/carry.py, or set CARRY"

compgen -G "$carry/*.whl" >/dev/null || die "$carry holds no wheels: make that folder with benchmarks/carry.py, or set CARRY"

# What runs and what is computed on the way lies in a folder of its own, with every cache, and goes when this ends.
work=$(mktemp -d "${TMPDIR:-/tmp}/pusa-card.XXXXXX") || exit 2
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
site=$work/site
mkdir -p "$site" "$work/train" "$work/tmp"
cp -r "$root/src" "$root/benchmarks" "$work" || exit 2
compiled=${PUSA_CARD_CACHE:-$work/compiled}
export TMPDIR=$work/tmp HF_HOME=$work/cache XDG_CACHE_HOME=$work/cache TORCHINDUCTOR_CACHE_DIR=$compiled/inductor \
    TRITON_CACHE_DIR=$compiled/triton CUDA_CACHE_PATH=$compiled/cuda HF_HUB_OFFLINE=1 \
    TOKENIZERS_PARALLELISM=true PYTHONUNBUFFERED=1 PYTHONPATH=$site:$work/src

card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
[ -n "$card" ] || card=unknown
toys=() budget=card machine=12
if [ -n "$rehearsal" ]; then
    card=cpu toys=(--tiny --device cpu --compiler eager) budget=card-rehearsal machine=120
    export OMP_WAIT_POLICY=PASSIVE  # or two threads that share a core wait for each other for minutes
fi

left() { echo $((limit - SECONDS)); }

# at_most A B: the smaller one in a rehearsal, else A.
at_most() { if [ -n "$rehearsal" ] && [ "$1" -gt "$2" ]; then echo "$2"; else echo "$1"; fi; }

# stage NAME SECONDS COMMAND...: run it for at most so long; what it prints is logged, and how it ended.
stage() {
    local name=$1 most=$2 began=$SECONDS code
    shift 2
    if [ "$most" -lt 1 ]; then
        echo "card.sh: no time is left for $name" | tee -a "$log"
        code=124
    else
        timeout --kill-after=5 "$most" "$@" 2>&1 | "$python" "$work/benchmarks/_card_log.py" "$log" "$card" $((most + 8))
        code=${PIPESTATUS[0]}
        case $code in 124 | 137) echo "card.sh: $name was stopped after $most seconds" | tee -a "$log" ;; esac
    fi
    printf '{"card": "%s", "case": "stage", "stage": "%s", "exit": %d, "seconds": %d, "left": %d}\n' \
        "$card" "$name" "$code" $((SECONDS - began)) "$(left)" | tee -a "$log"
    [ "$code" = 0 ] || failed=1
}

# Put the carried packages on the path: with pip, or by hand, as a wheel is an archive.
install_wheels() {
    if "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
            --target "$site" "$carry"/*.whl && return
        echo "pip could not install the wheels: they are unpacked instead"
    fi
    local wheel
    for wheel in "$carry"/*.whl; do
        "$python" -m zipfile -e "$wheel" "$site" || return
    done
}
export -f install_wheels
export python carry site

train() {
    local reserve=20  # to gather the results
    stage machine $((machine + machine)) "$python" "$work/benchmarks/card_machine.py" ${toys[@]+"${toys[@]}"} \
        --budget-seconds "$machine"
    local most=$(($(left) - reserve))
    # Its own clock begins when Python has been started and the pictures are read.
    stage recipe "$most" "$python" -m pusa mini train "$work/train" --budget "$budget" \
        --seconds "$(at_most $((most - 25)) 10)" --pictures "$carry/pictures.safetensors"
    stage results $(($(left) - 2)) "$python" "$work/benchmarks/_results.py" "$work/train" "$out"
}

measure() {
    local most=$(($(left) - 45))  # what the next stage needs at least
    stage gpu "$most" "$python" "$work/benchmarks/gpu.py" --short ${toys[@]+"${toys[@]}"} \
        --budget-seconds "$(at_most $((most - 8)) 200)"
    most=$(($(left) - 10))
    stage train_gpu "$most" "$python" "$work/benchmarks/train_gpu.py" --steps 2 ${toys[@]+"${toys[@]:0:3}"} \
        --budget-seconds "$(at_most $((most - 8)) 200)"
}

stage wheels $(($(left) < 60 ? $(left) : 60)) bash -c install_wheels
"$verb"
echo "card.sh: $verb took $SECONDS of $limit seconds; $([ $failed = 0 ] && echo every stage ended well || echo a stage failed, see above)" | tee -a "$log"
exit $failed
