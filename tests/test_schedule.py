"""Calls to launches, buffers to the arena."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniad_edge.errors import InputError
from omniad_edge.kernels.plan import ALIGN_BYTES, Buffer, Call, Launch, Plan, aligned
from omniad_edge.kernels.schedule import arrange, for_batch, place, schedule


def call(*buffers: str) -> Call:
    return Call("some.op", buffers, (), 1)


def test_independent_chains_go_side_by_side():
    calls = [call("x", "a1"), call("a1", "a2"), call("x", "b1"), call("b1", "b2"), call("a2", "b2", "y")]
    launches = schedule(calls, {"x"})
    assert [len(launch.calls) for launch in launches] == [2, 2, 1]


def test_the_longest_way_goes_first():
    side = [call("x", f"s{i}") for i in range(3)]
    chain = [call("x", "c0"), call("c0", "c1"), call("c1", "c2")]
    launches = schedule([*side, *chain, call("c2", *(f"s{i}" for i in range(3)), "y")], {"x"})
    assert len(launches) == 4
    for i, launch in enumerate(launches[:3]):
        assert f"c{i}" in [c.buffers[-1] for c in launch.calls]


@st.composite
def networks(draw):
    """Calls in reading order, each writing one buffer from some earlier ones."""
    count = draw(st.integers(1, 25))
    calls = []
    for index in range(count):
        earlier = draw(st.lists(st.sampled_from(["x", *(f"t{i}" for i in range(index))]), max_size=3))
        calls.append(call(*earlier, f"t{index}"))
    return calls, [draw(st.integers(1, 2000)) for _ in range(count)]


@given(networks())
def test_order_and_memory_are_safe(network):
    calls, sizes = network
    launches = schedule(calls, {"x"})
    assert sorted(map(id, (c for launch in launches for c in launch.calls))) == sorted(map(id, calls))
    offsets = place(launches, {f"t{i}": size for i, size in enumerate(sizes)}, {"x": 100})
    # Run it: each launch reads what was written before it, and nobody has overwritten it since.
    memory: dict[int, str] = dict.fromkeys(range(aligned(100)), "x")

    def span(name: str) -> range:
        size = 100 if name == "x" else sizes[int(name[1:])]
        return range(offsets[name], offsets[name] + size, 7)

    for launch in launches:
        for reader in launch.calls:
            for name in reader.buffers[:-1]:
                assert all(memory[i] == name for i in span(name))
        written = [c.buffers[-1] for c in launch.calls]
        for name in written:
            assert offsets[name] % ALIGN_BYTES == 0
            memory |= dict.fromkeys(span(name), name)
        for name in (n for c in launch.calls for n in c.buffers):  # written side by side with what it reads
            assert all(memory[i] == name for i in span(name))


def test_memory_is_used_again():
    calls = [call("x" if i == 0 else f"t{i - 1}", f"t{i}") for i in range(50)]
    offsets = place(schedule(calls, {"x"}), {f"t{i}": 1000 for i in range(50)}, {"x": 10})
    assert max(offsets.values()) < 4 * 1024


@pytest.mark.parametrize("front", [None, Launch((Call("a.g", ("w", "x"), (3,), 2),))])
@pytest.mark.parametrize("stored", [lambda d: d, lambda d: __import__("json").loads(__import__("json").dumps(d))])
def test_a_plan_survives_being_stored(stored, front):
    buffers = {
        "x": Buffer((2, 3), "float16", "input", 0),
        "w": Buffer((4,), "float32", "weight", 256, ("same", "a.b")),
        "y": Buffer((2, 3), "float32", "output", 512),
    }
    launches = (Launch((Call("a.f", ("x", None, "y"), (1, 0.5, True), 3, 8), call("w", "y"))),)
    plan = Plan(2, 64, 96, buffers, launches, front)
    again = Plan.from_dict(stored(plan.to_dict()))
    assert again == plan and again.arena_bytes == 768
    assert [again.kernel_key(la) for la in again.all_launches] == [plan.kernel_key(la) for la in plan.all_launches]
    assert len(plan.all_launches) == 1 + (front is not None)


def test_buffers_are_within_the_kernels_offsets():
    buffers = {"x": Buffer((1, 1 << 28), "float16", "input", 0), "y": Buffer((1, 4), "float32", "output", 0)}
    plan = arrange(1, 4096, 4096, buffers, (Launch((call("x", "y"),)),))
    assert for_batch(plan, 7).batch == 7
    with pytest.raises(InputError, match=r"fewer than 8 of 4096x4096 at once, .*\(--tiles\)"):
        for_batch(plan, 8)
