"""Detector.stream: a result per frame, and the source closed however the loop ends."""

import cv2
import numpy as np
import pytest

from omniad_edge import Detector
from omniad_edge.cameras.array_source import ArraySource
from omniad_edge.errors import CameraError, InputError
from omniad_edge.frame import Frame


class TriggeredCamera(ArraySource):
    """Gives the next array when it is triggered; lost after the last."""

    live = software_trigger = True
    triggers = closes = 0

    def read(self, timeout_s: float) -> Frame | None:
        assert self.triggers, "read without a trigger"
        if self.triggers > len(self.arrays):
            raise CameraError("lost")
        return super().read(timeout_s)

    def trigger(self) -> None:
        self.triggers += 1

    def close(self) -> None:
        self.closes += 1
        super().close()


@pytest.fixture(scope="module")
def detector(small_bundle) -> Detector:
    return Detector(small_bundle)


@pytest.fixture
def images(rng) -> list[np.ndarray]:
    return list(rng.integers(0, 256, (3, 50, 70, 3), np.uint8))


def test_results_are_those_of_calls_and_hold_their_frame(detector, images, tmp_path):
    for number, image in enumerate(images):
        cv2.imwrite(str(tmp_path / f"{number}.png"), image)
    product = detector.products[0]
    results = list(detector.stream(str(tmp_path), product))
    assert [result.pred_score for result in results] == [detector(image, product).pred_score for image in images]
    for number, (result, image) in enumerate(zip(results, images, strict=True)):
        np.testing.assert_array_equal(result.frame.image, image)
        assert result.frame.item == str(tmp_path / f"{number}.png")
        assert result.draw(result.frame.image).shape == image.shape
    assert detector(images[0]).frame is None


def test_a_triggered_camera_is_triggered_for_each_result(detector, images):
    camera = TriggeredCamera(images)
    results = []
    with pytest.raises(CameraError, match="lost"):
        for result in detector.stream(camera):
            results.append(result)
            assert camera.triggers == len(results)
    assert len(results) == 3 and camera.closes == 1


def test_leaving_the_loop_closes_the_source(detector, images):
    camera = TriggeredCamera(images)
    results = detector.stream(camera)
    next(results)
    results.close()
    assert camera.closes == 1 and camera.triggers == 1


def test_mistakes(detector, images):
    with pytest.raises(InputError, match="A source is one of"):
        next(detector.stream("nowhere/at/all"))
    camera = TriggeredCamera(images)
    with pytest.raises(InputError, match="product: expected one of"):
        next(detector.stream(camera, "no such product"))
    assert camera.closes == 1
