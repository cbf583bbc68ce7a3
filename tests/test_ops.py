"`cxr-pred drift` over a real store, and `cxr-pred simulate` against a real service."
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from cxr_pred.cli import cli
from cxr_pred.core import reload_settings, root
from cxr_pred.store import Feedback, Store

ROOT = root()
FACTS = ROOT / "nbs/language/facts.yaml"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    from cxr_pred.vision.toy import toy_bundle
    return toy_bundle(tmp_path_factory.mktemp("toy"), FACTS)


@pytest.fixture
def here(bundle, tmp_path, monkeypatch):
    "Settings that point to the toy and to a state folder of this test."
    monkeypatch.setenv("CXR_BUNDLE", str(bundle)); monkeypatch.setenv("CXR_STATE", str(tmp_path / "state"))
    yield reload_settings()
    monkeypatch.undo(); reload_settings()


def said(*args):
    return CliRunner().invoke(cli, [str(a) for a in args], catch_exceptions=False)


def read(store, classifier, first, n, change=lambda p: p):
    "Read and record n drawn films, as the service would; their rows."
    from cxr_pred.clinic.reading import study_row
    from cxr_pred.clinic.study import read_study
    from cxr_pred.data.images import Film
    from PIL import Image
    rows = []
    for i in range(first, first + n):
        g = np.random.default_rng(i)
        pixels = np.asarray(Image.fromarray(g.integers(0, 160, (4, 4), dtype=np.uint8)).resize((48, 48), Image.Resampling.BICUBIC))
        report, film, heat = read_study(classifier, b"", opened=lambda data, name: Film(np.ascontiguousarray(change(pixels))))
        rows.append(study_row(report, heat)); store.add_study(rows[-1], film.pixels)
    return rows


def test_drift_is_silent_until_the_films_change(here, tmp_path):
    from cxr_pred.vision.classify import Classifier
    store, classifier, reference = Store(), Classifier(threads=1), tmp_path / "reference.json"
    r = said("drift")
    assert r.exit_code == 1 and "no_reference" in r.stderr
    assert "too_few_films" in said("drift", "--learn", reference).stderr
    rows = read(store, classifier, 0, 420)
    for row in [r for r in rows if r.status == "ok"]: store.add_feedback(Feedback(study_id=row.id, physician="a", confirmed_label=row.label, agrees=True))
    assert "420 films" in said("drift", "--learn", reference).output
    read(store, classifier, 1000, 200)
    calm = said("drift", "--reference", reference, "--json")
    report = json.loads(calm.stdout)
    assert calm.exit_code == 0 and not report["input_drifted"] and report["films"] == 620 and report["known_by"]["read_again"] > 100
    assert report["outcome"]["newest"]["value"] == 1 and report["outcome"]["reference"]["n"] == report["outcome"]["all"]["n"]
    read(store, classifier, 2000, 120, lambda p: 255 - p)
    moved = said("drift", "--reference", reference, "--html", tmp_path / "drift.html", "--prom", tmp_path / "drift.prom", "--no-read-again")
    assert moved.exit_code == 3 and "DRIFTED" in moved.output and "not measured" in moved.output, "without features the rest still tells"
    assert "<h1>Drift</h1>" in (tmp_path / "drift.html").read_text() and 'cxr_drifted{what="input"} 1.0' in (tmp_path / "drift.prom").read_text()
    assert said("drift", "--reference", tmp_path / "nothing.json").exit_code == 1
    store.close()


def test_without_a_bundle_each_version_in_use_is_looked_at_and_named(here, tmp_path):
    from cxr_pred.ops.rollout import Memory, State, target
    from cxr_pred.vision.classify import Classifier
    from cxr_pred.vision.toy import toy_bundle
    store, reference, versions = Store(), tmp_path / "reference.json", [Classifier(toy_bundle(tmp_path / name, FACTS, seed), threads=1) for name, seed in (("was", 1), ("comes", 2))]
    for k, c in enumerate(versions): read(store, c, 3000 + 500 * k, 420)
    held = [target(c.bundle.path) for c in versions]
    Memory(store.state).write(State(stage="canary", stable=held[0], candidate=held[1]))
    both, short = [c.bundle_hash for c in versions], [c.bundle_hash[:12] for c in versions]
    r = said("drift", "--learn", reference, "--most", 420); assert short[0] in r.output, "the served one's films, and it says whose"
    r = said("drift", "--reference", reference, "--html", tmp_path / "d.html", "--prom", tmp_path / "d.prom", "--no-read-again")
    assert r.exit_code in (0, 3) and all(f"Version {c.model_version} ({h}), films read from 20" in r.output for c, h in zip(versions, short)), r.output
    assert short[0] in (tmp_path / "d.html").read_text() and short[1] in (tmp_path / f"d-{short[1]}.html").read_text()
    assert all(f'cxr_drift_films{{bundle_hash="{h}"}}' in (tmp_path / "d.prom").read_text() for h in both)
    found = json.loads(said("drift", "--reference", reference, "--json", "--no-read-again").stdout)
    assert [f["bundle_hash"] for f in found] == both and [f["films"] for f in found] == [420, 420] and all(f["oldest"] <= f["newest"] for f in found)
    one = json.loads(said("drift", "--reference", reference, "--bundle", tmp_path / "comes", "--json", "--no-read-again").stdout)
    assert one["bundle_hash"] == both[1] and one["oldest"] == found[1]["oldest"] > found[0]["oldest"], "the one that is named, and its own films"
    shutil.rmtree(tmp_path / "comes")
    r = said("drift", "--reference", reference, "--json", "--no-read-again")
    assert [f["bundle_hash"] for f in json.loads(r.stdout)] == both[:1] and short[1] in r.stderr and r.exit_code in (1, 3), "the other is looked at all the same"
    store.close()


def test_simulated_traffic_survives_a_killed_service(bundle, tmp_path):
    "The reader is killed with films on the way and started again on the same port: they are sent once more, and nothing is lost."
    env = os.environ | {"CXR_BUNDLE": str(bundle), "CXR_STATE": str(tmp_path / "state"), "CXR_PHYSICIAN_KEY": "k", "OMP_NUM_THREADS": "1"}

    def reader(port):
        child = subprocess.Popen([sys.executable, "-m", "cxr_pred.cli", "serve", "--no-ui", "--port", str(port)], env=env, stdout=subprocess.PIPE, text=True)
        return child, re.search(r"http://127.0.0.1:(\d+)", child.stdout.readline())
    from cxr_pred.data.sample import make_sample
    from cxr_pred.ops.simulate import read_books, report_of, wait_ready
    make_sample(tmp_path / "raw", 12, 96, 0, workers=1)
    child, at = reader(0)
    sender = None
    try:
        wait_ready(at[0])
        sender = subprocess.Popen([sys.executable, "-m", "cxr_pred.cli", "simulate", at[0], "--films", "60", "--seconds", "12", "--pattern", "bursts", "--wrong", "0.1", "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")],
                                  env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        books = tmp_path / "out" / "books.jsonl"
        end = time.monotonic() + 60
        while time.monotonic() < end and not (books.exists() and books.read_text().count('"answered"') >= 8): time.sleep(0.1)
        child.send_signal(signal.SIGKILL); child.wait()
        sent = books.read_text().count('"sent"')
        while time.monotonic() < end and books.read_text().count('"sent"') == sent: time.sleep(0.1)   # bursts: between two of them nobody would have noticed
        child, again = reader(at[1])
        assert again, "the port is free again"
        text = sender.communicate(timeout=240)[0]
        report = report_of(read_books(books))
        assert sender.returncode == 0 and "nothing lost" in text, text[-3000:]
        assert report["sent"] == 60 and report["lost"] == {"without_answer": 0, "not_in_record": 0, "physicians_answers": 0} and not report["unexpected"]
        assert report["retried"] > 0 and sum(report["answered"].values()) == 60
    finally:
        for p in (sender, child):
            if p and p.poll() is None: p.terminate(); p.wait(20)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    from cxr_pred.data.sample import make_sample
    make_sample(d := tmp_path_factory.mktemp("drawn"), 40, 96, 0, workers=1)
    return d


@pytest.mark.parametrize("drift", ["none", "scanner"])
def test_a_changed_scanner_raises_an_alert_and_a_calm_day_none(bundle, drawn, tmp_path, drift):
    "In the books, in the report and in the last lines that are said; the toy has no reference, so the films themselves are described first."
    from cxr_pred.ops.simulate import read_books
    env = os.environ | {"CXR_BUNDLE": str(bundle), "OMP_NUM_THREADS": "1"}
    played = subprocess.run([sys.executable, "-m", "cxr_pred.cli", "simulate", "--films", "220", "--seconds", "6", "--drift", drift, "--drift-from", "0.5", "--wrong", "0.05", "--raw", str(drawn), "--out", str(tmp_path / "out")],
                            env=env, capture_output=True, text=True, timeout=400)
    assert played.returncode == 0, played.stdout[-3000:] + played.stderr[-3000:]
    report, lines = json.loads((tmp_path / "out/report.json").read_text()), read_books(tmp_path / "out/books.jsonl")
    assert report["lost"] == {"without_answer": 0, "not_in_record": 0, "physicians_answers": 0} and report["feedback"]["kept"] == report["feedback"]["sent"] > 20
    assert report["watched"]["films"] > 180 and report["watched"]["reference"].endswith("films that are sent") and [l["by"] for l in lines if l["what"] == "alert"] == [a["by"] for a in report["alerts"]]
    last = played.stdout.strip().splitlines()[-1]
    if drift == "none": assert report["alerts"] == [] and last == "No alert."
    else:
        first = report["alerts"][0]
        assert last.startswith("ALERT: ") and "film low" in {a["by"] for a in report["alerts"]} and first["drift"] == "scanner" and 0 < first["since"] < 80, report["alerts"]
        assert {l["number"]: l["drift"] for l in lines if l["what"] == "sent"}[first["number"]] == "scanner"


def test_a_day_is_told_even_if_nobody_could_watch_it(bundle, drawn, tmp_path, monkeypatch):
    from cxr_pred.core import SetupError
    from cxr_pred.ops import simulate as played
    def old(*a): raise SetupError("old_reference", "The bundle's reference is of another form.")
    monkeypatch.setenv("CXR_BUNDLE", str(bundle)); monkeypatch.setattr(played, "yardstick", old)
    report = played.simulate(tmp_path / "out", raw=drawn, n=6, seconds=1)
    assert sum(report["answered"].values()) == 6 and report["watched"]["why"] == "The bundle's reference is of another form." and (tmp_path / "out/report.json").is_file()
