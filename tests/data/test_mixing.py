"""Several sources as one set, and mixes of them in given shares."""

from __future__ import annotations

import math

import pytest

from softpref.data.mixing import counts_of, mixed, shares_of
from softpref.data.sources import by_source, load_pairs
from softpref.data.splits import hold_out_clean
from softpref.errors import UsageError
from softpref.training.output import write_lines


def pairs(count, name=""):
    return [{"prompt": f"{name}{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(count)]


@pytest.fixture
def files(tmp_path):
    write_lines(tmp_path / "a.jsonl", pairs(40, "a"))
    write_lines(tmp_path / "b.jsonl", pairs(30, "b"))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]


def prompts(loaded):
    return loaded.pairs["prompt"][:]


def test_several_files_follow_each_other_and_each_pair_says_its_own(files):
    loaded, alone = load_pairs(files), [load_pairs(file) for file in files]
    assert prompts(loaded) == prompts(alone[0]) + prompts(alone[1])
    assert loaded.pairs["source"][:] == [files[0]] * 40 + [files[1]] * 30
    assert loaded.pairs["row"][:] == [*range(1, 41), *range(1, 31)]
    assert loaded.fingerprints == {one.source: one.fingerprint for one in alone}
    assert loaded.fingerprint not in loaded.fingerprints.values()
    assert loaded.source == ", ".join(files)
    parts = list(by_source(loaded.pairs, loaded.source))
    assert [(name, part["prompt"][:]) for name, part in parts] == [
        (one.source, prompts(one)) for one in alone
    ]


def test_a_list_of_one_file_is_that_file(files):
    alone, listed = load_pairs(files[0]), load_pairs(files[:1])
    assert listed.pairs.column_names == alone.pairs.column_names
    assert (listed.source, listed.fingerprint) == (alone.source, alone.fingerprint)
    ((name, part),) = by_source(alone.pairs, "whatever")
    assert (name, len(part)) == ("whatever", 40)


def test_rows_repeated_in_another_file_are_counted_as_in_one_file(tmp_path):
    first, second, third = pairs(3)
    turned = second | {"chosen": second["rejected"], "rejected": second["chosen"]}
    write_lines(tmp_path / "a.jsonl", [first, second, third])
    write_lines(tmp_path / "b.jsonl", [first, turned])
    write_lines(tmp_path / "both.jsonl", [first, second, third, first, turned])
    several = load_pairs([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    one = load_pairs(str(tmp_path / "both.jsonl"))
    assert (several.duplicates, several.contradicting) == (1, 1)
    both = " and ".join([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])
    assert several.where == {"duplicates": {both: 1}, "contradicting": {both: 1}}
    assert one.where["contradicting"] == {str(tmp_path / "both.jsonl"): 1}
    assert several.pairs["uid"][:] == one.pairs["uid"][:]


def test_a_uid_of_another_file_is_refused_with_both_places(tmp_path):
    rows = [row | {"uid": str(i)} for i, row in enumerate(pairs(3))]
    write_lines(tmp_path / "a.jsonl", rows[:2])
    write_lines(tmp_path / "b.jsonl", [rows[2], pairs(9)[8] | {"uid": "1"}])
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    with pytest.raises(UsageError, match=r"b.jsonl, line 2: uid '1' is .*a.jsonl, line 2"):
        load_pairs(files)
    loaded = load_pairs(files, on_bad_row="skip")
    assert [(bad.source, bad.row) for bad in loaded.bad_rows] == [(files[1], 2)]


def test_files_that_are_not_alike_or_not_there_are_named(files, tmp_path):
    write_lines(tmp_path / "c.jsonl", [row | {"is_flipped": False} for row in pairs(2)])
    with pytest.raises(UsageError, match=r"c.jsonl, line 1: the row has text and is_flipped, the"):
        load_pairs([files[0], str(tmp_path / "c.jsonl")])
    with pytest.raises(UsageError, match="nowhere.jsonl does not exist"):
        load_pairs([files[0], "nowhere.jsonl"])
    with pytest.raises(UsageError, match=r"a.jsonl is given twice: give each file once"):
        load_pairs([files[0], files[1], files[0]])


@pytest.mark.parametrize(
    ("available", "weights", "counts"),
    [
        ([1000, 5000], (0.7, 0.3), [1000, 429]),  # 1000 / 0.7 = 1428.6 pairs in all
        ([5000, 1000], (0.7, 0.3), [2333, 1000]),
        ([100, 100], (1, 1), [100, 100]),
        ([90, 60, 30], (3, 2, 1), [90, 60, 30]),
        ([90, 60, 12], (3, 2, 1), [36, 24, 12]),
        ([49, 7], (1, 49), [0, 7]),
        ([10**6, 3], (1 / 3, 2 / 3), [2, 3]),
    ],
)
def test_the_largest_mix_that_repeats_no_pair(available, weights, counts):
    names = [str(i) for i in range(len(weights))]
    shares = shares_of(names, weights)
    assert math.fsum(shares) == pytest.approx(1)
    assert counts_of(available, shares) == counts
    assert all(count <= size for count, size in zip(counts, available, strict=True))


def test_a_mix_is_a_seeded_draw_in_the_files_order(files, caplog):
    loaded = load_pairs(files)
    with caplog.at_level("INFO", "softpref"):
        drawn = mixed(loaded, shares_of(files, (1, 3)), seed=5)
    assert f"mix: 10 of 40 pairs of {files[0]}, 30 of 30 pairs of {files[1]}" in caplog.text
    assert "not read" not in caplog.text
    assert drawn.pairs["source"][:] == [files[0]] * 10 + [files[1]] * 30
    assert prompts(drawn)[10:] == prompts(loaded)[40:]
    of_a = prompts(drawn)[:10]
    assert len(set(of_a)) == 10
    assert of_a == sorted(of_a, key=prompts(loaded).index)
    uids = dict(zip(prompts(loaded), loaded.pairs["uid"][:], strict=True))
    assert drawn.pairs["uid"][:] == [uids[prompt] for prompt in prompts(drawn)]
    again, other = (mixed(loaded, (0.25, 0.75), seed) for seed in (5, 6))
    assert prompts(again) == prompts(drawn) != prompts(other)
    assert drawn.shares == (0.25, 0.75)
    assert drawn.fingerprints[files[1]] == loaded.fingerprints[files[1]]
    assert drawn.fingerprints[files[0]] != loaded.fingerprints[files[0]]


def test_pairs_held_out_of_several_files_leave_them_apart(files):
    rest, clean, _ = hold_out_clean(load_pairs(files).pairs, 20, seed=0)
    for part in (rest, clean):
        assert [name for name, _ in by_source(part, "")] == files


@pytest.mark.parametrize(
    ("names", "weights", "words"),
    [
        (["a.jsonl"], [1.0], r"^--mix 1: there is only a.jsonl to mix; remove --mix"),
        (["a", "b"], [1.0], r"^--mix 1: give one weight for each of the 2 files"),
        (["a", "b"], [1, 1, 1], r"^--mix 1 1 1: give one weight for each of the 2 files"),
        (["a", "b"], [0.7, -0.3], r"^--mix 0.7 -0.3: every weight must be a positive finite"),
        (["a", "b"], [1, 0], "^--mix 1 0: every weight must be"),
        (["a", "b"], [0, 0], "^--mix 0 0: every weight must be"),
        (["a", "b"], [1, -1], "^--mix 1 -1: every weight must be"),
        (["a", "b"], [1, math.nan], "^--mix 1 nan: every weight must be"),
        (["a", "b"], [1, math.inf], "^--mix 1 inf: every weight must be"),
        (["a", "b"], [1e308, 5e-324], "every weight must be"),
        (["a", "b"], [1e308, 1e308], "every weight must be"),
    ],
)
def test_shares_that_are_none_are_refused(names, weights, words):
    with pytest.raises(UsageError, match=words):
        shares_of(names, weights)


def test_a_file_of_trusted_pairs_alone_is_refused(files):
    with pytest.raises(UsageError, match=r"all pairs of .*b.jsonl are trusted pairs too: remove"):
        mixed(load_pairs(files), shares_of(files, (1, 1)), 0, load_pairs(files[1]))


def test_a_share_too_small_for_one_pair_is_refused(files):
    with pytest.raises(UsageError, match=r"--mix leaves no pair of .*b.jsonl: give it a larger"):
        mixed(load_pairs(files), shares_of(files, (1, 0.001)), seed=0)
