"""The page of a run in a real browser, from a file, without a network."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from coupalign.report import report_run
from tests.unit.report.examples import EVIL, SENTENCES, write_run

pytestmark = pytest.mark.slow
SHOWN = "figure:not([hidden])"


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    return report_run(
        write_run(tmp_path_factory.mktemp("runs") / "demo & <i>more", per_group=3)
    ).as_uri()


@pytest.fixture
def page(browser: Browser, report: str) -> Iterator[Page]:
    """The opened page; whatever it complains about or asks for fails the test."""
    context = browser.new_context(offline=True, viewport={"width": 1400, "height": 1000})
    opened, complaints = context.new_page(), []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: complaints.append(f"dialog: {dialog.message}"))
    opened.on(
        "request",
        lambda request: (
            complaints.append(request.url)
            if not request.url.startswith((report, "data:"))
            else None
        ),
    )
    opened.goto(report)
    yield opened
    assert complaints == []
    context.close()


def values(page: Page, name: str) -> list[float | None]:
    """A field of the cards that are shown, in the order in which they stand."""
    return page.eval_on_selector_all(
        SHOWN, f"cards => cards.map(card => '{name}' in card.dataset ? +card.dataset.{name} : null)"
    )


def quotes(page: Page) -> list[str]:
    return page.locator(f"{SHOWN} q").all_text_contents()


def test_every_picture_is_there_and_nothing_is_wider_than_the_page(page: Page, shoot):
    images = page.locator("img")
    assert images.count() > 6
    assert page.evaluate(
        "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
    )
    shoot(page, "report")
    for width in (1400, 800, 400):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.scrollingElement.scrollWidth") == width
    shoot(page, "report-phone")


def test_quoted_words_stay_words(page: Page):
    assert set(quotes(page)) <= set(SENTENCES) and EVIL in page.locator("pre").text_content()
    assert "</script><b>you" in " ".join(quotes(page)) or EVIL in quotes(page)
    assert (
        page.title().startswith("demo & <i>more")
        and page.locator("figcaption b b, figcaption script, h1 i").count() == 0
    )
    assert page.locator("script").count() == 1


def test_the_filter_hides_and_shows(page: Page, shoot):
    everything = quotes(page)
    search, output = page.get_by_label("filter"), page.locator("output")
    assert (
        output.text_content() == f"{len(everything)} of {len(everything)}" and len(everything) > 4
    )
    search.fill("LEFT")
    assert quotes(page) == [quote for quote in everything if "left" in quote] and 0 < len(
        quotes(page)
    ) < len(everything)
    assert output.text_content() == f"{len(quotes(page))} of {len(everything)}"
    shoot(page, "report-filter")
    search.fill("no such words")
    assert quotes(page) == []
    search.fill("")
    assert quotes(page) == everything


def test_the_buttons_show_a_group(page: Page):
    everything = quotes(page)
    for name in ("Best", "Median", "Worst", "Random"):
        page.get_by_role("button", name=name, exact=True).click()
        groups = page.eval_on_selector_all(
            SHOWN, "cards => cards.map(card => card.dataset.groups.split(' '))"
        )
        assert len(groups) == 3 and all(name.lower() in each for each in groups)
        assert page.locator("button.on").text_content() == name
    page.get_by_role("button", name="All", exact=True).click()
    assert quotes(page) == everything


def test_the_kinds_of_the_tables_choose_pictures(page: Page):
    kinds = page.locator("[name=tag]")
    kinds.select_option(label="Size of the object: over 16 %")
    assert values(page, "size") and all(size >= 16 for size in values(page, "size"))
    kinds.select_option(label="Words of the sentence: place")
    assert quotes(page) and all(
        {"left", "close", "back"} & set(quote.split()) for quote in quotes(page)
    )
    kinds.select_option(label="every kind")
    assert len(quotes(page)) > 4


@pytest.mark.parametrize("name", ["iou", "boundary", "size", "others"])
def test_sorting_changes_the_order(page: Page, name: str):
    before, sort, order = (
        values(page, "place"),
        page.locator("[name=sort]"),
        page.locator("[name=order]"),
    )
    assert before == sorted(before)
    sort.select_option(name)
    known = [value for value in values(page, name) if value is not None]
    assert known == sorted(known) and values(page, name)[: len(known)] == known
    order.click()
    assert values(page, name)[: len(known)] == known[::-1] and len(set(known)) > 1
    order.click()
    sort.select_option("place")
    assert values(page, "place") == before


def test_a_click_enlarges_and_another_closes(page: Page, shoot):
    page.locator("figure summary").first.click()
    page.locator("figure img").first.click()
    assert page.locator("dialog[open] img").evaluate("image => image.naturalWidth") > 0
    shoot(page, "report-enlarged")
    page.locator("dialog").click()
    page.wait_for_selector("dialog", state="detached")


def test_without_scripts_everything_is_shown(browser: Browser, report: str):
    context = browser.new_context(offline=True, java_script_enabled=False)
    page = context.new_page()
    page.goto(report)
    assert page.locator("figure").count() > 4 and all(
        figure.is_visible() for figure in page.locator("figure").all()
    )
    assert not page.locator(".controls").is_visible()
    context.close()


def test_the_policy_of_the_page_lets_no_other_script_run(browser: Browser, report: str):
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(report)
    page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.broken = true";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<img src='data:,x' onerror='window.broken = true'>");
    }""")
    page.wait_for_function("document.images[document.images.length - 1].complete")
    assert page.evaluate("window.broken") is None
    context.close()
