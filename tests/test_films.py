"Films in a bucket of a real S3 server: an answer only when film and record are there, everything gone with its patient, backups both ways, and what is said when the server is away. And originals, sealed."
import json, os, signal, subprocess, sys, time

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from test_api import FACTS, dicom, encoded, guard, pattern, problem_of, send, wait_ready  # noqa: F401
from test_load import SECRET, free_port, s3, state  # noqa: F401, its fixtures

from cxr_pred.clinic.api import create_app
from cxr_pred.clinic.custody import backup, forget, restore, sweep
from cxr_pred.clinic.originals import Safe, new_key, original, reseal
from cxr_pred.core import SetupError, root
from cxr_pred.films import Bucket, place_of
from cxr_pred.store import Store, original_name
from cxr_pred.tables import Base
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.toy import toy_bundle


@pytest.fixture(scope="module")
def classifier(tmp_path_factory): return Classifier(toy_bundle(tmp_path_factory.mktemp("bundle"), FACTS))


@pytest.fixture
def store(s3, tmp_path):
    s = Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path / "state", f"{s3}/{tmp_path.name}/films")
    yield s
    s.place.delete(list(s.place.names()))
    s.close()


@pytest.fixture
def client(classifier, store, guard):
    with TestClient(create_app(classifier, store, ui=False, guard=guard), raise_server_exceptions=False) as c:
        wait_ready(c, 60)
        yield c


def held(store): return sorted(store.place.names())


def test_a_film_lies_in_the_bucket_before_it_is_answered_and_goes_with_its_patient(client, store, tmp_path):
    mine, other = [send(client, encoded(pattern(n)), patient_ref="MRN-1").json()["study_id"] for n in (1, 2)], send(client, encoded(pattern(3)), patient_ref="MRN-2").json()["study_id"]
    assert isinstance(store.place, Bucket) and held(store) == sorted(f"{i}.png" for i in (*mine, other)) and not (store.state / "films").exists()
    assert client.get(f"/v1/studies/{mine[0]}/heatmap.png").content[:4] == b"\x89PNG"
    assert forget(store, "MRN-1")[:2] == (2, 2) and held(store) == [f"{other}.png"]
    assert problem_of(client.get(f"/v1/studies/{mine[0]}/heatmap.png"), 404)["code"] == "no_such_study"
    store.place.put("0" * 32 + ".png", b"stray")
    assert sweep(store)[1] == 0 and len(held(store)) == 2, "a fresh one may be waiting for its row"
    from cxr_pred.clinic.custody import sweep_pictures
    time.sleep(1.1)
    assert sweep_pictures(store, "test", older_s=0.5) == 1 and held(store) == [f"{other}.png"]


def test_no_record_no_answer_and_no_object(client, store):
    Base.metadata.drop_all(store.engine)
    assert problem_of(send(client, encoded(pattern())), 503)["code"] == "store_unavailable" and held(store) == []
    Base.metadata.create_all(store.engine)
    assert send(client, encoded(pattern())).status_code == 200 and len(held(store)) == 1


def test_a_backup_goes_from_bucket_to_folder_and_back(client, store, s3, tmp_path):
    ids = [send(client, encoded(pattern(n))).json()["study_id"] for n in (1, 2)]
    store.place.put(f"{ids[1]}.png", store.place.get(f"{ids[1]}.png")[:-9] + b"otherwise")
    made = backup(store, tmp_path / "spoiled"); assert (made["films"], made["damaged"]) == (2, [ids[1]])
    store.place.delete([f"{ids[1]}.png"])
    made = backup(store, tmp_path / "backup"); assert (made["films"], made["missing"]) == (1, [ids[1]])
    restore(tmp_path / "backup", f"sqlite:///{tmp_path}/two.db", tmp_path / "two")
    two = Store(f"sqlite:///{tmp_path}/two.db", tmp_path / "two")
    assert np.array_equal(two.film(ids[0]), store.film(ids[0])) and two.films.is_dir()
    url = f"{s3}/{tmp_path.name}/three"
    restore(tmp_path / "backup", f"sqlite:///{tmp_path}/three.db", tmp_path / "three", films=url)
    three = Store(f"sqlite:///{tmp_path}/three.db", tmp_path / "three", url)
    assert np.array_equal(three.film(ids[0]), store.film(ids[0])) and held(three) == [f"{ids[0]}.png"]
    two.close(); three.close()


def test_a_server_that_is_away_is_said_and_comes_back(classifier, guard, s3, tmp_path, monkeypatch, caplog):
    "The address of a server that does not answer, then the right one: the same process goes on."
    right = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    store = Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path / "state", f"{s3}/{tmp_path.name}")
    with TestClient(create_app(classifier, store, ui=False, guard=guard), raise_server_exceptions=False) as client:
        assert client.app.state.room.opened.wait(60)
        for r in (client.get("/readyz"), send(client, encoded(pattern()))):
            p = problem_of(r, 503); assert p["code"] == "store_unavailable" and "127.0.0.1" not in json.dumps(p)
        with store.engine.connect() as c: assert c.exec_driver_sql("SELECT count(*) FROM studies").scalar() == 0
        away, store.place = store.place, place_of(f"{s3}/{tmp_path.name}")
        monkeypatch.setenv("AWS_ENDPOINT_URL", right); store.place = place_of(f"{s3}/{tmp_path.name}")
        study = send(client, encoded(pattern()), patient_ref="MRN-9").json()["study_id"]
        here, store.place = store.place, away
        assert problem_of(client.get(f"/v1/studies/{study}/heatmap.png"), 503)["code"] == "store_unavailable" and client.get(f"/v1/studies/{study}").status_code == 200
        with pytest.raises(SetupError, match="store_unavailable"): forget(store, "MRN-9")
        store.place = here
        assert store.study(study) and forget(store, "MRN-9").studies == 1 and held(store) == [], "what could not be deleted is still known"
    assert SECRET not in caplog.text
    store.close()


def test_keys_that_are_wrong(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(SetupError, match="store_unavailable") as e: place_of(s3).put("a.png", b"x")
    assert "another" not in str(e.value)


def test_the_service_by_its_settings_killed_while_films_come(classifier, s3, tmp_path):
    "`cxr-pred serve` with CXR_FILMS, killed with films under way: what was answered is there, in rows and bucket."
    env = os.environ | dict(CXR_FILMS=f"{s3}/{tmp_path.name}", CXR_STATE=str(tmp_path / "state"), CXR_BUNDLE=str(classifier.bundle.path), PYTHONPATH=str(root()))
    port, answered = free_port(), []
    p = subprocess.Popen([sys.executable, "-m", "cxr_pred.cli", "serve", "--no-ui", "--port", str(port)], cwd=root(), env=env, stdout=subprocess.DEVNULL, stderr=open(tmp_path / "log", "w"))
    try:
        end = time.monotonic() + 120
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200: break
            except httpx.TransportError: pass
            assert p.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()[-2000:]
            time.sleep(.1)
        import threading
        def ask():
            while True:
                try: r = httpx.post(f"http://127.0.0.1:{port}/v1/predict", files={"file": encoded(pattern())}, timeout=60)
                except httpx.TransportError: return
                if r.status_code == 200: answered.append(r.json()["study_id"])
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for t in threads: t.start()
        while len(answered) < 5 and time.monotonic() < end: time.sleep(.01)
        os.kill(p.pid, signal.SIGKILL); p.wait(30)
        for t in threads: t.join(60)
    finally:
        if p.poll() is None: p.kill(); p.wait(30)
    store = Store(f"sqlite:///{tmp_path}/state/cxr.db", tmp_path / "state", f"{s3}/{tmp_path.name}")
    assert len(answered) >= 5 and {f"{i}.png" for i in answered} <= set(held(store)) and all(store.study(i).finding for i in answered) and store.verify().broken is None
    store.place.delete(held(store)); store.close()


@pytest.fixture
def keys(tmp_path, monkeypatch):
    "Originals are on, with a key of their own."
    new_key(tmp_path / "keys"); monkeypatch.setenv("CXR_KEEP_ORIGINALS", "true"); monkeypatch.setenv("CXR_ORIGINALS_KEYS", str(tmp_path / "keys"))
    return tmp_path / "keys"


def test_originals_are_sealed_and_name_nobody(keys, client, store, tmp_path):
    film = dicom(pattern(), PatientName="Quillfeather^Jane", PatientID="MRN-0815")
    study = send(client, film, patient_ref="MRN-0815").json()["study_id"]
    assert held(store) == sorted([f"{study}.png", original_name(study)]) and original(store, Safe(keys), study) == film
    everything = b"".join(store.place.get(n) for n in held(store)) + b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert b"uillfeather" not in everything and b"MRN-0815" not in everything and keys.read_bytes().strip()[:20] not in b"".join(p.read_bytes() for p in store.state.rglob("*") if p.is_file())
    new_key(keys); newest = keys.read_text().splitlines()[0]
    assert reseal(store, Safe(keys)) == 1
    keys.write_text(newest + "\n"); keys.chmod(0o600)
    assert original(store, Safe(keys), study) == film, "the old key is needed no more"
    assert forget(store, "MRN-0815").originals == 1 and held(store) == []


def test_originals_without_their_key_stop_the_service(classifier, s3, tmp_path, monkeypatch, guard):
    monkeypatch.setenv("CXR_KEEP_ORIGINALS", "true"); monkeypatch.setenv("CXR_ORIGINALS_KEYS", str(tmp_path / "nowhere"))
    store = Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path / "state")
    with TestClient(create_app(classifier, store, ui=False, guard=guard), raise_server_exceptions=False) as client:
        assert client.app.state.room.opened.wait(60) and problem_of(send(client, encoded(pattern())), 503)["code"] == "no_keys"
    assert not list(store.place.names())
    store.close()
