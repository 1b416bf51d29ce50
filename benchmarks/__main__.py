"""``python -m benchmarks``: the engines' race, under the environment that the commands run in."""

from mico_chat.engine.cpu import set_openmp

set_openmp()

from benchmarks.engines import main  # noqa: E402  (torch reads the environment when imported)

main()
