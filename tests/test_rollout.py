"A rollout with the real HAProxy: a canary's share, a bad version that goes back by itself without a lost film, and two real readers that are exchanged under traffic."
import contextlib, http.server, json, os, shutil, signal, socket, subprocess, sys, threading, time
from pathlib import Path

import httpx
import pytest
import yaml
from test_deploy import debian, eventually, loopback_port

from cxr_pred.core import root
from cxr_pred.ops.proxy import say, servers, set_weights
from cxr_pred.ops.rollout import Limits, Memory, Rollout, RolloutSettings, State, Watcher, made_up_films, target, weights
from cxr_pred.store import Store
from cxr_pred.tables import Audit
from cxr_pred.vision.toy import toy_bundle

ROOT, CONFIG = root(), root() / "deploy/haproxy/haproxy.cfg"
FACTS = ROOT / "nbs/language/facts.yaml"


def certificate(folder: Path) -> Path:
    "A certificate of this test's own."
    shutil.copy(ROOT / "deploy/compose/prepare.sh", folder)
    subprocess.run([folder / "prepare.sh"], check=True, capture_output=True)
    return folder / "secrets/certificate"


@contextlib.contextmanager
def haproxy(folder: Path, stable: str, canary: str):
    "The project's own configuration; gives the address of the traffic and of the socket."
    listen, metrics, admin = (loopback_port() for _ in range(3))
    env = os.environ | {"LISTEN": f"127.0.0.1:{listen}", "METRICS": f"127.0.0.1:{metrics}", "ADMIN": f"127.0.0.1:{admin}", "STABLE": stable, "CANARY": canary, "PAGE": stable, "CERTIFICATE": str(certificate(folder))}
    with open(folder / "haproxy.log", "wb") as log: p = subprocess.Popen([debian("haproxy"), "-db", "-f", str(CONFIG)], env=env, stdout=log, stderr=log)
    try:
        eventually(lambda: socket.create_connection(("127.0.0.1", admin), 2), 60)
        yield f"https://127.0.0.1:{listen}", f"127.0.0.1:{admin}"
    finally: p.terminate(); p.wait(20)


class Reader(http.server.ThreadingHTTPServer):
    "A small service with a bundle's hash, which can be slow or fail, and counts as the reader does."
    daemon_threads = True

    def __init__(self, name, hash):
        super().__init__(("127.0.0.1", 0), Answer)
        self.name, self.hash, self.wait_s, self.fails = name, hash, 0.0, False
        from prometheus_client import CollectorRegistry, Histogram
        self.registry = CollectorRegistry()
        self.seconds = Histogram("cxr_predict_seconds", "t", registry=self.registry, buckets=(.025, .05, .1, .2, .3, .5, 1, 2, 5, 10))
        self.address = f"127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    def handle(self):
        with contextlib.suppress(ConnectionError): super().handle()   # a health check that hangs up

    def do_GET(self):
        from prometheus_client import generate_latest
        body = generate_latest(self.server.registry) if self.path == "/metrics" else json.dumps({"bundle_hash": self.server.hash}).encode()
        self.send_response(200); self.end_headers(); self.wfile.write(body)

    def do_POST(self):
        s = self.server
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with s.seconds.time(): time.sleep(s.wait_s)
        self.send_response(500 if s.fails else 200); self.end_headers(); self.wfile.write(s.name.encode())

    def log_message(self, *a): pass


class Traffic:
    "Senders that never pause; what came back, when, and from whom."

    def __init__(self, url, senders=6, films=(b"x",), pause_s=0.01):
        self.url, self.films, self.pause_s, self.answers, self.stopping = url, films, pause_s, [], threading.Event()
        self.threads = [threading.Thread(target=self.send, args=(k,)) for k in range(senders)]
        for t in self.threads: t.start()

    def send(self, k):
        with httpx.Client(verify=False, trust_env=False, timeout=60) as client:
            while not self.stopping.is_set():
                begun = time.monotonic()
                try: r = client.post(f"{self.url}/v1/predict?explain=false", files={"file": ("f.png", self.films[(k := k + 1) % len(self.films)])}); said = r.status_code, r.headers.get("X-Served-By")
                except httpx.HTTPError as e: said = 0, type(e).__name__
                self.answers.append((begun, time.monotonic(), *said))
                self.stopping.wait(self.pause_s)

    def stop(self):
        self.stopping.set()
        for t in self.threads: t.join()
        return self.answers


@pytest.fixture
def site(tmp_path, request):
    "Two small readers behind the real HAProxy, and a rollout that has a canary."
    debian("haproxy")
    old, new = (toy_bundle(tmp_path / n, FACTS, seed=s) for s, n in enumerate(("old", "new")))
    readers = {n: Reader(n, target(b).hash) for n, b in (("stable", old), ("canary", new))}
    store = Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path / "state")
    limits = Limits(for_s=4, window_s=3, least=5, every_s=0.25, canary_s=0, keep_s=3600, doubt=getattr(request, "param", 0.025))
    with haproxy(tmp_path, *(r.address for r in readers.values())) as (url, admin):
        where = RolloutSettings(proxy=admin, stable=f"http://{readers['stable'].address}", canary=f"http://{readers['canary'].address}")
        r = Rollout(tmp_path / "state", where, limits, store)
        r.start(old)
        r.start(new, tested=lambda t: {"passed": True, "why": [], "p99_ms": 1, "per_s": 1, "steps": []}, tell=lambda *a: None)
        eventually(lambda: (r.look(), r.status().stage == "canary")[1], 60)
        traffic, watcher = Traffic(url), Watcher(r)
        looking = threading.Thread(target=watcher.keep_looking); looking.start()
        try: yield r, readers, traffic, watcher
        finally:
            watcher.stopping.set(); looking.join(); traffic.stop()
            for s in readers.values(): s.shutdown(); s.server_close()
            store.close()


def gone_back(r, traffic, begun):
    "Wait for the rollback; seconds from the fault to the decision and to the last film that was sent to the canary."
    eventually(lambda: r.status().stage == "settled", 120)
    decided = time.monotonic()
    n = len(traffic.answers); eventually(lambda: len(traffic.answers) > n + 100 and traffic.answers[-1][0] > decided + 1.5, 60)
    answers = traffic.stop()
    last = max(a for a, _, _, who in answers if who == "canary")
    return decided - begun, last - begun, answers


@pytest.mark.parametrize("site, rule", [(1e-200, "latency"), (0.025, "worse_times")], indirect=["site"])   # with that doubt no comparison ends
def test_a_tenth_goes_to_the_canary_and_a_slow_one_goes_back(site, rule):
    r, readers, traffic, watcher = site
    eventually(lambda: len(traffic.answers) > 300, 60)
    share = [who for *_, who in traffic.answers].count("canary") / len(traffic.answers)
    assert 0.06 < share < 0.14
    readers["canary"].wait_s, begun = 0.7, time.monotonic()
    to_decision, to_last, answers = gone_back(r, traffic, begun)
    line = r.status().decisions[-1]
    assert (line["what"], line["rule"]) == ("rollback", rule), line
    assert rule != "latency" or line["why"].startswith("P99 ") and to_decision >= r.limits.for_s, "not before the limit was passed for so long"
    assert [a for a in answers if a[2] != 200] == [], "no film was lost"
    assert {who for a, _, _, who in answers if a > begun + to_decision + 1} == {"stable"}
    assert weights("settled", r.limits) == tuple(s.weight for s in servers(r.where.proxy).values()) == (100, 0)
    with r.store.session() as s: logged = [a.action for a in s.query(Audit).order_by(Audit.id)]
    assert logged == ["rollout.first", "rollout.start", "rollout.tested", "rollout.canary", "rollout.rollback"] and r.store.verify().broken is None
    assert watcher.failures == 0 and 'cxr_rollout_stage{stage="settled"} 1.0' in watcher.page().decode()
    print(f"\n{rule}: back {to_decision:.1f} s after it became slow (limit {r.limits.for_s:g} s), last film to it after {to_last:.1f} s, {len(answers)} films, none lost")


def test_a_canary_that_fails_is_taken_out_by_whoever_sees_it_first(site):
    r, readers, traffic, watcher = site
    eventually(lambda: r.status().errors.n[1] >= 5, 60)
    readers["canary"].fails, begun = True, time.monotonic()
    to_decision, to_last, answers = gone_back(r, traffic, begun)
    line = r.status().decisions[-1]
    assert line["what"] == "rollback" and line["rule"] in ("down", "failures", "worse_errors"), line
    bad = [a for a in answers if a[2] != 200]
    assert bad and {a[2:] for a in bad} == {(500, "canary")} and not [a for a in bad if a[0] > begun + to_decision + 1], "what it had in hand failed, and nothing later"


def test_production_goes_back_at_once_and_haproxy_may_forget(site):
    r, readers, traffic, watcher = site
    r.promote("dr. a")
    eventually(lambda: [who for *_, who in traffic.answers[-200:]].count("canary") > 190, 60)
    set_weights(r.where.proxy, (100, 0))   # as after a restart
    eventually(lambda: servers(r.where.proxy)["canary"].weight == 256, 30)
    begun = time.monotonic(); r.rollback("dr. a", "a physician's word")
    to_decision, _, answers = gone_back(r, traffic, begun)
    assert to_decision < 30 and [a for a in answers if a[2] != 200] == []
    assert {who for a, _, _, who in answers if a > begun + to_decision + 1} == {"stable"}
    line = r.status().decisions[-1]
    assert (line["actor"], line["why"], line["rule"], line["from"]) == ("dr. a", "a physician's word", "by_hand", "production")


def test_drift_pages_or_goes_back(site):
    r, readers, traffic, watcher = site
    was, comes = r.status().stable.hash, r.status().candidate.hash
    r.eyes.drifted = lambda what, bundle: what == "outcome" and bundle == was
    looked = r.status().errors.n[1]; eventually(lambda: r.status().errors.n[1] > looked + 20, 30)
    assert r.status().stage == "canary" and not r.status().called, "the old version's answers are no reason to take the new one back"
    r.eyes.drifted = lambda what, bundle: what == "input"
    eventually(lambda: "input_drift" in r.status().called, 30)
    assert r.status().stage == "canary" and [x["rule"] for x in r.status().decisions].count("input_drift") == 1
    r.eyes.drifted = lambda what, bundle: what == "outcome" and bundle == comes
    eventually(lambda: r.status().stage == "settled", 30)
    assert r.status().decisions[-1]["rule"] == "outcome_drift"


# ---- real readers

def slow_bundle(folder: Path) -> Path:
    "A toy that multiplies large matrices before it answers: the same answers, and over half a second late."
    import numpy as np, onnx
    from onnx import helper, numpy_helper
    from cxr_pred.core import sha256_file, write_json
    toy_bundle(folder, FACTS, seed=1)
    m = onnx.load(folder / "vit.int8.onnx"); g = m.graph
    big = np.full((1800, 1800), 1e-6, np.float32)
    g.initializer.extend([numpy_helper.from_array(big, "big"), numpy_helper.from_array(np.float32(0), "naught"), numpy_helper.from_array(np.array([0], np.int64), "zero")])
    for n in g.node:
        if n.op_type == "ReduceSum": n.output[0] = "plain"
    last = "seeded"; g.node.extend([helper.make_node("ReduceMean", ["plain"], ["mean_all"], keepdims=0), helper.make_node("Add", ["big", "mean_all"], [last])])
    for k in range(16): g.node.append(helper.make_node("MatMul", [last, "big"], [last := f"big{k}"]))
    g.node.extend([helper.make_node("ReduceMax", [last], ["top"], keepdims=0), helper.make_node("Mul", ["top", "naught"], ["nothing"]), helper.make_node("Add", ["plain", "nothing"], ["logits"])])
    onnx.save(m, folder / "vit.int8.onnx"); shutil.copyfile(folder / "vit.int8.onnx", folder / "vit.onnx")
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json")
    write_json(folder / "manifest.json", {"version": "toy-slow", "files": {f: sha256_file(folder / f) for f in files}})
    return folder


@pytest.fixture
def real(tmp_path):
    "HAProxy, `rollout serve` for both servers, and `rollout watch`, each a process; limits of seconds."
    debian("haproxy")
    ports = {n: loopback_port() for n in ("stable", "canary")}
    project = tmp_path / "project"; project.mkdir(); shutil.copy(ROOT / "settings.ini", project)
    short = Limits(clients=2, step_s=2, gate_p99_ms=60_000, gate_per_s=0.01, canary_s=1, keep_s=3600, p99_ms=1500, for_s=8, window_s=20, least=1, every_s=0.5, doubt=0.05, error_margin=0.2, wait_s=400)
    (project / "params.yaml").write_text("{}"); (project / "deploy").mkdir(); (project / "deploy/rollout.yaml").write_text(yaml.safe_dump(short.model_dump()))
    children = []
    with haproxy(tmp_path, *(f"127.0.0.1:{p}" for p in ports.values())) as (url, admin):
        env = {k: v for k, v in os.environ.items() if not k.startswith("CXR_")} | {"CXR_ROOT": str(project), "CXR_STATE": str(tmp_path / "state"), "CXR_ROLLOUT_PROXY": admin, "OMP_NUM_THREADS": "1", "CXR_THREADS": "1"} | {f"CXR_ROLLOUT_{n.upper()}": f"http://127.0.0.1:{p}" for n, p in ports.items()}
        def cli(*args, wait=True):
            command = [sys.executable, "-W", "ignore", "-m", "cxr_pred.cli", "rollout", *map(str, args)]
            if wait: return subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, timeout=400)
            children.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=open(tmp_path / f"{args[0]}.log", "ab"), stderr=subprocess.STDOUT)); return children[-1]
        try: yield cli, url, admin, ports, Memory(tmp_path / "state"), tmp_path
        finally:
            for c in children: c.send_signal(signal.SIGINT)
            for c in children:
                try: c.wait(40)
                except subprocess.TimeoutExpired: c.kill(); c.wait()


def test_real_readers_are_exchanged_under_traffic_and_a_slow_one_goes_back(real):
    cli, url, admin, ports, memory, d = real
    old, new, slow = toy_bundle(d / "old", FACTS), toy_bundle(d / "new", FACTS, seed=2), slow_bundle(d / "slow")
    assert cli("start", old).returncode == 0
    for n, p in ports.items(): cli("serve", n, "--port", p, wait=False)
    stage = lambda: memory.read().stage
    def serves():
        try: return httpx.get(f"{url}/readyz", verify=False, trust_env=False, timeout=30).json().get("model_version")
        except (httpx.HTTPError, ValueError): return None
    eventually(lambda: serves() == "toy-0", 300, 1)
    watch = cli("watch", "--port", loopback_port(), wait=False)
    traffic = Traffic(url, 2, [f for n, f in enumerate(made_up_films(8)) if n in (0, 3, 6, 7)], 0.05)   # both answer these: what one leaves open would take it back
    try:
        said = cli("start", new); assert said.returncode == 0, said.stdout + said.stderr
        eventually(lambda: stage() == "canary", 300, 0.2)
        eventually(lambda: memory.read().errors.n[1] >= 3, 300, 0.2)
        assert cli("promote", "--why", "it is well").returncode == 0 and stage() == "production"
        eventually(lambda: [who for *_, who in traffic.answers[-20:]].count("canary") >= 19, 300, 0.2)
        early = cli("promote"); assert early.returncode == 1 and "[kept_warm]" in early.stderr and stage() == "production"
        assert cli("promote", "--settle").returncode == 0
        eventually(lambda: stage() == "settled", 300, 0.2)
        eventually(lambda: serves() == "toy-2", 60, 1)
        said = cli("start", slow); assert said.returncode == 0, said.stdout + said.stderr
        eventually(lambda: stage() == "canary", 300, 0.2)
        eventually(lambda: stage() == "settled", 400, 0.2)
        line, n = memory.read().decisions[-1], len(traffic.answers)
        assert (line["what"], line["version"]) == ("rollback", "toy-slow") and line["rule"] in ("latency", "worse_times", "hangs", "down"), line
        eventually(lambda: len(traffic.answers) > n + 20, 120)
    finally: answers = traffic.stop()
    assert len(answers) > 100 and [a for a in answers if a[2] != 200] == [], "two versions came and went, and no film was lost"
    back = cli("rollback", "--to", "toy-0"); assert back.returncode == 0, back.stderr
    eventually(lambda: stage() == "production" and serves() is not None, 300, 0.5)
    assert watch.poll() is None and cli("status").stdout.startswith("production")
    store = Store(f"sqlite:///{d}/state/cxr.db", d / "state"); assert store.verify().broken is None; store.close()


# ---- one set of numbers

def test_the_limits_are_the_same_everywhere():
    text = lambda p: (ROOT / "deploy" / p).read_text()
    L = Limits(**yaml.safe_load(text("rollout.yaml")))
    rules = {r["alert"]: r for g in yaml.safe_load(text("prometheus/rules/cxr.yml"))["groups"] for r in g["rules"] if "alert" in r}
    assert L.for_s > L.window_s, "a film is seen for as long as the window is wide: one alone must not last so long"
    assert rules["PredictionsSlow"]["expr"].endswith(f"> {L.p99_ms / 1000:g}") and rules["PredictionsSlow"]["for"] == f"{L.for_s / 60:g}m"
    assert rules["RequestsFail"]["expr"].endswith(f"> {L.failures:g}") and rules["RequestsFail"]["for"] == f"{L.for_s / 60:g}m"
    assert f'"--p99-ms", type=float, default={L.gate_p99_ms:g}' in text("ci/load.py") and f'"--failures", type=float, default={L.gate_failures:g}' in text("ci/load.py")
    gates = {g["name"]: g for section in yaml.safe_load((ROOT / "params.yaml").read_text()).values() for g in section.get("gates", [])}
    assert gates["latency P99 in ms"]["below"] == L.gate_p99_ms
    assert L == Limits(), "outside of a project the same"


def test_by_hand_the_same_words_are_sent():
    "canary.sh sends what the rollout sends."
    import re
    script = (ROOT / "deploy/compose/canary.sh").read_text()
    by_hand = [w.replace("$share", "10").replace("$((100 - share))", "90") for w in re.findall(r'="(set server [^"]+)"', script)]
    sent = []
    class Proxy(threading.Thread):
        def run(self):
            c, _ = self.s.accept()
            with c: sent.append(c.recv(999).decode().strip()); c.sendall(b"\n")
    p = Proxy(); p.s = socket.create_server(("127.0.0.1", 0)); p.start()
    set_weights("127.0.0.1:%d" % p.s.getsockname()[1], weights("canary", Limits())); p.join(); p.s.close()
    assert sorted(sent[0].split(";")) == sorted(by_hand)


def test_a_state_of_before_compares_what_is_left_open_by_the_limits(tmp_path):
    limits = Limits()
    r = Rollout(tmp_path, RolloutSettings(), limits, None)
    (tmp_path / "rollout.json").write_text(State(stage="canary").model_dump_json(exclude={"opens", "opened", "filled", "stable_since"}))
    assert (r.read().opens.slack, r.read().opens.margin, r.read().stage) == (limits.open_slack, limits.open_slack, "canary")


def test_a_load_test_does_not_overrun_the_line():
    "As many senders as staging has find a place in the line of a reader with one lane: who is told to come again would count as a failure."
    from cxr_pred.clinic.auth import ClinicSettings
    from cxr_pred.ops.rollout import Limits
    assert Limits().clients <= 1 + ClinicSettings.model_fields["films_waiting"].default
