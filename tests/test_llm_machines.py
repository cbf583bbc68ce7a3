"QLoRA cut up over two processes: each holds half of the base, and what a killed training has kept is gone on from. The notebook compares the curves; these start two processes seven times (`make test-all`)."
import json, os, signal, subprocess, sys, time

import psutil
import pytest

from cxr_pred.core import root

slow = pytest.mark.skipif(not os.environ.get("CXR_SLOW"), reason="slow: make test-all")
HOW = dict(rank=2, alpha=4, steps=30, micro_batch=1, accumulate=2, lr=1e-2, max_tokens=1024, keep_every=2)
HELD = """
import sys, torch
from pathlib import Path
from cxr_pred.language.base import load_base
from cxr_pred.language.machines import Team
from cxr_pred.language.qlora import Lesson, nf4, with_lora
model = with_lora(nf4(load_base(Path(sys.argv[1])), torch.float32), "toy", 2, 4)
trunk = model.base_model.model
lesson, team = Lesson(trunk, trunk.lm_head), Team("fsdp")
trunk.lm_head = torch.nn.Identity()
nbytes = lambda: sum((p.to_local() if hasattr(p, "to_local") else p).nbytes for p in lesson.parameters())
before = nbytes(); team.spread(lesson)
assert abs(nbytes() / before - 0.5) < 0.02, (before, nbytes())
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    from cxr_pred.language.base import toy_base
    from cxr_pred.language.facts import load_facts
    from cxr_pred.language.sft import grammar_pairs
    pairs = grammar_pairs(12, load_facts(root() / "nbs/language/facts.yaml"), seed=1)
    return toy_base(tmp_path_factory.mktemp("toy") / "base", [p["answer"] for p in pairs]), pairs


def torchrun(*what, out=None) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, what)], cwd=root(), start_new_session=True, stdout=out,
                            env=os.environ | {"PYTHONPATH": str(root()), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"})


@slow
def test_each_process_holds_half_of_the_base(toy, tmp_path):
    (tmp_path / "held.py").write_text(HELD)
    assert torchrun(tmp_path / "held.py", toy[0]).wait(180) == 0


@slow
def test_a_killed_training_goes_on_where_it_was(toy, tmp_path):
    base, pairs = toy
    def job(name):
        (folder := tmp_path / name).mkdir()
        (folder / "job.json").write_text(json.dumps({"base": str(base), "pairs": pairs, "held_out": [], "adapter": str(folder / "out"), "keep": str(folder / "kept.safetensors"), "how": HOW}))
        return folder
    def done(folder): return folder / "out" / "adapter.safetensors"
    def updates(folder): return len((folder / "steps.jsonl").read_text().splitlines()) if (folder / "steps.jsonl").is_file() else 0
    straight, broken = job("straight"), job("broken")
    assert torchrun("-m", "cxr_pred.language.machines", straight, "fsdp").wait(300) == 0 and not (straight / "kept.safetensors").exists()
    p, end = torchrun("-m", "cxr_pred.language.machines", broken, "fsdp"), time.monotonic() + 300
    while updates(broken) < 6: assert p.poll() is None and time.monotonic() < end; time.sleep(0.01)
    below = psutil.Process(p.pid).children(recursive=True)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    for c in below:
        if c.is_running(): c.kill()
    psutil.wait_procs(below, 20)
    assert (broken / "kept.safetensors").is_file() and not done(broken).exists() and 0 < updates(broken) < 30
    with open(tmp_path / "said", "w") as said: assert torchrun("-m", "cxr_pred.language.machines", broken, "fsdp", out=said).wait(300) == 0
    assert "Going on after update" in (tmp_path / "said").read_text()
    assert done(broken).read_bytes() == done(straight).read_bytes() and not (broken / "kept.safetensors").exists()
    assert json.loads((broken / "curve.json").read_text()) == json.loads((straight / "curve.json").read_text())


@slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_with_a_pass_each_are_one_with_both(toy, tmp_path, kind):
    "An answer's token weighs the same in whichever process it is: one answer is three times as long as the other."
    from safetensors.torch import load_file

    from cxr_pred.language.machines import train_adapter_on
    base, pairs = toy[0], sorted(toy[1], key=lambda p: len(p["answer"]))
    two = [pairs[0] | {"answer": pairs[0]["answer"][:len(pairs[-1]["answer"]) // 3]}, pairs[-1]]
    how = HOW | {"steps": 4}
    curves = {name: train_adapter_on(**on)(base, two, [], tmp_path / name, **how | passes) for name, on, passes in
              (("one", {}, {"micro_batch": 2, "accumulate": 1}), ("two", {"strategy": kind, "devices": 2}, {"micro_batch": 1, "accumulate": 2}))}
    assert all(abs(a["loss"] - b["loss"]) < 1e-3 * a["loss"] for a, b in zip(*curves.values(), strict=True)), curves
    one, other = (load_file(tmp_path / n / "adapter.safetensors") for n in curves)
    assert all((other[k].float() - v.float()).abs().mean() < 3e-3 for k, v in one.items())   # of a weight whose gradient is next to nothing, AdamW's step follows its rounding


@slow
def test_a_process_that_fails_is_told_of(toy, tmp_path):
    from cxr_pred.core import SetupError
    from cxr_pred.language.machines import train_adapter_on
    with pytest.raises(SetupError) as e: train_adapter_on("ddp", 2, tmp_path / "job")(toy[0], toy[1][:2], [], tmp_path / "out", **HOW | {"max_tokens": 4})
    assert e.value.code == "process_failed" and not (tmp_path / "job").exists() and not (tmp_path / "out").exists()
