"""The pictures of a run: cards that a person filters and sorts (page.js does that)."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html import escape
from pathlib import Path

from PIL import Image

from coupalign.report.groups import KINDS, groups_of
from coupalign.report.pictures import SavedPicture, read_pictures
from coupalign.report.scores import percent

_GROUPS = {"best": "Best", "median": "Median", "worst": "Worst", "random": "Random"}
_SORTS = {
    "place": "as chosen",
    "iou": "IoU",
    "boundary": "boundary IoU",
    "size": "size of the object",
    "others": "others of its class",
}
_EMBEDDED_WIDTH = 1100  # pixels; wider pictures are reduced
_PNG_PIXELS = 200_000  # larger pictures are embedded as JPEG
_NOTE = (
    "Image, truth, prediction, the difference of the masks and of their boundaries; a click enlarges. Best and worst are those of "
    "the samples that the first rank scored."
)


def picture_section(split: str, folder: Path) -> str:
    """The pictures of one split; nothing where its folder has none."""
    groups = read_pictures(folder)
    groups = {
        group: groups[group]
        for group in [*filter(groups.__contains__, _GROUPS), *sorted(set(groups) - set(_GROUPS))]
    }
    if not groups:
        return ""
    shown: dict[
        str, SavedPicture
    ] = {}  # a sample that is in several groups is shown once, explained where any of them is
    for kept in [kept for members in groups.values() for kept in members]:
        if kept.name not in shown or kept.why and not shown[kept.name].why:
            shown[kept.name] = kept
    member_of = {
        name: [
            group for group, members in groups.items() if name in {kept.name for kept in members}
        ]
        for name in shown
    }
    tags = {name: _tags(kept) for name, kept in shown.items()}
    cards = "".join(
        _card(place, folder, kept, member_of[name], tags[name])
        for place, (name, kept) in enumerate(shown.items())
    )
    controls = _controls(list(groups), {tag for some in tags.values() for tag in some})
    return (
        f'<section class="gallery"><h2>Predictions: {escape(split)}</h2><p class="quiet">{_NOTE}</p>'
        f'{controls}<div class="grid">{cards}</div></section>'
    )


def _tags(kept: SavedPicture) -> list[str]:
    """The groups of the tables that a sample belongs to, "<kind>:<number of its label>"."""
    return [
        f"{kind}:{KINDS[kind][1].index(label)}"
        for kind, labels in groups_of(
            kept.sentence, kept.area, kept.pixels, kept.same_class
        ).items()
        for label in labels
    ]


def _controls(groups: list[str], tags: set[str]) -> str:
    """What page.js listens to; hidden where scripts do not run."""
    buttons = "".join(
        f'<button type="button" data-group="{escape(group)}">{escape(_GROUPS.get(group, group))}</button>'
        for group in groups
    )
    choices = "".join(
        f'<option value="{kind}:{number}">{heading}: {label}</option>'
        for kind, (heading, labels, _) in KINDS.items()
        for number, label in enumerate(labels)
        if f"{kind}:{number}" in tags
    )
    sorts = "".join(f'<option value="{key}">{label}</option>' for key, label in _SORTS.items())
    return (
        f'<form class="controls" hidden><input type="search" aria-label="filter" placeholder="words of the sentence">'
        f'<span class="buttons"><button type="button" data-group="" class="on">All</button>{buttons}</span>'
        f'<label>of <select name="tag"><option value="">every kind</option>{choices}</select></label>'
        f'<label>sorted by <select name="sort">{sorts}</select></label>'
        f'<button type="button" name="order">lowest first</button><output></output></form>'
    )


def _card(place: int, folder: Path, kept: SavedPicture, groups: list[str], tags: list[str]) -> str:
    size = 100 * kept.area / kept.pixels if kept.pixels else None
    data = {
        "place": place,
        "groups": " ".join(groups),
        "tags": " ".join(tags),
        "iou": kept.iou,
        "boundary": kept.boundary,
        "size": size,
        "others": kept.same_class if kept.same_class >= 0 else None,
    }
    attributes = "".join(
        f' data-{name}="{escape(str(value))}"' for name, value in data.items() if value is not None
    )
    badges = "".join(f'<i class="{escape(group)}">{escape(group)}</i>' for group in groups)
    facts = "".join(f"<span>{fact}</span>" for fact in _facts(kept, size))
    why = (
        f"<details><summary>What the model looked at</summary>{_image(folder / kept.why, 'heat maps')}</details>"
        if kept.why
        else ""
    )
    return (
        f"<figure{attributes}>{_image(folder / kept.file, kept.sentence, kept.heading)}<figcaption><q>{escape(kept.sentence)}</q>"
        f"<p>{facts}</p><p><small>{escape(kept.name)}</small>{badges}</p></figcaption>{why}</figure>"
    )


def _facts(kept: SavedPicture, size: float | None) -> Iterator[str]:
    yield f"IoU <b>{percent(kept.iou)}</b>"
    if kept.boundary is not None:
        yield f"boundary IoU <b>{percent(kept.boundary)}</b>"
    if size is not None:
        yield f"size {size:.1f} %"
    if kept.same_class >= 0:
        yield f"{kept.same_class} other{'' if kept.same_class == 1 else 's'} of its class"


def _image(file: Path, words: str, heading: int = 0) -> str:
    return f'<img alt="{escape(words)}" src="{embedded(file, heading)}">'


def embedded(file: Path, heading: int = 0) -> str:
    """A picture below its uppermost `heading` pixels as a data URL: reduced where it is wide, JPEG where it is large."""
    with Image.open(file) as opened:
        picture = opened.convert("RGB")
    picture = picture.crop((0, min(heading, picture.height - 1), picture.width, picture.height))
    if picture.width > _EMBEDDED_WIDTH:
        picture = picture.resize(
            (_EMBEDDED_WIDTH, max(1, round(picture.height * _EMBEDDED_WIDTH / picture.width)))
        )
    kind = "png" if picture.width * picture.height <= _PNG_PIXELS else "jpeg"
    stream = io.BytesIO()
    picture.save(stream, kind, **({"quality": 88} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"
