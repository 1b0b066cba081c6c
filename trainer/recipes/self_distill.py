"""``self-distill``: the model that has read a correction teaches the one that has not (SDFT).

The policy answers by itself; a teacher, the same model with the correction in its prompt, says for each token what
it would have said. So the policy moves to what people want in its own words, and forgets less than by imitation.

References
----------
Shenfeld et al. (2026), Self-Distillation Enables Continual Learning, arXiv 2601.19897.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from trainer.config import RunConfig
from trainer.pairs import demonstrations
from trainer.recipe import Material, Recipe, Rows

TEACHER_PROMPT = (
    "{prompt}\n\nThis is an example of a good answer:\n{privileged_context}\n\nNow answer in the same manner."
)


class SelfDistillConfig(RunConfig):
    """Settings of self-distillation."""

    recipe: str = "self-distill"
    samples_per_prompt: int = Field(2, ge=1, description="Answers of the policy to each prompt.")
    max_train_tokens: None = Field(None, description="No budget here: TRL does not count what it samples itself.")
    liked_answers: bool = Field(False, description="Have liked answers teach too, not corrections alone.")


class SelfDistill(Recipe[SelfDistillConfig]):
    """Corrections as privileged context."""

    Config = SelfDistillConfig
    summary = "corrections as what a teacher knows: the policy learns from itself, having read them"

    def rows(self, material: Material, config: SelfDistillConfig) -> Rows:
        """Return prompts and what the teacher is shown, the newest."""
        found = demonstrations(material.data.train, liked=config.liked_answers).newest(config.max_rows)
        found.rows = [{"prompt": row["prompt"], "privileged_context": row["answer"]} for row in found.rows]
        return found

    def trainer(
        self, config: SelfDistillConfig, arguments: Mapping[str, Any], parts: Mapping[str, Any], material: Material
    ) -> Any:
        """Return TRL's SDFT trainer; the policy as it is at each step teaches, having read what people want."""
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

        return SDFTTrainer(
            args=SDFTConfig(
                **arguments,
                num_generations=config.samples_per_prompt,
                max_prompt_length=None,  # TRL would cut the question out of what the teacher reads
                max_completion_length=config.max_answer_tokens,
                temperature=config.temperature,
                teacher_model_kind="live",  # "base" would forget what a champion's adapter knows
                teacher_prompt_template=TEACHER_PROMPT,
            ),
            **parts,
        )


RECIPE = SelfDistill()
