"The ETL killed with SIGKILL: at each step that touches its files, in the middle of a line, and from outside among its workers. What the next run leaves is what a run without a kill leaves, byte for byte."
import json, os, signal, subprocess, sys, time

import numpy as np
import psutil
import pytest
from test_etl import film, save

from cxr_pred.core import root

OUT = ("data/films.npy", "data/manifest.parquet", "data/rejects.parquet", "metrics/etl.json")

# One process imports everything, and a fork of it does each run: with its reading in the process itself, so that a run takes no time.
# {"run": folder} finishes; "step": n kills at the n-th time that something below the folder is opened, moved or removed;
# "line": n kills before the n-th film is written down; "torn": n after half of its line.
FORKS = """
import json, os, signal, sys, traceback
import imagehash, pandera.pandas, pyarrow.parquet
from pathlib import Path
from cxr_pred.data import etl, journal

def kill(): os.kill(os.getpid(), signal.SIGKILL)

def reading(call, tasks, workers, limits):
    for t in tasks:
        said, picture = etl.read_record(*t)
        yield json.loads(json.dumps(said)), picture

def run(raw, run, step=0, line=0, torn=0, size=16):
    steps, lines, add = [0], [0], journal.Journal.add
    def count(event, args):
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree") and str(args[0]).startswith(run):
            steps[0] += 1
            if steps[0] == step: kill()
    def adding(self, key, row, picture):
        lines[0] += 1
        if lines[0] == line: kill()
        if lines[0] == torn: self.file.write(journal.as_line(dict(key=key, slot=self.slots, crc=0, row=row))[:40]); kill()
        return add(self, key, row, picture)
    etl.guarded_map, journal.Journal.add = reading, adding
    sys.addaudithook(count)
    etl.run_etl(raw, run, ["tb"], size, workers=1)
    return lines[0]

for text in sys.stdin:
    r, w = os.pipe()
    if not (pid := os.fork()):
        try: os.write(w, str(run(**json.loads(text))).encode()); os._exit(0)
        except BaseException: traceback.print_exc(); os._exit(1)
    os.close(w); status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([status, int(os.read(r, 9) or -1)]), flush=True); os.close(r)
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
    "A function that does one run in a fork: its exit status, and how many films it opened."
    p = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root())
    def once(run, **how):
        p.stdin.write(json.dumps(dict(raw=str(raw), run=str(run), **how)) + "\n"); p.stdin.flush()
        return tuple(json.loads(p.stdout.readline()))
    yield once
    p.stdin.close(); p.wait(30)


def written(run): return {f: (run / f).read_bytes() for f in OUT}
def below(run): return sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def whole(ask, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    assert ask(run) == (0, 23)
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
        assert status == 0 and written(run) == whole and below(run) == sorted(OUT), n
    assert n > 12, "the steps were not seen"


def test_killed_again_and_again_while_reading(ask, whole, tmp_path):
    "One run that is killed eleven times, whole lines and torn ones in turn: no film is opened twice."
    for n in range(11): assert ask(tmp_path, **({"line": 3} if n % 2 else {"torn": 3}))[0] == -signal.SIGKILL
    status, opened = ask(tmp_path)
    assert (status, opened) == (0, 23 - 22) and written(tmp_path) == whole and below(tmp_path) == sorted(OUT)


def test_other_rules_begin_anew(ask, whole, tmp_path):
    assert ask(tmp_path, line=20, size=24)[0] == -signal.SIGKILL
    assert ask(tmp_path) == (0, 23) and written(tmp_path) == whole


def test_a_film_that_was_replaced_in_between_is_read_again(ask, whole, raw, tmp_path):
    path = raw / "TB_Chest_Radiography_Database/Tuberculosis/TB.0.png"; before = path.read_bytes()
    save(path, film(999, 64)); assert ask(tmp_path, line=23)[0] == -signal.SIGKILL
    path.write_bytes(before)
    assert ask(tmp_path) == (0, 2) and written(tmp_path) == whole


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
    assert written(tmp_path) == whole and below(tmp_path) == sorted(OUT)
