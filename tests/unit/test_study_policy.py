"""The study's small policy: it learns the answers that it is given, and none of the prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import study_policy


def test_it_says_what_it_was_taught_and_ends_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setattr(study_policy, "VOCABULARY", 280)
    monkeypatch.setattr(study_policy, "SHAPE", {**study_policy.SHAPE, "hidden_size": 96, "num_hidden_layers": 1})
    answers = {"a film": "What a fine film!", "a meal": "The meal was cold.", "a town": "A town to stay in."}
    study_policy.new_policy(tmp_path, [*answers, *answers.values()] * 8, seed=0)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    pairs = [
        (tokenizer(prompt)["input_ids"], tokenizer(answer + study_policy.END)["input_ids"])
        for prompt, answer in answers.items()
    ]
    network: Any = study_policy.teach(tmp_path, pairs * 8, epochs=30, rate=5e-3, batch=8)
    for prompt, answer in pairs:
        said = network.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0, len(prompt) :]
        assert said.tolist() == answer
        with torch.no_grad():
            logprobs = network(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        # A prompt's own tokens were labels of nothing.
        assert logprobs.gather(-1, torch.tensor(prompt[1:])[:, None]).mean() < -3
