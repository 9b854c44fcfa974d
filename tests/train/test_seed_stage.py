"""When the seed stage ends, with a proposer that stands in for a model."""

from types import SimpleNamespace

import pytest

from azr.tasks import Buffers, Task
from azr.train import loop
from azr.train.config import Config


@pytest.mark.parametrize(("fruitful", "rounds"), [(0, 4), (3, 7), (30, 20)])
def test_the_seed_stage_ends_after_rounds_that_bring_nothing(fruitful, rounds, capsys):
    """A model that proposes a new deduction in each of its first `fruitful` rounds and nothing else."""
    s, asked = SimpleNamespace(buffers=Buffers(), config=Config(prompts_per_mode=8)), []

    def propose(s, name, modes):
        asked.append(modes)
        if len(asked) > fruitful:
            return []
        task = Task("deduction", f"def f(x):\n    return x + {len(asked)}", "1", str(len(asked) + 1))
        return [SimpleNamespace(task=task, mode="deduction", parsed=SimpleNamespace(well_formed=True))]

    loop.seed_stage(s, propose, lambda s, proposals, exempt: None)
    assert len(asked) == rounds and s.buffers.size("deduction") == min(fruitful, 20) + 1
    assert f"found in {rounds} rounds" in capsys.readouterr().err
