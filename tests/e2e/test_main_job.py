"""The main job as users run it: train through real launchers, be killed, go on, score, predict, report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import coupalign
from coupalign.cli.parser import main
from coupalign.tracking import read_journal
from tests.e2e.conftest import finish, launch

pytestmark = pytest.mark.slow
TIMED = ("train/samples_per_second", "data/wait_share", "train/peak_memory_gb", "ranks/", "save/")


def curve(run: Path) -> dict[int, dict[str, float]]:
    """Everything that was measured at each step, but for what a clock or the memory says."""
    steps: dict[int, dict[str, float]] = {}
    for row, _ in read_journal(run / "metrics.jsonl"):
        steps.setdefault(row.step, {}).update(
            {name: value for name, value in row.metrics.items() if not name.startswith(TIMED)}
        )
    return steps


def kill_when(process: subprocess.Popen[str], there: Path) -> None:
    """SIGKILL the launcher, all its ranks and their workers as soon as a path exists."""
    until = time.monotonic() + 240
    while not there.exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < until, f"{there} did not appear"
        time.sleep(0.02)
    launcher = psutil.Process(process.pid)
    for victim in (launcher, *launcher.children(recursive=True)):
        victim.kill()
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 14 steps on two DDP ranks that nobody disturbed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    finish(launch(2, "train", config, f"run_dir={run}"))
    return run


def test_a_killed_run_goes_on_bit_for_bit(config: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "killed"
    kill_when(
        launch(2, "train", config, f"run_dir={run}", "data.workers=1"),
        run / "checkpoints" / "step-00000006",
    )
    output = finish(launch(2, "train", config, f"run_dir={run}"))
    assert curve(run) == curve(whole), output[-2000:]
    assert sorted(curve(run)) == list(range(1, 15))
    for file in ("weights.safetensors", "ema.safetensors"):
        last = "checkpoints/step-00000014"
        assert (run / last / file).read_bytes() == (whole / last / file).read_bytes(), file
    assert not list(run.rglob("*.partial")), "no debris"


def test_one_rank_gives_the_same_curve_as_two_and_goes_on_from_them(
    config: Path, tmp_path: Path
) -> None:
    """Dropout draws from each rank's own stream, so it is off here; the data are the same global batches."""
    changes = [
        "model.text.dropout=0",
        "model.proposals.dropout=0",
        "optim.eps=1e-5",
        "train.evaluate_every=100",
        "train.save_every=4",
    ]
    finish(launch(1, "train", config, f"run_dir={tmp_path / 'one'}", *changes, "train.steps=8"))
    finish(
        launch(
            2,
            "train",
            config,
            f"run_dir={tmp_path / 'two'}",
            *changes,
            "train.steps=8",
            "engine.kind=deepspeed",
            "engine.stage=2",
            launcher="deepspeed",
        )
    )
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "step-00000008")
    seen = (tmp_path / "two" / "trained_on.json").read_bytes()
    (tmp_path / "two" / "trained_on.json").write_text(
        '{"mix": null, "weights": [], "photos": {}}'
    )  # left by another run of this name
    (tmp_path / "before").mkdir()
    (tmp_path / "two" / "metrics.jsonl").rename(tmp_path / "before" / "metrics.jsonl")
    output = finish(
        launch(1, "train", config, f"run_dir={tmp_path / 'two'}", *changes, "train.steps=8")
    )
    assert "was written by deepspeed ZeRO 2 with 2 ranks; ddp with 1 rank takes it over" in output
    assert (tmp_path / "two" / "trained_on.json").read_bytes() == seen, (
        "the checkpoint knows what it was trained on"
    )
    one, two, later = curve(tmp_path / "one"), curve(tmp_path / "before"), curve(tmp_path / "two")
    assert sorted(two) == list(range(1, 9)) and sorted(later) == [5, 6, 7, 8]
    for found in (two, later):
        for step, row in found.items():
            assert row["train/loss"] == pytest.approx(one[step]["train/loss"], rel=1e-5)


def test_a_flipped_byte_is_seen_and_the_checkpoint_before_it_is_taken(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    flip(run / "checkpoints" / "step-00000014" / "optimizer.pt")
    output = finish(launch(2, "train", config, f"run_dir={run}"))
    assert (
        "step-00000014 is damaged: optimizer.pt has another sha256" in output
        and "damaged-step-00000014" in output
    )
    assert curve(run) == curve(whole), (
        "what came after the whole checkpoint was trained again, to the same numbers"
    )
    for file in ("weights.safetensors", "ema.safetensors", "optimizer.pt"):
        assert (run / "checkpoints/step-00000014" / file).read_bytes() == (
            whole / "checkpoints/step-00000014" / file
        ).read_bytes()
    for checkpoint in (run / "checkpoints").glob("step-*"):
        flip(checkpoint / "ema.safetensors")
    assert main(["eval", str(run)]) == 2
    assert "ema.safetensors has another sha256" in capsys.readouterr().err
    assert main(["train", str(config), f"run_dir={run}"]) == 2
    assert "every checkpoint is damaged" in capsys.readouterr().err


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_asked_to_stop_it_saves_and_says_that_it_can_go_on(
    config: Path, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    process = launch(
        1,
        "train",
        config,
        f"run_dir={run}",
        "train.steps=400",
        "train.evaluate_every=400",
        "train.save_every=400",
    )
    until = time.monotonic() + 200
    while not curve(run) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = finish(process, status=75)
    assert "SIGTERM" in output and "goes on" in output
    saved = sorted((run / "checkpoints").glob("step-*"))[-1]
    done = int(saved.name.removeprefix("step-"))
    finish(
        launch(
            1,
            "train",
            config,
            f"run_dir={run}",
            f"train.steps={done + 2}",
            "train.evaluate_every=400",
            "train.save_every=400",
        )
    )
    assert sorted(curve(run)) == list(range(1, done + 3))


def test_scores_pictures_page_and_prediction(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    assert "<svg" in (run / "report.html").read_text() and list(
        (run / "pictures" / "val").glob("*.png")
    ), "training writes the page"
    (run / "report.html").unlink()
    finish(launch(2, "eval", run, "--language-blind", "--pictures", "2"))
    score = json.loads((run / "score.json").read_text())
    assert {
        "oIoU",
        "mIoU",
        "P@0.5",
        "P@0.9",
        "language_blind_oIoU",
        "protocol",
        "samples",
    } <= score.keys()
    assert (
        score["protocol"] == "ris-v1"
        and score["samples"] == len((run / "scores/val-ris-v1.csv").read_text().splitlines()) - 1
    )
    assert list((run / "pictures" / "val").glob("*.png"))
    capsys.readouterr()
    by_eval = (run / "report.html").read_text()
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").read_text() == by_eval and "leak" in by_eval
    image = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(
        image
    )
    capsys.readouterr()
    assert (
        main(
            [
                "predict",
                str(run),
                str(image),
                "the red circle",
                "--out",
                str(tmp_path / "out"),
                "--json",
            ]
        )
        == 0
    )
    json.loads(capsys.readouterr().out.splitlines()[-1])
    assert Image.open(next((tmp_path / "out").glob("*.mask.png"))).size == (70, 50)
    assert coupalign.load(run).predict(image, "the red circle").mask.shape == (50, 70)


def test_all_protocols_side_by_side(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(whole), "--protocol", "all", "--split", "testA", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {score["protocol"] for score in scores.values()} == {"ris-v1", "lavt", "cris"}


def test_another_configuration_cannot_go_on(
    config: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    for change, named in [
        ("model.decoder.width=32", "model.decoder.width was 16, is 32"),
        ("seed=1", "seed was 0, is 1"),
    ]:
        assert main(["train", str(config), f"run_dir={run}", "train.steps=20", change]) == 2
        assert named in capsys.readouterr().err
        assert (run / "config.yaml").read_bytes() == (whole / "config.yaml").read_bytes(), (
            "a refused start changes nothing"
        )


def test_a_full_disk_leaves_the_old_checkpoints_whole(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finish(
        launch(1, "train", config, f"run_dir={run}", "train.steps=3", "train.evaluate_every=100")
    )
    before = {
        file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()
    }
    # The limit holds for shared memory too, so the samples come without worker processes.
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    code = limit + "from coupalign.cli.parser import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.run(
        [
            os.sys.executable,
            "-c",
            code,
            "train",
            str(config),
            f"run_dir={run}",
            "train.steps=6",
            "train.evaluate_every=100",
            "data.workers=0",
            "evaluate.pictures=0",
        ],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 2, process.stderr[-3000:]
    assert "could not be written" in process.stderr and "step-00000003" in process.stderr
    assert {
        file: file.read_bytes() for file in (run / "checkpoints").rglob("*") if file.is_file()
    } == before
    finish(
        launch(1, "train", config, f"run_dir={run}", "train.steps=6", "train.evaluate_every=100")
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("train.global_batch=9", "train.global_batch=9"),
        ("data.train.0.split=trian", "trian"),
        ("data.train.0.index=/nowhere", "/nowhere"),
        ("optim.impl=apex", "never `pip install apex`"),
    ],
)
def test_wrong_settings_end_before_the_first_step(
    config: Path, tmp_path: Path, change: str, named: str
) -> None:
    ranks = 2 if "global_batch" in change else 1
    process = launch(ranks, "train", config, f"run_dir={tmp_path / 'run'}", change)
    output, _ = process.communicate(timeout=200)
    assert process.returncode != 0 and named in output, output[-3000:]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
