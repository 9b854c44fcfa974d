"""The settings of a training run: one frozen dataclass whose field documentation is the help text of train_azr.py."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from azr.command import Parser
from azr.models import base_description, model_path
from azr.tasks.prompts import template_hash
from azr.train.rewards import SHAPES
from azr.train.trackers import TRACKERS

from azr.machine import cost, plan
from azr.train import arms


NO_BF16 = ("t4",)  # of cost.CARDS: older than Ampere


def setting(default, text: str, choices: tuple = ()):
    """A field with its help text; a default of None is filled in by the model or the preset."""
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Config:
    """What `python train_azr.py` takes. None: chosen from the model and the memory at hand, printed, and saved."""

    model: str = setting("tiny", "tiny (embedded), qwen-3b, qwen-7b, a hub id, or a directory")
    out: str | None = setting(None, "run directory (default runs/MODEL-SEED)")
    steps: int | None = setting(None, "training steps (500; tiny: what fits 15 minutes on two CPU cores)")
    seed: int = setting(0, "every draw of the run follows from it")
    resume: str = setting("none", "auto: go on from the last checkpoint of --out; DIR: of that run; none: a new run")
    algorithm: str = setting(
        "selfplay",
        "selfplay; rlvr: answers to the fixed tasks of --data; sft: cross-entropy on the responses of --data",
        ("selfplay", "rlvr", "sft"),
    )
    data: str | None = setting(
        None, "rlvr: a file of tasks, sft: of tasks with responses (python -m azr.tasks make writes both)"
    )
    step_tokens: int | None = setting(
        None, "rlvr, sft: response tokens a step; a run of selfplay logs its own as train/tokens"
    )
    recipe: str = setting(
        "lean", "lean: the answers that measure the solve rate are trained on; azr: as published", ("lean", "azr")
    )
    preset: str = setting("auto", "sizes for a GPU memory", ("auto", *plan.PRESETS))
    learning_rate: float | None = setting(None, "of AdamW, constant (tiny 1e-3, else 2e-5)")
    prompts_per_mode: int | None = setting(None, "proposals a mode and step; lower if a step takes too long")
    answers: int = setting(8, "answers that measure a task's solve rate; more: finer rewards, slower steps")
    references: int | None = setting(None, "earlier tasks shown to the proposer (6; tiny 2)")
    max_new_tokens: int | None = setting(None, "longest response in tokens; raise if many are cut off ('truncated')")
    prompt_tokens: int | None = setting(None, "longest proposer prompt; references that do not fit are left out")
    temperature: float = setting(1.0, "of sampling and of the trained log-probs")
    minibatches: int = setting(1, "optimizer steps a training step; above 1 the PPO clip becomes active")
    loss_weighting: str = setting(
        "group", "group: the six (role, mode) groups weigh the same; token: all tokens do", ("group", "token")
    )
    solver_tasks: str = setting(
        "backfill",
        "fresh: only this step's tasks; backfill: topped up from the buffer when few are valid",
        ("fresh", "backfill"),
    )
    solver_reward: str = setting(
        "graded", "graded: 1 / -0.5 / -1 for correct / wrong / malformed; binary: 1 / 0", ("graded", "binary")
    )
    proposer: str = setting(
        "joint",
        "no-update: proposals get no gradient; frozen-base: and are the base's, adapter off; no-update-matched: as "
        "no-update, with solver rows of buffer tasks for the proposals' tokens",
        ("joint", "no-update", "frozen-base", "no-update-matched"),
    )
    proposer_reward: str = setting(
        "learnability",
        "of a valid task at solve rate r; invalid is -1 (python analyze.py rewards plots them)",
        tuple(SHAPES),
    )
    ends_penalty: float = setting(0.0, "taken off a valid task's reward where r is 0 or 1 (0.5 as in AZR's code)")
    entropy_control: str = setting("none", "what acts on the entropy of the update", arms.CONTROLS)
    control_fraction: float | None = setting(
        None, "of tokens: clip-cov 2e-4, kl-cov 2e-3 (tiny 2e-2 both), top-entropy and high-advantage-clip 0.2"
    )
    entropy_coefficient: float | None = setting(None, "of the entropy bonus (1e-3), or the cap of adaptive (5e-3)")
    entropy_target: float | None = setting(None, "adaptive: this fraction of the first step's entropy is held (0.8)")
    kl_coefficient: float | None = setting(None, "kl-cov: of |log p - log p_old| on the chosen tokens (1)")
    off_policy_gamma: float = setting(0.0, "weight of solutions the policy did not sample, in each solver group")
    off_policy_source: str | None = setting(
        None, "base: its solutions, adapter off, of tasks solved at most half the time; or a FILE of solutions"
    )
    off_policy_schedule: str = setting("constant", "of gamma; linear: down to 0", ("constant", "linear"))
    off_policy_weight: str = setting(
        "truncated",
        "truncated: importance ratio to the recorded log-probs, at most 2; luffy: p / (p + 0.1)",
        ("truncated", "luffy"),
    )
    off_policy_samples: int | None = setting(None, "answers the base draws to a task; the right ones are used (8)")
    off_policy_baseline: str = setting(
        "union", "answers that a group's mean is over: all, or the policy's own", ("union", "on-policy")
    )
    off_policy_control: str = setting(
        "none",
        "on-policy: the policy's own answers instead, as many; shuffled: the solutions of other tasks",
        ("none", "on-policy", "shuffled"),
    )
    quantization: str | None = setting(None, "of the frozen base (nf4; tiny none)", ("nf4", "none"))
    dtype: str | None = setting(
        None,
        "of computation and of what is not quantized; auto (default): bf16 on a GPU that has it, fp16 with a scaled "
        "loss on an older one (T4, V100), fp32 on a CPU. fp16 keeps sampler and trainer ten times closer than bf16",
        ("auto", "bf16", "fp16", "fp32"),
    )
    lora_rank: int | None = setting(None, "rank of the adapter (32; tiny 16)")
    lora_alpha: float | None = setting(None, "the update is alpha / rank x B A (default 2 x rank; tiny 4 x rank)")
    lora_targets: str = setting("all-linear", "which matrices get an adapter", ("all-linear", "attention"))
    attn: str = setting(
        "auto", "attention of sampling; auto: the fastest that runs here", ("auto", "flash", "triton", "sdpa")
    )
    rollout_weights: str = setting(
        "auto",
        "of a 4-bit base while sampling; bf16: an unpacked copy, faster, which needs its memory; stored: as they are; "
        "auto: copies if a quarter of the cache that all slots could use still fits beside them",
        ("auto", "stored", "bf16"),
    )
    token_budget: int | None = setting(
        None, "tokens of a training micro-batch; lower when memory is short, the gradient stays"
    )
    eval_every: int = setting(25, "steps between held-out evaluations; 0: only before and after")
    eval_data: str | None = setting(None, "held-out tasks, a JSON-lines file (tiny: its own)")
    eval_samples: int | None = setting(
        None, "answers a held-out task before and after training, for pass@k (tiny 64, else 0)"
    )
    eval_temperature: float = setting(1.0, "of those answers, whatever --temperature the training has")
    save_every: int = setting(10, "steps between checkpoints")
    save_minutes: float = setting(10.0, "minutes between checkpoints, if that is sooner; 0: by steps only")
    keep_states: int = setting(2, "newest checkpoints that can be resumed; the adapters of evaluated steps all stay")
    max_hours: float | None = setting(
        None, "stop with a checkpoint after the step in which this many hours are full; a resume counts anew"
    )
    price_per_hour: float | None = setting(None, "of the machine, in dollars: prints what the run costs")
    tracker: str = setting("none", "send each step's numbers there too; its package is yours to install", TRACKERS)
    card: str | None = setting(None, "--dry-run: plan for this card, such as 4090, whatever is in this machine")
    probe: str = setting(
        "auto",
        "before training, the longest allowed sequences once forward and backward, so that memory runs out now or not "
        "at all; auto: on a GPU",
        ("auto", "always", "never"),
    )
    max_batch: int | None = setting(None, "sequences decoded at once; what is learned does not depend on it")
    allow_cpu: bool = setting(False, "train a model other than tiny on the CPU, if no GPU can be used; days for 3B")
    dry_run: bool = setting(
        False, "print the resolved settings and the memory plan, train nothing; exit 1 if it does not fit"
    )
    doctor: bool = setting(
        False, "try what training needs on this machine, say what works, train nothing; exit 1 if it cannot run here"
    )

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "prompts_per_mode",
            "answers",
            "max_new_tokens",
            "minibatches",
            "lora_rank",
            "token_budget",
            "save_every",
            "keep_states",
            "step_tokens",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.card and not self.dry_run:
            raise ValueError("--card is for --dry-run: a run takes the card it finds")
        if self.temperature <= 0:
            raise ValueError(f"--temperature must be above 0 to train, not {self.temperature}")
        if self.eval_temperature <= 0:
            raise ValueError(f"--eval-temperature must be above 0, not {self.eval_temperature}")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise ValueError(f"--learning-rate must be between 0 and 1, not {self.learning_rate}")
        for f in dataclasses.fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value is not None and value not in choices:
                raise ValueError(f"--{f.name.replace('_', '-')} must be one of {', '.join(choices)}, not {value!r}")


def _type(f: dataclasses.Field):
    return {"int": int, "float": float}.get(str(f.type).removesuffix(" | None"), str)


def parse(arguments: list[str], description: str) -> Config:
    """The settings of a command line; those of --config FILE lie under those that are typed. Exits 2 on a bad flag."""
    parser = Parser(
        prog="train_azr.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="settings saved by an earlier run (its config.json)")
    for f in dataclasses.fields(Config):
        name, text = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.default is not None and f.default is not False:
            text += f" (default {f.default})"
        if f.default is False:
            parser.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(
                name,
                type=_type(f),
                choices=f.metadata["choices"] or None,
                default=argparse.SUPPRESS,
                metavar=None if f.metadata["choices"] else _type(f).__name__.upper(),
                help=text,
            )
    typed = vars(parser.parse_args(arguments))
    stored = read_config(typed.pop("config")) if typed.get("config") else typed.pop("config", None) or {}
    try:
        return Config(**{**stored, **typed})
    except ValueError as error:
        parser.error(str(error))


def read_config(path: str) -> dict:
    """Settings of a config.json; exits 2 with one line if it is none."""
    try:
        stored = json.loads(Path(path).read_text())
        if not isinstance(stored, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        sys.exit(_complain(f"--config {path}: {error}"))
    known = {f.name for f in dataclasses.fields(Config)}
    if unknown := sorted(set(stored) - known):
        sys.exit(_complain(f"--config {path}: unknown settings {', '.join(unknown)}"))
    for f in dataclasses.fields(Config):
        if f.name in stored and not _is_a(stored[f.name], str(f.type)):
            sys.exit(_complain(f"--config {path}: {f.name} must be {f.type}, not {json.dumps(stored[f.name])}"))
    return {key: value for key, value in stored.items() if key not in ("resume", "dry_run", "doctor")}


def completed(stored: dict) -> dict:
    """The settings of an earlier run with those that came later, as it would get them today if none were typed."""
    known = {f.name for f in dataclasses.fields(Config)}
    try:
        config, _ = resolve(Config(**{key: value for key, value in stored.items() if key in known - {"resume"}}))
    except (TypeError, ValueError):
        return stored  # no run of this script: the differences will say so
    return {**dataclasses.asdict(config), **stored}


def _is_a(value, kind: str) -> bool:
    """Whether a JSON value has the type of a field; a whole number is a float too, true is not a number."""
    if value is None:
        return kind.endswith("| None")
    known = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}[kind.removesuffix(" | None")]
    return isinstance(value, known) and (bool in known or not isinstance(value, bool))


def resolve(config: Config) -> tuple[Config, str]:
    """Every None filled in, and one line that says how: a run that goes on keeps its own; else the model's preset.

    Raises PlanError (a ValueError) for what is unknown or does nothing.
    """
    config = _carried_over(config)
    arms.refuse(config)
    tiny = base_description(config.model) is not None
    free = cost.free_bytes(config.card, plan.free_gpu_bytes())
    preset, why = plan.choose_preset(config.preset, "tiny" if tiny else config.model, free)
    values = {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset)} | {
        "out": _default_out(config),
        "eval_data": None,
    }
    values["lora_alpha"] = (4.0 if tiny else 2.0) * (config.lora_rank or preset.lora_rank)
    values |= arms.control_defaults(config.entropy_control, tiny)
    if config.dtype in (None, "auto"):
        config = dataclasses.replace(config, dtype=_auto_dtype(config, preset))
        why += "; computing in fp16: this GPU has no bf16 in hardware" if config.dtype == "fp16" else ""
    if config.off_policy_gamma > 0 and config.off_policy_source == "base":
        values["off_policy_samples"] = 8
    held_out = Path(model_path(config.model)) / "held_out.jsonl"
    if held_out.is_file():
        values["eval_data"] = str(held_out)
    filled = {
        f.name: values[f.name]
        for f in dataclasses.fields(Config)
        if getattr(config, f.name) is None and values.get(f.name) is not None
    }
    config = dataclasses.replace(config, **filled)
    if config.rollout_weights == "bf16" and config.quantization == "none":
        raise plan.PlanError(
            "--rollout-weights bf16 copies a 4-bit base; with --quantization none there is none to copy"
        )
    return config, why


def _carried_over(config: Config) -> Config:
    """What was not given, from the run that is resumed: free memory, which decides the preset, may differ now."""
    out = config.resume if config.resume not in ("auto", "none") else config.out or _default_out(config)
    path = Path(out) / "config.json"
    if config.resume == "none" or not path.is_file():
        return config
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return config  # opening the run will say what is wrong
    names = {f.name for f in dataclasses.fields(Config) if getattr(config, f.name) is None} & set(stored)
    return dataclasses.replace(
        config, **{name: stored[name] for name in names - {"out", "max_hours", "price_per_hour"}}
    )


def _auto_dtype(config: Config, preset: plan.Preset) -> str:
    """What --dtype auto is: of the named card, of this machine, or, in a plan made without a GPU, of a recent one."""
    if config.card:
        return "fp16" if config.card.lower() in NO_BF16 else "bf16"
    import torch

    from azr.policy.load import auto_dtype

    if config.dry_run and preset.gib and not torch.cuda.is_available():
        return "bf16"
    return auto_dtype("cuda" if torch.cuda.is_available() else "cpu")


def _default_out(config: Config) -> str:
    return f"runs/{Path(config.model.rstrip('/')).name}-{config.seed}"


def template_of(config: Config) -> str:
    """The wording of the prompts: the one a base was trained on, else azr. ValueError if it has changed since."""
    base = base_description(config.model)
    if base is None:
        return "azr"
    if base["template_hash"] != template_hash(base["template"]):
        raise ValueError(
            f"{config.model}: was trained on another wording of the {base['template']} prompts; build it again "
            "with python -m azr.tiny.make, or undo the change in azr/tasks/prompts.py"
        )
    return base["template"]


def dry_run(config: Config, why: str) -> int:
    """Prints settings, memory plan, time and cost; 1 if it does not fit. Needs no GPU and no network."""
    here = None if config.card else plan.free_gpu_bytes()
    tiny = base_description(config.model) is not None
    preset, _ = plan.choose_preset(config.preset, "tiny" if tiny else config.model, cost.free_bytes(config.card, here))
    named = {f.name: getattr(config, f.name, None) for f in dataclasses.fields(preset) if f.name != "name"}
    preset = dataclasses.replace(preset, **{name: value for name, value in named.items() if value is not None})
    room, device = cost.room(config.card, preset, here), "cuda" if preset.gib or here else "cpu"
    card, which = cost.card_for(config.card, preset, cost.gpu_here() if here else None)
    made = plan.plan_memory(plan.shape_of(config.model), preset, room, device)
    print(json.dumps(dataclasses.asdict(config), indent=1), why, plan.render(made, config.model), "", sep="\n")
    print(cost.render(made, config.model, card, which, config.steps, config.price_per_hour, config.eval_every,
                      config.keep_states, config.out), "", plan.verdict(made), sep="\n")  # fmt: skip
    return 0 if made.fits else 1


def _complain(text: str) -> int:
    print(f"train_azr.py: {text}", file=sys.stderr)
    return 2
