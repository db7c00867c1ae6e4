"""A split batch gives the same update, running out of memory loses nothing, and other errors are not swallowed."""

import pytest
import torch

from tracknet.errors import UserError
from tracknet.memory.micro_batch import MicroBatchConfig, MicroBatcher, is_out_of_memory


def config(**changes):
    return MicroBatchConfig(
        **{
            "batch_size": 12,
            "adaptive": True,
            "start_size": None,
            "min_size": 1,
            "backoff_factor": 2,
            "retries": 5,
            **changes,
        }
    )


def run(batcher, fits, batch=12):
    """Attempt a step that only fits in parts of at most `fits`; return the parts of the good attempt and the lines said."""
    done, resets = [], []

    def attempt():
        done.clear()
        for part in batcher.parts(batch):
            if part.stop - part.start > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            done.append((part.start, part.stop))
        return 1.0

    assert batcher.run(attempt, lambda: resets.append(1)) == 1.0
    return done, len(resets)


def test_it_backs_off_until_it_fits_and_stays_there():
    said = []
    batcher = MicroBatcher(config(), said.append)
    parts, resets = run(batcher, fits=4)
    assert parts == [(0, 3), (3, 6), (6, 9), (9, 12)] and resets == 2
    assert len(said) == 2 and "going on with 6" in said[0] and "going on with 3" in said[1]
    assert run(batcher, fits=4)[1] == 0


def test_parts_cover_an_uneven_batch():
    batcher = MicroBatcher(config(start_size=5), print)
    assert [(p.start, p.stop) for p in batcher.parts(12)] == [(0, 5), (5, 10), (10, 12)]
    assert [(p.start, p.stop) for p in batcher.parts(3)] == [(0, 3)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_size": 4}, "training.min_micro_batch_size=4 is reached"),
        ({"retries": 1}, "training.oom_retries"),
        ({"adaptive": False}, "training.adaptive_micro_batch is false"),
    ],
)
def test_what_cannot_be_cured_is_an_error_with_remedies(changes, words):
    asked = []
    batcher = MicroBatcher(config(**changes), lambda line: None, advise=lambda size: asked.append(size) or "buy more")
    with pytest.raises(UserError, match=words) as error:
        run(batcher, fits=2)
    assert str(error.value).endswith("buy more") and asked == [batcher.size]


def test_it_never_grows_when_memory_is_short():
    """A smallest size above the batch (validation has a batch of its own) is reached at once."""
    with pytest.raises(UserError, match="training.min_micro_batch_size=16"):
        run(MicroBatcher(config(batch_size=8, min_size=16), lambda line: None), fits=2, batch=8)


def test_an_error_without_a_text_is_handled_too():
    said = []
    failures = [MemoryError()]

    def attempt():
        if failures:
            raise failures.pop()
        return 2.0

    assert MicroBatcher(config(), said.append).run(attempt, lambda: None) == 2.0 and len(said) == 1


def test_other_errors_pass_through_unchanged():
    def attempt():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        MicroBatcher(config(), print).run(attempt, lambda: None)


def test_what_is_an_out_of_memory_error():
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(
        ValueError("CUDA error: out of memory")
    )
    try:
        try:
            raise torch.OutOfMemoryError("inner")
        except torch.OutOfMemoryError as inner:
            raise RuntimeError("wrapped") from inner
    except RuntimeError as error:
        assert is_out_of_memory(error)


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


def test_the_failed_attempts_tensors_are_gone_when_it_is_repeated():
    import weakref

    alive = []

    def attempt():
        if alive:
            return float(alive[0]() is not None)
        tensor = torch.zeros(1000)
        alive.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("x")

    assert MicroBatcher(config(), lambda line: None).run(attempt, lambda: None) == 0.0


def test_it_grows_back_by_halves_and_never_to_what_failed():
    said, sizes = [], []
    batcher = MicroBatcher(config(grow_after=3), said.append)
    for step in range(40):
        run(batcher, fits=4 if step < 2 else 8)  # memory was short at first only
        sizes.append(batcher.size)
    # 12 and 6 failed while little was free, so 3 to 5 is all that is tried again.
    assert sizes[:3] == [3, 3, 3] and sizes[3] == 4 and max(sizes) == 5 and sizes[-1] == 5
    assert sum("trying micro-batches" in line for line in said) == 2
    assert run(batcher, fits=8)[1] == 0


def test_a_probe_that_fails_goes_back_to_what_fitted():
    said = []
    batcher = MicroBatcher(config(grow_after=2, retries=1), said.append)
    for _ in range(12):
        run(batcher, fits=6)
    assert batcher.size == 6 and batcher.failed == 7
    # 12 failed, 6 fitted; 9 was tried and failed, then 7; each time it went back to 6, whatever the retries.
    assert [line for line in said if "back to" in line] == [
        "Micro-batches of 9 windows do not fit: back to 6.", "Micro-batches of 7 windows do not fit: back to 6."
    ]  # fmt: skip


def test_it_can_be_told_not_to_grow():
    batcher = MicroBatcher(config(grow_after=None), lambda line: None)
    for _ in range(50):
        run(batcher, fits=4)
    assert batcher.size == 3


def test_a_suspected_lack_of_memory_is_tried_in_smaller_parts_and_then_shown_as_it_is():
    def attempt():
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

    said = []
    with pytest.raises(RuntimeError, match="CUDNN_STATUS_NOT_SUPPORTED"):
        MicroBatcher(config(batch_size=4), said.append).run(attempt, lambda: None)
    assert len(said) == 2  # 4 -> 2 -> 1


def test_an_allocator_that_flushes_in_every_step_counts_as_short_memory():
    said, flushes = [], [0]
    batcher = MicroBatcher(config(), said.append, count_flushes=lambda: flushes[0])
    for step in range(8):
        flushes[0] += step in (0, 1, 3, 4, 5)  # twice in a row is bad luck, three times is not
        run(batcher, fits=12)
    assert batcher.size == 6 and batcher.failed == 12 and len(said) == 1 and "empties its cache" in said[0]


def test_what_was_learned_is_taken_up_under_the_same_setting_only():
    batcher = MicroBatcher(config(setting="(512, 288) none"), lambda line: None)
    run(batcher, fits=4)
    learned = batcher.state()
    same, other = (MicroBatcher(config(setting=f"(512, 288) {level}"), print) for level in ("none", "full"))
    same.restore(learned)
    other.restore(learned)
    assert (same.size, same.failed) == (3, 6) and (other.size, other.failed) == (12, None)
    assert MicroBatcher(config(), print).state() is None  # nothing was learned


def test_what_is_tried_twice_is_tried_twice():
    from tracknet.memory.micro_batch import try_twice

    failures, said = [torch.OutOfMemoryError("x")], []

    def action():
        if failures:
            raise failures.pop()
        return 3

    assert try_twice(action, said.append, "here") == 3 and len(said) == 1
    failures[:] = [torch.OutOfMemoryError("x")] * 2
    with pytest.raises(UserError, match="Out of memory here"):
        try_twice(action, said.append, "here")
    failures[:] = [RuntimeError("size mismatch")]
    with pytest.raises(RuntimeError, match="size mismatch"):
        try_twice(action, said.append, "here")
