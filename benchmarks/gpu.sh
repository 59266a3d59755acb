#!/usr/bin/env bash
# Run everything that needs a GPU, unattended: the tests, the kernel benchmark, then bench.sh.
# `make gpu` calls it.
#
# Results: benchmarks/<date>-<gpu>-tests.txt, -kernel-<batch>.txt and .json; those of bench.sh.
# OUT:     another folder for the results.
#
# The benchmarks run even if a test fails. A benchmark that fails leaves no .json.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}

gpu=$("$python" -c "import torch; print(torch.cuda.get_device_name().lower().replace(' ', '-'))" 2>/dev/null) || {
    echo "benchmarks/gpu.sh: torch finds no GPU here" >&2
    exit 2
}
out=${OUT:-benchmarks}/$(date +%F)-$gpu
status=0

"$python" -m coupalign doctor
"$python" -m pytest tests -m gpu -q 2>&1 | tee "$out-tests.txt" || status=1
for batch in 32 8; do
    if "$python" -m coupalign bench kernel --batch $batch --json >"$out-kernel-$batch.txt"; then
        tail -n 1 "$out-kernel-$batch.txt" >"$out-kernel-$batch.json"
        sed -i '$d' "$out-kernel-$batch.txt"
    else
        status=1
    fi
    cat "$out-kernel-$batch.txt"
done
OUT=$out PYTHON=$python benchmarks/bench.sh || status=1
exit $status
