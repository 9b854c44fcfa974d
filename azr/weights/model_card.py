"""The README.md of an exported model: its licence, how it was trained in a line, how to load it.

text = card(source, base_directory, update="LoRA ...", result="merged ...", dtype="bfloat16")
"""

from __future__ import annotations

import re
from pathlib import Path

from azr.policy.opening import read_record
from azr.tasks import Task
from azr.tasks.prompts import STOP, solve_prompt
from azr.weights.files import read_json

BODY = """{header}

# {title}

Made by `train_azr.py` (Absolute Zero, arXiv 2505.03335; studied in arXiv 2510.27072){settings}, \
{update}. Base: `{base}`, revision `{revision}`, licence {terms} as its
card says: it holds for this model too. {result}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR", dtype="{dtype}")
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
SETTINGS = ("algorithm", "seed", "learning_rate")  # of the run, where it is there


def card(source, directory: Path, update: str, result: str, dtype: str) -> str:
    """README.md of a `Source` of export.py; directory: of the base, with its own card; update, result: in words."""
    info = read_record(source.checkpoint)
    base = base_name(info, directory)
    config = read_json(source.run / "config.json") if source.run else {}
    terms, template = licence(base, directory), info.get("template", "azr")
    task = Task(mode="deduction", program="def f(a, b):\n    return a * b + 1", input="2, 3", output="7")
    return BODY.format(
        header=header(base, terms),
        title=f"{base.split('/')[-1]}-azr, step {source.step}",
        settings="".join(f", {name.replace('_', ' ')} {config[name]}" for name in SETTINGS if name in config),
        update=update,
        base=base,
        revision=info.get("revision"),
        terms=terms.get("license_name") or terms["license"],
        result=result,
        dtype=dtype,
        prompt=solve_prompt(task, template),
        tokens=config.get("max_new_tokens") or 512,
        stop=STOP,
        template=template,
        template_hash=info.get("template_hash"),
    )


def base_name(info: dict, directory: Path) -> str:
    """The hub id of the base, else its directory's name: "tiny" for the embedded model."""
    name = info.get("base_model") or str(directory)
    is_hub_id = name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).is_dir()
    return name if is_hub_id else Path(name).name


def licence(base: str, directory: Path) -> dict[str, str]:
    """license, license_name, license_link as the base's own card says; "unknown" where there is none."""
    file = directory / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    front = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    stated = dict(re.findall(r"^(license\w*): *(\S.*)$", front[1], re.MULTILINE)) if front else {}
    if "license" in stated:
        return {key: value.strip().strip("\"'") for key, value in stated.items()}
    return {"license": "mit" if base == "tiny" else "unknown"}


def header(base: str, terms: dict[str, str]) -> str:
    """The front matter as the hub reads it."""
    lines = ["---", *(f"{key}: {value}" for key, value in terms.items())]
    if "/" in base:  # the hub refuses what is no id
        lines += [f"base_model: {base}", "base_model_relation: finetune"]
    lines += ["library_name: transformers", "pipeline_tag: text-generation"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in ("absolute-zero", "self-play", "code")), "---"])
