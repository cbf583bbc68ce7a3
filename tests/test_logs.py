"The log in Elastic's common schema, and rsyslog that carries it to a bulk endpoint."
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from cxr_pred.core import root

ROOT = root()
ELK = ROOT / "deploy/elk"


class Bulk:
    "What of Elasticsearch rsyslog speaks to: takes POST /_bulk, keeps the documents."

    def __init__(self, port: int = 0):
        documents = self.documents = []
        class Answer(http.server.BaseHTTPRequestHandler):
            def answer(self, body: dict):
                data = json.dumps(body).encode(); self.send_response(200); self.send_header("Content-Type", "application/json"); self.send_header("Content-Length", str(len(data))); self.end_headers(); self.wfile.write(data)
            def do_HEAD(self): self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
            def do_GET(self): self.answer({"status": "green"})
            def do_POST(self):
                lines = self.rfile.read(int(self.headers["Content-Length"])).decode().splitlines()
                pairs = [(json.loads(a), json.loads(d)) for a, d in zip(lines[::2], lines[1::2])]
                documents.extend(pairs)
                self.answer({"took": 1, "errors": False, "items": [{"index": {"status": 201}} for _ in pairs]})
            def log_message(self, *a): pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Answer)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self): self.server.shutdown(); self.server.server_close()


def until(ask, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not ask(): time.sleep(0.2)
    assert ask()


WRITE = "import sys; from cxr_pred.clinic.logs import ecs_log; from cxr_pred.core import log; ecs_log('cxr-reader'); [log.warning('line %d \"quoted\" \\u00e4', i) for i in range(int(sys.argv[1]), int(sys.argv[2]))]"


def written(path, first, last):
    "Append lines as a service does: another process, its stderr in the file."
    with open(path, "a") as f: subprocess.run([sys.executable, "-c", WRITE, str(first), str(last)], stderr=f, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.skipif(not shutil.which("rsyslogd") or not os.path.exists("/usr/lib/x86_64-linux-gnu/rsyslog/omelasticsearch.so"), reason="Debian's rsyslog and rsyslog-elasticsearch are not installed")
def test_rsyslog_carries_every_line_even_if_the_index_is_away(tmp_path):
    logs = tmp_path / "log"; logs.mkdir()
    index = Bulk()
    conf = (ELK / "rsyslog.conf").read_text().replace("/var/log/cxr", str(logs)).replace('serverport="9200"', f'serverport="{index.port}"')
    (tmp_path / "rsyslog.conf").write_text(f'global(workDirectory="{tmp_path}")\n' + conf)
    check = subprocess.run(["rsyslogd", "-N1", "-f", str(tmp_path / "rsyslog.conf")], capture_output=True, text=True)
    assert check.returncode == 0, check.stderr
    written(logs / "reader.log", 0, 50)
    syslog = subprocess.Popen(["rsyslogd", "-n", "-f", str(tmp_path / "rsyslog.conf"), "-i", str(tmp_path / "pid")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(index.documents) == 50)
        index.close()
        written(logs / "reader.log", 50, 80)
        time.sleep(2)
        again = Bulk(index.port)
        until(lambda: len(again.documents) >= 30)
    finally: syslog.terminate(); syslog.wait(20)
    got = [d for _, d in index.documents + again.documents]
    assert {d["message"] for d in got} == {f'line {i} "quoted" ä' for i in range(80)}, "none lost, none changed"
    assert all(a["index"]["_index"] == "cxr-logs" for a, _ in index.documents) and all(d["service"]["name"] == "cxr-reader" and d["log.level"] == "warning" for d in got)
    again.close()


def test_the_template_knows_every_field_that_is_written(tmp_path):
    path = tmp_path / "a.log"
    written(path, 0, 1)
    fields = json.loads((ELK / "index-template.json").read_text())["template"]["mappings"]["properties"]

    def known(value, properties):
        "Names of a document's fields that the mapping lacks; dots and nested objects are the same."
        for name, v in value.items():
            head, _, rest = name.partition(".")
            if head not in properties: yield name
            elif rest: yield from known({rest: v}, properties[head].get("properties", {}))
            elif isinstance(v, dict): yield from known(v, properties[head].get("properties", {}))

    assert not list(known(json.loads(path.read_text()), fields))
    policy = json.loads((ELK / "ilm-policy.json").read_text())["policy"]["phases"]
    assert policy["delete"]["min_age"] == "90d"
