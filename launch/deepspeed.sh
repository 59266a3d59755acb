#!/usr/bin/env bash
# Start a coupalign verb in several processes with the deepspeed launcher. See launch/README.md.
set -euo pipefail
# shellcheck source=launch/machine.sh
source "$(dirname "${BASH_SOURCE[0]}")/machine.sh"

usage() {
    cat <<'END'
usage: launch/deepspeed.sh [--hostfile FILE] [--dry-run] [VERB] CONFIG.yaml [key=value ...]

  VERB             train (default), eval, or any other verb of coupalign
  --hostfile FILE  machines and their slots, see launch/hostfile.example (default: this machine)
  --dry-run        print the command instead of running it

environment
  NPROC            processes per machine (default: its GPUs, or the slots of the hostfile; 1 without GPUs)
  MASTER_ADDR      address of the first machine (default: ask it by ssh)
  MASTER_PORT      port on the first machine (default: a free one)
  DEEPSPEED_ARGS   more options for the launcher, such as "--no_ssh_check --launcher pdsh"
  PYTHON           interpreter (default: the active environment's, else .venv/bin/python of the checkout)
END
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
read_verb "$@"
shift "$words"
if [[ -n "$hostfile" && ! -r "$hostfile" ]]; then
    echo "hostfile $hostfile cannot be read: see launch/hostfile.example" >&2
    exit 2
fi
find_python coupalign deepspeed
# The environment's own ninja must come first: whenever ninja's version changes, DeepSpeed rebuilds its
# extensions.
PATH=$(dirname "$python"):$PATH
export PATH
count_processes
if [[ "$gpus" == 0 && -z "$hostfile" ]]; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi

read -r -a more <<<"${DEEPSPEED_ARGS:-}"
entry=(--module coupalign)
if [[ " ${more[*]-} " =~ \ --launcher[\ =]slurm\  ]]; then
    if [[ -z "$hostfile" ]]; then
        echo "--launcher slurm needs a hostfile: scontrol show hostnames | sed 's/\$/ slots=8/' > hostfile" >&2
        exit 2
    fi
    # With srun the launcher starts `python SCRIPT`, never a module. The ranks learn from Slurm who they are, so
    # the launcher need not ask the first machine by ssh.
    entry=("$(dirname "$python")/coupalign")
    more+=(--no_ssh_check)
    MASTER_ADDR=${MASTER_ADDR:-unused}
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

start deepspeed --log_level warning "${where[@]}" --master_port "$port" ${more[@]+"${more[@]}"} --no_local_rank \
    "${entry[@]}" "$verb" "$@"
