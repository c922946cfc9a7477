"""The pace: never more than a few frames ahead of the viewer, and never a viewer that waits without need."""

import asyncio

from streamdit_jax.serving.pace import Pace


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


async def is_due(pace):
    try:
        await asyncio.wait_for(pace.due(), 0.02)
    except TimeoutError:
        return False
    return True


def test_acknowledged_frames_let_the_next_chunk_go():
    async def story():
        clock = Clock()
        pace = Pace(16.0, ahead=4, acknowledges=True, clock=clock)
        assert await is_due(pace), "the first chunk goes at once"
        pace.sent(0, 8)
        assert not await is_due(pace)
        pace.shown(2)
        assert not await is_due(pace), "five wait: 3 … 7"
        pace.shown(3)
        assert await is_due(pace)
        pace.shown(1)
        assert await is_due(pace), "an acknowledgement that comes late takes nothing back"
        pace.shown(10**6)
        pace.sent(8, 8)
        assert not await is_due(pace), "and one from the future gives nothing in advance"
        clock.now = 7.0
        assert pace.stalled() == 7.0
        pace.go()
        assert pace.stalled() == 0.0
        waiting = asyncio.create_task(pace.due())
        await asyncio.sleep(0)
        pace.begin()
        await asyncio.wait_for(waiting, 1), "a new video is due at once"

    asyncio.run(story())


def test_the_clock_paces_those_who_do_not_acknowledge():
    async def story():
        clock = Clock()
        pace = Pace(16.0, ahead=4, acknowledges=False, clock=clock)
        pace.sent(100, 8)
        pace.shown(107)
        assert not await is_due(pace), "they are not asked"
        clock.now = 0.24
        assert not await is_due(pace)
        clock.now = 0.26  # four frames of 62.5 ms
        assert await is_due(pace)
        clock.now = 10.0  # the engine was slow: the viewer ran dry, and does not catch up on what it missed
        pace.sent(108, 8)
        assert not await is_due(pace)
        clock.now = 10.26
        assert await is_due(pace)
        pace.sent(116, 8)
        pace.freeze()  # 16 were sent since 10.0, and 4.16 of them shown
        clock.now = 60.0
        assert not await is_due(pace)
        pace.go()
        assert pace.stalled() == 0.0 and not await is_due(pace)
        clock.now = 60.48
        assert not await is_due(pace)
        clock.now = 60.5
        assert await is_due(pace)

    asyncio.run(story())


def test_an_engine_that_takes_long_is_asked_earlier():
    async def story():
        pace = Pace(16.0, ahead=4, acknowledges=True)
        pace.sent(0, 8)
        for seconds, waiting in ((0.1, 4), (0.32, 6), (5.0, 8), (0.0, 4)):
            for _ in range(40):
                pace.took(seconds)
            pace.begin()
            pace.sent(0, 100)
            pace.shown(99 - waiting - 1)
            assert not await is_due(pace), waiting
            pace.shown(99 - waiting)
            assert await is_due(pace), waiting

    asyncio.run(story())


def test_a_sleep_ends_when_the_chunk_is_due():
    async def story():
        pace = Pace(100.0, ahead=2, acknowledges=False)
        loop = asyncio.get_running_loop()
        pace.sent(0, 12)
        began = loop.time()
        await pace.due()
        assert 0.09 <= loop.time() - began <= 1.0

    asyncio.run(story())
