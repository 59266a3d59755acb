"""The pictures of a run as cards. page.js filters and sorts them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from coupalign.report.groups import KINDS, groups_of
from coupalign.report.pictures import SavedPicture, read_pictures, read_strip
from coupalign.report.scores import percent

_GROUPS = {"best": "Best", "median": "Median", "worst": "Worst", "random": "Random"}
_SORTS = {
    "place": "as chosen",
    "iou": "IoU",
    "boundary": "boundary IoU",
    "size": "size of the object",
    "others": "others of its class",
}
_MAX_WIDTH = 1100  # pixels; wider pictures are reduced
_MAX_PNG_PIXELS = 200_000  # larger pictures are embedded as JPEG
_JPEG_QUALITY = 88
_NOTE = (
    "Image, truth, prediction, the difference of the masks and of their boundaries. Click to "
    "enlarge. Best and worst are chosen among the samples that rank 0 scored."
)


@dataclass
class _Card:
    """A sample of the gallery: its picture and the groups that it is in."""

    picture: SavedPicture
    groups: list[str]
    tags: list[str]


def picture_section(split: str, folder: Path) -> str:
    """Show the pictures of one split; empty if its folder has none."""
    groups = _sorted_groups(read_pictures(folder))
    if not groups:
        return ""
    cards = _cards_of(groups)

    figures = [_figure(number, folder, card) for number, card in enumerate(cards)]
    used_tags = {tag for card in cards for tag in card.tags}
    controls = _controls(list(groups), used_tags)
    return (
        f'<section class="gallery"><h2>Predictions: {escape(split)}</h2>'
        f'<p class="quiet">{_NOTE}</p>'
        f'{controls}<div class="grid">{"".join(figures)}</div></section>'
    )


def embedded(file: Path, heading: int = 0) -> str:
    """Return a picture without its uppermost `heading` pixels as a data URL.

    Wide pictures are reduced, large ones become JPEG.
    """
    picture = read_strip(file)
    top = min(heading, picture.height - 1)
    picture = picture.crop((0, top, picture.width, picture.height))
    if picture.width > _MAX_WIDTH:
        height = max(1, round(picture.height * _MAX_WIDTH / picture.width))
        picture = picture.resize((_MAX_WIDTH, height))

    stream = io.BytesIO()
    if picture.width * picture.height <= _MAX_PNG_PIXELS:
        kind = "png"
        picture.save(stream, kind)
    else:
        kind = "jpeg"
        picture.save(stream, kind, quality=_JPEG_QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def _sorted_groups(groups: dict[str, list[SavedPicture]]) -> dict[str, list[SavedPicture]]:
    """Known groups first, in our order, then any others by name."""
    known = [group for group in _GROUPS if group in groups]
    others = sorted(group for group in groups if group not in _GROUPS)
    return {group: groups[group] for group in [*known, *others]}


def _cards_of(groups: dict[str, list[SavedPicture]]) -> list[_Card]:
    """One card per sample, even if it is in several groups."""
    cards: dict[str, _Card] = {}
    for group, pictures in groups.items():
        for picture in pictures:
            card = cards.setdefault(picture.name, _Card(picture, [], _tags(picture)))
            # The same sample may be explained in one of its groups only.
            if picture.why and not card.picture.why:
                card.picture = picture
            if group not in card.groups:
                card.groups.append(group)
    return list(cards.values())


def _tags(picture: SavedPicture) -> list[str]:
    """The groups of the score tables that a sample is in, as "<kind>:<index of the label>"."""
    groups = groups_of(picture.sentence, picture.area, picture.pixels, picture.same_class)
    tags = []
    for kind, labels in groups.items():
        for label in labels:
            tags.append(f"{kind}:{KINDS[kind].labels.index(label)}")
    return tags


def _controls(groups: Sequence[str], used_tags: set[str]) -> str:
    """The form that page.js listens to; hidden if scripts do not run."""
    buttons = []
    for group in groups:
        label = escape(_GROUPS.get(group, group))
        buttons.append(f'<button type="button" data-group="{escape(group)}">{label}</button>')

    choices = []
    for kind, (heading, labels, _) in KINDS.items():
        for index, label in enumerate(labels):
            tag = f"{kind}:{index}"
            if tag in used_tags:
                choices.append(f'<option value="{tag}">{heading}: {label}</option>')

    sorts = [f'<option value="{key}">{label}</option>' for key, label in _SORTS.items()]
    return (
        '<form class="controls" hidden>'
        '<input type="search" aria-label="filter" placeholder="words of the sentence">'
        '<span class="buttons"><button type="button" data-group="" class="on">All</button>'
        f"{''.join(buttons)}</span>"
        '<label>of <select name="tag"><option value="">every kind</option>'
        f"{''.join(choices)}</select></label>"
        f'<label>sorted by <select name="sort">{"".join(sorts)}</select></label>'
        '<button type="button" name="order">lowest first</button><output></output></form>'
    )


def _figure(number: int, folder: Path, card: _Card) -> str:
    """One card as HTML.

    Args:
        number: of the card, the order in which cards are shown first.
        folder: of the pictures.
    """
    picture = card.picture
    size = 100 * picture.area / picture.pixels if picture.pixels else None
    data = {
        "place": number,
        "groups": " ".join(card.groups),
        "tags": " ".join(card.tags),
        "iou": picture.iou,
        "boundary": picture.boundary,
        "size": size,
        "others": picture.same_class if picture.same_class >= 0 else None,
    }
    attributes = [
        f' data-{name}="{escape(str(value))}"' for name, value in data.items() if value is not None
    ]
    facts = [f"<span>{fact}</span>" for fact in _facts(picture, size)]
    badges = [f'<i class="{escape(group)}">{escape(group)}</i>' for group in card.groups]

    why = ""
    if picture.why:
        heat_maps = _image(folder / picture.why, "heat maps")
        why = f"<details><summary>What the model looked at</summary>{heat_maps}</details>"
    return (
        f"<figure{''.join(attributes)}>"
        f"{_image(folder / picture.file, picture.sentence, picture.heading)}"
        f"<figcaption><q>{escape(picture.sentence)}</q>"
        f"<p>{''.join(facts)}</p>"
        f"<p><small>{escape(picture.name)}</small>{''.join(badges)}</p></figcaption>{why}</figure>"
    )


def _facts(picture: SavedPicture, size: float | None) -> Iterator[str]:
    yield f"IoU <b>{percent(picture.iou)}</b>"
    if picture.boundary is not None:
        yield f"boundary IoU <b>{percent(picture.boundary)}</b>"
    if size is not None:
        yield f"size {size:.1f} %"
    if picture.same_class >= 0:
        plural = "" if picture.same_class == 1 else "s"
        yield f"{picture.same_class} other{plural} of its class"


def _image(file: Path, text: str, heading: int = 0) -> str:
    return f'<img alt="{escape(text)}" src="{embedded(file, heading)}">'
