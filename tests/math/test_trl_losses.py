"""The loss of TRL's GRPOTrainer on the same tensors, called on a stub in place of a trainer. Skipped without TRL.

Both sides get the same log-probabilities, advantages and masks; TRL pads, we do not. Where the definitions part, the
test has both numbers and says why.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rerankkit.math.advantages import group_advantages
from rerankkit.math.losses import PRESETS, LossSettings, policy_loss

pytest.importorskip("trl", reason="TRL's losses: pip install trl==1.16.0")
if not version("trl").startswith("1.16."):
    pytest.skip(f"the stub stands in for the trainer of TRL 1.16, not {version('trl')}", allow_module_level=True)

LENGTHS = torch.tensor([1, 3, 2, 5, 4, 2, 3, 1])  # two prompts, four samples each
MASK = torch.arange(5) < LENGTHS[:, None]  # [8, 5]
MAX_LENGTH = 10


def drawn(seed: int) -> dict[str, Tensor]:
    """[8, 5] each: ratios between about .3 and 3, so that every clip is in force somewhere."""
    dice = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(8, 5, generator=dice, dtype=torch.float64)

    logps = -noise().abs() - 0.1
    return {"logps": logps, "old": logps + 0.7 * noise(), "ref": logps + 0.5 * noise(), "entropies": noise().abs()}


REWARDS = torch.tensor([[1.0, 0.0, 0.25, 0.0], [0.5, 0.75, 0.0, 1.0]], dtype=torch.float64)
ADVANTAGES = group_advantages(REWARDS).values.flatten()


def trl_loss(values: Mapping[str, Tensor], mask: Tensor, advantages: Tensor, **settings: Any) -> tuple[Tensor, Any]:
    """TRL's loss, and what it logs. Every field it reads is given: its defaults have changed before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grpo: Any = import_module("trl.trainer.grpo_trainer")

    plain: dict[str, Any] = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_LENGTH,
        "entropy_coef": 0.0,
        "use_adaptive_entropy": False,
        "model": SimpleNamespace(training=True),
        "_metrics": defaultdict(lambda: defaultdict(list)),
    }
    arguments = SimpleNamespace(use_bias_correction_kl=False, delta=settings.pop("delta", None), steps_per_generation=1)
    trainer = SimpleNamespace(
        **{**plain, **settings},
        args=arguments,
        _entropy_bonus_enabled=bool(settings.get("entropy_coef")),
        _get_per_token_logps_and_entropies=lambda *_, **__: (values["logps"], values["entropies"], None),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
    )
    ids = torch.zeros(8, 5, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": values["old"], "ref_per_token_logps": values["ref"],
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return grpo.GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["train"]


def our_loss(
    values: Mapping[str, Tensor], settings: LossSettings, advantages: Tensor, keep: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    flat = {name: value[MASK] for name, value in values.items()}
    return policy_loss(
        flat["logps"], flat["old"], torch.arange(8).repeat_interleave(LENGTHS), advantages, settings,
        keep=keep, ref_logps=flat["ref"], entropies=flat["entropies"],
    )  # fmt: skip


DR_GRPO = replace(PRESETS["dr-grpo"], constant=float(MAX_LENGTH))
SAME: dict[str, tuple[LossSettings, dict[str, Any]]] = {
    "grpo": (PRESETS["grpo"], {"loss_type": "grpo", "epsilon_high": 0.2}),
    "grpo with KL": (
        replace(PRESETS["grpo"], kl_weight=0.3),
        {"loss_type": "grpo", "epsilon_high": 0.2, "beta": 0.3},
    ),
    "dapo": (PRESETS["dapo"], {"loss_type": "dapo"}),
    "dapo, dual clip": (replace(PRESETS["dapo"], clip_dual=1.4), {"loss_type": "dapo", "delta": 1.4}),
    "dapo, KL and entropy": (
        replace(PRESETS["dapo"], kl_weight=0.3, entropy_weight=0.02),
        {"loss_type": "dapo", "beta": 0.3, "entropy_coef": 0.02},
    ),
    "dr-grpo": (DR_GRPO, {"loss_type": "dr_grpo", "epsilon_high": 0.2}),
    # TRL's GSPO is a level of loss type "grpo"
    "gspo": (
        PRESETS["gspo"],
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    ),
    "gspo, wide clip": (
        replace(PRESETS["gspo"], clip_low=0.3, clip_high=0.4),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.3, "epsilon_high": 0.4},
    ),
    # TRL's epsilon_high is the bound itself here: 1 + clip_high. It has no lower bound, nor has ours at clip_low = 1.
    "cispo": (replace(PRESETS["cispo"], clip_high=0.3), {"loss_type": "cispo", "epsilon_high": 1.3}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SAME)
def test_loss_and_gradient_are_trls(name: str, seed: int) -> None:
    settings, theirs = SAME[name]
    pairs: list[tuple[Tensor, list[Tensor], Any]] = []
    calls: list[Callable[[dict[str, Tensor]], tuple[Tensor, Any]]] = [
        lambda values: our_loss(values, settings, ADVANTAGES),
        lambda values: trl_loss(values, MASK, ADVANTAGES, **theirs),
    ]
    for call in calls:
        values = drawn(seed)
        values["logps"].requires_grad_()
        values["entropies"].requires_grad_()
        loss, log = call(values)
        torch.autograd.backward(loss)
        gradients = [values[key].grad for key in ("logps", "entropies")]
        pairs.append((loss, [torch.zeros_like(MASK, dtype=loss.dtype) if g is None else g for g in gradients], log))
    (ours, our_grads, our_log), (trls, trl_grads, trl_log) = pairs
    assert ours.item() == pytest.approx(trls.item(), abs=1e-14)
    torch.testing.assert_close(our_grads, trl_grads, rtol=0, atol=1e-14)
    assert bool(our_grads[0].any())
    if theirs["loss_type"] != "cispo" and settings.ratio == "token":
        for key in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
            assert our_log[key] == pytest.approx(trl_log[key][0])
        assert our_log["clip_ratio/low_mean"] + our_log["clip_ratio/high_mean"] > 0
    if settings.kl_weight:
        assert our_log["kl"] == pytest.approx(trl_log["kl"][0])


def test_what_does_not_count_stays_in_trls_denominator() -> None:
    """The second group is without variance, so its advantages are 0: TRL divides by it all the same, we do not."""
    advantages = torch.cat([ADVANTAGES[:4], torch.zeros(4, dtype=torch.float64)])
    keep = torch.arange(8) < 4
    shares = {
        "grpo": 4 / 8,  # rollouts
        "dapo": LENGTHS[:4].sum().item() / LENGTHS.sum().item(),  # tokens: 11 of 21
        "dr-grpo": 4 / 8,
    }
    for name, share in shares.items():
        settings, theirs = SAME[name]
        ours = our_loss(drawn(0), settings, advantages, keep)[0]
        trls = trl_loss(drawn(0), MASK, advantages, **theirs)[0]
        assert trls.item() == pytest.approx(ours.item() * share, abs=1e-14)


def test_a_truncated_rollout_stays_in_trls_mean_over_rollouts() -> None:
    """TRL masks its tokens: they leave the tokens that `dapo` divides by, but `grpo` still counts the rollout."""
    keep = torch.arange(8) != 3
    for name, share in {"dapo": 1.0, "grpo": 7 / 8, "dr-grpo": 7 / 8}.items():
        settings, theirs = SAME[name]
        ours = our_loss(drawn(1), settings, ADVANTAGES, keep)[0]
        trls = trl_loss(drawn(1), MASK & keep[:, None], ADVANTAGES, **theirs)[0]
        assert trls.item() == pytest.approx(ours.item() * share, abs=1e-14)


def test_trls_entropy_bonus_is_a_mean_over_tokens_whatever_the_loss() -> None:
    """Ours is aggregated as the loss is: they agree under "token" alone."""
    settings, theirs = SAME["grpo"]
    values = drawn(2)
    ours = (
        our_loss(values, replace(settings, entropy_weight=1.0), ADVANTAGES)[0]
        - our_loss(values, settings, ADVANTAGES)[0]
    )
    trls = (
        trl_loss(values, MASK, ADVANTAGES, **theirs, entropy_coef=1.0)[0]
        - trl_loss(values, MASK, ADVANTAGES, **theirs)[0]
    )
    means = [row[kept].mean().item() for row, kept in zip(values["entropies"], MASK, strict=True)]
    assert ours.item() == pytest.approx(-sum(means) / 8)
    assert trls.item() == pytest.approx(-values["entropies"][MASK].mean().item())
