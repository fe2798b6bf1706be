import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.integers import LIMIT, ExactSum, sum_exactly
from runtime.plan import Plan, make_plan
from runtime.program.training import CHUNK
from runtime.shards import Chunk, Layout, shares_of, tensor_entries
from storage import merkle
from storage.codec import decode, encode
from storage.errors import FailureError, UsageError
from storage.tensors import entry_for


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.integers(1, 20))
def test_stages_cover_all_blocks_evenly_and_in_order(
    blocks: int, stages: int, replicas: int, micro_batches: int
) -> None:
    if stages > blocks:
        with pytest.raises(UsageError, match=f"expected 1 to {blocks} stages .* got {stages}; set --stages"):
            make_plan(blocks=blocks, stages=stages, replicas=replicas, micro_batches=micro_batches)
        return
    plan = make_plan(blocks=blocks, stages=stages, replicas=replicas, micro_batches=micro_batches)
    assert [block for stage in plan.stages for block in stage] == list(range(blocks))
    sizes = [len(stage) for stage in plan.stages]
    assert max(sizes) - min(sizes) <= 1
    counts = [plan.units[-1].count(replica) for replica in range(replicas)]
    assert sum(counts) == micro_batches
    assert max(counts) - min(counts) <= 1
    assert decode(Plan, encode(plan)) == plan
    assert [plan.worker(*plan.place(worker)) for worker in plan.workers] == list(plan.workers)


def test_shares_spread_micro_batches() -> None:
    assert make_plan(blocks=1, replicas=2, micro_batches=8, shares=(3, 1)).units == ((0, 0, 1, 0, 0, 0, 1, 0),)
    assert make_plan(blocks=1, replicas=2, micro_batches=3, shares=(0, 1)).units == ((1, 1, 1),)


@pytest.mark.parametrize("shares", [(1,), (1, 2, 3), (0, 0), (-1, 2)])
def test_shares_that_do_not_fit_are_refused(shares: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="expected 2 shares"):
        make_plan(blocks=1, replicas=2, micro_batches=4, shares=shares)


def test_no_replica_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 replica"):
        make_plan(blocks=1, replicas=0, micro_batches=4)


SIZES = st.integers(1, 5 * CHUNK)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Layouts with tensors tied over stages."""
    sizes = draw(st.lists(SIZES, min_size=1, max_size=6))
    stages, replicas = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    subset = st.sets(st.sampled_from(range(len(sizes))))
    held = [draw(subset) for _ in range(stages)]
    held[0] |= set(range(len(sizes))) - set().union(*held)
    some = st.lists(st.integers(0, 9), min_size=replicas, max_size=replicas).filter(any)
    plan = make_plan(blocks=stages, stages=stages, replicas=replicas, micro_batches=draw(st.integers(1, 9)))
    return Layout(
        plan=plan,
        shares=draw(st.just(shares_of(plan)) | st.tuples(*(some.map(tuple) for _ in range(stages)))),
        names=tuple(f"t{i}" for i in range(len(sizes))),
        shapes=tuple((size,) for size in sizes),
        held=tuple(tuple(sorted(tensors)) for tensors in held),
    )


@given(layouts())
def test_every_chunk_has_one_owner_in_the_first_stage_that_holds_it(layout: Layout) -> None:
    every = [chunk for tensor in range(len(layout.names)) for chunk in layout.chunks(tensor)]
    assert sorted(chunk for worker in layout.plan.workers for chunk in layout.owned(worker)) == every
    for chunk, owner in layout.owners.items():
        first = min(stage for stage, tensors in enumerate(layout.held) if chunk.tensor in tensors)
        assert layout.plan.place(owner)[0] == first
    for worker in layout.plan.workers:
        held = {chunk for tensor in layout.holds(worker) for chunk in layout.chunks(tensor)}
        received = [c for owner in layout.owners_for(worker) for c in layout.shared(owner, worker)]
        assert sorted(received) == sorted(held)
        assert all(worker in (owner, *layout.holders_of(owner)) for owner in layout.owners_for(worker))
        givers = [owner for owner in layout.plan.workers if worker in layout.holders_of(owner)]
        slots = {c for owner in givers for key, c in layout.parts(owner, worker, ("weight", "m")) if key == "m"}
        mine = {chunk for tensor in layout.homed(worker) for chunk in layout.chunks(tensor)}
        assert slots == mine - set(layout.owned(worker))


@given(layouts())
def test_who_did_more_units_owns_more_to_within_a_chunk(layout: Layout) -> None:
    for stage, shares in enumerate(layout.shares):
        workers = layout.plan.team(stage)
        loads = [sum(layout.length(chunk) for chunk in layout.owned(worker)) for worker in workers]
        for load, share in zip(loads, shares, strict=True):
            assert load <= share / sum(shares) * sum(loads) + CHUNK
            assert share or not load


def test_shares_of_a_plan_are_its_units() -> None:
    plan = make_plan(blocks=2, stages=2, replicas=3, micro_batches=8, shares=(5, 3, 0))
    assert shares_of(plan) == ((5, 3, 0),) * 2


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7])
@pytest.mark.parametrize("dtype", ["f32", "i64"])
def test_roots_of_chunks_compose_to_the_tensors_root(size: int, dtype: str) -> None:
    plan = make_plan(blocks=1, micro_batches=1)
    layout = Layout(plan=plan, names=("t",), shapes=((size,),), held=((0,),), shares=shares_of(plan))
    array = np.arange(size).astype({"f32": np.float32, "i64": np.int64}[dtype])
    roots = {("k", chunk): merkle.bytes_root(array[layout.span(chunk)].data) for chunk in layout.chunks(0)}
    assert tensor_entries(layout, roots, keys=("k",), dtype=dtype) == [entry_for("k/t", array)]
    assert sum(layout.length(chunk) for chunk in layout.chunks(0)) == size
    assert Chunk(0, 2).offset == 2 * CHUNK


WORDS = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.lists(WORDS, min_size=3, max_size=3), min_size=1, max_size=8), st.randoms())
def test_sums_are_exact_or_refused_whatever_the_order_and_the_tree(parts: list[list[int]], random: object) -> None:
    true = [sum(column) for column in zip(*parts, strict=True)]
    sums = [ExactSum(np.array(part, np.int64)) for part in parts]
    middle = len(sums) // 2
    random.shuffle(sums)  # type: ignore[attr-defined]
    halves = [sum_exactly(half, np.full(3, 7)) for half in (sums[:middle], sums[middle:])]
    total = sum_exactly(halves, np.full(3, 9))
    if any(abs(value) >= LIMIT for value in true):
        with pytest.raises(FailureError, match="gradient overflow at element"):
            total.total()
    else:
        assert total.total().tolist() == true


def test_part_of_a_sum_keeps_its_carries() -> None:
    half = ExactSum(np.array([2**62, 1], np.int64))
    total = sum_exactly([half, half], np.empty(2, np.int64))
    assert total.part(slice(1, 2)).total().tolist() == [2]
    with pytest.raises(FailureError, match="element 0"):
        total.part(slice(0, 1)).total()
