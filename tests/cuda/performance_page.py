"""The tables of docs/performance.md, from counts made here and now; `--write` puts them there, else they are printed.

    python tests/cuda/performance_page.py --write

Between `<!-- NAME: begin -->` and `<!-- NAME: end -->` stands the table NAME. Half a minute; no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
PAGE = ROOT / "docs" / "performance.md"
ROWS = (1, 16, 128)
MODELS = ("3B", "7B")
SHOWN = {"bf16": "bf16", "NF4": "NF4"}  # weights -> how the page calls them
NAMES = {"3090": "3090", "4090": "4090", "a100": "A100", "h100": "H100"}  # of the cards of four_bit_rule.py
COMPILED_WITH = "3.7.1"  # Triton's version, on which registers depend
GROUPS = {
    "4-bit products": ("4-bit product",),
    "products in bf16: base, LoRA's first, head": ("mm bf16", "addmm bf16"),
    "LoRA's second product, added to the base's": ("addmm_ bf16",),
    "norms, with the sum before them": ("norm",),
    "rotary positions, keys and values stored": ("rotary and store",),
    "attention": ("attention, splits", "attention, combined"),
    "SwiGLU": ("silu and product",),
}


def decode_table() -> str:
    from azr.machine.cost import CARDS
    from azr.machine.plan import QWEN25
    from counted_steps import decode_step

    lines = [["model", "weights", "rows", *NAMES.values()]]
    for model in MODELS:
        for weights, name in SHOWN.items():
            for rows in ROWS:
                count = decode_step(QWEN25[model], weights, rows)
                cells = []
                for card in NAMES:
                    size = count.bytes_on(card).total() / 1e9
                    time = size / CARDS[card].bandwidth * 1e3
                    cells.append(f"{count.kernels_on(card).total():,} / {size:.1f} / *{time:.1f}*")
                lines.append([model, name, str(rows), *cells])
    return table(lines, 3)


def kinds_table() -> str:
    from azr.machine.plan import QWEN25
    from counted_steps import decode_step

    counts = [decode_step(QWEN25["3B"], weights, 128) for weights in SHOWN]
    kernels, sizes = [c.kernels_on("h100") for c in counts], [c.bytes_on("h100") for c in counts]
    heads = [f"{name}, {what}" for name in SHOWN.values() for what in ("kernels", "GB")]
    lines = [["operations", *heads]]
    named = {part for parts in GROUPS.values() for part in parts}
    groups = {**GROUPS, "the rest: sampling, indices": tuple((kernels[0] | kernels[1]).keys() - named)}
    for group, parts in groups.items():
        cells = []
        for k, b in zip(kernels, sizes):
            cells += [f"{sum(k[p] for p in parts):,}", f"{sum(b[p] for p in parts) / 1e9:.2f}"]
        lines.append([group, *cells])
    return table(lines, 1)


def passes_table() -> str:
    from azr.machine.cost import CARDS
    from azr.machine.plan import QWEN25
    from counted_steps import PROMPT, PROMPTS, SCORED, UPDATE, log_probs, prefill_step, scoring, update

    rates = [f"{name}, tokens/s" for name in NAMES.values()]
    lines = [["model", "pass", "weights", "tokens", "kernels", "MB a token", *rates]]
    for model in MODELS:
        shape, tokens = QWEN25[model], UPDATE[0] * UPDATE[1]
        passes = [("prefill", name, prefill_step(shape, weights), PROMPT * PROMPTS) for weights, name in SHOWN.items()]
        passes.append(("scoring", "NF4", scoring(shape, "nf4"), SCORED))
        for quantization, name in (("none", "bf16"), ("nf4", "NF4")):
            passes.append(("update, layers", name, update(shape, quantization), tokens))
        passes.append(("update, log-probs", "", log_probs(shape), SCORED))
        if model == MODELS[0]:
            passes.append(("the same with an entropy bonus", "", log_probs(shape, entropy=True), SCORED))
        for what, weights, count, tokens in passes:
            size = count.bytes_on("h100").total() / tokens
            rates = [f"*{CARDS[card].bandwidth * 1e9 / size:,.0f}*" for card in NAMES]
            kernels = f"{count.kernels_on('h100').total():,}"
            lines.append([model, what, weights, f"{tokens:,}", kernels, f"{size / 1e6:.1f}", *rates])
    return table(lines, 3)


def compiled_table() -> str:
    from azr.machine.plan import QWEN25
    from compiled_kernels import CARDS, compile_for

    lines = [["kernel", "model", *(f"sm_{capability} ({cards})" for capability, cards in CARDS.items())]]
    reports = {(model, c): compile_for(c, QWEN25[model]) for model in MODELS for c in CARDS}
    for kernel in next(iter(reports.values())):
        for model in MODELS:
            of = [(c, reports[model, c][kernel]) for c in CARDS]
            cells = [f"{r.registers} / {r.spilled} / {r.shared:,} / {r.programs(c)}" for c, r in of]
            lines.append([kernel, model, *cells])
    return f"Triton {COMPILED_WITH}.\n\n{table(lines, 2)}"


TABLES = {"decode": decode_table, "kinds": kinds_table, "passes": passes_table, "compiled": compiled_table}


def table(lines: list[list[str]], words: int) -> str:
    """Markdown; the first `words` columns to the left, numbers to the right."""
    rule = ["---"] * words + ["---:"] * (len(lines[0]) - words)
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def section(page: str, name: str) -> str:
    """What stands in the page between the marks of a table. ValueError: it has no such marks."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    if begin not in page or end not in page:
        raise ValueError(f"{PAGE} has no {begin.strip()} and {end}")
    return page.split(begin)[1].split(end)[0]


def counted(name: str) -> str:
    """The table as it should be. What the libraries say about the engine and fake tensors is not shown."""
    with contextlib.redirect_stderr(io.StringIO()):
        return TABLES[name]() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    options = parser.parse_args()
    import triton

    from guard import why_no_guard

    reason = why_no_guard()
    if reason is None and triton.__version__ != COMPILED_WITH:
        reason = f"the page is made with Triton {COMPILED_WITH}, not {triton.__version__}"
    if reason:
        print(f"performance_page.py: {reason}", file=sys.stderr)
        return 2
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for name in TABLES:
            begin = f"<!-- {name}: begin -->\n"
            page = page.replace(begin + section(page, name), begin + counted(name))
    if options.write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
