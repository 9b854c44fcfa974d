"""Trains the embedded base model from scratch and writes it next to this file: `python -m azr.tiny.make`.

A Qwen2 of about 1.2 M parameters, trained on synthetic text (documents.py) with the loss on response tokens only, in
fp32, stored in bf16. About 45 minutes on two CPU cores, minutes on a GPU. Stop it at any time: the same command goes on
from the last chunk of documents. What it writes: config.json, model.safetensors, the tokenizer, tokenizer_check.json
(ids of a fixed text, verified on every load), base.json (template hash, tokens, loss), held_out.jsonl and skill.jsonl.

    python -m azr.tiny.make                        into azr/tiny, work files in runs/tiny-base
    python -m azr.tiny.make --out other --tokens 1e6
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
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from azr.prompts import template_hash
from azr.tiny.documents import documents, held_out_tasks
from azr.tiny.vocabulary import EOS, build

MODES = ("deduction", "abduction", "induction")
CHUNK = 10_000  # documents between two saves of the work files
BATCH_TOKENS = 4096
VALIDATION_SEED = 10**9
LATE = 0.63  # share of the training after which most documents are about solving


@dataclass(frozen=True)
class Shape:
    """The architecture; 1.24 M parameters with a vocabulary of 432."""

    hidden: int = 160
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp: int = 448


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


def token_batches(
    tokenizer: Tokenizer, seed: int, count: int, late: bool = False
) -> list[list[tuple[list[int], int]]]:
    """Documents of a seed as (ids, prompt length), in batches of like length under the budget, in random order."""
    texts = documents(seed, count, late)
    eos = tokenizer.token_to_id(EOS)
    prompts = tokenizer.encode_batch([prompt for prompt, _ in texts], add_special_tokens=False)
    responses = tokenizer.encode_batch([response for _, response in texts], add_special_tokens=False)
    rows = sorted(
        ((p.ids + r.ids + [eos], len(p.ids)) for p, r in zip(prompts, responses)), key=lambda row: len(row[0])
    )
    batches, batch = [], []
    for row in rows:
        if batch and len(row[0]) * (len(batch) + 1) > BATCH_TOKENS:
            batches.append(batch)
            batch = []
        batch.append(row)
    random.Random(seed).shuffle(batches)
    return batches + [batch]


def response_loss(model: Qwen2ForCausalLM, batch, device) -> tuple[torch.Tensor, int]:
    """Mean cross-entropy over response tokens, and how many tokens the batch has in all."""
    width = max(len(ids) for ids, _ in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    trained = torch.zeros(len(batch), width - 1, dtype=torch.bool)
    for i, (row, prompt) in enumerate(batch):
        ids[i, : len(row)] = torch.tensor(row)
        trained[i, prompt - 1 : len(row) - 1] = True
    ids, trained = ids.to(device), trained.to(device)
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][trained]  # right-padded and causal: no mask needed
    return F.cross_entropy(model.lm_head(hidden), ids[:, 1:][trained]), sum(len(row) for row, _ in batch)


@torch.no_grad()
def validation_loss(model, tokenizer, device) -> float:
    """Response loss on documents of a seed that is never trained on."""
    batches = token_batches(tokenizer, VALIDATION_SEED, 1000)
    return sum(response_loss(model, batch, device)[0].item() for batch in batches) / len(batches)


def save_work(work: Path, model, optimizer, state: dict) -> None:
    """Weights, Adam moments and counters; each file is written aside and renamed, the counters last."""
    tensors = {f"weight/{name}": p for name, p in model.named_parameters()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{i}/{name}": value for name, value in moments.items()}
    path = work / f"chunk_{state['chunk']}.safetensors"
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, str(path) + ".tmp")
    os.replace(str(path) + ".tmp", path)
    (work / "state.json.tmp").write_text(json.dumps(state))
    os.replace(work / "state.json.tmp", work / "state.json")
    for old in work.glob("chunk_*.safetensors"):
        if old != path:
            old.unlink()


def load_work(work: Path, model, optimizer, device) -> dict:
    """Puts back what save_work wrote; {} counters of a fresh start if there is nothing."""
    if not (work / "state.json").exists():
        return {"chunk": 0, "tokens": 0, "seconds": 0.0}
    state = json.loads((work / "state.json").read_text())
    tensors = load_file(work / f"chunk_{state['chunk']}.safetensors", device=str(device))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"weight/{name}"])
    moments: dict[int, dict] = {}
    for name, value in tensors.items():
        if name.startswith("adam/"):
            _, i, key = name.split("/")
            moments.setdefault(int(i), {})[key] = value.cpu() if key == "step" else value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def learning_rate(tokens: int, total: float, peak: float) -> float:
    """A hundred batches of warm-up, then a cosine to 2 % of the peak."""
    warm = min(1.0, (tokens + 1) / (100 * BATCH_TOKENS))
    return peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, tokens / total))))


def train(model, tokenizer, args, device) -> dict:
    """Trains until `args.tokens`, saving after every chunk of documents; returns the counters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    state = load_work(args.work, model, optimizer, device)
    while state["tokens"] < args.tokens:
        start, losses = time.time(), []
        late = state["tokens"] > LATE * args.tokens
        for batch in token_batches(tokenizer, 100 + state["chunk"], CHUNK, late):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state["tokens"], args.tokens, args.learning_rate)
            loss, tokens = response_loss(model, batch, device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            state["tokens"] += tokens
        state["chunk"] += 1
        state["seconds"] += time.time() - start
        save_work(args.work, model, optimizer, state)
        mean, left = sum(losses) / len(losses), max(args.tokens - state["tokens"], 0)
        pace = state["seconds"] / state["tokens"]
        print(
            f"chunk {state['chunk']:3d}  {state['tokens'] / 1e6:6.1f} M tokens  response loss {mean:.4f}  "
            f"{state['tokens'] / state['seconds']:.0f} tokens/s  {left * pace / 60:.0f} min left",
            flush=True,
        )
    return state


def write_model(out: Path, model, tokenizer, state: dict) -> None:
    """The model directory: bf16 weights, tokenizer check, held-out tasks and what was trained on what."""
    model.to(torch.bfloat16).save_pretrained(out)
    text = documents(VALIDATION_SEED, 8)
    check = "".join(prompt + response for prompt, response in text)
    ids = tokenizer.encode(check, add_special_tokens=False).ids
    (out / "tokenizer_check.json").write_text(json.dumps({"text": check, "ids": ids}) + "\n")
    base = {"template": "tiny", "template_hash": template_hash("tiny"), **state}
    (out / "base.json").write_text(json.dumps(base, indent=1) + "\n")
    tasks = [task for mode in MODES for task in held_out_tasks(mode, 200)]
    for name, rows in (("held_out.jsonl", tasks), ("skill.jsonl", held_out_tasks("math", 200))):
        (out / name).write_text("".join(json.dumps(task.to_json()) + "\n" for task in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="model directory to write")
    parser.add_argument("--work", type=Path, default=Path("runs/tiny-base"), help="work files, for going on later")
    parser.add_argument(
        "--tokens", type=float, default=26e6, help="training tokens (26e6: about 50 minutes on two cores)"
    )
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--hidden", type=int, default=160, help="width; the MLP is 2.8 times as wide")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.work.mkdir(parents=True, exist_ok=True)
    build(args.out)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    shape = Shape(hidden=args.hidden, mlp=int(2.8 * args.hidden))
    model = new_model(shape, tokenizer.get_vocab_size(), tokenizer.token_to_id(EOS)).to(device)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.tokens / 1e6:.0f} M tokens, on {device}",
        flush=True,
    )
    state = train(model, tokenizer, args, device)
    state["validation_loss"] = round(validation_loss(model, tokenizer, device), 4)
    write_model(args.out, model, tokenizer, state)
    print(f"written to {args.out}: validation response loss {state['validation_loss']}")


if __name__ == "__main__":
    main()
