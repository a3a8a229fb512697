"""Pictures of every plot, viewer and page in Chromium, to be looked at: `make look` writes them to out/look.

Each at two widths, or at those given, light and dark: `make look PAGES="circuit 600 2000"` draws one page at two others. What a
page complains of, and where it can be scrolled sideways, is printed.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from browser import opened

from nnatomy import StandardizedTransformer
from nnatomy.methods import edge_attribution, logit_difference
from nnatomy.methods.prompts import token_texts
from nnatomy.plots import (
    attention,
    attention_view,
    bars,
    circuit,
    curves,
    heat_map,
    over_picture,
    parts,
    save,
    token_view,
)

WIDTHS = (390, 1400)  # unless others are given
LINES = (  # of commands that write a page
    "check demo:gpt2",
    "anatomy demo:llama",
    'lens demo:gpt2 "The capital of France is" --top 2',
    'patch demo:gpt2 "The capital of France is" "The capital of Japan is" --answer " Paris" --wrong " Tokyo"',
    'attend demo:llama "The capital of France is" --layer 5',
    'attribute demo:llama "The capital of France is" --answer " Paris" --wrong " Rome" --by head',
    'steer demo:llama "The capital of France is" --toward "The capital of Japan is" --away "The capital of France is" --layer 4',
)
PROMPT = "The capital of France is"
LONG = " ".join(["The capital of Italy is Rome and the capital of France is Paris."] * 5)


def main(folder: Path, browser: str, names: Sequence[str]) -> None:
    """Write the pages and their pictures; `names` are those of the pages wanted, all if there are none, and widths."""
    widths = [int(name) for name in names if name.isdecimal()] or WIDTHS
    names = [name for name in names if not name.isdecimal()]
    folder.mkdir(parents=True, exist_ok=True)
    with opened(browser) as tab, TemporaryDirectory() as elsewhere:
        for name, draw in {**plots(), **pages(Path(elsewhere))}.items():
            if names and name not in names:
                continue
            page = folder / f"{name}.html"
            drawn = draw()
            page.write_text(drawn, encoding="utf-8") if isinstance(drawn, str) else save(drawn, page)
            for width in widths:
                for mode in ("light", "dark"):
                    tab.show(page, width=width, dark=mode == "dark")
                    tab.picture(folder / f"{name}-{width}-{mode}.png")
                    wrong = [*tab.errors, *([f"{over} pixels too wide"] if (over := tab.too_wide()) > 0 else [])]
                    sys.stdout.write(": ".join([f"{name}-{width}-{mode}", *wrong]) + "\n")
                    sys.stdout.flush()


def plots() -> dict[str, Callable[[], Any]]:
    """Each function, on the small model where that shows more than random values."""
    model = StandardizedTransformer("demo:gpt2")

    def read(prompt: str) -> tuple[list[str], Any, Any]:
        with torch.no_grad(), model.trace(prompt):
            tokens = model.input_ids[0]
            patterns = [model.attention_probabilities[i][0] for i in range(model.num_layers)]
        with torch.no_grad(), model.trace(prompt):
            hidden = torch.stack([h[0] for h in model.layers_output[:]])
        return token_texts(model, tokens), torch.stack(patterns), hidden

    def lens(prompt: str) -> Any:
        tokens, _, hidden = read(prompt)
        best, at = model.project_on_vocab(hidden).softmax(-1).max(-1)
        return heat_map(
            best,
            rows=[str(i) for i in range(len(best))],
            columns=tokens,
            texts=[token_texts(model, row) for row in at],
            title=f"Logit lens: {prompt}",
            value_name="probability",
        )

    def heads(prompt: str, draw: Callable[..., Any], layer: int | None) -> Any:
        tokens, patterns, _ = read(prompt)
        return draw(
            patterns if layer is None else patterns[layer], tokens=tokens, layer=layer, title=f"Attention: {prompt}"
        )

    def edges() -> Any:
        metric = logit_difference(" Paris", " Rome", model)
        found = edge_attribution(model, PROMPT, "The capital of Italy is", metric=metric)
        return circuit(
            found.effect.mean(0),
            sources=found.sources,
            destinations=found.destinations,
            title=f"Edge attribution: {PROMPT} / The capital of Italy is",
            value_name="logit( Paris) - logit( Rome)",
        )

    def tokens() -> Any:
        texts, patterns, hidden = read(LONG)
        values = {
            "norm after the last layer": hidden[-1].norm(dim=-1),
            "change of norm": hidden[-1].norm(dim=-1) - hidden[0].norm(dim=-1),
            **{f"attention from the last token, L2H{i}": head[-1] for i, head in enumerate(patterns[2])},
        }
        return token_view(texts, values, title=f"Values by token: {LONG}")

    def on_a_picture() -> Any:
        across, down = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 60), indexing="xy")
        shown = (torch.stack([across, down, 1 - across], -1) * 255).byte()
        maps = {f"L{i}H3, from ' dog'": torch.rand(8, 12) ** (i + 1) for i in range(6)}
        return over_picture(shown, maps, title="Attention from a word to a picture's patches", value_name="probability")

    names = [
        "embeddings",
        *(f"L{i}{part}" for i in range(12) for part in [*(f"H{h}" for h in range(12)), " mlp"]),
        "rest",
    ]
    return {
        "lens": lambda: lens(PROMPT),
        "lens-long": lambda: lens(LONG),
        "attention": lambda: heads(PROMPT, attention, 3),
        "attention-layers": lambda: heads(PROMPT, attention, None),
        "attention-long": lambda: heads(LONG, attention, 3),
        "attention-one": lambda: attention(read(PROMPT)[1][2, :1], tokens=read(PROMPT)[0], layer=2, title="One head"),
        "attention-view": lambda: heads(PROMPT, attention_view, None),
        "attention-view-long": lambda: heads(LONG, attention_view, 3),
        "token-view": tokens,
        "circuit": edges,
        "bars": lambda: bars(torch.randn(9), labels=[f"L{i} mlp" for i in range(9)], value_name="logit", title="Bars"),
        "parts": lambda: parts(
            torch.randn(len(names)), labels=names, value_name="logit", title="Direct logit attribution"
        ),
        "over-picture": on_a_picture,
        "curves": lambda: curves(
            range(8),
            {" Paris": torch.rand(8).tolist(), " Rome": torch.rand(8).tolist()},
            title="Curves",
            x_title="layer",
            y_title="probability",
        ),
    }


def pages(folder: Path) -> dict[str, Callable[[], str]]:
    """The demo's page, the server's, and those that the command line writes."""

    def demo() -> str:
        from nnatomy.demo.analysis import analyse
        from nnatomy.demo.page import page

        return page([analyse("gpt2"), analyse("llama")])

    def server() -> str:
        command = [sys.executable, "-m", "nnatomy", "serve", "demo:gpt2", "--port", "0"]
        process = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://[\d.:]+", line)))
            for _ in range(100):
                try:
                    with urlopen(address) as answer:
                        return str(answer.read(), "utf-8")
                except URLError:  # it says its address before it takes connections
                    time.sleep(0.3)
            raise SystemExit("The server does not answer.")
        finally:
            process.terminate()
            process.communicate()

    def written(line: str) -> Callable[[], str]:
        def run() -> str:
            from nnatomy.cli import main

            out = folder / "page.html"
            if main([*shlex.split(line), "--out", str(out)]):
                raise SystemExit(f"nnatomy {line} fails.")
            return out.read_text(encoding="utf-8")

        return run

    return {"demo": demo, "server": server, **{f"cli-{line.split()[0]}": written(line) for line in LINES}}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
