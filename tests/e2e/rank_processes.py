"""Processes in which tests run the ranks of learners."""

import multiprocessing
import pickle
import queue
from collections.abc import Callable
from typing import Any, Self

from pilaf_ray.engines.rendezvous import free_address

SECONDS = 300.0
"""How long a test waits for its ranks."""


class RankProcesses:
    """A process for each rank of one group, which may train several learners one after the other.

    Starting a process and importing DeepSpeed takes much longer than the steps of a tiny model. ::

        with RankProcesses(2) as ranks:
            first, second = ranks.run(work, argument)

    ``work`` is a function of a module, called with keywords ``rank``, ``world_size``, ``master_addr`` and
    ``master_port`` as one dictionary, then with the arguments.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._begin()

    def _begin(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pools = [spawn.Pool(1) for _ in range(self._ranks)]
        address, port = free_address()
        self._places = [
            {"rank": rank, "world_size": self._ranks, "master_addr": address, "master_port": port}
            for rank in range(self._ranks)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        for pool in self._pools:
            if error is None:
                pool.close()
            else:
                pool.terminate()
        for pool in self._pools:
            pool.join()

    def start(self, work: Callable[..., Any], *arguments: Any) -> Callable[[], list[Any]]:
        """Begin on all ranks; what is returned waits for the results, in rank order.

        Where a rank raises, its error is raised at once and all processes are replaced: the others may be waiting for
        that rank.
        """
        ended: queue.Queue[tuple[int, Any, BaseException | None]] = queue.Queue()
        for rank, (pool, place) in enumerate(zip(self._pools, self._places, strict=True)):
            pool.apply_async(
                _pickled,
                (work, place, *arguments),
                callback=lambda result, rank=rank: ended.put((rank, pickle.loads(result), None)),
                error_callback=lambda error, rank=rank: ended.put((rank, None, error)),
            )

        def wait() -> list[Any]:
            results = {}
            for _ in self._pools:
                rank, result, error = ended.get(timeout=SECONDS)
                if error is not None:
                    self.__exit__(type(error))
                    self._begin()
                    raise error
                results[rank] = result
            return [results[rank] for rank in sorted(results)]

        return wait

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """:meth:`start`, and wait."""
        return self.start(work, *arguments)()


def _pickled(work: Callable[..., Any], *arguments: Any) -> bytes:
    """As bytes, because tensors would each come as an open file."""
    return pickle.dumps(work(*arguments))
