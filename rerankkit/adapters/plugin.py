"""Other libraries' reward functions, by name in a config: registered like anybody's parts."""

from __future__ import annotations

from rerankkit.plugins import Register, hookimpl


@hookimpl
def rerankkit_register(register: Register) -> None:
    """Offer them under the names that configs use."""
    parts = "rerankkit.adapters.parts:"
    register.rewards.lazy("trl", parts + "trl", "a TRL reward function of yours, by module:function")
    register.rewards.lazy("verifiers", parts + "verifiers", "a verifiers rubric function of yours, likewise")
    register.rewards.lazy("verl", parts + "verl", "a verl compute_score function of yours, likewise")
