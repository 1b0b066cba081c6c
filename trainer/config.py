"""What a run is told: plain data, stored with the run. Imports nothing heavy."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class OnlineDPOConfig(BaseModel):
    """Settings of the ``online-dpo`` recipe.

    The defaults are what a 2-core machine does in a night of under six minutes (docs/log.md).
    """

    model_config = ConfigDict(extra="forbid")

    num_prompts: int = Field(48, ge=1, description="Prompts that get fresh samples.")
    samples_per_prompt: int = Field(4, ge=2, description="K: best against worst of these.")
    max_answer_tokens: int = Field(96, ge=8, description="Longest sample.")
    temperature: float = Field(1.0, gt=0, description="Of the samples.")
    max_corrections: int = Field(32, ge=0, description="Newest corrections used as pairs.")
    max_pairs: int = Field(48, ge=8, description="Pairs trained on, corrections first.")
    num_gate_prompts: int = Field(24, ge=8, description="Held-out prompts of the win-rate gate.")
    min_margin: float = Field(0.3, ge=0, description="Least reward difference within a pair.")
    beta: float = Field(0.1, gt=0, description="DPO's KL strength.")
    sft_weight: float = Field(0.0, ge=0, description="Weight of likelihood on the chosen answer.")
    learning_rate: float = Field(3e-4, gt=0)
    batch_pairs: int = Field(8, ge=1, description="Pairs per optimiser step.")
    micro_batch_pairs: int = Field(4, ge=1, description="Pairs per forward pass.")
    max_pair_tokens: int = Field(144, ge=32, description="Prompt and answer are cut to this in training.")
    epochs: float = Field(1.0, gt=0)
    lora_rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    seed: int = 0
