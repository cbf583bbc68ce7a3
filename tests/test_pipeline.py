"The runner: parameters arrive, output is the same twice, and a failed cell says what matters."
import ast
import hashlib
import re
import shutil

import nbformat
import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from nbformat.v4 import new_code_cell, new_notebook

from cxr_pred import pipeline
from cxr_pred.core import PROFILES, CxrError, SetupError, load_params, params_path, root
from cxr_pred.vision.recipes import dvc_flags, recipe

ROOT = root()
HERE = [s for s in pipeline.STAGES if pipeline.stage_notebook(s).exists()]
ON_GPU = ["adapt_vit", "distil_vit"]


def notebook(path, *sources, tagged=True):
    cells = [new_code_cell('profile = "none"\nrun = "none"\nx = 0', metadata={"tags": ["parameters"] if tagged else []})]
    nbformat.write(new_notebook(cells=cells + [new_code_cell(s) for s in sources]), path)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project of its own, so that nothing here touches the real runs and reports."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "params.yaml").write_text("gate: {x: 41}\n")
    monkeypatch.setenv("CXR_ROOT", str(tmp_path))
    return tmp_path


def test_parameters_arrive_and_two_runs_are_equal(project):
    nb = notebook(project / "a.ipynb", "import time, sys\nprint(profile, run, x + 1)\nfor i in range(3): print(f'\\r{i} {time.time()}', end='', file=sys.stderr)\nprint('\\rdone', file=sys.stderr)")
    digests = []
    for _ in range(2):
        report = pipeline.run_stage("gate", notebook=nb)
        digests.append(hashlib.sha256(report.read_bytes()).hexdigest())
        assert "sample runs/sample 42" in report.read_text()
        assert report.with_suffix(".html").stat().st_size > 1000
    assert digests[0] == digests[1]


def test_untagged_notebook_is_refused(project):
    with pytest.raises(SetupError) as e:
        pipeline.run_stage("gate", notebook=notebook(project / "b.ipynb", "print(x)", tagged=False))
    assert e.value.code == "no_parameters_tag"


def test_failed_cell_says_its_sentence_and_keeps_the_half_run_notebook(project):
    nb = notebook(project / "c.ipynb", "from cxr_pred.core import SetupError\nraise SetupError('missing_set', 'chest_xray is absent.', 'Run cxr-pred fetch-data kermany.')")
    with pytest.raises(CxrError) as e:
        pipeline.run_stage("gate", notebook=nb)
    assert e.value.code == "stage_failed" and "cxr-pred fetch-data kermany" in str(e.value)
    assert (project / "reports/sample/gate.html").exists()


@pytest.mark.parametrize("name", ["tiny", "small", "lora", "large"])
@pytest.mark.parametrize("profile", PROFILES)
def test_what_a_recipe_sets_arrives_as_it_was_meant(name, profile, tmp_path, monkeypatch):
    "By way of `-S`: DVC writes the file, the stage reads it. 2e-05 came as text."
    file = params_path(profile).relative_to(ROOT).as_posix()
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    for f in ("settings.ini", "params.yaml", file): shutil.copy(ROOT / f, tmp_path / f)
    set_by = [a.removeprefix(f"{file}:") for a in dvc_flags(name, profile)[2::2]]
    before, wanted = load_params(profile, "train_vit"), recipe(name)
    monkeypatch.setenv("CXR_ROOT", str(tmp_path))
    apply_overrides(tmp_path / file, [*set_by, "train_vit.weight_decay=0.00001", "train_llm.lr=3E-6"])
    after = load_params(profile, "train_vit")
    assert after == before | wanted | {"weight_decay": 1e-5} and load_params(profile, "train_llm")["lr"] == 3e-6
    assert {k: type(v) for k, v in after.items() if k not in wanted} == {k: type(v) for k, v in before.items() if k not in wanted}


def stages(path):
    return yaml.safe_load(path.read_text())["stages"]


def test_both_profiles_run_the_same_stages():
    ours, clinical = stages(ROOT / "dvc.yaml"), stages(ROOT / "profiles/clinical/dvc.yaml")
    assert list(ours) == [s for s in HERE if s not in ON_GPU], "the sample is for machines without a GPU"
    assert list(clinical) == [s for s in HERE if s != "sample"]
    assert [name for name, stage in clinical.items() if stage.get("frozen")] == ON_GPU
    for name, stage in clinical.items():
        if name in ON_GPU: continue
        assert stage["cmd"] == f"python -m cxr_pred.pipeline {name} --profile clinical" and stage["wdir"] == "../.."
        mine = {o if isinstance(o, str) else next(iter(o)) for o in ours[name].get("outs", [])}
        theirs = {o if isinstance(o, str) else next(iter(o)) for o in stage.get("outs", [])}
        assert {o.replace("runs/sample", "runs/clinical") for o in mine} == theirs, name


@pytest.mark.parametrize("stage", HERE)
def test_stage_notebook_has_its_parameters(stage):
    nb = nbformat.read(pipeline.stage_notebook(stage), as_version=4)
    declared = pipeline.declared_parameters(nb)
    for profile in ({"sample": ["sample"]} | dict.fromkeys(ON_GPU, ["clinical"])).get(stage, ["sample", "clinical"]):
        params = pipeline.stage_parameters(stage, profile, declared)
        assert declared - set(params) == set(), f"params.yaml leaves out {declared - set(params)}"
    assert not any(c.get("outputs") for c in nb.cells), "pipeline notebooks are committed without outputs"
    assert not any(line.startswith(("def ", "class ")) for c in nb.cells if c.cell_type == "code" for line in c.source.splitlines())


def imported(source, package):
    "The files of cxr_pred that a source imports, at its top or inside a function."
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[:len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*up, *filter(None, [node.module])])
            found += [base, *(f"{base}.{a.name}" for a in node.names)]
    return {f for n in found if n.startswith("cxr_pred.") and (ROOT / (f := n.replace(".", "/") + ".py")).is_file()}


def stage_code(stage):
    "The files of cxr_pred that a stage's notebook imports, and what these import, to the end."
    nb = nbformat.read(pipeline.stage_notebook(stage), as_version=4)
    seen, todo = set(), imported("\n".join(c.source for c in nb.cells if c.cell_type == "code"), "cxr_pred")
    while todo:
        seen.add(f := todo.pop())
        todo |= imported((ROOT / f).read_text(), f.rpartition("/")[0].replace("/", ".")) - seen
    return seen


def test_imports_are_found_wherever_they_stand():
    code = "from ..data import labels\ndef f():\n    from .vit import Reader\n    import cxr_pred.core as c, numpy"
    assert imported(code, "cxr_pred.vision") == {"cxr_pred/data/labels.py", "cxr_pred/vision/vit.py", "cxr_pred/core.py"}
    assert {"cxr_pred/data/dicom.py", "cxr_pred/data/quality.py"} <= stage_code("evaluate"), "imported by what is imported, inside a function"


@pytest.mark.parametrize("profile", ["dvc.yaml", "profiles/clinical/dvc.yaml"])
def test_dvc_depends_on_all_code_that_a_stage_runs(profile):
    for stage, said in stages(ROOT / profile).items():
        assert f"nbs/pipelines/{stage}.ipynb" in said["deps"]
        assert {d for d in said["deps"] if d.endswith(".py")} == stage_code(stage), stage


# What train_vit leaves in passing, on a machine with a GPU only. DVC cannot depend on a file that may be absent, and need not:
# the gate on it is timed, so that neither of gate's outs holds its figure (evaluate.gates), and no lock says what a card had free.
IN_PASSING = {"metrics/bench/gpu.json"}


@pytest.mark.parametrize("profile", ["dvc.yaml", "profiles/clinical/dvc.yaml"])
def test_dvc_depends_on_the_measurements_that_a_stage_reads(profile):
    read_by = {}
    for stage, said in stages(ROOT / profile).items():
        code = "\n".join(c.source for c in nbformat.read(pipeline.stage_notebook(stage), as_version=4).cells if c.cell_type == "code")
        opened = set(re.findall(r':= Path\("(metrics/bench/[\w.]+)"\)\)\.is_file', code))
        written = set(re.findall(r'write_\w+\(Path\("(metrics/bench/[\w.]+)"', code))
        assert set(re.findall(r'Path\("(metrics/bench/[\w.]+)"', code)) == opened | written, f"{stage}: read or written in another way"
        assert {d for d in said["deps"] if d.startswith("metrics/bench/")} == opened - IN_PASSING, stage
        read_by |= {f: stage for f in opened}
    kept = [f"metrics/bench/{n}.json" for n in ("as_served", "engines", "gpu_training")]
    assert read_by == dict.fromkeys(kept, "package") | {"metrics/bench/gpu.json": "gate"} and all((ROOT / f).is_file() for f in kept)
    gates = load_params(profile.split("/")[1] if "/" in profile else "sample", "gate")["gates"]
    assert all(g["timed"] for g in gates if g["metric"].startswith("bench.")), "a figure of this machine would stand in gates.json"
