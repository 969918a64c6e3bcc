"""`softpref push` and `--push_to_hub` against a scripted hub."""

import json
import re

import huggingface_hub.constants as constants
import pytest
import torch
import yaml
from datasets import load_dataset

from softpref.auditing.audit import run_audit
from softpref.auditing.options import AuditOptions
from softpref.cli import main
from softpref.data.sources import load_pairs
from softpref.errors import UsageError
from softpref.hub import create_repository, size_text, without_secrets
from softpref.publishing import PushOptions, run_push
from softpref.training.align import AlignFiles, align
from softpref.training.config import MSPOConfig
from softpref.training.seals import defect, write_manifest
from softpref.training.sft import SFTOptions, fine_tune
from softpref.world.language import make_tokenizer
from tests.hub import TOKEN, serving
from tests.tiny import tiny_model
from tests.toy import toy_pairs


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, pairs, a finished run and a finished audit."""
    home = tmp_path_factory.mktemp("home")
    tiny_model(dtype=torch.float32, attention="sdpa").save_pretrained(home / "sft")
    make_tokenizer().save_pretrained(home / "sft")
    toy_pairs(24, flip_every=3).to_json(home / "train.jsonl")
    toy_pairs(16, 1).to_json(home / "clean.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        align(files(home, home / "run"), config())
        options = {name: str(home / f"{name}.jsonl") for name in ("clean",)}
        data = str(home / "train.jsonl")
        run_audit(AuditOptions(model=str(home / "sft"), data=data, **options,
                               export="drop", force=True, output=str(home / "audit")))  # fmt: skip
    return home


def files(home, output):
    return AlignFiles(str(home / "sft"), str(home / "train.jsonl"), str(home / "clean.jsonl"),
                      None, str(output))  # fmt: skip


def config(**options):
    defaults = {"method": "mspo", "tuning": "full", "max_steps": 1, "use_cpu": True,
                "save_strategy": "no", "disable_tqdm": True}  # fmt: skip
    return MSPOConfig(**defaults | options)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with serving(monkeypatch) as hub:
        yield hub


def copied(directory, target):
    target.mkdir()
    for path in directory.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_run_is_pushed_whole(home, hub, tmp_path, capsys):
    main(["push", str(home / "run"), "org/name", "--private"])
    ((repo, sent),) = hub.commits
    assert (repo, hub.private[repo]) == ("model org/name", True)
    wanted = {"README.md", "manifest.json", "run.json", "labels.jsonl", "label_history.parquet",
              "meta_learner.safetensors", "metrics.jsonl", "model.safetensors", "config.json",
              "tokenizer.json"}  # fmt: skip
    assert wanted <= sent.keys()
    pulled = tmp_path / "pulled"
    pulled.mkdir()
    for name, content in sent.items():
        (pulled / name).write_bytes(content)
    assert defect(pulled) is None
    assert sent["run.json"] == (home / "run" / "run.json").read_bytes()
    card = yaml.safe_load(sent["README.md"].decode().split("---")[1])
    assert "base_model" not in card  # a local path, which the hub refuses
    said = capsys.readouterr().out
    size = size_text((home / "run" / "model.safetensors").stat().st_size)
    assert f"  model.safetensors  {size}\n" in said
    assert f"in {len(sent)} files to org/name, a private model" in said
    assert TOKEN not in said


def test_an_audit_is_pushed_as_a_data_set_with_its_card(home, hub, tmp_path):
    run_push([str(home / "audit"), "cleaned"], PushOptions())
    ((repo, sent),) = hub.commits
    assert repo == "dataset me/cleaned"
    assert hub.private[repo] is False
    assert sent.keys() == {"README.md", "cleaned.jsonl", "labels.jsonl", "summary.json",
                           "manifest.json"}  # fmt: skip
    card = sent["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["configs"][0]["data_files"] == "cleaned.jsonl"
    kept = len(sent["cleaned.jsonl"].splitlines())
    for said in ("| rows of the data | 24 |", f"| rows here | {kept}; {24 - kept} are dropped",
                 "| trusted pairs | 16 (", "wrong labels among the audited pairs", "read by `sft`",
                 "`ppl_diff`, `length`, `content`", "# train.jsonl, audited",
                 "## Warnings\n\n- 16 trusted pairs, clean.jsonl, are few"):  # fmt: skip
        assert said in card
    assert str(home) not in card
    for name, content in sent.items():
        (tmp_path / name).write_bytes(content)
    assert defect(tmp_path) is None
    assert len(load_dataset(str(tmp_path), cache_dir=str(tmp_path / "hf"))["train"]) == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "labels.jsonl").write_text(""), "labels.jsonl is damaged, or was"),
        (lambda run: (run / "manifest.json").unlink(), "it has no manifest.json"),
        (lambda run: (run / "run.json").unlink(), "neither a finished run .run.json. nor"),
        (lambda run: (run / "labels.jsonl").unlink(), "labels.jsonl is missing"),
    ],
)
def test_what_is_not_finished_or_was_changed_is_refused(home, hub, tmp_path, change, message):
    run = copied(home / "run", tmp_path / "run")
    change(run)
    with pytest.raises(UsageError, match=message):
        run_push([str(run), "org/name"], PushOptions())
    assert not hub.files
    audit = copied(home / "audit", tmp_path / "audit")
    (audit / "cleaned.jsonl").write_text("")
    with pytest.raises(UsageError, match="cleaned.jsonl is damaged, or was changed"):
        run_push([str(audit), "org/name"], PushOptions())


def test_a_card_may_be_edited(home, hub, tmp_path):
    run = copied(home / "run", tmp_path / "run")
    (run / "README.md").write_text("mine")
    run_push([str(run), "org/name"], PushOptions())
    assert hub.files["model org/name"]["README.md"] == b"mine"


def test_secrets_in_a_record_stay_here(home, hub, tmp_path, caplog):
    run = copied(home / "run", tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["options"] |= {"run_name": f"a {TOKEN}", "api_key": "k", "hub_token": "<HUB_TOKEN>"}
    (run / "run.json").write_text(json.dumps(record))
    (run / "training_args.json").write_text(json.dumps({"run_name": f"a {TOKEN}"}))
    names = json.loads((run / "manifest.json").read_text())["files"]
    write_manifest(run, {name: run / name for name in names})
    run_push([str(run), "org/name"], PushOptions())
    sent = hub.files["model org/name"]
    options = json.loads(sent["run.json"])["options"]
    assert [options[name] for name in ("run_name", "api_key", "hub_token")] == [
        None, None, "<HUB_TOKEN>"
    ]  # fmt: skip
    assert TOKEN.encode() not in b"".join(sent.values())
    assert "the values of run_name, api_key look like secrets" in caplog.text
    (tmp_path / "pulled").mkdir()
    for name, content in sent.items():
        (tmp_path / "pulled" / name).write_bytes(content)
    assert defect(tmp_path / "pulled") is None


@pytest.mark.parametrize(
    ("value", "is_secret"),
    [
        ("https://user:word@host/v1", True), ("sk-" + "a" * 30, True),
        ("https://host:80/v1", False), ("hf_internal-testing/tiny", False),
        ("/data/a:b@c", False), ("my-secret", False),
    ],
)  # fmt: skip
def test_what_looks_like_a_secret(tmp_path, value, is_secret):
    (tmp_path / "run.json").write_text(json.dumps({"a": [{"model": value}], "eos": "x"}))
    assert without_secrets(tmp_path / "run.json")[1] == (["model"] if is_secret else [])


def test_private_never_ends_in_a_public_repository(home, hub):
    create_repository("org/name", "model")
    with pytest.raises(UsageError, match="org/name exists and is public"):
        run_push([str(home / "run"), "org/name"], PushOptions(private=True))
    assert not hub.commits


def test_other_files_of_a_repository_are_named(home, hub, caplog):
    create_repository("org/name", "model")
    hub.files["model org/name"]["adapter_config.json"] = b"{}"
    run_push([str(home / "run"), "org/name"], PushOptions())
    assert "org/name keeps other files that it holds: adapter_config.json" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "answers", "message"),
    [
        (["org/name"], {"create": 401}, "org/name: not uploaded: .*HF_TOKEN, or run `hf auth"),
        (["org/name"], {"commit": 403}, "org/name: not uploaded: .*HF_TOKEN"),
        (["org/name"], {"preupload": 400}, "org/name: not uploaded: .*check the name"),
        (["a/b/c"], {}, "a/b/c: not uploaded: .*check the name"),
        (["org/name", "--token=hf_word"], {}, "unknown option --token; see softpref push"),
        ([], {}, "give a directory and a repository, before any option"),
    ],
)
def test_mistakes_have_one_message(home, hub, capsys, arguments, answers, message):
    hub.answers |= answers
    with pytest.raises(SystemExit) as stop:
        main(["push", str(home / "run"), *arguments])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert re.search(message, printed.err)
    assert "hf_word" not in printed.err + printed.out
    assert TOKEN not in printed.err + printed.out
    assert not hub.commits


def test_no_token_and_no_network(home, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="check the network, and that http://127.0.0.1:9 can"):
        run_push([str(home / "run"), "org/name"], PushOptions())
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="there is no token to upload with: set HF_TOKEN"):
        run_push([str(home / "run"), "org/name"], PushOptions())


def test_train_pushes_once_and_after_all_is_written(home, hub, tmp_path):
    seen = []
    hub.at_commit.append(lambda: seen.append(defect(tmp_path / "run")))
    align(files(home, tmp_path / "run"), config(push_to_hub=True, hub_model_id="org/mspo"))
    ((repo, sent),) = hub.commits
    assert repo == "model org/mspo"
    assert seen == [None]
    assert {"labels.jsonl", "run.json", "meta_learner.safetensors", "README.md"} <= sent.keys()
    assert b"aligned with mspo" in sent["README.md"]


def test_a_push_that_fails_leaves_the_run_and_says_how_to_push_it(home, hub, tmp_path):
    hub.answers["commit"] = 500
    run = tmp_path / "run"
    with pytest.raises(UsageError, match=f"The run is complete: softpref push {run} org/mspo"):
        align(files(home, run), config(push_to_hub=True, hub_model_id="org/mspo"))
    assert defect(run) is None
    hub.answers.clear()
    run_push([str(run), "org/mspo"], PushOptions())
    assert len(hub.commits) == 1


def test_a_hub_that_refuses_is_found_before_training(home, hub, tmp_path):
    hub.answers["create"] = 403
    with pytest.raises(UsageError, match="org/mspo: not uploaded"):
        align(files(home, tmp_path / "run"), config(push_to_hub=True, hub_model_id="org/mspo"))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_sft_pushes_with_the_list_of_what_it_has_seen(home, hub, tmp_path):
    options = SFTOptions(
        str(tmp_path / "sft"), max_steps=1, use_cpu=True, save_strategy="no", disable_tqdm=True,
        push_to_hub=True, hub_model_id="org/sft",
    )  # fmt: skip
    pairs = load_pairs(str(home / "train.jsonl")).pairs
    fine_tune(tiny_model(dtype=torch.float32, attention="sdpa"), make_tokenizer(), pairs, options)
    ((_, sent),) = hub.commits
    assert {"sft_targets.json", "model.safetensors"} <= sent.keys()
