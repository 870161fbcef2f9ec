"""What a recipe says of workers, a trainer's or a teacher's. The words are explained in docs/rollouts.md."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rl.recipe_base import Positive, Strict

Engine = Literal["local", "vllm"]
Mode = Literal["inprocess", "colocate", "server"]
_CORES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


class WorkersSpec(Strict):
    """Either `count` workers that the recipe starts on the host of its first process, or `urls` of others."""

    count: Positive | None = None
    urls: list[str] = Field(default_factory=list, description="http://HOST:PORT of workers that are running already")
    secret_file: str | None = Field(
        None, description="shared with the workers; None = a new one for those started here"
    )
    host: str = Field("127.0.0.1", description="address that started workers listen at")
    ports: list[Annotated[int, Field(ge=1, le=65535)]] = Field(
        default_factory=list, description="one for each started worker; none = free ones"
    )
    python: str | None = Field(None, description="interpreter of vLLM's environment; None = this one")
    options: dict[str, Any] = Field(default_factory=dict, description="of the engine; vLLM's engine arguments")
    env: dict[str, str | list[str]] = Field(
        default_factory=dict, description="environment variables; a list has a value for each worker"
    )
    cores: list[str] = Field(default_factory=list, description="CPU cores of each worker, such as 0-3")
    transport: Literal["files", "http", "collective"] | None = Field(
        None, description="of weights; None = files for workers started here, http for others"
    )
    weights: Literal["model", "fp8"] = Field(
        "model", description="how weights are sent: all in model.dtype, or those that `precision: fp8` rounds in FP8"
    )
    folder: str | None = Field(None, description="where weights wait for workers; None = shared memory if it has room")
    collective: Literal["gloo", "nccl"] = Field("gloo", description="of transport collective")
    collective_host: str = Field("127.0.0.1", description="address of the first process that workers can reach")
    bucket_mb: Positive = Field(256, description="weights are sent in pieces of this size")
    deadline_s: float = Field(60.0, gt=0, description="a worker that is silent for so long is lost")
    start_timeout_s: float = Field(600.0, gt=0, description="until a worker is ready; until a run without any stops")
    max_restarts: int = Field(10, ge=0, description="of each worker, without an update between")
    in_flight: Positive = Field(256, description="samples that a process asks of a worker at a time")
    probe_tolerance: float = Field(0.5, gt=0, description="mean difference of log-probabilities, nats per token")

    @field_validator("urls")
    @classmethod
    def _addresses(cls, urls: list[str]) -> list[str]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.username:
                raise ValueError(f"a worker's URL must look like http://HOST:PORT, not {url!r}")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError("a worker is named twice")
        return urls

    @field_validator("cores")
    @classmethod
    def _ranges(cls, cores: list[str]) -> list[str]:
        for text in cores:
            if not _CORES.fullmatch(text):
                raise ValueError(f"{text!r} must look like 0-3 or 0-3,6")
        return cores

    @model_validator(mode="after")
    def _consistent(self) -> WorkersSpec:
        if self.urls and self.secret_file is None:
            raise ValueError("workers.urls needs workers.secret_file: the file that the workers were started with")
        if self.urls and self.count is not None:
            raise ValueError("give at most one of workers.count and workers.urls")
        if self.urls:
            started = {"ports", "python", "options", "env", "cores"} & self.model_fields_set
            if started:
                raise ValueError(
                    f"workers.{min(started)} is for workers that the recipe starts; those of urls run already"
                )
            if self.transport == "files" and self.folder is None:
                raise ValueError(
                    "workers.transport: files with workers.urls needs workers.folder, the workers' --bucket-folder"
                )
        lengths = {"ports": len(self.ports), "cores": len(self.cores)}
        lengths |= {f"env.{name}": len(value) for name, value in self.env.items() if isinstance(value, list)}
        for name, length in lengths.items():
            if length not in (0, self.count or 1):
                raise ValueError(f"workers.{name} has {length} entries for {self.count or 1} worker(s)")
        return self

    @property
    def chosen_transport(self) -> Literal["files", "http", "collective"]:
        return self.transport or ("http" if self.urls else "files")

    def env_of(self, number: int) -> dict[str, str]:
        """The environment variables of worker `number`."""
        return {name: v[number] if isinstance(v, list) else v for name, v in self.env.items()}


def check_loaded(engine: Engine, workers: WorkersSpec | None) -> None:
    """Raises ValueError for what cannot serve a model that nobody trains, in this process or in workers."""
    if workers is None:
        if engine == "vllm":
            raise ValueError("engine: vllm needs workers.count (to be started here) or workers.urls")
        return
    if not (workers.count or workers.urls):
        raise ValueError("workers needs count (to be started here) or urls")
    sending = {"transport", "weights", "bucket_mb", "folder", "collective", "collective_host", "probe_tolerance"}
    meaningless = sending & workers.model_fields_set
    if meaningless:
        raise ValueError(
            f"workers.{min(meaningless)} is about sending weights; these stay as they were loaded: remove it"
        )


def check_mode(engine: Engine, mode: Mode, workers: WorkersSpec | None) -> None:
    """Raises ValueError for combinations that there are not."""
    if mode == "inprocess":
        if engine == "vllm":
            raise ValueError("engine: vllm needs mode: colocate (in the trainer's processes) or server (in workers)")
        if workers is not None:
            raise ValueError("workers mean nothing with mode: inprocess; set mode: server")
    if mode == "colocate":
        if engine == "local":
            raise ValueError("mode: colocate is for engine: vllm; a local engine in the trainer is mode: inprocess")
        known = {"options", "probe_tolerance", "weights"}
        other = (workers.model_fields_set if workers else set()) - known
        if other:
            raise ValueError(f"workers.{min(other)} means nothing with mode: colocate, which has no worker processes")
    if mode == "server" and (workers is None or not (workers.count or workers.urls)):
        raise ValueError("mode: server needs workers.count (to be started here) or workers.urls")


def check_weights(workers: WorkersSpec | None, *, fp8: bool, adapters: bool) -> None:
    """Raises ValueError where weights would be sent in FP8 that the trainer does not round so."""
    if workers is None or workers.weights != "fp8":
        return
    if not fp8:
        raise ValueError(
            "rollout.workers.weights: fp8 needs precision: fp8: else the sampler's weights would be rounded and the "
            "trainer's not; set weights: model"
        )
    if adapters:
        raise ValueError(
            "rollout.workers.weights: fp8 would round what adapters add, which the trainer does not; with model.lora "
            "set weights: model"
        )
