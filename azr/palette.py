"""One colour and one marker for everything that several plots show: models, roles, modes, and arms of training.

    style("deduction")          # Style(color="#E69F00", marker="^"), in every figure
    series(3)                   # what has no name here: runs, reasons, phases, by their numbers
    arm_of(config)              # "joint", "rlvr", "frozen-base", ...: what a run did, from its config.json

The colours are those of Okabe and Ito (2008, jfly.uni-koeln.de/color), which colour-blind readers tell apart, and for
lines grey in the place of their yellow, which is too pale on white. There are more names than colours, so a name is a
PAIR of colour and marker, and what shares a figure (the modes, the roles, base and tuned, the arms of one kind) differs
in both. Nothing is imported, so the file can be lifted out as it is.
"""

from __future__ import annotations

from typing import NamedTuple


class Style(NamedTuple):
    """What a line or a point is drawn with, in matplotlib's words."""

    color: str
    marker: str


BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, GRAY = "#CC79A7", "#56B4E9", "#000000", "#777777"
YELLOW = "#F0E442"  # for areas only
COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK, GRAY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")

MODELS = {"base": Style(BLUE, "o"), "tuned": Style(VERMILION, "s")}
COMPARISON = {"difference": Style(GREEN, "D"), "crossing": Style(ORANGE, "|")}
MODES = {
    "deduction": Style(ORANGE, "^"),
    "abduction": Style(GREEN, "s"),
    "induction": Style(PURPLE, "D"),
    "all": Style(GRAY, "o"),
}
ROLES = {"proposer": Style(SKY, "o"), "solver": Style(BLACK, "s")}
# Who proposes, or what is trained on in the place of proposals; "azr" is the published recipe.
PROPOSERS = {
    "joint": Style(VERMILION, "o"),
    "separate": Style(PURPLE, "s"),
    "no-update": Style(GREEN, "^"),
    "no-update-matched": Style(SKY, "v"),
    "frozen-base": Style(BLUE, "D"),
    "rlvr": Style(ORANGE, "P"),
    "sft": Style(BLACK, "*"),
    "azr": Style(GRAY, "h"),
}
TEACHERS = {"sft-traces": Style(SKY, "<"), "sft-worded": Style(GRAY, ">")}  # other text for sft
OFF_POLICY = {
    "off-policy": Style(GRAY, "X"),
    "off-policy-more": Style(BLUE, "<"),
    "off-policy-shuffled": Style(ORANGE, ">"),
    "off-policy-gold": Style(PURPLE, "p"),
}
CONTROLS = {
    "bonus": Style(BLUE, "^"),
    "adaptive": Style(VERMILION, "v"),
    "clip-higher": Style(GREEN, "<"),
    "clip-cov": Style(ORANGE, "D"),
    "kl-cov": Style(PURPLE, "P"),
    "top-entropy": Style(SKY, "X"),
    "high-advantage-clip": Style(BLACK, "p"),
}
REWARDS = {
    "learnability": Style(VERMILION, "h"),
    "half-peak": Style(BLUE, "v"),
    "uniform": Style(GREEN, "P"),
    "variance": Style(PURPLE, "<"),
    "gaussian": Style(ORANGE, "X"),
    "gate": Style(SKY, "s"),
    "above-chance": Style(BLACK, "^"),
    "random": Style(GRAY, "D"),
}
GROUPS = (MODELS, COMPARISON, MODES, ROLES, PROPOSERS, TEACHERS, OFF_POLICY, CONTROLS, REWARDS)
STYLES = {name: pair for group in GROUPS for name, pair in group.items()}


def style(name: str) -> Style:
    """The colour and marker of a name. KeyError for one that has none: a new arm needs a line above."""
    return STYLES[name]


def series(number: int) -> Style:
    """The colour and marker of the number-th of things that have no name here; every 64 of them differ."""
    turn, place = divmod(number, len(COLORS))
    return Style(COLORS[place], MARKERS[(place + turn) % len(MARKERS)])


def arm_of(config: dict) -> str:
    """The arm of a run from the settings in its config.json: the first that is not the default, in the order
    algorithm, proposer, recipe, off-policy samples, entropy control, shape of the reward; "joint" for plain self-play.
    """
    control = str(config.get("entropy_control")).partition("=")[0]
    first = map(config.get, ("algorithm", "proposer", "recipe"))  # the recipe azr brings an entropy bonus of its own
    words = (*first, _off_policy(config), control, config.get("proposer_reward"))
    return next((word for word in words if word in STYLES and word not in ("joint", "learnability")), "joint")


def _off_policy(config: dict) -> str | None:
    """The name of an off-policy arm; None for a run that trains on its own samples alone."""
    if not config.get("off_policy_gamma"):
        return None
    controls = {"on-policy": "off-policy-more", "shuffled": "off-policy-shuffled"}
    foreign = "off-policy" if config.get("off_policy_source") in (None, "base") else "off-policy-gold"
    return controls.get(config.get("off_policy_control"), foreign)
