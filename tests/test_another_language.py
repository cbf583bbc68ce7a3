"Explanations in another language, from the instruction pairs to what a person reads, in a pseudo-locale that no rule knows."
import re, shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from cxr_pred.clinic.writer import explanation_for, problems_of
from cxr_pred.core import read_json, root
from cxr_pred.ops.translate import Flat, flat
from cxr_pred.language.case import Case
from cxr_pred.language.facts import load_facts
from cxr_pred.language.findings import template_explanation
from cxr_pred.language.sft import NO_ANSWER_CASES, case_of, read_pairs
from cxr_pred.language.verify import check
from cxr_pred.language.wordings import accented, pseudo_language
from cxr_pred.vision.bundle import seal
from cxr_pred.vision.toy import toy_bundle, toy_patterns

ROOT = root()
ENGLISH = load_facts(ROOT / "nbs" / "language" / "facts.yaml")
PLAIN_VOWEL = re.compile("[aeiouy]")


def is_english(text: str) -> bool: return bool(PLAIN_VOWEL.search(text))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The stages sft, train_llm and evaluate_llm as the pipeline runs them, with a facts file of en-XA and a random base."
    import papermill as pm
    from cxr_pred.language.base import toy_base
    from cxr_pred.language.sft import grammar_pairs
    folder = tmp_path_factory.mktemp("project")
    (folder / "nbs/language").mkdir(parents=True)
    for name in ("settings.ini", "params.yaml", "nbs/language/facts.yaml"): shutil.copyfile(ROOT / name, folder / name)
    (folder / "strange.yaml").write_text(yaml.dump(flat(pseudo_language(ENGLISH)), Dumper=Flat, sort_keys=False, allow_unicode=True), encoding="utf-8")
    facts = load_facts(folder / "strange.yaml")
    toy_base(folder / "run/llm_base", [f"{p['prompt']}\n{p['answer']}" for p in grammar_pairs(40, facts)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_ROOT", str(folder)); patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        for stage, params in (("sft", {"n_pairs": 60, "facts_file": "strange.yaml"}), ("train_llm", {"rank": 2, "alpha": 4, "steps": 2, "micro_batch": 2, "max_tokens": 1024, "val_pairs": 2}),
                              ("evaluate_llm", {"n_findings": 3, "n_untrained": 1, "most": 600, "most_untrained": 12, "facts_file": "strange.yaml"})):
            pm.execute_notebook(ROOT / f"nbs/pipelines/{stage}.ipynb", folder / f"{stage}.ipynb", {"profile": "sample", "run": "run", **params}, kernel_name="python3", language="python", cwd=folder, progress_bar=False)
    return folder, facts


def test_the_pairs_are_in_the_language(made):
    folder, facts = made
    pairs = [p for split in ("train", "val", "test") for p in read_pairs(folder / f"run/sft/{split}.jsonl")]
    assert len(pairs) == 60 and not any(is_english(re.sub(r"COVID-19", "", p["answer"].replace("summary", "").replace("details", ""))) for p in pairs)
    told = [line.split(": ", 1)[1] for p in pairs for line in p["prompt"].splitlines() if not line.startswith("reader:")]
    assert not [t for t in told if is_english(t.replace("COVID-19", "").replace(", at ", ""))], "nor does the prompt say anything of the case in English"


def test_what_no_rule_can_judge_is_not_measured(made):
    folder, _ = made
    m = read_json(folder / "run/metrics/llm.json")
    assert m["verified_by"] is None and m["n"] == 3
    for name in ("unsupported_finding_rate", "contradiction_rate", "urgency_below_rule_rate", "form_rate", "readability_grade"): assert {*m[name].values()} == {None}, name
    assert m["fallback_rate"]["served"] == m["fallback_rate"]["verified"] == 0 and m["fallback_rate"]["trained"] == 1, "a random model chooses sentences as well as any, and writes none"
    from cxr_pred.evaluate.gates import check_gates
    gate = {"name": "invented", "metric": "llm.unsupported_finding_rate.verified", "below": 0.01, "action": "halt"}
    assert check_gates([gate], {"llm": m})[0]["gates"][0]["passed"] == "not measured" and check_gates([gate], {"llm": m})[0]["passed"] is False, "it has to be taken out by whoever reviewed the texts"
    from cxr_pred.evaluate.card import language_section
    assert "No rules read prose" in language_section(m)


def test_the_service_writes_it_and_the_reader_takes_it(made, tmp_path, monkeypatch):
    from fastapi.testclient import TestClient

    from cxr_pred.language.service import Desk, create_service
    folder, facts = made
    bundle = toy_bundle(tmp_path / "bundle", folder / "strange.yaml")
    shutil.copytree(folder / "run/llm", bundle / "llm", ignore=shutil.ignore_patterns("*.jsonl", "checkpoints"))
    for f in [f for f in (bundle / "llm").iterdir() if f.name not in ("adapter.safetensors", "adapter_config.json", "llm.json")]: f.unlink() if f.is_file() else shutil.rmtree(f)
    seal(bundle, "sample")
    monkeypatch.setenv("CXR_LLM_BASE", str(folder / "run/llm_base"))
    from cxr_pred.core import reload_settings
    reload_settings()
    with TestClient(create_service(desk := Desk(bundle, engine="litgpt"))) as client:
        assert desk.opened.wait(60) and desk.problem is None, desk.problem
        for pair in read_pairs(folder / "run/sft/test.jsonl")[:2]:
            case = case_of(pair)
            e = client.post("/v1/explain", json=case.model_dump(mode="json"))
            from cxr_pred.language.findings import Explanation
            said = Explanation.model_validate(e.json())
            assert (said.source, said.language) == ("llm", "en-XA") and not problems_of(said, case, facts) and not is_english(said.text.replace("COVID-19", ""))
            assert problems_of(said.model_copy(update={"details": said.details.replace("é", "e", 1)}), case, facts)
    reload_settings()


def test_a_film_is_answered_in_it(made, tmp_path):
    from cxr_pred.clinic.report import html_report
    from cxr_pred.clinic.study import read_study
    from cxr_pred.data.sample import png_bytes
    from cxr_pred.vision.classify import Classifier
    folder, facts = made
    reader = Classifier(toy_bundle(tmp_path / "bundle", folder / "strange.yaml"))
    report, film, heat = read_study(reader, png_bytes(np.clip(128 + 100 * np.kron(toy_patterns()[1], np.ones((14, 14))), 0, 255).astype(np.uint8)))
    report = report.model_copy(update={"explanation": explanation_for(report, facts)})
    assert (report.status, report.explanation.language) == ("ok", "en-XA")
    assert re.search(r'<div lang="en-XA"><p>[^<]+</p>', html_report(report, film, heat)), "a screen reader is told"


@pytest.mark.parametrize("status, reason", NO_ANSWER_CASES)
def test_no_answer_is_said_in_it(status, reason):
    facts = pseudo_language(ENGLISH)
    for who in ("adult", "child", "baby"):
        case = Case(status=status, reason_code=reason, age_group=who, symptoms=("fever",))
        e = template_explanation(case, facts)
        assert not is_english(e.text.replace("COVID-19", "")) and not check(e, case, facts) and e.urgency == template_explanation(case, ENGLISH).urgency


def test_a_physicians_prose_is_refused_and_counted(made):
    import pandas as pd
    from cxr_pred.language.sft import feedback_pairs
    _, facts = made
    own = accented("The reader sees signs of pneumonia. I agree with it, and a course of rest is what you need.")
    wrote = pd.DataFrame({"confirmed_label": ["PNEUMONIA"], "severity": [None], "edited_explanation": [own]})
    assert feedback_pairs(wrote, facts) == ([], 1)


def test_nothing_that_a_patient_reads_is_english(made, tmp_path):
    "Page's words and explanations both in en-XA: card, print and sheet hold no word of English."
    import html, os, subprocess, sys
    from cxr_pred.clinic.words import ENGLISH as PAGE
    folder, _ = made
    (tmp_path / "page.yaml").write_text(yaml.dump(flat(accented(PAGE | {"language": ""}) | {"language": "en-XA"}), Dumper=Flat, allow_unicode=True), encoding="utf-8")
    bundle = toy_bundle(tmp_path / "bundle", folder / "strange.yaml")
    code = """
import sys
from pathlib import Path
import numpy as np
from cxr_pred.clinic.app import waiting_card, example_caption
from cxr_pred.clinic.consultation import story
from cxr_pred.clinic.report import html_report
from cxr_pred.clinic.study import Patient, read_study
from cxr_pred.clinic.writer import explanation_for
from cxr_pred.data.sample import png_bytes
from cxr_pred.language.facts import load_facts
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.toy import toy_patterns
bundle, out = map(Path, sys.argv[1:])
reader, facts = Classifier(bundle), load_facts(bundle / "facts.yaml")
def said(x):
    if isinstance(x, list | tuple): return [t for y in x for t in said(y)]
    return [x.getPlainText()] if hasattr(x, "getPlainText") else said(getattr(x, "_content", None) or getattr(x, "_cellvalues", None) or [])
for k in (0, 1, 9):
    r, film, heat = read_study(reader, png_bytes(np.clip(128 + 100 * np.kron(toy_patterns()[k], np.ones((14, 14))), 0, 255).astype(np.uint8)), patient=Patient(age=40, sex="F", symptoms=["fever"]))
    assert r.status == "ok", k
    r = r.model_copy(update={"explanation": explanation_for(r, facts)})
    if k == 1: r = r.model_copy(update={"spread": False, "finding": r.finding.model_copy(update={"zones": ["right lower zone"]})})
    (out / f"{k}.html").write_text(html_report(r, film, heat)); (out / f"{k}.sheet.html").write_text("<br>".join(said(story(r, film, heat, None))))
(out / "waiting.html").write_text(waiting_card() + example_caption(Path("broken_elbow.png")))
"""
    r = subprocess.run([sys.executable, "-c", code, str(bundle), str(tmp_path)], env=os.environ | {"CXR_LANGUAGE": str(tmp_path / "page.yaml")}, capture_output=True, text=True, timeout=180)
    assert r.returncode == 0, r.stderr[-2000:]
    for f in sorted(tmp_path.glob("*.html")):
        text = re.sub(r"<(style|script).*?</\1>", " ", f.read_text(), flags=re.S)
        seen = [*re.split(r"<[^>]+>", text), *re.findall(r'(?:alt|aria-label|title)="([^"]*)"', text)]
        left = [t.strip() for t in map(html.unescape, seen) if is_english(re.sub(r"COVID-19|toy-[0-9a-f]+|\b[0-9a-f]{8,}\b|sample-[0-9a-f]+", "", t))]
        assert not left, (f.name, left)
    assert all(accented("right lower zone") in (tmp_path / n).read_text() for n in ("1.html", "1.sheet.html"))


def page_in(folder: Path, words: dict, code: str) -> list[str]:
    "What a program prints that is started with a page in another language."
    import os, subprocess, sys
    (folder / "page.yaml").write_text(yaml.dump(words, allow_unicode=True), encoding="utf-8")
    start = """
import sys
from pathlib import Path
import numpy as np
from cxr_pred.clinic.study import Patient, Settled, read_study
from cxr_pred.clinic.words import STRINGS, SHEET
from cxr_pred.data.sample import png_bytes
from cxr_pred.language.facts import load_facts
from cxr_pred.language.findings import template_explanation
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.toy import toy_bundle, toy_patterns
bundle = toy_bundle(Path(sys.argv[1]) / "bundle", Path(sys.argv[2]))
report, film, heat = read_study(Classifier(bundle), png_bytes(np.clip(128 + 100 * np.kron(toy_patterns()[1], np.ones((14, 14))), 0, 255).astype(np.uint8)), patient=Patient(age=40))
assert report.status == "ok"
report = report.model_copy(update={"explanation": template_explanation(report.case(), load_facts(bundle / "facts.yaml"))})
"""
    r = subprocess.run([sys.executable, "-c", start + code, str(folder), str(ROOT / "nbs/language/facts.yaml")], env=os.environ | {"CXR_LANGUAGE": str(folder / "page.yaml"), "PYTHONIOENCODING": "utf-8"}, capture_output=True, text=True, timeout=180)
    assert r.returncode == 0, r.stderr[-2000:]
    return r.stdout.splitlines()


def test_a_page_from_right_to_left_says_so_and_offers_no_sheet_without_letters(tmp_path):
    said = page_in(tmp_path, {"language": "ar", "title": "قارئ الأشعة", "names": {"PNEUMONIA": "التهاب رئوي"}}, """
from cxr_pred.clinic.app import page_language
from cxr_pred.clinic.consultation import consultation_pdf
from cxr_pred.clinic.report import card_html, html_report
from cxr_pred.core import SetupError
html, card = html_report(report, film, heat), card_html(report, film, heat, link="v1/studies/1")
print('<html lang="ar" dir="rtl">' in html, '<div lang="en" dir="ltr">' in html, 'lang="ar" dir="rtl">' in card, "consultation.pdf" in card, "report.html" in card, SHEET)
print(page_language(STRINGS["language"]))
try: consultation_pdf(report, film, heat)
except SetupError as e: print(e.code)
""")
    assert said == ["True True True False True False", 'Object.assign(document.documentElement, {"lang": "ar", "dir": "rtl"});', "no_letters"], said


def test_german_nouns_keep_their_letters_and_ages_are_understood(tmp_path):
    said = page_in(tmp_path, {"language": "de", "names": {"PNEUMONIA": "Lungenentzündung"}, "age_units": {"months": "Monat Monate"}, "complaints": {"severe chest pain": "starke Brustschmerzen"}, "errors": {"empty_file": "Die Datei ist leer."}}, """
from datetime import datetime, timezone
from cxr_pred.clinic.app import error_card, patient_fields, years_of
from cxr_pred.clinic.consultation import consultation_pdf
from cxr_pred.clinic.report import card_html, settled_line
from cxr_pred.core import InputError
import gradio as gr
with gr.Blocks(): fields = patient_fields()
print([name for name, key in fields[2].choices if key == "severe chest pain"], years_of("6 Monate"), years_of("6 MONATE."), years_of("6 monate"))
settled = Settled(label="PNEUMONIA", agrees=True, readers=1, at=datetime(2026, 1, 1, tzinfo=timezone.utc))
print(settled_line(report.model_copy(update={"settled": settled})).endswith(": Lungenentzündung."))
card = error_card(InputError("empty_file", "x.png is empty.", "Copy it again."))
print("Die Datei ist leer." in card, "Copy" in card, "is damaged" in error_card(InputError("corrupt", "x.png is damaged.", "Export it again.")))
print(SHEET, consultation_pdf(report, film, heat)[:5], "consultation.pdf" in card_html(report, film, heat, link="x"), "dir=" in card_html(report, film, heat))
""")
    assert said == ["['Starke Brustschmerzen'] 0.5 0.5 0.5", "True", "True False True", "True b'%PDF-' True False"], said


def test_several_are_joined_as_the_language_joins_them():
    from cxr_pred.vision.finding import Finding
    facts = pseudo_language(ENGLISH)
    facts["words"] = facts["words"] | {"join": {"and": "和", "or": "或", "zones": "和", "comma": "、", "beside": ""}}
    p = {l: 0.01 for l in facts["classes"]} | {"PNEUMONIA": 0.91}
    case = Case(finding=Finding(label="PNEUMONIA", probability=0.91, probabilities=p, prediction_set=["PNEUMONIA", "TUBERCULOSIS", "COVID19", "NORMAL"], zones=["left upper zone", "left lower zone"]), symptoms=("cough", "fever", "weight loss"))
    e = template_explanation(case, facts)
    assert "á cøügh、á févér和wéíght løss" in e.details and "léft üppér zøné和léft løwér zøné" in e.details and "或á nørmál fílm" in e.details and not check(e, case, facts)
