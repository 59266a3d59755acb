"""Scoring over ranks: the same integers for any number of them, nothing missing, nothing twice; the file of rows; pictures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from coupalign.data.batch import Batch, SampleInfo
from coupalign.data.transforms import frame_of
from coupalign.errors import InputError
from coupalign.evaluation.counting import Counted
from coupalign.evaluation.evaluator import Evaluation, Stopped, evaluate, with_language_blind
from coupalign.evaluation.metrics import ious, summarize
from coupalign.evaluation.protocols import PROTOCOLS, count_pixels, find_protocol
from coupalign.evaluation.rows import COLUMNS, Rows, read_rows, write_rows
from coupalign.evaluation.shelf import choose_pictures

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
    both_rules: bool = False
    skip: tuple[int, ...] = ()
    fingerprint: str = "f" * 64

    @property
    def words(self) -> list[tuple[str, str]]:
        return [
            (f"refshapes/none/{number // 2}/{number}", f'sentence {number}, "the" last')
            for number in range(self.samples)
        ]

    @property
    def members(self) -> dict[str, np.ndarray]:
        numbers = np.arange(self.samples)
        return {"each": numbers, "first": numbers[::2]} if self.both_rules else {"each": numbers}

    def __iter__(self) -> Iterator[Batch]:
        per_rank = -(-self.samples // self.ranks)
        mine = [(self.rank + place * self.ranks) % self.samples for place in range(per_rank)]
        for start in range(0, per_rank, self.batch):
            yield self.collate(
                [number for number in mine[start : start + self.batch] if number not in self.skip]
            )

    def collate(self, numbers: list[int]) -> Batch:
        infos = tuple(self.info(number) for number in numbers)
        images = torch.stack(
            [torch.full((3, SIZE, SIZE), info.number, dtype=torch.uint8) for info in infos]
        )
        words = torch.zeros(len(infos), 5, dtype=torch.int64)
        return Batch(images, words, words == 0, None, infos)

    def info(self, number: int) -> SampleInfo:
        random = np.random.default_rng(number)
        height, width = random.integers(10, 30, 2).tolist()
        truth = np.zeros((height, width), bool)
        truth[height // 4 : height // 2, width // 4 : width * 3 // 4] = True
        image = np.full((height, width, 3), number, np.uint8) if self.images else None
        return SampleInfo(
            number,
            *self.words[number],
            frame_of(height, width, SIZE, "letterbox"),
            image_id=number // 4,
            category="star",
            same_class=number % 3 - 1,
            truth=truth,
            image=image,
            cut=number % 5 == 0,
        )


def infer(batch: Batch) -> torch.Tensor:
    """A model whose answer to a sample depends on nothing but the sample."""
    answers = [
        torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(int(image[0, 0, 0])))
        for image in batch.image
    ]
    return torch.stack(answers) + 0.3


def evaluate_one(loader: Loader, protocol: str = "ris-v1", answer=infer, **options) -> Evaluation:
    """The evaluation under one protocol, every sentence a sample."""
    return evaluate(answer, loader, [find_protocol(protocol)], **{"bootstrap": 0, **options})[
        protocol, "each"
    ]


def score_over(ranks: int, protocol: str = "ris-v1", **changes) -> list[Evaluation]:
    """What each of `ranks` ranks gets, one after another in this process."""
    shares: list[np.ndarray] = []

    def collect(rows: np.ndarray) -> np.ndarray:
        shares.append(rows)
        return rows

    rank_loaders = [replace(Loader(**changes), rank=rank, ranks=ranks) for rank in range(ranks)]
    for loader in rank_loaders:
        try:
            evaluate_one(loader, protocol, gather=collect)
        except AssertionError:
            assert ranks > 1  # a share of the rows is not complete, as it must be found
    everybody = np.concatenate(shares)
    return [
        evaluate_one(loader, protocol, gather=lambda _: everybody, rank=loader.rank, bootstrap=20)
        for loader in rank_loaders
    ]


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
    expected = summarize(result.rows[:, :5], 20, clusters=np.arange(23) // 4)
    assert result.score.metrics == {name: expected[name] for name in result.score.metrics}
    assert dict(result.score.intervals) == expected["intervals"]
    assert (result.score.samples, result.score.images, result.score.fingerprint) == (
        23,
        6,
        "f" * 64,
    )
    assert result.score.conditions["cut"].startswith("5 sentences")


def test_rows_are_those_of_the_protocol_sample_by_sample():
    loader = Loader()
    for number, *counted, image, area, pixels, same_class in evaluate_one(loader).rows.tolist():
        info = loader.info(number)
        prediction = RIS.predict(infer(loader.collate([number])), info.frame)
        assert counted == count_pixels(prediction, torch.from_numpy(info.truth)[None])[0].tolist()
        assert (image, area, pixels, same_class) == (
            number // 4,
            info.truth.sum(),
            info.truth.size,
            number % 3 - 1,
        )


def test_one_pass_gives_what_a_pass_for_each_protocol_gives_and_asks_the_model_once():
    asked: list[int] = []

    def counting(batch: Batch) -> torch.Tensor:
        asked.extend(info.number for info in batch.info)
        return infer(batch)

    together = evaluate(counting, Loader(both_rules=True), list(PROTOCOLS.values()), bootstrap=20)
    assert sorted(asked) == list(range(23))
    assert list(together) == [(name, rule) for name in PROTOCOLS for rule in ("each", "first")]
    for name in PROTOCOLS:
        alone = evaluate_one(Loader(), name, bootstrap=20)
        assert (
            together[name, "each"].rows.tolist() == alone.rows.tolist()
            and together[name, "each"].score == alone.score
        )
        first = together[name, "first"]
        assert first.rows.tolist() == alone.rows[::2].tolist()
        assert (first.score.sentences, first.score.protocol, first.score.samples) == (
            "first",
            name,
            12,
        )
        assert first.score.metrics["bIoU"] == pytest.approx(
            summarize(alone.rows[::2, :5], 0)["bIoU"], abs=1e-12
        )


def test_a_batch_is_read_once_the_next_one_is_under_way(monkeypatch: pytest.MonkeyPatch):
    """So that a GPU has work while the host waits for the numbers of the batch before."""
    told: list[str] = []
    read = Counted.rows

    def infer_and_tell(batch: Batch) -> torch.Tensor:
        told.append(f"infer {batch.info[0].number}")
        return infer(batch)

    def read_and_tell(counted: Counted) -> np.ndarray:
        told.append(f"read {min(info.number for info in counted.infos)}")
        return read(counted)

    monkeypatch.setattr(Counted, "rows", read_and_tell)
    evaluate_one(Loader(samples=12), answer=infer_and_tell)
    assert told == ["infer 0", "infer 4", "read 0", "infer 8", "read 4", "read 8"]


def test_a_stop_is_asked_for_before_each_batch():
    asked: list[str] = []
    answers = iter([False, False, True])

    def answer(batch: Batch) -> torch.Tensor:
        asked.append("batch")
        return infer(batch)

    def stopped() -> bool:
        asked.append("stopped?")
        return next(answers)

    with pytest.raises(Stopped):
        evaluate_one(Loader(), answer=answer, stopped=stopped)
    assert asked == ["stopped?", "batch", "stopped?", "batch", "stopped?"]


def test_conditions_are_printed_with_the_score():
    score = evaluate_one(
        Loader(), conditions=lambda protocol, rule: {"threshold": protocol.threshold, "rule": rule}
    ).score
    assert (
        "p > 0.5" in score.table()
        and "ris-v1" in score.table()
        and "rule       each" in score.table()
    )


def test_a_missing_sample_is_named():
    with pytest.raises(
        AssertionError,
        match="2 of 23 samples were not scored: refshapes/none/1/3, refshapes/none/8/17",
    ):
        evaluate_one(Loader(skip=(3, 17)))


def test_ranks_that_disagree_about_a_sample_are_found():
    def disturbed(rows: np.ndarray, column: int) -> np.ndarray:
        other = rows[5:6].copy()
        other[0, column] += 1
        return np.concatenate([rows, other])

    for column in range(1, 15):
        with pytest.raises(AssertionError, match="sample 5 was scored twice"):
            evaluate(
                infer,
                Loader(),
                [RIS, find_protocol("lavt")],
                gather=partial(disturbed, column=column),
            )


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_broken_logits_are_named_and_never_scored(poison: float):
    def broken(batch: Batch) -> torch.Tensor:
        logits = infer(batch)
        logits[[info.number in (2, 9) for info in batch.info], 0, 0] = poison
        return logits

    with pytest.raises(
        FloatingPointError, match="2 of 23 samples: refshapes/none/1/2, refshapes/none/4/9"
    ):
        evaluate_one(Loader(), answer=broken)


def test_an_empty_split_is_an_error():
    with pytest.raises(InputError, match="no samples"):
        evaluate_one(Loader(samples=0))


def test_language_blind_is_printed_beside_and_must_be_of_the_same_samples():
    score, other = (evaluate_one(Loader(samples=n)).score for n in (8, 9))
    both = with_language_blind(score, score)
    assert both.to_json()["language_blind_oIoU"] == score.metrics["oIoU"]
    with pytest.raises(AssertionError, match="other samples"):
        with_language_blind(score, other)


# ------------------------------------------------------------------------------------------------- the file of rows


def test_rows_survive_the_file(tmp_path: Path):
    rows = Rows.of(evaluate_one(Loader()).rows, Loader().words)
    path = tmp_path / "rows.csv"
    write_rows(path, rows)
    again = read_rows(path)
    assert (
        (again.names, again.sentences)
        == (rows.names, rows.sentences)
        == tuple(zip(*Loader().words))
    )
    for field in ("counts", "image_ids", "area", "pixels", "same_class"):
        assert getattr(again, field).tolist() == getattr(rows, field).tolist(), field
    lines = path.read_text().splitlines()
    assert (
        lines[0]
        == (
            "sample_id,intersection,union,iou,boundary_intersection,boundary_union,image_id,area,pixels,same_class,"
            "sentence"
        )
        and len(lines) == 24
    )
    assert [float(line.split(",")[3]) for line in lines[1:]] == pytest.approx(
        ious(rows.counts), abs=1e-6
    )
    assert list(tmp_path.iterdir()) == [path]
    some = again.take(np.asarray([4, 2]))
    assert (
        some.names == (rows.names[4], rows.names[2])
        and some.area.tolist() == rows.area[[4, 2]].tolist()
        and len(some) == 2
    )


def test_rows_of_one_rule_keep_their_own_names(tmp_path: Path):
    loader = Loader(both_rules=True)
    rows = Rows.of(
        evaluate(infer, loader, [RIS], bootstrap=0)["ris-v1", "first"].rows, loader.words
    )
    assert rows.names == tuple(name for name, _ in loader.words[::2])
    write_rows(tmp_path / "first.csv", rows)
    assert read_rows(tmp_path / "first.csv").counts[:, 0].tolist() == list(range(12)), (
        "numbered anew"
    )


def test_a_failed_writing_leaves_the_old_file(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text("old")
    rows = Rows.of(evaluate_one(Loader()).rows, Loader().words)
    with pytest.raises(ValueError):
        write_rows(path, replace(rows, names=rows.names[:-1]))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


HEAD = ",".join(COLUMNS) + "\n"


@pytest.mark.parametrize(
    "text, place",
    [
        ("", "line 1"),
        ("a,b\n", "line 1"),
        (f"{HEAD}x,1,2,0.5,1,2,9,1,4,-1,the one\ny,1\n", "line 3"),
        (f"{HEAD}x,one,2,0.5,1,2,9,1,4,-1,the one\n", "line 2"),
        (
            "sample_id,intersection,union,iou\nx,1,2,0.5\n",
            "line 1: .*earlier version.*coupalign eval",
        ),
    ],
)
def test_a_foreign_or_old_file_of_rows_is_refused(tmp_path: Path, text: str, place: str):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=f"rows.csv: {place}"):
        read_rows(path)


def test_an_absent_file_of_rows_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="none.csv"):
        read_rows(tmp_path / "none.csv")


# ------------------------------------------------------------------------------------------------------- pictures


def test_pictures_hold_the_extremes_exactly_and_stay_few():
    result = evaluate_one(Loader(samples=200, images=True), pictures=3)
    groups = choose_pictures(result.pictures, result.rows, 3)
    values = ious(result.rows)
    assert [picture.iou for picture in groups["best"]] == sorted(values)[::-1][:3]
    assert [picture.iou for picture in groups["worst"]] == sorted(values)[:3]
    assert all(abs(picture.iou - np.median(values)) < 0.1 for picture in groups["median"])
    assert len({picture.number for picture in groups["random"]}) == 3
    assert len(result.pictures) <= 3 + 3 + 12
    for picture in result.pictures:
        assert picture.image[0, 0, 0] == picture.number
        inside, union = (
            (picture.prediction & picture.truth).sum(),
            (picture.prediction | picture.truth).sum(),
        )
        assert picture.iou == inside / union == values[picture.number]


def test_random_pictures_are_a_fair_draw():
    """The shelf also holds extremes; they must not be likelier to be shown as random."""
    result = evaluate_one(Loader(samples=250, images=True), pictures=12)
    drawn = choose_pictures(result.pictures, result.rows, 12)["random"]
    share = np.mean([np.mean(ious(result.rows) < picture.iou) for picture in drawn])
    assert 0.3 < share < 0.7
    other = evaluate_one(Loader(samples=250, images=True, batch=17), pictures=12)
    assert [picture.number for picture in drawn] == [
        p.number for p in choose_pictures(other.pictures, other.rows, 12)["random"]
    ]


def test_fewer_samples_than_pictures_are_all_shown():
    result = evaluate_one(Loader(samples=2, images=True), pictures=4)
    groups = choose_pictures(result.pictures, result.rows, 4)
    assert {name: len(group) for name, group in groups.items()} == {
        "random": 2,
        "best": 2,
        "median": 2,
        "worst": 2,
    }
    assert evaluate_one(Loader()).pictures == ()
