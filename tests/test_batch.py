"Many films in one request: a line each, in their order, whatever one of them does; and an answer that was cut is sent for again without reading anything twice."
import io, json, logging, os, socket, stat, threading, time, zipfile
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import uvicorn
from fastapi.testclient import TestClient
from sqlalchemy import func, select
from test_api import FACTS, client, classifier, dicom, encoded, guard, pattern, problem_of, send, store, wait_ready  # noqa: F401

from cxr_pred.clinic.api import create_app
from cxr_pred.clinic.auth import add_key, clinic_settings
from cxr_pred.clinic.many import MOST_FILMS
from cxr_pred.core import reload_settings
from cxr_pred.tables import Study


def zipped(*entries) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in entries: z.writestr(name, data)
    return out.getvalue()


def send_all(client, *files, path="/v1/batch", **headers): return client.post(path, files=[("files", f) for f in files], headers=headers)


def lines_of(r) -> list[dict]:
    "The lines of an answer but the last, which must count them."
    assert r.status_code == 200 and r.headers["content-type"] == "application/x-ndjson" and r.headers["cache-control"] == "no-store", r.text
    *lines, last = map(json.loads, r.text.splitlines())
    assert [l["index"] for l in lines] == list(range(len(lines))) and all(set(l) - {"name", "index"} in ({"report"}, {"problem"}) for l in lines)
    assert last == {"done": len(lines), "failed": sum("problem" in l for l in lines)}
    return lines


def said(line) -> str: return line["problem"]["code"] if "problem" in line else line["report"]["finding"]["label"] if line["report"]["finding"] else line["report"]["reason_code"]


def studies(store) -> int:
    with store.session() as s: return s.scalar(select(func.count()).select_from(Study))


def test_a_line_a_film_in_their_order(client, store, tmp_path, caplog):
    "Films, zips and what is neither; names go back to the sender and nowhere else."
    link = zipfile.ZipInfo("quillfeather link.png"); link.external_attr = (stat.S_IFLNK | 0o777) << 16
    evil = bytearray(zipped(("quillfeather/5.png", encoded(pattern(5))), ("../../quillfeather.png", encoded(pattern())), ("bomb.png", bytes(10**7)), (link, b"/etc/passwd"), ("z.txt", b"text"), ("inner.zip", zipped(("1.png", encoded(pattern())))), (".DS_Store", b"")))
    locked = bytearray(zipped(("1.png", encoded(pattern())))); locked[locked.index(b"PK\1\2") + 8] |= 1
    damaged = bytearray(zipped(("1.png", encoded(pattern())))); damaged[200] ^= 255
    with caplog.at_level(logging.DEBUG):
        r = send_all(client, ("quillfeather.png", encoded(pattern())), ("quillfeather.zip", bytes(evil)), ("x" * 500, b"no film"), ("cut.zip", bytes(evil[:300])), ("locked", bytes(locked)), ("damaged", bytes(damaged)), ("empty.zip", zipped()),
                     ("blank.png", encoded(pattern() * 0 + 77)), ("film.dcm", dicom(pattern(5), PatientName="Quillfeather^Jane", PatientAge="054Y")))
    lines = lines_of(r)
    z = "quillfeather.zip/"
    assert {l["name"]: said(l) for l in lines} == {"quillfeather.png": "PNEUMONIA", z + "..%2F..%2Fquillfeather.png": "unsafe_path", z + "bomb.png": "bomb", z + "inner.zip": "unsupported_format", z + "quillfeather link.png": "link", z + "quillfeather/5.png": "FRACTURE_FINGERS", z + "z.txt": "unsupported_format",
                                                   "x" * 200: "unsupported_format", "cut.zip": "bad_archive", "locked/1.png": "encrypted", "damaged/1.png": "corrupt", "blank.png": "blank", "film.dcm": "FRACTURE_FINGERS"}
    assert [l["name"] for l in lines][:3] == ["quillfeather.png", z + "..%2F..%2Fquillfeather.png", z + "bomb.png"] and lines[-1]["report"]["patient"]["age"] == 54
    for l in lines:
        if "problem" in l: assert l["problem"]["status"] in (413, 415, 422) and l["problem"]["title"] and l["problem"]["detail"] and l["problem"]["hint"] and "quill" not in json.dumps(l["problem"])
        else: assert client.get(f"/v1/studies/{l['report']['study_id']}").json() == l["report"] and l["report"]["explanation_status"] == "off"
    assert studies(store) == 4 and client.app.state.room.metrics.value("cxr_rejects_total", code="bomb") == 1
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()) + caplog.text.encode() + client.get("/metrics").content
    assert b"quillfeather" not in kept.lower()


def test_explain_and_an_empty_zip(client):
    line, = lines_of(send_all(client, ("a.png", encoded(pattern())), path="/v1/batch?explain=true"))
    assert line["report"]["explanation"]["next_steps"]
    assert lines_of(send_all(client, ("a.zip", zipped()))) == []


def test_what_is_no_batch_is_refused_whole(client, store, monkeypatch):
    film = encoded(pattern())
    for files in ([("x.png", film)] * (MOST_FILMS + 1), [("a.zip", zipped(*((f"{i}.png", b"x") for i in range(MOST_FILMS)))), ("x.png", film)], [("a.zip", b"PK\3\4" + b"PK\1\2" * 100_000)]):
        assert problem_of(send_all(client, *files), 413)["code"] == "too_many_films"
    assert problem_of(client.post("/v1/batch", data={"files": "text"}), 422)["code"] == "invalid_request" and problem_of(client.post("/v1/batch"), 422) and problem_of(client.get("/v1/batch"), 405)
    assert problem_of(client.post("/v1/batch", content=b"", headers={"content-length": str(10**9)}), 413)["code"] == "too_large"
    assert studies(store) == 0
    monkeypatch.setenv("CXR_FILMS_NEED_ROLE", "true"); reload_settings(); clinic_settings.cache_clear()
    try:
        assert problem_of(client.post("/v1/batch", content=b"not even a form"), 401)["code"] == "wrong_key", "asked before the body is read"
        assert len(lines_of(send_all(client, ("x.png", film), Authorization=f"Bearer {add_key(store, 'pacs', 'service')[0]}"))) == 1
    finally: monkeypatch.undo(); reload_settings(); clinic_settings.cache_clear()


def test_what_goes_wrong_inside_is_the_films_line(client, store, monkeypatch):
    "A full disk at the second film, a fault of ours at the third: counted as ours, told without a path, and the fourth is read."
    add, n = store.add_study, []
    def at_times(*a, **k):
        n.append(1)
        if len(n) == 2: raise OSError(28, "No space left on device", "/srv/films")
        if len(n) == 3: raise RuntimeError("secret in /srv")
        return add(*a, **k)
    monkeypatch.setattr(store, "add_study", at_times)
    r = send_all(client, *((f"{i}.png", encoded(pattern(i))) for i in range(4)))
    lines = lines_of(r)
    assert [said(l) for l in lines][1:3] == ["store_unavailable", "internal_error"] and "report" in lines[0] and "report" in lines[3] and "/srv" not in r.text
    assert [l["problem"]["status"] for l in lines[1:3]] == [503, 500] and studies(store) == 2
    assert [client.app.state.room.metrics.value("cxr_failures_total", code=c) for c in ("store_unavailable", "internal_error")] == [1, 1]


def test_nothing_is_begun_where_no_film_can_be_read(store, guard, monkeypatch, tmp_path):
    monkeypatch.setenv("CXR_BUNDLE", str(tmp_path / "nowhere")); reload_settings()
    try:
        with TestClient(create_app(None, store, ui=False, guard=guard), raise_server_exceptions=False) as client: assert problem_of(send_all(client, ("a.png", encoded(pattern()))), 503)["code"] == "no_bundle"
    finally: monkeypatch.undo(); reload_settings()


def test_a_key_is_for_one_batch_and_one_sender(client, store):
    films = [(f"{i}.png", encoded(pattern(i))) for i in range(3)]
    ids = lambda **headers: [l["report"]["study_id"] for l in lines_of(send_all(client, *films, **headers))]
    first = ids(**{"Idempotency-Key": "ward 7"})
    assert ids(**{"Idempotency-Key": "ward 7"}) == first and studies(store) == 3
    assert not {*ids(**{"Idempotency-Key": "ward 8"})} & {*first} and not {*ids()} & {*first}
    assert not {*ids(**{"Idempotency-Key": "ward 7", "Authorization": f"Bearer {add_key(store, 'pacs', 'service')[0]}"})} & {*first}
    swapped = lines_of(send_all(client, films[1], films[0], films[2], **{"Idempotency-Key": "ward 7"}))
    assert [said(l) for l in swapped[:2]] == ["key_reused"] * 2 and swapped[2]["report"]["study_id"] == first[2]
    single = client.post("/v1/predict", params={"explain": False}, files={"file": films[0]}, headers={"Idempotency-Key": "ward 7"}).json()
    assert single["study_id"] not in first, "a film alone is another request"


@pytest.fixture
def served(classifier, store, guard):  # noqa: F811
    "A real server, whose answers can be cut: its address and application."
    app = create_app(classifier, store, ui=False, guard=guard)
    with socket.create_server(("127.0.0.1", 0)) as s:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [s]}, daemon=True); thread.start()
        with httpx.Client(base_url=f"http://127.0.0.1:{s.getsockname()[1]}", timeout=60, trust_env=False) as web:
            end = time.monotonic() + 60
            while True:
                try:
                    if web.get("/readyz").status_code == 200: break
                except httpx.TransportError: pass
                assert time.monotonic() < end; time.sleep(.05)
            yield web, app
        server.should_exit = True; thread.join(30)


def test_a_cut_answer_is_sent_for_again(served, store, classifier, monkeypatch):
    "Each line comes as soon as its film is recorded; after the cut no more films are begun; the same batch again reads the rest, and makes no second study."
    web, app = served
    real, read, go = type(classifier).classify, [], threading.Semaphore(0)
    def slow(self, film): read.append(1); assert go.acquire(timeout=20); return real(self, film)
    monkeypatch.setattr(type(classifier), "classify", slow)
    films = [("files", (f"{i}.png", encoded(pattern(i)))) for i in range(6)]
    key, first = {"Idempotency-Key": "ward 7"}, []
    with web.stream("POST", "/v1/batch", files=films, headers=key) as r:
        lines = r.iter_lines()
        for i in range(3):
            go.release()
            first.append(json.loads(next(lines)))
            assert studies(store) == i + 1, "recorded before it is told, and told before the next is read"
    end = time.monotonic() + 5
    go.release(3)
    while time.monotonic() < end and len(read) > 3 and studies(store) < 4: time.sleep(.05)
    time.sleep(.5)
    begun = len(read)
    assert app.state.lanes.inside == 0, "the cut batch gave its place back"
    assert begun <= 4 and studies(store) == begun, "the film that was being read when the sender left, and no more"
    go.release(10)
    whole = lines_of(web.post("/v1/batch", files=films, headers=key))
    assert [l["report"]["study_id"] for l in whole[:3]] == [l["report"]["study_id"] for l in first] and whole[:3] == first
    assert studies(store) == 6 == len({l["report"]["study_id"] for l in whole}) and len(read) == 6, "nothing is read twice"


def test_a_batch_does_not_starve_a_single_film(classifier, store, guard, monkeypatch):  # noqa: F811
    "With one lane: a film alone waits for one film of the batch and not for all."
    app = create_app(classifier, store, ui=False, guard=guard, workers=1)
    real, read = type(classifier).classify, []
    def slow(self, film): read.append(1); time.sleep(.2); return real(self, film)
    with TestClient(app, raise_server_exceptions=False) as client, ThreadPoolExecutor(1) as pool:
        wait_ready(client)
        monkeypatch.setattr(type(classifier), "classify", slow)
        batch = pool.submit(send_all, client, *((f"{i}.png", encoded(pattern(i))) for i in range(8)))
        end = time.monotonic() + 20
        while len(read) < 2: assert time.monotonic() < end; time.sleep(.01)
        assert app.state.lanes.inside == 1, "one place, however many films"
        assert send(client, encoded(pattern())).status_code == 200 and len(read) <= 6 and not batch.done()
        assert len(lines_of(batch.result())) == 8
