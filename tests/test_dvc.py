"The whole pipeline under DVC, on a few films and with a random language model: every stage runs, nothing is left to do, and what people ask DVC for is there."
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml

from cxr_pred.core import root

ROOT = root()
DVC = [sys.executable, "-m", "dvc"]
SMALL = {
    "sample": {"n_films": 80, "size": 96, "dicom_share": 0.1},
    "etl": {"test_share": 0.3, "val_share": 0.2},
    "train_vit": {"epochs": 3},
    "export_vit": {"check_films": 4},
    "evaluate": {"bootstrap_draws": 20, "shortcut_films": 6, "engine_films": 4, "stress_films": 3, "strangers_each": 1},
    "llm_base": {"source": "folder", "folder": "toy"},
    "sft": {"n_pairs": 40},
    "train_llm": {"rank": 2, "alpha": 4, "steps": 2, "micro_batch": 2, "max_tokens": 1024, "val_pairs": 2},
    "package": {"drift_drawn": {}},
    "evaluate_llm": {"n_findings": 2, "n_untrained": 1, "most": 12, "most_untrained": 12},
    "gate": {"latency_calls": 3, "latency_px": 256, "gates": [
        {"name": "model accuracy", "metric": "vit.overall.accuracy.value", "above": -1, "action": "halt"},
        {"name": "GPU memory", "metric": "bench.gpu.memory_share", "below": 0.8, "action": "scale up", "timed": True}]},
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A copy of the project with small parameters, run once from the first stage to the last."
    from cxr_pred.language.base import toy_base
    from cxr_pred.language.facts import load_facts
    from cxr_pred.language.sft import grammar_pairs
    folder = tmp_path_factory.mktemp("project")
    for name in ("nbs", "cxr_pred"): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    (folder / "metrics/bench").mkdir(parents=True)
    for name in ("dvc.yaml", "settings.ini", *(f"metrics/bench/{n}.json" for n in ("as_served", "engines", "gpu_training"))): shutil.copy(ROOT / name, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for stage, changed in SMALL.items():
        assert set(changed) <= set(params[stage]), f"{stage} has other parameters"
        params[stage] |= changed
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    toy_base(folder / "toy", [f"{p['prompt']}\n{p['answer']}" for p in grammar_pairs(40, load_facts(ROOT / "nbs/language/facts.yaml"))])
    env = os.environ | {"PYTHONPATH": str(folder), "DVC_NO_ANALYTICS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("CXR_ROOT", None)
    run = lambda *a: subprocess.run([*DVC, *a], cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert run("init", "--no-scm").returncode == 0
    r = run("repro")
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return folder, run


def test_every_stage_ran_and_nothing_is_left_to_do(project):
    folder, run = project
    lock = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    assert set(lock) == set(yaml.safe_load((folder / "dvc.yaml").read_text())["stages"])
    assert "up to date" in run("status").stdout
    assert {p.stem for p in (folder / "reports" / "sample").glob("*.html")} == set(lock), "each stage leaves a report"


def test_metrics_and_plots_are_there(project):
    folder, run = project
    shown = json.loads(run("metrics", "show", "--json").stdout)[""]["data"]
    (line,) = [v["data"] for v in shown.values()]
    assert set(shown) == {"runs/sample/metrics/headline.json"} and line["films"] > 50 and 0 <= line["accuracy"] <= 1 and line["gates"] == 1 and None not in line.values()
    assert max(map(len, run("metrics", "show").stdout.splitlines())) < 170, "a line that fits a screen"
    assert {p.stem for p in (folder / "runs/sample/metrics").glob("*.json")} == {"data_card", "etl", "train_vit", "export", "train_llm", "vit", "llm", "gates", "headline"}
    r = run("plots", "show", "-o", "plots_html")
    assert r.returncode == 0 and all(name in (folder / "plots_html" / "index.html").read_text() for name in ("train_curve", "reliability", "confusion", "llm_curve"))


def test_the_packaged_bundle_reads_a_film(project):
    from cxr_pred.clinic.study import read_file
    from cxr_pred.vision.classify import Classifier
    folder, _ = project
    c = Classifier(folder / "runs" / "sample" / "bundle")
    for name in c.bundle.manifest["files"]: c.bundle.read(name)
    film = next((folder / "runs" / "sample" / "raw" / "films").rglob("*.png"))
    assert read_file(c, film)[0].status in ("ok", "abstained", "rejected")
    assert not [f for f in c.bundle.manifest["files"] if f.endswith((".pth", ".pkl", ".pt", ".ckpt"))]


def test_a_stage_again_gives_the_same_bytes(project):
    folder, run = project
    before = (folder / "dvc.lock").read_text()
    r = run("repro", "-f", "-s", "sft", "train_llm")
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
    assert (folder / "dvc.lock").read_text() == before


def with_params(project, stage, metrics, **values):
    "The metrics that a stage writes under other parameters; everything is put back."
    folder, run = project
    before = {f: (folder / f).read_text() for f in ("dvc.lock", "params.yaml", metrics)}
    try:
        p = yaml.safe_load(before["params.yaml"])
        p[stage] |= values
        (folder / "params.yaml").write_text(yaml.safe_dump(p, sort_keys=False))
        r = run("repro", "-s", stage)
        assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-2000:]
        return json.loads((folder / metrics).read_text())
    finally:
        for f, text in before.items(): (folder / f).write_text(text)


def test_no_pairs_for_validation(project):
    assert with_params(project, "train_llm", "runs/sample/metrics/train_llm.json", val_pairs=0)["val_loss"] == {"before": None, "after": None}


def test_a_base_that_is_not_asked(project):
    said = with_params(project, "evaluate_llm", "runs/sample/metrics/llm.json", n_untrained=0)
    assert said["n_untrained"] == 0 and said["fallback_rate"]["untrained"] is None and said["fallback_rate"]["trained"] is not None


def test_the_curves_are_in_mlflow(project):
    import mlflow
    folder, _ = project
    runs = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = runs.search_runs([e.experiment_id for e in runs.search_experiments()])
    names = {r.info.run_name for r in found}
    assert {"train_vit sample", "train_llm sample"} <= names
    assert all(r.data.tags["dvc_lock"] and r.data.params for r in found if r.info.run_name in ("train_vit sample", "train_llm sample"))
    llm = next(r for r in found if r.info.run_name == "train_llm sample")
    assert len(runs.get_metric_history(llm.info.run_id, "loss")) == 2
