"""Every option of `train` and `sft` is part of a run's identity, or known not to be."""

from __future__ import annotations

from dataclasses import fields

from softpref.algorithm.methods import METHODS
from softpref.options import facts_of
from softpref.training.align import AlignFiles
from softpref.training.config import MSPOConfig
from softpref.training.conflicts import FIXED
from softpref.training.identity import IDENTITY, SFT_IDENTITY
from softpref.training.sft import SFTFiles, SFTOptions

BY_OTHER_MEANS = """
model train clean mix prompt_column chosen_column rejected_column system_column on_bad_row
per_device_train_batch_size gradient_accumulation_steps recipe eval output output_dir
resume_from_checkpoint force warmup_ratio
""".split()  # noqa: SIM905  # pairs, policy, size of a step, an old name of warmup_steps; or of no step
HOW_IT_IS_COMPUTED = """
engine keep_budget_gib layout shard bf16_full_eval fp16_full_eval tf32 activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache
torch_empty_cache_steps full_determinism use_cpu accelerator_config parallelism_config
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
remove_unused_columns label_names length_column_name ddp_find_unused_parameters ddp_bucket_cap_mb
ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed local_rank
trust_remote_code reference_cache max_skipped_steps skip_memory_metrics activation_offloading
pad_to_multiple_of padding_free model_init_kwargs dataset_num_proc
""".split()  # noqa: SIM905
WHAT_IS_SAID_AND_KEPT = """
logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy
save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token
hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision metric_for_best_model
greater_is_better restore_callback_states_from_checkpoint debug do_train do_eval do_predict
label_pairs dry_run logging_dir
""".split()  # noqa: SIM905
NOT_OF_SFT = """
chat_template_path dataset_text_field dataset_kwargs eval_packing completion_only_loss
load_best_model_at_end torch_compile include_num_input_tokens_seen auto_find_batch_size
""".split()  # noqa: SIM905  # pairs come tokenized, and the chat template is part of what identifies them
OTHERS = {*BY_OTHER_MEANS, *HOW_IT_IS_COMPUTED, *WHAT_IS_SAID_AND_KEPT}


def names(*options):
    return {field.name for option in options for field in fields(option) if field.init}


def test_every_option_of_train_is_classed():
    of_train = names(AlignFiles, MSPOConfig)
    fixed = FIXED.keys() | {"average_tokens_across_devices"}  # its steps are not transformers'
    assert of_train - {*IDENTITY} - OTHERS - fixed == set()
    assert {*IDENTITY} & (OTHERS | fixed) == set()
    assert {*IDENTITY} <= of_train


def test_every_option_of_sft_is_classed():
    of_sft = names(SFTFiles, SFTOptions)
    own = {"lora_r", "load_in_4bit", "load_in_8bit"}  # of the trainer's own, and of the model's
    known = {*SFT_IDENTITY, *NOT_OF_SFT, *own} | OTHERS
    assert of_sft - known == set()
    assert {*SFT_IDENTITY} & OTHERS == set()


def test_options_name_the_methods_that_read_them():
    """What a method needs and what its options say must not come apart."""
    readers = {name: facts.get("read_by") for name, facts in facts_of(MSPOConfig).items()}
    assert {method for names in readers.values() for method in names or ()} <= METHODS.keys()
    taught = {name for name, method in METHODS.items() if method.teaches}
    assert set(readers["meta_every"]) == taught
    knows_rate = {name for name, method in METHODS.items() if "noise_rate" in method.needs}
    assert set(readers["noise_rate"]) == taught | knows_rate
