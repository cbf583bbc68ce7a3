"The chart and the pipeline, by what an installation would meet: routes, names of images, gates that can be missed, a rollout that is waited for."
import json, os, re, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from test_deploy import CHART, DEPLOY, ENVIRONMENTS, ROOT, checker, debian, good, of_kind, pins, pods, rendered, run  # noqa: F401

IMAGES = {f"cxr-pred-{i}" for i in ("vit", "page", "watch", "llm-cpu", "llm-cuda", "mlflow", "train")}
FLOWS = {f.name: yaml.safe_load(f.read_text()) for f in (ROOT / ".github/workflows").glob("*.yml")}
VERSION = re.search(r"^version *= *(\S+)$", (ROOT / "settings.ini").read_text(), re.M)[1]


@pytest.fixture
def render(tmp_path):
    "Render an environment with values on top: the manifests, or what was said against them."
    def make(environment: str, **values):
        (tmp_path / "more.yaml").write_text(yaml.safe_dump(values))
        r = run(checker("python"), DEPLOY / "checks/render.py", CHART, *ENVIRONMENTS[environment], tmp_path / "more.yaml")
        return json.loads(r.stdout) if r.returncode == 0 else r.stderr
    return make


@pytest.fixture
def stand_in(tmp_path):
    "Put a program of that name first in the path; it writes down how it is called. The environment to run with comes back."
    (tmp_path / "bin").mkdir()
    def make(**programs: str) -> dict:
        for name, says in programs.items():
            (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "{name} $@" >> "{tmp_path}/calls"\n{says}\n')
            (tmp_path / "bin" / name).chmod(0o755)
        return os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    make.calls = lambda: (tmp_path / "calls").read_text() if (tmp_path / "calls").exists() else ""
    return make


# ---- the chart

def served_by(manifests: list[dict], path: str) -> str | None:
    "Who answers a path, as the Gateway API says: of all routes the longest prefix, by whole elements. None: nobody does."
    found = [(len(m["path"]["value"].rstrip("/")), rule) for route in of_kind(manifests, "HTTPRoute").values() for rule in route["spec"]["rules"] for m in rule["matches"]
             if m["path"]["type"] == "PathPrefix" and f"{path.rstrip('/')}/".startswith(f"{m['path']['value'].rstrip('/')}/")]
    if not found: return None
    behind = max(found, key=lambda f: f[0])[1].get("backendRefs")
    return behind[0]["name"] if behind else None


def test_routes_are_haproxys(rendered):
    study = "/v1/studies/" + "ab" * 16
    to_page = [f"{study}/fhir", f"{study}/sr.dcm", f"{study}/heatmap.dcm", "/", "/gradio_api/queue", "/v1/login", "/v1/oidc/callback"]
    to_page += [f"{p}studies" for p in re.findall(r"use_backend page if \{ path_beg (\S+) \}", (DEPLOY / "haproxy/haproxy.cfg").read_text())]
    assert to_page[-1] == "/dicomweb/studies"
    for e in ("staging", "canary", "production"):
        who = lambda path: served_by(rendered[e], path)
        assert {p: who(p) for p in to_page} == dict.fromkeys(to_page, "cxr-page"), "the image without those libraries answers 501"
        assert {who(p) for p in ("/v1/predict", "/v1/feedback", "/readyz", "/healthz", "/docs", "/openapi.json")} == {"cxr-vit"}
        assert who("/metrics") is None, "figures are for Prometheus"
        services = of_kind(rendered[e], "Service")
        assert {b["name"] for r in of_kind(rendered[e], "HTTPRoute").values() for rule in r["spec"]["rules"] for b in rule.get("backendRefs", [])} <= set(services)
        page = pods(rendered[e])["cxr-page"]["containers"][0]
        assert page["image"].endswith("cxr-pred-page@sha256:" + "d" * 64) and "--no-ui" not in page["args"]
    assert of_kind(rendered["staging"], "HTTPRoute")["cxr-vit"]["spec"]["hostnames"] == ["cxr-staging.hospital.example"] and not of_kind(rendered["development"], "HTTPRoute")


def test_page_can_be_left_out_and_dicom_let_in(render):
    without = render("production", page={"enabled": False})
    assert served_by(without, "/dicomweb/studies") is None and served_by(without, "/") is None and "cxr-page" not in of_kind(without, "Deployment")
    assert "calling" in render("production", page={"dicom": {"enabled": True, "from": ["10.3.0.0/16"]}}), "films from anybody"
    found = render("production", page={"dicom": {"enabled": True, "calling": ["CT1", "CT2"], "from": ["10.3.0.0/16"], "peer": "ARCHIVE@archive:104"}})
    env = {v["name"]: v["value"] for v in pods(found)["cxr-page"]["containers"][0]["env"]}
    assert env.items() >= {"CXR_DICOM_CALLING": "CT1,CT2", "CXR_DICOM_PORT": "11112", "CXR_DICOM_PEER": "ARCHIVE@archive:104"}.items()
    assert of_kind(found, "Service")["cxr-page-dicom"]["spec"]["ports"][0]["port"] == 11112
    doors = {p["port"]: rule["from"] for rule in of_kind(found, "NetworkPolicy")["cxr-page"]["spec"]["ingress"] for p in rule["ports"]}
    assert doors[11112] == [{"ipBlock": {"cidr": "10.3.0.0/16"}}]


def test_settings_and_ways_out_are_values(render):
    found = render("production", service={"env": {"CXR_RETENTION_DAYS": "90", "CXR_THREADS": "1"}}, vit={"env": {"CXR_FILMS_PER_MINUTE": "1200"}}, secrets={"more": {"cxr_session_key": "session-key"}},
                   network={"egress": [{"cidr": "10.9.8.7/32", "ports": [443]}]})
    env = {n: [(v["name"], v["value"]) for v in p["containers"][0]["env"]] for n, p in pods(found).items()}
    for name in ("cxr-vit", "cxr-page", "cxr-watch"):
        assert ("CXR_RETENTION_DAYS", "90") in env[name] and len(dict(env[name])) == len(env[name]), "a name twice: the cluster would take one of them"
        paths = {i["path"] for v in pods(found)[name]["volumes"] if "secret" in v for i in v["secret"]["items"]}
        assert {"cxr_session_key", "cxr_database_url"} <= paths
        assert {"to": [{"ipBlock": {"cidr": "10.9.8.7/32"}}], "ports": [{"port": 443, "protocol": "TCP"}]} in of_kind(found, "NetworkPolicy")[name]["spec"]["egress"]
    assert all(dict(env[name])["CXR_WORKERS"] == "2" for name in ("cxr-vit", "cxr-page")), "a pod's share, not its node's cores"
    assert dict(env["cxr-vit"])["CXR_THREADS"] == "1" and dict(env["cxr-vit"])["CXR_FILMS_PER_MINUTE"] == "1200" and "CXR_FILMS_PER_MINUTE" not in dict(env["cxr-page"])
    assert dict(env["cxr-vit"])["FORWARDED_ALLOW_IPS"] == "10.42.0.0/16", "else all clients are one, and the page is http"
    assert of_kind(found, "NetworkPolicy")["cxr-llm"]["spec"]["egress"] == []
    for wrong in ({"CXR_SESSION_KEY": "x"}, {"AWS_SECRET_ACCESS_KEY": "x"}, {"CXR_THREADS": 2}, {"cxr": "x"}): assert isinstance(render("production", vit={"env": wrong}), str), wrong
    assert "gateway.enabled" in render("production", gateway={"enabled": False})


def test_files_of_a_hospital_are_mounted(render):
    made = pods(render("production", secrets={"service": "cxr-pred", "files": "cxr-files"}, service={"env": {"CXR_ORIGINALS_KEYS": "/etc/cxr/originals.keys"}}))
    for name in ("cxr-vit", "cxr-page", "cxr-watch", "cxr-backup"):
        box = made[name]["containers"][0]
        assert {"name": "files", "mountPath": "/etc/cxr", "readOnly": True} in box["volumeMounts"] and {"name": "CXR_ORIGINALS_KEYS", "value": "/etc/cxr/originals.keys"} in box["env"], name
        assert {"name": "files", "secret": {"secretName": "cxr-files", "defaultMode": 0o440}} in made[name]["volumes"]


def test_a_release_changes_no_pod_by_its_environment(rendered):
    "After a canary the plain values of production come: were its Pods others, it would begin anew."
    shown = {e: {n: m["spec"]["template"] for k in ("Rollout", "Deployment") for n, m in of_kind(rendered[e], k).items()} for e in ("canary", "production")}
    assert shown["canary"]["cxr-vit"] == shown["production"]["cxr-vit"] and shown["canary"]["cxr-page"] == shown["production"]["cxr-page"] and shown["canary"]["cxr-llm"] == shown["production"]["cxr-llm"] and shown["canary"]["cxr-watch"] == shown["production"]["cxr-watch"]


def test_drift_of_the_films_takes_a_canary_back_where_that_is_wished(render):
    for values, wanted in (({}, False), ({"rollout": {"inputDrift": True}}, True), ({"rollout": {"inputDrift": True}, "watch": {"enabled": False}}, False)):
        found = render("canary", **values)
        names = {t["templateName"] for t in of_kind(found, "Rollout")["cxr-vit"]["spec"]["strategy"]["canary"]["analysis"]["templates"]}
        assert names == set(of_kind(found, "AnalysisTemplate")) and ("cxr-vit-input" in names) is wanted, values
        if wanted:
            metric, = of_kind(found, "AnalysisTemplate")["cxr-vit-input"]["spec"]["metrics"]
            assert metric["provider"]["prometheus"]["query"] == 'max(max_over_time(cxr_drifted{what="input",namespace="cxr"}[5m]))' and metric["failureCondition"].endswith("result[0] > 0")
    assert isinstance(render("canary", rollout={"inputDrift": "yes"}), str), "true or false"


def test_canary_is_judged(rendered, tmp_path):
    "The queries of the analysis in Prometheus: a canary that reads well, one that fails, one that reads nothing; drift or none."
    promtool = debian("promtool")
    ask = {n.rsplit("-", 1)[1]: t["spec"]["metrics"][0]["provider"]["prometheus"]["query"] for n, t in of_kind(rendered["canary"], "AnalysisTemplate").items()}
    who = 'track="canary",namespace="cxr",job="cxr-reader"'
    count, failed = {"series": f"cxr_predict_seconds_count{{{who}}}", "values": "0+60x20"}, {"series": f'cxr_failures_total{{{who},code="store_unavailable"}}', "values": "0+60x20"}
    drift = lambda v: {"series": 'cxr_drifted{what="outcome",bundle_hash="8e71",namespace="cxr"}', "values": f"{v}x20"}
    sample = lambda v: [{"labels": "{}", "value": v}]
    cases = [("clean", [count, drift(0)], {"failures": sample(0), "drift": sample(0)}),
             ("failing", [count, failed, drift(1)], {"failures": sample(0.5), "drift": sample(1)}),
             ("silent", [drift(0)], {"failures": [], "latency": []}),
             ("input drifts", [count, {"series": 'cxr_drifted{what="input",bundle_hash="8e71",namespace="cxr"}', "values": "1x20"}, drift(0)], {"drift": sample(0)})]
    tests = [{"name": name, "interval": "1m", "input_series": series, "promql_expr_test": [{"expr": ask[gate], "eval_time": "12m", "exp_samples": want} for gate, want in wanted.items()]} for name, series, wanted in cases]
    (tmp_path / "t.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": tests}))
    good(run(promtool, "test", "rules", tmp_path / "t.yml"))
    canary = of_kind(rendered["canary"], "Rollout")["cxr-vit"]["spec"]["strategy"]["canary"]
    assert {t["templateName"] for t in canary["analysis"]["templates"]} == {f"cxr-vit-{n}" for n in ask}
    # an hour between two looks is longer than the canary
    for args in (pods(rendered[e])["cxr-watch"]["containers"][0]["args"] for e in ("canary", "production")): assert int(args[args.index("--every") + 1]) <= 300
    drop, = of_kind(rendered["canary"], "ServiceMonitor")["cxr"]["spec"]["endpoints"][0]["relabelings"]
    hit = lambda service, track: bool(re.fullmatch(drop["regex"], f"{service};{track}"))
    assert hit("cxr-vit-canary", "production") and not hit("cxr-vit-canary", "canary") and not hit("cxr-vit", "production"), "each Pod is asked once"


def test_training_job_can_run(rendered):
    job = of_kind(rendered["production"], "RayJob")["cxr-training"]["spec"]
    words, env = job["entrypoint"].split(), yaml.safe_load(job["runtimeEnvYAML"])
    assert "working_dir" not in env and env["env_vars"]["MLFLOW_TRACKING_URI"].startswith("http") and job["submissionMode"] == "HTTPMode", "a Pod that submits would be refused"
    assert words[0] == "/opt/venv/bin/python" and "--temp" not in words and words[-1] == "profiles/clinical/dvc.yaml" and (ROOT / words[-1]).is_file()
    settings = [w for i, w in enumerate(words) if words[i - 1] == "-S"]
    assert dict(s.split("=") for s in settings) == {f"profiles/clinical/params.yaml:train_vit.{k}": v for k, v in (("launcher", "ray"), ("strategy", "ddp"), ("devices", "2"))}
    known = yaml.safe_load((ROOT / "profiles/clinical/params.yaml").read_text())["train_vit"]
    assert {"launcher", "strategy", "devices"} <= set(known)
    policy = of_kind(rendered["production"], "NetworkPolicy")["cxr-training"]["spec"]
    own = policy["podSelector"]["matchLabels"]
    cluster = job["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert own.items() <= group["template"]["metadata"]["labels"].items()
        assert {v["name"]: v["value"] for v in group["template"]["spec"]["containers"][0]["env"]}["DVC_SITE_CACHE_DIR"].startswith("/tmp/"), "the root is read-only"
        assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    among = {"podSelector": {"matchLabels": own}}
    assert {"from": [among]} in policy["ingress"] and {"to": [among]} in policy["egress"], "Ray's machines on any port"
    assert [p["port"] for rule in policy["egress"] for p in rule.get("ports", [])] == [53, 53, 5000] and [p["port"] for rule in policy["ingress"] for p in rule.get("ports", [])] == [8265]


# ---- the pipeline

def test_copies_are_made_and_old_ones_go(rendered, stand_in, tmp_path):
    job = of_kind(rendered["production"], "CronJob")["cxr-backup"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    box, mounts = job["containers"][0], {m["name"]: m["mountPath"] for m in job["containers"][0]["volumeMounts"]}
    claims = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in job["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {"state": "cxr-vit", "backups": "cxr-backup"} and mounts["state"] == "/var/lib/cxr" and mounts["backups"] == "/backups" and box["image"].endswith("cxr-pred-page@sha256:" + "d" * 64)
    assert {"kind": "PersistentVolumeClaim", "keep": "keep"} == {"kind": (c := of_kind(rendered["production"], "PersistentVolumeClaim")["cxr-backup"])["kind"], "keep": c["metadata"]["annotations"]["helm.sh/resource-policy"]}
    assert not any(of_kind(rendered[e], "CronJob") for e in ("development", "staging")), "their films are nobody's"
    here = tmp_path / "backups"; here.mkdir()
    for day in range(10, 19): (here / f"2026-11-{day}T021500Z").mkdir()
    (here / "lost+found").mkdir()
    assert box["args"][:2] == ["sh", "-ec"] and box["args"][2].startswith("cd /backups; ")
    again = lambda env: run("sh", "-ec", box["args"][2].replace("/backups", str(here), 1), env=env)
    assert again(stand_in(**{"cxr-pred": f'mkdir "{here}/$2"; exit 2'})).returncode == 2 and len(list(here.glob("20*"))) == 10, "a copy that is not whole replaces none"
    for f in here.glob("20*Z"):
        if not f.name.startswith("2026-11-1"): f.rmdir()
    good(again(stand_in(**{"cxr-pred": f'mkdir "{here}/$2"'})))
    left = sorted(f.name for f in here.glob("20*"))
    assert len(left) == 7 and left[0] == "2026-11-13T021500Z" and (here / "lost+found").exists()


def test_images_have_one_set_of_names(rendered):
    matrix = FLOWS["delivery.yml"]["jobs"]["package"]["strategy"]["matrix"]["include"]
    assert {f"cxr-pred-{i['image']}" for i in matrix} == IMAGES
    for script in ("package.sh", "sbom.sh"): assert {f"cxr-pred-{i}" for i in re.search(r"set -- ((?:[a-z-]+ ?)+)$", (DEPLOY / "ci" / script).read_text(), re.M)[1].split()} == IMAGES, script
    # and the line that each Dockerfile gives to type makes one of them; ROCm's is nobody's but who types it
    typed = {t for f in (DEPLOY / "docker").glob("*.Dockerfile") for t in re.findall(r"^#.*docker build .* -t (\S+) \.", f.read_text(), re.M)}
    assert typed <= IMAGES | {"cxr-pred-train-rocm"} and {"cxr-pred-llm-cuda", "cxr-pred-llm-cpu", "cxr-pred-train", "cxr-pred-vit"} <= typed
    assert "rocm" not in {i["target"] for i in matrix} and "The pipeline builds `cuda`; `rocm` is built by hand" in (DEPLOY / "README.md").read_text()
    asked = {re.search(r"/(cxr-pred-[a-z-]+)[@:]", c["image"])[1] for ms in rendered.values() for p in pods(ms).values() for c in p["containers"]}
    assert asked <= IMAGES and asked >= {"cxr-pred-vit", "cxr-pred-page", "cxr-pred-watch", "cxr-pred-llm-cpu", "cxr-pred-llm-cuda", "cxr-pred-train"}
    # what the pipeline pushes, the chart asks for where no digest is given
    build = next(s for s in FLOWS["delivery.yml"]["jobs"]["package"]["steps"] if s.get("id") == "build")["with"]
    assert [t.split("}}:")[-1] for t in build["tags"].split("\n") if t] == ["${{ github.sha }}", "${{ steps.version.outputs.version }}"]
    values, chart = yaml.safe_load((CHART / "values.yaml").read_text()), yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert values["image"]["tag"] == chart["appVersion"] == VERSION
    for i in matrix: assert not i["target"] or re.search(rf"^FROM \S+ AS {i['target']}$", (DEPLOY / f"docker/{i['file']}.Dockerfile").read_text(), re.M)
    assert {i["file"] for i in matrix if i["image"] in ("page", "watch")} == {"vit"} and all((DEPLOY / f"docker/requirements/{i['image']}.lock").is_file() for i in matrix if i["file"] == "vit")


def test_package_builds_each_image(stand_in, tmp_path):
    env = stand_in(docker="exit 0") | {"CYCLONEDX": "true", "REGISTRY": "r.example"}
    good(run(DEPLOY / "ci/package.sh", "llm-cuda", "page", "train", env=env))
    built = [c for c in stand_in.calls().splitlines() if " build " in c]
    assert ["--file deploy/docker/llm.Dockerfile --target cuda " in built[0], "--file deploy/docker/vit.Dockerfile --target  --build-arg LOCK=page" in built[1], "train.Dockerfile --target cuda" in built[2]] == [True] * 3, built
    assert all(f":{VERSION} " in c for c in built) and "--tag r.example/cxr-pred-llm-cuda:" in built[0]


def test_bills_of_materials_are_whole(tmp_path):
    checker("cyclonedx-py")
    good(run(DEPLOY / "ci/sbom.sh", tmp_path, "train", "llm-cpu"))
    has = {n: {c["name"] for c in json.loads((tmp_path / f"{n}.cdx.json").read_text())["components"]} for n in ("train", "llm-cpu")}
    # every lock that a Dockerfile installs into the environment of its image, and each package once
    parts = json.loads((tmp_path / "train.cdx.json").read_text())["components"]
    assert len(parts) == len({c["name"] for c in parts})
    installed = re.findall(r"install --no-cache-dir --require-hashes .*-r /tmp/([\w-]+\.lock)", (DEPLOY / "docker/train.Dockerfile").read_text())
    assert installed == ["build.lock", "train-common.lock", "train-cuda.lock"] and {p.split("==")[0] for l in installed for p in pins(DEPLOY / "docker/requirements" / l)} <= {c["name"] for c in parts} | {p.split("==")[0] for p in pins(DEPLOY / "docker/requirements/train-common.lock") if "[" in p}
    assert {"torch", "nvidia-cudnn-cu13", "lightning", "wheel"} <= has["train"] and "torch" in has["llm-cpu"] and not [n for n in has["llm-cpu"] if n.startswith("nvidia")]
    whole, part = pins(DEPLOY / "checks/requirements.lock"), pins(DEPLOY / "checks/requirements.sbom.lock")
    assert any(p.startswith("cyclonedx-bom==") for p in part) and all(part[p] == whole.get(p) for p in part), "deploy/checks/requirements.sbom.lock is a part of requirements.lock"


def test_every_make_has_its_python():
    "The Makefile wants Python 3.11, and `sudo` drops the path where a runner keeps it."
    python = re.search(r"^ARG PYTHON=(\S+)$", (DEPLOY / "docker/vit.Dockerfile").read_text(), re.M)[1]
    made = 0
    for flow in FLOWS.values():
        for name, job in flow["jobs"].items():
            runs = "\n".join(s.get("run", "") for s in job.get("steps", []))
            assert "sudo make" not in runs, name
            if not re.search(r"^\s*make ", runs, re.M) or "self-hosted" in job["runs-on"]: continue
            made += 1
            assert job["container"]["image"] == python and "apt-get install" in job["steps"][0]["run"] and " git " in job["steps"][0]["run"], name
        for job in flow["jobs"].values():
            for s in job.get("steps", []):
                if s.get("uses", "").startswith("azure/setup-helm@"): assert re.fullmatch(r"v3\.\d+\.\d+", s["with"]["version"]), "Helm 4 has other options"
    assert made == 2
    package = FLOWS["delivery.yml"]["jobs"]["package"]["steps"]
    assert any(s.get("with", {}).get("python-version") == "3.11" for s in package) and "requirements.sbom.lock" in "\n".join(s.get("run", "") for s in package)


def test_training_step_is_on_ray():
    step = next(s for s in FLOWS["training.yml"]["jobs"]["train"]["steps"] if "ray job submit" in s.get("run", ""))["run"]
    assert {"launcher=ray", "strategy=ddp"} <= set(re.findall(r"-S \"\$of\.(\w+=\w+)\"", step)) and "of=profiles/clinical/params.yaml:train_vit\n" in step and step.index("-S ") < step.index("profiles/clinical/dvc.yaml")
    # one environment for all of it, made before it is used, and by nothing that takes Ray out of it again
    assert step.index("deploy/ray/environment.sh") < step.index(".venv-ray/bin/ray job") and not re.search(r"^\s*make |\.venv/", step, re.M)


def test_ray_s_environment_is_made_once_and_has_ray(tmp_path):
    shutil.copytree(DEPLOY / "docker/requirements", tmp_path / "deploy/docker/requirements"); (tmp_path / "deploy/ray").mkdir()
    shutil.copy(DEPLOY / "ray/environment.sh", tmp_path / "deploy/ray")
    for f in ("setup.py", "settings.ini"): shutil.copy(ROOT / f, tmp_path)
    # -m venv makes a python that writes down what it is told
    (tmp_path / "python").write_text(f'#!/bin/sh\nmkdir -p "$3/bin" && printf \'#!/bin/sh\\necho "$@" >> {tmp_path}/calls\\nexit ${{PIP_FAILS:-0}}\\n\' > "$3/bin/python" && chmod +x "$3/bin/python"\n'); (tmp_path / "python").chmod(0o755)
    calls = lambda: (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    make = lambda **env: run(tmp_path / "deploy/ray/environment.sh", env=os.environ | {"PYTHON": str(tmp_path / "python")} | env, cwd=tmp_path)
    assert make(PIP_FAILS="1").returncode != 0 and not (tmp_path / ".venv-ray/.of").exists(), "half an environment is made again"
    (tmp_path / "calls").unlink(); good(make())
    locks = [re.search(r"--requirement (\S+)", c)[1] for c in calls() if "--requirement" in c]
    assert len(calls()) == 4 and calls()[-1].endswith("--editable .") and all("--require-hashes" in c for c in calls()[:-1])
    own = {p for l in locks for p in pins(tmp_path / l)}
    assert {p.split("==")[0] for p in own} >= {"ray", "torch", "dvc", "lightning", "mlflow", "papermill"} and all(p in own for p in pins(DEPLOY / "docker/requirements/train-cuda.lock"))
    good(make()); assert len(calls()) == 4, "nothing has changed"
    (tmp_path / locks[1]).write_text((tmp_path / locks[1]).read_text() + "\n"); good(make()); assert len(calls()) == 8


def test_a_model_is_delivered_by_a_merge_and_nothing_else():
    "What a schedule trained and the next push packaged would else be two models, and the gate would compare with a third."
    training, delivery = FLOWS["training.yml"], FLOWS["delivery.yml"]
    assert set(delivery[True]) == {"push", "workflow_dispatch"} and "schedule" in training[True] and not {"package", "staging", "canary", "production"} & set(training["jobs"])
    for flow in (delivery,): assert not [s for j in flow["jobs"].values() for s in j.get("steps", []) if "trained" in json.dumps(s)], "the bundle is the commit's"
    offer = training["jobs"]["offer"]; said = [s.get("run", "") for s in offer["steps"]]
    gate, push = (next(i for i, r in enumerate(said) if w in r) for w in ("deploy/ci/gate.sh", "git push"))
    assert gate < push and offer["steps"][push]["if"] == "steps.gate.outputs.good == 'true'" and '"HEAD:refs/heads/$BRANCH"' in said[push] and offer["steps"][push]["env"]["BRANCH"].startswith("trained/")
    assert offer["needs"] == "train" and [n for n, j in training["jobs"].items() if (j.get("permissions") or {}).get("contents") == "write"] == ["offer"]
    assert "fetch-depth" in json.dumps(FLOWS["model.yml"]["jobs"]["gate"]) and set(FLOWS["model.yml"][True]) == {"pull_request"}
    assert not [n for n, j in FLOWS["commit.yml"]["jobs"].items() if "if" in j], "delivery calls it: a job that is left out could have all that follows left out"
    measure = next(s["run"] for s in delivery["jobs"]["gate"]["steps"] if "gate.sh" in s.get("run", ""))
    assert "--status success" in measure and "--branch main" in measure, "held against what was delivered, not against what was halted"


def test_what_was_trained_travels_as_a_patch(tmp_path):
    "The workflow's own steps, with stand-ins for Ray and the training: what the branch holds, and what it does not."
    home, work, offer, runner = (tmp_path / n for n in ("home", "work", "offer", "runner")); home.mkdir(); runner.mkdir()
    step = lambda job, word: next(s["run"] for s in FLOWS["training.yml"]["jobs"][job]["steps"] if word in s.get("run", ""))
    git = lambda where, *a: good(run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=main", *a, cwd=where)).strip()
    gates = lambda gap: json.dumps({"gates": [{"name": "gap by sex", "value": gap, "threshold": 0.1, "wants": "at most", "passed": gap <= 0.1, "action": "report"}]})
    for f, text in {"models/release/vit.int8.onnx": "old", "models/release/gone.json": "{}", "models/release/metrics/gates.json": gates(0.05), "runs/clinical/metrics/gates.json": gates(0.05), "runs/clinical/plots/curve.csv": "1",
                    "profiles/clinical/dvc.lock": "1", "profiles/clinical/params.yaml": "train_vit: {launcher: local}\n", "deploy/ray/environment.sh": "#!/bin/sh\n", ".gitignore": "/.venv-ray\n"}.items():
        (home / f).parent.mkdir(parents=True, exist_ok=True); (home / f).write_text(text)
    (home / "deploy/ray/environment.sh").chmod(0o755); (home / "deploy/ci").mkdir()
    for f in ("gate.sh", "gate.py"): shutil.copy(DEPLOY / "ci" / f, home / "deploy/ci")
    git(home, "init", "--quiet"); git(home, "add", "--all"); git(home, "commit", "--quiet", "--message", "x"); head = git(home, "rev-parse", "HEAD")
    for folder in (work, offer): git(tmp_path, "clone", "--quiet", str(home), str(folder))
    (work / ".venv-ray/bin").mkdir(parents=True)
    trained = lambda gap: {"ray": f"printf '%s' '{gates(gap)}' > runs/clinical/metrics/gates.json; echo 2 > profiles/clinical/dvc.lock; echo 'train_vit: {{launcher: ray}}' > profiles/clinical/params.yaml; echo \"$@\" > {tmp_path}/submitted",
                           "python": "cp runs/clinical/metrics/gates.json models/release/metrics/; printf 'new\\000' > models/release/vit.int8.onnx; rm -f models/release/gone.json; echo x > models/release/came.json"}
    def train(gap):
        for name, says in trained(gap).items(): (work / f".venv-ray/bin/{name}").write_text(f"#!/bin/sh\n{says}\n"); (work / f".venv-ray/bin/{name}").chmod(0o755)
        good(run("bash", "-eo", "pipefail", "-c", step("train", "ray job submit"), cwd=runner, env=os.environ | {"WORK": str(work), "GITHUB_SHA": head, "RAY_ADDRESS": "http://r:8265", "TRAIN_WORKERS": "3"}))
        git(offer, "reset", "--quiet", "--hard", head); git(offer, "clean", "-qfd"); (runner / "out").write_text("")
        return run("bash", "-eo", "pipefail", "-c", step("offer", "gate.sh"), cwd=offer, env=os.environ | {"TRAINED": str(runner / "trained.patch"), "GITHUB_SHA": head, "GITHUB_STEP_SUMMARY": str(runner / "summary"), "GITHUB_OUTPUT": str(runner / "out")})
    worse = train(0.3); assert worse.returncode == 3 and (runner / "out").read_text() == "" and "gap by sex was 0.05" in (runner / "summary").read_text(), "no branch is offered"
    good(train(0.04)); assert "good=true" in (runner / "out").read_text() and "train_vit.devices=3" in (tmp_path / "submitted").read_text()
    assert set(git(offer, "diff", "--cached", "--name-only").split()) == {"models/release/vit.int8.onnx", "models/release/gone.json", "models/release/came.json", "models/release/metrics/gates.json", "runs/clinical/metrics/gates.json", "profiles/clinical/dvc.lock"}
    assert (offer / "models/release/vit.int8.onnx").read_bytes() == b"new\0" and "local" in (offer / "profiles/clinical/params.yaml").read_text()
    (runner / "trained.patch").write_text(""); git(offer, "reset", "--quiet", "--hard", head); (runner / "out").write_text("")
    assert "changed nothing" in good(run("bash", "-eo", "pipefail", "-c", step("offer", "gate.sh"), cwd=offer, env=os.environ | {"TRAINED": str(runner / "trained.patch"), "GITHUB_STEP_SUMMARY": str(runner / "summary"), "GITHUB_OUTPUT": str(runner / "out")})) and (runner / "out").read_text() == ""


def test_gate_of_a_commit_is_held_against_the_model_before(tmp_path):
    (tmp_path / "deploy/ci").mkdir(parents=True)
    for f in ("gate.sh", "gate.py"): shutil.copy(DEPLOY / "ci" / f, tmp_path / "deploy/ci")
    git = lambda *a: good(run("git", "-c", "user.name=t", "-c", "user.email=t@localhost", *a, cwd=tmp_path)).strip()
    def commit(gap, bundle=None):
        for folder, value in (("runs/clinical/metrics", gap), ("models/release/metrics", gap if bundle is None else bundle)):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / "gates.json").write_text(json.dumps({"gates": [{"name": "gap by sex", "value": value, "threshold": 0.1, "wants": "at most", "passed": value <= 0.1, "action": "report"}]}))
        git("add", "--all"); git("commit", "--quiet", "--message", "x"); return git("rev-parse", "HEAD")
    gate = lambda *before: run(tmp_path / "deploy/ci/gate.sh", *before, cwd=tmp_path)
    git("init", "--quiet")
    first = commit(0.05); good(gate()); good(gate(first))
    worse = commit(0.3); r = gate(first)
    assert r.returncode == 3 and "gap by sex was 0.05, within its limit, and is 0.3" in r.stdout
    commit(0.31); assert gate(first).returncode == 3 and gate(worse).returncode == 0
    unknown = gate("0" * 40); assert unknown.returncode == 0 and "is not here" in unknown.stderr
    commit(0.05, bundle=0.04); r = gate(first); assert r.returncode == 3 and "was not made by the run" in r.stderr


def test_lint_finds_a_name_that_nobody_defined(tmp_path):
    ruff = shutil.which("ruff", path=f"{ROOT / '.venv-deploy/bin'}:{os.environ['PATH']}") or pytest.skip("the linter is not here: make deploy-checks")
    lint = lambda *paths: run(ruff, "check", "--no-cache", "--config", DEPLOY / "checks/ruff.toml", *paths)
    good(lint(*re.search(r"ruff\.toml (.+)$", (DEPLOY / "ci/lint.sh").read_text(), re.M)[1].split()))
    (tmp_path / "wrong.py").write_text("def f(): return undefined_here\n")
    assert lint(tmp_path).returncode == 1 and "F821" in lint(tmp_path).stdout


def test_gate_halts_where_a_group_fares_worse(tmp_path):
    gap = lambda value, passed: {"name": "gap by sex", "value": value, "threshold": 0.1, "wants": "at most", "passed": passed, "action": "report"}
    def judged(new, old):
        for name, g in (("new", new), ("old", old)): (tmp_path / name).mkdir(exist_ok=True); (tmp_path / name / "gates.json").write_text(json.dumps({"gates": [g] if g else []}))
        return run(sys.executable, DEPLOY / "ci/gate.py", tmp_path / "new", tmp_path / "old")
    missing = gap(None, "not measured")
    for new, old, code in ((gap(0.09, True), gap(0.02, True), 0), (gap(0.12, False), gap(0.09, True), 3), (gap(0.2, False), gap(0.17, False), 0), (gap(0.23, False), gap(0.17, False), 3),
                           (missing, gap(0.09, True), 3), (None, gap(0.09, True), 3), (missing, missing, 0), (gap(0.4, False), missing, 0)):
        r = judged(new, old)
        assert r.returncode == code and ("Halt: gap by sex was" in r.stdout) == (code == 3), (new, old, r.stdout)
    assert run(sys.executable, DEPLOY / "ci/gate.py", tmp_path / "new", tmp_path / "nowhere").returncode == 3
    good(run(DEPLOY / "ci/gate.sh"))   # of the commit that is here


def test_load_test_counts_refusals(rendered):
    sys.path.insert(0, str(DEPLOY / "ci"))
    try: import load
    finally: sys.path.pop(0)
    refused = load.verdict([(0.2, 200)] * 600 + [(0.001, 429)] * 1400, 300, 0.01)
    assert not refused["passed"] and refused["refused_ratio"] == 0.7 and refused["failure_ratio"] == 0 and refused["p50_ms"] == 200, "an answer that was none is not a quick one"
    assert load.verdict([(0.2, 200)] * 990 + [(0.001, 415)] * 10, 300, 0.01)["passed"] and not load.verdict([(0.001, 401)] * 10, 300, 0.01)["passed"]
    assert load.verdict([(0.4, 200)] * 2 + [(0.1, 200)] * 98, 300, 0.01)["p99_ms"] == 400
    # and the readers of staging let the whole test through
    load_step = next(s["run"] for s in FLOWS["delivery.yml"]["jobs"]["staging"]["steps"] if "load.py" in s.get("run", ""))
    env = {v["name"]: v["value"] for v in pods(rendered["staging"])["cxr-vit"]["containers"][0]["env"]}
    assert int(env["CXR_FILMS_PER_MINUTE"]) / int(env["CXR_INSTANCES"]) > int(re.search(r"--requests (\d+)", load_step)[1])


CLUSTER = """case "$*" in
  *metadata.generation*) head -n 1 "{d}/says"; [ "$(wc -l < "{d}/says")" -lt 2 ] || sed -i 1d "{d}/says" ;;
  *currentBackgroundAnalysisRunStatus*) cat "{d}/analysis" ;;
  *"get analysisrun run-7"*) cat "{d}/run.json" ;;
esac"""   # kubectl: the next phase that was told, the last of them for ever; the analysis beside it


@pytest.fixture
def canary(stand_in, tmp_path):
    "rollout.sh on a stand-in for kubectl: `canary(do, *phases)` gives its exit status."
    if shutil.which("jq") is None: pytest.skip("jq is not here")
    env = stand_in(kubectl=CLUSTER.format(d=tmp_path)) | {"EVERY_S": "0", "WAIT_MINUTES": "4", "WATCH_MINUTES": "2"}
    def ended(do, *said, analysis="Running", answered={"latency": 20, "failures": 20, "drift": 20}):
        (tmp_path / "says").write_text("\n".join(said) + "\n"); (tmp_path / "analysis").write_text(f"{analysis} run-7" if analysis else "")
        (tmp_path / "run.json").write_text(json.dumps({"spec": {"metrics": [{"name": n} for n in ("latency", "failures", "drift")]}, "status": {"metricResults": [{"name": n, "inconclusive": 25} | ({"successful": k} if k else {}) for n, k in answered.items()]}}))
        ended.last = run(DEPLOY / "ci/rollout.sh", do, env=env); return ended.last.returncode
    ended.patched = lambda: [c for c in stand_in.calls().splitlines() if " patch " in c]
    return ended


def test_rollout_is_waited_for(canary):
    "What the controller says of the specification before is no answer."
    assert canary("wait", "3 2 Healthy", "3 3 Progressing", "3 3 Paused") == 0
    assert canary("wait", "3 2 Healthy") == 4, "nobody has looked at it"
    assert canary("wait", "3 2 Degraded", "3 3 Degraded") == 4 and canary("wait", "") == 4
    assert canary("finish", "3 3 Paused", "3 3 Progressing", "3 3 Healthy") == 0 and canary("finish", "3 3 Paused") == 4, "still paused is not done"
    assert canary("abort", "3 3 Paused") == 0 and '"abort": true' in canary.patched()[-1] and canary("nonsense", "") == 2
    give = "\n".join(s.get("run", "") for s in FLOWS["delivery.yml"]["jobs"]["production"]["steps"])
    assert give.index("promote") < give.index("rollout.sh finish") < give.index("upgrade production")


def test_a_canary_that_was_not_judged_goes_back(canary):
    "An analysis without a result leaves the Rollout paused, as a good one does."
    assert canary("watch", "3 3 Paused") == 0 and canary("watch", "3 3 Paused", "3 3 Degraded") == 4
    assert canary("watch", "3 3 Healthy", analysis="") == 0, "the same version again: there is no canary"
    for ended in ("Inconclusive", "Failed", "Error"): assert canary("watch", "3 3 Paused", analysis=ended) == 4 and ended in canary.last.stderr
    assert canary("watch", "3 3 Paused", analysis="") == 4 and "no analysis" in canary.last.stderr
    assert canary("watch", "3 3 Paused", answered={"latency": 0, "failures": 0, "drift": 20}) == 4 and "no figure for latency, failures" in canary.last.stderr, "it read nothing for half an hour"
    assert canary("watch", "3 3 Paused", answered={}) == 4
    # and nothing that went wrong is promoted, nor what reads all films
    assert canary("promote", "3 3 Degraded") == 4 and canary("promote", "3 3 Healthy") == 0 and not canary.patched()
    assert canary("promote", "3 3 Paused") == 0 and '"promoteFull": true' in canary.patched()[-1]


def test_release_installs_and_goes_back(stand_in, tmp_path):
    if shutil.which("jq") is None: pytest.skip("jq is not here")
    project = tmp_path / "project"
    (project / "deploy/ci").mkdir(parents=True); shutil.copy(DEPLOY / "ci/release.sh", project / "deploy/ci")
    for i, image in enumerate(sorted(IMAGES)): (project / "package" / image).mkdir(parents=True); (project / "package" / image / "digest").write_text(f"sha256:{i:064}\n")
    history = [{"revision": 4, "status": "superseded"}, {"revision": 5, "status": "deployed"}, {"revision": 6, "status": "failed"}]
    env = stand_in(helm=f"""case "$*" in history*) echo '{json.dumps(history)}' ;; "get values"*) echo '{{"page": {{"digest": "sha256:old"}}}}' ;; esac""") | {"REGISTRY": "r.example", "HOST": "h.example", "SIGNER": "nobody"}
    release = lambda *args, **more: run(project / "deploy/ci/release.sh", *args, env=env | more)
    told = lambda: dict(w.split("=", 1) for w in stand_in.calls().splitlines()[-1].split() if "digest=" in w or "hostname=" in w)
    good(release("upgrade", "production"))
    assert told() == {"gateway.hostname": "h.example"} | {f"{k}.digest": f"sha256:{sorted(IMAGES).index('cxr-pred-' + v):064}" for k, v in (("vit", "vit"), ("watch", "watch"), ("page", "page"), ("llm", "llm-cuda"), ("training", "train"))}
    assert "--namespace cxr " in stand_in.calls().splitlines()[-1] and "values-canary" not in stand_in.calls()
    new = told()
    good(release("upgrade", "canary", VALUES="/etc/hospital.yaml"))
    files = re.findall(r"--values (\S+)", stand_in.calls().splitlines()[-1])
    assert [Path(f).name for f in files] == ["values-production.yaml", "values-canary.yaml", "hospital.yaml"], "the hospital's word is the last"
    assert told() == new | {"page.digest": "sha256:old"}, "the page reads all films that are handed in there: it is no canary"
    good(release("upgrade", "staging", "--atomic"))
    assert told() == new and "--namespace cxr-staging" in stand_in.calls().splitlines()[-1] and "--atomic" in stand_in.calls().splitlines()[-1]
    assert good(release("revision", "cxr")).strip() == "5"
    good(release("still", "cxr", "5")); gone = release("still", "cxr", "4")
    assert gone.returncode == 4 and "Revision 5 runs in cxr, not 4" in gone.stderr
    canary, given = FLOWS["delivery.yml"]["jobs"]["canary"], [s.get("run", "") for s in FLOWS["delivery.yml"]["jobs"]["production"]["steps"]]
    asked, promoted = (next(i for i, r in enumerate(given) if w in r) for w in ("release.sh still", "rollout.sh promote"))
    assert canary["outputs"] == {"revision": "${{ steps.give.outputs.revision }}", "before": "${{ steps.before.outputs.revision }}"} and asked < promoted, "a step of its own: what somebody took away is not taken back once more"
    back = FLOWS["delivery.yml"]["jobs"]["not-given"]
    assert "production.result != 'success'" in back["if"] and set(back["needs"]) == {"canary", "production"} and "release.sh back cxr" in back["steps"][-1]["run"], "a tenth that nobody approved is no tenth for good"
    good(release("back", "cxr", "6")); assert "rollback" not in stand_in.calls(), "it still runs"
    good(release("back", "cxr", "0")); assert "rollback" not in stand_in.calls()
    good(release("back", "cxr", "5")); assert "helm rollback cxr 5 --namespace cxr " in stand_in.calls()
    # an image that the delivery did not sign is not installed, nor one of which nobody has said who signs
    n, unsaid = len(stand_in.calls().splitlines()), release("upgrade", "production", SIGNER="")
    assert unsaid.returncode == 2 and "SIGNER is not set" in unsaid.stderr and len(stand_in.calls().splitlines()) == n
    stand_in(cosign="")
    asked = release("upgrade", "production", SIGNER="https://github.com/o/r/.github/workflows/delivery.yml@refs/heads/main")
    good(asked); calls = stand_in.calls().splitlines()[-2 - len(IMAGES):]
    assert {re.search(r"r\.example/([\w-]+)@sha256:", c)[1] for c in calls[:-2]} == set(IMAGES) and all("verify --certificate-identity https://github.com/o/r/" in c for c in calls[:-2]) and calls[-1].startswith("helm upgrade")
    assert calls[-2].startswith("cosign verify-blob --certificate-identity https://github.com/o/r/") and calls[-2].endswith("--bundle package/bundle/manifest.sigstore.json models/release/manifest.json")
    # the images are signed and the bundle is not
    n, unsealed = len(stand_in.calls().splitlines()), run(project / "deploy/ci/release.sh", "upgrade", "production", env=stand_in(cosign='[ "$1" != verify-blob ]') | {"REGISTRY": "r.example", "HOST": "h.example", "SIGNER": "https://github.com/o/r/.github/workflows/delivery.yml@refs/heads/main"})
    assert unsealed.returncode == 3 and "bundle is not installed" in unsealed.stderr and "helm" not in "".join(stand_in.calls().splitlines()[n:])
    packed = FLOWS["delivery.yml"]["jobs"]["package"]["steps"]
    sealing, = [s for s in packed if "sign-blob" in s.get("run", "")]
    assert sealing["if"] == "matrix.image == 'vit'" and "--bundle package/bundle/manifest.sigstore.json models/release/manifest.json" in sealing["run"] and packed.index(sealing) < next(i for i, s in enumerate(packed) if "upload-artifact" in s.get("uses", "")), "once, and where release.sh looks"
    n, refused = len(stand_in.calls().splitlines()), run(project / "deploy/ci/release.sh", "upgrade", "production", env=stand_in(cosign="exit 1") | {"REGISTRY": "r.example", "HOST": "h.example", "SIGNER": "https://github.com/o/r/.github/workflows/delivery.yml@refs/heads/main"})
    assert refused.returncode == 3 and "is not signed by" in refused.stderr and "helm" not in "".join(stand_in.calls().splitlines()[n:])
    assert FLOWS["delivery.yml"]["env"]["SIGNER"] == "https://github.com/${{ github.workflow_ref }}"
    assert release("upgrade", "moon").returncode == 2 and release().returncode == 2
    assert good(run(project / "deploy/ci/release.sh", "revision", "cxr", env=stand_in(helm="exit 1"))).strip() == "0"
    # the chart knows every value that is set
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert all(k.split(".")[1] in values[k.split(".")[0]] for k in new)


HELM = """case "$1 $2" in
  "history cxr") echo "$HISTORY" ;;
  "get values") echo "$VALUES_OF" | jq --arg n "$(echo "$*" | sed 's/.*--revision \\([0-9]*\\).*/\\1/')" '.[$n]' ;;
  "get manifest") echo "kind: $KIND" ;;
esac"""


def test_going_back_finds_the_version_before(stand_in, tmp_path):
    "Each delivery leaves two revisions of one version: a canary's and production's."
    if shutil.which("jq") is None: pytest.skip("jq is not here")
    stand_in(helm=HELM)
    (tmp_path / "says").write_text("9 9 Paused\n9 9 Paused\n9 9 Healthy\n"); (tmp_path / "analysis").write_text("")
    def back(*history, where="production", to=(), kind="Rollout"):
        "History as (environment, version[, status]) from revision 1 on; the revision that Helm is told, 0 for none."
        values = {str(n): {"environment": e, "vit": {"digest": f"sha256:{v}"}, "page": {"digest": f"sha256:{v if e == 'production' else 'old'}"}} for n, (e, v, *_) in enumerate(history, 1)}
        told = [{"revision": n, "status": (h[2:] or ("superseded",))[0]} for n, h in enumerate(history, 1)]
        if len(history[-1]) == 2: told[-1]["status"] = "deployed"
        before = len(stand_in.calls().splitlines())
        (tmp_path / "says").write_text("9 9 Paused\n9 9 Paused\n9 9 Healthy\n")
        back.last = run(DEPLOY / "ci/release.sh", "rollback", where, *to, env=stand_in(kubectl=CLUSTER.format(d=tmp_path)) | {"HISTORY": json.dumps(told), "VALUES_OF": json.dumps(values), "KIND": kind, "EVERY_S": "0"})
        back.calls = stand_in.calls().splitlines()[before:]
        return next((int(c.split()[3]) for c in back.calls if c.startswith("helm rollback cxr ")), 0)
    c, p = "canary", "production"
    two = [(p, "a"), (c, "b"), (p, "b")]
    assert back(*two) == 1, "not 2, which is the canary of what runs"
    assert back.last.returncode == 0 and any("promoteFull" in k for k in back.calls), "an older manifest would go through the steps again, a canary's halt at its share"
    assert back(*two, (c, "c")) == 3, "a canary is under way"
    assert back(*two, (c, "c"), (p, "b"), (c, "d"), (p, "d")) == 5, "what a canary was taken back to is production's"
    assert back(*two, (p, "c", "failed"), (c, "d"), (p, "d")) == 3, "a revision that never ran is none to go back to"
    assert back((p, "z"), *two, (p, "a")) == 1, "who goes back twice goes further back, not forward"
    assert back((p, "a"), (c, "b"), (p, "b"), (p, "a")) == 0 and back.last.returncode == 1 and "name a revision" in back.last.stderr
    assert back(*two, to=("2",)) == 2 and any("promoteFull" in k for k in back.calls)
    assert back(("staging", "a"), ("staging", "b"), where="staging", kind="Deployment") == 1 and "--namespace cxr-staging" in " ".join(back.calls) and not [k for k in back.calls if k.startswith("kubectl")]
    assert back(*two, where="moon") == 0 and back.last.returncode == 2 and back(*two, to=("-1",)) == 0 and back.last.returncode == 2
    step = FLOWS["rollback.yml"]["jobs"]["rollback"]["steps"][-1]["run"]
    assert 'deploy/ci/release.sh rollback "$WHERE" "$REVISION"' in step and "helm rollback" not in step
    assert FLOWS["rollback.yml"][True]["workflow_dispatch"]["inputs"]["revision"]["default"] == 0
    assert int(re.search(r"--history-max (\d+)", (DEPLOY / "ci/release.sh").read_text())[1]) >= 40, "two revisions a delivery, and two a canary that went back"


def test_gpu_memory_asks_for_one_more(stand_in):
    if shutil.which("jq") is None: pytest.skip("jq is not here")
    answer = lambda value: f"""echo '{{"data": {{"result": [{value}]}}}}'"""
    def ask(value, least="2", most="4", curl=None): return run(DEPLOY / "ci/gpu_memory.sh", "http://p:9090", "cxr-staging", env=stand_in(curl=curl or answer(value), kubectl=f"case \"$*\" in *minReplica*patch*) ;; *spec.minReplicaCount*) printf '{least}' ;; *spec.maxReplicaCount*) printf '{most}' ;; esac"))
    assert "not measured" in good(ask("")) and "kubectl" not in stand_in.calls()
    assert ask("", curl="exit 7").returncode == 7, "a Prometheus that is gone measures nothing, and passes nothing"
    good(ask('{"value": [0, "79.9"]}')); assert "patch" not in stand_in.calls()
    for least in ("4", "5"): full = ask('{"value": [0, "80.1"]}', least); assert full.returncode == 4 and "no room for one more" in full.stderr and "patch" not in stand_in.calls()
    good(ask('{"value": [0, "80.1"]}', "3")); assert '{"spec": {"minReplicaCount": 4}}' in stand_in.calls()
    good(ask('{"value": [0, "95"]}', "", "")); assert '{"spec": {"minReplicaCount": 1}}' in stand_in.calls()


# ---- what is written about it

def test_readme_installs_what_the_chart_has(rendered):
    text = (DEPLOY / "README.md").read_text()
    command = re.search(r"helm upgrade --install cxr .*?(?=\n```|\n\n)", text, re.S)[0]
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for path in re.findall(r"--set ([\w.]+)=", command):
        at = values
        for key in path.split("."): assert key in at, path; at = at[key]
    for name in ("vit", "page", "watch", "llm"): assert f"{name}.digest" in command, "the tag of a version moves, a digest does not"
    for key in re.findall(r"`((?:gateway|page|network|training|secrets|service)\.[\w.]+)`", text):
        at = values
        for part in key.split("."): assert part in at, key; at = at[part]


def test_the_guides_go_back_as_the_scripts_do():
    for guide in (DEPLOY / "README.md", ROOT / "docs/operator.md"):
        typed = re.findall(r"release\.sh rollback(?: (\w+))?(?: (\d+))?", guide.read_text())
        assert {("production", ""), ("production", "12")} <= set(typed) and {w for w, _ in typed} <= {"production", "staging"}, guide.name
        assert not re.search(r"^helm rollback", guide.read_text(), re.M), f"{guide.name}: the revision before is the canary of what runs"
    words = run(DEPLOY / "ci/release.sh").stderr
    assert "rollback production|staging [REVISION]" in words
