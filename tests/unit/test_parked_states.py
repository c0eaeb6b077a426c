"""States that leave their device and come back: all of them, the same, and whatever looks into them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pilaf_ray.engines.parked_states import ParkedStates


def flattened(network: nn.Module) -> Tensor:
    """One buffer with all weights, which are views of it from now on, as ZeRO's are."""
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])
    start = 0
    for parameter in network.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return flat


def engine() -> tuple[Any, ParkedStates]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    flat = flattened(network)
    adam = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
    wrapper = SimpleNamespace(optimizer=adam, groups=[[flat]], buckets={"norms": (torch.ones(4), None)}, name="x")
    made = SimpleNamespace(module=network, optimizer=wrapper, device=torch.device("cpu"))
    return made, ParkedStates(made)


def trained(*, rests: bool) -> tuple[list[float], Any]:
    made, parked = engine()
    batch = torch.linspace(-1, 1, 20).view(4, 5)
    losses = []
    for _ in range(4):
        loss = made.module(batch).square().sum()
        loss.backward()
        if rests:
            # In the middle of a step, when there are most states: gradients, too.
            freed, again = parked.rest(), parked.rest()
            assert (freed > 0, again, parked.is_away) == (True, 0, True)
            weights = list(made.module.parameters())
            tensors = [*weights, *(weight.grad for weight in weights), made.optimizer.groups[0][0]]
            tensors += [value for state in made.optimizer.optimizer.state.values() for value in state.values()]
            tensors.append(made.optimizer.buckets["norms"][0])
            assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
            parked.resume()
            assert not parked.is_away
        made.optimizer.optimizer.step()
        made.optimizer.optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, made


def test_training_goes_on_to_the_last_bit_and_views_stay_views() -> None:
    straight, _ = trained(rests=False)
    losses, made = trained(rests=True)
    assert losses == straight
    flat = made.optimizer.groups[0][0]
    assert torch.equal(flat, torch.cat([p.detach().reshape(-1) for p in made.module.parameters()]))
    first = next(made.module.parameters())
    with torch.no_grad():
        first.fill_(3.0)
    assert torch.equal(flat[: first.numel()], torch.full((first.numel(),), 3.0))


def test_what_leaves_is_counted_once() -> None:
    made, parked = engine()
    weights = sum(parameter.numel() * 4 for parameter in made.module.parameters())
    assert parked.rest() == weights + 4 * 4, "the flat buffer with its views, and the bucket"
    parked.resume()
    parked.resume()
    assert made.module(torch.zeros(1, 5)).isfinite().all()


def test_what_is_not_ours_to_free_stays(tmp_path: Path) -> None:
    """A weight that lies in a file, as a loader may leave it."""
    file = tmp_path / "weights"
    torch.arange(15, dtype=torch.float32).numpy().tofile(file)
    network = nn.Linear(5, 3, bias=False)
    network.weight.data = torch.from_file(str(file), size=15).view(3, 5)
    made = SimpleNamespace(module=network, optimizer=None, device=torch.device("cpu"))
    parked = ParkedStates(made)
    parked.rest()
    assert network.weight.sum() == 105
    parked.resume()
