"""The package's wheel with another machine's native libraries, such as a Jetson's that need not compile them.

    python -m build --wheel --outdir build/wheel
    python kernels/native/platform_wheel.py build/wheel/*.whl build/aarch64/libomniad_*.so

with the runtime, the TensorRT plugin, or both, as they were built there,
writes build/wheel/omniad_edge-VERSION-py3-none-manylinux_2_35_aarch64.whl. Needs the standard library alone.
"""

import base64
import hashlib
import re
import struct
import sys
import zipfile
from pathlib import Path

MACHINES = {62: "x86_64", 183: "aarch64"}  # e_machine of ELF
# What Ubuntu 22.04 has, thus JetPack 6 and all after it.
NEWEST = {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}
LIBRARIES = ("libomniad_runtime.so", "libomniad_plugin.so")


def main(arguments: list[str]) -> int:
    if len(arguments) < 2:
        print("usage: platform_wheel.py WHEEL LIBRARY...", file=sys.stderr)
        return 2
    try:
        wheel, *libraries = map(Path, arguments)
        print(add_libraries(wheel, libraries))
    except (OSError, ValueError, zipfile.BadZipFile) as exc:
        print(f"platform_wheel: {exc}", file=sys.stderr)
        return 1
    return 0


def add_libraries(wheel: Path, libraries: list[Path]) -> Path:
    """The new wheel, beside the given one, in which there may be libraries of this machine: they are left out.

    Raises ValueError for files that are not such.
    """
    if not (named := re.fullmatch(r"(.+-py3-none)-\w+\.whl", wheel.name)):
        raise ValueError(f"{wheel}: expected a wheel for any Python, like omniad_edge-0.1.0-py3-none-any.whl")
    if unknown := [library for library in libraries if library.name not in LIBRARIES]:
        raise ValueError(f"{unknown[0]}: expected a library named {' or '.join(LIBRARIES)}")
    tag, *others = sorted({platform_tag(library) for library in libraries})
    if others:
        raise ValueError(f"expected libraries for one machine; got {tag} and {', '.join(others)}")
    made = wheel.with_name(f"{named[1]}-{tag}.whl")
    with zipfile.ZipFile(wheel) as given:
        contents = {info.filename: given.read(info) for info in given.infolist()}
    (record,) = (name for name in contents if name.endswith(".dist-info/RECORD"))
    described = record.replace("RECORD", "WHEEL")
    del contents[record]
    text = re.sub(rb"Tag: py3-none-\w+", f"Tag: py3-none-{tag}".encode(), contents[described])
    contents[described] = text.replace(b"Root-Is-Purelib: true", b"Root-Is-Purelib: false")
    for name in LIBRARIES:
        contents.pop(f"omniad_edge/{name}", None)
    contents |= {f"omniad_edge/{library.name}": library.read_bytes() for library in libraries}
    lines = [f"{name},{digest(content)},{len(content)}\n" for name, content in contents.items()]
    contents[record] = "".join([*lines, f"{record},,\n"]).encode()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in contents.items():
            out.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return made


def platform_tag(library: Path) -> str:
    """Like manylinux_2_35_aarch64. Raises ValueError for a library that asks for more than such a system has."""
    code = library.read_bytes()
    if code[:4] != b"\x7fELF" or (machine := struct.unpack_from("<H", code, 18)[0]) not in MACHINES:
        raise ValueError(f"{library}: expected a library for {' or '.join(MACHINES.values())}")
    for name, number in needed_versions(code):
        if number > NEWEST[name]:
            wanted, newest = (".".join(map(str, numbers)) for numbers in (number, NEWEST[name]))
            raise ValueError(
                f"{library}: asks for {name}_{wanted}, Ubuntu 22.04 (JetPack 6) has {newest}; "
                "compile it there, or with the compiler of Debian 12"
            )
    return f"manylinux_{'_'.join(map(str, NEWEST['GLIBC']))}_{MACHINES[machine]}"


def needed_versions(code: bytes) -> set[tuple[str, tuple[int, ...]]]:
    """Versions of glibc and libstdc++ that a library asks for: texts of their own in its dynamic strings."""
    found = re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI)_(\d+(?:\.\d+)*)(?=\0)", code)
    return {(name.decode(), tuple(map(int, number.split(b".")))) for name, number in found}


def digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
