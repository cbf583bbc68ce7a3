"""Canary and production on this machine: canary.py NEW STABLE [--signers FILE] [--limits FILE]

HAProxy with deploy/haproxy/haproxy.cfg, two readers and `cxr-pred rollout watch`, each a process on the loopback, and senders that never
pause. The new bundle is tested under load, reads a tenth of the films, then all of them; the watch takes it back by itself. Exits with 4 (roll back).
"""
import argparse, json, ssl, subprocess, sys, tempfile, threading, time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

ROOT, ROLL_BACK = Path(__file__).resolve().parents[2], 4
# of deploy/rollout.yaml's limits those that are times: half an hour is for patients' films, a minute shows that the way works
SHORT = {"clients": 2, "step_s": 5, "canary_s": 60, "keep_s": 20, "for_s": 20, "window_s": 20, "least": 5, "every_s": 1, "wait_s": 300}


class Missed(Exception):
    "Why the chain ends here, for people; and the exit status."
    def __init__(self, why: str, status: int): super().__init__(why); self.status = status


class Traffic:
    "Senders that never pause: when each film was sent, its HTTP status (0: no answer), and which server answered."

    def __init__(self, url: str, films: list[bytes], certificate: Path, senders: int = 2):
        self.url, self.films, self.context, self.answers, self.stopping = url, films, ssl.create_default_context(cafile=certificate), [], threading.Event()
        self.threads = [threading.Thread(target=self.send, args=(k,)) for k in range(senders)]
        for t in self.threads: t.start()

    def send(self, k: int) -> None:
        import httpx
        with httpx.Client(verify=self.context, trust_env=False, timeout=60) as client:
            while not self.stopping.wait(0.05):
                begun = time.time()
                try: r = client.post(f"{self.url}/v1/predict", params={"explain": "false"}, files={"file": ("film.png", self.films[(k := k + 1) % len(self.films)])}); said = r.status_code, r.headers.get("X-Served-By")
                except httpx.HTTPError: said = 0, None
                self.answers.append((begun, *said))

    def since(self, begun: float) -> list[tuple]: return [a for a in self.answers if a[0] >= begun]

    def stop(self) -> None:
        self.stopping.set()
        for t in self.threads: t.join()


class Trial:
    "The parts, started and stopped together; `canary` and `production` say what was seen, or raise `Missed`."

    def __init__(self, folder: Path, new: Path, stable: Path, signers: Path | None = None, limits: dict | None = None, films: list[bytes] | None = None, tell=print):
        self.folder, self.new, self.stable, self.signers, self.films, self.tell, self.stack = Path(folder), Path(new), Path(stable), signers, films, tell, ExitStack()
        import yaml
        self.limits = yaml.safe_load((ROOT / "deploy/rollout.yaml").read_text()) | SHORT | (limits or {})

    def __enter__(self) -> "Trial":
        from cxr_pred.core import CxrError
        from cxr_pred.ops import stack
        from cxr_pred.ops.rollout import Memory, made_up_films, target
        import yaml
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "rollout.yaml").write_text(yaml.safe_dump(self.limits))
        port = stack.ports(True)
        at = lambda n: f"127.0.0.1:{port[n]}"
        self.env = {"CXR_STATE": str(self.folder / "state"), "CXR_THREADS": "1", "CXR_FILMS_PER_MINUTE": "1000000", "CXR_ROLLOUT_LIMITS": str(self.folder / "rollout.yaml"), "CXR_ROLLOUT_PROXY": at("proxy_admin"),
                    "CXR_ROLLOUT_STABLE": f"http://{at('stable')}", "CXR_ROLLOUT_CANARY": f"http://{at('canary')}", "PYTHONPATH": str(ROOT)} | ({"CXR_ROLLOUT_SIGNERS": str(Path(self.signers).absolute())} if self.signers else {})
        site, self.memory = stack.Site(self.folder, port, self.env), Memory(self.folder / "state")
        try:
            self.old, self.version = target(self.stable, self.signers), target(self.new, self.signers)
            self.cli("start", self.stable)
            for part in (stack.haproxy(site), stack.reader(site, "stable", False), stack.reader(site, "canary", False), next(p for p in stack.watches(site) if p.name == "rollout")):
                self.stack.callback(part.stop); part.start()
                self.until(part.is_ready, f"{part.name} is not ready", self.limits["wait_s"] + 100)
            self.senders = lambda: Traffic(f"https://{at('clinic')}", self.films or made_up_films(), stack.certificate(self.folder))
        except CxrError as e: self.stack.close(); raise Missed(str(e), ROLL_BACK) from e
        except BaseException: self.stack.close(); raise
        return self

    def __exit__(self, *what) -> None: self.stack.close()

    def cli(self, *words) -> None:
        "A command of the rollout, as an operator would type it."
        import os
        r = subprocess.run([sys.executable, "-W", "ignore", "-m", "cxr_pred.cli", "rollout", *map(str, words)], env=os.environ | self.env, capture_output=True, text=True, cwd=ROOT)
        if r.stdout: self.tell(r.stdout.strip())
        if r.returncode: raise Missed(next((l for l in reversed(r.stderr.splitlines()) if l.strip()), f"cxr-pred rollout {words[0]} ended with {r.returncode}"), ROLL_BACK)

    def until(self, look, what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not look():
            if time.monotonic() > end: raise Missed(f"{what} after {seconds:g} s", ROLL_BACK)
            time.sleep(0.2)

    def stage(self, *wanted: str) -> bool:
        "Whether the rollout is in one of these stages; raises `Missed` where it went back."
        state = self.memory.read()
        if (line := state.decisions[-1])["what"] == "rollback": raise Missed(self.back(line), ROLL_BACK)
        return state.stage in wanted

    def back(self, line: dict) -> str:
        "What became of the films after a rollback: all of them to the version before."
        n = len(self.traffic.answers)
        self.until(lambda: len(self.traffic.answers) > n + 20, "no films after the way back", 120)
        late, before = self.traffic.since(line["at"] + 2), self.traffic.since(0)
        lost, elsewhere = sum(a[1] != 200 for a in before), sum(a[2] != "stable" for a in late)
        return f"back by itself from {line['from']} ({line['rule']}): {line['why']}; {self.old.version} reads, {lost} of {len(before)} films lost, {elsewhere} of the {len(late)} later ones to the new version"

    def answered(self, begun: float) -> tuple[Counter, int]: films = self.traffic.since(begun); return Counter(a[2] for a in films if a[1] == 200), sum(a[1] != 200 for a in films)

    def canary(self) -> str:
        "A tenth of the films for `canary_s`, while the watch looks."
        self.cli("start", self.new)   # its load test is over before the senders begin
        self.traffic = self.senders(); self.stack.callback(self.traffic.stop)
        self.until(lambda: self.stage("canary"), "the canary's reader is not ready", self.limits["wait_s"] + 60)
        begun = time.time()
        while time.time() < begun + self.limits["canary_s"]: self.stage("canary"); time.sleep(0.5)
        n, lost = self.answered(begun)
        if n["canary"] < self.limits["least"]: self.cli("rollback", "--why", "too few films"); raise Missed(f"the canary read {n['canary']} films, {self.limits['least']} are wanted: it was not judged", ROLL_BACK)
        return f"read {n['canary']} of {n.total()} films ({n['canary'] / n.total():.0%}), {lost} lost, for {self.limits['canary_s']:g} s"

    def production(self) -> str:
        "All films; then the old version goes and the new one stands behind `stable`."
        self.cli("promote", "--why", "the canary was good")
        begun = time.time()
        # the watch lets the old version go after keep_s, where nothing is wrong and nobody is called
        self.until(lambda: self.stage("settled"), "the reader behind stable does not serve the new version", self.limits["keep_s"] + self.limits["wait_s"] + 100)
        n, lost = self.answered(begun)
        if self.memory.read().stable.hash != self.version.hash or lost > self.limits["failures"] * (n.total() + lost): raise Missed(f"{lost} of {n.total() + lost} films were lost on the way to {self.version.version}", ROLL_BACK)
        return f"{self.version.version} reads all: {n.total()} films since, {lost} lost"


def main() -> int:
    import os
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("new", type=Path); p.add_argument("stable", type=Path)
    p.add_argument("--signers", type=Path, help="public keys, of which one has signed both bundles"); p.add_argument("--limits", type=Path, help="limits that differ from deploy/rollout.yaml, YAML")
    a = p.parse_args()
    import yaml
    for k in [k for k in os.environ if k.startswith("CXR_")]: del os.environ[k]   # this shell's own reader is no part of it
    try:
        with tempfile.TemporaryDirectory() as d, Trial(Path(d), a.new, a.stable, a.signers, yaml.safe_load(a.limits.read_text()) if a.limits else {}) as t:
            print(json.dumps({"canary": t.canary(), "production": t.production()}))
    except Missed as e: print(f"Roll back: {e}", file=sys.stderr); return e.status
    return 0


if __name__ == "__main__": sys.exit(main())
