"""OneRec-Think's parts (arXiv 2510.11639): names and a line each; `parts.py` makes them when a run has chosen them."""

from __future__ import annotations

from rerankkit import Register, hookimpl

PARTS = "rerankkit_onerec_think.parts:"


@hookimpl
def rerankkit_register(register: Register) -> None:
    """Offer everything under the names that configs use."""
    register.teachers.lazy("onerec-think-template", PARTS + "template", "one sentence with the target's category path")
    register.teachers.lazy("onerec-think-self", PARTS + "self_rationale", "the aligned policy says why the target fits")
    register.rewards.lazy("rollout-beam", PARTS + "rollout_beam", "codes of the target that the best of K beams has")
    register.optimizers.lazy("onerec-think", PARTS + "optimizer", "GRPO on rationales, each judged by its beams")
