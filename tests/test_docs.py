"The guides say what is there: every test, setting, alarm, command and file that they name exists, and none that exists is left out."
import ast, importlib, re

import pytest
import yaml

from cxr_pred.cli import cli
from cxr_pred.core import root

ROOT = root()
GUIDES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "deploy/README.md"]
STRIDE = {"Spoofing", "Tampering", "Repudiation", "Information disclosure", "Denial of service", "Elevation of privilege"}


def all_tests() -> set[str]:
    "Every test's name, and that of each notebook's."
    names = {n.name for f in (ROOT / "tests").glob("test_*.py") for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")}
    return names | {f"test_notebook_runs[{p.relative_to(ROOT)}]" for p in (ROOT / "nbs").rglob("*.ipynb")}


def settings_here() -> set[str]:
    "The variables of every class of settings in the package."
    found = set()
    for f in (ROOT / "cxr_pred").rglob("*.py"):
        for name in re.findall(r"^class (\w+)\(BaseSettings\)", f.read_text(), re.M):
            c = getattr(importlib.import_module(".".join(f.relative_to(ROOT).with_suffix("").parts)), name)
            found |= {f"{c.model_config['env_prefix']}{n.upper()}" for n in c.model_fields}
    return found


def commands_here() -> set[str]:
    "`users add` and the like, and those without a second word."
    from typer.main import get_command
    top = get_command(cli).commands
    return set(top) | {f"{name} {sub}" for name, c in top.items() for sub in getattr(c, "commands", {})}


def test_every_threat_has_its_test():
    rows = [[c.strip() for c in l.strip("|").split("|")] for l in (ROOT / "docs/threats.md").read_text().splitlines() if l.startswith("|")][2:]
    from conftest import LONG
    there = all_tests()
    assert {r[0].strip("*") for r in rows} == STRIDE and len(rows) >= 30
    for kind, what, against, named in rows:
        found = re.findall(r"`(test_[^`]+)`", named)
        assert what and against and found, f"{kind}: {what}: no test is named"
        assert set(found) <= there, f"{what}: there is no {set(found) - there}"
        assert set(found) - LONG, f"{what}: `make test` does not run it"


def test_every_setting_is_explained():
    told = set(re.findall(r"`(CXR_[A-Z_]+)`", (ROOT / "docs/operator.md").read_text()))
    assert settings_here() - told == set(), "docs/operator.md leaves these out"
    assert told - settings_here() == set(), "docs/operator.md names what cannot be set"


def test_every_alarm_says_what_to_do():
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules/cxr.yml").read_text())
    alarms = {r["alert"] for g in rules["groups"] for r in g["rules"] if "alert" in r}
    rows = {r[0].strip("` "): r[1:] for l in (ROOT / "docs/operator.md").read_text().splitlines() if l.startswith("| `") and (r := l.strip("|").split("|"))}
    assert alarms <= set(rows), f"docs/operator.md leaves out {alarms - set(rows)}"
    for alarm in alarms: assert all(c.strip() for c in rows[alarm][:2]), f"{alarm}: what it means, what to do first"


def test_every_figure_of_the_services_is_explained():
    sources = "\n".join(f.read_text() for part in ("clinic", "language") for f in (ROOT / "cxr_pred" / part).glob("*.py"))
    here = {name + ("_total" if kind == "Counter" else "") for kind, name in re.findall(r'(Counter|Gauge|Histogram|GaugeMetricFamily)\("(cxr_\w+)"', sources)}
    table = (ROOT / "docs/operator.md").read_text().split("| figure | tells |")[1].split("\n\n")[0]
    told = {n for row in table.splitlines()[2:] for n in re.findall(r"`(cxr_\w+)`", row)}
    assert len(here) > 20 and told == here, f"left out: {here - told}; not there: {told - here}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda p: p.name)
def test_commands_and_files_are_there(guide):
    text, there = guide.read_text(), commands_here()
    for words in re.findall(r"cxr-pred ((?:[a-z][a-z-]+)(?: [a-z][a-z-]*)?)", text):
        first = words.split(" ")[0]
        assert first in there, f"{guide.name}: cxr-pred {words}"
        if any(c.startswith(f"{first} ") for c in there) and " " in words: assert words in there, f"{guide.name}: cxr-pred {words}"
    for target in re.findall(r"^make ([a-z][a-z-]*)|`make ([a-z][a-z-]*)", text, re.M):
        assert re.search(rf"^{''.join(target)}:", (ROOT / "Makefile").read_text(), re.M), f"{guide.name}: make {''.join(target)}"
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not link.startswith("http"): assert (guide.parent / link).exists(), f"{guide.name}: {link}"


def spans(text: str) -> list[str]:
    "What a guide gives to type: the lines of its blocks, comments cut off and continued lines joined, and its code spans."
    blocks = re.findall(r"^```(?:bash|sh)?\n(.*?)^```", text, re.M | re.S)
    lines = [re.sub(r"\s+#( .*|$)", "", l) for b in blocks for l in b.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def options_of(words: list[str]) -> tuple[str, set[str]]:
    "Name and options of the command that words begin with."
    from typer.main import get_command
    command, named = get_command(cli), []
    while words and (sub := getattr(command, "commands", {}).get(words[0])): command, named = sub, named + [words.pop(0)]
    return " ".join(named), {o for p in command.params for o in p.opts + p.secondary_opts} | {"--help"}


ASKED = [*GUIDES, ROOT / "README.md", ROOT / "deploy/ray/README.md", ROOT / "deploy/elk/README.md", ROOT / "deploy/space/README.md", ROOT / "deploy/browser/README.md"]


@pytest.mark.parametrize("guide", ASKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_options_are_there(guide):
    for typed in spans(guide.read_text()):
        for rest in re.findall(r"(?:^|[ /])cxr-pred(?:\.sh)? ([a-z][^;|&]*)", typed):
            name, known = options_of(words := rest.split())
            assert name, f"{guide.name}: {typed}"
            assert {w.split("=")[0] for w in words if re.match(r"--[a-z]", w)} <= known, f"{guide.name}: {typed}"


def sources(folder) -> str: return "\n".join(p.read_text() for p in sorted(folder.iterdir()) if p.suffix in (".yaml", ".sh"))


@pytest.mark.parametrize("guide", ASKED, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_typed_is_there(guide):
    "Variables of make, scripts, services and profiles of Compose, files."
    make = (ROOT / "Makefile").read_text()
    files = [yaml.load(re.sub(r"!reset ", "", p.read_text()), yaml.SafeLoader) for p in (ROOT / "deploy/compose").glob("compose*.yaml")]
    services = {n for f in files for n in f["services"]}
    profiles = {p for f in files for s in f["services"].values() for p in s.get("profiles", [])} | {"*"}
    for typed in spans(guide.read_text()):
        said = f"{guide.name}: {typed}"
        for target, more in re.findall(r"^make ([a-z][a-z-]*)((?: [A-Z]+=\S*)*)", typed):
            assert re.search(rf"^{target}:", make, re.M), said
            for variable in re.findall(r"([A-Z]+)=", more): assert f"$({variable})" in make, said
        for script in re.findall(r"(?:^|[ (])(?:\./)?((?:[\w-]+/)*[\w-]+\.(?:sh|py))\b", typed):
            assert any((place / script).is_file() for place in (guide.parent, ROOT, ROOT / "deploy", ROOT / "deploy/compose", ROOT / "deploy/ci")), said
        if m := re.search(r"docker compose (?:--profile (\S+) )?(?:exec|stop|start|rm|up|run)((?: --?[a-z][\w-]*)*) ?([a-z][a-z-]*)?", typed):
            assert (m[1] or "*").strip("'\"") in profiles, said
            if m[3]: assert m[3] in services, said
        for named in re.findall(r"COMPOSE_PROFILES=([\w,]+)", typed): assert set(named.split(",")) <= profiles, said
        for named in re.findall(r"COMPOSE_FILE=([\w.:]+)", typed): assert all((ROOT / "deploy/compose" / f).is_file() for f in named.split(":")), said
        if typed.startswith("kubectl"): continue   # deploy/NAME is a Deployment there
        for path in re.findall(r"(?:^|[ =])((?:deploy|docs|nbs|tests|models|data|metrics|profiles)/[\w./-]*[\w/])(?=$|[ :;,)])", typed):
            assert (ROOT / path).exists() or path.startswith(("data/raw", "models/release", "deploy/compose/secrets")), said


def test_citation():
    own = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    said = (ROOT / "settings.ini").read_text()
    assert f"version = {own['version']}\n" in said and own["license"] == "Apache-2.0" and own["cff-version"] == "1.2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text() and f"## {own['version']}" in (ROOT / "CHANGELOG.md").read_text()
