"""The command line over a scripted engine, for tests that need a process of their own. Settings: SCRIPT, a JSON."""

import json
import os
import sys

from redrafter.cli import main, options
from tests.fakes import scripted


def load(*arguments: object, **settings: object) -> object:
    wanted = json.loads(os.environ["SCRIPT"])
    return scripted(wanted.pop("answer"), **wanted)


options.load_llm = load

if __name__ == "__main__":
    sys.exit(main())
