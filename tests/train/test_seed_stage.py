"""When the seed stage ends, with a proposer that stands in for a model."""

from types import SimpleNamespace

import pytest

from azr.tasks import Buffers, Task
from azr.train import loop
from azr.train.config import Config


@pytest.mark.parametrize(("fruitful", "refused", "rounds"), [(0, 8, 4), (3, 8, 7), (3, 4, 11), (30, 8, 20)])
def test_the_seed_stage_ends_after_rounds_that_bring_nothing(fruitful, refused, rounds, capsys):
    """A model that proposes a new deduction in each of its first `fruitful` rounds and nothing else; so many proposals
    of each round are refused."""
    bad = SimpleNamespace(task=None, reason="syntax", detail="", response="def", completion=SimpleNamespace())
    bad.completion.finish_reason = "stop"
    s, asked = SimpleNamespace(buffers=Buffers(), config=Config(prompts_per_mode=8)), []

    def propose(s, name, modes):
        asked.append(modes)
        if len(asked) > fruitful:
            return [bad] * refused
        task = Task("deduction", f"def f(x):\n    return x + {len(asked)}", "1", str(len(asked) + 1))
        return [SimpleNamespace(task=task, mode="deduction", parsed=SimpleNamespace(well_formed=True))] + [
            bad
        ] * refused

    loop.seed_stage(s, propose, lambda s, proposals, exempt: None)
    assert len(asked) == rounds and s.buffers.size("deduction") == min(fruitful, 20) + 1
    assert f"found in {rounds} rounds" in capsys.readouterr().err
