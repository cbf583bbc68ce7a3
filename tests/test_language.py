"Reader and language service as the two processes that they are: an explanation crosses over, and its absence is seen and counted."
import json, os, shutil, socket, subprocess, sys, time

import httpx
import pytest

from cxr_pred.core import read_json, root
from cxr_pred.vision.bundle import seal
from cxr_pred.vision.toy import toy_bundle

FACTS = root() / "nbs" / "language" / "facts.yaml"
REFUSED = ("llm_bad_form", "llm_unsupported")  # a random model is cut off, or says what it must not


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    "A toy bundle whose language model is random: it answers, and never anything that a person may read."
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


@pytest.fixture(scope="module")
def llm(bundle):
    folder, base = bundle
    port = free_port()
    env = os.environ | {"CXR_LLM_BASE": str(base), "CXR_LLM_TIMEOUT_S": "20"}
    p = subprocess.Popen([sys.executable, "-m", "cxr_pred.cli", "llm-serve", "--port", str(port), "--bundle", str(folder)], env=env)
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


@pytest.fixture
def answered(bundle, llm):
    "Status, reason and finding of a film as the reader would send them."
    from cxr_pred.language.sft import case_of, grammar_pairs
    from cxr_pred.language.facts import load_facts
    return {"status": "ok", "reason_code": "ok", "finding": case_of(grammar_pairs(5, load_facts(FACTS), no_answer_share=0)[1]).finding.model_dump(mode="json")}


def test_service_answers_with_an_explanation_that_passed_the_check(llm, answered):
    r = httpx.post(f"{llm}/v1/explain", json=answered, timeout=60)
    assert r.status_code == 200 and r.json()["verified"] is True
    assert r.json()["source"] == "template" and r.json()["fallback_reason"] in REFUSED, "a random model writes nothing that may be shown"
    metrics = httpx.get(f"{llm}/metrics").text
    assert f'cxr_llm_explanations_total{{reason="{r.json()["fallback_reason"]}",source="template"}} 1.0' in metrics


@pytest.mark.parametrize("bad", [{}, {"status": "ok", "reason_code": "ok"}, {"status": "ok", "reason_code": "ok", "finding": None, "name": "A. Patient"}])
def test_service_refuses_what_is_no_question(llm, bad):
    assert httpx.post(f"{llm}/v1/explain", json=bad).status_code == 422


def test_reader_takes_the_services_answer_and_counts_the_fallback(bundle, llm, tmp_path):
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
    room = ReadingRoom(Classifier(bundle[0]), Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path), llm_url=llm).open()
    try:
        report = room.predict(out.getvalue())
        assert report.explanation_status == "pending" and report.explanation is None, "the finding comes at once"
        end = time.monotonic() + 60
        while (r := room.report(report.study_id)).explanation is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert (reason := r.explanation.fallback_reason) in REFUSED
        assert room.metrics.value("cxr_explanation_fallbacks_total", reason=reason) == 1
    finally: room.close(); room.store.close()


def test_reader_goes_on_when_the_service_is_gone(bundle, answered):
    from cxr_pred.clinic.study import Report
    from cxr_pred.clinic.writer import explanation_for, language_client
    from cxr_pred.language.facts import load_facts
    report = Report(study_id="0" * 32, bundle_hash="0" * 64, **answered)
    e = explanation_for(report, load_facts(FACTS), language_client(f"http://127.0.0.1:{free_port()}"))
    assert (e.source, e.fallback_reason) == ("template", "llm_unreachable")
