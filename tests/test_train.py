"The training room where it is no example: an interrupted training, killed or stopped, ends with the same weights as one that was not."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from cxr_pred.core import load_params, root, sha256_file
from cxr_pred.data.augment import Alteration
from cxr_pred.data.labels import LABELS
from cxr_pred.vision.adapter import read_tensors
from cxr_pred.vision.edge import read_student
from cxr_pred.vision.resume import forget_epochs
from cxr_pred.vision.recipes import dvc_flags, recipe
from cxr_pred.vision.train import Picked, fit
from cxr_pred.vision.vit import Reader, backbone

os.environ["TQDM_DISABLE"] = "1"
EPOCHS = 3


def stripes(n=36):
    "Films (n, 32, 32) of ten kinds of stripes, and their table."
    rng, y = np.random.default_rng(0), np.arange(n) % 10
    yy, xx = np.mgrid[:32, :32]
    x = np.stack([127 + 60 * np.sin((xx * np.cos(c) + yy * np.sin(c)) / (1.5 + 0.4 * c)) for c in y]) + rng.normal(0, 40, (n, 32, 32))
    m = pd.DataFrame({"row": range(n), "target": y, "label": [LABELS[i] for i in y], "split": ["train"] * (n - 20) + ["val"] * 20, "source": "stripes"})
    return x.clip(0, 255).astype(np.uint8), m


def train(folder: Path | None, stop=None, seed=0, **training) -> dict:
    "Everything at once: blocks, dropped patches, mixup, alterations, a running mean, LoRA; the trained tensors."
    import lightning as L
    class Stop(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, i):
            if stop and (trainer.current_epoch, i) == stop[:2]: stop[2]()
        def on_train_epoch_end(self, trainer, module):
            if stop and (trainer.current_epoch, "end") == stop[:2]: stop[2]()
    torch.manual_seed(1)
    x, m = stripes()
    reader = Reader(backbone("vit_tiny_patch16_224", 32))
    tuner, best = fit(reader, Picked(x, m.row), m, 2, EPOCHS, 4, seed=seed, how=Alteration(flip=0), lr=5e-3, block_lr=5e-4, patch_drop=0.25, mixup=0.3, lora_rank=training.pop("lora_rank", 0),
                      training={"ema": 0.8, "accumulate": 2, "resume": folder, "machine": {"callbacks": [Stop()], "accelerator": "cpu"}, **training})
    return {k: v.detach().clone().contiguous() for k, v in tuner.state_dict().items()} | {"curve": torch.tensor([list(c.values()) for c in best.curve], dtype=torch.float64)}


def same(a: dict, b: dict) -> bool: return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(): return train(None)


def stopped(): raise RuntimeError("the power went")


@pytest.mark.parametrize("at", [(1, 2), (2, 0), (1, "end")], ids=["in an epoch", "between epochs", "before the checkpoint is written"])
def test_a_stopped_training_ends_with_the_same_weights(whole, tmp_path, at):
    with pytest.raises(RuntimeError, match="power"): train(tmp_path / "r", (*at, stopped))
    kept = list((tmp_path / "r").iterdir())
    assert len(kept) == 1, kept
    again = train(tmp_path / "r")
    assert same(again, whole) and len(again["curve"]) == EPOCHS
    forget_epochs(tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_finished_training_whose_results_were_lost_is_not_trained_again(whole, tmp_path):
    train(tmp_path / "r")
    assert same(train(tmp_path / "r", (0, 0, stopped)), whole)


CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; import test_train as t; t.child(Path(sys.argv[2]))"


def child(folder: Path) -> None:
    "Train, wait in the middle of the second epoch to be killed; the second time to the end."
    def wait():
        if not (folder / "waited").exists(): (folder / "waited").touch(); time.sleep(600)
    save_file(train(folder / "r", (1, 2, wait), lora_rank=2), folder / "done.safetensors")


def test_a_killed_training_ends_with_the_same_weights(tmp_path):
    run = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(root())}
    p = subprocess.Popen(run, cwd=root(), env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + 300
    while not (tmp_path / "waited").exists() and p.poll() is None and time.monotonic() < end: time.sleep(0.1)
    p.send_signal(signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL, p.stderr.read()[-2000:]
    r = subprocess.run(run, cwd=root(), env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    assert "Going on from" in r.stdout and same(load_file(tmp_path / "done.safetensors"), train(None, lora_rank=2))


@pytest.mark.parametrize("change", [{"seed": 1}, {"ema": 0.7}])
def test_a_checkpoint_of_another_training_is_not_used(tmp_path, capsys, change):
    with pytest.raises(RuntimeError): train(tmp_path / "r", (1, 1, stopped))
    got = train(tmp_path / "r", **change)
    assert "not used" in capsys.readouterr().out and same(got, train(None, **change))


def test_a_checkpoint_that_would_run_something_is_refused(tmp_path):
    import pickle
    with pytest.raises(RuntimeError): train(tmp_path / "r", (1, 1, stopped))
    kept, = (tmp_path / "r").iterdir()
    class Bomb:
        def __reduce__(self): return Path.touch, (tmp_path / "exploded",)
    state = torch.load(kept, weights_only=True)
    torch.save(state | {"extra": Bomb()}, kept)
    with pytest.raises(pickle.UnpicklingError, match="eights.only"): train(tmp_path / "r")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["tiny", "small", "lora", "large"])
def test_a_recipe_is_what_the_command_in_it_says(name):
    file = root() / "profiles" / "recipes" / f"{name}.yaml"
    assert f"dvc exp run $(python -m cxr_pred.vision.recipes {name}" in file.read_text()
    known = load_params("clinical", "train_vit")
    for k, v in recipe(name).items(): assert type(v) in (type(known[k]), *((int, str) if k == "precision" else ())), k
    assert len(dvc_flags(name)) == 1 + 2 * len(recipe(name))


def run_notebook(name, folder, **parameters):
    "A pipeline notebook under papermill, in a project of its own; the finished process."
    env = os.environ | {"CXR_ROOT": str(folder), "PYTHONPATH": str(root()), "CXR_STATE": str(folder / "state"), "OMP_NUM_THREADS": "1"}
    given = [part for k, v in parameters.items() for part in ("-p", k, str(v))]
    return subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", *given, str(root() / f"nbs/pipelines/{name}.ipynb"), str(folder / f"{name}.ipynb")],
                          cwd=folder, env=env, capture_output=True, text=True, timeout=600)


def test_an_adapter_is_made_gone_on_from_and_teaches_and_never_with_other_films(tmp_path):
    rng, labels = np.random.default_rng(0), ["NORMAL", "PNEUMONIA", "FRACTURE_WRIST"]
    n, kinds = 60, np.arange(60) % 3
    films = np.stack([127 + 60 * np.sin(np.mgrid[:64, :64][k % 2] / (2 + k)) + rng.normal(0, 20, (64, 64)) for k in kinds]).clip(0, 255).astype(np.uint8)
    box = json.dumps([{"kind": "box", "points": [[0.2, 0.2], [0.5, 0.5]]}])
    (tmp_path / "run/data").mkdir(parents=True)
    for name in ("params.yaml", "settings.ini"): shutil.copy(root() / name, tmp_path)
    np.save(tmp_path / "run/data/films.npy", films)
    (tmp_path / "run/data/preprocessing.json").write_text('{"resize": "squash"}')
    table = pd.DataFrame({"row": range(n), "label": [labels[k] for k in kinds], "split": np.where(np.arange(n) < 36, "train", np.where(np.arange(n) < 48, "val", "test")), "source": "toy",
                          "regions": [box if k == 2 else None for k in kinds], "severity": None, "width": 64, "height": 64})
    table.to_parquet(tmp_path / "run/data/manifest.parquet")
    torch.manual_seed(0)
    save_file({k: v for k, v in backbone("vit_tiny_patch16_224", 64).state_dict().items()}, tmp_path / "start.safetensors")
    start = {"profile": "toy", "run": "run", "model": "vit_tiny_patch16_224", "init": "file", "init_file": tmp_path / "start.safetensors", "size": 64}
    made = run_notebook("adapt_vit", tmp_path, **start, rank=2, epochs=1, batch_size=12)
    assert made.returncode == 0, made.stderr[-3000:]
    file = tmp_path / "profiles/toy/weights/adapter.safetensors"
    first = file.read_bytes()
    go_on = lambda: run_notebook("train_vit", tmp_path, **start, adapter=file, most=5, epochs=1, batch_size=8, locate=1, cache=tmp_path / "cache")
    went = go_on()
    assert went.returncode == 0, went.stderr[-3000:]
    said = json.loads((tmp_path / "run/train/vit.json").read_text())
    assert said["init"]["adapter"]["films"] == 36 and 3 <= said["films"]["train"] <= 15 and said["outlined"] == ["FRACTURE_WRIST"]
    assert run_notebook("adapt_vit", tmp_path, **start, rank=2, epochs=1, batch_size=12).returncode == 0 and file.read_bytes() == first, "the same seed, the same bytes"
    teach = lambda: run_notebook("distil_vit", tmp_path, **{k: v for k, v in start.items() if k not in ("model", "size")}, adapter=file, depth=1, epochs=2, batch_size=12)
    small = file.with_name("edge.safetensors")
    taught = teach()
    assert taught.returncode == 0, taught.stderr[-3000:]
    of_first, (_, about) = small.read_bytes(), read_tensors(small)
    assert (about["films"], about["depth"], about["model"]) == (36, 1, "vit_tiny_patch16_224") and read_student(small, about["films_sha256"], sha256_file(file)).depth == 1
    assert teach().returncode == 0 and small.read_bytes() == of_first
    table.assign(split=table.split.replace({"val": "test", "test": "val"})).to_parquet(tmp_path / "run/data/manifest.parquet")
    refused = go_on()
    assert refused.returncode and "other_films" in refused.stderr, "films that the adapter has seen could be test films now"
    refused = teach()
    assert refused.returncode and "other_films" in refused.stderr and small.read_bytes() == of_first
