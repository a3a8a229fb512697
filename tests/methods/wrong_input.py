"""What methods are given that is wrong: each is an error that says what it is and how to mend it. Run by test_wrong_input.py.

It is a process of its own, as in the tests' the runtime checks of types come first.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import torch

import nnatomy.methods as of
from nnatomy import StandardizedTransformer
from nnatomy.errors import UsageError

m = StandardizedTransformer("demo:gpt2", validate=False)
H = m.hidden_size
P, Q, N = "The capital of France is", "The capital of Japan is", float("nan")
nanv = torch.full((H,), N)
met = of.logit_difference(" Paris", " Tokyo", m)
sv = of.SteeringVector({1: torch.ones(H)}, "layers_output", "gpt2", "given")
lens = of.TunedLens.identity(m)
edges = of.edge_attribution(m, P, Q, metric=met)


def t(ask: Callable[[], Any]) -> None:
    """In a trace."""
    with m.trace(P):
        ask()


def ap(**given: Any) -> Any:
    return of.activation_patching(m, **{"clean": P, "corrupted": Q, "metric": met, "progress": False, **given})


def pp(**given: Any) -> Any:
    whole = {
        "clean": P,
        "corrupted": Q,
        "metric": met,
        "sender": "mlps_contribution[1]",
        "receivers": "logits",
    }
    return of.path_patching(m, **{**whole, "progress": False, **given})


def ct(**given: Any) -> Any:
    return of.causal_tracing(m, P, **{"subject": "France", "samples": 1, "progress": False, **given})


def at(*args: Any, **given: Any) -> Any:
    clean, corrupted, metric = args or (P, Q, met)
    return of.attribution_patching(m, clean, corrupted, metric=metric, **given)


def ig(**given: Any) -> Any:
    return of.integrated_gradients(m, P, Q, metric=met, **{"steps": 1, **given})


#: What is called, what is raised, and how its text begins.
ROWS: list[tuple[Callable[[], Any], str, str]] = [
    (
        lambda: of.logit_lens(m, P, positions="first"),
        "InputError",
        'positions=\'first\': it is "last", "all", or one or several numbers.',
    ),
    (
        lambda: of.logit_lens(m, P, positions=99),
        "InputError",
        "positions: prompt 0 has 5 tokens, at 0 to 4 (or -5 to -1); there is no position 99.",
    ),
    (lambda: of.logit_lens(m, P, positions=[]), "InputError", "positions: give at least one."),
    (
        lambda: of.logit_lens(m, P, positions=1.5),
        "InputError",
        "positions=1.5: give a whole number, or several.",
    ),
    (
        lambda: of.logit_lens(m, P, positions=["a"]),
        "InputError",
        "positions=['a']: give a whole number, or several.",
    ),
    (
        lambda: of.logit_lens(m, P, output="prob"),
        "InputError",
        "output='prob': it is one of 'probs', 'logits', 'log_probs'.",
    ),
    (
        lambda: of.logit_lens(m, P, lens="tuned"),
        "InputError",
        "lens='tuned': it is a function of hidden states, such as a TunedLens.",
    ),
    (
        lambda: of.logit_lens(m, P, lens=lambda h: None),
        "InputError",
        "Hidden states are a tensor of floating point numbers, (..., 96); got NoneType.",
    ),
    (
        lambda: of.logit_lens(m, P, batch_size=0),
        "InputError",
        "batch_size=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.logit_lens(m, P, batch_size=-1),
        "InputError",
        "batch_size=-1: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.logit_lens(m, [P, Q, "Japan is in"], batch_size=2.5),
        "InputError",
        "batch_size=2.5: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.logit_lens("demo:gpt2", P),
        "InputError",
        "model is a str: methods take a StandardizedTransformer, StandardizedTransformer('demo:gpt2').",
    ),
    (
        lambda: of.logit_lens(m.hf_model, P),
        "InputError",
        "model is a GPT2LMHeadModel: methods take a StandardizedTransformer, StandardizedTransformer(model, t",
    ),
    (
        lambda: of.logit_lens(m, None),
        "InputError",
        "There is no prompt: give a string, token ids, or a dict with input_ids.",
    ),
    (lambda: of.logit_lens(m, []), "InputError", "The prompt is empty: []."),
    (
        lambda: of.logit_lens(m, 3),
        "InputError",
        "int is no prompt: give a string, a chat (a list of dicts with role and content), token ids, a list o",
    ),
    (
        lambda: of.lens_statistics(m, P, targets=[" a", " b"]),
        "InputError",
        "1 prompt and 2 targets: give one for all, or one each.",
    ),
    (
        lambda: of.lens_statistics(m, P, targets=10**6),
        "InputError",
        "The answer 1000000 is no token id of a vocabulary of 742.",
    ),
    (
        lambda: of.lens_statistics(m, P, targets=[1.5]),
        "InputError",
        "The answer 1.5 is neither a token id nor a text.",
    ),
    (lambda: of.lens_statistics(m, P, top_k=0), "InputError", "top_k=0: it is a whole number, 1 or more."),
    (lambda: of.lens_statistics(m, P, top_k=10**6), "InputError", "top_k=1000000: the model has 742 tokens."),
    (
        lambda: of.lens_statistics(m, P, chunk_size=0),
        "InputError",
        "chunk_size=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.lens_statistics(m, P, targets=" a", next_tokens=True),
        "InputError",
        "Give targets or next_tokens=True, not both.",
    ),
    (lambda: of.TunedLens.train(m, []), "InputError", "There are no texts to train the lens on."),
    (lambda: of.TunedLens.train(m, [P], steps=0), "InputError", "steps=0: it is a whole number, 1 or more."),
    (
        lambda: of.TunedLens.train(m, [P], steps=1, batch_size=0),
        "InputError",
        "batch_size=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.TunedLens.train(m, [P], steps=1, start=of.TunedLens(torch.zeros(1, H, H), torch.zeros(1, H))),
        "InputError",
        "This tuned lens is for a model of 2 layers and width 96; this one has 6 layers and width 96. Train o",
    ),
    (
        lambda: lens(torch.zeros(3, H)),
        "InputError",
        "This tuned lens is for a model of 6 layers and width 96; this one has 3 layers and width 96. Train o",
    ),
    (lambda: of.patchscope_lens(m), "InputError", "Give source_prompts or latents: one of the two."),
    (
        lambda: of.patchscope_lens(m, P, layers=99),
        "LayerIndexError",
        "layers_output[99]: the model has 6 layers, 0 to 5.",
    ),
    (lambda: of.patchscope_lens(m, P, layers=[]), "InputError", "layers=[]: give at least one."),
    (
        lambda: of.patchscope_lens(m, P, layers="all"),
        "InputError",
        "layers='all': it is one layer, or several; they are counted from 0.",
    ),
    (lambda: of.patchscope_lens(m, P, 3), "InputError", "target prompts=3: give several, in a list."),
    (
        lambda: of.patchscope_lens(m, P, ["a", "b"]),
        "InputError",
        "target prompts[0] is 'a': give TargetPrompt(prompt, index_to_patch).",
    ),
    (
        lambda: of.patchscope_lens(m, P, of.TargetPrompt("a", 99)),
        "InputError",
        "positions: prompt 0 has 1 token, at 0 to 0 (or -1 to -1); there is no position 99.",
    ),
    (
        lambda: of.patchscope_lens(m, latents=torch.zeros(2, 1, H)),
        "InputError",
        "latents are of 2 layers: give one for each of the 6 layers asked for, or for each of the model's 6.",
    ),
    (
        lambda: of.patchscope_lens(m, latents=torch.zeros(6, 1, 3)),
        "InputError",
        "The hidden states are 3 wide and the target model's 96: give a mapping from the one to the other, su",
    ),
    (
        lambda: of.patchscope_lens(m, latents=torch.zeros(6, H)),
        "InputError",
        "latents are of (layer, source, hidden); got (6, 96).",
    ),
    (
        lambda: of.patchscope_lens(m, latents="abc"),
        "InputError",
        "latents are a tensor of (layer, source, hidden), or one of (source, hidden) for each layer.",
    ),
    (
        lambda: of.patchscope_lens(m, P, mapping=3),
        "InputError",
        "mapping=3: it is a function of hidden states, such as a torch.nn.Linear.",
    ),
    (
        lambda: of.patchscope_lens(m, P, source_position=50),
        "InputError",
        "positions: prompt 0 has 5 tokens, at 0 to 4 (or -5 to -1); there is no position 50.",
    ),
    (
        lambda: of.patchscope_lens(m, P, source_position="last"),
        "InputError",
        "source_position='last': it is a whole number.",
    ),
    (
        lambda: of.patchscope_lens(m, P, source_position=[0, 1]).shape,
        "InputError",
        "source_position=[0, 1]: it is a whole number.",
    ),
    (
        lambda: of.patchscope_lens(m, P, batch_size=0),
        "InputError",
        "batch_size=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.patchscope_lens(m, P, layers=[0, 1], target_layers=[0, 1, 2]),
        "InputError",
        "2 layers to read and 3 to write: give one target layer for all, or one each.",
    ),
    (
        lambda: of.patchscope_generate(m, P, of.TargetPrompt("a", -1), max_length=0, layers=0),
        "InputError",
        "max_length=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.patchscope_generate(m, P, None, max_length=1, layers=0),
        "InputError",
        "target prompts=None: give several, in a list.",
    ),
    (
        lambda: of.patchscope_generate(m, P, of.TargetPrompt("a", -1), max_length=1, layers=0, max_batch_size=0),
        "InputError",
        "max_batch_size=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.patch_object_attn_lens(m, P, Q, attn_idx_patch=99),
        "InputError",
        "positions: prompt 0 has 5 tokens, at 0 to 4 (or -5 to -1); there is no position 99.",
    ),
    (
        lambda: of.patch_object_attn_lens(m, P, Q, attn_idx_patch="last"),
        "InputError",
        "attn_idx_patch='last': it is a whole number.",
    ),
    (
        lambda: of.patch_object_attn_lens(m, P, Q, attn_idx_patch=0, num_patches=0),
        "InputError",
        "num_patches=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.patch_object_attn_lens(m, [P, Q], [P, Q, P], attn_idx_patch=0),
        "InputError",
        "2 sources and 3 target prompts: give one source for all, or one each.",
    ),
    (
        lambda: of.TargetPromptBatch.from_prompts(["a", "b"], [1]),
        "InputError",
        "index_to_patch has 1 positions for 2 prompts: give one for all, or one each.",
    ),
    (
        lambda: of.TargetPromptBatch.from_prompts(["a"], "x"),
        "InputError",
        "index_to_patch='x': give a whole number, or several.",
    ),
    (
        lambda: of.TargetPromptBatch.from_prompts(["a"], [1.5]),
        "InputError",
        "index_to_patch=[1.5]: give a whole number, or several.",
    ),
    (
        lambda: of.TargetPromptBatch.from_target_prompts([]),
        "InputError",
        "There are no target prompts: give at least one.",
    ),
    (
        lambda: of.TargetPromptBatch.from_target_prompts(["a"]),
        "InputError",
        "target prompts[0] is 'a': give TargetPrompt(prompt, index_to_patch).",
    ),
    (
        lambda: of.TargetPromptBatch.auto(None, 2),
        "InputError",
        "target prompts=None: give several, in a list.",
    ),
    (
        lambda: of.TargetPromptBatch.from_target_prompt(of.TargetPrompt("a", -1), 0),
        "InputError",
        "There are no target prompts: give at least one.",
    ),
    (lambda: of.repeat_prompt("cat"), "InputError", "words='cat': give several, in a list."),
    (lambda: of.repeat_prompt([]), "InputError", "words=[]: give several, in a list."),
    (
        lambda: of.it_repeat_prompt(m.tokenizer),
        "InputError",
        "The tokenizer has no chat template: take repeat_prompt(), or set tokenizer.chat_template.",
    ),
    (
        lambda: of.Prompt.from_strings(P, {}, m),
        "InputError",
        "There are no targets: give words, or a dict of words by the name of each target.",
    ),
    (
        lambda: of.Prompt.from_strings(P, {"a": []}, m),
        "InputError",
        "There are no words to take the first tokens of.",
    ),
    (
        lambda: of.Prompt.from_strings(P, " Paris", m).run(m, lambda a, b: torch.zeros(3)),
        "InputError",
        "Probabilities are of (prompt, layer, vocab), as logit_lens gives them; got (3,).",
    ),
    (
        lambda: of.Prompt(P, {"a": [10**6]}).run(m, of.logit_lens),
        "InputError",
        "Target 'a' has token 1000000, outside of a vocabulary of 742.",
    ),
    (
        lambda: of.run_prompts(m, ["a"], tqdm=None),
        "InputError",
        "prompts=['a']: give a list of Prompts, [Prompt.from_strings(text, targets, model), ...].",
    ),
    (
        lambda: of.run_prompts(m, [of.Prompt.from_strings(P, " Paris", m)], batch_size=0, tqdm=None),
        "InputError",
        "batch_size=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.run_prompts(m, [of.Prompt.from_strings(P, " Paris", m)], get_probs_func=3, tqdm=None),
        "InputError",
        "get_probs_func=3: it is a function from the model and texts to probabilities, such as logit_lens.",
    ),
    (
        lambda: of.run_prompts(m, of.Prompt.from_strings(P, " Paris", m), tqdm=None),
        "InputError",
        "prompts=Prompt(prompt='The capital of France is', target_tokens={'ta: give a list of Prompts, [Promp",
    ),
    (lambda: of.get_first_tokens(3, m), "InputError", "words=3: give several, in a list."),
    (lambda: of.get_first_tokens([3], m), "InputError", "words: 3 is no text."),
    (
        lambda: of.get_first_tokens("a", None),
        "InputError",
        "Words have tokens only with a tokenizer: StandardizedTransformer(model, tokenizer).",
    ),
    (lambda: of.compute_next_token_probs(m, ""), "InputError", "Prompt 0 is empty: '' has no tokens."),
    (lambda: of.logit_difference(1.5, 2), "InputError", "The answer 1.5 is neither a token id nor a text."),
    (
        lambda: of.logit_difference([], 2),
        "InputError",
        "There is no answer: give a token id or a text of one token.",
    ),
    (
        lambda: of.logit_difference(-1, 2, m),
        "InputError",
        "The answer -1 is no token id of a vocabulary of 742.",
    ),
    (lambda: of.logit_difference(-1, 2)(torch.zeros(1, 5)), "InputError", "The answer -1 is no token id."),
    (
        lambda: of.logit_difference(10**6, 2)(torch.zeros(1, 5)),
        "InputError",
        "There is no token 1000000 among logits of 5.",
    ),
    (
        lambda: of.logit_difference([1, 2], 2)(torch.zeros(3, 5)),
        "InputError",
        "2 answers for 3 rows of logits: give one, or one for each.",
    ),
    (
        lambda: of.logit_difference(1, 2)(torch.zeros(5)),
        "InputError",
        "A metric takes logits of (batch, vocab); got (5,).",
    ),
    (lambda: of.logit_difference(None, 2), "InputError", "The answer None is neither a token id nor a text."),
    (
        lambda: of.logit_difference(" Paris", " Rome", m.tokenizer),
        "InputError",
        "model is a TokenizersBackend: methods take a StandardizedTransformer, StandardizedTransformer(model,",
    ),
    (
        lambda: of.probability(" Paris is", m),
        "InputError",
        "The answer ' Paris is' is 2 tokens, ['ĠParis', 'Ġis']: a metric looks at the next token alone. Give ",
    ),
    (
        lambda: of.kl_divergence([1.0, 2.0]),
        "InputError",
        "reference_logits are a tensor of (vocab) or (batch, vocab), with no NaN in it.",
    ),
    (
        lambda: of.kl_divergence(torch.zeros(2, 5))(torch.zeros(3, 5)),
        "InputError",
        "The reference's logits are of (2, 5), the run's of (3, 5): give one for all rows, or one for each.",
    ),
    (
        lambda: of.kl_divergence(torch.zeros(4))(torch.zeros(3, 5)),
        "InputError",
        "The reference's logits are of (4,), the run's of (3, 5): give one for all rows, or one for each.",
    ),
    (
        lambda: of.kl_divergence(torch.full((5,), N))(torch.zeros(3, 5)),
        "InputError",
        "reference_logits are a tensor of (vocab) or (batch, vocab), with no NaN in it.",
    ),
    (
        lambda: ap(metric="logit"),
        "InputError",
        "metric='logit': it is a function from logits of (batch, vocab) to one number a row, such as logit_di",
    ),
    (
        lambda: ap(metric=lambda x: x),
        "InputError",
        "A metric gives one number a row, of shape (1,); this one gave (1, 742).",
    ),
    (
        lambda: ap(metric=None),
        "InputError",
        "metric=None: it is a function from logits of (batch, vocab) to one number a row, such as logit_diffe",
    ),
    (
        lambda: ap(point="layer_output"),
        "InputError",
        "'layer_output' is no standard name of layers: give one of layers_input, layers_output, attentions_in",
    ),
    (lambda: ap(layers=99), "LayerIndexError", "layers_output[99]: the model has 6 layers, 0 to 5."),
    (lambda: ap(layers=[]), "InputError", "layers=[]: give at least one."),
    (
        lambda: ap(layers="all"),
        "InputError",
        "layers='all': it is one layer, or several; they are counted from 0.",
    ),
    (lambda: ap(positions=[99]), "InputError", "positions=[99]: the prompts have 5 tokens."),
    (lambda: ap(positions=[]), "InputError", "positions: give at least one."),
    (
        lambda: ap(positions="last"),
        "InputError",
        "positions='last': give 'each', 'all', or a list of positions.",
    ),
    (
        lambda: ap(point="heads_output", heads=[99]),
        "InputError",
        "heads=[99]: heads_output has 6 heads, 0 to 5.",
    ),
    (
        lambda: ap(heads="each"),
        "InputError",
        "heads='each': layers_output has no axis of heads; heads_output, queries, ... have.",
    ),
    (lambda: ap(point="heads_output", heads=[]), "InputError", "heads: give at least one."),
    (lambda: ap(mode="both"), "InputError", "mode='both': give 'denoising' or 'noising'."),
    (lambda: ap(batch_size=0).effect.shape, "InputError", "batch_size=0: it is a whole number, 1 or more."),
    (lambda: ap(batch_size=-1).effect.shape, "InputError", "batch_size=-1: it is a whole number, 1 or more."),
    (
        lambda: ap(corrupted="Japan is in"),
        "InputError",
        "Patching needs prompts of equal length, position by position; pair 0 has 5 and 3 tokens:",
    ),
    (lambda: ap(clean=[P, Q], corrupted=[Q]), "InputError", "2 clean and 1 corrupted prompts: give pairs."),
    (
        lambda: ap(corrupted=P),
        "InputError",
        "The clean and the corrupted prompt of pair 0 are the same, so that there is nothing to tell apart: g",
    ),
    (lambda: ap(layers=[0]).plot(3), "InputError", "pair=3: one pair was given, and not a list."),
    (
        lambda: pp(sender="mlp[1]"),
        "InputError",
        "'mlp[1]' is none of heads_output[layer][head], attentions_contribution[layer], mixers_contribution[l",
    ),
    (lambda: pp(sender=[]), "InputError", "Give at least one sender and one receiver."),
    (lambda: pp(sender=3), "InputError", "sender=3: give several, in a list."),
    (lambda: pp(receivers=[]), "InputError", "Give at least one sender and one receiver."),
    (
        lambda: pp(receivers="mlps_contribution[0]"),
        "InputError",
        "mlps_contribution[0] comes before mlps_contribution[1] or with it, and hears nothing of it.",
    ),
    (
        lambda: pp(sender="heads_output[1][99]"),
        "InputError",
        "heads_output[1][99]: there are 6 heads, 0 to 5.",
    ),
    (lambda: pp(receivers="queries[3][99]"), "InputError", "queries[3][99]: there are 6 heads, 0 to 5."),
    (
        lambda: pp(sender="mlps_contribution[99]"),
        "LayerIndexError",
        "mlps_contribution[99]: the model has 6 layers, 0 to 5.",
    ),
    (lambda: pp(positions=[99]), "InputError", "positions: pair 0 has 5 tokens; there is no position 99."),
    (lambda: pp(positions=[]).effect, "InputError", "positions: give at least one."),
    (lambda: pp(mode="x"), "InputError", "mode='x': give 'denoising' or 'noising'."),
    (lambda: pp(batch_size=0).effect, "InputError", "batch_size=0: it is a whole number, 1 or more."),
    (
        lambda: pp(metric=3),
        "InputError",
        "metric=3: it is a function from logits of (batch, vocab) to one number a row, such as logit_differen",
    ),
    (
        lambda: (
            pp(
                clean=[P, "Japan is in"],
                corrupted=[Q, "France is in"],
                metric=of.logit_difference(3, 4),
                positions=[-5],
            ).effect
        ),
        "InputError",
        "positions: pair 1 has 3 tokens; there is no position -5.",
    ),
    (
        lambda: ct(subject="Spain"),
        "InputError",
        "subject='Spain' is no part of the prompt 'The capital of France is'.",
    ),
    (lambda: ct(subject=""), "InputError", "subject='' is no part of the prompt 'The capital of France is'."),
    (lambda: ct(subject=[]), "InputError", "subject: give at least one."),
    (lambda: ct(subject=99), "InputError", "subject=[99]: give some positions of the prompt's 5 tokens."),
    (lambda: ct(subject=None), "InputError", "subject=None: give a whole number, or several."),
    (lambda: ct(noise=N).effect, "InputError", "noise=nan: it is a finite number."),
    (
        lambda: ct(noise=0.0).normalized,
        "InputError",
        "The metric is the same in the clean and the corrupted run (0.993998 and 0.993998), so that no effect",
    ),
    (lambda: ct(noise="3"), "InputError", "noise='3': it is a finite number."),
    (lambda: ct(samples=0), "InputError", "samples=0: it is a whole number, 1 or more."),
    (lambda: ct(samples=1.5), "InputError", "samples=1.5: it is a whole number, 1 or more."),
    (lambda: ct(window=0), "InputError", "window=0: it is a whole number, 1 or more."),
    (
        lambda: of.causal_tracing(m, [P, Q], subject=1),
        "InputError",
        "Causal tracing takes one prompt; 2 were given.",
    ),
    (
        lambda: at(P, Q, 3),
        "InputError",
        "metric=3: it is a function from logits of (batch, vocab) to one number a row, such as logit_differen",
    ),
    (
        lambda: at(P, Q, lambda x: x.sum()),
        "InputError",
        "A metric takes logits of (prompt, vocab) and returns one number for each prompt: a tensor of (1,). I",
    ),
    (
        lambda: at(point="x"),
        "InputError",
        "'x' is no standard name of layers: give one of layers_input, layers_output, attentions_input, attent",
    ),
    (lambda: at(layers=[]), "InputError", "layers=[]: give at least one."),
    (
        lambda: at(P, "Japan is in", met),
        "InputError",
        "Clean and corrupted prompts are compared token by token, but have [5] and [3] tokens.",
    ),
    (
        lambda: at([P, Q], [Q], met),
        "InputError",
        "Clean and corrupted prompts are compared token by token, but have [5, 5] and [5] tokens.",
    ),
    (
        lambda: at(qk_fix=True),
        "InputError",
        "qk_fix is for point='queries' and 'keys', not for 'layers_output'.",
    ),
    (
        lambda: at(P, P, met),
        "InputError",
        "The clean and the corrupted prompt of pair 0 are the same, so that there is nothing to tell apart: g",
    ),
    (lambda: ig(steps=0), "InputError", "steps=0: it is a whole number, 1 or more."),
    (lambda: ig(steps=1.5), "InputError", "steps=1.5: it is a whole number, 1 or more."),
    (
        lambda: of.edge_attribution(m, P, Q, metric=met, steps=0),
        "InputError",
        "steps=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.edge_attribution(m, P, Q, metric=met, steps="5"),
        "InputError",
        "steps='5': it is a whole number, 1 or more.",
    ),
    (lambda: edges.kept(-1).sum(), "InputError", "k=-1: it is a whole number, 0 or more."),
    (
        lambda: of.circuit_faithfulness(m, P, Q, metric=met, attribution=edges, sizes=[10**6]),
        "InputError",
        "sizes=[1000000]: 1000000 edges cannot be kept, there are 2188 (sizes: 0 to 2188).",
    ),
    (
        lambda: of.circuit_faithfulness(m, P, Q, metric=met, attribution=edges, sizes=[]),
        "InputError",
        "sizes: give at least one.",
    ),
    (
        lambda: of.circuit_faithfulness(m, P, Q, metric=met, attribution=3, sizes=[1]),
        "InputError",
        "attribution is an int: give what edge_attribution gave.",
    ),
    (
        lambda: of.direct_logit_attribution(m, P, answer=" Paris", by="x"),
        "InputError",
        "by='x': take 'layer', 'component' or 'head'.",
    ),
    (
        lambda: of.direct_logit_attribution(m, P, answer=" Paris", position=99),
        "InputError",
        "positions: prompt 0 has 5 tokens, at 0 to 4 (or -5 to -1); there is no position 99.",
    ),
    (
        lambda: of.direct_logit_attribution(m, P, answer=" Paris", position="last"),
        "InputError",
        "position='last': it is a whole number.",
    ),
    (
        lambda: of.direct_logit_attribution(m, P, answer=" Paris is"),
        "InputError",
        "The answer ' Paris is' is 2 tokens, ['ĠParis', 'Ġis']: a metric looks at the next token alone. Give ",
    ),
    (
        lambda: of.direct_logit_attribution(m, P, answer=10**6),
        "InputError",
        "The answer 1000000 is no token id of a vocabulary of 742.",
    ),
    (
        lambda: of.direct_logit_attribution(m, P, answer=None),
        "InputError",
        "The answer None is neither a token id nor a text.",
    ),
    (
        lambda: of.direct_logit_attribution(m, P, answer=[1, 2]),
        "InputError",
        "2 answers for 1 row of logits: give one, or one for each.",
    ),
    (
        lambda: of.get_token_activations(m, P, layers=[99]),
        "LayerIndexError",
        "layers_output[99]: the model has 6 layers, 0 to 5.",
    ),
    (lambda: of.get_token_activations(m, P, layers=[]), "InputError", "layers=[]: give at least one."),
    (
        lambda: of.get_token_activations(m, P, layers="all"),
        "InputError",
        "layers='all': it is one layer, or several; they are counted from 0.",
    ),
    (
        lambda: of.get_token_activations(m, P, idx=99),
        "InputError",
        "positions: prompt 0 has 5 tokens, at 0 to 4 (or -5 to -1); there is no position 99.",
    ),
    (lambda: of.get_token_activations(m, P, idx="last"), "InputError", "idx='last': it is a whole number."),
    (lambda: of.get_token_activations(m, P, idx=False), "InputError", "idx=False: it is a whole number."),
    (
        lambda: of.get_token_activations(m, P, layers=None, get_activations=3),
        "InputError",
        "get_activations=3: it is a function from the model and a layer to a value of (batch, seq, hidden).",
    ),
    (
        lambda: of.get_token_activations(m, P, layers=None, get_activations=lambda a, b: 3),
        "InputError",
        "get_activations gave an int of layer 0, and no tensor of (batch, seq, ...).",
    ),
    (
        lambda: of.get_token_activations(m),
        "InputError",
        "There are no prompts: give some, or a trace that is open (tracer=...).",
    ),
    (
        lambda: of.collect_token_activations_batched(m, [P], batch_size=0),
        "InputError",
        "batch_size=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.collect_token_activations_batched(m, [], batch_size=2),
        "InputError",
        "There are no prompts to collect activations of.",
    ),
    (
        lambda: of.collect_activations(m, [P], points="x", progress=False),
        "InputError",
        "'x' is no name with values by position; there are layers_input",
    ),
    (lambda: of.collect_activations(m, [P], points={}, progress=False), "InputError", "points={} names no layer."),
    (
        lambda: of.collect_activations(m, [P], points=3, progress=False),
        "InputError",
        "points=3: give several, in a list.",
    ),
    (
        lambda: of.collect_activations(m, [P], points={"layers_output": 99}, progress=False),
        "LayerIndexError",
        "layers_output[99]: the model has 6 layers, 0 to 5.",
    ),
    (
        lambda: of.collect_activations(m, [P], points={"layers_output": "x"}, progress=False),
        "LayerIndexError",
        "layers_output['x']: layers are counted, 0 to 5, or sliced.",
    ),
    (
        lambda: of.collect_activations(m, None, progress=False),
        "InputError",
        "prompts=None: give several, in a list.",
    ),
    (
        lambda: of.collect_activations(m, 3, progress=False),
        "InputError",
        "prompts=3: give several, in a list.",
    ),
    (
        lambda: of.collect_activations(m, [3, 4], progress=False),
        "InputError",
        "prompts[0] is 3: for one prompt's token ids, give a list of it, [ids].",
    ),
    (
        lambda: of.collect_activations(m, [], progress=False),
        "InputError",
        "There are no prompts to collect activations of.",
    ),
    (
        lambda: of.collect_activations(m, [P], positions="x", progress=False),
        "InputError",
        "positions='x': give 'last', 'all', indices, or a function from ids to indices.",
    ),
    (
        lambda: of.collect_activations(m, [P], positions=99, progress=False),
        "InputError",
        "prompts[0] has 5 tokens: there is no position 99.",
    ),
    (
        lambda: of.collect_activations(m, [P], positions=1.5, progress=False),
        "InputError",
        "positions=1.5: give a whole number, or several.",
    ),
    (
        lambda: of.collect_activations(m, [P], positions=[1.5], progress=False),
        "InputError",
        "positions=[1.5]: give a whole number, or several.",
    ),
    (
        lambda: of.collect_activations(m, [P], positions=lambda i: None, progress=False),
        "InputError",
        "positions=None: give a whole number, or several.",
    ),
    (
        lambda: of.collect_activations(m, [P], batch_size=0, progress=False),
        "InputError",
        "batch_size=0: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.collect_activations(m, [P], batch_size=-2, progress=False),
        "InputError",
        "batch_size=-2: it is a whole number, 1 or more.",
    ),
    (
        lambda: of.collect_activations(m, [P], dtype="float16", progress=False),
        "InputError",
        "dtype='float16': give a torch.dtype, such as torch.float32.",
    ),
    (lambda: of.collect_activations(m, [P], device="gpu", progress=False), "InputError", "device='gpu': E"),
    (
        lambda: of.SteeringVector.from_pairs(m, []),
        "InputError",
        "There are no prompts to collect activations of.",
    ),
    (
        lambda: of.SteeringVector.from_pairs(m, ["ab", "cd"]),
        "InputError",
        "pairs[0] is 'ab': give pairs of prompts, [(positive, negative), ...]. Of prompts that are not in pai",
    ),
    (
        lambda: of.SteeringVector.from_pairs(m, [(P, Q, P)]),
        "InputError",
        "pairs[0] is ('The capital of France is', 'The capital of Japan is', 'The: give pairs of prompts, [(p",
    ),
    (lambda: of.SteeringVector.from_pairs(m, 3), "InputError", "pairs=3: give several, in a list."),
    (lambda: of.SteeringVector.from_pairs(m, None), "InputError", "pairs=None: give several, in a list."),
    (
        lambda: of.SteeringVector.from_prompts(m, [P], [Q], method="x", progress=False),
        "InputError",
        "There is no method 'x'; there are mean_difference, pca, logistic_probe.",
    ),
    (
        lambda: of.SteeringVector.from_prompts(m, [P], [P], progress=False),
        "InputError",
        "layers_output[0]: the positive and the negative examples do not differ there, so there is no directi",
    ),
    (
        lambda: of.SteeringVector.from_prompts(m, [P, Q], [Q], method="pca", progress=False),
        "InputError",
        "pca takes pairs; there are 2 positive and 1 negative examples.",
    ),
    (
        lambda: of.SteeringVector.from_prompts(m, [P], [Q], point="queries", progress=False),
        "InputError",
        "'queries' is no name with values by position; there are layers_input",
    ),
    (
        lambda: of.SteeringVector.from_prompts(m, [P], [Q], point="neurons", progress=False),
        "InputError",
        "neurons is of (384,) at each position, the residual stream of (96): steer at another point.",
    ),
    (
        lambda: of.SteeringVector.from_prompts(m, [P], [Q], layers=[99], progress=False),
        "LayerIndexError",
        "layers_output[99]: the model has 6 layers, 0 to 5.",
    ),
    (
        lambda: of.SteeringVector.from_prompts(m, [P], [Q], layers=[], progress=False),
        "InputError",
        "layers=[]: give at least one.",
    ),
    (
        lambda: of.SteeringVector({}, "layers_output", "gpt2", "x").apply(m),
        "InputError",
        "This vector has no direction for any layer.",
    ),
    (
        lambda: sv.apply(m),
        "OutsideTraceError",
        "steering: values exist only while the model runs. Ask for them inside `with model.trace(...):`, in t",
    ),
    (
        lambda: t(lambda: sv.apply(m, positions=99)),
        "InputError",
        "positions: prompt 0 has 5 tokens, at 0 to 4 (or -5 to -1); there is no position 99.",
    ),
    (
        lambda: t(lambda: sv.apply(m, positions="last")),
        "InputError",
        "positions='last': give a whole number, or several.",
    ),
    (lambda: t(lambda: sv.apply(m, "2")), "InputError", "factor='2': it is a finite number."),
    (lambda: t(lambda: sv.apply(m, N)), "InputError", "factor=nan: it is a finite number."),
    (
        lambda: t(lambda: of.SteeringVector({99: torch.ones(H)}, "layers_output", "", "").apply(m)),
        "LayerIndexError",
        "layers_output[99]: the model has 6 layers, 0 to 5.",
    ),
    (
        lambda: t(lambda: of.SteeringVector({1: torch.ones(H)}, "x", "", "").apply(m)),
        "InputError",
        "'x' is no standard name of layers: give one of layers_input, layers_output, attentions_input, attent",
    ),
    (
        lambda: t(lambda: of.SteeringVector({1: torch.ones(3)}, "layers_output", "", "").apply(m)),
        "InputError",
        "The vector is of width 3 (from a ), the model's residual stream of width 96 (gpt2).",
    ),
    (
        lambda: t(lambda: sv.apply(m, from_step="1")),
        "InputError",
        "from_step='1': it is a whole number, 0 or more.",
    ),
    (lambda: sv * "a", "InputError", "factor='a': it is a finite number."),
    (
        lambda: of.SteeringVector({1: torch.zeros(H)}, "layers_output", "", "").normalized().directions,
        "InputError",
        "The direction of layer 1 is zero or not finite, and has no length to be made 1.",
    ),
    (lambda: sv.projections(m, [P, Q]), "InputError", "prompts[0] is several prompts: give each by itself."),
    (
        lambda: t(lambda: of.ablate_direction(m, torch.zeros(H))),
        "InputError",
        "The direction is zero.",
    ),
    (
        lambda: t(lambda: of.ablate_direction(m, nanv)),
        "InputError",
        "The direction has entries that are NaN or infinite.",
    ),
    (
        lambda: t(lambda: of.ablate_direction(m, torch.ones(3))),
        "InputError",
        "The direction is of shape (3,), the model's residual stream of width 96.",
    ),
    (
        lambda: t(lambda: of.ablate_direction(m, torch.ones(H), layers=99)),
        "LayerIndexError",
        "layers_input[99]: the model has 6 layers, 0 to 5.",
    ),
    (
        lambda: t(lambda: of.ablate_direction(m, torch.ones(H), layers=[])),
        "InputError",
        "layers=[]: give at least one.",
    ),
    (
        lambda: t(lambda: of.ablate_direction(m, torch.ones(H), points=["x"])),
        "InputError",
        "'x' is no standard name of layers: give one of layers_input, layers_output, attentions_input, attent",
    ),
    (
        lambda: t(lambda: of.ablate_direction(m, torch.ones(H), points=["queries"])),
        "InputError",
        "queries[0] is of (1, 6, 5, 16), and no point of (batch, seq, 96).",
    ),
    (
        lambda: of.ablate_direction(m, torch.ones(H)),
        "OutsideTraceError",
        "layers_input: values exist only while the model runs. Ask for them inside `with model.trace(...):`, ",
    ),
    (
        lambda: t(lambda: m.steer(1, nanv)),
        "InputError",
        "The steering vector has entries that are NaN or infinite.",
    ),
    (
        lambda: t(lambda: m.steer(1, "abc")),
        "InputError",
        "The steering vector is str, and no tensor: new(): invalid data type 'str'",
    ),
    (
        lambda: t(lambda: m.steer("all", torch.ones(H))),
        "InputError",
        "layers='all': steer adds a vector to the output of layers, by their numbers: steer(3, vector), steer([3, 5], vector).",
    ),
    (lambda: t(lambda: m.steer([], torch.ones(H))), "InputError", "layers: give at least one to steer."),
    (lambda: t(lambda: m.steer(1, torch.ones(H), "2")), "InputError", "factor='2': it is a number."),
    (
        lambda: t(lambda: m.steer(1, torch.ones(H), 1.0, 1.5)),
        "InputError",
        "batch_index=None, token_positions=1.5 and a vector of (96,) do not fit a stream of (1, 5, 96): "
        "positions=1.5: give a whole number, or several.",
    ),
    (
        lambda: t(lambda: m.steer(1, torch.ones(H), 1.0, batch_index=9)),
        "InputError",
        "batch_index=9, token_positions=None and a vector of (96,) do not fit a stream of (1, 5, 96): index 9",
    ),
    (
        lambda: t(lambda: m.steer(1, torch.ones(H), 1.0, batch_index="a")),
        "InputError",
        "batch_index='a', token_positions=None and a vector of (96,) do not fit a stream of (1, 5, 96): new()",
    ),
    (
        lambda: m.get_topk_closest_tokens(torch.ones(H), 0),
        "InputError",
        "k=0: the model has 742 tokens; give how many of them.",
    ),
    (
        lambda: m.get_topk_closest_tokens(torch.ones(H), 10**6),
        "InputError",
        "k=1000000: the model has 742 tokens; give how many of them.",
    ),
    (
        lambda: m.get_topk_closest_tokens(torch.ones(1, 1, H)),
        "InputError",
        "hidden_state is (hidden) or (rows, hidden); got (1, 1, 96).",
    ),
    (
        lambda: m.get_topk_closest_tokens([1.0] * H),
        "InputError",
        "Hidden states are a tensor of floating point numbers, (..., 96); got list.",
    ),
    (
        lambda: m.project_on_vocab([1.0] * H),
        "InputError",
        "Hidden states are a tensor of floating point numbers, (..., 96); got list.",
    ),
    (
        lambda: m.project_on_vocab(torch.ones(H, dtype=torch.long)),
        "InputError",
        "Hidden states are a tensor of floating point numbers, (..., 96); got torch.int64.",
    ),
    (
        lambda: t(lambda: m.skip_layers(0, 99)),
        "LayerIndexError",
        "layers_input[99]: the model has 6 layers, 0 to 5.",
    ),
    (
        lambda: t(lambda: m.skip_layer("a")),
        "LayerIndexError",
        "skip_layer('a'): give the number of a layer, 0 to 5.",
    ),
    (
        lambda: t(lambda: m.skip_layer(1, 3)),
        "AssignmentError",
        "skip_with of layer 1 is a tensor; an int was assigned.",
    ),
    (lambda: m.run_with_cache(P, 5), "InputError", "names=5: give one standard name or several, or None for all."),
    (lambda: m.run_with_cache(P, layers="all"), "InputError", "layers='all': give a whole number, or several."),
    (lambda: m.run_with_cache(P, "keys", layers=1.5), "InputError", "layers=1.5: give a whole number, or several."),
    (lambda: m.run_with_cache(P, dtype="fp16"), "InputError", "dtype='fp16': give a torch.dtype"),
    (lambda: m.run_with_cache(P, positions="last"), "InputError", "positions='last': give a whole number, or several."),
    (
        lambda: m.run_with_cache(P)[1].logit_attribution(1, by=3),
        "InputError",
        "by=3: take 'layer', 'component' or 'head'.",
    ),
    (lambda: m.trace(P, prepend_bos="no"), "InputError", "prepend_bos='no': it is True, False, or None for what"),
    (lambda: m.test_prompt(P, 5), "InputError", "prompt='The capital of France is', answer=5: both are text."),
    (
        lambda: of.logit_lens(m, P, positions=torch.tensor([True, False, True, False, False])),
        "InputError",
        "positions=tensor([ True, False,  True, False, False]): that is a mask, and positions are whole numbers: give",
    ),
    (
        lambda: of.head_ablation(m, P, metric=met, heads=[True, False], progress=False),
        "InputError",
        "heads=[True, False]: that is a mask, and heads are whole numbers: give where it is true, mask.nonzero().flat",
    ),
    (
        lambda: of.head_ablation(m, P, metric=met, layers=[True, False], progress=False),
        "InputError",
        "layers=[True, False]: it is one layer, or several; they are counted from 0.",
    ),
]


def main() -> None:
    wrong = []
    for ask, kind, text in ROWS:
        place = f"line {ask.__code__.co_firstlineno}"
        try:
            ask()
        except UsageError as error:
            ours = [
                frame for frame in traceback.extract_tb(error.__traceback__) if "/nnatomy/methods/" in frame.filename
            ]
            if type(error).__name__ != kind or not str(error).startswith(text):
                wrong.append(f"{place}: {type(error).__name__}: {error}, and not {kind}: {text}")
            elif ours[:1] and ours[0].filename.endswith("/arguments.py") and kind == "InputError" and len(ours) > 1:
                wrong.append(f"{place}: {error}: it is said {len(ours)} frames of ours below the user's line")
        except Exception as error:
            wrong.append(f"{place}: {type(error).__name__}: {error}, and not {kind}: {text}")
        else:
            wrong.append(f"{place}: nothing was raised, and not {kind}: {text}")
    assert len(ROWS) > 200
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    main()
