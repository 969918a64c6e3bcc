"""Evidence: symmetries, what each fit has read, and how right it is in worlds that are known."""

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor

from softpref.statistics import evidence as evidence_module
from softpref.statistics import fluency_curve, noise_rate
from softpref.statistics.calibration import expected_calibration_error
from softpref.statistics.evidence import LEAST_NOISE, NO_LABEL, Evidence, _Model, fit_evidence
from softpref.statistics.fluency_curve import fit_curve
from softpref.statistics.folds import FEW_PAIRS, FOLDS, FOLDS_OF_FEW, deal, gain, left_out
from softpref.statistics.noise_rate import NoiseRate
from softpref.statistics.noisy_logistic import log_likelihood, slope
from softpref.statistics.pair_signals import PairSignals
from softpref.training.metrics import auroc
from tests.statistics.worlds import World, at, swapped, world

SEEDS = range(20)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """A noise rate in large steps: it is looked for five times a fit."""
    monkeypatch.setattr(noise_rate, "_GRID", 21)
    monkeypatch.setattr(noise_rate, "_BINS", 128)


@cache
def drawn(seed: int, *sizes: int, **shape: float) -> World:
    return world(seed, *sizes, **shape)


@cache
def fitted(seed: int, *sizes: int, **shape: float) -> Evidence:
    some = drawn(seed, *sizes, **shape)
    return fit_evidence(some.noisy, some.trusted, seed)


def telling() -> tuple[World, Evidence]:
    """Content says most, fluency something."""
    shape = {"fluency": 0.4, "content": 1.5, "rate": 0.3}
    return drawn(0, 300, 140, **shape), fitted(0, 300, 140, **shape)


def test_swapping_a_pair_negates_its_log_odds():
    some, evidence = telling()
    g = evidence.log_odds(some.noisy)
    which = torch.arange(len(g)) % 2 == 0
    turned = evidence.log_odds(swapped(some.noisy, which))
    assert torch.equal(turned[~which], g[~which])
    torch.testing.assert_close(turned[which], -g[which], rtol=1e-12, atol=1e-14)


def test_parts_sum_to_log_odds():
    some, evidence = telling()
    parts = evidence.parts(some.noisy)
    assert list(parts) == ["curve", "even", "content", "length"]
    torch.testing.assert_close(sum(parts.values()), evidence.log_odds(some.noisy))
    assert parts["content"].abs().mean() > 2 * parts["length"].abs().mean()
    empty = swapped(at(some.noisy, slice(0, 1)), torch.tensor([True]))
    nothing = PairSignals(
        empty.fluency * 0, {name: 0 * values for name, values in empty.odd.items()}, empty.even
    )
    assert evidence.log_odds(nothing).tolist() == [0.0]


def test_log_odds_are_the_equation():
    some, evidence = telling()
    curve = evidence.curve.log_odds(some.noisy.fluency)
    columns = torch.cat(list(evidence.columns(some.noisy, curve).values()), dim=1)
    unit = (curve + columns @ evidence.theta) / evidence.size
    linear, saturating = evidence.calibration
    expected = linear * unit + saturating * torch.tanh(2 * unit)
    torch.testing.assert_close(evidence.log_odds(some.noisy), expected)
    assert (unit * evidence.size - expected).abs().max() > 0.01  # calibration changes something


def test_the_penalty_is_the_one_that_foretells_best(monkeypatch):
    some = telling()[0]
    for penalties in ((4.0, 1e6), (1e6, 4.0)):
        monkeypatch.setattr(evidence_module, "PENALTIES", penalties)
        assert fit_evidence(some.noisy, some.trusted).theta.abs().max() > 0.1


def test_trusted_pairs_have_no_flips_and_noisy_ones_a_few_at_least(monkeypatch):
    some, rates = drawn(3, 150, 60, fluency=0.3, content=2.0), []
    fit = evidence_module.fit_curve
    monkeypatch.setattr(
        evidence_module, "fit_curve", lambda t, rate, fold: rates.append(rate) or fit(t, rate, fold)
    )
    monkeypatch.setattr(evidence_module, "estimate_noise_rate", lambda *_: NoiseRate.given(0.0))
    fit_evidence(some.noisy, some.trusted)
    for rate in rates:
        assert set(rate[:150].tolist()) in ({LEAST_NOISE}, {NO_LABEL})
        assert set(rate[150:].tolist()) == {0.0}


@pytest.mark.parametrize(("noisy", "folds"), [(300, FOLDS_OF_FEW), (FEW_PAIRS, FOLDS)])
def test_both_kinds_of_pairs_are_dealt_evenly(noisy, folds):
    fold = deal(noisy, 140, seed=3)
    for part in (fold[:noisy], fold[noisy:]):
        counts = part.bincount()
        assert len(counts) == folds
        assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(fold, deal(noisy, 140, seed=3))
    assert not torch.equal(fold, deal(noisy, 140, seed=4))


def test_noisy_pairs_of_the_same_content_are_in_the_same_fold():
    content = torch.arange(300) % 120
    fold, alone = deal(300, 140, 3, content), deal(300, 140, 3)
    assert torch.equal(fold[:120], alone[:120])
    assert torch.equal(fold[120:240], fold[:120])
    assert torch.equal(fold[240:300], fold[:60])
    assert torch.equal(fold[300:], alone[300:])
    assert torch.equal(deal(300, 140, 3, torch.arange(300)), alone)


def test_a_fold_is_judged_by_a_fit_on_all_others():
    fold, fits = torch.tensor([2, 0, 1, 2, 0]), []

    def fit_on(these: Tensor) -> Tensor:
        fits.append(these)
        return torch.arange(5.0, dtype=torch.float64) + 100 * len(fits)

    assert left_out(fold, fit_on).tolist() == [300, 101, 202, 303, 104]
    assert [these.tolist() for these in fits] == [(fold != part).tolist() for part in range(3)]


@pytest.mark.parametrize("free", [False, True])
def test_turning_a_pair_negates_what_the_curve_says_of_it(free, monkeypatch):
    monkeypatch.setattr(fluency_curve, "FREE_CURVE_GATE", -1e9 if free else 1e9)
    some = drawn(1, 200, 60, fluency=1.0)
    t = (some.noisy + some.trusted).fluency
    rate = torch.cat([torch.full((200,), 0.3), torch.zeros(60)]).double()
    fold = deal(200, 60, 0)
    curve, before = fit_curve(t, rate, fold)
    assert len(curve.knots) == (fluency_curve.KNOTS if free else 0)
    for i in (3, 77, 210):
        turned = t.clone()
        turned[i] *= -1
        _, after = fit_curve(turned, rate, fold)
        assert float(after[i]) == pytest.approx(-float(before[i]), abs=1e-12)
        mates, others = fold == fold[i], fold != fold[i]
        mates[i] = False
        torch.testing.assert_close(after[mates], before[mates], rtol=1e-12, atol=1e-12)
        assert (after[others] != before[others]).all()  # whose fits have read it


def corrections(monkeypatch) -> list[tuple]:
    """What each stage B was fitted on, and what came of it."""
    seen, correct = [], _Model.corrected

    def spy(model, penalty, left_aside, fold):
        found = correct(model, penalty, left_aside, fold)
        seen.append((fold, left_aside, found))
        return found

    monkeypatch.setattr(_Model, "corrected", spy)
    return seen


def raw(model: _Model) -> torch.Tensor:
    """g of left-out pairs before it is calibrated."""
    return model.by_curve + model.parts.sum(1)


def test_turning_a_pair_negates_what_stage_b_says_of_it(monkeypatch):
    some, seen = telling()[0], corrections(monkeypatch)
    fit_evidence(some.noisy, some.trusted)
    fold, left_aside, found = seen[0]
    for i in (5, 320):
        sign = torch.ones_like(found.rate)
        sign[i] = -1
        turned = dataclasses.replace(
            found, by_curve=found.by_curve * sign,
            kinds={name: x * sign[:, None] for name, x in found.kinds.items()},
        ).corrected(found.penalty, left_aside, fold)  # fmt: skip
        # The search for it began where the fit to all had ended, and stops when near enough.
        assert float(raw(turned)[i]) == pytest.approx(-float(raw(found)[i]), abs=1e-2)


@pytest.mark.parametrize("rank", [0, 100])
def test_turning_a_noisy_pair_about_negates_its_evidence(rank):
    some, before = telling()
    i = int(before.noisy.abs().argsort(descending=True)[rank])
    which = torch.arange(len(some.noisy)) == i
    after = fit_evidence(swapped(some.noisy, which), some.trusted)
    spread = float(before.noisy.abs().mean())
    assert float(before.noisy[i].abs()) > 1
    assert float(after.noisy[i]) == pytest.approx(-float(before.noisy[i]), abs=0.05 * spread)


def test_influence_of_trusted_and_noisy_pairs_is_all_that_stage_b_says(monkeypatch):
    some, seen = drawn(3, 150, 60, fluency=0.3, content=2.0), corrections(monkeypatch)
    evidence = fit_evidence(some.noisy, some.trusted)
    found = next(one for *_, one in seen if torch.equal(one.theta, evidence.theta))
    x, rate = torch.cat(list(found.kinds.values()), dim=1), found.rate
    g, theta = found.by_curve + x @ evidence.theta, torch.zeros_like(evidence.theta)
    for j in range(len(x)):  # λθ = Σ (r − q) x
        theta += slope(g[j : j + 1], rate[j : j + 1]) * x[j] / found.penalty
        if j == 149:
            noisy_share = theta.clone()
    torch.testing.assert_close(theta, evidence.theta, rtol=0.02, atol=0.02)
    torch.testing.assert_close(evidence.pull.sum(0), theta - noisy_share)
    columns = evidence.columns(some.noisy, evidence.curve.log_odds(some.noisy.fluency))
    rows = torch.cat(list(columns.values()), dim=1)
    influence = evidence.influence(some.noisy)
    assert influence.shape == (150, 60)
    together = influence.sum(1) + rows @ noisy_share
    torch.testing.assert_close(together, rows @ evidence.theta, rtol=0.05, atol=0.05)


def test_signals_without_meaning_are_left_out():
    """Twice 1 nat is asked for; over 40 other draws 31 had none. `speaks` is the stricter gate."""
    fits = [fitted(seed, 300, 140) for seed in SEEDS]
    assert sum(not one.theta.any() for one in fits) >= 14


def test_noise_is_heard_as_seldom_as_by_chance_and_costs_little_over_draws():
    """By chance one in twenty is heard; of 20 draws more than 4 are in 3 of 1,000."""
    heard = [seed for seed in SEEDS if fitted(seed, 300, 140).speaks]
    assert len(heard) <= 4
    excess = 0.0
    for seed in heard:
        evidence, some = fitted(seed, 300, 140), drawn(seed, 300, 140)
        is_flipped = some.is_flipped
        rate = evidence.rates(some.noisy)
        pull = 2 * evidence.probability_correct(evidence.noisy, rate) - 1
        wrong = pull.abs()[(pull > 0) == is_flipped].sum() / pull.abs().sum()
        excess += float(wrong - is_flipped.double().mean())  # over DPO's
    assert excess / len(SEEDS) < 0.01


def judged(noisy: int, *, by_fluency: bool) -> tuple[PairSignals, PairSignals, Tensor]:
    """Return noisy and trusted pairs, and which labels a judge got wrong who likes fluency."""
    draw = torch.Generator().manual_seed(0)
    n = noisy + 140
    content = 0.2 + torch.randn(n, 30, generator=draw, dtype=torch.float64)
    fluency = 0.3 + torch.randn(n, generator=draw, dtype=torch.float64)
    toss = torch.rand(n, generator=draw, dtype=torch.float64)
    wrong = toss < (torch.sigmoid(-4 * fluency) if by_fluency else 0.4)
    wrong[noisy:] = False
    sign = 1 - 2 * wrong.double()
    pairs = PairSignals(fluency * sign, {"content": content * sign[:, None]}, {})
    return at(pairs, slice(0, noisy)), at(pairs, slice(noisy, n)), wrong[:noisy]


@pytest.mark.parametrize(("noisy", "by_fluency", "labels_help"), [(600, 1, 0), (4000, 0, 1)])
def test_noisy_labels_are_read_only_where_they_help(monkeypatch, noisy, by_fluency, labels_help):
    *pairs, wrong = judged(noisy, by_fluency=bool(by_fluency))
    chosen, values = fit_evidence(*pairs).noisy, {}
    for reads_labels in (0, 1):
        sizes = iter([1 - reads_labels, reads_labels])  # of trusted pairs alone, of both sets
        monkeypatch.setattr(evidence_module, "_value", lambda _, sizes=sizes: 1e9 * next(sizes))
        values[reads_labels] = fit_evidence(*pairs).noisy
    assert torch.equal(chosen, values[labels_help])
    by_choice = {labels: auroc(g, ~wrong) for labels, g in values.items()}
    assert by_choice[labels_help] > by_choice[1 - labels_help]


def test_where_evidence_does_not_speak_every_label_is_as_likely():
    evidence = dataclasses.replace(telling()[1], trusted=torch.full((140,), -1.0).double())
    assert not evidence.speaks
    g = torch.tensor([-2.0, 0.0, 5.0], dtype=torch.float64)
    rate = torch.tensor([0.1, 0.2, 0.2]).double()
    assert evidence.probability_correct(g, rate).tolist() == pytest.approx([0.9, 0.8, 0.8])


def test_a_vector_is_heard_where_fluency_says_nothing():
    shape = {"content": 1.5, "size": 24, "even": 3}
    evidence = fitted(0, 300, 140, **shape)
    assert evidence.speaks
    assert auroc(evidence.noisy, ~drawn(0, 300, 140, **shape).is_flipped) > 0.8


def fluent_in_mistakes(seed: int) -> World:
    """Weak preferences are right, the strongest ones wrong."""
    some = world(seed, 3000, 140, fluency=0.0, rate=0.3, even=0)
    pairs = some.noisy + some.trusted
    t = pairs.fluency.abs() * torch.where(pairs.fluency.abs() > 1.2, -1.0, 1.0)
    known = torch.cat([some.is_flipped, torch.zeros(140, dtype=torch.bool)])
    pairs = PairSignals(torch.where(known, -t, t), {}, {})
    return World(at(pairs, slice(0, 3000)), at(pairs, slice(3000, 3140)), some.is_flipped)


def test_a_model_that_is_fluent_in_its_mistakes_is_seen_through():
    some = fluent_in_mistakes(0)
    evidence = fit_evidence(some.noisy, some.trusted)
    assert len(evidence.curve.knots)
    weak, strong = evidence.curve.log_odds(torch.tensor([0.6, 2.5]))
    assert weak > 0.5
    assert strong < -0.5
    assert auroc(evidence.noisy, ~some.is_flipped) > 0.9
    assert evidence.speaks


def test_probability_correct_is_calibrated():
    shape = {"rate": 0.4, "fluency": 0.5, "content": 1.0}
    some, evidence = drawn(0, 3000, 140, **shape), fitted(0, 3000, 140, **shape)
    is_right, rate = ~some.is_flipped, evidence.rates(some.noisy)
    p_correct = evidence.probability_correct(evidence.noisy, rate)
    assert expected_calibration_error(p_correct, is_right) < 0.04
    # With another noise rate the same evidence is visibly off: the check can fail.
    wrong = evidence.probability_correct(evidence.noisy, torch.full_like(rate, 0.2))
    assert expected_calibration_error(wrong, is_right) > 0.04


def test_hard_pairs_that_are_flipped_more_often_are_found():
    """One rate for all comes out too low: hard pairs say least."""
    draw = torch.Generator().manual_seed(0)
    t = 0.8 + torch.randn(6140, generator=draw, dtype=torch.float64)
    content = 2 + torch.randn(6140, 4, generator=draw, dtype=torch.float64)
    is_hard = t.abs() < t.abs().median()
    flipped = torch.rand(6140, generator=draw) < torch.where(is_hard, 0.4, 0.1)
    flipped[6000:] = False
    sign = 1 - 2 * flipped.double()
    pairs = PairSignals(t * sign, {"content": content * sign[:, None]}, {})
    noisy, trusted = at(pairs, slice(0, 6000)), at(pairs, slice(6000, 6140))
    evidence = fit_evidence(noisy, trusted)
    rate = evidence.rates(noisy)
    assert evidence.flip_rates
    assert evidence.noise.rate == pytest.approx(0.25, abs=0.04)
    assert float(rate[is_hard[:6000]].mean()) > 0.3
    assert float(rate[~is_hard[:6000]].mean()) < 0.2


def test_flips_at_one_rate_have_one_rate():
    shape = {"rate": 0.4, "fluency": 0.5, "content": 1.0}
    assert fitted(0, 3000, 140, **shape).flip_rates is None


def test_a_noise_rate_of_none_is_not_believed():
    evidence = dataclasses.replace(telling()[1], noise=NoiseRate.given(0.0))
    rate = evidence.rates(at(telling()[0].noisy, slice(0, 1)))
    assert rate.item() == pytest.approx(LEAST_NOISE)


def test_the_noise_rates_interval_covers_it():
    fits = [fitted(seed, 300, 140, fluency=0.5, content=1.5, rate=0.3) for seed in SEEDS]
    assert sum(one.noise.low <= 0.3 <= one.noise.high for one in fits) >= 18


def test_gain_is_a_paired_z_statistic():
    richer, simpler = torch.tensor([[2.0, -1.0, 1.0], [0.5, 0.0, 1.5]], dtype=torch.float64)
    rate = torch.tensor([0.0, 0.3, 0.1], dtype=torch.float64)
    d = log_likelihood(richer, rate) - log_likelihood(simpler, rate)
    expected = d.sum() / (3**0.5 * (((d - d.mean()) ** 2).sum() / 2) ** 0.5)
    assert gain(richer, simpler, rate) == pytest.approx(float(expected))
    assert gain(richer, richer, rate) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_trusted_pairs_that_all_agree_show_no_more_than_so_many_can(seed):
    """A signal that is right for 99% of pairs: 150 of them cannot show odds of e^20."""
    draw = torch.Generator().manual_seed(seed)

    def signal(count: int, right: float) -> tuple[Tensor, Tensor]:
        is_right = torch.rand(count, generator=draw) < right
        size = torch.randn(count, generator=draw).double().abs() + 0.3
        return size * torch.where(is_right, 1.0, -1.0).double(), is_right

    truth, _ = signal(600, 0.99)
    trusted = signal(150, 1.0)[0]
    flip = torch.where(torch.rand(600, generator=draw) < 0.1, -1.0, 1.0).double()
    evidence = fit_evidence(PairSignals(truth * flip, {}, {}), PairSignals(trusted, {}, {}), seed)
    g = evidence.noisy
    assert 4 < g.abs().median() < 10
    doubted = g < 0
    stated = torch.sigmoid(g[doubted])
    assert stated.mean() > 1e-4
    assert (flip[doubted] > 0).double().mean() < 0.2
