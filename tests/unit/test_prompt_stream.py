"""Streamed prompts: the order is a function of (data, seed, position), and memory does not grow with the set."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet as parquet
import pytest

from pilaf_ray.build import PlanSource, build_inputs
from pilaf_ray.build_samplers import build_sampler
from pilaf_ray.config.loader import load_config
from pilaf_ray.data.prompt_shards import LINES, PromptShards
from pilaf_ray.data.prompt_stream import StreamCursor
from pilaf_ray.data.prompts import PromptSet, load_prompts
from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.errors import ConfigError, PromptError
from pilaf_ray.run_folder import keep_prompts, open_run_folder
from pilaf_ray.types import Prompt

TINY = Path(__file__).parents[2] / "configs" / "tiny.yaml"


def render(text: str) -> Prompt:
    return Prompt(prompt_id=text, text=text, token_ids=(1,))


def write_parquet(folder: Path, *, files: int = 3, rows: int = 50, group: int = 8) -> list[str]:
    texts = [f"p{n}" for n in range(files * rows)]
    for number in range(files):
        table = pyarrow.table({"prompt": texts[number * rows : (number + 1) * rows], "other": [0] * rows})
        parquet.write_table(table, folder / f"part-{number}.parquet", row_group_size=group)
    return texts


def cursor(path: Path | str, *, seed: int = 3, window: int = 20) -> StreamCursor:
    return StreamCursor(PromptShards(str(path), column="prompt"), seed=seed, render=render, window=window)


def order(walker: StreamCursor, positions: range) -> list[tuple[int, int, str]]:
    turns = [walker.at(position) for position in positions]
    return [(turn.epoch, turn.draw, turn.prompt.text) for turn in turns]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_each_epoch_has_every_prompt_once_and_any_position_can_be_asked_first(tmp_path: Path, kind: str) -> None:
    texts = write_parquet(tmp_path)
    if kind == "jsonl":
        for file in sorted(tmp_path.glob("*.parquet")):
            rows = parquet.read_table(file)["prompt"].to_pylist()
            file.with_suffix(".jsonl").write_text("\n\n".join(json.dumps({"prompt": row}) for row in rows))
            file.unlink()
    whole = order(cursor(tmp_path), range(400))
    assert Counter(text for epoch, _, text in whole if epoch == 0) == Counter(texts)
    assert Counter(text for epoch, _, text in whole if epoch == 1) == Counter(texts)
    assert whole[:150] != [(0, d, t) for _, d, t in whole[150:300]], "another order in another epoch"
    for start in (1, 77, 149, 150, 333):
        assert order(cursor(tmp_path), range(start, 400)) == whole[start:], "a run that resumes here goes on the same"
    walker = cursor(tmp_path)
    assert [order(walker, range(n, n + 1))[0] for n in reversed(range(400))] == whole[::-1]
    assert order(cursor(tmp_path, seed=4), range(150)) != whole[:150]


def test_neighbours_of_the_file_are_spread_over_their_window(tmp_path: Path) -> None:
    write_parquet(tmp_path, files=1, rows=4000, group=100)
    numbers = [int(text[1:]) for _, _, text in order(cursor(tmp_path, window=1000), range(4000))]
    for begun in range(0, 4000, 1000):
        assert len({number // 100 for number in numbers[begun : begun + 1000]}) == 10, "ten row groups a window"
        assert len({number // 100 for number in numbers[begun : begun + 100]}) == 10
    assert len({number // 1000 for number in numbers[:1000]}) == 4, "from all over the file"


def test_long_jsonl_files_are_read_in_stretches(tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    lines = 2 * LINES + 7
    file.write_text("".join(json.dumps({"prompt": f"ü{n}"}, ensure_ascii=False) + "\n" for n in range(lines)))
    shards = PromptShards(str(file), column="prompt")
    assert [shard.rows for shard in shards.shards] == [LINES, LINES, 7]
    assert list(shards.texts()) == [f"ü{n}" for n in range(lines)]
    few = PromptShards(str(file), column="prompt", limit=LINES + 2)
    assert list(few.texts()) == [f"ü{n}" for n in range(LINES + 2)]


def test_remote_files_give_the_order_of_local_ones(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    remote = fsspec.filesystem("memory")
    for file in tmp_path.glob("*.parquet"):
        remote.pipe(f"/set/{file.name}", file.read_bytes())
    local = order(cursor(tmp_path), range(300))
    for path in ("memory://set", "memory://set/part-*.parquet", f"file://{tmp_path}", f"{tmp_path}/part-[0-9].parquet"):
        assert order(cursor(path), range(300)) == local, path


def test_a_failing_read_is_tried_again_and_then_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path, files=1)
    shards = PromptShards(str(tmp_path), column="prompt")
    files, failures = shards._files, iter([True, True, False])
    whole = files.open
    # Only what waits between two tries is left out.
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _seconds: None)

    def flaky(*arguments: object) -> object:
        if next(failures, True):
            raise ConnectionResetError("the network is away")
        return whole(*arguments)

    monkeypatch.setattr(files, "open", flaky)
    assert shards.read(shards.shards[0]) == [f"p{n}" for n in range(8)]
    with pytest.raises(PromptError, match=r"part-0\.parquet: cannot be read: the network is away"):
        shards.read(shards.shards[0])


def test_a_prompt_that_is_too_long_is_replaced_by_one_that_fits_in_a_draw_of_its_own(tmp_path: Path) -> None:
    texts = write_parquet(tmp_path)
    long = {text for text in texts if int(text[1:]) % 3 == 0}

    def only_short(text: str) -> Prompt | None:
        return None if text in long else render(text)

    shards = PromptShards(str(tmp_path), column="prompt")
    walker = StreamCursor(shards, seed=3, render=only_short, window=20)
    turns = [walker.at(position) for position in range(150)]
    asked = [turn.prompt.text for turn in turns]
    assert set(asked) == set(texts) - long
    assert len({(turn.prompt.text, turn.draw) for turn in turns}) == 150, "each is a pair of its own"
    assert [turn for turn in turns if turn.draw < 150] == [
        turn for turn, (_, _, text) in zip(turns, order(cursor(tmp_path), range(150)), strict=True) if text not in long
    ]
    with pytest.raises(PromptError, match=r"fits prompts\.max_prompt_tokens"):
        StreamCursor(shards, seed=3, render=lambda _: None).at(0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.parquet", b"no parquet", "not a Parquet file"),
        ("p.jsonl", b'{"question": "x"}\n', "prompt 1 is not a JSON object with the key 'prompt'"),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": null}\n', "prompt 2 in column 'prompt' is None"),
        ("p.arrow", b"", "write data sets with to_parquet"),
        ("p.txt", b"", "no .parquet or .jsonl file there"),
        ("p.jsonl", b"\n\n", "no prompts in column 'prompt'"),
    ],
)
def test_sets_that_cannot_be_read_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError) as caught:
        cursor(tmp_path).at(0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere/at/all.parquet", "pigeon://far/away", "memory://empty/*.parquet"])
def test_places_that_are_not_there_are_one_line(path: str) -> None:
    with pytest.raises(PromptError) as caught:
        PromptShards(path, column="prompt")
    assert path.rpartition("/")[2] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_data_set_of_the_hub_is_to_be_named_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def complaint(path: str) -> str:
        with pytest.raises(PromptError) as caught:
            PromptShards(path, column="prompt")
        return str(caught.value)

    words = "owner/name-1.0: no .parquet or .jsonl file there; if it is a data set of the hub, name its files: "
    assert complaint("owner/name-1.0") == words + "hf://datasets/owner/name-1.0/**/*.parquet"
    (tmp_path / "owner" / "name-1.0").mkdir(parents=True)
    assert complaint("owner/name-1.0").endswith("file there")
    assert complaint(str(tmp_path / "none")).endswith("file there")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    with pytest.raises(PromptError, match="no column 'question'; it has prompt, other"):
        PromptShards(str(tmp_path), column="question")


def test_a_run_plans_from_a_stream_and_evaluates_on_the_first_rows_of_a_url(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "policy", seed=0)
    write_parquet(tmp_path)
    overrides = [
        f"model.policy={model}",
        f"prompts.train={{path: {tmp_path}, stream: true}}",
        f"prompts.evaluation={{path: 'file://{tmp_path}/part-2.parquet'}}",
    ]
    config = load_config(TINY, overrides)
    inputs = build_inputs(config)
    assert inputs.train.count == 150
    assert [prompt.text for prompt in inputs.evaluation.prompts] == ["p100", "p101", "p102", "p103"]

    def plans() -> PlanSource:
        return PlanSource(prompts=inputs.train, sampler=build_sampler(config), seed=1)

    source = plans()
    planned = [source.plan(index) for index in range(320)]
    assert len({plan.pair_id for plan in planned}) == 320
    assert plans().plan(200) == planned[200]
    with pytest.raises(ConfigError, match="held-out prompts are read once and kept"):
        load_config(TINY, ["prompts.evaluation.stream=true"])


def test_a_resumed_run_refuses_other_prompts(tmp_path: Path) -> None:
    write_parquet(tmp_path)
    before = PromptShards(str(tmp_path), column="prompt")
    with open_run_folder(tmp_path / "run", config_json="{}", resume=False) as folder:
        keep_prompts(folder, path="set", count=before.rows, fingerprint=before.fingerprint)
    (tmp_path / "part-1.parquet").unlink()
    after = PromptShards(str(tmp_path), column="prompt")
    with open_run_folder(tmp_path / "run", config_json="{}", resume=True) as folder:
        keep_prompts(folder, path="set", count=before.rows, fingerprint=before.fingerprint)
        with pytest.raises(PromptError, match=r"began with \(150 then, 100 now\): put them back"):
            keep_prompts(folder, path="set", count=after.rows, fingerprint=after.fingerprint)


WALK = """
import sys
from pilaf_ray.data.prompt_shards import PromptShards
from pilaf_ray.data.prompt_stream import StreamCursor
from pilaf_ray.types import Prompt
import pyarrow.parquet, fsspec
def peak():
    # Not ru_maxrss: it begins with what the parent process had.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
before = peak()
shards = PromptShards(sys.argv[1], column="prompt")
cursor = StreamCursor(shards, seed=0, render=lambda text: Prompt(prompt_id="", text=text, token_ids=()))
seen = set()
for position in range(0, 1_000_000, 7):
    seen.add(cursor.at(position).draw)
print(shards.rows, len(seen), peak() - before)
"""


def test_memory_is_bounded_by_two_windows_and_not_by_a_million_prompts(tmp_path: Path) -> None:
    """Texts of 400 MB; a window of 20,000 prompts holds 8 MB of them."""
    file = tmp_path / "million.parquet"
    schema = pyarrow.schema([("prompt", pyarrow.string())])
    with parquet.ParquetWriter(file, schema) as writer:
        for group in range(100):
            texts = [f"{group * 10_000 + n:09d} " + "x" * 390 for n in range(10_000)]
            writer.write_table(pyarrow.table({"prompt": texts}, schema=schema))
    walked = subprocess.run(
        [sys.executable, "-c", WALK, str(file)], capture_output=True, text=True, check=True, timeout=300
    )
    rows, seen, grown_mib = (float(word) for word in walked.stdout.split())
    print(f"{rows:.0f} prompts, {rows * 400 / 2**20:.0f} MiB of text: memory grew by {grown_mib:.0f} MiB")
    assert (rows, seen) == (1_000_000, -(-1_000_000 // 7))
    assert grown_mib < 150


def test_in_memory_sets_name_themselves(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "policy", seed=0)
    write_parquet(tmp_path)

    def load(limit: int | None) -> PromptSet:
        return load_prompts(
            path=str(tmp_path / "part-0.parquet"),
            column="prompt",
            split="train",
            limit=limit,
            tokenizer_path=str(model),
            system_prompt=None,
            chat_template=True,
            max_prompt_tokens=64,
            overlong="error",
        )

    assert (load(None).count, load(7).count) == (50, 7)
    assert load(None).fingerprint == load(50).fingerprint != load(49).fingerprint
