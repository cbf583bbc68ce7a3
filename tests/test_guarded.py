"""What no example shows: the whole ETL with hostile films, and a short fuzz through the child processes."""
import io
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from cxr_pred.core import InputError, SetupError, root
from cxr_pred.data.etl import read_all
from cxr_pred.data.guarded import Limits, guarded_map
from cxr_pred.data.sources import Record

CODES = {"empty_file", "unsupported_format", "truncated", "corrupt", "too_large", "multi_frame", "dicom_no_pixels", "dicom_no_transfer_syntax", "decode_memory"}


def picture(kind):
    y, x = np.mgrid[0:96, 0:80]
    out = io.BytesIO(); Image.fromarray((60 + 150 * np.exp(-((x - 40) / 9.) ** 2) + 25 * np.cos(y / 4.)).clip(0, 255).astype(np.uint8)).save(out, kind)
    return out.getvalue()


def mutated(whole, rng):
    "A file with bytes flipped, its end cut off, or a piece of it put elsewhere."
    b = bytearray(whole)
    for at in rng.integers(0, len(b), rng.integers(0, 9)): b[at] = rng.integers(0, 256)
    if rng.random() < .3: b = b[:rng.integers(0, len(b))]
    if b and rng.random() < .3: a, c, to = rng.integers(0, len(b), 3); b[to:to] = b[min(a, c):max(a, c)]
    return bytes(b)


def test_a_short_fuzz_ends_in_films_or_known_reasons():
    rng, whole = np.random.default_rng(0), [picture(k) for k in ("PNG", "JPEG", "TIFF")]
    answers = list(guarded_map("cxr_pred.data.guarded:read_bytes", [(mutated(whole[i % 3], rng),) for i in range(300)], 1, Limits(seconds=20)))
    assert len(answers) == 300 and {a.code for a in answers if isinstance(a, InputError)} <= CODES
    assert 30 < sum(not isinstance(a, InputError) for a in answers) < 280


def test_a_crash_costs_one_film_and_keeps_the_order(tmp_path, monkeypatch):
    (tmp_path / "crashing.py").write_text(textwrap.dedent("""
        import os
        def act(n):
            if n == 5: os.abort()
            return {"n": n}, None"""))
    monkeypatch.syspath_prepend(str(tmp_path))
    answers = list(guarded_map("crashing:act", [(n,) for n in range(12)], 1))
    assert answers[5].code == "decoder_crashed" and [a[0]["n"] for i, a in enumerate(answers) if i != 5] == [n for n in range(12) if n != 5]


@pytest.mark.parametrize("length", [60, 74, 90, 200])
def test_a_temporary_folder_with_a_long_path_keeps_nobody_from_reading(tmp_path, length):
    "Multiprocessing's socket lies below the temporary folder, and a socket's path may have 107 bytes."
    deep = f"/{tmp_path.parts[1]}/cxr-{os.getpid()}-".ljust(length, "d")
    os.mkdir(deep)
    try:
        (tmp_path / "film.png").write_bytes(picture("PNG"))
        code = "import sys, tempfile; from cxr_pred.data.guarded import Guard\nwith Guard(1) as g: print(g.read(open(sys.argv[1], 'rb').read()).size, tempfile.gettempdir())"
        r = subprocess.run([sys.executable, "-c", code, tmp_path / "film.png"], env=os.environ | {"TMPDIR": deep, "PYTHONPATH": str(root())}, capture_output=True, text=True, timeout=120)
        assert r.stdout.split() == ["(80,", "96)", deep] and not os.listdir(deep), r.stderr
    finally: os.rmdir(deep)


def test_a_rule_that_names_no_flag_stops_before_a_film_is_read(tmp_path):
    with pytest.raises(SetupError) as e: read_all(tmp_path, [Record("tb", "a.png", "NORMAL")], None, ("blnk",))
    assert e.value.code == "unknown_flag"


def test_a_worker_that_is_lost_gives_its_second_task_back_and_nothing_is_held_against_it(tmp_path, monkeypatch):
    "One worker, one try: what it held beside the film that it died of must be read all the same, and its clock starts when the first is answered."
    (tmp_path / "holding.py").write_text(textwrap.dedent("""
        import os, time
        def act(n):
            if n % 4 == 1: os.abort()
            time.sleep(1.1)
            return {"n": n}, None"""))
    monkeypatch.syspath_prepend(str(tmp_path))
    answers = list(guarded_map("holding:act", [(n,) for n in range(6)], 1, Limits(seconds=2, tries=1)))
    assert [a.code if isinstance(a, InputError) else a[0]["n"] for a in answers] == [0, "decoder_crashed", 2, 3, 4, "decoder_crashed"]


def test_a_long_task_is_not_handed_over_while_its_worker_answers(tmp_path, monkeypatch):
    "Both pipes would be full, and each end would wait for the other."
    (tmp_path / "lengthy.py").write_text("import numpy as np\ndef act(data): return {'n': len(data)}, np.zeros(len(data), np.uint8)")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [a[0]["n"] for a in guarded_map("lengthy:act", [(bytes(2**23),)] * 4, 1, Limits(seconds=20))] == [2**23] * 4


def test_no_film_is_passed_over_while_one_keeps_the_others_waiting(tmp_path, monkeypatch):
    "The first film takes as long as the other worker needs for all that may be read ahead, again and again."
    (tmp_path / "slow.py").write_text(textwrap.dedent("""
        import time
        def act(n):
            if n % 20 == 0: time.sleep(0.3)
            return {"n": n}, None"""))
    monkeypatch.syspath_prepend(str(tmp_path))
    for workers in (2, 3): assert [a[0]["n"] for a in guarded_map("slow:act", ((n,) for n in range(200)), workers, ahead=2)] == list(range(200))
