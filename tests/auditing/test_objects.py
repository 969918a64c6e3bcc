"""`softpref.audit` of objects in memory, what it writes, and how its result shows itself."""

from __future__ import annotations

import json

import pytest
import torch

import softpref
from softpref.errors import UsageError
from softpref.training.output import write_lines
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
from tests.toy import toy_pairs


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """The same audit of files and of objects; of the latter, model and data too."""
    home = tmp_path_factory.mktemp("objects")
    model, data, clean = tiny_llama(make_tokenizer(), 0), toy_pairs(30), toy_pairs(16, seed=1)
    model.save_pretrained(home / "sft")
    make_tokenizer().save_pretrained(home / "sft")
    write_lines(home / "data.jsonl", data)
    write_lines(home / "clean.jsonl", clean)
    files = softpref.audit(
        home / "sft", home / "data.jsonl", home / "clean.jsonl",
        reference_cache=str(home / "cache"), output=home / "files",
    )  # fmt: skip
    model.train()
    objects = softpref.audit(
        model, data.to_pandas(), clean.to_list(), processing_class=make_tokenizer(),
        reference_cache=str(home / "cache2"), output=str(home / "objects"),
    )  # fmt: skip
    return home, model, files, objects


def test_objects_are_audited_as_files_are(audited):
    _, _, files, objects = audited
    assert objects.pairs.to_list() == files.pairs.to_list()
    assert objects.summary.noise_rate_high == files.summary.noise_rate_high
    assert objects.summary.clean_provenance == "given as an object"


def test_an_audit_leaves_the_callers_model_as_it_was(audited):
    _, model, _, _ = audited
    assert model.training
    fresh = tiny_llama(make_tokenizer(), 0)
    for one, other in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one, other)
    assert model.config._attn_implementation == fresh.config._attn_implementation


def test_an_audit_in_python_writes_what_the_command_writes(audited):
    home, _, _, objects = audited
    names = {path.name for path in (home / "files").iterdir()}
    assert names >= {"labels.jsonl", "summary.json", "cleaned.jsonl", "report.html"}
    assert {path.name for path in (home / "objects").iterdir()} == names
    for name in ("labels.jsonl", "cleaned.jsonl"):
        assert (home / "objects" / name).read_text() == (home / "files" / name).read_text()
    rows = [json.loads(row) for row in (home / "objects" / "cleaned.jsonl").open()]
    assert len(rows) == 30
    assert objects.report == home / "objects" / "report.html"


def test_an_audit_shows_itself(audited):
    home, _, _, objects = audited
    text, page = repr(objects), objects._repr_html_()
    assert "\n" not in text
    assert text.startswith("<Audit of 30 pairs: wrong labels ")
    assert text.endswith(f"report {home / 'objects' / 'report.html'}>")
    assert "95%" in text
    assert "none named" in text  # toy pairs say nothing
    assert f'<a href="{objects.report.as_uri()}">' in page
    assert page.startswith("<table>")
    assert "<script" not in page


def test_a_model_without_a_name_needs_its_tokenizer():
    with pytest.raises(UsageError, match="not loaded from anywhere: give its processing_class"):
        softpref.audit(tiny_llama(make_tokenizer(), 0), toy_pairs(20), 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dry_run": True}, "dry_run is for the command softpref audit: omit it in Python"),
        ({"dry_run": True, "output": "out"}, "dry_run is for the command"),
        ({"export_to": "argilla"}, "export_to is about files that are written: give output"),
        ({"export": "soft"}, "export is about files that are written: give output"),
    ],
)
def test_options_that_would_not_be_read_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        softpref.audit(tiny_llama(make_tokenizer(), 0), toy_pairs(20), 10, **options)
    assert not (tmp_path / "out").exists()
