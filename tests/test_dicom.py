"A film from a real archive to the service and its report back again, by DICOM and by DICOMweb; dcmtk as sender and receiver; faults."
import io, json, logging, os, shutil, signal, socket, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pydicom
import pytest
from fastapi.testclient import TestClient

from cxr_pred.clinic.api import create_app
from cxr_pred.clinic.outbox import related
from cxr_pred.clinic.origin import own_uid
from cxr_pred.clinic.stow import study_ids
from cxr_pred.core import root
from cxr_pred.data.sample import plan_films, write_film
from cxr_pred.store import Store
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.toy import toy_bundle

FACTS = root() / "nbs" / "language" / "facts.yaml"
PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")


def needs(*tools: str):
    missing = [t for t in tools if not shutil.which(t)]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed; as root: make test-deps")


def can_unshare() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run(["unshare", "-n", "sh", "-c", "ip link set lo up || ifconfig lo up"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> list[bytes]:
    "Synthetic films as DICOM, CR and DX, of several patients; one MONOCHROME1."
    folder, out = tmp_path_factory.mktemp("films"), []
    for i, plan in enumerate(plan_films(60)[::6]):
        plan = replace(plan, kind="dicom_monochrome1" if i == 3 else "dicom"); write_film(folder, plan); out.append((folder / plan.file).read_bytes())
    return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path: return toy_bundle(tmp_path_factory.mktemp("bundle"), FACTS)


def changed(film: bytes, drop=(), **tags) -> bytes:
    ds = pydicom.dcmread(io.BytesIO(film))
    for k in drop: del ds[k]
    for k, v in tags.items(): setattr(ds, k, v)
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    out = io.BytesIO(); ds.save_as(out, enforce_file_format=True); return out.getvalue()


def fresh(film: bytes, n: int) -> bytes: return changed(film, SOPInstanceUID=own_uid("test", str(n)))


def until(true, seconds=300, what=""):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, what or "it took too long"
        time.sleep(0.05)
    return found


# The service in this process

@pytest.fixture
def client(bundle, tmp_path):
    store = Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path / "state")
    with TestClient(create_app(Classifier(bundle), store, ui=False), raise_server_exceptions=False) as c:
        until(lambda: c.get("/readyz").status_code == 200)
        yield c
    store.close()


def stow(client, files, study="", **headers):
    body, kind = related(files)
    return client.post("/dicomweb/studies" + (f"/{study}" if study else ""), content=body, headers={"Content-Type": kind, "Accept": "application/dicom+json"} | headers)


def reasons(r) -> list[int]: return [i["00081197"]["Value"][0] for tag in ("00081198", "0008119A") for i in r.json().get(tag, {}).get("Value", [])]


def test_a_hundred_instances_in_one_request_and_the_bad_ones_cost_themselves(client, films):
    bad = {1: films[0][:-4000], 20: b"a letter", 40: changed(films[1], SOPClassUID="1.2.840.10008.5.1.4.1.1.88.33", drop=["PixelData"]), 60: changed(films[2], drop=["PixelData"]), 99: b""}
    files = [bad.get(i, fresh(films[i % len(films)], i)) for i in range(100)]
    r = stow(client, files)
    ids = study_ids(r.json())
    assert r.status_code == 202 and r.headers["content-type"] == "application/dicom+json" and len(set(ids)) == 95
    assert sorted(reasons(r)) == sorted([0xC000, 0x0122, 0xA900, 0xC000, 0xC000])
    stored = [i["00081155"]["Value"][0] for i in r.json()["00081199"]["Value"]]
    assert stored == [own_uid("test", str(i)) for i in range(100) if i not in bad], "each under its own number, in order"
    metrics = client.get("/metrics").text
    assert 'cxr_dicom_received_total{door="stow",outcome="stored"} 95.0' in metrics and 'outcome="class_unsupported"} 1.0' in metrics


def test_the_log_names_who_sent(client, films):
    from cxr_pred.clinic.auth import add_key
    from cxr_pred.tables import Audit
    store = client.app.state.room.store
    key = add_key(store, "archive", "service")[0]
    assert stow(client, [films[0]], Authorization=f"Bearer {key}").status_code == 200 and stow(client, [fresh(films[0], 7)]).status_code == 200
    with store.session() as s: assert [a.actor for a in s.query(Audit).filter(Audit.action == "study.recorded").order_by(Audit.id)] == ["key archive", "anybody"]


def test_the_same_object_twice_is_one_study(client, films):
    first, second = stow(client, [films[0], films[0]]), stow(client, [films[0]])
    assert first.status_code == second.status_code == 200 and len(set(study_ids(first.json()) + study_ids(second.json()))) == 1


@pytest.mark.parametrize("headers, status, code", [
    ({"Content-Type": "application/dicom"}, 415, "unsupported_media_type"), ({"Content-Type": "multipart/form-data; boundary=x"}, 415, "unsupported_media_type"),
    ({"Content-Type": 'multipart/related; type="application/dicom+xml"; boundary=x'}, 415, "unsupported_media_type"), ({"Content-Type": 'multipart/related; type="application/dicom"'}, 400, "bad_multipart"),
    ({"Accept": "application/dicom+xml"}, 406, "not_acceptable")])
def test_a_request_that_cannot_be_taken_apart_is_a_problem(client, films, headers, status, code):
    r = stow(client, [films[0]], **headers)
    assert (r.status_code, r.json()["code"], r.headers["content-type"]) == (status, code, "application/problem+json")


def test_a_request_that_is_too_large_is_refused_before_it_is_read(client):
    from cxr_pred.core import settings
    def endless():
        for _ in range(2 * int(settings().max_upload_mb)): yield bytes(2**20)
    r = client.post("/dicomweb/studies", content=endless(), headers={"Content-Type": 'multipart/related; type="application/dicom"; boundary=x'})
    assert r.status_code == 413 and r.json()["code"] == "too_large"


def test_another_study_than_the_address_names(client, films):
    uid = pydicom.dcmread(io.BytesIO(films[0])).StudyInstanceUID
    assert stow(client, [films[0]], uid).status_code == 200
    mixed = stow(client, [films[0], films[1]], uid)
    assert mixed.status_code == 202 and reasons(mixed) == [0xC000] and stow(client, [films[0]], "1.02").status_code == 400


def test_pixels_that_are_not_what_the_transfer_syntax_says(client, films):
    ds = pydicom.dcmread(io.BytesIO(films[0]))
    for syntax in ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.5"):
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = pydicom.encaps.encapsulate([b"no codestream at all, " * 50])
        out = io.BytesIO(); ds.save_as(out, enforce_file_format=True)
        r = stow(client, [out.getvalue(), films[1]])
        assert r.status_code == 202 and reasons(r) == [0xC000], syntax
    assert client.get("/readyz").status_code == 200


def test_what_is_no_film_is_answered_as_one_that_was_not_read(client, films):
    "A blank secondary capture is stored; its report says that it was not read, in every form."
    blank = changed(films[0], SOPClassUID="1.2.840.10008.5.1.4.1.1.7", PixelData=bytes(len(pydicom.dcmread(io.BytesIO(films[0])).PixelData)))
    study_id, = study_ids(stow(client, [blank]).json())
    sr = pydicom.dcmread(io.BytesIO(client.get(f"/v1/studies/{study_id}/sr.dcm").content))
    assert "did not read this picture" in str(sr) and "Certainty" not in str(sr)
    bundle = client.get(f"/v1/studies/{study_id}/fhir?version=r5").json()
    assert bundle["entry"][1]["resource"]["dataAbsentReason"]["coding"][0]["code"] == "not-performed"
    assert client.get(f"/v1/studies/{study_id}/heatmap.dcm").status_code == 404


def test_png_gets_a_study_of_its_own(client):
    from cxr_pred.clinic.report import picture_png
    from cxr_pred.vision.toy import toy_patterns
    from PIL import Image
    p = toy_patterns()[1]
    film = picture_png(Image.fromarray((255 * (p - p.min()) / np.ptp(p)).astype(np.uint8)).resize((300, 340)))
    study_id = client.post("/v1/predict", files={"file": film}).json()["study_id"]
    sr, sc = (pydicom.dcmread(io.BytesIO(client.get(f"/v1/studies/{study_id}/{f}.dcm").content)) for f in ("sr", "heatmap"))
    assert sr.StudyInstanceUID == sc.StudyInstanceUID == own_uid(study_id, "study") and sr.StudyInstanceUID.startswith("2.25.")
    assert client.get(f"/v1/studies/{study_id}/sr.dcm").content == client.get(f"/v1/studies/{study_id}/sr.dcm").content
    for path in ("sr.dcm", "heatmap.dcm", "fhir"): assert client.get(f"/v1/studies/{'0' * 32}/{path}").status_code == 404


def test_nothing_that_names_the_patient_is_kept_or_logged(client, films, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    secrets = dict(PatientName="Zq001Xwv^Jane", PatientID="Zq002Xwv", PatientBirthDate="19430217", AccessionNumber="Zq003Xwv", ReferringPhysicianName="Zq004Xwv", StudyDescription="Zq005Xwv", PatientComments="Zq006Xwv")
    film = changed(films[0], **secrets)
    good, bad = stow(client, [film]), stow(client, [film[:-3000]])
    study_id, = study_ids(good.json())
    said = b"".join(client.get(f"/v1/studies/{study_id}{p}").content for p in ("", "/fhir", "/sr.dcm", "/heatmap.dcm", "/report.html")) + good.content + bad.content + client.get("/metrics").content
    printed = capfd.readouterr()
    kept = b"".join(p.read_bytes() + p.name.encode() for p in tmp_path.rglob("*") if p.is_file())
    for where, what in (("answers", said), ("log", caplog.text.encode()), ("output", (printed.out + printed.err).encode()), ("disk", kept)):
        assert not [w for w in (*secrets.values(), "Zq001Xwv") if w.encode() in what], where


@needs("dsrdump", "dciodvfy", "dcmdump")
def test_other_programs_read_what_comes_out(client, films, tmp_path):
    r = stow(client, films)
    assert r.status_code == 200
    for n, study_id in enumerate(study_ids(r.json())):
        for name in ("sr", "heatmap"):
            got = client.get(f"/v1/studies/{study_id}/{name}.dcm")
            if got.status_code == 404: continue
            (path := tmp_path / f"{n}_{name}.dcm").write_bytes(got.content)
            said = subprocess.run(["dciodvfy", path], capture_output=True, text=True)
            assert not [l for l in (said.stderr + said.stdout).splitlines() if l.startswith("Error")], said.stderr
            assert subprocess.run(["dcmdump", "-q", path], capture_output=True).returncode == 0
        dump = subprocess.run(["dsrdump", "+Pl", tmp_path / f"{n}_sr.dcm"], capture_output=True, text=True)
        assert dump.returncode == 0 and "Answer of the reader" in dump.stdout and "research software" in dump.stdout


# The service as its own process, for real peers

@pytest.fixture
def serving(bundle, tmp_path):
    "Start `cxr-pred serve` with a DICOM listener: serving(CXR_...=...) gives the process, its REST address and its DICOM port."
    running = []
    def start(prefix=(), **env):
        command = [*prefix, sys.executable, "-W", "ignore", "-m", "cxr_pred.cli", "serve", "--no-ui", "--port", "0", "--dicom-port", "0"]
        p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=open(tmp_path / "log", "ab"), text=True, cwd=root(), env=os.environ | {"CXR_BUNDLE": str(bundle), "CXR_STATE": str(tmp_path / "state"), "OMP_NUM_THREADS": "1"} | env)
        running.append(p)
        web, dicom = "", 0
        while not (web and dicom):
            line = p.stdout.readline()
            assert line, (tmp_path / "log").read_text()[-3000:]
            if line.startswith("X-ray reader:"): web = line.split()[2].rstrip("/")
            if line.startswith("DICOM listener:"): dicom = int(line.split(":")[2].split()[0])
        until(lambda: ready(web), 400, "the service does not get ready")
        return p, web, dicom
    yield start
    for p in running:
        p.send_signal(signal.SIGTERM)
        try: p.wait(20)
        except subprocess.TimeoutExpired: p.kill(); p.wait()


def ready(web: str) -> bool:
    try: return httpx.get(f"{web}/readyz", timeout=30, trust_env=False).status_code == 200
    except httpx.HTTPError: return False


def metric(web: str, name: str, labels: str = "") -> float:
    for line in httpx.get(f"{web}/metrics", timeout=120, trust_env=False).text.splitlines():
        if line.startswith(name + (labels or " ")): return float(line.rsplit(" ", 1)[1])
    return 0.0


@needs("storescu", "echoscu", "storescp")
def test_dcmtk_sends_and_receives(serving, films, tmp_path):
    "echoscu and storescu in, storescp out: down at first, up later, with a restart of the service between."
    with socket.create_server(("127.0.0.1", 0)) as s: port = s.getsockname()[1]
    peer = {"CXR_DICOM_PEER": f"STORESCP@127.0.0.1:{port}", "CXR_DICOM_CALLING": "ROOM1"}
    p, web, dicom = serving(**peer)
    (tmp_path / "in").mkdir(); (tmp_path / "out").mkdir()
    for i, f in enumerate(films[:3]): (tmp_path / "in" / f"{i}.dcm").write_bytes(f)
    (tmp_path / "in" / "cut.dcm").write_bytes(films[3][:-6000])
    call = lambda tool, title, *more: subprocess.run([tool, "-aet", title, "-aec", "CXR_PRED", *more[:-1], "127.0.0.1", str(dicom), *more[-1]], capture_output=True, text=True)
    assert call("echoscu", "ROOM1", []).returncode == 0 and call("echoscu", "STRANGER", []).returncode != 0
    sent = call("storescu", "ROOM1", "-v", [str(f) for f in sorted((tmp_path / "in").glob("[0-9].dcm"))])
    assert sent.returncode == 0, sent.stderr + sent.stdout
    call("storescu", "ROOM1", [str(tmp_path / "in" / "cut.dcm")])   # dcmtk itself may refuse to read it
    until(lambda: metric(web, "cxr_dicom_results_total", '{outcome="peer_away"}') >= 1)
    assert metric(web, "cxr_dicom_results_waiting") == 3 and metric(web, "cxr_dicom_received_total", '{door="cstore",outcome="stored"}') == 3
    p.kill(); p.wait()   # and nothing is lost
    receiver = subprocess.Popen(["storescp", "-aet", "STORESCP", "-od", tmp_path / "out", "+xa", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        p, web, dicom = serving(**peer)
        assert metric(web, "cxr_dicom_results_waiting") == 3
        until(lambda: metric(web, "cxr_dicom_results_waiting") == 0, 400, "results stay in the queue")
    finally: receiver.kill(); receiver.wait()
    got = [pydicom.dcmread(f) for f in (tmp_path / "out").iterdir()]
    studies = {pydicom.dcmread(io.BytesIO(f)).StudyInstanceUID for f in films[:3]}
    assert {o.StudyInstanceUID for o in got if o.Modality == "SR"} == studies
    assert metric(web, "cxr_dicom_results_unnamed_total") == 3, "storescp answers no questions, and the names were gone with the first process"
    assert all(o.PatientID == "" for o in got)


def test_the_service_starts_without_the_libraries_that_it_may_never_need():
    "highdicom takes seconds to import, FHIR's models one: not before the first report is asked for."
    said = "import sys, cxr_pred.clinic.api; print(sorted({'highdicom', 'fhir', 'pynetdicom', 'pydicom', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, cwd=root()).stdout.strip() == "[]"


def test_the_command_line_writes_both(bundle, films, tmp_path):
    "A DICOM film's report lies in its own study and names its patient; a PNG's report has a study of its own."
    from PIL import Image
    from cxr_pred.vision.toy import toy_patterns
    p = toy_patterns()[1]
    Image.fromarray((255 * (p - p.min()) / np.ptp(p)).astype(np.uint8)).resize((300, 340)).save(tmp_path / "film.png")
    (tmp_path / "film.dcm").write_bytes(films[0])
    head = pydicom.dcmread(tmp_path / "film.dcm")
    for film in ("film.dcm", "film.png"):
        r = subprocess.run([sys.executable, "-W", "ignore", "-m", "cxr_pred.cli", "predict", tmp_path / film, "--no-explain", "--bundle", bundle, "--sr", tmp_path / "out" / "sr.dcm", "--fhir", tmp_path / "out" / "report.json"], capture_output=True, text=True, cwd=root())
        assert r.returncode == 0, r.stderr
        sr, report = pydicom.dcmread(tmp_path / "out" / "sr.dcm"), json.loads((tmp_path / "out" / "report.json").read_text())
        assert report["resourceType"] == "Bundle" and "Synthetic" not in json.dumps(report)
        if film == "film.dcm": assert (sr.StudyInstanceUID, sr.PatientName, sr.PatientID) == (head.StudyInstanceUID, head.PatientName, head.PatientID) and head.StudyInstanceUID in json.dumps(report)
        else: assert sr.StudyInstanceUID.startswith("2.25.") and not sr.PatientName


# A real Orthanc, in a network of its own since it listens on every address

INSIDE = """
import json, sys
sys.path.insert(0, "tests")
import test_dicom
test_dicom.with_orthanc(*sys.argv[1:])
"""


def orthanc_settings(folder: Path, service_dicom: int, service_web: str) -> dict:
    return {"Name": "test", "StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "HttpPort": 8042, "DicomPort": 4242, "DicomAet": "ORTHANC", "RemoteAccessAllowed": True, "AuthenticationEnabled": False,
            "DicomScuTimeout": 300, "HttpTimeout": 300, "DicomAlwaysAllowEcho": True, "DicomAlwaysAllowStore": True, "DicomAlwaysAllowFind": True, "DicomCheckCalledAet": True, "Plugins": [str(PLUGIN)],
            "DicomModalities": {"cxr": ["CXR_PRED", "127.0.0.1", service_dicom]}, "DicomWeb": {"Enable": True, "Root": "/dicom-web/", "Servers": {"cxr": {"Url": f"{service_web}/dicomweb/", "HasDelete": False}}}}


def start_orthanc(folder: Path, dicom: int, web: str, running: list):
    folder.mkdir(exist_ok=True); (folder / "db").mkdir(exist_ok=True)
    (folder / "orthanc.json").write_text(json.dumps(orthanc_settings(folder, dicom, web)))
    p = subprocess.Popen([shutil.which("Orthanc") or "orthanc", str(folder / "orthanc.json")], stdout=open(folder / "log", "ab"), stderr=subprocess.STDOUT)
    running.append(p)
    def up():
        assert p.poll() is None, (folder / "log").read_text()[-2000:]
        try: return httpx.get("http://127.0.0.1:8042/system", timeout=30, trust_env=False).status_code == 200
        except httpx.HTTPError: return False
    until(up, 300, "Orthanc does not start")
    return p


def tags_of(instance: str) -> dict: return httpx.get(f"http://127.0.0.1:8042/instances/{instance}/simplified-tags", timeout=120, trust_env=False).json()


def results_in_orthanc(patient: str) -> list[dict]:
    "The tags of what Orthanc holds of a patient."
    found = httpx.post("http://127.0.0.1:8042/tools/find", json={"Level": "Instance", "Query": {"PatientID": patient}}, timeout=120, trust_env=False).json()
    return [tags_of(i) for i in found]


def with_orthanc(way: str, bundle: str, films: str, folder: str) -> None:
    "Run inside a network of its own: film from Orthanc to the service, report back in Orthanc. Prints what was found as JSON."
    folder, said = Path(folder), {}
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    peer = "ORTHANC@127.0.0.1:4242" if way == "dicom" else "http://127.0.0.1:8042/dicom-web"
    env = os.environ | {"CXR_BUNDLE": bundle, "CXR_STATE": str(folder / "state"), "CXR_DICOM_PEER": peer, "CXR_DICOM_CALLING": "ORTHANC", "OMP_NUM_THREADS": "1"}
    web, dicom, running = "http://127.0.0.1:8090", 11112, []
    def start_service():
        p = subprocess.Popen([sys.executable, "-W", "ignore", "-m", "cxr_pred.cli", "serve", "--no-ui", "--port", "8090", "--dicom-port", str(dicom)], stdout=subprocess.DEVNULL, stderr=open(folder / "service.log", "ab"), env=env)
        running.append(p)
        until(lambda: ready(web) or p.poll() is not None, 400)
        assert p.poll() is None, (folder / "service.log").read_text()[-3000:]
        return p
    try:
        orthanc, service = start_orthanc(folder / "orthanc", dicom, web, running), start_service()
        post = lambda path, **k: httpx.post(f"http://127.0.0.1:8042{path}", timeout=400, trust_env=False, **k)
        files = sorted(Path(films).glob("*.dcm"))
        ids = [post("/instances", content=f.read_bytes()).json()["ID"] for f in files]
        patients = [tags_of(i)["PatientID"] for i in ids]
        send = (lambda i: post("/modalities/cxr/store", content=i)) if way == "dicom" else (lambda i: post("/dicom-web/servers/cxr/stow", json={"Resources": [i]}))
        if way == "dicom": said["echo"] = post("/modalities/cxr/echo", json={}).status_code
        said["sent"] = [send(i).status_code for i in ids[:2]]
        until(lambda: all(any(t["Modality"] == "SR" for t in results_in_orthanc(p)) for p in patients[:2]), 400, "no report came back")
        orthanc.terminate(); orthanc.wait()   # the archive goes away: the film is read, its result waits
        data = files[2].read_bytes()
        body, kind = related([data])
        said["while away"] = httpx.post(f"{web}/dicomweb/studies", content=body, headers={"Content-Type": kind}, timeout=300, trust_env=False).status_code
        until(lambda: metric(web, "cxr_dicom_results_total", '{outcome="peer_away"}') >= 1)
        said["waiting"] = metric(web, "cxr_dicom_results_waiting")
        service.kill(); service.wait()
        orthanc, service = start_orthanc(folder / "orthanc", dicom, web, running), start_service()
        until(lambda: any(t["Modality"] == "SR" for t in results_in_orthanc(patients[2])), 400, "the result that waited did not arrive")
        said["results"] = [sorted((t["Modality"], t["PatientName"], t["StudyInstanceUID"]) for t in results_in_orthanc(p)) for p in patients[:3]]
        said["studies in orthanc"] = len(httpx.get("http://127.0.0.1:8042/studies", timeout=120, trust_env=False).json())
        said["unnamed"] = metric(web, "cxr_dicom_results_unnamed_total")
        said["delivered"] = metric(web, "cxr_dicom_results_total", '{outcome="delivered"}')
    finally:
        for p in running: p.kill(); p.wait()
    print(json.dumps(said))


@needs("Orthanc", "ip")
@pytest.mark.skipif(not PLUGIN.exists(), reason="orthanc-dicomweb is not installed; as root: make test-deps")
@pytest.mark.parametrize("way", ["dicom", "dicomweb"])
def test_orthanc_gets_its_reports_back(way, bundle, films, tmp_path):
    if not can_unshare(): pytest.skip("no network namespace can be made here; Orthanc would listen on every address")
    (tmp_path / "films").mkdir()
    heads = [pydicom.dcmread(io.BytesIO(f)) for f in films]
    chosen = list({str(h.PatientID): i for i, h in enumerate(heads)}.values())[:3]   # of three patients
    for n, i in enumerate(chosen): (tmp_path / "films" / f"{n}.dcm").write_bytes(films[i])
    r = subprocess.run(["unshare", "-n", sys.executable, "-W", "ignore", "-c", INSIDE, way, bundle, tmp_path / "films", tmp_path], capture_output=True, text=True, cwd=root(), timeout=1100, env=os.environ | {"PYTHONPATH": str(root())})
    logs = "".join(f.read_text(errors="replace")[-1500:] for f in (tmp_path / "service.log", tmp_path / "orthanc" / "log") if f.exists())
    assert r.returncode == 0, r.stderr[-3000:] + logs
    said = json.loads(r.stdout.splitlines()[-1])
    assert said["sent"] == [200, 200] and said["while away"] == 200 and said["waiting"] == 1 and said.get("echo", 200) == 200
    for i, found in zip(chosen, said["results"]):
        head = heads[i]
        assert {m for m, *_ in found} >= {"SR", head.Modality} and {(p, s) for _, p, s in found} == {(str(head.PatientName), head.StudyInstanceUID)}, "each report lies under its patient, in its study"
    assert said["studies in orthanc"] == 3 and said["unnamed"] == 0, "the archive was asked whose study it is"
