"Every benchmark notebook runs with the tiny parameters it is written with, and leaves its numbers under its own name."
import json
import os
import shutil
import subprocess
import sys

import pytest

from cxr_pred.core import root

ROOT = root()
MINUTES = {"gpu_training", "qlora_gpu", "qlora_cpu", "serving", "kills", "month", "large_base"}   # at toy size on two cores they show that they run, and take minutes for it
BENCHMARKS = sorted((ROOT / "nbs" / "benchmarks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", BENCHMARKS, ids=lambda p: p.stem)
def test_a_benchmark_runs_small(notebook, tmp_path):
    if notebook.stem in MINUTES and not os.environ.get("CXR_SLOW"): pytest.skip("minutes: make test-all")
    assert any("parameters" in c["metadata"].get("tags", []) for c in json.loads(notebook.read_text())["cells"]), "papermill would run the defaults whatever it is told"
    for name in ("params.yaml", "settings.ini"): shutil.copy(ROOT / name, tmp_path)   # numbers of a test stay in its own project
    env = os.environ | {"CXR_ROOT": str(tmp_path), "PYTHONPATH": str(ROOT), "CXR_STATE": str(tmp_path / "state"), "OMP_NUM_THREADS": "1"}
    r = subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(tmp_path / "ran.ipynb")], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stderr[-3000:]
    numbers = json.loads((tmp_path / "metrics" / "bench" / f"{notebook.stem}.json").read_text())
    assert numbers and any(c.isdigit() for c in json.dumps(numbers))
