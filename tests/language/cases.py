"Read the checker's hand-written texts: what was said, and the case that it was said of."
import json
from pathlib import Path

from cxr_pred.data.labels import LABELS
from cxr_pred.language.case import Case
from cxr_pred.language.facts import entry, texts
from cxr_pred.language.findings import Explanation
from cxr_pred.vision.finding import Finding

PATH = Path(__file__).parent / "checker_cases.jsonl"


def load_rows(path: Path = PATH) -> list[dict]:
    "All texts with their verdicts, in the file's order."
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def row_case(row: dict) -> Case:
    "What a writer was told; what is left of the probability is spread evenly over the other nine classes."
    told = {k: row[k] for k in ("status", "reason_code", "reader", "age_group", "symptoms") if k in row}
    if f := row["finding"]:
        rest = {l: (1 - f["probability"]) / (len(LABELS) - 1) for l in LABELS}
        told["finding"] = Finding(**f, probabilities={**rest, f["label"]: f["probability"]})
    return Case(**told)


def row_explanation(
    row: dict,
    facts: dict,  # as loaded: the lines that the product adds are always today's
) -> Explanation:
    "What is read in the end: the words of the row, and those lines of the facts that the row says were added."
    said, e = row["explanation"], entry(facts, row_case(row))
    lines = {kind: texts(e, kind) for kind in row["adds"]}
    return Explanation(summary=said["summary"], details=" ".join([said["details"], *lines.get("caveat", [])]), urgency=said["urgency"],
                       next_steps=[*said["next_steps"], *lines.get("urgent_signs", [])], source="llm", verified=False)
