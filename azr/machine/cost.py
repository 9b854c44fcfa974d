"""What a run takes besides memory: time of a step by phase, of the run, dollars, disk. Computed, not measured.

    card, why = card_for(preset)                          # the one in this machine, else one of the preset
    middle, fast, slow = (step_time(plan, card, pace) for pace in PACES)
    print(render(plan, config, card, why))                # a Config of azr/train/config.py

Decoding is bound by memory and by launching: a step of the engine reads the weights once and every sequence's keys and
values, or takes the products' time, whichever is longer, and each layer costs a fixed time that no bandwidth shortens.
Prefill and update are bound by the products (6 FLOPs a weight and trained token: forward, recomputed forward, gradient
of the inputs; 8 where the weights get one). Peaks are those of the data sheets; what is reached of them, and how long a
response is, is a guess in three paces, stated with the result. The middle one and the time of a layer follow what an
H200 measured with a 3B (docs/gpu.md); no other card has been measured. A run measures its own steps and corrects this
after the third. Left out: CPUs, evaluations, loading, several GPUs. No torch is imported.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from azr.machine.plan import COPIES, CUDA_CONTEXT, GB, GIB, LEAST_SLOTS, Plan, Preset, Shape, value_bytes
from azr.machine.plan import verdict as memory_verdict
from azr.models import model_path
from azr.runs import KEEP_STATES


@dataclass(frozen=True)
class Card:
    """GPU memory in GiB, bandwidth in GB/s, dense half-precision products in TFLOP/s, fp32 sums: data-sheet peaks."""

    name: str
    gib: int
    bandwidth: float
    tflops: float
    bf16: bool = True  # in hardware

    @property
    def free(self) -> float:
        """Bytes that CUDA's context leaves."""
        return self.gib * GIB - CUDA_CONTEXT


CARDS = {
    card.name: card
    for card in (  # the first of a size stands for the preset of that size
        Card("3070", 8, 448, 41),
        Card("3060", 12, 360, 25),
        Card("a4000", 16, 448, 77),
        Card("4080", 16, 717, 97),
        Card("t4", 16, 320, 65, bf16=False),
        Card("3090", 24, 936, 71),
        Card("4090", 24, 1008, 165),
        Card("a10", 24, 600, 125),
        Card("l4", 24, 300, 121),
        Card("5090", 32, 1792, 210),
        Card("a100-40", 40, 1555, 312),
        Card("a6000", 48, 768, 155),
        Card("l40s", 48, 864, 362),
        Card("a100", 80, 1935, 312),
        Card("h100", 80, 3350, 989),
        Card("h200", 141, 4800, 989),
    )
}


@dataclass(frozen=True)
class Pace:
    """A guess at what decides the time: shares of the card's peaks that are reached, of bandwidth and of products, mean
    tokens of a proposal and of an answer, share of proposals that are valid, share of their tasks that are solved
    sometimes and failed sometimes: the others give no gradient and are not trained on."""

    name: str
    bandwidth: float
    products: float
    proposal: int
    answer: int
    valid: float
    mixed: float


# mixed: 0.63 of the response tokens of ten steps of the embedded model
PACES = (
    Pace("middle", 0.6, 0.3, 400, 400, 0.75, 0.65),
    Pace("fast", 0.8, 0.4, 200, 200, 0.5, 0.5),
    Pace("slow", 0.4, 0.2, 1000, 1000, 1.0, 1.0),
)
# Of the two samplings' seconds remain, for answers are sampled beside the last proposals (azr/train/ahead.py): 0.87 to
# 0.93, followed response by response on four cards (tests/bench_ahead.py --card).
AHEAD = 0.9
LONGEST_OVER_MEAN = 4  # of the responses of a phase; when few are left, slots stand empty
PROPOSE_PROMPT, SOLVE_PROMPT = 0.5, 350  # mean prompt: share of prompt_tokens, tokens
# s of a layer of a decode step that no bandwidth shortens, with the weights as copies and as stored: 22 and 49 kernels,
# on an H200 (3B: 4.5 ms a step at 1 and at 16 rows; 9.4 to 11.7 ms at 16 to 128 rows)
LAUNCH, LAUNCH_STORED = 1.1e-4, 2.2e-4
TO_HOST = 1e10  # bytes/s of a copy into the CPU's memory, a guess: after each step all that training changes
SHARED_ROW = 4096  # rollout.py: tokens of a row of the update that holds several answers to one prompt
RUNS_A_SECOND = 500  # programs of proposals and answers in the sandbox, with their checks, on two cores
# Bytes a weight of a decode step in 4 bits, up to so many rows (worked out for a 4090 from bitsandbytes' dispatch).
NF4_READ = ((16, 0.65), (64, 1.5), (128, 2.5), (math.inf, 4.25))
ROW_BYTES = 1.5  # of samples.jsonl to a character of prompts and responses: the task, JSON, escapes
TOKEN_CHARACTERS = 3.5
TOKENIZER_BYTES = 12e6
LIBRARIES = 1e9  # of a process on a CPU: Python, torch and what else is imported


# ---------------------------------------------------------------- which card


def card_for(preset: Preset) -> tuple[Card | None, str]:
    """(card, why) where none is named: the one in this machine, else a common one of the preset's memory; None: a CPU.

    torch is asked for the GPU only if it is loaded already.
    """
    torch = sys.modules.get("torch")
    usual = next((card for card in CARDS.values() if card.gib == preset.gib), None)
    if torch is not None and torch.cuda.is_available():
        here = torch.cuda.get_device_name()
        words = here.lower().replace("-", " ").split()
        if card := next((card for key, card in CARDS.items() if key in words), None):
            return card, f"{here}, in this machine"
        return usual, f"{here} is not in the list of cards; taken for a {usual.name if usual else 'CPU'}"
    if usual is None:
        return None, "none: a CPU"
    return usual, f"assumed: {usual.name}, for no GPU is here; --preset names another"


# ---------------------------------------------------------------- time


@dataclass(frozen=True)
class StepTime:
    """Seconds of the phases of a step, and the tokens that it samples and trains on."""

    propose: float
    solve: float
    validate: float  # validating and judging, in the sandbox
    update: float
    sampled: int
    trained: int  # prompts included, one to a row of the update
    written: int  # to samples.jsonl

    @property
    def total(self) -> float:
        """Seconds of a step."""
        return self.propose + self.solve + self.validate + self.update


def step_time(plan: Plan, card: Card, pace: Pace) -> StepTime:
    """Computes a step of the recipe lean: one response a proposal, n answers to each valid task; trained on are the
    proposals and the answers of mixed tasks."""
    preset, shape = plan.preset, plan.shape
    proposals = 3 * preset.prompts_per_mode
    tasks = max(1, round(proposals * pace.valid))
    answers = tasks * preset.answers
    proposal, answer = (min(length, preset.max_new_tokens) for length in (pace.proposal, pace.answer))
    to_propose = int(PROPOSE_PROMPT * preset.prompt_tokens)
    to_solve = min(SOLVE_PROMPT, int(0.6 * to_propose))
    sampled = proposals * proposal + answers * answer
    mixed = max(1, round(tasks * pace.mixed))
    rows = mixed * preset.answers  # of the update, each with its prompt, unless answers to one prompt fit into a row
    if 2 * answer + to_solve <= SHARED_ROW:
        rows = mixed * math.ceil(preset.answers * answer / (SHARED_ROW - to_solve))
    scored = proposals * proposal + mixed * preset.answers * answer
    trained = scored + proposals * to_propose + rows * to_solve
    written = sampled + proposals * to_propose + answers * to_solve
    card = dataclasses.replace(card, bandwidth=card.bandwidth * pace.bandwidth, tflops=card.tflops * pace.products)
    propose = AHEAD * sampling_time(plan, card, proposals, proposal, to_propose, proposals)
    solve = AHEAD * sampling_time(plan, card, answers, answer, to_solve, tasks)
    update = update_time(shape, preset, card, scored, trained)
    return StepTime(propose, solve, (proposals + answers) / RUNS_A_SECOND, update, sampled, trained, written)


def sampling_time(plan: Plan, card: Card, responses: int, length: int, prompt: int, distinct: int) -> float:
    """Seconds at the card's rates to prefill `distinct` prompts and decode the responses of mean `length`."""
    slots = max(LEAST_SLOTS, min(plan.preset.max_batch, responses))
    tail = min(plan.preset.max_new_tokens, LONGEST_OVER_MEAN * length)
    steps = max(responses * length / slots, tail)
    decode = decode_time(plan, card, responses * length / steps, prompt + length / 2)
    return steps * decode + distinct * prompt * 2 * plan.shape.parameters / (card.tflops * 1e12)


def decode_time(plan: Plan, card: Card, rows: float, context: float) -> float:
    """Seconds at the card's rates of a decode step: each of `rows` sequences of `context` tokens gets one more."""
    shape = plan.shape
    copied = plan.preset.quantization == "none" or "copied weights" in plan.phases["rollout"]
    read = decode_bytes(shape, "none" if copied else "nf4", rows) / (card.bandwidth * 1e9)
    cache = rows * context * shape.kv_bytes / (card.bandwidth * 1e9)
    launch = shape.layers * (LAUNCH if copied else LAUNCH_STORED)
    return max(read, rows * 2 * shape.parameters / (card.tflops * 1e12)) + cache + launch


def decode_bytes(shape: Shape, quantization: str, rows: float) -> float:
    """Returns the bytes that a decode step of so many rows reads: few rows use bitsandbytes' fused 4-bit products; with
    more, each matrix is unpacked to bf16, written and read."""
    linear = next(size for most, size in NF4_READ if rows <= most) if quantization == "nf4" else 2
    return shape.linear_parameters * linear + 2 * shape.vocabulary * shape.hidden


def update_time(shape: Shape, preset: Preset, card: Card, scored: int, trained: int) -> float:
    """Seconds at the card's rates; the head counts for the scored tokens alone, with the gradient in two halves. With
    every weight trained also the copy of all of them, which for an adapter takes no time to speak of."""
    full = preset.train == "full"
    flops = (8 if full else 6) * (shape.linear_parameters * trained + shape.vocabulary * shape.hidden * scored)
    passes = 3 * (trained / preset.token_budget + 1) if preset.quantization == "nf4" else 0
    unpack = passes * 4.5 * shape.linear_parameters
    copied = COPIES * shape.parameters / TO_HOST if full else 0
    return flops / (card.tflops * 1e12) + unpack / (card.bandwidth * 1e9) + copied


# ---------------------------------------------------------------- disk


def disk(plan: Plan, model: str, steps: int, eval_every: int) -> dict[str, float]:
    """Bytes of the run directory by part, and of the model's files in the hub's cache."""
    preset = plan.preset
    stays = 4 * preset.adapters * plan.shape.lora_parameters(preset.lora_rank, preset.lora_targets)
    state = 3 * stays
    if preset.train == "full":
        value = value_bytes(preset, plan.device)
        stays = value * plan.shape.parameters
        state = stays + (12 if value == 2 else 8) * plan.shape.parameters  # masters, where there are some, and moments
    count = 2 + (steps - 1) // eval_every if eval_every else 2  # step 0, evaluated ones, the last
    tokens = step_time(plan, CARDS["h100"], PACES[0]).written * steps
    hub = not Path(model_path(model)).is_dir()
    return {
        "adapters": count * stays,
        "states": (KEEP_STATES + 1) * state,
        "samples": ROW_BYTES * TOKEN_CHARACTERS * tokens,
        "download": 2 * plan.shape.parameters + TOKENIZER_BYTES if hub else 0,
    }


def free_disk(out: str) -> float:
    """Bytes free where the run directory will be."""
    path = Path(out).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def free_memory() -> float:
    """Bytes of ordinary memory that a process may still take; infinite where the system does not say."""
    try:
        words = Path("/proc/meminfo").read_text().split()
        return 1024 * float(words[words.index("MemAvailable:") + 1])
    except (OSError, ValueError):
        return math.inf


# ---------------------------------------------------------------- as text


def verdict(plan: Plan, config) -> tuple[bool, str]:
    """(whether the run fits, one line that says so or a line for each thing that it does not fit)."""
    needed, free = sum(disk(plan, config.model, config.steps, config.eval_every).values()), free_disk(config.out)
    room = f"{needed / GB:.2f} GB of disk, {free / GB:.0f} GB are free at {config.out}"
    wants = [] if plan.fits else [memory_verdict(plan)]
    if plan.capacity is None and plan.peak + LIBRARIES > (memory := free_memory()):
        wants = [f"{memory_verdict(plan)}, {LIBRARIES / GB:g} GB;\n             {memory / GB:.1f} are free"]
    if needed > free:
        fewer = "" if config.eval_every == 0 else "; --eval-every 0 keeps two checkpoints only"
        wants += [f"{room}{fewer}"]
    if wants:
        return False, "\n".join(f"DOES NOT FIT {want}" for want in wants)
    return True, f"fits         {memory_verdict(plan)};\n             {room}"


def render(plan: Plan, config, card: Card | None, why: str) -> str:
    """Time and cost on a GPU, and disk, of a run with these settings, as plain text, 80 columns."""
    time = times(plan, card, config.steps, config.price_per_hour) if card else []
    lines = [f"card         {why}", *time, ""]
    parts = disk(plan, config.model, config.steps, config.eval_every)
    gb = {name: f"{size / GB:.2f} GB" for name, size in parts.items()}
    stay = "models that stay" if plan.preset.train == "full" else "adapters that stay"
    lines += [
        f"disk         {gb['adapters']} {stay}, {gb['states']} states to resume from,",
        f"             {gb['samples']} samples.jsonl, {gb['download']} model files to load",
    ]
    return "\n".join(lines)


def times(plan: Plan, card: Card, steps: int, price: float | None) -> list[str]:
    """A column a pace: the phases of a step, the run, its price, and what was assumed."""
    from azr.console import duration  # needs rich, which the doctor must do without

    half = "bf16" if card.bf16 else "fp16; it has no bf16"
    lines = [f"             peaks: {card.bandwidth:.0f} GB/s, {card.tflops:.0f} TFLOP/s in {half}", ""]
    each = [step_time(plan, card, pace) for pace in PACES]

    def row(name: str, cells) -> None:
        lines.append(f"{name:16}" + "".join(f"{cell:>12}" for cell in cells))

    row("time, computed", (pace.name for pace in PACES))
    for name in ("propose", "solve", "validate", "update"):
        row(f"  {name}", (f"{getattr(time, name):.1f} s" for time in each))
    row("a step", (f"{time.total:.1f} s" for time in each))
    row(f"{steps} steps", (duration(steps * time.total) for time in each))
    if price:
        row(f"at ${price:g}/h", (f"${steps * time.total / 3600 * price:,.2f}" for time in each))
    row("tokens a step", (f"{time.sampled:,}" for time in each))
    row("  an answer", (f"{min(pace.answer, plan.preset.max_new_tokens)}" for pace in PACES))
    row("  valid", (f"{100 * pace.valid:.0f} %" for pace in PACES))
    row("  trained on", (f"{100 * pace.mixed:.0f} %" for pace in PACES))
    row("  of the peaks", (f"{100 * pace.bandwidth:.0f}/{100 * pace.products:.0f} %" for pace in PACES))
    lines += ["             computed, not measured on this card (an H200 was: docs/gpu.md);"]
    return [*lines, "             a run says after 3 steps what its own steps make of it"]
