"""azr/policy/lora.py: the gradient is PEFT's, and nothing else of a PEFT model changes."""

import gc
import weakref

import pytest
import torch
from peft import get_peft_model_state_dict

from azr.models import model_path
from azr.policy import lora
from azr.policy.load import adapter_tensors
from azr.policy.policy import LoraSettings, Policy, Sampling
from random_weights import with_values_in_B

PROMPTS = [[1 + (i * 31 + j * 7) % 300 for j in range(9 + i)] for i in range(4)]
ANSWERS = [[2 + (i * 13 + j * 5) % 300 for j in range(12 - 2 * i)] for i in range(4)]


def load(quantization: str, dtype=torch.float32) -> Policy:
    policy = Policy.load(model_path("tiny"), quantization, LoraSettings(8, 16.0), seed=3, dtype=dtype)
    return with_values_in_B(policy, 0.02)


def gradient(policy, parameters=None) -> torch.Tensor:
    for p in policy.trainable_parameters():
        p.grad = None
    for scored in policy.score(PROMPTS, ANSWERS, with_grad=True):
        ((scored.log_prob + 0.1 * scored.entropy) * scored.mask).sum().backward()
    return torch.cat([p.grad.flatten() for p in parameters or policy.trainable_parameters()])


def log_probs(policy) -> torch.Tensor:
    return torch.tensor(sum(policy.score_lists(PROMPTS, ANSWERS)[0], []))


class Unfused:
    """The layers with PEFT's own forward, inside."""

    def __init__(self, policy):
        self.fused = [(m, type(m)) for m in policy.model.modules() if isinstance(m, lora._Fused)]

    def __enter__(self):
        for module, kind in self.fused:
            module.__class__ = kind.__mro__[2]

    def __exit__(self, *exception):
        for module, kind in self.fused:
            module.__class__ = kind


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradient_and_log_probs_are_those_of_peft(quantization, recompute):
    policy = load(quantization)
    policy.checkpoint_activations(recompute)
    ours, p = gradient(policy), log_probs(policy)
    with Unfused(policy) as _:
        theirs, q = gradient(policy), log_probs(policy)
    assert ours.dtype == torch.float32 and theirs.norm() > 0.1
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    assert (p - q).abs().max() < 1e-5


def test_half_precision_is_as_near_to_fp32_as_peft_is():
    """bf16 products of bf16 copies against PEFT's fp32 products: the base's own rounding is the larger error."""
    exact, policy = gradient(load("none")), load("none", torch.bfloat16)
    error = {"ours": (gradient(policy) - exact).norm() / exact.norm()}
    with Unfused(policy):
        error["theirs"] = (gradient(policy) - exact).norm() / exact.norm()
    assert error["ours"] < 1.3 * error["theirs"] < 0.2
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in policy.trainable_parameters())


def test_switching_the_adapter_off_and_saving_work_as_before():
    policy = load("none")
    base, with_adapter = Policy.load(model_path("tiny"), "none"), log_probs(policy)
    with policy.disable_adapter():
        assert torch.equal(log_probs(policy), log_probs(base))
    assert not torch.allclose(with_adapter, log_probs(base))
    assert get_peft_model_state_dict(policy.model).keys() == policy.adapter_state().keys()
    module = next(m for m in policy.model.modules() if isinstance(m, lora._Fused))
    module.lora_dropout["default"] = torch.nn.Dropout(0.5)  # PEFT's own forward takes over
    policy.model.eval()
    assert torch.allclose(log_probs(policy), with_adapter, atol=1e-5)
    module.lora_B["default"].bias = torch.nn.Parameter(torch.ones(module.out_features))
    assert not torch.allclose(log_probs(policy), with_adapter, atol=1e-2)


def test_a_fused_model_is_no_circle_of_its_own():
    policy = load("none")
    gradient(policy)
    layers = [weakref.ref(m) for m in policy.model.modules() if isinstance(m, lora._Fused)]
    assert len(layers) > 20
    module = layers[0]()
    assert not any(callable(value) and not isinstance(value, type) for value in vars(module).values())
    del policy, module
    gc.collect()
    assert not any(ref() for ref in layers)


def test_of_two_adapters_the_one_in_use_samples_scores_and_gets_the_gradient():
    policy, alone = load("none", torch.bfloat16), load("none", torch.bfloat16)  # sampling copies what it uses
    matrices, first = policy.add_adapter("proposer"), policy.adapter_state()
    assert all(torch.equal(first[name], tensor) for name, tensor in policy.adapter_state(adapter="proposer").items())
    far = {name: -tensor if "lora_B" in name else tensor for name, tensor in first.items()}
    policy.load_adapter_state(far, "proposer")
    alone.load_adapter_state(far)

    def sampled(of) -> tuple[list, list]:
        rows = of.generate(PROMPTS, 1, Sampling(max_new_tokens=8), [[i] for i in range(4)])
        return [row[0].ids for row in rows], [row[0].log_probs for row in rows]

    before = sampled(policy)
    with policy.using("proposer"):
        ids, written = sampled(policy)
        trainer, expected = torch.tensor(sum(policy.score_lists(PROMPTS, ids)[0], [])), gradient(policy, matrices)
        with policy.disable_adapter():
            base = log_probs(policy)
    other, written = torch.tensor(sum(policy.score_lists(PROMPTS, ids)[0], [])), torch.tensor(sum(written, []))
    assert (written - trainer).abs().mean() < 0.05 < (written - other).abs().mean()
    assert (ids, before) == (sampled(alone)[0], sampled(policy)) and before[0] != ids
    named = adapter_tensors(alone.model).values()
    assert torch.equal(expected, gradient(alone, named)) and expected.norm() > 0
    assert sum(p.grad is not None for p in policy.trainable_parameters()) == len(matrices) == len(first)
    with alone.disable_adapter():
        assert torch.equal(base, log_probs(alone))
    with pytest.raises(KeyError), policy.using("proposer"):
        raise KeyError
    assert policy.adapter == "default" and sampled(policy) == before
