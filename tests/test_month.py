"A simulated month: what was lost is counted, what was not measured is not claimed, and the whole of it holds together with real readers."
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import uvicorn
from PIL import Image

from cxr_pred.clinic.api import create_app
from cxr_pred.clinic.starting import bound
from cxr_pred.core import reload_settings, root
from cxr_pred.data.labels import LABELS
from cxr_pred.ops import month as m
from cxr_pred.ops.simulate import Books, Physicians, read_books, sources_of, wait_ready
from cxr_pred.store import Store, film_name
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.toy import toy_bundle, toy_patterns

FACTS = root() / "nbs/language/facts.yaml"


def known_films(raw: Path, n: int) -> Path:
    "A raw folder of films that the toy of seed 0 reads rightly, in the sample's layout."
    (raw / "films").mkdir(parents=True)
    for i in range(n):
        noise = np.random.default_rng(i).normal(size=(16, 16))
        Image.fromarray(np.clip(128 + 75 * np.kron(toy_patterns(0)[i % 10], np.ones((14, 14))) + 25 * np.kron(noise, np.ones((14, 14))), 0, 255).astype(np.uint8)).save(raw / f"films/{i:03d}.png")
    pd.DataFrame([{"file": f"films/{i:03d}.png", "label": LABELS[i % 10], "patient_id": f"P{i}", "age": 50, "sex": "F", "view": "PA", "split": "", "severity": "", "regions": ""} for i in range(n)]).to_csv(raw / "metadata.csv", index=False)
    return raw


class Deaf:
    "A service behind a line that loses every third answer to a POST, after it was given."

    def __init__(self, app): self.app, self.n = app, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST": return await self.app(scope, receive, send)
        self.n += 1
        if self.n % 3: return await self.app(scope, receive, send)
        async def swallow(message): pass
        await self.app(scope, receive, swallow)
        await send({"type": "http.response.start", "status": 503, "headers": []}); await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def clinic(tmp_path, monkeypatch):
    "What traffic needs of a clinic, with a toy in this process behind a line that loses answers."
    monkeypatch.setenv("CXR_PHYSICIAN_KEY", "month"); reload_settings()
    store, bundle = Store(f"sqlite:///{tmp_path}/a.db", tmp_path / "state"), toy_bundle(tmp_path / "toy", FACTS)
    reader, sock = Classifier(bundle, threads=1), bound("127.0.0.1", 0)
    service = uvicorn.Server(uvicorn.Config(Deaf(create_app(reader, store, ui=False)), log_level="error"))
    thread = threading.Thread(target=service.run, kwargs={"sockets": [sock]}, daemon=True); thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    wait_ready(url)
    status = SimpleNamespace(stable=SimpleNamespace(hash=reader.bundle_hash))
    yield SimpleNamespace(url=url, key="month", store=store, rollout=SimpleNamespace(status=lambda: status), folder=tmp_path)
    service.should_exit = True; thread.join(); sock.close(); store.close(); monkeypatch.undo(); reload_settings()


def played(clinic, n=30):
    raw = known_films(clinic.folder / "raw", 20)
    films = sources_of(raw, ["sample"])
    books = Books(clinic.folder / "books.jsonl")
    traffic = m.Traffic(clinic, raw, books, Physicians(3, 1.0, 0.2), at_once=4)
    for some in m.plan_month(films[:10], films[10:], n, (m.Phase("a", 1.0, {"none": 1}),), 0.2): traffic.play(some)
    books.close()
    return read_books(books.path), traffic


def test_answers_lost_on_the_line_make_nothing_lost_and_nothing_twice(clinic):
    lines, traffic = played(clinic)
    account, versions = m.accounts(lines, clinic.store)
    assert traffic.sent == traffic.back == account["acknowledged"]["uploads"] == 30 and account["sent_again"] >= 5
    assert not any(account["lost"].values()) and not any(account["twice"].values()) and account["log_whole"]
    films = m.films_table(lines, versions)
    assert films.good[films.wrong == ""].mean() > 0.6 and not films.good[films.wrong != ""].any() and account["acknowledged"]["physicians_answers"] > 5
    one, other = [l for l in lines if l.get("study_id")][:2]
    clinic.store.place.delete([film_name(one["study_id"])])
    lost = m.accounts([l | {"study_id": "0" * 32} if l is other else l for l in lines], clinic.store)[0]["lost"]
    assert lost["studies"] == 1 and lost["films"] == 2, "and a loss is seen"


def test_without_keys_what_was_sent_again_is_there_twice_and_is_counted(clinic, monkeypatch):
    bare = m.send
    monkeypatch.setattr(m, "send", lambda client, u, data, attempts, key: bare(client, u, data, attempts, key=None))
    lines, _ = played(clinic)
    assert m.accounts(lines, clinic.store)[0]["twice"]["studies"] >= 3


def test_nothing_is_claimed_that_was_not_measured():
    account = {"acknowledged": {"uploads": 1, "studies": 1, "physicians_answers": 0}, "sent_again": 0, "lost": {"films": 0}, "twice": {"studies": 0}, "log_whole": True}
    never = m.found_drift([], 100, 200)
    bare = {"accounts": account, "unexpected": {}, "wrong_files": 0, "kills": [], "kills_planned": 3, "drifts": {"inverted": never}, "bad_release": None, "retraining": None, "recovery": m.recovery(pd.DataFrame({c: [] for c in ("wrong", "drift", "version", "path", "good", "covered")}), "a", None)}
    said = {p["what"].split(":")[0]: p["passed"] for p in m.promises(bare)}
    assert said == {"nothing lost": True, "nothing twice": True, "every wrong file gets the answer that it should": None, "3 kill -9, and back each time": False, "drift found within 500 films": False, "bad release rolled back by itself": None, "retrained and promoted": None, "80 % of what drift cost came back": None}
    none = {p["what"]: p["passed"] for p in m.promises(bare | {"wrong_files": 3, "kills_planned": 0})}
    assert none["every wrong file gets the answer that it should"] is True and none["0 kill -9, and back each time"] is None
    late = [{"sent": 90, "ratio": 0.5, "drifted": []}, {"sent": 640, "ratio": 2.0, "drifted": ["reasons"]}]
    found = m.found_drift(late, 100, 700)
    assert found["after"] == 540 and m.promises(bare | {"drifts": {"inverted": found}})[4]["passed"] is False, "found, but too late"


def test_a_month_of_toys_with_real_readers(tmp_path):
    bundle, better = toy_bundle(tmp_path / "toy", FACTS), lambda clinic: {"reason": "", "by_itself": True, "seconds": 0.0, "promoted": True, "why": [], "bundle": str(toy_bundle(tmp_path / "next", FACTS, graded=("PNEUMONIA",))), "version": "next"}
    phases = (m.Phase("calm", 0.25, {"none": 1}), m.Phase("inverted", 0.15, {"inverted": 1}), m.Phase("retrained", 0.15, {"inverted": 1}, "retrain"), m.Phase("bad", 0.45, {"none": 1}, "bad release"))
    r = m.month(tmp_path / "month", bundle, better, 200, known_films(tmp_path / "raw", 80), each=40, physicians=Physicians(3, 1.0, 0.05), kills=2, phases=phases, limits=m.SHORT.model_copy(update={"share": 50, "step_s": 1, "every_s": 0.2}), tell=lambda *a: None)
    assert not any(r["accounts"]["lost"].values()) and not any(r["accounts"]["twice"].values()) and r["accounts"]["log_whole"]
    assert r["unexpected"] == {}, "a film whose decoder was killed is read by another one"
    assert len(r["kills"]) == 2 and all(k["back_s"] is not None for k in r["kills"]) and r["accounts"]["sent_again"] > 0
    assert r["bad_release"]["rolled_back"] and r["bad_release"]["rule"] == "worse_answers"
    assert [e["said"].split(": ")[-1] for e in r["events"] if e["kind"] == "release"][:2] == ["canary", "production, by hand"] and (tmp_path / "month/report.html").stat().st_size > 20_000


@pytest.mark.parametrize("reason, code, promoted", [("There is reason to train again: by drift in two windows: reasons", 0, True), ("No reason to train again: 3 studies were settled", 3, False), ("No reason to train again: 3 studies were settled", 1, None)])
def test_a_retraining_is_told_as_its_evidence_tells_it(tmp_path, monkeypatch, reason, code, promoted):
    from cxr_pred.ops.challenge import decision
    from cxr_pred.ops.evidence import write_evidence
    asked = []
    def ran(command, env, cwd, stdout, stderr, text):
        asked.append(command[command.index("--profile") + 2:])
        assert Path(env["CXR_ROOT"]) == Path(cwd) == tmp_path / "project" and env["MLFLOW_TRACKING_URI"].endswith(f"{tmp_path}/mlflow.db"), "what a month promotes stays in the month"
        if asked[-1] == ["--check"]: return SimpleNamespace(returncode=0, stdout=f"{reason}\n")
        if promoted is not None:
            row = {"where": "recent feedback", "name": "accuracy", "kind": "goal", "champion": 0.4, "challenger": 0.9, "difference": 0.5, "low": 0.3 if promoted else -0.3, "high": 0.7, "n": 90, "units": 90}
            champion = {"version": "sample-1", "bundle_hash": "c" * 64}
            e = {"at": "2026-03-01", "profile": "sample", "started": reason, "run": "runs/retrain/sample/1", "data": {"films": 90, "recent": 30, "learned_from": 60}, "champion": champion, "challenger": champion, "decision": decision([row])}
            write_evidence(Path(cwd) / "runs/retrain/sample/1/evidence", e)
        return SimpleNamespace(returncode=code, stdout="")
    monkeypatch.setattr(m.subprocess, "run", ran)
    t = m.retrained(SimpleNamespace(folder=tmp_path, state=tmp_path / "state"), "sample")
    assert asked == [["--check"], [] if reason.startswith("There") else ["--now"]] and t["by_itself"] is reason.startswith("There") and t["reason"] == reason
    assert t["promoted"] is bool(promoted) and (t["bundle"] == f"{tmp_path}/project/runs/retrain/sample/1/bundle") is bool(promoted)
    assert "status 1" in t["why"][0] if promoted is None else t["goals"][0]["verdict"] == ("better" if promoted else "worse")
    assert (tmp_path / "project/params.yaml").resolve() == root() / "params.yaml" and not (tmp_path / "project/runs/retrain").is_symlink()
