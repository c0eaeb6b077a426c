"""Labels from other tools, turned into votes."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pilaf_ray.errors import ConfigError
from pilaf_ray.store.records import Vote

VALUES = {"a": 1.0, "b": 0.0, "tie": 0.5}


def read_votes(path: Path, *, annotator: str) -> list[Vote]:
    """Votes in a file: rows with pair_id and preference (a, b, tie) or probability as .jsonl or .parquet, or what
    Argilla or Label Studio export as .json.

    Args:
        annotator: name of whoever gave them, where the file does not say.

    Raises:
        ConfigError: unreadable, or a row without a label.
    """
    try:
        rows = list(_rows(path, annotator))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as labels: {error}") from error
    votes = {}
    for pair_id, name, value in rows:
        # The same answer imported again is the same vote.
        digest = hashlib.sha256(f"{pair_id}/{name}/{value}".encode()).hexdigest()[:32]
        votes[pair_id, name] = Vote(key=f"import-{digest}", pair_id=pair_id, annotator=name, probability=value)
    return list(votes.values())


def _rows(path: Path, annotator: str) -> Iterator[tuple[str, str, float]]:
    """(pair, annotator, P(a ≻ b)) of each label."""
    if path.suffix == ".json":
        for item in json.loads(path.read_text()):
            yield from _label_studio(item, annotator) if "data" in item else _argilla(item, annotator)
        return
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if "pair_id" not in row:
            raise ConfigError(f"{path}: row {number} has no pair_id")
        yield str(row["pair_id"]), str(row.get("annotator") or annotator), _value(row, f"{path}: row {number}")


def _value(row: dict[str, Any], where: str) -> float:
    if row.get("preference") is not None:
        return _side(row["preference"], where)
    probability = row.get("probability")
    if not isinstance(probability, int | float) or not 0 <= probability <= 1:
        raise ConfigError(f"{where} needs preference (a, b or tie) or a probability in [0, 1]")
    return float(probability)


def _side(value: Any, where: str) -> float:
    if value not in VALUES:
        raise ConfigError(f"{where}: preference is {value!r}; a, b and tie are known")
    return VALUES[value]


def _argilla(record: dict[str, Any], annotator: str) -> Iterator[tuple[str, str, float]]:
    for response in record.get("responses", {}).get("preference", []):
        name = str(response.get("user_id") or annotator)
        yield str(record["id"]), name, _side(response["value"], f"record {record['id']}")


def _label_studio(task: dict[str, Any], annotator: str) -> Iterator[tuple[str, str, float]]:
    pair_id = str(task["data"]["pair_id"])
    for annotation in task.get("annotations", []):
        by = annotation.get("completed_by")
        name = str(by.get("email") if isinstance(by, dict) else by or annotator)
        for result in annotation.get("result", []):
            if result.get("from_name") == "preference" and not annotation.get("was_cancelled"):
                yield pair_id, name, _side(result["value"]["choices"][0], f"task of pair {pair_id}")
