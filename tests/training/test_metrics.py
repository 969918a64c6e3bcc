import torch
from hypothesis import given
from hypothesis import strategies as st

from softpref.training.metrics import auroc, truth_metrics


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans()), min_size=2))
def test_auroc_is_the_share_of_pairs_ranked_right_ties_counting_half(rows):
    scores = torch.tensor([score for score, _ in rows])
    positive = torch.tensor([label for _, label in rows])
    if positive.all() or not positive.any():
        return
    pairs = [(p, n) for p in scores[positive].tolist() for n in scores[~positive].tolist()]
    brute = sum((p > n) + (p == n) / 2 for p, n in pairs) / len(pairs)
    assert abs(auroc(scores, positive) - brute) < 1e-12


def test_truth_metrics_by_hand():
    soft_label = torch.tensor([0.9, 0.2, 0.8, 0.4, 0.5])
    metrics = truth_metrics(soft_label, torch.tensor([0.0, 1.0, 0.0, 1.0, torch.nan]))
    assert abs(metrics["labels/clean"] - 0.85) < 1e-6
    assert abs(metrics["labels/flipped"] - 0.3) < 1e-6
    assert "labels/flipped" not in truth_metrics(soft_label, torch.zeros(5))
