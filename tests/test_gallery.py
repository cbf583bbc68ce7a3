"The data page as a person meets it: a real server on the loopback over a run that the ETL wrote, asked over HTTP for what it must not give, and looked at in a real browser."
import json, os, time
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_browser import CHROMIUM, browser  # noqa: F401, its fixture
from test_cli import environment, service
from test_etl import film, save

from cxr_pred.core import root
from cxr_pred.data.etl import run_etl
from cxr_pred.data.journal import Journal

BOX = '"[{""kind"": ""box"", ""points"": [[0.1, 0.2], [0.6, 0.7]]}]"'


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    "A project with films, and no run yet: forty in a table with ages, one of them with a box and a mask, and thirty files that are not kept."
    d = tmp_path_factory.mktemp("project"); own = d / "raw" / "csv"
    (d / "settings.ini").touch(); (d / "params.yaml").write_text("etl: {raw: raw}")
    rows = ["path,label,patient_id,age,sex,split,severity,regions,lung_mask"]
    for i in range(40):
        save(own / f"smith-{i}.png", film(i, 90 + i))
        rows.append(f"smith-{i}.png,{'NORMAL' if i % 4 else 'FRACTURE_WRIST'},MRN{7000 + i},{20 + i},{'FM'[i % 2]},,,{BOX if i == 4 else ''},{'lungs.png' if i == 4 else ''}")
    save(own / "lungs.png", np.where(film(1000) > 120, 255, 0).astype(np.uint8))
    for i in range(28): save(own / f"loose-{i:02}.png", film(2000 + i, 40))
    save(own / "blank.png", np.full((60, 60), 9, np.uint8)); (own / "{{value}}${1+1}<img src=x onerror=alert(1)>.png").write_text("no film")
    (own / "films.csv").write_text("\n".join([*rows, "blank.png,NORMAL,,,,,,,", "{{value}}${1+1}<img src=x onerror=alert(1)>.png,NORMAL,,,,,,,"]))
    return d


def make_run(project, sources=("csv",)): return run_etl(project / "raw", project / "runs" / "sample", list(sources), size=64, least_test=0, workers=1)


@pytest.fixture(scope="module")
def served(project):
    "The server, started before there is a run; then the run."
    with service(project, "data-page", CXR_ROOT=str(project)) as (url, p, said):
        before = Page(url).load()
        make_run(project)
        yield url, p, before
        assert p.poll() is None, "it lived through all of this"


class Page:
    "The page's callbacks without a browser: whatever anybody may send to them."
    PARTS = ["seen", "top", "films", "card", "terms", "reason", "label", "split", "source", "flag", "age", "sex"]

    def __init__(self, url):
        self.http, self.session = httpx.Client(base_url=url, timeout=120, trust_env=False), f"s{time.monotonic_ns()}"
        self.deps = self.http.get("/config").json()["dependencies"]
        part = {c["props"].get("elem_id"): c["id"] for c in self.http.get("/config").json()["components"]}
        on = lambda id, event: next(d["id"] for d in self.deps if [id, event] in d["targets"])
        self.loaded = next(d["id"] for d in self.deps if any(event == "load" for _, event in d["targets"]))
        self.film, self.filter, self.reason = on(part["films"], "click"), on(part["by-label"], "input"), on(part["reason"], "input")

    def call(self, number, data, event=None):
        "What a callback answered: whether it succeeded, and its outputs."
        r = self.http.post("/gradio_api/queue/join", json={"data": data, "fn_index": number, "session_hash": self.session, "event_data": event})
        assert r.status_code == 200, r.text
        with self.http.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as events:
            for e in events.iter_lines():
                if '"process_completed"' in e:
                    done = json.loads(e.removeprefix("data:"))
                    return done["success"], done["output"].get("data", done["output"])
        raise AssertionError("the queue ended without an answer")

    def load(self) -> dict:
        ok, out = self.call(self.loaded, ["", 0, "", *[""] * 6])
        assert ok, out
        return dict(zip(self.PARTS, out))


def test_before_a_run_it_says_what_to_do_and_then_shows_it(served):
    url, p, before = served
    assert "make run" in before["top"] and "no data of this run yet" in before["top"] and before["films"] == before["card"] == ""
    now = Page(url).load()
    assert "<b>40</b> films" in now["top"] and "2 files rejected, 29 left out" in now["top"] and now["films"].count("<img") == 16 and "ask whoever gave the films" in now["terms"]


def test_the_page_names_no_patient_and_no_place(served, project):
    url, p, _ = served
    page, m = Page(url), pd.read_parquet(project / "runs/sample/data/manifest.parquet")
    now = page.load()
    marked = m[m.regions.notna()].iloc[0]
    ok, (sheet,) = page.call(page.film, [], {"film": marked.image_id})
    assert ok and "<polygon" in sheet and sheet.count('class="mark"') == 2 and "<dt>age</dt><dd>20-29</dd>" in sheet and 'class=note' not in sheet
    ok, (rejects, at) = page.call(page.reason, [""])
    assert ok and rejects.count("<figure") == 24 and "1 to 24 of 31" in rejects
    told = json.dumps(now) + rejects + sheet + page.http.get("/config").text + page.http.get("/").text
    assert not [x for x in (*m.patient_id, *m.sha256, str(project), str(root()), "/tmp/") if x in told]
    assert "smith" not in now["films"] + now["card"] + sheet and "loose-00.png" in rejects, "a file's name is shown only where it is all that there is"
    assert "{{value}}${1+1}&lt;img" in page.call(page.reason, ["unsupported_format"])[1][0], "the names of this run's reasons are known to the session"


def test_what_is_sent_is_looked_up_and_never_opened(served, project):
    url, p, _ = served
    page, secret = Page(url), project / "raw" / "csv" / "smith-0.png"
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    for event in ({"film": str(secret)}, {"film": "../../etc/passwd"}, {"film": ["x"]}, {"film": file}, {"film": None}, {}, [], "x", None):
        ok, out = page.call(page.film, [], event)
        assert "data:image" not in json.dumps(out) and (not ok or "no longer in the run" in out[0]), event
    for data in ([0, str(secret), *[""] * 5], [0, file, *[""] * 5], [1e300, *[""] * 6], ["x", *[""] * 6], [-5, "FLU", *[""] * 5]):
        ok, out = page.call(page.filter, data)
        assert "root:x:" not in json.dumps(out) and (not ok or str(secret) not in json.dumps(out)), data   # Gradio's refusal repeats what was sent
    assert page.call(page.reason, [str(secret)])[0] in (True, False) and secret.exists() and p.poll() is None


@pytest.mark.parametrize("path", ["/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/file=/etc/passwd", "/gradio_api/info", "/gradio_api/openapi.json", "/monitoring", "/docs", "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/queue/../file=/etc/passwd", "/assets/..%2f..%2f..%2fetc%2fpasswd", "/gradio_api/call/look"])
def test_doors_that_nobody_needs_are_shut(served, path):
    url, *_ = served
    r = httpx.get(url + path, timeout=60)
    assert r.status_code in (403, 404) and "root:" not in r.text


def test_no_uploads_and_no_other_name(served):
    url, *_ = served
    assert httpx.post(url + "/gradio_api/upload", files={"files": ("a.png", b"x")}, timeout=60).status_code == 404
    assert httpx.get(url, headers={"Host": "films.evil.example"}, timeout=60).status_code == 400


def test_it_listens_on_this_machine_only_and_loads_no_torch(served):
    url, p, _ = served
    port, other = int(url.rsplit(":", 1)[1]), f"{0x7f000001:08X}"
    lines = [l.split() for l in Path("/proc/net/tcp").read_text().splitlines()[1:]] if Path("/proc/net/tcp").exists() else []
    mine = {l[1].split(":")[0] for l in lines if l[3] == "0A" and int(l[1].split(":")[1], 16) == port}
    assert url.startswith("http://127.0.0.1:") and mine in (set(), {"0100007F"})
    maps = Path(f"/proc/{p.pid}/maps")
    assert not maps.exists() or "libtorch" not in maps.read_text()


def test_a_run_that_begins_again_does_not_end_the_page(served, project):
    "films.npy is cut while a browser has the page open; a map of the file would end the server. Then the ETL itself says that it reads."
    url, p, _ = served
    page, data = Page(url), project / "runs/sample/data"
    first, kept = page.load(), {f: (data / f).read_bytes() for f in ("films.npy", "manifest.parquet", "rejects.parquet")}
    with open(data / "films.npy", "r+b") as f: f.truncate(500)
    assert page.load()["films"] == "" and p.poll() is None
    journal = Journal(data.parent / "reading", {}, 8, [])   # as `run_etl` opens it
    assert "being read" in page.load()["top"]
    journal.finish()
    for f, content in kept.items(): (data / f).write_bytes(content)
    assert page.load()["films"] == first["films"], "the same draw of the same films"


def test_where_others_may_look_no_file_is_named(project):
    from cxr_pred.data.gallery import load_run, rejects_html
    if not (project / "runs/sample/data/manifest.parquet").exists(): make_run(project)
    run = load_run(project / "runs/sample/data", project / "raw")
    shown, hidden = rejects_html(run)[0], rejects_html(run, names=False)[0]
    assert "loose-" in shown and "blank.png" in shown and shown.count("<figure") == hidden.count("<figure") == 24 and not [w for w in ("loose", "blank.png", ".png", "csv/") if w in hidden]


def test_a_file_that_ends_its_decoder_costs_one_frame(project, monkeypatch):
    from cxr_pred.data import gallery
    if not (project / "runs/sample/data/manifest.parquet").exists(): make_run(project)
    run = gallery.load_run(project / "runs/sample/data", project / "raw")
    from cxr_pred.core import InputError
    monkeypatch.setattr(gallery, "guarded_map", lambda call, tasks, *a: (InputError("decoder_crashed", "x") if i == 3 else (dict(lines=["a", "b", "c"], missing=""), film(i)) for i, t in enumerate(tasks)))
    gallery._looked_at.cache_clear()
    html, _ = gallery.rejects_html(run, "not_in_table")
    gallery._looked_at.cache_clear()
    assert html.count("<figure") == 24 and html.count("<img") == 23 and "no picture: decoder crashed" in html


def test_a_healthy_film_is_not_called_marked(project):
    from cxr_pred.data.gallery import films_html, load_run
    if not (project / "runs/sample/data/manifest.parquet").exists(): make_run(project)
    run = load_run(project / "runs/sample/data", project / "raw")
    run.manifest["regions"] = run.manifest.regions.where(run.manifest.regions.notna(), "[]")   # as the sample says it: looked at, nothing there
    try: html = films_html(run)
    finally: run.manifest["regions"] = run.manifest.regions.where(run.manifest.regions != "[]", None)
    assert html.count("<img") > 8 and html.count("marked") == films_html(run).count("marked") <= 1


def test_thirteen_thousand_films_are_drawn(tmp_path, monkeypatch):
    "All that the page shows but the pictures of rejects, of a run as large as the clinical one; only the films that are shown are read."
    from cxr_pred.data import gallery
    from cxr_pred.data.gallery import card_html, films_html, filters, load_run, terms_html, top_html
    n, rng = 12_903, np.random.default_rng(0)
    labels = ["NORMAL", "PNEUMONIA", "COVID19", "TUBERCULOSIS", *(f"FRACTURE_{b}" for b in ("ELBOW", "FINGERS", "FOREARM", "HUMERUS", "SHOULDER", "WRIST"))]
    films = np.lib.format.open_memmap(tmp_path / "films.npy", "w+", np.uint8, (n, 224, 224))   # a sparse file: zeros, and the reading is the same
    for i in range(0, n, 500): films[i] = film(i, 224)
    del films
    pd.DataFrame(dict(image_id=[f"{i:016x}" for i in range(n)], row=range(n), source=rng.choice(["a", "b", "c"], n), split=rng.choice(["train", "val", "test"], n), label=rng.choice(labels, n), patient_id=None, group_id=[f"{i // 3:016x}" for i in range(n)], age=rng.uniform(0, 99, n), sex=rng.choice(["F", "M"], n), view=None,
        width=224, height=224, sha256="0", phash="0", quality=[["low_contrast"] * (i % 9 == 0) for i in range(n)], severity=None, regions=None, path="a.png")).to_parquet(tmp_path / "manifest.parquet")
    pd.DataFrame(dict(path=[f"{i}.png" for i in range(700)], source="a", label=None, reason_code="no_annotation", reason="", kind="left_out")).to_parquet(tmp_path / "rejects.parquet")
    read = []
    monkeypatch.setattr(gallery, "read_films", lambda path, rows, real=gallery.read_films: read.extend(rows) or real(path, rows))
    run = load_run(tmp_path, tmp_path)
    page = [top_html(run, "clinical"), films_html(run, 1), card_html(run), terms_html(run), filters(run)]
    assert page[1].count("<img") == 80 == len(read) and "12,903" in page[0]


sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
browsing = pytest.mark.skipif(not CHROMIUM.exists(), reason="no browser here: `make test-deps` installs Debian's chromium")


@browsing
@pytest.mark.parametrize("size", [(1280, 860), (390, 844)], ids=["desktop", "phone"])
def test_in_a_browser(browser, served, project, size):
    "Films, a filter, a new draw, a film large with its marks, the rejects; whatever is asked of another server is a failure."
    url, *_ = served
    context = browser.new_context(viewport=dict(zip(("width", "height"), size)))
    page, elsewhere, wrong = context.new_page(), [], []
    page.set_default_timeout(60_000)
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else elsewhere.append(r.url))
    page.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
    page.goto(url)
    fits = lambda: page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    ids = lambda: page.locator("#films figure").evaluate_all("f => f.map(x => x.dataset.id)")
    shown = lambda n: page.wait_for_function("n => document.querySelectorAll('#films figure img').length === n", arg=n)
    shown(16)
    first = ids()
    assert fits() and len(set(first)) == 16 and "not a medical device" in page.content()
    page.get_by_role("button", name="Draw again").click()
    page.wait_for_function("old => document.querySelector('#films figure').dataset.id !== old", arg=first[0])
    assert ids() != first and page.get_by_label("Number of the draw").input_value() == "1"
    page.locator("#by-label input").click(); page.get_by_role("option", name="FRACTURE_WRIST").click()
    shown(10)
    assert page.locator("#films h3").inner_text() == "FRACTURE_WRIST 10 films"
    page.locator("#films figure", has_text="marked").focus(); page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert page.locator("dialog polygon").is_visible() and page.locator("dialog .pic img").first.evaluate("i => i.complete && i.naturalWidth") == 94
    assert page.locator("dialog").evaluate("d => d.querySelector('svg').getBoundingClientRect().width === d.querySelector('.pic img').getBoundingClientRect().width"), "the marks lie on the film"
    page.get_by_text("show what is marked").click()
    assert not page.locator("dialog polygon").is_visible() and "age\n20-29" in page.locator("dialog dl").inner_text()
    page.keyboard.press("Escape"); page.wait_for_selector("dialog[open]", state="detached")
    bar, three = page.locator(".tab-container[role=tablist]"), page.locator(".overflow-menu > button")
    for width in (size[0], 320) if size[0] < 500 else size[:1]:
        page.set_viewport_size(dict(width=width, height=size[1]))
        three.wait_for(state="hidden")
        assert bar.get_by_role("tab").all_inner_texts() == ["Films", "Counts", "Not kept", "Terms"], "no tab hides behind the three points"
        assert all(0 <= b["x"] and b["x"] + b["width"] <= width and b["height"] >= 30 for b in (t.bounding_box() for t in bar.get_by_role("tab").all())), "in sight, and large enough for a thumb"
    page.get_by_role("tab", name="Not kept").click()
    page.wait_for_function("() => document.querySelectorAll('#rejects figure').length === 24")
    page.get_by_role("button", name="Later").click()
    page.wait_for_function("() => document.querySelectorAll('#rejects figure').length === 7")
    assert "25 to 31 of 31" in page.locator("#rejects").inner_text() and fits()
    page.locator("#reason input").click(); page.get_by_role("option", name="unsupported format").click()
    page.get_by_text("1 to 1 of 1").wait_for()
    assert "{{value}}${1+1}<img" in page.locator("#rejects").inner_text() and not wrong, "a file's name is text"
    page.get_by_role("tab", name="Counts").click()
    assert page.locator("#card table").first.is_visible() and fits()
    page.get_by_role("tab", name="Terms").click()
    assert "ask whoever gave the films" in page.locator("#terms").inner_text() and fits() and not elsewhere
    data = project / "runs/sample/data"; journal = Journal(data.parent / "reading", {}, 8, [])   # the next run begins
    page.get_by_text("The films of this run are being read.").wait_for()
    journal.finish()
    page.get_by_text("files rejected").wait_for()   # and there it is again, without a reload
    context.close()
