#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 8 minutes: `bash bench/gpu_suite.sh [SECONDS]`.
#
# For a bare machine: one NVIDIA GPU, Python with torch and triton, no network, nothing installed. Checks the kernels
# (tests/kernels, marker gpu), measures the FFN's tuning table, measures all goals, writes the table of where window
# attention is ours, and, where vLLM can be imported, measures the engine suites. A step that fails or runs out of time
# is told at the end; the others still run, and what was measured is kept: the engine suites go on where an earlier call
# with the same OUT and commit ended. A short table comes last. Exit status 0 when every step passed.
#
#   SECONDS, or LIMIT=SECONDS    for all steps together (default 470)
#   OUT=DIR                      where results go (default bench/results): kernels-<card>.csv and .json,
#                                engine-<suite>-<card>.csv and .json, gpu-suite.log
#   PYTHON=COMMAND               default python3
#   STEPS="tests tuning bench attention-table engine"   which steps (default all five)
#   PART=NAME BENCH="FLAGS"      another part of the kernels' measurement, in files of its own: PART=-a BENCH="--goal A"
#   TUNING="FLAGS"               what is tuned (default: the shapes of the goals at five numbers of tokens)
#   ENGINE="SUITES"              which engine suites, in which order (default: overhead fusion super49 gptoss nano3)
#   ENGINE_FLAGS="FLAGS"         a part of them: ENGINE=super49 ENGINE_FLAGS="--only 49b-fp8 --batches 1,256"
#   COMMIT=NAME                  the measured commit, where git cannot tell
#   VLLM_PUZZLE_VLLM_SOURCE=DIR  vLLM's package folder (its Triton kernels are a baseline also without vLLM)
set -u

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$ROOT/bench/results}
LIMIT=${1:-${LIMIT:-470}}
STEPS=" ${STEPS:-tests tuning bench attention-table engine} "
PART=${PART:-}
TUNING=${TUNING:---shape 17920,8192 --shape 28672,8192 --shape 14336,4096 --shape 5632,8192 --tokens 1,16,64,2048,8192}
ENGINE=${ENGINE:-overhead fusion super49 gptoss nano3}
FAILED=()
TABLE=()

say() { echo "gpu_suite: $*"; }

stop() {
    say "$*" >&2
    exit 1
}

[[ $LIMIT =~ ^[0-9]{1,6}$ ]] || stop "time limit: found $LIMIT, allowed: whole seconds"

# The package is a map of folders; a folder of links gives them their import names without an installation.
LINKS=$(mktemp -d) || stop "found no temporary folder, allowed: one that can be written"
finish() {
    rm -rf "$LINKS"
    [[ -n ${TEE:-} ]] && exec >&- 2>&- && wait "$TEE"
}
trap finish EXIT
mkdir "$LINKS/vllm_puzzle"
for folder in serving kernels model_configs bench; do
    ln -s "$ROOT/$folder" "$LINKS/vllm_puzzle/$folder"
done
export PYTHONPATH="$LINKS${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

python() { "$PYTHON" -P "$@"; }

python -c "import sys, torch, triton; sys.exit(0 if torch.cuda.is_available() else 3)" 2>/dev/null
case $? in
    0) ;;
    3) stop "found no CUDA device, allowed: one NVIDIA GPU" ;;
    *) stop "found no torch and triton in $PYTHON, allowed: a Python with both" ;;
esac
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || stop "OUT: found $OUT, allowed: a folder that can be written"
exec > >(tee "$OUT/gpu-suite.log") 2>&1
TEE=$!

# row NAME RESULT SECONDS: a line of the table that comes last.
row() { TABLE+=("$(printf '%-34s %-22s %5d s' "$1" "$2" "$3")"); }

# step NAME SECONDS COMMAND…: run Python within its own limit and what is left of the whole. With CUT=ok a step that
# runs out of time has done its part.
step() {
    local name=$1 limit=$2 left=$((LIMIT - SECONDS)) start=$SECONDS status result=passed
    shift 2
    if ((left < 10)); then
        FAILED+=("$name: no time left")
        row "$name" "no time left" 0
        return
    fi
    ((limit > left)) && limit=$left
    say "== $name (at most $limit s)"
    timeout --kill-after=10 "$limit" "$PYTHON" -P "$@"
    status=$?
    say "-- $name: status $status after $((SECONDS - start)) s"
    if ((status == 124 || status == 137)); then
        result="cut at its limit"
        [[ ${CUT:-} == ok ]] || FAILED+=("$name: ran out of time ($limit s)")
    elif ((status != 0)); then
        result="status $status"
        FAILED+=("$name: status $status")
    fi
    row "$name" "$result" $((SECONDS - start))
}

versions() {
    nvidia-smi -L 2>/dev/null
    python - <<'VERSIONS'
from importlib.metadata import PackageNotFoundError, version

import torch

found = {}
for name in ("torch", "triton", "vllm", "flashinfer-python", "numpy", "pytest"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = "none"
found["cuda"] = torch.version.cuda
print(torch.cuda.get_device_name(), found)
VERSIONS
}

kernel_tests() {
    if ! python -c "import pytest" 2>/dev/null; then
        # Without pytest nobody judges the grids' numbers, but a crash shows.
        for grid in "$ROOT"/tests/kernels/*_grid.py; do
            step "$(basename "$grid"), unjudged" 120 "$grid" cuda
        done
        return
    fi
    local workers=()
    python -c "import xdist" 2>/dev/null && workers=(-n 4 --dist loadfile)
    step "kernels against their twins" 170 -m pytest -q -m gpu -p no:cacheprovider "${workers[@]}" "$ROOT/tests/kernels"
}

# The table comes from every recorded part of the newest measurement, whatever became of the benchmark's other rows.
attention_table() {
    local files
    mapfile -t files < <(ls -t -- "$OUT"/kernels-*.csv 2>/dev/null)
    if ((${#files[@]} == 0)); then
        FAILED+=("attention-table: found no $OUT/kernels-*.csv, allowed: rows of the step bench")
        return
    fi
    step attention-table 60 -m vllm_puzzle.bench.kernel.attention_tuning --out "$ROOT/kernels/tables" "${files[@]}"
    cp "$ROOT"/kernels/tables/window-attention-*.json "$OUT" 2>/dev/null || say "attention-table: no table to copy"
}

# vLLM finds our plugin by its entry points, which an installation would have written; so does `bench`.
entry_points() {
    python - "$ROOT/pyproject.toml" "$LINKS" <<'ENTRY_POINTS'
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
folder = Path(sys.argv[2]) / f"vllm_puzzle-{project['version']}.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-puzzle\nVersion: {project['version']}\n")
lines = []
for group, entries in project["entry-points"].items():
    lines += [f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())]
(folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
ENTRY_POINTS
}

engine_suites() {
    local suites flags suite left
    read -ra suites <<<"$ENGINE"
    read -ra flags <<<"${ENGINE_FLAGS:-}"
    for suite in "${suites[@]}"; do
        left=$((LIMIT - SECONDS))
        # An engine takes minutes to start: what is too late for it is left to the next call.
        if ((left < 60)); then
            say "engine $suite: $left s left, which is too little to begin with"
            row "engine $suite" "left for another call" 0
            continue
        fi
        step "engine $suite" $((left - 5)) -m vllm_puzzle.bench.command engine "$suite" "${flags[@]}" \
            --time-limit $((left - 25)) --commit "$COMMIT" --out "$OUT"
    done
}

say "results go to $OUT"
versions
cd "$ROOT" || stop "found no $ROOT"
COMMIT=${COMMIT:-$(git describe --always --abbrev=12 --dirty 2>/dev/null || echo unknown)}
if [[ -z ${VLLM_PUZZLE_VLLM_SOURCE:-} && -d $ROOT/.carry/vllm ]]; then
    export VLLM_PUZZLE_VLLM_SOURCE=$ROOT/.carry/vllm
fi
HAS_ENGINE=no
if [[ $STEPS == *" engine "* ]]; then
    entry_points || FAILED+=("entry points: could not be written")
    if python -c "import vllm" 2>/dev/null; then
        HAS_ENGINE=yes
    else
        say "engine: found no vLLM in $PYTHON, left out"
        row engine "no vLLM here" 0
    fi
fi
[[ $STEPS == *" tests "* ]] && kernel_tests
if [[ $STEPS == *" tuning "* && -f $ROOT/bench/ffn_tuning.py ]]; then
    # The table is written as it grows, where the benchmark (and serving) read it; a copy goes with the results.
    read -ra flags <<<"$TUNING"
    CUT=ok step "FFN tuning" 110 -m vllm_puzzle.bench.ffn_tuning --out "$ROOT/kernels/tables" "${flags[@]}"
    cp "$ROOT"/kernels/tables/*.json "$OUT" 2>/dev/null || FAILED+=("FFN tuning: no table")
fi
if [[ $STEPS == *" bench "* ]]; then
    # What is left belongs to the measurement (half of it where engines follow), less the time that its last case and
    # the table after it may take.
    reserve=0
    [[ $HAS_ENGINE == yes ]] && reserve=$(((LIMIT - SECONDS) / 2))
    [[ $STEPS == *" attention-table "* ]] && reserve=$((reserve + 20))
    read -ra flags <<<"${BENCH:-}"
    step "kernel benchmark" $((LIMIT - SECONDS - reserve)) -m vllm_puzzle.bench.command kernels "${flags[@]}" \
        --time-limit $((LIMIT - SECONDS - reserve - 40)) --commit "$COMMIT" \
        --csv "$OUT/kernels-{card}$PART.csv" --json "$OUT/kernels-{card}$PART.json"
fi
if [[ $STEPS == *" attention-table "* ]]; then
    attention_table
fi
[[ $HAS_ENGINE == yes ]] && engine_suites

say "steps:"
((${#TABLE[@]})) && printf '  %s\n' "${TABLE[@]}"
if compgen -G "$OUT/engine-*.json" >/dev/null; then
    say "engine:"
    python -m vllm_puzzle.bench.command engine --report --out "$OUT"
fi
if ((${#FAILED[@]})); then
    say "${#FAILED[@]} steps failed after $SECONDS s:"
    printf '  %s\n' "${FAILED[@]}"
    exit 1
fi
say "all steps passed after $SECONDS s"
