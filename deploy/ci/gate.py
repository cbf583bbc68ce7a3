"""The evaluation gate: gate.py FOLDER [SHIPPED] reads gates.json of a run, says each gate in a line of Markdown, and exits with 3 to halt.

With SHIPPED, the folder of the metrics of the model that is in use, fairness halts too: a gap between groups that was within its
limit has to stay there, one that was measured has to be measured, and one that is over its limit may not widen by more than WIDER.
"""
import json, sys
from pathlib import Path

HALT = 3
WIDER = 0.05   # of a gap that is over its limit already


def row(gate: dict) -> str:
    "One gate as a row of a table; a figure of time is the load test's to measure."
    said = {True: "passed", False: "**missed**"}.get(gate["passed"], gate["passed"])
    return f"| {gate['name']} | {gate.get('value', '')} | {gate['wants']} {gate['threshold']} | {said} | {gate['action']} |"


def gates_of(folder: str) -> list[dict]:
    "The gates of a run."
    return json.loads((Path(folder) / "gates.json").read_text(encoding="utf-8"))["gates"]


def gaps(gates: list[dict]) -> dict[str, dict]:
    "The gates on fairness, by name."
    return {g["name"]: g for g in gates if g["name"].startswith("gap by ")}


def halting(gates: list[dict]) -> list[str]:
    "Names of the gates that stop the pipeline: those whose action is to halt and that did not pass, the unmeasured too."
    return [g["name"] for g in gates if g["action"] == "halt" and g["passed"] is not True]


def less_fair(gates: list[dict], shipped: list[dict]) -> list[str]:
    "What is worse between groups than in the shipped model, a sentence each."
    new, out = gaps(gates), []
    for name, old in gaps(shipped).items():
        gap, was = new.get(name, {}).get("value"), old.get("value")
        if was is None or new.get(name, {}).get("passed") is True: continue
        if gap is None: out.append(f"{name} was {was} and is not measured any more")
        elif old["passed"] is True: out.append(f"{name} was {was}, within its limit, and is {gap}")
        elif gap > was + WIDER: out.append(f"{name} was {was} and is {gap}, wider by more than {WIDER}")
    return out


def main(folder: str, shipped: str = "") -> int:
    path = folder
    try:
        gates = gates_of(folder)
        path = shipped or folder
        before = gates_of(path)
    except (OSError, ValueError, KeyError) as e:
        print(f"{Path(path) / 'gates.json'} cannot be read ({type(e).__name__}): a model without gates does not go on.", file=sys.stderr)
        return HALT
    print("| gate | value | wanted | | if missed |", "| --- | --- | --- | --- | --- |", *map(row, gates), sep="\n")
    fairness, worse = gaps(gates).values(), less_fair(gates, before)
    print(f"\nFairness: {sum(g['passed'] is True for g in fairness)} of {len(fairness)} gaps between groups are within their limit, "
          f"{sum(g['passed'] == 'not measured' for g in fairness)} were not measured.")
    stopped = halting(gates) + worse
    if stopped: print(f"\nHalt: {'; '.join(stopped)}.")
    return HALT if stopped else 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3): sys.exit("gate.py FOLDER [SHIPPED], e.g. runs/clinical/metrics")
    sys.exit(main(*sys.argv[1:]))
