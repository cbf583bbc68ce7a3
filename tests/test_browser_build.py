"The build for phones and browsers: headless Chromium reads the same films as the server, and nothing leaves it."
import base64, functools, io, json, os, random, re, threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image
from test_api import FACTS, cat, encoded, pattern
from test_browser import CHROMIUM, browser, fits  # noqa: F401

from cxr_pred.clinic.browser import browser_page
from cxr_pred.clinic.words import STRINGS
from cxr_pred.clinic.words import STRINGS
from cxr_pred.core import DISCLAIMER, CxrError, SetupError, read_json, root
from cxr_pred.data.images import decode
from cxr_pred.data.labels import CHEST, LABELS
from cxr_pred.data.sample import plan_films, render
from cxr_pred.language.facts import load_facts
from cxr_pred.language.wordings import pseudo_language, words_of
from cxr_pred.language.case import Case
from cxr_pred.language.findings import template_explanation
from cxr_pred.vision.classify import Classifier, calibrated, decide, points_nowhere, prediction_set, set_limit
from cxr_pred.vision.finding import Finding, confidence_word, is_spread, zones
from cxr_pred.vision.toy import toy_bundle, toy_patterns

ROOT = root()
PAGE = ROOT / "deploy" / "browser"
REAL = ROOT.parent / "shared" / "data"
here = pytest.mark.skipif(not CHROMIUM.exists() or not (PAGE / "node_modules" / "onnxruntime-web").exists(), reason="no browser or no ONNX Runtime Web here: `make test-deps` brings both, where npm is")
slow = pytest.mark.skipif(not os.environ.get("CXR_SLOW"), reason="minutes: make test-all")


class Plain(SimpleHTTPRequestHandler):
    "Any static server."
    def log_message(self, *a): return None


class Isolated(Plain):
    "One that sends the two headers which allow threads."
    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin"); self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()


@contextmanager
def served(folder, handler=Plain):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}/"
    finally: server.shutdown(); server.server_close()


def as_file(pixels, kind):
    "A film (H, W) uint8 in one of the ways in which films come."
    picture, large = Image.fromarray(pixels), lambda side: Image.fromarray(pixels).resize((side, side * pixels.shape[0] // pixels.shape[1]), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    if kind == "jpeg": picture.save(out, "JPEG", quality=90)
    elif kind == "jpeg in colour": large(500).convert("RGB").save(out, "JPEG", quality=88)
    elif kind == "png in colour": picture.convert("RGB").save(out, "PNG")
    elif kind == "transparent": Image.merge("RGBA", [picture] * 3 + [Image.new("L", picture.size, 255)]).save(out, "PNG")
    elif kind == "16 bits": Image.fromarray(pixels.astype(np.uint16) * 16 + 7).save(out, "PNG")   # a detector of 12
    elif kind == "large": large(1300).save(out, "PNG")
    elif kind == "middle": large(700).save(out, "PNG")
    elif kind == "gamma": picture.save(out, "PNG", pnginfo=gamma())
    elif kind == "turned": picture.transpose(Image.Transpose.ROTATE_90).save(out, "JPEG", quality=95, exif=turned())
    else: picture.save(out, "PNG")
    return out.getvalue()


def gamma():
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo(); info.add(b"gAMA", (100_000).to_bytes(4, "big"))
    return info


def turned():
    exif = Image.Exif(); exif[0x0112] = 6
    return exif.tobytes()


KINDS = ("png", "jpeg", "jpeg in colour", "png in colour", "transparent", "16 bits", "large", "middle", "gamma", "turned")


@pytest.fixture(scope="module")
def films():
    "A hundred different synthetic films as files: ten drawings in ten kinds of file, as they are, mirrored, darker, cut or of low contrast."
    drawn = [np.round(255 * render(p).film).astype(np.uint8) for p in plan_films(10, 96, 11, 0.0)]
    ways = (lambda a: a, lambda a: a[:, ::-1], lambda a: (255 * (a / 255) ** 1.6).astype(np.uint8), lambda a: a[8:-16, 5:], lambda a: (90 + a // 8).astype(np.uint8))
    return {f"{n} {kind}": as_file(np.ascontiguousarray(ways[(n + k + k // 5) % 5](drawn[n])), kind) for n in range(10) for k, kind in enumerate(KINDS)}


def wide():
    "A film (448, 448) that the toy calls pneumonia for all that is bright in it: the same evidence over half of the film."
    p = toy_patterns()[1]
    return np.kron(np.where(p > 0, np.minimum(1, 0.3 / np.maximum(p, 1e-9)), 0) * 255, np.ones((28, 28))).astype(np.uint8)


START = """films => { window.job = (async () => { const out = []; for (const film of films) { try {
  const { film: f, square, heat, ...answer } = await reader.read(Uint8Array.from(atob(film), c => c.charCodeAt(0)));
  out.push({ ...answer, said: reader.page.facts && explain(answer, reader.page), size: [f.width, f.height], square: square && btoa(Array.from(square, v => String.fromCharCode(v)).join('')), heat: heat && Array.from(heat) });
} catch (e) { out.push({ error: e.code ?? String(e.stack) }); } } return out; })(); }"""


@contextmanager
def reader(browser, bundle, folder, handler=Plain):
    "Starts the page's own modules on some files, and gives a function that waits for the answers; the server can read meanwhile."
    browser_page(bundle, folder)
    with served(folder, handler) as url:
        page = browser.new_page()
        page.goto(url)
        assert page.evaluate("crossOriginIsolated") == (handler is Isolated)

        def read(files):
            page.evaluate(START, [base64.b64encode(f).decode() for f in files])
            return lambda: page.evaluate("() => window.job")
        page.evaluate("async () => { window.explain = (await import('./explain.js')).explain; window.reader = await (await import('./reader.js')).openReader(location.href); }")
        yield read
        page.close()


def read_here(classifier, files):
    "The server's side: film and result of each file."
    films = [decode(data) for data in files]
    return [(film, classifier.classify(film)) for film in films]


def compared(said, film, r, classifier, facts=None, rounds=False):
    """One film read by both: what must be equal is; how far the probabilities lie apart, None without any.
    A network that rounds gives two maps; then the place must be what the server's rule makes of the browser's map, and how far the maps lie apart is for the caller."""
    assert tuple(said["size"]) == film.size
    if r.ood is None: return None
    square = np.frombuffer(base64.b64decode(said["square"]), np.uint8)
    assert np.array_equal(square, classifier.prepare(film.pixels).ravel()), "the prepared film is the same, to the last grey level"
    if not (r.finding and said.get("finding")): return None
    found = Finding.model_validate(said["finding"])
    same, heat = (r.status, r.finding.label) == (said["status"], found.label), np.reshape(np.float32(said["heat"]), r.heat.shape) if rounds else r.heat
    if rounds or same: assert (found.zones, said["spread"]) == (zones(heat, found.label), points_nowhere(heat)), f"places of {said['status']} {found.label}"
    if facts:
        e = template_explanation(Case(status=said["status"], reason_code=said["reason_code"], finding=found), facts)
        assert (e.summary, e.details, e.next_steps, e.urgency) == tuple(said["said"][k] for k in ("summary", "details", "next_steps", "urgency"))
    assert [q for q in r.finding.quality_flags if q != "burnt_in_text"] == found.quality_flags
    return max(abs(p - found.probabilities[l]) for l, p in r.finding.probabilities.items())


@here
@pytest.mark.timeout(300)
def test_a_hundred_films_without_rounding(browser, films, tmp_path):
    "The toy's network does not round, so that everything but it must agree: decoder, preparation, rules, flags, zones, words."
    bundle, films = toy_bundle(tmp_path / "bundle", FACTS), films | {"wide": encoded(wide())}
    classifier, facts, seen = Classifier(bundle, size="small"), load_facts(FACTS), set()
    with reader(browser, bundle, tmp_path / "page") as read:
        wait, ours = read(films.values()), read_here(classifier, films.values())
        answers = wait()
    for name, (film, r), said in zip(films, ours, answers):
        apart = compared(said, film, r, classifier, facts)
        assert (said["status"], said["reason_code"]) == (r.status, r.reason_code) and (apart is None or apart < 1e-5), name
        if r.finding:
            assert {k: said["finding"][k] for k in ("label", "prediction_set", "zones", "severity", "coverage", "model_version")} == {k: getattr(r.finding, k) for k in ("label", "prediction_set", "zones", "severity", "coverage", "model_version")}, name
            assert np.allclose(said["heat"], r.heat.ravel(), atol=1e-4), name
        seen.add((r.status, bool(r.finding and r.finding.zones), said.get("spread")))
    assert len(answers) == 101 and {("ok", True, False), ("ok", False, True)} < seen
    assert (r.status, r.finding.label, r.finding.zones, said["spread"]) == ("ok", "PNEUMONIA", [], True), "the wide map, which is the last"


@here
def test_the_rules_for_the_same_numbers(browser, tmp_path):
    "Place, spread and confidence word on maps and probabilities that no network needs to find, the borders among them."
    rng = np.random.default_rng(0)
    coarse, narrow = rng.normal(size=(60, 16, 16)), rng.random((60, 16, 16)) ** np.linspace(0.3, 8, 60)[:, None, None]
    edges = [np.where(np.arange(256).reshape(16, 16) < n, level, 0.4) for n in (0, 1, 85, 86, 256) for level in (0.79, 0.8, 0.9)]   # 86 of 256 is more than a third
    maps = np.float32([*coarse, *narrow, *edges, np.zeros((16, 16)), -np.ones((16, 16))])
    labels, p = ["PNEUMONIA", str([l for l in LABELS if l not in CHEST][0]), "NORMAL"], [0.0, 0.4999, 0.5, 0.6999, 0.7, 0.8999, 0.9, 1.0]
    browser_page(toy_bundle(tmp_path / "bundle", FACTS), tmp_path / "page")
    with served(tmp_path / "page") as url:
        page = browser.new_page()
        page.goto(url)
        said, words = page.evaluate("""async ([maps, labels, p]) => { const { zones, isSpread } = await import('./reader.js'), { confidenceWord } = await import('./explain.js'), page = await (await fetch('page.json')).json();
            return [maps.map(m => [isSpread(m, page.spread), ...labels.map(l => zones(m, 16, page.chest.includes(l), l, page.spread))]), p.map(confidenceWord)]; }""", [maps.reshape(len(maps), -1).tolist(), labels, p])
        page.close()
    assert said == [[is_spread(m), *(zones(m, l) for l in labels)] for m in maps] and words == [confidence_word(q) for q in p]
    assert {wide for wide, *_ in said} == {False, True} and {len(z) for _, z, *_ in said} == {0, 1, 2}


@here
def test_chest_and_limb_calibrated_apart(browser, tmp_path):
    "Probabilities, set, status and reason of the same logits, where each part of the body has its own numbers and where one calibration serves all."
    logits = np.random.default_rng(1).normal(0, 2.5, (300, 10)).astype(np.float32)
    logits[np.arange(300) % 3 > 0] += np.where(np.arange(10) < 4, 4, -4) * np.random.default_rng(2).choice([-1, 1], 200)[:, None]
    browser_page(toy_bundle(tmp_path / "bundle", FACTS), tmp_path / "page")
    pooled = read_json(tmp_path / "bundle/calibration.json")
    apart = pooled | {"parts": {"chest": {"temperature": 0.9, "qhat": 0.3, "n": 1600}, "limb": {"temperature": 2.1, "qhat": 0.95, "n": 250}}}
    careful = apart | {"conformal": apart["conformal"] | {"not_ruled_out": 0.05}}
    with served(tmp_path / "page") as url:
        page = browser.new_page()
        page.goto(url)
        said = page.evaluate("""async ([logits, calibrations, labels]) => { const { ownNumbers, softmax, predictionSet, decide } = await import('./reader.js'), { chest } = await (await fetch('page.json')).json();
            return calibrations.map(c => logits.map(z => { const { temperature, limit } = ownNumbers(z, c, labels, chest), p = softmax(z, temperature); return [p, predictionSet(p, limit, labels), ...decide(p, 0.1, c, labels, chest)]; })); }""", [logits.tolist(), [pooled, apart, careful], list(LABELS)])
        page.close()
    for c, rows in zip((pooled, apart, careful), said):
        for z, (p, names, *answer) in zip(logits, rows):
            ours = calibrated(z, c)
            assert np.allclose(ours, p, rtol=0, atol=1e-12) and names == prediction_set(ours, set_limit(ours, c)) and tuple(answer) == decide(ours, 0.1, c)
    assert [r[1] for r in said[0]] != [r[1] for r in said[1]] != [r[1] for r in said[2]] and len({r[3] for r in said[1]}) == 3


@here
@pytest.mark.parametrize("language", ["en", "en-XA"])
def test_the_words_for_the_same_findings(browser, tmp_path, language):
    "Explanations of findings with one, two and three answers, places and severities, among them both kinds of pneumonia in either order, and in another language."
    facts_file = FACTS
    if language != "en": (facts_file := tmp_path / "facts.yaml").write_text(json.dumps(pseudo_language(load_facts(FACTS))))
    facts, sets = load_facts(facts_file), [["COVID19", "PNEUMONIA"], ["PNEUMONIA", "COVID19"], ["TUBERCULOSIS", "PNEUMONIA", "COVID19"], ["TUBERCULOSIS", "COVID19", "PNEUMONIA"], ["TUBERCULOSIS", "PNEUMONIA"], ["FRACTURE_WRIST", "FRACTURE_FINGERS", "FRACTURE_ELBOW"], ["NORMAL"]]
    places = {True: ["right lower zone", "left middle zone"], False: ["upper third of the film", "middle third of the film"]}
    found = []
    for k, names in enumerate(sets):
        p = dict.fromkeys(LABELS, 0.0) | {l: q for l, q in zip(names, (0.6, 0.3, 0.1))}
        p |= {next(l for l in LABELS if l not in names): 1 - sum(p.values())}
        found.append(Finding(label=names[0], probability=p[names[0]], probabilities=p, prediction_set=names, severity="none" if names == ["NORMAL"] else ("unknown", "mild")[k % 2], zones=[] if names == ["NORMAL"] else places[names[0] in CHEST][:1 + k % 2], quality_flags=["saturated", "tiny"][:k % 3]))
    browser_page(toy_bundle(tmp_path / "bundle", facts_file), tmp_path / "page")
    with served(tmp_path / "page") as url:
        page = browser.new_page()
        page.goto(url)
        said = page.evaluate("async found => { const { explain } = await import('./explain.js'), page = await (await fetch('page.json')).json(); return found.map(finding => explain({ status: 'ok', reason_code: 'ok', finding }, page)); }", [f.model_dump(mode="json") for f in found])
        page.close()
    for f, s in zip(found, said):
        e = template_explanation(Case(finding=f), facts)
        assert (e.summary, e.details, e.next_steps, e.urgency) == tuple(s[k] for k in ("summary", "details", "next_steps", "urgency")), f.prediction_set
    assert sum(words_of(facts)["other_pneumonia"] in s["details"] for s in said) == 3, "and plain pneumonia where COVID-19 is no answer"


def on_the_border(r, calibration, apart, distance):
    "Whether so small a difference, in probability and in distance, can make another answer of a server's result."
    p = sorted(r.finding.probabilities.values(), reverse=True) if r.finding else []
    edges = [abs(q - edge) for q in p for edge in {calibration["abstain"]["min_probability"], *(1 - set_limit(list(r.finding.probabilities.values()), calibration)).tolist()}]
    return any(e <= apart for e in edges) or (p and p[0] - p[1] <= 2 * apart) or any(abs(r.ood - calibration["ood"][k]) <= distance for k in ("threshold", "reject"))


def answer(classifier, out):
    "Status, reason and label of what a network put out, and its probabilities."
    p = classifier.probabilities(out["logits"][0])
    return (*decide(p, float(out["ood"][0]), classifier.calibration), LABELS[int(p.argmax())]), p


def check_int8(read, classifier, files, slack=1e-3):
    """The released network, whichever it is. One of 8 bits rounds, and another order of additions rounds otherwise: so the yardstick is the server's own network with its
    graph optimisations off, on the same films. On average the browser may be no farther from the server than three times that, in probabilities, maps and distance, and it may
    answer otherwise only on a border that the difference crosses."""
    off = ort.SessionOptions()
    off.graph_optimization_level, off.log_severity_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, 3
    other, facts = ort.InferenceSession(classifier.bundle.read(classifier.engine), off, providers=["CPUExecutionProvider"]), load_facts(classifier.facts_path)
    apart, own, same, own_same, places = {k: [] for k in ("probabilities", "maps", "distance")}, {k: [] for k in ("probabilities", "maps", "distance")}, 0, 0, []
    wait, ours = read(files.values()), read_here(classifier, files.values())
    for name, (film, r), said in zip(files, ours, wait()):
        most, found, label = compared(said, film, r, classifier, facts, rounds=True), said.get("finding") or {}, r.finding and str(r.finding.label)
        equal = (said["status"], said["reason_code"], found.get("label")) == (r.status, r.reason_code, label)
        same += equal
        if r.ood is None: assert equal, name; own_same += 1; continue
        assert equal or on_the_border(r, classifier.calibration, most or 0, abs(said["ood"] - r.ood)), f"{name}: {said['status']} {said['reason_code']}, the server says {r.status} {r.reason_code}"
        two = dict(zip(classifier.names, other.run(classifier.names, {"image": classifier.prepare(film.pixels)[None, None]})))
        (status, reason, its), q = answer(classifier, two)
        own_same += (status, reason, its if r.finding else None) == (r.status, r.reason_code, label)
        apart["distance"].append(abs(said["ood"] - r.ood)); own["distance"].append(abs(float(two["ood"][0]) - r.ood))
        if most is None: continue
        apart["probabilities"].append(most); own["probabilities"].append(max(abs(q[LABELS.index(l)] - p) for l, p in r.finding.probabilities.items()))
        if found["label"] != label or its != label: continue
        places.append((r.finding.zones, points_nowhere(r.heat)) == (found["zones"], said["spread"]))
        apart["maps"].append(np.abs(np.reshape(said["heat"], r.heat.shape) - r.heat).max())
        own["maps"].append(np.abs(classifier.on_film(two["heat"][0, LABELS.index(label)], *film.size) - r.heat).max())
    tell = lambda n, of: f"{n} of {len(files)} answers are the same; " + ", ".join(f"{k} differ by {np.mean(v):.4f} on average and {np.max(v):.3f} at most" for k, v in of.items() if v)
    print(f"\nbrowser and server: {tell(same, apart)}; {sum(places)} of {len(places)} places are the same\nserver and server without optimisations: {tell(own_same, own)}")
    for k in apart: assert not apart[k] or np.mean(apart[k]) < 3 * np.mean(own[k]) + slack, k


@pytest.fixture(scope="module")
def released(browser, tmp_path_factory):
    bundle = ROOT / "models" / "release"
    with reader(browser, bundle, tmp_path_factory.mktemp("released") / "page") as read: yield read, Classifier(bundle, size="small")


@here
def test_the_released_bundle_reads_its_own_examples(released):
    "A few films only, so that the mean says little: it is given some slack."
    read, classifier = released
    files = {n: classifier.bundle.read(n) for n in classifier.bundle.manifest["files"] if n.startswith("examples/") and n.endswith(".png")}
    if not files: pytest.skip("the released bundle has no examples")
    check_int8(read, classifier, files, slack=.03)


@here
@slow
@pytest.mark.timeout(900)
def test_a_hundred_films_with_the_released_network(released, films): check_int8(*released, films)


@here
@slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not (REAL / "manifest.csv").exists(), reason="no real films beside the project")
def test_real_films_with_the_released_network(released):
    paths = sorted(p for p in REAL.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg") and "mask" not in str(p.relative_to(REAL)).lower() and p.stat().st_size < 1_000_000)
    random.Random(0).shuffle(paths)
    files = {}
    for p in paths:
        try: decode(p.read_bytes()); files[p.name] = p.read_bytes()
        except CxrError: continue
        if len(files) == 100: break
    check_int8(*released, files)


@here
def test_what_is_no_film(browser, tmp_path):
    "The same code as the server's for what cannot be read, and the same refusal for what should not be."
    bundle, film = toy_bundle(tmp_path / "bundle", FACTS), encoded(pattern())
    jpeg, two = as_file(np.asarray(Image.open(io.BytesIO(film))), "jpeg"), io.BytesIO()
    Image.fromarray(pattern()).save(two, "PNG", save_all=True, append_images=[Image.fromarray(pattern(3))])
    files = {"empty_file": b"", "unsupported_format": b"Dear colleague", "truncated": film[:len(film) // 2], "multi_frame": two.getvalue()}
    with reader(browser, bundle, tmp_path / "page") as read:
        for code, data in [*files.items(), ("truncated", jpeg[:len(jpeg) // 2]), ("truncated", jpeg[:-2]), ("truncated", film[:-12])]:
            assert read([data])()[0] == {"error": code}, code
            if code != "truncated" or len(data) < len(film) - 12:
                with pytest.raises(CxrError) as e: decode(data)
                assert e.value.code == code
        assert read([film[:60] + bytes(40) + film[100:]])()[0].get("error") == "corrupt"
        blank, photo, tiff = io.BytesIO(), encoded(cat(), "JPEG"), io.BytesIO()
        Image.new("L", (200, 150), 40).save(blank, "PNG"); Image.fromarray(pattern()).save(tiff, "TIFF")
        assert [(a["status"], a["reason_code"]) for a in read([blank.getvalue(), photo])()] == [("rejected", "blank"), ("rejected", "not_a_radiograph")]
        assert read([tiff.getvalue()])()[0]["error"] == "unsupported_format"


@here
def test_proportions_kept_and_threads(browser, tmp_path, films):
    "A bundle that keeps a film's proportions, on a server that allows threads."
    from cxr_pred.core import read_json, sha256_file, write_json
    bundle = toy_bundle(tmp_path / "bundle", FACTS)
    write_json(bundle / "preprocessing.json", read_json(bundle / "preprocessing.json") | {"resize": "letterbox"})
    names = read_json(bundle / "manifest.json"); names["files"]["preprocessing.json"] = sha256_file(bundle / "preprocessing.json"); write_json(bundle / "manifest.json", names)
    classifier, some = Classifier(bundle, size="small"), dict(list(films.items())[::9])
    with reader(browser, bundle, tmp_path / "page", Isolated) as read: answers = read(some.values())()
    for (film, r), said in zip(read_here(classifier, some.values()), answers):
        apart = compared(said, film, r, classifier)
        assert apart is None or apart < 1e-5 and np.allclose(said["heat"], r.heat.ravel(), atol=1e-4)


@pytest.fixture(params=[(1280, 860), (390, 844)], ids=["desktop", "phone"])
def page(browser, tmp_path, request):
    "The open page on a plain server; after it has loaded, whatever it asks of any server is a failure."
    bundle = toy_bundle(tmp_path / "bundle", FACTS)
    browser_page(bundle, tmp_path / "page")
    context = browser.new_context(viewport=dict(zip(("width", "height"), request.param)))
    page, wrong = context.new_page(), []
    with served(tmp_path / "page") as url:
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.goto(url)
        page.wait_for_selector("#load.done", timeout=60_000)
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("blob:", f"{url}picture.js")) else None)
        yield page
    assert not wrong
    context.close()


def choose(page, name, data): page.set_input_files("#drop input", {"name": name, "mimeType": "application/octet-stream", "buffer": data})


def card(page, status):
    page.wait_for_selector(f"#answer .cxr[data-status={status}]", timeout=30_000)
    return page.locator("#answer .cxr")


@here
def test_the_page(page):
    assert page.locator("#always").inner_text() == DISCLAIMER and "Tuberculosis" in page.locator("#answer").inner_text() and fits(page)
    choose(page, "jane-doe.png", encoded(pattern()))
    answer = card(page, "ok")
    assert answer.locator("h2").inner_text() == "Pneumonia" and answer.get_attribute("data-label") == "PNEUMONIA" and answer.locator("h2").evaluate("e => e.getBoundingClientRect().top") < 430
    assert answer.locator(".bar").count() == 10 and "99 %" in answer.locator(".bar").first.inner_text()
    assert answer.locator("img.over").is_visible() and answer.locator("img.over").evaluate("i => i.decode().then(() => i.naturalWidth)") > 0
    assert "signs of pneumonia" in answer.inner_text() and answer.locator("section.text li").count() >= 2
    answer.locator("input[type=range]").fill("0")
    assert answer.locator("img.over").evaluate("i => getComputedStyle(i).opacity") == "0"
    assert page.locator("#always").is_visible() and "jane" not in page.content().lower() and fits(page)
    choose(page, "film.png", b"this is text")
    assert "unsupported_format" in card(page, "error").inner_text() and page.locator("#answer img").count() == 0 and fits(page)
    choose(page, "cat.jpg", encoded(cat(), "JPEG"))
    answer = card(page, "rejected")
    assert answer.locator("h2").inner_text() == "It did not read this picture" and answer.locator(".bar").count() == answer.locator("img.over").count() == 0 and fits(page)


@here
def test_a_limb_and_whose_advice(page):
    "There is no whole limb among the ten, and the page knows of no child."
    choose(page, "film.png", encoded(pattern(LABELS.index("FRACTURE_WRIST"))))
    answer = card(page, "ok")
    assert answer.get_attribute("data-label") == "FRACTURE_WRIST" and fits(page)
    word, percent = re.fullmatch(re.escape(STRINGS["confidence_line_limb"]).replace(r"\{word\}", "(.+)").replace(r"\{percent\}", "(.+)"), answer.locator("p.sure").first.inner_text()).groups()
    assert word == "Very likely" and int(percent) > 90
    assert answer.locator(".bars > .bar").count() == 6 and all("fracture" in b for b in answer.locator(".bars > .bar .n").all_inner_texts()), "a wrist is asked about lungs further down"
    text = answer.locator("section.text").inner_text()
    assert "If a bone is broken here, it looks most like a wrist fracture" in text and STRINGS["browser"]["adults"] in text and STRINGS["set_one_limb"].split("{")[0].strip() in answer.inner_text()
    choose(page, "film.png", encoded(pattern()))
    page.wait_for_selector("#answer .cxr[data-label=PNEUMONIA]", timeout=30_000)
    text = page.locator("#answer .cxr").inner_text()
    assert "If a bone" not in text and STRINGS["browser"]["adults"] in text


@here
def test_an_example_says_that_it_is_one(browser, tmp_path):
    from cxr_pred.core import read_json, sha256_file, write_json
    bundle = toy_bundle(tmp_path / "bundle", FACTS)
    (bundle / "examples").mkdir(); (bundle / "examples" / "a_chest.png").write_bytes(encoded(pattern()))
    names = read_json(bundle / "manifest.json"); names["files"]["examples/a_chest.png"] = sha256_file(bundle / "examples" / "a_chest.png"); write_json(bundle / "manifest.json", names)
    browser_page(bundle, tmp_path / "page")
    page = browser.new_page()
    with served(tmp_path / "page") as url:
        page.goto(url); page.wait_for_selector("#load.done", timeout=60_000)
        page.locator("#examples button").click()
        answer = card(page, "ok")
        assert answer.locator("h2").inner_text() == "An example, no patient: Pneumonia" and STRINGS["browser"]["example"] in answer.inner_text()
        choose(page, "film.png", encoded(pattern()))
        page.wait_for_function("() => document.querySelector('#answer h2')?.innerText === 'Pneumonia'", timeout=30_000)
        assert STRINGS["browser"]["example"] not in page.locator("#answer").inner_text() and page.locator(".bars > .bar").count() == 4
    page.close()


@here
def test_a_spread_map_names_no_zone_and_colours_nothing(page):
    choose(page, "film.png", encoded(wide()))
    answer = card(page, "ok")
    assert answer.get_attribute("data-label") == "PNEUMONIA" and answer.locator("img").count() == 1 and answer.locator("img.over, input[type=range]").count() == 0 and fits(page)
    text = answer.inner_text()
    assert answer.locator("dd").first.inner_text() == STRINGS["zones_spread"] and f"{STRINGS['film']}. {STRINGS['heat_spread']}" in text
    assert STRINGS["heat_note"] not in text and "looked mostly" not in text and "signs of pneumonia" in text
    choose(page, "film.png", encoded(pattern()))
    page.wait_for_selector("#answer img.over", timeout=30_000)
    text = page.locator("#answer .cxr").inner_text()
    assert STRINGS["zones_spread"] not in text and STRINGS["heat_spread"] not in text and "looked mostly" in text


@here
def test_the_heatmap_is_the_servers(browser, tmp_path):
    "The same colours over the same places as `heat_overlay`, but for the rounding of a canvas."
    from cxr_pred.vision.classify import heat_overlay
    bundle, data = toy_bundle(tmp_path / "bundle", FACTS), encoded(pattern())
    browser_page(bundle, tmp_path / "page")
    with served(tmp_path / "page") as url:
        page = browser.new_page()
        page.goto(url)
        choose(page, "film.png", data)
        card(page, "ok").locator("img.over").evaluate("i => i.decode()")
        size, seen = page.evaluate("""() => { const [film, over] = document.querySelectorAll('#answer figure:last-child img'), c = document.createElement('canvas');
            [c.width, c.height] = [film.naturalWidth, film.naturalHeight]; const x = c.getContext('2d'); x.drawImage(film, 0, 0); x.drawImage(over, 0, 0);
            return [[c.height, c.width], btoa(Array.from(x.getImageData(0, 0, c.width, c.height).data, v => String.fromCharCode(v)).join(''))]; }""")
        page.close()
    film = decode(data)
    wanted = np.asarray(heat_overlay(film.pixels, Classifier(bundle, size="small").classify(film).heat), int)
    seen = np.frombuffer(base64.b64decode(seen), np.uint8).reshape(*size, 4)[..., :3].astype(int)
    assert seen.shape == wanted.shape and abs(seen - wanted).max() <= 3 and (wanted[..., 0] - wanted[..., 2]).max() > 60, "and there is something to see"


@here
def test_another_model_is_refused(browser, tmp_path):
    browser_page(toy_bundle(tmp_path / "bundle", FACTS), tmp_path / "page")
    model = tmp_path / "page" / "bundle" / "vit.int8.onnx"
    b = bytearray(model.read_bytes()); b[-5] ^= 1; model.write_bytes(bytes(b))
    with served(tmp_path / "page") as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#load.broken", timeout=60_000)
        assert "bundle_changed" in page.locator("#load").inner_text()
        choose(page, "film.png", encoded(pattern()))
        assert "bundle_changed" in card(page, "error").inner_text()
        page.close()


def test_the_runtime_is_pinned_and_no_registry_is_named():
    wanted, lock = json.loads((PAGE / "package.json").read_text())["dependencies"], json.loads((PAGE / "package-lock.json").read_text())["packages"]
    assert set(wanted) == {"onnxruntime-web"} and wanted["onnxruntime-web"] == lock["node_modules/onnxruntime-web"]["version"]
    assert all(p["integrity"].startswith("sha512-") and "resolved" not in p for name, p in lock.items() if name)
    with pytest.raises(SetupError) as e:
        from cxr_pred.clinic.browser import runtime_files
        runtime_files(PAGE / "nowhere", "1.0.0")
    assert e.value.code == "no_runtime"
