"""Calls of many owners take turns."""

import asyncio
import threading

from pusa.server.transfers.turns import Turns


def test_an_owner_does_not_wait_for_all_that_another_has_asked_for():
    order: list[str] = []
    gate = threading.Event()

    def call(name: str) -> str:
        gate.wait(30)
        order.append(name)
        return name

    async def ask() -> list[str]:
        turns = Turns(2)
        calls = [asyncio.ensure_future(turns.run("ann", lambda n=n: call(f"ann {n}"))) for n in range(20)]
        await asyncio.sleep(0)
        calls.append(asyncio.ensure_future(turns.run("bob", lambda: call("bob"))))
        await asyncio.sleep(0)
        gate.set()
        answers = await asyncio.gather(*calls)
        assert not turns._own
        return answers

    assert asyncio.run(ask()) == [*(f"ann {n}" for n in range(20)), "bob"]
    assert "bob" in order[:4]  # behind those that ran already
