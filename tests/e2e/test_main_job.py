"""The main job as users run it: train by launchers, be killed, resume, score, predict, report."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import coupalign
from coupalign.cli.parser import main
from coupalign.errors import ExitStatus
from coupalign.tracking import read_journal
from tests.e2e.conftest import finish, launch

pytestmark = pytest.mark.slow

# Metrics that a clock or the memory decides.
TIMED = ("train/samples_per_second", "data/wait_share", "train/peak_memory_gb", "ranks/", "save/")
WEIGHTS = ("weights.safetensors", "ema.safetensors")


def curve(run: Path) -> dict[int, dict[str, float]]:
    """Return everything measured at each step that must not depend on a clock or the memory."""
    steps: dict[int, dict[str, float]] = {}
    for row, _ in read_journal(run / "metrics.jsonl"):
        exact = {name: x for name, x in row.metrics.items() if not name.startswith(TIMED)}
        steps.setdefault(row.step, {}).update(exact)
    return steps


def kill_when_there(process: subprocess.Popen[str], path: Path) -> None:
    """SIGKILL the launcher, all its ranks and their workers as soon as a path exists."""
    until = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)

    launcher = psutil.Process(process.pid)
    for victim in (launcher, *launcher.children(recursive=True)):
        victim.kill()
    process.communicate(timeout=60)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of 14 steps on two DDP ranks."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    finish(launch(2, "train", config, f"run_dir={run}"))
    return run


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the undisturbed run, to change."""
    return shutil.copytree(whole, tmp_path / "run", symlinks=True)


def test_killed_run_resumes_bit_for_bit(config: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    kill_when_there(
        launch(2, "train", config, f"run_dir={run}", "data.workers=1"),
        run / "checkpoints" / "step-00000006",
    )

    output = finish(launch(2, "train", config, f"run_dir={run}"))

    assert curve(run) == curve(whole), output[-2000:]
    assert sorted(curve(run)) == list(range(1, 15))
    last = "checkpoints/step-00000014"
    for file in WEIGHTS:
        assert (run / last / file).read_bytes() == (whole / last / file).read_bytes(), file
    assert not list(run.rglob("*.partial"))


def test_one_rank_has_the_curve_of_two_and_takes_over_from_them(
    config: Path, tmp_path: Path
) -> None:
    """Each rank draws its own dropout, so that is off here. The global batches are the same."""
    one, two, before = tmp_path / "one", tmp_path / "two", tmp_path / "before"
    changes = [
        "model.text.dropout=0",
        "model.proposals.dropout=0",
        "optim.eps=1e-5",
        "train.evaluate_every=100",
        "train.save_every=4",
        "train.steps=8",
    ]
    zero = ["engine.kind=deepspeed", "engine.stage=2"]

    # Eight steps on one rank, and on two by another engine.
    finish(launch(1, "train", config, f"run_dir={one}", *changes))
    finish(launch(2, "train", config, f"run_dir={two}", *changes, *zero, launcher="deepspeed"))

    # The run of two ranks as it was after step 4; an old trained_on.json was left by another run.
    shutil.rmtree(two / "checkpoints" / "step-00000008")
    trained_on = (two / "trained_on.json").read_bytes()
    (two / "trained_on.json").write_text('{"mix": null, "weights": [], "photos": {}}')
    before.mkdir()
    (two / "metrics.jsonl").rename(before / "metrics.jsonl")

    # One rank takes over.
    output = finish(launch(1, "train", config, f"run_dir={two}", *changes))

    assert "was written by deepspeed ZeRO 2 with 2 ranks; ddp with 1 rank takes it over" in output
    assert (two / "trained_on.json").read_bytes() == trained_on, "from the checkpoint"
    assert sorted(curve(before)) == list(range(1, 9))
    assert sorted(curve(two)) == [5, 6, 7, 8]
    expected = curve(one)
    for run in (before, two):
        for step, row in curve(run).items():
            assert row["train/loss"] == pytest.approx(expected[step]["train/loss"], rel=1e-5)


def test_damaged_checkpoint_is_noticed_and_the_one_before_it_is_taken(
    config: Path, whole: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_bit(copy / "checkpoints" / "step-00000014" / "optimizer.pt")

    output = finish(launch(2, "train", config, f"run_dir={copy}"))

    assert "step-00000014 is damaged: optimizer.pt has another sha256" in output
    assert "damaged-step-00000014" in output
    # What came after the older checkpoint was trained again, to the same numbers.
    assert curve(copy) == curve(whole)
    last = "checkpoints/step-00000014"
    for file in (*WEIGHTS, "optimizer.pt"):
        assert (copy / last / file).read_bytes() == (whole / last / file).read_bytes(), file


def test_run_of_damaged_checkpoints_is_refused(
    config: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for checkpoint in (copy / "checkpoints").glob("step-*"):
        flip_a_bit(checkpoint / "ema.safetensors")

    assert main(["eval", str(copy)]) == 2
    assert "ema.safetensors has another sha256" in capsys.readouterr().err
    assert main(["train", str(config), f"run_dir={copy}"]) == 2
    assert "every checkpoint is damaged" in capsys.readouterr().err


def test_sigterm_saves_and_the_same_command_resumes(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    rarely = ["train.evaluate_every=400", "train.save_every=400"]
    process = launch(1, "train", config, f"run_dir={run}", "train.steps=400", *rarely)
    until = time.monotonic() + 200
    while not curve(run) and time.monotonic() < until:
        time.sleep(0.05)

    process.send_signal(signal.SIGTERM)

    output = finish(process, status=ExitStatus.STOPPED)
    assert "SIGTERM" in output and "resumes" in output
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    done = int(newest.name.removeprefix("step-"))
    finish(launch(1, "train", config, f"run_dir={run}", f"train.steps={done + 2}", *rarely))
    assert sorted(curve(run)) == list(range(1, done + 3))


def test_training_and_eval_write_scores_pictures_and_page(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, page = copy / "pictures" / "val", copy / "report.html"
    assert "<svg" in page.read_text() and list(pictures.glob("*.png")), "the training's"
    page.unlink()

    finish(launch(2, "eval", copy, "--language-blind", "--pictures", "2"))

    score = json.loads((copy / "score.json").read_text())
    metrics = {"oIoU", "mIoU", "P@0.5", "P@0.9", "language_blind_oIoU"}
    assert metrics | {"protocol", "samples"} <= score.keys()
    assert score["protocol"] == "ris-v1"
    lines = (copy / "scores" / "val-ris-v1.csv").read_text().splitlines()
    assert score["samples"] == len(lines) - 1
    assert list(pictures.glob("*.png"))

    # The page can be written again from what the run directory holds.
    by_eval = page.read_text()
    assert main(["report", str(copy)]) == 0
    assert page.read_text() == by_eval and "leak" in by_eval


def test_predict_writes_a_mask_of_the_photograph_s_size(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, out = tmp_path / "photo.png", tmp_path / "out"
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    capsys.readouterr()

    arguments = [str(whole), str(image), "the red circle", "--out", str(out), "--json"]
    assert main(["predict", *arguments]) == 0

    json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Image.open(next(out.glob("*.mask.png"))).size == (70, 50)
    assert coupalign.load(whole).predict(image, "the red circle").mask.shape == (50, 70)


def test_eval_of_all_protocols(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(whole), "--protocol", "all", "--split", "testA", "--json"]) == 0

    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    rules = {score["protocol"]: score["sentences"] for score in scores.values()}
    assert rules == {
        "ris-v1": "each",
        "lavt": "each",
        "cris": "each",
        "coupalign-author": "concatenated",
    }


def test_run_of_another_configuration_is_not_resumed(
    config: Path, whole: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for change, message in [
        ("model.decoder.width=32", "model.decoder.width was 16, is 32"),
        ("seed=1", "seed was 0, is 1"),
    ]:
        assert main(["train", str(config), f"run_dir={copy}", "train.steps=20", change]) == 2

        assert message in capsys.readouterr().err
        # A refused start changes nothing.
        assert (copy / "config.yaml").read_bytes() == (whole / "config.yaml").read_bytes()


def test_full_disk_leaves_the_old_checkpoints_whole(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = ["train", str(config), f"run_dir={run}", "train.evaluate_every=100"]
    finish(launch(1, *train, "train.steps=3"))
    before = contents(run / "checkpoints")

    # The limit is for shared memory too, so the samples come without worker processes.
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    code = limit + "from coupalign.cli.parser import main; sys.exit(main(sys.argv[1:]))"
    limited = [*train, "train.steps=6", "data.workers=0", "evaluate.pictures=0"]
    process = subprocess.run(
        [sys.executable, "-c", code, *limited], capture_output=True, text=True, timeout=200
    )

    assert process.returncode == ExitStatus.RUN_FAILED, process.stderr[-3000:]
    assert "could not be written" in process.stderr and "step-00000003" in process.stderr
    assert contents(run / "checkpoints") == before
    finish(launch(1, *train, "train.steps=6"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.global_batch=9", "train.global_batch=9"),
        ("data.train.0.split=trian", "trian"),
        ("data.train.0.index=/nowhere", "/nowhere"),
        ("optim.impl=apex", "never `pip install apex`"),
    ],
)
def test_wrong_setting_ends_before_the_first_step(
    config: Path, tmp_path: Path, change: str, message: str
) -> None:
    ranks = 2 if "global_batch" in change else 1

    process = launch(ranks, "train", config, f"run_dir={tmp_path / 'run'}", change)

    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0 and message in output, output[-3000:]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
