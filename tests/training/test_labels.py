from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from softpref.algorithm import MetaLearner
from softpref.algorithm.bilevel import Update
from softpref.algorithm.labeller import Constant
from softpref.models.scoring import Scorer
from softpref.training.labels import LabelHistory, beliefs, evidence, known_flips, read_labels
from tests.tiny import measured
from tests.toy import toy_trainer


def pairs(ppl_diff, starting=None):
    margin = [3.0] * len(ppl_diff)
    return measured(ppl_diff=ppl_diff, margin=margin, starting_ppl_diff=starting or margin)


def falling():
    """A meta-learner that believes pairs of low PPLDiff: p = sigmoid(-4 x)."""
    meta_learner = MetaLearner(hidden=2)
    with torch.no_grad():
        for parameter in meta_learner.parameters():
            parameter.zero_()
        meta_learner.layers[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        meta_learner.layers[2].weight.copy_(torch.eye(2))
        meta_learner.layers[4].weight.copy_(torch.tensor([[-4.0, 4.0]]))
    return meta_learner


def named(*uids, **columns):
    return Dataset.from_dict({"uid": uids, **columns})


TRUSTED = [-2.0, -1.5, -1.0, -1.0, -0.5, -0.5, -0.2, 0.1, 0.3, -0.8, -1.2, 0.2]


@pytest.mark.parametrize("labeller", [Constant(1.0), falling()])
def test_evidence_grows_with_the_belief_in_the_label(labeller):
    scores = evidence(labeller, pairs([-1.0, 0.0, 1.0], starting=[-1.0, 0.0, 1.0]))
    assert scores[0] > 0.5
    assert scores[1] == 0
    assert scores[2] == -scores[0]


def test_beliefs_of_a_meta_learner():
    rows = beliefs(
        named("a", "b", "c"), torch.tensor([4, -1, 2]), pairs([-1.0, 0.0, 2.0]), pairs(TRUSTED),
        falling(), 0.3,
    )  # fmt: skip
    expected = torch.sigmoid(-4 * torch.tensor([-1.0, 0.0, 2.0])).tolist()
    assert rows["soft_label"] == pytest.approx(expected, abs=1e-6)
    assert rows["step"] == [4, None, 2]
    assert rows["margin"] == [3.0, 3.0, 3.0]
    assert rows["ppl_diff"] == [-1.0, 0.0, 2.0]
    first, middle, last = rows["p_correct"]
    assert first > middle > last
    assert middle == pytest.approx(0.7)  # no evidence: the prior


def test_beliefs_without_a_meta_learner_come_from_the_starting_policy():
    rows = beliefs(
        named("a", "b"), torch.tensor([1, 1]), pairs([5.0, -5.0], starting=[-1.0, 1.0]),
        pairs([9.0] * len(TRUSTED), starting=TRUSTED), Constant(1.0), 0.4,
    )  # fmt: skip
    assert rows["soft_label"] == [None, None]
    assert rows["p_correct"][0] > 0.6 > rows["p_correct"][1]


def test_beliefs_without_clean_pairs_are_null():
    rows = beliefs(named("a"), torch.tensor([1]), pairs([1.0]), None, Constant(1.0), None)
    assert rows["p_correct"] == [None]


def test_a_tie_is_neither_right_nor_wrong():
    tied = named("a", "b", "c", label=[None, "tie", None], is_flipped=[False, False, True])
    rows = beliefs(tied, torch.ones(3), pairs([-1.0, 0.0, 2.0]), pairs(TRUSTED), falling(), 0.3)
    assert [p is None for p in rows["p_correct"]] == [False, True, False]
    assert None not in rows["soft_label"]
    assert str(known_flips(tied).tolist()) == "[0.0, nan, 1.0]"


def test_history_keeps_every_label_and_the_last_step(tmp_path):
    history = LabelHistory()
    for step, index in ((1, [2, 0]), (3, [0, 1])):
        move = Update((), torch.zeros(()), pairs([0.5, -0.5]), torch.tensor([0.2, 0.9]))
        history.record(step, torch.tensor(index), torch.tensor([0.5, -0.5]), move)
    assert history.last_steps(4).tolist() == [3, 3, 1, -1]
    again = LabelHistory()
    again.restore(history.tensors())
    again.write(tmp_path / "history.parquet", pa.chunked_array([["a", "b", "c", "d"]]))
    rows = pq.read_table(tmp_path / "history.parquet").to_pydict()
    assert rows["uid"] == ["c", "a", "a", "b"]
    assert rows["step"] == [1, 1, 3, 3]
    assert rows["ppl_diff"] == [0.5, -0.5, 0.5, -0.5]
    assert rows["soft_label"] == pytest.approx([0.2, 0.9, 0.2, 0.9])
    assert rows["margin"] == [3.0] * 4


def test_the_latest_numbers_of_a_pair_need_no_pass():
    history = LabelHistory()
    for step, index, numbers in ((1, [2, 0], [0.5, -0.5]), (3, [0, 1], [0.25, -0.25])):
        move = Update((), torch.zeros(()), pairs(numbers), torch.tensor([0.2, 0.9]))
        history.record(step, torch.tensor(index), torch.tensor(numbers), move)
    rows = Dataset.from_dict({"starting_ppl_diff": [0.1, 0.2, 0.3, 0.4], "uid": list("abcd")})
    found = history.latest(rows)
    assert found.ppl_diff[:3].tolist() == [0.25, -0.25, 0.5]
    assert found.margin[:3].tolist() == [3.0] * 3
    assert found.starting_ppl_diff.tolist() == [0.1, 0.2, 0.3, 0.4]
    assert found.ppl_diff[3].isnan()
    assert found.margin[3].isnan()
    assert found.chosen_logp.isnan().all()
    labels = beliefs(rows, history.last_steps(4), found, None, Constant(1.0), None)
    assert (labels["margin"][3], labels["ppl_diff"][3], labels["step"][3]) == (None, None, None)
    assert LabelHistory().latest(rows).margin.isnan().all()  # where every step was skipped


def passes_of(run, monkeypatch, **options):
    """Return what a run scored when it was saved, its trainer and its labels.jsonl."""
    scored, measure = [], Scorer.measure
    trainer = toy_trainer(run, learning_rate=1e-2, warmup_steps=0, **options)
    trainer.train()
    with monkeypatch.context() as patched:
        patched.setattr(
            Scorer, "measure",
            lambda self, pairs, what: scored.append(what) or measure(self, pairs, what),
        )  # fmt: skip
        trainer.save_model()
    return scored, trainer, read_labels(run / "run" / "labels.jsonl")


@pytest.mark.parametrize("method", ["dpo", "rdpo", "perpcorrect"])
def test_labels_that_no_run_learned_take_no_pass(method, tmp_path, monkeypatch):
    scored, trainer, labels = passes_of(tmp_path / "a", monkeypatch, method=method)
    asked, _, whole = passes_of(tmp_path / "b", monkeypatch, method=method, label_pairs=True)
    assert (scored, asked) == ([], ["labelling"])
    for name in ("uid", "soft_label", "p_correct", "evidence", "step"):
        assert labels[name].to_pylist() == whole[name].to_pylist(), name
    history = trainer.history.tensors()
    margin = dict(zip(history["index"].tolist(), history["margin"].tolist(), strict=True))
    assert labels["margin"].to_pylist() == [margin.get(i) for i in range(len(labels))]
    assert labels["margin"].to_pylist() != whole["margin"].to_pylist()
    assert None not in labels["margin"].to_pylist()


@pytest.mark.parametrize(
    ("method", "expected"),
    [("mspo", ["labelling", "labelling, clean"]), ("evidence", ["labelling"])],
)
def test_learned_labels_take_a_pass_over_what_they_read(method, expected, tmp_path, monkeypatch):
    scored, _, labels = passes_of(tmp_path, monkeypatch, method=method)
    assert scored == expected
    assert None not in labels["soft_label"].to_pylist()


def test_flat_labels_are_told_of_the_geometric_loss_as_it_was_trained_with(
    tmp_path, monkeypatch, caplog
):
    told = "labels: nearly the same for all pairs, 0.70 to 0.70: this was about DPO at β = 0.04"
    last_labels = LabelHistory.last_labels
    for method, label, is_told in (("mspo", 0.7, 1), ("mspo", None, 0), ("re_po", 0.7, 0)):
        monkeypatch.setattr(
            LabelHistory, "last_labels",
            lambda self, pairs, label=label: (
                torch.full((pairs,), label) if label else torch.linspace(0, 1, pairs)
            ),
        )  # fmt: skip
        caplog.clear()
        passes_of(tmp_path / f"{method}{label}", monkeypatch, method=method, max_steps=1)
        assert caplog.text.count(told) == caplog.text.count("about DPO") == is_told
    history = LabelHistory()
    for step, soft_label in ((1, [0.2, 0.9]), (2, [0.4, 0.6])):
        move = Update((), torch.zeros(()), pairs([0.0, 0.0]), torch.tensor(soft_label))
        history.record(step, torch.tensor([0, step]), torch.zeros(2), move)
    assert last_labels(history, 4).tolist() == pytest.approx([0.4, 0.9, 0.6])


def test_auroc_is_over_all_pairs_seen_so_far_by_their_latest_labels():
    history, is_flipped = LabelHistory(), torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, torch.nan])

    def train_on(step, index, soft_label):
        scored = pairs([0.0] * len(index))
        move = Update([], torch.tensor(0.0), scored, torch.tensor(soft_label))
        history.record(step, torch.tensor(index), scored.ppl_diff, move)

    assert history.auroc(is_flipped) == {}
    train_on(1, [0, 2], [0.3, 0.8])
    assert history.auroc(is_flipped) == {}  # no flipped pair was seen
    train_on(2, [1, 3, 5], [0.5, 0.6, 0.1])  # the last is a tie
    assert history.auroc(is_flipped) == {"labels/auroc": 0.5}
    train_on(3, [0, 1], [0.7, 0.65])  # a second pass: 0.7 and 0.8 against 0.65 and 0.6
    assert history.auroc(is_flipped) == {"labels/auroc": 1.0}
    resumed = LabelHistory()
    resumed.restore(history.tensors())
    assert resumed.auroc(is_flipped) == {"labels/auroc": 1.0}
