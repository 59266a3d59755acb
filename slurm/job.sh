# shellcheck shell=bash
# What the sbatch files share. Sourced by each of them in the root of the checkout, on the first node of the job; what differs
# from site to site is in env.sh.

if [[ -z "${SLURM_JOB_ID:-}" && -z "${DRY_RUN:-}" ]]; then
    echo "submit this file as its first lines say: sbatch ... $0 (or DRY_RUN=1 to look)" >&2
    exit 2
fi
export COUPALIGN_ROOT=$PWD
# shellcheck source=slurm/env.sh
source "${COUPALIGN_ENV:-slurm/env.sh}"

# The ranks meet on the first node.
if [[ -z "${MASTER_ADDR:-}" ]]; then
    if [[ -n "${SLURM_JOB_NODELIST:-}" ]]; then
        mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    fi
    MASTER_ADDR=${nodes[0]:-127.0.0.1}
fi
export MASTER_ADDR
export MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 10000))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Since Slurm 22.05 srun does not inherit this from sbatch.
[[ -z "${SLURM_CPUS_PER_TASK:-}" ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# step "SRUN OPTIONS" VERB ARGUMENTS...: one verb of coupalign as a step of the job. DRY_RUN: only printed.
step() {
    local options
    read -r -a options <<<"$1"
    shift
    local command=(srun "${options[@]}" ${COUPALIGN_SRUN[@]+"${COUPALIGN_SRUN[@]}"}
        ${COUPALIGN_CONTAINER[@]+"${COUPALIGN_CONTAINER[@]}"} python -m coupalign "$@")
    if [[ -n "${DRY_RUN:-}" ]]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    "${command[@]}"
}

# all_ranks "SRUN OPTIONS" VERB ARGUMENTS...: the same on all nodes and tasks that the job has.
all_ranks() {
    step "--nodes ${SLURM_JOB_NUM_NODES:-1} --ntasks ${SLURM_NTASKS:-1} $1" "${@:2}"
}

# stoppable VERB ARGUMENTS...: train or eval; one that was asked to stop (status 75) is queued again, and goes on then.
stoppable() {
    local status=0 job=${SLURM_JOB_ID:-}
    # The number of an array's last task is also the array's own: only this name means one task.
    [[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    # A task that ends first is followed by the others within two minutes; killing them at once would hide status 75.
    all_ranks "--kill-on-bad-exit=0 --wait=120" "$@" || status=$?
    case $status in
        75)
            echo "stopped before the end: queued again"
            local tries=0
            # A busy controller does not answer at times. When it does, this script is ended with the job.
            until scontrol requeue "$job" || ((++tries == 5)); do sleep 10; done
            ;;
        70) echo "a hang was found and ended: not queued again, since it may come back; above are the stacks of the ranks" >&2 ;;
    esac
    return "$status"
}
