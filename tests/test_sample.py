"The embedded sample: same seed, same bytes; nothing but the picture tells the class."
import hashlib
import json

import numpy as np
import pandas as pd
import pydicom
import pytest

from cxr_pred.core import InputError
from cxr_pred.data.images import read_film
from cxr_pred.data.labels import CHEST, LABELS, region
from cxr_pred.data.sample import make_sample, plan_films, render, severity
from cxr_pred.data.phantom import random_exposure

TROUBLES = {"truncated_png", "truncated_jpeg", "duplicate", "monochrome1", "blank", "empty_file", "text_named_png", "dicom_no_pixels", "colour_photo"}


def prints(folder):
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    return folder, make_sample(folder, n_films=60, size=112, seed=3, dicom_share=0.2, workers=1)


def test_same_seed_same_bytes_whatever_the_workers(sample, tmp_path):
    folder, _ = sample
    make_sample(tmp_path, n_films=60, size=112, seed=3, dicom_share=0.2, workers=2)
    assert prints(folder) == prints(tmp_path)


def test_a_second_run_replaces_the_first(tmp_path):
    make_sample(tmp_path, n_films=14, size=64, seed=1, workers=1)
    make_sample(tmp_path, n_films=10, size=64, seed=2, workers=1)
    frame = pd.read_csv(tmp_path / "metadata.csv")
    assert sorted(frame.file) == sorted(p for p in prints(tmp_path) if p != "metadata.csv")


def test_another_seed_other_films(sample, tmp_path):
    folder, _ = sample
    make_sample(tmp_path, n_films=12, size=112, seed=4, workers=1)
    films = lambda d: {h for p, h in prints(d).items() if p.endswith((".png", ".dcm")) and "_x" not in p}
    assert not films(folder) & films(tmp_path)


def test_every_trouble_is_planted_and_is_what_it_says(sample):
    folder, frame = sample
    assert set(frame.trouble) - {""} == TROUBLES
    path = lambda t: folder / frame[frame.trouble == t].file.iloc[0]
    codes = {}
    for t in ("truncated_png", "truncated_jpeg", "empty_file", "text_named_png", "dicom_no_pixels"):
        with pytest.raises(InputError) as e: read_film(path(t))
        codes[t] = e.value.code
    assert codes == {"truncated_png": "truncated", "truncated_jpeg": "truncated", "empty_file": "empty_file", "text_named_png": "unsupported_format", "dicom_no_pixels": "dicom_no_pixels"}
    assert read_film(path("colour_photo")).colour > 0.3
    assert np.ptp(np.percentile(read_film(path("blank")).pixels, [1, 99])) < 10
    hashes = prints(folder)
    twin = frame[frame.trouble == "duplicate"].iloc[0]
    assert [p for p, h in hashes.items() if h == hashes[twin.file]] == sorted([twin.file, *frame[(frame.patient_id == twin.patient_id) & (frame.regions == twin.regions) & (frame.file != twin.file)].file])


def test_monochrome1_is_stored_inverted_and_reads_like_the_drawn_film(sample):
    folder, frame = sample
    plans = {p.file: p for p in plan_films(60, 112, 3, 0.2)}
    for file in frame[frame.trouble == "monochrome1"].file:
        ds = pydicom.dcmread(folder / file)
        drawn = render(plans[file]).film
        assert ds.PhotometricInterpretation == "MONOCHROME1"
        assert np.corrcoef(ds.pixel_array.ravel(), drawn.ravel())[0, 1] < -0.99
        assert np.corrcoef(read_film(folder / file).pixels.ravel(), drawn.ravel())[0, 1] > 0.95


def test_dicom_files_are_valid_enough_and_name_nobody(sample):
    folder, frame = sample
    files = [f for f in frame.file if f.endswith(".dcm")]
    uids = set()
    for f in files:
        ds = pydicom.dcmread(folder / f)
        row = frame[frame.file == f].iloc[0]
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID and ds.SOPInstanceUID.startswith("2.25.")
        assert ds.PatientIdentityRemoved == "YES" and str(ds.PatientName).startswith("Synthetic^") and not ds.StudyDate and not ds.PatientBirthDate
        assert (ds.PatientAge, ds.PatientSex) == (f"{row.age:03d}Y", row.sex)
        uids.add(ds.SOPInstanceUID)
        if row.trouble != "dicom_no_pixels":
            assert ds.BitsStored == 12 and 2048 < ds.pixel_array.max() <= 4095
    assert len(files) == 13 and len(uids) >= 12


def test_the_sheet_is_complete_and_regions_are_valid(sample):
    folder, frame = sample
    assert list(frame.columns) == ["file", "label", "patient_id", "age", "sex", "view", "severity", "lesion_extent", "regions", "split", "trouble"]
    films = frame[frame.trouble.isin(["", "monochrome1"])]
    assert set(films.label) == set(LABELS) and (frame.split == "").all() and frame.file.is_unique
    for r in films.itertuples():
        regions = json.loads(r.regions)
        assert bool(regions) == (r.label != "NORMAL") and r.severity == severity(r.label, float(r.lesion_extent))
        assert (r.severity == "none") == (r.label == "NORMAL")
        for g in regions:
            p = np.array(g["points"])
            assert g["kind"] in ("polygon", "ellipse", "box") and p.ndim == 2 and p.shape[1] == 2 and len(p) >= 3
            assert (p >= 0).all() and (p <= 1).all() and np.ptp(p, axis=0).min() > 0


def test_the_lesion_is_where_the_region_says():
    "Draw the same chest with and without disease: the difference lies in the region."
    from cxr_pred.data.chest import chest, sicken
    inside = []
    for p in [p for p in plan_films(100, 128, 5) if p.label in CHEST and p.label != "NORMAL"][::4]:
        rng = np.random.default_rng([p.seed, 3, p.number])
        ch = chest(p.person, p.shape, rng, p.view)
        clear = ch.c.A.copy()
        _, outlines = sicken(ch, p.label, p.load, rng)
        change = np.abs(ch.c.A - clear)
        m = np.zeros(change.shape, bool)
        for o in outlines:
            win, mask = ch.c.mask(o); m[win] |= mask
        inside.append(change[m].sum() / change.sum())
    assert np.mean(inside) > 0.6 and min(inside) > 0.3, inside


def test_format_size_and_exposure_do_not_know_the_class():
    plans = plan_films(2000, seed=11)
    t = pd.DataFrame([dict(label=p.label, dicom=p.kind != "png", h=p.shape[0], w=p.shape[1]) for p in plans])
    by = t.groupby("label")
    assert by.dicom.mean().between(0.15 - 0.09, 0.15 + 0.09).all()           # 3.5 standard errors of 200
    assert (by[["h", "w"]].mean() - t[["h", "w"]].mean()).abs().max().max() < 6  # of 22 px, 3.5 standard errors
    a, b = (random_exposure(np.random.default_rng([11, 4, n])) for n in (3, 3))
    assert a == b                                                           # exposure comes from the film's number alone
    assert (t.h.between(224, 324) & t.w.between(224, 324)).all()


def test_a_patient_has_one_class_and_several_films():
    plans = plan_films(600)
    t = pd.DataFrame([(p.patient_id, p.label, p.person.age, p.person.sex) for p in plans], columns=["patient", "label", "age", "sex"])
    assert (t.groupby("patient").nunique() == 1).all().all()
    assert 2 <= t.groupby("patient").size().mean() <= 3
    assert t.age.between(18, 89).all() and 0.35 < t.drop_duplicates("patient").sex.eq("F").mean() < 0.65
    assert {region(p.label): p.view for p in plans}.keys() == {"chest", "elbow", "fingers", "forearm", "humerus", "shoulder", "wrist"}
