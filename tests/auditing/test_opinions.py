"""Reward models and judges in an audit: asked once, weighed by the trusted pairs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.sharing import counting
from transformers import LlamaConfig, LlamaForSequenceClassification

import softpref
from softpref.auditing import audit, opinions
from softpref.auditing.opinions import with_opinions
from softpref.cli import main
from softpref.data.column_cache import ColumnCache
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.judging.options import JudgeOptions
from softpref.training.evidence import OPINION
from softpref.training.output import write_lines
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer
from tests.judging.server import MARK, Script, serving
from tests.toy import toy_pairs

SIZES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = make_tokenizer()
    tiny_llama(tokenizer, 0).save_pretrained(tmp_path / "sft")
    torch.manual_seed(0)
    reward = LlamaForSequenceClassification(
        LlamaConfig(vocab_size=len(tokenizer), num_labels=1, **SIZES)
    )
    reward.save_pretrained(tmp_path / "reward")
    for name in ("sft", "reward"):
        tokenizer.save_pretrained(tmp_path / name)
    write_lines(tmp_path / "data.jsonl", toy_pairs(120, flip_every=4))
    write_lines(tmp_path / "clean.jsonl", toy_pairs(40, seed=1))
    return {name: str(tmp_path / file) for name, file in
            (("model", "sft"), ("data", "data.jsonl"), ("clean", "clean.jsonl"))}  # fmt: skip


class Knowing:
    """A reward model that knows the truth, and says it with a sign of its own."""

    sign, batch_size = 1.0, 8

    def __init__(self, source, *_):
        self.identity = {"weights": f"{source} {self.sign}"}

    def differences(self, batch):
        return [self.sign * (len(q.first) - len(q.second) + 0.5) for q in batch]

    def finish(self):
        """Nothing is kept."""


def test_the_difference_of_rewards_is_kept_by_content(files, tmp_path):
    data, reward = load_pairs(files["data"]), str(tmp_path / "reward")
    (found,) = with_opinions([data], [reward, reward], ColumnCache(None))
    opinion = torch.tensor(found.pairs[OPINION + reward])
    assert opinion.std() > 0
    turned = data.pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})
    (other,) = with_opinions([replace(data, pairs=turned)], [reward], ColumnCache(None))
    assert torch.equal(torch.tensor(other.pairs[OPINION + reward]), -opinion)
    with counting() as tokens:
        (again,) = with_opinions([data], [reward], ColumnCache(None))
    assert tokens == [1]  # the trial of a model
    assert again.pairs[OPINION + reward][:] == found.pairs[OPINION + reward][:]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_an_opinion_is_weighed_by_the_trusted_pairs(files, monkeypatch, sign):
    """A model that is always wrong says as much as one that is always right."""
    truth = {}
    for path in (files["data"], files["clean"]):
        for row in load_pairs(path).pairs:
            flipped = bool(row.get("is_flipped"))
            truth[row["chosen"], row["rejected"]] = -1.0 if flipped else 1.0

    class Sure(Knowing):
        def differences(self, batch):
            return [sign * truth[q.first, q.second] for q in batch]

    Sure.sign = sign
    monkeypatch.setattr(opinions, "RewardModel", Sure)
    done = softpref.audit(**files, reward_model="rm")
    assert done.summary.signals == ["ppl_diff", "length", "content", "rm"]
    assert done.summary.trusted_auroc > 0.95
    assert done.summary.auroc > 0.95
    (most_suspect,) = (row for row in done.pairs if row["rank"] == 1)
    assert most_suspect["evidence"]["opinion of rm"] < -1
    assert most_suspect["why"].startswith("the opinion of rm speaks against the label")


def test_a_pair_that_cannot_be_scored_has_no_opinion(files, monkeypatch, caplog):
    class Silent(Knowing):
        def differences(self, batch):
            return [opinions.Answer(None, "does not fit the context"), float("nan"), 2.0][
                : len(batch)
            ]

    monkeypatch.setattr(opinions, "RewardModel", Silent)
    data = load_pairs(files["data"])
    few = replace(data, pairs=data.pairs.select(range(3)))
    (found,) = with_opinions([few], ["rm"], ColumnCache(None))
    assert found.pairs["opinion of rm"][:] == [0.0, 0.0, 2.0]
    assert f"rm, {files['data']}: could not score 2 pairs" in caplog.text


def test_a_reward_model_reads_messages_as_its_template_has_them(files, monkeypatch):
    """One turn of text is that text, as `judge` has it from `generate`; calls stay messages."""
    asked = []

    class Listening(Knowing):
        def differences(self, batch):
            asked.extend(batch)
            return [1.0] * len(batch)

    monkeypatch.setattr(opinions, "RewardModel", Listening)
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    tools = [{"name": "f"}]
    path = str(Path(files["data"]).with_name("calls.jsonl"))
    write_lines(Path(path), [{
        "prompt": [{"role": "user", "content": "a"}], "chosen": [call], "tools": tools,
        "rejected": [{"role": "assistant", "content": "b"}],
    }])  # fmt: skip
    with_opinions([load_pairs(path)], ["rm"], ColumnCache(None))
    assert [(q.first, q.second, q.context) for q in asked] == [([call], "b", {"tools": tools})]


def knowing(files, share=1.0):
    """Return a judge that knows the better response of a share of the pairs, and no others."""
    better = {}
    for path in (files["data"], files["clean"]):
        for number, row in enumerate(load_pairs(path).pairs):
            sides = row["chosen"], row["rejected"]
            better[frozenset(sides)] = (sides[bool(row.get("is_flipped"))], number)

    def judge(system, user):
        texts = user.split(f"\n{MARK.search(system)[0]} ")[1:3]
        first, second = (text.split("\n", 1)[1] for text in texts)
        right, number = better[frozenset((first, second))]
        if number >= share * len(better):
            return "neither"
        return "A" if right == first else "B"

    return judge


def cut(files, tmp_path, pairs, trusted):
    """Return the first pairs of the files, which are dearer to ask about than to read."""
    for name, count in (("data", pairs), ("clean", trusted)):
        path = tmp_path / f"few_{name}.jsonl"
        path.write_text("".join(Path(files[name]).read_text().splitlines(True)[:count]))
        files = files | {name: str(path)}
    return files


def test_a_judge_is_asked_in_both_orders_and_weighed_by_the_trusted_pairs(files, tmp_path, caplog):
    """A judge that is always wrong says as much as one that is always right."""
    files = cut(files, tmp_path, 60, 30)
    caplog.set_level("INFO", "softpref")
    truth = knowing(files)
    with serving(Script(lambda *asked: "AB"[truth(*asked) == "A"])) as script:
        judge = JudgeOptions(judge_model="m", base_url=script.url, concurrency=16, price_input=10.0,
                             price_output=30.0)  # fmt: skip
        out = str(tmp_path / "out")
        done = softpref.audit(**files, judge=judge, output=out)
        assert set(script.calls.values()) == {1}
        assert len(script.calls) == 2 * (60 + 30)
    assert done.summary.signals == ["ppl_diff", "length", "content", "judge m"]
    assert done.summary.trusted_auroc > 0.95
    assert done.summary.auroc > 0.95
    (most_suspect,) = (row for row in done.pairs if row["rank"] == 1)
    assert most_suspect["why"].startswith("the opinion of judge m speaks against the label")
    asked = done.summary.record()["judge"]
    assert (asked["pairs"], asked["without_opinion"], asked["changed_with_order"]) == (90, 0, 0)
    assert asked["account"]["calls"] == 180
    assert asked["account"]["dollars"] == pytest.approx(180 * (100 * 10 + 20 * 30) / 1e6)
    about = f"judging pairs of {files['data']} and {files['clean']}: "
    assert f"{about}180 calls; about" in caplog.text
    assert "dollars" in caplog.text


def test_max_cost_ends_the_asking_and_the_same_command_goes_on(files, tmp_path, capsys):
    files = cut(files, tmp_path, 20, 12)
    with serving(Script(knowing(files))) as script:
        command = [
            "audit", *(word for name, path in files.items() for word in (f"--{name}", path)),
            "--output", str(tmp_path / "out"), "--judge", "endpoint", "--judge_model", "m",
            "--base_url", script.url, "--price_input", "10", "--price_output", "30",
            "--max_retries", "0", "--max_reply_tokens", "400", "--max_cost",
        ]  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main([*command, "0.1"])
        assert end.value.code == 2
        assert "--max_cost 0.1 dollars: " in capsys.readouterr().err
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["verdicts.jsonl"]
        asked = len(script.calls)
        assert 0 < asked < 64
        main([*command, "10"])
        assert set(script.calls.values()) == {1}
        assert len(script.calls) == 64
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["judge"]["account"]["calls"] == 64
    assert summary["judge"]["orders"] == "both"


def test_pairs_on_which_a_judge_fails_have_no_opinion_and_are_counted(files, tmp_path, monkeypatch):
    files = cut(files, tmp_path, 30, 12)
    seen = []
    fit = audit.evidence_of
    monkeypatch.setattr(audit, "evidence_of", lambda *of: seen.append(of[:2]) or fit(*of))
    monkeypatch.setattr(opinions, "RewardModel", Knowing)
    with serving(Script(knowing(files, 20 / 42))) as script:
        judge = JudgeOptions(judge_model="m", base_url=script.url)
        done = softpref.audit(
            **files, judge=judge, output=str(tmp_path / "out"), reward_model=["rm"]
        )
    ((data, clean),) = seen
    labels = [-1.0 if flipped else 1.0 for flipped in data["is_flipped"][:20]]
    assert data["opinion of judge m"][:] == labels + [0.0] * 10
    assert clean["opinion of judge m"][:] == [1.0] * 12
    assert done.summary.signals[-2:] == ["rm", "judge m"]
    assert done.summary.judge["without_opinion"] == 10
    assert done.summary.judge["account"]["failures"] == {"no verdict": 20}
    assert any("judge m failed on 10 of 42 pairs" in words for words in done.summary.warnings)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--judge_model", "m"], "--judge_model: has no effect without a judge; add"),
        (["--judge", "endpoint"], "--judge_model is missing"),
        (["--judge", "endpoint", "--judge_model", "m"], "OPENAI_API_KEY is not set"),
        (["--judge", "checker", "--max_retries", "2"], "--judge checker does not read it"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_first(
    files, tmp_path, monkeypatch, capsys, more, message
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(audit, "score_sets", None)
    named = [word for name, path in files.items() for word in (f"--{name}", path)]
    with pytest.raises(SystemExit):
        main(["audit", *named, "--output", str(tmp_path / "out"), *more])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_judge_in_python_needs_options_and_a_directory_for_its_verdicts(files):
    with pytest.raises(UsageError, match="judge is a str: give softpref.judging.options"):
        softpref.audit(**files, judge="endpoint")
    with pytest.raises(UsageError, match="^output is missing"):
        softpref.audit(**files, judge=JudgeOptions("checker"))


def test_what_is_no_reward_model_is_named_by_its_option(files, tmp_path):
    with pytest.raises(UsageError, match="^reward_model"):
        softpref.audit(**files, reward_model=[str(tmp_path / "sft")])
