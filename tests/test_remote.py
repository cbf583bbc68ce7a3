"DVC's remotes: the data stage's outs go to a folder and to a real S3 server, everything here is deleted, and what comes back is the same, byte for byte."
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from test_etl import film, save
from test_load import SECRET, s3, state  # noqa: F401, its fixtures

from cxr_pred.core import root, write_json
from cxr_pred.data.etl import run_etl

ROOT, DATA = root(), Path("runs/sample/data")


@pytest.fixture
def project(tmp_path):
    "The project's own stages, with a raw folder of twelve films and what the ETL made of it; a function that asks DVC."
    for name in ("nbs", "cxr_pred"): shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("dvc.yaml", "params.yaml", "settings.ini"): shutil.copy(ROOT / name, tmp_path)
    run = tmp_path / "runs/sample"
    for i in range(12): save(run / "raw/TB_Chest_Radiography_Database" / ("Normal" if i % 2 else "Tuberculosis") / f"{i}.png", film(i, 64))
    run_etl(run / "raw", run, ["tb"], size=16, workers=1)
    write_json(run / "metrics/data_card.json", {"films": 12})
    env = os.environ | {"PYTHONPATH": str(tmp_path), "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(tmp_path / "site"), "DVC_GLOBAL_CONFIG_DIR": str(tmp_path / "global")}
    def dvc(*args, **more):
        r = subprocess.run([sys.executable, "-m", "dvc", *args], cwd=tmp_path, env=env | more, capture_output=True, text=True, timeout=600)
        return r.returncode, r.stdout + r.stderr
    for command in (("init", "--no-scm"), ("commit", "-f", "etl")): assert dvc(*command)[0] == 0, dvc(*command)
    return tmp_path, dvc


def content(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def there_and_back(project, url, held, **by):
    "Push, delete outs and cache, pull; and pull from a remote that lost one file. `held` says what the remote holds, `held(name)` takes a name out."
    folder, dvc = project
    before = content(folder / DATA); assert set(before) == {"films.npy", "manifest.parquet", "preprocessing.json", "rejects.parquet", "vocabulary.json"}
    assert dvc("push", "etl", **by) == (0, "6 files pushed\n")   # five files, and the list of them
    assert "up to date" in dvc("push", "etl", **by)[1]
    listed = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]["etl"]["outs"]
    (of_data,) = [o for o in listed if o["path"] == DATA.as_posix()]
    names = [f"{m[:2]}/{m[2:]}" for m in (of_data["md5"], *(f["md5"] for f in json.loads((folder / ".dvc/cache/files/md5" / of_data["md5"][:2] / of_data["md5"][2:]).read_text())))]
    assert held() == sorted(names), "what is pushed is named after its content"
    def empty(): shutil.rmtree(folder / DATA); shutil.rmtree(folder / ".dvc/cache"); shutil.rmtree(folder / "site")
    empty()
    code, said = dvc("pull", "etl", **by)
    assert code == 0 and content(folder / DATA) == before, said
    assert "up to date" in dvc("status", "etl")[1]
    held(names[1]); empty()
    code, said = dvc("pull", "etl", **by)
    assert code and not (folder / DATA).exists(), said
    return said


def test_a_folder(project):
    folder, dvc = project; store = folder.parent / f"{folder.name} store"   # a space in its name
    assert dvc("remote", "add", "-d", "store", str(store))[0] == 0
    def held(take=None):
        if take: (store / "files/md5" / take).unlink()
        return sorted(content(store / "files/md5"))
    there_and_back(project, str(store), held)


def test_s3(project, s3):
    "Keys come from the environment, and are in no file of the project."
    from cxr_pred.data.load import films_place
    by = dict(AWS_DEFAULT_REGION="us-east-1")
    folder, dvc = project
    assert dvc("remote", "add", "-d", "store", f"{s3}/dvc")[0] == dvc("remote", "modify", "store", "endpointurl", os.environ["AWS_ENDPOINT_URL"])[0] == 0
    fs, place = films_place(f"{s3}/dvc/files/md5")
    def held(take=None):
        if take: fs.rm_file(f"{place}/{take}")
        return sorted(p.partition("files/md5/")[2] for p in fs.find(place))
    said = there_and_back(project, s3, held, **by)
    everything = said + "".join(p.read_text() for p in (folder / ".dvc/config", folder / "dvc.lock"))
    assert SECRET not in everything
    code, said = dvc("pull", "etl", **by | dict(AWS_SECRET_ACCESS_KEY="another"))
    assert code and SECRET not in said
