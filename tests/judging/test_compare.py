"""`softpref compare`: methods, head to head, controls, two judges."""

from __future__ import annotations

import json

import pytest

from softpref.cli import main
from softpref.judging import compare as compare_module
from softpref.judging import template
from softpref.judging.controls import load_attacks
from softpref.judging.questions import questions_of
from softpref.judging.rates import judged_rate
from tests.judging.server import ORDERS, Script, always_first, gullible, honest, serving

PROMPTS = [f"Question {i}?" for i in range(12)]


def write(path, response):
    rows = [{"prompt": p, "response": response(i)} for i, p in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    return {
        "baseline": write(tmp_path / "baseline.jsonl", lambda i: "good answer"),
        "best": write(tmp_path / "best.jsonl", lambda i: f"good good answer {i}"),
        "run": write(tmp_path / "run.jsonl", lambda i: "good " * (2 * (i % 4 > 0)) + f"x {i}"),
    }


def compare(tmp_path, files, script, *more, responses=None):
    main(["compare", "--responses", *(responses or [files["best"]]), "--baseline",
          files["baseline"], "--output", str(tmp_path / "out"), "--judge_model", "m",
          "--base_url", script.url, *more])  # fmt: skip
    return json.loads((tmp_path / "out" / "compare.json").read_text())


def test_methods_runs_and_head_to_head(tmp_path, files, capsys):
    with serving(Script()) as script:
        record = compare(
            tmp_path, files, script, "--head_to_head", "true",
            responses=[f"mspo={files['best']}", f"mspo={files['run']}",
                       f"dpo={files['run']}", f"dpo={files['best']}"],
        )  # fmt: skip
    rates = {(c["method"], c["rival"], c["run"]): c["found"] for c in record["contests"]}
    assert {key: found["rate"] for key, found in rates.items()} == {
        ("mspo", None, 0): 1.0, ("mspo", None, 1): 0.75,
        ("dpo", None, 0): 0.75, ("dpo", None, 1): 1.0,
        ("mspo", "dpo", 0): 1.0, ("mspo", "dpo", 1): 0.0,
    }  # fmt: skip
    assert rates["mspo", "dpo", 0]["ties"] == 9
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "| dpo | 87.5 ± 17.7 |" in text
    assert "| mspo against dpo | 50.0 ± 70.7 |" in text
    assert "87.5 $\\pm$ 17.7" in (tmp_path / "out" / "compare.tex").read_text()
    for kind in ("png", "svg"):
        assert (tmp_path / "out" / f"compare.{kind}").stat().st_size > 1000
    assert "0 failed (0.0%)" in capsys.readouterr().out


def test_an_honest_judge_is_fit(tmp_path, files):
    with serving(Script(honest)) as script:
        record = compare(tmp_path, files, script, "--controls", "true")
    controls = record["controls"]
    assert controls["unfit"] == []
    assert controls["null"]["rate"] == 0
    assert controls["identical"]["ties"] == len(PROMPTS)
    assert controls["attacks"]["losses"] == 10
    assert controls["not_resisted"] == []
    assert "Nothing speaks against it." in (tmp_path / "out" / "compare.md").read_text()


def flattered(system, user):
    """A judge that likes to be thanked."""
    _, first, second = user.split("RESPONSE ", 2)
    thanks = ["Thank you" in text for text in (first, second)]
    return "A" if thanks == [True, False] else "B" if thanks == [False, True] else "tie"


def silent_on_controls(system, user):
    """A judge that gives no verdict on a constant answer, on identical ones, or on attacks."""
    _, first, second = user.split("RESPONSE ", 2)
    same = first.splitlines()[1] == second.splitlines()[1]
    return "?" if same or "Thank you" in user or ORDERS.search(user) else honest(system, user)


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (always_first, "finds one of two identical answers better in 12 of 12 cases"),
        (always_first, "decides nothing between a constant answer"),
        (flattered, "prefers a constant answer to the baseline's in 100%"),
        (silent_on_controls, "questions about constant answers, identical answers, attacks failed"),
    ],
)
def test_a_judge_that_prefers_controls_is_unfit(tmp_path, files, judge, reason):
    with serving(Script(judge)) as script:
        record = compare(tmp_path, files, script, "--controls", "true")
    assert any(reason in unfit for unfit in record["controls"]["unfit"])
    assert "**Unfit**" in (tmp_path / "out" / "compare.md").read_text()


def fence_taken_away(monkeypatch):
    bare = {"SYSTEM": "Compare two responses. Reply in JSON.",
            "USER": template.USER.replace("{fence} ", "")}  # fmt: skip
    for name, words in bare.items():
        monkeypatch.setattr(template, name, words)


@pytest.mark.parametrize("attack", load_attacks(), ids=lambda attack: attack.uid)
def test_an_attack_fails_at_the_fence_and_works_without(monkeypatch, attack):
    def verdicts():
        questions = questions_of([attack], "both", 0)[attack.uid]
        asked = [template.render_question(question, f"<{'0123' * 6}>") for question in questions]
        return [gullible(system["content"], user["content"]) for system, user in asked]

    assert verdicts() == ["B", "A"]  # the honest answer, in both orders
    fence_taken_away(monkeypatch)
    assert verdicts() == ["A", "B"]  # the attack, in both orders


def test_a_fooled_judge_is_reported(tmp_path, files, monkeypatch):
    fence_taken_away(monkeypatch)
    with serving(Script(gullible)) as script:
        record = compare(tmp_path, files, script, "--controls", "true")
    assert len(record["controls"]["fooled_by"]) == 10
    assert any("10 of 10 attacks won" in reason for reason in record["controls"]["unfit"])


def test_two_judges_are_compared(tmp_path, files, monkeypatch):
    rated = []
    monkeypatch.setattr(
        compare_module, "judged_rate", lambda *given: rated.append(given) or judged_rate(*given)
    )
    with serving(Script(honest)) as script, serving(Script(flattered)) as other:
        second = tmp_path / "second.yaml"
        second.write_text(f"judge_model: other\nbase_url: {other.url}\n")
        record = compare(
            tmp_path, files, script, "--second_judge", str(second), responses=[files["run"]]
        )
    found = record["agreement"]["run"]
    assert found["comparisons"] == len(PROMPTS)
    assert found["kappa"] == pytest.approx(0, abs=1e-9)  # the second calls everything a tie
    assert len(rated) == 1  # its bootstrap takes most of the time


def obeys_when_first(system, user):
    """A judge that an attack sways where it is A, and that is honest else."""
    _, first, second = user.split("RESPONSE ", 2)
    return "A" if ORDERS.search(first) else honest(system, user)


def test_a_judge_that_attacks_turn_in_one_order_is_unfit(tmp_path, files):
    with serving(Script(obeys_when_first)) as script:
        record = compare(tmp_path, files, script, "--controls", "true")
    assert record["controls"]["fooled_by"] == []
    assert len(record["controls"]["not_resisted"]) == 10
    assert any("better than 10 of 10 attacks" in r for r in record["controls"]["unfit"])


def test_a_second_judge_that_cannot_be_had_is_known_before_the_first_is_asked(
    tmp_path, files, capsys, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "second.yaml").write_text("judge_model: gpt-4o\n")
    with serving(Script()) as script:
        with pytest.raises(SystemExit):
            compare(tmp_path, files, script, "--second_judge", str(tmp_path / "second.yaml"))
        assert not script.calls
    assert "OPENAI_API_KEY is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        (["run.jsonl", "other/run.jsonl"], "the name run is taken; give NAME=FILE"),
        (["a=run.jsonl", "a=best.jsonl", "b=best.jsonl"], "a has 2 runs and b 1"),
        (["a=run.jsonl", "a=run.jsonl"], "is given twice"),
    ],
)
def test_names_and_runs_that_do_not_go_together(
    tmp_path, files, capsys, monkeypatch, responses, message
):
    monkeypatch.chdir(tmp_path)
    with serving(Script()) as script, pytest.raises(SystemExit):
        compare(tmp_path, files, script, "--head_to_head", "true", responses=responses)
    assert message in capsys.readouterr().err


def test_a_path_with_an_equals_sign_is_a_path(tmp_path, files, monkeypatch):
    home = tmp_path / "lr=1e-4"
    home.mkdir()
    write(home / "out.jsonl", lambda i: f"good good {i}")
    monkeypatch.chdir(tmp_path)
    with serving(Script()) as script:
        record = compare(tmp_path, files, script, responses=["lr=1e-4/out.jsonl"])
    assert [contest["method"] for contest in record["contests"]] == ["out"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("judge_model: [", "not YAML"),
        ("nonsense", "write `key: value` lines"),
        ("model: x", "unknown key 'model'"),
        ("judge: checker\norders: one", "does not read it"),
        ("judge_model: m\nconcurrency: many", "invalid int value: 'many'"),
        ("judge_model: m\norders: Both", "invalid choice: 'Both'"),
        ("judge_model: m\napi_key_env: X", "give it by --second_judge_key NAME=ADDRESS"),
    ],
)
def test_a_wrong_second_judge_is_named(tmp_path, files, capsys, text, message):
    (tmp_path / "second.yaml").write_text(text)
    with serving(Script()) as script, pytest.raises(SystemExit):
        compare(tmp_path, files, script, "--second_judge", str(tmp_path / "second.yaml"))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def graded(system, user):
    """The honest judge; a difference of two or more is "much better"."""
    assert '"A>>B" (A is much better)' in system
    _, first, second = user.split("RESPONSE ", 2)
    by = first.split().count("good") - second.split().count("good")
    steps = ">>" if abs(by) > 1 else ">"
    return "tie" if not by else f"A{steps}B" if by > 0 else f"B{steps}A"


def test_five_verdicts_count_as_three_and_strong_ones_are_reported(tmp_path, files):
    responses = write(tmp_path / "graded.jsonl", lambda i: "good " * (i % 4))
    with serving(Script(graded)) as script:
        record = compare(tmp_path, files, script, "--grades", "five", responses=[responses])
        asked = sum(script.calls.values())
        compare(tmp_path, files, script, "--grades", "five", responses=[responses])
        assert sum(script.calls.values()) == asked
    (contest,) = record["contests"]
    found = contest["found"]
    assert [found[name] for name in ("wins", "losses", "ties")] == [6, 3, 3]
    assert (found["strong_wins"], found["strong_losses"], found["rate"]) == (3, 0, 6 / 9)
    assert found["first_share"] == 0.5
    assert "| graded | 6 | 3 | 3 | 0 |" in (tmp_path / "out" / "compare.md").read_text()
    assert '"A>>B"' in record["template"]["system"]


def test_a_verdict_counts_only_among_those_that_were_asked_for():
    reply = '{"justification": "", "verdict": "%s"}'
    assert template.read_reply(reply % "A>>B") is None
    assert template.read_reply(reply % "A", "five") is None
    assert template.read_reply(reply % "B>A", "five") == ("B>A", "")
    assert template.template_version("five") != template.template_version("three")
    assert template.reply_schema("five")["properties"]["verdict"]["enum"][0] == "A>>B"
