"What the README says is so: it is made from the notebook, its commands run as written, its targets, parameters and files exist."
import os, re, shlex, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from test_api import FACTS, dicom, encoded, pattern
from test_cli import environment, ready, service

from cxr_pred.core import DISCLAIMER, root
from cxr_pred.vision.toy import toy_bundle

ROOT = root()
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines() if line.split("#")[0].strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    "A folder as the README's reader has it: a film, a DICOM film, a folder of films; the toy stands in for the bundle."
    d = tmp_path_factory.mktemp("readme")
    toy_bundle(d / "bundle", FACTS)
    (d / "films").mkdir()
    (d / "film.png").write_bytes(encoded(pattern())); (d / "film.dcm").write_bytes(dicom(pattern(5))); (d / "films" / "film.png").write_bytes(encoded(pattern()))
    (d / "bin").mkdir()
    (d / "bin" / "cxr-pred").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m cxr_pred.cli "$@"\n'); (d / "bin" / "cxr-pred").chmod(0o755)
    return d


def shell(command, place, cwd=None):
    path = os.pathsep.join([str(place / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(command, shell=True, executable="/bin/bash", capture_output=True, text=True, cwd=cwd or place, env=environment(place, PATH=path), timeout=300)


def test_it_is_what_the_notebook_says(place):
    r = shell(f"make -s -C {ROOT} readme OUT={place / 'README.md'}", place)
    assert r.returncode == 0 and (place / "README.md").read_text() == README, "run `make readme`"


def test_it_has_what_a_visitor_needs():
    first_screen = README[:2500]
    assert "not a medical device" in first_screen and "make run" in first_screen and "docs/page.png" in first_screen and "when it cannot tell" in first_screen
    assert DISCLAIMER.split(". ")[0].removeprefix("This is ") in first_screen
    picture = ROOT / "docs" / "page.png"
    assert 20_000 < picture.stat().st_size < 300_000


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("cxr-pred ")])
def test_command_runs_as_written(place, command):
    r = shell(command, place)
    assert r.returncode == 0, r.stdout + r.stderr
    for name in re.findall(r"--(?:html|heatmap|out) (\S+)", command): assert (place / name).stat().st_size > 1000


def test_every_command_is_accounted_for():
    known = ("cxr-pred ", "make ", "curl ", "dvc ", "mlflow ")
    assert len(COMMANDS) >= 15 and not [c for c in COMMANDS if not c.startswith(known)]


def test_curl(place):
    one, many = (c for c in COMMANDS if c.startswith("curl "))
    with service(place, "serve", "--no-ui") as (url, p, said):
        ready(url)
        r, s = (shell(command.replace("http://127.0.0.1:8000", url), place) for command in (one, many))
    assert '"label":"PNEUMONIA"' in r.stdout, r.stderr
    assert '"label": "PNEUMONIA"' in s.stdout and '"label": "FRACTURE_FINGERS"' in s.stdout and s.stdout.endswith('{"done": 2, "failed": 0}\n'), s.stderr


def test_python(place):
    snippet, = re.findall(r"```python\n(.*?)```", README, re.S)
    r = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, cwd=place, env=environment(place))
    assert r.stdout.strip() == "ok PNEUMONIA", r.stderr


def test_make_targets_exist():
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make ")} | set(re.findall(r"`make ([\w-]+)", README))
    assert {"run", "test", "app", "lab", "test-deps", "release"} <= targets
    for t in targets:
        r = subprocess.run(["make", "-n", t], cwd=ROOT, capture_output=True, text=True)
        assert r.returncode == 0, t
    assert "cxr-pred app --port 8001" in subprocess.run(["make", "-n", "app", "PORT=8001"], cwd=ROOT, capture_output=True, text=True).stdout
    clinical = subprocess.run(["make", "-n", "run", "PROFILE=clinical", "DATA=/somewhere"], cwd=ROOT, capture_output=True, text=True).stdout
    assert 'cxr-pred link-data "/somewhere"' in clinical and "dvc repro profiles/clinical/dvc.yaml" in clinical and "cxr-pred show --profile clinical" in clinical


@pytest.mark.parametrize("python3, python311, chosen", [("3.12", None, ""), ("3.12", "3.11", "python3.11"), ("3.11", None, "python3"), ("3.10", None, ""), (None, None, ""), ("3.11", "broken", "python3")])
def test_set_up_takes_python_3_11_and_no_other(tmp_path, python3, python311, chosen):
    "Stand-ins say which version they are and write down who was asked for an environment."
    for name in ("Makefile", "requirements.lock", "settings.ini", "setup.py"): (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "sh", "make", "test", "echo", "touch", "id"): os.symlink(shutil.which(tool), tmp_path / "bin" / tool)
    for name, version in (("python3", python3), ("python3.11", python311)):
        if version is None: continue
        code = f'#!/bin/sh\ncase "$1" in --version) echo Python {version}.1;; -c) exec "{sys.executable}" -c "import sys; sys.version_info = (*map(int, \'{version}\'.split(\'.\')), 1); $2";; *) echo "{name} $*" > asked; exit 1;; esac\n'
        (tmp_path / "bin" / name).write_text(code if version != "broken" else "#!/bin/sh\nexit 127\n"); (tmp_path / "bin" / name).chmod(0o755)
    r = subprocess.run(["make", "setup"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": str(tmp_path / "bin")})
    asked = (tmp_path / "asked").read_text().split()[0] if (tmp_path / "asked").exists() else ""
    assert r.returncode != 0 and asked == chosen, r.stdout + r.stderr
    assert ("Python 3.11 is needed" in r.stdout) == (not chosen) and ("apt-get" in r.stdout), r.stdout
    if not chosen and python3: assert f"Python {python3}.1" in r.stdout, "what was found"


def test_an_environment_of_another_python_is_refused(tmp_path):
    for name in ("Makefile", "requirements.lock", "settings.ini", "setup.py"): (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "pip"): (tmp_path / ".venv" / "bin" / name).write_text("#!/bin/sh\nexit 1\n"); (tmp_path / ".venv" / "bin" / name).chmod(0o755)
    r = subprocess.run(["make", "setup"], cwd=tmp_path, capture_output=True, text=True)
    assert r.returncode != 0 and "rm -r .venv" in r.stdout, r.stdout + r.stderr


def test_the_experiment_names_a_parameter():
    setting = next(c for c in COMMANDS if c.startswith("dvc exp run")).split("-S ")[1]
    section, key = setting.split("=")[0].split(".")
    assert key in yaml.safe_load((ROOT / "params.yaml").read_text())[section]


def test_dvc_shows_numbers(place):
    r = shell("dvc metrics show", place, ROOT)
    assert r.returncode == 0 and "headline" in r.stdout and "accuracy" in r.stdout, r.stderr


def test_mlflow_takes_these_options():
    command = shlex.split(next(c for c in COMMANDS if c.startswith("mlflow ")))
    from mlflow.cli import cli
    options = {o for p in cli.get_command(None, command[1]).params for o in p.opts}
    assert {a for a in command if a.startswith("--")} <= options and command[-1] == "sqlite:///mlflow.db"


def test_files_it_names_are_there():
    for name in re.findall(r"`((?:nbs|profiles|params|dvc)[\w./-]*)`", README): assert (ROOT / name).exists(), name
    sets = re.search(r"cxr-pred fetch-data (\w+)", README)[1]
    from cxr_pred.data.fetch import DATASETS
    assert sets in DATASETS and all(d.folder in README for d in DATASETS.values())
