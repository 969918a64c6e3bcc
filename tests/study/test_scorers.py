"""Ways to tell wrong labels, and what is measured of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softpref.data.sources import load_pairs
from softpref.study import presets
from softpref.study.grid import Cell
from softpref.study.presets import WorldPreset
from softpref.study.scorers import SCORERS, NoisySet, average_precision
from softpref.training.align import AlignFiles
from softpref.world.build import INFORMATIVE

SMALL = replace(
    INFORMATIVE, sft_rows=200, train_pairs=96, clean_pairs=16, eval_pairs=10, test_prompts=10
)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=20))
def test_average_precision_by_thresholds(pairs):
    pairs = [*pairs, (2, True)]
    slow, before = 0.0, 0.0
    positives = sum(positive for _, positive in pairs)
    for threshold in sorted({score for score, _ in pairs}, reverse=True):
        taken = [positive for score, positive in pairs if score >= threshold]
        recall, precision = sum(taken) / positives, sum(taken) / len(taken)
        slow += (recall - before) * precision
        before = recall
    scores, is_positive = (torch.tensor(column) for column in zip(*pairs, strict=True))
    assert average_precision(scores, is_positive) == pytest.approx(slow)


def test_the_truth_has_an_average_precision_of_one():
    is_positive = torch.tensor([True, False, True, False])
    assert average_precision(is_positive.double(), is_positive) == 1
    assert average_precision(torch.zeros(4), is_positive) == 0.5


@pytest.fixture(scope="module")
def in_world(tmp_path_factory):
    home = tmp_path_factory.mktemp("worlds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(presets, "WORLDS", {"informative": SMALL})
        patch.setattr(presets, "LARGEST_CLEAN_SET", 16)
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        yield WorldPreset("informative", home)


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_way_judges_every_pair(in_world, tmp_path, scorer):
    numbers = in_world.run(Cell("mspo", 3, 0.4, scorer=scorer), tmp_path / "cell")
    assert 0 <= numbers["label_auroc"] <= 1
    assert 0 < numbers["average_precision"] <= 1
    assert ("ece" in numbers) == (scorer in ("audit", "audit_run"))
    assert ("noise_rate_error" in numbers) == (
        scorer in ("audit", "audit_run", "perpcorrect_official", "confident_learning")
    )
    assert not (tmp_path / "cell" / "run" / "model.safetensors").exists()


def test_the_longer_response_is_right_where_it_always_is(in_world, tmp_path):
    cell = tmp_path / "cell"
    in_world.run(Cell("mspo", 3, 0.4, scorer="ppl_diff"), cell)
    rows = [
        row | {"chosen": "a b c", "rejected": "a"} if not row["is_flipped"]
        else row | {"chosen": "a", "rejected": "a b c"}
        for row in load_pairs(str(cell / "noisy.jsonl")).pairs.to_list()
    ]  # fmt: skip
    keep = ("prompt", "chosen", "rejected", "is_flipped")
    lines = "".join(json.dumps({name: row[name] for name in keep}) + "\n" for row in rows)
    (cell / "long.jsonl").write_text(lines)
    judged = SCORERS["longer"](
        NoisySet(AlignFiles("", str(cell / "long.jsonl"), None, None, ""), lambda _: None)
    )
    assert (judged.values > 0).tolist() == [not row["is_flipped"] for row in rows]
