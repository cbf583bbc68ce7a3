"Reader and language service as the two processes that they are: an explanation crosses over, and its absence is seen and counted."
import json, os, shutil, socket, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from cxr_pred.core import read_json, root
from cxr_pred.vision.bundle import seal
from cxr_pred.vision.toy import toy_bundle

FACTS = root() / "nbs" / "language" / "facts.yaml"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "A toy bundle whose language model is random: all it can do is choose among what may be said."
    from cxr_pred.language.base import toy_base
    from cxr_pred.language.facts import load_facts
    from cxr_pred.language.qlora import train_adapter
    from cxr_pred.language.sft import grammar_pairs
    folder = toy_bundle(tmp_path_factory.mktemp("b") / "bundle", FACTS)
    base = folder.parent / "base"
    pairs = grammar_pairs(20, load_facts(FACTS), seed=1)
    toy_base(base, [p["answer"] for p in pairs])
    train_adapter(base, pairs, [], folder / "llm", rank=2, alpha=4, steps=1, micro_batch=1, max_tokens=1024)
    (folder / "llm" / "llm.json").write_text(json.dumps({"base": read_json(base / "base.json")}))
    seal(folder, "sample")
    return folder, base


@contextmanager
def serving(bundle, *more, log=None):
    folder, base = bundle
    port = free_port()
    env = os.environ | {"CXR_LLM_BASE": str(base), "CXR_LLM_TIMEOUT_S": "20"}
    p = subprocess.Popen([sys.executable, "-m", "cxr_pred.cli", "llm-serve", "--port", str(port), "--bundle", str(folder), *more], env=env, stderr=log)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200: break
            except httpx.TransportError: pass
            assert p.poll() is None and time.monotonic() < end, "the language service does not come up"
            time.sleep(0.2)
        yield url
    finally:
        p.terminate()
        p.wait(20)


@pytest.fixture(scope="module")
def llm(bundle):
    with serving(bundle) as url: yield url


@pytest.fixture
def answered(bundle, llm):
    "Status, reason and finding of a film as the reader would send them."
    from cxr_pred.language.sft import case_of, grammar_pairs
    from cxr_pred.language.facts import load_facts
    return {"status": "ok", "reason_code": "ok", "finding": case_of(grammar_pairs(5, load_facts(FACTS), no_answer_share=0)[1]).finding.model_dump(mode="json")}


def test_service_answers_with_an_explanation_that_passed_the_check(llm, answered):
    r = httpx.post(f"{llm}/v1/explain", json=answered, timeout=60)
    assert r.status_code == 200 and r.json()["verified"] is True
    assert (r.json()["source"], r.json()["fallback_reason"]) == ("llm", ""), "a random model too says only what may be said"
    metrics = httpx.get(f"{llm}/metrics").text
    assert 'cxr_llm_explanations_total{reason="",source="llm"} 1.0' in metrics


def test_a_base_in_four_bits_is_served_like_any_other(bundle, answered):
    with serving(bundle, "--engine", "nf4") as url:
        said = httpx.post(f"{url}/v1/explain", json=answered, timeout=60).json()
        assert (said["source"], said["verified"]) == ("llm", True) and 'cxr_llm_engine{engine="nf4"} 1.0' in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize("bad", [{}, {"status": "ok", "reason_code": "ok"}, {"status": "ok", "reason_code": "ok", "finding": None, "name": "A. Patient"}])
def test_service_refuses_what_is_no_question(llm, bad):
    assert httpx.post(f"{llm}/v1/explain", json=bad).status_code == 422


@pytest.mark.parametrize("there", [True, False])
def test_reader_takes_the_services_answer_or_counts_the_fallback(bundle, llm, tmp_path, there):
    from cxr_pred.clinic.reading import ReadingRoom
    from cxr_pred.store import Store
    from cxr_pred.vision.classify import Classifier
    from cxr_pred.vision.toy import toy_patterns
    import io
    import numpy as np
    from PIL import Image
    p = toy_patterns()[1]
    out = io.BytesIO()
    Image.fromarray((255 * (p - p.min()) / np.ptp(p)).astype(np.uint8)).resize((300, 300)).save(out, "PNG")
    room = ReadingRoom(Classifier(bundle[0]), Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path), llm_url=llm if there else f"http://127.0.0.1:{free_port()}").open()
    try:
        report = room.predict(out.getvalue())
        assert report.explanation_status == "pending" and report.explanation is None, "the finding comes at once"
        end = time.monotonic() + 60
        while (r := room.report(report.study_id)).explanation is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert (r.explanation.source, r.explanation.fallback_reason) == (("llm", "") if there else ("template", "llm_unreachable"))
        assert (room.metrics.value("cxr_explanation_fallbacks_total", reason="llm_unreachable") or 0) == (0 if there else 1)
    finally: room.close(); room.store.close()


@pytest.fixture
def desk(bundle, monkeypatch):
    "An opened desk in this process, with two seats and two seconds for an explanation."
    from cxr_pred.core import reload_settings
    from cxr_pred.language.service import Desk
    monkeypatch.setenv("CXR_LLM_BASE", str(bundle[1])); monkeypatch.setenv("CXR_LLM_TIMEOUT_S", "2"); reload_settings()
    d = Desk(bundle[0], waiting=1)
    d.open()
    yield d
    monkeypatch.undo(); reload_settings()


def test_who_waited_too_long_gets_the_template(desk, answered):
    "The limit is for waiting and writing together: who asked has gone when the first text has used it up."
    from cxr_pred.language.case import Case
    began, go = threading.Event(), threading.Event()
    stream = desk.writer.stream
    def slow(*a, **k): began.set(); go.wait(30); yield from stream(*a, **k)
    desk.writer.stream = slow
    case = Case.model_validate(answered)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(desk.explain, case); assert began.wait(30)
        second = pool.submit(desk.explain, case)
        time.sleep(2); go.set()
        first.result(60); said = second.result(60)
    assert (said.source, said.fallback_reason) == ("template", "llm_timeout")
    desk.writer.stream = stream
    assert desk.explain(case).source == "llm", "the next one has its whole time again"
    assert desk.registry.get_sample_value("cxr_llm_busy") == 0


def test_a_seat_is_free_again_where_no_thread_can_be_started(desk, answered, monkeypatch):
    from fastapi.testclient import TestClient
    from cxr_pred.language import service
    start = threading.Thread.start
    def none(self):
        if self.name == "write": raise RuntimeError("can't start new thread")
        start(self)
    with TestClient(service.create_service(desk), raise_server_exceptions=False) as client:
        monkeypatch.setattr(threading.Thread, "start", none)
        said = [client.post("/v1/explain", json=answered) for _ in range(4)]
        monkeypatch.setattr(threading.Thread, "start", start)
        assert [r.json()["code"] for r in said] == ["internal_error"] * 4, "and never busy: there are two seats"
        assert client.post("/v1/explain", json=answered).json()["source"] == "llm" and desk.registry.get_sample_value("cxr_llm_busy") == 0


def test_reader_goes_on_when_the_service_is_gone(bundle, answered):
    from cxr_pred.clinic.study import Report
    from cxr_pred.clinic.writer import explanation_for, language_client
    from cxr_pred.language.facts import load_facts
    report = Report(study_id="0" * 32, bundle_hash="0" * 64, **answered)
    e = explanation_for(report, load_facts(FACTS), language_client(f"http://127.0.0.1:{free_port()}"))
    assert (e.source, e.fallback_reason) == ("template", "llm_unreachable")


def test_a_text_that_is_no_choice_of_what_may_be_said_is_not_shown():
    "True, in plain words and past the check: and yet nobody has reviewed the sentence."
    from cxr_pred.language.facts import load_facts
    from cxr_pred.language.findings import assemble, choices, parts, write_answer
    from cxr_pred.language.generate import fits, judge
    from cxr_pred.language.sft import case_of, grammar_pairs
    from cxr_pred.language.verify import check
    facts = load_facts(FACTS)
    for pair in grammar_pairs(40, facts, seed=4, no_answer_share=0):
        case = case_of(pair)
        said = parts(case, facts)
        assert judge(pair["answer"], case, facts).source == "llm"
        other = said | {"summary": said["summary"][:-1] + ", it says."}
        assert not check(assemble(other, case, facts, source="llm", verified=True), case, facts) and not fits(other, choices(case, facts))
        e = judge(write_answer(other), case, facts)
        assert (e.source, e.fallback_reason) == ("template", "llm_unsupported")


def test_what_the_decoder_lets_through_is_what_may_be_said(bundle):
    "Two hundred texts of random scores: each is one choice of its case, and the check finds nothing in any."
    import numpy as np
    from litgpt import Tokenizer
    from cxr_pred.language.base import config_of
    from cxr_pred.language.facts import load_facts
    from cxr_pred.language.findings import choices
    from cxr_pred.language.generate import Form, judge
    from cxr_pred.language.sft import case_of, grammar_pairs
    facts, base = load_facts(FACTS), bundle[1]
    tok, width = Tokenizer(base), config_of(base).padded_vocab_size
    form, texts = Form(tok, width), set()
    for i, pair in enumerate(grammar_pairs(200, facts, seed=9, no_answer_share=0)):
        case, scores = case_of(pair), np.random.default_rng(i)
        pen, ids = form.pen(said=choices(case, facts)), []
        while len(ids) < 4000 and (token := pen.next(scores.standard_normal(width))) != tok.eos_id: ids.append(token)
        texts.add(text := tok.processor.decode(ids))
        assert judge(text, case, facts).source == "llm", text
    assert len(texts) > 190


def test_the_id_of_a_request_is_on_the_lines_of_both_services(bundle, tmp_path):
    "A film under a proxy's id: the reader's answer and lines have it, and so has the language service's line about the text that is written after the answer."
    import io, logging, uuid
    from fastapi.testclient import TestClient
    from test_api import encoded, pattern, wait_ready
    from cxr_pred.clinic.api import create_app
    from cxr_pred.clinic.logs import ecs_log, events
    from cxr_pred.store import Store
    from cxr_pred.vision.classify import Classifier
    given, out, base = [str(uuid.uuid4()) for _ in range(2)], io.StringIO(), logging.getLogger()
    before, level = base.handlers[:], base.level
    store, handler = Store(f"sqlite:///{tmp_path}/a.db", tmp_path / "state"), ecs_log("cxr-reader", out)
    try:
        with open(tmp_path / "writer.log", "wb") as log, serving(bundle, "--ecs", log=log) as url, TestClient(create_app(Classifier(bundle[0], threads=1), store, ui=False, llm_url=url)) as web:
            wait_ready(web, 60)
            answers = [web.post("/v1/predict", files={"file": ("f.png", encoded(pattern()))}, headers={"X-Request-ID": i}) for i in given]
            ids = [a.json()["study_id"] for a in answers]
            end = time.monotonic() + 60
            while any(web.get(f"/v1/studies/{i}").json()["explanation_status"] == "pending" for i in ids): assert time.monotonic() < end; time.sleep(0.2)
            broken = httpx.post(f"{url}/v1/explain", content=b"{", headers={"X-Request-ID": "anna-miller-1970"})
    finally:
        base.removeHandler(handler); base.setLevel(level); events.setLevel(logging.NOTSET)
        for h in before: base.addHandler(h)
        store.close()
    assert [a.headers["x-request-id"] for a in answers] == given
    done = lambda lines: [(l["trace"]["id"], l["event"]["action"]) for l in map(json.loads, lines) if l.get("event", {}).get("action") in ("film-read", "request", "study.recorded") and l.get("trace", {}).get("id") in given]
    assert sorted(done(out.getvalue().splitlines())) == sorted((i, a) for i in given for a in ("film-read", "request", "study.recorded"))
    written = (tmp_path / "writer.log").read_text()
    assert done(written.splitlines()) == [(i, "request") for i in given]
    last = json.loads(written.splitlines()[-1])
    assert last["trace"]["id"] == broken.headers["x-request-id"] and last["event"]["reason"] == "invalid_request" and "anna" not in written
