"The whole house: a film from the archive to the reader, into database, tracking and monitoring, and its report back. Minutes; `make test-all`."
import io, json, os, signal, ssl, subprocess, sys, time
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
RAY = os.environ.get("CXR_RAY_PYTHON")   # as tests/test_machines.py


def until(look, seconds=240, what="it"):
    end = time.monotonic() + seconds
    while True:
        try:
            if found := look(): return found
        except (httpx.HTTPError, ValueError, KeyError): pass
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.5)


def told(said, **numbers):
    "Write seconds into the house's books, and print them."
    with open(Path(said["folder"]) / "books.jsonl", "a") as f: f.write(json.dumps(numbers) + "\n")
    print(f"\n{numbers}")


def coded(items):
    "Concept name and value of every code in a structured report's tree."
    value = lambda code: code.get("CodeValue") or code.LongCodeValue   # of more than 16 characters
    for item in items:
        if item.ValueType == "CODE": yield value(item.ConceptNameCodeSequence[0]), value(item.ConceptCodeSequence[0])
        yield from coded(item.get("ContentSequence", []))


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    "The running house: what it printed, and its process."
    d = tmp_path_factory.mktemp("house")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CXR_", "AWS_", "MLFLOW_"))} | {"CXR_THREADS": "1", "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    p = subprocess.Popen([*CLI, "stack", "--folder", str(d / "house"), "--bundle", str(ROOT / "models/release"), "--free-ports", "--no-ui", "--json", *(["--ray-python", RAY] if RAY else [])], env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=open(d / "said", "w"), text=True)
    try:
        line = p.stdout.readline()
        assert line, (d / "said").read_text()[-4000:]
        said = json.loads(line)
        told(said, up_s=round(time.monotonic() - begun, 1), parts_s=said["seconds"])
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
    assert set(said["missing"]) == (set() if RAY else {"ray"}), said["missing"]
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
        return [i for i in found if archive.get(f"/instances/{i}/simplified-tags").json()["Modality"] == "SR"]
    answers = []
    for head in heads:
        sr = pydicom.dcmread(io.BytesIO(archive.get(f"/instances/{until(lambda: reports(head), what='the report in the archive')[0]}/file").content))
        assert (sr.PatientID, sr.StudyInstanceUID) == (head.PatientID, head.StudyInstanceUID)
        codes = list(coded(sr.ContentSequence))
        answers += [v for n, v in codes if n == "ANSWER"]
    assert sorted(answers) == sorted(label if status == "ok" else reason.upper()[:16] for status, label, reason in ask("SELECT status, label, reason_code FROM studies")), "each report names what the record holds"
    until(lambda: ask("SELECT count(*) FROM explanations")[0][0] == 2, what="two explanations in PostgreSQL")
    assert {i for i, in ask("SELECT study_id FROM explanations")} == set(ids) and all(json.loads(b) if isinstance(b, str) else b for b, in ask("SELECT body FROM explanations"))
    def lines(): return [json.loads(l) for l in (folder / "log/cxr.jsonl").read_text().splitlines(keepends=True) if l.endswith("\n")]   # the last may be half written
    until(lambda: sum(l.get("event", {}).get("action") == "film-read" for l in lines()) == 2, what="two films in the log that rsyslog gathers")
    assert 200 in {l["http"]["response"]["status_code"] for l in lines() if l.get("url", {}).get("path", "").startswith("/dicomweb/studies")}, "and the archive's requests"
    chain = {(l["event"]["sequence"], l["event"]["hash"]) for l in lines() if "sequence" in l.get("event", {})}
    assert chain and chain <= {tuple(r) for r in ask("SELECT id, hash FROM audit_log")}, "what the log holds of the audit log is in it"

    def metric(query):
        r = web.get(f"http://127.0.0.1:{port['prometheus']}/api/v1/query", params={"query": query}).json()["data"]["result"]
        return float(r[0]["value"][1]) if r else 0.0
    until(lambda: metric('sum(cxr_predict_seconds_count{job="cxr-reader", track="production"})') >= 2, what="two films in Prometheus")
    until(lambda: metric("sum(cxr_record_studies)") == 2, what="the watch's count in Prometheus")
    until(lambda: metric('cxr_rollout_stage{stage="settled"}') == 1, what="the rollout in Prometheus")
    until(lambda: metric('count(up{job=~"cxr-reader|cxr-watch|cxr-rollout|haproxy|cxr-writer"} == 1)') >= 5, what="the services in Prometheus")
    assert web.get(f"http://127.0.0.1:{port['alertmanager']}/api/v2/status").status_code == 200

    token = {"Authorization": f"token {(folder / 'secrets/jupyter_token').read_text()}"}
    status = web.get(f"http://127.0.0.1:{port['jupyter']}/api/status", headers=token).json()
    assert status["kernels"] == 0 and httpx.get(f"http://127.0.0.1:{port['jupyter']}/api/status", trust_env=False).status_code == 403, "JupyterLab, and not without its token (or the cookie that it brought)"

    with engine.begin() as c: c.execute(text("UPDATE studies SET created_at = created_at - interval '1 hour'"))   # so that their hour is over
    hour = subprocess.run([*CLI, "report-hour"], env=own, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert hour.returncode == 0 and "logged as" in hour.stdout, hour.stdout + hour.stderr
    run = web.get(f"{own['MLFLOW_TRACKING_URI']}/api/2.0/mlflow/runs/get", params={"run_id": hour.stdout.split()[-1]}).json()["run"]
    metrics = {m["key"]: m["value"] for m in run["data"]["metrics"]}
    assert metrics["films"] == 2 and metrics["p99_ms"] > 0, metrics
    engine.dispose()
    told(said, through_s=round(time.monotonic() - begun, 1))


@slow
@needs("haproxy")
@pytest.mark.skipif(not RAY, reason="no environment with Ray is named: CXR_RAY_PYTHON")
def test_a_job_runs_on_both_workers(house):
    "As deploy/ray's README says it; the job sees tracking through the wall, and nothing sees Ray without its token."
    said, process, env = house
    if not can_unshare(): pytest.skip("no network of its own can be made here for Ray")
    at, own = f"http://127.0.0.1:{said['ports']['ray']}", env | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(said["folder"]) / "secrets/ray_token")}
    assert httpx.get(f"{at}/api/version", trust_env=False).status_code == 401
    job = """import os, time, urllib.request, ray
ray.init(log_to_driver=False)
@ray.remote(num_cpus=1)
def where(): time.sleep(3); return ray.util.get_node_ip_address(), urllib.request.urlopen(os.environ["MLFLOW_TRACKING_URI"] + "/health", timeout=30).status, os.environ["OMP_NUM_THREADS"], "CXR_DATABASE_URL" in os.environ
print("seen", sorted(ray.get([where.remote() for _ in range(2)])))"""
    begun = time.monotonic()
    r = subprocess.run([str(Path(RAY).with_name("ray")), "job", "submit", "--address", at, "--runtime-env", str(ROOT / "deploy/ray/runtime_env.yaml"), "--", RAY, "-c", job], env=own, capture_output=True, text=True, timeout=400)
    assert r.returncode == 0 and "seen [('127.0.0.3', 200, '4', False), ('127.0.0.4', 200, '4', False)]" in r.stdout, r.stdout[-3000:] + r.stderr[-3000:]
    told(said, ray_job_s=round(time.monotonic() - begun, 1))


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
    assert left == []
    until(lambda: not psutil.pid_exists(database), 10, "the end of PostgreSQL, which is told to stop and says so when its files are closed")
    logs = "".join(f.read_text(errors="replace") for f in Path(said["folder"]).glob("*.log"))
    assert not [k for k in (f.read_text() for f in (Path(said["folder"]) / "secrets").iterdir() if f.suffix == "") if k in logs] and said["env"]["AWS_SECRET_ACCESS_KEY"] not in logs, "no key in a log"
