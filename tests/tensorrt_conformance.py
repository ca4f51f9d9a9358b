"""Compares our TensorRT code with the bindings that Python finds; prints what does not fit, as JSON."""

import ast
import inspect
import json
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import fake_tensorrt
import tensorrt_bindings as trt

import omniad_edge.tensorrt_library
from omniad_edge.export import tensorrt_engine as builder

SOURCES = ("omniad_edge/tensorrt_engine.py", "omniad_edge/tensorrt_library.py", "export/tensorrt_engine.py")
ROOT = Path(__file__).resolve().parents[1]


def missing_names() -> list[str]:
    """Each trt.A.B in our sources that the bindings do not have."""
    missing = []
    for source in SOURCES:
        for node in ast.walk(ast.parse((ROOT / source).read_text())):
            match = (
                re.search(r"(?:^|\.)trt\.([\w.]+)$", ast.unparse(node))
                if isinstance(node, ast.Attribute)
                else None
            )
            if match and not has(match[1]):
                missing.append(f"{source}:{node.lineno}: trt.{match[1]}")
    return missing


def has(path: str) -> bool:
    value = trt
    for name in path.split("."):
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def unlike_the_bindings() -> list[str]:
    """What is in the stand-in and is not so in the bindings."""
    found = []
    for name, ours in public(fake_tensorrt).items():
        if getattr(ours, "__module__", "") != "fake_tensorrt":
            continue
        theirs = getattr(trt, name, None)
        if theirs is None:
            found.append(name)
        elif not inspect.isclass(ours):
            found += differences(name, ours, theirs)
        else:
            for member, value in own(ours).items():
                found += differences(f"{name}.{member}", value, inspect.getattr_static(theirs, member, None))
    return found


def public(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if not name.startswith("_")}


def own(cls: type) -> dict[str, Any]:
    """Members that stand for some of the bindings; a constructor only where code may call it."""
    if issubclass(cls, Enum):
        return dict(cls.__members__)
    made_by_us = cls.__name__ in ("Builder", "OnnxParser", "Runtime", "ILogger", "IProgressMonitor")
    return public(cls) | ({"__init__": cls.__init__} if made_by_us else {})


def differences(name: str, ours: Any, theirs: Any) -> list[str]:
    if theirs is None:
        return [f"{name} is missing"]
    if isinstance(ours, property):
        return [] if isinstance(theirs, property) else [f"{name} is no property"]
    if inspect.isfunction(ours):
        wanted, has = signature(ours), signatures(theirs)
        same = wanted in has or (wanted[-1] == "object" and wanted[:-1] in [other[:-1] for other in has])
        return [] if same else [f"{name}: ours {wanted}, theirs {has}"]
    if isinstance(ours, int):  # a member of an enumeration
        return []
    return [] if isinstance(theirs, property) and theirs.fset else [f"{name} cannot be set"]


def signature(function: Any) -> tuple[str, ...]:
    """Names of the parameters, with = if they may be left out, and the type returned; an object may be any."""
    described = inspect.signature(function)
    names = [p.name + ("" if p.default is p.empty else "=") for p in described.parameters.values()]
    returned = described.return_annotation
    return (*names, bare(returned.__name__ if type(returned) is type else str(returned)))


def signatures(theirs: Any) -> list[tuple[str, ...]]:
    """The same of each overload, as pybind11 writes them into the docstring."""
    found = []
    for line in (getattr(theirs, "__func__", theirs).__doc__ or "").splitlines():
        match = re.fullmatch(r"(?:\d+\. )?\w+\((.*)\) -> (.*)", line.strip())
        if match:
            parameters = re.sub(r"<[^>]*>", "...", match[1])
            names = [re.match(r"(\w+)", p)[1] + ("=" if "=" in p else "") for p in split(parameters)]
            found.append((*names, bare(match[2])))
    return found


def split(parameters: str) -> list[str]:
    """At commas outside of brackets."""
    return [p.strip() for p in re.split(r",(?![^\[(]*[\])])", parameters) if p.strip()]


def bare(type_name: str) -> str:
    """Without modules."""
    return re.sub(r"\w+(\.|::)", "", type_name).lower()


def unlike_the_stand_in() -> list[str]:
    """Our subclasses of the bindings' classes, made and called as TensorRT calls them."""
    log = omniad_edge.tensorrt_library.new_log(trt)
    log.log(trt.ILogger.INFO, "not this")
    log.log(trt.ILogger.ERROR, "this")
    told = []
    monitor = builder.new_monitor(trt, lambda *report: told.append(report))
    monitor.phase_start("phase", None, 2)
    going = [monitor.step_complete("phase", step) for step in range(2)]
    monitor.phase_finish("phase")
    expected = [["this"], [True, True], [("phase", 0, 2), ("phase", 1, 2), ("phase", 2, 2)]]
    made = [log.errors, going, told]
    return [f"{ours} instead of {wanted}" for ours, wanted in zip(made, expected, strict=True) if ours != wanted]


json.dump(
    {
        "version": trt.__version__,
        "names": missing_names(),
        "stand_in": unlike_the_bindings(),
        "derived": unlike_the_stand_in(),
    },
    sys.stdout,
)
