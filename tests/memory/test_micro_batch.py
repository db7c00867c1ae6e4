"""A split batch gives the same update, running out of memory loses nothing, and other errors are not swallowed."""

import pytest
import torch

from tracknet.errors import UserError
from tracknet.memory.micro_batch import THRASHING_STEPS, MicroBatchConfig, MicroBatcher, is_out_of_memory


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
    """Attempt a step that only fits in parts of at most `fits`; return the parts of the good attempt and the lines
    said."""
    done, resets = [], []

    def attempt():
        done.clear()
        for part in batcher.micro_batches(batch):
            if part.stop - part.start > fits:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            done.append((part.start, part.stop))
        return 1.0

    assert batcher.run(attempt, lambda: resets.append(1)) == 1.0
    return done, len(resets)


def test_it_backs_off_until_it_fits_and_stays_there(said):
    batcher = MicroBatcher(config())
    parts, resets = run(batcher, fits=4)
    assert parts == [(0, 3), (3, 6), (6, 9), (9, 12)] and resets == 2
    assert len(said) == 2 and "going on with 6" in said[0] and "going on with 3" in said[1]
    assert run(batcher, fits=4)[1] == 0


def test_parts_cover_an_uneven_batch():
    batcher = MicroBatcher(config(start_size=5))
    assert [(p.start, p.stop) for p in batcher.micro_batches(12)] == [(0, 5), (5, 10), (10, 12)]
    assert [(p.start, p.stop) for p in batcher.micro_batches(3)] == [(0, 3)]


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
    batcher = MicroBatcher(config(**changes), suggest_settings=lambda size: asked.append(size) or "buy more")
    with pytest.raises(UserError, match=words) as error:
        run(batcher, fits=2)
    assert str(error.value).endswith("buy more") and asked == [batcher.size]


def test_it_never_grows_when_memory_is_short():
    """A smallest size above the batch (validation has a batch of its own) is reached at once."""
    with pytest.raises(UserError, match="training.min_micro_batch_size=16"):
        run(MicroBatcher(config(batch_size=8, min_size=16)), fits=2, batch=8)


def test_an_error_without_a_text_is_handled_too(said):
    failures = [MemoryError()]

    def attempt():
        if failures:
            raise failures.pop()
        return 2.0

    assert MicroBatcher(config()).run(attempt, lambda: None) == 2.0 and len(said) == 1


def test_other_errors_pass_through_unchanged():
    def attempt():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        MicroBatcher(config()).run(attempt, lambda: None)


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


def test_a_real_allocation_that_fails_is_recognized():
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

    assert MicroBatcher(config()).run(attempt, lambda: None) == 0.0


def test_it_grows_back_by_halves_and_never_to_what_failed(said):
    sizes = []
    batcher = MicroBatcher(config(grow_after=3))
    for step in range(40):
        run(batcher, fits=4 if step < 2 else 8)  # memory was short at first only
        sizes.append(batcher.size)
    # 12 and 6 failed while little was free, so 3 to 5 is all that is tried again.
    assert sizes[:3] == [3, 3, 3] and sizes[3] == 4 and max(sizes) == 5 and sizes[-1] == 5
    assert sum("trying micro-batches" in line for line in said) == 2
    assert run(batcher, fits=8)[1] == 0


def test_a_probe_that_fails_goes_back_to_what_fitted(said):
    batcher = MicroBatcher(config(grow_after=2, retries=1))
    for _ in range(12):
        run(batcher, fits=6)
    assert batcher.size == 6 and batcher.failed == 7
    # 12 failed, 6 fitted; 9 was tried and failed, then 7; each time it went back to 6, whatever the retries.
    assert [line for line in said if "back to" in line] == [
        "Micro-batches of 9 windows do not fit: going back to 6.",
        "Micro-batches of 7 windows do not fit: going back to 6.",
    ]


def test_it_can_be_told_not_to_grow():
    batcher = MicroBatcher(config(grow_after=None))
    for _ in range(50):
        run(batcher, fits=4)
    assert batcher.size == 3


def test_a_suspected_lack_of_memory_is_tried_in_smaller_parts_and_then_shown_as_it_is(said):
    def attempt():
        raise RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED")

    with pytest.raises(RuntimeError, match="CUDNN_STATUS_NOT_SUPPORTED"):
        MicroBatcher(config(batch_size=4)).run(attempt, lambda: None)
    assert len(said) == 2  # 4 -> 2 -> 1


def test_an_allocator_that_flushes_in_every_step_counts_as_short_memory(said):
    flushes = [0]
    batcher = MicroBatcher(config(), count_flushes=lambda: flushes[0])
    for step in range(8):
        flushes[0] += step in (0, 1, 3, 4, 5)  # twice in a row is bad luck, three times is not
        run(batcher, fits=12)
    assert batcher.size == 6 and batcher.failed == 12 and len(said) == 1 and "empties its cache" in said[0]


def test_what_was_learned_is_taken_up_under_the_same_setting_only():
    batcher = MicroBatcher(config(setting="(512, 288) none"))
    run(batcher, fits=4)
    learned = batcher.state()
    same, other = (MicroBatcher(config(setting=f"(512, 288) {level}")) for level in ("none", "full"))
    same.restore(learned)
    other.restore(learned)
    assert (same.size, same.failed) == (3, 6) and (other.size, other.failed) == (12, None)
    assert MicroBatcher(config()).state() is None  # nothing was learned


def test_what_is_tried_twice_is_tried_twice(said):
    from tracknet.memory.micro_batch import retry_on_oom

    failures = [torch.OutOfMemoryError("x")]

    def action():
        if failures:
            raise failures.pop()
        return 3

    assert retry_on_oom(action, "here") == 3 and len(said) == 1
    failures[:] = [torch.OutOfMemoryError("x")] * 2
    with pytest.raises(UserError, match="Out of memory here"):
        retry_on_oom(action, "here")
    failures[:] = [RuntimeError("size mismatch")]
    with pytest.raises(RuntimeError, match="size mismatch"):
        retry_on_oom(action, "here")


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_step_is_repeated_as_often_as_configured_and_no_more(retries):
    tried = []

    def attempt():
        tried.append(batcher.size)
        raise torch.OutOfMemoryError("x")

    batcher = MicroBatcher(config(batch_size=64, retries=retries))
    with pytest.raises(UserError, match=rf"all {retries} retries \(training.oom_retries\) are used"):
        batcher.run(attempt, lambda: None)
    assert tried == [64, 32, 16, 8][: retries + 1]


def test_a_smaller_size_to_start_with_is_taken_and_a_larger_one_is_not():
    assert [MicroBatcher(config(start_size=size)).size for size in (None, 5, 12, 13)] == [12, 5, 12, 12]


def test_what_is_learned_is_size_failure_and_steps_since():
    batcher = MicroBatcher(config(setting="s"))
    for _ in range(3):
        run(batcher, fits=4)
    assert batcher.state() == {"size": 3, "failed": 6, "clean": 3, "setting": "s"}
    other = MicroBatcher(config(setting="s"))
    other.restore(batcher.state())
    assert other.state() == batcher.state()
    other.restore(None)
    assert other.state() == batcher.state()


@pytest.mark.parametrize("start", [2, 3])
def test_what_was_learned_of_sizes_that_are_not_tried_any_more_is_left(start):
    batcher = MicroBatcher(config(start_size=start, setting="s"))
    batcher.restore({"size": 3, "failed": 6, "clean": 3, "setting": "s"})
    assert (batcher.size, batcher.failed, batcher.clean) == (start, None, 0)


def test_a_larger_size_is_tried_after_so_many_clean_steps_and_once_in_so_many():
    batcher = MicroBatcher(config(batch_size=16, grow_after=3))
    sizes = []
    for step in range(12):
        run(batcher, fits=4 if step == 0 else 16, batch=16)
        sizes.append((batcher.size, batcher.clean))
    # 16 and 8 fail, 4 fits: 6 is tried in the fourth step, 7 in the seventh, and then there is none below 8.
    assert sizes == [(4, 1), (4, 2), (4, 3), (6, 1), (6, 2), (6, 3), (7, 1), (7, 2), (7, 3), (7, 1), (7, 2), (7, 3)]
    assert batcher.failed == 8


def test_where_nothing_failed_nothing_larger_is_tried():
    batcher = MicroBatcher(config(start_size=3, grow_after=1))
    for _ in range(3):
        run(batcher, fits=12)
    assert batcher.size == 3 and batcher.clean == 3


def test_all_processes_take_smaller_parts_when_one_runs_out(said):
    flags, resets = [True, False, False], []

    def all_reduce_any(flag):
        return flag or flags.pop(0)  # what another process says: of the first attempt, of the second, of its allocator

    batcher = MicroBatcher(config(), all_reduce_any=all_reduce_any)
    assert batcher.run(lambda: len(list(batcher.micro_batches(12))), lambda: resets.append(1)) == 2
    assert (batcher.size, batcher.failed, len(resets)) == (6, 12, 1) and not flags


def test_the_words_of_another_process_are_not_invented():
    batcher = MicroBatcher(config(retries=0), all_reduce_any=lambda flag: True)
    with pytest.raises(UserError, match="are used: in another process$"):
        batcher.run(lambda: 1.0, lambda: None)


@pytest.mark.parametrize(
    ("changes", "size"), [({}, 6), ({"adaptive": False}, 12), ({"min_size": 12}, 12), ({"backoff_factor": 4}, 3)]
)
def test_an_allocator_that_flushes_makes_parts_smaller_where_they_may_be(changes, size, said):
    flushes = [100]
    batcher = MicroBatcher(config(**changes), count_flushes=lambda: flushes[0])
    run(batcher, fits=12)
    for _ in range(THRASHING_STEPS):
        flushes[0] += 1
        assert batcher.size == 12
        run(batcher, fits=12)
    assert batcher.size == size and len(said) == (size < 12)
    # Counting begins again.
    for _ in range(THRASHING_STEPS - 1):
        flushes[0] += 1
        run(batcher, fits=12)
    assert batcher.size == size


def test_what_thrashes_counts_as_failed_and_what_follows_as_good():
    flushes = [0]
    batcher = MicroBatcher(config(grow_after=4), count_flushes=lambda: flushes[0])
    for _ in range(THRASHING_STEPS):
        flushes[0] += 1
        run(batcher, fits=12)
    assert (batcher.size, batcher.failed, batcher.clean) == (6, 12, 0)
    for _ in range(5):
        run(batcher, fits=8)  # 9 is tried and fails
    assert (batcher.size, batcher.failed, batcher.clean) == (6, 9, 1)


def test_every_message_of_an_allocator_or_library_is_known():
    said = [
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "MPS backend out of memory",
        "CUDNN_STATUS_NOT_SUPPORTED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_INTERNAL_ERROR",
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "Unable to find a valid cuDNN algorithm",
        "unable to find an engine",
        "could not create a primitive",
        "could not create a memory",
    ]
    assert all(is_out_of_memory(RuntimeError(f"Error: {text} object")) for text in said)
    assert is_out_of_memory(MemoryError())


def test_a_lack_of_memory_that_is_certain_is_told_as_such_even_where_suspected_words_stand_beside_it():
    def attempt():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("CUDNN_STATUS_INTERNAL_ERROR") from error

    with pytest.raises(UserError, match="Out of memory with micro-batches of 1"):
        MicroBatcher(config(batch_size=1)).run(attempt, lambda: None)
