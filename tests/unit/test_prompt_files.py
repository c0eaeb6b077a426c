"""Prompt files: what is read, and what is refused in one line."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from pilaf_ray.data.prompt_files import read_prompts
from pilaf_ray.data.prompts import PromptCursor
from pilaf_ray.errors import PromptError
from pilaf_ray.types import Prompt

TEXTS = ["one", "two\u2028lines", "drei, vier"]


def write(folder: Path, kind: str, values: list[object]) -> str:
    file = folder / f"p.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps({"prompt": v}, ensure_ascii=False) + "\n" for v in values))
    elif kind == "csv":
        file.write_text("id,prompt\n" + "".join(f'1,"{v}"\n' if v is not None else "1\n" for v in values))
    else:
        parquet.write_table(pyarrow.table({"prompt": values}), file)
    return str(file)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_texts_come_back(tmp_path: Path, kind: str) -> None:
    assert list(read_prompts(write(tmp_path, kind, [*TEXTS]), column="prompt", split="train")) == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("missing", [None, "", "  "])
def test_missing_prompts_are_refused_and_not_invented(tmp_path: Path, kind: str, missing: str | None) -> None:
    with pytest.raises(PromptError, match=r"prompt 2 in column 'prompt' is .*give a non-empty text"):
        read_prompts(write(tmp_path, kind, ["one", missing]), column="prompt", split="train")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_missing_column_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(PromptError, match="'question'"):
        read_prompts(write(tmp_path, kind, ["one"]), column="question", split="train")


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_damaged_files_are_one_line(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"p.{kind}"
    file.write_bytes(b"\xff\xfe\x00broken")
    with pytest.raises(PromptError) as caught:
        read_prompts(str(file), column="prompt", split="train")
    assert "\n" not in str(caught.value)


def test_cursor_is_a_permutation_of_each_epoch_from_any_position() -> None:
    prompts = [Prompt(prompt_id=str(i), text=str(i), token_ids=(i,)) for i in range(7)]
    order = [PromptCursor(prompts, seed=3).at(i) for i in range(21)]
    walker = PromptCursor(prompts, seed=3)
    assert [walker.at(i) for i in reversed(range(21))] == order[::-1]
    epochs = [[turn.prompt.prompt_id for turn in order if turn.epoch == epoch] for epoch in range(3)]
    assert all(sorted(epoch) == [str(i) for i in range(7)] for epoch in epochs)
    assert epochs[0] != epochs[1]
