"""--proposer separate: proposer and solver have an adapter each, on the one frozen base.

In plain self-play the gradients of two roles go through one set of weights. Here each role samples with its own adapter
and its gradient goes there alone, with the weight in the loss, the clip of the norm and the learning rate that it has
in plain self-play: what still joins the roles is the data, tasks and solve rates. The solver's adapter is the policy's
own, "default": whatever measures or exports a checkpoint has the solver. The proposer's begins as a copy of it, after a
warm start too, and lies beside it in checkpoints/step_N/proposer, an adapter like any other.
"""

from __future__ import annotations

from azr.train.arms import Arm


class Separate(Arm):
    """Gives the proposer an adapter of its own."""

    def start(self, s, judge):
        """Adds the proposer's adapter; a group of its own in the optimizer, so that its gradient is clipped alone."""
        s.optimizer.add_param_group({"params": s.policy.add_adapter("proposer")})

    def adapter(self, role, name):
        """The proposer's own; the solver keeps the policy's."""
        return role if role == "proposer" else name
