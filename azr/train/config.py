"""The settings of a training run: one frozen dataclass whose field documentation is the help text of train_azr.py."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path

from azr.command import MOST, Number, Parser
from azr.jsonl import read_object
from azr.machine import cost, doctor, plan
from azr.models import base_description, model_path
from azr.policy.opening import newest_checkpoint
from azr.tasks.prompts import template_hash
from azr.train import rules
from azr.train.rewards import SHAPES

TRACKERS = ("none", "trackio", "wandb", "tensorboard")  # here: settings are read before rich, which trackers.py needs
# --preset smoke: the smallest sizes, lowered until a run of any model is over in a minute or two. It learns nothing.
SMOKE = {"steps": 2, "prompts_per_mode": 2, "max_new_tokens": 64, "references": 1, "eval_samples": 0}
# --train full: as published for Qwen2.5-Coder; of the rates tried on the embedded model (True) the middle one
# (docs/policy.md has what each gave).
FULL_LEARNING_RATE = {False: 1e-6, True: 3e-4}
# Settings that earlier versions had: a config.json may still hold them.
GONE = frozenset(
    "loss_weighting off_policy_schedule off_policy_baseline off_policy_samples eval_temperature save_minutes "
    "keep_states probe card control_fraction entropy_coefficient entropy_target kl_coefficient".split()
)
METAVARS = {"resume": "auto|none|DIR", "entropy_control": "NAME[=VALUE]", "off_policy_source": "base|FILE"}


def setting(default, text: str, choices: tuple = (), group: str = "", number: Number | None = None):
    """A field with its help text; a default of None is filled in by the model or the preset.

    group: the title of --help that this field and those after it stand under. number: what a number may be.
    """
    return field(default=default, metadata={"help": text, "choices": choices, "group": group, "number": number})


def whole(low: int, high: int, default: int | None, text: str, group: str = ""):
    """A setting that is a whole number from low to high, the highest being what no machine of today gets through."""
    return setting(default, text, group=group, number=Number(int, low, high))


def real(low: float, high: float, default: float | None, text: str, above: bool = True, below: bool = False):
    """A setting that is a number; above, below: the ends are no part of what it may be."""
    return setting(default, text, number=Number(float, low, high, above, below))


@dataclass(frozen=True)
class Config:
    """What `python train_azr.py` takes. None: chosen from the model and the memory at hand, printed, and saved."""

    model: str = setting(
        "tiny",
        "The model to train: tiny (the embedded one), qwen-0.5b, -1.5b, -3b, -7b or -14b, a hub id, or a directory.",
        group="the run",
    )
    adapter: str | None = setting(
        None, "Training starts from this PEFT adapter of the same base, or from the newest one of a run (a warm start)."
    )
    train: str = setting(
        "lora",
        "lora trains an adapter on a frozen base; full trains every weight of an unquantized model, where it fits (in "
        "bf16 they follow fp32 masters, as in the paper's runs).",
        ("lora", "full"),
    )
    out: str | None = setting(None, "The run directory; it is runs/MODEL-SEED unless given.")
    steps: int | None = whole(1, 10**8, None, "The number of training steps (500; tiny: what fits 15 CPU minutes).")
    seed: int = whole(0, MOST, 0, "Every random draw of the run follows from this number.")
    resume: str = setting(
        "none",
        "With auto the run in --out goes on from its last checkpoint, with DIR the run in that directory, both with "
        "its own settings under those that are typed; with none a new run begins.",
    )
    preset: str = setting(
        "auto",
        f"The sizes of the run: auto takes what the free GPU memory allows; smoke is a run of minutes that only shows "
        f"whether everything works; {', '.join(plan.PRESETS)} are for that much memory; a card's name, such as 4090, "
        "is for that card, whatever is in this machine.",
    )
    max_hours: float | None = real(0, 1e6, None, "The run stops with a checkpoint once so many hours are over.")
    price_per_hour: float | None = real(0, 1e6, None, "The machine's price in dollars: the cost is printed.")
    algorithm: str = setting(
        "selfplay",
        "In selfplay the model makes its own tasks; rlvr answers the fixed tasks of --data; sft is cross-entropy on "
        "the responses of --data.",
        ("selfplay", "rlvr", "sft"),
        group="the method",
    )
    data: str | None = setting(
        None, "The tasks of rlvr, or of sft with responses (python -m azr.tasks make writes both)."
    )
    step_tokens: int | None = whole(
        1, 10**9, None, "The response tokens of a step of rlvr or sft; selfplay logs its own as train/tokens."
    )
    recipe: str = setting(
        "lean",
        "lean trains on the answers that measure the solve rate; azr is the method as published.",
        ("lean", "azr"),
    )
    learning_rate: float | None = real(
        0,
        1,
        None,
        "The constant learning rate of AdamW (tiny 1e-3, else 2e-5; --train full: tiny 3e-4, else 1e-6).",
        below=True,
    )
    prompts_per_mode: int | None = whole(
        1, 10**5, None, "How many proposals a step has per mode; lower it if it takes too long."
    )
    answers: int = whole(1, 10**4, 8, "How many answers measure a task's solve rate; more give finer rewards.")
    references: int | None = whole(0, 1000, None, "How many earlier tasks the proposer is shown (6; tiny 2).")
    max_new_tokens: int | None = whole(1, 10**6, None, "The longest response in tokens; raise it if many are cut off.")
    prompt_tokens: int | None = whole(
        1, 10**6, None, "The longest prompt in tokens; the proposer sees fewer references."
    )
    temperature: float = real(
        0.01, 100, 1.0, "The temperature of sampling and of the log-probs that are trained.", above=False
    )
    minibatches: int = whole(1, 10**5, 1, "How many optimizer steps a training step has; PPO's clip acts above 1.")
    solver_tasks: str = setting(
        "backfill",
        "fresh solves this step's tasks only; backfill adds some of the buffer when few proposals are valid.",
        ("fresh", "backfill"),
    )
    solver_reward: str = setting(
        "graded",
        "graded pays 1 / -0.5 / -1 for a correct / wrong / malformed answer, binary 1 / 0.",
        ("graded", "binary"),
    )
    proposer: str = setting(
        "joint",
        "joint trains both roles; no-update gives proposals no gradient; frozen-base also takes them from the base, "
        "adapter off; no-update-matched has solver rows of buffer tasks in place of the proposals' tokens; separate "
        "trains an adapter of its own for each role.",
        ("joint", "no-update", "frozen-base", "no-update-matched", "separate"),
        group="the arms of the comparison",
    )
    proposer_reward: str = setting(
        "learnability",
        "The reward of a valid task as a function of its solve rate; an invalid one gets -1 (python analyze.py rewards "
        "plots them).",
        tuple(SHAPES),
    )
    ends_penalty: float | None = real(
        0,
        100,
        None,
        "This is taken off a valid task's reward where its solve rate is 0 or 1 (0; recipe azr 0.5, as its code).",
        above=False,
    )
    entropy_control: str | None = setting(
        None,
        f"What acts on the entropy of the update: {', '.join(rules.CONTROLS)}. NAME=VALUE sets its strength: the "
        "coefficient of bonus (1e-3), the highest one of adaptive (5e-3), the upper clip bound of clip-higher (0.28), "
        "the share of tokens of clip-cov (2e-4), kl-cov (2e-3; tiny 2e-2 for both), top-entropy and "
        "high-advantage-clip (0.2). The default is none (recipe azr: bonus=0.001, as its paper branch).",
    )
    off_policy_gamma: float = real(
        0,
        1,
        0.0,
        "Solutions that the policy did not sample have this share of the weight of each solver group.",
        above=False,
        below=True,
    )
    off_policy_source: str | None = setting(
        None,
        "Whose solutions: base takes right answers of the base, adapter off, to tasks that are solved at most half the "
        "time; FILE holds tasks with responses.",
    )
    off_policy_weight: str = setting(
        "truncated",
        "truncated weights their tokens by the importance ratio to the recorded log-probs, at most 2; luffy by its "
        "shaping p / (p + 0.1).",
        ("truncated", "luffy"),
    )
    off_policy_control: str = setting(
        "none",
        "The control experiments: on-policy takes as many of the policy's own answers instead, shuffled the solutions "
        "of other tasks.",
        ("none", "on-policy", "shuffled"),
    )
    quantization: str | None = setting(
        None,
        "The frozen base is held in 4 bits (nf4) or as it is (none; so is tiny).",
        ("nf4", "none"),
        group="the model and the memory",
    )
    dtype: str | None = setting(
        None,
        "The dtype of computation and of what is not quantized. auto is bf16 on a GPU that has it, fp16 with a scaled "
        "loss on an older one (T4, V100), fp32 on a CPU. fp16 keeps sampler and trainer ten times closer than bf16.",
        ("auto", "bf16", "fp16", "fp32"),
    )
    lora_rank: int | None = whole(1, 2**13, None, "The rank of the adapter (32; tiny 16).")
    lora_alpha: float | None = real(0, 1e6, None, "The adapter adds alpha / rank x B A (alpha is 2 x rank; tiny 4 x).")
    lora_targets: str = setting("all-linear", "Which matrices get an adapter.", ("all-linear", "attention"))
    attn: str = setting(
        "auto",
        "The attention of sampling; auto takes the fastest that runs here.",
        ("auto", "flash", "triton", "sdpa"),
    )
    rollout_weights: str = setting(
        "auto",
        "What a 4-bit base computes with while sampling: bf16 is an unpacked copy, faster, which needs its memory; "
        "stored takes the weights as they are; auto copies if a quarter of the cache that all slots could use still "
        "fits beside the copy.",
        ("auto", "stored", "bf16"),
    )
    token_budget: int | None = whole(1, 10**8, None, "The tokens of a micro-batch; the gradient does not depend on it.")
    max_batch: int | None = whole(
        1, 2**16, None, "The sequences decoded at once; what is learned does not depend on it."
    )
    allow_cpu: bool = setting(False, "Any model is trained on the CPU if no GPU can be used: days for 3B.")
    eval_every: int = whole(
        0,
        10**8,
        25,
        "Steps between held-out evaluations; 0 evaluates only before and after training.",
        group="measuring and saving",
    )
    eval_samples: int | None = whole(
        0, 10**5, None, "The answers per held-out task before and after, for pass@k (tiny 64)."
    )
    eval_data: str | None = setting(
        None,
        "The held-out tasks, a file (200 each of CRUXEval-O and -I and 64 of the seed stage; tiny: its own).",
    )
    save_every: int = whole(1, 10**8, 10, "Steps between checkpoints; one is also written every ten minutes.")
    tracker: str = setting("none", "Each step's numbers are sent there too; its package is yours to install.", TRACKERS)
    dry_run: bool = setting(
        False,
        "Whether it fits, with the memory of each phase, time, dollars and disk, is printed, and nothing is trained; "
        "the exit code is 1 if it does not fit.",
        group="instead of training",
    )
    print_config: bool = setting(False, "The resolved settings are printed as JSON and nothing is trained.")
    doctor: bool = setting(
        False,
        "What training needs on this machine is tried and reported, nothing is trained; the exit code is 1 if it "
        "cannot run here.",
    )

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            choices, number, value = f.metadata["choices"], f.metadata["number"], getattr(self, f.name)
            if value is not None and choices and value not in choices:
                raise ValueError(f"{flag(f.name)} must be one of {', '.join(choices)}, not {value!r}")
            if value is not None and number and not number.holds(value):
                raise ValueError(f"{flag(f.name)} must be {number}, not {value}")
        rules.control_of(self.entropy_control)

    @property
    def adapters(self) -> int:
        """How many adapters are trained."""
        return 2 if self.proposer == "separate" else 1

    @property
    def held_out_file(self) -> str | None:
        """--eval-data, else the model's own held-out tasks, whose place is no setting: it moves with the model."""
        own = Path(model_path(self.model)) / "held_out.jsonl"
        return self.eval_data or (str(own) if own.is_file() else None)

    @property
    def control(self) -> str:
        """The name of the entropy control."""
        return rules.control_of(self.entropy_control)[0]

    @property
    def control_strength(self) -> float | None:
        """The strength of the entropy control; None: it has none, or the settings are not resolved."""
        return rules.control_of(self.entropy_control)[1]


def flag(name: str) -> str:
    """The flag of a setting."""
    return "--" + name.replace("_", "-")


def make_parser(description: str) -> Parser:
    """The command line: --config and every field of Config, under its title."""
    parser = Parser(
        prog="train_azr.py",
        usage="python train_azr.py [--FLAG VALUE]...      or: python train_azr.py export --help",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    titled = parser
    for f in dataclasses.fields(Config):
        if f.metadata["group"]:
            titled = parser.add_argument_group(f.metadata["group"])
        if f.name == "resume":
            titled.add_argument(
                "--config",
                metavar="FILE",
                help="The settings of an earlier run (its config.json) are taken where none is typed.",
            )
        name, text = flag(f.name), f.metadata["help"]
        if f.default is False:
            titled.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        titled.add_argument(
            name,
            type=f.metadata["number"],
            choices=f.metadata["choices"] or None,
            default=argparse.SUPPRESS,
            metavar=METAVARS.get(f.name),
            help=text if f.default is None else f"{text} The default is {f.default}.",
        )
    return parser


def check_early(arguments: list[str], description: str) -> None:
    """--help, a wrong flag and a missing package end the process here, before torch takes its seconds."""
    parser = make_parser(description)
    parser.parse_args(arguments)
    if missing := [name for name in doctor.NEEDED if importlib.util.find_spec(name) is None]:
        parser.error(f"not installed here: {', '.join(missing)}; pip install -r requirements.txt (--doctor says more)")


def parse(arguments: list[str], description: str) -> Config:
    """The settings of a command line; under those that are typed lie those of --config FILE, and under these the own
    ones of the run that --resume names. Exits 2 on a bad flag or file."""
    parser = make_parser(description)
    typed = vars(parser.parse_args(arguments))
    path = typed.pop("config", None)
    try:
        given = {**(read_config(path) if path else {}), **typed}
        config = Config(**given)
        if resumed := _config_to_resume(config):
            config = Config(**{**read_config(resumed), **given, "out": str(resumed.parent)})
    except ValueError as error:
        parser.error(str(error))
    for file in dict.fromkeys(Path(name).resolve() for name in (path, resumed) if name):
        _tell_what_is_gone(file)
    return config


def read_config(path: str | Path) -> dict:
    """Settings of a config.json, but for what is asked of one command. ValueError, in one line, if it is none."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a directory; --config takes the file, such as {Path(path) / 'config.json'}")
    stored, kinds = modern(read_object(path)), {f.name: str(f.type) for f in dataclasses.fields(Config)}
    if unknown := sorted(stored.keys() - kinds.keys()):
        raise ValueError(f"{path}: unknown settings {', '.join(unknown[:5])}: no config.json of a run of this script")
    for name, value in stored.items():
        if not _is_a(value, kinds[name]):
            raise ValueError(f"{path}: {name} must be {kinds[name]}, not {json.dumps(value)[:60]}")
    return {key: value for key, value in stored.items() if key not in ("resume", "dry_run", "print_config", "doctor")}


def modern(stored: dict) -> dict:
    """The settings of an earlier version without those that are gone; the strength of an entropy control moves to its
    name: {"entropy_control": "bonus", "entropy_coefficient": 0.03} -> {"entropy_control": "bonus=0.03"}."""
    settings = {key: value for key, value in stored.items() if key not in GONE}
    control = settings.get("entropy_control")
    strength = stored.get("control_fraction") or stored.get("entropy_coefficient")
    if isinstance(control, str) and "=" not in control and control != "none" and strength:
        settings["entropy_control"] = f"{control}={strength}"
    file = settings.get("eval_data")  # the embedded model's own was named, by its place at that time
    if settings.get("model") == "tiny" and isinstance(file, str) and file.endswith("azr/tiny/held_out.jsonl"):
        settings["eval_data"] = None
    return settings


def _tell_what_is_gone(path: Path) -> None:
    """One line on stderr for what an old config.json holds that no longer exists."""
    try:
        stored = read_object(path)
    except ValueError:
        return  # whoever opens it says what is wrong
    if gone := [f"{name} {stored[name]}" for name in sorted(GONE & stored.keys())]:
        from azr.console import warn  # the doctor reads settings before it knows whether there is rich

        warn(f"{path}: settings that no longer exist are left out: {', '.join(gone)}")


def completed(stored: dict) -> dict:
    """The settings of an earlier run with those that came later, as it would get them today if none were typed."""
    stored, known = modern(stored), {f.name for f in dataclasses.fields(Config)}
    try:
        config, _ = resolve(Config(**{key: value for key, value in stored.items() if key in known - {"resume"}}))
    except (TypeError, ValueError):
        return stored  # no run of this script: the differences will say so
    return {**dataclasses.asdict(config), **stored, "entropy_control": config.entropy_control}


def _is_a(value, kind: str) -> bool:
    """Whether a JSON value has the type of a field; a whole number is a float too, true is not a number."""
    if value is None:
        return kind.endswith("| None")
    known = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}[kind.removesuffix(" | None")]
    return isinstance(value, known) and (bool in known or not isinstance(value, bool))


def resolve(config: Config) -> tuple[Config, str]:
    """Every None filled in from the model's preset, and one line that says how.

    Raises PlanError (a ValueError) for what is unknown or does nothing.
    """
    if config.adapter and (Path(config.adapter) / "checkpoints").is_dir():  # a run, as every script takes one
        config = dataclasses.replace(config, adapter=str(newest_checkpoint(Path(config.adapter))))
    tiny = base_description(config.model) is not None
    preset, why, card = preset_of(config)
    values = {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset)} | {
        "out": _default_out(config),
    }
    values |= rules.of_recipe(config)
    values["lora_alpha"] = (4.0 if tiny else 2.0) * (config.lora_rank or preset.lora_rank)
    if config.train == "full":
        values |= {"learning_rate": FULL_LEARNING_RATE[tiny], "quantization": "none"}
        values |= {"lora_rank": None, "lora_alpha": None}  # there is no adapter
    elif config.adapter and not config.lora_alpha:
        values |= _lora_of(config.adapter)
    why += _fit_context(config, values)
    if config.dtype in (None, "auto"):
        config = dataclasses.replace(config, dtype=_auto_dtype(config, preset, card))
        why += "; computing in fp16: this GPU has no bf16 in hardware" if config.dtype == "fp16" else ""
    filled = {
        f.name: values[f.name]
        for f in dataclasses.fields(Config)
        if getattr(config, f.name) is None and values.get(f.name) is not None
    }
    config = dataclasses.replace(config, **filled)
    config = dataclasses.replace(config, entropy_control=rules.with_strength(config.entropy_control, tiny))
    rules.refuse(config)
    return config, why


def _fit_context(config: Config, values: dict) -> str:
    """Lowers the longest prompt and response of `values` until the model's context holds both; returns what to tell.
    PlanError where it cannot hold those that are typed. A context that is not known offline counts as endless; the
    loaded model's is looked at in azr/train/data.py."""
    context = plan.context_of(config.model) or MOST
    response = config.max_new_tokens or min(values["max_new_tokens"], context // 2)
    prompt = config.prompt_tokens or min(values["prompt_tokens"], context - response)
    # the rules and the program of a prompt alone take about so much
    if prompt < (config.prompt_tokens or values["prompt_tokens"] // 4) or prompt + response > context:
        raise plan.PlanError(
            f"--max-new-tokens {response} leaves {max(0, context - response)} of the {context} tokens of the model's "
            f"context for the prompt, which may have {config.prompt_tokens or values['prompt_tokens']}: give less"
        )
    fitting = {"max_new_tokens": response, "prompt_tokens": prompt}
    lower = [
        f"{flag(name)} {value}"
        for name, value in fitting.items()
        if getattr(config, name) is None and value < values[name]
    ]
    values |= fitting
    return f"; the model's context of {context} tokens leaves {', '.join(lower)}" if lower and context < MOST else ""


def _lora_of(adapter: str) -> dict[str, float]:
    """Rank and alpha of a PEFT adapter, which a warm start keeps. ValueError if there is none."""
    try:
        stored = read_object(Path(adapter) / "adapter_config.json")
        return {"lora_rank": int(stored["r"]), "lora_alpha": float(stored["lora_alpha"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"--adapter {adapter}: no LoRA adapter of PEFT ({error}); give a run, or a checkpoint such as "
            "RUN/checkpoints/step_100"
        ) from error


def preset_of(config: Config) -> tuple[plan.Preset, str, cost.Card | None]:
    """(sizes, one line that says why, the card that --preset names or None). PlanError for an unknown name."""
    model = "tiny" if base_description(config.model) is not None else config.model
    name = config.preset.lower()
    if name == "smoke":
        smallest, _ = plan.choose_preset(next(iter(plan.PRESETS)), model, None)
        sizes = dataclasses.replace(smallest, **SMOKE)
        if model == "tiny":  # 64 would cut off its induction: the seed stage then takes all of its rounds
            sizes = dataclasses.replace(sizes, max_new_tokens=128)
        return sizes, "preset smoke: sizes of a run that only shows whether everything works", None
    if name not in ("auto", *plan.PRESETS, *cost.CARDS):
        raise plan.PlanError(
            f"unknown preset {config.preset}: take auto, smoke, {', '.join(plan.PRESETS)}, or a card: "
            f"{', '.join(cost.CARDS)}"
        )
    card = cost.CARDS.get(name)
    free = card.free if card else plan.free_gpu_bytes()
    preset, why = plan.choose_preset("auto" if card else name, model, free)
    if card and preset.gib:
        why = f"preset {preset.name}, for a {card.name}: {card.free / cost.GIB:.1f} of its {card.gib} GiB are free"
    if not preset.gib and name != "auto":
        why += f" (--preset {name} is for others)"
    return preset, why, card


def _config_to_resume(config: Config) -> Path | None:
    """The config.json of the run that goes on, if there is one."""
    out = config.resume if config.resume not in ("auto", "none") else config.out or _default_out(config)
    path = Path(out) / "config.json"
    return path if config.resume != "none" and path.is_file() else None


def _auto_dtype(config: Config, preset: plan.Preset, card: cost.Card | None) -> str:
    """What --dtype auto is: in a plan that of the named card, or of a recent one where there is no GPU; in a run that
    of this machine."""
    if card and config.dry_run:
        return "bf16" if card.bf16 else "fp16"
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


def as_json(config: Config) -> str:
    """The resolved settings as readable JSON, which --config takes."""
    return json.dumps(dataclasses.asdict(config), indent=1)


def dry_run(config: Config, why: str) -> int:
    """Prints whether it fits, then the memory plan, time, cost and disk; 1 if it does not. Needs no GPU, no network."""
    preset, _, card = preset_of(config)
    here = None if card else plan.free_gpu_bytes()
    given = {f.name: getattr(config, f.name, None) for f in dataclasses.fields(preset) if f.name != "name"}
    preset = dataclasses.replace(preset, **{name: value for name, value in given.items() if value is not None})
    room = card.free if card and preset.gib else plan.capacity(preset, here)
    made = plan.plan_memory(plan.shape_of(config.model), preset, room, "cuda" if preset.gib or here else "cpu")
    which = f"{card.name}, as asked" if card else ""
    if not card:
        card, which = cost.card_for(preset)
    fits, said = cost.verdict(made, config)
    print(said, "", why, plan.render(made, config.model), "", cost.render(made, config, card, which), sep="\n")
    return 0 if fits else 1
