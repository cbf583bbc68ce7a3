"The ETL killed with SIGKILL: at each step that touches its files, in the middle of a line, and from outside among its workers. What the next run leaves is what a run without a kill leaves, byte for byte. And the run after a good one: it opens what changed or was asked for, and nothing else."
import json, os, shutil, signal, subprocess, sys, time

import numpy as np
import pandas as pd
import psutil
import pytest
from test_etl import film, save

from cxr_pred.core import root
from cxr_pred.data.etl import image_id

OUT = ("data/films.npy", "data/manifest.parquet", "data/preprocessing.json", "data/rejects.parquet", "data/vocabulary.json", "metrics/etl.json")
LEFT = sorted([*OUT, "reading/lock", "reading/pictures.u8", "reading/rows.jsonl"])   # `unfinished` and drafts are gone

# One process imports everything, and a fork of it does each run: with its reading in the process itself, so that a run takes no time.
# {"run": folder} finishes; "step": n kills at the n-th time that something below the folder is opened, moved or removed;
# "line": n kills before the n-th film is written down; "torn": n after half of its line. A film named in "crash" costs its worker.
FORKS = """
import json, os, signal, sys, traceback
import imagehash, pandera.pandas, pyarrow.parquet
from pathlib import Path
from cxr_pred.core import InputError, SetupError
from cxr_pred.data import etl, journal

def kill(): os.kill(os.getpid(), signal.SIGKILL)

def run(raw, run, step=0, line=0, torn=0, size=16, only="", crash=""):
    steps, lines, opened, add = [0], [0], [], journal.Journal.add
    def reading(call, tasks, workers, limits):
        for t in tasks:
            opened.append(Path(t[1].path).name)
            if opened[-1] == crash: yield InputError("decoder_crashed", "It crashed."); continue
            said, picture = etl.read_record(*t)
            yield json.loads(json.dumps(said)), picture
    def count(event, args):
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree") and str(args[0]).startswith(run):
            steps[0] += 1
            if steps[0] == step: kill()
    def adding(self, key, row, picture, lost):
        lines[0] += 1
        if lines[0] == line: kill()
        if lines[0] == torn: self.file.write(journal.as_line(dict(key=key, slot=-1, crc=0, row=row))[:40]); kill()
        return add(self, key, row, picture, lost)
    etl.guarded_map, journal.Journal.add = reading, adding
    sys.addaudithook(count)
    try: etl.run_etl(raw, run, ["tb"], size, workers=1, only=only)
    except SetupError as e: return [e.code, e.message, *opened]
    return opened

for text in sys.stdin:
    r, w = os.pipe()
    if not (pid := os.fork()):
        try: os.write(w, json.dumps(run(**json.loads(text))).encode()); os._exit(0)
        except BaseException: traceback.print_exc(); os._exit(1)
    os.close(w); status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([status, json.loads(os.read(r, 9999) or "[]")]), flush=True); os.close(r)
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    "Twenty films, a copy, a text and a blank one."
    r = tmp_path_factory.mktemp("raw"); t = r / "TB_Chest_Radiography_Database"
    for i in range(10): save(t / "Tuberculosis" / f"TB.{i}.png", film(i, 64)); save(t / "Normal" / f"N.{i}.png", film(50 + i, 64))
    save(t / "Normal/copy.png", film(50, 64)); save(t / "Normal/blank.png", np.full((64, 64), 7, np.uint8)); (t / "Normal/text.png").write_text("no film")
    return r


@pytest.fixture(scope="module")
def ask(raw):
    "A function that does one run in a fork: its exit status, and the films that it opened, after the error that stopped it."
    p = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root())
    def once(run, raw=raw, **how):
        p.stdin.write(json.dumps(dict(raw=str(raw), run=str(run), **how)) + "\n"); p.stdin.flush()
        return tuple(json.loads(p.stdout.readline()))
    yield once
    p.stdin.close(); p.wait(30)


def written(run): return {f: (run / f).read_bytes() for f in OUT}
def below(run): return sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def whole(ask, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    status, opened = ask(run)
    assert status == 0 and len(set(opened)) == len(opened) == 23
    return written(run)


def test_killed_at_each_step(ask, whole, tmp_path):
    "Opened, moved, removed: of each such step the process that takes it is killed before it does."
    n = 0
    while True:
        n += 1
        run = tmp_path / str(n)
        status, _ = ask(run, step=n)
        if status == 0: break
        assert status == -signal.SIGKILL
        for f in OUT: assert not (run / f).exists() or (run / f).read_bytes() == whole[f], f"half of {f} was in its place"
        status, opened = ask(run)
        assert status == 0 and written(run) == whole and below(run) == LEFT, n
    assert n > 12, "the steps were not seen"


def test_killed_again_and_again_while_reading(ask, whole, tmp_path):
    "One run that is killed eleven times, whole lines and torn ones in turn: no film is opened twice."
    for n in range(11): assert ask(tmp_path, **({"line": 3} if n % 2 else {"torn": 3}))[0] == -signal.SIGKILL
    status, opened = ask(tmp_path)
    assert (status, len(opened)) == (0, 23 - 22) and written(tmp_path) == whole and below(tmp_path) == LEFT


def test_other_rules_begin_anew(ask, whole, tmp_path):
    assert ask(tmp_path, line=20, size=24)[0] == -signal.SIGKILL
    status, opened = ask(tmp_path)
    assert (status, len(opened)) == (0, 23) and written(tmp_path) == whole


def test_a_film_that_was_replaced_in_between_is_read_again(ask, whole, raw, tmp_path):
    path = raw / "TB_Chest_Radiography_Database/Tuberculosis/TB.0.png"; before = path.read_bytes()
    save(path, film(999, 64)); assert ask(tmp_path, line=23)[0] == -signal.SIGKILL
    path.write_bytes(before)
    status, opened = ask(tmp_path)
    assert status == 0 and len(opened) == 2 and "TB.0.png" in opened and written(tmp_path) == whole


def test_killed_from_outside_among_its_workers(whole, raw, tmp_path):
    "Real reading processes: they end by themselves when their parent is gone, and hold no lock."
    code = "import sys; from cxr_pred.data.etl import run_etl; run_etl(sys.argv[1], sys.argv[2], ['tb'], 16, workers=1)"
    run, lines = [sys.executable, "-c", code, str(raw), str(tmp_path)], tmp_path / "reading" / "rows.jsonl"
    count = lambda: lines.read_bytes().count(b"\n") if lines.exists() else 0
    p = subprocess.Popen(run, cwd=root()); end = time.monotonic() + 300
    while count() < 4: assert p.poll() is None and time.monotonic() < end; time.sleep(0.002)
    family = psutil.Process(p.pid).children(recursive=True)
    p.kill(); assert p.wait() == -signal.SIGKILL
    assert psutil.wait_procs(family, timeout=120)[1] == [], "a worker outlived its run"
    assert subprocess.run(run, cwd=root()).returncode == 0
    assert written(tmp_path) == whole and below(tmp_path) == LEFT


@pytest.fixture
def mine(raw, tmp_path):
    "The same films in a folder of the test's own, to be changed."
    shutil.copytree(raw, tmp_path / "raw")
    return tmp_path / "raw"


def named(*paths): return [image_id("tb", f"TB_Chest_Radiography_Database/{p}") for p in paths]


def test_after_a_change_only_that_film_is_opened(ask, whole, mine, tmp_path):
    "Replaced, added, taken away: the bytes are those of a new run over the same films, and the pictures of what is gone leave their room to others."
    run, normal = tmp_path / "run", mine / "TB_Chest_Radiography_Database/Normal"
    assert ask(run, mine)[0] == 0 and written(run) == whole
    room = (run / "reading/pictures.u8").stat().st_size
    assert ask(run, mine) == (0, []) and written(run) == whole
    def check(n, opened):
        assert ask(run, mine) == (0, opened) and below(run) == LEFT
        assert ask(tmp_path / f"new{n}", mine)[0] == 0 and written(tmp_path / f"new{n}") == written(run)
    for n in range(3):
        save(normal / "N.3.png", film(400 + n, 64)); check(n, ["N.3.png"])
    (normal / "N.5.png").unlink(); check(3, [])
    save(normal / "N.X.png", film(500, 64)); check(4, ["N.X.png"])
    assert (run / "reading/pictures.u8").stat().st_size == room, "five changes, and no more room"
    assert len((run / "reading/rows.jsonl").read_bytes().splitlines()) == 1 + 23, "a line for each film that is there"


def test_flagged_films_are_opened_and_no_other(ask, whole, mine, tmp_path):
    run, flags = tmp_path / "run", named("Normal/N.2.png", "Tuberculosis/TB.7.png", "Normal/text.png")
    assert ask(run, mine)[0] == 0
    pd.DataFrame(dict(image_id=flags, note="look again")).to_parquet(tmp_path / "flagged.parquet"); (tmp_path / "nobody.txt").touch()
    for only, wanted in ((flags[:1], ["N.2.png"]), (str(tmp_path / "flagged.parquet"), ["N.2.png", "TB.7.png", "text.png"]), (str(tmp_path / "nobody.txt"), []), ("", []), ([], [])):
        status, opened = ask(run, mine, only=only)
        assert status == 0 and sorted(opened) == sorted(wanted) and written(run) == whole and below(run) == LEFT, only


def test_only_stops_where_the_others_are_not_known(ask, whole, mine, tmp_path):
    run, one = tmp_path / "run", named("Normal/N.2.png")
    assert ask(run, mine, only=one)[1][0] == "not_read_before", "no run yet"
    assert ask(run, mine)[0] == 0
    before = {f: (run / f).read_bytes() for f in LEFT}
    assert ask(run, mine, only=named("Normal/nobody.png")) == (0, ["unknown_film", f"No film of these sources has the image_id {named('Normal/nobody.png')[0]}."])
    code, message, *opened = ask(run, mine, only=one, size=24)[1]
    assert code == "not_read_before" and message.startswith("22 films ") and opened == []
    save(mine / "TB_Chest_Radiography_Database/Normal/N.X.png", film(500, 64))
    code, message, *opened = ask(run, mine, only=one)[1]
    assert code == "not_read_before" and message.startswith("1 films ") and opened == [] and before == {f: (run / f).read_bytes() for f in below(run)}, "nothing was touched"
    assert ask(run, mine, only=named("Normal/N.X.png")) == (0, ["N.X.png"]), "the new film may itself be named"


def test_killed_among_flagged_films_it_goes_on(ask, whole, mine, tmp_path):
    "At each step, and between the films: what was read again is not read a third time."
    run, flags = tmp_path / "run", named("Normal/N.1.png", "Normal/N.2.png", "Tuberculosis/TB.7.png", "Normal/copy.png")
    assert ask(run, mine)[0] == 0
    room = (run / "reading/pictures.u8").stat().st_size
    for how in (dict(line=2), dict(torn=2), dict(line=2)): assert ask(run, mine, only=flags, **how)[0] == -signal.SIGKILL
    status, opened = ask(run, mine, only=flags)
    assert status == 0 and len(opened) == 1 and written(run) == whole
    n = 0
    while True:
        n += 1
        status, opened = ask(run, mine, only=flags, step=n)
        if status == 0: break
        status, opened = ask(run, mine, only=flags)
        assert status == 0 and len(opened) <= 4 and written(run) == whole and below(run) == LEFT, n
    assert n > 8 and (run / "reading/pictures.u8").stat().st_size == room


def test_a_film_that_cost_its_worker(ask, whole, mine, tmp_path):
    "It is tried again by the next run, but does not keep a run of other films from going."
    run, one = tmp_path / "run", named("Normal/N.2.png")
    assert ask(run, mine, crash="TB.4.png")[0] == 0
    lost = written(run); assert lost != whole
    assert ask(run, mine, only=one) == (0, ["N.2.png"]) and written(run) == lost
    assert ask(run, mine, crash="TB.4.png") == (0, ["TB.4.png"]) and written(run) == lost
    assert ask(run, mine) == (0, ["TB.4.png"]) and written(run) == whole
