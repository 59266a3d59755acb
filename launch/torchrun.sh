#!/usr/bin/env bash
# Starts a coupalign verb on several processes through torchrun. See launch/README.md.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/torchrun.sh [--dry-run] [VERB] CONFIG.yaml [key=value ...]

  VERB       train (default), eval, or any other verb of coupalign
  --dry-run  print the command instead of running it

environment
  NPROC      processes on this machine (default: its GPUs, 1 where there is none)
  NNODES     machines (default 1); start the script on each of them, with
  NODE_RANK  0, 1, ... and the same
  MASTER_ADDR, MASTER_PORT  of machine 0
  PYTHON     interpreter (default: the active environment's, else .venv/bin/python beside launch/)
EOF
}

dry=""
while [[ "${1:-}" == -* ]]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry=1; shift ;;
        *) usage >&2; echo "unknown option: $1" >&2; exit 2 ;;
    esac
done
verb=train
if [[ "${1:-}" =~ ^[a-z]+$ ]]; then
    verb=$1
    shift
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [[ -z "$python" && -z "${VIRTUAL_ENV:-}" && -z "${CONDA_PREFIX:-}" && -x "$root/.venv/bin/python" ]]; then
    python=$root/.venv/bin/python
fi
python=${python:-python3}
if ! "$python" -c "import coupalign"; then
    echo "$python cannot import coupalign: activate its environment, set PYTHON, or run 'make demo' once" >&2
    exit 1
fi

gpus=0
if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
elif [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]] && command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
fi
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}

where=(--standalone)
if [[ "${NNODES:-1}" != 1 ]]; then
    : "${MASTER_ADDR:?NNODES is $NNODES: set MASTER_ADDR to the name of machine 0}"
    : "${NODE_RANK:?NNODES is $NNODES: set NODE_RANK to 0, 1, ... on each machine}"
    where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi

command=("$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$nproc" -m coupalign "$verb" "$@")
if [[ -n "$dry" ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
