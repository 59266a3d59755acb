"""The command line: its flags are frozen, help is light, and every verb ends with a status."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from coupalign.cli import inspect, parser, run
from coupalign.cli.options import Answer
from coupalign.cli.parser import build_parser, main, parse_arguments
from coupalign.errors import ExitStatus, InputError, RunError

ROOT = Path(__file__).parents[3]

# Every verb, and the flags that it has in addition to --help and --json.
FLAGS = {
    "synth": {"--images", "--seed", "--level", "--size", "--workers"},
    "pack": {"--out", "--workers", "--overwrite", "--dry-run"},
    "verify": {"--leaks"},
    "describe": set(),
    "config": {"--deepspeed", "--ranks"},
    "plan": {"--gpu", "--nodes", "--ranks-per-node", "--network"},
    "train": set(),
    "eval": {
        "--split",
        "--index",
        "--out",
        "--protocol",
        "--sentences",
        "--language-blind",
        "--pictures",
    },
    "compare": {"--split", "--protocol", "--tracking-uri"},
    "predict": {"--out", "--batch", "--device"},
    "reproduce": {
        "--data",
        "--scale",
        "--seeds",
        "--jobs",
        "--launcher",
        "--slurm",
        "--only-print",
    },
    "report": {"--out"},
    "track": {"--tracking-uri"},
    "bench": {
        "--batch",
        "--steps",
        "--warmup",
        "--random-data",
        "--profile",
        "--beside",
        "--soak",
        "--out",
        "--against",
    },
    "doctor": {"--distributed"},
}


def parsers_of_verbs() -> dict[str, argparse.ArgumentParser]:
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("the parser has no verbs")


def flags_of(verb: argparse.ArgumentParser) -> set[str]:
    return {flag for action in verb._actions for flag in action.option_strings}


def test_flags_are_frozen() -> None:
    """A new flag is a decision: most settings belong into the configuration."""
    common = {"-h", "--help", "--json", "--local_rank"}

    found = {name: flags_of(verb) for name, verb in parsers_of_verbs().items()}

    assert found == {name: flags | common for name, flags in FLAGS.items()}


def test_overrides_may_stand_anywhere() -> None:
    options = parse_arguments(
        ["eval", "runs/x", "data.workers=0", "--split", "val", "evaluate.limit=3", "--json"]
    )

    assert options.overrides == ["data.workers=0", "evaluate.limit=3"]
    assert options.split == ["val"]
    assert options.json


@pytest.mark.parametrize(
    ("arguments", "unrecognized"),
    [
        (["eval", "runs/x", "--splitt", "val"], "--splitt val"),
        (["eval", "runs/x", "--split", "val", "more"], "more"),
        (["track", "runs/x", "a=b"], "a=b"),
    ],
)
def test_unknown_arguments_are_refused(
    arguments: list[str], unrecognized: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(arguments)

    assert f"unrecognized arguments: {unrecognized}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "code",
    ["import coupalign", "import coupalign.cli.parser as cli; cli.build_parser().format_help()"],
)
def test_package_and_help_import_nothing_heavy(code: str) -> None:
    heavy = {"torch", "numpy", "pydantic", "deepspeed", "transformers", "timm", "webdataset"}
    heavy |= {"mlflow", "yaml", "tabulate"}
    check = f"{code}; import sys; found = {heavy} & set(sys.modules); assert not found, found"

    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


@pytest.mark.parametrize("verb", FLAGS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args([verb, "--help"])

    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_choices_are_those_of_the_code_behind_them() -> None:
    """The parser has copies, because importing the originals takes a second."""
    from coupalign.config.schema import EvalConfig
    from coupalign.costs.plan import GPUS
    from coupalign.data.table import RULES

    assert inspect.GPUS == tuple(GPUS)
    assert run.PROTOCOLS == get_args(EvalConfig.model_fields["protocol"].annotation)
    assert run.SENTENCE_RULES == RULES


def answer_with(monkeypatch: pytest.MonkeyPatch, result: Answer | Exception) -> None:
    """Let every command line give this answer, or raise this error."""

    def run_verb(options: argparse.Namespace) -> Answer:
        if isinstance(result, Exception):
            raise result
        return result

    def parse(arguments: list[str]) -> argparse.Namespace:
        return argparse.Namespace(run=run_verb, json="--json" in arguments)

    monkeypatch.setattr(parser, "parse_arguments", parse)


@pytest.mark.parametrize(
    ("result", "status", "message"),
    [
        (Answer(), 0, ""),
        (Answer({"faults": 1}, ExitStatus.NO), 1, ""),
        (Answer(status=ExitStatus.STOPPED), 75, ""),
        (InputError("x.yaml: no such file"), 2, "coupalign: error: x.yaml: no such file\n"),
        (RunError("disk full"), 3, "coupalign: the run failed: disk full\n"),
        (InputError("http://u:hunter2@h/a"), 2, "coupalign: error: http://***@h/a\n"),
        (RunError("hunter2 is wrong"), 3, "coupalign: the run failed: *** is wrong\n"),
        (BrokenPipeError(), 1, ""),
    ],
)
def test_main_returns_the_status(
    result: Answer | Exception,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hunter2@host/db")
    answer_with(monkeypatch, result)

    assert main([]) == status

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == message


def test_tilde_of_a_path_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")

    options = parse_arguments(["predict", "~/run", "a~/b.jpg", "a star", "--out=~/masks"])

    assert (options.checkpoint, options.out) == (Path("/home/me/run"), Path("/home/me/masks"))
    assert options.image == Path("a~/b.jpg")


def test_log_lines_show_no_secret() -> None:
    masking = parser._MaskingFormatter("%(levelname)s: %(message)s")
    record = logging.LogRecord("x", logging.INFO, "", 0, "open %s", ("s3://key:hunter2@b",), None)

    assert masking.format(record) == "INFO: open s3://***@b"


def test_main_prints_the_value_as_json_if_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(monkeypatch, Answer({"é": [1, 2]}))

    main([])
    assert capsys.readouterr().out == ""

    main(["--json"])
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"é": [1, 2]}
    assert "é" in printed and printed.endswith("}\n")


def test_main_prints_no_json_without_a_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer_with(monkeypatch, Answer())

    main(["--json"])

    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "words",
    [
        "step configs/demo.yaml --batch 4",
        "kernel --steps 3",
        "kernel --out x.json",
        "kernel --against x.json",
        "order --warmup 2",
        "traffic configs/demo.yaml --soak 9",
        "loader configs/demo.yaml --random-data",
        "eval configs/demo.yaml --beside optim.lr=1",
    ],
)
def test_bench_refuses_flags_of_other_kinds(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    flag = next(word for word in words.split() if word.startswith("--"))

    assert main(["bench", *words.split()]) == ExitStatus.INPUT_ERROR

    assert f"error: {flag} is for bench" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slurm", "", "--jobs", "2"], "--jobs is for runs on this machine"),
        (["--slurm", "", "--launcher", "x"], "--launcher is for runs on this machine"),
        (["--slurm", "", "--only-print"], "--only-print starts nothing, and --slurm submits"),
        (["--scale", "tiny"], "--scale is of --data refshapes"),
    ],
)
def test_reproduce_refuses_flags_without_use(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "table3", *words]) == ExitStatus.INPUT_ERROR

    assert message in capsys.readouterr().err


def test_closed_pipe_ends_without_a_complaint() -> None:
    command = [sys.executable, "-m", "coupalign", "config", "configs/demo.yaml", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()

    assert (process.returncode, errors) == (ExitStatus.NO, b"")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_on_a_full_disk_is_one_line(options: list[str]) -> None:
    command = [sys.executable, "-m", "coupalign", "config", "configs/demo.yaml", *options]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    assert done.returncode == ExitStatus.RUN_FAILED
    assert "the output of this command cannot be written" in done.stderr
    assert done.stderr.count("\n") == 1


def test_closed_output_is_no_error() -> None:
    command = f"{sys.executable} -m coupalign config configs/demo.yaml --json >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, cwd=ROOT)

    assert (done.returncode, done.stderr) == (ExitStatus.OK, "")


def test_bench_writes_its_result_over_nothing_but_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    os.mkfifo(tmp_path / "pipe")

    for place in (tmp_path, tmp_path / "pipe"):
        assert main(["bench", "step", "configs/demo.yaml", "--out", str(place)]) == 2
        assert f"--out {place}: is no file" in capsys.readouterr().err
