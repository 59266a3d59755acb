"""The launch and Slurm scripts: syntax, printed commands, and the launchers with two processes."""

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

Done = subprocess.CompletedProcess

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ["launch/torchrun.sh", "launch/deepspeed.sh"]
# Each launcher's option for the number of processes.
PROCESSES = {"launch/torchrun.sh": "--nproc-per-node", "launch/deepspeed.sh": "--num_gpus"}
SBATCH = {
    "slurm/pack.sbatch": ["pack"],
    "slurm/train.sbatch": ["train"],
    "slurm/eval.sbatch": ["eval"],
    "slurm/doctor.sbatch": ["doctor", "--distributed"],
}
SWEEP = "slurm/sweep.sbatch"
SOURCED = ["slurm/env.sh", "slurm/job.sh", "launch/machine.sh"]
OTHERS = ["benchmarks/gpu.sh", "benchmarks/bench.sh", "tests/cluster/slurm.sh"]
# Words that a shell would take apart.
ARGUMENTS = [
    "configs/a b.yaml",
    "name=it's",
    "data.train=[{index: 'a b', split: train}]",
    "seed=$HOME",
]
# What a launcher or a scheduler may have set in the environment of the tests.
FOREIGN = (
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


def run(*command: str, cwd: Path = ROOT, **variables: str) -> Done:
    """Run a command in an environment without foreign variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    own = {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=cwd, env=kept | own | variables, capture_output=True, text=True, timeout=240
    )


def printed_command(done: Done) -> list[str]:
    """Return the words of the last line that was printed."""
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.strip().splitlines()[-1])


def value_of(option: str, command: list[str]) -> str:
    """Return the word after an option."""
    return command[command.index(option) + 1]


# --------------------------------------------------------------------------------- All scripts


@pytest.mark.parametrize("script", [*LAUNCHERS, *SBATCH, SWEEP, *SOURCED, *OTHERS])
def test_bash_accepts_the_script(script: str) -> None:
    done = run("bash", "-n", script)

    assert (done.returncode, done.stderr) == (0, "")


def test_every_script_of_the_folders_is_listed_here() -> None:
    files = [*(ROOT / "launch").iterdir(), *(ROOT / "slurm").iterdir()]
    scripts = {str(path.relative_to(ROOT)) for path in files if path.suffix in (".sh", ".sbatch")}

    assert scripts >= {*LAUNCHERS, *SBATCH, SWEEP, *SOURCED}
    for script in scripts:
        assert run("bash", "-n", script).returncode == 0, script


def test_gpu_benchmark_says_that_there_is_no_gpu() -> None:
    done = run("benchmarks/gpu.sh")

    assert (done.returncode, done.stdout) == (2, "")
    assert "torch finds no GPU here" in done.stderr


# ----------------------------------------------------------------------------------- Launchers


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("words, verb", [([], "train"), (["train"], "train"), (["eval"], "eval")])
def test_launcher_hands_its_arguments_on_untouched(
    script: str, words: list[str], verb: str
) -> None:
    command = printed_command(run(script, "--dry-run", *words, *ARGUMENTS, NPROC="3"))

    module = "--module" if "deepspeed" in script else "-m"
    assert command[-len(ARGUMENTS) - 3 :] == [module, "coupalign", verb, *ARGUMENTS]
    assert value_of(PROCESSES[script], command) == "3"


@pytest.mark.parametrize("script", LAUNCHERS)
def test_default_without_a_gpu_is_one_process(script: str) -> None:
    command = printed_command(run(script, "--dry-run", "train", "a.yaml"))

    assert value_of(PROCESSES[script], command) == "1"


def test_launchers_use_the_visible_gpus() -> None:
    devices = {"CUDA_VISIBLE_DEVICES": "2,3,5"}

    two = printed_command(run("launch/deepspeed.sh", "--dry-run", "a.yaml", NPROC="2", **devices))
    all_three = printed_command(run("launch/torchrun.sh", "--dry-run", "a.yaml", **devices))

    assert value_of("--include", two) == "localhost:2,3"
    assert value_of("--nproc-per-node", all_three) == "3"


def test_hostfile_decides_the_processes() -> None:
    hostfile = ["--hostfile", "launch/hostfile.example"]

    done = run(
        "launch/deepspeed.sh",
        *hostfile,
        "--dry-run",
        "a.yaml",
        MASTER_ADDR="10.0.0.1",
        MASTER_PORT="2345",
        DEEPSPEED_ARGS="--no_ssh_check --ssh_port 22",
    )

    assert printed_command(done) == shlex.split(
        "deepspeed --log_level warning --hostfile launch/hostfile.example --master_addr 10.0.0.1 "
        "--master_port 2345 "
        "--no_ssh_check --ssh_port 22 --no_local_rank --module coupalign train a.yaml"
    )
    assert run("launch/deepspeed.sh", "--hostfile", "nowhere", "a.yaml").returncode == 2


def test_example_hostfile_has_the_format_of_deepspeed() -> None:
    text = (ROOT / "launch/hostfile.example").read_text()

    lines = [line for line in text.splitlines() if line and not line.startswith("#")]

    assert lines
    assert all(re.fullmatch(r"\S+ slots=\d+", line) for line in lines)


def test_torchrun_on_several_machines_needs_the_first_one_s_address() -> None:
    two = {"NNODES": "2"}

    missing = run("launch/torchrun.sh", "--dry-run", "a.yaml", **two)
    given = run("launch/torchrun.sh", "--dry-run", "a.yaml", NODE_RANK="1", MASTER_ADDR="n1", **two)

    assert missing.returncode != 0 and "MASTER_ADDR" in missing.stderr
    command = printed_command(given)
    assert "--standalone" not in command
    assert value_of("--master-addr", command) == "n1"


def test_torchrun_with_c10d_needs_no_rank_of_the_machine() -> None:
    done = run(
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

    assert printed_command(done)[3:] == shlex.split(
        "--nnodes 2:4 --rdzv-backend c10d --rdzv-endpoint n1:2345 --rdzv-id 'job 7' "
        "--nproc-per-node 1 --max-restarts 3 --log-dir logs -m coupalign train a.yaml"
    )


def test_torchrun_refuses_an_unknown_rendezvous() -> None:
    done = run(
        "launch/torchrun.sh", "--dry-run", "a.yaml", NNODES="2", RDZV="etcd", MASTER_ADDR="n1"
    )

    assert done.returncode == 2
    assert "static or c10d" in done.stderr


@pytest.mark.parametrize("option", ["--launcher slurm", "--launcher=slurm"])
def test_deepspeeds_slurm_launcher_gets_a_script_instead_of_a_module(option: str) -> None:
    launcher = {"DEEPSPEED_ARGS": option}
    hostfile = ["--hostfile", "launch/hostfile.example"]

    command = printed_command(
        run("launch/deepspeed.sh", *hostfile, "--dry-run", "a.yaml", **launcher)
    )
    refused = run("launch/deepspeed.sh", "--dry-run", "a.yaml", **launcher)

    assert "--module" not in command
    assert "--no_ssh_check" in command and "--master_addr" in command
    script = Path(command[-3])
    assert command[-2:] == ["train", "a.yaml"]
    assert script.name == "coupalign" and script.is_file()
    assert refused.returncode == 2 and "hostfile" in refused.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
def test_launcher_prints_its_usage_and_refuses_unknown_options(script: str) -> None:
    done = run(script, "-h")

    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {script}")
    assert run(script, "--nonsense").returncode == 2


@pytest.mark.parametrize("script", LAUNCHERS)
def test_launcher_refuses_a_python_without_coupalign(script: str, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)

    done = run(script, "--dry-run", "a.yaml", PYTHON=str(bare))

    assert (done.returncode, done.stdout) == (1, "")
    assert "coupalign" in done.stderr


STAND_IN = """
import json, os, sys
from pathlib import Path
names = ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
report = {"arguments": sys.argv[1:]} | {name: os.environ[name] for name in names}
Path(os.environ["REPORTS"], os.environ["RANK"] + ".json").write_text(json.dumps(report))
"""


def write_stand_in(folder: Path, code: str) -> None:
    """Write a package `coupalign` that runs this code in place of a verb."""
    package = folder / "coupalign"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(code)


@pytest.mark.slow
@pytest.mark.parametrize("script", LAUNCHERS)
def test_two_processes_get_their_ranks_and_arguments(script: str, tmp_path: Path) -> None:
    write_stand_in(tmp_path, STAND_IN)
    variables = {"NPROC": "2", "OMP_NUM_THREADS": "1", "REPORTS": str(tmp_path)}

    done = run(str(ROOT / script), "train", *ARGUMENTS, cwd=tmp_path, **variables)

    assert done.returncode == 0, done.stderr
    for rank in ("0", "1"):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "arguments": ["train", *ARGUMENTS],
            "WORLD_SIZE": "2",
            "LOCAL_RANK": rank,
            "OMP_NUM_THREADS": "1",
        }


@pytest.mark.slow
@pytest.mark.parametrize("script", LAUNCHERS)
def test_launcher_fails_if_a_process_fails(script: str, tmp_path: Path) -> None:
    write_stand_in(tmp_path, "import sys; sys.exit(3)")

    done = run(str(ROOT / script), "train", "a.yaml", cwd=tmp_path, NPROC="1")

    assert done.returncode != 0


# --------------------------------------------------------------------------------------- Slurm


@pytest.mark.parametrize("script", SBATCH)
def test_sbatch_file_prints_its_command_without_slurm(script: str) -> None:
    command = printed_command(run("bash", script, *ARGUMENTS, DRY_RUN="1"))

    words = ["python", "-m", "coupalign", *SBATCH[script], *ARGUMENTS]
    assert command[0] == "srun"
    assert command[-len(words) :] == words


@pytest.mark.parametrize("script", [*SBATCH, SWEEP])
def test_sbatch_file_that_is_not_submitted_says_how(script: str) -> None:
    done = run("bash", script, "a.yaml")

    assert done.returncode == 2
    assert "sbatch" in done.stderr


@pytest.mark.parametrize("script", [*SBATCH, SWEEP])
def test_sbatch_directives_come_first_and_name_no_site(script: str) -> None:
    lines = (ROOT / script).read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [line for line in lines if line.startswith("#SBATCH")]
    options = {line.split()[1].split("=")[0] for line in directives}

    # Slurm reads no directive after the first command, nor one with a typing error.
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
    meant = [line for line in lines[:first] if "SBATCH" in line and line.startswith("#S")]
    assert all(line in directives for line in meant)

    assert {"--requeue", "--open-mode", "--output"} <= options
    assert not options & {"--partition", "--account", "--gres", "--gpus", "--qos", "--constraint"}
    # Only these answer USR1 by a checkpoint.
    assert ("--signal" in options) == (script in ("slurm/train.sbatch", SWEEP))


FAKE_SRUN = """#!/bin/sh
variables="$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $SRUN_CPUS_PER_TASK"
printf "%s\\n" "$variables" "$@" > "$REPORT"
exit $STATUS
"""
FAKE_SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then echo node07; echo node08; else echo "$@" >> "$REQUEUED"; fi
"""
# Slurm's variables in a job on two nodes with eight tasks each.
JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "16",
    "SLURM_CPUS_PER_TASK": "12",
}


@pytest.mark.parametrize(
    "array", [{}, {"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "3"}]
)
@pytest.mark.parametrize(
    "status, requeued", [("0", False), ("1", False), ("75", True), ("70", False), ("143", False)]
)
def test_training_job_meets_at_its_first_node_and_is_requeued_after_an_early_stop_only(
    tmp_path: Path, status: str, requeued: bool, array: dict[str, str]
) -> None:
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copytree(ROOT / "slurm", tmp_path / "checkout" / "slurm")
    # Slurm runs a copy of the file, outside of the checkout.
    spooled = shutil.copy(ROOT / "slurm/train.sbatch", tmp_path / "slurm_script")
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path / "checkout"),
        "REPORT": str(tmp_path / "report"),
        "REQUEUED": str(tmp_path / "requeued"),
        "STATUS": status,
    }

    done = run("bash", str(spooled), "a.yaml", cwd=tmp_path, **JOB, **array, **variables)

    assert done.returncode == int(status), done.stderr
    address, *arguments = (tmp_path / "report").read_text().splitlines()
    assert address == "node07 23456 12 12"
    assert arguments[:4] == ["--nodes", "2", "--ntasks", "16"]
    assert arguments[-5:] == ["python", "-m", "coupalign", "train", "a.yaml"]

    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        job = "123456_3" if array else "123456"
        assert (tmp_path / "requeued").read_text() == f"requeue {job}\n"
    assert ("a hang was found" in done.stderr) == (status == "70")


def test_another_site_file_can_be_named(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text("COUPALIGN_CONTAINER=(in 'a box')\nCOUPALIGN_SRUN=(--mpi=none)\n")

    done = run("bash", "slurm/train.sbatch", "a.yaml", DRY_RUN="1", COUPALIGN_ENV=str(site))

    expected = shlex.split("--mpi=none in 'a box' python -m coupalign train a.yaml")
    assert printed_command(done)[-8:] == expected


# -------------------------------------------------------------------------------------- Sweeps


def dry_run_sweep(folder: Path, text: str, task: str, *words: str) -> Done:
    """Print the commands of a task of a sweep with this text."""
    (folder / "sweep.txt").write_text(text)
    (folder / "base.yaml").write_text("")
    files = [str(folder / "sweep.txt"), str(folder / "base.yaml")]
    variables = {"SLURM_ARRAY_TASK_ID": task} if task else {}
    return run("bash", SWEEP, *files, *words, DRY_RUN="1", **variables)


def test_task_of_a_sweep_trains_and_scores_its_line(tmp_path: Path) -> None:
    text = (
        "# variants\n\nwhole\n   # more\n"
        "wpa-off  model.wpa.stages=[false,false,false,false]  data.train='[{index: a b}]'\n"
    )

    first = dry_run_sweep(tmp_path, text, "0", ARGUMENTS[3]).stdout
    second = dry_run_sweep(tmp_path, text, "1").stdout

    train, score = [shlex.split(line) for line in first.splitlines()]
    assert train[-3:] == [str(tmp_path / "base.yaml"), ARGUMENTS[3], "name=base-whole"]
    expected = ["eval", "runs/base-whole", "--language-blind", "--pictures", "6"]
    assert score[-5:] == expected
    assert shlex.split(second.splitlines()[0])[-3:] == [
        "model.wpa.stages=[false,false,false,false]",
        "data.train=[{index: a b}]",
        "name=base-wpa-off",
    ]


@pytest.mark.parametrize(
    "text, task, words, message",
    [
        ("a\nb\n", "2", (), "has 2 lines, tasks 0 to 1: there is no task 2"),
        ("a\nb\n", "", (), "not an array"),
        ("a x=1\nb\na x=2\n", "0", (), "has a name twice: a"),
        ("seed=1\n", "0", (), "begins with a name, found 'seed=1'"),
        ("a name=b\n", "0", (), "name=b: the runs are named by"),
        ("a\n", "0", ("run_dir=x",), "run_dir=x: the runs are named by"),
        ("a 'x=1\n", "0", (), "a quote is not closed"),
    ],
)
def test_wrong_sweep_is_refused(
    tmp_path: Path, text: str, task: str, words: tuple[str, ...], message: str
) -> None:
    done = dry_run_sweep(tmp_path, text, task, *words)

    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


SWEEPS = sorted((ROOT / "slurm" / "sweeps").glob("*.txt"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.name)
def test_every_config_accepts_every_line_of_a_sweep(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SHARDS", "WEIGHTS"):
        monkeypatch.setenv(name, "/somewhere")
    text = file.read_text()
    lines = [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]

    assert f"tasks 0 to {len(lines) - 1}." in text
    for config in sorted((ROOT / "configs").glob("*.yaml")):
        plain = read_config(config)
        if plain.model.kind != "coupalign":
            continue
        variants = {name: read_config(config, changes) for name, *changes in lines if changes}
        unchanged = [name for name, variant in variants.items() if variant == plain]
        assert not unchanged or config.stem != "refcoco_swin_b"
