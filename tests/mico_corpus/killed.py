"""A build that kills itself at a chosen moment.

``python -m tests.mico_corpus.killed MOMENT RECIPE OUTPUT SOURCE`` counts moments: before and
after a file gets its name, and whenever a file is cut or an annotator is asked. It kills itself,
as SIGKILL does, at the moment of this number; without so many, it ends and prints their number.
"""

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from mico_corpus import build
from mico_corpus.cutting.isolated import Isolated
from mico_corpus.places import Place
from mico_corpus.recipe import BuildRecipe
from tests.mico_corpus.annotators import Told


class Moments:
    def __init__(self, last: int) -> None:
        self.last = last
        self.count = 0

    def pass_one(self) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def counted(*arguments: Any, **named: Any) -> Any:
            self.pass_one()
            answer = call(*arguments, **named)
            self.pass_one()
            return answer

        return counted


def main(moment: str, recipe: str, output: str, source: str) -> None:
    moments = Moments(int(moment))
    for owner, name in ((Place, "put"), (Isolated, "_one"), (Told, "__call__")):
        setattr(owner, name, moments.around(getattr(owner, name)))
    content = Path(recipe).read_text(encoding="utf-8")
    build.build(BuildRecipe.model_validate_json(content), [source], output)
    print(moments.count)


if __name__ == "__main__":
    main(*sys.argv[1:])
