"The schedules of deploy/airflow: each file parses, each command is one that the project has, and Airflow itself runs them."
import ast, http.server, json, os, re, subprocess, sys, threading
from pathlib import Path

import pytest
import yaml

from cxr_pred.core import root

ROOT = root()
DAGS, AIRFLOW = sorted((ROOT / "deploy/airflow/dags").glob("*.py")), ROOT / ".venv-airflow/bin/airflow"
slow = pytest.mark.skipif(not os.environ.get("CXR_SLOW"), reason="slow: make test-all")


def commands(path: Path) -> list[str]:
    "Every string of the file that is a command; what is put into it is an x."
    parts = lambda node: "".join(v.value if isinstance(v, ast.Constant) else "x" for v in node.values)
    nodes = list(ast.walk(ast.parse(path.read_text())))
    inside = {id(v) for n in nodes if isinstance(n, ast.JoinedStr) for v in n.values}
    texts = [parts(n) if isinstance(n, ast.JoinedStr) else n.value for n in nodes if isinstance(n, ast.JoinedStr) or isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in inside]
    return [t for t in texts if t.startswith(("cxr-pred ", "dvc ", "make "))]


def test_the_files_parse_and_name_commands_that_there_are():
    from typer.main import get_command
    from cxr_pred.cli import cli
    have, found = get_command(cli).commands, [c for p in DAGS for c in commands(p)]
    assert len(found) >= 5
    for line in found:
        program, name, *rest = line.split()
        if program == "dvc": assert name == "repro" and rest[-1].rpartition(":")[2] in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"], line
        else:
            assert name in have, line
            assert set(re.findall(r"--[a-z-]+", line)) <= {o for p in have[name].params for o in p.opts + p.secondary_opts}, line


def schedules() -> dict:
    "SCHEDULES of the file, without Airflow: name, (cron, retries, tasks)."
    made = next(n for n in ast.parse(DAGS[0].read_text()).body if isinstance(n, ast.Assign) and n.targets[0].id == "SCHEDULES")
    return eval(compile(ast.Expression(made.value), "SCHEDULES", "eval"), {"PIPELINE": "dvc.yaml", "PROFILE": "sample", "LAST_HOUR": ""})


def test_a_command_that_may_say_no_is_not_tried_again():
    "Exit status 3 tried again would show a drift twice, and a refused retraining as green."
    for name, (cron, retries, tasks) in schedules().items():
        may = [t for t, command in tasks if command.split()[1] in ("drift", "retrain")]
        assert (retries == 0) is bool(may) and (not may or len(tasks) == 1), name
    assert schedules()["cxr_retrain"][0].split()[2:] == ["*", "*", "*"], "every day"


def test_the_versions_agree():
    lock = (ROOT / "deploy/airflow/requirements.lock").read_text()
    wanted = re.fullmatch(r"apache-airflow==([\d.]+)\n", (ROOT / "deploy/airflow/requirements.in").read_text())[1]
    assert f"\napache-airflow=={wanted} \\" in "\n" + lock and lock.count("--hash=sha256:") > 500
    compose = yaml.safe_load((ROOT / "deploy/compose/compose.yaml").read_text())
    assert compose["x-airflow"]["image"] == f"apache/airflow:{wanted}-python3.11"
    assert compose["x-airflow"]["environment"]["RAY_ADDRESS"] == "http://ray-head:8265" and "ray_auth_token" in compose["x-airflow"]["secrets"]


@pytest.fixture(scope="module")
def airflow(tmp_path_factory):
    "Airflow with a database of its own; a function that runs one of its commands."
    if not AIRFLOW.exists(): pytest.skip("Airflow is not here: make airflow-checks")
    d = tmp_path_factory.mktemp("airflow")
    (d / "bin").mkdir(); project = d / "project"; (project / ".venv/bin").mkdir(parents=True)
    for name in ("cxr-pred", "dvc"):   # stand-ins write down what they are asked for
        (exe := project / ".venv/bin" / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {d}/asked\necho "$PWD" >> {d}/where\ncase "$1" in drift|retrain) [ ! -e {d}/no ] || exit 3;; esac\n'); exe.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "RAY_", "CXR_"))} | {"AIRFLOW_HOME": str(d), "CXR_ROOT": str(project), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "deploy/airflow/dags"), "PYTHONDONTWRITEBYTECODE": "1", "NO_PROXY": "*"}
    def run(*args, **more): return subprocess.run([AIRFLOW, *args], env=env | more, cwd=d, capture_output=True, text=True, timeout=500)
    made = run("db", "migrate"); assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return run, d


@slow
def test_airflow_reads_all_of_them(airflow):
    run, d = airflow
    errors = run("dags", "list-import-errors", "--local", "-o", "json"); assert errors.returncode == 0 and "Traceback" not in errors.stdout, errors.stdout + errors.stderr[-2000:]
    listed = run("dags", "list", "--local", "-o", "json")
    found = {r["dag_id"] for r in json.loads(listed.stdout[re.search(r"\[\s*\{", listed.stdout).start():])}
    assert found == {"cxr_nightly", "cxr_retrain", "cxr_hourly_drift", "cxr_hourly_figures"}, listed.stdout + listed.stderr[-2000:]


@slow
@pytest.mark.parametrize("dag, asked", [("cxr_nightly", ["dvc repro profiles/clinical/dvc.yaml:etl", "cxr-pred load --profile clinical"]), ("cxr_retrain", ["cxr-pred retrain --profile clinical"]), ("cxr_hourly_figures", ["cxr-pred report-hour 2026-11-27T04"])])
def test_airflow_runs_them(airflow, dag, asked):
    run, d = airflow
    (d / "asked").unlink(missing_ok=True)
    r = run("dags", "test", dag, "2026-11-27T05:10:00+00:00")
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    assert (d / "asked").read_text().splitlines() == asked and set((d / "where").read_text().split()) == {str(d / "project")}


@slow
@pytest.mark.parametrize("dag, command", [("cxr_hourly_drift", "cxr-pred drift --json"), ("cxr_retrain", "cxr-pred retrain --profile clinical")])
def test_a_no_is_a_failed_run_and_is_not_asked_again(airflow, dag, command):
    run, d = airflow
    (d / "asked").unlink(missing_ok=True); (d / "no").touch()
    try: r = run("dags", "test", dag, "2026-11-27T05:05:00+00:00")
    finally: (d / "no").unlink()
    assert "state=failed" in (r.stdout + r.stderr).lower().replace("state:", "state=").replace(" ", "") or r.returncode, r.stdout[-3000:]
    assert (d / "asked").read_text().splitlines() == [command], "once: a second time it might say yes to another question"


@slow
def test_a_cluster_gets_the_command(airflow, tmp_path):
    "RAY_ADDRESS names a stand-in for Ray's job service."
    run, d = airflow
    jobs, states = [], ["PENDING", "SUCCEEDED"]
    class Ray(http.server.BaseHTTPRequestHandler):
        def answer(self, body): self.send_response(200); self.end_headers(); self.wfile.write(json.dumps(body).encode())
        def do_POST(self): jobs.append((self.headers["Authorization"], json.loads(self.rfile.read(int(self.headers["Content-Length"]))))); self.answer({"submission_id": "raysubmit_1"})
        def do_GET(self): self.answer({"status": states.pop(0), "message": ""})
        def log_message(self, *a): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ray); threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "token").write_text("t0ken\n")
    try: r = run("dags", "test", "cxr_retrain", "2026-11-24T18:30:00+00:00", RAY_ADDRESS=f"http://127.0.0.1:{server.server_port}", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    finally: server.shutdown(); server.server_close()
    assert r.returncode == 0 and not states, r.stdout[-3000:] + r.stderr[-3000:]
    assert jobs == [("Bearer t0ken", {"entrypoint": f"cd {d / 'project'} && cxr-pred retrain --profile clinical", "entrypoint_num_cpus": 1})]
