"""state.json: what a checkpoint knows about the run besides weights and optimizer state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Optional

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coupalign.engine.base import TrainState
from coupalign.errors import InputError

FORMAT = 3
# Format 2 had neither `session` nor `best_of`.
_READABLE_FORMATS = (2, FORMAT)
_MOST_BYTES = 2**20


class _Strict(BaseModel):
    """Refuses unknown keys, numbers in quotes, NaN and infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class _Progress(_Strict):
    """The fields of TrainState."""

    step: int = Field(ge=0)
    bad_steps: int = Field(ge=0)
    best: Optional[float] = Field(ge=0, le=1)
    best_step: Optional[int] = Field(ge=0)
    evaluated: Optional[int] = Field(ge=0)
    best_of: Optional[str] = None

    @model_validator(mode="after")
    def _check_order(self) -> _Progress:
        if max(self.bad_steps, self.best_step or 0, self.evaluated or 0) > self.step:
            raise ValueError("a number of steps is above `step`")
        return self


class EngineRecord(_Strict):
    """The engine that wrote the optimizer state. Only an equal one loads it without conversion.

    Attributes:
        stage: of ZeRO; None for DDP.
    """

    kind: Literal["ddp", "deepspeed"]
    stage: Optional[int] = Field(ge=0, le=3)
    ranks: int = Field(ge=1)

    @model_validator(mode="after")
    def _check_stage(self) -> EngineRecord:
        if (self.kind == "ddp") != (self.stage is None):
            raise ValueError("kind and stage contradict each other")
        return self


class _Counters(_Strict):
    """What `Engine.counters` returned."""

    applied: int = Field(ge=0)
    scale: float = Field(gt=0)
    good_steps: int = Field(ge=0)


class StateFile(_Strict):
    """The content of state.json.

    Attributes:
        tool: name and version of what wrote it.
        data: fingerprint of the training data.
        session: a random number of the save, by which all ranks know that they wrote one
            checkpoint.
    """

    format: int
    tool: str
    state: _Progress
    engine: EngineRecord
    counters: _Counters
    data: str
    session: Optional[str] = None

    @property
    def train_state(self) -> TrainState:
        """The state to resume from."""
        return TrainState(**self.state.model_dump())

    @classmethod
    def describe(
        cls,
        state: TrainState,
        *,
        tool: str,
        engine: EngineRecord,
        counters: dict[str, float],
        data: str,
        session: str,
    ) -> StateFile:
        """Make the content for a checkpoint that is being written."""
        return cls(
            format=FORMAT,
            tool=tool,
            state=_Progress(**state.to_json()),
            engine=engine,
            counters=_Counters(**counters),
            data=data,
            session=session,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the content as JSON."""
        return self.model_dump(mode="json")


class BadState(ValueError):
    """A state.json is damaged; the message says where, without the folder."""


def read_state(path: Path) -> StateFile:
    """Read a state.json.

    Raises:
        BadState: it is unreadable, or a field is not as we write it.
        InputError: another version of this program wrote it.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("too large")
        tree = json.loads(path.read_text("utf-8"))
        version = tree["format"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadState(f"{path.name} is unreadable") from error

    if type(version) is int and version > FORMAT:
        raise InputError(
            f"{path}: format {version} was written by a newer version of coupalign; this one reads "
            f"formats {_READABLE_FORMATS[0]} to {FORMAT}. Resume with the newer version"
        )
    try:
        if version not in _READABLE_FORMATS:
            raise ValueError("format")
        return StateFile.model_validate(tree)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise BadState(f"{path.name}: {place:.80} is damaged") from error
    except ValueError as error:
        raise BadState(f"{path.name}: format is damaged") from error
