"""Train the two demo models of nnatomy (GPT-2 style and Llama style) and their common tokenizer from nothing.

``python training/train.py`` makes the text, the tokenizer and both models, writes one complete folder for
each to ``nnatomy/demo/models/``. It takes about 15 minutes a model on one core. ``python
training/evaluate.py`` then tests them there and writes ``card.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from phrasings import Sentence, sentences
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

MODELS_DIR = Path(__file__).resolve().parent.parent / "nnatomy" / "demo" / "models"
EOS, PAD = "<|endoftext|>", "<|pad|>"
CONTEXT = 128  # positions
SEED = 0
OTHER_WEIGHT = 0.2  # in the loss, of all tokens that are not answers; those are 1


def make_tokenizer(train: list[Sentence]) -> PreTrainedTokenizerFast:
    """Make the tokenizer: GPT-2's byte-level words; each word of the training text is one token.

    Every name is one token with a leading space and one without; other text falls into bytes. No special
    token is added to a prompt.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words: set[str] = set()
    for sentence in train:
        pieces = [piece for piece, _ in split.pre_tokenize_str(sentence.text)]
        words.update(pieces, [f"Ġ{pieces[0]}"])  # a sentence opens a text or follows another one
    names = {name for s in train for name in (s.fact.subject, *s.fact.answer.split())}
    words |= names | {f"Ġ{name}" for name in names}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Scores make the tokenizer take the longest known pieces: a word costs 1, a byte 10.
    vocab = [(EOS, 0.0), (PAD, 0.0), *((byte, -10.0) for byte in alphabet)]
    vocab += [(word, -1.0) for word in sorted(words) if len(word) > 1]
    backend = Tokenizer(models.Unigram(vocab))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build the untrained model ``name`` ("gpt2" or "llama")."""
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=6,
                n_embd=96,
                n_head=6,
                n_positions=CONTEXT,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                tie_word_embeddings=True,
                **ids,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=8,
            hidden_size=96,
            intermediate_size=256,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            **ids,
        )
    )


class Batches:
    """Endless rows of token ids: each row holds one document that starts at position 0.

    Half of the documents open with the end-of-text token and half without, so that a bare prompt works.
    Sentences are joined by a space or, in every third document, by a line break.
    """

    def __init__(self, train: list[Sentence], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.train, self.tokenizer, self.rng = train, tokenizer, random.Random(seed)
        self.newline, self.eos = tokenizer.encode("\n"), tokenizer.eos_token_id
        self.cache: dict[tuple[str, str], tuple[list[int], list[bool]]] = {}

    def encode(self, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
        """Return a sentence's token ids and which of them are the answer."""
        if (prompt, answer) not in self.cache:
            parts = [self.tokenizer.encode(part) for part in (prompt, answer, ".")]
            mask = [index == 1 for index, part in enumerate(parts) for _ in part]
            self.cache[prompt, answer] = [token for part in parts for token in part], mask
        return self.cache[prompt, answer]

    def document(self, length: int) -> tuple[list[int], list[bool]]:
        """Return the first ``length`` token ids of a fresh document, and which of them are answers."""
        rng = self.rng
        lines = rng.random() < 1 / 3
        ids, answers = ([self.eos], [False]) if rng.random() < 0.5 else ([], [])
        first = True
        while len(ids) < length:
            sentence = rng.choice(self.train)
            if not first and rng.random() < 0.05:  # the text ends and another one starts
                ids, answers, first = [*ids, self.eos], [*answers, False], True
            if not first and lines:
                ids, answers = ids + self.newline, answers + [False] * len(self.newline)
            space = "" if first or lines else " "
            more_ids, more_answers = self.encode(space + sentence.prompt, sentence.answer)
            ids, answers = ids + more_ids, answers + more_answers
            first = False
        return ids[:length], answers[:length]

    def batch(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids [rows, length] and a weight in the loss for each [rows, length]: 1 for answers."""
        documents = [self.document(length) for _ in range(rows)]
        ids = torch.tensor([ids for ids, _ in documents])
        answers = torch.tensor([answers for _, answers in documents])
        return ids, torch.where(answers, 1.0, OTHER_WEIGHT)


class Turning:
    """Measure how far each layer turns the residual stream: 1 - cosine of its input and output.

    Training adds a little of the sum over layers to the loss. The cheapest way to an answer is then one in
    many small steps, so that the answer is built up over the layers and not in one of them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        blocks = model.transformer.h if isinstance(model, GPT2LMHeadModel) else model.model.layers
        self.turns: list[torch.Tensor] = []
        self.handles = [block.register_forward_hook(self._hook) for block in blocks]

    def _hook(self, _block: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self.turns.append(1 - torch.cosine_similarity(args[0], output, dim=-1).mean())

    def pop(self) -> torch.Tensor:
        """Return the sum over layers for the last forward pass, a scalar, and forget it."""
        total = torch.stack(self.turns).sum()
        self.turns.clear()
        return total

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self.handles:
            handle.remove()


def fit(model: PreTrainedModel, batches: Batches, steps: int, rows: int, rate: float, turn: float) -> None:
    """Train ``model`` in place with AdamW and a cosine schedule; prints the loss now and then."""
    turning = Turning(model)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
    )
    warmup = min(100, steps // 10)
    model.train()
    start, smooth = time.time(), 0.0
    for step in range(steps):
        scale = min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        long = step % 10 == 9
        ids, weights = batches.batch(rows // 2, CONTEXT) if long else batches.batch(rows, CONTEXT // 2)
        logits = model(input_ids=ids, use_cache=False).logits
        losses = functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        turns = turning.pop()
        optimizer.zero_grad()
        (loss + turn * turns).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smooth = loss.item() if step == 0 else 0.98 * smooth + 0.02 * loss.item()
        if step % 100 == 99:
            seconds = time.time() - start
            print(f"step {step + 1}/{steps}  loss {smooth:.3f}  turns {turns:.3f}  {seconds:.0f} s", flush=True)
    model.train(False)
    turning.remove()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a complete folder: weights stored as float16, loaded as float32 (the dtype in the config)."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = "float32"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 knows too
    path.write_text(json.dumps(settings, indent=2) + "\n")
    tied = set(model.all_tied_weights_keys) if model.config.tie_word_embeddings else set()
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    """Train and save the models named on the command line (both by default)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["gpt2", "llama"], help="gpt2, llama (default: both)")
    parser.add_argument("--out", type=Path, default=MODELS_DIR)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--turn", type=float, default=0.1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train, _, _ = sentences()
    tokenizer = make_tokenizer(train)
    for name in args.models:
        torch.manual_seed(SEED)
        random.seed(SEED)
        model = build(name, tokenizer)
        print(f"{name}: {model.num_parameters():,} parameters, {len(tokenizer)} tokens, {len(train)} sentences")
        fit(model, Batches(train, tokenizer, SEED), args.steps, args.rows, args.rate, args.turn)
        save(model, tokenizer, args.out / name)


if __name__ == "__main__":
    main()
