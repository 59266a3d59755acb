#!/usr/bin/env bash
# What this machine can measure, and the ratios to what was measured on it before. `make bench` calls it.
# Results: benchmarks/<date>-<device>/<bench>.json and .txt; each is compared with the newest earlier folder of the same device.
# SHARDS: packed photographs, which the loader brings to 480 x 480, in place of RefShapes. OUT names another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
shards=${SHARDS:-data/refshapes/shards}

mapfile -t devices < <("$python" -c "
import torch
from coupalign.bench.machine import describe_machine
for kind in ['cpu'] + ['cuda'] * torch.cuda.is_available():
    print(describe_machine(torch.device(kind))['device'])")
device=$(tr '[:upper:]' '[:lower:]' <<< "${devices[-1]}" | sed -E 's/[^a-z0-9]+/-/g; s/-$//')
out=${OUT:-benchmarks/$(date +%F)-$device}
before=$(find benchmarks -maxdepth 1 -name "*-$device" ! -path "$out" | sort | tail -n 1)
mkdir -p "$out"

bench() {    # name of the result, then the words of `coupalign bench`
    local name=$1 against=()
    shift
    # The same GPU may have another host, whose loader and start are not to be compared.
    if [[ -n $before ]] && printf '"device": "%s"\n' "${devices[@]}" | grep -qFf - "$before/$name.json" 2>/dev/null; then
        against=(--against "$before/$name.json")
    fi
    printf '\n== %s\n' "$name"
    "$python" -m coupalign bench "$@" --out "$out/$name.json" "${against[@]}" | sed '/^USDT:/d' | tee "$out/$name.txt"     # torch's profiler marks its beginning and end
}

if [[ $shards == data/refshapes/shards && ! -f $shards/index.json ]]; then
    "$python" -m coupalign synth data/refshapes/refshapes --images 6600
    "$python" -m coupalign pack shards/recipes/refshapes.yaml root=data/refshapes/refshapes --out "$shards"
fi
packed=("data.train=[{index: $shards, split: train}]" "data.evaluate=[{index: $shards, split: val}]")
bench startup startup configs/refshapes.yaml "${packed[@]}"
bench loader loader configs/refshapes.yaml "${packed[@]}" ${SHARDS:+data.image_size=480} data.workers=2 --steps 24
# The published sizes on random samples, from random weights, so that nothing has to be downloaded.
bert=$(mktemp -d)
trap 'rm -rf "$bert"' EXIT
"$python" -c "import sys, transformers; transformers.BertConfig().save_pretrained(sys.argv[1])" "$bert"
random=(--random-data engine.kind=ddp "model.text.weights=random:$bert" model.image.weights=null)
export WEIGHTS=$bert
if [[ ${#devices[@]} == 1 ]]; then
    bench step step configs/refshapes.yaml "${packed[@]}" --beside model.kind=lavt --beside model.decoder.width=64
    bench eval eval configs/refshapes.yaml "${packed[@]}" evaluate.batch=8 --warmup 2 --steps 10
    if [[ $device == *bf16* ]]; then
        bench step-swin-b step configs/refcoco_swin_b.yaml "${random[@]}" train.global_batch=2 --beside precision=fp32 --warmup 1 --steps 5
    else
        printf '\n== step-swin-b: left out, since this processor only imitates bfloat16\n'
    fi
    exit
fi
bench step step configs/refcoco_swin_b.yaml "${random[@]}" --beside compile=true
bench step-graphs step configs/refcoco_swin_b.yaml "${random[@]}" compile=true --beside cuda_graphs=true
bench step-8 step configs/refcoco_swin_b.yaml "${random[@]}" train.global_batch=8 model.{image,text}.checkpointing=selective
bench step-8-graphs step configs/refcoco_swin_b.yaml "${random[@]}" train.global_batch=8 --beside cuda_graphs=true
lavt=(--beside model.kind=lavt --beside model.decoder.width=512)
bench step-lavt step configs/refcoco_swin_b.yaml "${random[@]}" "${lavt[@]}"
bench step-lavt-fp32 step configs/refcoco_swin_b.yaml "${random[@]}" "${lavt[@]}" --beside precision=fp32
