"""What no example shows: the published trees through the whole stage, hostile archives and tables, fetching from the command line, the real sets' known numbers."""
import csv
import io
import json
import os
import stat
import sys
import types
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image
from test_etl import SHARED, film

from cxr_pred.core import InputError, SetupError
from cxr_pred.data import fetch
from cxr_pred.data.archive import film_bytes, members
from cxr_pred.data.etl import manifest_schema, run_etl
from cxr_pred.data.fetch import DATASETS, compare_counts, fetch_dataset
from cxr_pred.data.sources import SOURCES, Record, chosen, dicom_films, records, source, within

real = pytest.mark.skipif(not (SHARED / "covid-chestxray-dataset").is_dir(), reason="no real films beside the project")


def png(a):
    out = io.BytesIO(); Image.fromarray(a).save(out, "PNG")
    return out.getvalue()


def save(path, a):
    path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(png(a))


def mask(share, size=64):
    "White in the first rows."
    a = np.zeros((size, size), np.uint8); a[:round(share * size)] = 255
    return a


def etl(raw, run, sources, **shares):
    "The whole stage: metrics, manifest, rejects; the ledger must balance."
    m = run_etl(raw, run, sources, size=32, workers=1, **shares)
    assert m["files_seen"] == m["films_out"] + sum(m["rejected"].values()) + sum(m["left_out"].values())
    return m, pd.read_parquet(run / "data/manifest.parquet"), pd.read_parquet(run / "data/rejects.parquet")


def everything(folder):
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_covid_qu_ex_as_published(tmp_path):
    "Both trees, three splits, three classes: severity by the infected share, masks kept, copies counted, nothing lost."
    raw = tmp_path / "raw"; L, I = (raw / "COVID-QU-Ex" / n / n for n in ("Lung Segmentation Data", "Infection Segmentation Data"))
    names = {"COVID-19": "covid_{}.png", "Non-COVID": "non_COVID ({}).png", "Normal": "Normal ({}).png"}
    shares, wanted = (0, 0.1, 0.3, 0.7), {}
    for s, split in enumerate(("Train", "Val", "Test")):
        for c, (cls, name) in enumerate(names.items()):
            for i in range(8):
                n, a = name.format(100 * s + i), film(1000 * s + 100 * c + i)
                save(L / split / cls / "images" / n, a); save(L / split / cls / "lung masks" / n, mask(1))
                if i >= 4: continue
                save(I / split / cls / "images" / n, a); save(I / split / cls / "lung masks" / n, mask(1)); save(I / split / cls / "infection masks" / n, mask(shares[i] if cls == "COVID-19" else 0))
                if cls == "COVID-19": wanted[n] = ("none", "mild", "moderate", "severe")[i]
    (raw / "COVID-QU-Ex/COVID-QU-Ex dataset.txt").write_text("about")
    m, table, _ = etl(raw, tmp_path / "run", ["covid_qu_ex"])
    assert m["left_out"] == {"also_in_infection_data": 36, "mask": 3 * 3 * (8 + 4 + 4), "outside_layout": 1} and m["rejected"] == {} and m["films_out"] == 72
    assert table.label.value_counts().to_dict() == {"COVID19": 24, "PNEUMONIA": 24, "NORMAL": 24}
    graded = table[table.severity.notna()]
    assert dict(zip(graded.path.str.rpartition("/")[2], graded.severity)) == wanted
    for r in table.itertuples():
        files = json.loads(r.masks)
        assert all((raw / f).is_file() and Path(f).name == Path(r.path).name for f in files.values()) and ("infection" in files) == (isinstance(r.severity, str))
    manifest_schema().validate(table)
    m, table, _ = etl(raw, tmp_path / "without", [{"covid_qu_ex": {"non_covid": ""}}])
    assert m["left_out"]["class_left_out"] == 36 and set(table.label) == {"COVID19", "NORMAL"}
    with pytest.raises(SetupError): records(raw, [{"covid_qu_ex": {"non_covid": "FLU"}}])


def test_a_copy_that_is_another_picture_stays(tmp_path):
    tree = tmp_path / "COVID-QU-Ex"
    for n, seed in (("Lung Segmentation Data", 1), ("Infection Segmentation Data", 2)): save(tree / n / n / "Train/COVID-19/images/covid_1.png", film(seed))
    assert [r.label for r in records(tmp_path, ["covid_qu_ex"])] == ["COVID19"] * 2, "a name alone proves nothing"


def test_radiography_masks_are_read_and_none_makes_no_column(tmp_path):
    raw = tmp_path / "raw"; c = raw / "COVID-19_Radiography_Dataset"
    for i in range(12):
        for cls, stem, seed in (("COVID", "COVID", 0), ("Normal", "Normal", 100), ("Lung_Opacity", "Lung_Opacity", 200)):
            save(c / cls / "images" / f"{stem}-{i}.png", film(seed + i, 299)); save(c / cls / "masks" / f"{stem}-{i}.png", mask(0.5, 256))
    (c / "COVID.metadata.xlsx").touch(); (c / "README.md.txt").touch()
    m, table, _ = etl(raw, tmp_path / "run", ["covid_radiography"])
    assert m["left_out"] == {"class_left_out": 24, "mask": 24, "outside_layout": 2}
    assert all(json.loads(r.masks)["lungs"] == r.path.replace("/images/", "/masks/") for r in table.itertuples()) and len(table) == 24
    for cls in ("COVID", "Normal"):
        for p in (c / cls / "masks").iterdir(): p.unlink()
    _, table, _ = etl(raw, tmp_path / "again", ["covid_radiography"])
    assert "masks" not in table, "a run without masks keeps the table that it had"


HEAD = ("patientid,offset,sex,age,finding,RT_PCR_positive,survival,intubated,intubation_present,went_icu,in_icu,needed_supplemental_O2,extubated,temperature,pO2_saturation,leukocyte_count,neutrophil_count,"
        "lymphocyte_count,view,modality,date,location,folder,filename,doi,url,license,clinical_notes,other_notes,").split(",")


def test_covid_chestxray_as_published(tmp_path):
    raw = tmp_path / "raw"; home = raw / "covid-chestxray-dataset"
    rows = [dict(patientid=str(i // 2), sex="M" if i % 2 else "F", age=str(20 + i), finding=f, view=v, modality=mod, folder="volumes" if mod == "CT" else "images", filename=f"{i}.{'nii.gz' if mod == 'CT' else 'png'}", license="CC BY", clinical_notes='said "no",\nthen yes')
            for i, (f, v, mod) in enumerate([("Pneumonia/Viral/COVID-19", "PA", "X-ray"), ("Pneumonia/Viral/COVID-19", "AP Supine", "X-ray"), ("Pneumonia/Bacterial/Streptococcus", "AP", "X-ray"), ("Pneumonia", "PA", "X-ray"),
                ("Tuberculosis", "PA", "X-ray"), ("No Finding", "PA", "X-ray"), ("Unknown", "PA", "X-ray"), ("Pneumonia/Viral/COVID-19", "L", "X-ray"), ("Pneumonia/Viral/COVID-19", "Coronal", "CT"), ("todo", "PA", "X-ray")])]
    rows += [rows[0], rows[0] | {"filename": "gone.png"}, rows[0] | {"filename": "../../../outside.png"}]
    home.mkdir(parents=True)
    with open(home / "metadata.csv", "w", newline="", encoding="utf-8") as f: w = csv.DictWriter(f, HEAD); w.writeheader(); w.writerows(rows)
    for i in range(10):
        if i != 8: save(home / "images" / f"{i}.png", film(i))
    save(home / "annotations/lungVAE-masks/0_mask.png", mask(0.5)); (home / "README.md").touch(); save(tmp_path / "outside.png", film(99))
    m, table, rejects = etl(raw, tmp_path / "run", ["covid_chestxray"], val_share=0, test_share=0)   # three patients are not to be divided
    assert m["left_out"] == {"no_label": 2, "other_view": 1, "not_xray": 1, "named_twice": 1, "outside_raw": 1, "mask": 1, "not_in_metadata": 1} and m["rejected"] == {"not_found": 1}
    assert table.label.value_counts().to_dict() == {"COVID19": 2, "PNEUMONIA": 2, "TUBERCULOSIS": 1, "NORMAL": 1}
    first = table[table.path.str.endswith("/0.png")].iloc[0]
    assert (first.age, first.sex, first["view"], first.patient_id) == (20, "F", "PA", "0") and "0_mask.png" in first.masks
    assert table.groupby("patient_id").group_id.nunique().max() == 1
    assert Counter(r.label for r in records(raw, [{"covid_chestxray": {"views": ["PA", "AP", "AP Supine", "L"]}}]))["COVID19"] == 4


def clinic(raw, zipped):
    "One set twice: loose in train and test, or as train.zip and test.zip."
    for split, first in (("train", 0), ("test", 50)):
        films = {f"{cls}/P{first + i}_{c}.png": png(film(1000 * c + first + i)) for c, cls in enumerate(("normal", "covid-19", "tb")) for i in range(10)}
        if not zipped:
            for name, data in films.items(): (raw / "clinic" / split / name).parent.mkdir(parents=True, exist_ok=True); (raw / "clinic" / split / name).write_bytes(data)
            continue
        (raw / "clinic").mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(raw / "clinic" / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as z:
            for name, data in films.items(): z.writestr(f"{split}/{name}" if split == "train" else name, data)


def test_a_zip_gives_the_films_of_the_folder_and_unpacks_nothing(tmp_path):
    chosen_ = [{"folders:clinic": {"classes": {"tb": "TUBERCULOSIS"}, "patient": "^(P[0-9]+)"}}]
    got = {}
    for zipped in (False, True):
        raw = tmp_path / f"raw{zipped}"; clinic(raw, zipped); before = everything(raw)
        m, table, _ = etl(raw, tmp_path / f"run{zipped}", chosen_)
        assert everything(raw) == before and m["films_out"] == 60 and set(table.source) == {"folders:clinic"}
        assert table.groupby("patient_id").split.nunique().max() == 1 and table.patient_id.nunique() == 20
        got[zipped] = table.set_index("sha256")[["label", "patient_id"]].sort_index()
    assert got[False].equals(got[True])
    a, b = (run_etl(tmp_path / "rawTrue", tmp_path / f"w{n}", chosen_, size=32, workers=n) for n in (1, 2))
    assert a == b and (tmp_path / "w1/data/films.npy").read_bytes() == (tmp_path / "w2/data/films.npy").read_bytes(), "workers read archives too"


def test_hostile_archives_are_counted_and_touch_nothing(tmp_path, monkeypatch):
    raw = tmp_path / "raw"; (raw / "folders").mkdir(parents=True); secret = tmp_path / "secret.png"; save(secret, film(5))
    link = zipfile.ZipInfo("normal/link.png"); link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(raw / "folders/films.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(6): z.writestr(f"normal/{i}.png", png(film(i)))
        for name in ("../../secret.png", "normal/../../../secret.png", f"{secret}", "normal\\..\\..\\x.png", "C:/x.png", "normal/\u202egnp.exe"): z.writestr(name, b"x")
        z.writestr(link, str(secret)); z.writestr("normal/bomb.png", bytes(50_000_000))
        with pytest.warns(UserWarning): z.writestr("normal/0.png", png(film(77)))
    lies = raw / "folders/lies.zip"   # its directory says that a member is small
    with zipfile.ZipFile(lies, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("normal/small.png", bytes(3_000_000) + os.urandom(200_000))
    lies.write_bytes(lies.read_bytes().replace((3_200_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    (raw / "folders/cut.zip").write_bytes((raw / "folders/films.zip").read_bytes()[:3000]); (raw / "folders/none.zip").write_text("no zip")
    before = everything(tmp_path)
    m, table, rejects = etl(raw, tmp_path / "run", ["folders"])
    assert {k: v for k, v in everything(tmp_path).items() if not k.startswith("run/")} == before
    assert m["left_out"] == {"unsafe_path": 6, "link": 1, "bomb": 1, "name_twice": 2, "bad_archive": 2} and m["rejected"] == {"corrupt": 1} and len(table) == 5
    assert not any(".." in Path(p).parts for p in rejects.path), "no reject's path climbs"
    monkeypatch.setattr("cxr_pred.data.archive.MOST_MEMBERS", 3)
    assert Counter(r.left_out for r in records(raw, ["folders"]))["too_many_members"] == 1
    monkeypatch.setenv("CXR_MAX_PIXELS", "100"); from cxr_pred.core import reload_settings; reload_settings()
    monkeypatch.setattr("cxr_pred.data.archive.MOST_MEMBERS", 100)
    try: assert dict(members(raw / "folders/films.zip"))["normal/bomb.png"] == "too_large"
    finally: monkeypatch.delenv("CXR_MAX_PIXELS"); reload_settings()


def test_an_encrypted_member_is_left_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z: z.writestr("normal/a.png", b"x")
    data = bytearray((tmp_path / "a.zip").read_bytes())
    for at in (data.find(b"PK\x01\x02") + 8, data.find(b"PK\x03\x04") + 6): data[at] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    assert list(members(tmp_path / "a.zip")) == [("normal/a.png", "encrypted")]


@pytest.fixture(scope="module")
def honest():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(3): z.writestr(f"normal/{i}.png", png(film(i, 16)))
    return out.getvalue()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 10_000))
def test_a_damaged_archive_only_ever_raises_input_errors(honest, tmp_path_factory, flips, cut):
    folder = tmp_path_factory.mktemp("z"); data = bytearray(honest)
    for at, value in flips: data[at % len(data)] = value
    if cut % 3 == 0: del data[cut % len(data):]
    (folder / "a.zip").write_bytes(data)
    try: found = list(members(folder / "a.zip"))
    except InputError: return
    for name, why in found:
        if why: continue
        try: assert isinstance(film_bytes(folder, f"a.zip/{name}"), bytes)
        except InputError: pass
    assert os.listdir(folder) == ["a.zip"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["..", ".", "a", "b.png", "", "link", "//", "/etc", "\0", "c d"]), max_size=6), st.sampled_from(["csv", "csv/deep"]))
def test_no_path_of_a_table_leads_outside(tmp_path_factory, parts, folder):
    raw = tmp_path_factory.mktemp("raw"); (raw / "csv/deep").mkdir(parents=True); (raw / "csv/link").symlink_to("/"); (raw / "csv/deep/link").symlink_to("..")
    found = within(raw, folder, "/".join(parts))
    assert found is None or (raw / found).resolve().is_relative_to(raw.resolve())


def write_dicom(path, pixels=None, **tags):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid
    ds = Dataset(); ds.file_meta = FileMetaDataset(); ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    for k, v in (dict(SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1", SOPInstanceUID=generate_uid(), Modality="DX", PatientAge="061Y", PatientSex="F", ViewPosition="PA", PatientName="Secret^Person") | tags).items(): setattr(ds, k, v)
    if pixels is not None:
        ds.Rows, ds.Columns = pixels.shape; ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, 8, 8, 7, 0, "MONOCHROME2"; ds.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True); ds.save_as(path, enforce_file_format=True)


def test_a_folder_of_dicom_keeps_patients_together_and_unnamed(tmp_path):
    raw = tmp_path / "raw"
    for i in range(20): write_dicom(raw / "dicom" / ("tuberculosis" if i % 2 else "normal") / f"{i:03}.dcm", film(i), PatientID=f"HOSP-{i // 4}")
    write_dicom(raw / "dicom/normal/slice.dcm", film(90), Modality="CT"); write_dicom(raw / "dicom/normal/no_pixels.dcm", PatientID="HOSP-0")
    (raw / "dicom/normal/a.png").write_bytes(png(film(91))); (raw / "dicom/normal/cut.dcm").write_bytes((raw / "dicom/normal/000.dcm").read_bytes()[:200])
    m, table, _ = etl(raw, tmp_path / "run", ["dicom"])
    assert m["left_out"] == {"not_xray": 1, "not_dicom": 1} and sum(m["rejected"].values()) == 2 and len(table) == 20
    assert table.patient_id.nunique() == 5 and table.groupby("patient_id").split.nunique().max() == 1 and table.groupby("patient_id").size().eq(4).all()
    assert (table.age == 61).all() and set(table.sex) == {"F"} and set(table["view"]) == {"PA"}
    for f in (tmp_path / "run").rglob("*"):
        if f.is_file(): assert not any(s in f.read_bytes() for s in (b"HOSP", b"Secret")), f.name


def test_a_table_goes_through_the_stage(tmp_path):
    raw = tmp_path / "raw"
    rows = [f"films/{i}.png,{'healthy' if i % 2 else 'PNEUMONIA'},P{i // 3},{20 + i},{'MF'[i % 2]}" for i in range(18)] + ["films/0.png,PNEUMONIA,P0,1,M", "../../secret.png,PNEUMONIA,,,", "films/gone.png,PNEUMONIA,,,"]
    for i in range(18): save(raw / "csv/films" / f"{i}.png", film(i))
    (raw / "csv/films.csv").write_text("\ufeffPath, Label,patient_id,age,sex\n" + "\n".join(rows)); (raw / "csv/notes.txt").touch(); save(tmp_path / "secret.png", film(99))
    m, table, rejects = etl(raw, tmp_path / "run", [{"csv": {"classes": {"healthy": "NORMAL"}}}])
    assert m["left_out"] == {"named_twice": 1, "outside_raw": 1, "not_in_table": 1} and m["rejected"] == {"not_found": 1} and len(table) == 18
    assert table.groupby("patient_id").split.nunique().max() == 1 and table.label.value_counts().to_dict() == {"NORMAL": 9, "PNEUMONIA": 9}


def test_sources_mix_and_each_keeps_its_name(tmp_path):
    raw = tmp_path / "raw"; clinic(raw, True); (raw / "clinic").rename(raw / "clinic_a"); clinic(raw, False); (raw / "clinic").rename(raw / "clinic_b")
    for i in range(5): save(raw / "niaid_2024" / f"case-{i}" / "front.png", film(5000 + i)); save(raw / "TB_Chest_Radiography_Database/Normal" / f"Normal-{i}.png", film(6000 + i))
    mix = [{"tb": {"niaid": "niaid_2024"}}, "folders:clinic_a", {"folders:clinic_b": {"classes": {"tb": ""}}}]
    m, table, _ = etl(raw, tmp_path / "run", mix)
    assert set(m["by_source"]) == {"tb", "folders:clinic_a", "folders:clinic_b"} and m["by_source"]["tb"]["by_label"] == {"NORMAL": 5, "TUBERCULOSIS": 5}
    assert m["by_source"]["folders:clinic_a"]["left_out"] == {"unknown_class": 20} and m["by_source"]["folders:clinic_b"]["left_out"] == {"class_left_out": 20}
    assert m["rejected"] == {"exact_duplicate": 40}, "the same films under two names"
    with pytest.raises(SetupError) as e: run_etl(raw, tmp_path / "x", [*mix, "csv:ward", {"tb": {"niaid": "absent"}}][1:])
    assert e.value.code == "missing_data" and "csv:ward (ward)" in str(e.value) and "absent" in str(e.value)
    for wrong, code in (("folders:a/../..", "outside_raw"), ("folders:", "outside_raw"), ({"kermany": {"views": []}}, "unknown_option"), ("flickr", "unknown_source"), ("tb", "source_twice")):
        with pytest.raises(SetupError) as e: chosen([wrong, wrong])
        assert e.value.code == code, wrong
    assert all(set(Record.__dataclass_fields__) >= {"masks", "left_out"} and source(n).records for n in SOURCES)


def test_published_counts_add_up():
    total = lambda name, end: sum(n for f, n in DATASETS[name].folders.items() if f.endswith(end))
    assert sum(DATASETS["kermany"].folders.values()) == 5856 and sum(DATASETS["bone_fracture"].folders.values()) == 4148 and sum(DATASETS["tb"].folders.values()) == 4200
    assert total("covid_radiography", "/images") == total("covid_radiography", "/masks") == 3616 + 10192 + 6012 + 1345
    qu = DATASETS["covid_qu_ex"].folders
    assert total("covid_qu_ex", "/lung masks") == 33920 and sum(n for f, n in qu.items() if f.startswith("Infection") and f.endswith("/images")) == 5826
    assert all(d.licence and d.citation and (d.folders or d.labels) and d.page.startswith("https://") for d in DATASETS.values()) and set(DATASETS) < set(SOURCES)


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").touch(); (tmp_path / "settings.ini").write_text((Path(__file__).resolve().parents[1] / "settings.ini").read_text()); monkeypatch.setenv("CXR_ROOT", str(tmp_path))
    return tmp_path


def test_fetch_data_asks_once_fetches_counts_and_resumes(project, tmp_path, monkeypatch):
    "The command, with a Kaggle that breaks off the first time and goes on where it was."
    from typer.testing import CliRunner
    from cxr_pred.cli import cli
    cache, calls = tmp_path / "cache", []

    def dataset_download(slug):
        calls.append(slug); home = cache / "versions/5/Lung Segmentation Data/Lung Segmentation Data/Train/COVID-19/images"; home.mkdir(parents=True, exist_ok=True)
        if not any(home.iterdir()): save(home / "covid_1.png", film(1)); raise ConnectionError("cut off")
        save(home / "covid_2.png", film(2)); (cache / "versions/5/Infection Segmentation Data").mkdir()
        return str(cache / "versions/5")

    monkeypatch.setitem(sys.modules, "kagglehub", types.SimpleNamespace(dataset_download=dataset_download))
    run = lambda *args, **kw: CliRunner().invoke(cli, ["fetch-data", *args], **kw)
    r = run("covid_qu_ex", input="n\n")
    assert r.exit_code != 0 and not calls and "anasmohammedtahir/covidqu" in r.output and "Licence" in r.output and "Tahir" in r.output
    r = run("covid_qu_ex", input="y\n")
    assert r.exit_code != 0 and "resumes" in r.output + str(r.exception) and r.output.count("Fetch it on these terms") == 1 and not (project / "data/raw/COVID-QU-Ex").exists()
    r = run("covid_qu_ex", "--yes")
    assert r.exit_code == 0, r.output
    assert "Fetch it" not in r.output and "COVID-19/images: 2 of 11,956" in r.output and "counts differ from the published ones" in r.output and len(calls) == 2
    assert len([x for x in records(project / "data/raw", ["covid_qu_ex"]) if x.label == "COVID19"]) == 2
    r = run("mnist")
    assert r.exit_code != 0 and "covid_chestxray" in r.output + str(r.exception)


def test_a_whole_set_has_no_difference(tmp_path, monkeypatch):
    small = {"Tuberculosis": 3, "Normal": 4}
    monkeypatch.setitem(fetch.DATASETS, "tb", fetch.Dataset("a/b", "l", "c", "TB_Chest_Radiography_Database", small))
    for cls, n in small.items():
        for i in range(n): save(tmp_path / "k/TB_Chest_Radiography_Database" / cls / f"{cls}-{i}.png", film(i))
    said = []
    fetch_dataset("tb", tmp_path / "raw", yes=True, download=lambda slug: str(tmp_path / "k"), say=said.append)
    assert said[-1].endswith("Every count is the published one.") and "!" not in said[-1]


def test_training_does_not_depend_on_the_sources():
    sys.path.insert(0, str(Path(__file__).parent))
    from test_pipeline import stage_code
    films_come_by = {f"cxr_pred/data/{name}.py" for name in ("sources", "fetch", "archive")}
    assert films_come_by <= stage_code("etl"), "what an adapter, a download and an archive are called"
    assert not films_come_by & stage_code("train_vit"), "a new source of films retrains nothing by itself"


@real
def test_real_covid_chestxray_counts():
    "306 films with the sheet beside the folder: 31 lateral, 4 of ARDS alone."
    found = Counter(r.label or r.left_out for r in records(SHARED, ["covid_chestxray"]))
    assert found == {"COVID19": 198, "PNEUMONIA": 61, "NORMAL": 12, "other_view": 31, "no_label": 4}
    assert Counter(r.source for r in records(SHARED, ["covid_chestxray"])) == {"covid_chestxray": 306}


@real
def test_real_dicom_files_are_labelled_by_a_table(tmp_path):
    (tmp_path / "dicom").symlink_to(SHARED / "dicom")
    names = sorted(p.name for p in (SHARED / "dicom").glob("*.dcm"))
    (tmp_path / "labels.csv").write_text("path,label\n" + "".join(f"{n},{'' if n.startswith('RG3') else 'NORMAL'}\n" for n in names))
    found = list(dicom_films(tmp_path))
    assert Counter(r.label or r.left_out for r in found) == {"NORMAL": 6, "unknown_label": 1, "not_dicom": 1}
    patients = Counter(r.patient_id for r in found if r.label)
    assert sorted(patients.values()) == [1, 1, 2, 2], "one file without a patient, two patients with two films"


@real
def test_real_counts_of_what_is_published_whole():
    "The official Kermany set is here whole; the others are parts and say so."
    assert all(n == there for _, n, there in compare_counts("kermany", SHARED))
    assert {what: there for what, n, there in compare_counts("bone_fracture", SHARED)} == {"train/images": 1731, "valid/images": 348, "test/images": 169}
