from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from softpref.training.teacher import (
    META_LEARNER,
    load_meta_learner,
    make_meta_learner,
    save_meta_learner,
)
from tests.toy import toy_config


def made(args, noisy, clean, noise_rate):
    """V over PPLDiff alone."""
    return make_meta_learner(args.teaching(100), noisy[:, None], clean[:, None], -clean, noise_rate)


def test_the_z_score_is_of_the_first_thousand_pairs(tmp_path):
    noisy = torch.cat([torch.linspace(-1, 1, 1000), torch.full((500,), 50.0)])
    args = toy_config(tmp_path, warm_start=False)
    meta_learner = made(args, noisy, torch.linspace(-1, 0, 20), 0.2)
    torch.testing.assert_close(meta_learner.mean, noisy[:1000].mean()[None])
    torch.testing.assert_close(meta_learner.deviation, noisy[:1000].std()[None])


def test_the_warm_start_takes_the_noise_rate_as_prior(tmp_path):
    clean = torch.linspace(-2, 1, 40)
    labels = [
        made(toy_config(tmp_path), clean, clean, rate)(torch.zeros(1)).item() for rate in (0.1, 0.4)
    ]
    assert labels[0] > labels[1] + 0.1


def test_a_saved_meta_learner_says_the_same(tmp_path):
    clean = torch.linspace(-2, 1, 40)
    meta_learner = made(toy_config(tmp_path, meta_hidden=8), clean, clean, 0.2)
    save_meta_learner(meta_learner, tmp_path)
    again = load_meta_learner(tmp_path)
    assert torch.equal(again(clean), meta_learner(clean))


def test_a_saved_meta_learner_knows_its_signals_by_name(tmp_path):
    args = toy_config(tmp_path, signals=["margin", "ppl_diff"], meta_hidden=8)
    noisy = torch.stack([torch.zeros(40), torch.linspace(-2, 1, 40)], -1)
    meta_learner = make_meta_learner(args.teaching(100), noisy, noisy, -noisy[:, 1], 0.2)
    save_meta_learner(meta_learner, tmp_path)
    again = load_meta_learner(tmp_path)
    assert [signal.name for signal in again.signals] == ["margin", "ppl_diff"]
    assert torch.equal(again(noisy), meta_learner(noisy))


def test_a_file_that_names_no_signals_is_of_ppl_diff_alone(tmp_path):
    clean = torch.linspace(-2, 1, 40)
    meta_learner = made(toy_config(tmp_path, meta_hidden=8), clean, clean, 0.2)
    save_meta_learner(meta_learner, tmp_path)
    state = load_file(tmp_path / META_LEARNER)
    save_file(state | {name: state[name][0].clone() for name in ("mean", "deviation")},
              tmp_path / META_LEARNER)  # fmt: skip
    again = load_meta_learner(tmp_path)
    assert [signal.name for signal in again.signals] == ["ppl_diff"]
    assert torch.equal(again(clean), meta_learner(clean))


def test_the_meta_learning_rate_follows_the_length_of_the_run(tmp_path):
    def rate(meta_updates, **options):
        steps = {"max_steps": 4 * meta_updates, "meta_every": 4}
        return toy_config(tmp_path, **steps, **options).teaching(100).learning_rate

    assert rate(1250) == 1e-4  # the paper's run, the paper's rate
    assert rate(250) == 5e-4
    assert rate(1) == 1e-3
    assert rate(1, meta_lr=5e-4) == 5e-4
