"Read the checker's hand-written cases: what was said, and the answer that it was said of."
import json
from pathlib import Path

from cxr_pred.data.labels import LABELS
from cxr_pred.language.case import Case
from cxr_pred.language.facts import entry, texts
from cxr_pred.language.findings import Explanation
from cxr_pred.vision.finding import Finding

PATH = Path(__file__).parent / "checker_cases.jsonl"


def load_cases(path: Path = PATH) -> list[dict]:
    "All cases, in the file's order."
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def case_finding(case: dict) -> Finding | None:
    "The finding, with what is left of the probability spread evenly over the other nine classes; none where the reader gave no answer."
    if (f := case["finding"]) is None: return None
    rest = {l: (1 - f["probability"]) / (len(LABELS) - 1) for l in LABELS}
    return Finding(**f, probabilities={**rest, f["label"]: f["probability"]})


def case_asked(case: dict) -> Case:
    "What the writer was told: nothing of a child or of symptoms, in all of them."
    return Case(status=case["status"], reason_code=case["reason_code"], finding=case_finding(case))


def case_explanation(
    case: dict,
    facts: dict,  # as loaded: the lines that the product adds are always today's
) -> Explanation:
    "What a patient would read: the words of the case, and those lines of the facts that the case says were added."
    said, e = case["explanation"], entry(facts, case_asked(case))
    lines = {kind: texts(e, kind) for kind in case["adds"]}
    return Explanation(summary=said["summary"], details=" ".join([said["details"], *lines.get("caveat", [])]), urgency=said["urgency"],
                       next_steps=[*said["next_steps"], *lines.get("urgent_signs", [])], source="llm", verified=False)
