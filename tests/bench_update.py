"""The update of a default CPU run, on the very samples of its steps, against simpler ways to compute the same gradient.

    python tests/bench_update.py [--steps 8] [--rounds 3] [--threads 1] [--json FILE] [--quick] [--profile]

One run of `train_azr.py` on the embedded model, seed 0, whose every update is computed in each of the ways, by turns,
`--rounds` times; the run goes on with the first. Figures are CPU seconds of an update, the least of the rounds,
averaged over the steps. Every way must give the gradient of the first to 1e-4 of its norm (exit code 1).

    as it is       one packed row, nothing scored that has no advantage, LoRA as one function, the last layer in part
    all scored     samples without an advantage are scored too, for their entropies
    rows           and answers to a prompt share a padded row of up to 512 tokens, with a mask
    PEFT           and LoRA layers compute as PEFT writes them
    a row each     and every answer is a row with its prompt: what a plain script does

--profile: the operations of the first way that take longest. Left out: rewards, the optimizer, a GPU (bench_gpu.py).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

BOUND = 1e-4  # the gradients' relative difference


def ways(policy) -> dict[str, list]:
    """{name: context managers to be entered, as functions without arguments}, each with all that the one before has."""
    from peft.tuners.lora import Linear

    from azr.policy.lora import _Fused
    from azr.train import update

    everything = partial(patch.object, update, "accumulate", all_scored(update.accumulate))
    rows = partial(patch.multiple, policy, shared_row=512, packs=False, known=False)
    alone = partial(patch.object, policy, "shared_row", 0)
    plain = partial(patch.object, _Fused, "forward", Linear.forward)
    simple = [everything, rows, plain, alone]
    return {"as it is": []} | dict(
        zip(("all scored", "rows", "PEFT", "a row each"), (simple[:n] for n in range(1, len(simple) + 1)))
    )


def all_scored(accumulate):
    """`accumulate` that forgets the entropies sampling recorded, and so computes them."""

    def work(s, samples, weights, loss_of):
        for sample in samples:
            sample.entropy = None
        return accumulate(s, samples, weights, loss_of)

    return work


class Bench:
    """In the place of `update.gradient`: computes it in every way, and keeps the seconds."""

    def __init__(self, gradient, rounds: int, profile: bool):
        self.gradient, self.rounds, self.profile = gradient, rounds, profile
        self.seconds: dict[str, list[float]] = {}
        self.difference: dict[str, float] = {}
        self.table = ""

    def once(self, contexts, s, samples, weights, loss_of):
        """(CPU seconds, what gradient gives, flat gradient) of one way."""
        import torch

        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            began = time.process_time()
            result = self.gradient(s, samples, weights, loss_of)
            seconds = time.process_time() - began
        flat = torch.cat([p.grad.flatten() for p in s.policy.trainable_parameters() if p.grad is not None])
        return seconds, result, flat

    def __call__(self, s, samples, weights, loss_of):
        """As update.gradient."""
        entropies = [sample.entropy for sample in samples]
        every = ways(s.policy)
        best, flats = dict.fromkeys(every, float("inf")), {}
        for _ in range(self.rounds):
            for name, contexts in reversed(every.items()):  # the run goes on with what the last leaves: as it is
                for sample, entropy in zip(samples, entropies):
                    sample.entropy = entropy
                seconds, result, flats[name] = self.once(contexts, s, samples, weights, loss_of)
                best[name] = min(best[name], seconds)
        if self.profile:
            result = self.profiled(s, samples, weights, loss_of)
        for name, seconds in best.items():
            self.seconds.setdefault(name, []).append(seconds)
            apart = (flats[name] - flats["as it is"]).norm() / flats["as it is"].norm().clamp(min=1e-30)
            self.difference[name] = max(self.difference.get(name, 0.0), float(apart))
        return result

    def profiled(self, *arguments):
        """One more gradient, with a table of its operations."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as seen:
            result = self.gradient(*arguments)
        self.table = seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40)
        return result


def main() -> int:
    """Runs it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="one step, one round, a quarter of the prompts")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)

    import train_azr
    from azr.train import update

    flags = f"--steps {1 if options.quick else options.steps} --eval-every 0 --eval-samples 0"
    flags += " --prompts-per-mode 2" if options.quick else ""
    bench = Bench(update.gradient, 1 if options.quick else options.rounds, options.profile)
    with tempfile.TemporaryDirectory() as folder, patch.object(update, "gradient", bench):
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            code = train_azr.main([*flags.split(), "--out", str(Path(folder, "run"))])
    means = {name: sum(seconds) / len(seconds) for name, seconds in bench.seconds.items()}
    for name, seconds in means.items():
        ratio, apart = seconds / means["as it is"], bench.difference[name]
        print(f"{name:<12} {seconds:6.2f} CPU s an update  {ratio:5.2f}x  gradient apart {apart:.1e}")
    print(bench.table, end="")
    if options.json:
        options.json.write_text(json.dumps({"seconds": bench.seconds, "difference": bench.difference}) + "\n")
    return code or int(max(bench.difference.values()) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
