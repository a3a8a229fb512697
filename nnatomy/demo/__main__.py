"""`python -m nnatomy.demo [--html FILE]`: the analyses on both demo models, as tables and as a page."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from transformers.utils import logging

from nnatomy.demo.analysis import analyse
from nnatomy.demo.tables import results_table

MODELS = ("gpt2", "llama")


def main(arguments: list[str] | None = None) -> None:
    """Run everything, print the tables, write the page."""
    parser = argparse.ArgumentParser(prog="python -m nnatomy.demo", description=main.__doc__)
    parser.add_argument("--html", type=Path, default=Path("nnatomy-demo.html"), metavar="FILE")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    every = []
    for name in MODELS:
        every.append(analyse(name))
        print(results_table(every[-1]), end="\n\n", flush=True)
    if find_spec("plotly") is None:
        raise SystemExit("The page needs plotly: pip install 'nnatomy[plot]'. The tables above are complete.")
    from nnatomy.demo.page import page

    options.html.write_text(page(every), encoding="utf-8")
    print(f"The same with plots: {options.html.resolve()}")


if __name__ == "__main__":
    main()
