"The whole house: a film from the archive to the reader, into database, tracking and monitoring, and its report back. Minutes; `make test-all`."
import json, os, re, signal, ssl, subprocess, sys, time
from pathlib import Path

import httpx
import pydicom
import pytest
from sqlalchemy import create_engine, text
from test_dicom import PLUGIN, can_unshare, needs

from cxr_pred.core import root
from cxr_pred.data.sample import plan_films, write_film
from cxr_pred.database import plain_url

ROOT = root()
slow = pytest.mark.skipif(not os.environ.get("CXR_SLOW"), reason="slow, starts everything: make test-all")
CLI = [sys.executable, "-W", "ignore", "-m", "cxr_pred.cli"]


def until(look, seconds=240, what="it"):
    end = time.monotonic() + seconds
    while True:
        try:
            if found := look(): return found
        except (httpx.HTTPError, ValueError, KeyError): pass
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    "The running house: what it printed, and its process."
    d = tmp_path_factory.mktemp("house")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CXR_", "AWS_", "MLFLOW_"))} | {"CXR_THREADS": "1", "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    p = subprocess.Popen([*CLI, "stack", "--folder", str(d / "house"), "--bundle", str(ROOT / "models/release"), "--free-ports", "--no-ui", "--json"], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=open(d / "said", "w"), text=True)
    try:
        line = p.stdout.readline()
        assert line, (d / "said").read_text()[-4000:]
        said = json.loads(line)
        print(f"\nup after {time.monotonic() - begun:.0f} s: {said['seconds']}")
        yield said, p, env
    finally:
        if p.poll() is None: p.send_signal(signal.SIGINT)
        try: p.wait(180)
        except subprocess.TimeoutExpired: p.kill(); p.wait()


@slow
@needs("haproxy", "prometheus", "prometheus-alertmanager", "rsyslogd", "Orthanc", "storescu")
@pytest.mark.skipif(not PLUGIN.exists(), reason="orthanc-dicomweb is not installed; as root: make test-deps")
def test_a_film_goes_through_all_of_it_and_its_report_comes_back(house, tmp_path):
    said, process, env = house
    if not can_unshare(): pytest.skip("no network of its own can be made here for Orthanc")
    assert said["missing"] == {}, said["missing"]
    port, folder, own, begun = said["ports"], Path(said["folder"]), env | said["env"], time.monotonic()
    web = httpx.Client(trust_env=False, timeout=60)
    clinic = httpx.Client(trust_env=False, timeout=60, verify=ssl.create_default_context(cafile=folder / "secrets/certificate.pem"))
    ready = clinic.get(f"https://127.0.0.1:{port['clinic']}/readyz").json()
    assert ready["status"] == "ready" and ready["bundle_hash"] == json.loads((folder / "state/rollout.json").read_text())["stable"]["hash"]

    from dataclasses import replace
    plans = [replace(p, kind="dicom") for p in plan_films(60)[::20]][:2]
    files = []
    for plan in plans: write_film(tmp_path, plan); files.append(tmp_path / plan.file)
    heads = [pydicom.dcmread(f) for f in files]
    sent = subprocess.run(["storescu", "-aec", "ORTHANC", "127.0.0.1", str(port["orthanc_dicom"]), *map(str, files)], capture_output=True, text=True)
    assert sent.returncode == 0, sent.stderr

    engine = create_engine(plain_url(own["CXR_DATABASE_URL"]))
    def ask(sql):
        with engine.connect() as c: return c.execute(text(sql)).all()
    until(lambda: ask("SELECT count(*) FROM studies")[0][0] == 2, what="two records in PostgreSQL")
    ids = [i for i, in ask("SELECT id FROM studies")]
    if "CXR_FILMS" in own:
        import boto3
        bucket = boto3.client("s3", endpoint_url=own["AWS_ENDPOINT_URL"], aws_access_key_id=own["AWS_ACCESS_KEY_ID"], aws_secret_access_key=own["AWS_SECRET_ACCESS_KEY"], region_name="us-east-1")
        held = {Path(o["Key"]).stem for o in bucket.list_objects_v2(Bucket="films").get("Contents", [])}
    else: held = {p.stem for p in (folder / "state/films").glob("*.png")}
    assert set(ids) <= held, "each film is kept"

    archive = httpx.Client(base_url=f"http://127.0.0.1:{port['orthanc']}", auth=("cxr", (folder / "secrets/orthanc_password").read_text()), trust_env=False, timeout=60)
    assert web.get(f"http://127.0.0.1:{port['orthanc']}/system").status_code == 401, "not without a password"
    def reports(head):
        found = archive.post("/tools/find", json={"Level": "Instance", "Query": {"StudyInstanceUID": head.StudyInstanceUID}}).json()
        return [t for t in (archive.get(f"/instances/{i}/simplified-tags").json() for i in found) if t["Modality"] == "SR"]
    for head in heads: assert until(lambda: reports(head), what="the report in the archive")[0]["PatientID"] == head.PatientID

    def metric(query):
        r = web.get(f"http://127.0.0.1:{port['prometheus']}/api/v1/query", params={"query": query}).json()["data"]["result"]
        return float(r[0]["value"][1]) if r else 0.0
    until(lambda: metric('sum(cxr_predict_seconds_count{job="cxr-reader", track="production"})') >= 2, what="two films in Prometheus")
    until(lambda: metric("sum(cxr_record_studies)") == 2, what="the watch's count in Prometheus")
    until(lambda: metric('cxr_rollout_stage{stage="settled"}') == 1, what="the rollout in Prometheus")
    until(lambda: metric('count(up{job=~"cxr-reader|cxr-watch|cxr-rollout|haproxy|cxr-writer"} == 1)') >= 5, what="the services in Prometheus")
    assert web.get(f"http://127.0.0.1:{port['alertmanager']}/api/v2/status").status_code == 200

    with engine.begin() as c: c.execute(text("UPDATE studies SET created_at = created_at - interval '1 hour'"))   # so that their hour is over
    hour = subprocess.run([*CLI, "report-hour"], env=own, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert hour.returncode == 0 and "logged as" in hour.stdout, hour.stdout + hour.stderr
    run = web.get(f"{own['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/runs/get", params={"run_id": hour.stdout.split()[-1]}).json()["run"]
    metrics = {m["key"]: m["value"] for m in run["data"]["metrics"]}
    assert metrics["films"] == 2 and metrics["p99_ms"] > 0, metrics
    engine.dispose()
    print(f"through all of it in {time.monotonic() - begun:.0f} s")


@slow
@needs("haproxy")
def test_nothing_is_left_when_it_stops(house):
    import psutil
    said, process, env = house
    ours = psutil.Process(process.pid).children(recursive=True)
    database = int((Path(said["folder"]) / "postgres/postmaster.pid").read_text().split()[0])
    assert len(ours) >= 8 and psutil.pid_exists(database)
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 0
    left = [p for p in ours if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert left == [] and not psutil.pid_exists(database), left
    assert not re.search(said["env"]["AWS_SECRET_ACCESS_KEY"], "".join(f.read_text(errors="replace") for f in Path(said["folder"]).glob("*.log"))), "no key in a log"
