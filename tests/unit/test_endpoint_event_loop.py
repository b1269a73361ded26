import asyncio

import pytest

from silkie.endpoint.event_loop import run_to_end


async def _double(value):
    await asyncio.sleep(0)
    return 2 * value


async def _fail():
    raise ValueError("of the coroutine")


def test_it_runs_where_no_loop_runs():
    assert run_to_end(_double(2)) == 4


def test_it_runs_inside_a_running_loop_as_in_a_notebook():
    async def cell():
        return run_to_end(_double(3))

    assert asyncio.run(cell()) == 6


def test_errors_of_the_coroutine_arrive_from_both():
    async def cell():
        return run_to_end(_fail())

    for call in (lambda: run_to_end(_fail()), lambda: asyncio.run(cell())):
        with pytest.raises(ValueError, match="of the coroutine"):
            call()
