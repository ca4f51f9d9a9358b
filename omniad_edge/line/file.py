"""A line as a TOML file: `read_line_file("line3.toml").run()`.

    bundle = "line3.omniad"         # paths are relative to this file
    product = "screw"               # what the parts are; without it as recognised
    source = "gige://?trigger=off"  # see `open_source`; or several by name: [source] top = "...", side = "..."
    trigger = "frame"               # or "every 500ms", "mqtt://broker/line3/trigger"
    deadline_ms = 50

    [outputs]
    json_lines = "verdicts.jsonl"
    mqtt = "mqtt://${MQTT_USER}:${MQTT_PASSWORD}@broker/line3"
    spool = "spool"

`${NAME}` in any text is the environment's. Names and meanings are those of Detector, Line and the outputs.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ..address import parse_address
from ..bundle import read_bundle
from ..cameras.camera_process import CameraProcess
from ..cameras.folder_source import FolderSource
from ..cameras.sources import FORMS, SCHEME, open_source
from ..credentials import without_credentials
from ..detector import Detector
from ..errors import BundleError, InputError, OmniADError
from ..files import check_writable
from ..frame import Source
from ..image import list_images
from ..outputs.delivery import Output
from ..outputs.json_lines import JsonLines
from ..outputs.mqtt import PORTS, Mqtt, MqttTrigger, load_paho
from ..outputs.rejects import Rejects
from ..outputs.webhook import Webhook
from .health import Health
from .keys import TABLES, in_words, move_to, unknown
from .line import Line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
INTERVAL = re.compile(r"every +(\d{1,9}(?:\.\d{1,9})?) *(ms|s|min)")
SECONDS = {"ms": 1e-3, "s": 1.0, "min": 60.0}
TRIGGERED = "'every 500ms' or 'mqtt://host/topic'"


def read_line_file(path: str | Path) -> Line:
    """The line of a file, with its outputs and health page: the engine is loaded, all else is opened by `run`.

    Raises InputError with every mistake in the file, one a line with the key's path, without values of `${...}`.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as exc:
        raise InputError(f"{path}: expected a TOML file; it cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise InputError(f"{path}: expected TOML: {exc}") from exc
    return LineFile(path, content).line()


class LineFile:
    """Makes the parts of one file's line, and collects the mistakes: (key's path, in words)."""

    def __init__(self, path: Path, content: dict) -> None:
        self.path, self.folder = path, Path(os.path.abspath(path)).parent
        self.mistakes: list[tuple[str, str]] = []
        self.lists_sources = False  # whether one of them is an address that no source has
        self.hidden: list[tuple[str, str, str]] = []  # key's path, a variable's value, what messages say for it
        self.raw = content
        self.top = self.table("", self.with_environment("", content))

    def line(self) -> Line:
        top, line = self.top, None
        detector = self.detector()
        sources = self.sources()
        trigger = self.trigger(lambda *event: line.output_event(*event))
        names = ("deadline_ms", "views", "policy", "on_timeout", "rule", "on_error")
        options = {name: top[name] for name in names if name in top}
        if trigger == "frame" and any(source.software_trigger for source in sources.values()):
            self.wrong("trigger", f"a camera waits for a software trigger; expected {TRIGGERED}, got 'frame'")
        self.check_options(trigger, options)
        outputs = self.outputs()
        if "health" in top:
            outputs.append(self.health(top["health"]))
        self.refuse_mistakes()
        name = top.get("name", self.path.stem)
        line = Line(detector, sources, top.get("product"), trigger=trigger, name=name, **options)
        return line.add(*outputs)

    # ---- mistakes

    def wrong(self, key: str, what: str) -> None:
        if not any(what == said and f"{key}.".startswith(f"{said_of}.") for said_of, said in self.mistakes):
            self.mistakes.append((key, what))

    def is_wrong(self, key: str) -> bool:
        """Whether something is, of this key or within it."""
        return any(said_of == key or said_of.startswith(f"{key}.") for said_of, _ in self.mistakes)

    def attempt(self, key: str, make: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """What `make` returns; None if it raises, which is a mistake of `key` or of the option the error names."""
        try:
            return make(*args, **options)
        except OmniADError as exc:
            said, listed, _ = str(exc).partition(". A source is one of\n")
            self.lists_sources |= bool(listed)
            name, _, rest = said.partition("\n")[0].partition(": ")
        if name in TABLES.get(key, ()):
            key = f"{key}.{name}".strip(".")
        elif name not in key.split("."):
            rest = f"{name}: {rest}" if rest else name
        self.wrong(key, rest)
        return None

    def refuse_mistakes(self) -> None:
        if not self.mistakes:
            return
        lines = [f"{key}: {self.hide(key, ' '.join(what.split()))}" for key, what in self.mistakes]
        text = "\n  ".join([f"{self.path}: {len(lines)} mistake{'s' * (len(lines) > 1)}", *lines])
        raise InputError(f"{text}\nA source is one of\n{FORMS}" if self.lists_sources else text)

    def hide(self, key: str, what: str) -> str:
        for of, value, shown in sorted(self.hidden, key=lambda hidden: -len(hidden[1])):
            if f"{of}.".startswith(f"{key}.") or key.startswith(f"{of}."):
                what = what.replace(value, shown)
        return without_credentials(what)

    # ---- values

    def with_environment(self, key: str, value: Any) -> Any:
        """The same with the environment's values for `${NAME}`; what names a missing variable is left out."""
        if isinstance(value, dict):
            filled = {name: self.with_environment(f"{key}.{name}".strip("."), v) for name, v in value.items()}
            return {name: v for name, v in filled.items() if v is not None}
        if not isinstance(value, str):
            return value
        for name in VARIABLE.findall(value):
            if name not in os.environ:
                self.wrong(key, f"the environment variable {name} is not set; set it, or write the value here")
                return None
            given = os.environ[name]
            # As messages may show it: as it is, without its %40, or as Python writes text.
            ways = {given, unquote(given), repr(given)[1:-1]} - {""}
            self.hidden += [(key, way, f"${{{name}}}") for way in ways]
        value = VARIABLE.sub(lambda match: os.environ[match[1]], value)
        if not value.strip() or "\0" in value:
            self.wrong(
                key, f"expected text, got {'an empty one' if not value.strip() else 'one with a zero byte'}"
            )
            return None
        return value

    def table(self, where: str, content: dict) -> dict[str, Any]:
        """The keys of a table that are right so far."""
        kinds, right = TABLES[where], {}
        for name, value in content.items():
            key = f"{where}.{name}".strip(".")
            if name not in kinds:
                self.wrong(key, unknown(where, name))
                continue
            kind = kinds[name]
            if not isinstance(value, kind.types) or (isinstance(value, bool) and bool not in kind.types):
                self.wrong(key, f"expected {kind.words}, got {in_words(value)}")
                continue
            if kind.path:
                value = str(self.folder / value)
            before = len(self.mistakes)
            if kind.check:
                self.attempt(key, kind.check, value)
            if len(self.mistakes) == before:
                right[name] = value
        return right

    def missing(self, key: str, content: Mapping, what: str) -> bool:
        """Whether a key that is needed is not there, or wrong."""
        name = key.rpartition(".")[2]
        if name not in content and not self.is_wrong(key):
            self.wrong(key, f"missing; expected {what}")
        return name not in content

    # ---- what a line is made of

    def detector(self) -> Detector | None:
        top = self.top
        if self.missing("bundle", top, "the path of a bundle, as `omniad export` writes it"):
            return None
        options = {name: top[name] for name in ("backend", "precision", "threads") if name in top}
        opened = None
        try:
            opened = Detector(top["bundle"], **options)
        except BundleError as exc:
            self.wrong("bundle", str(exc))
            return None
        except OmniADError as exc:
            name, _, rest = str(exc).partition(": ")
            self.wrong(*((name, rest) if name in TABLES[""] else ("backend", str(exc))))
        if "product" in top:  # known also where the engine is not to be had
            self.attempt("", Line, opened or read_bundle(top["bundle"]), (), top["product"])
        return opened

    def sources(self) -> dict[str | None, Source]:
        """By name; None for the only one, which has its address for a name."""
        if self.missing("source", self.top, "the address of a camera, file or folder"):
            return {}
        given, raw = self.top["source"], self.raw["source"]
        if not isinstance(given, dict):
            source = self.source("source", given)
            if given != raw and source is not None:
                source.name = without_credentials(raw)
            return {None: source} if source is not None else {}
        if not given:
            self.wrong("source", "expected a name and an address at least, got an empty table")
        made = {}
        for name, address in given.items():
            key = f"source.{name}"
            if name in TABLES[""]:
                self.wrong(key, f"no name for a source; for the line's {name} {move_to('')}")
            elif not isinstance(address, str | int) or isinstance(address, bool):
                self.wrong(key, f"expected an address, got {in_words(address)}")
            else:
                made[name] = self.source(key, address)
        return {name: source for name, source in made.items() if source is not None}

    def source(self, key: str, address: str | int) -> Source | None:
        if isinstance(address, str):
            address = located(address.strip(), self.folder)
        source = self.attempt(key, open_source, address)
        if isinstance(source, CameraProcess):
            self.attempt(key, source.check_installed)
        if isinstance(source, FolderSource):
            self.attempt(key, list_images, source.path)
        return source

    def trigger(self, on_event: Callable[[str, str, str], None]) -> Any:
        """What Line takes as trigger; None if it is wrong."""
        text = self.top.get("trigger", "frame")
        if self.is_wrong("trigger"):
            return None
        if text == "frame":
            return text
        if text.startswith("mqtt"):
            return self.over_mqtt("trigger", text, MqttTrigger, on_event=on_event, **self.trust(text))
        interval = INTERVAL.fullmatch(text)
        if interval is None or float(interval[1]) == 0:
            hint = "; 'call' is for programs, which call Line.trigger" if text == "call" else ""
            self.wrong("trigger", f"expected 'frame', {TRIGGERED}; got {text!r}{hint}")
            return None
        return float(interval[1]) * SECONDS[interval[2]]

    def over_mqtt(self, key: str, url: str, make: Callable, *args: Any, **options: Any) -> Any:
        self.attempt(key, load_paho)
        self.attempt(key, parse_address, url, PORTS)
        return None if self.is_wrong(key) else self.attempt(key, make, url, *args, **options)

    def trust(self, url: str) -> dict[str, str]:
        return (
            {"ca_file": self.top["ca_file"]}
            if "ca_file" in self.top and url.startswith(("mqtts", "https"))
            else {}
        )

    def check_options(self, trigger: Any, options: dict[str, Any]) -> None:
        """The line itself is asked, option by option, as it names the first mistake alone."""
        for name, value in options.items():
            self.attempt("", Line, None, (), trigger="call", **{"deadline_ms": 1.0, name: value})
        together = {name: options[name] for name in ("deadline_ms", "views") if name in options}
        if not any(map(self.is_wrong, ("deadline_ms", "views"))):
            trigger = "call" if self.is_wrong("trigger") else trigger  # any but "frame" needs the same
            self.attempt("", Line, None, (), trigger=trigger, **together)

    def outputs(self) -> list[Output]:
        given = self.table("outputs", self.top.get("outputs", {}))
        if "json_lines" in given:
            self.attempt("outputs.json_lines", check_writable, Path(given["json_lines"]), is_folder=False)
        made = [JsonLines(given["json_lines"])] if "json_lines" in given else []
        if "rejects" in given:
            made.append(self.rejects(given["rejects"]))
        network = [name for name in ("mqtt", "webhook") if name in given]
        if network and not self.missing(
            "outputs.spool", given, f"a folder for what {network[0]} has not delivered"
        ):
            self.attempt("outputs.spool", check_writable, Path(given["spool"]), is_folder=True)
        made += [self.network(name, given[name], Path(given.get("spool", self.folder))) for name in network]
        return made

    def rejects(self, given: str | dict) -> Rejects | None:
        key = "outputs.rejects"
        options = self.table(key, given if isinstance(given, dict) else {"folder": given})
        if self.missing(f"{key}.folder", options, "where the images go"):
            return None
        self.attempt(f"{key}.folder", check_writable, Path(options["folder"]), is_folder=True)
        if options.get("near_miss") is False:
            options["near_miss"] = None
        return self.attempt(key, Rejects, **options)

    def network(self, name: str, given: str | dict, spool: Path) -> Output | None:
        key = f"outputs.{name}"
        options = self.table(key, given if isinstance(given, dict) else {"url": given})
        if self.missing(f"{key}.url", options, "an address"):
            return None
        url, file = options.pop("url"), spool / f"{self.path.stem}-{name}.sqlite"
        options |= self.trust(url)
        if name == "mqtt":
            return self.over_mqtt(key, url, Mqtt, file, **options)
        return self.attempt(key, Webhook, url, file, **options)

    def health(self, given: dict) -> Health | None:
        options = self.table("health", given)
        made = self.attempt("health", Health, **options)
        if made is None:
            self.attempt("health", Health)  # a wrong port hides that the package is missing
        return made


def located(address: str, folder: Path) -> str:
    """The address of a source, with the path in it relative to `folder`."""
    scheme = SCHEME.match(address)
    if scheme is None and address and not address.isdecimal():
        return str(folder / address)
    if scheme is not None and scheme[1].lower() == "folder":
        place = address[len("folder:") :].removeprefix("//")
        return address if place.startswith("/") else f"folder://{quote(str(folder))}/{place}"
    return str(folder / address) if address and os.path.exists(folder / address) else address
