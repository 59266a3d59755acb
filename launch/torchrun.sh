#!/usr/bin/env bash
# Start a coupalign verb in several processes with torchrun. See launch/README.md.
set -euo pipefail
# shellcheck source=launch/machine.sh
source "$(dirname "${BASH_SOURCE[0]}")/machine.sh"

usage() {
    cat <<'END'
usage: launch/torchrun.sh [--dry-run] [VERB] CONFIG.yaml [key=value ...]

  VERB       train (default), eval, or any other verb of coupalign
  --dry-run  print the command instead of running it

environment
  NPROC      processes on this machine (default: its GPUs, or 1 without GPUs)
  PYTHON     interpreter (default: the active environment's, else .venv/bin/python of the checkout)
  TORCHRUN_ARGS  more options for torchrun, such as "--max-restarts 3"

environment for several machines; start the script on each of them
  NNODES     number of machines (default: 1), or with c10d a range such as 2:4
  NODE_RANK  number of this machine: 0, 1, ... (not needed with c10d)
  MASTER_ADDR, MASTER_PORT  of machine 0, the same on each machine (default port: 29500)
  RDZV       static (default), or c10d: machines join in any order, and again after a failure
  RDZV_ID    name of the job with c10d, the same on each machine (default: coupalign)
END
}

dry=""
while [[ "${1:-}" == -* ]]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry=1; shift ;;
        *) usage >&2; echo "unknown option: $1" >&2; exit 2 ;;
    esac
done
read_verb "$@"
shift "$words"
find_python coupalign
count_processes

where=(--standalone)
if [[ "${NNODES:-1}" != 1 ]]; then
    : "${MASTER_ADDR:?NNODES is $NNODES: set MASTER_ADDR to the name of machine 0}"
    port=${MASTER_PORT:-29500}
    case "${RDZV:-static}" in
        static)
            : "${NODE_RANK:?NNODES is $NNODES: set NODE_RANK to 0, 1, ... on each machine}"
            where=(--nnodes "$NNODES" --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$port")
            ;;
        c10d)
            where=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$port"
                --rdzv-id "${RDZV_ID:-coupalign}")
            ;;
        *) usage >&2; echo "RDZV is $RDZV: static or c10d" >&2; exit 2 ;;
    esac
fi
read -r -a more <<<"${TORCHRUN_ARGS:-}"
# Restarted ranks must not read the addresses of their predecessors from the store: each start gets a new store.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

start "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$nproc" ${more[@]+"${more[@]}"} \
    -m coupalign "$verb" "$@"
