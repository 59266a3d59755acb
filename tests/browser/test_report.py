"""The page of a run in a real browser, from a file, without a network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request

from coupalign.report import report_run
from tests.unit.report.examples import EVIL, SENTENCES, write_run

pytestmark = pytest.mark.slow
SHOWN = "figure:not([hidden])"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("runs") / "demo & <i>more"
    return report_run(write_run(folder, per_group=3)).as_uri()


@pytest.fixture
def page(browser: Browser, report: str) -> Iterator[Page]:
    """The opened page. The test fails if it complains about anything or asks for other files."""
    context = browser.new_context(offline=True, viewport={"width": 1400, "height": 1000})
    opened, complaints = context.new_page(), []

    def note_request(request: Request) -> None:
        if not request.url.startswith((report, "data:")):
            complaints.append(request.url)

    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    opened.on("request", note_request)

    opened.goto(report)
    yield opened
    assert complaints == []
    context.close()


def shown_values(page: Page, name: str) -> list[float | None]:
    """A data field of the cards that are shown, in their order."""
    script = f"cards => cards.map(card => '{name}' in card.dataset ? +card.dataset.{name} : null)"
    return page.eval_on_selector_all(SHOWN, script)


def shown_sentences(page: Page) -> list[str]:
    return page.locator(f"{SHOWN} q").all_text_contents()


def test_all_pictures_load_and_nothing_is_wider_than_page(page: Page, shoot):
    assert page.locator("img").count() > 6
    loaded = "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    assert page.evaluate(loaded)
    shoot(page, "report")

    for width in (1400, 800, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.scrollingElement.scrollWidth") == width
    shoot(page, "report-phone")


def test_quoted_text_stays_text(page: Page):
    sentences = shown_sentences(page)

    assert set(sentences) <= set(SENTENCES)
    assert "</script><b>you" in " ".join(sentences) or EVIL in sentences
    assert EVIL in page.locator("pre").text_content()
    assert page.title().startswith("demo & <i>more")
    assert page.locator("figcaption b b, figcaption script, h1 i").count() == 0
    assert page.locator("script").count() == 1


def test_filter_hides_and_shows_cards(page: Page, shoot):
    everything = shown_sentences(page)
    search, output = page.get_by_label("filter"), page.locator("output")
    assert len(everything) > 4
    assert output.text_content() == f"{len(everything)} of {len(everything)}"

    search.fill("LEFT")
    matching = shown_sentences(page)
    assert matching == [sentence for sentence in everything if "left" in sentence]
    assert 0 < len(matching) < len(everything)
    assert output.text_content() == f"{len(matching)} of {len(everything)}"
    shoot(page, "report-filter")

    search.fill("no such words")
    assert shown_sentences(page) == []

    search.fill("")
    assert shown_sentences(page) == everything


def test_buttons_show_one_group(page: Page):
    everything = shown_sentences(page)
    groups_script = "cards => cards.map(card => card.dataset.groups.split(' '))"

    for name in ("Best", "Median", "Worst", "Random"):
        page.get_by_role("button", name=name, exact=True).click()
        groups = page.eval_on_selector_all(SHOWN, groups_script)
        assert len(groups) == 3
        assert all(name.lower() in card for card in groups)
        assert page.locator("button.on").text_content() == name

    page.get_by_role("button", name="All", exact=True).click()
    assert shown_sentences(page) == everything


def test_kinds_of_score_tables_select_pictures(page: Page):
    kinds = page.locator("[name=tag]")

    kinds.select_option(label="Size of the object: over 16 %")
    sizes = shown_values(page, "size")
    assert sizes
    assert all(size >= 16 for size in sizes)

    kinds.select_option(label="Words of the sentence: place")
    sentences = shown_sentences(page)
    assert sentences
    assert all({"left", "close", "back"} & set(sentence.split()) for sentence in sentences)

    kinds.select_option(label="every kind")
    assert len(shown_sentences(page)) > 4


@pytest.mark.parametrize("name", ["iou", "boundary", "size", "others"])
def test_sorting_changes_order(page: Page, name: str):
    sort, order = page.locator("[name=sort]"), page.locator("[name=order]")
    before = shown_values(page, "place")
    assert before == sorted(before)

    # Cards without a value come last in both orders.
    sort.select_option(name)
    values = shown_values(page, name)
    known = [value for value in values if value is not None]
    assert known == sorted(known)
    assert len(set(known)) > 1
    assert values[: len(known)] == known

    order.click()
    assert shown_values(page, name)[: len(known)] == known[::-1]

    order.click()
    sort.select_option("place")
    assert shown_values(page, "place") == before


def test_click_enlarges_picture_and_another_closes_it(page: Page, shoot):
    page.locator("figure summary").first.click()
    page.locator("figure img").first.click()

    assert page.locator("dialog[open] img").evaluate("image => image.naturalWidth") > 0
    shoot(page, "report-enlarged")

    page.locator("dialog").click()
    page.wait_for_selector("dialog", state="detached")


def test_everything_is_shown_without_scripts(browser: Browser, report: str):
    context = browser.new_context(offline=True, java_script_enabled=False)
    page = context.new_page()
    page.goto(report)

    figures = page.locator("figure").all()
    assert len(figures) > 4
    assert all(figure.is_visible() for figure in figures)
    assert not page.locator(".controls").is_visible()
    context.close()


def test_policy_of_page_allows_no_other_script(browser: Browser, report: str):
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(report)

    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.broken = true";
        document.body.append(script);
        const image = "<img src='data:,x' onerror='window.broken = true'>";
        document.body.insertAdjacentHTML("beforeend", image);
    }""")
    page.wait_for_function("document.images[document.images.length - 1].complete")

    assert page.evaluate("window.broken") is None
    context.close()
