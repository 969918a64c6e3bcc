"""An audit of pairs whose annotators are named: what it says of each, and where."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset

from softpref.auditing import audit as audit_module
from softpref.auditing.audit import AuditOptions, audit, run_audit
from softpref.auditing.summary import WITHOUT_EVIDENCE, AnnotatorSummary
from softpref.data.sources import load_pairs
from softpref.statistics.annotators import estimate_reliability
from softpref.statistics.evidence import Evidence
from softpref.training.annotators import annotators_of
from softpref.training.output import write_lines
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
from tests.toy import toy_pairs

SIDES = ("prompt", "chosen", "rejected")


def turned(row):
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def labelled(rows, **wrong_every):
    """Return the rows labelled by each annotator, who is wrong about every so-and-so-manieth."""
    return [
        (turned(row) if every and i % every == 0 else dict(row)) | {"annotator": name}
        for name, every in wrong_every.items()
        for i, row in enumerate(rows)
    ]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_llama(make_tokenizer(), 0).save_pretrained("sft")
    make_tokenizer().save_pretrained("sft")
    rows = [{side: row[side] for side in SIDES} for row in toy_pairs(60)]
    write_lines(tmp_path / "data.jsonl", labelled(rows, ann=0, bob=4, cid=2))
    write_lines(tmp_path / "clean.jsonl", rows[:40])
    write_lines(tmp_path / "other.jsonl", toy_pairs(16, seed=1))
    return tmp_path


def test_an_audit_names_annotators_on_screen_in_summary_and_report(home, caplog):
    caplog.set_level("INFO", "softpref")
    run_audit(AuditOptions("sft", "data.jsonl", "clean.jsonl", output="out"))
    found = json.loads((home / "out" / "summary.json").read_text())["annotators"]
    assert [(each["annotator"], each["pairs"]) for each in found] == [
        ("ann", 60),
        ("bob", 60),
        ("cid", 60),
    ]
    for each, share in zip(found, (1.0, 0.75, 0.5), strict=True):
        assert each["low"] <= share <= each["high"] + 0.005
        assert 0.04 < each["high"] - each["low"] < 0.3
    report, said = (home / "out" / "report.html").read_text(), caplog.text
    lines = [str(AnnotatorSummary(**each)) for each in found]
    assert all(line in said and line[1:] in report for line in lines)
    assert [said.index(line) for line in lines] == sorted(
        (said.index(line) for line in lines), reverse=True
    )
    assert WITHOUT_EVIDENCE in said
    cleaned = [
        json.loads(line) for line in (home / "out" / "cleaned.jsonl").read_text().splitlines()
    ]
    assert {row["annotator"] for row in cleaned} == {"ann", "bob", "cid"}
    assert "ann" not in (home / "out" / "README.md").read_text().split()


def test_evidence_that_speaks_is_handed_on_with_its_trusted_pairs(home, monkeypatch):
    seen = []
    monkeypatch.setattr(audit_module, "annotators_of", lambda *of: seen.append(of) or {})
    for speaks in (True, False):
        monkeypatch.setattr(Evidence, "speaks", speaks)
        audit("sft", "data.jsonl", "other.jsonl")
    (loaded, noisy, clean, *g), (*_, none, neither) = seen
    assert (len(loaded), len(noisy), len(clean)) == (180, 180, 16)
    assert [len(of) for of in g] == [180, 16]
    assert all(of.any() for of in g)
    assert not none.any()
    assert not neither.any()


def test_nothing_is_known_without_evidence_and_shared_pairs(home, caplog):
    caplog.set_level("INFO", "softpref")
    rows = labelled(list(toy_pairs(40)), ann=0)[:20] + labelled(list(toy_pairs(40)), bob=3)[20:]
    found = audit("sft", rows, "other.jsonl").summary
    assert [(of.annotator, of.reliability) for of in found.annotators] == [
        ("ann", None),
        ("bob", None),
    ]
    assert all("unknown, too little is known" in str(of) for of in found.annotators)
    plain = audit("sft", [row | {"annotator": None} for row in rows], "other.jsonl").summary
    assert plain.annotators == []
    assert "annotators" not in plain.record()


def test_only_the_ten_with_most_pairs_are_listed(home, caplog):
    caplog.set_level("INFO", "softpref")
    rows = [row | {"annotator": i % 12} for i, row in enumerate(toy_pairs(49))]
    run_audit(AuditOptions("sft", Dataset.from_list(rows), "other.jsonl", output="out"))
    assert caplog.text.count("right labels among the") == 10
    assert "right labels among the 5 pairs of annotator 0: unknown" in caplog.text
    assert "and 2 other annotators, see summary.json" in caplog.text
    assert len(json.loads((home / "out" / "summary.json").read_text())["annotators"]) == 12


def test_contents_are_joined_in_either_order():
    """What is handed to the estimate equals a join by hand."""
    rows = [{side: row[side] for side in SIDES} for row in toy_pairs(80)]
    loaded = load_pairs(labelled(rows, ann=3, bob=2))
    clean = load_pairs([turned(row) if i % 2 else row for i, row in enumerate(rows[:30])])
    noisy = loaded.pairs.select([i for i in range(160) if i % 80 >= 30])
    evidence = torch.linspace(-1, 1, len(noisy)).double()
    found = annotators_of(loaded.pairs, noisy, clean.pairs, evidence, torch.ones(30))
    side = [-1 if i % 3 == 0 else 1 for i in range(80)] + [
        -1 if i % 2 == 0 else 1 for i in range(80)
    ]
    side = torch.tensor(side).double()
    truth = torch.tensor([-1 if i % 2 else 1 for i in range(30)] + [0] * 50).double()
    mean = (evidence[:50] * side[30:80] + evidence[50:] * side[110:]) / 2
    expected = estimate_reliability(
        torch.arange(160) % 80, torch.arange(160) // 80, side, torch.cat([truth[:30], mean]), truth
    )
    assert list(found) == ["ann", "bob"]
    for one, other in zip(found.values(), expected, strict=True):
        assert (one.labels, one.estimate) == (other.labels, pytest.approx(other.estimate, abs=1e-5))
        assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-5)
