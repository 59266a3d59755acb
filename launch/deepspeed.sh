#!/usr/bin/env bash
# Starts a coupalign verb on several processes through the deepspeed launcher. See launch/README.md.
set -euo pipefail

usage() {
    cat <<'EOF'
usage: launch/deepspeed.sh [--hostfile FILE] [--dry-run] [VERB] CONFIG.yaml [key=value ...]

  VERB             train (default), eval, or any other verb of coupalign
  --hostfile FILE  machines and their slots (launch/hostfile.example); none: this machine
  --dry-run        print the command instead of running it

environment
  NPROC            processes on each machine (default: its GPUs, or the slots of the hostfile; 1 without GPUs)
  MASTER_ADDR      of the first machine (default: asked by ssh), MASTER_PORT (default: a free one)
  DEEPSPEED_ARGS   more options of the launcher, such as "--no_ssh_check --launcher pdsh"
  PYTHON           interpreter (default: the active environment's, else .venv/bin/python beside launch/)
EOF
}

dry="" hostfile=""
while [[ "${1:-}" == -* ]]; do
    case "$1" in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry=1; shift ;;
        --hostfile) hostfile=${2:?--hostfile needs a file}; shift 2 ;;
        --hostfile=*) hostfile=${1#*=}; shift ;;
        *) usage >&2; echo "unknown option: $1" >&2; exit 2 ;;
    esac
done
verb=train
if [[ "${1:-}" =~ ^[a-z]+$ ]]; then
    verb=$1
    shift
fi
if [[ -n "$hostfile" && ! -r "$hostfile" ]]; then
    echo "hostfile $hostfile is missing: see launch/hostfile.example" >&2
    exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-}
if [[ -z "$python" && -z "${VIRTUAL_ENV:-}" && -z "${CONDA_PREFIX:-}" && -x "$root/.venv/bin/python" ]]; then
    python=$root/.venv/bin/python
fi
python=$(command -v "${python:-python3}")
if ! "$python" -c "import coupalign, importlib.util as u, sys; sys.exit(u.find_spec('deepspeed') is None and 'deepspeed is missing')"; then
    echo "$python cannot start: activate the environment of coupalign, set PYTHON, or run 'make demo' once" >&2
    exit 1
fi
# The environment's own ninja must come first: another version rebuilds DeepSpeed's extensions at every change.
PATH=$(dirname "$python"):$PATH
export PATH

gpus=0
if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
elif [[ -z "${CUDA_VISIBLE_DEVICES+set}" ]] && command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
fi
nproc=${NPROC:-$((gpus > 0 ? gpus : 1))}
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}
if [[ "$gpus" == 0 && -z "$hostfile" ]]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi

where=()
if [[ -n "$hostfile" ]]; then
    where=(--hostfile "$hostfile")
    [[ -z "${NPROC:-}" ]] || where+=(--num_gpus "$NPROC")
    [[ -z "${MASTER_ADDR:-}" ]] || where+=(--master_addr "$MASTER_ADDR")
elif [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
    where=(--include "localhost:$(cut -d, "-f1-$nproc" <<<"$CUDA_VISIBLE_DEVICES")")
else
    where=(--num_gpus "$nproc")
fi
port=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
read -r -a more <<<"${DEEPSPEED_ARGS:-}"

command=(deepspeed --log_level warning "${where[@]}" --master_port "$port" ${more[@]+"${more[@]}"} --no_local_rank --module coupalign "$verb" "$@")
if [[ -n "$dry" ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
