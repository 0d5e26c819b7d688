"""What a run asks of its backend: one reservation, and every buffer that a kernel sees."""

from __future__ import annotations

import pytest

from qtool.backends.protocol import Reservation
from qtool.checkpoint import open_checkpoint
from qtool.errors import QtoolError
from qtool.events import Note
from qtool.formats.bitsandbytes import packed_layouts
from qtool.formats.precisions import QUANTIZED_PRECISIONS, QuantFormat
from qtool.formats.tensors import TensorLayout
from qtool.quantize.buffers import BufferPool, CollectedAbsmax, TileBuffers, largest_sizes
from qtool.quantize.pipeline import PipelineSettings
from qtool.quantize.plan import Recipe, TensorPlan, build_plan
from qtool.quantize.tiles import cut_tensor
from qtool.quantize.workers import shards_in_turn
from tests.quantize.test_run import folder_digest, quantize
from tests.quantize.watched_backend import WatchedBackend
from tests.tiny_models import write_llama

MIB = 1 << 20


@pytest.fixture
def source(tmp_path):
    write_llama(tmp_path / "in", num_shards=6, layers=6)
    return tmp_path / "in"


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_every_array_that_a_kernel_sees_is_the_backend_s(source, tmp_path, precision):
    backend = WatchedBackend()
    quantize(source, tmp_path / "out", backend=backend, format=QuantFormat(precision))
    assert backend.num_kernels > 50 and backend.foreign == []


def test_conv1d_weights_too(test_data, tmp_path):
    backend = WatchedBackend()
    quantize(test_data / "models" / "slm4096-gpt2-hf", tmp_path / "out", backend=backend)
    assert backend.num_kernels > 50 and backend.foreign == []


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
def test_buffers_are_reused_and_do_not_grow_with_the_model(tmp_path, precision):
    lent = {}
    for layers in (2, 16):
        write_llama(tmp_path / f"in{layers}", num_shards=8, layers=layers)
        backend = WatchedBackend()
        out = tmp_path / f"out{layers}"
        quantize(tmp_path / f"in{layers}", out, backend=backend, format=QuantFormat(precision))
        lent[layers] = backend.lent_bytes
    # How many tensors are in work together, and so their absmax, depends on the threads' luck.
    largest_absmax_bytes = 5 * 64 * 160 // 64 + 16
    assert abs(lent[16] - lent[2]) <= 16 * largest_absmax_bytes


def test_one_reservation_is_asked_for_and_released(source, tmp_path):
    backend = WatchedBackend()
    quantize(source, tmp_path / "out", backend=backend, settings=PipelineSettings(2, 5000))
    assert backend.asked == [(2, 4096)]  # whole pages
    assert backend.num_releases == 1


def test_without_settings_the_choice_is_the_backend_s(source, tmp_path):
    backend = WatchedBackend()
    quantize(source, tmp_path / "out", backend=backend, settings=PipelineSettings())
    assert backend.asked == [(None, None)]


def test_nothing_is_reserved_where_nothing_is_to_do(source, tmp_path):
    quantize(source, tmp_path / "out")
    backend = WatchedBackend()
    quantize(source, tmp_path / "out", backend=backend)
    assert backend.asked == [] and backend.num_releases == 0


def test_a_run_keeps_to_what_was_granted_and_says_why(source, tmp_path):
    note = "the GPU is short of memory"
    backend = WatchedBackend(granted=Reservation(1, 5000, (note,)))
    events = []
    settings = PipelineSettings(4, MIB)
    quantize(source, tmp_path / "out", backend=backend, settings=settings, on_event=events.append)
    assert backend.asked == [(4, MIB)]
    assert backend.most_at_once == 1
    assert backend.largest_source_bytes == 4096
    assert Note(note, "warning") in events
    quantize(source, tmp_path / "plain")
    assert folder_digest(tmp_path / "out") == folder_digest(tmp_path / "plain")


@pytest.mark.parametrize("kernel", [1, 4, 30])  # in the warm-up, in the first tiles, later
def test_a_failed_run_releases_too(source, tmp_path, kernel):
    class FailingBackend(WatchedBackend):
        def count(self):
            super().count()
            if self.num_kernels == kernel:
                raise ZeroDivisionError

    backend = FailingBackend()
    with pytest.raises(ZeroDivisionError):
        quantize(source, tmp_path / "out", backend=backend)
    assert backend.num_releases == 1


def test_a_device_that_is_too_small_leaves_no_folder(source, tmp_path):
    class FullBackend(WatchedBackend):
        def reserve(self, num_workers, tile_bytes):
            raise QtoolError("the GPU is full", kind="memory", hint="free some")

    with pytest.raises(QtoolError, match="the GPU is full"):
        quantize(source, tmp_path / "out", backend=FullBackend())
    assert not (tmp_path / "out").exists()


def test_no_buffer_to_be_had_ends_the_run(source, tmp_path):
    class PoorBackend(WatchedBackend):
        def host_buffer(self, num_bytes):
            if len(self.buffers) >= 4:  # three to warm up; more take as many as tiles overlap
                raise MemoryError("no buffer")
            return super().host_buffer(num_bytes)

    backend = PoorBackend()
    with pytest.raises(MemoryError, match="no buffer"):
        quantize(source, tmp_path / "out", backend=backend)
    assert backend.num_releases == 1


def test_peaks_count_page_locked_and_device_memory(source, tmp_path):
    class PinningBackend(WatchedBackend):
        page_locked_bytes = 1 << 40

    _, plain = quantize(source, tmp_path / "plain", backend=WatchedBackend())
    _, result = quantize(source, tmp_path / "out", backend=PinningBackend())
    assert plain.peak_host_bytes < 1 << 40 <= result.peak_host_bytes
    assert result.peak_device_bytes == WatchedBackend().peak_device_bytes > 0


# -- buffers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", QUANTIZED_PRECISIONS)
@pytest.mark.parametrize("tile_bytes", [4096, 20480, MIB])
def test_sizes_suffice_for_every_tile_and_for_no_more(source, precision, tile_bytes):
    fmt = QuantFormat(precision)
    plan = build_plan(open_checkpoint(str(source), need="files"), Recipe(format=fmt))
    sizes = largest_sizes(plan.tensors, fmt, tile_bytes)
    tiles = [tile for tensor in plan.tensors for tile in cut_tensor(tensor, fmt, tile_bytes)]
    quantized = [tile for tile in tiles if tile.tensor.action == "quantize"]
    assert sizes.source == max(tile.source_bytes for tile in tiles)
    codes = [tile.length if fmt.is_int8 else -(-tile.length // 2) for tile in quantized]
    assert sizes.codes == max(codes)
    assert sizes.transposed == 0
    buffers = TileBuffers.allocate(WatchedBackend(), sizes)
    for name in sizes._fields:
        assert getattr(buffers, name).size >= getattr(sizes, name)


def test_a_pool_lends_the_smallest_buffer_that_suffices():
    backend = WatchedBackend()
    pool = BufferPool(backend)
    small, large = pool.take(100), pool.take(1000)
    pool.give_back(large)
    pool.give_back(small)
    assert pool.take(80) is small
    assert pool.take(90) is large
    assert pool.take(10).size == 10
    assert [buffer.size for buffer in backend.buffers] == [100, 1000, 10]


@pytest.mark.parametrize(
    ("shape", "precision", "expected"),
    [
        ((4096, 14336), "nf4-dq", 4),
        ((8192, 28672), "nf4-dq", 4),
        ((16384, 53248), "nf4-dq", 1),  # 68 MB of absmax each, two of them in work per shard
        ((16384, 53248), "nf4", 4),
        ((16384, 53248), "int8", 4),
        ((0, 64), "nf4-dq", 4),
    ],
)
def test_fewer_shards_take_turns_where_tensors_are_huge(shape, precision, expected):
    fmt = QuantFormat(precision)
    weight = TensorLayout("w.weight", "BF16", shape)
    plan = TensorPlan(weight, "quantize", "test", packed_layouts(weight, fmt))
    copied = TensorPlan(TensorLayout("big", "BF16", (1 << 40,)), "copy", "test", ())
    assert shards_in_turn([copied, plan], fmt) == expected
    assert shards_in_turn([copied], fmt) == 4


@pytest.mark.parametrize("num_blocks", [0, 1, 255, 256, 257, 10_000])
def test_collected_absmax_has_room_for_all_of_it_without_overlap(num_blocks):
    backend = WatchedBackend()
    collected = CollectedAbsmax(BufferPool(backend), num_blocks)
    collected.absmax[:], collected.nested_absmax[:], collected.codes[:] = 1, 2, 3
    assert collected.absmax.shape == collected.codes.shape == (num_blocks,)
    assert collected.nested_absmax.shape == (-(-num_blocks // 256),)
    assert (collected.absmax == 1).all() and (collected.nested_absmax == 2).all()
