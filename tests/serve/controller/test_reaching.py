"""Which workers get tensors from which gateways, as the controller's process passes it on."""

from __future__ import annotations

from clockwork_serve.messages import Role, TensorsOffered, TensorsReached
from tests.serve.controller.exchanges import World
from tests.serve.links import until

OFFER = TensorsOffered(gateway="g", server="10.0.0.4:7001")
YES = TensorsReached(gateway="g", ok=True)
NO = TensorsReached(gateway="g", ok=False, why="filtered")


async def test_each_worker_gets_what_gateways_offer_and_learns_of_their_end(world: World) -> None:
    await world.supervisor()
    before = await world.worker("w1", "cpu:0")
    gateway = await world.peer(Role.GATEWAY, "g")
    gateway.send(OFFER)
    await until(lambda: before.of(TensorsOffered) == [OFFER])
    after = await world.worker("w2", "cpu:1")
    await until(lambda: after.of(TensorsOffered) == [OFFER])
    gateway.link.close()
    for worker in (before, after):
        await until(lambda worker=worker: worker.of(TensorsOffered) == [OFFER, TensorsOffered(gateway="g")])


async def test_a_gateway_is_reached_while_any_worker_reaches_it(world: World) -> None:
    await world.supervisor()
    gateway = await world.peer(Role.GATEWAY, "g")
    gateway.send(OFFER)
    workers = [await world.worker(f"w{at}", f"cpu:{at}") for at in (1, 2)]
    told: list[TensorsReached] = []

    async def then(found: TensorsReached) -> None:
        told.append(found)
        await until(lambda: gateway.of(TensorsReached) == told)

    unreached = TensorsReached(gateway="g", ok=False, why="w1: filtered")
    workers[0].send(NO)
    await then(unreached)
    workers[1].send(YES)
    await then(YES)
    workers[1].link.close()
    await then(unreached)
    workers[0].send(YES)
    await then(YES)
    workers[0].link.close()
    await until(lambda: not world.exchange._joined())
    assert gateway.of(TensorsReached) == told, "nobody is left to say anything"


async def test_a_gateway_cannot_offer_for_another_one(world: World) -> None:
    gateway = await world.peer(Role.GATEWAY, "other")
    gateway.send(OFFER)
    await until(lambda: gateway.is_lost)
