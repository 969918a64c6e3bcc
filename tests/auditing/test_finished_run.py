"""`softpref audit --run` takes a run that is whole, and refuses any other before it scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from softpref.auditing import audit
from softpref.auditing.audit import run_audit
from softpref.auditing.finished_run import labels_of_run, options_of_run
from softpref.auditing.options import AuditOptions
from softpref.errors import UsageError
from softpref.training.align import AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.labels import read_labels
from softpref.training.output import write_lines
from softpref.training.seals import MANIFEST, write_manifest
from softpref.training.trainer import MSPOTrainer
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
from tests.toy import toy_pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of one step beside its files."""
    home = tmp_path_factory.mktemp("made")
    tiny_llama(make_tokenizer(), 0).save_pretrained(home / "sft")
    make_tokenizer().save_pretrained(home / "sft")
    dated = [row | {"uid": f"2024-01-{i:02}"} for i, row in enumerate(toy_pairs(20), start=1)]
    write_lines(home / "data.jsonl", dated)
    write_lines(home / "clean.jsonl", toy_pairs(16, seed=1))
    run_of(home, "run")
    return home


def run_of(home, name, **options):
    config = MSPOConfig(method="mspo", max_steps=1, use_cpu=True, save_strategy="no", seed=3,
                        disable_tqdm=True, meta_batch_size=8,
                        reference_cache=str(home / "cache"), **options)  # fmt: skip
    files = (str(home / file) for file in ("sft", "data.jsonl", "clean.jsonl"))
    align(AlignFiles(*files, None, str(home / name)), config)


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy of the run; nothing may be scored by it."""
    shutil.copytree(made / "run", tmp_path / "run")
    monkeypatch.delattr(audit, "score_sets")
    return tmp_path / "run"


def options(run, **given):
    return AuditOptions(run=str(run), output=str(Path(run).parent / "out"), **given)


def test_a_run_seals_all_but_its_card(made):
    files = {path.name for path in (made / "run").iterdir() if path.is_file()}
    sealed = json.loads((made / "run" / "manifest.json").read_text())["files"]
    assert set(sealed) == files - {"manifest.json", "README.md"}
    assert {"run.json", "labels.jsonl", "label_history.parquet", "metrics.jsonl"} <= set(sealed)
    with (made / "run" / "README.md").open("a") as card:
        card.write("of the user")
    assert options_of_run(options(made / "run")).model == str(made / "run")


def other_columns(path):
    pq.write_table(pa.table({"uid": ["a"]}), path)


def not_a_number(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, [row | {"soft_label": float("nan")} for row in rows])


def of_another_run(path):
    path.write_text(path.read_text().replace("2024", "2025"))


@pytest.mark.parametrize(
    ("name", "spoil", "fault"),
    [
        ("run.json", Path.unlink, "is missing"),
        ("run.json", lambda path: path.write_text(path.read_text()[:50]), "is damaged"),
        ("run.json", lambda path: path.write_text("[]"), "is damaged"),
        ("label_history.parquet", lambda path: path.write_bytes(b"PAR1"), "is damaged"),
        ("label_history.parquet", other_columns, "is damaged"),
        ("metrics.jsonl", Path.unlink, "is missing"),
        ("labels.jsonl", Path.unlink, "is missing"),
        ("labels.jsonl", not_a_number, "is damaged"),
        ("labels.jsonl", of_another_run, "is damaged"),
        ("manifest.json", Path.unlink, "has no manifest.json: it was removed"),
        ("manifest.json", lambda path: path.write_text("{"), "its manifest.json is damaged"),
    ],
)
def test_what_is_not_as_the_run_left_it_is_refused(run, name, spoil, fault):
    spoil(run / name)
    with pytest.raises(UsageError, match=f"--run {run}: .*{fault}") as told:
        run_audit(options(run))
    assert name in str(told.value)
    assert "udit with --model, --data and --clean" in str(told.value)
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize("name", ["data", "clean"])
def test_pairs_that_have_changed_since_are_refused(made, run, name):
    path = made / f"{name}.jsonl"
    before = path.read_text()
    path.write_text("".join(before.splitlines(keepends=True)[:-1]))
    try:
        with pytest.raises(UsageError, match=f"{path} has changed since .* or give --{name}"):
            run_audit(options(run))
        with pytest.raises(NameError, match="score"):  # given by the user, it is read
            run_audit(options(run, **{name: str(path)}))
    finally:
        path.write_text(before)


def test_the_file_that_was_not_given_must_be_as_it_was(made, run):
    path = made / "data.jsonl"
    before = path.read_text()
    path.write_text("".join(before.splitlines(keepends=True)[:-1]))
    try:
        with pytest.raises(UsageError, match=f"{path} has changed since"):
            run_audit(options(run, clean=str(made / "clean.jsonl")))
    finally:
        path.write_text(before)


def test_a_merged_model_is_not_audited_as_a_run(run):
    record = json.loads((run / "run.json").read_text()) | {"merged": {"run": "/runs/mspo"}}
    (run / "run.json").write_text(json.dumps(record))
    names = json.loads((run / MANIFEST).read_text())
    write_manifest(run, {path.name: path for path in run.iterdir() if path.name in str(names)})
    with pytest.raises(UsageError, match="is a merged model: give the run .* --run /runs/mspo"):
        run_audit(options(run))


def test_other_pairs_have_no_label_of_the_run(made, tmp_path, caplog):
    write_lines(tmp_path / "other.jsonl", toy_pairs(12, seed=5))
    found = audit.audit(run=str(made / "run"), data=str(tmp_path / "other.jsonl"),
                        reference_cache=str(tmp_path))  # fmt: skip
    assert found.pairs["soft_label"][:] == [None] * 12
    assert "the run did not train on 12 of 12 pairs" in caplog.text


def turned(row):
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def test_a_corrected_pair_has_no_label_of_the_run(made, tmp_path, caplog):
    """Its uid is the same, and what the run believed is about the other label."""
    rows = [json.loads(line) for line in (made / "data.jsonl").read_text().splitlines()]
    write_lines(tmp_path / "corrected.jsonl", [turned(row) for row in rows[:3]] + rows[3:12])
    given = {"run": str(made / "run"), "reference_cache": str(tmp_path)}
    found = audit.audit(**given, data=str(tmp_path / "corrected.jsonl")).pairs
    own = audit.audit(**given).pairs
    for name in ("soft_label", "margin", "step"):
        assert found[name][:] == [None] * 3 + own[name][3:12]
        assert None not in own[name][:3]
    assert "the run did not train on 3 of 12 pairs, or not as they are labelled now" in caplog.text


def test_labels_of_a_run_whose_pairs_have_changed_are_not_taken(made, tmp_path, caplog):
    path = made / "data.jsonl"
    before = path.read_text()
    rows = [json.loads(line) for line in before.splitlines()]
    write_lines(path, [turned(row) for row in rows])
    try:
        found = audit.audit(run=str(made / "run"), data=str(path), reference_cache=str(tmp_path))
    finally:
        path.write_text(before)
    assert found.pairs["soft_label"][:] == [None] * 20
    assert f"{path}, whose labels it would take, has changed since" in caplog.text


def test_uids_that_look_like_dates_stay_text(made):
    assert labels_of_run(str(made / "run"))["uid"].type == pa.string()
    assert read_labels(made / "run" / "labels.jsonl")["uid"][0].as_py() == "2024-01-01"


def test_a_run_that_labelled_no_pairs_is_audited_by_its_policy(made, tmp_path, monkeypatch):
    passes = []
    monkeypatch.setattr(MSPOTrainer, "label_pairs", lambda self: passes.append(1))
    run_of(made, "unlabelled", label_pairs=False)
    assert not passes
    home = made / "unlabelled"
    assert not (home / "labels.jsonl").exists()
    assert "labels.jsonl" not in (home / "README.md").read_text()
    found = audit.audit(run=str(home), output=str(tmp_path / "out"))
    assert set(found.pairs["soft_label"]) == {None}
    assert None not in found.pairs["p_correct"]
