"""How far, how fast and for how long: with a clock that is moved by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from tests.engine.generate.reports_case import Clock, begun, record, work

from stepfuse.engine.generate.reports.meter import Meter
from stepfuse.engine.generate.reports.speed import Speed

NEAR = 0.05  # of a rate: batches end between two looks at the clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> Meter:
    """Of two workers that are ready."""
    found = Meter(clock)
    found.begin(begun())
    found.up(0, True)
    found.up(1, True)
    return found


def test_before_the_first_batch_nothing_is_known(meter: Meter) -> None:
    reading = meter.read()
    assert (reading.images, reading.images_in_place, reading.images_wanted) == (
        12_000,
        12_000,
        50_000,
    )
    assert (reading.shards_done, reading.shards_failed, reading.shards) == (12, 0, 50)
    assert (reading.rate, reading.eta, reading.writer_share) == (0.0, None, None)
    assert reading.workers == {0: 0.0, 1: 0.0}


def test_rates_and_eta(meter: Meter, clock: Clock) -> None:
    work(meter, clock, 20, (16, 20))
    reading = meter.read()
    assert reading.workers[0] == pytest.approx(16, rel=NEAR)
    assert reading.workers[1] == pytest.approx(20, rel=NEAR)
    assert reading.rate == pytest.approx(36, rel=NEAR)
    assert reading.images == 12_000 + 20 * 16 + 20 * 20
    assert reading.images_in_place == 12_000
    assert reading.eta == pytest.approx((38_000 - 720) / 36, rel=NEAR)


def test_the_eta_is_that_of_this_run(clock: Clock) -> None:
    """A slice of the shards: `--shard 1/2` does not wait for the other half."""
    meter = Meter(clock)
    meter.begin(begun(workers=1, shards_asked=19, images_asked=19_000))
    meter.up(0, True)
    work(meter, clock, 20, (16,))
    assert meter.read().eta == pytest.approx((19_000 - 320) / 16, rel=NEAR)


def test_a_shard_counts_once_in_place_of_its_images(meter: Meter, clock: Clock) -> None:
    work(meter, clock, 50, (20,))
    assert (meter.read().images, meter.read().images_in_place) == (13_000, 12_000)
    meter.shard(0, record(12))
    meter.shard(0, record(12))
    reading = meter.read()
    assert (reading.images, reading.images_in_place, reading.shards_done) == (13_000, 13_000, 13)


def test_the_share_of_the_writer_is_that_of_the_sums(meter: Meter) -> None:
    meter.shard(0, record(12, seconds=50, wait=1))
    meter.shard(1, record(13, seconds=150, wait=5))
    reading = meter.read()
    assert (reading.writer_wait, reading.writer_share, reading.writer_bound) == (6, 0.03, False)
    meter.shard(0, record(14, seconds=100, wait=60))
    assert meter.read().writer_bound
    meter.shard(0, record(15, seconds=1, wait=1e9))
    assert meter.read().writer_share == 1


def test_a_share_of_nothing_is_unknown(meter: Meter) -> None:
    meter.shard(0, record(seconds=0, wait=0))
    assert meter.read().writer_share is None


def test_failed_shards(meter: Meter) -> None:
    meter.failed(13, False)
    assert meter.read().shards_failed == 0
    meter.failed(13, True)
    meter.failed(13, True)
    assert meter.read().shards_failed == 1
    meter.shard(0, record(13))  # somebody else has made it
    assert (meter.read().shards_failed, meter.read().shards_done) == (0, 13)
    meter.failed(13, True)  # too late
    assert meter.read().shards_failed == 0


def test_what_a_dead_worker_had_begun_is_lost(meter: Meter, clock: Clock) -> None:
    work(meter, clock, 20, (16, 20))
    meter.up(0, False)
    reading = meter.read()
    assert reading.images == 12_000 + 400
    assert reading.workers[0] is None
    assert reading.rate == reading.workers[1] == pytest.approx(20, rel=NEAR)
    meter.made(0, 8)  # told before it died
    assert meter.read().images == 12_000 + 400
    meter.up(0, True)
    assert meter.read().workers[0] == 0
    work(meter, clock, 10, (16, 20))
    assert meter.read().rate == pytest.approx(36, rel=NEAR)


def test_a_failed_attempt_of_the_only_worker_does_not_count(clock: Clock) -> None:
    meter = Meter(clock)
    meter.begin(begun(workers=1))
    meter.up(0, True)
    work(meter, clock, 20, (16,))
    meter.failed(12, False)
    assert meter.read().images == 12_000


def test_of_no_worker_more_than_a_shard_is_under_way(meter: Meter, clock: Clock) -> None:
    """Of several workers nobody knows whose attempt has failed."""
    work(meter, clock, 60, (20, 0))
    assert meter.read().images == 13_000


def test_everybody_stood_still(meter: Meter, clock: Clock) -> None:
    """Ctrl-Z: the rate is that of before, and no image of afterwards is lost."""
    work(meter, clock, 60, (16, 20))
    clock.go(3600)
    meter.tick()
    assert meter.read().rate == pytest.approx(36, rel=NEAR)
    work(meter, clock, 10, (16, 20))
    assert meter.read().rate == pytest.approx(36, rel=NEAR)
    assert meter.read().images == 14_000  # a shard of each


def test_the_watcher_stood_still_and_the_workers_did_not(meter: Meter, clock: Clock) -> None:
    """What they have finished meanwhile comes in at once, and says nothing about the rate."""
    work(meter, clock, 20, (16, 20))
    clock.go(30)
    for _ in range(60):
        meter.made(0, 8)
        meter.made(1, 10)
    assert meter.read().rate == pytest.approx(36, rel=NEAR)
    work(meter, clock, 10, (16, 20))
    assert meter.read().rate == pytest.approx(36, rel=NEAR)


def test_a_worker_that_hangs_slows_down(meter: Meter, clock: Clock) -> None:
    work(meter, clock, 60, (16, 20))
    rates = []
    work(meter, clock, 300, (0, 20), ticks=lambda: rates.append(meter.read().workers[0]))
    assert rates[0] == pytest.approx(16, rel=NEAR)
    assert all(later <= sooner for sooner, later in pairwise(rates))
    assert rates[-1] == pytest.approx(16 / 6, rel=NEAR)


def test_a_change_of_rate_is_there_within_the_window(meter: Meter, clock: Clock) -> None:
    work(meter, clock, 100, (16, 20))
    work(meter, clock, 61, (4, 40))
    reading = meter.read()
    assert (reading.workers[0], reading.workers[1]) == (
        pytest.approx(4, rel=2 * NEAR),
        pytest.approx(40, rel=NEAR),
    )


def test_batches_that_take_longer_than_the_window(clock: Clock) -> None:
    """And an engine that tells of nothing while they are made: that is not a pause."""
    meter = Meter(clock)
    meter.begin(begun(workers=1))
    meter.up(0, True)
    for _ in range(6):
        clock.go(90)
        meter.made(0, 9)
        assert meter.read().rate == pytest.approx(0.1)
    clock.go(80)
    assert meter.read().rate == pytest.approx(0.1)


def test_an_engine_that_tells_of_shards_alone(clock: Clock) -> None:
    meter = Meter(clock)
    meter.begin(begun(workers=0))
    for k in range(12, 16):
        clock.go(50)
        meter.shard(7, record(k, seconds=50))
    reading = meter.read()
    assert reading.images == 16_000
    assert reading.mean == pytest.approx(20)
    assert reading.workers == {7: pytest.approx(20)}


def test_what_others_have_made_is_no_speed(meter: Meter, clock: Clock) -> None:
    """`run_shard` gives the record of a shard that is done at once."""
    work(meter, clock, 50, (20, 0))
    meter.shard(0, record(12))
    before = meter.read().rate
    for k in range(13, 33):
        meter.shard(0, record(k))
    reading = meter.read()
    assert reading.rate == before
    assert reading.images == 33_000
    assert reading.mean == pytest.approx(20)


def test_the_first_batch_is_forgotten(meter: Meter, clock: Clock) -> None:
    """It waits for the network to be compiled and the step to be captured."""
    clock.time += 9
    meter.tick()
    clock.time += 9
    meter.made(0, 8)
    assert meter.read().workers[0] == pytest.approx(8 / 18)
    work(meter, clock, 10, (16, 0))
    assert meter.read().workers[0] == pytest.approx(16, rel=NEAR)


def test_a_fast_worker_does_not_fill_the_memory(clock: Clock) -> None:
    speed = Speed(clock.time)
    for _ in range(200_000):
        clock.go(0.001)
        speed.add(clock.time, 1)
    assert speed.value(clock.time) == pytest.approx(1000, rel=0.01)
    assert len(speed._marks) < 300


def test_messages_that_come_together_are_no_speed(clock: Clock) -> None:
    speed = Speed(clock.time)
    clock.go(10)
    speed.add(clock.time, 8)
    speed.add(clock.time, 8)
    speed.add(clock.time, 8)
    assert speed.value(clock.time) == pytest.approx(2.4)


def test_the_eta_is_never_negative(clock: Clock) -> None:
    meter = Meter(clock)
    meter.begin(begun(workers=1, shards_asked=2, images_asked=1500))
    meter.up(0, True)
    work(meter, clock, 200, (20,))
    assert meter.read().eta >= 0
    meter.shard(0, record(12))
    meter.failed(13, True)
    assert meter.read().eta == 0
    meter.end()
    assert meter.read().eta == 0


def test_shards_that_are_given_up_are_not_waited_for(meter: Meter, clock: Clock) -> None:
    work(meter, clock, 20, (16, 20))
    for k in range(12, 22):
        meter.failed(k, True)
    assert meter.read().eta == pytest.approx((28_000 - 720) / 36, rel=NEAR)


def test_the_end(meter: Meter, clock: Clock) -> None:
    work(meter, clock, 50, (20, 10))
    meter.shard(0, record(12))
    meter.end()
    clock.go(1000)
    meter.end()
    reading = meter.read()
    assert reading.images == reading.images_in_place == 13_000
    assert (reading.rate, reading.eta, reading.workers) == (0, None, {0: None, 1: None})
    assert (reading.seconds, reading.mean) == (pytest.approx(50), pytest.approx(20))


def test_nothing_is_kept_of_an_earlier_run(meter: Meter, clock: Clock) -> None:
    work(meter, clock, 50, (20, 10))
    meter.shard(0, record(12))
    meter.failed(13, True)
    meter.begin(begun())
    fresh = Meter(clock)
    fresh.begin(begun())
    assert meter.read() == fresh.read()


def test_no_workers_and_nothing_to_do(clock: Clock) -> None:
    meter = Meter(clock)
    meter.begin(begun(workers=0, shards_asked=0, images_asked=0, images_done=50_000))
    reading = meter.read()
    assert (reading.images, reading.workers, reading.rate, reading.eta) == (50_000, {}, 0, 0)


def test_a_hundred_million_images(clock: Clock) -> None:
    meter = Meter(clock)
    meter.begin(
        begun(images=10**8, shards=10**4, images_done=0, shards_done=0, shards_asked=10**4,
              images_asked=10**8, workers=64)
    )  # fmt: skip
    for worker in range(64):
        meter.up(worker, True)
    work(meter, clock, 10, (20,) * 64)
    assert meter.read().eta == pytest.approx(10**8 / 1280, rel=NEAR)


def test_a_clock_that_goes_back_is_not_believed(meter: Meter, clock: Clock) -> None:
    work(meter, clock, 20, (16, 20))
    clock.go(-500)
    meter.made(0, 8)
    reading = meter.read()
    assert reading.seconds >= 0
    assert all(math.isfinite(rate) and rate >= 0 for rate in reading.workers.values())
