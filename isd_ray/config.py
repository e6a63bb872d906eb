"""One typed configuration for every job, from layers of defaults, a YAML file and the command line.

Layers, later ones win: field defaults, the method's published defaults, the data set's defaults (its own and
those for the chosen method), the YAML file (`--config`), the command line (`--train.epochs 20`). Every unknown
name, and then every wrong value, is reported at once.
"""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from isd_ray.definitions import file_or_name
from isd_ray.errors import UserError, harmless, listed, nearest, shown
from isd_ray.layers import Layer, flatten, merge, only, unfold
from isd_ray.names import name_fault, place_fault, secret_fault
from isd_ray.sections import (
    RETIRED,
    DataConfig,
    EvaluateConfig,
    MethodConfig,
    ModelConfig,
    QueueConfig,
    TrainConfig,
)
from isd_ray.values import path_of, plain, reason_of, refuse
from isd_ray.yaml_files import read_mapping

# Options that a method has only if its published defaults name them; the method's own name is none of them.
OF_METHODS = ("method.", "queue.exclude_own")
MOST_ARGUMENT = 2**16  # characters of one argument of a command line


class Config(BaseSettings):
    """Everything a run needs; saved as config.yaml beside the results, and read back by --config."""

    model_config = SettingsConfigDict(
        extra="forbid", allow_inf_nan=False, cli_avoid_json=True, cli_hide_none_type=True
    )

    name: str | None = Field(
        None, description="Name of the run (default: method, data set and a hash of the options)"
    )
    output: str = Field("runs", description="Folder or URI that holds the runs")
    address: str | None = Field(
        None, description="Address of a running Ray cluster (default: RAY_ADDRESS, else local)"
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    method: MethodConfig = MethodConfig()
    queue: QueueConfig = QueueConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    _plain = field_validator("*", mode="before")(classmethod(plain))

    @field_validator("name", mode="after")
    @classmethod
    def _is_name(cls, name: str | None) -> str | None:
        return refuse(name, name_fault)

    @field_validator("output", mode="after")
    @classmethod
    def _is_place(cls, output: str) -> str | None:
        return refuse(output, place_fault)

    @field_validator("address", mode="after")
    @classmethod
    def _is_address(cls, address: str | None) -> str | None:
        """An address is host:port or ray://host:port."""
        return refuse(address, secret_fault)

    @classmethod
    def settings_customise_sources(cls, settings_cls: Any, init_settings: Any, **_: Any) -> tuple[Any, ...]:  # type: ignore[override]
        """Take values from the caller alone: stray environment variables must not change a run."""
        return (init_settings,)


class _CommandLine(Config):
    """Pretrain a backbone on unlabelled images with ISD on Ray, and evaluate it.

    Without options the embedded data set is used. Options given here win over the file of --config, that over the
    defaults of the data set (datasets/NAME.yaml), those over the method's. A run that was stopped continues when the
    same command is given again.
    """

    config: str | None = Field(
        None, description="YAML file to start from, or the name of a recipe; the command line wins over it"
    )


def parse(arguments: Sequence[str], program: str = "pretrain") -> Config:
    """Read the command line (and the YAML file it names) into a resolved configuration.

    Raises UserError that lists every unknown name and wrong value; `--help` prints all options and exits.
    """
    given = read_options(arguments, program)
    path = given.pop("config", None)
    return resolve({} if path is None else read_yaml(path), given)


def read_options(arguments: Sequence[str], program: str) -> dict[str, Any]:
    """Read the command line alone: what it says, with no defaults. Raises UserError as `parse` does."""
    _refuse_unknown_flags(arguments)
    try:
        return _read_arguments(arguments, program)
    except (ValueError, RecursionError) as error:  # SettingsError is a ValueError
        reason = _where_it_fails(arguments, program) or _reason(error)
        raise UserError(f"command line: {reason}; --help lists the options") from None


def _read_arguments(arguments: Sequence[str], program: str) -> dict[str, Any]:
    source = _command_line(program)
    return dict(source(args=list(arguments))())


@cache
def _command_line(program: str) -> CliSettingsSource[Any]:
    """Return the parser of a job's options: to build it takes ten times as long as to parse with it."""
    return CliSettingsSource[Any](_CommandLine, cli_prog_name=program, cli_exit_on_error=False)


def _where_it_fails(arguments: Sequence[str], program: str) -> str | None:
    """Name the first option whose value cannot be read; pydantic names a group at best."""
    starts = [i for i, argument in enumerate(arguments) if argument.startswith("--")]
    for start, end in pairwise([*starts, len(arguments)]):
        flag, *values = [*arguments[start].split("=", 1), *arguments[start + 1 : end]]
        if len(values) != 1:
            continue  # argparse says by name what is missing or too much
        try:
            _read_arguments([flag, values[0]], program)
        except (ValueError, RecursionError):
            remedy = "it cannot be read; a list is [1, 2], a mapping is name=value"
            return f"{flag} {shown(values[0])}: {remedy}"
    return None


def _reason(error: Exception) -> str:
    text = str(error).removeprefix("error parsing CLI: ")
    return harmless(text, 300)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options, nested or with dotted names; a name alone is that of a recipe."""
    return read_mapping(file_or_name("recipes", str(path)), "config file")


def resolve(*layers: Layer) -> Config:
    """Merge the layers over the defaults of the method and the data set that they choose."""
    from isd_ray.data.catalog import load_definition
    from isd_ray.methods import find_method

    for layer in layers:
        _refuse_unknown_keys(layer)
    given = merge(*layers)
    definition = load_definition(validate(only(given, "data.dataset")).data.dataset)
    name = validate(only(merge(definition.defaults, given), "method.name")).method.name
    method = find_method(name).defaults
    own = {o: v for o, v in flatten(given).items() if v is not None or not _of_methods(o)}
    _refuse_options_of_others(name, own)
    images = {f"data.{name}": getattr(definition, name) for name in ("image_size", "mean", "std")}
    chosen = flatten(merge(definition.defaults, definition.methods.get(name, {})))
    dataset = {o: v for o, v in chosen.items() if o in method or not _of_methods(o)}
    return validate(merge(method, images, dataset, own))


def validate(values: Layer) -> Config:
    """Build the configuration; raises UserError that lists every wrong value."""
    try:
        return Config(**values)
    except ValidationError as error:
        faults = [f"--{path_of(e)}{_given(e['input'])}: {reason_of(e)}" for e in error.errors()]
        raise UserError(listed(faults)) from None


def _given(value: Any) -> str:
    return "" if isinstance(value, dict) else f" {shown(value)}"


def option_names(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Return the dotted name of every option."""
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += option_names(kind, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML that `--config` reads back."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def _refuse_unknown_keys(given: Layer) -> None:
    names = option_names()
    unknown = [n for n in flatten(unfold(given)) if n not in (*names, *RETIRED)]
    wrong = [_unknown(name, names) for name in unknown]
    if wrong:
        raise UserError(listed(wrong) + " --help lists the options")


def _unknown(name: str, names: Sequence[str]) -> str:
    if any(known.startswith(f"{name}.") for known in names):
        return f"'{name}' is a group of options; give some of them, as {name}.NAME."
    return f"unknown option {shown(name)}.{nearest(name, names)}"


def _of_methods(option: str) -> bool:
    return option.startswith(OF_METHODS) and option != "method.name"


def _refuse_options_of_others(name: str, given: Layer) -> None:
    """Refuse what the user set and the method does not have; say which methods do."""
    from isd_ray.methods import METHODS

    wrong = []
    for option in given:
        if _of_methods(option) and option not in METHODS[name].defaults:
            owners = ", ".join(other for other, method in METHODS.items() if option in method.defaults)
            wrong.append(f"--{option}: method '{name}' has no such option; these have it: {owners}")
    if wrong:
        raise UserError(listed(wrong))


def _refuse_unknown_flags(arguments: Sequence[str]) -> None:
    names = [*option_names(_CommandLine), "help"]
    flags = [a[2:].split("=")[0] for a in arguments if a.startswith("--") and len(a) > 2]
    unknown = [flag for flag in flags if flag not in names]
    wrong = [f"unknown option {shown(f'--{flag}')}.{nearest(flag, names)}" for flag in unknown]
    if wrong:
        raise UserError(listed(wrong) + " --help lists the options")
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if len(argument) > MOST_ARGUMENT:
            name = before if before.startswith("--") else shown(argument.partition("=")[0])
            length = f"{len(argument):,} characters, at most {MOST_ARGUMENT:,} are taken"
            raise UserError(f"command line: {name}: {length}")
