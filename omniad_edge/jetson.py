"""What an NVIDIA Jetson says of itself: board, release, power mode, clocks, temperatures, power. Only reads.

Everything is in files that any user may read (Orin's memory clock is root's), so no tool of NVIDIA's is run.
What a file does not say is None, or left out of a dictionary.
"""

import re
from pathlib import Path

# Of devfreq: Orin under JetPack 6, Orin under JetPack 5, Thor.
GPU_CLOCKS = ("17000000.gpu", "17000000.ga10b", "gpu-gpc-0")
# The memory's, in Hz: Orin's is in debugfs, Thor's in devfreq.
EMC_CLOCKS = ("sys/kernel/debug/bpmp/debug/clk/emc/rate", "sys/class/devfreq/bwmgr/cur_freq")
# Rails that add up to the module: Orin Nano and NX measure it as a whole, AGX Orin and Thor in three parts. AGX
# Orin's fourth, VDDQ_VDD2_1V8AO, is fed by VIN_SYS_5V0; Thor's VIN is the carrier board's too.
MODULE_RAILS = (
    ("VDD_IN",),
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
    ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
)
JETPACKS = {36: "6", 38: "7", 39: "7"}  # by the major number of L4T


class Jetson:
    """root: where the system's files are; another folder than / in tests and in containers that mount them."""

    def __init__(self, root: str | Path = "/") -> None:
        self.root = Path(root)

    def __bool__(self) -> bool:
        """Whether this is one. Boards of other makers have their own model, but NVIDIA's chip and release.

        Containers see no device tree, unless they are privileged.
        """
        return "nvidia,tegra" in self.read("proc/device-tree/compatible") or self.l4t is not None

    # What stays

    @property
    def model(self) -> str | None:
        return self.read("proc/device-tree/model").rstrip("\0\n") or None

    @property
    def l4t(self) -> str | None:
        """NVIDIA's release of Linux, like "36.4.3"."""
        # "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: ..."
        line = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", self.read("etc/nv_tegra_release"))
        if line:
            return f"{line[1]}.{line[2]}"
        package = self.package("nvidia-l4t-core")  # "36.4.3-20250107174145"
        return package and package.split("-")[0]

    @property
    def jetpack(self) -> str | None:
        """Like "6.2" where the package nvidia-jetpack is installed, else the major number alone."""
        package = self.package("nvidia-jetpack")  # "6.2+b77"
        if package:
            return package.split("+")[0]
        return self.l4t and JETPACKS.get(int(self.l4t.split(".")[0]))

    def package(self, name: str) -> str | None:
        """The version of an installed Debian package."""
        fields = re.search(
            rf"^Package: {re.escape(name)}\n(?:.+\n)*", self.read("var/lib/dpkg/status"), re.MULTILINE
        )
        if not fields or "\nStatus: install ok installed\n" not in fields[0]:
            return None
        version = re.search(r"^Version: (?:\d+:)?(.+)$", fields[0], re.MULTILINE)
        return version and version[1]

    @property
    def power_mode(self) -> str | None:
        """By name: the numbers differ between boards and releases."""
        # nvpmodel keeps "pmode:0002"; its configuration has a "< POWER_MODEL ID=2 NAME=MAXN_SUPER >" of each.
        number = re.search(r"pmode:(\d+)", self.read("var/lib/nvpmodel/status"))
        modes = re.findall(r"^< POWER_MODEL ID=(\d+) NAME=(\S+) >", self.read("etc/nvpmodel.conf"), re.MULTILINE)
        return {int(mode): name for mode, name in modes}.get(int(number[1])) if number else None

    # What changes

    def clocks_mhz(self) -> dict[str, float]:
        """Of "gpu", "cpu" (the fastest core) and "emc" (the memory), now."""
        cores = [self.number(policy / "scaling_cur_freq") for policy in self.cpu_policies()]  # kHz
        hz = {
            "gpu": next((self.number(gpu / "cur_freq") for gpu in self.gpu_clocks()), None),
            "cpu": max((1000 * khz for khz in cores if khz is not None), default=None),
            "emc": next((rate for path in EMC_CLOCKS if (rate := self.number(self.root / path))), None),
        }
        return {name: value / 1e6 for name, value in hz.items() if value is not None}

    @property
    def clocks_fixed(self) -> bool | None:
        """Whether GPU and CPU can run at one frequency alone, as after `jetson_clocks`."""
        ends = [(gpu / "min_freq", gpu / "max_freq") for gpu in self.gpu_clocks()]
        ends += [(policy / "scaling_min_freq", policy / "scaling_max_freq") for policy in self.cpu_policies()]
        values = [(self.number(low), self.number(high)) for low, high in ends]
        if not values or None in (value for pair in values for value in pair):
            return None
        return all(low == high for low, high in values)

    def temperatures_c(self) -> dict[str, float]:
        """By zone, like "tj", the hottest place of the chip; a part that is switched off has none."""
        made = {}
        for zone in sorted(self.root.glob("sys/class/thermal/thermal_zone*")):
            millidegrees = self.number(zone / "temp")
            if millidegrees is not None:
                made[self.read(zone / "type").strip().removesuffix("-thermal")] = millidegrees / 1000
        return made

    def rails_mw(self) -> dict[str, float]:
        """Power of each rail that the board measures: an INA3221 three, an INA238 Thor's VIN."""
        # https://docs.kernel.org/hwmon/ina3221.html and ina238.html: in* in mV, curr* in mA, power1 in uW.
        # Channels 1 to 3 are rails, unused ones are called NC; higher numbers are shunts and sums.
        made = {}
        for monitor in sorted(self.root.glob("sys/class/hwmon/hwmon*")):
            name = self.read(monitor / "name").strip()
            if name == "ina238" and (microwatts := self.number(monitor / "power1_input")) is not None:
                made["VIN"] = microwatts / 1000
            for channel in (1, 2, 3) if name == "ina3221" else ():
                label = self.read(monitor / f"in{channel}_label").strip()
                millivolts = self.number(monitor / f"in{channel}_input")
                milliamperes = self.number(monitor / f"curr{channel}_input")
                if label not in ("", "NC") and millivolts is not None and milliamperes is not None:
                    made[label] = millivolts * milliamperes / 1000
        return made

    def module_mw(self) -> float | None:
        """Power of the whole module, without what the carrier board takes; None where its rails are not known."""
        rails = self.rails_mw()
        names = next((names for names in MODULE_RAILS if set(names) <= set(rails)), None)
        return sum(rails[name] for name in names) if names else None

    # Both, JSON-safe

    def facts(self) -> dict:
        return {
            "model": self.model,
            "l4t": self.l4t,
            "jetpack": self.jetpack,
            "power_mode": self.power_mode,
            "clocks_fixed": self.clocks_fixed,
        }

    def state(self) -> dict:
        return {
            "clocks_mhz": self.clocks_mhz(),
            "temperatures_c": self.temperatures_c(),
            "rails_mw": self.rails_mw(),
            "module_mw": self.module_mw(),
        }

    # Files

    def gpu_clocks(self) -> list[Path]:
        found = [self.root / "sys/class/devfreq" / name for name in GPU_CLOCKS]
        return [clock for clock in found if clock.is_dir()]

    def cpu_policies(self) -> list[Path]:
        return sorted(self.root.glob("sys/devices/system/cpu/cpufreq/policy*"))

    def read(self, path: str | Path) -> str:
        try:
            return (self.root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:  # not there, not ours to read, or a sensor that is switched off
            return ""

    def number(self, path: Path) -> int | None:
        text = self.read(path).strip()
        return int(text) if re.fullmatch(r"-?\d+", text) else None
