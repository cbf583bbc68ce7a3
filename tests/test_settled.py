"What physicians settled reaches the patient, the sheet, FHIR and DICOM; what they have not settled reaches nobody."
import html, io, json, random
from datetime import datetime, timedelta, timezone

import pydicom
import pytest
import sqlalchemy as sa
from sqlalchemy import event
from test_api import cat, encoded, guard, pattern, send  # noqa: F401
from test_door import bearer, classifier, client, store  # noqa: F401

from cxr_pred.clinic.auth import add_key
from cxr_pred.clinic.custody import forget
from cxr_pred.clinic.settled import closings, settled, settled_by
from cxr_pred.clinic.study import Report
from cxr_pred.clinic.words import STRINGS
from cxr_pred.clinic.worklist import Opinion, next_state, worklist_page
from cxr_pred.core import InputError
from cxr_pred.database import migrate, reach, writer
from cxr_pred.ops.feedback import closes, settles
from cxr_pred.store import Feedback, Store

FORMS = ("", "/report.html", "/consultation.pdf", "/fhir", "/fhir?version=r5", "/sr.dcm", "/heatmap.dcm", "/heatmap.png")


@pytest.fixture
def physicians(store): return {n: bearer(add_key(store, n, "physician")[0]) for n in ("dr-quill", "dr-feather", "dr-ink", "dr-blot")}


def forms(client, study) -> dict[str, bytes]:
    got = {f: client.get(f"/v1/studies/{study}{f}") for f in FORMS}
    assert {r.status_code for r in got.values()} == {200}, {f: r.status_code for f, r in got.items()}
    return {f: r.content for f, r in got.items()}


def say(client, who, study, label, kind="reading", **more):
    path, body = (f"/v1/worklist/{study}/{kind}", {}) if kind != "feedback" else ("/v1/feedback", {"study_id": study})
    r = client.post(path, json=body | {"confirmed_label": label} | more, headers=who)
    assert r.status_code == 201, r.text
    return r.json()


def told(got: dict[str, bytes]) -> tuple:
    "What each form says of a physician: JSON, page, FHIR's status, its first result, the SR and its text."
    bundle = json.loads(got["/fhir"])
    by_url = {e["fullUrl"]: e["resource"] for e in bundle["entry"]}
    report = bundle["entry"][0]["resource"]
    sr = pydicom.dcmread(io.BytesIO(got["/sr.dcm"]))
    return json.loads(got[""])["settled"], html.unescape(got["/report.html"].decode()), report, [by_url[r["reference"]] for r in report["result"]], sr, got["/sr.dcm"].decode(errors="replace")


def nameless(got: dict[str, bytes]) -> bool: return not any(n in body for body in got.values() for n in (b"quill", b"feather", b"dr-ink", b"dr-blot", b"I would write"))


def test_a_confirmed_study_says_so_everywhere(client, physicians):
    study = send(client, encoded(pattern()), age="54").json()["study_id"]
    before = forms(client, study)
    first, page, report, results, sr, text = told(before)
    assert first is None and report["status"] == "preliminary" and len(results) == 1 and sr.PreliminaryFlag == "PRELIMINARY" and "A physician read" not in page
    say(client, physicians["dr-quill"], study, "PNEUMONIA", severity="mild", edited_explanation="I would write it so.", regions=[[0.1, 0.1, 0.2, 0.2]])
    after = forms(client, study)
    known, page, report, results, sr, text = told(after)
    assert (known["label"], known["severity"], known["agrees"], known["readers"], known["revised"]) == ("PNEUMONIA", "mild", True, 1, False)
    line = "A physician read this film and agrees: pneumonia, mild."
    assert page.index(line) < page.index(STRINGS["settled"]["program"]) < page.index('class="sure"') and STRINGS["settled"]["note"] not in page
    assert report["status"] == "final" and line in report["conclusion"] and "not confirmed" not in report["conclusion"] and [r["status"] for r in results] == ["final", "preliminary"]
    assert (sr.PreliminaryFlag, sr.VerificationFlag, sr.CompletionFlag) == ("FINAL", "UNVERIFIED", "COMPLETE") and line in text and "not confirmed" not in text
    assert nameless(after) and before["/consultation.pdf"] != after["/consultation.pdf"] and before["/heatmap.png"] == after["/heatmap.png"]
    assert Report.model_validate_json(after[""]).model_copy(update={"settled": None}) == Report.model_validate_json(before[""]), "the program's answer is what it was"


def test_a_reading_is_blind_until_the_study_is_closed(client, physicians):
    study = send(client, encoded(pattern())).json()["study_id"]
    before = forms(client, study)
    for who, label, kind, state in (("dr-quill", "FRACTURE_FOREARM", "reading", "second"), ("dr-feather", "TUBERCULOSIS", "reading", "adjudication")):
        outcome = say(client, physicians[who], study, label, kind, severity="severe")
        assert outcome["state"] == state and outcome["model"]["settled"] is None
        assert forms(client, study) == before, f"not a byte has changed in {state}"
    assert say(client, physicians["dr-ink"], study, "FRACTURE_FOREARM", "adjudication", severity="moderate")["model"]["settled"]["label"] == "FRACTURE_FOREARM"
    after = forms(client, study)
    known, page, report, results, sr, text = told(after)
    line = "A physician read this film and sees it otherwise: forearm fracture, moderate."
    assert (known["agrees"], known["readers"], known["severity"]) == (False, 3, "moderate") and page.index(line) < page.index(STRINGS["settled"]["note"])
    assert results[0]["valueCodeableConcept"]["coding"][0]["code"] == "65966004" == report["conclusionCode"][0]["coding"][0]["code"] and results[0]["performer"] == report["resultsInterpreter"]
    assert results[1]["valueCodeableConcept"]["coding"][0]["code"] == "233604007" and results[1]["status"] == "preliminary" and "device" in results[1] and "device" not in results[0]
    assert line in text and "Reading of a physician" in text and nameless(after)
    assert client.get("/v1/worklist?state=closed", headers=physicians["dr-blot"]).json()["items"][0]["label"] == "PNEUMONIA", "the list is the model's, as before"

    assert say(client, physicians["dr-blot"], study, "PNEUMONIA", "feedback") and forms(client, study) == before, "a doubt opens it: nothing stands"
    say(client, physicians["dr-feather"], study, "PNEUMONIA", "feedback"); say(client, physicians["dr-quill"], study, "PNEUMONIA", "feedback"); say(client, physicians["dr-ink"], study, "PNEUMONIA", "feedback")
    known, page, report, results, sr, text = told(forms(client, study))
    assert known["revised"] and known["agrees"] and known["readers"] == 4 and report["status"] == results[0]["status"] == "amended" and STRINGS["settled"]["revised"] in page


def test_a_film_that_was_left_open_and_one_that_is_none(client, classifier, physicians, monkeypatch):
    monkeypatch.setitem(classifier.calibration["abstain"], "min_probability", 1.1)   # nothing is sure enough
    study = send(client, encoded(pattern())).json()["study_id"]
    say(client, physicians["dr-quill"], study, "TUBERCULOSIS")
    got = {f: client.get(f"/v1/studies/{study}{f}").content for f in FORMS if "heatmap" not in f}
    known, page, report, results, sr, text = told(got)
    assert known["agrees"] is False and "A physician read this film: tuberculosis." in page and STRINGS["settled"]["note"] in page and report["status"] == "final" and "dataAbsentReason" in results[1] and sr.PreliminaryFlag == "FINAL"
    photo = send(client, encoded(cat())).json()["study_id"]
    say(client, physicians["dr-quill"], photo, "NORMAL", "feedback")
    assert client.get(f"/v1/studies/{photo}").json()["settled"] is None, "a picture that is no film is settled by nobody"


def test_a_forgotten_study_gives_nothing(client, physicians, store):
    study = send(client, encoded(pattern()), patient_ref="4711").json()["study_id"]
    say(client, physicians["dr-quill"], study, "PNEUMONIA")
    row = store.study(study)
    forget(store, "4711")
    assert settled(store, row) is None and {client.get(f"/v1/studies/{study}{f}").status_code for f in FORMS} == {404}


def test_a_list_asks_nothing_more_and_an_open_study_neither(client, physicians, store):
    ids = [send(client, encoded(pattern())).json()["study_id"] for _ in range(3)]
    for i in ids[:2]: say(client, physicians["dr-quill"], i, "PNEUMONIA")
    asked = []
    note = lambda conn, cursor, statement, *_: asked.append(statement)
    event.listen(store.engine, "before_cursor_execute", note)
    counts = {}
    for name, act in (("list", lambda: worklist_page(store)), ("open", lambda: client.app.state.room.report(ids[2])), ("closed", lambda: client.app.state.room.report(ids[0]))):
        asked.clear(); act(); counts[name] = sum("feedback" in s for s in asked)
    event.remove(store.engine, "before_cursor_execute", note)
    assert counts == {"list": 0, "open": 0, "closed": 1}


def test_an_old_database(tmp_path):
    "Answers of before the worklist: what all agreed on is settled, what somebody saw otherwise waits."
    engine = reach(f"sqlite:///{tmp_path}/cxr.db")
    migrate(engine, "cxr_pred.migrations", "cxr_version", to="0001")
    with writer(engine).begin() as c:
        for n in (1, 2, 3): c.execute(sa.text("INSERT INTO studies VALUES (:id, '2026-01-01 08:00:00.000000', 'ok', 'ok', 'NORMAL', 0.9, '{}', NULL, 'off', 'b', '{}', NULL, 'F', 'PA', '[]', NULL, NULL)"), dict(id=str(n) * 32))
        for n, (study, who, label, agrees) in enumerate([("1", "dr-a", "NORMAL", 1), ("1", "dr-b", "NORMAL", 1), ("2", "dr-a", "NORMAL", 1), ("2", "dr-b", "PNEUMONIA", 0)], 1):
            c.execute(sa.text("INSERT INTO feedback VALUES (:n, :id, :who, :label, NULL, NULL, :agrees, '2026-01-05 09:00:00.000000')"), dict(n=n, id=study * 32, who=who, label=label, agrees=agrees))
    engine.dispose()
    store = Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path / "state")
    one, two, three = (settled(store, store.study(n * 32)) for n in "123")
    assert (one.label, one.agrees, one.readers, one.revised) == ("NORMAL", True, 2, False) and one.at == datetime(2026, 1, 5, 9, tzinfo=timezone.utc) and two is three is None
    store.close()


def test_what_stands_is_what_is_learned_from():
    "Whatever physicians say in whatever order: of a closed study this and `ops.feedback` name the same label."
    rng, closed = random.Random(7), 0
    for _ in range(3000):
        model, answers, state = rng.choice([None, "NORMAL", "PNEUMONIA"]), [], "unread"
        for n in range(rng.randint(1, 6)):
            who, label, kind = rng.choice("abc"), rng.choice(["NORMAL", "PNEUMONIA", "COVID19"]), rng.choice(["reading", "feedback", "adjudication"])
            try: state = next_state(state, kind, model, [Opinion(a.physician, a.confirmed_label) for a in answers], Opinion(who, label))
            except InputError: continue
            answers.append(Feedback(physician=who, confirmed_label=label, kind=kind, severity=rng.choice([None, "mild", "severe"]), agrees=label == model, created_at=datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(hours=n)))
        if state != "closed": continue
        closed += 1
        said, learned = settled_by(answers, model), settles(answers) or closes(answers, model)
        assert said.label == learned.confirmed_label and said.at == answers[-1].created_at and said.agrees == (model == said.label) and closings(answers, model)[-1] == (said.label, said.severity)
    assert closed > 500
