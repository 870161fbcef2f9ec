"""What sampler and worker say to each other: JSON messages, checked on arrival, and samples."""

from __future__ import annotations

import base64
import dataclasses
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from rl.rollout.types import Sample, SamplingParams

Key = Annotated[str, Field(min_length=1, max_length=128)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=2**20)]
Version = Annotated[int, Field(ge=0, lt=2**53)]
AS_LOADED = -1  # the version of weights that no trainer has sent
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Transport = Literal["files", "http", "collective"]


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Request(Message):
    """One prompt; `key` is the caller's, and a key that is known already is not sampled again."""

    key: Key
    prompt: Tokens
    stream: Annotated[int, Field(ge=0, lt=2**64)]


class Settings(Message):
    """`SamplingParams` with a seed: a prompt that is asked for again elsewhere must get the same numbers."""

    n: int = Field(ge=1, le=65536)
    temperature: float = Field(ge=0, le=100)
    top_p: float = Field(gt=0, le=1)
    top_k: int = Field(ge=0, lt=2**31)
    max_tokens: int = Field(ge=1, le=2**24)
    min_tokens: int = Field(ge=0, le=2**24)
    stop_token_ids: tuple[Token, ...] = Field(max_length=4096)
    seed: int = Field(ge=0, lt=2**64)

    def params(self) -> SamplingParams:
        return SamplingParams(**self.model_dump())


class Generate(Message):
    """`version`: of the weights to sample with, or AS_LOADED; a worker that has others refuses. or_newer: only one that
    has older ones, as updates may enter running requests."""

    requests: list[Request] = Field(min_length=1, max_length=65536)
    params: Settings
    version: Version | Literal[-1] | None = None
    or_newer: bool = False

    @field_validator("params")
    @classmethod
    def _possible(cls, settings: Settings) -> Settings:
        settings.params()  # raises ValueError
        return settings

    def may_use(self, version: int) -> bool:
        """Whether weights of this version are what was asked for."""
        return self.version is None or version == self.version or (self.or_newer and version > self.version)


class Results(Message):
    """Asks for finished groups among `keys`, waiting for the first; what is in `forget` has arrived."""

    keys: list[Key] = Field(max_length=65536)
    forget: list[Key] = Field(default_factory=list, max_length=65536)
    wait_s: float = Field(0.0, ge=0, le=60)


class Abort(Message):
    keys: list[Key] = Field(default_factory=list, max_length=65536)
    all: bool = False


class Group(Message):
    """Where a collective update meets; the sender is rank 0."""

    host: str = Field(min_length=1, max_length=255)
    port: int = Field(ge=1, le=65535)
    rank: int = Field(ge=1, le=4096)
    world: int = Field(ge=2, le=4097)
    backend: Literal["gloo", "nccl"]
    timeout_s: float = Field(gt=0, le=3600)


class Begin(Message):
    version: Version
    transport: Transport
    group: Group | None = None


class Bucket(Message):
    """Announces a bucket: read from `file`, or received in the body or by broadcast."""

    version: Version
    index: int = Field(ge=0, lt=2**20)
    bytes: int = Field(gt=0)
    checksum: Checksum
    file: str | None = Field(None, pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")


class Finish(Message):
    """`checksum`: of the buckets' checksums, in order. in_flight: without waiting for running requests, where the
    engine can. probe: to be scored with the new weights, before anything else."""

    version: Version
    buckets: int = Field(ge=0)
    checksum: Checksum
    in_flight: bool = False
    probe: list[Tokens] = Field(default_factory=list, max_length=1024)


class Score(Message):
    tokens: list[Tokens] = Field(min_length=1, max_length=1024)


class Nothing(Message):
    pass


class Finished(BaseModel):
    """The answer to `Finish`: the version that the worker has, and the probe's log-probabilities under it."""

    model_config = ConfigDict(extra="ignore")

    version: int
    logprobs: list[list[float]] = Field(default_factory=list)


class Health(BaseModel):
    """Anybody may ask for this. heartbeat_s: how long ago the engine's thread last showed itself; alive: if it runs at
    all. With a fault nothing is sampled: the engine failed, or its weights are an update that broke off."""

    model_config = ConfigDict(extra="ignore")

    engine: str
    instance: str  # another one after a restart
    version: int
    busy: int  # groups that are not finished
    steps: int
    heartbeat_s: float
    alive: bool
    fault: str | None


def settings_of(params: SamplingParams) -> Settings:
    return Settings(**dataclasses.asdict(params))


def encode_sample(sample: Sample) -> dict[str, Any]:
    fields = {f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)}
    routed = fields["routed_experts"]
    if routed is not None:
        array = np.ascontiguousarray(routed)
        data = base64.b64encode(array.tobytes()).decode()
        fields["routed_experts"] = {"shape": list(array.shape), "dtype": str(array.dtype), "data": data}
    return fields


def decode_sample(fields: dict[str, Any]) -> Sample:
    routed = fields.get("routed_experts")
    if routed is not None:
        data = bytearray(base64.b64decode(routed["data"]))  # a bytearray, so that the array can be written to
        routed = np.frombuffer(data, dtype=routed["dtype"]).reshape(routed["shape"])
    return Sample(**{**fields, "routed_experts": routed})
