"""The README.md of an exported model: front matter as the hub reads it, how it was made, what was measured, limits.

    text = card(source, merge, report, name)

Every figure is read from the run directory; what the run did not measure is said to be missing. Left out: plots.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from azr.evals.held_out import EvalResult, difference
from azr.tasks.prompts import STOP
from azr.runs import RunError, read_metrics
from azr.weights.files import read_json

LICENCE_NOTE = "as far as known; check the base model's page, its licence holds for this model too"
# Qwen2.5-Coder: the 3B alone is not under Apache-2.0
QWEN_3B = {
    "license": "other",
    "license_name": "qwen-research",
    "license_link": "https://huggingface.co/{base}/blob/main/LICENSE",
}
APACHE_QWEN = re.compile(r"Qwen/Qwen2\.5-Coder-(0\.5|1\.5|7|14|32)B(-Instruct)?")
RESEARCH_QWEN = re.compile(r"Qwen/Qwen2\.5(-Coder)?-3B(-Instruct)?")
SETTINGS = (
    "recipe",
    "learning_rate",
    "prompts_per_mode",
    "answers",
    "references",
    "max_new_tokens",
    "temperature",
    "minibatches",
    "loss_weighting",
    "solver_tasks",
    "solver_reward",
    "proposer",
    "proposer_reward",
    "ends_penalty",
    "entropy_control",
    "off_policy_gamma",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "data",
)

HOW = {
    "selfplay": "Trained by proposer-solver self-play (Absolute Zero): one model proposes small Python tasks and "
    "solves them, a sandbox judges.",
    "rlvr": "Trained by reinforcement learning on fixed tasks with verifiable rewards; a sandbox judged the answers.",
    "sft": "Trained by supervised fine-tuning on given solutions.",
    None: "Trained by `train_azr.py`; how is not known, its run directory was not there.",
}
CITATION = """```bibtex
@article{zhao2025absolutezero,
  title={Absolute Zero: Reinforced Self-play Reasoning with Zero Data},
  author={Zhao, Andrew and others},
  journal={arXiv preprint arXiv:2505.03335},
  year={2025}
}
@article{selfplay2025understanding,
  title={Towards Understanding Self-play for LLM Reasoning},
  journal={arXiv preprint arXiv:2510.27072},
  year={2025}
}
```"""


# ---------------------------------------------------------------- front matter


def base_name(merge) -> str:
    """The hub id of the base, "tiny" for the embedded model, else the directory's name."""
    name = merge.adapter.info.get("base_model") or str(merge.base.directory)
    if (Path(name).parent.name, Path(name).name) == ("azr", "tiny"):
        return "tiny"
    is_hub_id = name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).is_dir()
    return name if is_hub_id else Path(name).name


def licence(base: str, directory: Path) -> dict[str, str]:
    """license, license_name, license_link: of the base's own card if it is there, else what is known of the model."""
    stated = front_matter(directory / "README.md")
    if "license" in stated:
        return {key: stated[key] for key in ("license", "license_name", "license_link") if key in stated}
    if RESEARCH_QWEN.fullmatch(base):
        return {key: value.format(base=base) for key, value in QWEN_3B.items()}
    if APACHE_QWEN.fullmatch(base):
        return {"license": "apache-2.0"}
    if base == "tiny":
        return {"license": "mit"}
    return {"license": "unknown"}


def front_matter(file: Path) -> dict[str, str]:
    """The plain `key: value` lines between the two --- of a card; {} without."""
    if not file.is_file():
        return {}
    found = re.match(r"---\n(.*?)\n---", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    pairs = re.findall(r"^(\w+): *(\S.*)$", found[1], re.MULTILINE) if found else []
    return {key: value.strip().strip("\"'") for key, value in pairs}


def header(base: str, terms: dict[str, str]) -> str:
    lines = ["---", *(f"{key}: {value}" for key, value in terms.items())]
    if "/" in base:  # the hub refuses what is no id
        lines += [f"base_model: {base}", "base_model_relation: finetune"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in ("absolute-zero", "self-play", "code")), "---"])


# ---------------------------------------------------------------- sections


def training(source, merge, config: dict) -> str:
    """Steps, arm, seed, settings, tokens, time."""
    lora = merge.adapter.config
    lines = [
        f"- base held as {merge.reference.quantization}"
        + (
            f" (blocks of {merge.reference.block}{', double quantization' if merge.reference.double else ''})"
            if merge.reference.quantization == "nf4"
            else ""
        )
        + f", LoRA rank {lora.get('r')}, alpha {lora.get('lora_alpha')} on {len(merge.adapter.targets)} matrices"
    ]
    if not config:
        return "\n".join(
            [*lines, "- of the run itself nothing is known: the adapter was exported without its run directory"]
        )
    rows = [row for row in rows_of(source.run) if row["step"] <= (source.step or 0)]
    lines.insert(
        0,
        f"- algorithm {config.get('algorithm')}, step {source.step} of {config.get('steps')}, seed "
        f"{config.get('seed')}",
    )
    if rows:
        tokens = sum(row.get("train/tokens") or 0 for row in rows)
        seconds, gpu = rows[-1].get("time/elapsed") or 0, read_json(source.run / "environment.json").get("gpu")
        lines.append(
            f"- {tokens:,.0f} response tokens trained on, {seconds / 3600:.{2 if seconds > 360 else 3}f} h on "
            f"{gpu or 'a CPU'}"
        )
    shown = {key: config[key] for key in SETTINGS if config.get(key) is not None}
    return "\n".join([*lines, "- " + ", ".join(f"{key} {value}" for key, value in shown.items())])


def rows_of(run: Path) -> list[dict]:
    try:
        return [row for row in read_metrics(run) if row["step"] > 0]
    except RunError:
        return []


def results(source) -> str:
    """Base against this checkpoint on the run's held-out tasks, and greedy accuracy at the evaluated steps."""
    if source.run is None:
        return "None: exported without the run directory."
    files = [source.run / "eval" / f"{name}.json" for name in ("base", f"step_{source.step}")]
    lines = []
    if all(file.is_file() for file in files):
        base, tuned = (EvalResult.from_json(json.loads(file.read_text())) for file in files)
        n, temperature = base.settings["samples"], base.settings["sampling"]["temperature"]
        lines += [
            f"Held-out tasks, {n} answers each at temperature {temperature}; difference paired over the tasks, 95 % "
            "interval over tasks, not over training seeds.",
            "",
            "| mode | tasks | base pass@1 | this model | difference |",
            "|---|---|---|---|---|",
        ]
        for mode in [*base.modes, *([None] if len(base.modes) > 1 else [])]:
            gain = difference(base, tuned, 1, mode)
            lines.append(
                f"| {mode or 'all'} | {len(base.of(mode))} | {base.pass_at_k(1, mode).mean:.3f} | "
                f"{tuned.pass_at_k(1, mode).mean:.3f} | {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] |"
            )
    greedy = [
        (row["step"], {key: value for key, value in row.items() if re.fullmatch(r"held_out/\w+/accuracy", key)})
        for row in rows_of(source.run)
        if row["step"] <= (source.step or 0)
    ]
    for step, found in [item for item in greedy if item[1]][-1:]:
        values = ", ".join(
            f"{key.split('/')[1]} {100 * value:.1f} %" for key, value in found.items() if value is not None
        )
        lines += ["", f"Greedy accuracy on the held-out tasks at step {step}: {values}."]
    return "\n".join(lines).strip() or "None: this run did not evaluate this checkpoint."


def fidelity(report: dict) -> str:
    """What the merge cost and what the verification found."""
    lines, cost = [], report["rounding"]
    if cost["updated_weights"]:
        lines.append(
            f"- bf16 rounding: {100 * cost['unmoved_share']:.1f} % of the updated weights keep the value they had; "
            f"the error is {cost['error_over_update']:.3g} of its norm, and {100 * cost['survival']:.1f} % of "
            "the update is stored, along its own direction"
        )
    if report["verified"] is None:
        return "\n".join([*lines, "- NOT compared with the policy that was trained (`--no-verify`)"])
    for key, name in (
        ("fp32_merge", "unrounded merge"),
        ("bf16_model", "this model"),
        ("random_rounding", "a random rounding, for scale"),
        ("without_adapter", "the base without the update, for scale"),
    ):
        row = report[key]
        lines.append(
            f"- {name}: logits differ from the trained policy's by at most {row['max']:.2g}, {row['mean']:.2g} on "
            f"average; KL {row['kl']:.2g} nats a token; same best token {100 * row['top1']:.1f} %"
        )
    return "\n".join([*lines, f"- verified: {'yes' if report['verified'] else 'NO'}"])


# ---------------------------------------------------------------- the card

BODY = """{header}

# {title}

{base_text}.

{how} The adapter is merged: base as the training held it + update, rounded to bf16.

Licence: {terms} ({note}).

## Training

{training}

## Results

{results}

## Merge

{fidelity}

## Use

The model knows one prompt format, `{template}` of `azr/tasks/prompts.py` (hash {template_hash}); it has no chat template
of its own. Prompts end with an opened `<think>`, an answer ends at `{stop}`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{place}", dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained("{place}")
prompt = {prompt!r}
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
out = model.generate(**ids, max_new_tokens={tokens}, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                     stop_strings=["{stop}"], tokenizer=tokenizer)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:]))
```

Quantizing it to 4 bits again loses most of the update; to serve in 4 bits, put the adapter on the 4-bit base. The
scripts that trained it quantize by default: `eval_passk.py run --model DIR --quantization none --template {template}`.

## Limits

- It writes programs. They are untrusted code: run them in a sandbox only.
- Trained on small deterministic Python functions with literal inputs and outputs; nothing else was measured here.
- No training for safety or for dialogue; whatever the base has of biases and errors is still there.

## Citation

{citation}
"""


def card(source, merge, report: dict, name: str | None) -> str:
    """README.md; report: rounding, verified, the figures of export_check. name: on the hub, None if not uploaded."""
    base, info = base_name(merge), merge.adapter.info
    config = read_json(source.run / "config.json") if source.run else {}
    terms = licence(base, merge.base.directory)
    where = f"[{base}](https://huggingface.co/{base})" if "/" in base else f"`{base}` (a directory)"
    where = "The embedded `tiny` model of this repository" if base == "tiny" else where
    title = (name or f"{base.split('/')[-1]}-azr").split("/")[-1] + f", step {source.step}"
    template = info.get("template", "azr")
    prompt = example(template)
    return BODY.format(
        header=header(base, terms),
        how=HOW.get(config.get("algorithm"), HOW[None]),
        title=title,
        base_text=f"{where}, revision `{info.get('revision')}`",
        terms=terms.get("license_name") or terms["license"],
        note=LICENCE_NOTE,
        training=training(source, merge, config),
        results=results(source),
        fidelity=fidelity(report),
        template=template,
        template_hash=info.get("template_hash"),
        stop=STOP,
        place=name or "DIR",
        prompt=prompt,
        tokens=config.get("max_new_tokens") or 512,
        citation=CITATION,
    )


def example(template: str) -> str:
    """The solver's prompt of a small deduction task."""
    from azr.tasks.prompts import solve_prompt
    from azr.tasks import Task

    program = "def f(a, b):\n    return a * b + 1"
    return solve_prompt(Task(mode="deduction", program=program, input="2, 3", output="7"), template)
