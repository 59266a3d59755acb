#!/usr/bin/env bash
# Run the benchmarks that this machine can run, and compare them with its newest earlier results.
# `make bench` calls it.
#
# Results: benchmarks/<date>-<device>/<bench>.json and .txt
# SHARDS:  packed photographs to read instead of RefShapes; the loader resizes them to 480 x 480.
# OUT:     another folder for the results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
shards=${SHARDS:-data/refshapes/shards}

# The names of the CPU, and of the GPU if there is one.
mapfile -t devices < <("$python" -c "
import torch
from coupalign.bench.machine import describe_machine
for kind in ['cpu'] + ['cuda'] * torch.cuda.is_available():
    print(describe_machine(torch.device(kind))['device'])")

# The folder is named after the fastest device.
device=$(tr '[:upper:]' '[:lower:]' <<< "${devices[-1]}" | sed -E 's/[^a-z0-9]+/-/g; s/-$//')
out=${OUT:-benchmarks/$(date +%F)-$device}
before=$(find benchmarks -maxdepth 1 -name "*-$device" ! -path "$out" | sort | tail -n 1)
mkdir -p "$out"

# Usage: bench NAME ARGUMENTS. Runs `coupalign bench ARGUMENTS` and writes the result NAME.
bench() {
    local name=$1 against=()
    shift
    # The same GPU may be in another host, whose loader and start-up cannot be compared.
    if [[ -n $before ]] &&
        printf '"device": "%s"\n' "${devices[@]}" | grep -qFf - "$before/$name.json" 2>/dev/null; then
        against=(--against "$before/$name.json")
    fi
    printf '\n== %s\n' "$name"
    # torch's profiler prints lines that begin with USDT.
    "$python" -m coupalign bench "$@" --out "$out/$name.json" "${against[@]}" |
        sed '/^USDT:/d' | tee "$out/$name.txt"
}

# Generate RefShapes if it is needed and not there.
if [[ $shards == data/refshapes/shards && ! -f $shards/index.json ]]; then
    "$python" -m coupalign synth data/refshapes/refshapes --images 6600
    "$python" -m coupalign pack shards/recipes/refshapes.yaml \
        root=data/refshapes/refshapes --out "$shards"
fi

# Start-up and loader.
packed=("data.train=[{index: $shards, split: train}]" "data.evaluate=[{index: $shards, split: val}]")
bench startup startup configs/refshapes.yaml "${packed[@]}"
bench loader loader configs/refshapes.yaml "${packed[@]}" ${SHARDS:+data.image_size=480} \
    data.workers=2 --steps 24

# The published model sizes on random samples, from random weights: nothing has to be downloaded.
bert=$(mktemp -d)
trap 'rm -rf "$bert"' EXIT
"$python" -c "import sys, transformers; transformers.BertConfig().save_pretrained(sys.argv[1])" "$bert"
random=(--random-data engine.kind=ddp "model.text.weights=random:$bert" model.image.weights=null)
swin_b=(configs/refcoco_swin_b.yaml "${random[@]}")
export WEIGHTS=$bert

# Without a GPU: a small model, and one step of the large one if the CPU has bf16 instructions.
if [[ ${#devices[@]} == 1 ]]; then
    bench step step configs/refshapes.yaml "${packed[@]}" \
        --beside model.kind=lavt --beside model.decoder.width=64
    bench eval eval configs/refshapes.yaml "${packed[@]}" evaluate.batch=8 --warmup 2 --steps 10
    if [[ $device == *bf16* ]]; then
        bench step-swin-b step "${swin_b[@]}" train.global_batch=2 \
            --beside precision=fp32 --warmup 1 --steps 5
    else
        printf '\n== step-swin-b: skipped, because this processor only emulates bfloat16\n'
    fi
    exit
fi

# With a GPU: batches of 32 and 8, compiled and with CUDA graphs, and compared with LAVT.
bench step step "${swin_b[@]}" --beside compile=true
bench step-graphs step "${swin_b[@]}" compile=true --beside cuda_graphs=true
bench step-8 step "${swin_b[@]}" train.global_batch=8 model.{image,text}.checkpointing=selective
bench step-8-graphs step "${swin_b[@]}" train.global_batch=8 --beside cuda_graphs=true
lavt=(--beside model.kind=lavt --beside model.decoder.width=512)
bench step-lavt step "${swin_b[@]}" "${lavt[@]}"
bench step-lavt-fp32 step "${swin_b[@]}" "${lavt[@]}" --beside precision=fp32
