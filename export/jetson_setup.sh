#!/usr/bin/env bash
# Makes a Jetson with JetPack 6 or 7 ready to run lines: an environment in /opt/omniad and the systemd unit.
#     export/jetson_setup.sh [--dry-run] [--jetpack 6|7] [--power-mode NAME] PACKAGE
# PACKAGE: the wheel made for Jetson (export/jetson.md), or a clone of the repository. Says what it does before it
# does it; --dry-run only says it. What is there already is left as it is, so it can be run again, as for a newer wheel.
set -euo pipefail

usage() {
  echo "usage: jetson_setup.sh [--dry-run] [--jetpack 6|7] [--power-mode NAME] PACKAGE" >&2
  exit 2
}

dry_run=false jetpack="" power_mode="" package=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dry-run) dry_run=true ;;
    --jetpack | --power-mode)
      [ $# -gt 1 ] || usage
      [ "$1" = --jetpack ] && jetpack=$2 || power_mode=$2
      shift
      ;;
    -*) usage ;;
    *)
      [ -z "$package" ] || usage
      package=$1
      ;;
  esac
  shift
done
[ -n "$package" ] || usage

fail() {
  echo "jetson_setup: $1" >&2
  exit 1
}

run() {
  printf '    %s\n' "$*"
  $dry_run || "$@"
}

if [ -z "$jetpack" ]; then
  # "# R36 (release), REVISION: 4.3, ..."
  [ -r /etc/nv_tegra_release ] || fail "this is no Jetson: there is no /etc/nv_tegra_release (or give --jetpack)"
  case "$(sed -n '1s/^# R\([0-9]*\) .*/\1/p' /etc/nv_tegra_release)" in
    36) jetpack=6 ;;
    38 | 39) jetpack=7 ;;
    *) fail "expected JetPack 6 (R36) or 7 (R38, R39); /etc/nv_tegra_release has $(head -n 1 /etc/nv_tegra_release)" ;;
  esac
fi
# Of the driver's major number: JetPack 6 has CUDA 12.6, JetPack 7 has 13.
case "$jetpack" in
  6) bindings="cuda-bindings~=12.9" ;;
  7) bindings="cuda-bindings>=13,<14" ;;
  *) usage ;;
esac
[ -e "$package" ] || fail "$package: there is no such wheel or folder"
case "$package" in
  /*) ;;
  *) package=./$package ;; # else pip would look for a project of that name
esac

echo "1. Debian packages: Python's environments, GStreamer and Aravis for cameras"
missing=()
for name in python3-venv python3-gi gir1.2-gstreamer-1.0 gir1.2-gst-plugins-base-1.0 gstreamer1.0-plugins-base \
  gstreamer1.0-plugins-good gstreamer1.0-plugins-bad gir1.2-aravis-0.8; do
  dpkg-query --show --showformat='${Status}' "$name" 2>/dev/null | grep -q "ok installed" || missing+=("$name")
done
if [ ${#missing[@]} -gt 0 ]; then
  run sudo apt-get install --yes "${missing[@]}"
else
  echo "    all there"
fi

echo "2. /opt/omniad: an environment that sees the system's packages (TensorRT, GStreamer), without torch and Triton"
if [ -x /opt/omniad/bin/python ]; then
  echo "    there"
else
  run sudo python3 -m venv --system-site-packages /opt/omniad
fi
run sudo /opt/omniad/bin/python -m pip install --upgrade pip
run sudo /opt/omniad/bin/python -m pip install "${package}[line]" "$bindings"
# pip takes a newer wheel of the same version for the one that is there.
run sudo /opt/omniad/bin/python -m pip install --force-reinstall --no-deps "$package"

echo "3. systemd: the unit omniad@.service, and what it needs on a Jetson (GPU devices, the CSI cameras' socket in /tmp)"
unit=(/opt/omniad/lib/python3*/site-packages/omniad_edge/line/omniad@.service)
run sudo install -m 644 "${unit[@]}" /etc/systemd/system/
run sudo install -d /etc/omniad /etc/systemd/system/omniad@.service.d
drop_in=$(mktemp)
trap 'rm -f "$drop_in"' EXIT
groups=$(for group in video render; do getent group "$group" | cut -d : -f 1 || true; done | xargs) # those there are
cat >"$drop_in" <<UNIT
[Unit]
After=nvargus-daemon.service
[Service]
SupplementaryGroups=$groups
PrivateTmp=no
UNIT
run sudo install -m 644 "$drop_in" /etc/systemd/system/omniad@.service.d/jetson.conf
run sudo systemctl daemon-reload

if [ -n "$power_mode" ]; then
  echo "4. power mode $power_mode, and its highest clocks until the next start"
  mode=$(sed -n "s/^< POWER_MODEL ID=\([0-9]*\) NAME=$power_mode >.*/\1/p" /etc/nvpmodel.conf 2>/dev/null || true)
  if [ -z "$mode" ]; then
    $dry_run || fail "$power_mode is none of: $(sed -n 's/^< POWER_MODEL .* NAME=\(.*\) >.*/\1/p' /etc/nvpmodel.conf | xargs)"
    mode="(of /etc/nvpmodel.conf)"
  fi
  run sudo nvpmodel -m "$mode"
  run sudo jetson_clocks
fi

echo "What it has now:"
run /opt/omniad/bin/omniad doctor
echo "A line: put its TOML file at /etc/omniad/line3.toml, then: sudo systemctl enable --now omniad@line3"
