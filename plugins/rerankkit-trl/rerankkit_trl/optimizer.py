"""A PolicyOptimizer on TRL's GRPOTrainer.

The trainer runs in a thread of its own and stands still while a report is with the caller, who may stop it there, save
the policy or look at it. Rollouts are ours, through TRL's `rollout_func`: structured, decoded and judged as everywhere
in rerankkit; TRL gets token ids and rewards, and does advantages, loss and updates.
"""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from queue import Queue
from statistics import fmean
from threading import Semaphore, Thread
from typing import Any

import torch
from datasets import Dataset
from rerankkit import (
    Failed,
    Outcome,
    RerankExample,
    Reward,
    RewardFn,
    Rollout,
    RunFailed,
    RunInfo,
    StepReport,
    UsageError,
)
from rerankkit.lm import Policy, ask, resumable_steps
from rerankkit.lm.policy import quiet
from rerankkit.processes import count
from rerankkit.text.prompts import rerank_messages
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rerankkit_trl.plugin import TrlConfig

REWARD = "rerankkit_reward"
"""The column by which a rollout's reward goes through TRL."""


_RECOMPUTES = (
    "activation_checkpointing" if hasattr(GRPOConfig, "activation_checkpointing") else "gradient_checkpointing"
)
"""Its name in the transformers that is installed."""


@dataclass(frozen=True)
class TrlOptimizer:
    """GRPOTrainer under rerankkit's contract: a report a step, and continued from its own checkpoint."""

    config: TrlConfig

    def optimize(
        self, policy: Policy, examples: Sequence[RerankExample], reward: RewardFn, info: RunInfo
    ) -> Iterator[StepReport]:
        """Yields a report a step. Raises UsageError on several processes, which accelerate would start over again."""
        c = self.config
        if count() > 1:
            raise UsageError('optimizer.use = "trl" runs in one process; take "dapo" or "grpo" for several.')
        trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=c.learning_rate, betas=(0.9, 0.99), weight_decay=c.weight_decay)
        with tempfile.TemporaryDirectory() as scratch, _left_alone(policy), quiet():
            if c.beta:  # TRL takes its reference from where the model says it is from
                policy.save(Path(scratch) / "start")
                policy.model.config.name_or_path = str(Path(scratch) / "start")
            steps = resumable_steps(policy, optimizer, c.steps, info, what="TRL", checkpoint_every=c.checkpoint_every)
            if (first := next(steps, None)) is None:
                return
            batch = _Batches(c, policy, examples, reward, info, first - 1)
            trainer = _trainer(policy, trainer_fields(c, info, c.steps - first + 1, Path(scratch)), optimizer, batch)
            reports = _Reports(trainer, batch)
            try:
                for _ in chain([first], steps):
                    yield reports.next()
            finally:
                reports.stop()
        policy.model.eval()


def trainer_fields(c: TrlConfig, info: RunInfo, steps: int, scratch: Path) -> dict[str, Any]:
    """Every field of GRPOConfig that matters: defaults have changed between versions, and change what is trained."""
    on_cpu = info.device.startswith("cpu")
    return {
        # how much
        "max_steps": steps * c.num_iterations,
        "per_device_train_batch_size": c.groups_per_pass * c.group_size,
        "gradient_accumulation_steps": c.prompts_per_step // c.groups_per_pass,
        "steps_per_generation": c.prompts_per_step // c.groups_per_pass,
        "generation_batch_size": None,
        "num_generations": c.group_size,
        "num_generations_eval": None,
        "num_iterations": c.num_iterations,
        # the loss
        "loss_type": c.loss_type,
        "importance_sampling_level": c.importance_sampling_level,
        "epsilon": c.epsilon,
        "epsilon_high": c.epsilon_high,
        "delta": None,
        "beta": c.beta,
        "use_bias_correction_kl": False,
        "sync_ref_model": False,
        "scale_rewards": c.scale_rewards,
        "reward_weights": None,
        "multi_objective_aggregation": "sum_then_normalize",
        "mask_truncated_completions": c.mask_truncated_completions,
        "top_entropy_quantile": 1.0,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "off_policy_mask_threshold": None,
        "router_aux_loss_coef": 0.0,
        # the model
        "disable_dropout": False,
        "cast_lm_head_to_fp32": False,
        "model_init_kwargs": None,
        "trust_remote_code": False,
        "bf16": info.precision == "bfloat16",
        "fp16": False,
        _RECOMPUTES: False,  # `policy.gradient_checkpointing` has seen to it
        "use_liger_kernel": False,
        "torch_compile": False,
        "use_cpu": on_cpu,
        # sampling: ours, but the loss is computed at its temperature
        "temperature": c.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "max_completion_length": c.max_new_tokens,
        "generation_kwargs": None,
        "chat_template_kwargs": None,
        "cache_implementation": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "use_transformers_continuous_batching": False,
        "ds3_gather_for_generation": True,
        "max_tool_calling_iterations": None,
        "pad_to_multiple_of": None,
        # the steps; optimizer and schedule are handed over
        "learning_rate": c.learning_rate,
        "weight_decay": c.weight_decay,
        "max_grad_norm": c.max_grad_norm,
        "label_smoothing_factor": 0.0,
        "neftune_noise_alpha": None,
        # data: which examples a step takes is ours
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": not on_cpu,
        "seed": info.seed,
        "data_seed": info.seed,
        # nothing is saved, logged or sent by TRL itself
        "output_dir": str(scratch),
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "push_to_hub": False,
        "log_completions": False,
        "log_multimodal": False,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_first_step": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }


@dataclass
class _Batches:
    """TRL's rollout function: which examples a step takes, what the policy says to them, and what that is worth."""

    config: TrlConfig
    policy: Policy
    examples: Sequence[RerankExample]
    reward: RewardFn
    info: RunInfo
    done: int
    judged: list[tuple[Rollout, Outcome]] = field(default_factory=list)
    """The latest batch."""
    step: int = 0

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """One row for each of `prompts`, which only say how many."""
        c = self.config
        self.step = self.done + trainer.state.global_step // c.num_iterations + 1
        dice = random.Random(f"{self.info.seed} trl {self.step}")
        torch.manual_seed(dice.getrandbits(63))  # TRL shuffles the rows of a batch by torch's own dice
        # a small data set is gone through several times
        pool = list(self.examples) * -(-c.prompts_per_step // len(self.examples))
        rollouts = ask(
            self.policy,
            dice.sample(pool, c.prompts_per_step),
            group_size=c.group_size,
            max_new_tokens=c.max_new_tokens,
            temperature=c.temperature,
            info=self.info,
            salt=f"step {self.step}",
            constrain=c.constrain,
        )
        outcomes = list(self.reward(rollouts))
        if all(isinstance(outcome, Failed) for outcome in outcomes):
            raise RunFailed(f"reward: no rollout of step {self.step} could be judged; first reason: {outcomes[0]}")
        if len(prompts) != len(rollouts):
            raise RunFailed(f"TRL asked for {len(prompts)} rollouts in a batch of {len(rollouts)}.")
        self.judged = list(zip(rollouts, outcomes, strict=True))
        return {
            "prompt_ids": [_prompt_ids(self.policy, rollout.example) for rollout in rollouts],
            "completion_ids": [list(rollout.token_ids) for rollout in rollouts],
            "logprobs": [list(rollout.logps) for rollout in rollouts],
            # 0 takes a token out of the loss
            "env_mask": [
                [int(allowed is None or len(allowed) > 1) for allowed in rollout.allowed_ids]
                or [1] * len(rollout.token_ids)
                for rollout in rollouts
            ],
            REWARD: [outcome.value if isinstance(outcome, Reward) else None for outcome in outcomes],
        }


def judged_value(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """TRL's reward function: what our reward has said already. None takes a rollout out of its group."""
    values: list[float | None] = columns[REWARD]
    return values


class _Reports(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """The trainer's thread, and the reports that it hands over one by one."""

    def __init__(self, trainer: Any, batches: _Batches) -> None:
        self.trainer, self.batches = trainer, batches
        self.ready: Queue[StepReport | BaseException | None] = Queue(1)
        self.go_on = Semaphore(0)
        self.stopped = False
        self.logs: list[Mapping[str, Any]] = []
        self.threads = torch.get_num_threads()
        self.thread = Thread(target=self._run, name="trl", daemon=True)
        trainer.add_callback(self)

    def next(self) -> StepReport:
        """The report of the next step; raises what the trainer raised."""
        if self.thread.ident is None:
            self.thread.start()
        else:
            self.go_on.release()
        found = self.ready.get()
        if isinstance(found, BaseException):
            raise found
        if found is None:
            raise RunFailed(f"TRL ended after step {self.batches.step}, before it had done them all.")
        return found

    def stop(self) -> None:
        """End the thread, wherever it is."""
        self.stopped = True
        self.go_on.release()
        if self.thread.ident is not None:
            self.thread.join()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """After every optimizer step: when all on one batch are done, report it, and wait."""
        if "loss" not in (logs or {}):  # TRL's summary at the end
            return
        self.logs.append(dict(logs))
        if len(self.logs) < self.batches.config.num_iterations:
            return
        judged, metrics = tuple(self.batches.judged), _joined(self.logs)
        self.logs = []
        self.ready.put(StepReport(self.batches.step, metrics, tuple(r for r, _ in judged), tuple(o for _, o in judged)))
        self.go_on.acquire()
        if self.stopped:
            control.should_training_stop = True

    def _run(self) -> None:
        torch.set_num_threads(self.threads)  # a thread may begin with as many as there are cores
        try:
            self.trainer.train()
            self.ready.put(None)
        except BaseException as caught:  # handed to the caller's thread, which raises it
            self.ready.put(caught)


def _trainer(
    policy: Policy, fields: Mapping[str, Any], optimizer: torch.optim.Optimizer, batches: _Batches
) -> GRPOTrainer:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
        trainer = GRPOTrainer(
            model=policy.model,
            reward_funcs=judged_value,
            args=GRPOConfig(**fields),
            train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(batches.config.prompts_per_step)]}),
            processing_class=copy.deepcopy(policy.text_tokenizer),  # TRL may give it a pad token
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
            rollout_func=batches,
        )
    trainer.eos_token_ids = sorted(policy.stop_ids)  # what ends an answer: TRL takes others for truncated
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _left_alone(policy: Policy) -> Iterator[None]:
    """Take back what TRL does to a model besides training it: its forward, its pad token, where it is from."""
    model, source = policy.model, policy.model.config.name_or_path
    configs = [config for config in (model.config, getattr(model, "generation_config", None)) if config is not None]
    pads, before = [config.pad_token_id for config in configs], dict(vars(model))
    try:
        yield
    finally:
        model.config.name_or_path = source
        for config, pad in zip(configs, pads, strict=True):
            config.pad_token_id = pad
        for name in ("forward", "_original_forward"):
            if name in before:
                setattr(model, name, before[name])
            else:
                vars(model).pop(name, None)


def _prompt_ids(policy: Policy, example: RerankExample) -> list[int]:
    return policy.prompt_ids(rerank_messages(example, policy.surface, policy.style))


def _joined(logs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the optimizer steps of a batch, of what is a number."""
    kept: dict[str, list[float]] = {}
    for log in logs:
        for name, value in log.items():
            if isinstance(value, int | float) and not name.startswith(("rewards/judged_value", "tools/", "epoch")):
                kept.setdefault(name, []).append(float(value))
    return {name: fmean(values) for name, values in kept.items()}
