"""Recognising products, on made-up embeddings and with a real export."""

import shutil
from dataclasses import asdict, replace

import cv2
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from records import make_verdict, of_another_product

from omniad_edge import Detector, Line
from omniad_edge import detector as detector_module
from omniad_edge.bundle import read_bundle, set_thresholds, write_bundle
from omniad_edge.cli import main
from omniad_edge.engine import CpuEngine
from omniad_edge.errors import BundleError
from omniad_edge.recognition import (
    MARGIN,
    RECOGNITION,
    ProductSpace,
    Recogniser,
    embedding_channels,
    fit,
    limit_of,
    other_light,
    read_recogniser,
    shown_product,
)
from omniad_edge.verdict import ACCEPT, REJECT, combine, record_schema

D, N = 40, 60
PRODUCTS = ("gear", "cap", "board")


def embeddings(rng, product: int, count: int = N) -> np.ndarray:
    """Around a place of its own; the channels rise and fall together with the light, more than by themselves."""
    mean = np.random.default_rng(product).uniform(0.5, 1.5, D)
    values = mean * (1 + 0.1 * rng.standard_normal((count, 1))) + 0.02 * rng.standard_normal((count, D))
    return values.astype(np.float32)


@pytest.fixture
def recogniser(rng) -> Recogniser:
    space = fit({name: embeddings(rng, index) for index, name in enumerate(PRODUCTS)})
    fresh = {name: space.own_distances(embeddings(rng, index), name) for index, name in enumerate(PRODUCTS)}
    return Recogniser(space, {name: limit_of(distances) for name, distances in fresh.items()})


def test_good_images_are_recognised_in_any_light_and_others_are_not(recogniser, rng):
    for index, name in enumerate(PRODUCTS):
        ratios = recogniser.ratios(embeddings(rng, index, 400))
        assert (
            np.mean([shown_product(ratio) != name for ratio in ratios])
            <= recogniser.limits[name].false_unknown_bound
        )
    other = recogniser.ratios(embeddings(rng, 7))
    assert all(shown_product(ratio) == "" for ratio in other)


def test_the_expected_product_is_shown_if_it_fits_and_else_the_nearest():
    assert shown_product({"gear": 0.9, "cap": 0.2}, "gear") == "gear"
    assert shown_product({"gear": 0.9, "cap": 0.2}) == "cap"
    assert shown_product({"gear": 1.1, "cap": 0.2}, "gear") == "cap"
    assert shown_product({"gear": 1.1, "cap": 1.2}, "gear") == ""
    assert shown_product({"gear": float("nan"), "cap": 1.2}, "gear") == ""


def test_a_limit_has_the_bound_of_its_largest_distance():
    limit = limit_of(np.linspace(0.5, 2, 299))
    assert limit.limit == 2 * MARGIN and limit.n_good == 299
    assert 0.0099 < limit.false_unknown_bound <= 0.01
    assert limit_of([1.0, 2.0], used_for_fit=True).false_unknown_bound is None


def test_few_images_and_silent_channels_are_no_trouble(rng):
    one = embeddings(rng, 0, 2)
    one[:, 3] = 0
    space = fit({"gear": one})
    assert np.isfinite(space.whitening).all()
    faint = one[:1].copy()
    faint[:, 3] = 1e-6
    np.testing.assert_allclose(space.distances(faint), space.distances(one[:1]), rtol=1e-2)


def test_a_space_is_the_same_from_its_bytes(recogniser, rng):
    again = ProductSpace.from_bytes(recogniser.space.to_bytes())
    some = embeddings(rng, 2)
    assert again.products == PRODUCTS and (again.distances(some) == recogniser.space.distances(some)).all()


@pytest.mark.parametrize(
    "change", [{"means": np.zeros((2, D), np.float32)}, {"centre": np.full(D, np.nan, np.float32)}, {}], ids=str
)
def test_a_space_that_is_none_is_refused(recogniser, change):
    content = replace(recogniser.space, **change).to_bytes()
    with pytest.raises(BundleError, match=r"recognition.npz is not as omniad-export writes it: .*; export again"):
        ProductSpace.from_bytes(content if change else content[:50])


def test_other_light_moves_no_pixel(rng):
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:5, 3:7] = 200
    lit = other_light(image, rng)
    assert lit.shape == image.shape and lit.dtype == np.uint8 and (lit != image).any()
    assert ((lit > 100).all(2) == (image > 100).all(2)).all()


@pytest.mark.parametrize("rule", ["any", "all"])
def test_one_view_of_another_product_rejects_the_part(rule):
    good = make_verdict(1, 0.2).results[0]
    assert combine((good, good), rule) == ACCEPT
    assert combine((good, of_another_product()), rule) == REJECT
    assert combine((of_another_product("cap"), good), rule) == REJECT


def test_faults_are_said_in_words():
    assert make_verdict(1, 0.2).results[0].product_fault == ""
    assert of_another_product().product_fault == "unknown product"
    assert of_another_product("cap").product_fault == "wrong product: shows cap, expected gear"
    assert not of_another_product().is_defective


# ---- a detector; the frame's first pixel says what it shows


class Engine(CpuEngine):
    backend, precision, reason, input_size = "test", "fp32", "for this test", (64, 64)
    embeds = True

    def run(self, pixels):
        return self.run_all(pixels)[:2]

    def run_all(self, pixels):
        shown = [embeddings(np.random.default_rng(0), int(image[0, 0, 0]), 1)[0] for image in pixels]
        return np.full(pixels.shape[:3], 0.1, np.float32), np.full(len(pixels), 0.1, np.float32), np.array(shown)


def frame(product: int) -> np.ndarray:
    picture = np.random.default_rng(product).integers(0, 256, (64, 64, 3), np.uint8)
    picture[0, 0] = product
    return picture


NOTHING = 7
GEAR, CAP, BOARD = range(3)


@pytest.fixture
def bundle(small_bundle, recogniser, tmp_path):
    """Whose board has the lowest threshold, above every score all the same."""
    contents, path = read_bundle(small_bundle), tmp_path / "line.omniad"
    limits = {name: asdict(limit) for name, limit in recogniser.limits.items()}
    parts = contents.parts | {RECOGNITION: recogniser.space.to_bytes()}
    write_bundle(path, contents.manifest | {"recognition": limits}, parts)
    thresholds = {"gear": 0.5, "cap": 0.4, "board": 0.3}
    set_thresholds(
        path, {n: contents.products[n].with_threshold(t) for n, t in thresholds.items()}, "for this test"
    )
    return path


@pytest.fixture
def detector(bundle) -> Detector:
    return Detector(bundle, engine=Engine(None))


def test_the_product_is_recognised_and_its_threshold_applies(detector):
    assert detector.not_recognised == ""
    for index, (name, threshold) in enumerate({"gear": 0.5, "cap": 0.4, "board": 0.3}.items()):
        result = detector(frame(index))
        assert (result.product, result.product_shown, result.product_assumed) == (name, name, False)
        assert result.threshold == threshold and result.product_distance <= 1
        assert result.pred_label == detector(frame(index), name).pred_label == "good"


def test_what_is_no_product_is_unknown_and_never_good(detector):
    unknown = detector(frame(NOTHING))
    assert (unknown.pred_label, unknown.product_shown) == ("unknown product", "")
    assert (unknown.product, unknown.product_assumed) == ("board", True) and unknown.product_distance > 1
    named = detector(frame(NOTHING), "gear")
    assert (named.pred_label, named.product, named.product_assumed) == ("unknown product", "gear", False)


def test_another_product_than_named_is_said(detector):
    cap, gear = detector([frame(CAP), frame(GEAR)], "gear")
    assert (cap.pred_label, gear.pred_label) == ("wrong product", "good")
    assert cap.product_fault == "wrong product: shows cap, expected gear"
    assert cap.to_dict()["product_shown"] == "cap" and cap.product_distance > 1 >= gear.product_distance


def test_a_line_rejects_what_it_does_not_know(detector):
    verdicts = list(Line(detector, [frame(GEAR), frame(CAP), frame(NOTHING)], product="gear"))
    assert [verdict.decision for verdict in verdicts] == [ACCEPT, REJECT, REJECT]
    words = ["", "wrong product: shows cap, expected gear", "unknown product"]
    assert [verdict.reason for verdict in verdicts] == words
    for verdict in verdicts:
        Draft202012Validator(record_schema()).validate(verdict.to_dict())


def test_without_recognition_it_is_said_and_nothing_is_looked_at(bundle, tmp_path):
    contents = read_bundle(bundle)
    parts = {name: part for name, part in contents.parts.items() if name != RECOGNITION}
    write_bundle(tmp_path / "old.omniad", contents.manifest | {"recognition": {}}, parts)
    old = Detector(tmp_path / "old.omniad", engine=Engine(None))
    assert old.not_recognised == "the bundle cannot recognise products; export it again"
    result = old(frame(NOTHING))
    assert result.pred_label == "good" and result.product_assumed
    assert result.product_shown is None and result.product_distance is None


def test_an_engine_without_embeddings_says_so(bundle):
    class Plain(Engine):
        embeds = False

        def run_all(self, pixels):
            return *super().run_all(pixels)[:2], None

    plain = Detector(bundle, engine=Plain(None))
    assert plain.not_recognised.startswith("the test engine gives no embedding")
    assert plain(frame(NOTHING)).product_shown is None


def test_means_and_limits_belong_together(bundle):
    contents = read_bundle(bundle)
    write_bundle(bundle, contents.manifest | {"recognition": {}}, contents.parts)
    with pytest.raises(BundleError, match="different products"):
        Detector(bundle, engine=Engine(None))
    parts = {name: part for name, part in contents.parts.items() if name != RECOGNITION}
    write_bundle(bundle, contents.manifest, parts)
    with pytest.raises(BundleError, match=f"{RECOGNITION} is missing"):
        Detector(bundle, engine=Engine(None))


def test_predict_and_info_say_it(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(detector_module, "open_engine", lambda *arguments: Engine(None))
    cv2.imwrite(str(tmp_path / "part.png"), frame(CAP))
    assert main(["predict", str(bundle), str(tmp_path / "part.png"), "--product", "gear"]) == 0
    captured = capsys.readouterr()
    assert "wrong product: shows cap, expected gear" in captured.out and "1 wrong product" in captured.err
    assert main(["info", str(bundle)]) == 0
    assert "recognised  cap: at most 4.9 % false unknowns at 95 % confidence, from 60" in capsys.readouterr().out


# ---- an export


def test_an_export_has_a_limit_of_every_product(small_bundle):
    contents = read_bundle(small_bundle)
    assert set(contents.recognition) == set(PRODUCTS) == set(read_recogniser(contents).space.products)
    assert all(limit.false_unknown_bound == pytest.approx(0.95) for limit in contents.recognition.values())
    assert embedding_channels(contents) == 64 + 128 + 256
    engine = contents.manifest["parity"]["engines"]["onnxruntime fp32"]
    assert 0 < engine["measured"]["product_error"] <= engine["limits"]["product_error"]


def test_calibration_sets_limits_too(small_bundle, small_run, tmp_path, capsys):
    path = tmp_path / "line.omniad"
    path.write_bytes(small_bundle.read_bytes())
    assert main(["calibrate", str(path), "--good", str(small_run.data.parent / "calibration")]) == 0
    assert "recognised  gear: at most 53 % false unknowns at 95 %" in capsys.readouterr().out
    assert {limit.n_good for limit in read_bundle(path).recognition.values()} == {4}


def test_an_image_of_another_product_cannot_move_the_limit(small_bundle, small_run, tmp_path, capsys):
    path, good = tmp_path / "line.omniad", tmp_path / "calibration"
    path.write_bytes(small_bundle.read_bytes())
    shutil.copytree(small_run.data.parent / "calibration", good)
    (cap, *_) = (good / "cap" / "good").iterdir()
    shutil.copy(cap, good / "gear" / "good" / "stray.png")
    before = path.read_bytes()
    assert main(["calibrate", str(path), "--good", str(good)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "1 show another: " in said and "gear/good/stray.png shows cap" in said
    assert path.read_bytes() == before
