"""Is a frame worth inspecting? Black, over-exposed, frozen and out-of-focus frames are the camera's fault, not
the part's, and must not be judged as a part."""

from collections import deque

import cv2
import numpy as np

from ..frame import Frame

BLACK = "black frame"
OVER_EXPOSED = "over-exposed frame"
FROZEN = "frozen frame"
OUT_OF_FOCUS = "out-of-focus frame"

ROWS = 16  # looked at in a frame, over its height
DARK_LEVEL = 24  # a covered lens: cameras and video put black at 0 to 16, and noise comes on top
HOT_SHARE = 0.0005  # of values that may be brighter in a black frame: hot pixels
SATURATED_LEVEL = 250
SATURATED_SHARE = 0.98  # a back-lit part covers more than the rest

# A sensor's noise makes every frame new. Decoded video of a still scene may repeat itself, but not beyond a key
# frame, which codes the picture afresh; cameras send one every 1 to 4 s.
FROZEN_FRAMES = 3
FROZEN_S = 5.0

FAR_PX = 16  # edges are compared over 2 px (fine) and over this distance (coarse)
STEEPEST = 0.998  # quantile of the differences: the edges of a part, even one that fills little of the frame
GAUSSIAN = 3.09 / 0.674  # that quantile of noise alone, by its median
MIN_DETAIL = 12  # grey levels of the coarse edges; below, there is nothing in the frame to be sharp
HISTORY = 200  # healthy frames remembered
MIN_HISTORY = 20
RENEW_EVERY = 10  # healthy frames from one set of limits to the next: sorting the history costs
STEEP_DROP = SHARP_DROP = 0.5  # of the median
LOW, LOW_DROP = 0.05, 0.7  # quantile of the history, and the part of it
ADAPT_FRAMES, ADAPT_S = 50, 60.0


class FaultDetector:
    """Looks at every frame of one camera, in that camera's thread.

    A black frame is dark but for a few hot pixels; an over-exposed one is white in at least 98 % of its values,
    as is the empty picture of a back light. A frozen one, of live sources only, is the same picture in at least
    3 frames over at least 5 s.

    Out of focus is relative to the last 200 healthy frames of this camera, once there are 20. Two things are
    measured: how steep the steepest edges are over 2 px, and, without the noise, their share of what the same
    frame changes over 16 px, which does not depend on contrast. A frame is out of focus if both are well below
    their medians (half) and below nearly all healthy frames (0.7 of the 5 % quantile), so a camera that sees
    different products is judged by the softest of them. A new product that is softer still joins the history
    after 50 frames called out of focus over at least 60 s, and is healthy from then on. The price: a lens that
    lost its focus is reported for that long, and then taken as the new normal. Not found are a slow drift, blur
    of less than about 4 px (standard deviation), and blur so strong that only noise is left.

    Cost, cv2 on one thread, median of 2,000 frames from 8 buffers, on a two-core AMD EPYC server with a load of 3
    to 5 from other programs: 0.09 ms at 640x480, 0.16 to 0.19 ms at 1920x1080, 0.31 ms at 3840x2160.
    """

    def __init__(self, live: bool) -> None:
        self._live = live
        self._shape: tuple[int, ...] = ()
        self._rows: np.ndarray | None = None
        self._since_s, self._repeats = 0.0, 0
        self._fault = ""  # of the picture, were it not frozen
        self._start_history()

    def check(self, frame: Frame) -> str:
        """ "" if the frame can be inspected, else "black frame", "over-exposed frame", "frozen frame" or
        "out-of-focus frame"."""
        image = frame.image
        if image.shape != self._shape:
            self._shape, self._rows = image.shape, None
            self._start_history()
        rows = image[:: -(-len(image) // ROWS)].copy()  # a camera may fill the same memory again
        if self._rows is not None and np.array_equal(rows, self._rows):
            self._repeats += 1
        else:
            self._rows, self._since_s, self._repeats = rows, frame.captured_s, 1
            self._fault = brightness_fault(rows) or self._focus_fault(frame)
        still_s = frame.captured_s - self._since_s
        frozen = self._live and self._repeats >= FROZEN_FRAMES and still_s >= FROZEN_S
        return FROZEN if frozen and not self._fault else self._fault

    def _start_history(self) -> None:
        self._history: deque[tuple[float, float]] = deque(maxlen=HISTORY)
        self._limits: tuple[float, float] | None = None
        self._renew_in = MIN_HISTORY
        self._suspects: list[tuple[float, float]] = []
        self._suspect_since_s = 0.0
        self._healthy_run = 0

    def _focus_fault(self, frame: Frame) -> str:
        sharpness = edge_sharpness(frame.image)
        if sharpness is None:
            return ""
        if self._limits and all(now < limit for now, limit in zip(sharpness, self._limits, strict=True)):
            self._suspect(sharpness, frame.captured_s)
            return OUT_OF_FOCUS
        self._healthy_run += 1
        if self._healthy_run >= HISTORY:
            self._suspects.clear()
        self._history.append(sharpness)
        self._renew_in -= 1
        if self._renew_in <= 0:
            self._renew_limits()
        return ""

    def _suspect(self, sharpness: tuple[float, float], captured_s: float) -> None:
        if not self._suspects:
            self._suspect_since_s = captured_s
        self._healthy_run = 0
        if len(self._suspects) < ADAPT_FRAMES:
            self._suspects.append(sharpness)
        if len(self._suspects) == ADAPT_FRAMES and captured_s - self._suspect_since_s >= ADAPT_S:
            self._history.extend(self._suspects)
            self._suspects.clear()
            self._renew_limits()

    def _renew_limits(self) -> None:
        """Both limits are the lower of a share of the median and a share of the low quantile."""
        steepness, share = (sorted(values) for values in zip(*self._history, strict=True))
        middle, low = len(steepness) // 2, int(LOW * len(steepness))
        self._limits = (
            min(STEEP_DROP * steepness[middle], LOW_DROP * steepness[low]),
            min(SHARP_DROP * share[middle], LOW_DROP * share[low]),
        )
        self._renew_in = RENEW_EVERY


def brightness_fault(rows: np.ndarray) -> str:
    """rows: (n, W, 3) uint8 BGR -> "black frame", "over-exposed frame" or "".

    Every channel counts: under a red lamp two of three are dark in a healthy frame.
    """
    values = rows.reshape(-1)[::13]  # no multiple of 3: all channels in turn
    if np.count_nonzero(values > DARK_LEVEL) <= HOT_SHARE * values.size:
        return BLACK
    if np.count_nonzero(values >= SATURATED_LEVEL) >= SATURATED_SHARE * values.size:
        return OVER_EXPOSED
    return ""


def edge_sharpness(image: np.ndarray) -> tuple[float, float] | None:
    """How steep the steepest edges of (H, W, 3) uint8 BGR are, in grey levels over 2 px; and, without the noise,
    the share that is of their change over 16 px: near 1 for a sharp step, 2/16 or less for a very soft one.

    None if the frame shows no detail to judge. Green only, in 16 rows and their neighbours below.
    """
    height, width = image.shape[:2]
    if height < 2 * FAR_PX or width < 4 * FAR_PX:
        return None
    end = height - FAR_PX
    step, even = -(-end // ROWS), width // 2 * 2
    green = np.stack([image[first : end + first : step, :even, 1] for first in (0, 2, FAR_PX)])
    # The mean of every two columns halves the noise's power. Two bytes at a time: cv2.resize took twice as long.
    pairs = green.view(np.uint16)
    here, below, far_below = ((pairs >> 1) & 0x7F).astype(np.uint8) + (pairs >> 9).astype(np.uint8)
    far = FAR_PX // 2
    coarse = counted(cv2.absdiff(here[:, far:], here[:, :-far]), cv2.absdiff(here, far_below))
    fine = counted(cv2.absdiff(here[:, 1:], here[:, :-1]), cv2.absdiff(here, below))
    steep = quantile(fine, STEEPEST)
    noise = GAUSSIAN * quantile(fine, 0.5)
    change = quantile(coarse, STEEPEST) - noise
    if change < MIN_DETAIL:
        return None
    return steep, max(0.0, steep - noise) / change


def counted(across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """How many values of two uint8 arrays are at most 0, 1, ... 255: (256,) float32."""
    histograms = [cv2.calcHist([part], [0], None, [256], [0, 256]) for part in (across, down)]
    return (histograms[0] + histograms[1]).ravel().cumsum()


def quantile(count: np.ndarray, share: float) -> float:
    """Between whole numbers, as the median of noise is a small one."""
    wanted = share * count[-1]
    level = int(count.searchsorted(wanted))
    below = count[level - 1] if level else 0.0
    return float(level - 0.5 + (wanted - below) / (count[level] - below))
