import io
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from granq_jax.data.datasets import load_split
from granq_jax.data.splits import Dataset, EncodedSplit, MemorySplit, RandomCrop, ahead, batches, centre_crop
from granq_jax.errors import RunError
from tests.conftest import one_line_error

SMALL = Dataset(10, 24, 3, 255, (0.5, 0.4, 0.3), (0.2, 0.25, 0.5))
PATIENCE = 30  # seconds, before something counts as hanging


def noise(width, height, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def split_of(images, threads=2):
    """An EncodedSplit of PIL images; the label of each is its index."""

    def png(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    encoded = [(png(image), label) for label, image in enumerate(images)]
    pool = ThreadPoolExecutor(threads)
    return EncodedSplit(SMALL, len(encoded), lambda indices: [encoded[i] for i in indices], str, pool)


def test_the_last_batch_is_filled_with_images_of_weight_zero():
    split = load_split("digits", "test")
    parts = list(batches(split, 100))
    assert [weights.sum() for _, _, weights in parts] == [100, 100, 100, 60]
    images = np.concatenate([images for images, _, _ in parts])
    assert images.shape == (400, 8, 8, 1)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images[:360], split.dataset.normalise(split.images))
    np.testing.assert_array_equal(images[360:], np.repeat(images[300:301], 40, axis=0))


def test_batches_of_photographs_are_normalised_and_filled_up_as_well():
    colours = np.array([(0, 0, 0), (255, 0, 51), (10, 20, 30), (102, 204, 255), (7, 250, 99)])
    split = split_of([PIL.Image.new("RGB", (30 + 5 * i, 50 - 5 * i), tuple(c)) for i, c in enumerate(colours.tolist())])
    images, labels, weights = (np.stack(part) for part in zip(*batches(split, 3), strict=True))
    assert (images.shape, images.dtype) == ((2, 3, 24, 24, 3), np.float32)
    assert (labels.dtype, weights.dtype) == (np.int32, np.float32)
    assert labels.tolist() == [[0, 1, 2], [3, 4, 3]]
    assert weights.tolist() == [[1, 1, 1], [1, 1, 0]]
    expected = (colours[labels] / 255 - SMALL.mean) / SMALL.std
    np.testing.assert_allclose(images, np.broadcast_to(expected[:, :, None, None], images.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("crop", "resized"), [(224, 256), (7, 8)])
@pytest.mark.parametrize(
    "size",
    [
        (320, 240),
        (240, 320),
        (300, 300),
        (333, 251),
        (251, 333),
        (256, 256),
        (257, 383),
        (40, 30),
        (9, 300),
        (256, 511),
    ],
    ids="{0[0]}x{0[1]}".format,
)
def test_a_centre_crop_is_that_of_the_public_evaluation(size, crop, resized):
    """The rule of torchvision's Resize(resized) and CenterCrop(crop)."""
    image = noise(*size)
    shorter, longer = sorted(size)
    long_side = int(resized * longer / shorter)
    width, height = (long_side, resized) if size[0] > size[1] else (resized, long_side)
    left, top = round((width - crop) / 2.0), round((height - crop) / 2.0)
    pixels = np.asarray(image.resize((width, height), PIL.Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(centre_crop(image, crop), pixels[top : top + crop, left : left + crop])


DRAW = st.floats(0, 1, exclude_max=True)
SIDE = st.integers(8, 300)
FITTING = 320  # larger than any image: then what a crop shows is interpolated, and its box can be told from it


def ramps(width, height, start=0):
    """Two images, whose pixels say where they are: x and y, counted from ``start``."""
    y, x = np.mgrid[:height, :width].astype(np.float32) + start
    return PIL.Image.fromarray(x), PIL.Image.fromarray(y)


def box_of(crop, width, height):
    """Left, top, width and height of what is cut out of an image."""
    along = [np.asarray(crop(ramp, FITTING), float) for ramp in ramps(width, height)]
    lines = along[0].mean(0), along[1].mean(1)
    # Further out than a quarter, the edge of the image may be seen.
    near, far = FITTING // 4, FITTING - FITTING // 4 - 1
    sides = [(line[far] - line[near]) / (far - near) * FITTING for line in lines]
    starts = [line[near] + 0.5 - (near + 0.5) * side / FITTING for line, side in zip(lines, sides, strict=True)]
    return np.array([*starts, *sides])


@given(SIDE, SIDE, st.lists(st.tuples(DRAW, DRAW, DRAW, DRAW), min_size=1, max_size=4), st.integers(1, 64))
def test_a_random_crop_has_the_size_asked_for_and_sees_the_image_alone(width, height, draws, size):
    draws = np.array(draws)
    crop = RandomCrop(draws[:, :2], draws[:, 2:])
    # What lies outside would be seen as zeros.
    for ramp, side in zip(ramps(width, height, 1000), (width, height), strict=True):
        pixels = np.asarray(crop(ramp, size))
        assert pixels.shape == (size, size)
        assert pixels.min() >= 1000 - 1e-2
        assert pixels.max() <= 1000 + side - 1 + 1e-2


@given(SIDE, SIDE, DRAW, DRAW, DRAW, DRAW)
def test_a_random_crop_is_the_part_that_was_drawn(width, height, area, ratio, x, y):
    pixels = (0.08 + area * (1 - 0.08)) * width * height
    aspect = math.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
    sides = math.sqrt(pixels * aspect), math.sqrt(pixels / aspect)
    crop = RandomCrop(np.array([[area, ratio]]), np.array([[x, y]]))
    if sides[0] > width + 0.51 or sides[1] > height + 0.51:
        image = noise(width, height)
        np.testing.assert_array_equal(crop(image, 16), centre_crop(image, 16))
    elif sides[0] < width + 0.49 and sides[1] < height + 0.49:
        box = box_of(crop, width, height)
        np.testing.assert_allclose(box, box.round(), atol=0.02)
        left, top, across, down = box.round()
        assert abs(across - sides[0]) < 0.51
        assert abs(down - sides[1]) < 0.51
        for start, side, whole, draw in (left, across, width, x), (top, down, height, y):
            assert 0 <= start <= whole - side
            assert start <= draw * (whole - side + 1) <= start + 1


@pytest.mark.parametrize("size", [(300, 12), (12, 300)], ids=["wide", "high"])
def test_of_an_image_that_is_too_long_the_centre_is_taken(size):
    random = np.random.default_rng(0)
    image = noise(*size)
    expected = np.asarray(centre_crop(image, 24))
    for _ in range(20):
        np.testing.assert_array_equal(RandomCrop(*random.random((2, 10, 2)))(image, 24), expected)


def test_the_first_of_the_draws_that_fit_is_taken():
    shapes = np.array([[0.99, 0.99], [0.5, 0.5], [0.1, 0.2]])  # the first is wider than a square image
    places = np.array([[0.1, 0.2], [0.9, 0.3], [0.5, 0.5]])
    image = noise(60, 60)
    all_of_them = np.asarray(RandomCrop(shapes, places)(image, 24))
    np.testing.assert_array_equal(all_of_them, RandomCrop(shapes[1:2], places[1:2])(image, 24))
    assert not np.array_equal(all_of_them, RandomCrop(shapes[2:], places[2:])(image, 24))
    assert not np.array_equal(all_of_them, centre_crop(image, 24))


def test_augmented_photographs_depend_on_nothing_but_indices_and_draws():
    # The first takes longest to decode, so that several threads do not end in the order they began.
    images = [noise(*(2 * [400 if label == 0 else 40 + label]), seed=label) for label in range(9)]
    indices = np.array([0, 8, 3, 3, 5, 1, 7, 2])

    def augmented(threads, seed):
        return split_of(images, threads).augmented(indices, np.random.default_rng(seed), 16, 4)

    expected, labels = augmented(1, 0)
    assert (expected.shape, expected.dtype) == ((8, 16, 16, 3), np.uint8)
    assert (labels.tolist(), labels.dtype) == (indices.tolist(), np.int32)
    for threads in 2, 5:
        again, labels = augmented(threads, 0)
        np.testing.assert_array_equal(again, expected)
        assert labels.tolist() == indices.tolist()
    assert not np.array_equal(expected[2], expected[3])  # one image, two draws
    assert not (augmented(2, 1)[0] == expected).all((1, 2, 3)).any()


def test_augmented_photographs_keep_their_labels():
    colours = [(31 * label % 256, 17 * label, 255 - 20 * label) for label in range(10)]
    split = split_of([PIL.Image.new("RGB", (50 - 3 * label, 30), colours[label]) for label in range(10)], threads=4)
    indices = np.random.default_rng(1).permutation(10)
    images, labels = split.augmented(indices, np.random.default_rng(0), 8, 0)
    assert labels.tolist() == indices.tolist()
    np.testing.assert_array_equal(images, np.tile(np.array(colours)[indices][:, None, None], (1, 8, 8, 1)))


@pytest.mark.parametrize(("size", "max_shift"), [(5, 0), (3, 0), (5, 1), (4, 2), (7, 1)])
def test_augmented_small_images_are_all_the_windows_of_the_padded_ones(size, max_shift):
    random = np.random.default_rng(0)
    split = MemorySplit(SMALL, random.integers(1, 256, (3, 5, 5, 2), np.uint8), np.array([4, 6, 8], np.int32))
    side = 5 + 2 * max_shift
    padded = np.zeros((3, side, side, 2), np.uint8)
    padded[:, max_shift : max_shift + 5, max_shift : max_shift + 5] = split.images
    offsets = list(itertools.product(range(side - size + 1), repeat=2))
    windows = [
        {image[row : row + size, column : column + size].tobytes(): (row, column) for row, column in offsets}
        for image in padded
    ]
    indices = random.integers(0, 3, 600)
    images, labels = split.augmented(indices, np.random.default_rng(1), size, max_shift)
    assert (images.shape, images.dtype) == ((600, size, size, 2), np.uint8)
    assert labels.tolist() == [(4, 6, 8)[index] for index in indices]
    seen = {windows[index][image.tobytes()] for index, image in zip(indices, images, strict=True)}
    assert seen == set(offsets)
    if max_shift == 0:
        assert images.min() > 0


@pytest.mark.parametrize("length", [0, 1, 3, 20])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_is_made_ahead_keeps_its_order(length, count):
    assert list(ahead(iter(range(length)), count)) == list(range(length))


def test_an_exception_while_making_ahead_reaches_the_consumer():
    def source():
        yield from range(3)
        raise OSError("the disk is gone")

    items = ahead(source())
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def test_a_consumer_that_stops_early_does_not_hang():
    made = itertools.count()
    before = set(threading.enumerate())

    def consume():
        items = ahead(made)
        assert [next(items), next(items)] == [0, 1]
        items.close()

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(PATIENCE)
    assert not consumer.is_alive()
    assert set(threading.enumerate()) <= before
    assert next(made) <= 4


@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_more_is_made_ahead_than_was_asked_for(count):
    asked, makers, too_early = 0, set(), []
    full = threading.Semaphore(0)

    def source():
        for item in range(20):
            makers.add(threading.get_ident())
            if item >= asked + count:
                too_early.append(item)
            full.release()
            yield item

    items = ahead(source(), count)
    for asked in range(1, 15):
        assert next(items) == asked - 1
        # As many as are allowed are made before any of them is asked for.
        for _ in range(count + 1 if asked == 1 else 1):
            assert full.acquire(timeout=PATIENCE)
    items.close()
    assert too_early == []
    assert len(makers) == 1
    assert threading.get_ident() not in makers


def test_a_broken_photograph_is_named():
    split = EncodedSplit(SMALL, 2, lambda indices: [(b"no image", 0)] * len(indices), "photograph {}".format)
    with one_line_error(RunError, "config.data_dir", "photograph 1", "cannot be decoded"):
        split.examples(np.array([1]))


def test_photographs_that_cannot_be_read_are_no_fault_of_the_run():
    def read(indices):
        raise FileNotFoundError(2, "No such file", "photograph.jpg")

    with one_line_error(RunError, "config.data_dir", "cannot be read", "photograph.jpg"):
        EncodedSplit(SMALL, 2, read, "photograph {}".format).examples(np.array([1]))
