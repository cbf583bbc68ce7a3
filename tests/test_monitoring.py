"Rules, routes and dashboards against the real Prometheus and Alertmanager, which scrape the real services."
import http.server
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image

from cxr_pred.core import root

ROOT = root()
RULES, ROUTES, BOARDS = ROOT / "deploy/prometheus/rules/cxr.yml", ROOT / "deploy/alertmanager/alertmanager.yml", ROOT / "deploy/grafana/dashboards"
KEY = "a key of the test"


def needs(*programs):
    missing = [p for p in programs if not shutil.which(p)]
    return pytest.mark.skipif(bool(missing), reason=f"Debian's {', '.join(missing)} is not installed (apt-get install prometheus prometheus-alertmanager)")


@needs("promtool")
def test_rules_fire_when_they_should_and_only_then():
    for command in (["promtool", "check", "rules", str(RULES)], ["promtool", "test", "rules", str(RULES.parent / "tests" / "cxr.yml")]):
        r = subprocess.run(command, capture_output=True, text=True)
        assert r.returncode == 0, r.stdout + r.stderr
    rules = [r for g in yaml.safe_load(RULES.read_text())["groups"] for r in g["rules"] if "alert" in r]
    assert all(r["labels"]["severity"] in ("critical", "warning") and r["annotations"]["summary"] and r["annotations"]["action"] for r in rules)
    assert {r["alert"] for r in rules if r["labels"].get("rollback")} == {"PredictionsSlow", "RequestsFail", "OutcomeDrift"}, "drift of the input pages, and does not roll back"


@needs("amtool")
@pytest.mark.parametrize("labels, receivers", [("severity=critical", "on-call"), ("severity=critical rollback=true", "on-call"), ("severity=warning", "operators"), ("severity=warning scale_up=true", "operators")])
def test_an_alert_reaches_whom_it_should(labels, receivers):
    assert subprocess.run(["amtool", "check-config", str(ROUTES)], capture_output=True).returncode == 0
    r = subprocess.run(["amtool", "config", "routes", "test", "--config.file", str(ROUTES), *labels.split()], capture_output=True, text=True)
    assert r.stdout.strip() == receivers


def test_the_dashboards_are_those_of_the_notebook(tmp_path):
    from cxr_pred.ops.dashboards import write_dashboards
    for path in write_dashboards(tmp_path): assert path.read_bytes() == (BOARDS / path.name).read_bytes(), "run nbs/ops/dashboards.ipynb"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as s: return s.getsockname()[1]


def until(ask, seconds=60, every=0.3, what="it"):
    "What `ask` answers as soon as it is true."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if answer := ask(): return answer
        except httpx.HTTPError: pass
        time.sleep(every)
    raise AssertionError(f"{what} did not happen in {seconds} s")


class Listener:
    "An HTTP server in a thread: answers GET with a text, keeps what is posted by path."

    def __init__(self, text: str = ""):
        posted = self.posted = []
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self): self.send_response(200); self.send_header("Content-Type", "text/plain"); self.end_headers(); self.wfile.write(text.encode())
            def do_POST(self): posted.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))); self.send_response(200); self.end_headers()
            def log_message(self, *a): pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def film(seed: int) -> bytes:
    "A smooth random film, PNG."
    g = np.random.default_rng(seed); out = io.BytesIO()
    Image.fromarray(g.integers(0, 256, (4, 4), dtype=np.uint8)).resize((120, 130), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def drift_reference(path: Path) -> None:
    "A reference of drawn numbers: what matters here is that gauges come of it."
    from cxr_pred.ops.reference import Films, make_reference, write_reference
    g = np.random.default_rng(0); n = 500
    probs = g.dirichlet(np.ones(10), n)
    write_reference(path, make_reference(Films(g.normal(size=(n, 13)), g.normal(size=(n, 32)), probs, g.gamma(4, 0.1, n), np.full(n, "ok", object), np.full(n, 40.0)), right={"accuracy": [450, 500], "recall": {}}, draws=500))


class Stack:
    "The reader, the language service without a model, `cxr-pred watch`, Prometheus and Alertmanager, on free ports of the loopback."

    def __init__(self, folder: Path):
        self.folder, self.children = folder, []
        from cxr_pred.vision.toy import toy_bundle
        bundle = toy_bundle(folder / "toy", facts=ROOT / "nbs/language/facts.yaml")
        drift_reference(folder / "reference.json")
        env = os.environ | {"CXR_BUNDLE": str(bundle), "CXR_STATE": str(folder / "state"), "CXR_PHYSICIAN_KEY": KEY, "OMP_NUM_THREADS": "1"}
        self.webhook, self.gpu = Listener(), Listener('DCGM_FI_DEV_FB_USED{gpu="0"} 60\nDCGM_FI_DEV_FB_FREE{gpu="0"} 40\n')
        self.reader_process, self.reader = self.ours(["serve", "--no-ui", "--port", "0"], env)
        self.writer = self.language_service(bundle)
        _, self.watch = self.ours(["watch", "--port", "0", "--every", "2", "--reference", str(folder / "reference.json")], env)
        self.prometheus, self.alertmanager = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
        self.web = httpx.Client(trust_env=False, timeout=20)

    def start(self, command, env=None, **kw):
        child = subprocess.Popen(command, env=env, **kw); self.children.append(child)
        return child

    def ours(self, args, env):
        "Start a command of ours and wait for the address that it prints."
        child = self.start([sys.executable, "-m", "cxr_pred.cli", *args], env, stdout=subprocess.PIPE, text=True)
        line = child.stdout.readline()
        return child, re.search(r"http://127.0.0.1:\d+", line)[0]

    def language_service(self, bundle) -> str:
        import uvicorn
        from cxr_pred.language.service import Desk, create_service
        desk = Desk(bundle); desk.opened.set(); desk.ready.set(1)   # never loads a model
        port = free_port()
        self.uvicorn = uvicorn.Server(uvicorn.Config(create_service(desk), host="127.0.0.1", port=port, log_level="warning"))
        threading.Thread(target=self.uvicorn.run, daemon=True).start()
        return f"http://127.0.0.1:{port}"

    def monitoring(self) -> None:
        "Prometheus and Alertmanager with the project's files; only waiting times are shorter."
        at = lambda url: [{"targets": [url.split("//")[1]]}]
        rules = self.folder / "rules.yml"
        rules.write_text(re.sub(r"for: \d+[mh]", "for: 2s", RULES.read_text()))
        jobs = {"cxr-reader": self.reader, "cxr-writer": self.writer, "cxr-watch": self.watch, "dcgm": f"http://127.0.0.1:{self.gpu.port}"}
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump({"global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": [str(rules)], "alerting": {"alertmanagers": [{"static_configs": at(self.alertmanager)}]},
                                                                    "scrape_configs": [{"job_name": j, "static_configs": at(u)} for j, u in jobs.items()]}))
        routes = yaml.safe_load(ROUTES.read_text()); del routes["global"]   # the same routes, to a webhook of the test's
        routes["receivers"] = [{"name": r["name"], "webhook_configs": [{"url": f"http://127.0.0.1:{self.webhook.port}/{r['name']}"}]} for r in routes["receivers"]]
        (self.folder / "alertmanager.yml").write_text(yaml.safe_dump(routes))
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.start(["prometheus", f"--config.file={self.folder / 'prometheus.yml'}", f"--storage.tsdb.path={self.folder / 'tsdb'}", f"--web.listen-address={self.prometheus[7:]}"], **quiet)
        self.start(["prometheus-alertmanager", f"--config.file={self.folder / 'alertmanager.yml'}", f"--storage.path={self.folder / 'am'}", f"--web.listen-address={self.alertmanager[7:]}", "--cluster.listen-address="], **quiet)
        for url in (self.prometheus, self.alertmanager): until(lambda: self.web.get(f"{url}/-/ready").status_code == 200, what=url)

    def traffic(self, n: int) -> None:
        "Films, one that is none, one that is blank, and physicians' answers to those that were answered."
        send = lambda data: self.web.post(f"{self.reader}/v1/predict", files={"file": ("f.png", data)})
        until(lambda: self.web.get(f"{self.reader}/readyz").status_code == 200, what="the reader")
        reports = [send(film(i)).json() for i in range(n)]
        assert send(b"no film").status_code == 415
        out = io.BytesIO(); Image.new("L", (100, 100), 7).save(out, "PNG")
        assert send(out.getvalue()).json()["status"] == "rejected"
        answered = [r for r in reports if r["status"] == "ok"]
        assert answered, "the toy answers some"
        for i, r in enumerate(answered):
            label = r["finding"]["label"] if i % 5 else next(l for l in ("NORMAL", "PNEUMONIA") if l != r["finding"]["label"])
            assert self.web.post(f"{self.reader}/v1/feedback", json={"study_id": r["study_id"], "physician": f"dr{i % 2}", "confirmed_label": label}, headers={"Authorization": f"Bearer {KEY}"}).status_code == 201

    def ask(self, query: str) -> list:
        r = self.web.get(f"{self.prometheus}/api/v1/query", params={"query": query}).json()
        assert r["status"] == "success", (query, r)
        return r["data"]["result"]

    def close(self) -> None:
        self.uvicorn.should_exit = True
        for child in self.children[::-1]:
            if child.poll() is None: child.send_signal(signal.SIGTERM)
        for child in self.children[::-1]:
            try: child.wait(10)
            except subprocess.TimeoutExpired: child.kill(); child.wait()


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    s = Stack(tmp_path_factory.mktemp("monitoring"))
    try:
        s.monitoring()
        s.traffic(70)
        yield s
    finally: s.close()


live = needs("prometheus", "prometheus-alertmanager")


@live
def test_no_panel_is_empty(stack):
    from cxr_pred.ops.dashboards import queries
    stack.traffic(10)   # rates need two scrapes with films between them
    filled = lambda q: [s for s in stack.ask(q) if s["value"][1] != "NaN"]
    until(lambda: stack.ask("cxr_drift_ratio"), what="a look of the watch with films in it")
    empty = queries()
    end = time.monotonic() + 40
    while empty and time.monotonic() < end:
        stack.traffic(6)
        empty = [(d, p, q) for d, p, q in empty if not filled(q)]
    assert not empty
    assert {s["metric"]["job"] for s in stack.ask("up == 1")} == {"cxr-reader", "cxr-writer", "cxr-watch", "dcgm"}
    films = float(stack.ask("sum(cxr_predict_seconds_count)")[0]["value"][1])
    assert films >= 86, "what Prometheus counted is what was sent"
    assert 0.7 < float(stack.ask('cxr_feedback_accuracy{bound="value"}')[0]["value"][1]) < 0.9, "every fifth answer disagreed"


@live
def test_a_service_that_dies_is_told_at_the_webhook(stack):
    until(lambda: stack.ask("up{job=\"cxr-reader\"} == 1"), what="a scrape")
    before = [path for path, body in stack.webhook.posted if any(a["labels"]["alertname"] == "ReaderDown" for a in body["alerts"])]
    assert not before, "it was up"
    stack.reader_process.kill(); stack.reader_process.wait()
    killed = time.monotonic()
    told = lambda: [(path, a) for path, body in stack.webhook.posted for a in body["alerts"] if a["labels"]["alertname"] == "ReaderDown" and a["status"] == "firing"]
    (path, alert), *_ = until(told, 60, what="the alert")
    print(f"told {time.monotonic() - killed:.1f} s after the kill, with `for` of 2 s in place of a minute")
    assert path == "/on-call" and alert["labels"]["severity"] == "critical" and alert["labels"]["job"] == "cxr-reader" and "does not answer" in alert["annotations"]["summary"]
