"""Confident learning (Northcutt et al. 2021) on a Bradley-Terry reward, by cleanlab.

Shapes: n training pairs; D hidden size; R rows of N tokens.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm import tqdm

from softpref.algorithm.policy import evaluating
from softpref.models.loading import load_policy, on_accelerator

_FOLDS = 5
_BATCH_SIZE = 16  # pairs in one forward pass


def self_confidence(features: Tensor) -> tuple[Tensor, float]:
    """Return the cross-validated support for each label, and a noise rate.

        p_i = σ(w · (f(x, y1) − f(x, y2))),   w from the other folds (Bradley and Terry 1952)

    Pairs get a random orientation from a fixed seed, since cleanlab needs both classes of "first is
    better". The model has no intercept, so predictions do not depend on the orientation.

    Args:
        features: (n, D) f(x, y1) − f(x, y2).

    Returns:
        cleanlab's self-confidence, (n,), in [0, 1]; the share of its estimated joint of given and
        true labels that is off the diagonal.
    """
    from cleanlab.count import estimate_joint
    from cleanlab.rank import get_label_quality_scores
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = features.double()
    drawn = torch.rand(len(features), generator=torch.Generator().manual_seed(0))
    first_is_chosen = drawn < 0.5
    oriented = torch.where(first_is_chosen[:, None], features, -features).numpy()
    labels = first_is_chosen.int().numpy()
    bradley_terry = make_pipeline(
        StandardScaler(with_mean=False), LogisticRegression(fit_intercept=False, max_iter=1000)
    )
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    probabilities = cross_val_predict(
        bradley_terry, oriented, labels, cv=folds, method="predict_proba"
    )
    quality = torch.from_numpy(get_label_quality_scores(labels, probabilities))
    joint = estimate_joint(labels, probabilities)
    return quality, float(joint[0, 1] + joint[1, 0])


def response_features(model: str, pairs: Dataset) -> Tensor:
    """Return f(x, y1) − f(x, y2) for every tokenized pair, (n, D), f a mean last hidden state."""
    policy = on_accelerator(load_policy(model, trust_remote_code=False))
    differences = []
    with evaluating(policy), torch.no_grad():
        starts = range(0, len(pairs), _BATCH_SIZE)
        for start in tqdm(starts, "hidden states", unit="batch", leave=False, disable=None):
            batch = pairs.select(range(start, min(start + _BATCH_SIZE, len(pairs)))).to_list()
            chosen, rejected = (
                _mean_states(policy, [(pair["prompt_ids"], pair[branch]) for pair in batch])
                for branch in ("chosen_ids", "rejected_ids")
            )
            differences.append(chosen - rejected)
    return torch.cat(differences)


def _mean_states(policy: nn.Module, texts: list[tuple[list[int], list[int]]]) -> Tensor:
    """Return the mean of the last hidden states over each response, (R, D)."""
    longest = max(len(prompt) + len(response) for prompt, response in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    in_response = torch.zeros(len(texts), longest)
    for row, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.tensor(prompt + response)
        in_response[row, len(prompt) : end] = 1
    # Padding is on the right, so causal attention never sees it.
    device = next(policy.parameters()).device
    states = policy(input_ids=ids.to(device), output_hidden_states=True).hidden_states[-1]
    weights = in_response / in_response.sum(1, keepdim=True)
    return (weights[:, :, None] * states.float().cpu()).sum(1)
