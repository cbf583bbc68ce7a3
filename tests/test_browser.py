"The page as its two people meet it: a real server on the loopback, a real browser; a film dropped and an answer read, a worklist read and the model's answer opened last."
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from test_api import FACTS, cat, encoded, pattern
from test_cli import files_below, ready, service

from cxr_pred.clinic.auth import add_user
from cxr_pred.core import DISCLAIMER, root
from cxr_pred.store import Store
from cxr_pred.vision.toy import toy_bundle

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
PASSWORD = "correct horse battery"
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="no browser here: `make test-deps` installs Debian's chromium")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    "A server with the toy bundle and one example film."
    d = tmp_path_factory.mktemp("page")
    toy_bundle(d / "bundle", FACTS)
    (d / "bundle" / "examples").mkdir(); (d / "bundle" / "examples" / "a_chest.png").write_bytes(encoded(pattern(5)))
    store = Store(f"sqlite:///{d}/state/cxr.db", d / "state")
    for name in ("anna", "ben"): add_user(store, name, "physician", PASSWORD)
    store.close()
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
    assert answer.get_attribute("data-label") == "FRACTURE_FINGERS" and answer.locator("h2").inner_text() == "An example, no patient: Finger fracture" and "nobody's X-ray" in answer.inner_text()
    assert answer.locator(".bars > .bar .n").all_inner_texts()[5].endswith("fracture") and answer.locator(".bars > .bar").count() == 6, "of a limb nothing is said of lungs first"
    listed = httpx.get(f"{page.url.rstrip('/')}/v1/worklist?limit=200", headers={"Authorization": "Bearer a-key"}).json()["items"]
    assert answer.get_attribute("data-study") not in {i["study_id"] for i in listed}, "no physician is asked about a drawing"
    assert httpx.get(page.url.rstrip("/") + "/" + answer.locator("a", has_text="doctor (PDF)").get_attribute("href")).content.startswith(b"%PDF")
    href = answer.locator("a", has_text="Print").get_attribute("href")
    page.goto(page.url.rstrip("/") + "/" + href)
    assert "An example, no patient" in page.locator("h2").inner_text() and page.locator(".bar").count() == 10 and page.locator(".disclaimer").inner_text() == DISCLAIMER and fits(page)


def test_the_sheet_for_the_doctor_and_the_camera(page, url):
    assert page.locator("#drop input[type=file]").get_attribute("accept").startswith("image/*,") and "capture" not in page.locator("#drop input[type=file]").evaluate("i => i.outerHTML"), "a phone offers its camera, and its files too"
    page.get_by_role("button", name="About the patient").click()
    page.get_by_label("Age in years").fill("54"); page.get_by_label("Cough", exact=True).check()
    drop(page, "film.png", encoded(pattern()))
    href = card(page, "ok").locator("a", has_text="doctor (PDF)").get_attribute("href")
    sheet = httpx.get(f"{url}/{href}")
    assert sheet.headers["content-type"] == "application/pdf" and sheet.content.startswith(b"%PDF") and sheet.headers["cache-control"] == "no-store"
    study = httpx.get(f"{url}/{href}".removesuffix("/consultation.pdf")).json()
    assert study["patient"]["age"] == 54 and study["patient"]["symptoms"] == ["cough"]
    page.wait_for_function("() => document.querySelector('#drop input[type=file]')?.accept.includes('.dcm')", timeout=10_000)  # the field is drawn anew after each film
    assert page.get_by_label("Age in years").input_value() == "" and not page.get_by_label("Cough", exact=True).is_checked(), "the next film may be another person's"
    slider = page.locator("#answer input[type=range]")
    slider.focus(); slider.press("Home"); slider.press("ArrowRight")
    assert page.locator("#answer img.over").evaluate("i => getComputedStyle(i).opacity") == "0.01", "by keyboard too"


def test_what_is_said_of_the_patient(page, url):
    "An age that is mistyped is no broken film, and is mended without dropping it again; somebody's own words are answered with what was understood."
    page.get_by_role("button", name="About the patient").click()
    page.get_by_label("Age in years").fill("seven")
    drop(page, "film.png", encoded(pattern()))
    said = card(page, "error").inner_text()
    assert "The age was not understood" in said and "could not be read" not in said and page.get_by_label("Age in years").input_value() == "seven", "what was wrong can be mended"
    page.get_by_label("Age in years").fill("10 months"); page.get_by_label("Or in your own words").fill("Jane has a fever and coughs all night")
    page.locator("#again").click()
    answer = card(page, "ok")
    assert "10 months" in answer.inner_text() and "From your words: cough, fever." in answer.inner_text() and "all night" not in answer.inner_text() and fits(page)
    page.wait_for_function("() => !document.querySelector('#again')?.offsetParent", timeout=10_000)
    page.wait_for_function("() => document.querySelector('#side textarea').value === ''", timeout=10_000)   # nobody types the next one's in the moment in which the last one's is taken away
    page.get_by_label("Or in your own words").fill("xyzzy"); page.locator("#examples button").last.click()
    page.wait_for_function("() => document.querySelector('#answer').innerText.includes('None of the listed symptoms was recognised')", timeout=30_000)
    page.wait_for_function("() => document.querySelector('#side textarea').value === ''", timeout=10_000)   # after an example too


def test_what_is_typed_after_a_first_answer_arrives(page, url):
    "The fields were folded away, and so not on the page, when the first answer emptied them."
    page.locator("#examples button").last.click(); card(page, "ok")
    page.get_by_role("button", name="About the patient").click()
    page.get_by_label("Age in years").fill("7"); page.get_by_label("Female", exact=True).check(); page.get_by_label("Cough", exact=True).check()
    drop(page, "film.png", encoded(pattern()))
    page.wait_for_selector("#answer .cxr[data-label=PNEUMONIA]", timeout=30_000)
    patient = httpx.get(f"{url}/v1/studies/{page.locator('#answer .cxr').get_attribute('data-study')}").json()["patient"]
    assert (patient["age"], patient["sex"], patient["symptoms"]) == (7, "F", ["cough"])


def test_who_hears_the_page(page):
    "The answer is said once, and the keyboard meets each tab once."
    page.evaluate("window.heard = []; new MutationObserver(() => { const t = document.querySelector('#said').textContent; if (t) heard.push(t) }).observe(document.querySelector('#said'), {childList: true, characterData: true, subtree: true})")
    drop(page, "film.png", encoded(pattern()))
    card(page, "ok"); page.wait_for_timeout(800)
    assert page.evaluate("heard") == ["Pneumonia. See a doctor soon"] and page.locator("#said").get_attribute("aria-live") == "polite"
    page.locator("body").click(position={"x": 3, "y": 3})
    stops = []
    for _ in range(12):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.closest('[role=tab]')?.innerText ?? ''"))
    assert stops[0] == "Your film" and len([s for s in stops if s]) == len({s for s in stops if s}), stops


class SlowWriter(BaseHTTPRequestHandler):
    "A language service that answers nonsense once it may, so that the template speaks then."
    go = threading.Event()
    def log_message(self, *a): return
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"])); self.go.wait(60)
        self.send_response(500); self.send_header("Content-Length", "0"); self.end_headers()


def test_an_explanation_comes_when_it_is_written(browser, tmp_path):
    toy_bundle(tmp_path / "bundle", FACTS)
    writer = ThreadingHTTPServer(("127.0.0.1", 0), SlowWriter)
    threading.Thread(target=writer.serve_forever, daemon=True).start()
    with service(tmp_path, "serve", CXR_LLM_URL=f"http://127.0.0.1:{writer.server_port}") as (url, p, said):
        ready(url)
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#drop input[type=file]", state="attached", timeout=60_000)
        drop(page, "film.png", encoded(pattern()))
        answer = card(page, "ok")
        assert "is being written" in answer.inner_text() and answer.locator("section.text li").count() == 0
        SlowWriter.go.set()
        page.wait_for_selector("#answer section.text li", timeout=30_000)
        assert "signs of pneumonia" in answer.inner_text()
        page.close()
    writer.shutdown(); writer.server_close()


class Seat:
    "A physician's own browser at the desk; keeps all that came over the network and all that was sent."

    def __init__(self, browser, url, size=(1280, 860)):
        self.context = browser.new_context(viewport=dict(zip(("width", "height"), size)))
        self.page, self.heard, self.sent = self.context.new_page(), [], []
        self.page.on("request", lambda r: self.sent.append((r.url, r.post_data or "")) if r.method == "POST" else None)
        self.page.on("response", lambda r: self.heard.append(r))
        self.page.goto(f"{url}/?view=physician")
        self.page.wait_for_selector("#login", timeout=60_000)

    def log_in(self, name, password=PASSWORD):
        self.page.get_by_label("Name", exact=True).fill(name); self.page.get_by_label("Password").fill(password)
        self.page.locator("#enter").click()

    def open(self, study):
        self.page.locator("#find input, #find textarea").fill(study); self.page.locator("#find input, #find textarea").press("Enter")
        self.page.wait_for_selector(f'#viewer .cxr.view[data-study="{study}"]', timeout=20_000)

    def say(self, reading):
        self.page.locator("#label").get_by_label(reading, exact=True).check()
        self.page.locator("#send").click()
        self.page.wait_for_selector("#message strong", timeout=20_000)
        return self.page.locator("#message").inner_text()

    def came(self) -> str:
        "What has come over the network as text."
        def body(r):
            try: return r.text()
            except (sync_api.Error, UnicodeDecodeError): return ""
        return "".join(body(r) for r in self.heard if "/gradio_api/run/" in r.url or "/queue/data" in r.url or "/v1/" in r.url)


@pytest.fixture
def seat(browser, url):
    "Make seats; close their browsers afterwards."
    made = []
    yield lambda **more: made.append(Seat(browser, url, **more)) or made[-1]
    for s in made: s.context.close()


def new_study(url): return httpx.post(f"{url}/v1/predict", files={"file": ("film.png", encoded(pattern()))}, data={"age": "61"}).json()["study_id"]


def test_who_is_no_physician_sees_no_list(seat, url):
    new_study(url)
    a = seat()
    a.log_in("anna", "wrong password")
    a.page.get_by_text("wrong_login").wait_for(timeout=20_000)
    assert a.page.locator("#worklist").count() == 0 and a.page.get_by_label("Password").input_value() == "" and not a.context.cookies()
    assert not any("wrong password" in body for where, body in a.sent if "/v1/login" not in where), "a password goes to the log-in and nowhere else"
    a.page.evaluate("document.cookie = 'cxr_session=forged; path=/'"); a.page.reload()
    a.page.wait_for_selector("#login", timeout=60_000); a.page.wait_for_timeout(500)
    assert a.page.locator("#worklist").count() == 0


def test_the_second_reader_reads_first(seat, url):
    study = new_study(url)
    a, b = seat(), seat(size=(390, 844))
    a.log_in("anna")
    a.page.wait_for_selector("#worklist input[type=radio]", timeout=20_000)
    assert "not yet known" in a.page.locator("#figures").inner_text() and "unread" in a.page.locator("#worklist").inner_text()
    a.open(study)
    assert "61 years" in a.page.locator("#card").inner_text() and a.page.locator("#viewer .over, #viewer [data-do=heat]").count() == 0
    where = "() => document.querySelector('#desk').innerHTML.replace(document.querySelector('#label').innerHTML, '')"
    assert "61 years" in a.came(), "what the desk is told comes this way"
    for told in (a.page.evaluate(where), a.came()): assert "neumonia" not in told.replace("COVID-19 pneumonia", "") and "PNEUMONIA" not in told and "chip" not in told and "middle zone" not in told
    a.page.locator("#viewer input[name=window]").fill("50")
    assert a.page.locator("#viewer feFuncR").get_attribute("slope") == "2" and a.page.locator("#viewer feFuncR").get_attribute("intercept") == "-0.5"
    wide = lambda: a.page.locator("#viewer .sheet").evaluate("e => e.clientWidth")
    before = wide(); a.page.locator("#viewer [data-do=nearer]").click(); assert abs(wide() - 1.5 * before) < 3; a.page.keyboard.press("f"); assert abs(wide() - before) < 3
    a.page.locator("#viewer [data-do=mark]").click()
    sheet = a.page.locator("#viewer .sheet")
    sheet.evaluate("e => e.scrollIntoView({block: 'start', behavior: 'instant'})")
    box = sheet.bounding_box()
    a.page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 60); a.page.mouse.down(); a.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 160, steps=3); a.page.mouse.up()
    assert sheet.locator(".box.mine").count() == 1
    assert "second physician" in a.say("COVID-19 pneumonia")
    opened = a.page.locator("#card .cxr[data-label=PNEUMONIA]")
    assert "Pneumonia" in opened.inner_text() and a.page.locator("#viewer .over").is_visible() and "signs of pneumonia" in a.page.get_by_label("The explanation as you would write it").input_value()
    a.page.locator("#viewer .scroll").focus(); a.page.keyboard.press("h")
    assert not a.page.locator("#viewer .over").is_visible()
    assert not any(PASSWORD in body for where, body in a.sent if "/v1/login" not in where)

    b.page.locator("#login").get_by_role("button", name="Or a key").click()
    b.page.get_by_label("Name", exact=True).fill("dr-b"); b.page.locator("#key input").fill("a-key"); b.page.locator("#enter").click()
    b.page.wait_for_selector("#worklist input[type=radio]", timeout=20_000)
    b.open(study)
    assert b.page.locator("#viewer .over, #viewer .box").count() == 0 and "COVID" not in b.page.locator("#card").inner_text() and fits(b.page), "unseen too: neither the model nor the first reader"
    assert "The model said the same" in b.say("Pneumonia") and "dr-b (unseen): Pneumonia" in b.page.locator("#card").inner_text() and b.page.locator("#viewer .box.theirs").count() == 1
    b.page.get_by_text("Second readings saved").wait_for()
    b.page.wait_for_function("() => /of \\d+ studies/.test(document.querySelector('#figures').innerText)", timeout=20_000)
    assert not any("a-key" in body for where, body in b.sent if "/v1/login" not in where)
    b.page.get_by_role("button", name="Log out").click()
    b.page.wait_for_selector("#login", timeout=20_000)
    assert b.page.locator("#worklist, #viewer .cxr").count() == 0 and not [c for c in b.context.cookies() if c["name"] == "cxr_session"]


def test_a_stale_seat_cannot_answer(seat, url):
    other, study, a = new_study(url), new_study(url), seat()
    a.log_in("ben")
    a.page.wait_for_selector("#worklist input[type=radio]", timeout=20_000)
    a.page.locator("#viewer").wait_for(state="attached")
    a.page.locator("body").click(position={"x": 5, "y": 5}); a.page.keyboard.press("j")
    a.page.wait_for_selector(f'#viewer .cxr.view:not([data-study="{study}"])', timeout=20_000)  # the oldest waits at the top
    draw = lambda: a.page.locator("#viewer .sheet").evaluate("e => e.insertAdjacentHTML('beforeend', '<div class=\"box mine\"></div>')")
    a.open(other); draw(); a.open(study)
    assert a.page.locator("#viewer .box.mine").count() == 0, "the same film, another study: what was marked on the first stays with it"
    a.page.evaluate("document.cookie = 'cxr_csrf=other; path=/'")
    assert "no_csrf" in a.say("Tuberculosis") and a.page.locator("#card .cxr[data-status]").count() == 0, "another site's page could not have sent it"
    a.context.clear_cookies()
    a.page.locator("#send").click(); a.page.locator("#login").get_by_text("Your log-in has ended").wait_for(timeout=20_000)
    assert "wrong_key" in a.page.locator("#login").inner_text() and a.page.locator("#viewer .cxr").count() == 0, "who was shown out is told why, and it stays"
    a.page.reload(); a.page.wait_for_selector("#login", timeout=60_000); a.page.wait_for_timeout(500)
    assert "wrong_key" not in a.page.locator("#login").inner_text(), "who only comes is not told so"
    a.log_in("ben"); a.page.wait_for_selector("#worklist input[type=radio]", timeout=20_000)
    a.context.clear_cookies(); a.page.get_by_role("button", name="Refresh").click()
    a.page.locator("#login").get_by_text("Your log-in has ended").wait_for(timeout=20_000)
    assert httpx.get(f"{url}/v1/worklist/{study}", headers={"Authorization": "Bearer a-key"}).json()["study"]["state"] == "unread"


def test_who_reads_in_the_middle_of_the_list_stays_there(seat, url):
    "After an answer the same page of the list, J goes on from the same place, and what waits for somebody else is gone from it; the film and its button fit on a laptop's screen."
    for _ in range(18): new_study(url)
    a = seat(size=(1366, 768))
    a.log_in("ben"); a.page.wait_for_selector("#worklist input[type=radio]", timeout=20_000)
    listed = lambda: a.page.eval_on_selector_all("#worklist input[type=radio]", "rows => rows.map(r => r.value)")
    top = listed()
    a.page.get_by_role("button", name="Further down the list").click()
    a.page.wait_for_function("top => { const r = document.querySelector('#worklist input[type=radio]'); return r && r.value !== top }", arg=top[0], timeout=20_000)
    page = listed()
    assert len(page) >= 3 and not set(page) & set(top) and f"· {page[0][:6]}" in a.page.locator("#worklist").inner_text() and page[0] not in a.page.locator("#worklist").inner_text()
    a.page.locator("#worklist input[type=radio]").nth(1).check()
    a.page.wait_for_selector(f'#viewer .cxr.view[data-study="{page[1]}"]', timeout=20_000)
    sheet, send = a.page.locator("#viewer .sheet").bounding_box(), a.page.locator("#send").bounding_box()
    assert sheet["height"] > 520 and send["y"] + send["height"] - sheet["y"] < 768 and send["x"] > sheet["x"] + sheet["width"], "the answer is beside the film"
    assert a.page.locator("#card").bounding_box()["x"] > sheet["x"] + sheet["width"] and fits(a.page)
    a.say("Tuberculosis")
    a.page.wait_for_function("gone => ![...document.querySelectorAll('#worklist input[type=radio]')].some(r => r.value === gone)", arg=page[1], timeout=20_000)
    assert listed()[:len(page) - 1] == [p for p in page if p != page[1]], "the page stays, without what a second physician must read now"
    a.page.locator("body").click(position={"x": 5, "y": 5}); a.page.keyboard.press("j")
    a.page.wait_for_selector(f'#viewer .cxr.view[data-study="{page[2]}"]', timeout=20_000)
    a.page.locator("#which input").click(); a.page.get_by_role("option", name="wants a second reader").click()
    a.page.wait_for_function("own => [...document.querySelectorAll('#worklist input[type=radio]')].some(r => r.value === own)", arg=page[1], timeout=20_000)


def test_an_answer_is_for_the_film_on_the_page(seat, url):
    first, second, a = new_study(url), new_study(url), seat()
    a.log_in("ben"); a.page.wait_for_selector("#worklist input[type=radio]", timeout=20_000)
    a.open(second)
    a.page.evaluate(f"document.querySelector('#viewer .cxr.view').dataset.study = '{first}'")   # as if the second film were still on its way
    assert "another study was opened" in a.say("Tuberculosis")
    a.page.wait_for_function("() => !document.querySelector('#label input:checked')", timeout=20_000)
    states = [httpx.get(f"{url}/v1/worklist/{s}", headers={"Authorization": "Bearer a-key"}).json()["study"]["state"] for s in (first, second)]
    assert states == ["unread", "unread"], "recorded for neither"
    a.say("Tuberculosis"); a.page.locator("#message").get_by_text("second physician").wait_for(timeout=20_000)   # the film on the page is open now
    assert httpx.get(f"{url}/v1/worklist/{first}", headers={"Authorization": "Bearer a-key"}).json()["study"]["state"] == "second"


def test_the_boards_say_what_the_bundle_does_not_hold(page, url):
    for part, sentence in (("data", "does not hold metrics/etl.json"), ("model", "does not hold metrics/vit.json")):
        page.goto(f"{url}/?view={part}")
        page.get_by_text(sentence).wait_for(timeout=60_000)
        assert fits(page) and page.locator("#always").is_visible()
    assert "no drift watch" in page.locator("#drift-board").inner_text()


@pytest.mark.parametrize("hears", [True, False])
def test_a_page_in_another_language_asks_for_words_only_where_it_hears_them(browser, tmp_path, hears):
    "Symptoms are typed in the page's language, or ticked where it has no words for that; a film is read either way."
    toy_bundle(tmp_path / "bundle", FACTS)
    (tmp_path / "de.yaml").write_text((root() / "tests" / "heard.de.yaml").read_text(encoding="utf-8") if hears else "language: de\n", encoding="utf-8")
    with service(tmp_path, "serve", CXR_LANGUAGE=str(tmp_path / "de.yaml")) as (url, p, said):
        ready(url)
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#drop input[type=file]", state="attached", timeout=60_000)
        page.get_by_role("button", name="About the patient").click()
        page.get_by_label("Fever", exact=True).check()
        assert page.get_by_label("Or in your own words").count() == hears
        if hears: page.get_by_label("Or in your own words").fill("Ich huste Blut")
        drop(page, "film.png", encoded(pattern()))
        text = card(page, "ok").inner_text()
        assert ("From your words: cough, coughing blood." in text) == hears and "fever" in text.lower() and "Ich huste" not in text
        page.close()
