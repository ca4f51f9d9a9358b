import csv
import json

import cv2
import numpy as np
import pytest

from omniad_edge import products
from omniad_edge.errors import DataError, InputError
from omniad_edge.products import DEFECTS, GOOD, PRODUCTS, render, write_conveyor, write_line

EVERY_DEFECT = [(product, kind) for product in PRODUCTS for kind in DEFECTS[product]]
SMALL_LINE = {"n_train": 2, "n_calibration": 1, "n_test_good": 1, "n_test_per_kind": 1, "size_px": 32}


def make(product, seed, kind=GOOD, size_px=128):
    return render(product, np.random.default_rng(seed), kind, size_px)


def line_files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_kinds_occur_and_every_product_has_at_least_four():
    assert set(DEFECTS) == set(PRODUCTS)
    assert len(set().union(*DEFECTS.values())) == 5
    assert all(len(kinds) >= 4 for kinds in DEFECTS.values())


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("size_px", [32, 97, 128, 300])
def test_good_part_has_the_asked_shape_and_an_empty_mask(product, size_px):
    image, mask = make(product, 0, size_px=size_px)
    assert image.shape == (size_px, size_px, 3)
    assert image.dtype == np.uint8
    assert mask.shape == (size_px, size_px)
    assert mask.dtype == bool
    assert not mask.any()
    assert image.std() > 15  # a part is there


@pytest.mark.parametrize(("product", "kind"), [*((p, GOOD) for p in PRODUCTS), *EVERY_DEFECT])
def test_same_seed_same_bits_another_seed_another_part(product, kind):
    first, again, other = (make(product, seed, kind) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert (first[0] != other[0]).mean() > 0.5
    if kind != GOOD:
        assert (first[1] != other[1]).any()


@pytest.mark.parametrize("product", PRODUCTS)
def test_the_kind_does_not_change_what_the_generator_gives_next(product):
    after = []
    for kind in (GOOD, *DEFECTS[product]):
        rng = np.random.default_rng(0)
        render(product, rng, kind, 32)
        after.append(rng.integers(2**63))
    assert len(set(after)) == 1


@pytest.mark.parametrize(("product", "kind"), EVERY_DEFECT)
def test_mask_is_where_the_defect_changes_the_good_part(product, kind):
    for seed in range(8):
        good, _ = make(product, seed)
        image, mask = make(product, seed, kind)
        assert image.shape == good.shape
        change = np.abs(image.astype(int) - good).max(axis=2)
        near = cv2.dilate(mask.astype(np.uint8), np.ones((5, 5))).astype(bool)
        strong = change > 25
        assert strong.any(), seed
        assert (strong & near).sum() >= 0.8 * strong.sum(), seed
        # Outside the mask even the sensor noise is the same, but for what is below the mask's threshold.
        assert change[~near].max() <= 15, seed
        assert change[mask].mean() > 15, seed
        assert (change[mask] > 8).mean() > 0.6, seed
        assert 20 <= mask.sum() <= 0.15 * mask.size, seed
        y, x = np.nonzero(mask)
        assert 0.04 <= max(np.ptp(x), np.ptp(y)) / len(mask) <= 0.40, seed


@pytest.mark.parametrize("product", PRODUCTS)
def test_good_parts_vary_in_light_and_pose_but_moderately(product):
    parts = np.stack([make(product, seed)[0] for seed in range(24)]).astype(np.float64)
    brightness = parts.mean(axis=(1, 2, 3))
    assert 0.015 < brightness.std() / brightness.mean() < 0.06
    assert np.median(parts.std(axis=0)) > 2
    blurred = np.stack([cv2.GaussianBlur(part, (0, 0), 3) for part in parts / brightness[:, None, None, None]])
    assert np.median(blurred.std(axis=0) / blurred.mean(axis=0)) < 0.06


@pytest.mark.parametrize("product", PRODUCTS)
def test_mean_brightness_does_not_give_the_defects_away(product):
    good = np.array([make(product, [1, i], size_px=64)[0].mean() for i in range(60)])
    bad = np.array([make(product, [2, i], kind, 64)[0].mean() for kind in DEFECTS[product] for i in range(12)])
    auroc = (bad[:, None] > good).mean()
    assert 0.3 < auroc < 0.7


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_plain_look_at_the_nearest_good_parts_finds_most_defects(product):
    """Distance of blurred pixels to the nearest of 16 good parts, each shifted by up to one of 64 pixels."""
    known = [look(make(product, [1, i])[0]) for i in range(16)]
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    known = np.stack([np.roll(image, shift, (0, 1)) for image in known for shift in shifts])

    def score(image):
        nearest = ((known - look(image)) ** 2).sum(axis=3).min(axis=0)[2:-2, 2:-2]
        return np.sort(np.sqrt(nearest), axis=None)[-6:].mean()

    good = np.array([score(make(product, [2, i])[0]) for i in range(8)])
    bad = np.array([score(make(product, [3, i], kind)[0]) for kind in DEFECTS[product] for i in range(4)])
    assert (bad[:, None] > good).mean() > 0.8


def look(image):
    tone = np.log(cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32) + 25)
    return cv2.GaussianBlur(tone - tone.mean(axis=(0, 1)), (0, 0), 0.7)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("wheel",), "gear, board, cap"),
        ((None,), "gear, board, cap"),
        (("board", "dent"), "good, scratch, stain, missing_part, wrong_colour for board"),
        (("gear", "rust"), "good, scratch, dent"),
        (("gear", GOOD, 31), "from 32 to 1024, got 31"),
        (("gear", GOOD, 1025), "from 32 to 1024, got 1025"),
        (("gear", GOOD, 64.0), "whole number"),
        (("gear", GOOD, (64, 64)), "whole number"),
    ],
)
def test_render_refuses_and_lists_the_choices(arguments, words, rng):
    product, *rest = arguments
    with pytest.raises(InputError, match=words):
        render(product, rng, *rest)


def test_render_refuses_a_seed_instead_of_a_generator():
    with pytest.raises(InputError, match=r"Generator, got int; use numpy\.random\.default_rng"):
        render("gear", 0)


def test_line_has_the_layout_of_mvtec_and_a_calibration_tree(tmp_path):
    write_line(tmp_path, **SMALL_LINE)
    expected = {"params.json"}
    for product in PRODUCTS:
        expected |= {f"data/{product}/train/good/{i:03d}.png" for i in range(2)}
        expected |= {f"data/{product}/test/good/000.png", f"calibration/{product}/good/000.png"}
        expected |= {f"data/{product}/test/{kind}/000.png" for kind in DEFECTS[product]}
        expected |= {f"data/{product}/ground_truth/{kind}/000_mask.png" for kind in DEFECTS[product]}
    files = line_files(tmp_path)
    assert set(files) == expected
    pictures = [content for name, content in files.items() if name.endswith(".png") and "ground_truth" not in name]
    assert len(set(pictures)) == len(pictures)  # no picture is in two splits
    mask = cv2.imread(str(tmp_path / "data/gear/ground_truth/stain/000_mask.png"), cv2.IMREAD_UNCHANGED)
    assert mask.shape == (32, 32)
    assert set(np.unique(mask)) == {0, 255}


def test_complete_line_is_recognised(tmp_path, monkeypatch):
    write_line(tmp_path, **SMALL_LINE)
    before = line_files(tmp_path)
    monkeypatch.setattr(products, "render", lambda *args: pytest.fail("rendered again"))
    write_line(tmp_path, **SMALL_LINE)
    assert line_files(tmp_path) == before


def test_line_which_lost_a_file_or_was_interrupted_is_written_again(tmp_path, monkeypatch):
    write_line(tmp_path, **SMALL_LINE)
    before = line_files(tmp_path)
    (tmp_path / "data/cap/ground_truth/dent/000_mask.png").unlink()
    write_line(tmp_path, **SMALL_LINE)
    assert line_files(tmp_path) == before

    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return render(*args)

    monkeypatch.setattr(products, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_line(tmp_path, **SMALL_LINE, seed=1)
    monkeypatch.undo()
    assert line_files(tmp_path) != before
    write_line(tmp_path, **SMALL_LINE)
    assert line_files(tmp_path) == before


def test_line_of_other_parameters_is_replaced(tmp_path):
    write_line(tmp_path, **SMALL_LINE)
    before = line_files(tmp_path)
    write_line(tmp_path, **{**SMALL_LINE, "n_train": 1})
    after = line_files(tmp_path)
    assert set(before) - set(after) == {f"data/{product}/train/good/001.png" for product in PRODUCTS}
    assert all(after[name] == before[name] for name in after if name.endswith(".png"))
    write_line(tmp_path, **SMALL_LINE, seed=1)
    other = line_files(tmp_path)
    assert all(other[name] != before[name] for name in other if "ground_truth" not in name)


@pytest.mark.parametrize("params", [None, "{", '{"batch_size": 8}'])
def test_line_does_not_remove_somebody_elses_data(tmp_path, params):
    photo = tmp_path / "data" / "photo.png"
    photo.parent.mkdir()
    photo.write_bytes(b"mine")
    if params is not None:
        (tmp_path / "params.json").write_text(params)
    with pytest.raises(DataError, match="choose another folder"):
        write_line(tmp_path, **SMALL_LINE)
    assert photo.read_bytes() == b"mine"


def test_line_leaves_other_files_of_the_folder_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    write_line(tmp_path, **{**SMALL_LINE, "n_test_per_kind": 0})
    write_line(tmp_path, **SMALL_LINE)
    assert (tmp_path / "notes.txt").read_text() == "keep"
    assert json.loads((tmp_path / "params.json").read_text())["complete"] is True


@pytest.mark.parametrize(
    "wrong", [{"n_train": -1}, {"n_calibration": 2.5}, {"n_test_good": True}, {"size_px": 16}, {"seed": -1}]
)
def test_line_refuses_wrong_numbers_before_it_writes(tmp_path, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        write_line(tmp_path, **{**SMALL_LINE, **wrong})
    assert not any(tmp_path.iterdir())


def read_film(path):
    film = cv2.VideoCapture(str(path))
    frames = []
    while True:
        ok, frame = film.read()
        if not ok:
            return frames, film.get(cv2.CAP_PROP_FPS)
        frames.append(frame)


def test_conveyor_has_a_row_of_truth_for_every_frame(tmp_path):
    write_conveyor(tmp_path / "line.mp4", tmp_path / "truth.csv", n_parts=4, size_px=64, fps=12)
    frames, fps = read_film(tmp_path / "line.mp4")
    with (tmp_path / "truth.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(frames) == len(rows) == 4 * 5 * len(PRODUCTS)
    assert fps == 12
    assert frames[0].shape == (64, 64, 3)
    assert [int(row["frame"]) for row in rows] == list(range(len(rows)))
    assert [row["product"] for row in rows] == [product for product in PRODUCTS for _ in range(20)]
    for i in range(0, len(rows), 5):
        assert len({row["kind"] for row in rows[i : i + 5]}) == 1
        assert rows[i]["kind"] in (GOOD, *DEFECTS[rows[i]["product"]])
    for product in PRODUCTS:
        assert 0 < sum(row["kind"] != GOOD for row in rows if row["product"] == product) <= 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["line.mp4", "truth.csv"]


def test_conveyor_moves_the_part_and_repeats_with_the_seed(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_conveyor(tmp_path / f"{name}.mp4", tmp_path / f"{name}.csv", n_parts=1, seed=seed, size_px=128)
    (a, _), (b, _), (c, _) = (read_film(tmp_path / f"{name}.mp4") for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert (np.array(a) != np.array(c)).mean() > 0.5
    first, last = (np.float32(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)) for frame in (a[0], a[4]))
    (x, y), _ = cv2.phaseCorrelate(first, last)
    assert x == pytest.approx(0.010 * 128, abs=0.5)
    assert y == pytest.approx(0, abs=1)


def test_conveyor_says_when_opencv_cannot_write_films(tmp_path, monkeypatch):
    class NoFilm:
        def __init__(self, *args):
            pass

        def isOpened(self):
            return False

    monkeypatch.setattr(cv2, "VideoWriter", NoFilm)
    with pytest.raises(DataError, match="opencv-python-headless"):
        write_conveyor(tmp_path / "line.mp4", tmp_path / "truth.csv", n_parts=1, size_px=64)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"path": "line.avi"}, r"\.mp4, got 'line\.avi'"),
        ({"n_parts": 0}, "n_parts"),
        ({"fps": 0}, "fps"),
        ({"size_px": 8}, "size_px"),
        ({"seed": -1}, "seed"),
    ],
)
def test_conveyor_refuses_wrong_arguments(tmp_path, wrong, words):
    arguments = {"path": "line.mp4", "n_parts": 1, "size_px": 64, **wrong}
    with pytest.raises(InputError, match=words):
        write_conveyor(tmp_path / arguments.pop("path"), tmp_path / "truth.csv", **arguments)
    assert not any(tmp_path.iterdir())
