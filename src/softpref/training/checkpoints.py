"""Checkpoints in safetensors and JSON that are complete or do not exist.

transformers' Trainer pickles optimizer, scheduler, random states and arguments, file by file into
the final directory. `SafeCheckpoints` overrides the hooks that do so; docs/adr/0003-checkpoints.md
says why. Beside what `save_pretrained` writes, a checkpoint holds

    optimizer, scheduler, scaler, rng, extra, identity   NAME.json; NAME.safetensors for tensors
    trainer_state.json, training_args.json               as transformers defines them
    manifest.json                                        size and sha256 of all the other files
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils.import_utils import is_sagemaker_mp_enabled, is_torch_xla_available

from softpref.algorithm.gradients.shards import is_sharded, trains_shards, without_shards
from softpref.algorithm.policy import trainable
from softpref.algorithm.ranks import Ranks
from softpref.errors import UsageError
from softpref.hub import create_repository
from softpref.models.sharding import refuse_engines
from softpref.models.weights import PICKLED
from softpref.training import interrupts
from softpref.training.drift import require_same_start
from softpref.training.identity import refuse_other_run
from softpref.training.running_loss import ResumedLoss, running_loss
from softpref.training.saving import SHARDS, in_layout_of, load_weights, save_model, save_shards
from softpref.training.seals import PARTIAL, defect, publish, put_aside
from softpref.training.states import (
    JSON,
    random_state,
    read_state,
    restore_random_state,
    state_to_tensors,
    tensors_to_state,
    write_state,
)

LOSS = "running loss"

logger = logging.getLogger(__name__)


def newest_complete(directory: str | Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """Find the checkpoint to resume from.

    Args:
        directory: a run's output directory; it need not exist.

    Returns:
        The complete checkpoint with the highest step, or None, and those of a higher step that are
        not complete, each with the reason.
    """
    skipped: list[tuple[Path, str]] = []
    for checkpoint in reversed(_checkpoints(Path(directory))):
        reason = _defect(checkpoint)
        if reason is None:
            return checkpoint, skipped
        skipped.append((checkpoint, reason))
    return None, skipped


class SafeCheckpoints(Trainer):
    """A Trainer that never pickles, and whose checkpoints survive a crash at any moment.

    It comes first among the bases: `class SoftprefSFTTrainer(SafeCheckpoints, SFTTrainer)`. What
    else a subclass must save goes through `extra_state`, `load_extra_state` and `identity`. On a
    CPU in float32, resumed training equals uninterrupted training bit for bit, but where several
    processes draw dropout: the random state is the first one's. Construction raises
    UsageError for what could not be saved so: sharded models and the like, several processes unless
    the subclass `shares_steps`.
    """

    shares_steps = False
    """Whether several processes may do a step together, all with the same numbers at its end."""
    takes_shards = False
    """Whether the model may lie in shards."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_engines(self.args)
        self.ranks = Ranks.here(self.args.device)
        self._resumed_loss = ResumedLoss(self)
        model = self._unwrapped()
        pushes = self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END
        unsupported = {
            "XLA": is_torch_xla_available(),
            "SageMaker model parallelism": is_sagemaker_mp_enabled(),
            "a model sharded at load time": is_sharded(model) and not self.takes_shards,
            "training in several processes": self.ranks.count > 1 and not self.shares_steps,
            "several GPUs in one process (set CUDA_VISIBLE_DEVICES=0)": self.args.n_gpu > 1,
            "a model without save_pretrained": not isinstance(model, PreTrainedModel | PeftModel),
            "pushing every checkpoint to the hub (other than hub_strategy='end')": pushes,
        }
        for name, is_used in unsupported.items():
            if is_used:
                raise UsageError(f"{name} is not supported: checkpoints could not be saved safely.")

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, JSON]]:
        """Return what else an exact resume needs: tensors and plain values."""
        return {}, {}

    def load_extra_state(self, tensors: dict[str, Tensor], values: dict[str, JSON]) -> None:
        """Restore what `extra_state` returned, once optimizer and scheduler are restored."""

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository to push to, before training rather than after it."""
        if self.is_world_process_zero():
            args = self.args
            name = args.hub_model_id or Path(str(args.output_dir)).absolute().name
            is_private = args.hub_private_repo if private is None else private
            repo = create_repository(name, "model", is_private, token or args.hub_token)
            self.hub_model_id = repo  # type: ignore[assignment]  # declared to be None
            self.push_in_progress = None

    def trained_tensors(self) -> list[Tensor]:
        """Return all weights that optimizers move; a run ends if one is not finite after a step."""
        return [*trainable(cast(nn.Module, self.model))]

    def identity(self) -> dict[str, JSON]:
        """Return what must not change when a run resumes: method, beta, data, ..."""
        return {}

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train as `Trainer.train` does, from the start or from a complete checkpoint.

        With `resume_from_checkpoint=True` this is the newest one in `output_dir`; damaged ones are
        skipped with a warning.

        Raises:
            UsageError: there is no complete checkpoint, the one asked for is damaged or holds
                the model alone, or it has another `identity`.
            SystemExit: SIGTERM came; a checkpoint of the last step was saved.
        """
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            self._refuse_other_run(checkpoint)
        told = json.dumps([str(checkpoint and checkpoint.name), self.identity()], default=str)
        require_same_start(self.ranks, "the run", told)
        end = interrupts.SaveOnTerm(self.ranks)
        callbacks = (
            end,
            self._resumed_loss,
            interrupts.EndAtLastStep(),
            interrupts.FiniteWeights(self.trained_tensors),
        )
        for callback in callbacks:
            self.add_callback(callback)
        start = str(checkpoint) if checkpoint else None
        try:
            with end.listening():
                done = super().train(start, trial, ignore_keys_for_eval)
        except interrupts.NoStepLeft:
            self._load_rng_state(start)
            loss = self._resumed_loss.mean(self.state.global_step)
            self.log({"train_loss": loss})
            self.callback_handler.on_train_end(self.args, self.state, self.control)
            self.is_in_train = False
            done = TrainOutput(self.state.global_step, loss, {})
        for callback in callbacks:
            self.remove_callback(callback)
        if end.was_asked and self.state.global_step < self.state.max_steps:
            saved = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            # Where the signal came after this step's own saving.
            is_unsaved = self.ranks.is_first and bool(_defect(saved))
            if self.ranks.any(flag=is_unsaved):
                self._total_loss_scalar -= float(self._tr_loss)  # which the end has added
                self._save_checkpoint(cast(nn.Module, self.model), trial)
            step = self.state.global_step
            logger.info(f"ended by SIGTERM after step {step}; run the same command to resume")
            raise SystemExit(interrupts.TERMINATED)
        return done

    def _checkpoint(self, resume_from_checkpoint: str | bool | None) -> Path | None:
        if resume_from_checkpoint is True:
            checkpoint, skipped = newest_complete(str(self.args.output_dir))
            for path, reason in skipped:
                logger.warning("%s is skipped: %s", path, reason)
            if checkpoint is None:
                found = "".join(f"; {path.name}: {reason}" for path, reason in skipped)
                raise UsageError(
                    f"{self.args.output_dir}: no complete checkpoint to resume from{found}. "
                    "Leave resume_from_checkpoint out to start from the beginning."
                )
            return checkpoint
        if not resume_from_checkpoint:
            return None
        checkpoint = Path(resume_from_checkpoint)
        if defect := _defect(checkpoint):
            raise UsageError(
                f"{checkpoint}: cannot resume, {defect}. Name a complete checkpoint, or take the "
                "newest complete one with resume_from_checkpoint=True."
            )
        return checkpoint

    def _refuse_other_run(self, checkpoint: Path) -> None:
        if not (checkpoint / "optimizer.json").exists():
            raise UsageError(
                f"{checkpoint}: cannot resume, it was written with save_only_model=True and holds "
                "no optimizer state. Start a new run with it as the model."
            )
        refuse_other_run(checkpoint, self.identity(), self.args)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        state = self.state
        self.store_flos()
        directory = Path(str(self.args.output_dir))
        final = directory / f"checkpoint-{state.global_step}"
        best = directory / f"checkpoint-{state.best_global_step}"
        if state.best_global_step and (best == final or best.is_dir()):
            state.best_model_checkpoint = str(best)
        loss = running_loss(self, self.ranks)
        partial = directory / f"{PARTIAL}{final.name}"
        if self.ranks.is_first:
            for leftover in directory.glob(f"{PARTIAL}*"):
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        if trains_shards(self._unwrapped()):
            self.ranks.wait()
            self._save_shards(partial)
        if self.ranks.is_first:
            self._write_checkpoint(partial, final, loss)
        self.ranks.wait()

    def _save_shards(self, partial: Path) -> None:
        """Save trained shards, which takes all processes: gathered if only the model is wanted."""
        if self.args.save_only_model:
            self.save_model(str(partial), _internal_call=True)
            return
        of_optimizer, _ = state_to_tensors(cast(Any, self.optimizer).state_dict())
        save_shards(partial / SHARDS, dict(self._unwrapped().named_parameters()) | of_optimizer)

    def _write_checkpoint(self, partial: Path, final: Path, loss: dict[str, JSON]) -> None:
        state = self.state
        if not trains_shards(self._unwrapped()):
            self.save_model(str(partial), _internal_call=True)
        elif not self.args.save_only_model:
            self._save_beside_model(partial)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            tensors, values = self.extra_state()
            write_state(partial, "extra", tensors, values | {LOSS: loss})
        write_state(partial, "identity", {}, self.identity())
        stateful: list[Any] = [*self.callback_handler.callbacks, self.control]
        stateful = [callback for callback in stateful if isinstance(callback, ExportableState)]
        state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks
        state.save_to_json(str(partial / "trainer_state.json"))

        publish(partial, final)
        self._rotate(final.parent, final)

    def _rotate(self, directory: Path, newest: Path) -> None:
        limit = self.args.save_total_limit
        if limit is None or limit <= 0:
            return
        kept = {newest, Path(self.state.best_model_checkpoint or newest)}
        others = [path for path in _checkpoints(directory) if path not in kept]
        surplus = len(others) + len(kept) - limit
        for path in others[: max(surplus, 0)]:
            shutil.rmtree(put_aside(path))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model, writes = self._unwrapped(), self.args.should_save
        if not writes and not trains_shards(model):
            return
        directory = Path(output_dir or str(self.args.output_dir))
        if is_sharded(model) and not trains_shards(model):
            # Else PEFT would gather the base, and wait for the other processes.
            state_dict = {name: p for name, p in model.named_parameters() if p.requires_grad}
        save_model(model, directory, state_dict, writes=writes)
        if writes:
            self._save_beside_model(directory)

    def _unwrapped(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _save_beside_model(self, directory: Path) -> None:
        if self.processing_class is not None:
            self.processing_class.save_pretrained(directory)
        arguments = json.dumps(self.args.to_dict(), indent=2, default=str)
        (directory / "training_args.json").write_text(arguments, encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        for name, part in (("optimizer", self.optimizer), ("scheduler", self.lr_scheduler)):
            assert part is not None
            tensors, values = state_to_tensors(part.state_dict())
            write_state(Path(output_dir), name, without_shards(tensors), values)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if isinstance(self._unwrapped(), PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(Path(resume_from_checkpoint), self._unwrapped())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        for name, part in (("optimizer", self.optimizer), ("scheduler", self.lr_scheduler)):
            assert part is not None
            tensors, values = read_state(Path(checkpoint), name)
            if name == "optimizer":
                trained = [p for group in cast(Any, part).param_groups for p in group["params"]]
                tensors = in_layout_of(trained, tensors, values, Path(checkpoint))
            part.load_state_dict(tensors_to_state(tensors, values))
        tensors, values = read_state(Path(checkpoint), "extra")
        self._resumed_loss.before = values.pop(LOSS, None)
        self.load_extra_state(tensors, values)

    def _save_scaler(self, output_dir: str) -> None:
        if (scaler := self.accelerator.scaler) is not None:
            write_state(Path(output_dir), "scaler", *state_to_tensors(scaler.state_dict()))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is None or (scaler := self.accelerator.scaler) is None:
            return
        scaler.load_state_dict(tensors_to_state(*read_state(Path(checkpoint), "scaler")))

    def _save_rng_state(self, output_dir: str) -> None:
        state = random_state(self.args.device)
        write_state(Path(output_dir), "rng", *state_to_tensors(state))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = tensors_to_state(*read_state(Path(checkpoint), "rng"))
        restore_random_state(state, self.args.device)

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if reason := _defect(Path(best)):
            raise UsageError(
                f"{best}: the best model cannot be loaded, {reason}. "
                "Training is complete: use the newest checkpoint, or train again."
            )
        if isinstance(self._unwrapped(), PeftModel):
            super()._load_best_model()
        else:
            load_weights(Path(best), self._unwrapped())


def _checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint directories of a run, complete or not, by increasing step."""
    start = len("checkpoint-")
    found = directory.glob("checkpoint-*")
    numbered = [path for path in found if path.is_dir() and path.name[start:].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name[start:]))


def _defect(checkpoint: Path) -> str | None:
    """Return why a directory is not a complete checkpoint, or None if it is one."""
    if not checkpoint.is_dir():
        return "it is not a directory"
    if reason := defect(checkpoint):
        return reason
    paths = (path for path in checkpoint.rglob("*") if path.is_file())
    if pickled := [path.name for path in paths if path.suffix in PICKLED]:
        return f"it holds {pickled[0]}, which may be a pickle and is never read"
    return None
