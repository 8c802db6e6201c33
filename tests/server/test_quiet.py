"""The timer of streams: it rings after so long without a word, again and again, and not before."""

from __future__ import annotations

import asyncio

from redrafter.server.quiet import Quiet


def test_it_rings_after_silence_alone() -> None:
    async def listen() -> list[float]:
        loop = asyncio.get_running_loop()
        rung: list[float] = []
        began = loop.time()
        quiet = Quiet(0.2, lambda: rung.append(loop.time() - began))
        for _ in range(6):
            await asyncio.sleep(0.05)
            quiet.heard()
        await asyncio.sleep(0.45)
        quiet.close()
        await asyncio.sleep(0.25)
        return rung

    rung = asyncio.run(listen())
    assert len(rung) == 2
    assert 0.49 < rung[0] < rung[1]
