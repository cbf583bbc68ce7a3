"The checker's test set itself: every case can be read, is the only one of its kind, and keeps the promises of tests/language/README.md."
import difflib
import itertools
from collections import Counter
from pathlib import Path

from cxr_pred.language.facts import entry, load_facts, texts, urgency
from language.cases import case_asked, case_explanation, load_cases

FACTS = load_facts(Path(__file__).parents[1] / "nbs/language/facts.yaml")
CASES = load_cases()
FAULTS = {"condition", "negation", "side", "zone", "severity", "certainty", "number", "urgency", "medicine", "diagnosis_certain", "disclaimer_missing", "other"}
GOOD = [c for c in CASES if c["verdict"] == "good"]


def said(case):
    e = case["explanation"]
    return " ".join([e["summary"], e["details"], *e["next_steps"]])


def rule(case): return urgency(FACTS, case_asked(case))


def test_there_are_enough_of_each():
    assert len({c["id"] for c in CASES}) == len(CASES) >= 500
    assert Counter(c["verdict"] for c in CASES) == {"good": len(GOOD), "bad": len(CASES) - len(GOOD)} and len(GOOD) >= 200
    faults = Counter(c["fault"] for c in CASES if c["verdict"] == "bad")
    assert set(faults) == FAULTS and min(faults.values()) >= 15
    labels = Counter(c["finding"]["label"] for c in CASES if c["finding"])
    assert len(labels) == 10 and min(labels.values()) >= 20
    assert all(c["fault"] == "" for c in GOOD) and all(c["why"].strip() for c in CASES)


def test_every_case_can_be_read():
    for case in CASES:
        e = case_explanation(case, FACTS)
        assert e.summary and e.details and len(e.next_steps) >= 2, case["id"]
        assert (case["finding"] is None) == (case["status"] != "ok"), case["id"]


def test_a_good_one_has_the_urgency_of_the_rule_and_the_lines_that_must_stand():
    for case in GOOD:
        e = case_explanation(case, FACTS)
        due = texts(entry(FACTS, case_asked(case)), "caveat", "urgent_signs")
        assert due and (e.urgency, [line for line in due if line not in e.text]) == (rule(case), []), case["id"]


def test_only_faults_of_urgency_and_disclaimer_touch_what_the_product_adds():
    below = {c["fault"] for c in CASES if c["explanation"]["urgency"] != rule(c)}
    cut = {c["fault"] for c in CASES if c["adds"] != ["caveat", "urgent_signs"]}
    assert (below, cut) == ({"urgency"}, {"disclaimer_missing"})


def test_no_two_texts_are_alike():
    words = [said(c).lower().split() for c in CASES]
    assert len({" ".join(w) for w in words}) == len(words)
    for (i, a), (j, b) in itertools.combinations(enumerate(words), 2):
        pair = difflib.SequenceMatcher(None, a, b)
        if pair.real_quick_ratio() > 0.85 and pair.quick_ratio() > 0.85: assert pair.ratio() <= 0.85, (CASES[i]["id"], CASES[j]["id"])
