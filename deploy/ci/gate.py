"The evaluation gate: gate.py FOLDER reads gates.json of a run, says each gate in a line of Markdown, and exits with 3 to halt."
import json, sys
from pathlib import Path

HALT = 3


def row(gate: dict) -> str:
    "One gate as a row of a table; a figure of time is the load test's to measure."
    said = {True: "passed", False: "**missed**"}.get(gate["passed"], gate["passed"])
    return f"| {gate['name']} | {gate.get('value', '')} | {gate['wants']} {gate['threshold']} | {said} | {gate['action']} |"


def halting(gates: list[dict]) -> list[str]:
    "Names of the gates that stop the pipeline: those whose action is to halt and that did not pass, the unmeasured too."
    return [g["name"] for g in gates if g["action"] == "halt" and g["passed"] is not True]


def main(folder: str) -> int:
    path = Path(folder) / "gates.json"
    try: gates = json.loads(path.read_text(encoding="utf-8"))["gates"]
    except (OSError, ValueError, KeyError) as e:
        print(f"{path} cannot be read ({type(e).__name__}): a model without gates does not go on.", file=sys.stderr)
        return HALT
    print("| gate | value | wanted | | if missed |", "| --- | --- | --- | --- | --- |", *map(row, gates), sep="\n")
    fairness = [g for g in gates if g["name"].startswith("gap by ")]
    print(f"\nFairness: {sum(g['passed'] is True for g in fairness)} of {len(fairness)} gaps between groups are within their limit, "
          f"{sum(g['passed'] == 'not measured' for g in fairness)} were not measured.")
    stopped = halting(gates)
    if stopped: print(f"\nHalt: {', '.join(stopped)}.")
    return HALT if stopped else 0


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit("gate.py FOLDER, e.g. runs/clinical/metrics")
    sys.exit(main(sys.argv[1]))
