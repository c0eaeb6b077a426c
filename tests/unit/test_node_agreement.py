"""Nodes that do not belong in one run, and a port that is taken: one line each."""

import socket
from dataclasses import replace
from pathlib import Path

import pytest

from pilaf_ray.console.address import require_free_port
from pilaf_ray.errors import ClusterError, ConfigError
from pilaf_ray.node_agreement import NodeFacts, read_facts, require_agreement

HERE = NodeFacts(
    node="a", versions=(("python", "3.11.7"), ("torch", "2.13.0"), ("pilaf_ray", "12ab")), sees_folder=True
)


def test_facts_are_those_of_this_environment(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert not read_facts("n", marker, "word").sees_folder
    marker.write_text("other run")
    assert not read_facts("n", marker, "word").sees_folder
    marker.write_text("word")
    facts = read_facts("n", marker, "word")
    assert facts.sees_folder
    versions = dict(facts.versions)
    import numpy

    assert versions["numpy"] == numpy.__version__
    assert len(versions["pilaf_ray"]) == 12
    require_agreement(facts, [replace(facts, node="m")], folder=tmp_path)


def test_every_node_that_differs_is_named_in_one_line() -> None:
    old = replace(HERE, node="b", versions=(("python", "3.11.7"), ("torch", "2.12.0"), ("pilaf_ray", "77ff")))
    blind = replace(HERE, node="c", sees_folder=False)
    with pytest.raises(ClusterError) as refusal:
        require_agreement(HERE, [HERE, old, blind], folder=Path("/runs/x"))
    assert str(refusal.value) == (
        "node b has torch 2.12.0 (here 2.13.0), pilaf_ray 77ff (here 12ab): install the same on every node, "
        "`pilaf-ray doctor` on each tells what it has; "
        "node c does not see run.folder (/runs/x): roles on several nodes write checkpoints, logs and "
        "weights there, so put it on storage that all of them mount at the same place"
    )


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} cannot be bound \(Address already in use\)"):
            require_free_port("127.0.0.1", port)
    require_free_port("127.0.0.1", port)
