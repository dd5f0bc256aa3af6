"""Batches: each image is in exactly one step of an epoch, and in one process's share of that step."""

import numpy as np
import pytest

from hf_transfer.training.batches import Feed, count_steps, draw_steps, read_ahead, take_share


@pytest.mark.parametrize(("num_images", "images_a_step"), [(195, 32), (32, 32), (7, 32), (64, 32), (65, 32)])
def test_an_epoch_holds_every_image_once_in_even_steps(num_images: int, images_a_step: int) -> None:
    steps = draw_steps(num_images, images_a_step, seed=3, epoch=5)
    assert len(steps) == count_steps(num_images, images_a_step)
    assert sorted(np.concatenate(steps).tolist()) == list(range(num_images))
    sizes = {len(step) for step in steps}
    assert max(sizes) <= images_a_step
    assert max(sizes) - min(sizes) <= 1


def test_the_order_depends_on_epoch_and_seed_alone() -> None:
    first, again = (np.concatenate(draw_steps(50, 8, seed=0, epoch=1)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    for seed, epoch in ((0, 2), (1, 1)):
        assert (np.concatenate(draw_steps(50, 8, seed=seed, epoch=epoch)) != first).any()


def test_balanced_epochs_have_equally_many_images_of_each_class() -> None:
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 3], [100, 20, 7]))
    steps = draw_steps(127, 32, seed=0, epoch=2, balanced=labels)
    draws = np.concatenate(steps)
    assert len(draws) == len(set(draws.tolist())) == 127, "a repeat is another draw"
    assert sorted(np.bincount(labels[draws % 127]).tolist()) == [0, 42, 42, 43]
    times = np.bincount(draws % 127, minlength=127)
    for label in (0, 1, 3):
        assert np.ptp(times[labels == label]) <= 1, "no image repeats before the others of its class"
    np.testing.assert_array_equal(draws, np.concatenate(draw_steps(127, 32, seed=0, epoch=2, balanced=labels)))
    assert set(draws.tolist()) != set(np.concatenate(draw_steps(127, 32, seed=0, epoch=3, balanced=labels)).tolist())


@pytest.mark.parametrize("views", [None, 1, 4])
def test_a_repeated_image_is_read_in_another_view_if_there_is_one(views: int | None) -> None:
    feed = Feed(num_images=10, views=views, read=lambda r: r, prepare=lambda t, r: t, is_pixels=False)
    rows = feed.rows(np.array([7, 17, 27]), epoch=5)
    assert (rows % 10 == 7).all()
    assert len(set(rows.tolist())) == (1 if views == 1 else 3)
    assert views is None or (rows < 10 * views).all()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_processes_and_batches_share_a_step(num_ranks: int, accumulate: int) -> None:
    step = np.arange(10, 21)
    batches = [
        batch
        for rank in range(num_ranks)
        for batch in take_share(step, rank=rank, num_ranks=num_ranks, accumulate=accumulate)
    ]
    assert all(len(batch) for batch in batches)
    np.testing.assert_array_equal(np.concatenate(batches), step)


def test_more_processes_than_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="start fewer"):
        take_share(np.arange(2), rank=0, num_ranks=3, accumulate=1)


def test_views_are_taken_in_turn_and_fresh_ones_never_repeat() -> None:
    def make(views: int | None) -> Feed:
        return Feed(num_images=4, views=views, read=lambda r: r, prepare=lambda t, r: t, is_pixels=False)

    indices = np.array([3, 0])
    assert [make(2).rows(indices, e).tolist() for e in range(3)] == [[3, 0], [7, 4], [3, 0]]
    assert [make(None).rows(indices, e).tolist() for e in range(3)] == [[3, 0], [7, 4], [11, 8]]


def test_reading_ahead_keeps_the_order_and_passes_errors_on() -> None:
    rows = [np.array([i]) for i in range(5)]
    assert [int(r[0]) for r in read_ahead(rows, lambda r: r * 2)] == [0, 2, 4, 6, 8]
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(rows, lambda r: np.array([1 // int(r[0])])))
