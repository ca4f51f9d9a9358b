"""System files of a Jetson, as far as omniad_edge/jetson.py reads them, in a folder.

Values and spelling are those of real boards' files as their owners published them: nv_tegra_release and model of
JetPack 6.2 and 7.0, rails as in NVIDIA's developer guides (Platform Power and Performance) and in Linux's
tegra234-p3701.dtsi, thermal zones, devfreq and cpufreq as Linux names them there.
"""

from pathlib import Path

ORIN_NANO = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,p3767-0005\0nvidia,tegra234\0",
    "etc/nv_tegra_release": """\
# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025
# KERNEL_VARIANT: oot
TARGET_USERSPACE_LIB_DIR=nvidia
TARGET_USERSPACE_LIB_DIR_PATH=usr/lib/aarch64-linux-gnu/nvidia
""",
    "var/lib/dpkg/status": """\
Package: nvidia-jetpack
Status: install ok installed
Priority: standard
Section: metapackages
Version: 6.2+b77
Description: NVIDIA Jetpack Meta Package

Package: nvidia-l4t-core
Status: install ok installed
Version: 36.4.3-20250107174145

Package: python3-libnvinfer
Status: deinstall ok config-files
Version: 10.3.0.30-1+cuda12.5
""",
    "var/lib/nvpmodel/status": "pmode:0002",
    "etc/nvpmodel.conf": """\
###########################
# POWER_MODEL DEFINITIONS #
###########################
< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
GPU MAX_FREQ 612000000
< POWER_MODEL ID=1 NAME=25W >
GPU MAX_FREQ 918000000
# < POWER_MODEL ID=2 NAME=OLD >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
GPU MAX_FREQ -1
< PM_CONFIG DEFAULT=1 >
""",
    "sys/class/devfreq/17000000.gpu/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
    "sys/class/devfreq/17000000.gpu/max_freq": "1020000000\n",
    "sys/class/devfreq/15480000.nvdec/cur_freq": "524800000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "1728000\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "1113600\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_min_freq": "729600\n",
    "sys/devices/system/cpu/cpufreq/policy4/scaling_max_freq": "1728000\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "48406\n",
    "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "47250\n",
    "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",  # off: reading its temp is an error
    "sys/class/thermal/thermal_zone8/type": "tj-thermal\n",
    "sys/class/thermal/thermal_zone8/temp": "48406\n",
    "sys/class/hwmon/hwmon0/name": "nvme\n",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
    "sys/class/hwmon/hwmon1/in1_input": "5064\n",
    "sys/class/hwmon/hwmon1/curr1_input": "976\n",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/class/hwmon/hwmon1/in2_input": "5056\n",
    "sys/class/hwmon/hwmon1/curr2_input": "120\n",
    "sys/class/hwmon/hwmon1/in3_label": "VDD_SOC\n",
    "sys/class/hwmon/hwmon1/in3_input": "5056\n",
    "sys/class/hwmon/hwmon1/curr3_input": "296\n",
    "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages\n",
}

AGX_ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0",
    "sys/kernel/debug/bpmp/debug/clk/emc/rate": "3199000000\n",
    "sys/class/hwmon/hwmon3/name": "ina3221\n",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC\n",
    "sys/class/hwmon/hwmon3/in1_input": "19720\n",
    "sys/class/hwmon/hwmon3/curr1_input": "160\n",
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_CV\n",
    "sys/class/hwmon/hwmon3/in2_input": "19720\n",
    "sys/class/hwmon/hwmon3/curr2_input": "40\n",
    "sys/class/hwmon/hwmon3/in3_label": "VIN_SYS_5V0\n",
    "sys/class/hwmon/hwmon3/in3_input": "4968\n",
    "sys/class/hwmon/hwmon3/curr3_input": "953\n",
    "sys/class/hwmon/hwmon4/name": "ina3221\n",
    "sys/class/hwmon/hwmon4/in1_label": "NC\n",
    "sys/class/hwmon/hwmon4/in1_input": "0\n",
    "sys/class/hwmon/hwmon4/curr1_input": "0\n",
    "sys/class/hwmon/hwmon4/in2_label": "VDDQ_VDD2_1V8AO\n",
    "sys/class/hwmon/hwmon4/in2_input": "4968\n",
    "sys/class/hwmon/hwmon4/curr2_input": "80\n",
}

THOR = {
    "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
    "proc/device-tree/compatible": "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0",
    "etc/nv_tegra_release": (
        "# R38 (release), REVISION: 2.2, GCID: 42205042, BOARD: generic, EABI: aarch64, "
        "DATE: Thu Sep 25 22:47:11 UTC 2025\n"
    ),
    "var/lib/nvpmodel/status": "pmode:0000\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=1 NAME=120W >\n",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000\n",
    "sys/class/devfreq/gpu-gpc-0/min_freq": "1575000000\n",
    "sys/class/devfreq/gpu-gpc-0/max_freq": "1575000000\n",
    "sys/class/devfreq/bwmgr/cur_freq": "4266000000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "2601000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_min_freq": "2601000\n",
    "sys/devices/system/cpu/cpufreq/policy0/scaling_max_freq": "2601000\n",
    "sys/class/hwmon/hwmon0/name": "ina238\n",
    "sys/class/hwmon/hwmon0/power1_input": "23100000\n",
    "sys/class/hwmon/hwmon1/name": "ina3221\n",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_GPU\n",
    "sys/class/hwmon/hwmon1/in1_input": "12000\n",
    "sys/class/hwmon/hwmon1/curr1_input": "200\n",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_SOC_MSS\n",
    "sys/class/hwmon/hwmon1/in2_input": "12000\n",
    "sys/class/hwmon/hwmon1/curr2_input": "540\n",
    "sys/class/hwmon/hwmon1/in3_label": "VIN_SYS_5V0\n",
    "sys/class/hwmon/hwmon1/in3_input": "5000\n",
    "sys/class/hwmon/hwmon1/curr3_input": "1304\n",
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root
