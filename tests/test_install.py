"`pip install .` into an empty environment gives the reader: import, command, an answer, and no torch."
import os, shutil, subprocess, sys
from pathlib import Path

import pytest
from test_api import FACTS, encoded, pattern

from cxr_pred.core import root
from cxr_pred.vision.toy import toy_bundle

UV = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))


def run(*args, **more): return subprocess.run(list(map(str, args)), capture_output=True, text=True, timeout=600, **more)


def clean(**more): return {k: v for k, v in os.environ.items() if not k.startswith(("CXR_", "PYTHON", "VIRTUAL_ENV"))} | more


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    "An environment that holds the project and what settings.ini requires, at the lock's versions; the sources are copied, since building writes beside them."
    if not Path(UV).exists(): pytest.skip("no uv here: `make test` brings it")
    d = tmp_path_factory.mktemp("install")
    shutil.copytree(root(), d / "src", ignore=lambda folder, names: [n for n in names if Path(folder) == root() and n not in ("cxr_pred", "setup.py", "settings.ini", "README.md", "pyproject.toml")])
    assert run(UV, "venv", "--python", sys.executable, d / "env").returncode == 0
    r = run(UV, "pip", "install", "--python", d / "env" / "bin" / "python", "--constraint", root() / "requirements.lock", d / "src", env=clean())
    if r.returncode and any(w in r.stderr.lower() for w in ("network", "dns error", "connect")): pytest.skip("the packages are not in uv's cache and the network is not there")
    assert r.returncode == 0, r.stderr[-3000:]
    return d


def test_import_and_command(installed):
    env, python = clean(CXR_BUNDLE=str(toy_bundle(installed / "bundle", FACTS))), installed / "env" / "bin" / "python"
    (installed / "film.png").write_bytes(encoded(pattern()))
    r = run(python, "-c", "import cxr_pred, cxr_pred.clinic.api, cxr_pred.clinic.app, sys; print(cxr_pred.__file__, 'torch' in sys.modules)", cwd=installed, env=env)
    assert str(installed / "env") in r.stdout and r.stdout.strip().endswith("False"), r.stderr
    r = run(installed / "env" / "bin" / "cxr-pred", "predict", "film.png", cwd=installed, env=env)
    assert r.returncode == 0 and "film.png: Pneumonia" in r.stdout, r.stderr
    r = run(installed / "env" / "bin" / "cxr-pred", "doctor", cwd=installed, env=env | {"COLUMNS": "200"})
    assert r.returncode == 0 and "pip install 'cxr_pred[llm]'" in r.stdout, r.stdout + r.stderr


def test_no_torch_and_no_development_tools(installed):
    r = run(installed / "env" / "bin" / "python", "-c", "from importlib.util import find_spec; print([m for m in ('torch', 'nbdev', 'fastcore', 'litgpt', 'mlflow', 'dvc', 'pytest') if find_spec(m)])", cwd=installed, env=clean())
    assert r.stdout.strip() == "[]"
    r = run(installed / "env" / "bin" / "cxr-pred", "llm-serve", cwd=installed, env=clean())
    assert r.returncode == 1 and "[no_llm]" in r.stderr and "Traceback" not in r.stderr, r.stderr
