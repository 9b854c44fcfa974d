"""The README.md of an exported model: its licence, how it was trained in a line, what was measured, how to load it.

    text = card(source, merge, report)

Every figure is read from the run directory; what the run did not measure is said to be missing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from azr.evals.held_out import EvalResult, difference
from azr.runs import RunError, read_metrics
from azr.tasks import Task
from azr.tasks.prompts import STOP, solve_prompt
from azr.weights.files import read_json

# Qwen2.5 and Qwen2.5-Coder: the 3B alone is not under Apache-2.0
QWEN_3B = {
    "license": "other",
    "license_name": "qwen-research",
    "license_link": "https://huggingface.co/{base}/blob/main/LICENSE",
}
RESEARCH_QWEN = re.compile(r"Qwen/Qwen2\.5(-Coder)?-3B(-Instruct)?")
APACHE_QWEN = re.compile(r"Qwen/Qwen2\.5-Coder-(0\.5|1\.5|7|14|32)B(-Instruct)?")
HOW = {
    "selfplay": "Trained by proposer-solver self-play (Absolute Zero, arXiv 2505.03335; studied in arXiv 2510.27072)",
    "rlvr": "Trained by reinforcement learning on fixed tasks with verifiable rewards",
    "sft": "Trained by supervised fine-tuning on given solutions",
    None: "Trained by `train_azr.py`, its run directory was not there at the export",
}
BODY = """{header}

# {title}

{how}: {training}. Base: `{base}`, revision `{revision}`, licence {terms} as far as known: it holds for this model too.
The update is merged into the base and rounded to bf16; {fidelity}.

{results}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR", dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained("DIR")
prompt = {prompt!r}
ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
out = model.generate(**ids, max_new_tokens={tokens}, do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                     stop_strings=["{stop}"], tokenizer=tokenizer)
print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:]))
```

The model knows one prompt format, `{template}` (hash {template_hash}), and has no chat template. Quantizing it to 4
bits again loses most of the update. It writes programs: they are untrusted code, to be run in a sandbox only.
"""


def card(source, merge, report: dict) -> str:
    """README.md; source, merge: as in export.py; report: "rounding", "verified" and the figures of export_check."""
    base, info = base_name(merge), merge.adapter.info
    config = read_json(source.run / "config.json") if source.run else {}
    terms = licence(base, merge.base.directory)
    template = info.get("template", "azr")
    task = Task(mode="deduction", program="def f(a, b):\n    return a * b + 1", input="2, 3", output="7")
    return BODY.format(
        header=header(base, terms),
        title=f"{base.split('/')[-1]}-azr, step {source.step}",
        how=HOW.get(config.get("algorithm"), HOW[None]),
        training=training(source, merge, config),
        base=base,
        revision=info.get("revision"),
        terms=terms.get("license_name") or terms["license"],
        fidelity=fidelity(report),
        results=results(source),
        prompt=solve_prompt(task, template),
        tokens=config.get("max_new_tokens") or 512,
        stop=STOP,
        template=template,
        template_hash=info.get("template_hash"),
    )


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
    return {"license": "mit" if base == "tiny" else "unknown"}


def front_matter(file: Path) -> dict[str, str]:
    """The plain `key: value` lines between the two --- of a card; {} without."""
    if not file.is_file():
        return {}
    block = re.match(r"---\n(.*?)\n---", file.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    pairs = re.findall(r"^(\w+): *(\S.*)$", block[1], re.MULTILINE) if block else []
    return {key: value.strip().strip("\"'") for key, value in pairs}


def header(base: str, terms: dict[str, str]) -> str:
    """The front matter as the hub reads it."""
    lines = ["---", *(f"{key}: {value}" for key, value in terms.items())]
    if "/" in base:  # the hub refuses what is no id
        lines += [f"base_model: {base}", "base_model_relation: finetune"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in ("absolute-zero", "self-play", "code")), "---"])


# ---------------------------------------------------------------- sentences


def training(source, merge, config: dict) -> str:
    """Step, seed, learning rate, rank, quantization and time, as far as the run says."""
    lora = merge.adapter.config
    parts = [
        f"LoRA rank {lora.get('r')} on {len(merge.adapter.targets)} matrices of a base held as "
        f"{merge.reference.quantization}"
    ]
    if config:
        parts += [
            f"step {source.step} of {config.get('steps')}",
            f"seed {config.get('seed')}",
            f"learning rate {config.get('learning_rate')}",
        ]
    if rows := rows_of(source):
        gpu = read_json(source.run / "environment.json").get("gpu")
        tokens = sum(row.get("train/tokens") or 0 for row in rows)
        parts += [
            f"{tokens:,.0f} response tokens",
            f"{(rows[-1].get('time/elapsed') or 0) / 3600:.2f} h on {gpu or 'a CPU'}",
        ]
    return ", ".join(parts)


def rows_of(source) -> list[dict]:
    """The metrics of the steps up to the checkpoint; [] without a run directory."""
    try:
        rows = read_metrics(source.run) if source.run else []
    except RunError:
        return []
    return [row for row in rows if 0 < row["step"] <= (source.step or 0)]


def results(source) -> str:
    """Base against this checkpoint on the run's held-out tasks."""
    files = [source.run / "eval" / f"{name}.json" for name in ("base", f"step_{source.step}")] if source.run else []
    if not files or not all(file.is_file() for file in files):
        return "Not measured: the run did not evaluate this checkpoint."
    base, tuned = (EvalResult.from_json(json.loads(file.read_text())) for file in files)
    n, temperature = base.settings["samples"], base.settings["sampling"]["temperature"]
    lines = [
        f"Held-out tasks, {n} answers each at temperature {temperature}; differences are paired over the tasks, with "
        "95 % intervals over tasks, not over training seeds.",
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
    return "\n".join(lines)


def fidelity(report: dict) -> str:
    """What rounding cost, and whether the model was compared with the policy that was trained."""
    cost = report["rounding"]
    stored = f"{100 * cost['survival']:.1f} % of the update is stored" if cost["updated_weights"] else "it is zero"
    if report["verified"] is None:
        return f"{stored}; NOT compared with the policy that was trained (`--no-verify`)"
    return (
        f"{stored}; logits differ from the trained policy's by {report['bf16_model']['mean']:.2g} on average "
        f"({report['without_adapter']['mean']:.2g} without the update), "
        f"{'verified' if report['verified'] else 'NOT verified'}"
    )
