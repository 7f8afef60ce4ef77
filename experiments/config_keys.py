"""What all mappings of an experiment file have in common: strict keys, numbers within bounds, policies by name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._+ -]*$")]
Count = Annotated[int, Field(ge=1, le=1 << 31)]
Milliseconds = Annotated[float, Field(gt=0, le=1e9)]
Rate = Annotated[float, Field(ge=1e-6, le=1e9)]  # per second
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]


class Keys(BaseModel):
    """Strict types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _remember_keys(cls, data: Any, info: ValidationInfo) -> Any:
        # so that an unknown key can be answered with the keys of its own mapping
        if isinstance(info.context, dict) and isinstance(data, dict):
            info.context[id(data)] = list(cls.model_fields)
        return data


def _policy_from_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class PolicyChoice(BaseModel):
    """A policy by name, or `path/to/file.py:Class` from the experiment file's folder, with its parameters inline."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    name: str = Field(min_length=1, max_length=1000)

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


Policy = Annotated[PolicyChoice, BeforeValidator(_policy_from_name)]
