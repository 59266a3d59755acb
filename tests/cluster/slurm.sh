#!/usr/bin/env bash
# Run a Slurm of four nodes on this machine, for the tests.
#
#   slurm.sh install          install Debian's packages if something is missing
#   slurm.sh start FOLDER     write everything into FOLDER; SLURM_CONF=FOLDER/slurm.conf reaches this Slurm
#   slurm.sh stop FOLDER      end everything and keep the logs
set -euo pipefail

packages=(slurm-wlm slurmd slurmctld slurm-client munge pdsh openssh-server iproute2)
programs=(sbatch srun scontrol slurmctld slurmd munged pdsh sshd ip unshare)
nodes=(node1 node2 node3 node4)
PATH=$PATH:/usr/sbin:/sbin

die() {
    echo "slurm.sh: $1" >&2
    exit 1
}

missing() {
    local program
    for program in "${programs[@]}"; do
        command -v "$program" >/dev/null || echo "$program"
    done
}

install() {
    [[ -n "$(missing)" ]] || return 0
    [[ "$(id -u)" == 0 ]] || die "installing takes root; missing: $(missing | xargs)"
    command -v apt-get >/dev/null || die "no apt-get here; missing: $(missing | xargs)"
    apt-get update --quiet=2
    DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes --no-install-recommends "${packages[@]}" >/dev/null
    [[ -z "$(missing)" ]] || die "still missing after the installation: $(missing | xargs)"
}

# Choose ports below those that Linux hands out by itself, and below those where the ranks of a job meet.
free_ports() {
    python3 -c '
import random, socket, sys
def free(port):
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) != 0
ports = filter(free, random.sample(range(10000, 20000), 1000))
print(*(next(ports) for _ in range(int(sys.argv[1]))))' "$1"
}

# Each node claims two CPUs, whatever the machine has: the tasks share it. State, logs and munge are in the folder, so a
# Slurm of this machine is not touched. Job ids start at a random number, since the port of the ranks comes from them.
configure() {
    local host ports node number=1
    host=$(hostname)
    read -r -a ports <<<"$(free_ports $((${#nodes[@]} + 1)))"
    cat <<END
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CredType=cred/munge
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
MpiDefault=none
SwitchType=switch/none
ReturnToService=0
SlurmdTimeout=300
KillWait=20
JobRequeue=1
MinJobAge=3600
FirstJobId=$((RANDOM % 9000 + 1))
SlurmdParameters=config_overrides
END
    for node in "${nodes[@]}"; do
        echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[number]} CPUs=2 Sockets=1 CoresPerSocket=2" \
            "ThreadsPerCore=1 RealMemory=1000 State=UNKNOWN"
        number=$((number + 1))
    done
    echo "PartitionName=main Nodes=$(IFS=,; echo "${nodes[*]}") Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO"
}

# wait_for WHAT SECONDS COMMAND...
wait_for() {
    local what=$1 until=$((SECONDS + $2))
    shift 2
    until "$@"; do
        ((SECONDS < until)) || { tail -n 20 "$folder"/log/*.log >&2; die "$what: not within time"; }
        sleep 0.2
    done
}

all_idle() {
    [[ "$(sinfo --noheader --Node --format %T 2>/dev/null | grep -cx idle)" == "${#nodes[@]}" ]]
}

start() {
    [[ "$(id -u)" == 0 ]] || die "slurmd takes root"
    [[ -z "$(missing)" ]] || die "missing: $(missing | xargs); slurm.sh install"
    mkdir -p "$folder"/{state,log,run}
    # munged insists on a folder for its socket that others can enter. Our other folders need not be like that.
    mkdir -m 755 "$folder/munge"
    head -c 128 /dev/urandom >"$folder/munge/key"
    chmod 400 "$folder/munge/key"
    munged --force --num-threads 2 --key-file "$folder/munge/key" --socket "$folder/munge/socket" --pid-file "$folder/run/munged.pid" \
        --log-file "$folder/log/munged.log" --seed-file "$folder/munge/seed" 2>>"$folder/log/munged.log"
    configure >"$folder/slurm.conf"
    slurmctld -c
    printf '127.0.0.1 %s\n' localhost "$(hostname)" "${nodes[@]}" >"$folder/hosts"
    local node
    for node in "${nodes[@]}"; do
        # Only the node and its jobs see this: it has its own name, and the names of all nodes resolve, as on a cluster.
        unshare --mount --uts bash -c 'hostname "$2" && mount --bind "$1" /etc/hosts && exec slurmd -N "$2"' bash "$folder/hosts" "$node"
    done
    wait_for "four idle nodes" 60 all_idle
}

# List the ids of all processes that were started for or by this Slurm: its folder is in their environment.
ours() {
    local entry
    for entry in /proc/[0-9]*; do
        if [[ "${entry#/proc/}" != "$$" && "${entry#/proc/}" != "$BASHPID" && "${entry#/proc/}" != "$PPID" ]] &&
            grep -qsz "^COUPALIGN_TEST_SLURM=$folder\$" "$entry/environ"; then
            echo "${entry#/proc/}"
        fi
    done
}

none_left() {
    [[ -z "$(ours)" ]]
}

stop() {
    local file left until=$((SECONDS + 20))
    if scontrol ping >/dev/null 2>&1; then
        squeue --noheader --format %A | xargs --no-run-if-empty scancel || true
        while [[ -n "$(squeue --noheader)" ]] && ((SECONDS < until)); do sleep 0.2; done
    fi
    for file in "$folder"/run/slurmd.*.pid "$folder"/run/slurmctld.pid "$folder"/run/munged.pid; do
        [[ ! -s "$file" ]] || kill "$(<"$file")" 2>/dev/null || true
    done
    until=$((SECONDS + 10))
    until none_left || ((SECONDS >= until)); do sleep 0.2; done
    # List first and kill then, so that the list does not contain the process that kills.
    left=$(ours)
    [[ -z "$left" ]] || xargs kill -KILL <<<"$left" 2>/dev/null || true
    wait_for "the end of all processes" 10 none_left
    rm -rf "$folder"/{state,run,munge} "$folder"/spool.*
}

case "${1:-}" in
    install) install ;;
    start | stop)
        folder=$(realpath "${2:?FOLDER}")
        export SLURM_CONF=$folder/slurm.conf COUPALIGN_TEST_SLURM=$folder
        "$1"
        ;;
    *) die "expected install, start FOLDER or stop FOLDER" ;;
esac
