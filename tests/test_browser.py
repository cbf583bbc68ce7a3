"The page as a person meets it: a real server on the loopback, a real browser, a film dropped, an answer read."
import re
from pathlib import Path

import pytest
from test_api import FACTS, cat, encoded, pattern
from test_cli import files_below, ready, service

from cxr_pred.core import DISCLAIMER
from cxr_pred.vision.toy import toy_bundle

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="no browser here: `make test-deps` installs Debian's chromium")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    "A server with the toy bundle and one example film."
    d = tmp_path_factory.mktemp("page")
    toy_bundle(d / "bundle", FACTS)
    (d / "bundle" / "examples").mkdir(); (d / "bundle" / "examples" / "a_chest.png").write_bytes(encoded(pattern(5)))
    with service(d, "serve", CXR_PHYSICIAN_KEY="a-key") as (url, p, said):
        ready(url)
        yield url
        assert files_below(d / "state" / "uploads") == [], "nothing of an upload stays, while the server still runs"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


@pytest.fixture(params=[(1280, 860), (390, 844)], ids=["desktop", "phone"])
def page(browser, url, request):
    "The open page; whatever it asks of another server is a failure."
    context = browser.new_context(viewport=dict(zip(("width", "height"), request.param)))
    page, elsewhere = context.new_page(), []
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else elsewhere.append(r.url))
    page.goto(url)
    page.wait_for_selector("#drop input[type=file]", state="attached", timeout=60_000)
    yield page
    assert not elsewhere
    context.close()


def drop(page, name, data): page.set_input_files("#drop input[type=file]", {"name": name, "mimeType": "application/octet-stream", "buffer": data})


def card(page, status):
    "The answer's card, once it is there."
    page.wait_for_selector(f"#answer .cxr[data-status={status}]", timeout=30_000)
    return page.locator("#answer .cxr")


def fits(page): return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_film_gets_its_answer(page):
    assert page.locator("#always").inner_text() == DISCLAIMER and "Tuberculosis" in page.locator("#answer").inner_text() and fits(page)
    drop(page, "jane-doe.png", encoded(pattern()))
    answer = card(page, "ok")
    page.wait_for_function("() => { const y = document.querySelector('#answer h2').getBoundingClientRect().top; return y >= 0 && y < innerHeight / 2 }", timeout=10_000)  # in sight without scrolling
    assert answer.locator("h2").inner_text() == "Pneumonia" and answer.get_attribute("data-label") == "PNEUMONIA"
    assert answer.locator(".bar").count() == 10 and answer.locator(".bar").first.inner_text().split("\n")[0] == "Pneumonia" and "99 %" in answer.locator(".bar").first.inner_text()
    assert answer.locator("img.over").is_visible() and answer.locator("img.over").evaluate("i => i.complete && i.naturalWidth") > 0
    text = answer.inner_text()
    assert "signs of pneumonia" in text and "Written from fixed, reviewed sentences." in text and answer.locator("section.text li").count() >= 2
    assert page.locator("#always").is_visible() and "jane" not in page.content().lower() and fits(page)
    answer.locator("summary").click()
    assert answer.locator(".bar").last.is_visible()


def test_the_heatmap_can_be_faded(page):
    drop(page, "film.png", encoded(pattern()))
    answer = card(page, "ok")
    answer.locator("input[type=range]").fill("0")
    assert answer.locator("img.over").evaluate("i => getComputedStyle(i).opacity") == "0"


def test_a_bad_file_is_an_error_and_the_page_goes_on(page):
    drop(page, "film.png", b"this is text")
    answer = card(page, "error")
    assert "could not be read" in answer.inner_text() and "unsupported_format" in answer.inner_text() and answer.locator("img").count() == 0 and fits(page)
    drop(page, "film.png", encoded(pattern(5)))
    assert card(page, "ok").get_attribute("data-label") == "FRACTURE_FINGERS"


def test_a_cat_is_not_read(page):
    drop(page, "cat.jpg", encoded(cat(), "JPEG"))
    answer = card(page, "rejected")
    assert answer.locator("h2").inner_text() == "It did not read this picture" and answer.locator(".bar").count() == answer.locator("img.over").count() == 0 and fits(page)


def test_an_example_and_the_report_to_print(page, browser):
    page.locator("#examples button").last.click()
    answer = card(page, "ok")
    assert answer.get_attribute("data-label") == "FRACTURE_FINGERS"
    href = answer.locator("a", has_text="Print").get_attribute("href")
    page.goto(page.url.rstrip("/") + "/" + href)
    assert page.locator(".bar").count() == 10 and page.locator(".disclaimer").inner_text() == DISCLAIMER and fits(page)


def test_a_physician_corrects(browser, url):
    page = browser.new_page()
    page.goto(url)
    page.wait_for_selector("#drop input[type=file]", state="attached", timeout=60_000)
    drop(page, "film.png", encoded(pattern()))
    study = card(page, "ok").get_attribute("data-study")
    page.locator("#doctor button").first.click()
    field = lambda label: page.locator("#doctor").get_by_label(label, exact=True)
    page.wait_for_function("id => [...document.querySelectorAll('#doctor input, #doctor textarea')].some(e => e.value === id)", arg=study)
    field("Key").fill("wrong"); field("Your name or initials").fill("dr-a")
    field("Your reading").click(); page.get_by_role("option", name="COVID-19 pneumonia").click()
    send = page.get_by_role("button", name="Record my reading")
    send.click(); page.get_by_text("wrong_key").wait_for(timeout=20_000)
    field("Key").fill("a-key"); send.click()
    page.get_by_text(re.compile("Recorded. Thank you. The model had said otherwise")).wait_for(timeout=20_000)
    page.close()
