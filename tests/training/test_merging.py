"""`softpref merge`: the merged model is the adapted one, plain and whole."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from softpref.cli import main
from softpref.data.fingerprints import SFT_TARGETS, write_sft_targets
from softpref.errors import UsageError
from softpref.models.loading import load_policy
from softpref.training import merging
from softpref.training.merging import MergeOptions, run_merge
from softpref.training.seals import defect, write_manifest
from softpref.world.language import make_tokenizer
from tests.tiny import tiny_model

IDS = torch.arange(3, 23)[None]
CARD = "---\nlibrary_name: peft\ntags: [softpref]\n---\n\n# A title of the user's own\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base in float32 and a finished run over it."""
    home = tmp_path_factory.mktemp("home")
    tiny_model(dtype=torch.float32, attention="sdpa").save_pretrained(home / "base")
    make_tokenizer().save_pretrained(home / "base")
    make_run(home, "run")
    return home


def make_run(home, name, base="base", adapter=None, **record):
    """Leave what `train` leaves of an adapter that has learned something."""
    model = AutoModelForCausalLM.from_pretrained(home / base)
    adapter = adapter or LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = get_peft_model(model, adapter)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    run = home / name
    policy.save_pretrained(run)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(run)
    record = {"method": "mspo", "options": {}} | record
    (run / "run.json").write_text(json.dumps(record))
    (run / "README.md").write_text(CARD)
    sealed = (path for path in run.iterdir() if path.name != "README.md")
    write_manifest(run, {path.name: path for path in sealed})
    return run


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def adapted(run, dtype=torch.float32):
    return logits(load_policy(str(run), trust_remote_code=False, dtype=dtype))


def merge(run, output, **options):
    run_merge(MergeOptions(str(run), str(output), **options))
    return AutoModelForCausalLM.from_pretrained(output)


def fails(run, output):
    with pytest.raises(UsageError) as error:
        run_merge(MergeOptions(str(run), str(output)))
    assert not output.exists() or not any(output.iterdir())
    return str(error.value)


def test_the_merged_model_is_plain_and_says_what_the_adapted_one_says(home, tmp_path, capsys):
    main(["merge", "--run", str(home / "run"), "--output", str(tmp_path / "merged")])
    merged = tmp_path / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged)
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    assert model.dtype == torch.float32
    assert (logits(base) - adapted(home / "run")).abs().max() > 0.1
    assert torch.allclose(logits(model), adapted(home / "run"), atol=1e-5)
    names = {path.name for path in merged.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "chat_template.jinja", "README.md", "run.json", "manifest.json"} == names - {
                "tokenizer_config.json", "special_tokens_map.json"}  # fmt: skip
    assert AutoTokenizer.from_pretrained(merged).chat_template == "{{ messages[0].content }}"
    card = (merged / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "# A title of the user's own" in card
    assert "merged into base" in card
    assert json.loads((merged / "run.json").read_text())["merged"]["dtype"] == "float32"
    assert defect(merged) is None
    assert f"written: {merged}" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.parametrize(
    ("own", "asked", "left"),
    [("bfloat16", None, "bfloat16"), ("bfloat16", "float32", "float32"),
     ("float32", "bfloat16", "bfloat16")],
)  # fmt: skip
def test_the_type_is_the_base_models_or_the_one_asked_for(tmp_path, own, asked, left):
    tiny_model(dtype=getattr(torch, own), attention="sdpa").save_pretrained(tmp_path / "base")
    run = make_run(tmp_path, "run")
    model = merge(run, tmp_path / "merged", dtype=asked)
    assert model.dtype == getattr(torch, left)
    # Every sum is rounded once: the merged weights are those of float32, in the coarser type.
    policy = load_policy(str(run), trust_remote_code=False).merge_and_unload()
    for name, weight in policy.state_dict().items():
        if left == "float32" or own == "float32":
            assert torch.equal(model.state_dict()[name], weight.to(model.dtype)), name
    far = (logits(model) - adapted(run)).abs().max()
    assert far < (1e-5 if left == "float32" else 0.2)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "q_proj"]])
def test_a_tied_head_gets_its_own_weights_where_one_of_the_two_is_adapted(tmp_path, targets):
    base = tiny_model(dtype=torch.float32, attention="sdpa", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    adapter = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    run = make_run(tmp_path, "run", adapter=adapter)
    model = merge(run, tmp_path / "merged")
    assert torch.allclose(logits(model), adapted(run), atol=1e-5)


def test_a_tied_head_stays_tied_under_an_adapter_of_other_layers(tmp_path):
    base = tiny_model(dtype=torch.float32, attention="sdpa", tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    model = merge(make_run(tmp_path, "run"), tmp_path / "merged")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_modules_that_were_trained_whole_come_along(home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "base")
    adapter = LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    run = make_run(tmp_path, "run", adapter=adapter)
    assert torch.allclose(logits(merge(run, tmp_path / "merged")), adapted(run), atol=1e-5)


def test_a_run_over_a_quantized_base_is_merged_into_the_base_in_full_precision(
    home, tmp_path, caplog
):
    shutil.copytree(home / "base", tmp_path / "base")
    run = make_run(
        tmp_path, "run", quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    )
    with caplog.at_level("INFO", "softpref"):
        model = merge(run, tmp_path / "merged")
    assert torch.allclose(logits(model), adapted(run), atol=1e-5)
    assert "trained over a base in 4 bits (NF4), and this base is in full precision" in caplog.text
    assert json.loads((tmp_path / "merged" / "run.json").read_text())["quantization"] is None


def test_a_fine_tuned_adapter_is_merged_and_keeps_what_it_has_seen(home, tmp_path):
    run = tmp_path / "sft"
    shutil.copytree(home / "run", run)
    for name in ("run.json", "manifest.json"):
        (run / name).unlink()
    assert "not a finished run: it has no manifest.json" in fails(run, tmp_path / "merged")
    write_sft_targets(run, ["a"])
    merge(run, tmp_path / "merged")
    assert (tmp_path / "merged" / SFT_TARGETS).read_text() == (run / SFT_TARGETS).read_text()


def test_an_audits_output_is_no_run(tmp_path):
    audit = tmp_path / "audit"
    audit.mkdir()
    (audit / "summary.json").write_text("{}")
    write_manifest(audit, {"summary.json": audit / "summary.json"})
    assert "not a finished run: it has no run.json" in fails(audit, tmp_path / "merged")


def test_runs_that_cannot_be_merged_are_refused(home, tmp_path):
    output = tmp_path / "merged"
    full = tmp_path / "full"
    full.mkdir()
    (full / "run.json").write_text("{}")
    write_manifest(full, {"run.json": full / "run.json"})
    assert "trained all weights, so the directory is a plain model already" in fails(full, output)
    changed = tmp_path / "changed"
    shutil.copytree(home / "run", changed)
    (changed / "run.json").write_text("{}")
    assert "not a finished run: run.json is damaged, or was changed" in fails(changed, output)
    assert "not a finished run" in fails(tmp_path / "nowhere", output)


def test_a_base_that_is_stored_quantized_is_refused(home, tmp_path, monkeypatch):
    load = merging.load_policy

    def quantized(*args, **options):
        policy = load(*args, **options)
        policy.get_base_model().config.quantization_config = {"quant_method": "bitsandbytes"}
        return policy

    monkeypatch.setattr(merging, "load_policy", quantized)
    message = fails(home / "run", tmp_path / "merged")
    assert "stored in quantized form" in message
    assert "set base_model_name_or_path in" in message


@pytest.mark.parametrize(
    "adapter",
    [PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
     LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM")],
    ids=["prompt tuning", "a bias where the base has none"],
)  # fmt: skip
def test_an_adapter_that_peft_cannot_merge_is_refused(home, tmp_path, adapter):
    shutil.copytree(home / "base", tmp_path / "base")
    run = make_run(tmp_path, "run", adapter=adapter)
    message = fails(run, tmp_path / "merged")
    assert message.startswith(f"--run {run}: its adapter cannot be merged (")
    assert "use it as it is, with peft and its base model" in message


def test_weights_beyond_float16_are_refused(tmp_path):
    base = tiny_model(dtype=torch.float32, attention="sdpa")
    with torch.no_grad():
        base.lm_head.weight[0, 0] = 1e6
    base.save_pretrained(tmp_path / "base")
    run = make_run(tmp_path, "run")
    with pytest.raises(UsageError, match="--dtype float16: lm_head.weight holds"):
        run_merge(MergeOptions(str(run), str(tmp_path / "merged"), "float16"))


def test_an_output_that_exists_is_refused_and_a_failed_write_leaves_nothing(
    home, tmp_path, monkeypatch
):
    output = tmp_path / "merged"
    output.mkdir()
    (output / "mine").touch()
    with pytest.raises(UsageError, match="is not empty; choose a new directory"):
        run_merge(MergeOptions(str(home / "run"), str(output)))
    (output / "mine").unlink()
    monkeypatch.setattr(merging, "write_manifest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_merge(MergeOptions(str(home / "run"), str(output)))
    assert not any(output.iterdir())
    (output / ".partial-files").mkdir()  # of a process that was killed
    (output / ".partial-files" / "model.safetensors").write_text("half")
    monkeypatch.undo()
    merge(home / "run", output)
