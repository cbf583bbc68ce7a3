"The log in Elastic's common schema, and rsyslog that carries it to a bulk endpoint."
import http.server
import io
import json
import logging
import os
import re
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


def unknown(value, properties):
    "Names of a document's fields that the mapping lacks; dots and nested objects are the same."
    for name, v in value.items():
        head, _, rest = name.partition(".")
        if head not in properties: yield name
        elif rest: yield from unknown({rest: v}, properties[head].get("properties", {}))
        elif isinstance(v, dict): yield from unknown(v, properties[head].get("properties", {}))


def test_the_template_knows_every_field_that_is_written(tmp_path):
    path = tmp_path / "a.log"
    written(path, 0, 1)
    fields = json.loads((ELK / "index-template.json").read_text())["template"]["mappings"]["properties"]
    assert not list(unknown(json.loads(path.read_text()), fields))
    policy = json.loads((ELK / "ilm-policy.json").read_text())["policy"]["phases"]
    assert policy["delete"]["min_age"] == "90d"


# ---- the dashboard
FIELD = r"[\w@]+(?:\.\w+)*"


def known_as(field, value):
    "Values that a document has in a field, nested or dotted."
    for name, v in value.items():
        if name == field: yield from v if isinstance(v, list) else [v]
        elif isinstance(v, dict) and field.startswith(name + "."): yield from known_as(field[len(name) + 1:], v)


def matches(query, line):
    "What Kibana's query language says of a line, as much of it as the dashboard uses: field: value, * or (a or b); and, or, not, parentheses."
    tokens = re.findall(rf'"[^"]*"|\*|[():]|{FIELD}', query)
    def peek(): return tokens[0] if tokens else None
    def either():
        found = both()
        while peek() == "or": tokens.pop(0); other = both(); found = found or other
        return found
    def both():
        found = one()
        while peek() == "and": tokens.pop(0); other = one(); found = found and other
        return found
    def one():
        if peek() == "not": tokens.pop(0); return not one()
        if peek() == "(":
            tokens.pop(0); found = either(); assert tokens.pop(0) == ")"
            return found
        field, colon, wanted = tokens.pop(0), tokens.pop(0), [tokens.pop(0)]
        assert colon == ":"
        if wanted == ["("]:
            wanted = []
            while (t := tokens.pop(0)) != ")": wanted += [t] if t != "or" else []
        has = list(known_as(field, line))
        return bool(has) if wanted == ["*"] else any(f'"{v}"' in wanted for v in has)
    found = either()
    assert not tokens, tokens
    return found


@pytest.mark.parametrize("query, yes", [('a: "x"', True), ('a: "y"', False), ('a: ("y" or "x") and b.c: *', True), ('not a: "x" or b.c: "2"', False), ('(a: "y" or b.c: "1") and not d: *', True)])
def test_the_querys_reader_reads(query, yes): assert matches(query, {"a": "x", "b": {"c": 1}}) is yes


@pytest.fixture(scope="module")
def written_lines(tmp_path_factory):
    "Lines of a real reader: a film read, one refused, one left unexplained by a language service that is away, an error inside, rows of the audit log."
    from fastapi.testclient import TestClient
    from cxr_pred.clinic.api import create_app
    from cxr_pred.clinic.logs import ecs_log, events
    from cxr_pred.data.sample import make_sample
    from cxr_pred.ops.simulate import sources_of
    from cxr_pred.store import Store
    from cxr_pred.vision.classify import Classifier
    from cxr_pred.vision.toy import toy_bundle
    d = tmp_path_factory.mktemp("elk")
    make_sample(d / "raw", 16, 96, 0, workers=1)
    films = [d / "raw" / s.path for s in sources_of(d / "raw", ["sample"]) if s.path.endswith(".png")][:6]
    out, base = io.StringIO(), logging.getLogger()
    before, level = base.handlers[:], base.level
    store = Store(f"sqlite:///{d / 'a.db'}", d / "state")
    handler = ecs_log("cxr-reader", out)
    try:
        with TestClient(create_app(Classifier(toy_bundle(d / "toy", ROOT / "nbs/language/facts.yaml"), threads=1), store, ui=False, llm_url="http://127.0.0.1:9"), raise_server_exceptions=False) as web:
            until(lambda: web.get("/readyz").status_code == 200)
            said = [web.post("/v1/predict", files={"file": (f.name, f.read_bytes())}).json() for f in films]
            assert web.post("/v1/predict", files={"file": ("anna-miller.txt", b"Dear colleague, " * 50)}).json()["code"] == "unsupported_format"
            until(lambda: out.getvalue().count("explain: llm_unreachable") == sum(r["status"] == "ok" for r in said) > 0)
            store.study = lambda study_id: 1 / 0
            assert web.get(f"/v1/studies/{said[0]['study_id']}").status_code == 500
    finally:
        base.removeHandler(handler); base.setLevel(level); events.setLevel(logging.NOTSET)
        for h in before: base.addHandler(h)
        store.close()
    return [json.loads(l) for l in out.getvalue().splitlines()], said


@pytest.fixture(scope="module")
def board():
    "The saved objects, by type and id."
    found = {}
    for line in (ELK / "kibana.ndjson").read_text().splitlines():
        o = json.loads(line)
        assert {"type", "id", "attributes", "references", "coreMigrationVersion", "typeMigrationVersion"} <= set(o) and o["attributes"]["title"], line[:200]
        assert (o["type"], o["id"]) not in found, o["id"]
        found[o["type"], o["id"]] = o
    return found


def question(o):
    "The query of a panel or a search."
    return (o["attributes"]["state"] if o["type"] == "lens" else json.loads(o["attributes"]["kibanaSavedObjectMeta"]["searchSourceJSON"]))["query"]["query"]


def columns(o): return o["attributes"]["state"]["datasourceStates"]["formBased"]["layers"]["layer"]["columns"] if o["type"] == "lens" else {}


def asked_fields(o):
    "Names of fields that an object uses."
    a = o["attributes"]
    if o["type"] == "index-pattern": return {a["timeFieldName"], *json.loads(a["fieldFormatMap"])}
    if o["type"] == "dashboard": return set()
    return {*(c["sourceField"] for c in columns(o).values()), *a.get("columns", ()), *(s for s, _ in a.get("sort", ())), *re.findall(rf"({FIELD}):", re.sub('"[^"]*"', "", question(o)))} - {"___records___"}


def test_the_dashboard_holds_together(board):
    "References resolve in the file, nothing lies beside it, and each chart draws columns that it has."
    assert {t for t, _ in board} == {"index-pattern", "lens", "search", "dashboard"}
    assert all((r["type"], r["id"]) in board for o in board.values() for r in o["references"])
    page, = [o for o in board.values() if o["type"] == "dashboard"]
    panels = json.loads(page["attributes"]["panelsJSON"])
    assert {(r["type"], r["id"]) for r in page["references"]} == {k for k in board if k[0] in ("lens", "search")}
    assert [(f"{p['panelIndex']}:{p['panelRefName']}", p["type"], p["panelIndex"]) for p in panels] == [(r["name"], r["type"], p["gridData"]["i"]) for p, r in zip(panels, page["references"], strict=True)]
    places = [(x, y) for p in panels for g in [p["gridData"]] for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])]
    assert len(places) == len(set(places)) and max(x for x, _ in places) < 48, "no panel over another, none outside"
    for o in board.values():
        if o["type"] != "lens": continue
        state = o["attributes"]["state"]
        layers, vis, shown = state["datasourceStates"]["formBased"]["layers"], state["visualization"], columns(o)
        assert set(layers) == {"layer"} and layers["layer"]["columnOrder"] == list(shown) and [r["name"] for r in o["references"]] == ["indexpattern-datasource-layer-layer"], o["id"]
        drawn = vis["layers"][0] if "layers" in vis else vis
        used = {drawn.get("xAccessor"), drawn.get("splitAccessor"), drawn.get("metricAccessor"), *drawn.get("accessors", ()), *(c["columnId"] for c in drawn.get("columns", ()))} - {None}
        assert drawn["layerId"] == "layer" and used == set(shown), (o["id"], used, set(shown))
        assert all(c["params"]["orderBy"]["columnId"] in shown for c in shown.values() if c["operationType"] == "terms")


def test_the_dashboard_asks_for_fields_that_are_written_and_known(board, written_lines):
    lines, _ = written_lines
    template = json.loads((ELK / "index-template.json").read_text())["template"]["mappings"]["properties"]
    def kind(field):
        at = {"properties": template}
        for part in field.split("."): at = at["properties"][part]
        return at["type"]
    everything = {f for o in board.values() for f in asked_fields(o)}
    assert {"event.outcome", "event.reason", "event.duration", "event.sequence", "error.type", "http.response.status_code"} <= everything
    for field in everything:
        assert kind(field), field
        assert any(list(known_as(field, l)) for l in lines), f"no line holds {field}"
    for o in board.values():
        for c in columns(o).values():
            if c["operationType"] == "terms": assert kind(c["sourceField"]) in ("keyword", "long"), "text is not counted by value"
            if c["operationType"] == "percentile": assert kind(c["sourceField"]) == "long"
    assert not list(f for l in lines for f in unknown(l, template)), "and nothing is written that the template does not know"
    assert "anna" not in json.dumps(lines)


def test_the_dashboard_counts_what_happened(board, written_lines):
    "Each question, put to the lines of a reader, finds what was done there and nothing else."
    lines, said = written_lines
    counted = {id: [l for l in lines if matches(question(o), l)] for (t, id), o in board.items() if t in ("lens", "search")}
    of = lambda name, field: [v for l in counted[name] for v in known_as(field, l)]
    assert len(counted["cxr-films"]) == len(said) == 6 and of("cxr-films", "event.reason") == [r["reason_code"] for r in said]
    assert all(0 < v < 60e9 for v in of("cxr-latency", "event.duration")) and len(of("cxr-latency", "event.duration")) == 6
    assert sorted(of("cxr-refused", "event.reason")) == sorted([r["reason_code"] for r in said if r["reason_code"] != "ok"] + ["unsupported_format"])
    assert sorted(of("cxr-requests", "event.outcome")) == ["failure"] * 2 + ["success"] * 6 and sorted(of("cxr-status", "http.response.status_code")) == [200] * 6 + [415, 500]
    assert of("cxr-error-kinds", "error.type") == ["ZeroDivisionError"] and len(counted["cxr-errors"]) == len(counted["cxr-errors-now"]) == 1
    assert set(of("cxr-fallbacks", "event.reason")) == {"llm_unreachable"} and len(counted["cxr-fallbacks"]) == len(counted["cxr-fallbacks-now"]) == sum(r["status"] == "ok" for r in said)
    assert of("cxr-audit", "event.action") == ["study.recorded"] * 6 and of("cxr-audit-rows", "event.sequence") == [1, 2, 3, 4, 5, 6] and all(re.fullmatch("[0-9a-f]{64}", h) for h in of("cxr-audit-rows", "event.hash"))


def test_compose_puts_the_dashboard_into_its_kibana():
    import yaml
    services = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())["services"]
    s = services["kibana-dashboard"]
    assert s["image"] == services["elasticsearch"]["image"] and s["image"].split(":")[1] == services["kibana"]["image"].split(":")[1], "one version of all"
    source, target, mode = s["volumes"][0].split(":")
    assert (ROOT / "deploy/compose" / source).resolve() == ELK / "kibana.ndjson" and f"file=@{target}" in s["command"][0] and mode == "ro"
    assert "kibana:5601/api/saved_objects/_import?overwrite=true" in s["command"][0] and "kbn-xsrf" in s["command"][0] and s["depends_on"] == {"kibana": {"condition": "service_healthy"}} and s["profiles"] == services["kibana"]["profiles"]
    import subprocess, tempfile
    from pathlib import Path
    for answer, shown in (('{"success":true}', "is there"), ('{"success":false,"errors":["x"]}', "did not take")):   # a refusal must not keep Filebeat waiting
        with tempfile.TemporaryDirectory() as d:
            (curl := Path(d) / "curl").write_text(f"#!/bin/sh\necho '{answer}'\n"); curl.chmod(0o755)
            script = s["command"][0].replace("$$", "$").replace("/run/secrets/elastic_password", "/dev/null")
            r = subprocess.run(["/bin/sh", "-ec", script], env={"PATH": f"{d}:/usr/bin:/bin"}, capture_output=True, text=True)
        assert r.returncode == 0 and shown in r.stdout + r.stderr, r


# ---- the id of a request
@pytest.fixture
def logged(tmp_path):
    "A reader without a language service, and a function that gives what it has written as ECS lines."
    from fastapi.testclient import TestClient
    from cxr_pred.clinic.api import create_app
    from cxr_pred.clinic.logs import ecs_log, events
    from cxr_pred.store import Store
    from cxr_pred.vision.classify import Classifier
    from cxr_pred.vision.toy import toy_bundle
    out, base = io.StringIO(), logging.getLogger()
    before, level = base.handlers[:], base.level
    store = Store(f"sqlite:///{tmp_path / 'a.db'}", tmp_path / "state")
    handler = ecs_log("cxr-reader", out)
    try:
        with TestClient(create_app(Classifier(toy_bundle(tmp_path / "toy", ROOT / "nbs/language/facts.yaml"), threads=1), store, ui=False), raise_server_exceptions=False) as web:
            until(lambda: web.get("/readyz").status_code == 200)
            yield web, store, lambda: [json.loads(l) for l in out.getvalue().splitlines()]
    finally:
        base.removeHandler(handler); base.setLevel(level); events.setLevel(logging.NOTSET)
        for h in before: base.addHandler(h)
        store.close()


def test_requests_at_once_never_mix(logged):
    "Films, pictures that are none and files that are not even that, sixteen at a time: under each id stands what became of that one, and nothing of another."
    import uuid
    from concurrent.futures import ThreadPoolExecutor
    from test_api import encoded, pattern
    import numpy as np
    web, _, lines = logged
    sent = [(str(uuid.uuid4()), kind) for _ in range(8) for kind in ("film", "blank", "text")]
    data = {"film": encoded(pattern()), "blank": encoded(np.full((64, 64), 90, np.uint8)), "text": b"Dear colleague, " * 50}
    def send(job): return web.post("/v1/predict", files={"file": ("f.png", data[job[1]])}, headers={"X-Request-ID": job[0]})
    with ThreadPoolExecutor(16) as pool: answers = list(pool.map(send, sent))
    assert [a.headers.get_list("x-request-id") for a in answers] == [[i] for i, _ in sent]
    by_id = {}
    for l in lines():
        if "trace" in l and "action" in l["event"]: by_id.setdefault(l["trace"]["id"], []).append((l["event"]["action"], l["event"].get("reason", "")))
    expected = {"film": [("study.recorded", ""), ("film-read", "ok"), ("request", "")], "blank": [("study.recorded", ""), ("film-read", "blank"), ("request", "")], "text": [("request", "unsupported_format")]}
    assert {i: by_id[i] for i, _ in sent} == {i: expected[kind] for i, kind in sent}


@pytest.mark.parametrize("bad", ["anna-miller-1970", "4711471147114711", "1.2.840.113619.2.55.3.604688119", 'x","log.level":"error', "a" * 5000, "\t\x1b[2J", "0af76519-16cd-43dd-8448-eb211c80319c, anna"], ids=range(7))
def test_an_id_that_is_none_is_replaced_and_nowhere_kept(logged, bad):
    import uuid
    web, _, lines = logged
    r = web.get("/v1/studies/none", headers={"X-Request-ID": bad.encode()})
    own, = r.headers.get_list("x-request-id")
    assert r.status_code == 404 and r.headers["content-type"] == "application/problem+json" and uuid.UUID(own).hex == own
    assert [l["trace"]["id"] for l in lines() if l.get("event", {}).get("action") == "request"] == [own] and bad not in json.dumps(lines()) + r.text


def test_every_answer_says_its_id_also_one_that_nobody_expected(logged):
    web, store, lines = logged
    store.study = lambda study_id: 1 / 0
    answers = [web.get("/healthz"), web.get("/v1/elsewhere"), web.get("/v1/studies/x"), web.post("/v1/predict", content=b"", headers={"content-length": str(10**9)}), web.post("/v1/feedback", content=b"{")]
    assert [r.status_code for r in answers] == [200, 404, 500, 413, 403] and len({r.headers["x-request-id"] for r in answers}) == 5
    failed, = [l for l in lines() if l["log.level"] == "error"]
    assert failed["trace"]["id"] == answers[2].headers["x-request-id"] and failed["error"]["type"] == "ZeroDivisionError"
