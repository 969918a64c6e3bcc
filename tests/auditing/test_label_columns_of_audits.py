"""Ties, weights and margins in an audit and in its cleaned.jsonl."""

import json

import datasets
import pytest

from softpref.auditing.audit import audit, run_audit
from softpref.auditing.export import TrustedLabels, write_cleaned
from softpref.auditing.options import AuditOptions
from softpref.training.align import AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.output import write_lines
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
from tests.toy import toy_pairs


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_llama(make_tokenizer(), 0).save_pretrained(tmp_path / "sft")
    make_tokenizer().save_pretrained(tmp_path / "sft")
    tied = {"label": "tie"}
    rows = [
        row | {"weight": 1 + i % 2} | (tied if i % 5 == 4 else {})
        for i, row in enumerate(toy_pairs(40, flip_every=3))
    ]
    write_lines(tmp_path / "data.jsonl", rows)
    write_lines(tmp_path / "clean.jsonl", toy_pairs(16, seed=1))
    names = {"model": "sft", "data": "data.jsonl", "clean": "clean.jsonl"}
    return {name: str(tmp_path / file) for name, file in names.items()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ties_are_counted_kept_and_not_audited(files, tmp_path, caplog):
    caplog.set_level("INFO")
    output = tmp_path / "out"
    run_audit(AuditOptions(**files, export="soft", force=True, output=str(output)))
    labels, cleaned = lines(output / "labels.jsonl"), lines(output / "cleaned.jsonl")
    assert [row["row"] for row in labels] == [n for n in range(1, 41) if n % 5]
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["pairs"], summary["ties"]) == (32, 8)
    assert len(cleaned) == 40
    for row in cleaned[4::5]:
        assert (row["label"], row["is_suspect"], row["soft_label"]) == ("tie", False, 0.5)
    assert [row["weight"] for row in cleaned] == [1, 2] * 20
    said = "8 of 40 pairs are ties, which have no label to be wrong: not audited"
    assert f"{files['data']}: {said}" in caplog.text
    assert "columns that were not read: weight\n" in caplog.text


def test_ties_are_not_among_the_pairs_that_python_gets(files):
    rows = lines_of_objects(files["data"])
    found = audit(files["model"], rows, files["clean"])
    assert len(found.pairs) == 32
    assert found.ties == {("data", n) for n in range(5, 41, 5)}
    assert "ties" in found.summary.record()


def lines_of_objects(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def test_a_run_on_weights_and_ties_is_audited(files, tmp_path):
    run = str(tmp_path / "run")
    given = {"train": files["data"], "model": files["model"], "clean": files["clean"]}
    options = {"tuning": "full", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    align(AlignFiles(**given, output=run), MSPOConfig(method="mspo", max_steps=2, **options))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data"]["train"]["columns_read"] == {
        "weight": {"mean": 1.5},
        "label": {"ties": 8},
    }
    run_audit(AuditOptions(run=run, output=str(tmp_path / "out")))
    assert len(lines(tmp_path / "out" / "labels.jsonl")) == 32


def test_flipped_rows_take_along_what_belongs_to_a_response(tmp_path, caplog):
    said = {"score_chosen": 1, "score_rejected": 2, "soft_label": 0.2, "margin": 0.5}
    rows = [{"prompt": f"p{n}", "chosen": "c", "rejected": "r"} | said for n in range(3)]
    write_lines(tmp_path / "in.jsonl", rows)
    audited = datasets.Dataset.from_dict({"row": [1, 2, 3], "p_correct": [0.9, 0.2, 0.8]})
    write_cleaned(
        str(tmp_path / "in.jsonl"), tmp_path, audited, TrustedLabels({}), "flip", marks={}
    )
    kept, flipped, _ = lines(tmp_path / "cleaned.jsonl")
    assert "margin" not in kept
    assert (kept["score_chosen"], kept["soft_label"]) == (1, 0.2)
    assert (flipped["score_chosen"], flipped["score_rejected"]) == (2, 1)
    assert flipped["soft_label"] == 0.8
    assert "margin is dropped from 3 rows" in caplog.text
