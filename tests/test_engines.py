"The second engine and the second size, as a service meets them: no word to the network, no torch, a fallback that is seen."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cxr_pred.clinic.doctor import one_film
from cxr_pred.clinic.reading import ReadingRoom
from cxr_pred.core import read_json, reload_settings, root, sha256_file, write_json
from cxr_pred.data.images import Film, decode
from cxr_pred.data.labels import LABELS
from cxr_pred.store import Store, film_png
from cxr_pred.tables import Study
from cxr_pred.vision.classify import Classifier
from cxr_pred.vision.engine import openvino_package
from cxr_pred.vision.toy import toy_bundle, toy_onnx, toy_patterns

FACTS = root() / "nbs" / "language" / "facts.yaml"


def sealed(folder: Path) -> Path:
    "The bundle with a manifest of what it now holds."
    names = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json")
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | {"files": {n: sha256_file(folder / n) for n in names}})
    return folder


@pytest.fixture
def with_ir(tmp_path):
    "A bundle that serves OpenVINO's file and can fall back on ONNX."
    b, ov = toy_bundle(tmp_path / "ir", FACTS), openvino_package()
    ov.save_model(ov.Core().read_model(b / "vit.int8.onnx"), b / "vit.int8.xml", compress_to_fp16=False)
    plain = read_json(b / "calibration.json")
    write_json(b / "calibration.json", plain | {"engine": "vit.int8.xml", "fallback": plain})
    return sealed(b)


@pytest.fixture
def with_edge(tmp_path):
    "A bundle with a quick network of another seed and its own threshold."
    b = toy_bundle(tmp_path / "both", FACTS)
    (b / "edge").mkdir()
    toy_onnx(b / "edge/vit.int8.onnx", seed=3)
    write_json(b / "edge/calibration.json", read_json(b / "calibration.json") | {"engine": "edge/vit.int8.onnx", "temperature": 2.0})
    return sealed(b)


QUIET = """
import os, socket, sys
from pathlib import Path
asked = []
for name in ("connect", "connect_ex"): setattr(socket.socket, name, lambda self, address: asked.append(address) or 1)
socket.getaddrinfo = lambda *a, **k: asked.append(a) or []
import numpy as np
from cxr_pred.data.images import Film
from cxr_pred.vision.classify import Classifier
c = Classifier(Path(sys.argv[1]), threads=1)
r = c.classify(Film(np.random.default_rng(0).integers(0, 256, (256, 256), dtype=np.uint8)))
assert c.engine.endswith(".xml") and r.status in ("ok", "abstained", "rejected"), (c.engine, r)
assert "torch" not in sys.modules and "onnxruntime" not in sys.modules, "the service needs neither"
from cxr_pred.vision.engine import openvino_package
openvino_package("nncf")
import nncf.telemetry.wrapper as w
w.telemetry.send_event("a", "b", "c")
assert not asked, asked
assert not list(Path.home().iterdir()), "no client's id, no statistics"
assert not [m for m in sys.modules if m.startswith("openvino_telemetry.")]
"""


def test_openvino_and_nncf_speak_to_nobody(with_ir, tmp_path):
    (tmp_path / "home").mkdir()
    env = os.environ | {"HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    r = subprocess.run([sys.executable, "-c", QUIET, str(with_ir)], env=env, cwd=root(), capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]


def test_a_room_without_openvino_falls_back_and_counts_it(with_ir, tmp_path, monkeypatch):
    for name in [k for k in sys.modules if k.split(".")[0] == "openvino"]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)
    classifier = Classifier(with_ir)
    room = ReadingRoom(classifier, Store(f"sqlite:///{tmp_path}/cxr.db", tmp_path)).open()
    try: assert not room.problem and classifier.engine == "vit.int8.onnx" and room.metrics.value("cxr_engine_fallbacks_total") == 1
    finally: room.close()
    monkeypatch.setenv("CXR_BUNDLE", str(with_ir)); reload_settings()
    try: assert one_film().startswith("vit.int8.onnx answers") and "openvino is not installed" in one_film()
    finally: monkeypatch.undo(); reload_settings()


def test_the_quick_network_has_its_own_numbers(with_edge, monkeypatch):
    small, edge = Classifier(with_edge), Classifier(with_edge, size="edge")
    film = np.random.default_rng(0).integers(0, 256, (1, 224, 224), dtype=np.uint8)
    assert (small.engine, edge.engine, edge.calibration["temperature"]) == ("vit.int8.onnx", "edge/vit.int8.onnx", 2.0)
    assert not np.allclose(small.outputs(film)["logits"], edge.outputs(film)["logits"])
    assert edge.classify(Film(film[0])).timings["model_ms"] > 0
    monkeypatch.setenv("CXR_BUNDLE", str(with_edge)); reload_settings()
    try: assert "--model edge" in one_film()
    finally: monkeypatch.undo(); reload_settings()


def test_serve_refuses_a_model_that_the_bundle_lacks(tmp_path):
    env = os.environ | {"CXR_BUNDLE": str(toy_bundle(tmp_path / "plain", FACTS)), "CXR_STATE": str(tmp_path / "state"), "OMP_NUM_THREADS": "1"}
    r = subprocess.run([sys.executable, "-m", "cxr_pred.cli", "serve", "--port", "0", "--no-ui", "--model", "edge"], env=env, cwd=root(), capture_output=True, text=True, timeout=300)
    assert r.returncode == 1 and "no_such_model" in r.stderr + r.stdout, r.stderr[-2000:]
    assert "X-ray reader: http" not in r.stdout, "nothing listens"


def test_the_pair_is_what_is_served_and_what_was_asked_instead_is_not_watched(with_edge, tmp_path):
    its = with_edge / "edge/calibration.json"
    write_json(its, read_json(its) | {"temperature": 1.0, "sure": {"probability": 0.9, "labels": list(LABELS)}})
    sealed(with_edge)
    at = lambda i: np.clip(128 + 100 * np.kron(toy_patterns()[i], np.ones((16, 16))) + np.random.default_rng(i).normal(0, 4, (256, 256)), 0, 255).astype(np.uint8)
    films = [film_png(at(i)) for i in range(8)]
    told = {}
    for size in ("", "small"):
        room = ReadingRoom(Classifier(with_edge, size=size), store := Store(f"sqlite:///{tmp_path}/{size}.db", tmp_path / f"s{size}")).open()
        try:
            reports = [room.predict(f, explain=False) for f in films]
            room.predict(film_png(np.full((256, 256), 90, np.uint8)), explain=False)   # blank: refused unread, and counted for nobody
            by = {n: room.metrics.registry.get_sample_value("cxr_networks_total", {"network": n}) or 0 for n in ("edge", "small")}
            with store.session() as s: kept = [s.get(Study, r.study_id).signals["features"] for r in reports]
            told[size] = room.classifier.size, reports, by, kept
        finally: room.close()
    assert told[""][0] == "both" and 0 < told[""][2]["edge"] < 8 and sum(told[""][2].values()) == 8 and told["small"][2] == {"edge": 0, "small": 8}
    assert all(told[""][3]) and not any(told["small"][3]), "a drift reference is of the network that reads"
    for data, r in zip(films, told[""][1]):
        quick = Classifier(with_edge, size="edge").classify(decode(data))
        stands = quick.status == "ok" and quick.finding.probability >= 0.9
        assert (r.status, r.finding) == (quick.status, quick.finding) if stands else r.finding == Classifier(with_edge, size="small").classify(decode(data)).finding
