import json

import pytest
from datasets import Dataset

from softpref.data.fingerprints import count_sft_targets, target_fingerprint, write_sft_targets
from softpref.errors import UsageError

PAIRS = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "a", "chosen": "c", "rejected": "b"},  # the same, flipped
    {"prompt": "b", "chosen": "b", "rejected": "c"},
    {"prompt": "é", "chosen": "x", "rejected": "y"},
]


def test_fingerprints_tell_prompt_and_response_apart():
    prints = [target_fingerprint(*texts) for texts in [("a", "bc"), ("ab", "c"), ("bc", "a")]]
    assert len(set(prints)) == 3
    assert all(len(p) == 16 and set(p) <= set("0123456789abcdef") for p in prints)
    assert target_fingerprint("a", "b") == "3554d2b8a1e34099"  # files outlive versions


def test_of_messages_all_fields_count():
    def messages(role, content, **others):
        return [{"role": role, "content": content, **others}]

    plain = target_fingerprint(messages("user", "hi"), messages("assistant", "ho"))
    assert plain == "cb03e06ab623db2b"
    assert plain != target_fingerprint(
        messages("user", "hi", name="x"), messages("assistant", "ho")
    )
    assert plain != target_fingerprint(messages("system", "hi"), messages("assistant", "ho"))
    assert plain != target_fingerprint(messages("user", "hi"), messages("assistant", "hu"))
    assert plain != target_fingerprint("hi", "ho")


def test_pairs_are_counted_whichever_side_was_the_target(tmp_path):
    pairs = Dataset.from_list(PAIRS)
    assert count_sft_targets(str(tmp_path), pairs) == 0
    assert count_sft_targets("some/hub-model", pairs) == 0
    write_sft_targets(tmp_path, [target_fingerprint("é", "y"), target_fingerprint("a", "b")])
    assert count_sft_targets(str(tmp_path), pairs) == 3


def test_the_record_is_sorted_and_numbered(tmp_path):
    write_sft_targets(tmp_path, ["c", "a", "b"])
    record = json.loads((tmp_path / "sft_targets.json").read_text())
    assert record == {"format": 1, "fingerprints": ["a", "b", "c"]}


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2, "fingerprints": []}'])
def test_a_record_that_cannot_be_read_is_named(tmp_path, text):
    (tmp_path / "sft_targets.json").write_text(text)
    with pytest.raises(UsageError, match=r"sft_targets\.json: not a list of SFT targets.*delete"):
        count_sft_targets(str(tmp_path), Dataset.from_list(PAIRS))
