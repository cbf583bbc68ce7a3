"""A run and a bundle's versions, logged and read back: into a file, and through MLflow's server on a real PostgreSQL and a real S3 server. Both must give the same.

The server takes up to a minute to start: `make test-all` runs that one."""
import os, signal, subprocess, sys, time

import httpx
import numpy as np
import pandas as pd
import pytest
from test_load import free_port, postgres, s3, state  # noqa: F401, its fixtures

from cxr_pred.core import root
from cxr_pred.data.images import decode
from cxr_pred.data.sample import plan_films, png_bytes, render
from cxr_pred.tracking import tracked_run, tracking_uri
from cxr_pred.vision.bundle import seal
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.registry import MODEL, register_bundle
from cxr_pred.vision.toy import toy_bundle

slow = pytest.mark.skipif(not os.environ.get("CXR_SLOW"), reason="slow: make test-all runs it")
CURVE, PAUSE = [2.3, 1.1, 0.7], 2.5  # seconds in which the machine is measured
DATABASE, BUCKET = "mlflowdb", "mlflow-artifacts"


@pytest.fixture(scope="module")
def films(): return [png_bytes(np.round(255 * render(p).film).astype(np.uint8)) for p in plan_films(10, 96, seed=5)[::3]] + [b"no film"]


def logged(folder) -> dict:
    "Log a run into where the environment points; what is read back of it."
    import mlflow
    (folder / "card.txt").write_text("a picture")
    with tracked_run("a run", {"vit": {"lr": 0.1}, "seed": 1}, {"manifest_sha256": "ab" * 32}, system_metrics=0.3) as run:
        for epoch, loss in enumerate(CURVE): mlflow.log_metric("val_loss", loss, step=epoch)
        mlflow.log_artifact(folder / "card.txt", "notes")
        time.sleep(PAUSE)
    client = mlflow.MlflowClient()
    seen, back = client.get_run(run.info.run_id), client.download_artifacts(run.info.run_id, "notes/card.txt", str(folder))
    system = sorted(k for k in seen.data.metrics if k.startswith("system/"))
    return {"params": seen.data.params, "curve": [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "val_loss")], "status": seen.info.status,
            "system": system, "memory": 0 < seen.data.metrics["system/system_memory_usage_percentage"] < 100, "samples": len(client.get_metric_history(run.info.run_id, system[0])) > 1,
            "tags": {k: v for k, v in seen.data.tags.items() if k in ("git_commit", "dvc_lock", "manifest_sha256", "mlflow.runName")},
            "artifact": open(back).read(), "experiment": mlflow.get_experiment(seen.info.experiment_id).name}


def registered(folder, films) -> dict:
    "Register two bundles, one of them twice; what the registry says and what its challenger answers."
    import mlflow
    a, b = (seal(toy_bundle(folder / f"bundle{seed}", seed=seed), "clinical", {"data/manifest.parquet": "cd" * 32}) for seed in (0, 1))
    numbers = [register_bundle(a.path)]
    mlflow.MlflowClient().set_registered_model_alias(MODEL, "champion", numbers[0])
    numbers += [register_bundle(b.path), register_bundle(b.path)]
    client = mlflow.MlflowClient()
    names = {alias: client.get_model_version_by_alias(MODEL, alias) for alias in ("champion", "challenger")}
    said = {alias: mlflow.pyfunc.load_model(f"models:/{MODEL}@{alias}").predict(pd.DataFrame({"film": films})) for alias in names}
    for alias, bundle in (("champion", a), ("challenger", b)):
        assert names[alias].tags["bundle_hash"] == bundle.hash and names[alias].tags["manifest_sha256"] == "cd" * 32
        reader = Classifier(bundle.path)
        for row, film in zip(said[alias].itertuples(), films[:-1]):
            r = reader.classify(decode(film))
            assert (row.status, row.label, row.probability) == (r.status, str(r.finding.label), r.finding.probability)
        assert said[alias].reason_code.iloc[-1] == "unsupported_format"
    return {"numbers": numbers, "aliases": {k: str(v.version) for k, v in names.items()}, "version_tags": names["challenger"].tags,
            "said": {k: v.to_json() for k, v in said.items()}, "versions": len(client.search_model_versions(f"name = '{MODEL}'"))}


@pytest.fixture(scope="module")
def in_a_file(tmp_path_factory, films):
    "What is read back from SQLite and a folder."
    d = tmp_path_factory.mktemp("file")
    with pytest.MonkeyPatch.context() as m:
        m.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{d}/runs.db"); m.setenv("MLFLOW_EXPERIMENT_NAME", "of-the-test")
        return logged(d) | registered(d, films)


def test_a_file(in_a_file):
    assert in_a_file["params"] == {"vit.lr": "0.1", "seed": "1"} and in_a_file["curve"] == list(enumerate(CURVE)) and in_a_file["status"] == "FINISHED"
    assert "system/cpu_utilization_percentage" in in_a_file["system"] and in_a_file["memory"] and in_a_file["samples"]
    assert in_a_file["tags"]["manifest_sha256"] == "ab" * 32 and len(in_a_file["tags"]) == 4 and in_a_file["artifact"] == "a picture" and in_a_file["experiment"] == "of-the-test"
    assert in_a_file["numbers"] == ["1", "2", "2"] and in_a_file["aliases"] == {"champion": "1", "challenger": "2"} and in_a_file["versions"] == 2
    assert in_a_file["said"]["champion"] != in_a_file["said"]["challenger"], "two bundles, two opinions"


@pytest.fixture(scope="module")
def server(tmp_path_factory, postgres, s3):  # noqa: F811
    "The URL of an MLflow server on a database and a bucket of our own. Only it has the keys: who logs needs none. Gives the database and a client of the bucket too."
    boto3 = pytest.importorskip("boto3")
    from sqlalchemy import create_engine, make_url, text
    u = make_url(postgres)
    u = u.set(drivername="postgresql+pg8000").difference_update_query(["host"]).update_query_dict({"unix_sock": f"{u.query['host']}/.s.PGSQL.{u.port or 5432}"})
    with create_engine(u, isolation_level="AUTOCOMMIT").connect() as c: c.execute(text(f"CREATE DATABASE {DATABASE}"))
    u, bucket = u.set(database=DATABASE), boto3.client("s3")
    bucket.create_bucket(Bucket=BUCKET)
    d, port = tmp_path_factory.mktemp("server"), free_port()
    p = subprocess.Popen([sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", u.render_as_string(hide_password=False), "--artifacts-destination", f"s3://{BUCKET}"],
                         env=os.environ | {"MLFLOW_S3_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"], "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, cwd=d, stdout=open(d / "log", "w"), stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 400
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=20).status_code == 200: break
            except httpx.TransportError: pass
            assert p.poll() is None and time.monotonic() < end, (d / "log").read_text()[-3000:]
            time.sleep(0.3)
        with pytest.MonkeyPatch.context() as m:
            for k in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"): m.delenv(k)
            m.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}"); m.setenv("MLFLOW_EXPERIMENT_NAME", "of-the-test")
            yield u, bucket
    finally:
        os.killpg(p.pid, signal.SIGTERM)
        try: p.wait(20)
        except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL); p.wait()


@slow
def test_a_server_on_postgresql_and_s3_gives_the_same(in_a_file, server, films, tmp_path):
    from sqlalchemy import create_engine, text
    url, bucket = server
    assert tracking_uri().startswith("http://127.0.0.1:")
    there = logged(tmp_path) | registered(tmp_path, films)
    for k, v in in_a_file.items(): assert there[k] == v, k
    with create_engine(url).connect() as c:
        assert [tuple(r) for r in c.execute(text("SELECT step, value FROM metrics WHERE key = 'val_loss' ORDER BY step"))] == list(enumerate(CURVE)), "the curve is in PostgreSQL"
        assert [tuple(r) for r in c.execute(text("SELECT alias, version FROM registered_model_aliases ORDER BY alias"))] == [("challenger", 2), ("champion", 1)]
    held = {o["Key"]: o["Size"] for o in bucket.list_objects_v2(Bucket=BUCKET)["Contents"]}
    assert {"card.txt", "served.py", "vit.int8.onnx", "MLmodel"} <= {k.rpartition("/")[2] for k in held} and not [k for k in held if k.endswith((".pkl", ".pickle"))], "the files are in the bucket"
    assert bucket.get_object(Bucket=BUCKET, Key=next(k for k in held if k.endswith("notes/card.txt")))["Body"].read() == b"a picture"
    assert not (root() / "mlruns").exists() and not list(tmp_path.glob("**/mlartifacts")), "nothing was written beside the caller"
