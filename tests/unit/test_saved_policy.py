"""A model folder as a version of the weights: which engines take it over, and that what is read is what was named."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pilaf_ray.data.tiny_models import make_tiny_llama
from pilaf_ray.engines.saved_policy import can_take_over, read_model, saved_policy
from pilaf_ray.engines.weight_tickets import SampleChecksum
from pilaf_ray.errors import WeightSyncError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "policy", seed=0)


def changed(folder: Path, to: Path, **entries: Any) -> Path:
    """A folder like ``folder`` with other entries in its ``config.json``."""
    to.mkdir()
    (to / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | entries))
    for name in ("model.safetensors", "generation_config.json"):
        (to / name).write_bytes((folder / name).read_bytes())
    return to


def test_what_is_read_is_what_the_ticket_names(folder: Path, tmp_path: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    ticket = saved_policy(folder, version=3)
    assert (ticket.version, ticket.num_tensors) == (3, len(stored))
    assert ticket.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    read = dict(read_model(ticket.location))
    assert read.keys() == stored.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in stored.items())
    # In two files it has another order and the same tensors.
    halves = changed(folder, tmp_path / "halves")
    (halves / "model.safetensors").unlink()
    names = sorted(stored)
    save_file({name: stored[name] for name in names[1::2]}, halves / "model-00001-of-00002.safetensors")
    save_file({name: stored[name] for name in names[::2]}, halves / "model-00002-of-00002.safetensors")
    parts = sorted(file.name for file in halves.glob("*.safetensors"))
    index = {"weight_map": {name: parts[place % 2 == 0] for place, name in enumerate(names)}}
    (halves / "model.safetensors.index.json").write_text(json.dumps(index))
    # The same weights once more, in another layout, as some publishers add them.
    save_file(stored, halves / "consolidated.safetensors")
    both = saved_policy(halves, version=3)
    assert (both.num_tensors, both.num_bytes) == (ticket.num_tensors, ticket.num_bytes)
    checksum = SampleChecksum()
    for name, tensor in read_model(both.location):
        assert torch.equal(tensor, stored[name])
        checksum.add(name, tensor)
    assert checksum.hexdigest() == both.sample_checksum != ticket.sample_checksum


def test_other_ends_a_quantised_one_and_other_files_need_an_engine_of_their_own(folder: Path, tmp_path: Path) -> None:
    other_dtype = changed(folder, tmp_path / "dtype", torch_dtype="bfloat16", transformers_version="0.0")
    assert can_take_over(folder, other_dtype)
    assert not can_take_over(folder, changed(folder, tmp_path / "end", eos_token_id=[1, 2]))
    quantised = [changed(folder, tmp_path / name, quantization_config={"bits": 8}) for name in ("one", "two")]
    assert not can_take_over(*quantised)
    (other_dtype / "model.safetensors").rename(other_dtype / "pytorch_model.bin")
    assert not can_take_over(folder, other_dtype)


def test_a_file_that_is_short_is_one_line(folder: Path, tmp_path: Path) -> None:
    short = changed(folder, tmp_path / "short")
    (short / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightSyncError, match=r"cannot read the weights in .*short"):
        saved_policy(short, version=1)
