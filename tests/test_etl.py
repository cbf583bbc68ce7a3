"""What no example shows: every planted trouble through the whole stage, splitting as a property, the real sets' known numbers."""
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from cxr_pred.core import SetupError
from cxr_pred.data.etl import manifest_schema, run_etl
from cxr_pred.data.fetch import link_data
from cxr_pred.data.images import preprocess
from cxr_pred.data.sources import records
from cxr_pred.data.split import assign, units, units_in_two_splits

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
real = pytest.mark.skipif(not (SHARED / "chest_xray").is_dir(), reason="no real films beside the project")


def film(seed, size=100):
    "A film unlike any other."
    rng = np.random.default_rng(seed)
    return np.asarray(Image.fromarray(rng.integers(0, 255, (9, 9), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC))


def save(path, a, **kw):
    path.parent.mkdir(parents=True, exist_ok=True); Image.fromarray(a).save(path, **kw)


@pytest.fixture
def raw(tmp_path):
    "Four sets in their layouts with one of each trouble."
    r = tmp_path / "raw"; k, c, t, b = "chest_xray", "COVID-19_Radiography_Dataset", "TB_Chest_Radiography_Database", "BoneFractureYolo8"
    for i in range(12):
        save(r / k / "train/NORMAL" / f"IM-{i:04}-0001.jpeg", film(i)); save(r / k / "train/PNEUMONIA" / f"person{i}_virus_1.jpeg", film(100 + i)); save(r / k / "test/NORMAL" / f"IM-{i:04}-0001.jpeg", film(200 + i))
        save(r / c / "COVID/images" / f"COVID-{i}.png", film(300 + i)); save(r / c / "Normal/images" / f"Normal-{i}.png", film(400 + i))
        save(r / t / "Tuberculosis" / f"TB.{i}.jpg", film(500 + i)); save(r / t / "Normal" / f"Normal-{i}.png", film(600 + i))
        for copy, part in enumerate(("train", "test")):
            save(r / b / part / "images" / f"w{i}_jpg.rf.{copy}{i}.jpg", film(700 + i + 1000 * copy)); (r / b / part / "labels").mkdir(exist_ok=True)
            (r / b / part / "labels" / f"w{i}_jpg.rf.{copy}{i}.txt").write_text("0 .5 .5 .2 .2\n" if i < 10 else "")
    (r / b / "data.yaml").write_text("names: [wrist positive]")
    save(r / t / "Normal/same_as_covid_normal.png", film(400))                      # across two sources, one label
    save(r / t / "Tuberculosis/same_as_normal.png", film(601))                      # two labels: nobody knows
    save(r / k / "train/PNEUMONIA/person90_virus_1.png", np.full((90, 90), 7, np.uint8))
    save(r / k / "train/PNEUMONIA/person91_virus_1.png", np.dstack([film(1), np.zeros((100, 100), np.uint8), 255 - film(1)]))
    whole = (r / k / "train/NORMAL/IM-0001-0001.jpeg").read_bytes()
    (r / k / "train/NORMAL/cut.jpeg").write_bytes(whole[:len(whole) // 2]); (r / k / "train/NORMAL/empty.jpeg").touch(); (r / k / "train/NORMAL/text.png").write_text("no film")
    (r / k / "__MACOSX").mkdir(); (r / k / "__MACOSX/._x").touch()
    return r


@pytest.mark.parametrize("coloured", [0, 0.05, 0.15, 0.5])
@pytest.mark.parametrize("spread", [0, 7, 9, 200])
def test_etl_rejects_what_the_service_would_refuse(tmp_path, coloured, spread):
    "One border for both, so nothing is measured that would not be read."
    from cxr_pred.data.etl import read_record
    from cxr_pred.data.images import read_film
    from cxr_pred.data.sources import Record
    from cxr_pred.vision.calibrate import calibrate
    from cxr_pred.vision.classify import refuse
    a = np.linspace(20, 20 + spread, 100).round().astype(np.uint8)[None].repeat(100, 0)[..., None].repeat(3, 2)
    a[:round(100 * coloured)] = np.array([200, 20, 20]) + np.arange(100)[None, :, None] // 2
    save(tmp_path / "a.png", a)
    rules = calibrate(np.eye(10) * 5, np.ones(10), np.arange(10))
    row, _ = read_record(str(tmp_path), Record("kermany", "a.png", "NORMAL"), 32, ("blank", "not_a_radiograph"))
    assert row.get("reason_code") == refuse(read_film(tmp_path / "a.png"), rules)


def test_every_trouble_has_its_reason(raw, tmp_path):
    m = run_etl(raw, tmp_path / "run", ["kermany", "covid_radiography", "tb", "bone_fracture"], size=32, workers=1)
    assert m["rejected"] == {"blank": 1, "not_a_radiograph": 1, "truncated": 1, "empty_file": 1, "unsupported_format": 1, "exact_duplicate": 1, "duplicate_conflict": 2}
    assert m["left_out"] == {"outside_layout": 1, "no_annotation": 4}
    assert m["files_seen"] == m["films_out"] + sum(m["rejected"].values()) + sum(m["left_out"].values())
    assert m["exact_duplicate_groups"] == 2 and m["groups_crossing_source_splits"] == 12 and m["units_in_two_splits"] == 0
    table, films = pd.read_parquet(tmp_path / "run/data/manifest.parquet"), np.load(tmp_path / "run/data/films.npy", mmap_mode="r")
    manifest_schema().validate(table)
    for row in table.sample(10, random_state=0).itertuples(): assert (films[row.row] == preprocess(np.asarray(Image.open(raw / row.path)), 32)).all()
    bone = table[table.source == "bone_fracture"]
    assert len(bone) == 20 and bone.groupby(bone.path.str.extract(r"(w\d+)_jpg")[0]).split.nunique().max() == 1
    assert set(table[(table.source == "kermany") & table.path.str.contains("/test/")].split) == {"test"}
    assert set(table[(table.source == "kermany") & ~table.path.str.contains("/test/")].split) == {"train", "val"}
    assert json.loads(bone.regions.iloc[0])[0]["kind"] == "box"


def test_a_dropped_copy_still_ties_two_patients(raw, tmp_path):
    folder = raw / "chest_xray/train/PNEUMONIA"
    for name, seed in (("person50_virus_1", 50), ("person50_virus_2", 51), ("person60_virus_1", 51), ("person60_virus_2", 61)): save(folder / f"{name}.png", film(2000 + seed))
    save(raw / "chest_xray/train/NORMAL/IM-0700-0001.png", np.asarray(Image.open(raw / "chest_xray/test/NORMAL/IM-0003-0001.jpeg"))); save(raw / "chest_xray/train/NORMAL/IM-0700-0002.png", film(3000))
    m = run_etl(raw, tmp_path / "run", ["kermany"], size=32, workers=1)
    table = pd.read_parquet(tmp_path / "run/data/manifest.parquet")
    tied = table[table.path.str.contains("person[56]0_virus_[12].png")]
    assert len(tied) == 3 and tied.group_id.nunique() == 1 and tied.split.nunique() == 1, "one picture under two names: one unit"
    assert m["rejected"]["overlaps_official_test"] == 1 and not table.path.str.contains("IM-0700").any(), "the patient of an official test film is not trained on"
    assert (table.path == "chest_xray/test/NORMAL/IM-0003-0001.jpeg").any(), "of two copies, the official one stays"


def test_bytes_do_not_depend_on_workers_or_place(raw, tmp_path):
    (tmp_path / "elsewhere").symlink_to(raw)
    for name, where, workers in (("a", raw, 1), ("b", tmp_path / "elsewhere", 2)): run_etl(where, tmp_path / name, ["covid_radiography", "tb"], size=32, workers=workers)
    for f in ("data/manifest.parquet", "data/rejects.parquet", "data/films.npy", "metrics/etl.json"): assert (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes(), f
    assert str(tmp_path).encode() not in (tmp_path / "a/data/manifest.parquet").read_bytes()


def test_a_new_film_leaves_the_others_where_they_were(raw, tmp_path):
    run_etl(raw, tmp_path / "a", ["covid_radiography"], size=32, workers=1)
    save(raw / "COVID-19_Radiography_Dataset/COVID/images/COVID-99.png", film(999))
    run_etl(raw, tmp_path / "b", ["covid_radiography"], size=32, workers=1)
    a, b = (pd.read_parquet(tmp_path / r / "data/manifest.parquet").set_index("image_id").split for r in "ab")
    assert set(b.index) > set(a.index) and (a != b[a.index]).sum() <= 2


def test_the_stage_fails_without_a_readable_film(tmp_path):
    (tmp_path / "TB_Chest_Radiography_Database/Normal").mkdir(parents=True); (tmp_path / "TB_Chest_Radiography_Database/Normal/a.png").write_text("x")
    with pytest.raises(SetupError) as e: run_etl(tmp_path, tmp_path / "run", ["tb"], workers=1)
    assert e.value.code == "no_films" and not list((tmp_path / "run/data").iterdir()), "nothing half-made"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15), st.sampled_from("AB"), st.sampled_from(["x", "y"]), st.booleans()), min_size=1, max_size=80), st.integers(0, 5))
def test_no_key_ever_stands_in_two_splits(rows, seed):
    keys = [(("patient", p), ("pixels", h)) for p, h, *_ in rows]
    films = pd.DataFrame(dict(unit=[f"u{u}" for u in units(keys)], source=[r[2] for r in rows], label=[r[3] for r in rows], official_test=[r[4] and r[2] == "A" for r in rows]))
    split = assign(films, seed=seed)
    assert (split[films.official_test] == "test").all() and set(split) <= {"train", "val", "test", "overlap"}
    kept = split != "overlap"
    assert units_in_two_splits([k for k, use in zip(keys, kept) if use], split[kept]) == []
    again = assign(films.iloc[::-1], seed=seed)
    assert (again.sort_index() == split).all(), "the order of rows does not matter"


@real
def test_adapters_count_the_real_sets():
    found = {s: Counter(r.label or r.left_out for r in records(SHARED, [s])) for s in ("kermany", "covid_radiography", "tb", "bone_fracture")}
    assert found["kermany"] == {"NORMAL": 1583, "PNEUMONIA": 4273} and found["covid_radiography"] == {"COVID19": 1503, "NORMAL": 1600} and found["tb"] == {"TUBERCULOSIS": 1475, "NORMAL": 901}
    assert found["bone_fracture"] == {"FRACTURE_ELBOW": 293, "FRACTURE_FINGERS": 481, "FRACTURE_FOREARM": 178, "FRACTURE_HUMERUS": 188, "FRACTURE_SHOULDER": 270, "FRACTURE_WRIST": 191, "no_annotation": 647}


@real
def test_real_bones_are_regrouped(tmp_path):
    link_data(SHARED, tmp_path / "raw")
    m = run_etl(tmp_path / "raw", tmp_path / "run", ["bone_fracture"], size=32)
    assert m["groups_crossing_source_splits"] == 102 and m["units_in_two_splits"] == 0
    assert min(n["test"] for n in m["by_label"].values()) >= 30


@real
def test_real_duplicates_of_kermany_are_found(tmp_path):
    m = run_etl(SHARED, tmp_path / "run", ["kermany"], size=32)
    assert m["exact_duplicate_groups"] == 30 and m["rejected"]["exact_duplicate"] == 32 and "duplicate_conflict" not in m["rejected"]
    assert m["by_split"]["test"] == 618, "624 official test films, six of them twice"
