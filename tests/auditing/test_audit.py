"""`softpref audit` over files: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import replace
from datetime import date
from types import SimpleNamespace

import pytest
import torch
from datasets import DatasetDict, load_dataset

import softpref
from softpref.auditing import audit
from softpref.auditing.audit import run_audit
from softpref.auditing.beliefs import pair_beliefs
from softpref.auditing.explanations import Explanations, opposite_labels
from softpref.auditing.export import EXPORTS
from softpref.auditing.options import AuditOptions
from softpref.data.sources import load_pairs
from softpref.data.splits import TRUTH_RESTORED
from softpref.errors import UsageError
from softpref.models import reference
from softpref.models.scoring import Scorer
from softpref.options import parse
from softpref.statistics.evidence import Evidence
from softpref.training import output
from softpref.training.align import AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.output import write_lines
from softpref.training.seals import defect
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
from tests.toy import toy_pairs


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reference, "PART", 16)
    monkeypatch.setattr(audit, "date", SimpleNamespace(today=lambda: date(2030, 1, 2)))
    tiny_llama(make_tokenizer(), 0).save_pretrained(tmp_path / "sft")
    make_tokenizer().save_pretrained(tmp_path / "sft")
    rows = [row | {"source": f"s{i}"} for i, row in enumerate(toy_pairs(40, flip_every=3))]
    write_lines(tmp_path / "data.jsonl", rows)
    write_lines(tmp_path / "clean.jsonl", toy_pairs(16, seed=1))
    return {name: str(tmp_path / file) for name, file in
            (("model", "sft"), ("data", "data.jsonl"), ("clean", "clean.jsonl"))}  # fmt: skip


SOFT = {"export": "soft", "force": True}
"""Evidence says nothing of toy pairs."""


def run_config(method):
    return MSPOConfig(method=method, tuning="full", learning_rate=1e-3, use_cpu=True,
                      save_strategy="no", disable_tqdm=True)  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_say_the_same_of_every_pair(files, tmp_path):
    run_audit(AuditOptions(**files, **SOFT, output=str(tmp_path / "out")))
    labels = lines(tmp_path / "out" / "labels.jsonl")
    cleaned = lines(tmp_path / "out" / "cleaned.jsonl")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["row"] for row in labels] == list(range(1, 41))
    assert sorted(row["rank"] for row in labels) == list(range(1, 41))
    assert [row["soft_label"] for row in cleaned] == [row["p_correct"] for row in labels]
    assert [row["source"] for row in cleaned] == [f"s{i}" for i in range(40)]
    for label, row in zip(labels, cleaned, strict=True):
        assert row["is_suspect"] == (label["flag"] == "suspect") == (label["p_correct"] < 0.5)
    assert summary["suspect"] == sum(row["is_suspect"] for row in cleaned)
    assert (summary["pairs"], summary["clean_pairs"]) == (40, 16)
    assert 0 <= summary["noise_rate_low"] <= summary["noise_rate_high"] <= 0.5
    assert 0 <= summary["auroc"] <= 1
    assert 0 <= summary["trusted_auroc"] <= 1
    assert 0.5 <= summary["length_auroc"] <= 1
    assert summary["signals"] == ["ppl_diff", "length", "content"]
    assert all(list(row["evidence"]) == ["fluency", "length", "content"] for row in labels)
    assert load_dataset("json", data_files=str(tmp_path / "out" / "cleaned.jsonl"))["train"]


def test_two_audits_are_alike_to_the_byte(files, tmp_path):
    for name in ("first", "second"):
        run_audit(AuditOptions(**files, output=str(tmp_path / name)))
    for name in ("labels.jsonl", "summary.json", "cleaned.jsonl", "report.html"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize(
    ("clean", "named"),
    [(None, "16 pairs, {clean}"), ("12", f"12 pairs, held out of the data, {TRUTH_RESTORED}")],
)
def test_the_report_names_what_was_audited(files, tmp_path, clean, named):
    options = AuditOptions(**files | {"clean": clean or files["clean"]}, output=str(tmp_path / "o"))
    run_audit(options)
    header = {
        "Data": files["data"],
        "Model": files["model"],
        "Clean set": named.format(**files),
        "Date": "2030-01-02",
        "softpref": softpref.__version__,
    }
    lines_of = [f"<dt>{name}</dt> <dd>{text}</dd>" for name, text in header.items()]
    assert all(line in (tmp_path / "o" / "report.html").read_text() for line in lines_of)


def test_an_interrupted_audit_scores_only_what_is_missing(files, tmp_path, monkeypatch):
    scored = []
    read = Scorer.read

    def interrupted(self, pairs, *what):
        scored.append(len(pairs))
        if len(scored) == 2:
            raise KeyboardInterrupt
        return read(self, pairs, *what)

    monkeypatch.setattr(Scorer, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_audit(AuditOptions(**files, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    run_audit(AuditOptions(**files, output=str(tmp_path / "out")))
    assert scored == [16, 16, 16, 8, 16]  # the second was cut off, the first not made again


@pytest.mark.parametrize("step", ["write_lines", "write_text", "write_report", "write_cleaned"])
def test_an_audit_that_was_cut_off_while_it_wrote_goes_on(files, tmp_path, monkeypatch, step):
    options = AuditOptions(**files, output=str(tmp_path / "out"))

    def is_full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit, step, is_full)
        with pytest.raises(OSError, match="No space"):
            run_audit(options)
    run_audit(options)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"labels.jsonl", "summary.json", "report.html", "cleaned.jsonl", "README.md",
                     "manifest.json"}  # fmt: skip
    assert defect(tmp_path / "out") is None


@pytest.mark.parametrize("renames", [0, 1, 3])
def test_an_audit_that_was_killed_while_it_wrote_goes_on(files, tmp_path, renames):
    options, out = AuditOptions(**files, output=str(tmp_path / "out")), tmp_path / "out"
    run_audit(options)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    in_order = sorted(whole, key=lambda name: name == "summary.json")
    (out / output.TOGETHER).mkdir()  # as a kill after so many of its renames leaves it
    for name in in_order[renames:]:
        (out / name).rename(out / output.TOGETHER / name)
    run_audit(options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_of_two_audits_at_once_the_second_is_refused(files, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for held in ("real", "link"):
        with (
            output.one_writer(tmp_path / held / "out"),
            pytest.raises(UsageError, match="another process is writing it"),
        ):
            run_audit(AuditOptions(**files, output=str(tmp_path / "real" / "out")))
    assert list((tmp_path / "real").iterdir()) == []


def test_trusted_pairs_among_the_data_are_certain(files, tmp_path):
    data = lines(tmp_path / "data.jsonl")
    reviewed = [row if i % 2 else row | {"chosen": row["rejected"], "rejected": row["chosen"]}
                for i, row in enumerate(data[:12])]  # fmt: skip
    write_lines(tmp_path / "reviewed.jsonl", reviewed)
    given = files | {"clean": str(tmp_path / "reviewed.jsonl")}
    run_audit(AuditOptions(**given, **SOFT, output=str(tmp_path / "out")))
    cleaned = lines(tmp_path / "out" / "cleaned.jsonl")
    assert [row["soft_label"] for row in cleaned[:12]] == [0.0, 1.0] * 6
    assert [row["is_suspect"] for row in cleaned[:12]] == [True, False] * 6
    assert len(lines(tmp_path / "out" / "labels.jsonl")) == 28
    assert len(cleaned) == 40


def test_pairs_held_out_by_number(files, tmp_path):
    run_audit(AuditOptions(**files | {"clean": "12"}, **SOFT, output=str(tmp_path / "out")))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["pairs"], summary["clean_pairs"]) == (28, 12)
    assert summary["clean_provenance"] == "truth restored"
    held_out = [row for row in lines(tmp_path / "out" / "cleaned.jsonl")
                if row["soft_label"] in (0, 1)]  # fmt: skip
    assert all(row["soft_label"] == (0 if row["is_flipped"] else 1) for row in held_out)
    assert len(held_out) == 12


@pytest.mark.parametrize("export", EXPORTS)
def test_what_each_export_makes_of_suspects(files, tmp_path, export, monkeypatch):

    def doubting(*found):
        doubted = torch.where(torch.arange(40) % 4 == 1, 0.2, 0.9).double()
        return replace(pair_beliefs(*found), p_correct=doubted)

    monkeypatch.setattr(audit, "pair_beliefs", doubting)
    given = files | SOFT | {"export": export}
    run_audit(AuditOptions(**given, output=str(tmp_path / "out")))
    labels = lines(tmp_path / "out" / "labels.jsonl")
    data, cleaned = lines(tmp_path / "data.jsonl"), lines(tmp_path / "out" / "cleaned.jsonl")
    suspect = {row["row"] - 1 for row in labels if row["flag"] == "suspect"}
    assert suspect == set(range(1, 40, 4))
    assert all(("soft_label" in row) == (export == "soft") for row in cleaned)
    kept = [i for i in range(40) if export != "drop" or i not in suspect]
    assert [row["source"] for row in cleaned] == [f"s{i}" for i in kept]
    for i, row in zip(kept, cleaned, strict=True):
        turned = export == "flip" and i in suspect
        assert row["chosen"] == data[i]["rejected" if turned else "chosen"]
        assert row["is_flipped"] == (data[i]["is_flipped"] != turned)


def test_marks_of_a_reviewer_are_the_last_word(files, tmp_path):
    run_audit(AuditOptions(**files, output=str(tmp_path / "out")))
    audited = lines(tmp_path / "out" / "labels.jsonl")
    uids = [row["uid"] for row in audited]
    marks = [{"uid": uid, "mark": mark} for uid, mark in
             zip(uids, ("right", "wrong", "unsure"), strict=False)]  # fmt: skip
    write_lines(tmp_path / "marks.jsonl", marks)
    given = files | {"marks": str(tmp_path / "marks.jsonl")}
    run_audit(AuditOptions(**given, **SOFT, output=str(tmp_path / "out")))
    cleaned = lines(tmp_path / "out" / "cleaned.jsonl")
    unsure = audited[2]["p_correct"]  # as if it had no mark
    assert [row["soft_label"] for row in cleaned[:3]] == [1.0, 0.0, unsure]
    assert [row["is_suspect"] for row in cleaned[:3]] == [False, True, unsure < 0.5]


def test_marks_do_not_undo_what_was_corrected_by_them(files, tmp_path, caplog):
    """A pair has the same uid after its responses were swapped, and a mark is about a label."""
    run_audit(AuditOptions(**files, output=str(tmp_path / "out")))
    page = (tmp_path / "out" / "report.html").read_text()
    shown = json.loads(re.search('<script[^>]* id="data"[^>]*>(.*?)</script>', page, re.S)[1])
    label = dict(zip((pair[0] for pair in shown["pairs"]), shown["labels"], strict=True))
    uids = [row["uid"] for row in lines(tmp_path / "out" / "labels.jsonl")]
    verdicts = zip(uids, ("wrong", "right", "unsure", "wrong"), strict=False)
    marks = [{"uid": uid, "mark": mark, "label": label[uid]} for uid, mark in verdicts]
    write_lines(tmp_path / "marks.jsonl", [*marks[:3], marks[3] | {"label": "of other texts"}])
    rows = lines(tmp_path / "data.jsonl")
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    write_lines(tmp_path / "data.jsonl", [turned[0], rows[1], *turned[2:4], *rows[4:]])
    given = files | {"marks": str(tmp_path / "marks.jsonl")}
    run_audit(AuditOptions(**given, **SOFT, output=str(tmp_path / "again")))
    cleaned = [row["soft_label"] for row in lines(tmp_path / "again" / "cleaned.jsonl")]
    assert (*cleaned[:2], cleaned[3]) == (1.0, 1.0, 0.0)
    assert "2 marks are about labels that were corrected since" in caplog.text


def test_marks_on_the_random_sample_go_with_a_clean_set_made_of_it(files, tmp_path, caplog):
    """The report exports both, and a trusted pair is not audited."""
    write_lines(tmp_path / "clean.jsonl", lines(tmp_path / "data.jsonl")[:12])
    uids = load_pairs(files["data"]).pairs["uid"][:]
    of_clean = set(load_pairs(str(tmp_path / "clean.jsonl")).pairs["uid"])
    other = next(uid for uid in uids if uid not in of_clean)
    marks = [{"uid": uid, "mark": "right"} for uid in [*sorted(of_clean)[:3], other]]
    write_lines(tmp_path / "marks.jsonl", marks)
    given = files | {"clean": str(tmp_path / "clean.jsonl"), "marks": str(tmp_path / "marks.jsonl")}
    with caplog.at_level("INFO", "softpref"):
        run_audit(AuditOptions(**given, output=str(tmp_path / "out")))
    said = "marks.jsonl: 1 applied, 0 unsure and left to the audit, 3 on trusted"
    assert said in caplog.text


def test_what_a_review_tool_exports_goes_back_into_the_audit(files, tmp_path, caplog):
    out = tmp_path / "out"
    run_audit(AuditOptions(**files, export_to="argilla", output=str(out)))
    records = json.loads((out / "argilla_records.json").read_text())
    settings = json.loads((out / "argilla_settings.json").read_text())
    assert len(records) == 40
    assert settings["questions"][0]["name"] == "better"
    for record in records[:2]:
        response = {"value": record["metadata"]["labelled"], "user_id": "1"}
        record |= {"responses": {"better": [response]}, "status": "completed"}
    records[1]["responses"]["better"][0]["value"] = "unsure"
    (tmp_path / "export.json").write_text(json.dumps(records))
    given = files | {"marks": str(tmp_path / "export.json"), "export_to": "label_studio"}
    with caplog.at_level("INFO", "softpref"):
        run_audit(AuditOptions(**given, **SOFT, output=str(out)))
    assert "export.json: 1 applied, 1 unsure" in caplog.text
    uids = [row["uid"] for row in lines(out / "labels.jsonl")]
    assert lines(out / "cleaned.jsonl")[uids.index(records[0]["id"])]["soft_label"] == 1
    assert {path.name for path in out.iterdir() if path.name.startswith(("argilla", "label_"))} == {
        "label_studio_config.xml", "label_studio_tasks.json"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"uid": "u"}, "marks.jsonl, line 1: no `uid` and `mark`"),
        ({"uid": "u", "mark": "good"}, "marks.jsonl, line 1: mark 'good'; it must be one of right"),
        ({"uid": "u", "mark": "right"}, "1 of the marked pairs are not in"),
    ],
)
def test_marks_that_are_none_are_refused(files, tmp_path, line, message):
    write_lines(tmp_path / "marks.jsonl", [line])
    options = AuditOptions(
        **files, marks=str(tmp_path / "marks.jsonl"), output=str(tmp_path / "out")
    )
    with pytest.raises(UsageError, match=message):
        run_audit(options)
    assert not (tmp_path / "out").exists()


def test_a_run_of_mspo_brings_its_policy_files_and_labels(files, tmp_path):
    sft, data, clean = (files[name] for name in ("model", "data", "clean"))
    output = str(tmp_path / "run")
    align(AlignFiles(sft, data, clean, None, output), run_config("mspo"))
    run_audit(AuditOptions(run=output, output=str(tmp_path / "out")))
    labels = lines(tmp_path / "out" / "labels.jsonl")
    of_run = lines(tmp_path / "run" / "labels.jsonl")
    for mine, theirs in zip(labels, of_run, strict=True):
        assert [mine[name] for name in ("uid", "soft_label", "margin", "step")] == [
            theirs[name] for name in ("uid", "soft_label", "margin", "step")
        ]
        assert mine["ppl_diff"] == pytest.approx(theirs["ppl_diff"], abs=1e-4)


@pytest.fixture
def run_of_adapter(files, tmp_path, monkeypatch):
    """A finished run of relative paths that left out a bad row; the tests stand elsewhere."""
    rows = lines(tmp_path / "data.jsonl")
    rows[5]["rejected"] = rows[5]["chosen"]
    write_lines(tmp_path / "data.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    config = MSPOConfig(method="mspo", max_steps=1, max_length=32, on_bad_row="skip", use_cpu=True,
                        save_strategy="no", disable_tqdm=True, meta_batch_size=8)  # fmt: skip
    align(AlignFiles("sft", "data.jsonl", "clean.jsonl", None, "run"), config)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    return tmp_path / "run"


def test_a_run_is_audited_from_another_directory_by_its_own_settings(run_of_adapter, tmp_path):
    record = json.loads((run_of_adapter / "run.json").read_text())
    assert record["files"].items() >= {
        "model": str(tmp_path / "sft"), "train": str(tmp_path / "data.jsonl"),
        "clean": str(tmp_path / "clean.jsonl"), "eval": None, "output": str(run_of_adapter),
    }.items()  # fmt: skip
    assert record["options"]["output_dir"] == str(run_of_adapter)
    assert record["data"]["train"]["source"] == str(tmp_path / "data.jsonl")
    run_audit(AuditOptions(run="../run", output="out"))
    labels, of_run = (lines(home / "labels.jsonl") for home in (tmp_path / "other/out",
                                                                run_of_adapter))  # fmt: skip
    assert [row["uid"] for row in labels] == [row["uid"] for row in of_run]
    assert [row["soft_label"] for row in labels] == [row["soft_label"] for row in of_run]
    assert len(labels) == 39
    with pytest.raises(UsageError, match="line 6: chosen and rejected are identical"):
        run_audit(AuditOptions(run="../run", on_bad_row="stop", output="second"))


@pytest.mark.parametrize("name", ["data", "clean"])
def test_a_file_of_a_run_that_is_gone_can_be_given(run_of_adapter, tmp_path, name):
    moved = (tmp_path / f"{name}.jsonl").rename(tmp_path / "moved.jsonl")
    with pytest.raises(UsageError, match=f"{name}.jsonl does not exist: give --{name}"):
        run_audit(AuditOptions(run="../run", output="out"))
    run_audit(AuditOptions(run="../run", **{name: str(moved)}, output="out"))


def test_a_base_model_that_is_gone_is_named_with_the_option(run_of_adapter, tmp_path):
    (tmp_path / "sft").rename(tmp_path / "moved")
    with pytest.raises(UsageError, match=f"--run ../run: .* base model {tmp_path}/sft .* not ther"):
        run_audit(AuditOptions(run="../run", output="out"))


@pytest.mark.parametrize("speaks", [True, False])
def test_a_run_by_evidence_judges_its_labels_unless_it_was_dpo(
    files, tmp_path, monkeypatch, speaks
):
    monkeypatch.setattr(Evidence, "speaks", speaks)
    output = str(tmp_path / "run")
    align(AlignFiles(files["model"], files["data"], files["clean"], None, output),
          run_config("evidence"))  # fmt: skip
    if speaks:
        run_audit(AuditOptions(run=output, output=str(tmp_path / "out")))
        labels, of_run = (lines(tmp_path / name / "labels.jsonl") for name in ("out", "run"))
        assert [row["soft_label"] for row in labels] == [row["soft_label"] for row in of_run]
    else:
        with pytest.raises(UsageError, match="believes every label"):
            run_audit(AuditOptions(run=output, output=str(tmp_path / "out")))


def test_a_run_that_believed_its_labels_cannot_judge_them(files, tmp_path):
    sft, data = files["model"], files["data"]
    output = str(tmp_path / "run")
    align(AlignFiles(sft, data, None, None, output), run_config("dpo"))
    with pytest.raises(UsageError, match="trained by dpo, which believes every label"):
        run_audit(AuditOptions(run=output, clean=files["clean"], output=str(tmp_path / "out")))


def test_from_python(files):
    done = softpref.audit(files["model"], files["data"], files["clean"])
    assert done.pairs.num_rows == done.summary.pairs == 40
    assert {"uid", "p_correct", "rank", "flag", "why"} <= set(done.pairs.column_names)


@pytest.mark.parametrize(
    ("asked", "signals", "kinds"),
    [
        ("ppl_diff", ["ppl_diff"], ["fluency"]),
        (["length"], ["ppl_diff", "length"], ["fluency", "length"]),
        (["content", "ppl_diff"], ["ppl_diff", "content"], ["fluency", "content"]),
    ],
)
def test_signals_are_chosen_and_ppl_diff_is_always_among_them(files, asked, signals, kinds):
    done = softpref.audit(**files, signals=asked)
    assert done.summary.signals == signals
    assert list(done.pairs[0]["evidence"]) == kinds


def test_unknown_signals_are_refused_before_the_model_is_loaded(files, monkeypatch):
    monkeypatch.delattr(audit, "read_sets")
    told = 'signals="perplexity": choose from ppl_diff length content'
    with pytest.raises(UsageError, match=told):
        softpref.audit(**files, signals=["length", "perplexity"])
    with pytest.raises(UsageError, match="argument --signals: expected at least one"):
        parse("audit", ["--signals"], AuditOptions)


def test_evidence_that_speaks_is_told_beside_the_length_rule(files, tmp_path, caplog):
    """Trusted and audited pairs whose better response is the longer one."""
    rows = [{"prompt": f"{i} :", "chosen": f"{i} {i} {i} {i} {i}", "rejected": f"{i}"}
            for i in range(10, 99)]  # fmt: skip
    turned = [row if i % 4 else row | {"chosen": row["rejected"], "rejected": row["chosen"]}
              for i, row in enumerate(rows[30:])]  # fmt: skip
    write_lines(tmp_path / "data.jsonl", turned)
    write_lines(tmp_path / "clean.jsonl", rows[:30])
    with caplog.at_level("INFO", "softpref"):
        run_audit(AuditOptions(**files, output=str(tmp_path / "out")))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["evidence_speaks"]
    wrong = summary["noise_rate"] and summary["noise_rate"] * summary["pairs"]
    assert summary["expected_wrong_labels"] == wrong
    assert "calibration error" in caplog.text
    assert summary["length_auroc"] == 1
    assert summary["trusted_auroc"] > 0.9
    assert "evidence by ppl_diff, length, content: AUROC" in caplog.text
    assert "in cross-validation, 1.000 by length alone" in caplog.text
    labels = lines(tmp_path / "out" / "labels.jsonl")
    is_wrong = [not i % 4 for i in range(len(labels))]
    assert [row["flag"] == "suspect" for row in labels] == is_wrong
    assert [sum(row["evidence"].values()) < 0 for row in labels] == is_wrong


def test_trusted_pairs_are_named_by_their_rows(files, monkeypatch):
    found = Explanations({"content": torch.ones(40)}, torch.tensor([[3, 5]]).expand(40, 2))
    monkeypatch.setattr(audit, "explain_pairs", lambda *_: found)
    monkeypatch.setattr(
        audit, "pair_beliefs", lambda *given: replace(pair_beliefs(*given), speaks=True)
    )
    whys = softpref.audit(**files).pairs["why"]
    assert all(why.endswith("closest trusted pairs: rows 4 and 6") for why in whys)


def test_evidence_that_says_nothing_claims_nothing(files, tmp_path, caplog):
    """The trusted pairs are right as often as not."""
    rows = lines(tmp_path / "clean.jsonl")
    turned = [row if i % 2 else row | {"chosen": row["rejected"], "rejected": row["chosen"]}
              for i, row in enumerate(rows)]  # fmt: skip
    write_lines(tmp_path / "clean.jsonl", turned)
    with caplog.at_level("INFO", "softpref"):
        run_audit(AuditOptions(**files, output=str(tmp_path / "out")))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert not summary["evidence_speaks"]
    assert summary["suspect"] == 0
    assert summary["doubted_clean"] == []
    assert (
        "nothing in the data distinguishes right labels from wrong ones, so nothing is claimed"
        in caplog.text
    )
    skill = f"(AUROC {summary['trusted_auroc']:.3f} on trusted pairs in cross-validation, "
    assert f"{skill}{summary['length_auroc']:.3f} by length alone)" in caplog.text
    unknown = ("noise_rate", "expected_wrong_labels", "ece")
    assert [summary[name] for name in unknown] == [None] * 3
    assert (summary["noise_rate_low"], summary["noise_rate_high"]) == (0, 0.5)
    assert summary["reliability"] == []
    assert "calibration error" not in caplog.text
    assert "cleaned.jsonl marks suspects by `is_suspect` and changes no label" in caplog.text
    assert "more likely wrong than right" not in caplog.text
    labels = lines(tmp_path / "out" / "labels.jsonl")
    assert len({row["p_correct"] for row in labels}) == 1
    assert {row["why"] for row in labels} == {
        "nothing in the data distinguishes right labels from wrong ones"
    }
    assert {nats for row in labels for nats in row["evidence"].values()} == {0}
    report = (tmp_path / "out" / "report.html").read_text()
    assert (
        "Unknown for these 40 labels: nothing in the data distinguishes right labels from" in report
    )
    for name in ("soft", "drop", "flip"):
        other = AuditOptions(**files, output=str(tmp_path / "other"), export=name)
        refused = f"--export {name} is not applied: nothing .* add --force true"
        with pytest.raises(UsageError, match=refused):
            run_audit(other)
        assert lines(tmp_path / "other" / "cleaned.jsonl") == lines(tmp_path / "out/cleaned.jsonl")
    run_audit(replace(other, force=True))
    assert len(lines(tmp_path / "other" / "cleaned.jsonl")) == 40


def test_the_same_pair_labelled_both_ways_is_noticed():
    rows = toy_pairs(3).to_list()
    first = rows[0]
    turned = first | {"chosen": first["rejected"], "rejected": first["chosen"]}
    pairs = type(toy_pairs(1)).from_list([*rows, turned, rows[1]])
    assert list(opposite_labels(pairs)) == ["elsewhere", "", "", "elsewhere", ""]
    named = pairs.add_column("source", ["a", "a", "a", "b", "b"])
    assert list(opposite_labels(named)) == ["in b", "", "", "in a", ""]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output": ""}, "--output is missing"),
        ({"model": None}, "--model is missing"),
        ({"clean": None}, "--clean is missing"),
        ({"data": None}, "--data is missing"),
        ({"run": "nowhere"}, "--model and --run: give one of them"),
        (
            {"run": "nowhere", "model": None},
            "--run nowhere: not a finished run: it has no manifest.json",
        ),
        ({"run": "nowhere", "model": None, "seed": 1}, "--seed comes from the run"),
        ({"model": "no/such/model/here"}, "--model no/such/model/here: no tokenizer"),
        ({"clean": "40"}, "give a number from 1 to 39"),
        ({"clean": "5"}, "at least 10 trusted pairs are needed"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(files, tmp_path, given, message):
    options = AuditOptions(**({**files, "output": str(tmp_path / "out")} | given))
    with pytest.raises(UsageError, match=message):
        run_audit(options)
    assert not (tmp_path / "out").exists()


def test_what_an_interrupted_judge_leaves_is_no_other_content(files, tmp_path):
    """Its verdicts, its batches, and the locks of a killed process."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("verdicts.jsonl", "verdicts.jsonl.batches"):
        (out / name).touch()
        (out / f"{name}.lock").touch()
    with pytest.raises(UsageError, match="no tokenizer"):
        run_audit(AuditOptions(**files | {"model": "no/such/model"}, output=str(out)))


def test_a_directory_of_something_else_is_left_alone(files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds something else"):
        run_audit(AuditOptions(**files, output=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        (
            "data",
            DatasetDict(a=toy_pairs(3)),
            r"data is a DatasetDict with the splits a: .*data\['a",
        ),
        ("clean", [1], "clean, row 1: "),
        ("clean", 3.5, "clean is of type float: give a datasets.Dataset"),
        ("model", 3, "model is a int: give a path or hub id, or a model of transformers"),
        ("singals", ["length"], "audit has no such argument; did you mean 'signals'"),
        ("export", "drop", "export is about files that are written: give output"),
    ],
)
def test_what_an_audit_cannot_take_is_named_by_its_argument(files, name, given, message):
    with pytest.raises(UsageError, match=message):
        softpref.audit(**files | {name: given})
