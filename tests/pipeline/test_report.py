"""The page of ``bevkd report``, opened in a real browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from playwright.sync_api import Browser, Page

from tests.pipeline import report_kit
from tests.pipeline.kit import Bevkd
from tests.pipeline.report_kit import Runs

SECTIONS = ("finding", "results", "gains", "curves", "frames", "features", "recipes")


@pytest.fixture(scope="module")
def runs(bevkd: Bevkd, world: Path, cache: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("report") / "runs"
    return report_kit.make_runs(bevkd, folder, world, cache, teacher)


@pytest.fixture(scope="module")
def report(bevkd: Bevkd, runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    bevkd.well("report", *runs.places, "--out", out, "--frames", 2)
    return out


Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Return how to open a page; afterwards nothing must have been fetched and nothing complained of."""
    contexts, requests, complaints = [], [], []

    def opened(path: Path, width: int = 1280, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        context.route(lambda url: not url.startswith(("file:", "data:")), lambda route: route.abort())
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in requests) == len(contexts), "it loads other files"
    assert complaints == []


# ---------------------------------------------------------------------------------------------- in the browser


def test_every_section_has_its_heading_and_its_content(visit: Open, report: Path) -> None:
    page = visit(report)
    assert page.locator("main > section").evaluate_all("all => all.map(each => each.id)") == list(SECTIONS)
    for section in SECTIONS:
        assert page.locator(f"#{section} :is(h1, h2)").first.inner_text(), section
    assert page.locator("#finding .tile").count() == 6
    assert page.locator("#curves .chart").count() >= 8
    assert page.locator("#frames .frame").count() == 2
    assert page.locator("#frames .view img").count() == 2 * 6
    assert page.locator("#frames .top").count() == 2 * 3
    assert page.locator("#features .map").count() == 3 * 3
    assert page.locator(".note-box:not(#finding .note-box)").count() == 0, "something is missing"


def test_the_page_says_what_distillation_gained(visit: Open, runs: Runs, report: Path) -> None:
    page, results = visit(report), runs.results()
    scores = {name: 100 * result["metrics"]["mean_ap_present"] for name, result in results.items()}
    plain = (scores["plain-0"] + scores["plain-1"]) / 2
    distilled = (scores["distilled-0"] + scores[report_kit.HOSTILE]) / 2
    sentence = page.locator("h1").inner_text()
    assert f"{distilled - plain:.1f} points" in sentence
    assert f"{plain:.1f} → {distilled:.1f}" in sentence
    assert "better in 2 of 2" in page.locator("#finding .lead").inner_text()


def test_the_tables_hold_the_numbers_of_the_runs(visit: Open, runs: Runs, report: Path) -> None:
    page = visit(report)
    page.locator("#results summary").click()
    rows = page.locator("#results details tbody tr").evaluate_all(
        "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    )
    by_run = {Path(row[0]).name: row for row in rows}
    for name, result in runs.results().items():
        metrics = result["metrics"]
        wanted = [metrics["mean_ap_present"], metrics["mAP"], metrics["NDS"]]
        assert by_run[name][5:8] == [f"{100 * value:.1f}" for value in wanted]
        assert f"{metrics['tp_errors']['trans_err']:.2f}" in by_run[name]
        assert f"{result['step_seconds']:.3g}" in by_run[name]
    cells = page.locator("#gains .heat td").all_inner_texts()
    before, after = (
        sum(100 * runs.results()[name]["metrics"]["per_class"]["car"]["ap"] for name in names) / 2
        for names in (("plain-0", "plain-1"), ("distilled-0", report_kit.HOSTILE))
    )
    assert cells[0].splitlines() == [f"{after - before:+.1f}", f"{before:.1f} → {after:.1f}"]


@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_never_scrolls_sideways(visit: Open, report: Path, width: int) -> None:
    page = visit(report, width)
    page.locator("summary").evaluate_all("all => all.forEach(each => each.click())")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    beyond = (
        "all => all.filter(each => each.getBoundingClientRect().right > innerWidth + 1).map(each => each.className)"
    )
    assert page.locator("main > section, main > section > *, .tile, .frame > *").evaluate_all(beyond) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_all_text_stands_out_from_what_is_behind_it(visit: Open, report: Path, scheme: str, width: int) -> None:
    page = visit(report, width, scheme)
    page.locator("summary").evaluate_all("all => all.forEach(each => each.click())")
    assert page.evaluate(report_kit.CONTRAST) == []


def test_the_theme_follows_the_system_and_the_button(visit: Open, report: Path) -> None:
    def paper(page: Page) -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = (visit(report, scheme=scheme) for scheme in ("light", "dark"))
    colors = paper(light), paper(dark)
    assert colors[0] != colors[1]
    for page, other in ((light, colors[1]), (dark, colors[0])):
        page.locator("#theme").click()
        assert paper(page) == other
        page.locator("#theme").click()
        assert paper(page) != other
    assert light.locator("#theme").inner_text() == "Dark"


def test_all_pictures_decode_and_say_what_they_are(visit: Open, report: Path) -> None:
    page = visit(report)
    count, broken = page.evaluate(report_kit.UNDECODED)
    assert count >= 2 * 6 + 2 + 9
    assert broken == []
    assert page.locator("img:not([alt]), img[alt=''], svg[role=img]:not([aria-label])").count() == 0


def test_boxes_can_be_switched_off_by_keyboard(visit: Open, report: Path) -> None:
    page = visit(report)
    boxes = page.locator("#frames .view .box.c-plain").first
    assert boxes.is_visible()
    page.locator("input[data-layer=plain]").focus()
    page.keyboard.press("Space")
    assert not boxes.is_visible()
    assert page.locator("#frames .top.c-plain").first.is_hidden()
    assert not page.locator("#frames .top.c-teacher").first.is_visible(), "teachers are off at first"


def test_hostile_names_are_text(visit: Open, report: Path) -> None:
    page = visit(report)
    page.wait_for_timeout(100)
    assert page.title().startswith("bevkd report")
    assert page.locator("script").count() == 1
    assert report_kit.HOSTILE in page.locator("#results").text_content()
    assert "<script>document.title=3" in page.locator("#curves").text_content()


def test_frames_say_what_was_found(visit: Open, report: Path) -> None:
    page = visit(report)
    captions = page.locator("#frames .top.c-d0 figcaption").all_inner_texts()
    plain = page.locator("#frames .top.c-plain figcaption").all_inner_texts()
    for mine, theirs in zip(captions, plain, strict=True):
        found, total = mine.splitlines()[-1].partition(" found")[0].split(" of ")
        assert found == total
        assert int(theirs.splitlines()[-1].split(" of ")[0]) < int(total)
    assert page.locator("#frames h3").first.inner_text() == "1. Where the distilled student gains most"


# ---------------------------------------------------------------------------------------------- the file


def test_the_same_runs_give_the_same_bytes(bevkd: Bevkd, runs: Runs, report: Path) -> None:
    before = report.read_bytes()
    written = bevkd.well("report", *runs.places, "--out", report, "--frames", 2, "--json").json
    assert report.read_bytes() == before
    assert written["bytes"] == len(before) < 6e6
    assert (written["runs"], written["methods"], written["score"]) == (5, 3, "mean AP")


def test_what_is_missing_is_said_and_no_error(bevkd: Bevkd, runs: Runs, tmp_path: Path) -> None:
    folder = shutil.copytree(runs.folder, tmp_path / "runs")
    for run in folder.iterdir():
        (run / "detections.json").unlink()
        (run / "log.jsonl").unlink()
        (run / "model.safetensors").unlink()
        values = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
        if values["distill"]:
            values["distill"]["caches"] = {"lidar": str(tmp_path / "gone")}
        (run / "recipe.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    bevkd.well("report", folder, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for said in ("No run folder holds detections", "hold no log.jsonl", "cannot be opened", "unknown", "mean AP"):
        assert said in page, said


def test_a_data_set_that_has_moved_is_named_with_the_way_out(bevkd: Bevkd, runs: Runs, tmp_path: Path) -> None:
    gone = f"data.root={tmp_path / 'gone'}"
    bevkd.well("report", *runs.places, "--out", tmp_path / "report.html", "--set", gone)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The data set of the evaluation cannot be opened" in page
    assert "--set data.root=FOLDER" in page


def test_runs_without_scores_show_their_course(bevkd: Bevkd, runs: Runs, tmp_path: Path) -> None:
    run = shutil.copytree(runs.folder / "plain-0", tmp_path / "run")
    result = json.loads((run / "result.json").read_bytes()) | {"metrics": None}
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (run / "detections.json").unlink()
    bevkd.well("report", run, "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "These runs were not evaluated" in page
    assert "total loss" in page


def test_a_folder_without_runs_is_refused(bevkd: Bevkd, tmp_path: Path) -> None:
    outcome = bevkd("report", tmp_path, "--out", tmp_path / "report.html")
    assert outcome.code == 1
    assert "no run in it" in " ".join(outcome.err.split())
    assert not (tmp_path / "report.html").exists()
