"""What the training of a reward backbone is told: plain data, stored with its result. Imports nothing heavy."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class BackboneConfig(BaseModel):
    """Settings of the backbone; the defaults are a few minutes on two cores without a GPU."""

    model_config = ConfigDict(extra="forbid")

    max_pairs: int = Field(320, ge=8, description="Pairs trained on, the newest of those that may train.")
    max_minutes: float = Field(10.0, gt=0, description="The training ends here, with what it has learned.")
    max_pair_tokens: int = Field(256, ge=32, description="Prompt and answer are cut to this in training.")
    learning_rate: float = Field(2e-4, gt=0)
    epochs: float = Field(1.0, gt=0)
    batch_pairs: int = Field(8, ge=1, description="Pairs per optimiser step.")
    micro_batch_pairs: int = Field(4, ge=1, description="Pairs per forward pass.")
    lora_rank: int = Field(8, ge=1)
    lora_alpha: int = Field(32, ge=1)
    seed: int = 0
