"""Every method through the trainer: its labels, what it needs, what it refuses."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import torch
from datasets import Dataset

from softpref.algorithm.methods import METHODS
from softpref.errors import UsageError
from softpref.training.config import MSPOConfig
from softpref.training.finished import NOT_ESTIMATED, model_card, run_record
from softpref.training.labels import learns_labels
from softpref.training.trainer import MSPOTrainer
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model
from tests.toy import exact_trainer, toy_config, toy_pairs, toy_trainer

STEPS = {"max_steps": 2, "warmup_steps": 0, "learning_rate": 1e-2}


def test_the_command_knows_every_method():
    assert set(get_args(get_type_hints(MSPOConfig)["method"])) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_labels(method, tmp_path):
    trainer = toy_trainer(tmp_path, method=method, **STEPS)
    before = [p.clone() for p in trainer.policy.parameters()]
    trainer.train()
    assert any(
        not torch.equal(a, b) for a, b in zip(before, trainer.policy.parameters(), strict=True)
    )
    labels = trainer.label_pairs()
    learns = learns_labels(trainer.start.labeller)
    assert (labels["soft_label"][0] is not None) == learns
    if learns or method != "evidence":  # evidence that does not speak claims nothing
        assert all(0 <= p <= 1 for p in labels["p_correct"])
    history = trainer.history.tensors()
    assert len(history["index"]) == 16
    assert history["ppl_diff"].isfinite().all()
    is_flipped = torch.tensor(trainer.pairs["is_flipped"])[history["index"]]
    if method == "oracle":
        assert torch.equal(history["soft_label"], 1 - is_flipped.float())
    assert learns == METHODS[method].teaches or method in ("evidence", "re_po")  # where it speaks
    if method in ("gdpo", "cdpo", "rdpo", "dpo", "ipo", "dr_dpo", "sympo", "holder_dpo", "ropo"):
        assert history["soft_label"].unique().numel() == 1
    if method == "perpcorrect":
        assert set(history["soft_label"].tolist()) <= {0.0, 1.0}


def weights(trainer):
    trainer.train()
    return torch.cat([p.flatten() for p in trainer.policy.parameters()])


def test_oracle_is_dpo_without_the_flips(tmp_path):
    true = toy_pairs(24)

    def swap(row, i):
        wrong = {"chosen": row["rejected"], "rejected": row["chosen"], "is_flipped": True}
        return row | (wrong if i % 3 else {})

    flipped = true.map(swap, with_indices=True)
    ends = [
        weights(exact_trainer(tmp_path / m, method=m, train=pairs, max_grad_norm=0.0, **STEPS))
        for m, pairs in (("oracle", flipped), ("dpo", true))
    ]
    assert (ends[0] - ends[1]).norm() < 1e-9 * ends[1].norm()


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"oracle"}))
def test_no_method_but_the_oracle_reads_the_truth(method, tmp_path):
    pairs = toy_pairs(24, flip_every=3)
    lies = pairs.remove_columns("is_flipped").add_column("is_flipped", [True, False] * 12)
    ends = [
        weights(toy_trainer(tmp_path / name, method=method, train=train, **STEPS))
        for name, train in (("truth", pairs), ("lies", lies))
    ]
    assert torch.equal(*ends)


def with_labels(pairs: Dataset, labels) -> Dataset:
    return pairs.add_column("soft_label", labels)


@pytest.mark.parametrize("method", ["gdpo", "cdpo"])
def test_pairs_may_bring_their_own_labels(method, tmp_path):
    own = [0.1 + 0.03 * i for i in range(24)]
    trainer = toy_trainer(tmp_path, method=method, train=with_labels(toy_pairs(24), own), **STEPS)
    trainer.train()
    history = trainer.history.tensors()
    expected = torch.tensor(own)[history["index"]]
    torch.testing.assert_close(history["soft_label"], expected)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"gdpo", "cdpo"}))
def test_labels_that_a_method_would_not_read_are_refused(method, tmp_path):
    with pytest.raises(UsageError, match="choose gdpo or cdpo"):
        toy_trainer(tmp_path, method=method, train=with_labels(toy_pairs(24), [0.5] * 24))


def without_clean(output, **options):
    return MSPOTrainer(
        tiny_model(dtype=torch.float32, attention="sdpa"),
        toy_config(output, **options),
        toy_pairs(24).remove_columns("is_flipped"),
        processing_class=make_tokenizer(),
    )


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("mspo", "learns from clean pairs: give about 150"),
        ("perpcorrect", "learns from clean pairs: give about 150"),
        ("evidence", "learns from clean pairs: give about 150"),
        ("cdpo", "give it by noise_rate"),
        ("rdpo", "give it by noise_rate"),
        ("oracle", "carry no `is_flipped`"),
    ],
)
def test_what_is_missing_is_named_with_the_remedy(method, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        without_clean(tmp_path, method=method)


@pytest.mark.parametrize("method", ["cdpo", "rdpo"])
def test_a_given_noise_rate_needs_no_clean_pairs(method, tmp_path):
    trainer = without_clean(tmp_path, method=method, noise_rate=0.2, **STEPS)
    trainer.train()
    label = 0.8 if method == "cdpo" else 0.8 / 0.6
    assert trainer.history.tensors()["soft_label"].tolist() == pytest.approx([label] * 16)


@pytest.mark.parametrize("method", ["dpo", "gdpo", "oracle"])
def test_a_noise_rate_that_is_not_read_is_refused(method, tmp_path):
    with pytest.raises(UsageError, match="noise_rate"):
        toy_config(tmp_path, method=method, noise_rate=0.2)


@pytest.mark.parametrize("clean", [True, False])
def test_a_run_says_where_its_noise_rate_is_from(clean, tmp_path):
    make = toy_trainer if clean else without_clean
    record = run_record(make(tmp_path, method="dpo"))
    assert record["noise_rate_source"] == ("estimated" if clean else None)
    assert (record["noise_rate"] is None) == (not clean)
    assert clean or f"training pairs | {NOT_ESTIMATED} |" in model_card(record)


def test_a_noise_rate_beside_labels_of_the_pairs_own_is_refused(tmp_path):
    train = with_labels(toy_pairs(24), [0.9] * 24)
    with pytest.raises(UsageError, match="bring `soft_label`, so noise_rate .* omit the option"):
        toy_trainer(tmp_path, method="cdpo", noise_rate=0.2, train=train)


def test_a_run_does_not_go_on_with_other_labels_of_the_pairs_own(tmp_path):
    identities = [
        toy_trainer(
            tmp_path, method="gdpo", train=with_labels(toy_pairs(24), [label] * 24), **STEPS
        ).identity()
        for label in (0.3, 0.3, 0.4)
    ]
    assert identities[0] == identities[1] != identities[2]


def test_pairs_that_all_bring_labels_need_no_noise_rate(tmp_path):
    pairs = toy_pairs(24, flip_every=3)
    labelled = pairs.add_column("soft_label", [i / 24 for i in range(24)])
    trainer = MSPOTrainer(
        tiny_model(dtype=torch.float32, attention="sdpa"),
        toy_config(tmp_path, method="cdpo", max_steps=1), labelled,
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert trainer.start.noise is None
    trained = trainer.history.tensors()["soft_label"]
    assert set(trained.tolist()) <= {torch.tensor(i / 24).item() for i in range(24)}
