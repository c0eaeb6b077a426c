"""What Ray says about the places of generators, for :mod:`pilaf_ray.pipeline.node_following`."""

from pilaf_ray.actors.calls import asking_ray
from pilaf_ray.actors.generators import GeneratorPool
from pilaf_ray.actors.placement import Reservations, cluster_nodes, draining_nodes
from pilaf_ray.pipeline.node_following import ClusterView, room_for

ROLE = "generator"


async def view_cluster(pool: GeneratorPool, reservations: Reservations) -> ClusterView:
    """Where the generators are and where more could be, now; raises ClusterError where Ray does not say."""
    with asking_ray("where generators could be"):
        leaving = draining_nodes()
        nodes = await pool.nodes()
        places = reservations.places(ROLE)
        return ClusterView(
            nodes=nodes,
            leaving=leaving,
            adrift=frozenset(number for number in pool.lost if number in places and places[number] is None),
            spare=tuple(n for n, node in places.items() if n not in nodes and node is not None and node not in leaving),
            reserved=frozenset(places),
            room=room_for(reservations.alone(ROLE), cluster_nodes(without=leaving | reservations.unfit)),
        )
