"""Files for Argilla and Label Studio, and their exports as marks.

`exports/` holds what the real packages make of the files and some answers (`make test-review`).
"""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock
from uuid import UUID

import pytest
from datasets import Dataset

from softpref.auditing import review_tools
from softpref.auditing.marks import read_marks
from softpref.auditing.review_tools import REVIEW_FILES, SIDES, write_for_review
from softpref.errors import UsageError
from softpref.training.output import write_lines

EXPORTS = Path(__file__).parent / "exports"
UIDS = [f"u{n}" for n in range(6)]
VERDICTS = [["right"], ["wrong"], ["unsure"], ["wrong", "right", "wrong"], ["right", "wrong"],
            ["right"]]  # fmt: skip
"""By uid; the last is a draft in Argilla, and a skipped task in Label Studio."""
READ = {"u0": 1.0, "u1": 0.0, "u2": None, "u3": 0.0, "u4": None}


def rows_and_texts():
    ranks, p_correct = (4, 1, 6, 2, 5, 3), (0.75, 0.125, 0.9, 0.25, 0.8, 0.5)
    rows = [
        {"uid": uid, "p_correct": p, "evidence": {"fluency": p, "length": -1.0}, "rank": rank}
        for uid, p, rank in zip(UIDS, p_correct, ranks, strict=True)
    ]
    texts = [
        {"prompt": f"<b>{uid}</b>", "chosen": f"{uid} chosen", "rejected": f"{uid} rejected"}
        for uid in UIDS
    ]
    return Dataset.from_list(rows), Dataset.from_list(texts)


def written(home, tool, speaks=True, fingerprint="a"):
    summary = SimpleNamespace(evidence_speaks=speaks)
    write_for_review(home, tool, *rows_and_texts(), summary, fingerprint)
    settings, records = REVIEW_FILES[tool]
    return (home / settings).read_text(), json.loads((home / records).read_text())


@pytest.fixture
def first_version(monkeypatch):
    monkeypatch.setattr(review_tools, "version", lambda name: "0.1.0")


def answer(labelled, verdict):
    other = SIDES[labelled == SIDES[0]]
    return {"right": labelled, "wrong": other, "unsure": "unsure"}[verdict]


def export(tool):
    return json.loads((EXPORTS / f"{tool}.json").read_text())


@pytest.mark.parametrize("tool", REVIEW_FILES)
def test_pairs_come_most_suspect_first_in_drawn_order(tmp_path, tool):
    _, entries = written(tmp_path, tool)
    shown, known = ("fields", "metadata") if tool == "argilla" else ("data", "data")
    assert [entry[known]["uid"] for entry in entries] == ["u1", "u3", "u5", "u0", "u4", "u2"]
    assert [entry[known]["rank"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    for entry in entries:
        uid, labelled = entry[known]["uid"], entry[known]["labelled"]
        assert entry[shown]["prompt"] == f"<b>{uid}</b>"
        assert entry[shown][labelled] == f"{uid} chosen"
        assert entry[shown][answer(labelled, "wrong")] == f"{uid} rejected"
    assert len({entry[known]["labelled"] for entry in entries}) == 2
    orders = [
        [e[known]["labelled"] for e in written(tmp_path, tool, fingerprint=data)[1]]
        for data in ("a", "a", "b")
    ]
    assert orders[0] == orders[1] != orders[2]


def test_a_suggestion_is_the_response_that_is_probably_better(tmp_path):
    for record in written(tmp_path, "argilla")[1]:
        about, suggestion = record["metadata"], record["suggestions"]["better"]
        verdict = "right" if about["p_correct"] >= 0.5 else "wrong"
        assert suggestion["value"] == answer(about["labelled"], verdict)
        assert suggestion["score"] == max(about["p_correct"], 1 - about["p_correct"])
        assert suggestion["agent"].startswith("softpref ")


def test_nothing_is_suggested_where_evidence_says_nothing(tmp_path):
    assert all(not record["suggestions"] for record in written(tmp_path, "argilla", False)[1])
    assert all(not task["predictions"] for task in written(tmp_path, "label_studio", False)[1])


def test_reviewers_do_not_see_which_response_is_labelled_chosen(tmp_path):
    settings = json.loads(written(tmp_path, "argilla")[0])
    visible = {each["name"] for each in settings["metadata"] if each["visible_for_annotators"]}
    assert visible == {"uid", "rank"}
    config, _ = written(tmp_path, "label_studio")
    assert [name for name in ("labelled", "p_correct", "evidence") if name in config] == []


@pytest.mark.parametrize("tool", REVIEW_FILES)
def test_exports_are_read_as_marks(caplog, tool):
    assert read_marks(str(EXPORTS / f"{tool}.json")) == READ
    unread, differ = caplog.messages
    assert "1 answers are not read: " in unread
    assert "reviewers differ on 2 pairs: the most frequent verdict counts; 1 of these are" in differ


@pytest.mark.parametrize("tool", REVIEW_FILES)
def test_the_stored_exports_are_of_these_files(tmp_path, tool, first_version):
    _, entries = written(tmp_path, tool)
    for exported, entry in zip(export(tool), entries, strict=True):
        answers = ("responses",) if tool == "argilla" else ()
        assert {name: exported[name] for name in entry if name not in answers} == {
            name: value for name, value in entry.items() if name not in answers
        }


def test_marks_of_two_reviewers_in_one_file(tmp_path, caplog):
    marks = [("u", "right"), ("u", "wrong"), ("u", "wrong"), ("v", "right"), ("v", "unsure")]
    write_lines(tmp_path / "marks.jsonl", [{"uid": uid, "mark": mark} for uid, mark in marks])
    assert read_marks(str(tmp_path / "marks.jsonl")) == {"u": 0.0, "v": None}
    assert "reviewers differ on 2 pairs" in caplog.text


@pytest.mark.parametrize(
    ("tool", "change", "message"),
    [
        ("argilla", {"metadata": {"uid": "u1"}}, "row 1: not a pair that `audit --export_to`"),
        ("argilla", {"metadata": None}, "row 1: not a pair that"),
        ("argilla", {"responses": {"better": [{"value": "good"}]}, "status": "completed"},
         "row 1: answer 'good'; it must be one of response_a, response_b, unsure"),
        ("argilla", {"responses": [3]}, "row 1: not a pair that"),
        ("label_studio", {"data": {"uid": 3, "labelled": "response_a"}}, "row 1: not a pair that"),
        ("label_studio", {"annotations": [{"result": 3}]}, "row 1: not a pair that"),
        ("label_studio", {"annotations": [{"result": [{"from_name": "better", "value": {}}]}]},
         "row 1: not a pair that"),
        ("label_studio", {"annotations": 0}, "row 1: not a pair that"),
    ],
)  # fmt: skip
def test_a_malformed_export_names_file_and_row(tmp_path, tool, change, message):
    first, *others = export(tool)
    (tmp_path / "export.json").write_text(json.dumps([first | change, *others]))
    with pytest.raises(UsageError, match=rf"export\.json, {message}"):
        read_marks(str(tmp_path / "export.json"))


def test_argilla_imports_the_files_and_exports_what_is_stored(tmp_path, monkeypatch, first_version):
    rg = pytest.importorskip("argilla")
    from argilla.records._io import JsonIO  # behind `dataset.records.to_json`

    monkeypatch.setattr(rg.Argilla, "_get_default", lambda: MagicMock())  # there is no server
    written(tmp_path, "argilla")
    settings_file, records_file = (tmp_path / name for name in REVIEW_FILES["argilla"])
    settings = rg.Settings.from_json(settings_file)
    settings.validate()
    assert type(settings)._from_dict(settings.serialize()) == settings
    dataset = rg.Dataset(name="audit", settings=settings, client=MagicMock())
    records = [rg.Record.from_dict(record) for record in json.loads(records_file.read_text())]
    sent = dataset.records._ingest_records(records)
    assert [model.external_id for model in sent] == ["u1", "u3", "u5", "u0", "u4", "u2"]
    assert all(model.suggestions[0].agent == "softpref 0.1.0" for model in sent)
    for record in records:
        number = UIDS.index(record.id)
        for user, verdict in enumerate(VERDICTS[number]):
            value = answer(record.metadata["labelled"], verdict)
            record.responses.add(rg.Response("better", value, UUID(int=user), status="submitted"))
        record._model.status = "pending" if number == 5 else "completed"  # the server sets it
    JsonIO.to_json(records, tmp_path / "export.json")
    assert json.loads((tmp_path / "export.json").read_text()) == export("argilla")


def test_label_studio_imports_the_files_and_exports_what_is_stored(tmp_path, first_version):
    pytest.importorskip("label_studio_sdk")
    from label_studio_sdk.label_interface import LabelInterface
    from label_studio_sdk.label_interface.objects import AnnotationValue, TaskValue

    config, tasks = written(tmp_path, "label_studio")
    interface = LabelInterface(config)
    interface.validate()
    exported = []
    for number, task in enumerate(tasks, start=1):
        assert interface.validate_task({"data": task["data"]})
        (prediction,) = task["predictions"]
        assert interface.validate_prediction(prediction, return_errors=True) == []
        index = UIDS.index(task["data"]["uid"])
        annotations = []
        for user, verdict in enumerate(VERDICTS[index], start=1):
            value = answer(task["data"]["labelled"], verdict)
            regions = interface.create_regions({"better": value})
            result = [{**region._dict(), "id": f"r{number}{user}"} for region in regions]
            annotation = AnnotationValue(
                result=[] if index == 5 else result, completed_by=user, was_cancelled=index == 5
            )
            assert interface.validate_annotation(annotation.model_dump())
            annotations.append(annotation)
        value = TaskValue(data=task["data"], annotations=annotations, predictions=[prediction])
        exported.append({"id": number} | value.model_dump())
    assert exported == export("label_studio")
