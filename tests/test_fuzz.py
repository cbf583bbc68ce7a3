"Requests made from the OpenAPI document, right and wrong, against a real server: 500 of them, 10,000 where CXR_SLOW is set. No answer is a 5xx, and each is one that the document announces, in its form."
import os, socket, threading, time
from collections import Counter

import httpx
import pytest
import uvicorn
from test_api import FACTS, encoded, guard, pattern  # noqa: F401

from cxr_pred.clinic.api import create_app
from cxr_pred.core import reload_settings
from cxr_pred.store import Store
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.toy import toy_bundle

schemathesis = pytest.importorskip("schemathesis")
CASES = 10_000 if os.environ.get("CXR_SLOW") else 500


@pytest.fixture(scope="module")
def service(tmp_path_factory, guard):
    "The address of a service with a toy's bundle, its store, and the physicians' key."
    d = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CXR_PHYSICIAN_KEY", "fuzz"); m.setenv("CXR_MAX_UPLOAD_MB", "2"); reload_settings()
        store = Store(f"sqlite:///{d}/cxr.db", d / "state")
        with socket.create_server(("127.0.0.1", 0)) as s:
            server = uvicorn.Server(uvicorn.Config(create_app(Classifier(toy_bundle(d / "bundle", FACTS)), store, ui=False, guard=guard), log_level="error"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [s]}, daemon=True); thread.start()
            url, end = f"http://127.0.0.1:{s.getsockname()[1]}", time.monotonic() + 120
            while True:
                try:
                    if httpx.get(f"{url}/readyz", timeout=5).status_code == 200: break
                except httpx.TransportError: pass
                assert time.monotonic() < end; time.sleep(.05)
            yield url, store, {"Authorization": "Bearer fuzz"}
            server.should_exit = True; thread.join(30)
        store.close()
    reload_settings()


def test_every_answer_is_one_that_the_document_announces(service):
    from hypothesis import HealthCheck, given, settings, strategies as st
    from hypothesis.errors import Unsatisfiable
    url, store, key = service
    study = httpx.post(f"{url}/v1/predict", files={"file": encoded(pattern())}, timeout=60).json()["study_id"]
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [o for r in schema.get_all_operations() if not (o := r.ok()).path.startswith(("/v1/oidc/", "/dicomweb/"))]   # there is no provider: test_door brings one; DICOM is below
    each, seen, wrong, c = CASES // 16, Counter(), [], schemathesis.checks
    checks = [c.not_a_server_error, c.status_code_conformance, c.content_type_conformance, c.response_headers_conformance, c.response_schema_conformance]
    for operation in operations:
        for mode in schemathesis.GenerationMode:   # as the document says, and not
            @settings(max_examples=each, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode), physician=st.booleans(), known=st.booleans())
            def ask(case, physician, known):
                if known and "study_id" in (case.path_parameters or {}): case.path_parameters["study_id"] = study
                answer = case.call(headers=dict(case.headers or {}) | (key if physician else {}), timeout=60)
                seen[answer.status_code] += 1
                case.validate_response(answer, checks=checks)
            try: ask()
            except Unsatisfiable: assert mode == schemathesis.GenerationMode.NEGATIVE, operation.label   # there is no wrong way to ask for it
            except (Exception, BaseExceptionGroup) as e: wrong.append(f"{operation.label}: {type(e).__name__}: {e} {getattr(e, 'exceptions', '')}")
    assert not wrong, "\n\n".join(w[:1500] for w in wrong)
    assert sum(seen.values()) >= CASES and not [s for s in seen if s >= 500], seen
    assert store.verify().broken is None and {200, 404, 422} <= set(seen)


def test_any_body_sent_as_dicom_is_refused_in_words(service):
    "STOW-RS: boundaries, heads and bodies that are almost right, or not at all."
    from hypothesis import HealthCheck, given, settings, strategies as st
    url, store, _ = service
    before, seen = len(list(store.place.names())), Counter()
    boundary = st.sampled_from(["b", "b", "b", "b b", "", "--", "\u00e9", "x" * 300, "b\"; boundary=c"])
    kind = st.sampled_from(['multipart/related; type="application/dicom"; boundary={}', "multipart/related; boundary={}", "multipart/form-data; boundary={}", "application/dicom", "", "multipart/related; type=application/dicom+xml; boundary={}"])
    piece = st.one_of(st.binary(max_size=200), st.sampled_from([b"--b\r\n", b"--b--\r\n", b"\r\n--b\r\n", b"\r\n--b--", b"Content-Type: application/dicom\r\n\r\n", b"Content-Type: text/plain\r\n\r\n", b"\0" * 128 + b"DICM", b"\2\0\0\0UL\4\0\xff\xff\xff\xff"]))

    body = st.one_of(st.lists(piece, max_size=8).map(b"".join), st.lists(st.lists(piece, max_size=3).map(b"".join), min_size=1, max_size=3).map(lambda parts: b"".join(b"--b\r\nContent-Type: application/dicom\r\n\r\n%s\r\n" % p for p in parts) + b"--b--\r\n"))
    @settings(max_examples=CASES // 5, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(kind, boundary, body, st.sampled_from(["", "/1.2.3", "/1..2", "/" + "1" * 70, "/%00"]))
    def ask(kind, boundary, body, study):
        r = httpx.post(f"{url}/dicomweb/studies{study}", content=body, headers={"Content-Type": kind.format(boundary).encode()}, timeout=60)
        seen[r.status_code] += 1
        assert r.status_code in (400, 404, 409, 415, 422), (r.status_code, r.text)
        assert r.headers["content-type"].startswith(("application/problem+json", "application/dicom+json")) and (r.status_code == 409 or r.json()["code"])
    ask()
    assert len(list(store.place.names())) == before and {400, 409, 415} <= set(seen), seen
