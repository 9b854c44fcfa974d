"""Opens the policy of a run or of a command line, and compares it with its base token by token: exact KL divergences.

    policy = open_run(run)                    # base with the adapter of a checkpoint, checked against azr.json
    use(policy, checkpoint)                   # another checkpoint's adapter in the same base
    forward, reverse = token_divergences(policy, prompts, responses)

KL over the full vocabulary at every response position, in chunks of positions, so logits are never held whole.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from azr.analysis.reader import RunData
from azr.models import model_path
from azr.policy.opening import Opening, agree, check_template
from azr.runs import weights_of
from azr.tasks.prompts import template_hash

if TYPE_CHECKING:
    import torch

    from azr.policy.policy import Policy

TOKEN_BUDGET = 8192  # tokens of a forward pass


def open_policy(opening: Opening, **engine_options) -> Policy:
    """The policy of what azr/policy/opening.py agreed on. A GPU computes in the dtype of the training, a CPU in fp32:
    all else is slow there. ModelError, also if the adapter was trained on another base."""
    import torch

    from azr.policy.policy import Policy

    dtype = {} if torch.cuda.is_available() else {"dtype": None}
    policy = Policy.open(opening, **dtype, **engine_options)
    if policy.device.type == "cpu" and not os.environ.get("OMP_NUM_THREADS") and policy.head.weight.shape[1] < 512:
        torch.set_num_threads(1)  # threads that wait for each other are slower than one on matrices this small
    return policy


def open_run(run: RunData) -> Policy:
    """The policy of a run at its newest checkpoint. RunError without a checkpoint, ModelError if its base has changed
    or the wording of its prompts is no longer the one of azr/tasks/prompts.py."""
    info = run.base()
    model = model_path(str(run.config["model"]))
    # the configured path leads nowhere from here: the checkpoint has the one that the weights were read from
    if "/" in model and not Path(model).exists() and Path(info["base_model"]).exists():
        model = info["base_model"]
    opening = agree(model, run.checkpoints()[-1][1])
    if opening.template:
        check_template(opening, opening.template, template_hash(opening.template))
    slots = run.config.get("max_batch")
    return open_policy(opening, **({"max_batch": slots} if isinstance(slots, int) and slots > 0 else {}))


def use(policy: Policy, checkpoint: Path) -> None:
    """Puts the adapter of a checkpoint, or all its weights, into the loaded base."""
    from safetensors.torch import load_file

    policy.load_adapter_state(load_file(weights_of(checkpoint)))


def divergences(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(p || q), KL(q || p)), each (rows,), of log-probabilities (rows, vocabulary), summed in float64.

    Rounding in fp32 log-probs can make a divergence that is 0 come out at -1e-8: it is clipped at 0.
    """
    gap = (log_p - log_q).double()
    forward = (log_p.double().exp() * gap).sum(-1)
    reverse = -(log_q.double().exp() * gap).sum(-1)
    return forward.clamp(min=0), reverse.clamp(min=0)


def token_divergences(
    policy: Policy,
    prompts: list[list[int]],
    responses: list[list[int]],
    temperature: float = 1.0,
    token_budget: int = TOKEN_BUDGET,
    chunk: int = 128,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(KL(base || policy), KL(policy || base)) at every response token, nats, a float64 array per sample in order.

    Exact over the vocabulary given the text before the token. The mean over text that the FIRST argument wrote is the
    divergence per token of the two sequence distributions; over other text it is a reading along that text.
    """
    import torch

    from azr.policy.scoring import head_logits, micro_batches, right_padded

    forward, reverse = [np.empty(0)] * len(prompts), [np.empty(0)] * len(prompts)
    policy.model.eval()
    weight = policy.head.weight
    with torch.no_grad():
        for indices in micro_batches([len(p) + len(r) for p, r in zip(prompts, responses)], token_budget):
            batch = right_padded([(prompts[i], responses[i]) for i in indices], policy.pad_id)
            ids, position = (part.to(policy.device) for part in batch)
            # both models are one set of weights: the base is the policy with its adapter switched off
            hidden = [_hidden(policy, ids, context)[position] for context in (policy.disable_adapter(), nullcontext())]
            columns = [[], []]
            for start in range(0, len(position), chunk):
                # the temperature divides the logits, as in sampling: at another one it is another distribution
                logits = (head_logits(h[start : start + chunk], weight) / temperature for h in hidden)
                for column, value in zip(columns, divergences(*(z.log_softmax(-1) for z in logits))):
                    column.append(value.cpu().numpy())
            # micro-batches are sorted by length; the results go back to the order of the caller
            for out, column in zip((forward, reverse), columns):
                values = np.concatenate(column) if column else np.empty(0)
                for i, part in zip(indices, np.split(values, np.cumsum([len(responses[i]) for i in indices])[:-1])):
                    out[i] = part
    return forward, reverse


def _hidden(policy: Policy, ids: torch.Tensor, context) -> torch.Tensor:
    """(batch x time, H) final hidden states of the right-padded batch."""
    with context:
        return policy.backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
