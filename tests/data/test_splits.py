import datasets
import pytest

from softpref.data.splits import (
    ASSUMED_CORRECT,
    TRUTH_RESTORED,
    hold_out_clean,
    refuse_overlap,
    without_clean,
)
from softpref.errors import UsageError
from tests.toy import pairs_from_dataset


def make_pairs(numbers, flipped=None):
    """Pair n has the true responses good-n and bad-n; those in `flipped` stand the wrong way."""
    rows = []
    for n in numbers:
        wrong = flipped is not None and n in flipped
        good, bad = (f"bad-{n}", f"good-{n}") if wrong else (f"good-{n}", f"bad-{n}")
        row = {"prompt": f"p{n}", "chosen": good, "rejected": bad}
        rows.append(row | ({"is_flipped": wrong} if flipped is not None else {}))
    return pairs_from_dataset(datasets.Dataset.from_list(rows), "pairs").pairs


def test_clean_pairs_are_restored_where_the_flips_are_known():
    pairs = make_pairs(range(40), flipped=set(range(0, 40, 3)))
    rest, clean, provenance = hold_out_clean(pairs, 15, seed=4)
    assert provenance == TRUTH_RESTORED == "truth restored"
    assert (len(rest), len(clean)) == (25, 15)
    assert sorted([*rest["uid"], *clean["uid"]]) == sorted(pairs["uid"])
    for row in clean:
        n = row["prompt"][1:]
        assert (row["chosen"], row["rejected"]) == (f"good-{n}", f"bad-{n}")
        assert row["is_flipped"] is False
    before = {row["uid"]: row for row in pairs}
    assert any(before[uid]["is_flipped"] for uid in clean["uid"])
    assert all(row == before[row["uid"]] for row in rest)
    assert clean["row"][:] == sorted(clean["row"])
    assert clean.features == pairs.features


def test_clean_pairs_are_taken_as_given_where_nothing_is_known():
    pairs = make_pairs(range(10))
    rest, clean, provenance = hold_out_clean(pairs, 3, seed=0)
    assert provenance == ASSUMED_CORRECT == "assumed correct, not reviewed"
    assert [row for row in pairs if row["uid"] in clean["uid"][:]] == list(clean)
    assert len(rest) == 7


def test_the_seed_draws_the_clean_pairs_and_truth_does_not_matter():
    flipped = make_pairs(range(50), flipped={1, 2, 3})
    drawn = [hold_out_clean(flipped, 10, seed)[1]["row"][:] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert hold_out_clean(make_pairs(range(50)), 10, 0)[1]["row"][:] == drawn[0]


@pytest.mark.parametrize("count", [-1, 0, 5, 6])
def test_a_count_that_cannot_be_held_out(count):
    with pytest.raises(UsageError, match=f"--clean {count}: give a number from 1 to 4"):
        hold_out_clean(make_pairs(range(5)), count, seed=0)


def test_clean_pairs_leave_training_in_either_order():
    train = make_pairs([1, 2, 3, 4, 2], flipped={2})
    clean = make_pairs([2, 4, 9])
    kept, removed = without_clean(train, clean)
    assert kept["prompt"][:] == ["p1", "p3"]
    assert removed == 3
    untouched, none = without_clean(train, make_pairs([7]))
    assert (len(untouched), none) == (5, 0)
    with pytest.raises(UsageError, match="every pair is also in --clean"):
        without_clean(make_pairs([2, 4]), clean)


def test_overlap_with_an_evaluation_set_is_refused():
    clean = make_pairs([1, 2, 3])
    refuse_overlap(clean, make_pairs([4, 5]), "eval.jsonl")
    with pytest.raises(
        UsageError, match=r"--clean row 3 is also eval\.jsonl, line 2 \(2 such rows"
    ):
        refuse_overlap(clean, make_pairs([4, 3, 1], flipped={3}), "eval.jsonl")
