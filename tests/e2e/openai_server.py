"""vLLM's own OpenAI-compatible server around a tiny model whose answers are known beforehand."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from pilaf_ray.data.tiny_models import make_tiny_llama

MODEL = "judge"
MAX_LENGTH = 512
START_SECONDS = 300.0
TEMPLATE = "{prompt}@@{first}@@{second}"
"""The question, in the form that the chat template below takes apart."""
# The model repeats the last token of its prompt, so the template decides: the longer answer wins, equal ones are a
# tie, and a question about nonsense is answered by neither A, B nor T.
CHAT_TEMPLATE = (
    "{% set parts = messages[-1]['content'].split('@@') %}{{ messages[-1]['content'] }}<|im_end|>"
    "{% if 'nonsense' in parts[0] %}?{% elif parts[1]|length > parts[2]|length %}A"
    "{% elif parts[1]|length < parts[2]|length %}B{% else %}T{% endif %}"
)


def make_echo(folder: Path) -> Path:
    """The tiny policy, with layers that add nothing: the likeliest next token is the one that stands last."""
    make_tiny_llama(folder, seed=0)
    network = AutoModelForCausalLM.from_pretrained(folder)
    for layer in network.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    network.save_pretrained(folder)
    return folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """A server under way."""

    url: str
    port: int
    process: "subprocess.Popen[bytes]"

    def counted(self, metric: str) -> float:
        """The sum over all labels of one of the server's own counters."""
        page = urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics").read().decode()
        families = text_string_to_metric_families(page)
        return sum(sample.value for family in families for sample in family.samples if sample.name == metric)

    def end(self) -> None:
        """End the server and its engine, and wait for them."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(timeout=60)


@contextmanager
def openai_server(folder: Path) -> Iterator[Served]:
    """A server of the echo model, made in ``folder``; ended when the block is left."""
    model, template = make_echo(folder / "model"), folder / "chat.jinja"
    template.write_text(CHAT_TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {
        "model": model, "served-model-name": MODEL, "host": "127.0.0.1", "port": port, "dtype": "float32",
        "max-model-len": MAX_LENGTH, "max-num-seqs": 8, "max-num-batched-tokens": MAX_LENGTH,
        "kv-cache-memory-bytes": 2**24, "chat-template": template, "chat-template-content-format": "string",
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {
        **os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1",
    }  # fmt: skip
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    served = Served(url=f"http://127.0.0.1:{port}/v1", port=port, process=process)
    try:
        _await(served, folder / "server.log")
        yield served
    finally:
        served.end()


def _await(served: Served, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{served.port}/health").close()
        except URLError:
            assert served.process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)  # polling another process, not ordering work
        else:
            return
