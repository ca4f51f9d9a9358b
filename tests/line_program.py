"""A line as a program, for tests that end it from outside: line_program.py FOLDER [WEBHOOK_URL]

Frames come every 5 ms, an inspection takes as long. Records go to FOLDER/line.jsonl, to the webhook by way of
FOLDER/spool.db, and one part in ten to FOLDER/rejects. Prints "started" when signals are handled, and when it
was stopped its counts, of frames and of records that an output dropped.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from threading import Event
from time import monotonic

from line_parts import FakeDetector
from watched_line import LargerCamera, counters_watched

from omniad_edge.line.line import Line
from omniad_edge.outputs.json_lines import JsonLines
from omniad_edge.outputs.rejects import Rejects
from omniad_edge.outputs.webhook import Webhook

PERIOD_S = 0.005


class Belt(LargerCamera):
    """Takes a frame every PERIOD_S; one in ten shows a defect."""

    due_s = 0.0

    def read(self, timeout_s: float):
        Event().wait(max(0.0, self.due_s - monotonic()))
        self.due_s = max(self.due_s, monotonic() - 1.0) + PERIOD_S
        self.push(120 if self.sequence % 10 == 9 else 50)
        return super().read(timeout_s)


class Inspector(FakeDetector):
    """Its first call is made by a line that handles signals already."""

    started = False

    def __call__(self, images, product=None):
        if not self.started:
            self.started = True
            print("started", flush=True)
        Event().wait(PERIOD_S)
        return super().__call__(images, product)


def main(folder: Path, *urls: str) -> None:
    line = Line(Inspector(), Belt())
    line.add(JsonLines(folder / "line.jsonl"), Rejects(folder / "rejects"))
    line.add(*(Webhook(url, folder / "spool.db") for url in urls))
    with counters_watched(line):
        counts = line.run()
    print(json.dumps(asdict(counts)))
    print(json.dumps({status.name.split()[0]: status.dropped for status in line.snapshot().outputs}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
