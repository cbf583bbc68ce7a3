"The loop from a physician's answer to the next model: no test film is learned from, nobody is served worse, and every decision leaves its evidence."
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from cxr_pred.cli import cli
from cxr_pred.core import CxrError, SetupError, load_params, read_json, reload_settings, root, run_dir, write_json
from cxr_pred.data.images import PREPROCESSING, preprocess
from cxr_pred.data.labels import LABELS
from cxr_pred.ops import retrain as loop
from cxr_pred.ops.challenge import answers, decision
from cxr_pred.ops.feedback import Known, alike, known_films, write_films
from cxr_pred.store import Feedback, Store, Study, new_id
from cxr_pred.vision.toy import toy_bundle, toy_patterns

ROOT = root()
ETL = {"size": 224, "seed": 0, "workers": 1, "reject": ["blank"], "resize": "squash", "tone": "percentile"}


def film(label: str, seed: int) -> np.ndarray:
    "A film with the toy's pattern of a class under noise of its own, (224, 224) uint8."
    g = np.random.default_rng(seed)
    return np.clip(128 + 75 * np.kron(toy_patterns(0)[LABELS.index(label)], np.ones((14, 14))) + 45 * np.kron(g.normal(size=(16, 16)), np.ones((14, 14))), 0, 255).astype(np.uint8)


def write_base(data: Path, n: int = 160, test_from: int = 80) -> None:
    "A run's data folder with n films of the toy's classes, from number `test_from` on in test."
    from cxr_pred.data.etl import as_manifest, image_id, picture_hash, pixel_hash
    films = [film(LABELS[i % 10], i) for i in range(n)]
    ids = [image_id("toys", f"{i}.png") for i in range(n)]
    rows = pd.DataFrame({"image_id": ids, "source": "toys", "split": ["test" if i >= test_from else "val" if i % 7 == 0 else "train" for i in range(n)], "label": [LABELS[i % 10] for i in range(n)], "patient_id": None, "group_id": ids,
                         "age": 50.0, "sex": ["F", "M"] * (n // 2), "view": "PA", "width": 224, "height": 224, "sha256": [pixel_hash(f) for f in films], "phash": [picture_hash(f) for f in films], "quality": [[] for _ in films], "severity": None, "regions": None, "path": [f"{i}.png" for i in range(n)]})
    data.mkdir(parents=True)
    np.save(data / "films.npy", np.stack([preprocess(films[i]) for i in rows.sort_values("image_id").index]))
    as_manifest(rows).to_parquet(data / "manifest.parquet", index=False)
    write_json(data / "preprocessing.json", PREPROCESSING)


def recorded(store: Store, pixels: np.ndarray, label: str, patient: str, physicians: int = 2, says: tuple = ()) -> str:
    "A study of a film with what physicians answered; the model had said NORMAL."
    i = new_id()
    store.add_study(Study(id=i, status="ok", reason_code="ok", label="NORMAL", probability=0.6, finding={"label": "NORMAL"}, explanation_status="off", bundle_hash="b", patient_hash=store.patient_hash(patient)), pixels)
    for k, said in enumerate(says or [label] * physicians): store.add_feedback(Feedback(study_id=i, physician=f"dr-{k}", kind="reading", confirmed_label=said, agrees=said == "NORMAL"))
    return i


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of its own with a toy champion that knows the wrong patterns, and a store with forty settled films."
    place = tmp_path / "project"; place.mkdir()
    shutil.copy(ROOT / "settings.ini", place)
    gates = [{"name": "model accuracy", "metric": "vit.overall.accuracy.value", "above": 0.1, "action": "halt"}]
    retrain = load_params("sample", "retrain") | {"min_confirmed": 30, "draws": 100, "stress_films": 8, "on_drift": False, "margin_part": 0.2}
    (place / "params.yaml").write_text(yaml.safe_dump({"etl": ETL, "gate": {"gates": gates}, "retrain": retrain}))
    for name, value in {"CXR_ROOT": place, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/runs.db", "CXR_STATE": tmp_path / "state", "CXR_DATABASE_URL": ""}.items(): monkeypatch.setenv(name, str(value))
    reload_settings()
    write_base(run_dir("sample") / "data")
    toy_run(run_dir("sample"), 1)
    store = Store()
    for n in range(40): recorded(store, film(LABELS[n % 10], 500 + n), LABELS[n % 10], f"P{n // 2}")
    yield store
    store.close(); monkeypatch.undo(); reload_settings()


def toy_run(run: Path, seed: int) -> Path:
    "What training and packaging leave, of a toy; its bundle."
    from cxr_pred.vision.bundle import seal
    toy_bundle(run / "vit", seed=seed); shutil.copytree(run / "vit", run / "bundle", dirs_exist_ok=True)
    for place in (run, run / "bundle"): write_json(place / "metrics/vit.json", {"overall": {"accuracy": {"value": 0.5}}})
    seal(run / "bundle", "sample")
    return run / "bundle"


def said(*args): return CliRunner().invoke(cli, [str(a) for a in args], catch_exceptions=False)


# ---- nobody is served worse

def both(champion: np.ndarray, challenger: np.ndarray, truth: np.ndarray) -> dict:
    "Answers of two models that are right where they are told to be."
    probs = lambda right: np.eye(10)[np.where(right, truth, (truth + 1) % 10)] * 0.9 + 0.01
    return {m: {"probs": probs(r), "ok": np.ones(len(truth), bool)} for m, r in (("champion", champion), ("challenger", challenger))}


@pytest.mark.parametrize("worse_for", [None, "sex F", "finds fracture wrist", "source small clinic", "age 65+"])
def test_better_on_the_whole_and_worse_for_some_is_refused(worse_for):
    rng, n = np.random.default_rng(0), 600
    truth = np.arange(n) % 10
    table = pd.DataFrame({"label": np.array(LABELS)[truth], "source": np.where(np.arange(n) // 10 % 8 == 0, "small clinic", "large"), "group_id": np.arange(n), "age": np.where(np.arange(n) // 20 % 6 == 0, 70.0, 50.0), "sex": np.where(np.arange(n) // 30 % 5 == 0, "F", "M"), "view": "PA"})
    champion = rng.random(n) < 0.75
    challenger = champion | (rng.random(n) < 0.6)
    hit = {"sex F": table.sex == "F", "finds fracture wrist": table.label == "FRACTURE_WRIST", "source small clinic": table.source == "small clinic", "age 65+": table.age > 65}.get(worse_for)
    if hit is not None: challenger[hit.to_numpy()] = champion[hit.to_numpy()] & (rng.random(int(hit.sum())) < 0.6)
    found = decision(answers("frozen test", table, both(champion, challenger, truth), times=100))
    assert "frozen test, accuracy" in found["better"], "better on the whole it is"
    assert found["promote"] is (worse_for is None) and (worse_for is None or f"frozen test, {worse_for}" in found["worse"])
    assert worse_for is None or worse_for in found["why"][0]


def test_as_good_is_no_reason_and_a_gate_is_obeyed():
    truth = np.arange(400) % 10
    table = pd.DataFrame({"label": np.array(LABELS)[truth], "source": "one", "group_id": np.arange(400), "age": 50.0, "sex": "F", "view": "PA"})
    right = np.random.default_rng(0).random(400) < 0.8
    assert decision(answers("test", table, both(right, right, truth), times=50))["why"] == ["It is better at none of the goals that were named beforehand."]
    rows = answers("test", table, both(right, right | (np.arange(400) % 3 == 0), truth), times=100)
    assert decision(rows)["promote"]
    gate = {"where": "gates", "name": "texts refused", "kind": "gate", "champion": 0.1, "challenger": 0.9, "verdict": "worse"}
    assert not decision([*rows, gate])["promote"] and "gates, texts refused" in decision([*rows, gate])["worse"]


# ---- what is learned from

def test_no_test_film_enters_training_however_it_was_saved(project, tmp_path):
    tests = [film(LABELS[i % 10], i) for i in range(80, 86)]
    def through(a, **how): out = io.BytesIO(); Image.fromarray(a).save(out, **how); return np.asarray(Image.open(out).convert("L"))
    ways = [lambda a: a, lambda a: through(a, format="JPEG", quality=25), lambda a: np.asarray(Image.fromarray(a).resize((150, 170), Image.Resampling.BICUBIC)), lambda a: np.ascontiguousarray(a[:, ::-1]),
            lambda a: (40 + 0.6 * a).astype(np.uint8), lambda a: through(np.asarray(Image.fromarray(a).resize((600, 600))), format="PNG")]
    for n, (way, a) in enumerate(zip(ways, tests)): recorded(project, way(a), "TUBERCULOSIS", f"T{n}", physicians=2)
    friend = recorded(project, film("NORMAL", 900), "NORMAL", "T1")                    # a patient of whom a test film is known
    disputed = recorded(project, film("NORMAL", 901), "", "D", says=("NORMAL", "PNEUMONIA"))
    place, base = tmp_path / "feedback", run_dir("sample") / "data"
    counts = write_films(project, place / "raw", [known_films(base)], 0.3)
    assert (counts["copies_of_test_films"], counts["kept_out_with_them"], counts["disputed"], counts["films"]) == (6, 1, 1, 40)
    assert not {project.subject(i)[:32] for i in (friend, disputed)} & {p.stem for p in (place / "raw/feedback/films").iterdir()}
    assert loop.read_feedback_films(place, ETL)["films_opened"] == 40 and loop.read_feedback_films(place, ETL)["films_opened"] == 0
    loop.join_data(base, place / "data", place / "raw", tmp_path / "new")
    m, pictures = pd.read_parquet(tmp_path / "new/manifest.parquet"), np.load(tmp_path / "new/films.npy")
    frozen = known_films(base)
    assert m.image_id[m.split == "test"].tolist() == frozen.manifest.image_id.tolist() and (pictures[m.row[m.split == "test"]] == frozen.pictures).all()
    assert alike(pictures[m.row[m.split != "test"]], frozen.pictures) == [], "no picture that is learned from resembles a test film"
    assert m.groupby("group_id").split.nunique().max() == 1 and (m.source == "csv:feedback").sum() > 20


def test_one_damaged_film_is_left_out_and_named_and_a_place_that_is_away_ends_it(project, tmp_path, monkeypatch, caplog):
    i = recorded(project, film("NORMAL", 700), "NORMAL", "broken")
    tests = [known_films(run_dir("sample") / "data")]
    assert write_films(project, tmp_path / "raw", tests, 0.3)["films"] == 41
    whole = (kept := project.films / f"{i}.png").read_bytes()
    for broken in (whole[:len(whole) // 2], b"", b"no picture", whole[:25] + bytes(8) + whole[33:]):
        caplog.clear(); kept.write_bytes(broken)
        counts = write_films(project, tmp_path / "raw", tests, 0.3)
        assert (counts["film_gone"], counts["films"]) == (1, 40) and i in caplog.text and not (tmp_path / f"raw/feedback/films/{project.subject(i)[:32]}.png").exists()
    def away(name): raise OSError(5, "Input/output error")
    monkeypatch.setattr(project.place, "get", away)
    with pytest.raises(OSError, match="Input/output"): write_films(project, tmp_path / "raw", tests, 0.3)


def test_the_exported_folder_is_tidied_in_one_pass(project, tmp_path, monkeypatch):
    walked, real = [], pd.Series.__iter__
    def walk(self): walked.append(self.name); return real(self)
    monkeypatch.setattr(pd.Series, "__iter__", walk)
    write_films(project, tmp_path / "raw", [known_films(run_dir("sample") / "data")], 0.3)
    assert 0 < walked.count("study") < 10, "not once for each of the forty films"


def test_a_planted_test_film_in_the_feedback_folder_stops_the_join(project, tmp_path):
    base = run_dir("sample") / "data"
    write_films(project, tmp_path / "raw", [], 0.0)   # nobody told it of the test films
    recorded(project, film(LABELS[0], 90), LABELS[0], "T")
    write_films(project, tmp_path / "raw", [], 0.0)
    loop.read_feedback_films(tmp_path, ETL)
    with pytest.raises(Exception, match="test_film"): loop.join_data(base, tmp_path / "data", tmp_path / "raw", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_physicians_words_reach_the_language_data(project, tmp_path, monkeypatch):
    import nbformat
    from cxr_pred.language.sft import read_pairs
    i = recorded(project, film("PNEUMONIA", 1), "PNEUMONIA", "W", physicians=0)
    words = "Pneumonia is likely on this film, and it looks mild. The small air sacs of the lung are inflamed there. A doctor has to listen to your chest."
    for text in (words, "You have pneumonia. Take antibiotics for a week."): project.add_feedback(Feedback(study_id=i, physician="dr-w", confirmed_label="PNEUMONIA", severity="mild", edited_explanation=text, agrees=False))
    assert said("feedback", "export", tmp_path / "answers.parquet").exit_code == 0
    monkeypatch.chdir(ROOT)   # where the stages run
    names = {}
    for cell in nbformat.read(ROOT / "nbs/pipelines/sft.ipynb", 4).cells:
        if cell.cell_type != "code": continue
        exec(cell.source, names)
        if "parameters" in cell.metadata.get("tags", []): names |= {"run": str(tmp_path), "n_pairs": 40, "feedback": str(tmp_path / "answers.parquet"), "repeat": 3}
    mine = [p for p in read_pairs(tmp_path / "sft/train.jsonl") if p["origin"] == "physician"]
    assert len(mine) == 3 and "air sacs" in mine[0]["answer"] and read_json(tmp_path / "sft/summary.json")["physicians_refused"] == 1
    assert "A doctor has to listen to your chest." in [w["sentence"] for w in read_pairs(tmp_path / "sft/wordings.jsonl")], "for whoever reviews the sentences"


# ---- promotion and refusal

def test_the_command_promotes_refuses_and_leaves_evidence(project, monkeypatch):
    import mlflow
    alias = lambda: mlflow.MlflowClient().get_model_version_by_alias("cxr-reader-sample", "champion").tags["bundle_hash"]
    seeds = iter((1, 0, 1))
    train, pack = (lambda profile, run: toy_run(run, next(seeds))), (lambda profile, run: run / "bundle")
    monkeypatch.setattr(loop.retrain, "__defaults__", (train, pack))
    assert "40 newly settled studies" in said("retrain", "--check").stdout and not loop.home("sample").exists()
    r = said("retrain")
    assert r.exit_code == 3 and "Not promoted. It is better at none of the goals" in r.stdout, r.output
    r = said("retrain")
    assert r.exit_code == 0 and "No reason to train again: 0 studies were settled since the last time, 30 are needed" in r.stdout
    r = said("retrain", "--now")
    assert r.exit_code == 0 and "Promoted. It is not worse anywhere" in r.stdout, r.output
    up = loop.remembered("sample")["champion"]
    promoted = alias()
    r = said("retrain", "--now")
    assert r.exit_code == 3 and "It is worse, or not shown to be no worse, at: frozen test, accuracy" in r.stdout and alias() == promoted and loop.remembered("sample")["champion"] == up
    folders = sorted(p for p in loop.home("sample").iterdir() if (p / "evidence").is_dir())
    assert len(folders) == 3
    decided = [read_json(f / "evidence/evidence.json") for f in folders]
    assert [e["decision"]["promote"] for e in decided] == [False, True, False] and decided[1]["challenger"]["bundle_hash"] == promoted == decided[2]["champion"]["bundle_hash"]
    assert decided[0]["started"].startswith("by 40 newly settled") and [e["data"]["films_opened"] for e in decided] == [40, 0, 0], "the second and third time no film is opened"
    for f, e in zip(folders, decided):
        page, plan = (f / "evidence/evidence.html").read_text(), (f / "evidence/plan.md").read_text()
        assert ("<h1>Promoted</h1>" in page) is e["decision"]["promote"] and "http" not in page and "dr-0" not in page + plan
        assert all(h in plan for h in ("## 1. Description of the modification", "## 2. Modification protocol", "## 3. Impact assessment"))


def trained(monkeypatch, *seeds):
    "Stand-ins for training and packaging: toys of these seeds, one a retraining; returns what the alias points to."
    import mlflow
    left = iter(seeds)
    monkeypatch.setattr(loop.retrain, "__defaults__", ((lambda profile, run: toy_run(run, next(left))), (lambda profile, run: run / "bundle")))
    return lambda: mlflow.MlflowClient().get_model_version_by_alias("cxr-reader-sample", "champion").tags["bundle_hash"]


class Killed(BaseException): "As a kill: nothing catches it."


@pytest.mark.parametrize("at, evidence, moved", [("the evidence", False, False), ("the alias", True, False), ("the last words", True, True)])
def test_a_promotion_that_was_killed_is_ended_by_the_next_call(project, monkeypatch, at, evidence, moved):
    from cxr_pred.vision import registry
    alias, before = trained(monkeypatch, 0, 0), loop.load_bundle(run_dir("sample") / "bundle").hash
    *name, nth = {"the evidence": (loop, "write_evidence", 1), "the alias": (registry, "register_bundle", 2), "the last words": (loop, "write_evidence", 2)}[at]
    real, calls = getattr(*name), []
    def killed(*a, **k):
        calls.append(a)
        if len(calls) == nth: raise Killed
        return real(*a, **k)
    with monkeypatch.context() as m:
        m.setattr(*name, killed)
        with pytest.raises(Killed): loop.retrain("sample", project, "by a person")
    state = loop.remembered("sample"); run = root() / state["pending"]
    assert state["champion"] == "runs/sample" and state["at"] == "", "the old champion is remembered until the end"
    assert (run / "evidence/evidence.json").is_file() is evidence and (not evidence or read_json(run / "evidence/evidence.json")["alias"] == "pending"), "no alias moves before its evidence stands"
    if evidence: assert (alias() != before) is moved
    r = said("retrain", "--check"); assert "A promotion was begun and not ended" in r.stdout and loop.remembered("sample") == state, "who only looks ends nothing"
    def away(profile): raise SetupError("no_registry", "The model registry does not say which bundle is the champion.")
    with monkeypatch.context() as m:   # nobody can say what the alias is: that is no 'no'
        if evidence: m.setattr(loop, "registered", away); r = said("retrain"); assert r.exit_code == 1 and "[no_registry]" in r.stderr and loop.remembered("sample") == state and (run / "learned.json").is_file() and (run / "data").is_dir(), r.output
    r = said("retrain")
    if not evidence:
        assert "it had no evidence yet, nothing was moved" in r.stdout and "There is reason to train again" in r.stdout and loop.remembered("sample")["pending"] is None and not (run / "data").exists()
        return
    assert r.exit_code == 0 and "the alias is moved to version 2." in r.stdout and "No reason to train again: 0 studies" in r.stdout, r.output
    after = loop.remembered("sample")
    assert (after["champion"], after["pending"]) == (state["pending"], None) and alias() == read_json(run / "evidence/evidence.json")["challenger"]["bundle_hash"] == loop.load_bundle(run / "bundle").hash != before
    assert read_json(run / "evidence/evidence.json")["alias"] == "moved to version 2" and (run / "data").exists()


def test_a_registry_that_is_away_while_a_challenger_is_packaged_is_no_refusal(project, monkeypatch):
    seeds, doors = iter((0, 0, 0)), iter(("MlflowException: connection refused", None, None))
    def pack(profile, run):
        if (why := next(doors)): raise CxrError("stage_failed", f"Stage package stopped: {why}", "")
        return run / "bundle"
    monkeypatch.setattr(loop.retrain, "__defaults__", ((lambda profile, run: toy_run(run, next(seeds))), pack))
    r = said("retrain")
    assert r.exit_code == 1 and "[stage_failed] Stage package stopped" in r.stderr, "an error, and not the 3 of a refusal, which a schedule leaves alone"
    assert loop.remembered("sample")["at"] == "" and not list(loop.home("sample").glob("*/evidence")), "nobody decided anything"
    left = [d.parent for d in loop.home("sample").glob("[0-9]*/data")]
    r = said("retrain")
    assert r.exit_code == 0 and "by 40 newly settled studies" in r.stdout and "Promoted." in r.stdout, r.output + r.stderr
    assert len(left) == 1 and not (left[0] / "data").exists() and not (left[0] / "learned.json").exists(), "what broke off keeps no patient's film"


def test_one_retraining_at_a_time_and_it_says_so(project, monkeypatch):
    trained(monkeypatch, 1)
    with loop.alone("sample"):
        r = said("retrain", "--now")
        assert r.exit_code == 1 and "[retraining_runs]" in r.stderr and not (loop.home("sample") / "feedback").exists(), r.output
    assert said("retrain", "--now").exit_code == 3, "free again"


def test_a_rollback_by_hand_is_obeyed(project, monkeypatch, tmp_path):
    import mlflow
    from cxr_pred.vision.registry import register_bundle
    alias = trained(monkeypatch, 0, 1, 0)
    first = loop.load_bundle(run_dir("sample") / "bundle").hash
    assert said("retrain", "--now").exit_code == 0 and alias() != first
    mlflow.MlflowClient().set_registered_model_alias("cxr-reader-sample", "champion", "1")
    r = said("retrain", "--now")
    assert r.exit_code == 3 and "better at none of the goals" in r.stdout and alias() == first, "as good as the one that was gone back to, and worse than the one that was not"
    evidence = read_json(sorted(loop.home("sample").glob("*/evidence/evidence.json"))[-1])
    assert evidence["champion"] | {"version": ""} == {"version": "", "bundle_hash": first, "run": "runs/sample", "known_by": "the registry's alias champion"}
    assert loop.remembered("sample")["champion"] == "runs/sample"
    def aside(profile, run): register_bundle(toy_run(tmp_path / "third", 2), alias="champion"); return run / "bundle"   # a person, while the challenger is packaged
    monkeypatch.setattr(loop.retrain, "__defaults__", (lambda profile, run: toy_run(run, 0), aside))
    r = said("retrain", "--now")
    assert r.exit_code == 3 and "It could not be promoted: The registry's champion has become" in r.stdout and alias() != first, r.output


def test_what_a_champion_learned_from_is_never_measured_on(project, monkeypatch):
    trained(monkeypatch, 0, 0)
    recent = lambda: set(loop.recent_films(loop.home("sample") / "feedback").manifest.sha256)
    assert said("retrain", "--now").exit_code == 0
    measured, learned = recent(), set(read_json(root() / loop.remembered("sample")["champion"] / "learned.json")["sha256"])
    assert len(learned) > 20 and measured and not learned & measured
    (note := root() / loop.remembered("sample")["champion"] / "learned.json").rename(note.with_suffix(".away"))   # a champion of before, when there were no such notes
    assert learned <= loop.ever_learned("sample").sha256
    note.with_suffix(".away").rename(note)
    for n in range(19, -1, -1): recorded(project, film(LABELS[n % 10], 900 + n), LABELS[n % 10], f"P{n}")   # a new film of every patient, last of those that were learned from
    assert said("retrain", "--now").exit_code == 3
    assert recent() and not learned & recent(), "a patient's new film brings no old one back"
    assert not [f for f in loop.home("sample").glob("*/learned.json") if f.parent.name != Path(loop.remembered("sample")["champion"]).name], "nobody reads by what a refused one learned"


def test_the_films_of_a_former_champion_go_and_it_can_be_gone_back_to(project, monkeypatch):
    import mlflow
    from cxr_pred.vision.bundle import seal
    figures = iter((0.5, 0.51, 0.52, 0.53))
    def train(profile, run): seed, n = next(kinds), next(figures); toy_run(run, seed); write_json(run / "bundle/metrics/vit.json", {"overall": {"accuracy": {"value": n}}}); seal(run / "bundle", "sample")
    monkeypatch.setattr(loop.retrain, "__defaults__", (train, lambda profile, run: run / "bundle"))
    kinds, first, point = iter((0, 0, 1, 1)), run_dir("sample"), lambda v: mlflow.MlflowClient().set_registered_model_alias("cxr-reader-sample", "champion", v)
    champion = lambda: root() / loop.remembered("sample")["champion"]
    assert said("retrain", "--now").exit_code == 0
    old, learned, at = champion(), read_json(champion() / "learned.json")["sha256"], loop.remembered("sample")["at"]
    (old / "learned.json").unlink()   # as one from before these notes
    assert (old / "data/films.npy").is_file() and len(learned) > 20
    point("1")   # a person goes back to the profile's run, and the next challenger is better than that
    assert said("retrain", "--now").exit_code == 0 and champion() != old
    new = champion()
    assert not (old / "data").exists() and (new / "data/films.npy").is_file() and read_json(old / "learned.json")["sha256"] == learned, "the films go, what they were stays known"
    assert set(learned) <= loop.ever_learned("sample").sha256 and (first / "data/films.npy").is_file(), "the profile's own run is no retraining"
    point("2")   # and back by hand to the one without films
    assert loop.champion_of("sample", loop.remembered("sample")) == (old, "the registry's alias champion")
    r = said("retrain", "--now")
    evidence = read_json(sorted(loop.home("sample").glob("*/evidence/evidence.json"))[-1])
    assert r.exit_code == 3 and "It is worse" in r.stdout and evidence["champion"]["run"] == loop.below(old) and evidence["data"]["learned_from"] > 20, r.output + r.stderr
    assert not set(learned) & set(loop.recent_films(loop.home("sample") / "feedback").manifest.sha256), "nor is it measured on what it learned from"
    assert said("retrain", "--now").exit_code == 3 and champion() == old and not list(loop.home("sample").glob("[0-9]*/data")), "no patient's film is left of any retraining"


def test_who_forgets_is_told_where_films_were_taken_to_learn_from(project, monkeypatch):
    from cxr_pred.store import film_name
    assert said("forget", "P0").stdout == "2 studies, 2 films, 0 explanations and 4 physicians' answers deleted\n", "nothing was taken yet"
    write_films(project, loop.home("sample") / "feedback/raw", [known_films(run_dir("sample") / "data")], 0.3)
    r = said("forget", "P1")
    assert r.exit_code == 0 and "may still hold some of these:\n  runs/retrain/sample/feedback\n" in r.stdout and "docs/operator.md" in r.stdout
    assert "retrain" not in said("sweep").stdout and "runs/retrain/sample/feedback" in said("sweep", "--days", "0").stdout
    shutil.rmtree(loop.home("sample") / "feedback")   # as the operator's guide says
    i = recorded(project, film("NORMAL", 1), "NORMAL", "Q")
    assert write_films(project, loop.home("sample") / "feedback/raw", [known_films(run_dir("sample") / "data")], 0.0)["films"] == 1 and not project.place.get(film_name(i)) is None
    monkeypatch.delenv("CXR_ROOT"); monkeypatch.chdir(project.state)
    assert said("forget", "Q").stdout.count("\n") == 1, "a machine that only serves has no such folders"


def test_explanations_of_physicians_tune_the_language_model_where_asked(project, monkeypatch):
    from cxr_pred.language.base import toy_base
    from cxr_pred.language.facts import load_facts
    from cxr_pred.language.sft import grammar_pairs, read_pairs
    trained(monkeypatch, 0)
    small = {"sft": {"n_pairs": 40}, "train_llm": {"rank": 2, "alpha": 4, "steps": 2, "micro_batch": 2, "max_tokens": 1024, "val_pairs": 2}, "evaluate_llm": {"n_findings": 2, "n_untrained": 1, "most": 12, "most_untrained": 12}}
    (root() / "params.yaml").write_text(yaml.safe_dump(yaml.safe_load((root() / "params.yaml").read_text()) | small))
    (root() / "nbs").symlink_to(ROOT / "nbs")
    toy_base(run_dir("sample") / "llm_base", [f"{p['prompt']}\n{p['answer']}" for p in grammar_pairs(40, load_facts(ROOT / "nbs/language/facts.yaml"))])
    r = said("retrain", "--now", "--language")
    assert r.exit_code == 1 and "[no_words]" in r.stderr and not list(loop.home("sample").glob("[0-9]*/data")), "nothing is tuned for nothing"
    i = recorded(project, film("PNEUMONIA", 1), "PNEUMONIA", "W", physicians=0)
    words = "Pneumonia is likely on this film, and it looks mild. The small air sacs of the lung are inflamed there. A doctor has to listen to your chest."
    project.add_feedback(Feedback(study_id=i, physician="dr-w", confirmed_label="PNEUMONIA", severity="mild", edited_explanation=words, agrees=False))
    r = said("retrain", "--now", "--language")
    assert r.exit_code == 0, r.output + r.stderr
    run = root() / loop.remembered("sample")["champion"]
    e = read_json(run / "evidence/evidence.json")
    assert e["language"]["explanations_of_physicians"] == 1 and "air sacs" in "".join(p["answer"] for p in read_pairs(run / "sft/train.jsonl") if p["origin"] == "physician")
    assert (run / "llm/adapter.safetensors").is_file() and read_json(run / "metrics/llm.json")["n"] == 2 and "1 explanations of physicians" in (run / "evidence/plan.md").read_text()
    loop.carry_language(run, root() / "runs/next")
    assert (root() / "runs/next/llm/adapter.safetensors").read_bytes() == (run / "llm/adapter.safetensors").read_bytes(), "the next challenger begins with these words"


# ---- what to ask next

def test_the_queue_knows_what_is_strange_by_the_bundles_own_reference(project, tmp_path):
    from cxr_pred.ops.reference import IN_BUNDLE, Films, make_reference
    from cxr_pred.vision.bundle import seal
    g, n = np.random.default_rng(0), 400
    films = Films(g.normal(size=(n, 13)), g.normal(size=(n, 32)), g.dirichlet(np.ones(10), n), g.gamma(9, 0.2, n), np.full(n, "ok", object), np.full(n, np.nan))
    bundle = toy_bundle(tmp_path / "bundle")
    seal(bundle, "sample")
    i = new_id(); project.add_study(Study(id=i, status="ok", reason_code="ok", label="NORMAL", probability=0.9, finding={"label": "NORMAL", "probabilities": {"NORMAL": 0.9, "PNEUMONIA": 0.1}, "ood_score": 99.0}, explanation_status="off", bundle_hash="b", state="unread"), film("NORMAL", 3))
    strange = lambda r: {s["study_id"]: s["strange"] for s in json.loads(r.stdout)}[i]
    r = said("feedback", "queue", "--bundle", bundle, "--most", "100", "--json")
    assert strange(r) == 0 and "[no_reference]" in r.stderr and "No study counts as strange" in r.stderr
    write_json(bundle / IN_BUNDLE, make_reference(films, draws=200)); seal(bundle, "sample")
    r = said("feedback", "queue", "--bundle", bundle, "--most", "100", "--json")
    assert strange(r) > 0.9 and r.stderr == "", r.stderr
