"""What an image takes on this machine, beside what users have otherwise, interleaved in one run.

    python benchmarks/latency.py [--device cpu|cuda] [options of that benchmark]

cpu   a bundle's engines beside plain exports and torch on the CPU (cpu.py); a bundle that is given by --bundle on
      the GPU too
cuda  the fused engine beside torch, torch.compile, ONNX Runtime (gpu.py); needs torch and Triton, and is the
      default where there is an NVIDIA GPU and no --bundle
`--device cpu --help` and `--device cuda --help` show the options. Exit code 0, 1 failure, 2 usage.
"""

import argparse
import sys

from omniad_edge.cuda_graph import device_architecture


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=argv in (["-h"], ["--help"]),
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    args, options = parser.parse_known_args(argv)
    if args.device == "cuda" or (not args.device and "--bundle" not in options and device_architecture()):
        import gpu

        return gpu.main(["latency", *options])
    import cpu

    return cpu.main(options)


if __name__ == "__main__":
    sys.exit(main())
