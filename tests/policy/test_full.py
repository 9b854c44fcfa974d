"""--train full: gradients of every weight, masters of bf16 weights, checkpoints that are models, their base beneath."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from azr.models import model_path
from azr.policy.full import read_weights
from azr.policy.opening import ModelError, agree, is_full
from azr.policy.policy import Policy, Sampling
from azr.train.update import make_optimizer
from small_models import made_up_tokenizer, make_model, prompts_of, seeds_of

PROMPTS, RESPONSES = prompts_of(4, 3, 12), prompts_of(4, 5, 20, seed=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Its head is a matrix of its own; that of the embedded model is its embedding."""
    return make_model(tmp_path_factory.mktemp("model"), made_up_tokenizer(), 320, tie=False)


def add_gradient(policy, token_budget=8192):
    """Adds the gradient of the mean log-prob and entropy of the responses to the masters."""
    for scored in policy.score(PROMPTS, RESPONSES, token_budget=token_budget, with_grad=True):
        (-(scored.log_prob - 0.1 * scored.entropy) * scored.mask).sum().div(50).backward()


def gradient(policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])


def expected_gradient(policy) -> torch.Tensor:
    """Of the same loss, in one piece from the logits of transformers."""
    policy.model.zero_grad()
    loss = 0.0
    for prompt, response in zip(PROMPTS, RESPONSES):
        logits = policy.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.float().log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        loss = loss - (log_p.gather(1, torch.tensor(response)[:, None])[:, 0] - 0.1 * entropy).sum() / 50
    loss.backward()
    return gradient(policy)


@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_has_the_gradient_of_the_whole_model(small, tied):
    policy = Policy.load(model_path("tiny") if tied else small, "none", full=True)
    assert policy.trainable_parameters() == list(policy.model.parameters())
    add_gradient(policy, token_budget=64)
    ours = gradient(policy)
    theirs = expected_gradient(policy)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_masters_move_where_bf16_weights_cannot(small):
    """A step of 1e-6 moves every master and few weights, eight of them many more: what one step loses is not lost to
    the masters, of which the weights are always the rounded values."""
    policy = Policy.load(small, "none", dtype="bf16", full=True)
    start = policy.adapter_state()
    optimizer = make_optimizer(policy, 1e-6)
    moved = []
    for _ in range(8):
        add_gradient(policy, token_budget=64)
        assert all(p.grad is None for p in policy.model.parameters())  # handed to the masters, in fp32
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, weight in policy.model.named_parameters():
            assert weight.dtype == torch.bfloat16 and torch.equal(weight, policy.full.masters[name].bfloat16())
        changed = [(p != start[name]).flatten() for name, p in policy.model.named_parameters()]
        moved.append(torch.cat(changed).float().mean().item())
    masters = torch.cat([(p != start[name]).flatten() for name, p in policy.full.masters.items()])
    assert masters.float().mean() > 0.8  # but for embeddings of words that do not occur
    assert 0 < moved[0] < 0.02 and moved[-1] > 2.5 * moved[0]


def test_micro_batches_add_up_in_fp32(small):
    policy = Policy.load(small, "none", dtype="bf16", full=True)
    gradients = []
    for budget in (8192, 16):
        add_gradient(policy, budget)
        gradients.append(gradient(policy))
        assert gradients[-1].dtype == torch.float32
        for p in policy.trainable_parameters():
            p.grad = None
    assert (gradients[0] - gradients[1]).norm() / gradients[0].norm() < 0.02


def test_a_checkpoint_is_a_model_and_lies_over_its_base(small, tmp_path):
    trained, base = Policy.load(small, "none", full=True), Policy.load(small, "none")
    with torch.no_grad():
        for p in trained.trainable_parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_3"
    trained.save_adapter(checkpoint)
    (checkpoint / "azr.json").write_text(json.dumps({**trained.info, "template": "azr"}))
    assert is_full(checkpoint) and not is_full(tmp_path)

    plain = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(torch.equal(p, trained.full.weights[name]) for name, p in plain.named_parameters())
    for opening in (agree(None, tmp_path / "run"), agree(str(checkpoint)), agree(small, checkpoint)):
        assert (opening.model, opening.adapter, opening.quantization) == (small, checkpoint, "none")
    policy = Policy.open(opening)
    answers = [x.generate(PROMPTS, 2, Sampling(max_new_tokens=8), seeds_of(4, 2)) for x in (trained, policy)]
    assert answers[0] == answers[1]
    with policy.disable_adapter():
        assert policy.score_lists(PROMPTS, RESPONSES) == base.score_lists(PROMPTS, RESPONSES)
    assert policy.score_lists(PROMPTS, RESPONSES) == trained.score_lists(PROMPTS, RESPONSES)

    with pytest.raises(ModelError, match="keeps no copy of its base"), trained.disable_adapter():
        pass
    with pytest.raises(ModelError, match="is a run, not a model: give it with --adapter"):
        agree(str(tmp_path / "run"))
    with pytest.raises(ModelError, match="weights of another model"):
        Policy.load(model_path("tiny"), "none", adapter=checkpoint)
    with pytest.raises(ModelError, match="--quantization nf4 contradicts"):
        agree(None, checkpoint, "nf4")
    (checkpoint / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="cannot be read"):
        read_weights(checkpoint)
