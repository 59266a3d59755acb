"""The launch and Slurm scripts: their syntax, what they print, and the two local launchers with two processes each."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from coupalign.config.load import read_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ["launch/torchrun.sh", "launch/deepspeed.sh"]
BENCHMARK = "benchmarks/gpu.sh"
BENCHES = "benchmarks/bench.sh"
SBATCH = {
    "slurm/pack.sbatch": ["pack"],
    "slurm/train.sbatch": ["train"],
    "slurm/eval.sbatch": ["eval"],
    "slurm/doctor.sbatch": ["doctor", "--distributed"],
}
SWEEP = "slurm/sweep.sbatch"
SOURCED = ["slurm/env.sh", "slurm/job.sh", "launch/machine.sh"]
ARGUMENTS = [
    "configs/a b.yaml",
    "name=it's",
    "data.train=[{index: 'a b', split: train}]",
    "seed=$HOME",
]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what a launcher or a scheduler may have set in it."""
    prefixes = (
        "SLURM_",
        "MASTER_",
        "OMP_",
        "NPROC",
        "NNODES",
        "NODE_RANK",
        "CUDA_VISIBLE",
        "DS_",
        "COUPALIGN_",
        "DRY_RUN",
        "RDZV",
        "TORCHRUN_",
        "DEEPSPEED_",
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return kept | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | changes


def run(*words: str, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        words, cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=240
    )


def last_line(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "script", [*LAUNCHERS, *SBATCH, SWEEP, *SOURCED, BENCHMARK, BENCHES, "tests/cluster/slurm.sh"]
)
def test_bash_accepts_every_script(script):
    done = run("bash", "-n", script)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_script_in_the_folders_is_tested_here():
    found = {
        str(path.relative_to(ROOT))
        for folder in ("launch", "slurm")
        for path in (ROOT / folder).iterdir()
    }
    scripts = {name for name in found if name.endswith((".sh", ".sbatch"))}
    assert scripts >= {*LAUNCHERS, *SBATCH, SWEEP, *SOURCED}
    for script in scripts:
        assert run("bash", "-n", script).returncode == 0, script


def test_the_gpu_benchmark_says_that_there_is_no_gpu():
    done = run(BENCHMARK)
    assert (done.returncode, done.stdout) == (2, "") and "torch finds no GPU here" in done.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("words, verb", [([], "train"), (["train"], "train"), (["eval"], "eval")])
def test_a_launcher_ends_in_the_entry_point_with_its_arguments_untouched(script, words, verb):
    command = last_line(run(script, "--dry-run", *words, *ARGUMENTS, NPROC="3"))
    module = "--module" if "deepspeed" in script else "-m"
    assert command[-len(ARGUMENTS) - 3 :] == [module, "coupalign", verb, *ARGUMENTS]
    assert (
        command[command.index("--num_gpus" if "deepspeed" in script else "--nproc-per-node") + 1]
        == "3"
    )


@pytest.mark.parametrize("script", LAUNCHERS)
def test_without_a_gpu_one_process_is_the_default(script):
    command = last_line(run(script, "--dry-run", "train", "a.yaml"))
    assert (
        command[command.index("--num_gpus" if "deepspeed" in script else "--nproc-per-node") + 1]
        == "1"
    )


def test_visible_devices_are_respected():
    command = last_line(
        run("launch/deepspeed.sh", "--dry-run", "a.yaml", CUDA_VISIBLE_DEVICES="2,3,5", NPROC="2")
    )
    assert command[command.index("--include") + 1] == "localhost:2,3"
    command = last_line(
        run("launch/torchrun.sh", "--dry-run", "a.yaml", CUDA_VISIBLE_DEVICES="2,3,5")
    )
    assert command[command.index("--nproc-per-node") + 1] == "3"


def test_the_hostfile_decides_the_processes():
    command = last_line(
        run(
            "launch/deepspeed.sh",
            "--hostfile",
            "launch/hostfile.example",
            "--dry-run",
            "a.yaml",
            MASTER_ADDR="10.0.0.1",
            MASTER_PORT="2345",
            DEEPSPEED_ARGS="--no_ssh_check --ssh_port 22",
        )
    )
    assert command == shlex.split(
        "deepspeed --log_level warning --hostfile launch/hostfile.example --master_addr 10.0.0.1 "
        "--master_port 2345 "
        "--no_ssh_check --ssh_port 22 --no_local_rank --module coupalign train a.yaml"
    )
    assert run("launch/deepspeed.sh", "--hostfile", "nowhere", "a.yaml").returncode == 2


def test_the_example_hostfile_is_one_that_deepspeed_reads():
    lines = [
        line
        for line in (ROOT / "launch/hostfile.example").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines and all(re.fullmatch(r"\S+ slots=\d+", line) for line in lines)


def test_several_nodes_need_a_meeting_point():
    missing = run("launch/torchrun.sh", "--dry-run", "a.yaml", NNODES="2")
    assert missing.returncode != 0 and "MASTER_ADDR" in missing.stderr
    command = last_line(
        run(
            "launch/torchrun.sh", "--dry-run", "a.yaml", NNODES="2", NODE_RANK="1", MASTER_ADDR="n1"
        )
    )
    assert "--standalone" not in command and command[command.index("--master-addr") + 1] == "n1"


def test_machines_that_find_each_other_need_no_rank():
    command = last_line(
        run(
            "launch/torchrun.sh",
            "--dry-run",
            "a.yaml",
            NNODES="2:4",
            RDZV="c10d",
            MASTER_ADDR="n1",
            MASTER_PORT="2345",
            RDZV_ID="job 7",
            TORCHRUN_ARGS="--max-restarts 3 --log-dir logs",
        )
    )
    assert command[3:] == [
        "--nnodes",
        "2:4",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "n1:2345",
        "--rdzv-id",
        "job 7",
        "--nproc-per-node",
        "1",
        "--max-restarts",
        "3",
        "--log-dir",
        "logs",
        "-m",
        "coupalign",
        "train",
        "a.yaml",
    ]
    wrong = run(
        "launch/torchrun.sh", "--dry-run", "a.yaml", NNODES="2", RDZV="etcd", MASTER_ADDR="n1"
    )
    assert wrong.returncode == 2 and "static or c10d" in wrong.stderr


@pytest.mark.parametrize("option", ["--launcher slurm", "--launcher=slurm"])
def test_deepspeeds_slurm_launcher_is_given_a_script_and_not_a_module(option):
    command = last_line(
        run(
            "launch/deepspeed.sh",
            "--hostfile",
            "launch/hostfile.example",
            "--dry-run",
            "a.yaml",
            DEEPSPEED_ARGS=option,
        )
    )
    assert "--module" not in command and "--no_ssh_check" in command and "--master_addr" in command
    script = Path(command[-3])
    assert command[-2:] == ["train", "a.yaml"] and script.name == "coupalign" and script.is_file()
    refused = run("launch/deepspeed.sh", "--dry-run", "a.yaml", DEEPSPEED_ARGS=option)
    assert refused.returncode == 2 and "hostfile" in refused.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_and_mistakes(script, tmp_path):
    done = run(script, "-h")
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}")
    assert run(script, "--nonsense").returncode == 2
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    done = run(script, "--dry-run", "a.yaml", PYTHON=str(bare))
    assert done.returncode == 1 and "coupalign" in done.stderr and done.stdout == ""


STAND_IN = """
import json, os, sys
from pathlib import Path
names = ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
Path(os.environ["REPORTS"], os.environ["RANK"] + ".json").write_text(
    json.dumps({"arguments": sys.argv[1:]} | {name: os.environ[name] for name in names}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", LAUNCHERS)
def test_two_processes_start_with_ranks_and_arguments(script, tmp_path):
    (tmp_path / "coupalign").mkdir()
    (tmp_path / "coupalign" / "__init__.py").write_text("")
    (tmp_path / "coupalign" / "__main__.py").write_text(STAND_IN)
    done = run(
        str(ROOT / script),
        "train",
        *ARGUMENTS,
        cwd=tmp_path,
        NPROC="2",
        OMP_NUM_THREADS="1",
        REPORTS=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    for rank in ("0", "1"):
        report = json.loads((tmp_path / f"{rank}.json").read_text())
        assert report == {
            "arguments": ["train", *ARGUMENTS],
            "WORLD_SIZE": "2",
            "LOCAL_RANK": rank,
            "OMP_NUM_THREADS": "1",
        }


@pytest.mark.slow
@pytest.mark.parametrize("script", LAUNCHERS)
def test_a_failing_process_fails_the_launcher(script, tmp_path):
    (tmp_path / "coupalign").mkdir()
    (tmp_path / "coupalign" / "__init__.py").write_text("")
    (tmp_path / "coupalign" / "__main__.py").write_text("import sys; sys.exit(3)")
    assert run(str(ROOT / script), "train", "a.yaml", cwd=tmp_path, NPROC="1").returncode != 0


@pytest.mark.parametrize("script", SBATCH)
def test_an_sbatch_file_prints_its_srun_command_without_slurm(script):
    command = last_line(run("bash", script, *ARGUMENTS, DRY_RUN="1"))
    words = ["python", "-m", "coupalign", *SBATCH[script], *ARGUMENTS]
    assert command[0] == "srun" and command[-len(words) :] == words


@pytest.mark.parametrize("script", [*SBATCH, SWEEP])
def test_an_sbatch_file_that_is_not_submitted_says_how(script):
    done = run("bash", script, "a.yaml")
    assert done.returncode == 2 and "sbatch" in done.stderr


@pytest.mark.parametrize("script", [*SBATCH, SWEEP])
def test_sbatch_directives_come_before_the_first_command_and_name_no_site(script):
    lines = (ROOT / script).read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert all(
        line in directives for line in lines[:first] if "SBATCH" in line and line.startswith("#S")
    )
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    options = {line.split()[1].split("=")[0] for line in directives}
    assert {"--requeue", "--open-mode", "--output"} <= options
    assert not options & {"--partition", "--account", "--gres", "--gpus", "--qos", "--constraint"}
    assert ("--signal" in options) == (script in ("slurm/train.sbatch", SWEEP)), (
        "who answers USR1 by a checkpoint"
    )


FAKE_SRUN = """#!/bin/sh
printf "%s\\n" "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $SRUN_CPUS_PER_TASK" "$@" > "$REPORT"
exit $STATUS
"""
FAKE_SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo node07; echo node08; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.mark.parametrize(
    "array", [{}, {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "3"}]
)
@pytest.mark.parametrize(
    "status, requeued", [("0", False), ("1", False), ("75", True), ("70", False), ("143", False)]
)
def test_a_training_job_meets_at_its_first_node_and_is_requeued_only_after_an_early_stop(
    tmp_path, status, requeued, array
):
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copytree(ROOT / "slurm", tmp_path / "checkout" / "slurm")
    spooled = shutil.copy(ROOT / "slurm/train.sbatch", tmp_path / "slurm_script")
    done = run(
        "bash",
        str(spooled),
        "a.yaml",
        cwd=tmp_path,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_JOB_ID="123456",
        SLURM_SUBMIT_DIR=str(tmp_path / "checkout"),
        SLURM_JOB_NODELIST="node[07-08]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_NTASKS="16",
        SLURM_CPUS_PER_TASK="12",
        REPORT=str(tmp_path / "report"),
        REQUEUED=str(tmp_path / "requeued"),
        STATUS=status,
        **array,
    )
    assert done.returncode == int(status), done.stderr
    first, *arguments = (tmp_path / "report").read_text().splitlines()
    assert first == "node07 23456 12 12"
    assert arguments[:4] == ["--nodes", "2", "--ntasks", "16"]
    assert arguments[-5:] == ["python", "-m", "coupalign", "train", "a.yaml"]
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == (
            "requeue 123456_3\n" if array else "requeue 123456\n"
        )
    assert ("a hang was found" in done.stderr) == (status == "70")


def test_another_site_file_can_be_named(tmp_path):
    site = tmp_path / "site.sh"
    site.write_text("COUPALIGN_CONTAINER=(in 'a box')\nCOUPALIGN_SRUN=(--mpi=none)\n")
    command = last_line(
        run("bash", "slurm/train.sbatch", "a.yaml", DRY_RUN="1", COUPALIGN_ENV=str(site))
    )
    assert command[-8:] == [
        "--mpi=none",
        "in",
        "a box",
        "python",
        "-m",
        "coupalign",
        "train",
        "a.yaml",
    ]


SWEEPS = sorted((ROOT / "slurm" / "sweeps").glob("*.txt"))


def sweep(tmp_path: Path, text: str, task: str, *words: str) -> subprocess.CompletedProcess:
    (tmp_path / "sweep.txt").write_text(text)
    (tmp_path / "base.yaml").write_text("")
    return run(
        "bash",
        SWEEP,
        str(tmp_path / "sweep.txt"),
        str(tmp_path / "base.yaml"),
        *words,
        DRY_RUN="1",
        **({"SLURM_ARRAY_TASK_ID": task} if task else {}),
    )


def test_a_task_of_a_sweep_trains_and_scores_its_line(tmp_path):
    text = "# variants\n\nwhole\n   # more\nwpa-off  model.wpa.stages=[false,false,false,false]  data.train='[{index: a b}]'\n"
    plain = [
        shlex.split(line) for line in sweep(tmp_path, text, "0", *ARGUMENTS[3:]).stdout.splitlines()
    ]
    assert [line[-3:] for line in plain] == [
        [str(tmp_path / "base.yaml"), ARGUMENTS[3], "name=base-whole"],
        ["--language-blind", "--pictures", "6"],
    ]
    assert plain[1][-5:-3] == ["eval", "runs/base-whole"]
    changed = shlex.split(sweep(tmp_path, text, "1").stdout.splitlines()[0])
    assert changed[-3:] == [
        "model.wpa.stages=[false,false,false,false]",
        "data.train=[{index: a b}]",
        "name=base-wpa-off",
    ]


@pytest.mark.parametrize(
    "text, task, words, named",
    [
        ("a\nb\n", "2", (), "has 2 lines, tasks 0 to 1: there is no task 2"),
        ("a\nb\n", "", (), "not an array"),
        ("a x=1\nb\na x=2\n", "0", (), "gives a name twice: a"),
        ("seed=1\n", "0", (), "begins with a name, found 'seed=1'"),
        ("a name=b\n", "0", (), "name=b: the runs are named by"),
        ("a\n", "0", ("run_dir=x",), "run_dir=x: the runs are named by"),
        ("a 'x=1\n", "0", (), "a quote is not closed"),
    ],
)
def test_a_wrong_sweep_is_refused(tmp_path, text, task, words, named):
    done = sweep(tmp_path, text, task, *words)
    assert done.returncode == 2 and named in done.stderr and done.stdout == ""


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.name)
def test_every_line_of_a_sweep_is_accepted_by_every_config(file, monkeypatch):
    for name in ("SHARDS", "WEIGHTS"):
        monkeypatch.setenv(name, "/somewhere")
    lines = [
        shlex.split(line)
        for line in file.read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert f"tasks 0 to {len(lines) - 1}." in file.read_text()
    for config in sorted((ROOT / "configs").glob("*.yaml")):
        plain = read_config(config)
        if plain.model.kind == "coupalign":
            same = [
                name
                for name, *overrides in lines
                if overrides and read_config(config, overrides) == plain
            ]
            assert not same or config.stem != "refcoco_swin_b"
