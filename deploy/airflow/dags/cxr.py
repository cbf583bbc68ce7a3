"""What runs by the clock, for Airflow 3: data every night, drift and figures every hour, every day a look whether there is reason to retrain.

Each task is one command of the project. It runs in the project's folder (CXR_ROOT, else /srv/cxr) with its .venv;
where RAY_ADDRESS names a Ray cluster's dashboard, as in compose, it is handed to that cluster, which has the image with the project.
"""
import json, os, time, urllib.request
from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import DAG

ROOT = os.environ.get("CXR_ROOT", "/srv/cxr")
PROFILE = os.environ.get("PROFILE", "clinical")
PIPELINE = "dvc.yaml" if PROFILE == "sample" else f"profiles/{PROFILE}/dvc.yaml"
# the hour before the one that the schedule stands for; a run by hand takes the last full hour
LAST_HOUR = "{{ (logical_date - macros.timedelta(hours=1)).strftime('%Y-%m-%dT%H') if logical_date else '' }}"

# name of the DAG: cron, how often a task that failed is tried again, and its tasks in their order. A task that fails stops what comes after it, and nothing else.
# Exit status 3 says no: something drifted, or a challenger was refused. The task fails, and whoever watches the schedule sees it. Asked again it would
# find the same drift, or no reason to retrain any more, and turn green over what it said; so these two are not tried again: their next hour or day is.
SCHEDULES = {
    "cxr_nightly": ("0 2 * * *", 1, [("etl", f"dvc repro {PIPELINE}:etl"), ("load", f"cxr-pred load --profile {PROFILE}")]),
    # Without reason it ends in seconds; with one it trains. On Tuesdays and Fridays it is half an hour into a block of GPUs (.github/workflows/delivery.yml)
    "cxr_retrain": ("30 18 * * *", 0, [("retrain", f"cxr-pred retrain --profile {PROFILE}")]),
    "cxr_hourly_drift": ("5 * * * *", 0, [("drift", "cxr-pred drift --json")]),
    "cxr_hourly_figures": ("10 * * * *", 1, [("figures", f"cxr-pred report-hour {LAST_HOUR}")]),
}


def ask(path: str, body: dict | None = None) -> dict:
    "Ask Ray's job service."
    headers = {"Content-Type": "application/json"}
    if place := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        with open(place) as f: headers["Authorization"] = f"Bearer {f.read().strip()}"
    request = urllib.request.Request(os.environ["RAY_ADDRESS"] + path, json.dumps(body).encode() if body else None, headers)
    with urllib.request.urlopen(request, timeout=60) as answer: return json.load(answer)


def on_ray(command: str, pause_s: float = 10) -> None:
    "Have a worker run a command, and wait for its end."
    job = ask("/api/jobs/", {"entrypoint": f"cd {ROOT} && {command}", "entrypoint_num_cpus": 1})["submission_id"]
    lost = 0
    while True:   # a question that fails is no job that failed: tried again it would run twice
        try: now, lost = ask(f"/api/jobs/{job}"), 0
        except (OSError, ValueError) as e:
            if (lost := lost + 1) > 60: raise RuntimeError(f"{job}: Ray has not answered for {60 * pause_s:.0f} s; the job may go on") from e
        else:
            if now["status"] not in ("PENDING", "RUNNING"): break
        time.sleep(pause_s)
    if now["status"] != "SUCCEEDED": raise RuntimeError(f"{job}: {now['status']}. {now.get('message') or ''}")


def task(name: str, command: str):
    "A task of the command, where it can run."
    if os.environ.get("RAY_ADDRESS"): return PythonOperator(task_id=name, python_callable=on_ray, op_args=[command])
    return BashOperator(task_id=name, bash_command=f"{command} ", cwd=ROOT, append_env=True, env={"PATH": f"{ROOT}/.venv/bin:{os.environ['PATH']}"})


for dag_id, (cron, retries, tasks) in SCHEDULES.items():
    with DAG(dag_id, schedule=cron, start_date=datetime(2026, 1, 1), catchup=False, max_active_runs=1, default_args={"retries": retries, "retry_delay": timedelta(minutes=5)}, tags=["cxr_pred"], doc_md=__doc__) as dag:
        done = None
        for name, command in tasks:
            made = task(name, command)
            if done: done >> made
            done = made
    globals()[dag_id] = dag
