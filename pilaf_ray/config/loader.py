"""Reading a configuration: YAML, then ``key=value`` overrides, then validation."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from pilaf_ray.config.schema import RunConfig
from pilaf_ray.errors import ConfigError


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The validated configuration; every mistake is one line of ConfigError."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such configuration file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as 'run:' and 'model:', found something else")
    for override in overrides:
        _apply(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from error


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override '{override}' is not of the form key=value, e.g. run.seed=1")
    *parents, leaf = key.split(".")
    section = values
    for parent in parents:
        if section.get(parent) is None:  # missing, or an empty section such as "pipeline:"
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise ConfigError(f"override '{override}': '{parent}' is a value, not a section")
    try:
        section[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': the value is not valid YAML; put it in quotes") from error


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        names = _known_keys(RunConfig)
        close = difflib.get_close_matches(str(first["loc"][-1]), names, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else "; see docs/configuration.md"
        return f"unknown key '{where}'{hint}"
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message


def _known_keys(model: type[BaseModel]) -> set[str]:
    """Every key of the schema, at any depth."""
    names: set[str] = set()
    for definition in model.model_json_schema().get("$defs", {}).values():
        names |= set(definition.get("properties", {}))
    return names | set(model.model_fields)
