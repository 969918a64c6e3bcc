"""Win rates that people would give: against slow versions, by simulation, and from the command."""

from __future__ import annotations

import json
import logging
from random import Random

import pytest
import torch
from benchmarks.people_rates import draw
from scipy.optimize import brentq
from scipy.stats import t

from softpref.cli import main
from softpref.errors import UsageError
from softpref.judging.check import load_gold
from softpref.judging.people import load_people, people_remarks
from softpref.judging.questions import Comparison
from softpref.statistics.people_rate import people_rate
from softpref.statistics.win_rate import student_97_5, wilson_interval
from tests.judging.server import Script, serving


def sample(accuracy=0.9, size=(100, 4), labels=80, seed=0, rate=0.6, bias="none"):
    return draw(rate, size, accuracy, bias, labels, Random(seed))


def slow_terms(rate, weight, people, labelled, judged, prompts):
    """The influence of every prompt on the rate, by loops."""
    ours = [float(w - rate * (w + lost)) for w, lost in people]
    theirs = [float(w - rate * (w + lost)) for w, lost in judged]
    n, size = len(ours), len(theirs)
    here = [theirs[place] for place in labelled]
    terms = dict.fromkeys(prompts, 0.0)
    for g, f, place in zip(ours, here, labelled.tolist(), strict=True):
        terms[prompts[place]] += (g - sum(ours) / n - weight * (f - sum(here) / n)) / n
    for f, prompt in zip(theirs, prompts, strict=True):
        terms[prompt] += weight * (f - sum(theirs) / size) / size
    return list(terms.values())


def test_the_rate_solves_its_equation_with_the_weight_of_least_variance():
    people, labelled, judged, prompts = sample()
    found = people_rate(people, labelled, judged, prompts)
    assert 0.3 < found.judge_weight < 1

    def equation(rate):
        ours = (people[:, 0] - rate * people.sum(-1)).mean()
        theirs = judged[:, 0] - rate * judged.sum(-1)
        return float(ours + found.judge_weight * (theirs.mean() - theirs[labelled].mean()))

    assert found.rate == pytest.approx(brentq(equation, 0.01, 0.99), abs=1e-9)

    def variance(weight):
        return sum(
            term**2
            for term in slow_terms(found.rate, weight, people, labelled, judged, prompts)
        )  # fmt: skip

    least = variance(found.judge_weight)
    assert variance(found.judge_weight - 0.02) > least < variance(found.judge_weight + 0.02)
    assert found.worth == pytest.approx(80 * variance(0) / least, rel=0.03)  # but for leverages


def test_the_interval_is_students_on_the_logit_scale():
    people, labelled, judged, prompts = sample(accuracy=0.5, size=(400, 1), labels=200)
    found = people_rate(people, labelled, judged, prompts)
    terms = slow_terms(found.alone, 0.0, people, labelled, judged, prompts)
    decided = float(people.sum(-1).mean())
    error = (sum(term**2 for term in terms)) ** 0.5 / (1 - 1 / 200) / decided
    half = t.ppf(0.975, 199) * error / (found.alone * (1 - found.alone))
    low, high = (torch.logit(torch.tensor(end)).item() for end in found.alone_interval)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-4)
    for freedom in (5, 18, 100):
        assert student_97_5(freedom) == pytest.approx(t.ppf(0.975, freedom), rel=1e-3)


def test_the_interval_covers_for_good_bad_and_biased_judges():
    """Quick form of benchmarks/people_rates.py: 100 labels, over all judges together."""
    covered, shorter, sets = [], [], 24
    for accuracy in (0.55, 0.75, 0.95):
        for bias in ("none", "system", "position"):
            for seed in range(sets):
                size = (300, 1) if seed % 2 else (75, 4)
                found = people_rate(*sample(accuracy, size, 100, seed, 0.7, bias))
                covered.append(found.interval[0] <= 0.7 <= found.interval[1])
                if accuracy == 0.95:
                    alone, both = (e[1] - e[0] for e in (found.alone_interval, found.interval))
                    shorter.append(both / alone)
    assert 0.92 <= sum(covered) / len(covered) <= 0.985
    assert sum(shorter) / len(shorter) < 0.9


def test_a_judge_of_the_same_view_is_worth_many_labels_and_a_random_one_none():
    people, labelled, judged, prompts = sample(size=(400, 1))
    same = judged.clone()
    same[labelled] = people
    found = people_rate(people, labelled, same, prompts)
    assert found.worth > 300
    assert found.interval[1] - found.interval[0] < 0.13
    coins = judged[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    found = people_rate(people, labelled, coins, prompts)
    assert (found.judge_weight, found.worth) == (0, 80)
    assert (found.rate, found.interval) == (found.alone, found.alone_interval)
    assert "adds nothing" in people_remarks(found, 400)[0]
    opposite = people_rate(people, labelled, same.flip(-1), prompts)
    assert opposite.judge_weight == 0


def test_people_alone_where_their_verdicts_do_not_suffice():
    people, labelled, judged, prompts = sample(size=(400, 1))
    few = people_rate(people[:15], labelled[:15], judged, prompts)
    wins = float(people[:15, 0].sum())
    settled = int(people[:15].sum())
    low, high = wilson_interval(wins, settled)
    assert few.judge_weight == 0
    assert few.interval[0] <= low
    assert few.interval[1] >= high
    undecided = people.clone()
    undecided[people.sum(-1).cumsum(0) > 15] = 0
    assert people_rate(people, labelled, judged, prompts).judge_weight > 0
    assert people_rate(undecided, labelled, judged, prompts).judge_weight == 0
    won = torch.tensor([[1.0, 0.0]] * 80)
    assert people_rate(won, labelled, judged, prompts).interval == wilson_interval(80, 80)
    ties = people_rate(torch.zeros(80, 2), labelled, judged, prompts)
    assert (ties.rate, ties.ties, ties.interval) == (None, 80, (0.0, 1.0))
    every = people_rate(judged, torch.arange(400), judged, prompts)
    assert every.judge_weight == 0
    assert "theirs alone" in people_remarks(every, 400)[0]


def test_pairs_that_were_not_drawn_at_random_are_reported():
    people, labelled, judged, prompts = sample(size=(400, 1))
    assert abs(people_rate(people, labelled, judged, prompts).unlike) < 3
    chosen = judged[:, 0].argsort(descending=True, stable=True)[:80]
    found = people_rate(people, chosen, judged, prompts)
    assert found.unlike > 3
    assert "not a random sample" in people_remarks(found, 400)[-1]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(prompt, first, second, gold):
    return {"prompt": prompt, "response_1": first, "response_2": second, "gold": gold}


def test_verdicts_are_matched_by_content_in_either_order(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [
        pair("p", "a", "b", 1), pair("p", "b", "a ", 2), pair("p", "a", "b", "tie"),
        pair("p", "b", "a", 1), pair("q", "a", "b", 2), pair("p", "a", "c", 1),
    ]  # fmt: skip
    people = load_people(write(tmp_path / "human.jsonl", rows))
    ours = Comparison("1", "p", "a", "b")
    assert people.of(ours) == (0.5, 0.25)
    assert people.of(Comparison("2", "p", "b", "a")) == (0.25, 0.5)
    assert people.of(Comparison("3", "q", "a", "b")) == (0.0, 1.0)
    assert people.of(Comparison("4", "p", "b", "c")) is None
    people.announce([[ours], [ours]])
    assert "4 of 6 rows are about compared pairs (1 pairs, 1 of them judged" in caplog.text
    assert "the other 2 rows are not used" in caplog.text
    with pytest.raises(UsageError, match="human.jsonl: none of its 6 rows is about a compared"):
        people.announce([[Comparison("4", "z", "b", "c")]])


TURN = [{"role": "user", "content": "Hi there"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi there"}]}]
TOOLS = {"tools": [{"name": "f"}]}


@pytest.mark.parametrize("theirs", ["Hi there", TURN, PARTS, "user: Hi there "])
@pytest.mark.parametrize("context", [{}, TOOLS])
def test_a_prompt_is_one_as_text_as_a_users_turn_and_as_shown(tmp_path, theirs, context):
    row = pair(theirs, "a", "b", 1) | context
    people = load_people(write(tmp_path / "human.jsonl", [row]))
    for ours in ("Hi there", TURN):
        assert people.of(Comparison("1", ours, "a", "b", context)) == (1.0, 0.0)
    several = [*TURN, {"role": "assistant", "content": "b"}, *TURN]
    for other in ("there", [{"role": "system", "content": "Hi there"}], several):
        assert people.of(Comparison("1", other, "a", "b", context)) is None
    assert people.of(Comparison("1", "Hi there", "a", "b", {"tools": [{"name": "g"}]})) is None


def test_a_preference_between_equal_responses_is_refused(tmp_path):
    path = write(tmp_path / "human.jsonl", [pair("p", "a", "b", 1), pair("p", "a", "a ", 2)])
    with pytest.raises(UsageError, match=r"line 2: both responses are equal .* write tie, or"):
        load_people(path)


def test_a_check_asks_nothing_about_ties(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    rows = [pair("p", "a", "b", "tie"), pair("p", "b", "a", 2)]
    assert load_gold(write(tmp_path / "a.jsonl", rows)) == [Comparison("2", "p", "a", "b")]
    assert "not asked about 1 pairs that are ties" in caplog.text
    with pytest.raises(UsageError, match="every pair is a tie"):
        load_gold(write(tmp_path / "b.jsonl", rows[:1]))


@pytest.fixture
def files(tmp_path):
    """The judge, which counts "good", finds every second response better, and the others worse."""
    prompts = [f"Question {i}?" for i in range(40)]
    ours = [f"good good {i}" if i % 2 else f"none {i}" for i in range(40)]
    rows = zip(prompts, ours, strict=True)
    return {
        "ours": write(
            tmp_path / "ours.jsonl", [{"prompt": p, "response": response} for p, response in rows]
        ),
        "base": write(
            tmp_path / "base.jsonl", [{"prompt": p, "response": "good one"} for p in prompts]
        ),
        "pairs": list(zip(prompts, ours, strict=True)),
    }


def compare(tmp_path, files, script, human):
    main(["compare", "--responses", files["ours"], "--baseline", files["base"], "--output",
          str(tmp_path / "out"), "--judge_model", "m", "--base_url", script.url, "--human",
          human])  # fmt: skip


def test_compare_prints_peoples_rate_beside_the_judges(tmp_path, files):
    agree = [
        pair(prompt, "good one", ours, (2 if i % 2 else 1) if i % 10 else "tie")
        for i, (prompt, ours) in enumerate(files["pairs"][:30])
    ]
    human = write(tmp_path / "human.jsonl", [*agree, pair("no", "a", "b", 1)])
    with serving(Script()) as script:
        compare(tmp_path, files, script, human)
        text = (tmp_path / "out" / "compare.md").read_text()
        (contest,) = json.loads((tmp_path / "out" / "compare.json").read_text())["contests"]
        assert contest["found"]["rate"] == 0.5
        found = contest["people"]
        assert (found["verdicts"], found["wins"], found["losses"], found["ties"]) == (30, 15, 12, 3)
        assert found["worth"] > 33
        assert f"| 30 | 10.0 | {found['worth']:,.0f} |" in text
        assert "with the judge, 30 verdicts of people are worth" in text
    assert sum(script.calls.values()) == 80
    assert len(load_gold(human)) == 28  # the same file serves --check


def test_a_file_about_other_pairs_is_refused_before_the_judge_is_asked(tmp_path, files, capsys):
    human = write(tmp_path / "human.jsonl", [pair("no", "a", "b", 1)])
    with serving(Script()) as script, pytest.raises(SystemExit) as end:
        compare(tmp_path, files, script, human)
    assert end.value.code == 2
    assert "none of its 1 rows is about a compared pair" in capsys.readouterr().err
    assert not script.calls
    assert not (tmp_path / "out").exists()
