"""The card of an adapter: what it was made from and what it showed, for whoever finds the directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from deploy.gates import GateResult


def page_of(
    release: str,
    base_model: str,
    manifest: Mapping[str, Any],
    gates: Sequence[GateResult],
    ancestors: Sequence[str],
) -> str:
    """Return the card as Markdown, with the front matter that model hubs read.

    Parameters
    ----------
    manifest
        What the adapter was registered with.
    ancestors
        The releases that it goes on from, the nearest first, down to the base model.
    """
    lines = [
        "---",
        f"base_model: {json.dumps(base_model)}",
        "library_name: peft",
        "pipeline_tag: text-generation",
        "tags: [lora, trl, everloop]",
        "---",
        "",
        f"# {release}",
        "",
        f"A LoRA adapter in PEFT's format, trained with the recipe `{manifest['recipe']}` on what people said of "
        "the assistant's answers. It needs nothing but PEFT or vLLM.",
        "",
        "## Lineage",
        "",
        f"- goes on from: {' ← '.join(ancestors)} (base model sha256 `{manifest['base_digest'][:16]}`)",
        f"- run `{manifest['run_id']}`, dataset `{manifest['dataset_digest'][:16]}`, reward snapshot "
        f"{manifest['reward_snapshot_id']}",
        f"- {manifest['num_signals']} signals, {manifest['num_rows']} rows trained on",
        f"- files: {', '.join(f'{name} `{digest[:16]}`' for name, digest in manifest['files'].items())}",
        "",
        "## Evaluation, before it met anybody",
        "",
        "| gate | value | threshold | n | interval | verdict |",
        "|---|---|---|---|---|---|",
        *(
            f"| {g.gate} | {g.value:.4g} | {g.threshold:.4g} | {g.n} | {g.low:.4g} to {g.high:.4g} | {g.verdict} |"
            for g in gates
        ),
        "",
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in manifest["config"].items() if value is not None),
        "",
        "## Not used",
        "",
        *(f"- {reason.replace('_', ' ')}: {count}" for reason, count in manifest["set_aside"].items()),
    ]
    return "\n".join(lines) + "\n"
