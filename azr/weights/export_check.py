"""Whether an exported model is the policy that was trained: logits of real prompts, and what rounding explains of it.

    report, failures = check(merge, directory, run, samples=2)      # failures: [] if the model may be used

The reference is the live policy (quantized base + adapter, azr/policy/policy.py) in fp32 arithmetic, on prompts and
answers of the run. Three things must hold:

1. `fp32 merge`: with every linear layer replaced by its merged fp32 weights the logits are those of the policy, 1e-3.
   A kernel that reads the 4-bit weights otherwise than the merge does shows here.
2. `files`: loaded by transformers, every tensor is bit for bit the fp32 merge rounded to bf16; the tokenizer too.
3. `bf16 model`: the logits of that model, in bf16 arithmetic, are no further from the policy's than those of a random
   (stochastic, unbiased) rounding of the fp32 merge, times FACTOR: what rounding alone explains.

The 3rd says nothing of an update whose effect is smaller than rounding noise, and a warning says that; the others hold
for it too. Left out: samples of the two models (a token that differs by rounding changes all that follow).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from azr.console import say, warn
from azr.jsonl import strict_lines
from azr.policy.load import ModelError, load_tokenizer, quiet, tokenizer_hash
from azr.policy.policy import Policy
from azr.policy.scoring import head_logits, right_padded
from azr.tasks import MODES, SEED_TASKS
from azr.tasks.prompts import propose_prompt, solve_prompt

EXACT = 1e-3  # largest logit difference of two fp32 computations of the same weights
FACTOR = 2.0  # on mean |logit difference|; squared on the KL divergence
RESPONSE_TOKENS = 32  # of a sample that are compared
PADDED_TOKENS = 16384  # of the batch
LOGIT_BYTES = 512e6  # of one set of logits
Batch = tuple[torch.Tensor, torch.Tensor]  # see make_batch


# ---------------------------------------------------------------- prompts


def texts(run: Path | None, template: str, count: int) -> list[tuple[str, str]]:
    """(prompt, response): `count` of each role and mode of the run's probe.jsonl; without it of the seed tasks."""
    if run is None or not (run / "probe.jsonl").is_file():
        warn("no run directory with a probe.jsonl: verified on the prompts of the seed tasks, without answers")
        tasks = list(SEED_TASKS.values())
        prompts = [propose_prompt(mode, tasks[:1], template) for mode in MODES]
        return [(prompt, "</think> <answer>") for prompt in prompts + [solve_prompt(task, template) for task in tasks]]
    groups: dict[tuple, list] = {}
    for _, row in strict_lines(run / "probe.jsonl", ModelError):
        group = groups.setdefault((row["role"], row["mode"]), [])
        if len(group) < count and row["response"]:
            group.append((row["prompt"], row["response"]))
    return [pair for group in groups.values() for pair in group]


def make_batch(policy: Policy, pairs: list[tuple[str, str]]) -> Batch:
    """As many samples, shortest first, and tokens of each as the limits above allow: right-padded ids (samples, time),
    and flat indices (tokens,) of the states that predict their response tokens."""
    encoded = [(policy.encode(prompt), policy.encode(response)[:RESPONSE_TOKENS]) for prompt, response in pairs]
    encoded = sorted((pair for pair in encoded if pair[0] and pair[1]), key=lambda pair: sum(map(len, pair)))
    part = [pair for i, pair in enumerate(encoded) if (i + 1) * sum(map(len, pair)) <= PADDED_TOKENS] or encoded[:1]
    each = max(1, int(LOGIT_BYTES / 4 / policy.head.weight.shape[0]) // len(part))
    return right_padded(part, policy.pad_id, each)


@torch.no_grad()
def logits(backbone, weight: torch.Tensor, batch: Batch) -> torch.Tensor:
    """(tokens, vocabulary) fp32 on the CPU; the head's product is in fp32 for every model."""
    ids, positions = (part.to(weight.device) for part in batch)
    hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return head_logits(hidden.flatten(0, 1)[positions], weight).cpu()


def difference(model: torch.Tensor, policy: torch.Tensor) -> dict[str, float]:
    """Compares logits (tokens, vocabulary): largest and mean |difference|, KL(policy || model) in nats a token, and the
    share of tokens with the same best word."""
    gap, kl = (model - policy).abs(), 0.0
    for a, b in zip(policy.split(64), model.split(64)):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
    same = (model.argmax(-1) == policy.argmax(-1)).double().mean().item()
    return {"max": gap.max().item(), "mean": gap.mean().item(), "kl": kl / len(policy), "top1": same}


# ---------------------------------------------------------------- the live policy


def merged_logits(policy: Policy, merge, batch: Batch) -> torch.Tensor:
    """Returns the logits of the fp32 merge: each linear layer's output is replaced by that of its merged weights, which
    are made when it is its turn, so that one matrix at a time is in memory."""

    def replaced(name: str):
        def hook(module, inputs, output):
            bias = name.removesuffix(".weight") + ".bias"
            bias = merge.exact(bias).to(policy.device) if bias in merge.base.entries else None
            return F.linear(inputs[0].float(), merge.exact(name).to(policy.device), bias)

        return hook

    # all that the merge changes: those without an adapter too, on a 4-bit base
    changed = [name for name in merge.base.entries if merge.quantized(name) or name in merge.adapter.targets]
    modules = {f"{name}.weight": module for name, module in policy.base.named_modules()}
    handles = [modules[name].register_forward_hook(replaced(name)) for name in changed]
    try:
        return logits(policy.backbone, policy.head.weight, batch)
    finally:
        for handle in handles:
            handle.remove()


def measure_policy(merge, run: Path | None, samples: int) -> tuple[dict, Batch, torch.Tensor]:
    """(figures, batch, logits of the policy), all in fp32 arithmetic."""
    policy = Policy.load(
        str(merge.base.directory), merge.reference.quantization, adapter=merge.adapter.directory, dtype=torch.float32
    )
    policy.model.eval()
    batch = make_batch(policy, texts(run, merge.adapter.info.get("template", "azr"), samples))
    live = logits(policy.backbone, policy.head.weight, batch)
    with policy.disable_adapter():
        without = logits(policy.backbone, policy.head.weight, batch)
    merge = replace(merge, reference=replace(merge.reference, dtype=torch.float32))
    figures = {
        "samples": len(batch[0]),
        "tokens": len(batch[1]),
        "without_adapter": difference(without, live),
        "fp32_merge": difference(merged_logits(policy, merge, batch), live),
    }
    return figures, batch, live


# ---------------------------------------------------------------- the exported model


def load(directory: Path, need: int):
    """The model as transformers loads it, in bf16, on a GPU if it fits."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * need else "cpu")
    if device.type == "cpu" and torch.cuda.is_available():
        warn(f"the bf16 model needs {need / 1e9:.1f} GB and the GPU has less free: computed on the CPU, which is slow")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": device}
        )
    return model.eval()


def stochastic_round(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """bf16 of fp32: up or down at random, right on average. Numbers of bf16 stay what they are."""
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, generator=generator)
    return ((bits + noise) & ~0xFFFF).view(torch.float32).bfloat16()


@torch.no_grad()
def round_again(model, merge) -> list[str]:
    """Puts a stochastic rounding of the fp32 merge in the place of every weight; names of those that were not bit for
    bit the fp32 merge rounded to nearest, or not there."""
    generator, wrong = torch.Generator().manual_seed(0), []
    parameters = dict(model.named_parameters())
    for name, entry in merge.base.entries.items():
        if entry.dtype == torch.bfloat16 and not merge.quantized(name) and name not in merge.adapter.targets:
            exact = merge.base.tensor(name)
        else:
            exact = merge.exact(name)
        if name not in parameters:
            wrong.append(name)
            continue
        here = parameters[name].data
        if not torch.equal(here.cpu().view(torch.int16), exact.bfloat16().view(torch.int16)):
            wrong.append(name)
        if exact.dtype == torch.float32:
            here.copy_(stochastic_round(exact, generator))
    return wrong


def measure_model(merge, directory: Path, batch: Batch, live: torch.Tensor) -> dict:
    """Measures the exported model's logits against `live`, those of the policy (tokens, vocabulary), then those of a
    random rounding of the merge; compares every tensor and the tokenizer. ModelError if the model cannot be loaded."""
    model = load(directory, 2 * merge.base.parameters)
    head = model.get_output_embeddings().weight
    deployed = difference(logits(model.base_model, head, batch), live)
    wrong = round_again(model, merge)
    control = difference(logits(model.base_model, head, batch), live)
    with quiet():
        same = tokenizer_hash(load_tokenizer(str(directory), {"local_files_only": True}))
    return {"bf16_model": deployed, "random_rounding": control, "wrong_tensors": wrong, "tokenizer_hash": same}


def check(merge, directory: Path, run: Path | None, samples: int) -> tuple[dict, list[str]]:
    """(figures, what failed in words), and a table on the screen. ModelError: one of the two cannot be loaded."""
    say("verifying: the policy, the fp32 merge and the bf16 model on prompts of the run")
    report, batch, live = measure_policy(merge, run, samples)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    report |= measure_model(merge, directory, batch, live)
    rounded = report["random_rounding"]
    if 0 < report["without_adapter"]["mean"] < FACTOR * rounded["mean"]:
        warn(
            f"the update moves the logits by {report['without_adapter']['mean']:.2g} on average, rounding noise by "
            f"{rounded['mean']:.2g}: in bf16 the two models can hardly be told apart"
        )
    bounds = {"mean": FACTOR * rounded["mean"], "kl": FACTOR**2 * rounded["kl"]}
    show(report, bounds)
    return report, verdict(report, bounds, merge)


def verdict(report: dict, bounds: dict[str, float], merge) -> list[str]:
    """Says in words which of the checks do not hold; [] if all do. A comparison with NaN does not hold."""
    model, wrong, exact = report["bf16_model"], report["wrong_tensors"], report["fp32_merge"]["max"]
    failures = []
    if not exact <= EXACT:
        failures.append(f"logits of the fp32 merge are {exact:.2g} from the policy's, bound {EXACT}")
    if wrong:
        failures.append(f"{wrong[0]} is not the merge rounded to bf16 ({len(wrong)} tensors)")
    if merge.adapter.info.get("tokenizer_hash") not in (None, report["tokenizer_hash"]):
        failures.append("the tokenizer gives other tokens than in training")
    if not (model["mean"] <= bounds["mean"] and model["kl"] <= bounds["kl"]):
        failures.append(
            "the bf16 model is further from the policy than rounding noise explains: mean "
            f"{model['mean']:.3g}, bound {bounds['mean']:.3g}; KL {model['kl']:.2g}, bound {bounds['kl']:.2g}"
        )
    return failures


def show(report: dict, bounds: dict[str, float]) -> None:
    """The table of the verification."""
    say(f"logits against the live policy, {report['samples']} samples, {report['tokens']} tokens:")
    say(f"{'':24}{'max |diff|':>11}{'mean |diff|':>12}{'KL, nats':>10}{'same best token':>17}")
    for key, name, bound in (
        ("without_adapter", "base without the update", ""),
        ("fp32_merge", "fp32 merge", f"bound: max {EXACT:g}"),
        ("bf16_model", "bf16 model", f"bound: mean {bounds['mean']:.3g}, KL {bounds['kl']:.2g}"),
        ("random_rounding", "randomly rounded", ""),
    ):
        row = report[key]
        best = f"{100 * row['top1']:.1f} %"
        say(f"{name:24}{row['max']:>11.2g}{row['mean']:>12.2g}{row['kl']:>10.2g}{best:>17}  {bound}".rstrip())
