"""Scoring over ranks: the same integers for any number of them, nothing missing, nothing twice; the file of rows; pictures."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from coupalign.data.batch import Batch, SampleInfo
from coupalign.data.transforms import frame_of
from coupalign.errors import InputError
from coupalign.evaluation.evaluator import Evaluation, evaluate, read_rows, with_language_blind, write_rows
from coupalign.evaluation.metrics import ious, summarize
from coupalign.evaluation.pictures import choose_pictures
from coupalign.evaluation.protocols import PROTOCOLS, find_protocol

SIZE = 16
RIS = find_protocol("ris-v1")


@dataclass
class Loader:
    """The contract of the evaluation loader over samples made on the spot: rank r has r::ranks, padded with repeats."""

    samples: int = 23
    batch: int = 4
    rank: int = 0
    ranks: int = 1
    images: bool = False
    skip: tuple[int, ...] = ()
    fingerprint: str = "f" * 64

    @property
    def names(self) -> list[str]:
        return [f"refshapes/none/{number // 2}/{number}" for number in range(self.samples)]

    def __iter__(self) -> Iterator[Batch]:
        per_rank = -(-self.samples // self.ranks)
        mine = [(self.rank + place * self.ranks) % self.samples for place in range(per_rank)]
        for start in range(0, per_rank, self.batch):
            yield self.collate([number for number in mine[start:start + self.batch] if number not in self.skip])

    def collate(self, numbers: list[int]) -> Batch:
        infos = tuple(self.info(number) for number in numbers)
        images = torch.stack([torch.full((3, SIZE, SIZE), info.number, dtype=torch.uint8) for info in infos])
        words = torch.zeros(len(infos), 5, dtype=torch.int64)
        return Batch(images, words, words == 0, None, infos)

    def info(self, number: int) -> SampleInfo:
        random = np.random.default_rng(number)
        height, width = random.integers(10, 30, 2).tolist()
        truth = np.zeros((height, width), bool)
        truth[height // 4:height // 2, width // 4:width * 3 // 4] = True
        image = np.full((height, width, 3), number, np.uint8) if self.images else None
        return SampleInfo(number, self.names[number], f"sentence {number}", frame_of(height, width, SIZE, "letterbox"),
                          image_id=number // 4, category="star", truth=truth, image=image, cut=number % 5 == 0)


def infer(batch: Batch) -> torch.Tensor:
    """A model whose answer to a sample depends on nothing but the sample."""
    answers = [torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(int(image[0, 0, 0]))) for image in batch.image]
    return torch.stack(answers) + 0.3


def score_over(ranks: int, protocol: str = "ris-v1", **changes) -> list[Evaluation]:
    """What each of `ranks` ranks gets, one after another in this process."""
    shares: list[np.ndarray] = []

    def collect(rows: np.ndarray) -> np.ndarray:
        shares.append(rows)
        return rows

    rank_loaders = [replace(Loader(**changes), rank=rank, ranks=ranks) for rank in range(ranks)]
    for loader in rank_loaders:
        try:
            evaluate(infer, loader, find_protocol(protocol), gather=collect, bootstrap=0)
        except AssertionError:
            assert ranks > 1  # a share of the rows is not complete, as it must be found
    everybody = np.concatenate(shares)
    return [evaluate(infer, loader, find_protocol(protocol), gather=lambda _: everybody, rank=loader.rank, bootstrap=20)
            for loader in rank_loaders]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_one_two_and_three_ranks_give_the_same_integers(protocol: str):
    alone = score_over(1, protocol)[0]
    assert alone.rows[:, 0].tolist() == list(range(23))
    for ranks in (2, 3):
        for rank, result in enumerate(score_over(ranks, protocol)):
            assert result.rows.tolist() == alone.rows.tolist()
            assert result.score == (alone.score if rank == 0 else None)


def test_the_score_is_the_summary_of_the_rows_by_image():
    result = score_over(1)[0]
    expected = summarize(result.rows, 20, clusters=np.arange(23) // 4)
    assert result.score.metrics == {name: expected[name] for name in result.score.metrics}
    assert dict(result.score.intervals) == expected["intervals"]
    assert (result.score.samples, result.score.images, result.score.fingerprint) == (23, 6, "f" * 64)
    assert result.score.conditions["cut"].startswith("5 sentences")


def test_rows_are_those_of_the_protocol_sample_by_sample():
    loader = Loader()
    for number, inside, union in evaluate(infer, loader, RIS, bootstrap=0).rows.tolist():
        info = loader.info(number)
        assert (inside, union) == RIS.count(infer(loader.collate([number]))[0], info.frame, info.truth)


def test_conditions_are_printed_with_the_score():
    score = evaluate(infer, Loader(), RIS, bootstrap=0, conditions={"threshold": RIS.threshold}).score
    assert "p > 0.5" in score.table() and "ris-v1" in score.table()


def test_a_missing_sample_is_named():
    with pytest.raises(AssertionError, match="2 of 23 samples were not scored: refshapes/none/1/3, refshapes/none/8/17"):
        evaluate(infer, Loader(skip=(3, 17)), RIS)


def test_ranks_that_disagree_about_a_sample_are_found():
    def disturbed(rows: np.ndarray) -> np.ndarray:
        other = rows[5:6].copy()
        other[0, 2] += 1
        return np.concatenate([rows, other])

    with pytest.raises(AssertionError, match="sample 5 was scored twice"):
        evaluate(infer, Loader(), RIS, gather=disturbed)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_broken_logits_are_named_and_never_scored(poison: float):
    def broken(batch: Batch) -> torch.Tensor:
        logits = infer(batch)
        logits[[info.number in (2, 9) for info in batch.info], 0, 0] = poison
        return logits

    with pytest.raises(FloatingPointError, match="2 of 23 samples: refshapes/none/1/2, refshapes/none/4/9"):
        evaluate(broken, Loader(), RIS)


def test_an_empty_split_is_an_error():
    with pytest.raises(InputError, match="no samples"):
        evaluate(infer, Loader(samples=0), RIS)


def test_language_blind_is_printed_beside_and_must_be_of_the_same_samples():
    score, other = (evaluate(infer, Loader(samples=n), RIS, bootstrap=0).score for n in (8, 9))
    both = with_language_blind(score, score)
    assert both.to_json()["language_blind_oIoU"] == score.metrics["oIoU"]
    with pytest.raises(AssertionError, match="other samples"):
        with_language_blind(score, other)


# ------------------------------------------------------------------------------------------------- the file of rows


def test_rows_survive_the_file(tmp_path: Path):
    rows = evaluate(infer, Loader(), RIS, bootstrap=0).rows
    path = tmp_path / "rows.csv"
    write_rows(path, rows, Loader().names)
    again, names = read_rows(path)
    assert again.tolist() == rows.tolist() and names == Loader().names
    lines = path.read_text().splitlines()
    assert lines[0] == "sample_id,intersection,union,iou" and len(lines) == 24
    assert [float(line.split(",")[3]) for line in lines[1:]] == pytest.approx(ious(rows), abs=1e-6)
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_writing_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("old")
    with pytest.raises(IndexError):
        write_rows(path, np.asarray([[0, 1, 2], [1, 1, 2]], dtype=np.int64), ["only one name"])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text, place", [
    ("", "line 1"), ("a,b\n", "line 1"), ("sample_id,intersection,union,iou\nx,1,2,0.5\ny,1\n", "line 3"),
    ("sample_id,intersection,union,iou\nx,one,2,0.5\n", "line 2")])
def test_a_foreign_file_of_rows_is_refused(tmp_path: Path, text: str, place: str):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=f"rows.csv: {place}"):
        read_rows(path)


def test_an_absent_file_of_rows_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="none.csv"):
        read_rows(tmp_path / "none.csv")


# ------------------------------------------------------------------------------------------------------- pictures


def test_pictures_hold_the_extremes_exactly_and_stay_few():
    result = evaluate(infer, Loader(samples=200, images=True), RIS, bootstrap=0, pictures=3)
    groups = choose_pictures(result.pictures, result.rows, 3)
    values = ious(result.rows)
    assert [picture.iou for picture in groups["best"]] == sorted(values)[::-1][:3]
    assert [picture.iou for picture in groups["worst"]] == sorted(values)[:3]
    assert all(abs(picture.iou - np.median(values)) < 0.1 for picture in groups["median"])
    assert len({picture.number for picture in groups["random"]}) == 3
    assert len(result.pictures) <= 3 + 3 + 12
    for picture in result.pictures:
        assert picture.image[0, 0, 0] == picture.number
        inside, union = (picture.prediction & picture.truth).sum(), (picture.prediction | picture.truth).sum()
        assert picture.iou == inside / union == values[picture.number]


def test_random_pictures_are_a_fair_draw():
    """The shelf also holds extremes; they must not be likelier to be shown as random."""
    result = evaluate(infer, Loader(samples=250, images=True), RIS, bootstrap=0, pictures=12)
    drawn = choose_pictures(result.pictures, result.rows, 12)["random"]
    share = np.mean([np.mean(ious(result.rows) < picture.iou) for picture in drawn])
    assert 0.3 < share < 0.7
    other = evaluate(infer, replace(Loader(samples=250, images=True), batch=17), RIS, bootstrap=0, pictures=12)
    assert [picture.number for picture in drawn] == [p.number for p in choose_pictures(other.pictures, other.rows, 12)["random"]]


def test_fewer_samples_than_pictures_are_all_shown():
    result = evaluate(infer, Loader(samples=2, images=True), RIS, bootstrap=0, pictures=4)
    groups = choose_pictures(result.pictures, result.rows, 4)
    assert {name: len(group) for name, group in groups.items()} == {"random": 2, "best": 2, "median": 2, "worst": 2}
    assert evaluate(infer, Loader(), RIS, bootstrap=0).pictures == ()
