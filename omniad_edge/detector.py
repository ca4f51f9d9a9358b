"""Detector: frame -> preprocess -> engine -> anomaly map -> decision -> Result."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np

from .bundle import quantised_graph, read_bundle
from .cameras.sources import open_source
from .engine import Engine, open_engine
from .errors import InputError
from .frame import EndOfSource, Source
from .image import FrameArray
from .recognition import read_recogniser, shown_product
from .result import UNKNOWN_PRODUCT, WRONG_PRODUCT, Result, decide

BATCH = 8  # frames per engine call when a list is given
READ_S = 1.0  # that `stream` waits for a frame at a time


class Detector:
    """Gives verdicts on frames, seen whole or in tiles, with the engine and the thresholds of a bundle.

    bundle:    path of a `.omniad` file
    backend:   "fused" or "tensorrt" (an NVIDIA GPU), "onnxruntime", "openvino" or "auto"; `reason` says why auto
               chose it. "tensorrt" builds its engine where there is none in the cache yet, which takes minutes
    precision: "fp16" (on GPUs), "fp32", "bf16" (OpenVINO, only if the bundle passed the gate in it), "int8" or
               "fp8" (of a bundle exported for it; with thresholds and limits of its own), or "auto", which takes
               neither
    threads:   CPU threads of the engine; None leaves it to the backend
    engine:    one that is open already, in place of one by backend, precision and threads

    The first, slow call of the engine is made here. Calls are thread-safe. Raises BundleError for a missing,
    damaged or too new bundle, EngineError or MissingDependencyError where the engine is not to be had.
    """

    def __init__(
        self,
        bundle: str | Path,
        backend: str = "auto",
        precision: str = "auto",
        threads: int | None = None,
        engine: Engine | None = None,
    ) -> None:
        contents = read_bundle(bundle)
        self.tiling = contents.tiling
        self.height, self.width = self.tiling.size  # of an anomaly map
        if engine is None:
            engine = open_engine(contents, backend, precision, threads)
            engine.run(np.zeros((1, self.height, self.width, 3), np.uint8))
        self.engine = engine
        graph = quantised_graph(self.backend, self.precision)
        self.calibrations, self.recogniser = contents.calibrations_of(graph), read_recogniser(contents, graph)
        self.not_recognised = ""  # why it cannot recognise products
        if self.recogniser is None:
            self.not_recognised = "the bundle cannot recognise products; export it again"
        elif not engine.embeds:
            self.not_recognised = (
                f"the {engine.backend} engine gives no embedding; it would with backend='onnxruntime'"
            )

    @property
    def products(self) -> tuple[str, ...]:
        return tuple(self.calibrations)

    @property
    def backend(self) -> str:
        return self.engine.backend

    @property
    def precision(self) -> str:
        return self.engine.precision

    @property
    def reason(self) -> str:
        """Why this backend and precision were chosen."""
        return self.engine.reason

    def __call__(
        self, frames: FrameArray | Sequence[FrameArray], product: str | None = None
    ) -> Result | list[Result]:
        """Inspect one frame, or a list of frames of one product.

        frames:  (H, W, 3) uint8 BGR of any size, as OpenCV gives it; a list gives a list of results. With the
                 fused backend also an array on its GPU, C-contiguous, of any library that has DLPack or
                 __cuda_array_interface__ (PyTorch, CuPy, PyCUDA): read where it lies; not if the bundle has tiles
        product: what the frames should show, and whose threshold applies. None: the product that is recognised. If
                 none is, the one of the bundle with the lowest threshold, so that no defect passes because the
                 product was not named; the result's `product` names it and `product_assumed` is True.
        A frame that shows another product, or none of the bundle's, is neither good nor defective: `pred_label`
        says so. Where products cannot be recognised `not_recognised` says why.
        Raises InputError for a frame or product that is not what was asked for, EngineError if the engine fails.
        """
        single = isinstance(frames, np.ndarray) or not isinstance(frames, Sequence)
        batch = [frames] if single else list(frames)
        sizes = [self.engine.frame_size(frame) for frame in batch]
        named = None if product is None else self.known_product(product)
        results = []
        for start in range(0, len(batch), BATCH):
            some = slice(start, start + BATCH)
            results += self.inspect(batch[some], sizes[some], named)
        return results[0] if single else results

    def stream(
        self, source: str | int | Path | Iterable[np.ndarray] | Source, product: str | None = None
    ) -> Iterator[Result]:
        """One result per frame of a source, whose `frame` it holds: `result.draw(result.frame.image)`.

        source:  an address as `sources.open_source` takes it; opened here, closed when the loop ends or breaks.
                 A camera with a software trigger is triggered for each result.
        product: as for a call
        Ends where the source does: at the end of a file, folder or list; for a camera never. Raises CameraError
        if it is lost, and InputError for a source or frame that is not what was asked for.
        """
        source = open_source(source)
        try:
            source.open()
            while True:
                if source.software_trigger:
                    source.trigger()
                frame = source.read(READ_S)
                if frame is not None:
                    yield replace(self(frame.image, product), frame=frame)
        except EndOfSource:
            pass
        finally:
            source.close()

    def inspect(self, frames: list[FrameArray], sizes: list[tuple[int, int]], named: str | None) -> list[Result]:
        start = perf_counter()
        anomaly_maps, pred_scores, embeddings, preprocess_ms = self.engine.run_frames(frames)
        engine_ms = (1e3 * (perf_counter() - start) - sum(preprocess_ms)) / len(frames)
        results = []
        for index, size in enumerate(sizes):
            start = perf_counter()
            seen = self.seen_product(None if embeddings is None else embeddings[index], named)
            calibration = self.calibrations[seen["product"]]
            decision = decide(anomaly_maps[index], pred_scores[index], calibration, *size) | seen
            postprocess_ms = 1e3 * (perf_counter() - start)
            speed_ms = {
                "preprocess": preprocess_ms[index],
                "engine": engine_ms,
                "postprocess": postprocess_ms,
                "total": preprocess_ms[index] + engine_ms + postprocess_ms,
            }
            results.append(
                Result(
                    **decision,
                    speed_ms=speed_ms,
                    backend=self.backend,
                    precision=self.precision,
                )
            )
        return results

    def seen_product(self, embedding: np.ndarray | None, named: str | None) -> dict:
        """The fields of a Result that follow from which product the frame shows."""
        if embedding is None or self.recogniser is None:
            return {"product": named or self.strictest_product(), "product_assumed": named is None}
        (ratios,) = self.recogniser.ratios(embedding[None])
        shown = shown_product(ratios, named)
        product = named or shown or self.strictest_product()
        fields = {
            "product": product,
            "product_assumed": not (named or shown),
            "product_shown": shown,
            "product_distance": ratios[named] if named else min(ratios.values()),
        }
        return fields if shown == product else fields | {"pred_label": WRONG_PRODUCT if shown else UNKNOWN_PRODUCT}

    def strictest_product(self) -> str:
        return min(self.calibrations, key=lambda name: self.calibrations[name].threshold)

    def known_product(self, product: str) -> str:
        if product not in self.products:
            raise InputError(f"product: expected one of {', '.join(self.products)}; got {product!r}")
        return product

    def __repr__(self) -> str:
        products = ", ".join(self.products)
        return f"Detector({self.tiling}, {self.backend} {self.precision}, products: {products})"
