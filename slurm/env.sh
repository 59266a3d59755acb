# shellcheck shell=bash
# Everything that differs from site to site, and nothing else. Read by the sbatch files on the first node of a job, and,
# if you like, by your shell before sbatch (`source slurm/env.sh`), which then finds the SBATCH_* defaults. COUPALIGN_ENV names
# another file to read in its place.

# Defaults for sbatch.
# export SBATCH_ACCOUNT=my_project
# export SBATCH_PARTITION=gpu
# export SBATCH_TIMELIMIT=24:00:00

# Software: modules, then the environment that has coupalign.
# module load cuda/13.0
if [[ -z "${VIRTUAL_ENV:-}" && -r "${COUPALIGN_ROOT:-.}/.venv/bin/activate" ]]; then
    # shellcheck disable=SC1091
    source "${COUPALIGN_ROOT:-.}/.venv/bin/activate"
fi

# Container: the words in front of python, on every node.
COUPALIGN_CONTAINER=()
# COUPALIGN_CONTAINER=(apptainer exec --nv "$HOME/coupalign.sif")

# More options of srun.
COUPALIGN_SRUN=()
# COUPALIGN_SRUN=(--mpi=none)

# Network: the interface between the nodes. Without it gloo may advertise 127.0.0.1, and the job hangs at its start.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# Where node names do not resolve: the address of the first node. Where the port from the job id is taken: another.
# export MASTER_ADDR=10.0.0.1 MASTER_PORT=29500

# Node-local scratch: torch, triton and DeepSpeed build their extensions there.
# export TMPDIR=/scratch/$USER
# Nodes without internet: where the hub's files lie, and no attempt to fetch any.
# export HF_HOME=/shared/hub HF_HUB_OFFLINE=1
# Tracking server.
# export MLFLOW_TRACKING_URI=http://tracker:5000
