"From a commit to production on one machine: the steps are the workflows', a step that fails stops the rest and is named, a bundle that was changed after signing is refused, and a canary goes on or back with the real HAProxy."
import re, subprocess, sys
from pathlib import Path

import pytest
import yaml
from test_deploy import debian, good
from test_rollout import FACTS, slow_bundle

from cxr_pred.core import read_json, root, sha256_file, write_json
from cxr_pred.ops.rollout import made_up_films
from cxr_pred.vision.toy import toy_bundle

ROOT, CI = root(), root() / "deploy/ci"
sys.path.insert(0, str(CI))
import canary as trial
import chain
sys.path.remove(str(CI))


def ci(out: Path, *args) -> subprocess.CompletedProcess: return subprocess.run([sys.executable, CI / "chain.py", "--out", out, *map(str, args)], capture_output=True, text=True, cwd=ROOT, timeout=400)


def judged(folder: Path, **gates) -> Path:
    "A toy bundle with the gates of a run; its metrics."
    toy_bundle(folder, FACTS)
    own = read_json(ROOT / "runs/sample/metrics/gates.json")
    for g in own["gates"]: g |= gates.get(g["name"].replace(" ", "_"), {})
    (folder / "metrics").mkdir(exist_ok=True); write_json(folder / "metrics/gates.json", own)
    sealed(folder)
    return folder / "metrics"


def sealed(folder: Path) -> None:
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and not f.name.startswith("manifest.json"))
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | {"files": {f: sha256_file(folder / f) for f in files}})


def test_the_steps_are_the_workflows():
    "In their order, with what they call; and make ci is this chain."
    jobs = yaml.safe_load((ROOT / ".github/workflows/delivery.yml").read_text())["jobs"]
    assert "train" in yaml.safe_load((ROOT / ".github/workflows/training.yml").read_text())["jobs"], "a workflow of its own: what it makes is delivered by a merge"
    of = {"lint": "commit", "tests": "commit", "gate": "gate", "package": "package", "sign": "package", "staging": "staging", "memory": "staging", "canary": "canary", "production": "production"}
    assert list(of) == [s for s in chain.STEPS if s != "train"] and [*dict.fromkeys(of.values()), "not-given"] == list(jobs)
    assert all(callable(getattr(chain.Chain, s)) for s in chain.STEPS)
    own, text = (CI / "chain.py").read_text(), "".join((ROOT / f".github/workflows/{f}.yml").read_text() for f in ("commit", "delivery")) + (CI / "gate.sh").read_text()
    for called in ("deploy/ci/lint.sh", "deploy/ci/gate.py"): assert called in own and called in text
    assert "deploy/ci/gate.sh" in text
    said = subprocess.run(["make", "--dry-run", "ci", "FROM=gate", "PROFILE=sample"], cwd=ROOT, capture_output=True, text=True)
    assert "deploy/ci/chain.py --profile sample --from gate" in good(said)
    actions = {g["action"] for g in read_json(ROOT / "runs/sample/metrics/gates.json")["gates"]} - {"report"}
    assert actions <= set(chain.STEPS.values()), "each action of a gate belongs to a step"


def test_a_step_that_fails_stops_the_rest_and_is_named():
    ran = []
    class Steps:
        def __getattr__(self, step):
            def do():
                ran.append(step)
                if step == "gate": raise chain.Missed("Halt: model accuracy.", 3)
                if step == "staging": raise OSError("a bug")
                return "well"
            return do
    rows, status = chain.run(Steps(), ["lint", "gate", "package", "production"])
    assert status == 3 and ran == ["lint", "gate"] and [r["verdict"] for r in rows] == ["passed: well", "FAILED: Halt: model accuracy.", "not reached", "not reached"]
    lines = chain.table(rows).splitlines()
    assert len(lines) == 6 and re.match(r"\| gate +\| +[\d.]+ \| halt +\| FAILED: Halt: model accuracy\. \|$", lines[3]) and lines[5].split("|")[2].strip() == ""
    assert chain.run(Steps(), ["staging", "canary"])[1] == 1, "what nobody foresaw stops it too"


def test_a_missed_gate_halts_it(tmp_path):
    metrics = judged(tmp_path / "bundle", model_accuracy={"value": 0.6, "passed": False})
    r = ci(tmp_path / "out", "--from", "gate", "--bundle", tmp_path / "bundle", "--metrics", metrics)
    assert r.returncode == 3 and "Stopped at gate (halt): Halt: model accuracy." in r.stdout, r.stdout + r.stderr
    rows = (tmp_path / "out/summary.md").read_text().splitlines()[2:]
    assert len(rows) == 7 and "FAILED" in rows[0] and all(l.endswith("| not reached |") for l in rows[1:]) and not (tmp_path / "out/bundle").exists()
    # metrics of another run are not this bundle's
    r = ci(tmp_path / "out", "--from", "gate", "--to", "gate", "--bundle", tmp_path / "bundle", "--metrics", judged(tmp_path / "well"))
    assert r.returncode == 3 and "their gates.json differ" in r.stdout
    assert "gaps between groups" in good(ci(tmp_path / "out", "--from", "gate", "--to", "gate", "--bundle", tmp_path / "well", "--metrics", tmp_path / "well/metrics"))


def test_a_bundle_that_was_changed_after_signing_is_refused(tmp_path):
    judged(tmp_path / "bundle"); out = tmp_path / "out"
    assert "is signed with key" in good(ci(out, "--from", "sign", "--to", "sign", "--bundle", tmp_path / "bundle"))
    assert not (tmp_path / "bundle/manifest.json.sig").exists() and (out / "signing.key").stat().st_mode & 0o777 == 0o600
    (out / "bundle/labels.json").write_text((out / "bundle/labels.json").read_text() + " ")
    r = ci(out, "--from", "staging", "--to", "canary")
    assert r.returncode == 4 and "[bundle_changed]" in r.stdout and "Stopped at staging" in r.stdout
    sealed(out / "bundle")   # every hash is right again
    r = ci(out, "--from", "staging", "--to", "canary")
    assert r.returncode == 4 and "[wrong_signature]" in r.stdout and r.stdout.count("not reached") == 2, r.stdout
    # nor does the canary alone take it
    r = subprocess.run([sys.executable, CI / "canary.py", out / "bundle", tmp_path / "bundle", "--signers", out / "signing.key.pub"], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert r.returncode == 4 and "Roll back: [unsigned_bundle]" in r.stderr, "what is in use has to be signed too"


QUICK = {"clients": 1, "step_s": 1, "gate_p99_ms": 60_000, "gate_per_s": 0.01, "canary_s": 10, "keep_s": 3, "p99_ms": 1500, "for_s": 8, "window_s": 20, "least": 1, "every_s": 0.5, "error_margin": 0.2}


def test_a_good_canary_reads_all_films_and_a_bad_one_goes_back(tmp_path):
    debian("haproxy")
    old, new, slow = toy_bundle(tmp_path / "old", FACTS), toy_bundle(tmp_path / "new", FACTS, seed=2), slow_bundle(tmp_path / "slow")
    with trial.Trial(tmp_path / "good", new, old, limits=QUICK, films=made_up_films(4)) as t:
        assert "0 lost" in t.canary() and "toy-2 reads all" in t.production()
        told = t.memory.read().decisions
        assert [d["what"] for d in told if d["what"] != "call"] == ["first", "start", "tested", "canary", "promote", "settle", "settled"], "and perhaps a call that it may be promoted"
        assert all(d["rule"] == "ready" for d in told if d["what"] == "call"), "nobody is called but to promote it"
    with trial.Trial(tmp_path / "bad", slow, old, limits=QUICK | {"canary_s": 300}, films=made_up_films(4)) as t:
        with pytest.raises(trial.Missed, match=r"back by itself from canary \((latency|worse_times|down)\).*toy-0 reads, 0 of \d+ films lost, 0 of the \d+ later ones") as e: t.canary()
        assert e.value.status == 4 and t.memory.read().stage == "settled"
