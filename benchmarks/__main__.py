"""Runs a benchmark: ``python -m benchmarks NAME``, and without a name the race of the engines.

``python -m benchmarks NAME --help`` lists the options of one. Results go to ``--output``; with
``--beside FOLDER`` another checkout runs the same benchmark, in turns with this one.
"""

import sys
from importlib import import_module
from pathlib import Path

from mico_chat.engine.cpu import set_openmp
from mico_chat.late import late

# It brings libraries that read the environment.
with late():
    from benchmarks import harness

RESULTS = Path("benchmarks/results")
NAMES = {
    "architectures": "benchmarks.model.architectures:measure",
    "attacks": "benchmarks.service.attacks:measure",
    "busy": "benchmarks.service.busy:measure",
    "capacity": "benchmarks.capacity:measure",
    "chat-defaults": "benchmarks.model.chat_defaults:measure",
    "cold": "benchmarks.service.cold:measure",
    "data-cost": "benchmarks.capacity:data_cost",
    "data-engine-kill": "benchmarks.data.engine:kill",
    "data-engine-rows": "benchmarks.data.engine:rows",
    "data-engine-scaling": "benchmarks.data.engine:scaling",
    "data-engine-throughput": "benchmarks.data.engine:throughput",
    "decode": "benchmarks.data.decode:measure",
    "explanations": "benchmarks.model.explanations:measure",
    "forms": "benchmarks.engines.forms:measure",
    "frames": "benchmarks.model.frames:measure",
    "hour": "benchmarks.service.users:hour",
    "new-machine": "benchmarks.service.cold:new_machine",
    "open-models": "benchmarks.service.open_models:measure",
    "page": "benchmarks.service.page:measure",
    "preprocessing": "benchmarks.model.preprocessing:measure",
    "race": "benchmarks.engines.race:measure",
    "reading": "benchmarks.model.reading:measure",
    "real-media": "benchmarks.model.real_media:measure",
    "speed": "benchmarks.engines.speed:measure",
    "summary": "benchmarks.summary:write",
    "talk": "benchmarks.service.talk:measure",
    "talk-half-hour": "benchmarks.service.talk:half_hour",
    "teach": "benchmarks.model.teach:measure",
    "training": "benchmarks.data.training:measure",
    "training-data": "benchmarks.data.training_data:measure",
    "training-memory": "benchmarks.data.training_memory:measure",
    "users": "benchmarks.service.users:measure",
}


def main() -> None:
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "race"
    if name not in NAMES:
        sys.exit(f"error: {name!r} is no benchmark; they are {', '.join(NAMES)}")
    if name == "race":
        set_openmp()  # the environment of the commands, which torch reads when it is imported
    module, _, function = NAMES[name].partition(":")
    measure = getattr(import_module(module), function)
    harness.run(name, measure, arguments, RESULTS if name in ("race", "summary") else None)


if __name__ == "__main__":
    main()
