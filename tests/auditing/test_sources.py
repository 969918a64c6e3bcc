"""A run and an audit of several files: what they record of each."""

from __future__ import annotations

import json

import pytest

from softpref.auditing import audit
from softpref.auditing.audit import AuditOptions, run_audit
from softpref.cli import main
from softpref.data.mixing import mixed, shares_of
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.statistics.evidence import Evidence
from softpref.statistics.noise_rate import estimate_noise_rate
from softpref.training.align import AlignFiles, align, load_sets
from softpref.training.config import MSPOConfig
from softpref.training.output import write_lines
from softpref.training.preparation import prepare
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
from tests.toy import toy_pairs, toy_trainer


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_llama(make_tokenizer(), 0).save_pretrained("sft")
    make_tokenizer().save_pretrained("sft")
    write_lines(tmp_path / "a.jsonl", toy_pairs(30, seed=2, flip_every=3))
    write_lines(tmp_path / "b.jsonl", toy_pairs(40, seed=3))
    write_lines(tmp_path / "clean.jsonl", toy_pairs(16, seed=1))
    return tmp_path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def config(method="mspo", **options):
    return MSPOConfig(method=method, use_cpu=True, max_steps=1, save_strategy="no",
                      disable_tqdm=True, **options)  # fmt: skip


def mixed_run(home, clean="clean.jsonl"):
    files = AlignFiles("sft", ["a.jsonl", "b.jsonl"], clean, None, "run", mix=[3, 1])
    align(files, config(meta_batch_size=8))
    return json.loads((home / "run" / "run.json").read_text())


def test_a_mixed_run_and_its_audit_say_of_each_file_what_it_gave(home, caplog):
    caplog.set_level("INFO", "softpref")
    record = mixed_run(home)
    files = [str(home / "a.jsonl"), str(home / "b.jsonl")]
    assert (record["files"]["train"], record["files"]["mix"]) == (files, [3, 1])
    of_train = record["data"]["train"]
    assert [(of["source"], of["pairs"], of["share"]) for of in of_train["sources"]] == [
        (files[0], 30, 0.75), (files[1], 10, 0.25)
    ]  # fmt: skip
    assert of_train["mix"] == [0.75, 0.25]
    assert "sources" not in record["data"]["clean"]
    rates = [of["noise_rate"] for of in of_train["sources"]]
    assert [(of["rate"], of["low"], of["high"]) for of in rates] == [(None, 0, 0.5)] * len(rates)
    assert "noise rate of a.jsonl: " in caplog.text
    assert "train: 30 pairs from a.jsonl, 10 pairs from b.jsonl" in caplog.text
    assert "| of the 30 from a.jsonl | " in (home / "run" / "README.md").read_text()
    labels = lines(home / "run" / "labels.jsonl")
    assert [row["source"] for row in labels] == ["a.jsonl"] * 30 + ["b.jsonl"] * 10

    run_audit(AuditOptions(run="run", output="out"))
    audited = lines(home / "out" / "labels.jsonl")
    assert [(row["uid"], row["soft_label"]) for row in audited] == [
        (row["uid"], row["soft_label"]) for row in labels
    ]
    assert [row["source"] for row in audited] == [files[0]] * 30 + [files[1]] * 10
    with pytest.raises(UsageError, match="--mix comes from the run"):
        run_audit(AuditOptions(run="run", mix=[1, 1], output="out"))
    (home / "b.jsonl").unlink()
    with pytest.raises(UsageError, match=r"b.jsonl does not exist: give --data"):
        run_audit(AuditOptions(run="run", output="out"))


def test_pairs_held_out_of_a_mix_are_none_that_it_trains_on(home):
    record = mixed_run(home, clean="12")
    assert (record["data"]["train"]["pairs"], record["data"]["clean"]["pairs"]) == (28, 12)
    assert sum(of["pairs"] for of in record["data"]["train"]["sources"]) == 28
    run_audit(AuditOptions(run="run", output="out"))
    uids = [[row["uid"] for row in lines(home / of / "labels.jsonl")] for of in ("run", "out")]
    assert uids[0] == uids[1]


def test_an_audit_of_several_files_has_the_rate_of_each(home, caplog, monkeypatch):
    seen = []
    fit = audit.evidence_of
    monkeypatch.setattr(Evidence, "speaks", True)
    monkeypatch.setattr(audit, "evidence_of", lambda *of: seen.append(fit(*of)) or seen[-1])
    caplog.set_level("INFO", "softpref")
    run_audit(AuditOptions("sft", ["a.jsonl", "b.jsonl"], "clean.jsonl", output="out"))
    summary = json.loads((home / "out" / "summary.json").read_text())
    ((evidence, log_odds),) = seen
    for of, part in zip(summary["sources"], log_odds.split([30, 40]), strict=True):
        expected = estimate_noise_rate(-part, -evidence.trusted)
        found = [of[f"noise_rate{end}"] for end in ("", "_low", "_high")]
        assert found == [expected.told, expected.low, expected.high]
        words = f"wrong labels among the {len(part)} pairs of {of['source']}: {expected}"
        assert words in caplog.text
        assert words[1:] in (home / "out" / "report.html").read_text()
    assert [of["source"] for of in summary["sources"]] == ["a.jsonl", "b.jsonl"]
    labels, cleaned = (lines(home / "out" / name) for name in ("labels.jsonl", "cleaned.jsonl"))
    assert [row["source"] for row in labels] == ["a.jsonl"] * 30 + ["b.jsonl"] * 40
    assert [row["soft_label"] for row in cleaned] == [row["p_correct"] for row in labels]
    given = [*lines(home / "a.jsonl"), *lines(home / "b.jsonl")]
    assert [row["prompt"] for row in cleaned] == [row["prompt"] for row in given]
    assert "; from b.jsonl" in (home / "out" / "report.html").read_text()


def test_one_file_in_a_list_is_written_as_one_file(home):
    for name, data in (("one", "a.jsonl"), ("listed", ["a.jsonl"])):
        run_audit(AuditOptions("sft", data, "clean.jsonl", output=name))
    for file in ("labels.jsonl", "summary.json", "cleaned.jsonl", "report.html"):
        assert (home / "one" / file).read_bytes() == (home / "listed" / file).read_bytes()
    assert "source" not in (home / "one" / "summary.json").read_text()


def test_clean_pairs_leave_a_mix_before_its_draw(home):
    write_lines(home / "clean.jsonl", lines(home / "a.jsonl")[:12])
    files = AlignFiles("sft", ["a.jsonl", "b.jsonl"], "clean.jsonl", mix=[1, 1])
    sets = load_sets(files, "stop", 0)
    train, clean = sets.train, sets.clean
    assert train.pairs["source"][:] == ["a.jsonl"] * 18 + ["b.jsonl"] * 18
    assert train.also_clean == 12
    assert train.where["also_clean"] == {"a.jsonl and clean.jsonl": 12}
    assert not set(train.pairs["uid"]) & set(clean.pairs["uid"])


def test_every_count_names_the_files_that_it_speaks_of(home, caplog):
    """What contradicts, repeats or is trusted too may stand in two files."""
    caplog.set_level("INFO", "softpref")
    of_a, of_b, trusted = (
        [{side: row[side] for side in ("prompt", "chosen", "rejected")} for row in lines(path)]
        for path in (home / "a.jsonl", home / "b.jsonl", home / "clean.jsonl")
    )
    turned = of_a[0] | {"chosen": of_a[0]["rejected"], "rejected": of_a[0]["chosen"]}
    bad = [of_b[0] | {"chosen": ""}] * 11
    write_lines(home / "a.jsonl", of_a)
    write_lines(home / "b.jsonl", [*of_b, turned, *trusted[:2], of_b[3], *bad])
    files = AlignFiles("sft", ["a.jsonl", "b.jsonl"], "clean.jsonl")
    sets = load_sets(files, "skip", 0)
    prepare(sets.train, sets.clean, None, make_tokenizer(), 11, 64, "skip")
    said = {record.getMessage().strip() for record in caplog.records}
    assert said >= {
        "b.jsonl and clean.jsonl: 2 are clean pairs too and were removed from training",
        "a.jsonl and b.jsonl: 1 are labelled both ways (kept: that is noise)",
        "b.jsonl: 1 repeat an earlier row",
        "and 28 more rows of a.jsonl, b.jsonl left out",
    }
    cut = {line.split(":")[0] for line in said if "cut at max_length" in line}
    assert cut == {"a.jsonl", "b.jsonl", "clean.jsonl"}


def test_a_run_of_other_sources_or_another_mix_is_another_run(home, tmp_path):
    loaded = load_pairs(["a.jsonl", "b.jsonl"])
    first, second = (
        toy_trainer(tmp_path, train=mixed(loaded, shares_of(["a", "b"], weights), 0)).identity()
        for weights in ((3, 1), (3, 1.001))
    )
    alone = toy_trainer(tmp_path).identity()
    assert {name for name in first if first[name] != second[name]} == {"mix"}
    assert first.keys() - alone.keys() == {"training sources", "mix"}


MISTAKES = [
    (["--train", "a.jsonl", "--mix", "1"], "--mix 1: there is only a.jsonl to mix"),
    (["--train", "a.jsonl", "b.jsonl", "--mix", "1"], "--mix 1: give one weight for each of the 2"),
    (["--train", "a.jsonl", "b.jsonl", "--mix", "1", "-1"], "--mix 1 -1: every weight must be"),
    (["--train", "a.jsonl", "b.jsonl", "--mix", "1", "nan"], "--mix nan: must be a finite number"),
    (["--train", "a.jsonl", "a.jsonl"], "a.jsonl is given twice: give each file once"),
]


@pytest.mark.parametrize(("given", "message"), MISTAKES)
@pytest.mark.parametrize("command", ["train", "audit"])
def test_mistakes_are_one_message_before_a_model_is_loaded(home, command, given, message, capsys):
    option = {"train": "--train", "audit": "--data"}[command]
    given = [option if word == "--train" else word for word in given]
    with pytest.raises(SystemExit) as stopped:
        main([command, "--model", "none", "--clean", "clean.jsonl", "--output", "out", *given])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"softpref {command}: {message}")
    assert error.count("\n") == 1


def test_files_and_mix_from_yaml(home):
    (home / "run.yaml").write_text(
        "train: [a.jsonl, b.jsonl]\nmix: [0.75, 0.25]\nmodel: sft\nclean: clean.jsonl\n"
        "method: dpo\nmax_steps: 1\nuse_cpu: true\nsave_strategy: 'no'\n"
    )
    main(["train", "--config", "run.yaml", "--output", "run"])
    record = json.loads((home / "run" / "run.json").read_text())
    assert [of["pairs"] for of in record["data"]["train"]["sources"]] == [30, 10]
