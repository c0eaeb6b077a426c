"""Pairs written for other tools: preference data sets, and import files of labelling tools."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pilaf_ray.errors import ConfigError
from pilaf_ray.exchange.records import PairRecord

Format = Literal["preference", "argilla", "label-studio"]
ROWS = 2000

LABEL_STUDIO_VIEW = """<View>
  <Header value="Prompt"/><Text name="prompt" value="$prompt"/>
  <Header value="A"/><Text name="a" value="$response_a"/>
  <Header value="B"/><Text name="b" value="$response_b"/>
  <Choices name="preference" toName="prompt" choice="single" required="true">
    <Choice value="a"/><Choice value="tie"/><Choice value="b"/>
  </Choices>
</View>
"""


def preference_row(record: PairRecord) -> dict[str, Any]:
    """TRL's preference format with its prompt, and the provenance beside it; a tie keeps a as chosen."""
    assert record.probability is not None, "a pair without a label has no chosen side"
    a_chosen = record.probability >= 0.5
    row = asdict(record)
    a, b = row.pop("response_a"), row.pop("response_b")
    prompt = row.pop("prompt")
    return {
        "prompt": prompt,
        "chosen": a if a_chosen else b,
        "rejected": b if a_chosen else a,
        "chosen_side": "a" if a_chosen else "b",
        "chosen_probability": max(record.probability, 1 - record.probability),
        **row,
    }


def argilla_record(record: PairRecord) -> dict[str, Any]:
    """A record of Argilla 2: fields, metadata, and the label so far as a suggestion."""
    suggestion = {} if record.probability is None else {"suggestions": {"preference": {"value": side(record)}}}
    return {
        "id": record.pair_id,
        "fields": {"prompt": record.prompt, "response_a": record.response_a, "response_b": record.response_b},
        "metadata": {"plan_index": record.plan_index},
        **suggestion,
    }


def label_studio_task(record: PairRecord) -> dict[str, Any]:
    """A task of Label Studio; LABEL_STUDIO_VIEW shows it."""
    texts = {"prompt": record.prompt, "response_a": record.response_a, "response_b": record.response_b}
    return {"data": {"pair_id": record.pair_id, **texts}}


def side(record: PairRecord) -> str:
    """a, b or tie."""
    assert record.probability is not None
    return "tie" if record.probability == 0.5 else "a" if record.probability > 0.5 else "b"


def export(records: Iterable[PairRecord], output: Path, *, to: Format, ties: bool = False) -> int:
    """Write records; returns how many.

    Args:
        output: .jsonl or .parquet for preferences, .json for labelling tools.
        ties: whether ties go into a preference file, where they have no chosen side of their own.

    Raises:
        ConfigError: the ending does not fit.
    """
    endings = {"preference": (".jsonl", ".parquet"), "argilla": (".json",), "label-studio": (".json",)}[to]
    if output.suffix not in endings:
        raise ConfigError(f"{output}: {to} is written as {' or '.join(endings)}")
    if to == "preference":
        labelled = (r for r in records if r.probability is not None and (ties or r.probability != 0.5))
        rows = map(preference_row, labelled)
        return _parquet(rows, output) if output.suffix == ".parquet" else _jsonl(rows, output)
    make = argilla_record if to == "argilla" else label_studio_task
    made = [make(record) for record in records]
    output.write_text(json.dumps(made, indent=1))
    if to == "label-studio":
        output.with_suffix(".xml").write_text(LABEL_STUDIO_VIEW)
    return len(made)


def _jsonl(rows: Iterator[dict[str, Any]], output: Path) -> int:
    count = 0
    with output.open("w") as stream:
        for row in rows:
            stream.write(json.dumps(row) + "\n")
            count += 1
    return count


def _parquet(rows: Iterator[dict[str, Any]], output: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"text": pa.string(), "whole": pa.int64(), "real": pa.float64()}
    schema = pa.schema([(name, types[kind]) for name, kind in _columns()])
    count = 0
    with pq.ParquetWriter(output, schema) as writer:
        while part := list(islice(rows, ROWS)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))
            count += len(part)
    return count


def _columns() -> list[tuple[str, str]]:
    """Names and types of a preference row, in order."""
    texts = [(name, "text") for name in ("prompt", "chosen", "rejected", "chosen_side")]
    rest = {
        "pair_id": "text", "plan_index": "whole", "state": "text", "branch": "text", "coefficient_a": "real",
        "coefficient_b": "real", "probability": "real", "label_source": "text", "reward_a": "real",
        "reward_b": "real", "reference_logprob_a": "real", "reference_logprob_b": "real",
        "min_policy_version": "whole", "max_policy_version": "whole", "trained_step": "whole",
    }  # fmt: skip
    return [*texts, ("chosen_probability", "real"), *rest.items()]
