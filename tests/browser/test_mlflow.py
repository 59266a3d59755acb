"""MLflow's own page that compares two runs shows what distinguishes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from coupalign.config.load import flatten, read_config
from coupalign.tracking import open_tracker
from tests.browser.conftest import PATIENCE_MS
from tests.unit.tracking.test_mlflow import Server, client_of, run_id_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SCORES = {20: 0.7154, 0: 0.6321}  # by the number of proposals


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.kill()


@pytest.fixture(scope="module")
def address(server: Server, tmp_path_factory) -> str:
    """The page that compares two runs of the demo's configuration, with and without proposals."""
    ids = []
    for proposals, score in SCORES.items():
        run_dir = tmp_path_factory.mktemp("runs") / f"with-{proposals}"
        changes = [
            f"model.proposals.count={proposals}",
            f"run_dir={run_dir}",
            f"tracking.uri={server.uri}",
        ]
        config = read_config(ROOT / "configs" / "demo.yaml", changes)
        with open_tracker(
            config.tracking, run_dir, run_dir.name, rank=0, params=flatten(config)
        ) as tracker:
            for step in range(1, 21):
                tracker.log(step, {"train/loss": 2 / step})
            tracker.log(20, {"eval/val/oIoU": score, "eval/val/P@0.5": score + 0.1})
        ids.append(run_id_of(run_dir))
    experiment = client_of(server.uri).get_run(ids[0]).info.experiment_id

    query = f"runs={json.dumps(ids)}&experiments={json.dumps([experiment])}"
    return f"{server.uri}/#/compare-runs?{query}"


@pytest.fixture(scope="module")
def page(browser: Browser, address: str) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1500, "height": 1100})
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE_MS)
    opened.goto(address)
    yield opened
    context.close()


# Texts to the right of a text, by position: MLflow's tables are not always made of <tr>.
TEXTS_TO_THE_RIGHT = """name => {
    const texts = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const range = document.createRange();
        range.selectNodeContents(walker.currentNode);
        const box = range.getBoundingClientRect();
        if (box.width) texts.push({text: walker.currentNode.data.trim(), box});
    }
    const sameLine = (a, b) => b.left > a.right && b.top < a.bottom && b.bottom > a.top;
    return texts.filter(({text}) => text === name).map(({box}) => texts
        .filter(other => sameLine(box, other.box))
        .sort((a, b) => a.box.left - b.box.left).slice(0, 2).map(other => other.text));
}"""


def test_comparison_shows_what_distinguishes_runs(page: Page, shoot):
    expect(page.get_by_text("Comparing 2 Runs").first).to_be_visible()

    # One toggle for parameters, one for metrics.
    toggles = page.get_by_text("Show diff only")
    for index in range(2):
        toggles.nth(index).click()

    expected = {
        "model.proposals.count": [str(proposals) for proposals in SCORES],
        "eval/val/oIoU": [f"{score:.3f}" for score in SCORES.values()],
    }
    for name, values in expected.items():
        page.wait_for_function(
            f"([name, values]) => ({TEXTS_TO_THE_RIGHT})(name)"
            ".some(texts => '' + texts === '' + values)",
            arg=[name, values],
        )
    # What is the same in both runs is hidden.
    assert page.evaluate(TEXTS_TO_THE_RIGHT, "model.proposals.heads") == []

    toggles.last.scroll_into_view_if_needed()
    shoot(page, "mlflow")
