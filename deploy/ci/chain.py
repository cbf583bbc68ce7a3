"""The steps of .github/workflows/delivery.yml on this machine, in their order: chain.py [--from STEP] [--to STEP] [--bundle FOLDER] ...

The first step that fails stops the rest. At the end stands a table of the steps, their seconds and verdicts; the exit status is that of the step
that failed: 3 where a gate halts, 4 where something goes back, else the command's own.
"""
import argparse, json, os, shutil, subprocess, sys, time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from canary import ROLL_BACK, ROOT, Missed, Trial

HALT = 3


def say(command: list, env: dict[str, str] | None = None) -> str:
    "Run a command, show what it says, and give its last line. Raises `Missed` where it fails, with its status."
    p, last = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=os.environ | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"), ""
    for line in p.stdout:
        print(line, end="", flush=True)
        if line.strip() and not line.startswith("make"): last = line.strip()   # make's own last line names no reason
    if status := p.wait(): raise Missed(last or f"{command[0]} ended with status {status}", status)
    return last


class Chain:
    "A step a method, in the order of STEPS; what one makes, the next finds in `self`."

    def __init__(self, a: argparse.Namespace, stack: ExitStack):
        import yaml
        self.a, self.stack, self.trial, self.out = a, stack, None, a.out.absolute()
        run = ROOT / "runs" / a.profile
        self.bundle, self.metrics, self.packed, self.key = a.bundle or run / "bundle", a.metrics or run / "metrics", self.out / "bundle", a.key or self.out / "signing.key"
        self.differ = yaml.safe_load(a.limits.read_text()) if a.limits else {}
        self.limits = yaml.safe_load((ROOT / "deploy/rollout.yaml").read_text()) | self.differ

    def lint(self) -> str: return say([ROOT / "deploy/ci/lint.sh"])

    def tests(self) -> str: return say(["make", "--no-print-directory", "test"])

    def train(self) -> str:
        say(["make", "--no-print-directory", "run", f"PROFILE={self.a.profile}"])
        from importlib.util import find_spec
        if "CXR_RAY_PYTHON" not in os.environ and not find_spec("ray"): return "trained in one process; no Ray here (CXR_RAY_PYTHON)"
        # the pipeline's own training stays where it is; Ray's part of it is shown on a cluster of two machines
        return "trained in one process; on Ray: " + say([sys.executable, "-m", "pytest", "-q", "tests/test_machines.py"], {"CXR_SLOW": "1"})

    def gate(self) -> str:
        if not (self.bundle / "manifest.json").is_file(): raise Missed(f"{self.bundle} holds no bundle: `make run` makes one", HALT)
        try: same = json.loads((self.bundle / "metrics/gates.json").read_bytes()) == json.loads((self.metrics / "gates.json").read_bytes())
        except (OSError, ValueError) as e: raise Missed(f"the gates of {self.bundle} or {self.metrics} cannot be read ({type(e).__name__}): a model without gates does not go on", HALT) from e
        if not same: raise Missed(f"{self.bundle} was not made by the run that {self.metrics} is of: their gates.json differ", HALT)
        said = self.judged(self.a.profile, self.metrics)
        # the model in use is judged too: the sample has no patients whose groups could be compared
        return said if self.a.profile == "clinical" else f"{said}; the model in use: {self.judged('clinical', ROOT / 'runs/clinical/metrics')}"

    def judged(self, profile: str, metrics: Path) -> str:
        "Hold a run's gates, and its fairness against the run that the commit has."
        (shipped := self.out / "shipped" / profile).mkdir(parents=True, exist_ok=True)
        before = subprocess.run(["git", "show", f"HEAD:runs/{profile}/metrics/gates.json"], cwd=ROOT, capture_output=True)
        if before.returncode: raise Missed(f"the commit holds no gates of the profile {profile} to compare with", HALT)
        (shipped / "gates.json").write_bytes(before.stdout)
        say([sys.executable, ROOT / "deploy/ci/gate.py", metrics, shipped])
        gates = json.loads((metrics / "gates.json").read_text())["gates"]
        gaps = sum(g["name"].startswith("gap by ") for g in gates)
        told = f"{gaps} gaps between groups no worse than the commit's" if before.stdout != (metrics / "gates.json").read_bytes() else "its gaps between groups are the commit's own, compared with nothing"
        return f"{sum(g['action'] == 'halt' for g in gates)} gates that halt passed, {told}"

    def package(self) -> str:
        return f"bills of materials in build/sbom. {say([ROOT / 'deploy/ci/package.sh'])}"

    def sign(self) -> str:
        from cxr_pred.core import CxrError
        from cxr_pred.ops import signature
        # the pipeline's own bundle stays as DVC knows it
        shutil.rmtree(self.packed, ignore_errors=True); shutil.copytree(self.bundle, self.packed)
        try:
            if not self.key.exists(): signature.new_key(self.key)
            return f"{signature.load_bundle(self.packed).manifest['version']} is signed with key {signature.sign(self.packed, self.key)}"
        except CxrError as e: raise Missed(str(e), HALT) from e

    def staging(self) -> str:
        from cxr_pred.core import CxrError
        from cxr_pred.ops.rollout import target
        try: new = target(self.packed, f"{self.key}.pub")
        except CxrError as e: raise Missed(str(e), ROLL_BACK) from e
        try: found = json.loads(say([ROOT / "deploy/ci/staging.sh", "--p99-ms", self.limits["gate_p99_ms"], "--failures", self.limits["gate_failures"], "--requests", self.a.requests], {"CXR_BUNDLE": str(self.packed)}))
        except Missed as e: raise Missed(told(e), e.status) from e
        return f"{new.version}: {told(found)}"

    def memory(self) -> str:
        if not shutil.which("nvidia-smi"): return "not measured: no GPU here"
        r = subprocess.run(["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"], capture_output=True, text=True)
        if r.returncode: return "not measured: no GPU reports its memory"
        most = max(100 * float(used) / float(of) for used, of in (l.split(",") for l in r.stdout.splitlines() if l.strip()))
        return f"{most:.0f} % of a GPU's memory" + (": scale up, one more replica of the language service (ci/gpu_memory.sh asks a cluster for it)" if most >= 80 else "")

    def canary(self) -> str:
        from cxr_pred.core import CxrError
        from cxr_pred.ops import signature
        # what is in use, as an earlier delivery would have packaged it
        shutil.rmtree(stable := self.out / "stable", ignore_errors=True); shutil.copytree(self.a.stable, stable)
        try: signature.sign(stable, self.key)
        except CxrError as e: raise Missed(str(e), ROLL_BACK) from e
        shutil.rmtree(house := self.out / "house", ignore_errors=True)
        self.trial = self.stack.enter_context(Trial(house, self.packed, stable, Path(f"{self.key}.pub"), self.differ))
        return self.trial.canary()

    def production(self) -> str:
        if self.trial is None: self.canary()
        return self.trial.production()


def told(found) -> str:
    "The load test's line in words."
    try: found = found if isinstance(found, dict) else json.loads(str(found))
    except ValueError: return str(found)
    return f"P99 {found['p99_ms']} ms (limit {found['p99_limit_ms']:g}), {found['failure_ratio']:.1%} failed, {found['refused_ratio']:.1%} refused, of {found['requests']} films"


# as the workflows name them, and what happens where one is missed
STEPS = {"lint": "halt", "tests": "halt", "train": "halt", "gate": "halt", "package": "halt", "sign": "halt", "staging": "roll back", "memory": "scale up", "canary": "roll back", "production": "roll back"}


def run(chain, steps: list[str]) -> tuple[list[dict], int]:
    "Steps one after another until one fails: rows of the table, and the exit status."
    rows, status = [], 0
    for step in steps:
        if status: rows.append({"step": step, "s": None, "verdict": "not reached"}); continue
        print(f"\n== {step}", flush=True)
        begun = time.monotonic()
        try: verdict = f"passed: {getattr(chain, step)()}"
        except Missed as e: verdict, status = f"FAILED: {e}", e.status
        except Exception as e: verdict, status = f"FAILED: {type(e).__name__}: {e}", 1   # whatever it was, the rest does not run
        rows.append({"step": step, "s": round(time.monotonic() - begun, 1), "verdict": verdict})
    return rows, status


def table(rows: list[dict]) -> str:
    "For people, and as Markdown."
    cells = [("step", "s", "if missed", "verdict"), *((r["step"], "" if r["s"] is None else f"{r['s']:.1f}", STEPS[r["step"]], r["verdict"].replace("|", "/")[:400]) for r in rows)]
    wide = [max(len(c[k]) for c in cells) for k in range(3)]
    lines = [f"| {c[0]:{wide[0]}} | {c[1]:>{wide[1]}} | {c[2]:{wide[2]}} | {c[3]} |" for c in cells]
    return "\n".join([lines[0], f"|{'-' * (wide[0] + 2)}|{'-' * (wide[1] + 1)}:|{'-' * (wide[2] + 2)}|---|", *lines[1:]])


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--from", dest="first", choices=STEPS, default="lint"); p.add_argument("--to", choices=STEPS, default="production")
    p.add_argument("--profile", default="sample"); p.add_argument("--requests", type=int, default=500, help="films of staging's load test")
    p.add_argument("--bundle", type=Path, help="the run's if not given"); p.add_argument("--metrics", type=Path, help="the run's if not given")
    p.add_argument("--stable", type=Path, default=ROOT / "models/release", help="the bundle in use")
    p.add_argument("--key", type=Path, help="signs; made in build/ci if not given"); p.add_argument("--limits", type=Path, help="limits that differ from deploy/rollout.yaml, YAML")
    p.add_argument("--out", type=Path, default=ROOT / "build/ci", help="for all that is written")
    a = p.parse_args()
    steps = list(STEPS)
    steps = steps[steps.index(a.first):steps.index(a.to) + 1]
    if not steps: p.error(f"--to {a.to} comes before --from {a.first}")
    for k in [k for k in os.environ if k.startswith("CXR_") and k != "CXR_RAY_PYTHON"]: del os.environ[k]   # this shell's own reader is no part of it
    a.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack: rows, status = run(Chain(a, stack), steps)
    (a.out / "summary.md").write_text(table(rows) + "\n", encoding="utf-8")
    failed = next((r for r in rows if r["verdict"].startswith("FAILED")), None)
    print(f"\n{table(rows)}\n\n" + (f"Stopped at {failed['step']} ({STEPS[failed['step']]}): {failed['verdict'].removeprefix('FAILED: ')}" if failed else f"All {len(rows)} steps passed."))
    return status


if __name__ == "__main__": sys.exit(main())
