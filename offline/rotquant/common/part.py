"""A section of a recipe: unknown keys are refused, and nothing changes it."""

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
