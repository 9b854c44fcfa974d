"""Speed of sampling on a CPU: the engine beside transformers' `generate` and its continuous batching.

    python tests/bench_rollout.py [--json FILE] [--quick]

Everywhere: random LoRA values that are not zero, EOS and stop strings off, and a number of tokens forced for each
request, so that all systems make exactly the same tokens' worth of text. Useful tokens/s counts forced tokens only.

The embedded model in fp32, one thread, 256 requests of lognormal lengths (median 40, cap 256).
  - `generate` is called plainly, without log-probs or stop strings, each batch as long as its longest request, at the
    batch size that was fastest in a first pass; continuous batching without log-probs at its fastest number of slots;
    the engine at its default of 256 slots, log-probs included. Then rounds of all three in turn; medians over rounds,
    by wall clock and by CPU time (on a machine that does other things too, CPU time is the one to read).
`--quick`: a quarter of the requests, one round. Exit code 1 when a target is missed (not with --quick). Left out: other
dedicated servers, sampling with top-p, a GPU (bench_gpu.py).
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers

from azr.models import ALIASES
from azr.policy.policy import LoraSettings, Policy
from azr.policy.sampling import Sampling

TARGETS = {
    "cpu/engine over generate": 1.5,
    "cpu/engine over continuous batching": 1.2,
}
NOTHING_STOPS = dict(temperature=1.0, stop=())
PAGE = 32  # tokens of a page of continuous batching's cache on a CPU


def requests(count: int, vocabulary: int, median: int, cap: int, prompt: tuple[int, int]):
    """(prompts, forced lengths): distinct random prompts of prompt[0] to prompt[1] tokens, lognormal lengths."""
    rng = random.Random(0)
    prompts = [[rng.randrange(vocabulary) for _ in range(rng.randint(*prompt))] for _ in range(count)]
    return prompts, [max(1, min(cap, round(median * rng.lognormvariate(0, 1)))) for _ in range(count)]


def randomize(policy: Policy) -> None:
    generator = torch.Generator(policy.device).manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.normal_(0, 0.02, generator=generator)


def measured(call) -> tuple[float, float]:
    """(wall, CPU) seconds of a call; a GPU has finished by then."""
    started = time.perf_counter(), time.process_time()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started[0], time.process_time() - started[1]


# --------------------------------------------------------------------------------------------------- the three systems


def run_engine(policy: Policy, prompts, lengths) -> None:
    sampling = Sampling(max_new_tokens=max(lengths), **NOTHING_STOPS)
    seeds = [[i] for i in range(len(prompts))]
    policy.model.eval()
    completions = policy.engine.generate(prompts, 1, sampling, seeds, lengths)
    assert [len(row[0].ids) for row in completions] == lengths


def run_continuous(policy: Policy, slots: int, prompts, lengths) -> None:
    """transformers' continuous batching. On a CPU it would take 60 % of the memory for its cache: there it gets what
    `slots` samples need. Its log-probs are not asked for, so it does less than the engine."""
    settings = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=max(lengths),
        pad_token_id=policy.pad_id,
        eos_token_id=-1,
    )
    options = dict(max_requests_per_batch=slots, seed=0)
    if policy.device.type == "cpu":
        pages = -(-max(len(p) + limit for p, limit in zip(prompts, lengths)) // PAGE) + 1
        options |= dict(page_size=PAGE, num_blocks=slots * pages, max_batch_tokens=max(512, slots))
    attention, done = policy.base.config._attn_implementation, {}
    policy.base.set_attn_implementation("sdpa")  # it knows a paged form of this one, not of tree_attention.py's
    policy.model.eval()
    with (
        torch.no_grad(),
        policy.base.continuous_batching_context_manager(
            generation_config=settings, continuous_batching_config=transformers.ContinuousBatchingConfig(**options)
        ) as manager,
    ):
        for i, (prompt, limit) in enumerate(zip(prompts, lengths)):
            manager.add_request(list(prompt), request_id=f"{i}", max_new_tokens=limit)
        while len(done) < len(prompts):
            output = manager.get_result(timeout=1)
            if output is None and not manager.is_running() or output is not None and output.error is not None:
                raise RuntimeError(f"continuous batching ended with {len(done)} of {len(prompts)} requests done")
            if output is not None and output.is_finished():
                done[output.request_id] = len(output.generated_tokens)
    policy.base.set_attn_implementation(attention)
    assert [done[f"{i}"] for i in range(len(prompts))] == list(lengths)


def run_generate(policy: Policy, batch_size: int, prompts, lengths) -> None:
    """Nothing but `generate`: what a batch makes beyond a request's forced length is thrown away."""
    policy.model.eval()
    for start in range(0, len(prompts), batch_size):
        rows, longest = prompts[start : start + batch_size], max(lengths[start : start + batch_size])
        width = max(map(len, rows))
        ids = torch.tensor([[policy.pad_id] * (width - len(row)) + row for row in rows], device=policy.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=policy.device)
        config = transformers.GenerationConfig(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=longest,
            pad_token_id=policy.pad_id,
            eos_token_id=None,
        )
        with torch.no_grad():
            out = policy.base.generate(inputs=ids, attention_mask=mask, generation_config=config)
        assert out.shape == (len(rows), width + longest)


def no_checkpoint_settings(policy: Policy) -> None:
    """`generate` fills in from the checkpoint whatever is unset, EOS among it."""
    policy.base.generation_config = transformers.GenerationConfig()


# ----------------------------------------------------------------------------------------------------------------- CPU


def cpu_part(quick: bool) -> dict:
    torch.set_num_threads(1)
    lora = LoraSettings(rank=16, alpha=32)
    loaded = Policy.load(ALIASES["tiny"], quantization="none", lora=lora, device="cpu")
    policy = Policy(loaded.model, loaded.tokenizer, loaded.info, set())  # no EOS
    randomize(policy)
    no_checkpoint_settings(policy)
    prompts, lengths = requests(64 if quick else 256, policy.base.config.vocab_size, 40, 256, (40, 160))
    tokens = sum(lengths)
    print(
        f"CPU: embedded model, fp32, LoRA; {len(prompts)} requests, {tokens} tokens, the longest {max(lengths)}, "
        f"median {statistics.median(lengths):.0f}; {policy.engine.attention_note}"
    )

    def fastest(name, run, sizes):
        seconds = {size: measured(lambda: run(policy, size, prompts, lengths))[1] for size in sizes}
        print(f"  {name} by batch size: " + ", ".join(f"{s} {tokens / t:.0f}/s" for s, t in seconds.items()))
        return min(seconds, key=seconds.get)

    run_engine(policy, prompts[:8], lengths[:8])  # imports, allocations
    batch = fastest("generate, tokens per CPU second", run_generate, (32, 64) if quick else (16, 32, 64, 128, 256))
    slots = fastest("continuous batching, likewise", run_continuous, (32, 64) if quick else (16, 32, 64, 128))
    systems = {
        "engine": lambda: run_engine(policy, prompts, lengths),
        "generate": lambda: run_generate(policy, batch, prompts, lengths),
        "continuous batching": lambda: run_continuous(policy, slots, prompts, lengths),
    }
    rounds = [{name: measured(call) for name, call in systems.items()} for _ in range(1 if quick else 3)]
    figures = {"cpu/requests": len(prompts), "cpu/tokens": tokens, "cpu/generate batch": batch, "cpu/slots": slots}
    for name in systems:
        for clock, which in enumerate(("wall", "CPU")):
            figures[f"cpu/{name} tokens per {which} s"] = tokens / statistics.median(r[name][clock] for r in rounds)
    for other in ("generate", "continuous batching"):
        ratios = [[r[other][clock] / r["engine"][clock] for r in rounds] for clock in (0, 1)]
        figures[f"cpu/engine over {other}"] = statistics.median(ratios[1])
        figures[f"cpu/engine over {other}, wall"] = statistics.median(ratios[0])
        figures[f"cpu/engine over {other}, rounds"] = [round(x, 2) for x in sorted(ratios[1])]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of sampling.")
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--quick", action="store_true", help="a quarter of the work; no verdict on the targets")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    figures = {
        "machine": f"{platform.machine()} {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    figures |= cpu_part(arguments.quick)
    missed = []
    for name, value in figures.items():
        target = TARGETS.get(name)
        missed += [name] if target is not None and value < target else []
        note = "" if target is None else f"   target {target}: {'MISSED' if value < target else 'reached'}"
        print(f"{name:44} {value if type(value) is not float else round(value, 2)}{note}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures | {"missed": missed, "quick": arguments.quick}, indent=1))
    return 1 if missed and not arguments.quick else 0


if __name__ == "__main__":
    sys.exit(main())
