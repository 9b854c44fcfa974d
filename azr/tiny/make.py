"""Trains the embedded base model from scratch and writes it next to this file: `python -m azr.tiny.make`.

A Qwen2 of about a million parameters, trained on synthetic text (documents.py) with the loss on response tokens only,
in fp32, stored in bf16. Two processes, one a core, each with its own half of every batch; or one process with both
halves in turn (a GPU, or --workers 1), which gives the same weights. Stop it at any time: the same command goes on from
the last chunk of documents. It writes config.json, model.safetensors, the tokenizer, tokenizer_check.json (ids of a
fixed text, verified on every load), base.json (template hash, tokens, losses), held_out.jsonl, skill.jsonl, and
held_out_behaviours.json, by which training text and held-out tasks are kept apart.

    python -m azr.tiny.make                        into azr/tiny, work files in runs/tiny-base
    python -m azr.tiny.make --out other --tokens 1e6

Two things are not as in a textbook. The loss of a batch is divided by a running mean of response tokens, not by the
batch's own: batches hold documents of like length, and a mean over the batch would make the first token of a long
thought weigh less than that of a short one, so the model would choose thoughts less often than its text does. And the
values in programs widen by stages, each let in when the traces of the one before are learned.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from azr.command import MOST, Number, Parser
from azr.tasks.prompts import solve_prompt, template_hash
from azr.tiny import documents as recipe
from azr.tiny import split
from azr.tiny.muon import Muon
from azr.tiny.programs import LAST, STAGES
from azr.tiny.vocabulary import EOS, build

SHARDS = 2  # halves of a batch, whatever the number of processes: the sums are the same bit for bit
CHUNK = 5_000  # documents of a shard between two saves of the work files
BATCH_TOKENS = 3072  # of a shard
VALIDATION_SEED = 10**9
LEARNED = 0.10  # nats a token of full traces, below which the next stage is let in
LONGEST_STAGE = 0.08  # of the training; then the next stage is let in all the same
WARM_UP = 100  # steps
MEAN_DECAY = 0.98  # of the running mean of response tokens a step


@dataclass(frozen=True)
class Shape:
    """The architecture."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 384


def new_model(shape: Shape, vocabulary: int, eos: int) -> Qwen2ForCausalLM:
    """Random weights of the shape, tied embeddings, vocabulary rounded up to a multiple of 16."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=-(-vocabulary // 16) * 16,
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            intermediate_size=shape.mlp,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            eos_token_id=eos,
            pad_token_id=eos,
            bos_token_id=None,
        )
    )


# --- batches and losses ----------------------------------------------------------------------------------------------

Row = tuple[list[int], int, int]  # ids, where the trained part begins, where it ends


def rows_of(tokenizer: Tokenizer, texts: list[tuple[str, str]]) -> list[Row]:
    """(ids, length of the prompt, length) of each (prompt, response)."""
    eos = tokenizer.token_to_id(EOS)
    prompts = tokenizer.encode_batch([prompt for prompt, _ in texts], add_special_tokens=False)
    responses = tokenizer.encode_batch([response for _, response in texts], add_special_tokens=False)
    rows = []
    for prompt, response in zip(prompts, responses):
        ids = prompt.ids + response.ids + [eos]
        rows.append((ids, len(prompt.ids), len(ids)))
    return rows


def batches_of(rows: list[Row], seed: str) -> list[list[Row]]:
    """Batches of like length under BATCH_TOKENS, in random order."""
    batches, batch = [], []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if batch and len(row[0]) * (len(batch) + 1) > BATCH_TOKENS:
            batches.append(batch)
            batch = []
        batch.append(row)
    batches.append(batch)
    random.Random(seed).shuffle(batches)
    return batches


def loss_sum(model: Qwen2ForCausalLM, batch: list[Row], device) -> tuple[torch.Tensor, int]:
    """Sum of the cross-entropy over the trained tokens of a batch, and how many there are."""
    width = max(len(ids) for ids, _, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    trained = torch.zeros(len(batch), width - 1, dtype=torch.bool)
    for i, (row, start, end) in enumerate(batch):
        ids[i, : len(row)] = torch.tensor(row)
        trained[i, start - 1 : end - 1] = True
    ids, trained = ids.to(device), trained.to(device)
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][trained]  # right-padded and causal: no mask needed
    return F.cross_entropy(model.lm_head(hidden), ids[:, 1:][trained], reduction="sum"), len(hidden)


def thought_rows(tokenizer: Tokenizer, mode: str, style: str, stage: int, count: int = 150) -> list[Row]:
    """Solving documents of one style never trained on, the trained part cut to the thought ("none": the answer)."""
    rng = random.Random(f"{VALIDATION_SEED}/{mode}/{style}/{stage}")
    rows = []
    for _ in range(count):
        drawn = recipe.draw_task(mode, rng, STAGES[stage])
        thought = recipe.think(drawn, style, rng, STAGES[stage])
        prompt, end = solve_prompt(drawn.task, "tiny"), f"</think><answer>{recipe.answer(drawn.task)}</answer>"
        if style == "none":
            rows += rows_of(tokenizer, [(prompt, end)])
        else:
            ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, thought)]
            rows.append((ids[0] + ids[1], len(ids[0]), len(ids[0]) + len(ids[1])))
    return rows


@torch.no_grad()
def mean_loss(model, rows: list[Row], device) -> float:
    """Nats a trained token."""
    sums = [loss_sum(model, batch, device) for batch in batches_of(rows, "validation")]
    return sum(loss.item() for loss, _ in sums) / sum(count for _, count in sums)


# --- training --------------------------------------------------------------------------------------------------------


def optimizers_for(model, muon: bool, rate: float) -> list[tuple[torch.optim.Optimizer, float]]:
    """(optimizer, peak learning rate): Muon for the matrices of the layers and AdamW for the rest, or AdamW alone."""
    parameters = dict(model.named_parameters())
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and "layers" in name] if muon else []
    rest = [p for p in parameters.values() if not any(p is m for m in matrices)]
    pairs = [(torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0 if muon else 0.05), rate)]
    if muon:
        pairs.append((Muon(matrices, lr=MUON_RATE), MUON_RATE))
    return pairs


MUON_RATE = 0.01


def schedule(step: int, done: float) -> float:
    """Share of the peak learning rate: warm-up, then a cosine to 2 % over the training."""
    return min(1.0, (step + 1) / WARM_UP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


class Shards:
    """The halves of every batch: both in this process, or one here and one in the other process."""

    def __init__(self, rank: int, world: int):
        self.mine = range(SHARDS) if world == 1 else (rank,)
        self.alone, self.first = world == 1, rank == 0

    def least(self, counts: list[int]) -> int:
        """The smallest of the counts of all shards."""
        value = torch.tensor(min(counts))
        if not self.alone:
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value)

    def add(self, flats: list[torch.Tensor]) -> torch.Tensor:
        """The sum over all shards."""
        if self.alone:
            return flats[0] + flats[1]
        dist.all_reduce(flats[0])
        return flats[0]


def gradient(model, batch: list[Row], mean: float, device) -> torch.Tensor:
    """(parameters + 3,) gradient of the loss sum over the running mean, then loss sum, trained tokens, all tokens."""
    model.zero_grad(set_to_none=True)
    loss, count = loss_sum(model, batch, device)
    (loss / mean).backward()
    numbers = torch.tensor([loss.item(), count, sum(len(ids) for ids, _, _ in batch)], device=device)
    return torch.cat([*(p.grad.flatten() for p in model.parameters()), numbers])


def take_step(model, pairs, flat: torch.Tensor, share: float) -> None:
    """One step of the optimizers with a gradient clipped to norm 1."""
    flat = flat * min(1.0, 1.0 / (flat.norm().item() + 1e-6))
    for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()])):
        p.grad = part.view_as(p)
    for optimizer, peak in pairs:
        for group in optimizer.param_groups:
            group["lr"] = peak * share
        optimizer.step()


def train(model, tokenizer, args, device, shards: Shards) -> dict:
    """Trains until `args.tokens`, saving after every chunk of documents; returns the counters."""
    pairs = optimizers_for(model, args.optimizer == "muon", args.learning_rate)
    state, parent = load_work(args.work, model, pairs), os.getppid()
    while state["tokens"] < args.tokens:
        start, before, losses, counts = time.time(), state["tokens"], 0.0, 0.0
        done = state["tokens"] / args.tokens
        seeds = [f"{args.seed}/{state['chunk']}/{shard}" for shard in shards.mine]
        texts = [recipe.documents(seed, CHUNK, state["stage"], done) for seed in seeds]
        halves = [batches_of(rows_of(tokenizer, part), seed) for part, seed in zip(texts, seeds)]
        drawing = time.time() - start
        for i in range(shards.least([len(half) for half in halves])):
            if os.getppid() != parent:
                raise SystemExit("the process that started this one has ended")  # or it would go on writing work files
            mean = state["mean"] or 1000.0
            flat = shards.add([gradient(model, half[i], mean, device) for half in halves])
            loss, count, tokens = flat[-3:].tolist()
            take_step(model, pairs, flat[:-3], schedule(state["step"], state["tokens"] / args.tokens))
            state["mean"] = count if state["mean"] is None else MEAN_DECAY * mean + (1 - MEAN_DECAY) * count
            state["tokens"] += int(tokens)
            state["step"] += 1
            losses, counts = losses + loss, counts + count
        state["chunk"] += 1
        trace_loss = mean_loss(model, thought_rows(tokenizer, "deduction", "full", state["stage"]), device)
        late = state["tokens"] > state["stage_began"] + LONGEST_STAGE * args.tokens
        if state["stage"] < LAST and (trace_loss < LEARNED or late):
            state |= {"stage": state["stage"] + 1, "stage_began": state["tokens"]}
        state["seconds"] += time.time() - start
        if shards.first:
            save_work(args.work, model, pairs, state)
            left = (args.tokens - state["tokens"]) * state["seconds"] / state["tokens"]
            print(
                f"chunk {state['chunk']:3d}  {state['tokens'] / 1e6:5.1f} M tokens  loss {losses / counts:.4f} "
                f" full trace {trace_loss:.4f}  stage {state['stage']}  "
                f"{(state['tokens'] - before) / (time.time() - start):.0f} tokens/s (drawing {drawing:.0f} s)  "
                f"{max(left, 0) / 60:.0f} min left",
                flush=True,
            )
    return state


def save_work(work: Path, model, pairs, state: dict) -> None:
    """Weights, moments and counters in one file, written aside and renamed."""
    held = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer, _ in pairs]}
    torch.save(held | {"state": state}, work / "work.pt.tmp")
    os.replace(work / "work.pt.tmp", work / "work.pt")


def load_work(work: Path, model, pairs) -> dict:
    """Puts back what save_work wrote; the counters of a fresh start if there is nothing."""
    if not (work / "work.pt").exists():
        return {"chunk": 0, "step": 0, "tokens": 0, "seconds": 0.0, "mean": None, "stage": 0, "stage_began": 0}
    held = torch.load(work / "work.pt", map_location=next(model.parameters()).device, weights_only=True)
    model.load_state_dict(held["model"])
    for (optimizer, _), saved in zip(pairs, held["optimizers"]):
        optimizer.load_state_dict(saved)
    return held["state"]


# --- what is written -------------------------------------------------------------------------------------------------


def losses_by_style(model, tokenizer, device) -> dict[str, float]:
    """Nats a token on documents never trained on: of the thoughts of each style, and of answers without a thought."""
    return {
        f"{mode}/{style}": round(mean_loss(model, thought_rows(tokenizer, mode, style, LAST), device), 4)
        for mode in recipe.MODES
        for style in recipe.STYLES
    }


def write_model(out: Path, model, tokenizer, state: dict) -> None:
    """The model directory: bf16 weights, tokenizer check, and what was trained on what."""
    model.to(torch.bfloat16).save_pretrained(out)
    check = "".join(prompt + response for prompt, response in recipe.documents(VALIDATION_SEED, 8))
    ids = tokenizer.encode(check, add_special_tokens=False).ids
    (out / "tokenizer_check.json").write_text(json.dumps({"text": check, "ids": ids}) + "\n")
    base = {"template": "tiny", "template_hash": template_hash("tiny"), **state}
    (out / "base.json").write_text(json.dumps(base, indent=1) + "\n")


def made_first(out: Path) -> tuple[Path, ...]:
    """What must be there before a document is drawn."""
    return out / "tokenizer.json", out / "held_out.jsonl", split.BEHAVIOURS


def write_held_out(out: Path) -> None:
    """held_out.jsonl and skill.jsonl, and the behaviours that training text must not have."""
    draws = recipe.held_out_draws()
    split.write_behaviours(drawn.example.program for drawn in draws)
    for name, tasks in (
        ("held_out.jsonl", [drawn.task for drawn in draws]),
        ("skill.jsonl", recipe.held_out_skill(200)),
    ):
        (out / name).write_text("".join(json.dumps(task.to_json()) + "\n" for task in tasks))


def work(rank: int, world: int, args: argparse.Namespace, device: str) -> None:
    """One process of the training."""
    if world > 1:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{args.work.resolve()}/meeting", rank=rank, world_size=world
        )
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    shape = Shape(args.hidden, args.layers, mlp=3 * args.hidden)
    model = new_model(shape, tokenizer.get_vocab_size(), tokenizer.token_to_id(EOS)).to(device)
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count:,} parameters, {args.tokens / 1e6:.0f} M tokens, {world} x {device}", flush=True)
    state = train(model, tokenizer, args, torch.device(device), Shards(rank, world))
    if rank == 0:
        state["losses"] = losses_by_style(model, tokenizer, torch.device(device))
        write_model(args.out, model, tokenizer, state)
        print(f"written to {args.out}: {state['losses']}")
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    """Trains a base, or goes on with one: see the module. Exit code 2 with one line for a wrong command line."""
    parser = Parser(
        prog="python -m azr.tiny.make", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="model directory to write")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-base"), help="work files, for going on later")
    parser.add_argument("--tokens", type=Number(float, 1, 1e12), default=80e6, help="training tokens, prompts included")
    parser.add_argument("--seed", type=Number(int, 0, MOST), default=0, help="of the documents")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument(
        "--learning-rate", type=Number(float, 0, 1, above=True, below=True), default=3e-3, help="peak, of AdamW"
    )
    parser.add_argument(
        "--hidden", type=Number(int, 32, 2**13), default=128, help="width; the MLP is three times as wide"
    )
    parser.add_argument("--layers", type=Number(int, 1, 200), default=Shape.layers)
    parser.add_argument("--workers", type=int, choices=(1, 2), default=2, help="processes (a GPU: always 1)")
    args = parser.parse_args()
    if args.hidden % (2 * Shape.heads):  # a head's numbers are rotated in pairs
        parser.error(f"argument --hidden: must be a multiple of {2 * Shape.heads}, not {args.hidden}")
    try:
        for directory in (args.out, args.work):
            directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{directory}: cannot be written to ({error.strerror})")
    (args.work / "meeting").unlink(missing_ok=True)
    if not (args.work / "work.pt").exists() or not all(path.exists() for path in made_first(args.out)):
        write_held_out(args.out)
        build(args.out)
    if torch.cuda.is_available() or args.workers == 1:
        work(0, 1, args, "cuda" if torch.cuda.is_available() else "cpu")
    else:
        torch.multiprocessing.spawn(work, (2, args, "cpu"), nprocs=2)


if __name__ == "__main__":
    main()
