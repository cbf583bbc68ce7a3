"The load test of staging: load.py URL FILM... sends films to /v1/predict, and exits with 4 (roll back) where P99, failures or refusals are over their limits."
import argparse, json, os, ssl, statistics, sys, threading, time, urllib.error, urllib.request
from collections import Counter
from pathlib import Path

ROLL_BACK = 4


def body(film: bytes) -> tuple[bytes, str]:
    "A multipart form with one file, and its content type."
    mark = "----------------cxr-load"
    return b"\r\n".join([f"--{mark}".encode(), b'Content-Disposition: form-data; name="file"; filename="film"', b"", film, f"--{mark}--".encode(), b""]), f"multipart/form-data; boundary={mark}"


def ask(url: str, form: tuple[bytes, str], context) -> tuple[float, int]:
    "Seconds that one film took, and the HTTP status; 0 where there was no answer."
    key = {"Authorization": f"Bearer {os.environ['LOAD_KEY']}"} if os.environ.get("LOAD_KEY") else {}   # of a service, where films are read for those only who show who they are
    request, start = urllib.request.Request(f"{url}/v1/predict?explain=false", form[0], {"Content-Type": form[1]} | key), time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:
            answer.read()
            status = answer.status
    except urllib.error.HTTPError as e: status = e.code
    except OSError: status = 0
    return time.perf_counter() - start, status


def run(url: str, forms: list, requests: int, at_once: int, context=None) -> list[tuple[float, int]]:
    "Send `requests` films, `at_once` at a time; every request ends."
    taken, lock, out = iter(range(requests)), threading.Lock(), []
    def work():
        while True:
            with lock: i = next(taken, None)
            if i is None: return
            answer = ask(url, forms[i % len(forms)], context)
            with lock: out.append(answer)
    threads = [threading.Thread(target=work) for _ in range(at_once)]
    for t in threads: t.start()
    for t in threads: t.join()
    return out


def verdict(answers: list[tuple[float, int]], p99_ms: float, failures: float) -> dict:
    "What was measured against the limits. Only a film that was read (200) is an answer: a 5xx or silence is a failure, all else a refusal, and neither is quick."
    times, statuses = sorted(t for t, s in answers if s == 200), Counter(s for _, s in answers)
    failed = sum(n for s, n in statuses.items() if s == 0 or s >= 500) / len(answers)
    refused = sum(n for s, n in statuses.items() if s != 200 and 0 < s < 500) / len(answers)
    p99 = 1000 * times[max(0, -(-99 * len(times) // 100) - 1)] if times else None
    return {"requests": len(answers), "p50_ms": round(1000 * statistics.median(times), 1) if times else None, "p99_ms": p99 and round(p99, 1), "p99_limit_ms": p99_ms,
            "failure_ratio": round(failed, 4), "refused_ratio": round(refused, 4), "failure_limit": failures, "statuses": {str(s): n for s, n in sorted(statuses.items())},
            "passed": p99 is not None and p99 < p99_ms and failed <= failures and refused <= failures}


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("url"); p.add_argument("films", nargs="+", type=Path)
    p.add_argument("--requests", type=int, default=500); p.add_argument("--at-once", type=int, default=2)
    p.add_argument("--warm-up", type=int, default=10); p.add_argument("--p99-ms", type=float, default=300); p.add_argument("--failures", type=float, default=0.01)
    p.add_argument("--ca", type=Path, help="certificate of the server's authority")
    a = p.parse_args()
    context = ssl.create_default_context(cafile=a.ca) if a.url.startswith("https:") else None
    forms = [body(f.read_bytes() + (b"\0" if f.suffix == ".png" else b"")) for f in a.films]   # a byte more: a bundle's own example is read and not recorded, and both are measured here
    run(a.url, forms, a.warm_up, a.at_once, context)
    found = verdict(run(a.url, forms, a.requests, a.at_once, context), a.p99_ms, a.failures)
    print(json.dumps(found))
    return 0 if found["passed"] else ROLL_BACK


if __name__ == "__main__": sys.exit(main())
