"""The report of cpu.py in words, on stdout."""

from energy import print_energy

PLAIN_FORMS = ("paper", "module")


def print_report(report: dict) -> None:
    print_header(report["header"])
    print(f"\n{'case':<28}batch  p50 ms  p90 ms  p99 ms  max ms  images/s  vs paper  vs module  max error")
    for row in report["latency"]:
        times = "".join(f"{row[name]:8.1f}" for name in ("p50_ms", "p90_ms", "p99_ms", "max_ms"))
        speedups = "".join(f"{cell(row[f'speedup_{form}'], '.2f', 'x'):>10}" for form in PLAIN_FORMS)
        error = cell(row["max_error"], ".1e") if row["max_error"] is not None else "not finite"
        print(f"{row['case']:<28}{row['batch']:5}{times}{row['images_per_s']:10.1f}{speedups}{error:>12}")
    print("vs: times faster than ONNX Runtime on that plain export, median of the rounds; max error: of the")
    print("anomaly map, from that of " + ", ".join(dict.fromkeys(row["reference"] for row in report["latency"])))
    if report["stages"]:
        heads = ("preprocess", "engine", "postprocess", "(pre + post) / engine")
        print(f"\n{'Detector, 1920x1080 frame':<28}" + "".join(f"{head:>22}" for head in heads))
    for row in report["stages"]:
        stages = (row[stage] for stage in ("preprocess", "engine", "postprocess"))
        times = "".join(f"{stage['p50_ms']:11.2f} / {stage['p99_ms']:8.2f}" for stage in stages)
        print(f"{row['case']:<28}{times}{row['share_of_engine']:>22.1%}")
    if report["stages"]:
        print("p50 / p99, ms")
    for row in report["paced"]:
        ratio = f", {row['ratio']:.2f} times back to back" if "ratio" in row else ""
        print(f"{row['case']:<28}{row['arrivals']:>13}: {row['p50_ms']:.1f} / {row['p99_ms']:.1f}{ratio}")
    print_energy(report["energy"])
    print(f"\n{'in a process of its own':<28}  first image after s  resident MiB  peak MiB")
    for row in report["processes"]:
        memory = f"{cell(row['resident_mib'], '.0f'):>14}{cell(row['peak_mib'], '.0f'):>10}"
        print(f"{row['case']:<28}{row['ready_s']:21.2f}{memory}")
    print(f"import omniad_edge: {report['import_s']:.2f} s")
    for line in report["left_out"]:
        print(f"left out: {line}")


def print_header(header: dict) -> None:
    cpu = f"{header['cpu']} ({' '.join(header['cpu_features']) or 'no vector extensions known'})"
    print(f"{header['date']}  commit {header['commit']}")
    print(f"{cpu}, {header['cores']} cores, {header['threads']} threads used, {header['memory_mib']} MiB")
    print(f"{header['system']}, Python {header['python']}")
    print(", ".join(f"{name} {version}" for name, version in header["versions"].items()))
    if header["jetson"]:
        print(", ".join(f"{name} {value}" for name, value in header["jetson"].items()))
    network = ", ".join(f"{name} {value}" for name, value in header["network"].items())
    print(f"network: {network}; weights: {header['weights']}")
    sizes = (f"{group} {size / 2**20:.1f} MiB" for group, size in header["bundle_bytes"].items())
    print("bundle: " + ", ".join(sizes))
    print(f"load average {header['load_before']} before, {header['load_after']} after; ", end="")
    print(f"{header['warm_up']} warm-up rounds, {header['samples']} samples")


def cell(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"
