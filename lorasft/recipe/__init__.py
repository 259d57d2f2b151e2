"""The recipe's schema: names, defaults, units, types and ranges of all that can be set, here and nowhere else."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, field_validator

PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=0.5)]
# Of a path that need not be there yet; the system's calls end a text at a NUL.
PathText = Annotated[str, Field(pattern=r"^[^\x00]*$")]
RunPath = Annotated[PathText, AfterValidator(os.path.expanduser)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Auto = Literal["auto"]
Scalar = str | int | float | bool | None
_Tokens = str | list[str] | dict[str, str]
Format = Literal["auto", "chat", "sharegpt", "alpaca", "prompt-completion", "text"]
_DATE = datetime.date(2024, 7, 26)


def as_names(value: Any) -> Any:
    """One name may be written without a list, and several as a text with commas."""
    if isinstance(value, str) and value != "all-linear":
        value = [name.strip() for name in value.split(",")]
    return tuple(value) if isinstance(value, list) else value


def _as_tokens(value: Any) -> Any:
    """New tokens as a list, or as the lines of a file, each with no text: it starts at the mean of all rows."""
    if isinstance(value, str):
        if not Path(value).is_file():
            raise ValueError("there is no such file, with a token a line; tokens are a list")
        value = [line for line in Path(value).read_text(encoding="utf-8").splitlines() if line]
    if not isinstance(value, list):
        return value
    if twice := [token for at, token in enumerate(value) if token in value[:at]]:
        raise ValueError(f"{twice[0]} is in it twice")
    return {str(token): "" for token in value}


class _Section(BaseModel):
    # strict: a quoted number is not a number, and 1 is not true.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelSettings(_Section):
    base: str = Field(min_length=1, description="folder or hub id of the base model")
    revision: str | None = Field(None, description="branch, tag or commit of the base on the hub")
    quantization: Literal["nf4", "none"] = Field("nf4", description="nf4: the base in 4 bit (QLoRA)")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="what the base computes in")
    new_tokens: dict[str, str] = Field({}, max_length=1000, description="list, file of lines, or each: starting text")
    _tokens = field_validator("new_tokens", mode="before", json_schema_input_type=_Tokens)(_as_tokens)


class AdapterSettings(_Section):
    rank: int = Field(16, ge=1, le=1024, description="rank of A and B")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A; above 0 turns prefix sharing off")
    targets: Literal["all-linear"] | tuple[str, ...] = Field("all-linear", description="names of linears to adapt")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank)")
    dora: bool = Field(False, description="weight-decomposed LoRA")
    modules_to_save: tuple[str, ...] = Field((), description="modules trained and saved in full")
    start: str | None = Field(None, description="folder of an adapter or of a run to begin from")
    _names = field_validator("targets", "modules_to_save", mode="before")(as_names)


class DataSource(_Section):
    path: str = Field(min_length=1, description="file, folder or hub id")
    split: str = Field("train", description="split of a hub data set or a folder")
    config: str | None = Field(None, description="configuration of a hub data set or a snapshot of one")
    format: Format | None = Field(None, description="null: data.format")
    columns: dict[str, str] | None = Field(None, description="null: data.columns")
    share: float = Field(1.0, gt=0, le=100, description="of training rows, in an epoch; above 1 some come again")


def _as_sources(value: Any) -> Any:
    """A source may be written as its path alone, and one source without a list."""
    sources = [value] if isinstance(value, (str, dict, DataSource)) else value
    if not isinstance(sources, (list, tuple)):
        return value
    return tuple({"path": one} if isinstance(one, str) else one for one in sources)


_Written = str | DataSource | Annotated[list[str | DataSource], Field(min_length=1)]
_Sources = Annotated[
    tuple[DataSource, ...], Field(min_length=1), BeforeValidator(_as_sources, json_schema_input_type=_Written)
]


class DataSettings(_Section):
    train: _Sources = Field(description="a source or a list of sources")
    eval: Share | _Sources | None = Field(0.02, description="held out: a share of the data, a source, a list, or null")
    format: Format = Field("auto", description="shape of the rows")
    columns: dict[str, str] | None = Field(None, description="field of the format -> name of the column in the data")
    max_length: int = Field(4096, ge=8, description="tokens of the longest sequence")
    overlong: Literal["drop", "truncate", "split", "error"] = Field("drop", description="longer sequences")
    on_bad_row: Literal["error", "drop"] = Field("error", description="what to do with rows that cannot be read")
    max_dropped: float = Field(0.05, ge=0, le=1, description="largest share of the rows that may be dropped")


class ChatSettings(_Section):
    template: PathText | None = Field(None, description="null: the tokenizer's own; or plain, chatml, none, or a file")
    template_options: dict[str, Scalar] = Field({}, description="variables of the template, as a server would set")
    template_date: datetime.date | None = Field(_DATE, description="what a template gets as today's; null: the clock's")
    system: str | None = Field(None, description="system message for conversations without one")
    supervise: Literal["all", "last", "flagged", "everything"] = Field(
        "all", description="supervised messages, but for those of weight 0"
    )
    thinking: Literal["follow_template", "mask", "drop", "error"] = Field(
        "follow_template", description="reasoning: supervised as rendered, context, taken out, never to be lost"
    )
    control_tokens: Literal["error", "as_text"] = Field("error", description="control tokens written in the data")


class TrainSettings(_Section):
    epochs: float = Field(2.0, gt=0, description="passes over the data")
    steps: PositiveInt | None = Field(None, description="optimizer steps, instead of epochs")
    batch_size: int = Field(32, ge=1, description="examples per optimizer step")
    loss: Literal["token", "example"] = Field("token", description="mean over supervised tokens, or over examples")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="L2 norm to clip at; null: never")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of order, initial adapter and dropout")


class OptimizerSettings(_Section):
    name: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit keeps its state in 8 bit")
    learning_rate: float = Field(2e-4, gt=0, le=0.01, description="peak of the schedule")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, times the learning rate")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="decay of the first and second moment")
    lora_plus: PositiveFloat | None = Field(None, description="LoRA+: learning rate of B / that of A; null: the same")


class ScheduleSettings(_Section):
    name: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup: Annotated[int, Field(ge=0)] | Fraction = Field(0.03, description="whole: steps; fraction: a share of them")
    min_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate / peak")
    delay: int = Field(0, ge=0, le=1, description="1: each step has the rate of the one before, as transformers counts")


class RunSettings(_Section):
    output: RunPath = Field("runs/recipe", min_length=1, description="run folder; default: runs/ and the recipe's name")
    log_every: int = Field(1, ge=1, description="steps")
    eval_every: PositiveInt | None = Field(100, description="steps; null: only at the end")
    sample_every: PositiveInt | None = Field(1, description="evaluations, with answers to held-out prompts; null: none")
    save_every: PositiveInt | None = Field(100, description="steps; null: by the clock and at the end")
    save_minutes: PositiveFloat | None = Field(20.0, description="minutes between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints to keep")
    keep_best: bool = Field(False, description="adapter/ holds the best by held-out loss, not the last")
    patience: PositiveInt | None = Field(None, description="evaluations without a better one that end the run")
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = Field((), description="also log there")
    _names = field_validator("trackers", mode="before")(as_names)


class MachineSettings(_Section):
    micro_batch_tokens: Auto | PositiveInt = Field("auto", description="tokens per micro-batch; auto: by the memory")
    activation_checkpointing: Auto | bool = Field("auto", description="recompute layers; auto: as few as must be")
    keep_16bit: Auto | bool = Field("auto", description="4-bit weights also in 16 bit; auto: on a GPU if they fit")
    share_prefixes: Auto | bool = Field("auto", description="compute common beginnings once")
    attention: Literal["auto", "segments", "sdpa", "eager"] = Field("auto", description="attention backend")
    spread_rows: Auto | bool = Field("auto", description="rows too long for one device over all processes")
    shard: Auto | Literal["all"] | PositiveInt = Field("auto", description="processes that hold one base together")
    cache_base: Auto | bool = Field("auto", description="keep the 4-bit base for the next start; auto: from 64 MB")


class Recipe(_Section):
    """One training run. Everything but `run` and `machine` is mathematics."""

    model: ModelSettings
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings
    chat: ChatSettings = ChatSettings()
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    run: RunSettings = RunSettings()
    machine: MachineSettings = MachineSettings()


PLACES: dict[str, Any] = {  # keys of which the contents decide, and not where they are
    "model": {"base"},
    "adapter": {"start"},
    "chat": {"template"},
    "data": {"train": {"__all__": {"path"}}, "eval": {"__all__": {"path"}}},
}


def mathematics(recipe: Recipe) -> dict[str, Any]:
    """What decides the result, but for the files: all keys except `run`, `machine` and PLACES, as JSON values."""
    return recipe.model_dump(mode="json", exclude={"run": True, "machine": True, **PLACES})


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipe files, for editors; data is not required, because the command line may give it."""
    schema = Recipe.model_json_schema()
    del schema["$defs"]["DataSettings"]["required"]
    schema["required"].remove("data")
    return schema


from lorasft.recipe.load import load_recipe as load_recipe  # noqa: E402  it reads what is above
