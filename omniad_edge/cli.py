"""Command line: `omniad COMMAND`, and `omniad-export` for `omniad export`.

Data goes to stdout, messages to stderr. Exit codes: 0 ok, 1 failure, 2 usage.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from .errors import EngineError, MissingDependencyError, OmniADError

PRESETS = ("base", "fast", "small")
BACKBONES = ("resnet18", "resnet34", "resnet50", "wide_resnet50_2")
BACKENDS = ("fused", "tensorrt", "onnxruntime", "openvino")
PRECISIONS = ("fp16", "fp32", "bf16", "int8", "fp8")
console = Console(stderr=True, highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    # Threads that wait by spinning fight over cores another program uses. A training step (demo, two cores) took
    # 0.32 s alone and 1.3 s beside a busy program; with short spins 0.54 s there; without spins 0.46 and 0.7 s.
    # Read by libgomp when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
    try:
        return options.command(options) or 0
    except OmniADError as exc:
        console.print(f"[red]error:[/] {type(exc).__name__}: ", end="")
        console.print(str(exc), markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print("interrupted")
    except OSError as exc:
        console.print(f"error: {exc}", markup=False, soft_wrap=True)
    return 1


def export_main() -> int:
    return main(["export", *sys.argv[1:]])


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="omniad", description="Anomaly detection for production lines.")
    top.add_argument("--version", action="version", version=version("omniad-edge"))
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, help):
        sub = commands.add_parser(name, help=help, description=help, formatter_class=HelpFormatter)
        sub.set_defaults(command=run)
        return sub

    sub = command("train", train, "train one model on the good images of all products in a data set")
    sub.add_argument("--data", type=Path, required=True, help="MVTec, VisA, Real-IAD or PRODUCT/good/* folders")
    sub.add_argument("--out", type=Path, required=True, help="folder of the run")
    sub.add_argument("--epochs", type=positive, default=500, help="passes over the images")
    sub.add_argument("--preset", choices=PRESETS, default="base", help="size of the network")
    sub.add_argument("--size", type=image_size, help="input size in pixels, N or HxW, multiples of 32")
    sub.add_argument(
        "--tiles",
        type=image_size,
        help="for small defects: resize frames to this larger size, seen in overlapping tiles of the input size. "
        "A frame, and an epoch, takes as many times longer as there are tiles: 9 for twice the side",
    )
    sub.add_argument(
        "--backbone-weights",
        default="procedural",
        help="procedural (in the package), imagenet (downloaded once), a weights file, or none",
    )
    sub.add_argument("--batch-size", type=positive, default=16, help="images per step and process")
    sub.add_argument("--holdout", type=share, default="10%", help="part of the good images kept for calibration")
    sub.add_argument("--validate-every", type=int, default=0, help="epochs; 0: at the end only")
    sub.add_argument("--seed", type=int, default=42, help="of everything random")
    sub.add_argument("--cache-features", action="store_true", help="keep the backbone's features in memory")
    sub.add_argument("--skip-broken", action="store_true", help="leave out broken images instead of stopping")
    sub.add_argument("--resume", action="store_true", help="go on with the run in --out")
    sub.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="what trains")

    sub = command("evaluate", evaluate, "measure detection on the test images of a data set")
    sub.add_argument("model", type=Path, help="folder of a run, or a bundle")
    sub.add_argument("--data", type=Path, required=True, help="data set with test images")
    sub.add_argument("--published", action="store_true", help="pixel F1 and AUPRO as published tables have them")
    sub.add_argument("--report", type=Path, help="write an HTML report here")
    sub.add_argument("--json", type=Path, help="write the metrics here as JSON")
    sub.add_argument("--csv", type=Path, help="write the metrics here as CSV")

    sub = command("export", export, "write the bundle of a training run")
    sub.add_argument("run", type=Path, help="folder of the run")
    sub.add_argument("--out", type=Path, required=True, help="bundle to write, such as line3.omniad")
    sub.add_argument("--fp16", action="store_true", help="store weights in fp16 and add the fp16 graph")
    sub.add_argument(
        "--targets",
        type=lambda text: text.split(","),
        default=[],
        help="GPUs to add fused kernels for, like sm_87,sm_90 (Jetson Orin and Thor: sm_87,sm_110); needs --fp16",
    )
    sub.add_argument("--data", type=Path, help="the data set, if it is no longer where it was trained from")
    add_quantise(sub, "also in {}, if it detects as well on the test images")
    sub.add_argument(
        "--engine", choices=["tensorrt"], help="also do `omniad build`, for this machine's GPU; needs --fp16"
    )
    sub.add_argument("--device", default="gpu", help="of --engine: gpu; for a DLA it says why not")

    sub = command("build", build, "build a bundle's TensorRT engine, on the device that will run it")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--batches", type=numbers, default="1,8", help="images at once, 1 among them")
    sub.add_argument("--workspace", default="1GB", help="memory that a layer may take for itself")
    sub.add_argument("--device", default="gpu", help="gpu; for a DLA it says why not")
    add_quantise(sub, "of the bundle's {} graph instead of the fp16 one")

    sub = command("calibrate", calibrate, "set a bundle's thresholds from good parts")
    sub.add_argument("bundle", type=Path, help="changed in place, atomically")
    sub.add_argument(
        "--good", type=Path, required=True, help="PRODUCT/good/* folders; images trained on are left out"
    )
    sub.add_argument(
        "--max-false-reject",
        type=share,
        help="false rejects wanted at most, such as 0.5%%; without it the highest good score is the threshold",
    )
    sub.add_argument("--confidence", type=share, default="95%", help="that the wish holds")
    sub.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="what scores the parts")
    sub.add_argument(
        "--precision", choices=("auto", *PRECISIONS), default="auto", help="int8 and fp8 have their own thresholds"
    )

    sub = command("threshold", threshold, "set one product's threshold by hand")
    sub.add_argument("bundle", type=Path, help="changed in place, atomically")
    sub.add_argument("--product", required=True, help="as the bundle names it")
    sub.add_argument("value", type=float, help="parts that score higher are defective")
    sub.add_argument("--precision", choices=("int8", "fp8"), help="its own threshold; default: that of all others")

    sub = command("predict", predict, "give verdicts on images")
    sub.add_argument("bundle", type=Path, help="such as line3.omniad")
    sub.add_argument("images", type=Path, help="an image or a folder")
    sub.add_argument("--product", help="what the images should show; default: as recognised")
    sub.add_argument("--save", type=Path, help="folder for pictures with heatmap, and results.jsonl")
    sub.add_argument("--json", action="store_true", help="print one JSON object a line")
    sub.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="what computes")
    sub.add_argument("--precision", choices=("auto", *PRECISIONS), default="auto", help="of its arithmetic")

    sub = command("run", run, "inspect on a line, as its TOML file says, until it ends or is stopped")
    sub.add_argument("file", type=Path, help="such as line3.toml")
    sub.add_argument("--check", action="store_true", help="only name every mistake in it, or what would run")

    sub = command("info", info, "print what a bundle holds")
    sub.add_argument("bundle", type=Path, help="such as line3.omniad")
    sub.add_argument("--json", action="store_true", help="print the manifest")

    sub = command("doctor", doctor, "tell what this machine has, and what it lacks for what")
    sub.add_argument("bundle", type=Path, nargs="?", help="also whether it can run here; exit code 1 if not")
    sub.add_argument("--json", action="store_true", help="print it as JSON")

    sub = command("triton-repository", triton_repository, "write a bundle as a model repository of Triton")
    sub.add_argument("bundle", type=Path)
    sub.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    network = sub.add_mutually_exclusive_group()
    network.add_argument("--gpu", action="store_true", help="the server has an NVIDIA GPU: use the fp16 graph")
    network.add_argument("--plan", type=Path, help="use this TensorRT plan, built on that very server")
    network.add_argument("--tensorrt", action="store_true", help="build that plan now: this is that very server")

    sub = command("pretrain", pretrain, "train a backbone on procedural pictures")
    sub.add_argument("--out", type=Path, required=True, help="weights file to write, .safetensors")
    sub.add_argument("--backbone", choices=BACKBONES, default="resnet18", help="which one")
    sub.add_argument("--steps", type=positive, default=5000, help="of training")
    sub.add_argument("--seed", type=int, default=42, help="of everything random")
    sub.add_argument("--start", type=Path, help="weights to begin with; those of a smaller ResNet are grown")
    sub.add_argument("--pictures", type=positive, default=4000, help="to draw; more where a GPU is at hand")
    sub.add_argument("--batch", type=positive, default=16, help="pictures a step")

    sub = command("demo", demo, "train, calibrate, export and inspect a small generated product line")
    sub.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything it makes")
    return top


def add_quantise(sub: argparse.ArgumentParser, help: str) -> None:
    group = sub.add_mutually_exclusive_group()
    for name, whose in (("int8", ""), ("fp8", "; for TensorRT from sm_89 on, needs --fp16 in the export")):
        text = help.format(name) + whose
        group.add_argument(f"--{name}", dest="quantise", action="store_const", const=name, help=text)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def share(text: str) -> float:
    """ "0.5%" or "0.005" -> 0.005"""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected a share such as 5% or 0.05, below 100%; got {text!r}")
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on; got {text!r}")
    return int(text)


def image_size(text: str) -> tuple[int, int]:
    """ "256" or "256x320" -> height, width"""
    height, x, width = text.partition("x")
    try:
        return int(height), int(width if x else height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a size such as 256 or 256x320; got {text!r}") from None


def numbers(text: str) -> tuple[int, ...]:
    """ "1,8" -> (1, 8)"""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,8; got {text!r}") from None


def require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError(package, extra)


def require_training() -> None:
    for package in ("torch", "safetensors", "onnx"):
        require(package, "train")


def train(options: argparse.Namespace) -> None:
    require_training()
    from dataclasses import replace

    from . import model
    from .train import train

    config = model.PRESETS[options.preset]
    height, width = options.size or (config.height, config.width)
    config = replace(config, height=height, width=width, tiles=options.tiles)
    result = train(
        options.data,
        options.out,
        config,
        epochs=options.epochs,
        backbone_weights=options.backbone_weights,
        batch_size=options.batch_size,
        holdout=options.holdout,
        validate_every=options.validate_every,
        seed=options.seed,
        cache_features=options.cache_features,
        on_broken="skip" if options.skip_broken else "stop",
        resume=options.resume,
        device=options.device,
    )
    held_out = "" if result.val_loss is None else f", held out {result.val_loss:.4f}"
    print(f"{result.checkpoint}: epoch {result.best_epoch}, loss {result.loss:.4f}{held_out}")


def evaluate(options: argparse.Namespace) -> None:
    from .bundle import is_bundle

    if not is_bundle(options.model):
        require_training()
    from . import evaluate, report
    from .files import check_writable

    for path in filter(None, (options.json, options.csv, options.report)):
        check_writable(path, is_folder=False)
    evaluation = evaluate.evaluate_model(options.model, options.data, options.published)
    Console().print(report.metrics_table(evaluation.metrics))
    for fact in ("no pixel metrics", "defects missed", "good rejected", "product recognised"):
        if fact in evaluation.facts:
            print(f"{fact}: {evaluation.facts[fact]}")
    if options.json:
        report.write_metrics_json(options.json, evaluation.metrics, evaluation.facts)
    if options.csv:
        report.write_metrics_csv(options.csv, evaluation.metrics)
    if options.report:
        evaluate.report_evaluation(options.report, f"Evaluation of {options.model}", evaluation)


def export(options: argparse.Namespace) -> None:
    require_training()
    if options.targets:
        require("triton", "kernels")
    if options.engine:
        from .export.tensorrt_engine import check_device
        from .tensorrt_engine import check_machine

        check_device(options.device)
        check_machine(options.fp16, options.quantise or "fp16")  # before the minutes that the rest takes
    from .export.bundle_export import export_bundle

    made = export_bundle(
        options.run,
        options.out,
        options.fp16,
        options.data,
        options.targets,
        print_parity,
        print,
        options.quantise,
    )
    for product, calibration in made.calibrations.items():
        print_calibration(product, calibration)
    print_recognition(made.recognition)
    print(f"{made.path}: {made.size_bytes / 1e6:.1f} MB, {'fp16' if options.fp16 else 'fp32'}")
    if options.engine:
        build_engine(options.out, precision=options.quantise or "fp16")


def build(options: argparse.Namespace) -> None:
    from .export.tensorrt_engine import check_device
    from .sizes import size_bytes

    check_device(options.device)
    precision = options.quantise or "fp16"
    build_engine(options.bundle, options.batches, size_bytes(options.workspace), precision)


def build_engine(
    path: Path,
    batches: Sequence[int] | None = None,
    workspace_bytes: int | None = None,
    precision: str = "fp16",
) -> None:
    """Opens the bundle's TensorRT engine, which builds it where it is not there; says which one `auto` takes."""
    from .bundle import read_bundle
    from .engine import open_engine
    from .tensorrt_engine import TensorRtEngine

    bundle = read_bundle(path)
    engine = TensorRtEngine(bundle, f"TensorRT in {precision}", batches, workspace_bytes, precision)
    of_batches = ", ".join(map(str, engine.batches))
    print(f"engine      {engine.reason}; {of_batches} images at once; self-test passed")
    if not engine.kept:
        raise EngineError("what was built could not be kept: see above")
    print(f"kept        {engine.path}")
    del engine  # `auto` may need its memory
    print(f"auto        {open_engine(bundle).reason}")


def calibrate(options: argparse.Namespace) -> None:
    from .evaluate import calibrate_bundle

    calibrations, limits, left_out = calibrate_bundle(
        options.bundle,
        options.good,
        options.max_false_reject,
        options.confidence,
        options.backend,
        options.precision,
    )
    if left_out:
        console.print(f"left out {left_out} images that the model was trained on: their scores run low")
    for product, calibration in calibrations.items():
        print_calibration(product, calibration)
    print_recognition(limits)


def threshold(options: argparse.Namespace) -> None:
    from .bundle import quantised_graph, read_bundle, set_thresholds
    from .calibration import MAX_SCORE
    from .errors import InputError

    if not 0 <= options.value <= MAX_SCORE:
        raise InputError(f"value: expected 0 to {MAX_SCORE:.3f}, where all scores lie; got {options.value:g}")
    bundle = read_bundle(options.bundle)
    products, graphs = bundle.products, [""]
    if options.precision:
        quantised = bundle.manifest.get("quantised", {})
        of_both = {quantised_graph(backend, options.precision) for backend in ("openvino", "tensorrt")}
        graphs = sorted(of_both & quantised.keys())
        if not graphs:
            raise InputError(f"--precision: the bundle was not exported with --{options.precision}")
    if options.product not in products:
        raise InputError(f"product: expected one of {', '.join(products)}; got {options.product!r}")
    for graph in graphs:
        old = bundle.calibrations_of(graph)[options.product]
        action = f"set by hand for {graph}" if graph else "set by hand"
        set_thresholds(options.bundle, {options.product: old.with_threshold(options.value)}, action, graph=graph)
        print(f"{options.product}: threshold {old.threshold:.6g} -> {options.value:.6g}")


def predict(options: argparse.Namespace) -> int:
    import cv2

    from .detector import Detector
    from .errors import InputError
    from .files import atomic_write
    from .image import list_images, read_image

    paths = list_images(options.images)
    root = options.images if options.images.is_dir() else options.images.parent
    results = None
    if options.save and options.images.is_dir() and options.save.resolve().is_relative_to(root.resolve()):
        raise InputError(f"--save: {options.save} lies in {root}, whose images are read; take another folder")
    detector = Detector(options.bundle, options.backend, options.precision)
    if options.product is not None:
        detector.known_product(options.product)
    if options.save:  # only now that nothing is mistyped: what is there is written anew
        options.save.mkdir(parents=True, exist_ok=True)
        results = (options.save / "results.jsonl").open("w", encoding="utf-8", buffering=1)  # a line as it comes
    if detector.not_recognised:
        console.print(f"products are not recognised: {detector.not_recognised}", markup=False, soft_wrap=True)
    counts = {"good": 0, "defective": 0, "unknown product": 0, "wrong product": 0, "unreadable": 0}
    for path in paths:
        try:
            frame = read_image(path)
        except InputError as exc:
            counts["unreadable"] += 1
            console.print(f"error: {exc}", markup=False, soft_wrap=True)
            continue
        result = detector(frame, options.product)
        counts[result.pred_label] += 1
        line = json.dumps({"path": str(path), **result.to_dict()})
        assumed = " (assumed)" if result.product_assumed else ""
        print(
            line
            if options.json
            else f"{path}  {result.product_fault or result.pred_label}  "
            f"{result.pred_score:.4f} / {result.threshold:.4f}  "
            f"{result.product}{assumed}  {result.speed_ms['total']:.1f} ms",
            flush=True,
        )
        if results:
            results.write(f"{line}\n")
            picture = options.save / f"{path.relative_to(root)}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(picture) as part:
                part.write_bytes(cv2.imencode(".jpg", result.draw(frame))[1].tobytes())
    if results:
        results.close()
    always = ("good", "defective", "unreadable")
    summary = ", ".join(f"{count} {what}" for what, count in counts.items() if count or what in always)
    console.print(f"{len(paths)} images: {summary} ({detector.backend} {detector.precision})")
    return 1 if counts["unreadable"] else 0


def run(options: argparse.Namespace) -> int:
    from .line.run import run_file

    return run_file(options.file, options.check)


def info(options: argparse.Namespace) -> None:
    from .bundle import read_bundle

    bundle = read_bundle(options.bundle)
    manifest = bundle.manifest
    if options.json:
        print(json.dumps(manifest, indent=2))
        return
    print(f"{options.bundle}: schema {manifest['schema']}, made {manifest['created']}, {bundle.precision}")
    print(f"input       {bundle.tiling}")
    for title in ("model", "versions"):
        print(f"{title:<11} " + ", ".join(f"{name} {value}" for name, value in manifest[title].items()))
    for product, calibration in bundle.products.items():
        print_calibration(product, calibration)
    print_recognition(bundle.recognition)
    for graph in manifest.get("quantised", {}):
        print(f"in {graph}:")
        for product, calibration in bundle.calibrations_of(graph).items():
            print_calibration(product, calibration)
        if graph in manifest.get("quantised_recognition", {}):
            print_recognition(bundle.recognition_of(graph))
    for name, report in manifest["parity"].get("engines", {}).items():
        print_parity(name, report)
    for name, part in manifest["parts"].items():
        print(f"part        {name}, {part['bytes']} bytes, sha256 {part['sha256']}")
    for change in manifest["history"]:
        print(
            f"{change['time']}  {change['action']}: {change['product']} "
            f"{change['old_threshold']:.6g} -> {change['new_threshold']:.6g}"
        )


def doctor(options: argparse.Namespace) -> int:
    from .doctor import run_doctor

    return run_doctor(options.bundle, options.json)


def triton_repository(options: argparse.Namespace) -> None:
    from .export.triton_repository import write_triton_repository

    model, network = write_triton_repository(
        options.bundle, options.out, options.gpu, options.plan, options.tensorrt
    )
    print(f"{options.out}: ask the model {model}; its network is {network}")


def pretrain(options: argparse.Namespace) -> None:
    require_training()
    from .pretrain import pretrain
    from .progress import counting

    with counting("pre-training", options.steps) as progress:
        loss = pretrain(
            options.out,
            options.backbone,
            options.steps,
            options.seed,
            options.start,
            options.pictures,
            options.batch,
            lambda done, _: progress(done),
        )
    print(f"{options.out}: {options.backbone}, {options.steps} steps, loss {loss:.3f}")


def demo(options: argparse.Namespace) -> None:
    require_training()
    from .demo import run_demo

    run_demo(options.out)


def print_parity(name: str, report: dict) -> None:
    verdict = "passed" if report["passed"] else "FAILED: " + "; ".join(report["failures"])
    values = {k: v for k, v in report["measured"].items() if v is not None}
    measured = ", ".join(f"{what.replace('_', ' ')} {value:.2g}" for what, value in values.items())
    print(f"parity      {name} on {report['images']} images: {verdict} ({measured})")


def print_calibration(product: str, calibration) -> None:
    text = f"threshold   {product}: {calibration.threshold:.6g}"
    if calibration.false_reject_bound is None:
        trained = "from images that were trained on and score too low; run omniad calibrate"
        print(f"{text}, {'set by hand' if calibration.source == 'manual' else trained}")
        return
    print(
        f"{text}, at most {100 * calibration.false_reject_bound:.2g} % false rejects at "
        f"{100 * calibration.confidence:g} % confidence, from {calibration.n_good} good images"
    )


def print_recognition(limits: dict) -> None:
    for product, limit in limits.items():
        if limit.false_unknown_bound is None:
            known = "from images that it was fitted to; run omniad calibrate"
        else:
            known = (
                f"at most {100 * limit.false_unknown_bound:.2g} % false unknowns at "
                f"{100 * limit.confidence:g} % confidence, from {limit.n_good} good images"
            )
        print(f"recognised  {product}: {known}")
    if not limits:
        print("recognised  no product: export again for that")
