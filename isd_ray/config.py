"""One typed configuration for every job, from layers of defaults, a YAML file and the command line.

Layers, later ones win: field defaults, the method's published defaults, the data set's defaults (its own and
those for the chosen method), the YAML file (`--config`), the command line (`--train.epochs 20`). Every unknown
name, and then every wrong value, is reported at once.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict, SettingsError

from isd_ray.errors import UserError, nearest
from isd_ray.layers import Layer, flatten, merge, only
from isd_ray.sections import DataConfig, EvaluateConfig, MethodConfig, ModelConfig, QueueConfig, TrainConfig

# Options that a method has only if its published defaults name them; the method's own name is none of them.
OF_METHODS = ("method.", "queue.exclude_own")


class Config(BaseSettings):
    """Everything a run needs; saved as config.yaml beside the results, and read back by --config."""

    model_config = SettingsConfigDict(extra="forbid", cli_avoid_json=True, cli_hide_none_type=True)

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

    config: str | None = Field(None, description="YAML file to start from; the command line wins over it")


def parse(arguments: Sequence[str], program: str = "pretrain") -> Config:
    """Read the command line (and the YAML file it names) into a resolved configuration.

    Raises UserError that lists every unknown name and wrong value; `--help` prints all options and exits.
    """
    given = read_options(arguments, program)
    path = given.pop("config", None)
    return resolve(read_yaml(path) if path else {}, given)


def read_options(arguments: Sequence[str], program: str) -> dict[str, Any]:
    """Read the command line alone: what it says, with no defaults. Raises UserError as `parse` does."""
    _refuse_unknown_flags(arguments)
    try:
        source = CliSettingsSource[Any](
            _CommandLine, cli_parse_args=list(arguments), cli_prog_name=program, cli_exit_on_error=False
        )
        return dict(source())
    except SettingsError as error:
        reason = str(error).removeprefix("error parsing CLI: ")
        raise UserError(f"command line: {reason}; --help lists the options") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of options, nested or with dotted names."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config file {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict | None):
        raise UserError(f"config file {path}: expected 'name: value' lines, found {type(content).__name__}")
    return content or {}


def resolve(*layers: Layer) -> Config:
    """Merge the layers over the defaults of the method and the data set that they choose."""
    from isd_ray.data.catalog import load_definition
    from isd_ray.methods import find_method

    given = merge(*layers)
    _refuse_unknown_keys(given)
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
        lines = [f"--{'.'.join(map(str, e['loc']))} {e['input']!r}: {e['msg']}" for e in error.errors()]
        raise UserError("; ".join(lines)) from None


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
    wrong = [
        f"unknown option '{name}'.{nearest(name, names)}" for name in flatten(given) if name not in names
    ]
    if wrong:
        raise UserError("; ".join(wrong) + " --help lists the options")


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
        raise UserError("; ".join(wrong))


def _refuse_unknown_flags(arguments: Sequence[str]) -> None:
    names = [*option_names(_CommandLine), "help"]
    flags = [a[2:].split("=")[0] for a in arguments if a.startswith("--") and len(a) > 2]
    wrong = [f"unknown option '--{flag}'.{nearest(flag, names)}" for flag in flags if flag not in names]
    if wrong:
        raise UserError("; ".join(wrong) + " --help lists the options")
