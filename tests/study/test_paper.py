"""The paper's data as PerpCorrect prepares it, and what its runs are given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from softpref.algorithm.methods import METHODS
from softpref.errors import UsageError
from softpref.study import paper
from softpref.study.choices import StudyOptions
from softpref.study.grid import Cell
from softpref.study.paper import PaperPreset, estimate, single_turn, without_prompter
from softpref.study.study import run_study
from softpref.study.targets import TARGETS
from softpref.training.align import AlignFiles
from softpref.training.sft import SFTOptions
from softpref.world.build import tiny_llama
from softpref.world.language import make_tokenizer


def turns(*texts):
    marks = ("\n\nHuman: ", "\n\nAssistant: ")
    return "".join(marks[i % 2] + text for i, text in enumerate(texts))


def test_one_question_and_one_answer_of_hh():
    row = {"chosen": turns("Why?", "Because."), "rejected": turns("Why?", "No.")}
    assert single_turn(row) == {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (turns("Why?", "So.", "And?", "So."), turns("Why?", "So.", "And?", "No.")),
        (turns("Why?", "So."), turns("Why?", "No.", "And?")),
        (turns("Why?", "So."), turns("How?", "No.")),
        ("Human: no mark Assistant: no", "Human: no mark Assistant: yes"),
    ],
)
def test_other_rows_of_hh_are_left_out(chosen, rejected):
    assert single_turn({"chosen": chosen, "rejected": rejected}) is None


def test_the_first_prompter_goes_and_later_ones_stay():
    row = {"prompt": "prompter: a assistant: b prompter: c", "chosen": "d", "rejected": "e"}
    assert without_prompter(row)["prompt"] == "a assistant: b prompter: c"


@pytest.fixture
def on_paper(tmp_path, monkeypatch):
    """The preset over a hub of one process: a tiny model and rows in HH's form."""
    tiny_llama(make_tokenizer(), 0).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    words = "abcdefghijkl"

    def rows(source):
        yield 0, {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e")}
        for i in range(40 if source.endswith(":train") else 30):
            question = f"sort : {words[i % 12]} {words[i // 12]} ="
            yield i + 1, {"chosen": turns(question, "a b"), "rejected": turns(question, "c d e")}

    monkeypatch.setattr(paper, "read_rows", rows)
    monkeypatch.setattr(paper, "CLEAN_PAIRS", 6)
    monkeypatch.setattr(paper, "TEST_PROMPTS", 8)
    monkeypatch.setattr(
        paper, "SFTOptions", lambda **options: SFTOptions(**options | {"bf16": False})
    )
    tiny = paper.PaperModel(str(tmp_path / "model"), 1e6, 5e-7)
    monkeypatch.setattr(paper, "MODELS", {"tiny": tiny})
    return PaperPreset("tiny", "hh", tmp_path / "home")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(path):
    return {row["prompt"] for row in lines(path)}


def test_files_are_disjoint_seeded_and_a_prompt_is_tested_once(on_paper):
    on_paper.prepare(3, "disjoint")
    home = on_paper.home / "tiny-hh-disjoint-seed3"
    sets = {name: prompts(home / f"{name}.jsonl") for name in ("clean", "train", "sft", "test")}
    assert [len(lines(home / f"{name}.jsonl")) for name in sets] == [6, 17, 17, 8]
    assert not sets["clean"] & sets["train"]
    assert not sets["sft"] & (sets["train"] | sets["clean"])
    assert len(sets["test"]) == 8
    before = (home / "train.jsonl").read_bytes()
    on_paper.prepare(4, "disjoint")
    assert (on_paper.home / "tiny-hh-disjoint-seed4" / "train.jsonl").read_bytes() != before


def test_as_in_the_paper_sft_sees_the_very_pairs_that_are_aligned_on(on_paper):
    on_paper.prepare(3, "clean_chosen")
    home = on_paper.home / "tiny-hh-clean_chosen-seed3"
    assert (home / "sft.jsonl").read_bytes() == (home / "train.jsonl").read_bytes()
    assert len(lines(home / "train.jsonl")) == 34


def test_what_takes_the_hours():
    cells = TARGETS["table1"].cells([0], method=["dpo"], noise_rate=[0.4])
    (teaching,) = TARGETS["table1"].cells([0], method=["mspo"], noise_rate=[0.4],
                                          recipe=["faithful"])  # fmt: skip
    assert METHODS["mspo"].teaches
    said = estimate("llama-2-7b", cells)
    assert "1 runs and 1 SFT runs of meta-llama/Llama-2-7b-chat-hf" in said
    # LoRA: (2 + 2) F, and SFT 3/2 F, of 2 · 6.74e9 · 80,000 · 400 operations at 124.8e12 a second
    assert f"about {5.5 * 2 * 6.74e9 * 80_000 * 400 / 124.8e12 / 3600:.0f} A100 hours" in said
    # all weights, m = 1: (3 · 2 + 2) F
    hours = f"{9.5 * 2 * 6.74e9 * 80_000 * 400 / 124.8e12 / 3600:.0f}"
    assert f"about {hours} A100 hours" in estimate("llama-2-7b", [teaching])
    # LoRA, m = 8/32/4: (2 · 17/16 + 2) F
    (lora,) = TARGETS["table1"].cells([0], method=["mspo"], noise_rate=[0.4])
    hours = f"{5.625 * 2 * 6.74e9 * 80_000 * 400 / 124.8e12 / 3600:.0f}"
    assert f"about {hours} A100 hours" in estimate("llama-2-7b", [lora])


def test_a_dry_run_needs_no_hub_and_writes_nothing(tmp_path, caplog):
    options = StudyOptions(preset="paper", model="phi-2", data="oasst1", dry_run=True)
    with caplog.at_level("INFO", "softpref"):
        run_study("table1", options)
    assert "135 runs and 3 SFT runs of microsoft/phi-2" in caplog.text
    assert "135,000 calls of gpt-4-0613 as the judge" in caplog.text
    assert "Nothing was run." in caplog.text


def test_a_hub_out_of_reach_is_said_in_one_message(tmp_path):
    options = StudyOptions(preset="paper", model="phi-2", data="oasst1", methods=["dpo"],
                           noise=[0.4], seeds=[0], jobs=1, judge="none",
                           output=str(tmp_path))  # fmt: skip
    with pytest.raises(UsageError, match=r"1 of 1 runs failed.*oasst1_pairwise_rlhf_reward:train"):
        run_study("table1", options)


def test_the_models_own_rate_is_faithful_and_sft_is_fitted_once(on_paper, tmp_path, monkeypatch):
    asked = {}

    def stop(cell, files, options, evaluators):
        asked.update(options(cell.method))
        return {}

    monkeypatch.setattr(paper, "align_and_measure", stop)
    seen = []
    monkeypatch.setattr(
        paper,
        "cell_files",
        lambda cell, sources, _, where, own: (
            seen.append((cell, sources)) or AlignFiles("", "", None, None, "")
        ),
    )
    on_paper.run(Cell("dpo", 3, recipe="faithful", sft_data="clean_chosen"), tmp_path / "cell")
    assert asked["learning_rate"] == 5e-7
    on_paper.run(Cell("dpo", 3, sft_data="noisy_chosen"), tmp_path / "cell")
    (fitted, of_fitted), (noisy, of_noisy) = seen
    assert (fitted.sft_data, Path(of_fitted.sft).name) == ("disjoint", "sft")  # not fitted twice
    assert (noisy.sft_data, Path(of_noisy.sft).name) == ("noisy_chosen", "model")
    asked.clear()
    on_paper.run(Cell("dpo", 3), tmp_path / "cell")
    assert "learning_rate" not in asked


def test_a_way_to_tell_wrong_labels_is_measured_here_too(on_paper, tmp_path):
    on_paper.prepare(3, "disjoint")
    numbers = on_paper.run(Cell("mspo", 3, 0.2, scorer="longer"), tmp_path / "cell")
    assert numbers["label_auroc"] == 0  # every worse response of this hub is the longer
    assert "preference_accuracy" not in numbers
