"""Reading prompt texts: JSONL, CSV, Parquet, globs and URLs of them, a hub data set, or the demo's own."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path

from pilaf_ray.data.demo_prompts import demo_prompts
from pilaf_ray.data.prompt_shards import PromptShards, checked_texts, is_sharded
from pilaf_ray.errors import PromptError

_BUILTIN = "builtin:reviews/"


def read_prompts(path: str, *, column: str, split: str) -> Iterable[str]:
    """Prompt texts in file order; raises PromptError where one is missing, empty or no text."""
    if path.startswith(_BUILTIN):
        return demo_prompts(path.removeprefix(_BUILTIN))
    if is_sharded(path):
        return PromptShards(path, column=column).texts()
    file = Path(path)
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
    if file.suffix not in readers:
        return _read_hub(path, column, split)
    if not file.is_file():
        raise PromptError(f"{path}: there is no such prompt file")
    try:
        return checked_texts(path, column, readers[file.suffix](file, column))
    except UnicodeDecodeError as error:
        raise PromptError(f"{path}: not UTF-8 text: save it as UTF-8") from error


def _read_jsonl(file: Path, column: str) -> list[object]:
    values: list[object] = []
    # Not splitlines(): it also splits at separators that JSON strings may hold unescaped.
    with file.open(encoding="utf-8", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                values.append(json.loads(line)[column])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise PromptError(f"{file}:{number}: not a JSON object with the key '{column}'") from error
    return values


def _read_csv(file: Path, column: str) -> list[object]:
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if column not in (reader.fieldnames or []):
            raise PromptError(f"{file}: no column '{column}'; it has {', '.join(reader.fieldnames or [])}")
        return [row[column] for row in reader]


def _read_parquet(file: Path, column: str) -> list[object]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        names = parquet.read_schema(file).names
        if column not in names:
            raise PromptError(f"{file}: no column '{column}'; it has {', '.join(names)}")
        return list(parquet.read_table(file, columns=[column])[column].to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise PromptError(f"{file}: not a Parquet file: {str(error).splitlines()[0]}") from error


def _read_hub(path: str, column: str, split: str) -> list[str]:
    from datasets import load_dataset

    try:
        rows = load_dataset(path, split=split)
    except (OSError, ValueError) as error:
        raise PromptError(f"{path}: cannot load this data set: {str(error).splitlines()[0]}") from error
    if column not in rows.column_names:
        raise PromptError(f"{path}: no column '{column}'; it has {', '.join(rows.column_names)}")
    return checked_texts(path, column, rows[column])
