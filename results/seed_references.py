"""Self-play whose proposer is shown tasks of the seed stage alone: does the buffer shorten proposals, or the reward?

    python results/seed_references.py --solver-tasks fresh --steps 80      takes what train_azr.py takes

In self-play the proposer's references, and the programs that induction is asked about, come from a buffer that fills
with its own proposals: what it writes comes back to it. Here every draw is from the tasks that the untrained model
made; a proposal is still refused as a duplicate of anything proposed before. The solver's draws from the buffer would
be old too, so the arm to compare with is `--solver-tasks fresh`, which draws none. After a stop it goes on with this
script and --resume auto. No references at all, `--references 0`, cannot tell on the embedded model: it was never
trained on such a prompt, and the whole seed stage had no valid proposal.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_azr
from azr.tasks import SEED_PROGRAM, SEED_TASKS, Buffers, Task
from azr.train import arms


class SeedBuffers(Buffers):
    """Buffers that draw among the tasks of step 0, as `Buffers` does among all."""

    def seed(self, mode: str) -> list[Task]:
        """The tasks of the seed stage, oldest first."""
        return [task for task, step in self.tasks(mode) if step == 0]

    def sample(self, mode: str, k: int, rng: random.Random) -> list[Task]:
        """Up to k distinct tasks, uniformly, in random order."""
        rows = self.seed(mode)
        return rng.sample(rows, min(k, len(rows)))

    def sample_program(self, rng: random.Random) -> Task:
        """A task of both code buffers whose program an induction proposal is about."""
        rows = [task for mode in ("deduction", "abduction") for task in self.seed(mode) if task.program != SEED_PROGRAM]
        return rng.choice(rows) if rows else SEED_TASKS["deduction"]


class SeedReferences(arms.Arm):
    """Self-play with `SeedBuffers`."""

    @classmethod
    def refuses(cls, c):
        """Settings under which the solver draws from the buffer too."""
        draws = c.algorithm != "selfplay" or c.solver_tasks != "fresh"
        return [(draws, "results/seed_references.py is about what the proposer is shown: add --solver-tasks fresh")]

    def start(self, s, judge):
        """Takes the place of the buffers before anything is in them."""
        s.buffers = SeedBuffers()


if __name__ == "__main__":
    arms.REGISTRY.append((lambda config: True, SeedReferences))
    sys.exit(train_azr.main(sys.argv[1:]))
