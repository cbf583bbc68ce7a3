"The data card of a whole run: every number is the manifest's, duplicates have both their pictures, and no patient is named."
import numpy as np
import pandas as pd
import pytest

from cxr_pred.core import root
from cxr_pred.data.card import HIDDEN, counts, data_card, histograms, probe, shortcuts
from cxr_pred.data.duplicates import across_splits, copies, crossing, in_two_sets, lookalikes, side_by_side
from cxr_pred.data.etl import run_etl
from cxr_pred.data.pictures import examples, gallery, pair_gallery, reject_pictures
from cxr_pred.data.sources import records
from test_etl import film, raw, save  # noqa: F401  the fixture with one of each trouble


@pytest.fixture
def done(raw, tmp_path):
    "A run over the four sets: raw folder, sources, metrics, manifest, rejects, films."
    sources = ["kermany", "covid_radiography", "tb", "bone_fracture"]
    save(raw / "TB_Chest_Radiography_Database/Normal/<script>alert(1).png", film(4000))
    save(raw / "TB_Chest_Radiography_Database/Normal/again.png", film(4000))
    m, run = run_etl(raw, tmp_path / "run", sources, size=32, workers=1), tmp_path / "run/data"
    return raw, sources, m, pd.read_parquet(run / "manifest.parquet"), pd.read_parquet(run / "rejects.parquet"), np.load(run / "films.npy", mmap_mode="r")


def test_the_card_counts_what_the_stage_counted(done):
    raw, sources, m, manifest, rejects, films = done
    table = counts(manifest, "label", "split")
    assert {l: {s: int(n) for s, n in row.items() if n and s != "all"} for l, row in table.drop(index="all").T.to_dict().items()} == m["by_label"]
    assert table.loc["all", "all"] == m["films_out"]
    pairs = pd.concat([copies(rejects, manifest, raw), lookalikes(manifest, films)], ignore_index=True)
    assert pairs.how.str.startswith("same pixels").sum() == m["exact_duplicate_groups"] == 3 and set(in_two_sets(pairs).source_2) | set(in_two_sets(pairs).source) == {"tb", "covid_radiography"}
    groups = crossing(records(raw, sources), manifest)
    assert groups.group.nunique() == m["groups_crossing_source_splits"] == 12 and groups.split.isna().sum() == m["left_out"]["no_annotation"]
    card = data_card(manifest, rejects, pairs, shortcuts(manifest, films, 12), sources)
    assert sum(card["not_kept"].values()) == len(rejects) and card["films"] == m["films_out"]
    assert not any(p in str(card) for p in [*manifest.path, *manifest.patient_id.dropna()]), "no file and no patient in the card"
    assert set(HIDDEN) < set(manifest)


def test_every_reject_has_a_frame_and_no_name_breaks_the_page(done):
    raw, _, _, manifest, rejects, films = done
    frames = reject_pictures(rejects, raw)
    assert len(frames) == len(rejects) and {f.lines[0] for f in frames if f.missing == "cannot be decoded"} == {"truncated", "empty file", "unsupported format"}
    page = gallery(frames).html + pair_gallery(side_by_side(copies(rejects, manifest, raw), manifest, rejects, films, raw)).html
    assert "<script>" not in page and "&lt;script&gt;alert(1).png" in page and all(p.split("/")[-1] in page for p in rejects.path if "<" not in p)
    torn = across_splits(crossing(records(raw, ["bone_fracture"]), manifest), manifest, rejects, films, raw)
    assert len(torn) == 12 and sum(f.lines[0] == "no label" for p in torn for f in p[2:]) == 4 and pair_gallery(p[1:] for p in torn).html.count("no annotation") == 4, "two groups have no annotation"
    assert list(examples(manifest, films)) == ["NORMAL", "PNEUMONIA", "COVID19", "TUBERCULOSIS", "FRACTURE_WRIST"]


def test_the_probe_sees_another_scanner_and_not_another_draw():
    rng = np.random.default_rng(0)
    films = rng.normal(120, 40, (400, 32, 32)); films[::2] *= 0.8   # every second film from a scanner with less contrast
    h = histograms(films.clip(0, 255).astype(np.uint8), np.arange(400))
    scanner, draw, groups = pd.Series(np.where(np.arange(400) % 2, "a", "b")), pd.Series(rng.permutation(["a", "b"] * 200)), pd.Series(np.arange(400))
    told, guess = probe(h, scanner, groups)["balanced_accuracy"], probe(h, draw, groups)["balanced_accuracy"]
    assert told["low"] > 0.95 and guess["low"] < 0.55 < 0.65 > guess["value"]


def test_the_stage_needs_no_torch():
    import subprocess, sys
    code = "import sys, cxr_pred.data.card, cxr_pred.data.duplicates, cxr_pred.data.pictures; print(sorted({'torch', 'mlflow', 'matplotlib', 'sklearn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root()).stdout.strip() == "[]"
