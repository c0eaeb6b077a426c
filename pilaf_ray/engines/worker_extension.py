"""What the generator asks of vLLM's workers beyond vLLM's own calls."""

from typing import Any

from pilaf_ray.engines.token_records import TokenRecordsExtension


class WorkerExtension(TokenRecordsExtension):
    """Methods that vLLM adds to its worker class."""

    weight_transfer_engine: Any
    _arrived: bool

    def begin_weight_fetch(self, ticket: dict[str, Any]) -> None:
        """See :meth:`pilaf_ray.engines.weight_transfer.PolicyTransferEngine.begin_fetch`."""
        engine = self.weight_transfer_engine
        self._arrived = False
        engine.begin_fetch(engine.parse_update_info(ticket))

    def weights_have_arrived(self) -> bool:
        """Whether a load would find them; raises what the fetch met."""
        self._arrived = self._arrived or self.weight_transfer_engine.has_arrived()
        return self._arrived
