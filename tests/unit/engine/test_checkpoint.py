"""The checkpoint folder of a run: recovery, retention and errors; see also tests/e2e."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coupalign.config.load import override
from coupalign.config.schema import Config
from coupalign.data.packing.vocabulary import train_vocabulary
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.world import World
from coupalign.engine.base import TrainState
from coupalign.engine.checkpoint import Checkpoints
from coupalign.engine.layout import finished_checkpoints, recover_checkpoints, step_of
from coupalign.engine.state_file import read_state
from coupalign.errors import InputError, RunError

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class OneTensor:
    """The smallest engine that a checkpoint can hold."""

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def export(self, averaged: bool = False) -> dict[str, torch.Tensor] | None:
        return None if averaged else {"w": torch.tensor([self.value])}

    def counters(self) -> dict[str, float]:
        return {"applied": 0, "scale": 1.0, "good_steps": 0}

    def save(self, directory: Path) -> None:
        (directory / "optimizer.pt").write_bytes(b"moments")

    def load(self, directory: Path, counters: dict[str, float]) -> None:
        self.loaded = directory.name


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    file = tmp_path_factory.mktemp("words") / "vocabulary.txt"
    train_vocabulary(["small red star", "the blue square"], file, 100)
    return Tokenizer.open(file)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    changes = [f"run_dir={tmp_path}", "train.keep_last=2", "model.text.kind=small"]
    return Checkpoints(override(Config(), changes), ALONE, "data")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save_steps(
    checkpoints: Checkpoints, tokenizer: Tokenizer, *steps: int, best_step: int | None = None
) -> None:
    for step in steps:
        best = 0.5 if best_step is not None and step >= best_step else None
        state = TrainState(step, best=best, best_step=best_step if best else None)
        checkpoints.save(OneTensor(step), state, tokenizer)


def resume(checkpoints: Checkpoints, tokenizer: Tokenizer) -> TrainState | None:
    return checkpoints.resume(OneTensor(), tokenizer)


def test_interrupted_replacement_gets_its_name_back(tmp_path: Path) -> None:
    for name in ("step-00000002", ".step-00000002.old", ".step-00000004.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()

    recover_checkpoints(tmp_path)

    # Step 2 has its replacement. That of step 4 was never renamed.
    assert names(tmp_path) == ["step-00000002", "step-00000004"]


def test_publishing_keeps_the_newest_and_the_best(
    checkpoints: Checkpoints, tokenizer: Tokenizer
) -> None:
    save_steps(checkpoints, tokenizer, 2, 4, 6, 8, best_step=2)

    kept = ["best", "step-00000002", "step-00000006", "step-00000008"]
    assert names(checkpoints.folder) == kept
    assert os.readlink(checkpoints.folder / "best") == "step-00000002"


def test_checkpoints_are_sorted_by_step_and_not_by_name(
    checkpoints: Checkpoints, tokenizer: Tokenizer
) -> None:
    """After step 99,999,999 the names have nine digits."""
    save_steps(checkpoints, tokenizer, 99_999_998, 99_999_999, 100_000_000)

    assert names(checkpoints.folder) == ["step-100000000", "step-99999999"]
    assert resume(checkpoints, tokenizer).step == 100_000_000


@pytest.mark.parametrize(
    "name", ["step-keep", "step-1", "step-00000099x", "step-000000099", "step-00000099", "step-"]
)
@pytest.mark.parametrize("kind", ["file", "folder", "link", "copy of a checkpoint"])
def test_what_is_no_checkpoint_is_left_alone(
    checkpoints: Checkpoints, tokenizer: Tokenizer, name: str, kind: str
) -> None:
    save_steps(checkpoints, tokenizer, 2)
    other, whole = checkpoints.folder / name, checkpoints.folder / "step-00000002"
    make: dict[str, Callable[[], Any]] = {
        "file": other.touch,
        "folder": other.mkdir,
        "link": lambda: other.symlink_to(whole.name),
        "copy of a checkpoint": lambda: shutil.copytree(whole, other),
    }
    make[kind]()

    assert resume(checkpoints, tokenizer).step == 2
    save_steps(checkpoints, tokenizer, 4, 6, 8)
    assert resume(checkpoints, tokenizer).step == 8

    # A copy under a name of ours says another step, so it counts as damaged.
    is_damaged = kind.startswith("copy") and step_of(other) is not None
    left = f"damaged-{name}" if is_damaged else name
    assert names(checkpoints.folder) == sorted([left, "step-00000006", "step-00000008"])


def test_resume_refuses_if_every_checkpoint_is_damaged(
    checkpoints: Checkpoints, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(checkpoints, tokenizer, 2)
    (checkpoints.folder / "step-00000002" / "manifest.json").unlink()

    with pytest.raises(InputError, match="every checkpoint is damaged"):
        resume(checkpoints, tokenizer)

    assert names(checkpoints.folder) == ["damaged-step-00000002"]
    assert "manifest.json is missing" in caplog.text

    # A requeued job must not start from scratch either.
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        resume(checkpoints, tokenizer)


def test_damaged_checkpoints_of_one_step_are_all_kept(
    checkpoints: Checkpoints, tokenizer: Tokenizer
) -> None:
    for _ in range(3):
        save_steps(checkpoints, tokenizer, 2, 4)
        (checkpoints.folder / "step-00000004" / "optimizer.pt").write_bytes(b"other")
        assert resume(checkpoints, tokenizer).step == 2

    damaged = [f"damaged-step-00000004{end}" for end in ("", ".2", ".3")]
    assert names(checkpoints.folder) == [*damaged, "step-00000002"]


def test_run_without_checkpoints_has_nothing_to_resume(
    checkpoints: Checkpoints, tokenizer: Tokenizer
) -> None:
    assert resume(checkpoints, tokenizer) is None


def test_best_is_linked_again_after_a_kill_before_the_link(
    checkpoints: Checkpoints, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(checkpoints, tokenizer, 2, best_step=2)
    (checkpoints.folder / "best").unlink()

    assert resume(checkpoints, tokenizer).best_step == 2
    save_steps(checkpoints, tokenizer, 4, 6, 8, best_step=2)

    assert os.readlink(checkpoints.folder / "best") == "step-00000002"
    assert (checkpoints.folder / "best" / "weights.safetensors").is_file()


def test_resume_prunes_what_a_run_left_that_failed_after_publishing(
    checkpoints: Checkpoints, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(checkpoints, tokenizer, 2, 4)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "_prune", lambda *_: os.stat("/no/such/place"))
        with pytest.raises(RunError, match="step-00000006: the checkpoint could not be written"):
            save_steps(checkpoints, tokenizer, 6)
    assert len(names(checkpoints.folder)) == 3

    assert resume(checkpoints, tokenizer).step == 6
    assert names(checkpoints.folder) == ["step-00000004", "step-00000006"]


def test_best_is_not_pruned_even_if_its_link_points_elsewhere(
    checkpoints: Checkpoints, tokenizer: Tokenizer
) -> None:
    save_steps(checkpoints, tokenizer, 2, best_step=2)
    (checkpoints.folder / "best").unlink()

    save_steps(checkpoints, tokenizer, 4, 6, 8, best_step=2)

    assert "step-00000002" in names(checkpoints.folder)


def test_best_score_whose_checkpoint_is_gone_is_forgotten(
    checkpoints: Checkpoints, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(checkpoints, tokenizer, 2, 4, best_step=2)
    shutil.rmtree(checkpoints.folder / "step-00000002")

    state = resume(checkpoints, tokenizer)

    assert (state.step, state.best, state.best_step) == (4, None, None)
    assert names(checkpoints.folder) == ["step-00000004"]
    assert "step-00000002" in caplog.text and "is gone" in caplog.text


def test_best_that_became_a_folder_is_kept_under_another_name(
    checkpoints: Checkpoints, tokenizer: Tokenizer
) -> None:
    """`cp -rL` and some synchronizing tools make folders of links."""
    save_steps(checkpoints, tokenizer, 2, best_step=2)
    best = checkpoints.folder / "best"
    best.unlink()
    shutil.copytree(checkpoints.folder / "step-00000002", best)

    save_steps(checkpoints, tokenizer, 4, best_step=4)

    assert os.readlink(best) == "step-00000004"
    [former] = checkpoints.folder.glob("former-best-*")
    assert (former / "weights.safetensors").is_file()


def test_checkpoint_of_another_tokenizer_is_refused(
    checkpoints: Checkpoints, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_steps(checkpoints, tokenizer, 2)
    words = list(tokenizer.vocabulary)
    words[-1] = "other"
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in words))

    message = rf"tokenizer is another one: token {len(words) - 1} was '.+', is 'other'"
    with pytest.raises(InputError, match=message):
        resume(checkpoints, Tokenizer.open(tmp_path / "vocab.txt"))


def test_files_of_another_writer_are_never_published(
    checkpoints: Checkpoints, tokenizer: Tokenizer
) -> None:
    """Two jobs that share a folder, or a node that does not share it."""
    save_steps(checkpoints, tokenizer, 2)
    content = (checkpoints.folder / "step-00000002" / "state.json").read_bytes()

    class Disturbed(OneTensor):
        def save(self, directory: Path) -> None:
            super().save(directory)
            (directory / "state.json").write_bytes(content)

    with pytest.raises(RunError, match=r"ranks \[0\] do not find there what rank 0 has written"):
        checkpoints.save(Disturbed(), TrainState(4), tokenizer)

    assert names(checkpoints.folder) == ["step-00000002"]


def test_every_save_has_a_session_of_its_own(
    checkpoints: Checkpoints, tokenizer: Tokenizer
) -> None:
    save_steps(checkpoints, tokenizer, 2, 4)

    sessions = {
        read_state(path / "state.json").session for path in finished_checkpoints(checkpoints.folder)
    }

    assert len(sessions) == 2 and None not in sessions


def test_checkpoint_that_cannot_be_pruned_is_a_warning(
    checkpoints: Checkpoints,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_steps(checkpoints, tokenizer, 2, 4)
    replace = os.replace

    def refuse_old(source: Any, target: Any) -> None:
        if "step-00000002" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_old)
    save_steps(checkpoints, tokenizer, 6)

    assert names(checkpoints.folder) == ["step-00000002", "step-00000004", "step-00000006"]
    assert "step-00000002 could not be removed" in caplog.text


@pytest.mark.parametrize("part", ["weights.safetensors", "optimizer.pt", "config.yaml"])
def test_part_that_the_manifest_does_not_vouch_for_is_damage(
    checkpoints: Checkpoints, tokenizer: Tokenizer, part: str
) -> None:
    save_steps(checkpoints, tokenizer, 2, 4)
    manifest = checkpoints.folder / "step-00000004" / "manifest.json"
    lines = manifest.read_text().replace(f'"{part}"', f'"{part}x"')
    manifest.write_text(lines)

    assert resume(checkpoints, tokenizer).step == 2


class Faults:
    """Makes the n-th call that changes the disk fail; counts all of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int) -> None:
        self.calls, self.fail_at = 0, fail_at
        for module, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (os, "symlink")):
            monkeypatch.setattr(module, name, self._failing(getattr(module, name)))

    def _failing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.fail_at:
                raise OSError(errno.EIO, "Input/output error")
            return function(*arguments, **options)

        return call


@pytest.mark.slow
def test_disk_that_fails_at_any_place_leaves_whole_checkpoints(
    checkpoints: Checkpoints, tokenizer: Tokenizer
) -> None:
    """Once for each call that changes the disk. The same save again ends as without the fault."""
    fail_at, is_past_the_end = 0, False
    while not is_past_the_end:
        fail_at += 1
        shutil.rmtree(checkpoints.folder, ignore_errors=True)
        save_steps(checkpoints, tokenizer, 2, 4, best_step=2)

        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, fail_at)
            try:
                save_steps(checkpoints, tokenizer, 6, best_step=6)
            except RunError as error:
                assert "the checkpoint could not be written (OSError" in str(error)
            is_past_the_end = faults.calls < fail_at

        state = resume(checkpoints, tokenizer)
        assert state.step in (4, 6), fail_at
        save_steps(checkpoints, tokenizer, 6, 8, best_step=6)
        assert resume(checkpoints, tokenizer).best_step == 6
        expected = {"best", "step-00000006", "step-00000008"}
        others = {*names(checkpoints.folder)} - expected
        # What could not be removed stays visible.
        assert expected <= {*names(checkpoints.folder)} and others <= {"step-00000002"}, fail_at

    assert fail_at > 20
