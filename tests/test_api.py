"What the REST service does with good, bad, many and unwelcome requests."
import asyncio, concurrent.futures, io, json, os, re, struct, subprocess, sys, tempfile, textwrap, threading, time, zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient
from PIL import Image, ImageDraw
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from cxr_pred.clinic.api import create_app
from cxr_pred.clinic.auth import clinic_settings
from cxr_pred.core import reload_settings, root
from cxr_pred.data.guarded import Guard, Limits
from cxr_pred.store import Store, new_id
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.toy import toy_bundle, toy_patterns

FACTS = root() / "nbs" / "language" / "facts.yaml"


def encoded(pixels, kind="PNG") -> bytes:
    out = io.BytesIO(); Image.fromarray(pixels).save(out, kind); return out.getvalue()


def pattern(n=1, size=(300, 340)) -> np.ndarray:
    p = toy_patterns()[n]
    p = (255 * (p - p.min()) / np.ptp(p)).astype(np.uint8)
    return np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC))


def dicom(pixels=None, **tags) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = ComputedRadiographyImageStorage, generate_uid(), ExplicitVRLittleEndian
    ds = pydicom.Dataset()
    ds.file_meta, ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = meta, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, "CR"
    for k, v in tags.items(): setattr(ds, k, v)
    if pixels is not None:
        ds.Rows, ds.Columns, ds.BitsAllocated, ds.BitsStored, ds.HighBit = *pixels.shape, 8, 8, 7
        ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation, ds.PixelData = 1, 0, "MONOCHROME2", pixels.tobytes()
    out = io.BytesIO(); pydicom.dcmwrite(out, ds, enforce_file_format=True); return out.getvalue()


def huge_png(side=30_000) -> bytes:
    "A valid PNG of 30,000 x 30,000 pixels in under 1 MB."
    chunk = lambda t, d: struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
    squeeze, rows = zlib.compressobj(9), bytes(side + 1)
    body = b"".join(squeeze.compress(rows) for _ in range(side)) + squeeze.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def cat(side=320) -> np.ndarray:
    "A colour picture of a cat on grass, drawn: decodes, and is no film."
    picture = Image.new("RGB", (side, side), (96, 150, 70)); draw, u = ImageDraw.Draw(picture), side / 32
    box = lambda *a: tuple(u * x for x in a)
    draw.ellipse(box(8, 15, 24, 31), fill=(214, 122, 44)); draw.ellipse(box(9, 5, 23, 19), fill=(226, 136, 52))
    for left in (9, 18): draw.polygon([(u * left, 9 * u), (u * (left + 1), 2 * u), (u * (left + 5), 6 * u)], fill=(200, 104, 36))
    for x in (12, 18): draw.ellipse(box(x, 9, x + 3, 12), fill=(70, 190, 90)); draw.ellipse(box(x + 1, 9.5, x + 2, 11.5), fill=(10, 10, 10))
    draw.polygon([(15 * u, 13 * u), (17 * u, 13 * u), (16 * u, 14.5 * u)], fill=(240, 130, 150))
    for y in (14, 15.5): draw.line(box(5, y, 13, 14.5), fill=(250, 250, 240), width=2); draw.line(box(19, 14.5, 27, y), fill=(250, 250, 240), width=2)
    return np.asarray(picture)


def wait_ready(client, seconds=60):
    end = time.monotonic() + seconds
    while (r := client.get("/readyz")).status_code != 200:
        assert time.monotonic() < end, r.text
        time.sleep(0.02)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory): return Classifier(toy_bundle(tmp_path_factory.mktemp("bundle"), FACTS))


@pytest.fixture
def store(tmp_path):
    s = Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path / "state")
    yield s
    s.close()


@pytest.fixture(scope="module")
def guard():
    "The reading processes, started once for all tests."
    with Guard() as g: yield g


@pytest.fixture
def client(classifier, store, guard):
    with TestClient(create_app(classifier, store, ui=False, guard=guard), raise_server_exceptions=False) as c:
        wait_ready(c)
        yield c


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setenv("CXR_PHYSICIAN_KEY", "a-long-key")
    reload_settings()
    yield {"Authorization": "Bearer a-long-key"}
    monkeypatch.undo()
    reload_settings()


def send(client, data, name="film.png", path="/v1/predict", **form): return client.post(path, files={"file": (name, data)}, data=form)


def problem_of(r, status=None) -> dict:
    assert r.headers["content-type"] == "application/problem+json", r.text
    p = r.json()
    assert p["status"] == r.status_code and p["title"] and p["detail"] and re.fullmatch(r"[a-z_0-9]+", p["code"])
    if status: assert r.status_code == status, p
    return p


@pytest.mark.parametrize("data, status, code", [
    (b"this is a text file", 415, "unsupported_format"),
    (encoded(pattern(), "JPEG")[:-3000], 422, "truncated"),
    (b"", 422, "empty_file"),
    (dicom(Rows=8, Columns=8), 422, "dicom_no_pixels"),
    (encoded(pattern())[:900], 422, "truncated"),
    (b"\x89PNG\r\n\x1a\n" + b"\0" * 64, 422, "corrupt"),
    (b"GIF89a" + b"\0" * 64, 415, "unsupported_format"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_format"),
], ids=["text", "cut_jpeg", "empty", "dicom_no_pixels", "cut_png", "broken_png", "gif", "svg"])
def test_bad_input_is_a_problem_and_the_server_goes_on(client, store, data, status, code):
    assert problem_of(send(client, data), status)["code"] == code
    assert not list(store.place.names()), "nothing of it is kept"
    assert send(client, encoded(pattern())).json()["status"] == "ok"
    assert f'cxr_rejects_total{{code="{code}"}} 1.0' in client.get("/metrics").text


def test_a_picture_of_30000_by_30000_is_refused_fast(client):
    data = huge_png()
    def took() -> float:
        start = time.perf_counter()
        assert problem_of(send(client, data), 413)["code"] == "too_large"
        return time.perf_counter() - start
    assert min(took() for _ in range(3)) < 1, "refused by its header, not after decoding 900 million pixels"


def test_a_large_upload_never_lies_on_a_disk_in_clear(client, monkeypatch):
    rolled, before = [], tempfile.SpooledTemporaryFile.rollover
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: (rolled.append(1), before(self))[1])
    noise = io.BytesIO(); Image.fromarray(np.random.default_rng(0).integers(0, 256, (2300, 2300), dtype=np.uint8)).save(noise, "PNG", compress_level=0)
    assert len(noise.getvalue()) > 5 * 2**20 and send(client, noise.getvalue()).status_code == 200
    assert not rolled
    big = tempfile.SpooledTemporaryFile(max_size=10); big.write(b"x" * 11); big.close()
    assert rolled, "the test would see it"


@pytest.mark.parametrize("pixels, reason", [
    (cat(), "not_a_radiograph"),
    (np.random.default_rng(0).integers(0, 256, (200, 240, 3), dtype=np.uint8), "not_a_radiograph"),
    (np.full((100, 100), 77, np.uint8), "blank")])
def test_what_is_no_film_is_an_answer(client, pixels, reason):
    r = send(client, encoded(pixels))
    assert r.status_code == 200 and (r.json()["status"], r.json()["reason_code"], r.json()["finding"]) == ("rejected", reason, None)
    assert r.json()["explanation"]["next_steps"]
    assert problem_of(client.get(f"/v1/studies/{r.json()['study_id']}/heatmap.png"), 404)["code"] == "no_heatmap"


def test_dicom_leaves_nothing_that_names_the_patient(client, store, tmp_path):
    film = dicom(pattern(), PatientName="Quillfeather^Jane", PatientID="MRN-0815", PatientBirthDate="19700101", PatientAge="054Y", PatientSex="F", ViewPosition="PA", InstitutionName="St. Elsewhere")
    r = send(client, film, "quillfeather_jane_MRN-0815.dcm", patient_ref="MRN-0815").json()
    assert r["status"] == "ok" and r["patient"] == {"age": 54, "sex": "F", "view": "PA", "symptoms": []}
    again = send(client, film, patient_ref=" MRN-0815").json()
    assert store.study(r["study_id"]).patient_hash == store.study(again["study_id"]).patient_hash is not None
    kept = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()) + json.dumps(r).encode() + client.get(f"/v1/studies/{r['study_id']}/report.html").content
    for word in (b"quillfeather", b"jane", b"mrn-0815", b"19700101", b"elsewhere"): assert word not in kept.lower(), word


def test_an_answer_is_recorded_before_it_is_sent(client, store):
    r = send(client, encoded(pattern())).json()
    with Store(str(store.engine.url), store.state).session() as s:
        from cxr_pred.store import Study
        assert s.get(Study, r["study_id"]).finding["label"] == r["finding"]["label"], "seen by another connection"
    assert client.get(f"/v1/studies/{r['study_id']}").json() == r


def test_no_record_no_answer(client, store):
    from cxr_pred.store import Base
    Base.metadata.drop_all(store.engine)
    p = problem_of(send(client, encoded(pattern())), 503)
    assert p["code"] == "store_unavailable" and "studies" not in json.dumps(p) and not list(store.place.names())
    assert client.app.state.room.metrics.value("cxr_failures_total", code="store_unavailable") == 1, "counted as ours, not as a sender's"
    Base.metadata.create_all(store.engine)
    assert send(client, encoded(pattern())).status_code == 200, "it recovers by itself"


def test_a_full_disk_is_no_answer(client, store, monkeypatch):
    "A film's picture that goes to the device that is always full; then there is room again."
    monkeypatch.setattr("cxr_pred.clinic.study.secrets.token_hex", lambda n: "ab" * n)
    os.symlink("/dev/full", store.films / f"{'ab' * 16}.part")
    p = problem_of(send(client, encoded(pattern())), 503)
    assert p["code"] == "store_unavailable" and "/dev" not in json.dumps(p) and not list(store.place.names()) and store.pending() == []
    assert send(client, encoded(pattern())).status_code == 200


def test_eight_at_once(client, store):
    with concurrent.futures.ThreadPoolExecutor(8) as pool: answers = list(pool.map(lambda n: send(client, encoded(pattern(n % 10))).json(), range(40)))
    assert len({a["study_id"] for a in answers}) == 40
    assert all(a["finding"]["label"] == send(client, encoded(pattern(n))).json()["finding"]["label"] for n, a in enumerate(answers[:10])), "no answer is another's"
    assert sum(1 for a in answers if store.study(a["study_id"])) == 40


def test_the_service_answers_while_a_film_is_read(client, classifier, monkeypatch):
    held, go = threading.Event(), threading.Event()
    real = type(classifier).classify
    def slow(self, film): held.set(); assert go.wait(10); return real(self, film)
    monkeypatch.setattr(type(classifier), "classify", slow)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        film = pool.submit(send, client, encoded(pattern()))
        assert held.wait(10)
        assert client.get("/healthz").status_code == 200 and not film.done()
        go.set()
        assert film.result().status_code == 200


def test_who_comes_to_a_full_line_is_told_at_once(classifier, store, guard, monkeypatch):
    "One film is read and one waits; the next is told to come again before its body is read, and the two are answered."
    monkeypatch.setenv("CXR_FILMS_WAITING", "1"); clinic_settings.cache_clear()
    held, go, real = threading.Event(), threading.Event(), type(classifier).classify
    try:
        with TestClient(create_app(classifier, store, ui=False, guard=guard, workers=1), raise_server_exceptions=False) as c, concurrent.futures.ThreadPoolExecutor(2) as pool:
            wait_ready(c)
            def slow(self, film): held.set(); assert go.wait(20); return real(self, film)
            monkeypatch.setattr(type(classifier), "classify", slow)
            films = [pool.submit(send, c, encoded(pattern(n))) for n in range(2)]
            lanes = c.app.state.lanes
            while lanes.inside < 2: time.sleep(0.01)
            assert held.wait(10) and (lanes.working, lanes.waiting) == (1, 1)
            full = c.post("/v1/predict", content=b"no form at all", headers={"content-type": "multipart/form-data; boundary=x"})   # 400 for who reads it
            stow = c.post("/dicomweb/studies", content=b"", headers={"content-type": 'multipart/related; type="application/dicom"; boundary=x'})
            for r in (full, stow): assert problem_of(r, 503)["code"] == "busy" and int(r.headers["retry-after"]) > 0
            assert c.get("/healthz").status_code == 200 and c.get("/readyz").status_code == 200
            assert {"cxr_films_waiting 1.0", "cxr_films_in_work 1.0"} <= set(c.get("/metrics").text.splitlines())
            go.set()
            assert [f.result().status_code for f in films] == [200, 200] and lanes.inside == 0
            assert send(c, encoded(pattern(3))).status_code == 200
            assert 'cxr_failures_total{code="busy"} 2.0' in c.get("/metrics").text
    finally: monkeypatch.undo(); clinic_settings.cache_clear()


def test_a_damaged_film_gives_its_place_back(classifier, store, guard, monkeypatch):
    monkeypatch.setenv("CXR_FILMS_WAITING", "0"); clinic_settings.cache_clear()
    try:
        with TestClient(create_app(classifier, store, ui=False, guard=guard, workers=1), raise_server_exceptions=False) as c:
            wait_ready(c)
            for data, status in ((b"no film", 415), (encoded(pattern())[:900], 422), (encoded(pattern()), 200)) * 2: assert send(c, data).status_code == status
            assert c.app.state.lanes.inside == 0
    finally: monkeypatch.undo(); clinic_settings.cache_clear()


@pytest.mark.parametrize("said, given, lanes", [("3", 0, 3), ("3", 1, 1), ("", 0, len(os.sched_getaffinity(0)))], ids=["environment", "option", "cores"])
def test_as_many_decoders_as_lanes(classifier, store, monkeypatch, said, given, lanes):
    monkeypatch.setenv("CXR_WORKERS", said or "0"); clinic_settings.cache_clear()
    try: app = create_app(classifier, store, ui=False, workers=given)
    finally: monkeypatch.undo(); clinic_settings.cache_clear()
    assert app.state.lanes.at_once == app.state.room.guard.workers == lanes


def test_explain_false(client):
    r = send(client, encoded(pattern()), path="/v1/predict?explain=false").json()
    assert (r["explanation"], r["explanation_status"]) == (None, "off")
    assert problem_of(client.get(f"/v1/studies/{r['study_id']}/explanation"), 404)["code"] == "no_explanation"


def test_a_pending_explanation_is_streamed_until_it_is_written(client, store, classifier, monkeypatch):
    from cxr_pred.clinic.reading import study_row
    from cxr_pred.clinic.study import read_study
    from cxr_pred.clinic.writer import explanation_for
    report, film, heat = read_study(classifier, encoded(pattern()))
    store.add_study(study_row(report.model_copy(update={"explanation_status": "pending"}), heat), film.pixels)
    e = explanation_for(report, client.app.state.room.facts)
    look, looks = client.app.state.room.report, []
    def report_of(study_id):  # the first look is the address's own, the second the stream's, and before the third it is written
        looks.append(study_id)
        if len(looks) == 3: store.set_explanation(study_id, e.model_dump(mode="json"))
        return look(study_id)
    monkeypatch.setattr(client.app.state.room, "report", report_of)
    events = re.findall(r"event: (\w+)\ndata: (.*)\n\n", client.get(f"/v1/studies/{report.study_id}/explanation").text)
    assert [n for n, _ in events] == ["pending", "explanation"] and json.loads(events[-1][1]) == e.model_dump(mode="json")


def test_a_spread_map_names_no_zone_and_colours_nothing(client, store, classifier, monkeypatch):
    "From the classifier to the answer, the picture, the page and the record that is read again."
    outputs = type(classifier).outputs
    def everywhere(self, films):
        out = outputs(self, films); out["heat"] = np.full_like(out["heat"], 0.7); out["heat"][..., 2, 12] = 1
        return out
    film = encoded(pattern())
    focused = send(client, film).json()
    monkeypatch.setattr(type(classifier), "outputs", everywhere)
    spread = send(client, film).json()
    assert (focused["spread"], spread["spread"]) == (False, True) and focused["finding"]["zones"] and spread["finding"]["zones"] == []
    assert focused["finding"]["label"] == spread["finding"]["label"] == "PNEUMONIA" and client.get(f"/v1/studies/{spread['study_id']}").json()["spread"] is True
    colours = lambda r: np.ptp(np.asarray(Image.open(io.BytesIO(client.get(f"/v1/studies/{r['study_id']}/heatmap.png").content)), int), axis=-1).max()
    assert colours(focused) > 50 and colours(spread) == 0
    pages = [client.get(f"/v1/studies/{r['study_id']}/report.html").text for r in (focused, spread)]
    assert [p.count('class="over"') for p in pages] == [1, 0] and ["it names no place" in p for p in pages] == [False, True]
    assert "looked mostly" in focused["explanation"]["details"] and not re.search(r"(upper|middle|lower) zone|left|right", json.dumps(spread["explanation"]))


@pytest.mark.parametrize("path", ["", "/explanation", "/heatmap.png", "/report.html"])
@pytest.mark.parametrize("study_id", ["00000000000000000000000000000001", "1", "..%2f..%2fpatient.key", "%00", "é" * 40])
def test_unknown_studies(client, path, study_id): assert problem_of(client.get(f"/v1/studies/{study_id}{path}"), 404)["code"] in ("no_such_study", "not_found")


def test_requests_that_do_not_fit(client):
    for form in ({"age": "old"}, {"age": "-3"}, {"age": "nan"}, {"sex": "x"}, {"symptoms": "Jane Doe, 12 High Street"}, {"patient_ref": "x" * 201}):
        p = problem_of(send(client, encoded(pattern()), **form), 422)
        assert p["code"] == "invalid_request" and p["errors"][0]["where"].startswith("body") and "Jane" not in json.dumps(p)
    assert problem_of(client.post("/v1/predict", data={"file": "text"}), 422)["code"] == "invalid_request"
    assert problem_of(client.post("/v1/predict", content=b"{}"), 422)["code"] == "invalid_request"
    assert problem_of(client.get("/v1/predict"), 405)["code"] == "method_not_allowed"
    assert problem_of(client.get("/v1/nothing"), 404)["code"] == "not_found"


def test_body_limit_by_header_and_while_streaming(classifier, store, monkeypatch):
    monkeypatch.setenv("CXR_MAX_UPLOAD_MB", "0.1"); reload_settings()
    try: app = create_app(classifier, store, ui=False)
    finally: monkeypatch.undo(); reload_settings()
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_ready(client)
        assert problem_of(send(client, b"x" * 200_000), 413)["code"] == "too_large"
        read = 0
        def endless():
            nonlocal read
            yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="f.png"\r\n\r\n'
            for _ in range(50): read += 10_000; yield b"x" * 10_000
        r = client.post("/v1/predict", content=endless(), headers={"content-type": "multipart/form-data; boundary=b"})
        assert problem_of(r, 413)["code"] == "too_large"
        assert problem_of(client.post("/v1/predict", content=b"", headers={"content-length": "many"}), 400)["code"] == "bad_request"
        assert send(client, encoded(pattern())).json()["status"] == "ok"


def test_feedback_is_for_physicians(client, key, store):
    study = send(client, encoded(pattern())).json()["study_id"]
    answer = {"study_id": study, "physician": "dr-a", "confirmed_label": "PNEUMONIA", "severity": "mild"}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic a-long-key"}, {"Authorization": "Bearer "}):
        assert problem_of(client.post("/v1/feedback", json=answer, headers=headers), 401)["code"] == "wrong_key"
    for body in (b"{ no JSON", b"[]", json.dumps(answer | {"confirmed_label": "FLU"}).encode()):
        assert problem_of(client.post("/v1/feedback", content=body), 401)["code"] == "wrong_key", "the key comes before the body"
        assert problem_of(client.post("/v1/feedback", content=body, headers=key), 422)["code"] == "invalid_request"
    r = client.post("/v1/feedback", json=answer, headers=key)
    assert r.status_code == 201 and r.json()["agrees"] is True and r.json()["study_id"] == study
    assert problem_of(client.post("/v1/feedback", json=answer | {"agrees": True, "confirmed_label": "NORMAL"}, headers=key), 422)["code"] == "contradiction"
    assert problem_of(client.post("/v1/feedback", json=answer | {"study_id": new_id()}, headers=key), 404)["code"] == "no_such_study"
    assert problem_of(client.post("/v1/feedback", json=answer | {"confirmed_label": "FLU"}, headers=key), 422)["code"] == "invalid_request"
    for field in ("physician", "edited_explanation"): assert problem_of(client.post("/v1/feedback", json=answer | {field: "a\0b"}, headers=key), 422)["code"] == "invalid_request", "PostgreSQL could not keep it"
    assert problem_of(client.post("/v1/login", json={"name": "a\0b", "password": "x"}), 422)["code"] == "invalid_request"
    from cxr_pred.store import feedback_frame
    assert feedback_frame(store)[["physician", "confirmed_label", "severity", "agrees"]].values.tolist() == [["dr-a", "PNEUMONIA", "mild", True]]


def test_a_stranger_s_body_is_not_read(client, key):
    "The key is asked for before a byte of the body is taken."
    read = []
    async def receive(): read.append(1); return {"type": "http.request", "body": b"{}", "more_body": False}
    async def asked(headers):
        sent = []
        async def send(message): sent.append(message)
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": "/v1/feedback", "raw_path": b"/v1/feedback", "query_string": b"", "root_path": "", "server": ("t", 80), "client": ("t", 1),
                 "headers": [(b"content-type", b"application/json"), (b"content-length", b"2"), *headers]}
        await client.app(scope, receive, send)
        return sent[0]["status"]
    assert asyncio.run(asked([])) == 401 and read == []
    assert asyncio.run(asked([(b"authorization", b"Bearer a-long-key")])) == 422 and read == [1]


def test_feedback_is_closed_without_a_key(client):
    assert problem_of(client.post("/v1/feedback", json={}, headers={"Authorization": "Bearer "}), 403)["code"] == "feedback_closed"


def test_what_goes_wrong_inside_stays_inside(client, monkeypatch):
    def broken(*a, **k): raise RuntimeError("secret detail in /srv/models")
    monkeypatch.setattr(client.app.state.room.classifier, "classify", broken, raising=False)
    r = send(client, encoded(pattern()))
    assert problem_of(r, 500)["code"] == "internal_error" and "secret" not in r.text


def test_not_ready_without_a_bundle(store, monkeypatch, tmp_path):
    monkeypatch.setenv("CXR_BUNDLE", str(tmp_path / "nowhere")); reload_settings()
    try:
        with TestClient(create_app(None, store, ui=False), raise_server_exceptions=False) as client:
            p = problem_of(send(client, encoded(pattern())), 503)
            assert p["code"] == "no_bundle" and str(tmp_path) not in json.dumps(p)
            assert problem_of(client.get("/readyz"), 503)["code"] == "no_bundle" and client.get("/healthz").status_code == 200
    finally: monkeypatch.undo(); reload_settings()


@pytest.fixture
def bad_codec(tmp_path, monkeypatch):
    "A decoder that dies, hangs or swells on films that say so."
    (tmp_path / "bad_codec.py").write_text(textwrap.dedent("""
        import os, time
        from cxr_pred.data.guarded import read_bytes
        def read(data, name=""):
            if data.startswith(b"abort"): os.abort()
            if data.startswith(b"hang"): time.sleep(600)
            if data.startswith(b"swell"): bytearray(8 * 2**30)
            if data.startswith(b"killed"): os.kill(os.getpid(), 9)
            if data.startswith(b"once"):
                try: os.mkdir(os.path.join(os.path.dirname(__file__), "killed"))
                except FileExistsError: data = data[4:]
                else: os.kill(os.getpid(), 9)
            return read_bytes(data, name)"""))
    monkeypatch.syspath_prepend(str(tmp_path))
    return Guard(1, Limits(seconds=1, megabytes=1024, tries=1), call="bad_codec:read")


@pytest.mark.parametrize("data, status, code", [(b"abort", 422, "decoder_crashed"), (b"hang", 422, "decode_timeout"), (b"swell", 413, "decode_memory"), (b"killed", 413, "decode_memory")])
def test_a_film_that_costs_its_decoder_costs_one_upload(classifier, store, bad_codec, data, status, code):
    with bad_codec, TestClient(create_app(classifier, store, ui=False, guard=bad_codec), raise_server_exceptions=False) as client:
        wait_ready(client)
        assert problem_of(send(client, data), status)["code"] == code and not list(store.place.names())
        assert client.get("/readyz").status_code == 200 and f'cxr_rejects_total{{code="{code}"}} 1.0' in client.get("/metrics").text
        assert send(client, encoded(pattern())).json()["status"] == "ok", "one process reads, and it is another one"


def test_a_film_whose_decoder_was_ended_once_is_read_by_another(classifier, store, bad_codec):
    with bad_codec, TestClient(create_app(classifier, store, ui=False, guard=bad_codec), raise_server_exceptions=False) as client:
        wait_ready(client)
        assert send(client, b"once" + encoded(pattern())).json()["status"] == "ok"
        metrics = client.get("/metrics").text
        assert "cxr_films_read_again_total 1.0" in metrics and "cxr_rejects_total{" not in metrics
        send(client, b"hang"); send(client, b"abort")
        assert "cxr_films_read_again_total 2.0" in client.get("/metrics").text, "one that takes too long is not tried again"


def test_an_example_that_comes_by_rest_is_no_patient_s(store, guard, key, tmp_path):
    "However it comes: alone, in a batch, by the page; and the same picture in another file is a film."
    bundle = toy_bundle(tmp_path / "bundle", FACTS)
    (bundle / "examples").mkdir(); (bundle / "examples" / "a_chest.png").write_bytes(example := encoded(pattern()))
    with TestClient(create_app(Classifier(bundle), store, ui=False, guard=guard), raise_server_exceptions=False) as client:
        wait_ready(client)
        found = send(client, example, "from-a-friend.png").json()
        line = client.post("/v1/batch", files=[("files", ("a.png", example))])
        assert found["example"] is True and found["status"] == "ok" and line.status_code == 200 and '"status":"ok"' in line.text.replace(": ", ":"), line.text
        at = f"/v1/studies/{found['study_id']}"
        assert client.get(at).json() == found and "a drawing" in client.get(f"{at}/report.html").text and client.get(f"{at}/heatmap.png").status_code == 200
        assert client.get("/v1/worklist", headers=key).json()["items"] == [] and not [n for n in store.place.names() if n.endswith(".png")]
        assert problem_of(client.post("/v1/feedback", json={"study_id": found["study_id"], "physician": "dr-a", "confirmed_label": "NORMAL"}, headers=key), 404)["code"] == "no_such_study"
        assert problem_of(client.get(f"{at}/fhir"), 404)["code"] == "no_such_study", "no other system hears of it"
        film = send(client, example + b"\0").json()
        assert film["example"] is False and [i["study_id"] for i in client.get("/v1/worklist", headers=key).json()["items"]] == [film["study_id"]]


def test_the_page_says_what_a_film_did_to_its_decoder(classifier, store, bad_codec):
    from cxr_pred.clinic.app import read
    from cxr_pred.clinic.reading import ReadingRoom
    room = ReadingRoom(classifier, store, guard=bad_codec).open()
    try:
        card, study = read(room, lambda: b"abort")
        assert "decoder_crashed" in card and study == "" and store.pending() == []
        assert read(room, lambda: encoded(pattern()))[1]
    finally: room.close(); bad_codec.close()


def test_nothing_is_ready_before_the_decoders_are(classifier, store, tmp_path, monkeypatch):
    "A decoder that takes its time, and one that cannot start."
    go = tmp_path / "go"
    (tmp_path / "slow_codec.py").write_text(f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(.02)\nfrom cxr_pred.data.guarded import read_bytes as read")
    (tmp_path / "no_codec.py").write_text("import a_library_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    with TestClient(create_app(classifier, store, ui=False, guard=Guard(1, call="slow_codec:read")), raise_server_exceptions=False) as client:
        for _ in range(5): assert problem_of(client.get("/readyz"), 503)["code"] == "not_ready" and client.get("/healthz").status_code == 200
        go.touch()
        wait_ready(client)
        client.app.state.room.guard.close()
        assert problem_of(send(client, encoded(pattern())), 503)["code"] == "busy"
    with TestClient(create_app(classifier, store, ui=False, guard=Guard(1, call="no_codec:read")), raise_server_exceptions=False) as client:
        assert problem_of(send(client, encoded(pattern())), 503)["code"] == "no_worker" and problem_of(client.get("/readyz"), 503)["code"] == "no_worker"
        assert 'cxr_failures_total{code="no_worker"} 1.0' in client.get("/metrics").text, "who asks whether it is ready is no film that failed"
        client.app.state.room.guard.close()


def test_the_decoders_end_with_the_service(classifier, store):
    import psutil
    with TestClient(create_app(classifier, store, ui=False), raise_server_exceptions=False) as client:
        wait_ready(client)
        room = client.app.state.room
        team = [room.guard.free.get() for _ in range(2)]
        pids = [w.process.pid for w in team]
        for w in team: room.guard.free.put(w)
        assert len(set(pids)) == 2 and all(psutil.pid_exists(p) for p in pids)
    assert not any(psutil.pid_exists(p) for p in pids)


def test_openapi_names_every_address(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/v1/predict", "/v1/batch", "/v1/studies/{study_id}", "/v1/studies/{study_id}/explanation", "/v1/studies/{study_id}/heatmap.png", "/v1/studies/{study_id}/report.html", "/v1/feedback", "/healthz", "/readyz", "/metrics",
                          "/v1/studies/{study_id}/consultation.pdf", "/v1/studies/{study_id}/fhir", "/v1/studies/{study_id}/sr.dcm", "/v1/studies/{study_id}/heatmap.dcm", "/dicomweb/studies", "/dicomweb/studies/{study_uid}",
                          "/v1/login", "/v1/login/key", "/v1/logout", "/v1/me", "/v1/oidc/login", "/v1/oidc/callback", "/v1/worklist", "/v1/worklist/figures", "/v1/worklist/benefit", "/v1/worklist/{study_id}", "/v1/worklist/{study_id}/reading", "/v1/worklist/{study_id}/adjudication"}
    document = client.get("/openapi.json").json()
    assert document["paths"]["/v1/feedback"]["post"]["security"] == [{"HTTPBearer": []}] and "security" not in document["paths"]["/v1/predict"]["post"]
    docs = client.get("/docs").text
    assert all(p in docs for p in paths) and "<script" not in docs and not re.findall(r'(?:src|href)="(?:https?:)?//', docs)


SERVED = """
import sys, threading, time, socket
from pathlib import Path
import httpx, uvicorn
from cxr_pred.clinic.api import create_app
from cxr_pred.clinic.auth import clinic_settings
from cxr_pred.store import Store
from cxr_pred.vision.classify import Classifier
bundle, state, film = map(Path, sys.argv[1:])
s = socket.socket(); s.bind(("127.0.0.1", 0))
server = uvicorn.Server(uvicorn.Config(create_app(Classifier(bundle), Store(f"sqlite:///{state}/cxr.db", state)), log_level="error"))
threading.Thread(target=server.run, kwargs={"sockets": [s]}, daemon=True).start()
url = f"http://127.0.0.1:{s.getsockname()[1]}"
for _ in range(300):
    try:
        if httpx.get(url + "/readyz").status_code == 200: break
    except httpx.TransportError: pass
    time.sleep(0.05)
r = httpx.post(url + "/v1/predict", files={"file": film.read_bytes()}, timeout=30)
assert r.status_code == 200 and r.json()["finding"], r.text
assert "gradio" in httpx.get(url + "/").text
print("gradio" in sys.modules, sorted(m for m in ("torch", "torchvision", "transformers", "litgpt", "timm", "lightning", "mlflow") if m in sys.modules))
"""


def test_the_process_that_classifies_does_not_import_torch(classifier, tmp_path):
    (tmp_path / "film.png").write_bytes(encoded(pattern()))
    r = subprocess.run([sys.executable, "-W", "ignore", "-c", SERVED, classifier.bundle.path, tmp_path / "state", tmp_path / "film.png"], capture_output=True, text=True, timeout=180, cwd=root(),
                       env=os.environ | {"PYTHONPATH": str(root()), "CXR_STATE": str(tmp_path / "state")})
    assert r.stdout.split("\n")[0] == "True []", r.stdout + r.stderr


# ---- the examples of the document
def examples_of(document):
    "Method, path, where (body or a status), schema and example of each that there is."
    for path, operations in document["paths"].items():
        for method, op in operations.items():
            for where, part in [("body", op.get("requestBody", {})), *op["responses"].items()]:
                for content in part.get("content", {}).values():
                    if "example" in content: yield method, path, where, content["schema"], content["example"]


def test_every_example_fits_its_schema(client):
    import jsonschema
    document = client.get("/openapi.json").json()
    found = list(examples_of(document))
    for method, path, where, schema, example in found:
        jsonschema.validate(example, schema | {"components": document["components"]}, format_checker=jsonschema.FormatChecker())
        with pytest.raises(jsonschema.ValidationError): jsonschema.validate([], schema | {"components": document["components"]})
    shown = {(m, p, w) for m, p, w, *_ in found}
    assert {("post", "/v1/predict", "200"), ("get", "/v1/studies/{study_id}", "200"), ("post", "/v1/feedback", "body"), ("post", "/v1/feedback", "201"), ("get", "/v1/worklist", "200"), ("post", "/v1/worklist/{study_id}/reading", "body")} <= shown
    for path in ("/v1/predict", "/v1/feedback", "/v1/worklist"):   # every refusal that the document announces has one
        for method, op in document["paths"][path].items():
            assert {(method, path, s) for s, r in op["responses"].items() if "application/problem+json" in r["content"] and (method, s) != ("get", "400")} <= shown
    page = client.get("/docs").text
    assert "Example of a body" in page and "already_closed" in page and "dr-a" in page and "src=" not in page


def test_a_refusals_example_is_what_is_answered(client, monkeypatch, classifier, guard, tmp_path):
    "Each is provoked."
    examples = {(p, w): e for _, p, w, _, e in examples_of(client.get("/openapi.json").json())}
    film = {"file": ("f.png", encoded(pattern()))}
    got = {("/v1/predict", "400"): client.post("/v1/predict", content=b"\xff{", headers={"content-type": "multipart/form-data"}), ("/v1/predict", "401"): client.post("/v1/predict", files=film, headers={"Authorization": "Bearer x"}),
           ("/v1/predict", "413"): client.post("/v1/predict", content=b"", headers={"content-length": str(10**9)}), ("/v1/predict", "415"): client.post("/v1/predict", files={"file": ("f", b"Dear colleague")}),
           ("/v1/predict", "422"): client.post("/v1/predict", files=film, data={"age": "very"}), ("/v1/studies/{study_id}", "404"): client.get("/v1/studies/x"), ("/v1/worklist", "403"): client.get("/v1/worklist"), ("/v1/feedback", "403"): client.post("/v1/feedback")}
    monkeypatch.setenv("CXR_PHYSICIAN_KEY", "k"); reload_settings()
    key = {"Authorization": "Bearer k"}
    try:
        got |= {("/v1/worklist", "422"): client.get("/v1/worklist?limit=201", headers=key), ("/v1/worklist", "401"): client.get("/v1/worklist")}
        got["/v1/feedback", "400"] = client.post("/v1/feedback", headers=key | {"Content-Type": "application/json"}, content=b"\xff{")
        got["/v1/feedback", "422"] = client.post("/v1/feedback", headers=key, json={"study_id": "x", "physician": "dr-a"})
        study = client.post("/v1/predict", files=film).json()["study_id"]
        body = {k: v for k, v in examples["/v1/worklist/{study_id}/reading", "body"].items()} | {"confirmed_label": client.get(f"/v1/studies/{study}").json()["finding"]["label"]}
        assert client.post(f"/v1/worklist/{study}/reading", headers=key, json=body).status_code == 201
        got["/v1/worklist/{study_id}/reading", "409"] = client.post(f"/v1/worklist/{study}/reading", headers=key, json=body)
    finally: monkeypatch.undo(); reload_settings()
    fresh = create_app(classifier, Store(f"sqlite:///{tmp_path}/b.db", tmp_path / "b"), ui=False, guard=guard)
    fresh.state.room.check = lambda wait_s=0: type(fresh.state.room).check(fresh.state.room, 0)   # never opened, and nobody waits
    got["/v1/predict", "503"] = TestClient(fresh).post("/v1/predict", files=film)
    from unittest.mock import MagicMock
    from cxr_pred.clinic.door import too_many
    assert json.loads(too_many(20, MagicMock()).body) == examples["/v1/predict", "429"]
    for (path, status), r in got.items(): assert str(r.status_code) == status and r.json() == examples[path, status], (path, status, r.text)
    fresh.state.room.store.close()
