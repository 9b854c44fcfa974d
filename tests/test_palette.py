"""One definition of colours and markers: every name has one of its own, and what shares a figure differs in both."""

import re
from pathlib import Path

import pytest

from azr import palette
from azr.analysis import figures
from azr.analysis.reader import MODES, ROLES, RunData
from azr.train.config import Config
from azr.train.rewards import SHAPES
from azr.train.rules import CONTROLS


def test_every_name_has_a_pair_of_its_own():
    assert {*MODES, *ROLES, *SHAPES, *CONTROLS, "base", "tuned", "rlvr", "sft", "azr"} - {
        "none"
    } <= palette.STYLES.keys()
    proposers = next(f for f in Config.__dataclass_fields__.values() if f.name == "proposer").metadata["choices"]
    assert {*proposers} <= palette.STYLES.keys()
    assert sum(map(len, palette.GROUPS)) == len(palette.STYLES), "a name stands in two groups"
    assert len(set(palette.STYLES.values())) == len(palette.STYLES), "two names have one pair"
    for group in palette.GROUPS:
        for part in (0, 1):  # colour, marker
            assert len({own[part] for own in group.values()}) == len(group), f"not told apart: {list(group)}"
    shared = [{own.color for own in group.values()} for group in (palette.MODELS, palette.ROLES, palette.MODES)]
    assert len(set.union(*shared)) == sum(map(len, shared)), "modes, roles and models stand side by side in a report"
    assert len({palette.series(number) for number in range(64)}) == 64
    with pytest.raises(KeyError):
        palette.style("no such arm")


@pytest.mark.parametrize(
    "settings, arm",
    [
        ({}, "joint"),
        ({"proposer": "separate"}, "separate"),
        ({"algorithm": "rlvr", "proposer": "joint"}, "rlvr"),
        ({"entropy_control": "kl-cov=0.01"}, "kl-cov"),
        ({"proposer_reward": "gate"}, "gate"),
        ({"recipe": "azr", "entropy_control": "bonus=0.001"}, "azr"),
        ({"recipe": "azr", "proposer": "frozen-base"}, "frozen-base"),
        ({"off_policy_gamma": 0.25, "off_policy_source": "base"}, "off-policy"),
        (
            {"off_policy_gamma": 0.25, "off_policy_source": "base", "off_policy_control": "shuffled"},
            "off-policy-shuffled",
        ),
        ({"off_policy_gamma": 0.25, "off_policy_source": "gold.jsonl"}, "off-policy-gold"),
    ],
)
def test_the_arm_of_a_run(settings, arm):
    usual = {"algorithm": "selfplay", "proposer": "joint", "entropy_control": "none", "proposer_reward": "learnability"}
    assert palette.arm_of(usual | {"off_policy_gamma": 0.0} | settings) == arm
    assert palette.arm_of(settings) == arm  # an old or a foreign config.json


def test_runs_look_like_their_arms_and_seeds_of_one_arm_like_their_numbers():
    def looks(*arms):
        return figures.looks([RunData(Path(arm), {"algorithm": arm}, []) for arm in arms])

    first, other, again = looks("selfplay", "rlvr", "selfplay")
    assert (first["color"], first["marker"]) == palette.style("joint") and other["marker"] == palette.style(
        "rlvr"
    ).marker
    assert first["linestyle"] == "-" and again == first | {"linestyle": "--"}
    assert looks("selfplay") == [first]
    seeds = looks("rlvr", "rlvr")
    assert [(own["color"], own["marker"]) for own in seeds] == [palette.series(0), palette.series(1)]


def test_no_colour_is_defined_elsewhere():
    """A colour that is written out in another file of azr/ is one that changes between figures."""
    home = Path(palette.__file__)
    for path in home.parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path != home and ("matplotlib" in text or "figures." in text):
            assert not re.search(r"""["']#[0-9a-fA-F]{6}["']|["']C\d["']|f"C\{|tab:""", text), path
