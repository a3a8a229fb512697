"""Names that other libraries have for what has another name here: what is said to who asks for one."""

from __future__ import annotations

#: By name, what to write here.
ELSEWHERE = {
    # TransformerLens
    "blocks": "layers_output[i] and kin in a trace, or the view layers[i]",
    "cfg": "num_layers, num_heads, hidden_size, vocab_size; the model's own is config",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "d_model": "hidden_size",
    "d_vocab": "vocab_size",
    "embed": "token_embeddings in a trace, W_E for the weight",
    "unembed": "project_on_vocab(hidden), W_U for the weight",
    "run_with_hooks": "a trace that assigns: with model.trace(prompt): model.layers_output[5] = ...",
    "add_hook": "model.edit(function), or model.attach(point, module)",
    "add_perma_hook": "model.edit(function), or model.attach(point, module)",
    "reset_hooks": "model.without_edits()",
    "hooks": "model.edit(function)",
    "hook_dict": "docs/from_transformer_lens.md, a table of names",
    "to_single_token": "model.to_tokens(text)",
    "fold_layer_norm": "model.W_Q.folded(layer) and kin, which are new tensors",
    "FactoredMatrix": "model.QK(layer), model.OV(layer)",
    # nnsight and nnterp
    "generator": "tracer.result in a generation",
    "dispatch": "nothing: the model is loaded",
    "clear_edits": "model.without_edits()",
    "named_modules": "model.paths()",
    "_model": "model.hf_model",
    "project_on_vocabulary": "model.project_on_vocab(hidden)",
}


def said_of(name: str) -> str:
    """A sentence on what stands for that name here; "" if it is nobody's."""
    return f" What other libraries call {name!r} is here: {ELSEWHERE[name]}." if name in ELSEWHERE else ""
