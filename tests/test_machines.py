"""The same training on several processes. Slow: on a Ray cluster of two machines, of which one loses its worker in the middle of an epoch.

`make test-all` runs the slow one, with an environment that has Ray: CXR_RAY_PYTHON names its python, this one's if it is not set."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from cxr_pred.core import root

PYTHON = os.environ.get("CXR_RAY_PYTHON", sys.executable)
CHILD = "import sys; sys.path.insert(0, sys.argv[1]); import test_machines as t; t.child(*sys.argv[2:])"
slow = pytest.mark.skipif(not os.environ.get("CXR_SLOW"), reason="slow: make test-all runs it")
has_ray = pytest.mark.skipif("CXR_RAY_PYTHON" not in os.environ and not importlib.util.find_spec("ray"), reason='no Ray here: pip install "ray[train]==2.60.0", or CXR_RAY_PYTHON')


def child(folder: str, launcher: str, strategy: str, devices: str, pause: str = "0") -> None:
    "Train a tiny network on kept features; write the curve."
    import pandas as pd
    import torch
    from cxr_pred.data.labels import LABELS
    from cxr_pred.vision.machines import train_epochs_on
    from cxr_pred.vision.train import fit
    from cxr_pred.vision.vit import Reader, backbone
    torch.manual_seed(1)
    n, rng = 120, np.random.default_rng(0)
    y = np.arange(n) % 10
    x = (rng.normal(0, 1, (10, 5, 192))[y] + rng.normal(0, 1, (n, 5, 192))).astype(np.float16)   # the tokens of a film of 32 px
    m = pd.DataFrame({"row": range(n), "target": y, "label": [LABELS[i] for i in y], "split": ["train"] * 80 + ["val"] * 40, "source": "s"})
    train = train_epochs_on(strategy, launcher, int(devices), Path(folder) / "job")
    _, best = fit(Reader(backbone("vit_tiny_patch16_224", 32)), x, m, 1, int(os.environ.get("EPOCHS", "2")), 16, train=train, training={"precision": 32}, lr=5e-3, block_lr=5e-4)
    (Path(folder) / "curve.json").write_text(json.dumps([[c["train_loss"], c["val_loss"]] for c in best.curve]))


def environment() -> dict: return os.environ | {"PYTHONPATH": f"{root()}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TQDM_DISABLE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "300"}


def curve(folder: Path, *how: str, python=sys.executable, **env) -> np.ndarray:
    "The curve of a training in a process of its own."
    folder.mkdir(exist_ok=True)
    r = subprocess.run([python, "-c", CHILD, str(Path(__file__).parent), str(folder), *how], env=environment() | env, cwd=root(), capture_output=True, text=True, timeout=1100)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-3000:]
    assert not (folder / "job").exists()
    return np.array(json.loads((folder / "curve.json").read_text()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory): return curve(tmp_path_factory.mktemp("alone"), "local", "auto", "1")


def cards() -> int:
    import torch
    return torch.cuda.device_count()


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.skipif(cards() < 2, reason="FSDP needs two GPUs: torch refuses it on processors"))])
def test_two_processes_have_the_curve_of_one(alone, tmp_path, strategy):
    both = curve(tmp_path, "local", strategy, "2")
    assert both.shape == alone.shape and np.allclose(both, alone, rtol=1e-3), (both, alone)


@pytest.fixture
def cluster(tmp_path):
    "A head and a worker with a processor each, as if on two machines; stopped by their own process ids."
    ray, started = str(Path(PYTHON).parent / "ray"), []
    def start(*args):
        log = tmp_path / f"ray{len(started)}.log"
        started.append(p := subprocess.Popen([ray, "start", "--block", "--disable-usage-stats", "--object-store-memory=80000000", *args], env=environment(), start_new_session=True, stdout=open(log, "w"), stderr=subprocess.STDOUT))
        end = time.monotonic() + 400
        while "will now block" not in log.read_text():
            assert p.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.3)
    try:
        start("--head", "--node-ip-address=127.0.0.2", "--port=6389", "--include-dashboard=false", "--num-cpus=1", f"--temp-dir={tempfile.gettempdir()}/ray_{os.getpid()}")
        start("--address=127.0.0.2:6389", "--node-ip-address=127.0.0.3", "--num-cpus=1")
        yield "127.0.0.2:6389", started
    finally:
        import psutil
        below = [c for p in started if p.poll() is None for c in psutil.Process(p.pid).children(recursive=True)]   # in groups of their own
        for p in reversed(started):
            if p.poll() is None: os.killpg(p.pid, signal.SIGTERM)
        for p in started:
            try: p.wait(20)
            except subprocess.TimeoutExpired: os.killpg(p.pid, signal.SIGKILL); p.wait()
        for c in below:
            if c.is_running(): c.kill()


def training_workers(started: list) -> list:
    "The processes that train, among those that this test's Ray has started."
    import psutil
    below = [c for p in started for c in psutil.Process(p.pid).children(recursive=True)]
    return [c for c in below if "RayTrainWorker" in " ".join(c.cmdline())]


@slow
@has_ray
def test_ray_has_the_curve_of_one_process_though_a_worker_is_killed(tmp_path, cluster):
    straight = curve(tmp_path / "alone", "local", "auto", "1", EPOCHS="30")
    (tmp_path / "ray").mkdir()
    p = subprocess.Popen([PYTHON, "-c", CHILD, str(Path(__file__).parent), str(tmp_path / "ray"), "ray", "ddp", "2"], env=environment() | {"RAY_ADDRESS": cluster[0], "EPOCHS": "30"}, cwd=root(),
                         stdout=open(tmp_path / "ray.log", "w"), stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 600
        known, said = tmp_path / "ray/job/ray/checkpoint_manager_snapshot.json", lambda: (tmp_path / "ray.log").read_text()
        while not (known.is_file() and "checkpoint_2" in known.read_text()) and time.monotonic() < end and p.poll() is None: time.sleep(0.05)
        each = [training_workers([node]) for node in cluster[1]]
        assert [len(w) for w in each] == [1, 1], (each, said()[-3000:])
        os.kill(each[1][0].pid, signal.SIGKILL)
        assert p.wait(1200) == 0, said()[-3000:]
        assert "Going on from checkpoint_" in said(), "the training went on, it did not begin again"
    finally: p.kill(); p.wait()
    assert np.allclose(np.array(json.loads((tmp_path / "ray" / "curve.json").read_text())), straight, rtol=1e-3)
