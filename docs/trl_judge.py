"""The judge of this project as a reward function of TRL, for the tasks of a file.

    python -m azr.tasks make tiny tasks.jsonl --count 100          # or: make run RUN tasks.jsonl, tasks that a run made
    python docs/trl_judge.py tasks.jsonl --steps 2                 # TRL's GRPO on the embedded model, on a CPU

Programs run in the sandbox, isolated, and an expected answer never enters it. TRL is yours to install (tried with
1.16); this file is an example to copy, with azr/jsonl.py, azr/tasks and sandbox. docs/verifiers_tasks.py is the same
for the package verifiers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from azr.jsonl import strict_lines
from azr.tasks import Task, judge, parse_answer, solve_prompt
from sandbox import Sandbox


def rows_of(path: str, template: str = "azr") -> list[dict[str, str]]:
    """Rows of a data set: the prompt of each task of the file, and the task itself as one line of JSON."""
    tasks = [Task.from_json(row) for _, row in strict_lines(path)]
    return [{"prompt": solve_prompt(task, template), "task": json.dumps(task.to_json())} for task in tasks]


class JudgeReward:
    """1 for a correct answer, -0.5 for a wrong one, -1 for a response without the asked form (Absolute Zero, eq. 6).

    A TRL reward function: reward(prompts=..., completions=[str, ...], task=[JSON, ...]) -> [float or None, ...]; None,
    which TRL leaves out, where the machine failed and there is no verdict.
    """

    __name__ = "judge"  # TRL names its metrics by it

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def __call__(self, completions: list[str], task: list[str], **_) -> list[float | None]:
        """One reward per completion, in order."""
        tasks = [Task.from_json(json.loads(text)) for text in task]
        parsed = [parse_answer(one.mode, text) for one, text in zip(tasks, completions)]
        verdicts = judge([(one, answer.value) for one, answer in zip(tasks, parsed)], self.sandbox)
        rewards: list[float | None] = []
        for answer, verdict in zip(parsed, verdicts):
            if verdict.reason == "infra":
                rewards.append(None)
            elif not answer.well_formed:
                rewards.append(-1.0)
            else:
                rewards.append(1.0 if verdict.ok else -0.5)
        return rewards


def main(arguments: list[str]) -> int:
    """GRPO of TRL on the embedded model with this judge, a few steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", help="JSON lines that python -m azr.tasks make wrote")
    parser.add_argument("--steps", type=int, default=2, help="steps of GRPO (2)")
    parser.add_argument("--out", default="runs/trl", help="TRL's directory (runs/trl)")
    options = parser.parse_args(arguments)
    try:  # these take seconds to import: after a wrong flag was told
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        parser.error(f"{error}: pip install trl")

    from azr.models import model_path

    where = model_path("tiny")
    config = GRPOConfig(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=128,
        learning_rate=1e-4,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    with Sandbox() as sandbox:
        trainer = GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(where, dtype="float32"),
            JudgeReward(sandbox),
            config,
            Dataset.from_list(rows_of(options.tasks, "tiny")),
            processing_class=AutoTokenizer.from_pretrained(where),
        )
        trainer.train()
    for row in trainer.state.log_history:
        if "rewards/judge/mean" in row:
            print(f"step {row['step']}: reward {row['rewards/judge/mean']:.3f}, loss {row['loss']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
