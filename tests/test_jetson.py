"""What a Jetson's files say, from trees of such files; without a Jetson."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from time import sleep
from types import SimpleNamespace

import pytest
from jetson_tree import AGX_ORIN, ORIN_NANO, THOR, write_tree
from native_parts import arrays, fused_parts, tiny_plan, weights_file, write_tiny

from omniad_edge.errors import InputError
from omniad_edge.jetson import Jetson
from omniad_edge.model import ModelConfig, OmniAD

ROOT = Path(__file__).resolve().parents[1]
SETUP = ROOT / "export/jetson_setup.sh"


def jetson(root, files) -> Jetson:
    return Jetson(write_tree(root, files))


def test_orin_nano(tmp_path):
    nano = jetson(tmp_path, ORIN_NANO)
    assert nano
    assert nano.facts() == {
        "model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
        "l4t": "36.4.3",
        "jetpack": "6.2",
        "power_mode": "MAXN_SUPER",
        "clocks_fixed": False,
    }
    state = nano.state()
    assert state["clocks_mhz"] == {"gpu": 306, "cpu": 1113.6}  # the memory's is for root
    assert state["temperatures_c"] == {"cpu": 48.406, "gpu": 47.25, "tj": 48.406}
    assert state["rails_mw"] == pytest.approx({"VDD_IN": 4942.464, "VDD_CPU_GPU_CV": 606.72, "VDD_SOC": 1496.576})
    assert state["module_mw"] == pytest.approx(4942.464)  # the rail of the whole, not the sum


def test_agx_orin_counts_no_rail_twice(tmp_path):
    state = jetson(tmp_path, AGX_ORIN).state()
    assert state["clocks_mhz"] == {"emc": 3199}
    assert set(state["rails_mw"]) == {"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"}
    assert state["module_mw"] == pytest.approx(3155.2 + 788.8 + 4734.504)


def test_thor(tmp_path):
    thor = jetson(tmp_path, THOR)
    facts, state = thor.facts(), thor.state()
    assert (facts["l4t"], facts["jetpack"], facts["power_mode"]) == ("38.2.2", "7", "MAXN")
    assert facts["clocks_fixed"] is True
    assert state["clocks_mhz"] == {"gpu": 1575, "cpu": 2601, "emc": 4266}
    assert state["rails_mw"]["VIN"] == 23100
    assert state["module_mw"] == 2400 + 6480 + 6520


def test_clocks_are_fixed_only_if_all_are(tmp_path):
    fixed = {name: text.replace("306000000", "1020000000") for name, text in ORIN_NANO.items()}
    nano = jetson(tmp_path, fixed)
    assert nano.clocks_fixed is False  # the CPU's are not
    for core in (0, 4):
        (tmp_path / f"sys/devices/system/cpu/cpufreq/policy{core}/scaling_min_freq").write_text("1728000\n")
    assert nano.clocks_fixed is True
    (tmp_path / "sys/devices/system/cpu/cpufreq/policy4/scaling_min_freq").unlink()
    assert nano.clocks_fixed is None


def test_the_release_from_the_package_where_the_file_is_not_there(tmp_path):
    nano = jetson(tmp_path, {name: text for name, text in ORIN_NANO.items() if name != "etc/nv_tegra_release"})
    assert nano.l4t == "36.4.3"


@pytest.mark.parametrize("seen", ["proc/device-tree/compatible", "etc/nv_tegra_release"])
def test_it_is_one_by_its_chip_or_by_its_release(tmp_path, seen):
    assert jetson(tmp_path, {seen: ORIN_NANO[seen]})


def test_a_removed_package_is_not_installed(tmp_path):
    assert jetson(tmp_path, ORIN_NANO).package("python3-libnvinfer") is None


@pytest.mark.parametrize(
    "status", ["", "pmode:0007", "pmode:fmode"], ids=["empty", "not in the configuration", "not a number"]
)
def test_a_power_mode_that_is_not_known_is_none(tmp_path, status):
    assert jetson(tmp_path, ORIN_NANO | {"var/lib/nvpmodel/status": status}).power_mode is None


def test_power_whose_rails_are_not_known_is_no_total(tmp_path):
    nano = jetson(tmp_path, ORIN_NANO | {"sys/class/hwmon/hwmon1/in1_label": "VDD_OTHER\n"})
    assert nano.module_mw() is None
    assert "VDD_OTHER" in nano.rails_mw()


def test_another_computer_is_none(tmp_path):
    other = jetson(tmp_path, {"proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0"})
    assert not other
    assert set(other.facts().values()) == {None}
    assert other.state() == {"clocks_mhz": {}, "temperatures_c": {}, "rails_mw": {}, "module_mw": None}


def test_files_of_nonsense_say_nothing(tmp_path):
    nonsense = jetson(tmp_path, dict.fromkeys(ORIN_NANO, "\x00?\n"))
    assert not nonsense
    assert nonsense.facts() | nonsense.state() == Jetson(tmp_path / "empty").facts() | {
        "model": "\x00?",
        "clocks_mhz": {},
        "temperatures_c": {},
        "rails_mw": {},
        "module_mw": None,
    }


# In the benchmarks


@pytest.fixture
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_benchmarks_record_the_jetson(tmp_path, benchmark_modules, monkeypatch):
    import machine

    monkeypatch.setattr(machine, "JETSON", jetson(tmp_path, ORIN_NANO))
    facts = machine.facts()
    assert facts["jetson"]["power_mode"] == "MAXN_SUPER"
    assert machine.jetson_state()["temperatures_c"]["tj"] == 48.406
    json.dumps([facts, machine.jetson_state()], allow_nan=False)
    monkeypatch.setattr(machine, "JETSON", Jetson(tmp_path / "other"))
    assert (machine.facts()["jetson"], machine.jetson_state()) == (None, None)


def test_energy_is_power_times_time(tmp_path, benchmark_modules, capsys):
    from energy import measure_energy, print_energy

    board = jetson(tmp_path, ORIN_NANO)
    amperes = tmp_path / "sys/class/hwmon/hwmon1/curr1_input"

    def image():
        amperes.write_text("1976")  # 5.064 W more
        sleep(0.01)

    (row,) = measure_energy({"ours": image}, board, seconds=0.3)
    assert row["idle_mw"] == pytest.approx(4942.5, abs=0.1)
    assert row["power_samples"] >= 3
    assert row["mean_mw"] == pytest.approx(10006.5, rel=0.2)  # the first reading may be of before
    assert row["mj_per_image"] == pytest.approx(row["mean_mw"] * row["seconds"] / row["images"], rel=1e-3)
    above = row["mj_per_image"] * (1 - row["idle_mw"] / row["mean_mw"])
    assert row["mj_per_image_above_idle"] == pytest.approx(above, rel=1e-3)
    print_energy([row])
    assert f"{row['mj_per_image']:.1f} mJ an image" in capsys.readouterr().out


def test_no_energy_where_the_modules_power_is_not_known(tmp_path, benchmark_modules):
    from energy import measure_energy

    assert measure_energy({"ours": lambda: pytest.fail("ran")}, Jetson(tmp_path)) == []


def test_the_latency_benchmark_takes_the_kernels_a_bundle_has(tmp_path, benchmark_modules, monkeypatch):
    import cpu

    bundle = write_tiny(tmp_path / "tiny.omniad", parts=fused_parts(tiny_plan(), weights_file(arrays()), 87))
    monkeypatch.setattr(cpu.fused, "device_architecture", lambda: 87)
    cases, _ = cpu.select_cases({"ours": bundle}, ["ours/fused-fp16"])
    assert [case.backend for case in cases] == ["fused"]
    monkeypatch.setattr(cpu.fused, "device_architecture", lambda: 90)
    with pytest.raises(InputError, match="ours/fused-fp16: the bundle has kernels for sm_87"):
        cpu.select_cases({"ours": bundle}, ["ours/fused-fp16"])


# The documentation and the setup script


def setup(*arguments: object, path: Path | None = None) -> subprocess.CompletedProcess:
    """path: a folder of programs that stand for the real ones."""
    environment = os.environ | ({"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} if path else {})
    command = ["bash", SETUP, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def logging_sudo(tmp_path) -> Path:
    """A folder with a sudo that only writes down what it was asked for, into the file "asked" there."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "sudo").write_text(f'#!/bin/sh\necho "sudo $*" >> {folder}/asked\n')
    (folder / "sudo").chmod(0o755)
    return folder


@pytest.mark.parametrize(("jetpack", "bindings"), [("6", "cuda-bindings~=12.9"), ("7", "cuda-bindings>=13,<14")])
def test_the_setup_script_does_what_it_said(tmp_path, logging_sudo, jetpack, bindings):
    wheel = tmp_path / "omniad_edge-0.1.0-py3-none-any.whl"
    wheel.touch()
    said = setup("--dry-run", "--jetpack", jetpack, wheel, path=logging_sudo)
    assert said.returncode == 0, said.stderr
    assert not (logging_sudo / "asked").exists()
    assert f"-m pip install {wheel}[line] {bindings}\n" in said.stdout
    assert "torch" not in [word for line in said.stdout.splitlines() if "sudo" in line for word in line.split()]
    setup("--jetpack", jetpack, wheel, path=logging_sudo)  # ends at the first program of what was not installed
    lines = [line.strip() for line in said.stdout.splitlines() if line.strip().startswith("sudo ")]
    done = (logging_sudo / "asked").read_text().splitlines()
    drop_in = re.compile(r"/tmp/\S+")
    assert [drop_in.sub("TMP", line) for line in done] == [drop_in.sub("TMP", line) for line in lines]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "usage"),
        (("--fast", "."), 2, "usage"),
        (("--jetpack", "5", "."), 2, "usage"),
        (("--jetpack", "6", "a", "b"), 2, "usage"),
        (("--jetpack", "6", "none.whl"), 1, "none.whl: there is no such wheel"),
        (("--jetpack", "6", "--power-mode", "NONE", "."), 1, "NONE is none of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_setup_script_refuses_in_words(logging_sudo, arguments, code, words):
    done = setup(*arguments, path=logging_sudo)
    assert done.returncode == code and words in done.stderr


@pytest.mark.skipif(Path("/etc/nv_tegra_release").exists(), reason="this is a Jetson")
def test_the_setup_script_is_for_jetsons():
    done = setup("--dry-run", ".")
    assert done.returncode == 1 and "this is no Jetson" in done.stderr


def test_the_unit_is_where_the_setup_script_looks():
    (path,) = re.findall(r"site-packages/(omniad_edge/\S+\.service)", SETUP.read_text())
    assert (ROOT / path).is_file()


def test_the_setup_script_passes_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not on this machine; run: sudo apt install shellcheck")
    done = subprocess.run(["shellcheck", SETUP], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_floors_in_the_documentation_are_what_its_formula_gives():
    text = (ROOT / "export/jetson.md").read_text(encoding="utf-8")
    weight_bytes, flop = 63e6, 21.0e9
    assert "63 MB of weights" in text and "21.0 GFLOP" in text
    assert "63 MB of them weights" in (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| (Orin|AGX|Thor) .*\d", line)]
    assert len(rows) == 9
    for module, _, *numbers in rows:
        multiprocessors, mhz, gb_per_s, weights_ms, products_ms = map(float, numbers[:5])
        flop_per_clock = 8192 if "Thor" in module else 2048
        assert weights_ms == round(1e3 * weight_bytes / (gb_per_s * 1e9), 2)
        assert products_ms == round(1e3 * flop / (multiprocessors * mhz * 1e6 * flop_per_clock), 2)


def test_the_network_has_as_many_products_as_the_floors_count(benchmark_modules):
    pytest.importorskip("triton", reason="benchmarks/gpu.py needs Triton: pip install 'omniad-edge[kernels]'")
    from gpu import flop

    network = SimpleNamespace(model=OmniAD(ModelConfig()), plan=SimpleNamespace(height=256, width=256))
    assert round(flop(network) / 1e9, 1) == 21.0
