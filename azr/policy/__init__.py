"""A 4-bit base with its LoRA adapter: load, sample, score.

from azr.policy import Policy, Sampling, LoraSettings
"""

HOME = {"Policy": "policy", "LoraSettings": "load", "Sampling": "sampling"}


def __getattr__(name: str):
    """The three names above, imported when they are asked for: torch takes seconds, and the planner needs none."""
    import importlib

    if name not in HOME:
        raise AttributeError(f"azr.policy has no {name}")
    return getattr(importlib.import_module(f"{__name__}.{HOME[name]}"), name)
